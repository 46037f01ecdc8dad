"""Means of the pairs' figures, with 95 % intervals."""

import math

import torch

NORMAL_QUANTILE = 1.959964  # of 97.5 %


def summarize(metrics, before=None, prompts=None):
    """Means of the pairs' figures; with those before training also how many pairs, and intervals.

    name/ci95 is half a 95 % interval's width: mean_half_width's, of accuracies share_half_width's.
    It is also that of the paired change since the start of what was then the same for all pairs
    (margin 0, accuracy one half, where policy and reference were one). Of what was not,
    name/change_ci95 is half the width of the paired change's.

    metrics, before  dict of (n,) vectors, from score
    prompts          those of the pairs, by which they are not independent; None is all different
    returns          dict of float; a ci95 of a single pair's mean is nan
    """
    figures = {}
    after = {}
    for name, values in metrics.items():
        after[name] = values.cpu().double()
        figures[name] = after[name].mean().item()
    if before is None:
        return figures
    for name, values in after.items():
        figures["pairs"] = len(values)
        half_width = mean_half_width
        if name == "rewards/accuracies":
            half_width = share_half_width
        figures[f"{name}/ci95"] = half_width(values, prompts)
        earlier = before[name].cpu().double()
        began_alike = (earlier == earlier[0]).all()
        if not began_alike:
            change = values - earlier
            figures[f"{name}/change_ci95"] = mean_half_width(change, prompts)
    if prompts is not None:
        distinct = len(set(prompts))
        if distinct < figures["pairs"]:
            figures["prompts"] = distinct
    return figures


def mean_half_width(values, prompts=None):
    """Half the 95 % interval of a mean by Student's t, whose quantile is larger for few values.

    Values of one prompt are no independent ones: their deviations from the mean are added up, and
    the sums are as many as there are prompts (Liang and Zeger, Biometrika 73, 1986, p. 13).

    The quantile is D. L. Wallace's normal approximation (Annals of Mathematical Statistics 30,
    1959, p. 1121), solved for t: 4 % too large for 3 values, 0.01 % for 20.

    values   (n,) float
    prompts  the n of which they are; None is all different
    returns  float; nan for a single prompt
    """
    values = values.double()
    sums = values - values.mean()
    if prompts is not None:
        sums = _add_up(sums, prompts)
    if len(sums) == 1:
        return math.nan
    freedom = len(sums) - 1
    z = NORMAL_QUANTILE * (8 * freedom + 3) / (8 * freedom + 1)
    t = math.sqrt(freedom * math.expm1(z**2 / freedom))
    variance = sums.square().sum().item()
    variance *= len(sums) / freedom
    return t * math.sqrt(variance) / len(values)


def _add_up(values, prompts):
    """The sums of the values of each prompt, in the order in which these come first."""
    sums = {}
    for value, prompt in zip(values, prompts, strict=True):
        sums.setdefault(prompt, torch.zeros_like(value))
        sums[prompt] += value
    return torch.stack(list(sums.values()))


def share_half_width(wins, prompts=None):
    """The larger half of E. B. Wilson's 95 % score interval of a share.

    Wilson, "Probable inference, the law of succession, and statistical inference", JASA 22, 1927.
    The interval is not of width 0 where all pairs are won. Its larger half is the one towards one
    half, the share before training, with which an evaluation is compared.

    wins     (n,) float: 1, 0, or one half for a tie, which only makes the interval too wide
    prompts  the n of which they are, each of which counts as one pair; None is all different
    returns  float; 0 where all are ties, as before training: one half by definition, not by chance
    """
    all_tied = (wins == 0.5).all()
    if all_tied:
        return 0.0
    share = wins.mean().item()
    number = len(wins)
    if prompts is not None:
        number = len(set(prompts))
    z2_per_pair = NORMAL_QUANTILE**2 / number
    whole = 1 + z2_per_pair
    center = (share + z2_per_pair / 2) / whole
    variance = share * (1 - share)
    variance += z2_per_pair / 4
    half_width = math.sqrt(z2_per_pair * variance)
    half_width /= whole
    return abs(share - center) + half_width
