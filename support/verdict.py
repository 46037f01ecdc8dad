"""What the held-out figures say: a table of before and after, and a sentence on what to try."""

import math
import re
import shlex
from dataclasses import dataclass

COMPARED = ["loss", "rewards/margins", "rewards/accuracies"]
ENOUGH_PAIRS = 20  # held out, to tell a change from chance
ANSWERS_STAY = 1e-6  # below this lr, greedy answers hardly change within some hundred steps
VISIBLE_LR = 5e-6  # the default model's answers change within the default recipe's steps
HIGH_LR = 2e-5  # from here on a higher one is no advice


@dataclass
class Change:
    """A held-out figure before and after training; nan stands for a figure that was not finite."""

    name: str
    before: float
    after: float
    half_width: float  # of the paired change's 95 % interval

    @property
    def amount(self):
        """How far the figure moved."""
        return self.after - self.before

    @property
    def is_measurable(self):
        """Whether it moved further than its interval."""
        return abs(self.amount) > self.half_width

    @property
    def is_better(self):
        """Whether it moved to the right side: down for the loss, up for all else."""
        return (self.amount < 0) == (self.name == "loss")


def find_changes(held_out):
    """The changes from the first to the last of an evaluation's rows of metrics.jsonl, if any."""
    changes = []
    for name in COMPARED if held_out else []:
        before = _number(held_out[0][name])
        after = _number(held_out[-1][name])
        last = held_out[-1]
        own = last[f"{name}/ci95"]
        half_width = _number(last.get(f"{name}/change_ci95", own))
        changes.append(Change(name, before, after, half_width))
    return changes


def _number(figure):
    """A figure of metrics.jsonl, where null is what was not finite, as of one pair's interval."""
    return math.nan if figure is None else figure


def markdown(header, rows):
    """A Markdown table; a cell may hold several lines."""
    lines = [" | ".join(header), " | ".join(["---"] * len(header))]
    for row in rows:
        cells = [str(cell).replace("|", "\\|").replace("\n", "<br>") for cell in row]
        lines.append(" | ".join(cells))
    return "| " + " |\n| ".join(lines) + " |"


def compare(held_out):
    """Markdown: the evaluation before and after, and what of it changed measurably.

    held_out  the evaluations' rows of metrics.jsonl
    """
    header = ["held out", "before", "after", "change, paired 95 % interval"]
    rows = []
    measurable = []
    changes = find_changes(held_out)
    for change in changes:
        # an interval of 0.0000 would look like certainty
        digits = 6 if 0 < change.half_width < 0.001 else 4
        moved = f"{change.amount:+.{digits}f} ± {change.half_width:.{digits}f}"
        rows.append([change.name, f"{change.before:.4f}", f"{change.after:.4f}", moved])
        if change.is_measurable:
            measurable.append(change.name)
    verdict = ", ".join(measurable) or "none"
    if not held_out or not _are_finite(changes):
        verdict = "unknown"
    elif _count(held_out[-1]) < ENOUGH_PAIRS:
        verdict = f"too few held-out pairs ({_count(held_out[-1])}) to tell: {ENOUGH_PAIRS} or more"
    return f"{markdown(header, rows)}\n\nMeasurable change: {verdict}."


def tell_best(held_out, evaluations):
    """A sentence on which evaluation's weights were saved as the best.

    held_out     rows of metrics.jsonl up to that one
    evaluations  all of them
    """
    if not held_out or held_out[-1]["loss"] is None:
        return "keep=best: no evaluation has a finite loss; the last step is saved."
    step = held_out[-1]["step"]
    best = f"step {step}, the lowest held-out loss of {len(evaluations)} evaluations"
    if step == 0:
        return f"Saved: the model as it was before training ({best})."
    return f"Saved: the weights after {best}; chosen by these pairs, its figures flatter a little."


def conclude(config, trained, held_out, answers):
    """What a run's figures mean and what to try next, in a few sentences.

    trained, held_out  rows of metrics.jsonl
    answers            rows of (prompt, the model's answer before training, and after)
    """
    skipped = sum("skipped" in row for row in trained)
    changes = find_changes(held_out)
    cure = f"lower lr (now {_short(config.lr)})"
    if config.dtype != "float32":
        cure += ", or set dtype=float32"
    if "skipped" in trained[-1] or not _are_finite(changes):
        return f"The run diverged: {cure}."
    sentences = []
    if skipped:
        sentences.append(
            f"{skipped} of {len(trained)} updates were skipped, for loss or gradient was not "
            f"finite: {cure}."
        )
    if not held_out:
        sentences.append("Without held-out pairs nothing tells what it learned: eval_pairs=100.")
    elif _count(held_out[-1]) < ENOUGH_PAIRS:
        sentences.append(
            f"Too few pairs were held out ({_count(held_out[-1])}) to tell learning from chance: "
            f"{ENOUGH_PAIRS} is the least, 100 is better (more records, or a larger eval_pairs)."
        )
    else:
        sentences.append(_judge(config, changes, answers))
    return " ".join(sentences)


def _count(row):
    """How many pairs an evaluation has, or prompts where some have several."""
    return row.get("prompts", row["pairs"])


def _are_finite(changes):
    return all(math.isfinite(change.after) for change in changes)


def _judge(config, changes, answers):
    """What changes of enough pairs mean."""
    better = []
    worse = []
    for change in changes:
        if change.is_measurable:
            names = better if change.is_better else worse
            names.append(change.name)
    same = all(before == after for _, before, after in answers)
    if worse:
        gained = f" (better: {', '.join(better)})" if better else ""
        return (
            f"Got worse on held-out pairs, by more than chance: {', '.join(worse)}{gained}. "
            f"Try a lower lr (now {_short(config.lr)}), fewer epochs or more pairs."
        )
    if not better and config.lr < HIGH_LR:
        return f"No change beyond chance. Try more pairs, or {_at_higher_lr(config)}."
    if not better:
        return "No change beyond chance. Try more pairs."
    stay = same if answers else config.lr < ANSWERS_STAY
    if stay and config.lr < HIGH_LR:
        seen = f"; all {len(answers)} sampled ones are as before" if answers else ""
        return (
            "The weights moved: held-out log-probabilities changed by more than chance. At lr "
            f"{_short(config.lr)} the answers hardly can{seen}. To see a change, "
            f"{_at_higher_lr(config)}."
        )
    own_answers = "Whether its own answers are better, only reading them shows (report.md)."
    if config.reward and config.eval_samples:
        own_answers = (
            "What its own answers are worth, the rewards of sampled ones tell (report.md)."
        )
    return (
        "The model prefers the chosen answers of held-out pairs more than before, by more than "
        f"chance. {own_answers}"
    )


def _at_higher_lr(config):
    """How to run the same again at a rate that shows more, in a folder of its own."""
    lr = VISIBLE_LR if config.lr < VISIBLE_LR else 5 * config.lr
    lr = _short(lr)
    of_lr, follows_it = f"lr{config.lr}", f"lr{float(lr)}"
    whole = re.sub(r"[/\\]round_\d+$", "", config.output_dir)  # of rounds, all of them
    folder = whole.replace(of_lr, follows_it)
    if folder == whole:
        folder = f"{folder}_lr{lr}"
    return f"the same command with lr={lr} {shlex.quote(f'output_dir={folder}')}"


def _short(number):
    """A number as it is typed: 5e-6, not 5e-06."""
    return f"{number:g}".replace("e-0", "e-")
