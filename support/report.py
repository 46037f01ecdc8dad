"""What a run leaves to be read: its pairs in numbers, curves, report.md, model card."""

import math
import statistics
from dataclasses import asdict
from functools import partial

import pandas
import yaml
from matplotlib.figure import Figure

from support.files import write_atomically, write_text
from support.machine import peak_memory
from support.processes import is_first
from support.run_log import read_rows
from support.sources import stand_ins_used

PANELS = [  # of curves.png, each with its lines
    ["loss"],
    ["rewards/accuracies"],
    ["rewards/margins"],
    ["grad_norm"],
    ["lr"],
    ["rewards/chosen", "rewards/rejected"],
]
COLORS = ["tab:blue", "tab:orange"]
COMPARED = ["loss", "rewards/margins", "rewards/accuracies"]


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
        for reason, dropped in drops[split].items():
            lines.append(f"  dropped, {reason}: {dropped}")
    for name, used in stand_ins_used.items():
        lines.append(f"stand-in for {name}: {used}")
    return lines


def draw_curves(folder):
    """curves.png from metrics.jsonl: training smoothed, evaluation with 95 % intervals."""
    if not is_first():
        return
    trained = pandas.DataFrame(read_rows(folder / "metrics.jsonl", "train"))
    held_out = pandas.DataFrame(read_rows(folder / "metrics.jsonl", "eval"))
    figure = Figure((12, 6.5), layout="constrained")
    for axis, names in zip(figure.subplots(2, 3).flat, PANELS, strict=True):
        for name, color in zip(names, COLORS, strict=False):
            _draw_curve(axis, name, color, trained, held_out)
        if "loss" in names:
            axis.axhline(math.log(2), color="gray", linestyle=":", label="ln 2")
        axis.set(title=", ".join(names), xlabel="optimizer step")
        axis.legend(fontsize=8)
    write_atomically(folder / "curves.png", partial(figure.savefig, format="png"))


def _draw_curve(axis, name, color, trained, held_out):
    window = 1 + len(trained) // 20
    smooth = trained[name].rolling(window, min_periods=1).mean()
    axis.plot(trained["step"], trained[name], color=color, alpha=0.25)
    axis.plot(trained["step"], smooth, color=color, label=f"{name}, training")
    if name in held_out:
        style = {"fmt": "o--", "color": color, "capsize": 3, "label": f"{name}, eval"}
        half_widths = held_out[f"{name}/ci95"].astype(float)
        axis.errorbar(held_out["step"], held_out[name], yerr=half_widths, **style)


def markdown(header, rows):
    """A Markdown table; a cell may hold several lines."""
    lines = [" | ".join(header), " | ".join(["---"] * len(header))]
    for row in rows:
        line = " | ".join(str(cell).replace("|", "\\|") for cell in row)
        lines.append(line.replace("\n", "<br>"))
    return "\n".join(f"| {line} |" for line in lines)


def compare(held_out):
    """Markdown: the evaluation before and after, and what of it changed measurably.

    held_out  the evaluations' rows of metrics.jsonl
    """
    header = ["held out", "before", "after", "change, paired 95 % interval"]
    if not held_out:
        return f"{markdown(header, [])}\n\nMeasurable change: unknown."
    first = held_out[0]
    last = held_out[-1]
    changed = []
    rows = []
    for name in COMPARED:
        before = _number(first[name])
        after = _number(last[name])
        half_width = _number(last[f"{name}/ci95"])
        change = after - before
        if abs(change) > half_width:
            changed.append(name)
        rows.append([name, f"{before:.4f}", f"{after:.4f}", f"{change:+.4f} ± {half_width:.4f}"])
    return f"{markdown(header, rows)}\n\nMeasurable change: {', '.join(changed) or 'none'}."


def _number(figure):
    """A figure of metrics.jsonl, where null is what was not finite, as of one pair's interval."""
    return math.nan if figure is None else figure


def describe_speed(trained):
    """A line on time, memory and skipped updates, from the training rows of metrics.jsonl."""
    seconds = trained[-1]["seconds"]
    rates = []
    skipped = 0
    for row in trained:
        rates.append(row["tokens_per_second"])
        skipped += "skipped" in row
    rate = statistics.median_high(rates)
    memory = peak_memory() / 1e9
    return (
        f"{seconds:.0f} s since the reference pass began, {rate:.0f} tokens/s, {memory:.1f} GB, "
        f"{skipped} updates skipped"
    )


def write_report(folder, config, pairs, answers):
    """Draw curves.png and write report.md.

    pairs    lines on the pairs, from describe_pairs
    answers  rows of (prompt, the reference's answer, the trained model's)
    returns  the model card's text, and the end of the run in a few lines for the terminal
    """
    evaluation = compare(read_rows(folder / "metrics.jsonl", "eval"))
    speed = describe_speed(read_rows(folder / "metrics.jsonl", "train"))
    settings = yaml.safe_dump(asdict(config), sort_keys=False)
    facts = "\n".join([*pairs, speed])
    table = markdown(["prompt", "reference", "trained"], answers)
    text = (
        "Direct Preference Optimization (arXiv 2305.18290); the base model's licence holds.\n\n"
        f"{evaluation}\n\n```yaml\n{settings}```\n```\n{facts}\n```\n{table}\n"
    )
    draw_curves(folder)
    write_text(folder / "report.md", f"# {folder.name}\n\n![curves](curves.png)\n\n{text}")
    about = {"base_model": config.model, "datasets": [config.dataset], "license": "other"}
    card = f"---\n{yaml.safe_dump(about)}---\n{text}"
    return card, f"\n{evaluation}\n\n{speed}\nModel and report are in {folder}"
