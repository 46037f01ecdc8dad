"""What is asked of model and pairs before a run trains: that the method is right for them."""

import math

import torch

from support.attention import window_of
from support.errors import InputError, first_line
from support.kv_cache import check_cache
from support.processes import say


def check_tokens(model, pairs):
    """Refuse token ids that the model has no embedding for; warn beyond its positions.

    pairs   list of data.Pair
    raises  InputError
    """
    largest = 0
    longest = 0
    for pair in pairs:
        largest = max(largest, *pair.prompt_ids, *pair.chosen_ids, *pair.rejected_ids)
        longest = max(longest, pair.length)
    embeddings = model.get_input_embeddings().weight.shape[0]
    if largest >= embeddings:
        raise InputError(
            f"the tokenizer gives token id {largest}, but the model has {embeddings} embeddings: "
            "model and tokenizer do not belong together"
        )
    positions = _positions(model)
    if positions and longest > positions:
        say(
            f"Warning: the longest sequence has {longest} tokens, more than the model's "
            f"max_position_embeddings of {positions}. Set max_length={positions}, and a smaller "
            "max_prompt_length"
        )


def _positions(model):
    """How many positions the model's config says it has, or None."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


@torch.no_grad()
def check_causal(model, pair, tolerance=1e-4):
    """Refuse a model in which a token sees the tokens after it, as in BERT, or that gives nan.

    Changes the last token of a sequence, and asks that all logits before it stay: they may change
    by `tolerance` times what the last token's own logits do.

    raises  InputError
    """
    ids = torch.tensor([pair.prompt_ids + pair.chosen_ids])[:, -64:]  # few show it too
    changed = ids.clone()
    changed[0, -1] = (ids[0, -1] + 1) % model.get_input_embeddings().weight.shape[0]
    before = model(input_ids=ids, use_cache=False).logits[0].float()
    after = model(input_ids=changed, use_cache=False).logits[0].float()
    if not before.isfinite().all():
        raise InputError(
            "the model's predictions are not finite before any training: its weights are damaged, "
            "or hold nan. Give the model's files anew"
        )
    *earlier, last = (before - after).abs().amax(1).tolist()
    if not max(earlier) <= tolerance * last:
        raise InputError(
            f"{type(model).__name__} is no causal language model: its predictions change with a "
            "token that comes after them. Give a model that generates text from left to right"
        )


def tell_first_loss(config):
    """Say so where the first loss is not the one by which a run is known as right."""
    reasons = []
    if config.loss != "sigmoid":
        reasons.append(f"at a margin of 0 the loss {config.loss} is another")
    if config.nll_weight:
        reasons.append("nll_weight adds the chosen answers' negative log-likelihood (nll/chosen)")
    if config.reference_model:
        reasons.append("reference_model is not the policy, so the margins do not begin at 0")
    if reasons:
        say(f"The first loss is not ln 2: {'; '.join(reasons)}")


def check_noise(policy, row):
    """Say so where train mode adds noise of the model's own, which the method has no use for."""
    with torch.no_grad():
        calm = policy(row)
        policy.train()
        noisy = [policy(row), policy(row)]
        policy.eval()
    difference = max((logps - calm).abs().max().item() for logps in noisy)
    if not difference <= 1e-5:
        say(
            f"Warning: the model computes with noise in training ({difference:.1e} nat a token): "
            "the first loss will not be that of a margin of 0, and a resumed run will not end with "
            "the same bytes"
        )


@torch.no_grad()
def choose_layout(policy, pairs, make_row, sampled=0, tolerance=1e-3):
    """Let the policy share prompts if that gives what separate sequences give.

    Compared is the longest pair, within `tolerance` nats a token. Sequences beyond window_of the
    model never share, nor does a model whose LM head has a bias, which token_logps would leave out.

    sampled  tokens of the longest sequence that will be sampled, and scored as the pairs are
    returns  whether prompts are shared
    """
    longest = max(pairs, key=lambda pair: pair.length)
    row = make_row([longest], [0], policy.model.device)
    policy.share_prompts(False)
    separate = policy(row)
    difference = math.inf
    if getattr(policy.model.get_output_embeddings(), "bias", None) is not None:
        say("The model's LM head has a bias: rows do not share a prompt")
    else:
        try:
            policy.share_prompts(True)
            difference = (separate - policy(row)).abs().max().item()
        except (TypeError, ValueError, RuntimeError, AttributeError) as error:
            say(f"The model refuses rows that share a prompt: {first_line(error)}")
    window = window_of(policy.model.config.get_text_config())
    shared = difference <= tolerance and max(longest.length, sampled) <= window
    policy.share_prompts(shared)
    layout = "shared prompts" if shared else "separate sequences"
    say(
        f"Layout: {layout}, {difference:.1e} nat a token apart on the longest of {longest.length} "
        f"tokens (sliding window {window})"
    )
    return shared


def check_model(policy, pairs, make_row, config):
    """All checks before training; sets the policy's layout.

    policy    AnswerLogps, with its model in float32 in main memory
    pairs     list of data.Pair
    make_row  data.make_row
    config    a run's settings: with a reward, answers to the prompts will be sampled, and scored
    raises    InputError
    """
    check_tokens(policy.model, pairs)
    shortest = min(pairs, key=lambda pair: pair.length)
    try:
        check_causal(policy.model, shortest)
        sampled = 0
        if config.reward:
            sampled = max(len(pair.prompt_ids) for pair in pairs) + config.max_new_tokens
        choose_layout(policy, pairs, make_row, sampled)
        check_cache(policy, shortest)
        check_noise(policy, make_row([shortest], [0]))
    except IndexError as error:  # a position without an embedding of its own
        longest = max(pair.length for pair in pairs)
        raise InputError(
            f"the longest sequence has {longest} tokens, which the model cannot take "
            f"({first_line(error)}). Set max_length={_positions(policy.model)}, and a smaller "
            "max_prompt_length"
        ) from error
