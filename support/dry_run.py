"""What --dry-run shows before anything is trained: the data, a pair as the model sees it, the cost.

Of each data set its shapes, what of it is not used and what its preferences have in common, and a
record beside the pair made of it.
"""

import json
import sys
from collections import Counter
from dataclasses import replace

import torch
from torch.utils.benchmark import Timer

from support.errors import shorten
from support.four_bit import FourBitLinear, count_weights
from support.processes import WORLD, say
from support.samples import make_sampler

RED, GREEN, BLUE, PURPLE = 31, 32, 34, 35  # a terminal's codes
BRIEF = 16  # tokens of the answers that are drawn for an estimate
BYTES_A_LOGIT = 16  # measured of Gemma 2 in bfloat16: the logits and what their softmax keeps
SHOWN_TOKENS = (60, 30)  # of the beginning and of the end of a long text


def look(sets, pairs, tokenizer):
    """Print what was made of each data set.

    sets   support.sources.Sets
    pairs  list of data.Pair, whose indices point into sets
    """
    by_set = {name: [] for name in sets.names}
    for pair in pairs:
        by_set[sets.name_of(pair.index)].append(pair)
    for name, part in by_set.items():
        say(f"=== {name}: {len(part)} pairs")
        if part:
            say("\n".join(describe(part)))
            say("\n".join(["--- a record", *shorten(sets[part[0].index])]))
            show_pair(part[0], tokenizer)
    say("===")


def describe(pairs):
    """Lines on the pairs of a set: shapes, columns not used, scores, lengths, prompts, turns."""
    shapes = Counter()
    unused = Counter()
    prompts = Counter()
    longer = 0
    lower = 0
    dialogues = 0
    for pair in pairs:
        shapes[pair.shape] += 1
        unused.update(pair.unused)
        prompts[pair.prompt] += 1
        longer += len(pair.chosen_ids) > len(pair.rejected_ids)
        lower += pair.reversed
        roles = [message["role"] for message in json.loads(pair.prompt)]
        dialogues += "assistant" in roles
    repeated = sum(times > 1 for times in prompts.values())
    lines = [
        f"  prefer the answer of lower score: {lower}",
        f"  prefer the longer answer: {longer / len(pairs):.0%}",
        f"  prompts in more than one pair: {repeated / len(prompts):.0%}",
    ]
    if any(shapes):
        lines.insert(0, f"  recognised as: {_list(shapes)}")
        lines.insert(1, f"  filled columns not used in the pair: {_list(unused)}")
    if dialogues:
        lines.append(f"  of several turns, of which only the last answer is scored: {dialogues}")
    return lines


def _list(counts):
    named = [f"{name} ({number})" for name, number in counts.most_common() if name]
    return ", ".join(named) or "none"


def show_pair(pair, tokenizer):
    """Print a pair as the model sees it: in colours on a terminal, control tokens in purple."""
    special = set(tokenizer.all_special_ids)
    parts = [
        ("prompt", BLUE, pair.prompt_ids),
        ("chosen", GREEN, pair.chosen_ids),
        ("rejected", RED, pair.rejected_ids),
    ]
    first, last = SHOWN_TOKENS
    for title, color, ids in parts:
        left_out = len(ids) - first - last
        if left_out < 10:
            left_out = 0
        text = ""
        for place, token in enumerate(ids):
            if place == first and left_out:
                text += f" [... {left_out} tokens ...] "
            if left_out and first <= place < first + left_out:
                continue
            code = PURPLE if token in special else color
            text += _paint(tokenizer.decode(token), code)
        say(f"--- {title}, {len(ids)} tokens\n{text}")


def _paint(text, code):
    """Text in a colour, on a terminal."""
    if sys.stdout.isatty():
        return f"\033[{code}m{text}\033[0m"
    return text


@torch.no_grad()
def estimate(setup, config):
    """Print what a run would take: minutes, measured on its longest row, and memory.

    setup  the Setup that the run would train on
    """
    steps = config.epochs * len(setup.steps["train"])
    trained = 0
    for weight in setup.weights.values():
        trained += weight.numel()
    longest = max(setup.rows["train"], key=lambda row: _tokens(setup.pairs["train"], row))
    tokens = _tokens(setup.pairs["train"], longest)
    names = {"policy": setup.policy, "row": setup.make_row("train", longest)}
    timer = Timer("policy(row)", globals=names, num_threads=torch.get_num_threads())
    seconds_a_token = timer.timeit(1).median / tokens
    minutes = _tokens_in_all(setup.pairs, steps, config) * seconds_a_token / WORLD / 60
    memory = _memory(setup.policy, trained, tokens, config)
    samples_held_out = config.reward and config.eval_samples and setup.pairs["eval"]
    if samples_held_out:  # the first model stays beside the policy
        size = getattr(torch, config.dtype).itemsize
        memory += count_weights(setup.model) * size / WORLD
    cost = f"{minutes:.1f} minutes and {memory / 1e9:.1f} GB for each process"
    say(f"Estimate for {config.output_dir}: {cost}")
    if config.rounds:
        _estimate_rounds(setup, config)
    elif samples_held_out:
        times = _evaluations(steps, config)
        minutes = times * _minutes_to_sample(setup, config, "eval", config.eval_samples)
        say(
            f"On top come answers to held-out prompts, sampled {times} times in at most "
            f"{minutes:.0f} minutes, and their rewards"
        )
    say("Which answers the reference prefers already, a run tells after its reference pass")


def _estimate_rounds(setup, config):
    """Print what the answers of rounds would take."""
    count = len(setup.pairs["train"])
    samples = config.samples_per_prompt
    minutes = config.rounds * _minutes_to_sample(setup, config, "train", samples)
    say(
        f"That is of the set's own pairs. {config.rounds} rounds train on their own, at most one a "
        f"prompt, and sample {count * samples * config.rounds:,} answers to {count:,} prompts a "
        f"round for them, in at most {minutes:.0f} minutes; answers to held-out prompts come on top"
    )


def _minutes_to_sample(setup, config, split, samples):
    """What so many answers to each prompt of a split take at most, measured on the first ones."""
    prompts = [pair.prompt_ids for pair in setup.pairs[split]]
    brief = replace(config, max_new_tokens=min(BRIEF, config.max_new_tokens))
    sampler = make_sampler(setup, brief)
    batch = sampler.batches(prompts, samples)[0]
    names = {"draw": sampler.draw, "given": (prompts, batch, samples, "estimate")}
    timer = Timer("draw(*given)", globals=names, num_threads=torch.get_num_threads())
    seconds = timer.timeit(1).median / (len(batch) * samples * brief.max_new_tokens)
    return len(prompts) * samples * config.max_new_tokens * seconds / 60


def _tokens(pairs, members):
    """Tokens of the pairs at these positions, laid out as one row."""
    tokens = 0
    for index in members:
        tokens += pairs[index].tokens
    return tokens


def _evaluations(steps, config):
    """How often the held-out pairs are evaluated, before and after training included."""
    amid = (steps - 1) // config.eval_every if config.eval_every else 0
    return 2 + amid


def _tokens_in_all(pairs, steps, config):
    """Tokens of all forward passes in a run, a backward pass counted as two forward ones."""
    tokens = {}
    for split, part in pairs.items():
        tokens[split] = _tokens(part, range(len(part)))
    evaluations = _evaluations(steps, config)
    if config.reference_model:
        evaluations += 1  # the reference's is not the first
    # evaluations are in float32, which takes at least twice bfloat16's time
    slower = 4 // getattr(torch, config.dtype).itemsize
    passes = 1 + 3 * config.epochs  # the reference's, and three for each step
    return tokens["train"] * passes + tokens["eval"] * evaluations * slower


def _memory(policy, trained, tokens, config):
    """Bytes that each process needs to train with rows of at most so many tokens."""
    model = policy.model
    libraries = 0.8e9
    size = getattr(torch, config.dtype).itemsize
    frozen = 0
    for weight in model.parameters():
        if not weight.requires_grad:
            frozen += weight.nbytes
    # in float32 each trained weight, its gradient and two moments
    bytes_a_trained = 16
    if size < 4 and WORLD == 1 and not config.lora_r:
        bytes_a_trained += size  # its rounded copy, which computes
    weights = frozen + trained * bytes_a_trained
    # so many hidden states a layer keeps for its backward pass
    kept_a_layer = 1 if config.activation_checkpointing else 30
    shape = model.config.get_text_config()
    hidden_states = tokens * shape.hidden_size * shape.num_hidden_layers
    activations = hidden_states * kept_a_layer * size
    if not policy.shared:  # separate sequences keep the logits of all tokens
        activations += tokens * shape.vocab_size * BYTES_A_LOGIT
    # not shared out: 4-bit weights, and the largest of them as it computes
    packed = 0
    largest = 0
    for layer in model.modules():
        if isinstance(layer, FourBitLinear):
            packed += layer.nbytes()
            largest = max(largest, layer.out_features * layer.in_features * size)
    return libraries + weights / WORLD + activations + packed + largest
