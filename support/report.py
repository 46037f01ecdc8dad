"""What a run leaves to be read: its pairs in numbers, curves.png, report.md, the model card."""

import glob
import json
import math
import os
import re
import shutil
import statistics
from dataclasses import asdict
from functools import partial

import pandas
import yaml
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from support import samples
from support.files import write_atomically, write_text
from support.machine import peak_memory
from support.model import save_model, untrained_state
from support.preference import describe_preference
from support.processes import gather, is_first, say
from support.run_log import read_rows, saved_evaluations
from support.sampler import greedy_answers
from support.sources import (
    HubSet,
    bases_used,
    package_file,
    revisions_used,
    split_names,
    stand_ins_used,
)
from support.verdict import compare, conclude, markdown, tell_best

PANELS = [  # of curves.png, each with its lines
    ["loss"],
    ["rewards/accuracies"],
    ["rewards/margins"],
    ["grad_norm"],
    ["lr"],
    ["rewards/chosen", "rewards/rejected"],
]
COLORS = ["tab:blue", "tab:orange"]
PLACES = ["output_dir", "reference_cache", "offline"]  # settings that mean something here alone


def describe_pairs(pairs, drops, config):
    """Lines on the pairs: how many, token lengths, how many are cut, drops by reason.

    pairs  "train" and "eval" -> list of data.Pair
    drops  "train" and "eval" -> {reason: number}
    """
    wanted = {"train": config.train_pairs, "eval": config.eval_pairs}
    lines = []
    for split, part in pairs.items():
        number = len(part)
        fewer = ", fewer than asked" if number < wanted[split] else ""
        lines.append(f"{split}: {number} pairs{fewer}")
        lengths = sorted(pair.tokens for pair in part) or [0]
        spread = []
        for percent in (0, 10, 50, 90, 100):
            position = (len(lengths) - 1) * percent // 100
            spread.append(str(lengths[position]))
        lines.append(f"  tokens, prompt once (0, 10, 50, 90, 100 %): {', '.join(spread)}")
        cut = [pair for pair in part if pair.cut]
        lines.append(f"  cut to max_length or max_prompt_length: {len(cut)}")
        unused = set()
        for pair in part:
            unused.update(pair.unused)
        if unused:
            lines.append(f"  columns that are filled and not used: {', '.join(sorted(unused))}")
        for reason, dropped in drops[split].items():
            lines.append(f"  dropped, {reason}: {dropped}")
    for name in stand_ins_used:
        lines.append(f"stand-in for {name}: {public_name(name)}")
    for name, base in bases_used.items():
        lines.append(f"{public_name(name)} is an adapter, merged into {public_name(base)}")
        if name == config.model and config.lora_r and not config.lora_merge:
            lines.append(
                "  model/ will hold an adapter on both: it can go on from here, but to be used "
                "elsewhere that one must be merged first. lora_merge=true saves one whole model"
            )
    for name, commit in revisions_used.items():
        lines.append(f"{public_name(name)} at commit {commit}")
    return lines


def is_on_hub(name):
    """Whether what was used for a source came from the Hub: it is no path, nor had a stand-in."""
    is_path = glob.has_magic(name) or os.path.exists(package_file(name))
    is_function = ".py:" in name  # of a file, as a reward is
    return name not in stand_ins_used and not is_path and not is_function


def public_name(name):
    """What was really used for a source; of a path its last part, with the run's if it has one."""
    if is_on_hub(name):
        return name
    folder, last = os.path.split(os.path.abspath(stand_ins_used.get(name, name)))
    run = os.path.basename(folder)
    return f"{run}/{last}" if last == "model" or re.fullmatch(r"round_\d+", run) else last


def public_settings(config):
    """A run's settings with public names, and without those that mean something here alone."""
    settings = {n: value for n, value in asdict(config).items() if n not in PLACES}
    for name in ("model", "reference_model", "kl_model", "reward"):
        if settings[name]:
            settings[name] = public_name(settings[name])
    for name in ("dataset", "eval_dataset"):
        if settings[name]:
            parts = []
            for source, split in split_names(settings[name]):
                public = public_name(source)
                parts.append(f"{public}:{split}" if split else public)
            settings[name] = ", ".join(parts)
    return settings


def draw_curves(folder):
    """curves.png from metrics.jsonl: training smoothed, evaluation with 95 % intervals."""
    if not is_first():
        return
    trained = pandas.DataFrame(read_rows(folder / "metrics.jsonl", "train"))
    held_out = pandas.DataFrame(read_rows(folder / "metrics.jsonl", "eval"))
    first_loss = trained["loss"][0]  # None where it was not finite
    begins_at_ln_2 = first_loss is not None and math.isclose(first_loss, math.log(2), abs_tol=1e-6)
    figure = Figure((12, 6.5), layout="constrained")
    for axis, names in zip(figure.subplots(2, 3).flat, PANELS, strict=True):
        for name, color in zip(names, COLORS, strict=False):
            _draw_training(axis, name, color, trained, name in held_out)
            if name in held_out:
                _draw_evaluation(axis, name, color, held_out)
        if "loss" in names and begins_at_ln_2:
            axis.axhline(math.log(2), color="gray", linestyle=":", label="ln 2")
        axis.set(title=", ".join(names), xlabel="optimizer step")
        axis.legend(fontsize=8)
    write_atomically(folder / "curves.png", partial(figure.savefig, format="png"))


def _draw_training(axis, name, color, trained, framed):
    """A figure of each step, in the background; before it, unless it has no noise, its mean.

    framed  whether single steps may leave the frame, for held-out figures are what it is about
    """
    if name == "lr":
        axis.plot(trained["step"], trained[name], color=color, label=name)
        return
    dots = {"linestyle": "none", "marker": ".", "markersize": 4, "alpha": 0.25, "zorder": 1}
    noise = Line2D(trained["step"], trained[name], color=color, **dots)
    if framed:
        axis.add_artist(noise)
    else:
        axis.add_line(noise)
    window = 1 + len(trained) // 20
    smooth = trained[name].rolling(window, min_periods=1).mean()
    label = f"{_last_part(name)}, training, mean of {window}"
    axis.plot(trained["step"], smooth, color=color, alpha=0.5, zorder=2, label=label)


def _draw_evaluation(axis, name, color, held_out):
    """A held-out figure with its intervals, before all else."""
    label = f"{_last_part(name)}, held out, 95 % interval"
    style = {"fmt": "o--", "color": color, "markeredgecolor": "black", "ecolor": "black"}
    half_widths = held_out[f"{name}/ci95"].astype(float)
    figures = held_out[name].astype(float)
    step = held_out["step"]
    axis.errorbar(step, figures, half_widths, capsize=3, zorder=3, label=label, **style)


def _last_part(name):
    return name.rpartition("/")[2]


def describe_speed(trained, device):
    """A line on time, memory and skipped updates, from the training rows of metrics.jsonl.

    The memory is that of the process, which may have run others of a sweep before.
    """
    seconds = trained[-1]["seconds"]
    rates = []
    skipped = 0
    for row in trained:
        rates.append(row["tokens_per_second"])
        skipped += "skipped" in row
    rate = statistics.median_high(rates)
    memory = peak_memory(device)
    held = "" if memory is None else f"{memory / 1e9:.1f} GB held by the process at most, "
    return (
        f"{seconds:.0f} s since the reference pass began, {rate:.0f} tokens/s, {held}"
        f"{skipped} updates skipped"
    )


def write_report(folder, config, pairs, answers):
    """Draw curves.png and write report.md.

    pairs    lines on the pairs, from describe_pairs
    answers  rows of (prompt, the model's answer before training, and after)
    returns  the model card's text, and the end of the run in a few lines for the terminal
    """
    answers = list(answers)
    trained = read_rows(folder / "metrics.jsonl", "train")
    evaluations = read_rows(folder / "metrics.jsonl", "eval")
    held_out = saved_evaluations(evaluations, config.keep)
    evaluation = compare(held_out)
    if config.keep == "best":
        evaluation += f"\n\n{tell_best(held_out, evaluations)}"
    sampled = samples.describe(held_out)
    if sampled:  # what the model does comes before what it scores
        evaluation = f"{sampled}\n\n{evaluation}"
    if held_out and held_out[-1]["step"] == 0:  # the best: what training did is in the others
        verdict = conclude(config, trained, evaluations, [])
        verdict = f"Of the last step's weights, which are not saved: {verdict}"
    else:
        verdict = conclude(config, trained, held_out, answers)
    speed = describe_speed(trained, config.device)
    settings = public_settings(config)
    method = _method(settings)
    facts = "\n".join([*pairs, speed])
    listed = yaml.safe_dump(settings, sort_keys=False)
    details = f"```yaml\n{listed}```\n```\n{facts}\n```\n"
    details += markdown(["prompt", "before", "trained"], answers) + "\n"
    draw_curves(folder)
    report = f"{method}\n\n{evaluation}\n\n{verdict}\n\n{details}"
    write_text(folder / "report.md", f"# {folder.name}\n\n![curves](curves.png)\n\n{report}")
    card = f"---\n{_card_metadata(config)}---\n{method}\n\n{evaluation}\n\n{details}"
    return card, f"\n{evaluation}\n\n{verdict}\n\n{speed}\nModel and report are in {folder}"


def finish(setup, config, folder):
    """Write report.md, curves.png and, last, model/, which is what marks a run as finished."""
    after = greedy_answers(setup, config)
    state = gather(untrained_state(setup.model, config) | setup.weights)
    if not is_first():
        return
    questions = [json.loads(pair.prompt)[-1]["content"] for pair in setup.samples]
    answers = zip(questions, setup.answers, after, strict=True)
    pairs = describe_pairs(setup.pairs, setup.drops, config)
    pairs += describe_preference(setup.reference, setup.lengths)
    card, ending = write_report(folder, config, pairs, answers)
    digest = setup.origin["model"]
    save_model(setup.model, setup.tokenizer, state, setup.end_of_turn, config, folder, card, digest)
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    say(ending)


def _method(settings):
    """A sentence on what was done with which models and data, from public_settings."""
    against = ""
    if settings["reference_model"]:
        against = f", against the reference {settings['reference_model']}"
    if settings["kl_model"]:
        against += f" (the first model: {settings['kl_model']})"
    return (
        f"Direct Preference Optimization (arXiv 2305.18290) of {settings['model']} on "
        f"{settings['dataset']}{against}; the base model's licence holds.{_packed(settings)}"
    )


def _packed(settings):
    """A sentence on what an adapter stands on, where that is not the base as it is."""
    if not settings["load_in_4bit"]:
        return ""
    if settings["lora_merge"]:
        return " The base's linear layers were rounded to 4 bits (NF4); merged is what was trained."
    return (
        " The adapter was trained on the base with its linear layers in 4 bits (NF4, double "
        "quantised): load the base so, or its log-probabilities are others."
    )


def _card_metadata(config):
    """The model card's block for the Hub, which knows no names but its own."""
    about = {"license": "other"}
    if is_on_hub(config.model):
        about["base_model"] = config.model
    repositories = []
    for name, _ in split_names(config.dataset):
        if is_on_hub(name):
            repositories.append(HubSet.from_name(name).repository)
    if repositories:
        about["datasets"] = repositories
    return yaml.safe_dump(about)
