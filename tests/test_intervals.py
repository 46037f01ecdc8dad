"""Means and intervals of figures."""

import math

import pytest
import torch

from helpers import normal
from support.intervals import mean_half_width, share_half_width, summarize


@pytest.mark.parametrize(
    "count, quantile",  # of Student's t at 97.5 %, from tables
    [(3, 4.3027), (4, 3.1824), (5, 2.7764), (10, 2.2622), (20, 2.0930), (100, 1.9842)],
)
def test_the_interval_of_a_mean_is_students_and_widest_for_few_pairs(count, quantile):
    values = normal(count, seed=count)
    standard_error = values.std().item() / math.sqrt(count)
    ratio = mean_half_width(values) / standard_error
    assert 0.9999 * quantile < ratio < 1.05 * quantile


def test_the_mean_of_a_single_pair_has_no_interval():
    assert math.isnan(mean_half_width(torch.tensor([0.3])))


def wins(won, count):
    return torch.tensor([1.0] * won + [0.0] * (count - won), dtype=torch.float64)


@pytest.mark.parametrize("won, count", [(82, 100), (54, 80), (4, 4), (0, 25), (11, 20)])
def test_the_interval_of_a_share_ends_where_wilsons_score_equation_holds(won, count):
    share = won / count
    half_width = share_half_width(wins(won, count))
    end = share - half_width if share > 0.5 else share + half_width
    standard_error = math.sqrt(end * (1 - end) / count)
    assert half_width == pytest.approx(1.959964 * standard_error, rel=1e-9)


def test_all_pairs_won_is_not_certainty():
    assert share_half_width(wins(4, 4)) > 0.48
    assert 0.15 < share_half_width(wins(20, 20)) < 0.17


@pytest.mark.parametrize("count", [20, 21, 30, 50, 100])
def test_chance_alone_passes_for_a_change_of_accuracy_about_one_time_in_twenty(count):
    claimed = 0
    for won in range(count + 1):
        if abs(won / count - 0.5) > share_half_width(wins(won, count)):
            claimed += math.comb(count, won) / 2**count
    assert 0.01 < claimed < 0.08


def test_one_half_is_known_exactly_before_training_and_not_with_a_pair_decided():
    assert share_half_width(torch.full((9,), 0.5)) == 0
    assert share_half_width(torch.tensor([0.5, 0.5, 1.0])) > 0.3


def test_a_summary_with_intervals_counts_its_pairs():
    metrics = {"loss": normal(7, seed=0), "rewards/accuracies": wins(7, 7)}
    figures = summarize(metrics, before={name: torch.zeros(7) for name in metrics})
    assert figures["pairs"] == 7
    assert figures["loss/ci95"] == mean_half_width(metrics["loss"])
    assert figures["rewards/accuracies/ci95"] == share_half_width(metrics["rewards/accuracies"]) > 0
    assert "pairs" not in summarize(metrics)
    assert not any("change" in name for name in figures)


def test_pairs_of_one_prompt_count_once_where_they_are_alike():
    values = normal(20, seed=3)
    prompts = [number // 5 for number in range(100)]
    five_times = values.repeat_interleave(5)
    assert mean_half_width(five_times, prompts) == pytest.approx(mean_half_width(values))
    assert mean_half_width(values, list(range(20))) == mean_half_width(values)
    won = wins(14, 20).repeat_interleave(5)
    assert share_half_width(won, prompts) == share_half_width(wins(14, 20))
    figures = summarize({"loss": five_times}, {"loss": torch.zeros(100)}, prompts)
    assert (figures["pairs"], figures["prompts"]) == (100, 20)
    assert figures["loss/ci95"] == mean_half_width(five_times, prompts)
    assert math.isnan(mean_half_width(values, ["one"] * 20))


def test_the_interval_of_pairs_of_few_prompts_covers_as_often_as_it_says():
    generator = torch.Generator().manual_seed(0)
    prompts = [number // 5 for number in range(100)]
    missed = 0
    for _ in range(1000):
        shares = torch.rand(20, generator=generator).repeat_interleave(5)
        values = (torch.rand(100, generator=generator) < shares).double()
        missed += abs(values.mean().item() - 0.5) > mean_half_width(values, prompts)
    assert 30 <= missed <= 70


def test_a_changes_interval_is_paired_where_pairs_did_not_begin_alike():
    before = {"loss": 100 * normal(9, seed=0), "rewards/margins": torch.zeros(9)}
    change = normal(9, seed=1)
    after = {name: values + change for name, values in before.items()}
    figures = summarize(after, before)
    assert figures["loss/change_ci95"] == pytest.approx(mean_half_width(change), rel=1e-9)
    assert figures["loss/ci95"] > 10 * figures["loss/change_ci95"]
    assert "rewards/margins/change_ci95" not in figures
