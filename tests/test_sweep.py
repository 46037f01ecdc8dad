"""A sweep's runs side by side: their order, what is marked, any values, the picture."""

import csv
import itertools
import json
import math
from pathlib import Path

import pytest
from matplotlib.colors import to_hex

from helpers import CONFIG, UNFINITE, figures_of, held_out
from support import sweep
from support.config import read_config


def sweep_of(*figures, failed=None, **settings):
    """summarize_sweep of made-up runs; the rows of sweep.csv."""
    overrides = [f"{k}={json.dumps(v)}" for k, v in settings.items()]
    configs, varied = read_config(CONFIG, [*overrides, "output_dir=s/run"])
    for config, after in zip(configs, figures, strict=True):
        folder = Path(config.output_dir)
        folder.mkdir(parents=True)
        if after is not None:
            rows = held_out(**after)
            (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    reasons = {configs[number].output_dir: text for number, text in (failed or {}).items()}
    sweep.summarize_sweep(configs, varied, reasons)
    return list(csv.DictReader(Path("s/sweep.csv").read_text().splitlines()))


def column(rows, name):
    return [row[name] for row in rows]


def test_runs_of_the_same_accuracy_are_ordered_by_loss_not_by_margin(capsys):
    figures = [figures_of(0.6, 0.68, 9.0), figures_of(0.7, 0.7, 3.0), figures_of(0.7, 0.6, 1.0)]
    rows = sweep_of(*figures, lr=[1e-7, 1e-6, 1e-5])
    assert column(rows, "lr") == ["1e-05", "1e-06", "1e-07"]
    assert "compare only" not in capsys.readouterr().out


def test_losses_and_margins_of_different_beta_do_not_decide_and_that_is_said(capsys):
    figures = [figures_of(0.7, 0.69, 0.1), figures_of(0.7, 0.6, 9.0), figures_of(0.8, 0.9, 0.0)]
    rows = sweep_of(*figures, beta=[0.1, 0.5, 0.2])
    assert column(rows, "beta") == ["0.2", "0.1", "0.5"]
    said = "Losses and margins compare only between runs of the same beta."
    assert said in capsys.readouterr().out


@pytest.mark.parametrize("rounds", [[0, 2], [2, 0]])
def test_offline_and_rounds_are_ordered_by_reward_whichever_comes_first(rounds, capsys):
    of_runs = {}
    for number, accuracy, reward in ((0, 0.8, 0.14), (2, 0.55, 0.46)):
        of_runs[number] = figures_of(accuracy, 0.6, 0.1)
        for name in ("samples/reward", "samples/kl"):
            of_runs[number] |= {name: reward, f"{name}/ci95": 0.1}
    for number, figures in of_runs.items():
        folder = Path(f"s/run_rounds{number}") / ("round_2" if number else "")
        folder.mkdir(parents=True)
        rows = "".join(json.dumps(row) + "\n" for row in held_out(**figures))
        (folder / "metrics.jsonl").write_text(rows)
    reward = "reward=judge.py:judge"
    configs, varied = read_config(CONFIG, [f"rounds={rounds}", reward, "output_dir=s/run"])
    sweep.summarize_sweep(configs, varied)
    rows = list(csv.DictReader(Path("s/sweep.csv").read_text().splitlines()))
    assert column(rows, "rounds") == ["2", "0"]
    said = "Accuracies, losses and margins compare only between runs of the same rounds."
    assert said in capsys.readouterr().out


@pytest.mark.parametrize(
    "name, values, said",
    [
        ("model", ["a", "b"], "Accuracies, losses and margins compare only between runs of the"),
        ("seed", [1, 2], "Runs of another seed may have been evaluated on other pairs."),
        ("lr", [1e-6, 2e-6], None),
    ],
)
def test_figures_that_do_not_compare_are_said_not_to(capsys, name, values, said):
    sweep_of(figures_of(0.7, 0.6, 0.1), figures_of(0.6, 0.6, 0.1), **{name: values})
    shown = capsys.readouterr().out
    assert (said or "The sweep is in") in shown
    assert bool(said) == ("compare only" in shown or "other pairs" in shown)


def test_a_sweep_over_the_loss_keeps_each_runs_kind_beside_its_figure():
    rows = sweep_of(figures_of(0.7, 25.0, 0.1), figures_of(0.7, 0.6, 0.1), loss=["ipo", "sigmoid"])
    assert column(rows, "loss") == ["ipo", "sigmoid"]
    assert column(rows, "held-out loss") == ["25.0", "0.6"]


def test_a_run_that_kept_the_best_stands_in_the_table_with_that_evaluation():
    rows = [*held_out(**figures_of(0.7, 0.6, 1.0)), *held_out(**figures_of(0.9, 0.8, 2.0))[1:]]
    for step, row in enumerate(rows):
        row["step"] = step
    Path("s").mkdir()
    Path("s/metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for keep, accuracy in (("best", 0.7), ("last", 0.9)):
        configs, varied = read_config(CONFIG, [f"keep={keep}", "output_dir=s"])
        sweep.summarize_sweep(configs, ["lr"])
        (row,) = csv.DictReader(Path("sweep.csv").read_text().splitlines())
        assert float(row["rewards/accuracies"]) == accuracy


def test_diverged_and_failed_runs_come_last_and_are_marked(capsys):
    figures = [UNFINITE, figures_of(0.9, 0.1, 99.0), None, figures_of(0.6, 0.68, 0.1)]
    rows = sweep_of(*figures, failed={1: "no space left"}, lr=[1e-1, 1e-2, 1e-3, 1e-4])
    assert column(rows, "lr") == ["0.0001", "0.1", "0.01", "0.001"]
    assert column(rows, "outcome") == ["finished", "diverged", "failed", "not evaluated"]
    shown = capsys.readouterr().out
    assert "failed" in shown and "diverged" in shown
    assert column(rows, "reason") == ["", "", "no space left", ""]
    assert "99" not in Path("s/sweep.csv").read_text()


def test_a_run_whose_last_update_was_skipped_does_not_lead():
    skipped = {"step": 9, "split": "train", "skipped": [1]}
    Path("s/run_lr0.1").mkdir(parents=True)
    rows = [skipped, *held_out(**figures_of(0.9, 0.1, 9.0))]
    Path("s/run_lr0.1/metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (config,), _ = read_config(CONFIG, ["output_dir=s/run_lr0.1"])
    assert sweep._outcome(config, None)["outcome"] == "diverged"


def test_a_sweep_of_which_every_run_failed_has_a_table_and_no_picture():
    rows = sweep_of(None, None, failed={0: "a", 1: "b"}, lr=[1e-1, 1e-2])
    assert column(rows, "outcome") == ["failed", "failed"]
    assert not Path("s/sweep.png").exists()


@pytest.mark.parametrize(
    "settings",
    [
        {"revision": [None, "v1"]},
        {"revision": ["v1", None], "lr": [1e-6, 1e-7]},
        {"shuffle": [True, False], "eval_split": [None, "test"]},
        {"split": ["train", "more"]},
    ],
)
def test_null_truth_and_text_can_be_swept(settings):
    figures = [figures_of(0.7, 0.6, 0.1)] * math.prod(len(values) for values in settings.values())
    rows = sweep_of(*figures, **settings)
    for name, values in settings.items():
        assert set(column(rows, name)) == {str(sweep.plain(value)) for value in values}


def test_a_sweep_of_which_some_runs_sample_answers_draws_these_on_the_frontier(figures):
    sampled = figures_of(0.6, 0.6, 0.1)
    for name in ("samples/reward", "samples/kl"):
        sampled |= {name: 0.25, f"{name}/ci95": 0.1}
    rows = sweep_of(figures_of(0.7, 0.6, 0.1), sampled, eval_samples=[0, 2])
    assert column(rows, "samples/reward") == ["", "0.25"]
    frontier = figures[0].axes[2]
    legend = frontier.get_legend()
    names = [text.get_text() for text in legend.get_texts()]
    assert names == ["eval_samples 2"]
    (two,) = legend.legend_handles
    drawn = [line.get_marker() for line in frontier.lines if 0.25 in line.get_xdata()]
    assert two.get_marker() in drawn


def test_a_line_of_the_frontier_has_its_color_where_an_earlier_line_has_no_rewards(figures):
    sampled = figures_of(0.6, 0.6, 0.1)
    for name in ("samples/reward", "samples/kl"):
        sampled |= {name: 0.25, f"{name}/ci95": 0.1}
    runs = [figures_of(0.7, 0.6, 0.1), sampled] * 2
    sweep_of(*runs, eval_samples=[0, 2], lr=[1e-6, 1e-7])
    colors = []
    for axis in figures[0].axes:
        colors.append(axis.containers[-1].lines[0].get_color())
    assert len(set(map(to_hex, colors))) == 1


def test_sweeping_null_and_a_value_ends_in_a_table(dpo, capsys):
    settings = {"train_pairs": 2, "eval_pairs": 2, "output_dir": "s/run"}
    assert dpo(revision=[None, "v1"], **settings) == 0
    assert "null" in capsys.readouterr().out and Path("s/sweep.png").exists()


def test_a_sweeps_intervals_stand_beside_each_other_and_its_lines_are_named(figures):
    runs = [figures_of(0.7, 0.6, 0.1)] * 6
    sweep_of(*runs, beta=[0.1, 0.5], lr=[1e-7, 1e-6, 1e-5])
    for axis in figures[0].axes:
        positions = []
        for bars in axis.containers:
            positions += list(bars.lines[0].get_xdata())
        assert len(positions) == 6
        assert min(b - a for a, b in itertools.pairwise(sorted(positions))) > 0.05
        assert [tick.get_text() for tick in axis.get_xticklabels()] == ["1e-07", "1e-06", "1e-05"]
    labels = {text.get_text() for text in figures[0].legends[0].get_texts()}
    assert labels == {"before training", "beta 0.1", "beta 0.5"}
