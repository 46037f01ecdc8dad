"""A sweep's runs side by side: in what order they come, sweep.csv and sweep.png."""

import itertools
import json
import math
from functools import partial
from pathlib import Path

import pandas
from matplotlib.figure import Figure

from support.files import write_atomically
from support.processes import is_first, say
from support.rounds import first_folder, last_folder
from support.run_log import read_rows, saved_evaluations
from support.samples import KL, REWARD

ACCURACY = "rewards/accuracies"
BEFORE_TRAINING = {ACCURACY: 0.5, "rewards/margins": 0.0}  # what sweep.png draws
# what a loss is a loss of
SCALES = ["loss", "beta", "label_smoothing", "length_normalize", "nll_weight"]
# what all figures are against
REFERENCES = ["model", "revision", "reference_model", "rounds", "round_reference"]
# which pairs are held out, and what is left of them
HELD_OUT = ["dataset", "split", "eval_dataset", "eval_split", "eval_pairs", "shuffle", "columns"]
HELD_OUT += ["keep_ties", "seed", "max_length", "max_prompt_length"]
LOSS = "held-out loss"  # for loss is a setting's name too
FINISHED = "finished"
MARKERS = "osD^v<>P*X"  # of the frontier's points, over again beyond ten values
DODGED = 0.6  # the share of two ticks' distance over which lines are set beside each other


def summarize_sweep(configs, varied, failed=None):
    """Print the runs, best held-out accuracy first; write sweep.csv and sweep.png beside them.

    Of the same accuracy, the smaller loss is first among runs whose losses compare. Runs of rounds
    come by the reward of sampled answers, for each round has a reference of its own. Runs that
    diverged, were not evaluated or failed come last, and are marked.

    configs  of the runs
    varied   the names of the settings in which they differ
    failed   {output_dir: reason} of the runs that did not end; sweep.csv has the reasons
    """
    if not is_first():
        return
    rows = []
    for config in configs:
        row = {}
        for name in varied:
            row[name] = plain(getattr(config, name))
        row["output_dir"] = config.output_dir
        reason = (failed or {}).get(config.output_dir)
        rows.append(row | _outcome(config, reason))
    has_rounds = "rounds" in varied or configs[0].rounds
    first = REWARD if has_rounds else ACCURACY
    rows = rank(rows, scales_of(varied), first)
    folder = Path(configs[0].output_dir).parent
    frame = pandas.DataFrame(rows)
    write_atomically(folder / "sweep.csv", partial(frame.to_csv, index=False))
    _print_table(frame, varied)
    written = f"The sweep is in {folder / 'sweep.csv'}"
    (folder / "sweep.png").unlink(missing_ok=True)  # it may be another sweep's
    if rows[0]["outcome"] == FINISHED:
        before = BEFORE_TRAINING
        if configs[0].reference_model or configs[-1].reference_model:
            before = {}  # margins begin elsewhere
        before = before | _reward_before(configs)
        _draw_sweep(rows, varied, folder / "sweep.png", before)
        written += f" and {folder / 'sweep.png'}"
    say(written)


def _reward_before(configs):
    """The reward of sampled answers before training, where all runs that have one begin alike."""
    found = set()
    for config in configs:
        for row in read_rows(first_folder(config) / "metrics.jsonl", "eval")[:1]:
            if REWARD in row:
                found.add(row[REWARD])
    return {REWARD: found.pop()} if len(found) == 1 else {}


def plain(value):
    """A setting's value as a number, or else as the text that YAML has for it."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return value if is_number or isinstance(value, str) else json.dumps(value)


def _outcome(config, reason):
    """The evaluation of the weights that a run saved, and as its outcome how it ended."""
    if reason is not None:
        return {"outcome": "failed", "reason": str(reason)}
    folder = last_folder(config)
    held_out = saved_evaluations(read_rows(folder / "metrics.jsonl", "eval"), config.keep)
    trained = read_rows(folder / "metrics.jsonl", "train")
    if not held_out:
        return {"outcome": "not evaluated"}
    last = held_out[-1]
    last[LOSS] = last.pop("loss")
    last.pop("split")  # which is a setting's name too
    missing = last[LOSS] is None or last["rewards/margins"] is None
    skipped = trained and "skipped" in trained[-1]
    return last | {"outcome": "diverged" if missing or skipped else FINISHED}


def scales_of(varied):
    """Which settings, of those that vary, make losses that do not compare."""
    return _in_order((*SCALES, *REFERENCES), varied)


def _in_order(names, varied):
    """Those of some names that vary, in the order in which the names are given."""
    return [name for name in names if name in varied]


def rank(rows, scales, first=ACCURACY):
    """Rows of runs, the best first; where nothing decides, in the order given.

    first   the name of the figure that decides before the loss does
    scales  the names in a row by whose values its loss is one kind or another
    """
    kinds = []  # in the order given

    def place(row):
        if row["outcome"] != FINISHED:
            return 1, math.inf, row["outcome"] != "diverged", 0
        kind = [row[name] for name in scales]
        if kind not in kinds:
            kinds.append(kind)
        is_short = first not in row  # of a reward, where no answers were sampled
        return is_short, -row.get(first, row[ACCURACY]), kinds.index(kind), row[LOSS]

    return sorted(rows, key=place)


def _print_table(frame, varied):
    shown = [*varied]
    for name in (*BEFORE_TRAINING, REWARD, KL):
        if name in frame:
            shown += [name, f"{name}/ci95"]
    shown += [LOSS, "outcome"]
    frame = frame.reindex(columns=shown)
    say(frame.to_string(index=False, float_format="{:.4g}".format, na_rep=""))
    scales = scales_of(varied)
    if scales:
        figures = "Accuracies, losses" if set(REFERENCES) & set(scales) else "Losses"
        say(f"{figures} and margins compare only between runs of the same {' and '.join(scales)}.")
    others = _in_order(HELD_OUT, varied)
    if others:
        say(f"Runs of another {' or '.join(others)} may have been evaluated on other pairs.")


def _draw_sweep(rows, varied, path, before):
    """Accuracy and margin of finished runs over one setting, lr if it varies.

    There is a line for each combination of the others, which it is named after.

    before  the figures before training, where all runs begin with the same
    """
    x = "lr" if "lr" in varied else varied[0]
    others = list(varied)
    others.remove(x)
    ticks = []
    lines = {}
    for row in sorted(rows, key=partial(_place_in_picture, [*others, x])):
        if row["outcome"] != FINISHED:
            continue
        label = ", ".join(f"{name} {row[name]}" for name in others)
        lines.setdefault(label, []).append(row)
        if row[x] not in ticks:
            ticks.append(row[x])
    ticks.sort(key=_numbers_first)
    frontier = any(REWARD in row for row in itertools.chain.from_iterable(lines.values()))
    figure = Figure((18 if frontier else 12, 4), layout="constrained")
    axes = figure.subplots(1, 3 if frontier else 2)
    if frontier:
        _draw_frontier(axes[2], lines, x, ticks, before)
    for axis, name in zip(axes[:2], BEFORE_TRAINING, strict=True):
        # beside each other, or their intervals would hide one another
        dodge = DODGED / max(5, len(lines))
        aside = -dodge * (len(lines) - 1) / 2
        for label, part in lines.items():
            positions = []
            for row in part:
                positions.append(ticks.index(row[x]) + aside)
            _draw_line(axis, name, label, part, positions)
            aside += dodge
        if name in before:
            axis.axhline(before[name], color="gray", linestyle=":", label="before training")
        axis.set_xticks(range(len(ticks)), ticks)
        axis.set(title=f"held out {name}, 95 % interval", xlabel=x)
    figure.legend(*axes[1].get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    write_atomically(path, partial(figure.savefig, format="png"))


def _draw_frontier(axis, lines, x_name, ticks, before):
    """What the reward of sampled answers costs in KL divergence (figure 2 of the DPO paper).

    There is a point for each run that samples; its marker tells which of the ticks, the values of
    the setting x_name, it has. Texts beside the points would cover each other.
    """
    names = [KL, REWARD, f"{KL}/ci95", f"{REWARD}/ci95"]
    sampled = [row[x_name] for row in itertools.chain(*lines.values()) if REWARD in row]
    markers = {}
    for value, marker in zip(ticks, itertools.cycle(MARKERS)):
        if value not in sampled:
            continue
        markers[value] = marker
        label = f"{x_name} {value}"
        axis.plot([], [], color="gray", linestyle="none", marker=marker, label=label)
    axis.legend(fontsize=8)
    for number, rows in enumerate(lines.values()):
        part = [row for row in rows if REWARD in row]
        if not part:
            continue
        frame = pandas.DataFrame(part).reindex(columns=names).astype(float)
        x, y, x_error, y_error = frame.sort_values(KL).to_numpy().T
        color = f"C{number}"  # of the line's in the other pictures
        axis.errorbar(x, y, y_error, x_error, color=color, capsize=3)
        for row in part:
            axis.plot(row[KL], row[REWARD], color=color, marker=markers[row[x_name]])
    if REWARD in before:
        axis.axhline(before[REWARD], color="gray", linestyle=":")
    axis.set(
        title="reward of sampled answers, 95 % intervals",
        xlabel="KL to the first model, nats an answer",
    )


def _draw_line(axis, name, label, rows, positions):
    figures = []
    half_widths = []
    for row in rows:
        half_width = row[f"{name}/ci95"]
        figures.append(row[name])
        half_widths.append(math.nan if half_width is None else half_width)
    axis.errorbar(positions, figures, half_widths, marker="o", capsize=3, label=label)


def _place_in_picture(names, row):
    """A sorting key: the row's values of these settings."""
    return [_numbers_first(row[name]) for name in names]


def _numbers_first(value):
    """A sorting key for a setting's values, of which some may be text."""
    is_text = isinstance(value, str)
    return is_text, 0 if is_text else value, str(value)
