"""Answers that a model draws: which ones, where they end, and that nothing else decides them."""

import functools
import itertools

import pytest
import torch
import transformers

import data
import train_dpo
from helpers import PAIRS, build_model, build_tokenizer, normal, random_pair
from support import sampler
from support.checks import check_model
from support.config import Config
from support.kv_cache import KVCache
from support.sampler import Answer, Sampler

LENGTHS = [9, 2, 23, 1, 14, 5]
PROMPTS = [list(random_pair(n, 1, 1, seed=n).prompt_ids) for n in LENGTHS]
OFTEN = list(range(10, 70))  # of 300 tokens: an answer that ends at any of these is a short one
IM_START, IM_END, PAD = 3, 4, 2


@functools.cache
def policy_of(family="llama", ends=(), longest=24, **changes):
    """A tiny random model of a family as a policy."""
    model = build_model(family, **changes).eval()
    model.generation_config.eos_token_id = list(ends) or None
    return looked_at(model, [*PAIRS, random_pair(longest - 2, 2, 1)])


def looked_at(model, pairs):
    """A model as a policy, checked as before a run."""
    policy = train_dpo.AnswerLogps(model)
    check_model(policy, pairs, data.make_row, Config())
    return policy


def sampler_of(policy, most=12, end_of_turn=IM_END, **settings):
    return Sampler(policy, build_tokenizer(), end_of_turn, most, **settings)


def drawn_by(found, prompts, count=3, batch=None, seed="seed"):
    """Token ids of the answers to each prompt of a batch, by default of all."""
    batch = range(len(prompts)) if batch is None else batch
    answers = found.draw(prompts, list(batch), count, seed)
    return [[answer.ids for answer in part] for part in answers]


def chi_square(counts, expected):
    """Pearson's statistic, standardised: about normal where the counts have that distribution."""
    likely = expected > 5
    rest = (counts[~likely].sum(), expected[~likely].sum())
    squares = ((counts - expected) ** 2 / expected)[likely].sum()
    squares += (rest[0] - rest[1]) ** 2 / rest[1] if rest[1] > 0 else 0
    freedom = likely.sum() - 1
    return ((squares - freedom) / (2 * freedom) ** 0.5).item()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_an_answer_is_the_same_whatever_prompts_share_its_batch_or_finish_earlier(family):
    found = sampler_of(policy_of(family, ends=tuple(OFTEN)))
    together = drawn_by(found, PROMPTS)
    lengths = {len(ids) for answers in together for ids in answers}
    assert len(lengths) > 5  # some answers leave the batch, in several steps
    alone = [drawn_by(found, PROMPTS, batch=[position])[0] for position in range(len(PROMPTS))]
    assert alone == together
    backwards = drawn_by(found, PROMPTS, batch=reversed(range(len(PROMPTS))))
    assert backwards[::-1] == together


def test_answers_are_other_ones_for_each_prompt_sample_and_seed():
    found = sampler_of(policy_of())
    answers = drawn_by(found, [PROMPTS[0]] * 2) + drawn_by(found, [PROMPTS[0]], seed="other")
    assert len(set(map(tuple, itertools.chain.from_iterable(answers)))) == 9


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "mistral"])
def test_greedy_answers_are_those_of_transformers_generate(family):
    policy = policy_of(family, ends=(*OFTEN[:9],), sliding_window=None)
    assert policy.takes_kv_cache
    found = sampler_of(policy, 20, temperature=0)
    settings = transformers.GenerationConfig(
        do_sample=False, max_new_tokens=20, eos_token_id=found.stops, pad_token_id=PAD
    )
    for prompt, (answer,) in zip(PROMPTS, drawn_by(found, PROMPTS, count=1), strict=True):
        ids = torch.tensor([prompt])
        mask = torch.ones_like(ids)
        expected = policy.model.generate(ids, settings, attention_mask=mask)[0, len(prompt) :]
        assert answer == expected.tolist()


@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral"])
def test_logits_with_a_cache_are_those_of_the_plain_forward_at_each_token(family):
    policy, count, most = policy_of(family, sliding_window=None), 2, 6
    ids, lengths = sampler._pad_right(PROMPTS)
    cache = KVCache(count)
    positions = torch.arange(ids.shape[1]).expand_as(ids)
    with torch.no_grad():
        logits = policy.next_logits(ids, positions, cache, lengths - 1).repeat_interleave(count, 0)
        answers = torch.randint(
            300, (len(logits), most), generator=torch.Generator().manual_seed(0)
        )
        place = lengths.repeat_interleave(count)
        going = torch.arange(len(logits))
        for step in range(most):
            for row, found in zip(going.tolist(), logits, strict=True):
                sequence = PROMPTS[row // count] + answers[row, :step].tolist()
                own = policy.model(input_ids=torch.tensor([sequence]), use_cache=False).logits[
                    0, -1
                ]
                assert (found - own).abs().max() < 1e-5
            if step in (2, 4):  # answers that have ended leave, the longest prompt's among them
                keep = torch.tensor([0, 1, 3, 6, 7])[: 5 - step // 2]
                cache.keep(keep)
                going, place = going[keep], place[keep]
            cache.next_token(place)
            token = answers[going, step]
            first = torch.zeros_like(token)
            logits = policy.next_logits(token[:, None], place[:, None], cache, first)
            place = place + 1


@pytest.mark.parametrize("vocabulary", [12, 256, 300, 1000])
@pytest.mark.parametrize("temperature, min_p", [(1.0, 0.0), (0.5, 0.0), (2.0, 0.0), (1.0, 0.3)])
def test_a_token_is_the_inverse_of_the_distribution(vocabulary, temperature, min_p):
    found = sampler_of(policy_of(), temperature=temperature, min_p=min_p)
    logits = 2 * normal(vocabulary, seed=vocabulary)
    logits[[0, 5, vocabulary - 1]] = -torch.inf
    weights = (logits / temperature).exp()
    weights[weights < min_p * weights.max()] = 0
    sums = weights.cumsum(0) / weights.sum()
    uniform = torch.linspace(0, 1 - 2**-24, 20_001, dtype=torch.float64)
    picked = found._pick(logits.float().expand(len(uniform), -1), uniform.float())
    edges = torch.cat((torch.zeros(1), sums))
    slack = 3e-6  # float32 sums
    assert (uniform >= edges[picked] - slack).all() and (uniform <= edges[picked + 1] + slack).all()
    likely = weights / weights.sum() > 1e-4
    assert set(picked.tolist()) >= set(likely.nonzero().flatten().tolist())
    assert (weights[picked] > 0).all()


def test_tokens_of_probability_0_are_never_drawn_at_any_edge():
    found = sampler_of(policy_of())
    draw = torch.Generator().manual_seed(0)
    for _ in range(8):
        logits = 8 * torch.randn(2000, 700, generator=draw)
        impossible = torch.rand(2000, 700, generator=draw) < 0.9
        impossible[:, 0] = True
        impossible[:, 300] = False
        logits[impossible] = -torch.inf
        weights = (logits - logits.amax(1, keepdim=True)).exp()
        # where a block of the vocabulary begins, within rounding
        sums = weights.double().cumsum(1)
        edge = (sums[:, 255] / sums[:, -1]).float()
        steps = torch.randint(-3, 4, (2000,), generator=draw) * 2.0**-24
        picked = found._pick(logits, (edge + steps).clamp(0, 1 - 2**-24))
        assert (weights.gather(1, picked[:, None]) > 0).all()


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_answers_have_the_models_own_distribution(cached, temperature, monkeypatch):
    policy = policy_of()
    monkeypatch.setattr(policy, "takes_kv_cache", cached)
    found = sampler_of(policy, 2, temperature=temperature)
    found.stops, prompt, count = [IM_END], PROMPTS[0], 10_000
    with torch.no_grad():
        pairs = torch.tensor([[*prompt, token] for token in range(300)])
        logits = policy.model(input_ids=pairs, use_cache=False).logits / temperature
    first, second = logits[0, -2].softmax(0), logits[:, -1].softmax(1)
    seen = torch.zeros(300, 300)
    for ids in drawn_by(found, [prompt], count)[0]:
        seen[ids[0], ids[1] if len(ids) > 1 else 0] += 1
    assert abs(chi_square(seen.sum(1), count * first)) < 4
    second[IM_END] = torch.eye(300)[0]  # nothing follows it
    seen, expected = (table.view(10, 30, 10, 30) for table in (seen, first[:, None] * second))
    assert abs(chi_square(seen.sum((1, 3)).flatten(), count * expected.sum((1, 3)).flatten())) < 4


@pytest.fixture
def spoken(monkeypatch):
    """A sampler of a policy that says these tokens one after the other, whatever it is asked."""

    def prepared(tokens, most=6, cached=True, ends=(), **changes):
        policy = policy_of(ends=ends, **changes)
        said = iter(tokens)
        monkeypatch.setattr(policy, "takes_kv_cache", cached)
        found = sampler_of(policy, most)
        monkeypatch.setattr(
            found, "_pick", lambda logits, _: torch.full((len(logits),), next(said))
        )
        return found

    return prepared


@pytest.mark.parametrize(
    "tokens, ended",
    [
        ([50, 51, IM_END, 52, 53, 54], True),  # the template's end of turn
        ([50, 51, 7, 52, 53, 54], True),  # the model's own end
        ([50, 51, IM_START, 52, 53, 54], False),  # a turn of someone else's
        ([50, 51, PAD, 52, 53, 54], False),
        ([50, 51, 1, 52, 53, 54], False),  # a control token without a role in the tokenizer
    ],
)
def test_an_answer_ends_at_an_end_of_turn_and_is_cut_at_any_other_control_token(
    spoken, tokens, ended
):
    (answer,) = spoken(tokens, ends=(7,)).draw([PROMPTS[0]], [0], 1, "")[0]
    assert answer == Answer(tokens[:3], ended)


def test_an_answer_is_cut_at_max_new_tokens_and_may_end_with_the_last(spoken):
    (answer,) = spoken([50] * 6).draw([PROMPTS[0]], [0], 1, "")[0]
    assert answer == Answer([50] * 6, False)
    (answer,) = spoken([50] * 5 + [IM_END]).draw([PROMPTS[0]], [0], 1, "")[0]
    assert answer == Answer([50] * 5 + [IM_END], True)


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("family, kept_share", [("llama", 0.8), ("gpt2", 0.8), ("gpt2", 0)])
def test_an_answer_is_cut_at_the_models_positions_and_others_of_its_batch_are_not(
    family, kept_share, cached, monkeypatch
):
    monkeypatch.setattr(sampler, "KEPT_SHARE", kept_share)  # 0: all stay in the batch to its end
    policy = policy_of(family, max_position_embeddings=26)
    monkeypatch.setattr(policy, "takes_kv_cache", cached)
    found = sampler_of(policy)
    answers = drawn_by(found, PROMPTS)
    cut = 0
    for length, (ids, *_) in zip(LENGTHS, answers, strict=True):
        room = min(12, 26 - length)
        assert len(ids) == room or ids[-1] in found.stops and len(ids) < room
        cut += len(ids) == room < 12
    assert cut
    assert drawn_by(found, PROMPTS, batch=[0, 1]) == answers[:2]


@pytest.mark.parametrize("temperature", [0, 1.0])
@pytest.mark.parametrize("cached", [True, False])
def test_the_models_own_generation_settings_do_not_matter(temperature, cached, monkeypatch):
    policy = policy_of(seed=3)
    monkeypatch.setattr(policy, "takes_kv_cache", cached)
    found = sampler_of(policy, 16, temperature=temperature)
    expected = drawn_by(found, PROMPTS[:2])
    own = transformers.GenerationConfig(
        do_sample=True,
        repetition_penalty=5.0,
        temperature=0.1,
        top_k=1,
        top_p=0.1,
        no_repeat_ngram_size=1,
        suppress_tokens=list(range(100, 300)),
        max_length=3,
        num_beams=2,
    )
    monkeypatch.setattr(policy.model, "generation_config", own)
    assert drawn_by(found, PROMPTS[:2]) == expected
    assert policy.model.generation_config is own


def test_a_window_shorter_than_prompt_and_answer_is_left_to_generate_with_one_line(capsys):
    policy = policy_of("mistral", sliding_window=26)
    assert policy.shared and policy.takes_kv_cache
    found = sampler_of(policy, 20, temperature=0)
    said = "Answers are drawn by transformers' generate, a prompt at a time"
    capsys.readouterr()
    answers = drawn_by(found, PROMPTS, count=1)
    drawn_by(found, PROMPTS, count=1)
    assert capsys.readouterr().out.count(said) == 1
    with torch.no_grad():
        for prompt, (answer,) in zip(PROMPTS, answers, strict=True):
            policy.share_prompts(False)
            ids = list(prompt)
            while len(ids) < len(prompt) + len(answer):
                logits = policy.model(input_ids=torch.tensor([ids]), use_cache=False).logits
                ids.append(logits[0, -1].argmax().item())
            policy.share_prompts(True)
            assert ids[len(prompt) :] == answer
    drawn_by(sampler_of(policy, 3), PROMPTS, count=1)
    assert said not in capsys.readouterr().out


def test_a_model_without_attention_is_drawn_by_generate(capsys):
    sizes = {"state_size": 4, "conv_kernel": 4, "expand": 2, "intermediate_size": 64}
    policy = policy_of("mamba", **sizes)
    for name in ("num_attention_heads", "num_key_value_heads"):  # no names of this family
        if hasattr(policy.model.config, name):
            delattr(policy.model.config, name)
    found = sampler_of(policy)
    (batch,) = found.batches(PROMPTS[:2], 3)
    capsys.readouterr()
    assert sorted(batch) == [0, 1] and len(drawn_by(found, PROMPTS[:2])) == 2
    assert "drawn by transformers' generate" in capsys.readouterr().out


def test_batches_hold_each_prompt_once_short_ones_first_within_memory(monkeypatch):
    found = sampler_of(policy_of())
    assert found.batches(PROMPTS, 4) == [[3, 1, 5, 0, 4, 2]]
    monkeypatch.setattr(sampler, "ANSWERS_AT_ONCE", 8)
    assert found.batches(PROMPTS, 4) == [[3, 1], [5, 0], [4, 2]]
    assert found.batches(PROMPTS, 9) == [[3], [1], [5], [0], [4], [2]]  # one prompt in any case
    monkeypatch.setattr(sampler, "ANSWERS_AT_ONCE", 10**9)
    # 2 layers of 2 heads of 8 numbers, keys and values, float32, for each token
    a_token = 2 * 2 * 8 * 2 * 4
    monkeypatch.setattr(sampler, "BYTES_AT_ONCE", 4 * 2 * (14 + 12) * a_token)
    assert found.batches(PROMPTS, 4) == [[3, 1, 5], [0, 4], [2]]


def test_numbers_that_are_not_finite_stop_sampling_with_advice(monkeypatch):
    for cached in (True, False):
        policy = looked_at(build_model("llama").eval(), PAIRS)
        policy.takes_kv_cache = cached
        with torch.no_grad():
            policy.model.get_output_embeddings().weight[7] = torch.nan
        with pytest.raises(FloatingPointError, match="not finite"):
            drawn_by(sampler_of(policy), PROMPTS)


def test_the_text_of_an_answer_has_no_spaces_around_it_and_no_control_tokens():
    tokenizer = build_tokenizer()
    ids = tokenizer(" \nthe answer \n", add_special_tokens=False).input_ids
    told = sampler_of(policy_of()).tell(Answer([*ids, IM_END], True))
    assert told == ("the answer", True, len(ids) + 1)
