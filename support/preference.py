"""Which of its two answers a model prefers by itself, before any training."""

import torch


def answer_lengths(pairs, device):
    """By split: (pairs, 2) int64, how many tokens the chosen and the rejected answers have.

    pairs  "train" and "eval" -> list of data.Pair
    """
    lengths = {}
    for split, part in pairs.items():
        numbers = []
        for pair in part:
            numbers.append(len(pair.chosen_ids))
            numbers.append(len(pair.rejected_ids))
        flat = torch.tensor(numbers, dtype=torch.int64, device=device)
        lengths[split] = flat.view(-1, 2)
    return lengths


def describe_preference(reference, lengths):
    """Lines on the share of pairs whose chosen answer the reference prefers, before training.

    The accuracy after training is not the same question: it counts the pairs that moved to the
    right side from wherever the reference had them.

    reference  "train" and "eval" -> (pairs, 2) log-probabilities of whole answers
    lengths    the same of how many tokens they have
    """
    whole = {}
    averages = {}
    for split, logps in reference.items():
        if len(logps) > 0:
            whole[split] = logps
            averages[split] = logps / lengths[split]
    return [
        f"the reference's log-probability is higher for the chosen answer: {_shares(whole)}",
        f"  its average a token is higher: {_shares(averages)}",
    ]


def _shares(logps):
    """In how many pairs the first is higher, by split; a tie is not."""
    parts = []
    for split, values in logps.items():
        chosen, rejected = values.unbind(1)
        share = (chosen > rejected).double().mean().item()
        parts.append(f"{100 * share:.1f} % of {split} pairs")
    return ", ".join(parts)
