"""Rounds of iterative DPO: what is asked, coupled and trained on, and that nothing is lost."""

import contextlib
import csv
import datetime
import itertools
import json
import math
import random
import shutil
import signal
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pandas
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import train_dpo
from helpers import (
    CHATML,
    CONFIG,
    PAIRS,
    Output,
    assistant,
    build_tokenizer,
    make_quick,
    many,
    read_metrics,
    record,
    user,
    weights_bytes,
    write_jsonl,
    write_model,
)
from support import processes, report, rounds, samples, sources
from support.config import Config, read_config
from support.run_log import read_rows
from support.sampler import Told
from support.shapes import read_preference
from test_checkpoint import Runner

pytestmark = pytest.mark.usefixtures("quick")
LENGTH = "def judge(messages, answer, record):\n    return {}\n"
SETTINGS = {
    "reward": "judge.py:judge",
    "rounds": 2,
    "samples_per_prompt": 8,
    "eval_samples": 2,
    "max_new_tokens": 8,
    "train_pairs": 4,
}


def write_reward(value="len(answer)", folder="."):
    Path(folder, "judge.py").write_text(LENGTH.format(value))


@pytest.fixture
def settings(talker):
    """Settings of a run of two rounds, and judge.py, which rewards long answers."""
    write_reward()
    return SETTINGS | {"model": talker}


@pytest.fixture(scope="module")
def whole(tmp_path_factory, overrides, talker):
    """A finished run of two rounds, what it printed, its settings and its pictures."""
    folder = tmp_path_factory.mktemp("rounds")
    write_reward(folder=folder)
    places = {"output_dir": str(folder / "out"), "reward": f"{folder}/judge.py:judge"}
    given = SETTINGS | {"model": talker} | places
    printed = Output()
    with contextlib.redirect_stdout(printed), pytest.MonkeyPatch.context() as patch:
        make_quick(patch)
        drawn = []
        patch.setattr(
            rounds.Figure,
            "savefig",
            lambda figure, path, **_: drawn.append(figure) or Path(path).write_bytes(b""),
        )
        assert train_dpo.main(["--config", CONFIG, *overrides(**given)]) == 0
    return SimpleNamespace(
        folder=folder / "out", printed=printed.getvalue(), settings=given, figures=drawn
    )


def config_of(overrides, **changes):
    (config,), _ = read_config(CONFIG, overrides(**changes))
    return config


def pairs_of(folder):
    return read_rows(Path(folder) / "pairs.jsonl")


def asked_in(folder):
    return [row["prompt"][-1]["content"] for row in pairs_of(folder)]


def text_of(answer):
    (turn,) = answer
    assert turn["role"] == "assistant"
    return turn["content"]


def files(folder):
    """What is in a folder, with the moment of its writing."""
    paths = [path for path in Path(folder).rglob("*") if path.is_file()]
    return {path: path.stat().st_mtime_ns for path in paths}


# Couples


def couple(*answers, lead=0):
    """Texts of a couple of (text, tokens, reward)."""
    found = rounds.couple(list(answers), lead)
    return found and tuple(text for text, _, _ in found)


def test_the_best_answer_is_coupled_with_the_worst():
    assert couple(("a", 5, 0.5), ("b", 5, 2.0), ("c", 5, 1.0), ("d", 5, -3.0)) == ("b", "d")


def test_of_answers_as_good_the_longest_is_taken_against_one_about_as_long():
    answers = [("a", 10, 1), ("b", 100, 1), ("c", 60, 0), ("d", 16, 0), ("e", 140, 0)]
    # b is 40 tokens from c, which is 40 % of b, and 40 from e, 29 % of e: about as near
    assert couple(*answers) == ("b", "e")
    assert couple(*answers, lead=-20) == ("b", "c")
    assert couple(*answers[:4]) == ("b", "c")


def test_what_a_prompts_template_is_given_stays_with_its_sampled_answers():
    given = {"tools": [{"name": "look"}], "chat_template_kwargs": {"enable_thinking": False}}
    asked = read_preference({"prompt": "Q", "chosen": "a", "rejected": "b", **given})
    again = read_preference(rounds._in_own_shape(asked, "c", "d"))
    assert (again.chosen, again.rejected) == ("c", "d")
    for name in ("messages", "tools", "template_options"):
        assert getattr(again, name) == getattr(asked, name)


def test_one_text_of_two_rewards_is_no_couple():
    assert rounds.couple([("a", 3, 0.5), ("a", 3, 0.5000001), ("a", 3, 0.5)], 0) is None


def test_of_couples_as_near_one_is_taken_that_keeps_the_lengths_in_balance():
    answers = [("a", 20, 1), ("b", 22, 0), ("c", 18, 0)]
    assert couple(*answers, lead=-1) == ("a", "c")
    assert couple(*answers, lead=1) == ("a", "b")
    nearer = [("a", 20, 1), ("b", 21, 0), ("c", 16, 0)]  # 5 % and 20 %: as near
    assert couple(*nearer, lead=-5) == ("a", "c")
    further = [("a", 20, 1), ("b", 20, 0), ("c", 16, 0)]  # 0 % and 20 %
    assert couple(*further, lead=-5) == ("a", "b")


@pytest.mark.parametrize("rewards", [[], [1], [0, 0, 0], [1, 1], [2.5, 2.5]])
def test_answers_that_are_all_as_good_make_no_couple(rewards):
    assert couple(*((str(i), i, reward) for i, reward in enumerate(rewards))) is None


def test_chosen_answers_of_many_prompts_are_as_long_as_the_rejected_ones():
    draw, lead, apart, number = random.Random(0), 0, 0, 0
    for _ in range(200):
        answers = []
        for text in "abcdefgh":  # good answers are shorter by a third
            good = draw.random() < 0.4
            answers.append((text, draw.randint(5, 40 if good else 60), good))
        found = rounds.couple(answers, lead)
        if found:
            gap = found[0][1] - found[1][1]
            lead, apart, number = lead + gap, apart + abs(gap), number + 1
    assert number > 190 and apart / number > 2 and abs(lead) / number < 0.2


def test_the_balance_of_lengths_is_kept_from_prompt_to_prompt():
    prompts = [replace(PAIRS[0], record=record(f"Q {number}")) for number in range(4)]
    answers = [[Told("good", True, 20), Told("short", True, 18), Told("longer", True, 22)]] * 4
    rewards = torch.tensor([[1.0, 0.0, 0.0]] * 4)
    pairs = rounds._couple_all(prompts, answers, rewards, SimpleNamespace(columns=None))
    assert [text_of(pair["rejected"]) for pair in pairs] == ["longer", "short"] * 2
    assert [pair["prompt"] for pair in pairs] == [[user(f"Q {number}")] for number in range(4)]


@pytest.mark.parametrize(
    "good, bad",
    [
        ("Which of the two is it now? This one.", "Which of the two is it now? That one."),
        ("Human: Why?\n\nAssistant: So.", "Human: Why?\n\nAssistant: No."),
        ("### Instruction: none", "### Instruction: some"),
        ('{"role": "user", "content": "a"}', '[{"role": "user", "content": "b"}]'),
    ],
)
def test_what_is_sampled_is_trained_on_as_it_is_whatever_it_looks_like(good, bad):
    asked = [replace(PAIRS[0], record=record("Which of the two is it now?"))]
    answers, rewards = [[Told(good, True, 9), Told(bad, True, 9)]], torch.tensor([[1.0, 0.0]])
    (row,) = rounds._couple_all(asked, answers, rewards, SimpleNamespace(columns=None))
    preference = read_preference(row)
    assert (preference.chosen, preference.rejected) == (good, bad)
    assert preference.messages == [user("Which of the two is it now?")]


# Prompts


@pytest.mark.parametrize(
    "wanted, asked",
    [
        (3, ["012", "345", "670", "123"]),
        (8, ["01234567"] * 4),
        (0, ["01234567"] * 4),
        (99, ["01234567"] * 4),
    ],
)
def test_each_round_asks_other_prompts_until_all_have_been_asked(wanted, asked, capsys):
    config = Config(train_pairs=wanted)
    for number, expected in enumerate(asked, 1):
        pairs = list("01234567")[: rounds.config_to_sample(config, number).train_pairs or None]
        found = rounds._prompts_of_round(pairs, config, number)
        assert sorted(found) == sorted(expected)
        again = sum(place in "".join(asked[: number - 1]) for place in expected)
        said = f"round {number}: {again} of its {len(expected)} prompts were asked before"
        assert (said in capsys.readouterr().out) == (again > 0)


def test_a_run_asks_other_prompts_each_round_than_those_it_is_evaluated_on(whole):
    first, second = (set(asked_in(whole.folder / f"round_{n}")) for n in (1, 2))
    held_out = {row["prompt"][-1]["content"] for row in read_rows(whole.folder / "held_out.jsonl")}
    assert len(first) == len(second) == 4 and len(held_out) == 3
    assert not first & second and not (first | second) & held_out


def test_prompts_that_are_asked_again_get_other_answers(dpo, settings, tmp_path):
    source = write_jsonl(tmp_path / "few.jsonl", many(6))
    given = {"dataset": source, "split": None, "eval_split": None, "eval_pairs": 0, "lr": 1e-12}
    assert dpo(**settings | given | {"train_pairs": 4}) == 0
    first, second = (set(asked_in(f"out/round_{n}")) for n in (1, 2))
    assert len(first) == len(second) == 4 and len(first & second) == 2
    assert dpo(**settings | given | {"train_pairs": 0, "output_dir": "all"}) == 0
    answers = [read_rows(Path(f"all/round_{n}/answers.jsonl"))[1:] for n in (1, 2)]
    for ours, later in zip(*answers, strict=True):  # of the same prompt, and nearly the same model
        assert ours["prompt"] == later["prompt"] and ours["answers"] != later["answers"]


# The pairs of a round


def test_pairs_are_sampled_answers_better_against_worse_one_pair_a_prompt(whole):
    for number in (1, 2):
        folder = whole.folder / f"round_{number}"
        _, *lines = read_rows(folder / "answers.jsonl")
        drawn = {line["prompt"]: line["answers"] for line in lines}
        assert sorted(drawn) == list(range(4))
        texts = [{a["text"]: a["ended"] for a in answers} for answers in drawn.values()]
        pairs = pairs_of(folder)
        assert len({pair["prompt"][-1]["content"] for pair in pairs}) == len(pairs) == 4
        for pair in pairs:
            chosen, rejected = text_of(pair["chosen"]), text_of(pair["rejected"])
            assert pair["score_chosen"] == len(chosen) > len(rejected) == pair["score_rejected"]
            (own,) = [row for row in texts if chosen in row]
            assert own[chosen] and own[rejected]
            whole_ones = [len(text) for text, ended in own.items() if ended and text]
            assert pair["score_chosen"] == max(whole_ones) and pair["score_rejected"] == min(
                whole_ones
            )


def test_a_verifier_couples_no_answer_that_did_not_end(dpo, settings):
    write_reward("len(answer) > 6")
    assert dpo(**settings | {"samples_per_prompt": 16, "rounds": 1}) == 0
    _, *lines = read_rows(Path("out/round_1/answers.jsonl"))
    cut = {a["text"] for line in lines for a in line["answers"] if not a["ended"]}
    assert cut
    for pair in pairs_of("out/round_1"):
        assert (pair["score_chosen"], pair["score_rejected"]) == (1.0, 0.0)
        chosen, rejected = text_of(pair["chosen"]), text_of(pair["rejected"])
        assert len(chosen) > 6 >= len(rejected) and not {chosen, rejected} & cut


def test_the_pairs_of_a_round_are_a_set_that_can_be_looked_at(dpo, whole, capsys):
    source = str(whole.folder / "round_1/pairs.jsonl")
    given = {"dataset": source, "train_pairs": 0, "eval_pairs": 0, "split": None}
    assert dpo("--dry-run", **given) == 0
    out = capsys.readouterr().out
    assert "train: 4 pairs" in out and "chosen" in out
    assert "score the rejected answer above" not in out and "dropped" not in out


def test_each_round_trains_on_its_own_pairs_from_the_model_before(whole):
    for number in (1, 2):
        folder = whole.folder / f"round_{number}"
        noted = yaml.safe_load((folder / "config.yaml").read_text())
        assert noted["dataset"] == str(folder / "pairs.jsonl")
        rows = read_metrics(folder, "train")
        assert len(rows) == 2 and rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-7)
        before = whole.settings["model"] if number == 1 else str(whole.folder / "round_1/model")
        assert noted["model"] == before and noted["kl_model"] == whole.settings["model"]
    assert weights_bytes(whole.folder / "round_1") != weights_bytes(whole.folder / "round_2")


def test_a_round_begins_with_the_figures_that_the_one_before_ended_with(whole):
    last = read_metrics(whole.folder / "round_1", "eval")[-1]
    first = read_metrics(whole.folder / "round_2", "eval")[0]
    for name in ("reward", "ended", "tokens", "kl", "entropy", "distinct"):
        assert first[f"samples/{name}"] == pytest.approx(last[f"samples/{name}"], abs=1e-4), name
    assert (
        read_metrics(whole.folder / "round_1", "eval")[0]["samples/kl"] == 0 != first["samples/kl"]
    )


TURNS = [{"role": "system", "content": "S"}, user("Q"), assistant("A"), user(" Q2 \n")]


def conversations(count=20):
    for number in range(count):
        turns = [*TURNS[:-1], user(f"Q {number}")]
        yield {
            "chosen": [*turns, assistant(f" good {number}\n")],
            "rejected": [*turns, assistant(f"bad {number}")],
            "more": {"number": number},
        }


def own_columns(count=20):
    for number in range(count):
        yield {"question": f"Q {number}", "good": f"good {number}", "bad": "bad", "record": number}


SETS = {
    "columns": (
        own_columns,
        {"columns": {"prompt": "question", "chosen": "good", "rejected": "bad"}},
    ),
    "a system turn and several turns": (conversations, {}),
    "prompts and answers that are cut": (
        conversations,
        {"max_prompt_length": 30, "max_length": 36},
    ),
    "answers that begin with the prompt": (
        lambda: (record(f"Q {i}", f"Q {i} good", f"Q {i} bad") for i in range(20)),
        {},
    ),
    "an answer as a prefix of the other": (
        lambda: (record(f"Q {i}", "Assistant: good", f"Q {i}") for i in range(20)),
        {},
    ),
    "tools": (  # that this project's own shape holds too
        lambda: (
            record(f"Q {i}", tools=[{"type": "function", "function": {"name": f"f{i}"}}])
            for i in range(20)
        ),
        {},
    ),
    "scores, and a tie": (
        lambda: (record(f"Q {i}", score_chosen=2, score_rejected=2 - i % 2) for i in range(40)),
        {"keep_ties": True},
    ),
}


@pytest.mark.parametrize("name", SETS)
def test_a_round_is_evaluated_on_the_original_pairs_to_the_token(
    name, overrides, settings, tmp_path
):
    made, changes = SETS[name]
    source = write_jsonl(tmp_path / "set.jsonl", made())
    given = {
        "dataset": source,
        "split": None,
        "eval_split": None,
        "eval_pairs": 3,
        "train_pairs": 4,
    }
    if name == "tools":
        template = "{% if tools %}{{ tools }}{% endif %}" + CHATML
        changes = {"model": write_model(tmp_path / "tools", tokenizer=build_tokenizer(template))}
    config = config_of(overrides, **settings | given | changes)
    original = train_dpo.load(config).pairs["eval"]
    rounds._write_held_out(original, config)
    rounds.folder_of(config, 1).mkdir()
    write_jsonl(rounds.folder_of(config, 1) / "pairs.jsonl", many(3, name="another"))
    found = train_dpo.load(rounds.config_of(config, 1)).pairs["eval"]
    ids = lambda pair: tuple(
        tuple(part) for part in (pair.prompt_ids, pair.chosen_ids, pair.rejected_ids)
    )
    assert sorted(map(ids, found)) == sorted(map(ids, original)) and len(found) >= 2
    by_ids = {ids(pair): pair for pair in original}
    for pair in found:
        assert pair.prompt == by_ids[ids(pair)].prompt
        assert pair.record["original_record"] == by_ids[ids(pair)].record


def test_records_of_a_parquet_file_with_dates_go_through_rounds(dpo, settings, tmp_path):
    rows = list(many(9))
    for number, row in enumerate(rows):
        row["when"] = datetime.datetime(2024, 1, 1 + number)
        row["raw"] = bytes([number, 255])
        row["part"] = {"score": math.nan, "list": [1, 2]}
    pandas.DataFrame(rows).to_parquet(tmp_path / "set.parquet")
    write_reward("len(answer) + record['part']['list'][0]")
    given = {"dataset": str(tmp_path / "set.parquet"), "split": None, "eval_split": None}
    assert dpo(**settings | given | {"rounds": 1, "eval_pairs": 1}) == 0
    assert read_metrics("out/round_1", "eval")[-1]["samples/reward"] > 1


# References


def test_rounds_may_keep_the_first_model_as_reference(dpo, settings, setups, talker):
    assert dpo(**settings, round_reference="first") == 0
    first, second = setups
    assert "reference model" not in first.origin
    assert second.origin["reference model"] == first.origin["model"] != second.origin["model"]
    losses = [read_metrics(f"out/round_{number}", "train")[0]["loss"] for number in (1, 2)]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-7) != pytest.approx(losses[1], abs=1e-7)


@pytest.mark.parametrize("kept", ["first", "previous"])
def test_a_reference_model_that_is_given_is_that_of_all_rounds(
    kept, dpo, settings, setups, tmp_path
):
    other = write_model(tmp_path / "other", seed=5)
    assert dpo(**settings, reference_model=other, round_reference=kept) == 0
    references = {setup.origin["reference model"] for setup in setups}
    assert len(references) == 1 and len(setups) == 2
    noted = [yaml.safe_load(Path(f"out/round_{n}/config.yaml").read_text()) for n in (1, 2)]
    assert {settings["reference_model"] for settings in noted} == {other}


def test_the_divergence_of_all_rounds_is_from_a_kl_model_that_is_given(dpo, settings, tmp_path):
    other = write_model(tmp_path / "other", seed=5)
    assert dpo(**settings | {"rounds": 1}, kl_model=other) == 0
    assert read_metrics("out/round_1", "eval")[0]["samples/kl"] > 1


# What a run of rounds leaves


def test_the_report_has_a_row_for_the_start_and_each_round(whole):
    text = (whole.folder / "report.md").read_text()
    table = [line.split("|")[1:-1] for line in text.splitlines() if line.startswith("|")]
    header, _, *rows = [[cell.strip() for cell in row] for row in table]
    labels = samples.LABELS.values()
    assert header == ["after round", "pairs", *labels, "reward since the start, paired"]
    assert [row[:2] for row in rows] == [["start", ""], ["1", "4"], ["2", "4"]]
    evaluations = [read_metrics(whole.folder / f"round_{n}", "eval") for n in (1, 2)]
    shown = [evaluations[0][0], evaluations[0][-1], evaluations[1][-1]]
    for row, figures in zip(rows, shown, strict=True):
        for name, cell in zip(samples.LABELS, row[2:-1], strict=True):
            half_width = figures.get(f"{name}/ci95")
            expected = f"{figures[name]:.3f}"
            assert cell == (expected if half_width is None else f"{expected} ± {half_width:.3f}")
    before, after = shown[0]["samples/reward"], shown[2]["samples/reward"]
    gain, _, half_width = rows[2][-1].partition(" ± ")
    assert float(gain) == pytest.approx(after - before, abs=6e-4) and float(half_width) > 0
    assert rows[0][-1] == "" and "![rounds](rounds.png)" in text
    said, _, noted = text.partition("```yaml\n")
    name = Path(whole.settings["model"]).name
    method = f"Iterative DPO of {name}: its own answers to prompts of pairs.jsonl, the better"
    for line in said.splitlines():
        assert line in whole.printed or line.startswith(("# out", "![rounds]", method)), line
    assert "against the worse by judge.py:judge." in said
    assert method in said and yaml.safe_load(noted.strip("`\n"))["samples_per_prompt"] == 8
    assert "Too few prompts were held out (3) to tell" in said
    assert f"The last model is in {whole.folder / 'round_2/model'}" in whole.printed
    last = (whole.folder / "round_2/report.md").read_text()
    assert f"of round_1/model on round_2/pairs.jsonl (the first model: {name});" in last
    assert last.index("sampled answers") < last.index("rewards/margins")


def test_the_picture_has_a_point_for_the_start_and_each_round(whole):
    assert (whole.folder / "rounds.png").exists()
    figure = whole.figures[-1]
    evaluations = [read_metrics(whole.folder / f"round_{n}", "eval") for n in (1, 2)]
    shown = [evaluations[0][0], evaluations[0][-1], evaluations[1][-1]]
    names = ["samples/reward", "samples/ended", "samples/tokens", "samples/kl"]
    for axis, name in zip(figure.axes, names, strict=True):
        (bars,) = axis.containers
        assert bars.lines[0].get_xdata().tolist() == [0, 1, 2]
        assert bars.lines[0].get_ydata().tolist() == [row[name] for row in shown]


def test_what_became_of_a_rounds_answers_is_said(whole):
    _, *lines = read_rows(whole.folder / "round_1/answers.jsonl")
    answers = [answer for line in lines for answer in line["answers"]]
    ended = round(100 * sum(answer["ended"] for answer in answers) / 32)
    mean = sum(len(answer["text"]) for answer in answers) / 32
    assert all(answer["reward"] == len(answer["text"]) for answer in answers)
    assert (
        "round 1: 4 pairs of 4 prompts (0 have fewer than two answers that ended, 0 none better "
        f"than another); 32 answers, {ended} % ended, mean reward {mean:.4g}"
    ) in whole.printed
    assert "Few prompts gave a pair" not in whole.printed


def test_prompts_that_gave_no_pair_are_counted_by_the_reason(capsys):
    ended, cut = Told("x", True, 2), Told("x", False, 2)
    answers = [[ended, ended], [ended, cut], *[[ended, ended]] * 10]
    rounds._tell(1, answers, torch.zeros(12, 2), 1)
    said, warning = capsys.readouterr().out.splitlines()
    assert "1 pairs of 12 prompts (1 have fewer than two answers that ended, 10 none better" in said
    assert warning.startswith("!!! Few prompts gave a pair: a larger samples_per_prompt")


def test_a_finished_run_samples_and_trains_nothing_and_one_more_round_goes_on(
    dpo, whole, capsys, tmp_path
):
    given = dict(whole.settings)
    before = files(whole.folder)
    assert dpo(**given) == 0
    out = capsys.readouterr().out
    assert "sampling" not in out and out.count("is finished") == 2
    same = {
        path: written
        for path, written in files(whole.folder).items()
        if path.parent != whole.folder
    }
    assert same.items() <= before.items()
    shutil.copytree(whole.folder, tmp_path / "copy")
    for path in (tmp_path / "copy").rglob("config.yaml"):
        path.write_text(path.read_text().replace(str(whole.folder), str(tmp_path / "copy")))
    given |= {"output_dir": str(tmp_path / "copy"), "rounds": 3}
    assert dpo(**given) == 0
    assert (tmp_path / "copy/round_3/model").exists()
    assert "| 3 " in (tmp_path / "copy/report.md").read_text()


def test_rounds_that_fail_late_have_told_what_those_before_gave(dpo, settings, capsys):
    write_reward("len(answer) if not Path('out/round_1/model').exists() else 1")
    Path("judge.py").write_text("from pathlib import Path\n" + Path("judge.py").read_text())
    assert dpo(**settings) == 2
    out = capsys.readouterr().out
    assert "Error: round 2: no prompt has two answers" in out
    assert "| 1 | 4 |" in out and "| 1 | 4 |" in Path("out/report.md").read_text()


def test_rewards_of_a_file_that_was_edited_are_not_compared(dpo, settings, capsys):
    assert dpo(**settings | {"rounds": 1}) == 0
    write_reward("100 - len(answer)")
    capsys.readouterr()
    assert dpo(**settings) == 0
    assert (
        "!!! judge.py:judge was edited" not in capsys.readouterr().out
    )  # a round compares its own
    rows = [line for line in Path("out/report.md").read_text().splitlines() if line[:2] == "| "]
    assert [row.split("|")[-2].strip() for row in rows[-2:]][1] == "the reward's file was edited"
    assert " ± " in rows[-2].split("|")[-2]


@pytest.mark.parametrize("change", ["split", "dataset", "train_pairs", "eval_pairs", "columns"])
def test_all_rounds_of_a_folder_are_of_one_set(dpo, settings, capsys, change):
    assert dpo(**settings | {"rounds": 1}) == 0
    before = files("out")
    other = {"train_pairs": 3, "eval_pairs": 2, "columns": {"prompt": "ask"}}.get(change, "other")
    assert dpo(**settings | {change: other}) == 2
    assert f"Error: out: {change} was " in capsys.readouterr().out
    assert files("out") == before


def test_rounds_take_no_folder_of_another_run_and_leave_theirs_to_none(dpo, settings, capsys):
    plain = settings | {"rounds": 0, "samples_per_prompt": 8}
    assert dpo(**plain, output_dir="plain") == 0
    before = files("plain")
    assert dpo(**settings, output_dir="plain") == 2
    assert "Error: plain: rounds was 0, is 2" in capsys.readouterr().out
    assert files("plain") == before
    assert dpo(**settings | {"rounds": 1}) == 0
    assert dpo(**plain) == 2
    assert "Error: out: rounds was 1, is 0" in capsys.readouterr().out


def test_rounds_do_not_go_on_with_other_held_out_prompts(dpo, settings, tmp_path, capsys):
    given = settings | {"dataset": write_jsonl(tmp_path / "set.jsonl", many(9)), "rounds": 1}
    assert dpo(**given) == 0
    held_out = Path("out/held_out.jsonl").read_text()
    changed = (tmp_path / "set.jsonl").read_text().replace("Q", "P")
    (tmp_path / "set.jsonl").write_text(changed)
    assert dpo(**given | {"rounds": 2}) == 2
    assert "held_out.jsonl: the data changed since these were held out" in capsys.readouterr().out
    assert Path("out/held_out.jsonl").read_text() == held_out
    assert dpo("--overwrite", **given) == 0
    assert Path("out/held_out.jsonl").read_text() != held_out


def test_finished_rounds_that_are_started_again_still_name_their_stand_ins(
    hub_down, quick, dpo, settings, talker, pairs_file, capsys
):
    stand_ins = {"org/model": talker, "org/pairs": pairs_file}
    given = settings | {"model": "org/model", "dataset": "org/pairs", "offline": stand_ins}
    assert dpo(**given | {"rounds": 1}) == 0
    before = [Path("out", name).read_text() for name in ("report.md", "config.yaml")]
    assert "org/pairs': " in before[1].splitlines()[0]
    sources.forget_sources()
    assert dpo(**given | {"rounds": 1}) == 0
    assert [Path("out", name).read_text() for name in ("report.md", "config.yaml")] == before
    capsys.readouterr()
    assert dpo(**given | {"rounds": 2}) == 0  # which loads them again, and says so again
    assert "model org/model is replaced by" in capsys.readouterr().out


def test_overwritten_rounds_leave_no_report_of_the_earlier_ones(quick, dpo, settings):
    assert dpo(**settings | {"rounds": 1}) == 0 and Path("out/report.md").exists()
    assert dpo("--overwrite", **settings | {"rounds": 1, "eval_samples": 0}) == 0
    assert not Path("out/report.md").exists() and not Path("out/rounds.png").exists()


def test_held_out_answers_that_look_like_a_dialogue_stay_answers(dpo, settings, tmp_path):
    rows = many(15)
    for number, row in enumerate(rows):
        row["chosen"] = [assistant(f"[INST] {number} [/INST]")]
    given = {"dataset": write_jsonl(tmp_path / "set.jsonl", rows), "rounds": 1}
    assert dpo(**settings | given) == 0
    assert read_metrics("out/round_1", "eval")[-1]["pairs"] == 3


def test_a_signal_while_a_round_is_finished_begins_no_other(dpo, settings, monkeypatch, capsys):
    finish = report.finish

    def signalled(*given):
        processes._signals.append(15)
        finish(*given)

    with monkeypatch.context() as patch:
        patch.setattr(processes, "_signals", [])
        patch.setattr(report, "finish", signalled)
        assert dpo(**settings) == 143
    assert Path("out/round_1/model").exists() and not Path("out/round_2").exists()
    assert dpo(**settings) == 0


def test_rounds_of_a_folder_may_grow_and_not_shrink(whole, dpo, settings, capsys):
    given = whole.settings | {"output_dir": str(whole.folder)}
    before = files(whole.folder)
    assert dpo(**given | {"rounds": 1}) == 2
    assert "rounds was 2, is 1" in capsys.readouterr().out
    assert files(whole.folder) == before


def test_a_setting_that_stops_rounds_before_they_sample_may_be_mended(dpo, settings, capsys):
    assert dpo(**settings | {"model": "./nowhere"}) == 2
    assert dpo(**settings | {"reward": "nowhere.py:judge"}) == 2
    assert dpo(**settings | {"rounds": 1}) == 0


def test_steps_of_an_answer_are_refused(dpo, settings, capsys):
    rows = []
    for number in range(12):
        row = {"prompt": f"Q {number}", "initial_reason_steps": "One. "}
        rows.append(row | {"chosen": "Two.", "rejected": "Three."})
    path = write_jsonl(Path("steps.jsonl"), rows)
    assert dpo(**settings, dataset=str(path)) == 2
    assert "rounds sample whole answers, and this set's are steps" in capsys.readouterr().out


def test_rounds_without_held_out_pairs_train_and_say_that_nothing_is_measured(
    dpo, settings, capsys
):
    assert dpo(**settings, eval_pairs=0) == 0
    assert "nothing tells what rounds gave" in capsys.readouterr().out
    assert Path("out/round_2/model").exists() and not Path("out/held_out.jsonl").exists()
    assert not read_metrics("out/round_2", "eval")


def test_rounds_of_a_model_that_generate_draws_for(dpo, settings, tmp_path, capsys):
    model = write_model(
        tmp_path / "mistral", "mistral", sliding_window=60, ends=list(range(10, 70))
    )
    assert dpo(**settings | {"rounds": 1, "model": model, "max_new_tokens": 60}) == 0
    assert "drawn by transformers' generate" in capsys.readouterr().out
    assert len(pairs_of("out/round_1")) == 4 and Path("out/round_1/model").exists()


def test_a_sweep_of_rounds_compares_the_last_rounds_on_a_frontier(dpo, settings, figures):
    assert dpo(**settings, beta=[0.1, 0.5], output_dir="s/run") == 0
    table = list(csv.DictReader(Path("s/sweep.csv").read_text().splitlines()))
    assert {row["beta"] for row in table} == {"0.1", "0.5"}
    for row in table:
        assert row["outcome"] == "finished"
        last = read_metrics(f"s/run_beta{row['beta']}/round_2", "eval")[-1]
        for name in ("samples/reward", "samples/kl", "rewards/accuracies"):
            assert float(row[name]) == pytest.approx(last[name])
    frontier = figures[-1].axes[2]
    points = set()
    for bars in frontier.containers:
        points |= set(zip(*(line.tolist() for line in bars.lines[0].get_data()), strict=True))
    expected = [(float(row["samples/kl"]), float(row["samples/reward"])) for row in table]
    for point, values in zip(sorted(points), sorted(expected), strict=True):
        assert point == pytest.approx(values)
    names = {text.get_text() for text in frontier.get_legend().get_texts()}
    assert names == {"beta 0.1", "beta 0.5"}
    start = read_metrics("s/run_beta0.1/round_1", "eval")[0]["samples/reward"]
    (line,) = [line for line in frontier.lines if line.get_linestyle() == ":"]
    assert list(line.get_ydata()) == [start, start]
    # both are of the first round's answers, for the model that answers is the same
    answers = [Path(f"s/run_beta{b}/round_1/answers.jsonl").read_bytes() for b in (0.1, 0.5)]
    assert answers[0] == answers[1]


# What is refused


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"reward": None}, "rounds sample answers, and need a reward"),
        ({"revision": "v1"}, "with revision, download that commit"),
        ({"keep": "best"}, "keep=best goes by the loss on the set's own pairs"),
        ({"load_in_4bit": True, "lora_r": 4}, "rounds sample from weights that are not packed"),
        ({"kl_model": "./nowhere"}, "kl_model: model ./nowhere: no such file or folder"),
        ({"reference_model": "./nowhere"}, "reference_model: model ./nowhere: no such file"),
    ],
)
def test_rounds_that_could_not_be_had_are_refused_before_anything_is_sampled(
    dpo, settings, changes, said, capsys
):
    assert dpo(**settings | changes) == 2
    assert said in capsys.readouterr().out and not list(Path().glob("out/*/answers.jsonl"))


def test_a_dry_run_of_rounds_estimates_and_says_what_it_leaves_out(dpo, settings, capsys):
    assert dpo("--dry-run", **settings) == 0
    out = capsys.readouterr().out
    assert "sample 64 answers to 4 prompts a round for them, in at most 0 minutes" in out
    assert not Path("out").exists()


def test_no_couple_at_all_ends_with_a_line_that_says_what_to_do(dpo, settings, capsys):
    write_reward("1.5")
    assert dpo(**settings) == 2
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith(
        "Error: round 1: no prompt has two answers that ended and that the reward"
    )
    assert "Look at out/round_1/answers.jsonl; a larger samples_per_prompt" in last
    write_reward()
    assert dpo(**settings) == 0  # with another reward in the same file it goes on


@pytest.fixture
def half_sampled(dpo, settings, monkeypatch, capsys):
    """A run that stopped while its first round was sampled: two prompts of four are answered."""
    monkeypatch.setattr(rounds, "make_sampler", _one_prompt_at_a_time)
    original = rounds.write_records

    def score(*given):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(rounds, "score_answers", score)
        with pytest.raises(KeyboardInterrupt):
            dpo(**settings)
    path = Path("out/round_1/answers.jsonl")
    head, *lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([head, *lines[:2]]) + lines[2][:30])
    assert len(lines) == 4 and rounds.write_records is original
    capsys.readouterr()
    return settings


def _one_prompt_at_a_time(*given):
    sampler = samples.make_sampler(*given)
    sampler.batches = lambda prompts, count: [[number] for number in range(len(prompts))]
    return sampler


def test_a_half_sampled_round_goes_on_behind_its_answers_to_the_same(
    dpo, half_sampled, whole, monkeypatch
):
    asked, original = [], rounds.make_sampler

    def watched(*given):
        sampler = original(*given)
        draw = sampler.draw
        sampler.draw = lambda prompts, batch, *more: (
            asked.append(batch) or draw(prompts, batch, *more)
        )
        return sampler

    monkeypatch.setattr(rounds, "make_sampler", watched)
    assert dpo(**half_sampled) == 0
    assert asked == [[2], [3], [0], [1], [2], [3]]
    for number in (1, 2):
        assert pairs_of(f"out/round_{number}") == pairs_of(whole.folder / f"round_{number}")
        assert weights_bytes(f"out/round_{number}") == weights_bytes(
            whole.folder / f"round_{number}"
        )


def test_changed_settings_in_the_folder_of_a_half_sampled_round_are_refused(
    dpo, half_sampled, capsys
):
    assert dpo(**half_sampled | {"samples_per_prompt": 5}) == 2
    assert "samples_per_prompt was 8, is 5" in capsys.readouterr().out
    assert dpo(**half_sampled | {"temperature": 0.7}) == 2
    assert "temperature was 1.0, is 0.7" in capsys.readouterr().out


def test_another_model_or_set_in_the_folder_of_a_half_sampled_round_is_refused(
    dpo, half_sampled, capsys, tmp_path, talker
):
    shutil.copytree(talker, tmp_path / "model")
    moved = load_file(tmp_path / "model/model.safetensors")
    name = next(iter(moved))
    moved[name][0] += 0.1
    settings = half_sampled | {"model": str(tmp_path / "model"), "output_dir": "other"}
    shutil.copytree("out", "other")
    for noted in Path("other").rglob("config.yaml"):
        text = noted.read_text().replace(talker, settings["model"])
        noted.write_text(text.replace("out/", "other/"))
    save_file(moved, tmp_path / "model/model.safetensors", {"format": "pt"})
    assert dpo(**settings) == 2
    said = capsys.readouterr().out
    assert "answers.jsonl: model or data changed since this was sampled" in said
    assert "--overwrite" in said
    assert dpo("--overwrite", **settings) == 0


def test_overwrite_begins_anew_with_all_rounds_also_where_it_is_stopped(dpo, settings, monkeypatch):
    assert dpo(**settings) == 0
    write_reward("-len(answer)")
    assert dpo(**settings, output_dir="anew") == 0
    assert pairs_of("anew/round_2") != pairs_of("out/round_2")
    finish = report.finish
    with monkeypatch.context() as patch:
        patch.setattr(
            report, "finish", lambda *_: (_ for _ in ()).throw(FloatingPointError("stop"))
        )
        assert dpo("--overwrite", **settings) == 1
    assert report.finish is finish
    assert dpo(**settings) == 0
    for number in (1, 2):
        folders = [Path(name) / f"round_{number}" for name in ("anew", "out")]
        assert pairs_of(folders[0]) == pairs_of(folders[1])
        assert weights_bytes(folders[0]) == weights_bytes(folders[1])


# Kills


@pytest.fixture(scope="module")
def run(tmp_path_factory, talker):
    """Runs of two rounds, forked by a nursery."""
    runner = Runner(tmp_path_factory.mktemp("kills"))
    write_reward(folder=runner.folder)
    more = SETTINGS | {"model": talker, "reward": f"{runner.folder}/judge.py:judge"}
    more |= {"eval_pairs": 2, "eval_every": 1, "save_every": 1, "epochs": 1, "sample_prompts": 0}
    noted = yaml.safe_load(runner.config.read_text()) | more
    runner.config.write_text(yaml.safe_dump(noted))
    yield runner
    runner.close()


@pytest.fixture(scope="module")
def undisturbed(run):
    work = run.new("undisturbed")
    end = run(work)
    assert end["code"] == 0, end["text"]
    assert end["entries"]["sampling"] == end["entries"]["scoring"] == 2
    (run.folder / "lengths.json").write_text(json.dumps([end["lengths"], end["entries"]]))
    return work


def assert_same(work, undisturbed):
    """Both rounds to the byte, each row once, and nothing left behind."""
    names = lambda folder: sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))
    assert names(work / "run") == names(undisturbed / "run")
    for number in (1, 2):
        mine, its = (folder / f"run/round_{number}" for folder in (work, undisturbed))
        assert read_metrics(mine) == read_metrics(its)
        for path in [*its.glob("model/*"), *its.glob("samples/*"), its / "pairs.jsonl"]:
            if path.name != "README.md":
                assert path.read_bytes() == (mine / path.relative_to(its)).read_bytes(), path
        heads = [read_rows(folder / "answers.jsonl")[0] for folder in (mine, its)]
        assert heads[0] == heads[1]
    for name in ("held_out.jsonl", "report.md"):
        assert (work / "run" / name).read_bytes() == (undisturbed / "run" / name).read_bytes()


def draw_kill(draw, lengths, entries, size):
    """A random moment: at a file operation, within a file, or so long after a phase began."""
    kind = draw.random()
    if kind < 0.4:
        return {"fault": ["kill_at_event", draw.randrange(150)]}
    if kind < 0.6:
        faults = [
            ["kill_within_file", "make_pairs", draw.randint(1, 2), draw.randrange(1500)],
            ["kill_within_file", "write_records", draw.randint(1, 6), draw.randrange(500)],
            ["kill_within_file", "save_checkpoint", draw.randint(1, 4), draw.randrange(3 * size)],
            ["kill_within_file", "save_model", draw.randint(1, 2), draw.randrange(size)],
            ["signal_at", "score_answers", draw.randint(1, 2), signal.SIGKILL],
        ]
        return {"fault": draw.choice(faults)}
    phases = ["sampling", "sampling", "scoring", "training", "evaluation", "preparing", "finishing"]
    phase = draw.choice(phases)
    length = lengths[phase] / entries[phase]
    entry = draw.randint(1, entries[phase])
    return {"signal": [signal.SIGKILL, phase, entry, draw.uniform(0, length)]}


def survive(run, undisturbed, kills, seed):
    """Kill runs until so many kills are done; each that ends must equal the undisturbed one."""
    lengths, entries = json.loads((run.folder / "lengths.json").read_text())
    size = (undisturbed / "run/round_1/model/model.safetensors").stat().st_size
    draw, fell = random.Random(seed), Counter()
    while fell.total() < kills:
        work = run.new("killed")
        for attempt in itertools.count():
            more = fell.total() < kills and attempt < 6
            end = run(work, **(draw_kill(draw, lengths, entries, size) if more else {}))
            if end["code"] == 0:
                break
            assert end["code"] in (-signal.SIGKILL, -signal.SIGXFSZ), end["text"]
            rounds_begun = len(list((work / "run").glob("round_*")))
            fell[f"{end['phase']} {rounds_begun}"] += 1
        assert run(work)["code"] == 0
        assert_same(work, undisturbed)
    print(f"\n{fell.total()} kills survived: {dict(sorted(fell.items()))}")
    return fell


def test_4_sigkills_in_two_rounds_leave_the_same_bytes(run, undisturbed):
    assert survive(run, undisturbed, kills=4, seed=1).total() >= 4


def test_a_kill_while_pairs_are_written_leaves_no_half_of_them(run, undisturbed):
    work = run.new()
    # held-out pairs, the head of the answers and these with rewards are written before
    end = run(work, fault=["kill_within_file", "write_records", 4, 200])
    assert end["code"] == -signal.SIGXFSZ, end["text"]
    assert not (work / "run/round_1/pairs.jsonl").exists()
    assert (work / "run/round_1/pairs.jsonl.tmp").exists()
    assert run(work)["code"] == 0
    assert_same(work, undisturbed)


@pytest.mark.slow
def test_40_sigkills_in_two_rounds_leave_the_same_bytes(run, undisturbed):
    fell = survive(run, undisturbed, kills=40, seed=2)
    for phase in ("sampling 1", "sampling 2", "scoring", "training 1", "training 2"):
        assert any(name.startswith(phase) for name in fell), (phase, fell)


def test_a_signal_while_answers_are_sampled_ends_at_once_and_loses_none(run, undisturbed):
    work = run.new()
    end = run(work, fault=["signal_at", "score_answers", 1, signal.SIGTERM])
    assert end["code"] == 143 and "Interrupted outside training" in end["text"], end["text"]
    assert len(read_rows(work / "run/round_1/answers.jsonl")) == 5
    assert run(work)["code"] == 0
    assert_same(work, undisturbed)
