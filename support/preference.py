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
