"""What held-out figures claim: no change from chance, and a sentence on what to try."""

import json
import math

import pytest

from helpers import BETTER, CONFIG, UNFINITE, WORSE, held_out
from support import verdict
from support.config import read_config


def test_no_measurable_change_is_claimed_below_twenty_pairs():
    four = verdict.compare(held_out(4, half_width=0.0, **BETTER))
    assert "Measurable change: too few held-out pairs (4) to tell: 20 or more." in four
    assert "too few held-out pairs (19)" in verdict.compare(held_out(19, **BETTER))
    names = "loss, rewards/margins, rewards/accuracies"
    assert f"Measurable change: {names}." in verdict.compare(held_out(20, **BETTER))
    assert "Measurable change: none." in verdict.compare(held_out(20))


def test_a_run_with_three_held_out_pairs_claims_nothing(finished):
    for text in (finished.printed, (finished.folder / "report.md").read_text()):
        assert "too few held-out pairs (3) to tell: 20 or more" in text
        assert "Too few pairs were held out (3)" in text


def test_a_small_interval_does_not_show_as_zero():
    text = verdict.compare(held_out(half_width=2e-5, loss=math.log(2) - 1e-4))
    assert "-0.000100 ± 0.000020" in text and "± 0.0000 |" not in text


def test_pairs_that_did_not_begin_alike_are_compared_by_their_paired_change():
    rows = held_out(half_width=0.5, **BETTER)
    assert "Measurable change: none." in verdict.compare(rows)
    rows[-1]["loss/change_ci95"] = 0.01
    assert "-0.0931 ± 0.0100" in verdict.compare(rows)
    assert "Measurable change: loss." in verdict.compare(rows)


def conclusion(rows, answers=(), trained=4, skipped=(), **settings):
    (config,), _ = read_config(CONFIG, [f"{k}={json.dumps(v)}" for k, v in settings.items()])
    steps = [{"step": step} for step in range(trained)]
    for step in skipped:
        steps[step]["skipped"] = [3]
    return verdict.conclude(config, steps, rows, list(answers))


def test_the_default_recipes_end_says_that_answers_hardly_change_and_what_shows_a_change():
    same = [("Q", "A", "A"), ("Q2", "B", "B")]
    text = conclusion(held_out(**BETTER), same)
    assert "The weights moved" in text and "At lr 1e-7 the answers hardly can" in text
    assert "all 2 sampled ones are as before" in text
    higher = "To see a change, the same command with lr=5e-6"
    assert text.endswith(f"{higher} output_dir=runs/beta0.1_lr5e-06.")
    apart = conclusion(held_out(**BETTER), same, output_dir="mine")
    assert apart.endswith("the same command with lr=5e-6 output_dir=mine_lr5e-6.")
    of_rounds = conclusion(held_out(**BETTER), same, output_dir="mine/round_2")
    assert of_rounds.endswith("the same command with lr=5e-6 output_dir=mine_lr5e-6.")


def test_pairs_of_too_few_prompts_are_too_few():
    rows = held_out(**BETTER)
    assert "Measurable change: loss" in verdict.compare(rows)
    rows[-1]["prompts"] = 4
    assert "too few held-out pairs (4) to tell" in verdict.compare(rows)
    assert "Too few pairs were held out (4) to tell" in conclusion(rows)


def test_a_low_rate_whose_answers_changed_is_not_said_to_leave_them():
    text = conclusion(held_out(**BETTER), [("Q", "A", "B")], lr=5e-7)
    assert "the answers hardly can" not in text and "The model prefers the chosen" in text
    assert "the answers hardly can" in conclusion(held_out(**BETTER), lr=5e-7)


@pytest.mark.parametrize(
    "rows, expected",
    [
        (held_out(**BETTER), "The model prefers the chosen answers of held-out pairs more"),
        (held_out(**WORSE), "Got worse on held-out pairs, by more than chance: loss, rewards/m"),
        (held_out(**BETTER | {"loss": 0.9}), "chance: loss (better: rewards/margins, rewards/acc"),
        (held_out(), "No change beyond chance. Try more pairs, or the same command with lr=5e-5 "),
        (held_out(4, **BETTER), "Too few pairs were held out (4) to tell learning from chance"),
        (held_out(**UNFINITE), "The run diverged: lower lr (now 1e-5), or set dtype=float32."),
        ([], "Without held-out pairs nothing tells what it learned: eval_pairs=100."),
    ],
)
def test_the_end_of_a_run_says_what_the_table_means(rows, expected):
    assert expected in conclusion(rows, [("Q", "A", "B")], lr=1e-5)


def test_a_high_rate_is_not_advised_to_be_higher():
    assert conclusion(held_out(), lr=1e-3) == "No change beyond chance. Try more pairs."
    same = [("Q", "A", "A")]
    assert "hardly can" not in conclusion(held_out(**BETTER), same, lr=1e-3)


def test_the_end_of_a_run_tells_of_skipped_updates():
    text = conclusion(held_out(**BETTER), skipped=[1])
    assert text.startswith("1 of 4 updates were skipped") and "The weights moved" in text
    ended = conclusion(held_out(**BETTER), skipped=[3], dtype="float32")
    assert ended == "The run diverged: lower lr (now 1e-7)."


def test_figures_that_are_not_finite_are_no_measured_absence_of_change():
    assert "Measurable change: unknown." in verdict.compare(held_out(**UNFINITE))
    assert "Measurable change: unknown." in verdict.compare([])
