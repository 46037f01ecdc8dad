"""Means of the pairs' figures, with 95 % intervals."""

import math

NORMAL_QUANTILE = 1.959964  # of 97.5 %


def summarize(metrics, before=None):
    """Means of the pairs' figures; with those before training also how many pairs, and intervals.

    name/ci95 is half a 95 % interval's width: mean_half_width's, of accuracies share_half_width's.
    It is also that of the paired change since the start of what was then the same for all pairs
    (margin 0, accuracy one half, where policy and reference were one). Of what was not,
    name/change_ci95 is half the width of the paired change's.

    metrics, before  dict of (n,) vectors, from score
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
        figures[f"{name}/ci95"] = half_width(values)
        earlier = before[name].cpu().double()
        began_alike = (earlier == earlier[0]).all()
        if not began_alike:
            change = values - earlier
            figures[f"{name}/change_ci95"] = mean_half_width(change)
    return figures


def mean_half_width(values):
    """Half the 95 % interval of a mean by Student's t, whose quantile is larger for few values.

    The quantile is D. L. Wallace's normal approximation (Annals of Mathematical Statistics 30,
    1959, p. 1121), solved for t: 4 % too large for 3 values, 0.01 % for 20.

    values   (n,) float
    returns  float; nan for a single value
    """
    number = len(values)
    if number == 1:
        return math.nan
    freedom = number - 1
    z = NORMAL_QUANTILE * (8 * freedom + 3) / (8 * freedom + 1)
    t = math.sqrt(freedom * math.expm1(z**2 / freedom))
    deviation = values.std().item()
    return t * deviation / math.sqrt(number)


def share_half_width(wins):
    """The larger half of E. B. Wilson's 95 % score interval of a share.

    Wilson, "Probable inference, the law of succession, and statistical inference", JASA 22, 1927.
    The interval is not of width 0 where all pairs are won. Its larger half is the one towards one
    half, the share before training, with which an evaluation is compared.

    wins     (n,) float: 1, 0, or one half for a tie, which only makes the interval too wide
    returns  float; 0 where all are ties, as before training: one half by definition, not by chance
    """
    all_tied = (wins == 0.5).all()
    if all_tied:
        return 0.0
    share = wins.mean().item()
    z2_per_pair = NORMAL_QUANTILE**2 / len(wins)
    whole = 1 + z2_per_pair
    center = (share + z2_per_pair / 2) / whole
    variance = share * (1 - share)
    variance += z2_per_pair / 4
    half_width = math.sqrt(z2_per_pair * variance)
    half_width /= whole
    return abs(share - center) + half_width
