"""What --dry-run shows before anything is trained: a pair as the model sees it, time and memory."""

import sys

import torch
from torch.utils.benchmark import Timer

from support.processes import WORLD, say

RED, GREEN, BLUE, PURPLE = 31, 32, 34, 35  # a terminal's codes


def show(setup, config):
    """Print the first pair and the estimate, of the Setup that a run would train on."""
    first = setup.pairs["train"][0]
    show_pair(first, setup.tokenizer)
    steps = config.epochs * len(setup.steps["train"])
    trained = 0
    for weight in setup.weights.values():
        trained += weight.numel()
    estimate(setup.policy, setup.rows, steps, trained, config)


def show_pair(pair, tokenizer):
    """Print a pair as the model sees it: in colours on a terminal, control tokens in purple."""
    special = set(tokenizer.all_special_ids)
    parts = [
        ("prompt", BLUE, pair.prompt_ids),
        ("chosen", GREEN, pair.chosen_ids),
        ("rejected", RED, pair.rejected_ids),
    ]
    for title, color, ids in parts:
        text = ""
        for token in ids:
            code = PURPLE if token in special else color
            text += _paint(tokenizer.decode(token), code)
        say(f"--- {title}, {len(ids)} tokens\n{text}")


def _paint(text, code):
    """Text in a colour, on a terminal."""
    if sys.stdout.isatty():
        return f"\033[{code}m{text}\033[0m"
    return text


@torch.no_grad()
def estimate(policy, rows, steps, trained, config):
    """Print what a run would take: minutes, measured on its longest row, and memory.

    policy   called with a row
    rows     "train" and "eval" -> list of data.Row
    steps    optimizer steps of the run
    trained  number of trained weights
    """
    longest = max(rows["train"], key=lambda row: len(row.input_ids))
    tokens = len(longest.input_ids)
    names = {"policy": policy, "row": longest}
    timer = Timer("policy(row)", globals=names, num_threads=torch.get_num_threads())
    seconds_a_token = timer.timeit(1).median / tokens
    minutes = _tokens_in_all(rows, steps, config) * seconds_a_token / WORLD / 60
    memory = _memory(policy.model, trained, tokens, config)
    gigabytes = memory / 1e9
    say(f"Estimate: {minutes:.1f} minutes and {gigabytes:.1f} GB for each process")
    say("Which answers the reference prefers already, a run tells after its reference pass")


def _tokens_in_all(rows, steps, config):
    """Tokens of all forward passes in a run, a backward pass counted as two forward ones."""
    tokens = {"train": 0, "eval": 0}
    for split, part in rows.items():
        for row in part:
            tokens[split] += len(row.input_ids)
    evaluations = 2  # the reference's, and the last
    if config.reference_model:
        evaluations += 1  # the policy's own before its first step
    if config.eval_every:
        evaluations += steps // config.eval_every
    # evaluations are in float32, which takes at least twice bfloat16's time
    slower = 4 // getattr(torch, config.dtype).itemsize
    passes = 1 + 3 * config.epochs  # the reference's, and three for each step
    return tokens["train"] * passes + tokens["eval"] * evaluations * slower


def _memory(model, trained, tokens, config):
    """Bytes that each process needs to train with rows of at most so many tokens."""
    libraries = 0.8e9
    size = getattr(torch, config.dtype).itemsize
    frozen = model.num_parameters() - trained
    # in float32 each trained weight, its gradient and two moments
    bytes_a_trained = 16
    if size < 4 and WORLD == 1 and not config.lora_r:
        bytes_a_trained += size  # its rounded copy, which computes
    weights = frozen * size + trained * bytes_a_trained
    # so many hidden states a layer keeps for its backward pass
    kept_a_layer = 1 if config.activation_checkpointing else 30
    shape = model.config.get_text_config()
    hidden_states = tokens * shape.hidden_size * shape.num_hidden_layers
    activations = hidden_states * kept_a_layer * size
    return libraries + weights / WORLD + activations
