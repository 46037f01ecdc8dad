"""Rounds of iterative DPO: each one's settings, its prompts, answers and pairs, and what they gave.

The folder of a run with rounds holds held_out.jsonl, round_1/, round_2/, ..., each of which is a
run of its own, and report.md with rounds.png. Beside what every run leaves, a round has
    answers.jsonl   what was sampled, written as it comes: the same command goes on behind it
    pairs.jsonl     better against worse of these, what the round trains on
"""

import json
import math
from dataclasses import replace
from functools import partial
from pathlib import Path

import yaml
from matplotlib.figure import Figure

from support.checkpoint import (
    ANSWERS_FILE,
    FOLDERS_OF_A_RUN,
    HELD_OUT_FILE,
    PAIRS_FILE,
    check_noted,
    claim,
    is_finished,
)
from support.errors import InputError
from support.files import write_atomically, write_records, write_text
from support.intervals import mean_half_width
from support.processes import is_first, progress, say, wait_for_all
from support.report import public_settings
from support.reward import ORIGINAL, score_answers, try_answers, try_reward
from support.run_log import read_rows
from support.sampler import Told
from support.samples import (
    ENDED,
    KL,
    LABELS,
    REWARD,
    TOKENS,
    by_prompt,
    figure,
    make_sampler,
    samples_file,
)
from support.shapes import read_preference
from support.sources import bases_used
from support.verdict import ENOUGH_PAIRS, markdown

NEAR = 0.2  # of the longer answer: lengths that differ by less than this more are about as near
FEW = 0.1  # of a round's prompts: fewer that give a pair are worth a warning
PANELS = {  # of rounds.png, each with its title
    REWARD: "reward",
    ENDED: "share that ended",
    TOKENS: "tokens an answer",
    KL: "KL to the first model, nats",
}


def folder_of(config, number):
    """The folder of a round."""
    return Path(config.output_dir) / f"round_{number}"


def first_folder(config):
    """The folder of the run that the model began in: the first round's, or the run's own."""
    return folder_of(config, 1) if config.rounds else Path(config.output_dir)


def last_folder(config):
    """The folder of the run whose model is the last: the last round's, or the run's own."""
    return folder_of(config, config.rounds) if config.rounds else Path(config.output_dir)


def config_of(config, number):
    """The settings of a round, from 1 on, as of a run of its own."""
    first = config.kl_model or config.model
    model = config.model
    reference = config.reference_model
    if number > 1:
        model = str(folder_of(config, number - 1) / "model")
        if config.round_reference == "first":
            reference = reference or config.model
    return replace(
        config,
        rounds=0,
        model=model,
        reference_model=reference,
        kl_model=first,
        dataset=str(folder_of(config, number) / PAIRS_FILE),
        split=None,
        eval_dataset=str(Path(config.output_dir) / HELD_OUT_FILE) if config.eval_pairs else None,
        eval_split=None,
        columns=None,
        train_pairs=0,
        output_dir=str(folder_of(config, number)),
    )


def begin_anew_once(configs, options):
    """Before a sweep's first run trains: with --overwrite, remove what earlier ones have left.

    If the sweep is then stopped, and goes on without --overwrite, no old run passes for its own.

    options  the command line's, of which `overwrite` becomes False
    raises   InputError, as check_noted and claim do
    """
    if not options.overwrite:
        return
    options.overwrite = False
    for config in configs:
        check_noted(Path(config.output_dir), config, overwrite=True)
    _check_keeps_models(configs)
    for config in configs:
        with claim(Path(config.output_dir), config, overwrite=True):
            if config.rounds:
                _remove_rounds(config)


def _check_keeps_models(configs):
    """Refuse to remove a model which one of these runs begins with."""
    needed = set(bases_used.values())
    removed = set()
    for config in configs:
        needed |= {config.model, config.reference_model, config.kl_model}
        run = Path(config.output_dir)
        for folder in (run, *run.glob("round_*")):
            removed |= {(folder / name).resolve() for name in FOLDERS_OF_A_RUN}
    for name in sorted(needed - {None}):
        path = Path(name).resolve()
        if path.exists() and removed & {path, *path.parents}:
            raise InputError(
                f"model {name} would be removed by --overwrite: give another output_dir"
            )


def _remove_rounds(config):
    """Remove what rounds have left, the last first: a later one would pass for this run's."""
    last = config.rounds
    while folder_of(config, last + 1).exists():
        last += 1
    for number in range(last, 0, -1):
        folder = folder_of(config, number)
        one = config_of(config, number)
        if folder.exists():
            check_noted(folder, one, overwrite=True)
            if is_first():  # before the settings, with which old pairs would pass for new ones
                for name in (ANSWERS_FILE, PAIRS_FILE):
                    (folder / name).unlink(missing_ok=True)
            with claim(folder, one, overwrite=True):
                pass
    if is_first():
        (Path(config.output_dir) / HELD_OUT_FILE).unlink(missing_ok=True)


def lacks_pairs(config, number, overwrite):
    """Whether a round's answers are still to be sampled and scored.

    raises   InputError, as check_noted does, for the folders of all rounds and of this one
    """
    wait_for_all()  # for the first process writes the model of the round before
    check_noted(Path(config.output_dir), config, overwrite)
    folder = folder_of(config, number)
    finished = is_finished(folder, config_of(config, number), overwrite)
    return overwrite or not (finished or (folder / PAIRS_FILE).exists())


def config_to_sample(config, number):
    """The settings with which a round's model, and the prompts of it and those before, load."""
    model = config_of(config, number).model
    return replace(config, model=model, train_pairs=number * config.train_pairs)  # 0 is all


def make_pairs(setup, config, number):
    """Sample and score a round's answers, and write what it trains and is evaluated on.

    setup    the Setup of the model that answers, and of the set's own pairs up to this round's
    config   the settings of the whole run
    raises   InputError where a reward fails, or no prompt has two answers to be told apart
    """
    folder = folder_of(config, number)
    if setup.pairs["eval"]:
        _write_held_out(setup.pairs["eval"], config)
    prompts = _prompts_of_round(setup.pairs["train"], config, number)
    try_reward(config, prompts[:1])
    rows = _sample(setup, config, prompts, folder / ANSWERS_FILE, f"{config.seed} round {number}")
    rewards = score_answers(config, prompts, rows)
    _note_rewards(folder / ANSWERS_FILE, setup.origin, prompts, rows, rewards)
    pairs = _couple_all(prompts, rows, rewards, config)
    _tell(number, rows, rewards, len(pairs))
    if not pairs:
        raise InputError(
            f"round {number}: no prompt has two answers that ended and that the reward tells "
            f"apart, of {len(prompts)} prompts. Look at {folder / ANSWERS_FILE}; a larger "
            "samples_per_prompt, train_pairs or max_new_tokens, or another reward may help"
        )
    write_records(folder / PAIRS_FILE, pairs)
    wait_for_all()


def _write_held_out(pairs, config):
    """The evaluation pairs as a set of their own, so that all rounds have the same ones.

    raises   InputError if they are others than an earlier round's, or steps of an answer
    """
    rows = []
    for pair in pairs:
        preference = read_preference(pair.record, config.columns)
        if not preference.is_whole:
            raise InputError(
                "rounds sample whole answers, and this set's are steps of one (column "
                "initial_reason_steps): leave rounds at 0"
            )
        row = _in_own_shape(preference, preference.chosen, preference.rejected)
        rows.append(row | {ORIGINAL: pair.record})
    path = Path(config.output_dir) / HELD_OUT_FILE
    before = json.dumps(read_rows(path))
    if before not in ("[]", json.dumps(rows, default=str)):
        raise InputError(
            f"{path}: the data changed since these were held out, and what earlier rounds trained "
            "on may be among them now. Put the data back, give another output_dir, or begin anew "
            "with --overwrite"
        )
    write_records(path, rows)


def _in_own_shape(preference, chosen, rejected):
    """A record of this project's own shape with the prompt of a preference, and two answers."""
    # as turns, for plain text is searched for a prompt or the turns of a dialogue in it
    row = {
        "prompt": preference.messages,
        "chosen": [{"role": "assistant", "content": chosen}],
        "rejected": [{"role": "assistant", "content": rejected}],
    }
    if preference.tools:
        row["tools"] = preference.tools
    if preference.template_options:
        row["chat_template_kwargs"] = preference.template_options
    return row


def _prompts_of_round(pairs, config, number):
    """The next train_pairs of the set's pairs, other ones each round until all have been asked."""
    wanted = config.train_pairs or len(pairs)
    start = (number - 1) * wanted
    chosen = []
    again = 0
    for position in range(start, start + min(wanted, len(pairs))):
        chosen.append(pairs[position % len(pairs)])
        again += position >= len(pairs)
    if again:
        say(f"round {number}: {again} of its {len(chosen)} prompts were asked before: no more left")
    return chosen


def _sample(setup, config, prompts, path, seed):
    """Answers to a round's prompts, those that stand in the file already included.

    returns  for each prompt a list of Told
    raises   InputError where the reward fails on the first of them
    """
    count = config.samples_per_prompt
    found = _read_answers(path, setup.origin)
    sampler = make_sampler(setup, config)
    ids = [pair.prompt_ids for pair in prompts]
    with progress("sampling", len(prompts), len(found), "prompt") as bar:
        for batch in sampler.batches(ids, count):
            if found.keys() >= set(batch):
                continue
            drawn = sampler.draw(ids, batch, count, seed)
            told = list(map(sampler.tell_all, drawn))
            is_first_batch = not found
            lines = []
            for position, answers in zip(batch, told, strict=True):
                found[position] = answers
                row = _answers_row(position, prompts[position], found[position])
                lines.append(json.dumps(row) + "\n")
            if is_first():
                with open(path, "a", encoding="utf-8") as file:
                    file.write("".join(lines))
            if is_first_batch:
                try_answers(config, [prompts[position] for position in batch], told)
            bar.update(len(batch))
    return [found[position] for position in range(len(prompts))]


def _answers_row(position, pair, answers):
    """A line of answers.jsonl: a prompt, and what was answered to it."""
    told = [answer._asdict() for answer in answers]
    return {"prompt": position, "messages": json.loads(pair.prompt), "answers": told}


def _note_rewards(path, origin, prompts, answers, rewards):
    """Write answers.jsonl again, each answer with its reward."""
    rows = [{"origin": origin}]
    for position, scores in enumerate(rewards.tolist()):
        row = _answers_row(position, prompts[position], answers[position])
        for answer, score in zip(row["answers"], scores, strict=True):
            answer["reward"] = score
        rows.append(row)
    write_records(path, rows)


def _read_answers(path, origin):
    """Answers that an earlier, stopped process has sampled, by prompt; begins the file anew.

    raises   InputError if they are of another model or other prompts
    """
    wait_for_all()
    head, *rows = read_rows(path) or [{"origin": origin}]
    if head.get("origin") != origin:
        raise InputError(
            f"{path}: model or data changed since this was sampled. Put them back, give another "
            "output_dir, or begin anew with --overwrite"
        )
    found = {}
    for row in rows:
        answers = []
        for answer in row["answers"]:
            answers.append(Told(answer["text"], answer["ended"], answer["tokens"]))
        found[row["prompt"]] = answers
    wait_for_all()
    write_records(path, [{"origin": origin}, *rows])  # without a line that a kill has torn
    return found


def _couple_all(prompts, answers, rewards, config):
    """Records of the pairs of a round, at most one a prompt."""
    pairs = []
    lead = 0  # how many tokens more the chosen answers have so far
    for pair, drawn, scores in zip(prompts, answers, rewards.tolist(), strict=True):
        ended = []
        for answer, score in zip(drawn, scores, strict=True):
            if answer.ended and answer.text:
                ended.append((answer.text, answer.tokens, score))
        found = couple(ended, lead)
        if found is None:
            continue
        chosen, rejected = found
        lead += chosen[1] - rejected[1]
        record = pair.record.get(ORIGINAL, pair.record)
        preference = read_preference(record, config.columns)
        row = _in_own_shape(preference, chosen[0], rejected[0])
        pairs.append(row | {"score_chosen": chosen[2], "score_rejected": rejected[2]})
    return pairs


def couple(answers, lead):
    """The best of the answers to a prompt and the worst.

    Where several are as good, as a verifier finds them, the longest: short ones pass more easily,
    and training on any of them makes a model brief. Of the worst, one about as long, or the model
    would learn that long answers win, or short ones; of those the one that brings `lead` nearest
    to zero.

    answers  list of (text, tokens, reward)
    lead     how many tokens more than the rejected answers the chosen ones so far have
    returns  (chosen, rejected), or None where no answer is better than another
    """
    rewards = [reward for _, _, reward in answers]
    if len(set(rewards)) < 2:
        return None
    good = [answer for answer in answers if answer[2] == max(rewards)]
    bad = [answer for answer in answers if answer[2] == min(rewards)]
    chosen = max(good, key=lambda answer: answer[1])
    nearest = min(_distance(chosen, answer) for answer in bad)

    def order(answer):
        distance = _distance(chosen, answer)
        near = distance < nearest + NEAR
        return not near, abs(lead + chosen[1] - answer[1]), distance

    rejected = min(bad, key=order)
    # a reward model's last digit for one text may change with the others that it reads beside it
    return None if chosen[0] == rejected[0] else (chosen, rejected)


def _distance(one, other):
    """How far two answers' lengths are apart, as a part of the longer one's."""
    return abs(one[1] - other[1]) / max(one[1], other[1])


def _tell(number, answers, rewards, pairs):
    """Say what became of a round's prompts and answers."""
    total = 0
    whole = 0
    unfinished = 0
    for drawn in answers:
        ended = sum(answer.ended for answer in drawn)
        total += len(drawn)
        whole += ended
        unfinished += ended < 2
    alike = len(answers) - pairs - unfinished
    say(
        f"round {number}: {pairs} pairs of {len(answers)} prompts ({unfinished} have fewer than "
        f"two answers that ended, {alike} none better than another); {total} answers, "
        f"{100 * whole / total:.0f} % ended, mean reward {rewards.mean().item():.4g}"
    )
    if 0 < pairs < FEW * len(answers):
        say(
            "!!! Few prompts gave a pair: a larger samples_per_prompt, train_pairs or "
            "max_new_tokens, or another reward may help !!!"
        )


def summarize(config, last):
    """Write report.md and rounds.png of the rounds up to the last one, and print the table."""
    if not is_first():
        return
    rows = []
    table = []
    for number in range(1, last + 1):
        folder = folder_of(config, number)
        evaluations = read_rows(folder / "metrics.jsonl", "eval")
        if not evaluations or REWARD not in evaluations[0]:
            say("Without held-out pairs, or with eval_samples=0, nothing tells what rounds gave")
            return
        if number == 1:
            rows.append(evaluations[0])
            table.append(["start", "", *_figures(rows[0]), ""])
        rows.append(evaluations[-1])
        pairs = len(read_rows(folder / PAIRS_FILE))
        table.append([number, pairs, *_figures(rows[-1]), _gain(config, number, rows[-1]["step"])])
    _draw(rows, Path(config.output_dir) / "rounds.png")
    header = ["after round", "pairs", *LABELS.values(), "reward since the start, paired"]
    text = markdown(header, table)
    about = (
        "Held-out figures with 95 % intervals; KL is an estimate, which may be a little below 0. "
        "Each round is a run of its own, in round_N/; its report.md has answers before and after."
    )
    if rows[0]["pairs"] < ENOUGH_PAIRS:
        about += (
            f" Too few prompts were held out ({rows[0]['pairs']}) to tell a change from chance."
        )
    _write_report(config, text, about)
    say(f"\n{text}\n\n{about}\nThe last model is in {folder_of(config, last)}/model")


def _write_report(config, table, about):
    """Write report.md of all rounds: what was done, the table, and with which settings."""
    folder = Path(config.output_dir)
    settings = public_settings(config)
    method = (
        f"Iterative DPO of {settings['model']}: its own answers to prompts of "
        f"{settings['dataset']}, the better against the worse by {settings['reward']}."
    )
    listed = yaml.safe_dump(settings, sort_keys=False)
    write_text(
        folder / "report.md",
        f"# {folder.name}\n\n![rounds](rounds.png)\n\n{method}\n\n{table}\n\n{about}\n\n"
        f"```yaml\n{listed}```\n",
    )


def _gain(config, number, step):
    """How far the reward of sampled answers went since the first round began, with its interval."""
    before = read_rows(samples_file(folder_of(config, 1), 0))
    after = read_rows(samples_file(folder_of(config, number), step))
    if before[0].get("version") != after[0].get("version"):
        return "the reward's file was edited"
    change = by_prompt(after)[REWARD] - by_prompt(before)[REWARD]
    return f"{change.mean().item():+.3f} ± {mean_half_width(change):.3f}"


def _figures(row):
    """The figures of an evaluation, with their intervals, in the order of LABELS."""
    return [_figure(row, name) for name in LABELS]


def _figure(row, name):
    """A figure of an evaluation with its interval, where it has one."""
    half_width = row.get(f"{name}/ci95")
    return figure(row, name) + ("" if half_width is None else f" ± {half_width:.3f}")


def _draw(rows, path):
    """Reward, share that ended, length and KL divergence over the rounds."""
    figure = Figure((14, 3.6), layout="constrained")
    figure.suptitle("sampled answers to held-out prompts, 95 % intervals")
    for axis, name in zip(figure.subplots(1, len(PANELS)), PANELS, strict=True):
        values = []
        half_widths = []
        for row in rows:
            values.append(math.nan if row[name] is None else row[name])
            half_widths.append(row.get(f"{name}/ci95") or 0.0)
        axis.errorbar(range(len(rows)), values, half_widths, marker="o", capsize=3)
        axis.set(title=PANELS[name], xlabel="rounds")
        axis.set_xticks(range(len(rows)))
    write_atomically(path, partial(figure.savefig, format="png"))
