"""The method: layouts of a row, log-probabilities, steps, schedule, the reference, and sweeps."""

import copy
import gc
import json
import math
import os
import re
import shutil
import sys
import weakref
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import data
import train_dpo
from data import Pair, make_row
from dpo_loss import dpo_loss, sequence_logps
from helpers import (
    CONFIG,
    DANUBE,
    METRICS,
    PAIRS,
    ROOT,
    build_model,
    build_tokenizer,
    generation_ends,
    plain_logps,
    plain_row_logps,
    random_pair,
    read_metrics,
    records,
    weights_bytes,
    write_jsonl,
    write_model,
)
from support import report
from support.cache import CODE
from support.checks import choose_layout
from support.config import Config, read_config
from support.intervals import summarize
from train_dpo import AnswerLogps

# Layouts

FAMILIES = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "mistral": {"sliding_window": None},
    "gemma": {},
    "gemma3_text": {"sliding_window": 64},
    "gpt2": {},
    "gpt_neox": {"rotary_pct": 0.5},
    "phi3": {},
    "opt": {},
}


def gradients(policy, row, direction):
    policy.model.zero_grad()
    logps = policy(row)
    (logps * direction).sum().backward()
    parameters = policy.model.named_parameters()
    return logps.detach(), {n: p.grad.clone() for n, p in parameters if p.grad is not None}


@torch.no_grad()
def test_log_probabilities_at_a_temperature_are_of_logits_divided_by_it():
    policy = AnswerLogps(build_model("llama"))
    separate = policy(make_row(PAIRS, [0, 1, 2]), 0.5)
    assert choose_layout(policy, PAIRS, make_row) and policy.shared
    shared = policy(make_row(PAIRS, [0, 1, 2]), 0.5)
    policy.model.get_output_embeddings().weight.mul_(2)
    expected = plain_row_logps(policy.model, PAIRS[:3])
    torch.testing.assert_close(shared, expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(separate, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_shared_prompts_give_the_log_probabilities_and_gradients_of_separate_sequences(family):
    model = build_model(family, **FAMILIES[family])
    twin = copy.deepcopy(model)
    policy = AnswerLogps(model)
    assert choose_layout(policy, PAIRS, make_row) and policy.shared
    row = make_row(PAIRS, [0, 1, 2])
    direction = torch.randn(len(row.targets), generator=torch.Generator().manual_seed(4))
    shared, grads = gradients(policy, row, direction)
    separate, expected = gradients(AnswerLogps(twin), row, direction)
    torch.testing.assert_close(shared, separate, atol=1e-4, rtol=0)
    torch.testing.assert_close(separate, plain_row_logps(twin, PAIRS).detach(), atol=1e-4, rtol=0)
    assert grads.keys() == expected.keys()
    for name, grad in expected.items():
        torch.testing.assert_close(
            grads[name], grad, rtol=1e-3, atol=1e-5 * (1 + grad.abs().max().item()), msg=name
        )


def test_a_pair_in_a_row_does_not_see_its_neighbours():
    model = build_model("llama")
    policy, other = AnswerLogps(model), random_pair(9, 4, 6, seed=9)
    policy.share_prompts(True)
    alone = policy(make_row([PAIRS[1]], [0]))
    beside = policy(make_row([other, PAIRS[1], other], [0, 1, 2]))[10 : 10 + len(alone)]
    torch.testing.assert_close(beside, alone, atol=1e-4, rtol=0)


def test_rows_beyond_a_sliding_window_run_as_separate_sequences():
    policy = AnswerLogps(build_model("mistral", sliding_window=16))
    short, long = random_pair(4, 5, 6), random_pair(20, 10, 12)
    assert choose_layout(policy, [short], make_row) and policy.shared
    assert not choose_layout(policy, [short, long, short], make_row) and not policy.shared


@pytest.mark.parametrize("rope_type", ["dynamic", "default"])
def test_rows_share_no_prompt_where_rotations_depend_on_a_rows_length(rope_type):
    rope = {"rope_type": rope_type, "rope_theta": 1e4, "factor": 2.0}
    model = build_model("llama", rope_parameters=rope, max_position_embeddings=32)
    policy = AnswerLogps(model)
    assert choose_layout(policy, [random_pair(4, 5, 6)], make_row)
    # both answers of the longest are beyond the limit, where it agrees with itself
    pairs = [random_pair(20, 30, 30), random_pair(12, 8, 1)]
    assert choose_layout(policy, pairs, make_row) == (rope_type == "default")


def test_a_long_sequence_counts_although_another_pair_has_more_tokens():
    policy = AnswerLogps(build_model("mistral", sliding_window=32))
    assert choose_layout(policy, [random_pair(10, 21, 21)], make_row)
    assert not choose_layout(policy, [random_pair(10, 21, 21), random_pair(2, 36, 1)], make_row)


def test_a_short_first_pair_hides_nothing_from_the_check(monkeypatch):
    model = build_model("mistral", sliding_window=16)
    model.config = copy.deepcopy(model.config)
    model.config.sliding_window = None  # as if the model named its window otherwise
    policy = AnswerLogps(model)
    short, long = random_pair(4, 5, 6), random_pair(20, 10, 12)
    assert choose_layout(policy, [short], make_row)
    assert not choose_layout(policy, [short, long, short], make_row)


GPT_NEO = {"attention_types": [[["local"], 2]], "window_size": 8, "num_layers": 2, "num_heads": 4}


@pytest.mark.parametrize(
    "family, changes",
    [
        ("mamba", {"state_size": 4, "conv_kernel": 4, "expand": 2, "intermediate_size": 64}),
        ("gemma2", {"final_logit_softcapping": 5.0, "attn_logit_softcapping": 3.0}),
        ("gemma2", {"final_logit_softcapping": None, "attn_logit_softcapping": 3.0}),
        ("granite", {"logits_scaling": 8.0, "attention_multiplier": 0.3}),
        ("phi", {}),
        ("bloom", {}),
        ("cohere", {"logit_scale": 0.1}),
        ("gpt_neo", GPT_NEO),
    ],
)
def test_whatever_layout_is_chosen_gives_the_models_own_log_probabilities(family, changes):
    model = build_model(family, **changes)
    twin = copy.deepcopy(model)
    pairs = [*PAIRS, random_pair(15, 10, 20, seed=5)]
    policy = AnswerLogps(model)
    shared = choose_layout(policy, pairs, make_row)
    assert policy.shared == shared and not (shared and family == "mamba")
    with torch.no_grad():
        logps = policy(make_row(pairs, range(4)))
        torch.testing.assert_close(logps, plain_row_logps(twin, pairs), atol=1e-3, rtol=0)


def test_the_choice_of_a_layout_leaves_the_model_as_it_was():
    model = build_model("gemma2")
    own = model.config._attn_implementation
    policy = AnswerLogps(model)
    shared = choose_layout(policy, PAIRS, make_row)
    chosen = "shared_prompt" if shared else own
    assert model.config._attn_implementation == chosen and model.training
    policy.share_prompts(False)
    assert model.config._attn_implementation == own and model.training


# Numbers


def test_log_probabilities_of_a_run_are_those_of_brute_force(ready, pairs_file):
    setup, _ = ready(train_pairs=4, eval_pairs=2)
    tokenizer, model = setup.tokenizer, copy.deepcopy(setup.model).double()
    model.set_attn_implementation("eager")
    rows = [json.loads(line) for line in Path(pairs_file).read_text().splitlines()]
    by_prompt = {row["prompt"]: row for row in rows}
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    for split, pairs in setup.pairs.items():
        for number, pair in enumerate(pairs):
            row = by_prompt[json.loads(pair.prompt)[-1]["content"]]
            text = f"<|im_start|>user\n{row['prompt']}<|im_end|>\n<|im_start|>assistant\n"
            prompt = tokenizer(text).input_ids
            assert list(pair.prompt_ids) == prompt
            for column, name in enumerate(("chosen", "rejected")):
                ids, total = list(prompt), 0.0
                for token in [*tokenizer(row[name]).input_ids, end]:
                    with torch.no_grad():
                        logits = model(input_ids=torch.tensor([ids])).logits[0, -1]
                    total += (logits[token] - logits.logsumexp(0)).item()
                    ids.append(token)
                found = setup.reference[split][number, column].item()
                assert found == pytest.approx(total, abs=1e-3)


def test_scores_of_pairs_are_the_losses_and_a_tie_counts_one_half():
    logps, reference = torch.tensor([[-1.0, -5.0], [-2.0, -2.0], [-9.0, -1.0]]), torch.zeros(3, 2)
    lengths = torch.tensor([[2, 4], [1, 1], [5, 3]])
    losses, metrics = train_dpo.score(logps, reference, lengths, Config(beta=0.5))
    expected, chosen, rejected = dpo_loss(*logps.T, *reference.T, 0.5)
    torch.testing.assert_close(losses, expected)
    means = summarize(metrics)
    assert tuple(means) == METRICS and {values.shape for values in metrics.values()} == {(3,)}
    assert means["rewards/accuracies"] == 0.5
    assert means["loss"] == pytest.approx(losses.mean().item())
    assert means["rewards/margins"] == pytest.approx((chosen - rejected).mean().item())
    assert means["logps/chosen"] == -4 and means["rewards/chosen"] == -2
    assert means["nll/chosen"] == pytest.approx((1 / 2 + 2 / 1 + 9 / 5) / 3)
    halves = summarize(metrics, before=metrics)
    wilson = 1.96 / (2 * math.sqrt(3 + 1.96**2))  # of three pairs and one half
    assert halves["rewards/accuracies/ci95"] == pytest.approx(wilson, abs=1e-4)


@pytest.mark.parametrize(
    "changes",
    [{"loss": "ipo"}, {"loss": "ipo", "length_normalize": True}, {"length_normalize": True}],
    ids=str,
)
def test_ipo_always_averages_over_tokens_and_the_others_with_length_normalize(changes):
    logps = torch.tensor([[-6.0, -8.0], [-3.0, -9.0]], requires_grad=True)
    reference, lengths = torch.tensor([[-5.0, -9.0], [-4.0, -6.0]]), torch.tensor([[2, 4], [1, 3]])
    losses, metrics = train_dpo.score(logps, reference, lengths, Config(beta=0.5, **changes))
    h = torch.tensor([-1 / 2 - 1 / 4, 1 / 1 + 3 / 3])
    expected = (h - 1) ** 2 if changes.get("loss") == "ipo" else torch.log1p((-0.5 * h).exp())
    torch.testing.assert_close(losses.detach(), expected)
    torch.testing.assert_close(metrics["rewards/margins"], 0.5 * h)
    torch.testing.assert_close(metrics["logps/chosen"], torch.tensor([-3.0, -3.0]))
    losses.sum().backward()
    torch.testing.assert_close(logps.grad[:, 0] * lengths[:, 0], -logps.grad[:, 1] * lengths[:, 1])


@pytest.mark.parametrize("loss", ["sigmoid", "ipo"])
def test_nll_weight_adds_the_chosen_answers_mean_negative_log_likelihood(loss):
    logps = torch.tensor([[-6.0, -8.0], [-3.0, -9.0]], requires_grad=True)
    reference, lengths = torch.tensor([[-5.0, -9.0], [-4.0, -6.0]]), torch.tensor([[2, 4], [1, 3]])
    scored = []
    for weight in (0.0, 0.5):
        config = Config(loss=loss, nll_weight=weight)
        losses, metrics = train_dpo.score(logps, reference, lengths, config)
        (gradient,) = torch.autograd.grad(losses.sum(), logps)
        scored.append((losses.detach(), gradient, metrics))
    (plain, slope, figures), (weighted, with_nll, _) = scored
    torch.testing.assert_close(weighted - plain, 0.5 * torch.tensor([6 / 2, 3 / 1]))
    torch.testing.assert_close(with_nll - slope, -0.5 * torch.tensor([[1 / 2, 0.0], [1 / 1, 0.0]]))
    assert figures["nll/chosen"].tolist() == [3, 3] and not figures["nll/chosen"].requires_grad


@pytest.mark.parametrize(("loss", "first"), [("ipo", 25.0), ("hinge", 1.0), ("sigmoid", None)])
def test_the_first_loss_of_ipo_and_hinge_is_another_and_that_is_said(dpo, capsys, loss, first):
    assert dpo(loss=loss, train_pairs=2, eval_pairs=0) == 0
    told = f"not ln 2: at a margin of 0 the loss {loss} is another" in capsys.readouterr().out
    assert told == (loss != "sigmoid")
    expected = math.log(2) if first is None else first
    assert read_metrics(split="train")[0]["loss"] == pytest.approx(expected)


def test_the_first_loss_with_nll_weight_is_ln_2_and_its_part_and_that_is_said(dpo, capsys):
    assert dpo(nll_weight=[0.0, 0.2], output_dir="s/{nll_weight}") == 0
    assert capsys.readouterr().out.count("The first loss is not ln 2: nll_weight") == 1
    assert dpo(nll_weight=0.2) == 0
    assert "The first loss is not ln 2: nll_weight" in capsys.readouterr().out
    for split in ("train", "eval"):
        first = read_metrics(split=split)[0]
        assert first["loss"] == pytest.approx(math.log(2) + 0.2 * first["nll/chosen"], rel=1e-6)
        assert first["rewards/margins"] == 0
    assert weights_bytes() == weights_bytes("s/0.2") != weights_bytes("s/0.0")
    last = read_metrics("s/0.2", "eval")[-1]
    assert last["nll/chosen"] < read_metrics("s/0.0", "eval")[-1]["nll/chosen"]


def test_runs_that_sum_and_runs_that_average_share_one_reference(dpo, setups):
    losses = {"loss": ["sigmoid", "ipo"], "output_dir": "s/{loss}_{length_normalize}"}
    assert dpo(**losses, length_normalize=[False, True]) == 0
    assert all(setup is setups[0] for setup in setups) and len(setups) == 4
    assert dpo(length_normalize=True, output_dir="alone") == 0
    assert weights_bytes("s/sigmoid_True") == weights_bytes("alone")
    assert weights_bytes("s/ipo_True") == weights_bytes("s/ipo_False")
    assert weights_bytes("s/sigmoid_False") != weights_bytes("alone")
    assert read_metrics("s/sigmoid_True", "train")[0]["loss"] == pytest.approx(
        math.log(2), abs=1e-7
    )
    assert read_metrics("s/ipo_False", "train")[0]["loss"] == pytest.approx(25, rel=1e-6)


# Agreement with TRL


@torch.no_grad()
def row_logps(setup):
    """log pi(y|x) of the training pairs under the policy as it is now, (pairs, 2)."""
    logps = torch.zeros(len(setup.pairs["train"]), 2)
    for members in setup.rows["train"]:
        row = setup.make_row("train", members)
        logps[members] = sequence_logps(setup.policy(row), row.lengths).view(-1, 2).float()
    return logps


@pytest.mark.skipif("TRL_REFERENCE" not in os.environ, reason="TRL_REFERENCE names no file")
@pytest.mark.parametrize("path", os.environ.get("TRL_REFERENCE", "").split(","))
def test_sixteen_real_pairs_agree_with_trl(monkeypatch, path):
    trl = json.loads(Path(path).read_text())
    loss, *_ = trl["config"].get("loss_type", ["sigmoid"])
    nll_weight = trl["config"].get("loss_weights", [0.0])[-1]
    quick = ["lr=5e-6", "dtype=float32", "device=cpu", "sample_prompts=0", "reference_cache=null"]
    (config,), _ = read_config(CONFIG, [*quick, f"loss={loss}", f"nll_weight={nll_weight}"])
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    pairs = [Pair(i, *(pair[name] for name in names)) for i, pair in enumerate(trl["pairs"])]
    no_drops = {"train": Counter(), "eval": Counter()}
    monkeypatch.setattr(data, "load_pairs", lambda *_: ({"train": pairs, "eval": []}, no_drops))
    setup = train_dpo.prepare(replace(config, model=config.offline[config.model]))
    first = {name: weight.detach().clone() for name, weight in setup.weights.items()}
    worst = {}

    def compare(what, found, expected, limit, relative=False):
        gap = abs(found - expected) / (abs(expected) if relative else 1)
        worst[what] = max(worst.get(what, 0), gap)
        assert gap <= limit, f"{what}: {found}, TRL {expected}"

    def compare_logps(what, found, limit):
        for values, pair in zip(found.tolist(), trl["pairs"], strict=True):
            for value, name in zip(values, ("chosen", "rejected"), strict=True):
                compare(what, value, pair[what][name], limit)

    compare_logps("reference_logps", setup.reference["train"], 1e-3)
    optimizer = train_dpo.make_optimizer(setup.weights, config)
    for step, (group, expected) in enumerate(zip(setup.steps["train"], trl["steps"], strict=True)):
        lr = train_dpo.learning_rate(step, 8, config)
        figures = train_dpo.train_step(setup, config, group, optimizer, lr)
        compare("learning_rate", figures["lr"], expected["learning_rate"], 1e-9, relative=True)
        compare("grad_norm", figures["grad_norm"], expected["grad_norm"], 1e-3, relative=True)
        compare("loss", figures["loss"], expected["loss"], 1e-4)
        # of ipo, TRL's are sums and ours, as the loss, averages a token
        for name in ("chosen", "rejected", "margins") if loss != "ipo" else ():
            compare(name, figures[f"rewards/{name}"], expected[f"rewards/{name}"], 1e-3)
    compare_logps("trained_logps", row_logps(setup), 0.02)
    changes = [(w.detach() - first[n]).double().norm() for n, w in setup.weights.items()]
    change = torch.stack(changes).norm().item()
    compare("weight_change", change, trl["weight_change"]["l2"], 5e-3, relative=True)
    print("largest deviations from TRL:", {name: f"{gap:.1e}" for name, gap in worst.items()})


# Steps: first loss, accumulation, schedule


@pytest.mark.parametrize(
    "changes",
    [
        {"batch_size": 3, "gradient_accumulation_steps": 1},
        {"gradient_accumulation_steps": 3},
        {"batch_size": 2, "length_normalize": True},
        {"activation_checkpointing": True},
        {"label_smoothing": 0.2},
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_first_loss_is_exactly_ln_2(ready, dtype, changes):
    setup, config = ready(dtype=dtype, max_length=80, **changes)
    optimizer = train_dpo.make_optimizer(setup.weights, config)
    figures = train_dpo.train_step(setup, config, setup.steps["train"][0], optimizer, config.lr)
    assert figures["loss"] == pytest.approx(math.log(2), abs=1e-7)
    assert figures["rewards/margins"] == figures["rewards/chosen"] == 0
    assert figures["rewards/accuracies"] == 0.5
    later = train_dpo.train_step(setup, config, setup.steps["train"][0], optimizer, config.lr)
    assert later["rewards/margins"] > 0


class Gradients:
    """Stands in for an optimizer and keeps the gradients that it is given."""

    def __init__(self, weights):
        self.weights, self.param_groups, self.kept = weights, [{"params": [*weights.values()]}], {}

    def step(self):
        self.kept = {name: weight.grad.clone() for name, weight in self.weights.items()}

    def zero_grad(self):
        for weight in self.weights.values():
            weight.grad = None


@pytest.mark.parametrize("batch_size, accumulation", [(1, 4), (2, 2), (4, 1), (1, 3), (3, 1)])
def test_a_steps_gradient_is_the_mean_over_its_pairs_also_in_a_short_last_group(
    tmp_path, ready, batch_size, accumulation
):
    rows = [
        r | {"chosen": r["chosen"] * (4 if i % 3 == 0 else 1), "split": "train_prefs"}
        for i, r in enumerate(records(7))
    ]
    setup, config = ready(
        dataset=write_jsonl(tmp_path / "a.jsonl", rows),
        shuffle=False,
        beta=0.5,
        eval_pairs=0,
        train_pairs=7,
        max_grad_norm=0,
        batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
    )
    if batch_size == 1:  # rows of one long pair beside rows of several short ones
        assert any(len({len(row) for row in rows}) > 1 for rows in setup.steps["train"])
    generator = torch.Generator().manual_seed(1)  # as if trained: the pairs' gradients then differ
    setup.reference["train"] = setup.reference["train"] + 2 * torch.randn(7, 2, generator=generator)
    twin = copy.deepcopy(setup.model)
    assert [sum(len(row) for row in rows) for rows in setup.steps["train"]] == (
        [4, 3] if batch_size * accumulation == 4 else [3, 3, 1]
    )
    for group in setup.steps["train"]:
        indices, optimizer = [i for row in group for i in row], Gradients(setup.weights)
        figures = train_dpo.train_step(setup, config, group, optimizer, 0.0)
        losses = []
        for index in indices:
            pair = setup.pairs["train"][index]
            answers = (pair.chosen_ids, pair.rejected_ids)
            logps = [plain_logps(twin, pair.prompt_ids, answer).sum() for answer in answers]
            h = logps[0] - logps[1] - setup.reference["train"][index] @ torch.tensor([1.0, -1.0])
            losses.append(-torch.nn.functional.logsigmoid(0.5 * h))
        mean = torch.stack(losses).mean()
        expected = torch.autograd.grad(mean, [*twin.parameters()])
        assert figures["loss"] == pytest.approx(mean.item(), abs=2e-4)
        norm = torch.stack([grad.norm() for grad in expected]).norm().item()
        assert figures["grad_norm"] == pytest.approx(norm, rel=1e-4)
        for (name, found), grad in zip(optimizer.kept.items(), expected, strict=True):
            torch.testing.assert_close(found, grad, rtol=1e-3, atol=1e-4 * norm, msg=name)


def test_the_gradient_norm_is_reported_before_clipping_and_the_step_taken_after(ready):
    setup, config = ready(max_grad_norm=0.01)
    optimizer = Gradients(setup.weights)
    figures = train_dpo.train_step(setup, config, setup.steps["train"][0], optimizer, 0.0)
    clipped = torch.stack([grad.norm() for grad in optimizer.kept.values()]).norm().item()
    assert figures["grad_norm"] > 0.1 and clipped == pytest.approx(0.01, rel=1e-3)


def test_a_step_is_taken_at_the_rate_it_is_given(ready):
    setup, config = ready(lr=0.1)
    optimizer, group = train_dpo.make_optimizer(setup.weights, config), setup.steps["train"][0]
    for lr in (0.0, 1e-4):
        before = {name: weight.detach().clone() for name, weight in setup.weights.items()}
        train_dpo.train_step(setup, config, group, optimizer, lr)
        change = max((w - before[n]).abs().max().item() for n, w in setup.weights.items())
        assert 0.9 * lr <= change <= 1.2 * lr


def test_a_step_without_a_finite_loss_is_skipped_and_named(ready):
    setup, config = ready()
    before = {name: weight.detach().clone() for name, weight in setup.weights.items()}
    setup.reference["train"][0, 0] = math.nan
    optimizer = train_dpo.make_optimizer(setup.weights, config)
    figures = train_dpo.train_step(setup, config, setup.steps["train"][0], optimizer, config.lr)
    in_step = [setup.pairs["train"][i].index for row in setup.steps["train"][0] for i in row]
    assert sorted(figures["skipped"]) == sorted(in_step)
    for name, weight in setup.weights.items():
        assert torch.equal(weight, before[name])


def test_three_steps_running_that_are_not_finite_stop_the_run(dpo, monkeypatch, capsys):
    prepare = train_dpo.prepare

    def without_reference(*given):
        setup = prepare(*given)
        setup.reference["train"].fill_(math.nan)
        return setup

    monkeypatch.setattr(train_dpo, "prepare", without_reference)
    assert dpo(train_pairs=8, eval_pairs=0) == 1
    assert "Stopped: " in capsys.readouterr().out and not Path("out/model").exists()
    assert [row["loss"] for row in read_metrics()] == [None] * 3


def test_the_rate_follows_a_cosine_over_all_optimizer_steps(dpo):
    assert dpo(train_pairs=5, epochs=3, lr=2e-4, eval_pairs=0) == 0
    rates = [row["lr"] for row in read_metrics()]  # 5 pairs are 3 steps of 2: 9 in all
    assert rates == pytest.approx([1e-4 * (1 + math.cos(math.pi * k / 9)) for k in range(9)])
    assert [row["step"] for row in read_metrics()] == list(range(1, 10))


def test_the_rate_ends_at_zero_and_warms_up_from_near_it():
    plain, warm = Config(lr=1.0), Config(lr=1.0, warmup_ratio=0.2)
    assert train_dpo.learning_rate(100, 100, plain) == pytest.approx(0)
    assert 0 < train_dpo.learning_rate(99, 100, plain) < 1e-3
    rates = [train_dpo.learning_rate(step, 100, warm) for step in range(100)]
    assert 0 < rates[0] < 0.1 and rates[:21] == sorted(rates[:21]) and rates[20] == 1
    assert rates[20:] == sorted(rates[20:], reverse=True) and rates[60] == pytest.approx(0.5)
    only_warm = Config(lr=1.0, warmup_ratio=1)
    assert all(0 < train_dpo.learning_rate(step, 3, only_warm) <= 1 for step in range(3))


def test_linear_and_constant_rates_come_after_the_same_warmup():
    warm = {"lr": 1.0, "warmup_ratio": 0.2}
    cosine, linear, constant = [
        [
            train_dpo.learning_rate(step, 100, Config(**warm, lr_schedule=name))
            for step in range(101)
        ]
        for name in ("cosine", "linear", "constant")
    ]
    assert cosine[:21] == linear[:21] == constant[:21]
    assert linear[20:] == pytest.approx([1 - k / 80 for k in range(81)]) and linear[100] == 0
    assert constant[20:] == [1.0] * 81
    unfit = Config(**{**warm, "warmup_ratio": 0}, lr_schedule="linear")
    assert train_dpo.learning_rate(0, 100, unfit) == 1


def test_each_lr_schedule_has_a_course_of_its_own():
    courses = set()
    names = get_args(get_type_hints(Config)["lr_schedule"])
    for name in names:
        config = Config(lr=1.0, lr_schedule=name)
        courses.add(tuple(train_dpo.learning_rate(step, 9, config) for step in range(9)))
    assert len(courses) == len(names) == 3


def test_a_run_follows_its_schedule_and_a_sweep_of_schedules_shares_one_setup(dpo, setups):
    assert dpo(lr=2e-4, lr_schedule=["linear", "constant"], output_dir="s/{lr_schedule}") == 0
    linear, constant = read_metrics("s/linear", "train"), read_metrics("s/constant", "train")
    assert [row["lr"] for row in linear] == pytest.approx([2e-4, 2e-4 * 2 / 3, 2e-4 / 3])
    assert [row["lr"] for row in constant] == [2e-4] * 3
    assert setups[0] is setups[1]


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2"])
def test_weight_decay_spares_norms_and_biases_and_nothing_else(family):
    weights = dict(build_model(family).named_parameters())
    optimizer = train_dpo.make_optimizer(weights, Config(weight_decay=0.3))
    decays = {p: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert len(decays) == len(weights)
    for name, weight in weights.items():
        spared = re.search(r"norm|ln_|bias", name) is not None
        assert decays[weight] == (0 if spared else 0.3), name


def test_a_batch_of_two_is_two_accumulated_batches(dpo):
    assert dpo(train_pairs=5, batch_size=2, gradient_accumulation_steps=1) == 0
    assert dpo(train_pairs=5, batch_size=1, gradient_accumulation_steps=2, output_dir="b") == 0
    for a, b in zip(read_metrics(), read_metrics("b"), strict=True):
        assert (a["step"], a["split"]) == (b["step"], b["split"])
        for name in METRICS:
            assert a[name] == pytest.approx(b[name], abs=1e-4), name


def test_activation_checkpointing_changes_no_loss(dpo):
    assert dpo(eval_pairs=0) == 0
    assert dpo(eval_pairs=0, output_dir="b", activation_checkpointing=True) == 0
    plain, saving = read_metrics(), read_metrics("b")
    for a, b in zip(plain, saving, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)


def test_activation_checkpointing_computes_layers_again(ready, monkeypatch):
    calls = []
    for saving in (False, True):
        setup, config = ready(activation_checkpointing=saving)
        attention, seen, group = setup.model.model.layers[0].self_attn, [], setup.steps["train"][0]
        attention.register_forward_hook(lambda *_, seen=seen: seen.append(1))
        train_dpo.train_step(setup, config, group, Gradients(setup.weights), 0.0)
        calls.append(len(seen) / len(group))
    assert calls == [1, 2]


# The reference and its cache


CHECKED = 5  # rows that the checks at start run: two for the layout, three for noise


@pytest.fixture
def passes(monkeypatch):
    """The rows that the policy has run, one after the other."""
    rows, forward = [], AnswerLogps.forward

    def counted(policy, row, *temperature):
        rows.append(row)
        return forward(policy, row, *temperature)

    monkeypatch.setattr(AnswerLogps, "forward", counted)
    return rows


def test_a_second_run_reads_the_reference_from_the_cache(ready, dpo, passes):
    fresh, _ = ready(reference_cache="cache")
    computed = len(passes)
    cached, _ = ready(reference_cache="cache", beta=0.7, lr=1e-5, output_dir="b")
    assert len(passes) - computed == CHECKED < computed
    for split in ("train", "eval"):
        assert torch.equal(cached.reference[split], fresh.reference[split])
    assert dpo(reference_cache="cache", beta=0.7) == 0 and dpo(beta=0.7, output_dir="no_cache") == 0
    assert weights_bytes("out") == weights_bytes("no_cache")


@pytest.mark.parametrize(
    "changes",
    [
        {"train_pairs": 5},
        {"seed": 7},
        {"batch_size": 2},
        {"dtype": "bfloat16"},
        {"max_length": 60},
        {"split": "test_prefs", "eval_split": None},
    ],
    ids=str,
)
def test_the_cache_is_not_read_for_other_pairs_rows_or_numerics(ready, passes, changes):
    ready(reference_cache="cache", max_length=70)
    before = len(passes)
    setup, _ = ready(reference_cache="cache", **{"max_length": 70, **changes})
    assert len(passes) - before > CHECKED
    with torch.no_grad():
        members = setup.steps["train"][0][0]
        row = setup.make_row("train", members)
        logps = sequence_logps(setup.policy(row), row.lengths).view(-1, 2)
    assert torch.equal(setup.reference["train"][members], logps)


def test_the_cache_is_not_read_after_the_code_behind_it_changed(
    ready, passes, monkeypatch, tmp_path
):
    kernel = tmp_path / "kernel.py"
    kernel.write_text("fast = False")
    monkeypatch.setattr("support.cache.CODE", [kernel])
    ready(reference_cache="cache")
    kernel.write_text("fast = True")
    before = len(passes)
    ready(reference_cache="cache")
    assert len(passes) - before > CHECKED


def test_the_cache_knows_all_code_that_computes_a_log_probability(ready):
    setup, config = ready()
    ran = set()
    sys.setprofile(lambda frame, event, _: ran.add(Path(frame.f_code.co_filename)))
    try:
        train_dpo.compute_logps(setup, "train", config, "reference")
    finally:
        sys.setprofile(None)
    own = {path for path in ran if path.is_relative_to(ROOT) and ".venv" not in path.parts}
    # which rows this process has, and how they are shown
    own -= {ROOT / "support" / "processes.py", Path(__file__)}
    assert len(own) > 3 and own <= set(CODE)


def test_the_cache_is_not_read_for_the_same_rows_with_pairs_in_another_order(ready):
    one_step = {"reference_cache": "cache", "train_pairs": 0, "batch_size": 8, "eval_pairs": 0}
    for shuffle in (True, False):
        setup, _ = ready(**one_step, shuffle=shuffle, split="test_prefs")
        (members,) = setup.steps["train"][0]
        row = setup.make_row("train", members)
        with torch.no_grad():
            logps = sequence_logps(setup.policy(row), row.lengths).view(-1, 2)
        assert torch.equal(setup.reference["train"][members], logps)


def test_the_cache_is_not_read_for_another_model_at_the_same_path(tmp_path, ready, passes):
    for seed in (1, 2):
        model = write_model(tmp_path / "model", seed=seed)
        before = len(passes)
        ready(model=model, reference_cache="cache")
        assert len(passes) - before > CHECKED


# Another model as the reference


@pytest.fixture(scope="module")
def other_model(tmp_path_factory):
    """A model of another size whose tokenizer is the tiny model's, without a chat template."""
    folder = tmp_path_factory.mktemp("other")
    write_model(folder, "gpt2", seed=5, n_layer=1)
    (folder / "chat_template.jinja").unlink()
    return str(folder)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_model_itself_as_reference_model_is_null_to_the_last_digit(ready, tiny_model, dtype):
    null, _ = ready(dtype=dtype)
    same, config = ready(dtype=dtype, reference_model=tiny_model)
    for split in ("train", "eval"):
        assert torch.equal(null.reference[split], same.reference[split])
    assert torch.equal(same.start, null.start)
    optimizer = train_dpo.make_optimizer(same.weights, config)
    figures = train_dpo.train_step(same, config, same.steps["train"][0], optimizer, config.lr)
    assert figures["loss"] == pytest.approx(math.log(2), abs=1e-7)


def test_another_reference_is_that_models_own_log_probabilities(ready, other_model, tiny_model):
    setup, _ = ready(reference_model=other_model)
    for found, name in ((setup.reference["eval"], other_model), (setup.start, tiny_model)):
        model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).eval()
        with torch.no_grad():
            tokens = plain_row_logps(model, setup.pairs["eval"])
        expected = sequence_logps(tokens, setup.lengths["eval"].flatten().tolist()).view(-1, 2)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-3)


def test_a_run_against_another_reference_says_so_from_its_first_loss_on(
    dpo, setups, other_model, capsys
):
    settings = {"reference_model": other_model, "reference_cache": "cache", "beta": 0.5}
    assert dpo(**settings) == 0
    shown = capsys.readouterr().out
    assert "The first loss is not ln 2: reference_model is not the policy" in shown
    name = Path(other_model).name
    for file in ("report.md", "model/README.md"):
        assert f"against the reference {name}" in Path("out", file).read_text()
        assert other_model not in Path("out", file).read_text()
    before, after = read_metrics(split="eval")
    h = setups[0].start - setups[0].reference["eval"]
    margins = 0.5 * (h[:, 0] - h[:, 1])
    assert before["rewards/margins"] == pytest.approx(margins.mean().item(), rel=1e-5)
    loss = torch.nn.functional.softplus(-margins).mean().item()
    assert before["loss"] == pytest.approx(loss, rel=1e-5) and abs(loss - math.log(2)) > 0.01
    assert before["rewards/margins/change_ci95"] == 0 < after["rewards/margins/change_ci95"]
    assert dpo(**settings, lr=1e-4, output_dir="b") == 0
    assert capsys.readouterr().out.count("Reference log-probabilities: read from") == 2


def test_the_other_model_is_freed_before_training(ready, other_model, monkeypatch):
    loaded, load = [], train_dpo.load_other

    def watched(*given):
        model = load(*given)
        loaded.append(weakref.ref(model))
        return model

    monkeypatch.setattr(train_dpo, "load_other", watched)
    setup, _ = ready(reference_model=other_model)
    gc.collect()
    assert loaded[0]() is None and setup.weights


@pytest.mark.parametrize("flags", [[], ["--dry-run"]], ids=str)
def test_another_reference_of_other_tokens_is_refused_with_the_first_of_them(
    dpo, other_model, tmp_path, capsys, flags
):
    if flags:
        assert dpo(*flags, reference_model=other_model) == 0
    tokenizer = AutoTokenizer.from_pretrained(other_model)
    shutil.copytree(other_model, tmp_path / "more")
    tokenizer.add_tokens(["<extra>"])
    tokenizer.save_pretrained(tmp_path / "more")
    assert dpo(*flags, reference_model="more") == 2
    shown = capsys.readouterr().out
    assert "Error: reference_model more: its tokenizer is not that of model" in shown
    assert (
        f"1 tokens differ, such as '<extra>', id {len(tokenizer) - 1} there and None here" in shown
    )
    assert dpo(*flags, reference_model="./nowhere") == 2
    assert (
        "Error: reference_model: model ./nowhere: no such file or folder" in capsys.readouterr().out
    )


def test_a_run_does_not_go_on_against_a_reference_that_changed(
    dpo, other_model, tmp_path, monkeypatch, capsys
):
    shutil.copytree(other_model, tmp_path / "reference")
    settings = {"reference_model": "reference", "save_every": 1, "reference_cache": "cache"}
    with monkeypatch.context() as patch:
        patch.setattr(report, "finish", lambda *_: sys.exit(9))
        with pytest.raises(SystemExit):
            dpo(**settings)
    write_model(tmp_path / "reference", "gpt2", seed=6, n_layer=1)
    assert dpo(**settings) == 2
    assert "the reference model changed since this run began" in capsys.readouterr().out
    assert len(list(Path("cache").glob("*.safetensors"))) == 3  # the policy's, and two references


# Whole runs and sweeps


def test_two_runs_with_one_seed_are_equal_to_the_byte(finished, tmp_path, dpo):
    arguments = [*finished.arguments, f"output_dir={tmp_path / 'again'}", "reference_cache=null"]
    assert train_dpo.main(["--config", CONFIG, *arguments]) == 0
    assert weights_bytes("again") == weights_bytes(finished.folder)
    assert read_metrics("again") == read_metrics(finished.folder)
    assert train_dpo.main(["--config", CONFIG, *arguments, "seed=7", "output_dir=other"]) == 0
    assert weights_bytes("other") != weights_bytes(finished.folder)


def test_each_run_of_a_sweep_equals_the_same_run_alone(dpo, capsys):
    grid = {"lr": [1e-3, 1e-4], "beta": [0.1, 0.5]}
    assert dpo(**grid, output_dir="sweep/b{beta}_l{lr}", train_pairs=4) == 0
    assert "sweep.csv" in capsys.readouterr().out
    for lr, beta in [(lr, beta) for lr in grid["lr"] for beta in grid["beta"]]:
        assert dpo(lr=lr, beta=beta, output_dir="alone/b{beta}_l{lr}", train_pairs=4) == 0
        assert weights_bytes(f"sweep/b{beta}_l{lr}") == weights_bytes(f"alone/b{beta}_l{lr}")
        assert read_metrics(f"sweep/b{beta}_l{lr}") == read_metrics(f"alone/b{beta}_l{lr}")
    header, *lines = Path("sweep/sweep.csv").read_text().splitlines()
    assert len(lines) == 4 and {"lr", "beta", "rewards/accuracies"} <= {*header.split(",")}
    assert Path("sweep/sweep.png").exists()


def test_runs_of_a_sweep_start_anew_in_bfloat16_and_with_another_seed(dpo):
    short = {"dtype": "bfloat16", "train_pairs": 2, "eval_pairs": 2}
    assert dpo(lr=[1e-3, 1e-4], seed=[1, 2], output_dir="s/{seed}_{lr}", **short) == 0
    assert dpo(lr=1e-4, seed=2, output_dir="alone", **short) == 0
    assert weights_bytes("s/2_0.0001") == weights_bytes("alone")


@pytest.mark.parametrize("window, layout", [(4096, "shared prompts"), (24, "separate sequences")])
def test_a_danube_model_trains_on_several_sets_with_its_own_template(
    tmp_path, dpo, setups, capsys, window, layout
):
    tokenizer = build_tokenizer(DANUBE, eos="</s>")
    model = write_model(tmp_path / "danube", "mistral", tokenizer, sliding_window=window)
    write_jsonl(tmp_path / "a.jsonl", [r | {"split": "train"} for r in records(6)])
    questions = []
    for r, split in zip(records(6, 100), ["train", "test"] * 3, strict=True):
        question = {"question": r["prompt"], "split": split}
        questions.append(question | {name: r[name] for name in ("chosen", "rejected")})
    write_jsonl(tmp_path / "b.jsonl", questions)
    sets = {"dataset": "a.jsonl:train, b.jsonl:train", "split": None, "eval_split": "test"}
    assert dpo(model=model, **sets, train_pairs=0, eval_pairs=3) == 0
    assert layout in capsys.readouterr().out
    pairs = setups[0].pairs
    prompts = [json.loads(pair.prompt)[-1]["content"] for pair in pairs["train"]]
    assert sum(int(prompt.split()[0]) < 100 for prompt in prompts) == 6 and len(prompts) == 9
    texts = [tokenizer.decode(pair.prompt_ids) for pair in pairs["train"]]
    assert texts[0] == f"<|prompt|>{prompts[0]}</s><|answer|>"
    end = tokenizer.convert_tokens_to_ids("</s>")
    assert all(pair.chosen_ids[-1] == end == pair.rejected_ids[-1] for pair in pairs["train"])
    assert read_metrics(split="train")[0]["loss"] == pytest.approx(math.log(2), abs=1e-7)
    assert len(pairs["eval"]) == 3 and read_metrics(split="eval")[-1]["loss"] != math.log(2)
    model = AutoModelForCausalLM.from_pretrained("out/model")
    assert model.config.sliding_window == window
    assert end in generation_ends(model)
