"""What a model does, measured by sampled answers: the figures, and what they are of."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import data
import train_dpo
from helpers import plain_logps, read_metrics, write_model
from support import report, samples
from support.run_log import read_rows

pytestmark = pytest.mark.usefixtures("quick")
LENGTH = "def judge(messages, answer, record):\n    return len(answer)\n"
NAMES = ["reward", "ended", "tokens", "kl", "entropy", "distinct"]


@pytest.fixture
def settings(talker):
    """Settings of a run that samples answers, and judge.py, which rewards long ones."""
    Path("judge.py").write_text(LENGTH)
    quick = {"max_new_tokens": 8, "eval_samples": 3, "model": talker}
    return quick | {"reward": "judge.py:judge"}


def measure(setup, config, step=0):
    """Figures by prompt, after a step and before, and those of all answers."""
    given = (Path(config.output_dir), step, data.lay_out, train_dpo.compute_logps)
    return samples.measure(setup, config, *given)


def train_all(setup, config):
    optimizer = train_dpo.make_optimizer(setup.weights, config)
    for rows in setup.steps["train"]:
        train_dpo.train_step(setup, config, rows, optimizer, config.lr)


def logps_by_hand(model, prompts, drawn):
    """log-probabilities of sampled answers by a model's own forward, an answer at a time."""
    found = []
    with torch.no_grad():
        for pair, answers in zip(prompts, drawn, strict=True):
            logps = [plain_logps(model, list(pair.prompt_ids), a.ids).sum() for a in answers]
            found.append(torch.stack(logps).double())
    return torch.stack(found)


ROWS = [
    # reward, ended, tokens, logp, first_logp, text
    (1.0, True, 4, -2.0, -3.0, "a"),
    (0.0, False, 8, -10.0, -6.0, "b"),
    (0.0, True, 2, -1.0, -1.0, "a"),
    (0.5, True, 1, -1.0, -2.0, ""),
    (1.0, False, 3, -4.0, -4.0, "c"),
    (0.0, False, 4, -3.0, -6.0, "c"),
]


def test_figures_of_each_prompt_are_means_over_its_answers():
    names = ("reward", "ended", "tokens", "logp", "first_logp", "text")
    rows = []
    for number, values in enumerate(ROWS):
        place = {"prompt": number // 3, "sample": number % 3}
        rows.append(place | dict(zip(names, values, strict=True)))
    figures = {name: values.tolist() for name, values in samples.by_prompt(rows).items()}
    assert figures == {
        "samples/reward": pytest.approx([1 / 3, 0.5]),
        "samples/ended": pytest.approx([2 / 3, 1 / 3]),
        "samples/tokens": pytest.approx([14 / 3, 8 / 3]),
        "samples/kl": pytest.approx([(1 - 4 + 0) / 3, (1 + 0 + 3) / 3]),
        "samples/entropy": pytest.approx([13 / 14, 8 / 8]),
        "samples/distinct": pytest.approx([2 / 3, 2 / 3]),
    }
    assert samples._reward_of_ended(rows) == pytest.approx(1.5 / 3)
    assert math.isnan(samples._reward_of_ended(rows[4:]))


@pytest.mark.parametrize("count", [1, 3, 4])
def test_figures_are_those_of_the_answers_by_plain_forward_passes(ready, settings, count):
    setup, config = ready(**settings | {"eval_samples": count}, lr=1e-2)
    measure(setup, config)
    train_all(setup, config)
    prompts = setup.pairs["eval"]
    drawn = samples.sample_all(samples.make_sampler(setup, config), config, prompts)
    figures, before, together = measure(setup, config, 3)
    own = logps_by_hand(setup.model, prompts, drawn)
    first = logps_by_hand(setup.first.model, prompts, drawn)
    lengths = torch.tensor([[len(answer.ids) for answer in row] for row in drawn]).double()
    texts = [
        [setup.tokenizer.decode(a.ids, skip_special_tokens=True).strip() for a in row]
        for row in drawn
    ]
    rewards = torch.tensor([[len(text) for text in row] for row in texts]).double()
    ended = torch.tensor([[answer.ended for answer in row] for row in drawn])
    expected = {
        "reward": rewards.mean(1),
        "ended": ended.double().mean(1),
        "tokens": lengths.mean(1),
        "kl": (own - first).mean(1),
        "entropy": -own.sum(1) / lengths.sum(1),
        "distinct": torch.tensor([len(set(row)) / count for row in texts]).double(),
    }
    for name, values in expected.items():
        assert figures[f"samples/{name}"] == pytest.approx(values, abs=2e-5), name
    assert (figures["samples/kl"] != 0).all() and ended.any()
    assert together["samples/reward_of_ended"] == pytest.approx(rewards[ended].mean().item())
    assert before["samples/kl"].tolist() == [0.0] * 3


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_divergence_and_its_change_are_exactly_0_before_training(dpo, settings, dtype):
    assert dpo(**settings, dtype=dtype, eval_every=1, train_pairs=4, lr=1e-2) == 0
    first, *others = read_metrics("out", "eval")
    assert first["samples/kl"] == 0 and first["samples/kl/ci95"] == 0
    assert "samples/kl/change_ci95" not in first
    assert all(row["samples/kl"] != 0 and row["samples/kl/ci95"] > 0 for row in others)
    for name in NAMES:
        assert first.get(f"samples/{name}/change_ci95", 0) == 0


def test_a_run_does_not_go_on_with_a_kl_model_that_changed(
    dpo, settings, tmp_path, monkeypatch, capsys
):
    settings["kl_model"] = write_model(tmp_path / "other", seed=0)
    with monkeypatch.context() as patch:
        patch.setattr(report, "finish", lambda *_: sys.exit(9))
        with pytest.raises(SystemExit):
            dpo(**settings)
    write_model(tmp_path / "other", seed=1)
    assert dpo(**settings) == 2
    assert "the kl model changed since this run began" in capsys.readouterr().out


def test_answers_of_all_evaluations_have_the_same_random_numbers(dpo, settings):
    assert dpo(**settings, lr=1e-12, eval_every=1, train_pairs=2) == 0
    texts = []
    for path in sorted(Path("out/samples").iterdir()):
        texts.append([json.loads(line)["text"] for line in path.read_text().splitlines()])
    assert len(texts) == 2 and texts[0] == texts[1] and len(set(texts[0])) > 5


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_the_divergence_from_another_model_and_the_entropy_are_the_exact_ones(
    ready, settings, tmp_path, temperature
):
    other = write_model(tmp_path / "other", seed=0)
    weights = tmp_path / "other/model.safetensors"
    moved = write_model(tmp_path / "moved", seed=1)
    near, far = load_file(weights), load_file(f"{moved}/model.safetensors")
    mixed = {name: weight + 0.2 * far[name] for name, weight in near.items()}
    save_file(mixed, weights, {"format": "pt"})
    count = 2000
    limits = {"max_new_tokens": 1, "eval_samples": count, "eval_pairs": 1, "batch_size": 100}
    setup, config = ready(**settings | limits, kl_model=other, temperature=temperature)
    figures, _, _ = measure(setup, config)
    for number, pair in enumerate(setup.pairs["eval"]):
        ids = torch.tensor([list(pair.prompt_ids)])
        with torch.no_grad():
            own, first = (
                (model(input_ids=ids).logits[0, -1].double() / temperature).log_softmax(0)
                for model in (setup.model, setup.first.model)
            )
        p, ratio = own.exp(), own - first
        exact = {"kl": ratio, "entropy": -own}
        for name, values in exact.items():
            mean = (p * values).sum()
            error = ((p * (values - mean) ** 2).sum() / count).sqrt()
            found = figures[f"samples/{name}"][number]
            assert abs(found - mean) < 4 * error < 0.4 * mean, name


def test_a_stopped_run_goes_on_to_the_same_figures_and_answers(dpo, settings, monkeypatch):
    given = settings | {"eval_every": 2, "save_every": 1, "epochs": 2, "train_pairs": 4}
    assert dpo(**given, output_dir="whole") == 0
    original, steps = train_dpo.train_step, []

    def step(*arguments):
        steps.append(0)
        if len(steps) == 3:
            raise FloatingPointError("enough")
        return original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(train_dpo, "train_step", step)
        assert dpo(**given) == 1
    assert dpo(**given) == 0
    assert read_metrics("out") == read_metrics("whole")
    names = sorted(path.name for path in Path("whole/samples").iterdir())
    assert names == [f"step_000000{step}.jsonl" for step in (0, 2, 4)]
    for name in names:
        assert Path("out/samples", name).read_bytes() == Path("whole/samples", name).read_bytes()


def test_a_reward_that_is_edited_in_the_middle_of_a_run_is_said_and_not_compared(
    ready, settings, capsys
):
    setup, config = ready(**settings)
    measure(setup, config)
    assert "was edited" not in capsys.readouterr().out
    Path("judge.py").write_text(LENGTH + "# better\n")
    figures, before, _ = measure(setup, config, 1)
    said = "!!! judge.py:judge was edited: rewards do not compare with those before it !!!"
    assert said in capsys.readouterr().out
    assert before["samples/reward"].isnan().all() and figures["samples/reward"].isfinite().all()
    assert torch.equal(before["samples/tokens"], figures["samples/tokens"])


def test_a_change_that_is_not_known_has_no_figure_in_the_report():
    row = dict.fromkeys(samples.LABELS, 1.5)
    table = samples.describe([row, row | {"samples/reward/change_ci95": None}])
    assert "| reward | 1.500 | 1.500 |  |" in table


def test_a_run_reports_its_sampled_answers(dpo, settings):
    assert dpo(**settings, lr=1e-2) == 0
    first, last = read_metrics("out", "eval")
    report = Path("out/report.md").read_text()
    for name, label in samples.LABELS.items():
        (row,) = [line for line in report.splitlines() if line.startswith(f"| {label} |")]
        cells = [cell.strip() for cell in row.split("|")[2:-1]]
        assert cells[:2] == [f"{figures[name]:.3f}" for figures in (first, last)], name
        if name != samples.REWARD_OF_ENDED:
            assert cells[2].startswith(f"{last[name] - first[name]:+.3f} ± ")
    rows = read_rows(Path("out/samples/step_0000003.jsonl"))
    assert [(row["prompt"], row["sample"]) for row in rows] == [
        (p, s) for p in range(3) for s in range(3)
    ]
    rewards = torch.tensor([row["reward"] for row in rows])
    assert last["samples/reward"] == pytest.approx(rewards.mean().item())
    assert [row["reward"] for row in rows] == [len(row["text"]) for row in rows]


@pytest.mark.parametrize("changes", [{"reward": None}, {"eval_samples": 0}, {"eval_pairs": 0}])
def test_nothing_is_sampled_where_it_is_not_asked_for(dpo, settings, setups, changes):
    assert dpo(**settings | changes) == 0
    assert setups[0].first is None and not Path("out/samples").exists()
    assert not any(name.startswith("samples") for row in read_metrics() for name in row)
    assert "sampled answers" not in Path("out/report.md").read_text()


def test_a_single_held_out_prompt_is_measured_without_an_interval(dpo, settings):
    assert dpo(**settings | {"eval_pairs": 1, "eval_samples": 1}) == 0
    row = read_metrics("out", "eval")[-1]
    assert row["samples/reward/ci95"] is None and row["samples/tokens"] >= 1
    assert "| reward |" in Path("out/report.md").read_text()


def test_answers_beyond_a_sliding_window_are_scored_within_it(ready, settings, tmp_path):
    model = write_model(tmp_path / "mistral", "mistral", sliding_window=60)
    limits = {"max_new_tokens": 60, "model": model, "max_length": 60}
    setup, config = ready(**settings | limits, kl_model=model)
    prompts = setup.pairs["eval"]
    drawn = samples.sample_all(samples.make_sampler(setup, config), config, prompts)
    longest = 0
    for pair, answers in zip(prompts, drawn, strict=True):
        longest = max(longest, len(pair.prompt_ids) + max(len(answer.ids) for answer in answers))
    assert longest > 60 >= max(pair.length for part in setup.pairs.values() for pair in part)
    measure(setup, config)
    rows = read_rows(Path("out/samples/step_0000000.jsonl"))
    setup.policy.share_prompts(False)
    expected = logps_by_hand(setup.model, prompts, drawn).flatten()
    assert [row["logp"] for row in rows] == pytest.approx(expected.tolist(), abs=1e-4)


@pytest.mark.parametrize("family", ["mistral", "gpt2"])
def test_a_model_that_generate_draws_for_is_measured_in_a_run(
    dpo, settings, family, tmp_path, capsys
):
    changes = {"sliding_window": 60} if family == "mistral" else {}
    model = write_model(tmp_path / family, family, **changes)
    if family == "gpt2":
        limit = {"max_position_embeddings": 100}
        model = write_model(tmp_path / "short", family, **limit)
    assert dpo(**settings | {"model": model, "max_new_tokens": 60}, max_length=100) == 0
    said = capsys.readouterr().out
    assert ("drawn by transformers' generate" in said) == (family == "mistral")
    assert read_metrics("out", "eval")[-1]["samples/tokens"] > 1


def test_a_run_whose_predictions_are_not_finite_stops_with_advice(
    dpo, settings, monkeypatch, capsys
):
    original = train_dpo.train_step

    def step(setup, *given):
        figures = original(setup, *given)
        with torch.no_grad():
            setup.model.get_output_embeddings().weight.fill_(math.inf)
        return figures

    monkeypatch.setattr(train_dpo, "train_step", step)
    assert dpo(**settings, eval_every=1) == 1
    out = capsys.readouterr().out
    assert "Stopped: the model's predictions are not finite: lower lr" in out
    assert "another output_dir, or add --overwrite" in out
