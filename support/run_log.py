"""What a run tells while it trains: metrics.jsonl, a tracker, a progress bar, the time."""

import json
import math
import os
import sys
import time
from dataclasses import asdict

from support.files import write_text
from support.processes import is_first, progress, say

SHOWN = {  # on the bar and in lines, the most telling first
    "loss": "loss",
    "rewards/accuracies": "accuracy",
    "rewards/margins": "margin",
    "tokens_per_second": "tokens/s",
    "peak_share": "peak share",
}
BAR = "{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"
BAR_COLUMNS = 48  # that a bar of a long run needs beside the figures


def read_rows(path, split=None):
    """The rows of a JSONL file, of one split or all; a line that a crash has torn is left out."""
    rows = []
    if not path.exists():
        return rows
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except ValueError:  # torn
            continue
        if split is None or row["split"] == split:
            rows.append(row)
    return rows


def best_step(losses):
    """The step of the lowest finite loss, the first of several; None if none is finite.

    losses  {step: loss}, None for one that was not finite
    """
    best = None
    for step, loss in sorted(losses.items()):
        is_number = loss is not None and math.isfinite(loss)
        if is_number and (best is None or loss < losses[best]):
            best = step
    return best


def saved_evaluations(rows, keep):
    """Those of an evaluation's rows that end with the weights that a run saves.

    keep  last, for all of them, or best, up to the lowest loss
    """
    losses = {}
    for row in rows:
        losses[row["step"]] = row["loss"]
    best = best_step(losses)
    if keep == "last" or best is None:
        return rows
    return [row for row in rows if row["step"] <= best]


class RunLog:
    """What a run tells while it trains: metrics.jsonl, a tracker, a bar or lines, one clock.

    A resumed run's log goes on where the checkpoint stands: rows of later steps, which a crash has
    left, are removed, and the clock goes on from the last row that is kept.

    folder            the run's
    config            its settings
    order             the rows of each optimizer step of the run, each a list of pairs
    done              the step of the checkpoint it goes on from, or 0
    before            seconds that a new run's clock has run already: the reference pass
    peak_share        share of the machine's peak that one token a second is
    losses            (attribute) {step: held-out loss} of the evaluations in the log
    """

    def __init__(self, folder, config, order, done, before, peak_share):
        self.folder = folder
        self.path = folder / "metrics.jsonl"
        self.pairs = []  # of each step
        for rows in order:
            self.pairs.append(sum(len(row) for row in rows))
        self.done = done
        self.peak_share = peak_share
        self.began = time.time()
        kept = []
        self.losses = {}
        for row in read_rows(self.path):
            if done == 0 or row["step"] > done:
                continue
            kept.append(row)
            if row["split"] == "eval":
                self.losses[row["step"]] = row["loss"]
        write_text(self.path, "".join(json.dumps(row) + "\n" for row in kept))
        self.start = self.began - (kept[-1]["seconds"] if kept else before)
        self.track = _open_tracker(config, folder, done + 1)
        self.bar = progress("training", sum(self.pairs), sum(self.pairs[:done]))
        self.bar.bar_format = BAR

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.bar.close()

    def log_step(self, step, figures, seconds):
        """Log an optimizer step (from 1) that took so many seconds."""
        rate = figures["tokens"] / seconds
        speed = {"tokens_per_second": rate, "peak_share": rate * self.peak_share}
        figures = figures | speed
        self._write(step, "train", figures)
        self._show(step, figures)
        if "skipped" in figures:
            say(f"Step {step} skipped: not finite, with records {figures['skipped']}")

    def log_evaluation(self, step, figures):
        """Log an evaluation after so many optimizer steps."""
        self._write(step, "eval", figures)
        self.losses[step] = figures["loss"]
        if step == self.done:  # its time, as of sampled answers, tells nothing of the steps'
            self.began = time.time()
            self.bar.unpause()

    def _write(self, step, split, figures):
        """Append a row to metrics.jsonl, and send it to the tracker."""
        row = {"step": step, "split": split, **figures, "seconds": time.time() - self.start}
        sent = {}
        for name, value in row.items():
            if not isinstance(value, float):
                continue
            if math.isfinite(value):
                sent[f"{split}/{name}"] = value
            else:
                row[name] = None  # JSON's nearest
        if is_first():
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        self.track(sent, step)

    def _show(self, step, figures):
        """Move the bar; without a terminal print a line, twenty times in a run."""
        shown = []
        for name, label in SHOWN.items():
            shown.append(f"{label} {figures[name]:.4g}")
        total = len(self.pairs)
        if not self.bar.disable:
            self.bar.set_postfix_str(fit(shown, _columns() - BAR_COLUMNS), refresh=False)
        self.bar.update(self.pairs[step - 1])
        twentieth = step * 20 // total
        if self.bar.disable and twentieth > (step - 1) * 20 // total:
            seconds_a_step = (time.time() - self.began) / (step - self.done)
            left = seconds_a_step * (total - step)
            say(f"training {step}/{total}, {left:.0f} s left: {', '.join(shown)}")


def fit(parts, columns):
    """As many of the parts, joined by commas, as the columns hold: whole ones, the first always."""
    text, *others = parts
    for part in others:
        longer = f"{text}, {part}"
        if len(longer) > columns:
            break
        text = longer
    return text


def _columns():
    """The width of the terminal that the bar is on; some tell 0."""
    return os.get_terminal_size(sys.stderr.fileno()).columns or 80


def _open_tracker(config, folder, first):
    """A function of figures and their step, from `first` on, that sends them to report_to."""
    if config.report_to == "none" or not is_first():
        return lambda figures, step: None
    if config.report_to == "wandb":
        import wandb

        settings = {"name": folder.name, "dir": folder, "config": asdict(config)}
        return wandb.init(project="train_dpo", reinit="finish_previous", **settings).log
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(folder, purge_step=first)

    def add(figures, step):
        for name, value in figures.items():
            writer.add_scalar(name, value, step)

    return add
