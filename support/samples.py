"""What a model does: answers sampled to held-out prompts, their rewards, lengths, KL divergence."""

import math
from array import array
from dataclasses import replace

import torch

from support.files import write_records
from support.processes import say, wait_for_all
from support.reward import reward_version, score_answers
from support.run_log import read_rows
from support.sampler import Sampler
from support.verdict import markdown

REWARD = "samples/reward"
REWARD_OF_ENDED = "samples/reward_of_ended"
ENDED = "samples/ended"
TOKENS = "samples/tokens"
KL = "samples/kl"
ENTROPY = "samples/entropy"
DISTINCT = "samples/distinct"
LABELS = {  # what a table calls the figures
    REWARD: "reward",
    REWARD_OF_ENDED: "reward of those that ended",
    ENDED: "share that ended",
    TOKENS: "tokens an answer",
    KL: "KL to the first model, nats an answer",
    ENTROPY: "entropy, nats a token",
    DISTINCT: "share of distinct answers to a prompt",
}


def measure(setup, config, folder, step, lay_out, compute_logps):
    """Sample answers to the evaluation prompts, and write what became of them to folder/samples.

    The answers of all evaluations have the same random numbers, so changes are paired by prompt.
    The KL divergence from the first model is estimated as the mean of log pi - log pi_first of the
    answers, the entropy as that of -log pi a token: both of what is sampled, at its temperature.

    lay_out        data.lay_out
    compute_logps  train_dpo.compute_logps
    returns        figures of each prompt by name, each (prompts,); those before training; and
                   figures of all answers together
    """
    prompts = setup.pairs["eval"]
    sampler = make_sampler(setup, config)
    drawn = sample_all(sampler, config, prompts)
    answers = list(map(sampler.tell_all, drawn))
    rewards = score_answers(config, prompts, answers)

    split = "sampled answers"
    pairs = {split: _as_pairs(prompts, drawn)}
    sampled = replace(setup, pairs=pairs, steps=lay_out(pairs, config))
    of_first = replace(sampled, policy=setup.first)
    figures = {"reward": rewards.tolist()}
    for name, title, scored in (
        ("logp", "policy", sampled),
        ("first_logp", "first model", of_first),
    ):
        logps = compute_logps(scored, split, config, title, config.temperature)
        figures[name] = logps.view(len(prompts), -1).tolist()
    rows = _as_rows(answers, figures, reward_version(config))
    write_records(samples_file(folder, step), rows)
    wait_for_all()
    before = read_rows(samples_file(folder, 0))
    earlier = by_prompt(before)
    if before[0].get("version") != rows[0]["version"]:
        say(f"!!! {config.reward} was edited: rewards do not compare with those before it !!!")
        earlier[REWARD] = torch.full_like(earlier[REWARD], math.nan)
    return by_prompt(rows), earlier, {REWARD_OF_ENDED: _reward_of_ended(rows)}


def make_sampler(setup, config):
    """The Sampler of a Setup's policy, as the settings have it."""
    limits = (config.max_new_tokens, config.temperature)
    return Sampler(setup.policy, setup.tokenizer, setup.end_of_turn, *limits)


def sample_all(sampler, config, pairs):
    """eval_samples answers to the prompt of each pair: for each a list of Answer."""
    prompts = [pair.prompt_ids for pair in pairs]
    seed = f"{config.seed} evaluation"
    return sampler.draw_all(prompts, config.eval_samples, seed, "sampling held-out prompts")


def _as_pairs(prompts, answers):
    """data.Pairs of two answers each, for the log-probabilities of all; the last one may double."""
    pairs = []
    for pair, drawn in zip(prompts, answers, strict=True):
        for start in range(0, len(drawn), 2):
            one = drawn[start]
            other = drawn[min(start + 1, len(drawn) - 1)]
            ids = {"chosen_ids": array("i", one.ids), "rejected_ids": array("i", other.ids)}
            pairs.append(replace(pair, **ids))
    return pairs


def _as_rows(answers, figures, version):
    """A dict for each answer: what it is, its figures, and which version of the reward is theirs.

    answers  for each prompt a list of Told
    figures  {name: for each prompt a list of numbers, of which one too many does not count}
    """
    rows = []
    for prompt, drawn in enumerate(answers):
        for sample, answer in enumerate(drawn):
            row = {"prompt": prompt, "sample": sample}
            row |= answer._asdict()
            for name, values in figures.items():
                row[name] = values[prompt][sample]
            rows.append(row | {"version": version})
    return rows


def samples_file(folder, step):
    """Where the answers that were sampled after a step stand."""
    return folder / "samples" / f"step_{step:07d}.jsonl"


def by_prompt(rows):
    """Figures of each prompt from rows of a samples file, by name, each (prompts,) float64."""
    count = 1 + rows[-1]["sample"]
    table = {}
    for name in ("reward", "ended", "tokens", "logp", "first_logp"):
        values = [float(row[name]) for row in rows]
        table[name] = torch.tensor(values, dtype=torch.float64).view(-1, count)
    distinct = []
    for start in range(0, len(rows), count):
        texts = {row["text"] for row in rows[start : start + count]}
        distinct.append(len(texts) / count)
    divergence = table["logp"] - table["first_logp"]
    return {
        REWARD: table["reward"].mean(1),
        ENDED: table["ended"].mean(1),
        TOKENS: table["tokens"].mean(1),
        KL: divergence.mean(1),
        ENTROPY: -table["logp"].sum(1) / table["tokens"].sum(1),
        DISTINCT: torch.tensor(distinct, dtype=torch.float64),
    }


def _reward_of_ended(rows):
    """The mean reward of the answers that ended; nan if none did."""
    total = 0.0
    number = 0
    for row in rows:
        if row["ended"]:
            total += row["reward"]
            number += 1
    return total / number if number else math.nan


def describe(held_out):
    """Markdown: the sampled answers before and after, of an evaluation's rows of metrics.jsonl."""
    rows = [row for row in held_out if REWARD in row]
    if not rows:
        return ""
    before = rows[0]
    after = rows[-1]
    table = []
    for name, label in LABELS.items():
        change = ""
        half_width = after.get(f"{name}/change_ci95", after.get(f"{name}/ci95"))
        if half_width is not None:
            change = f"{after[name] - before[name]:+.3f} ± {half_width:.3f}"
        table.append([label, figure(before, name), figure(after, name), change])
    header = ["sampled answers, held out", "before", "after", "change, paired 95 % interval"]
    return markdown(header, table)


def figure(row, name):
    """A figure of an evaluation's row of metrics.jsonl, as text."""
    if row[name] is None:
        return ""
    return f"{row[name]:.3f}"
