"""What a run leaves and shows: metrics, report, sampled answers, curves, and a dry run."""

import json
import math
import re
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from data import Pair
from helpers import (
    BETTER,
    CONFIG,
    METRICS,
    WORSE,
    assistant,
    held_out,
    read_metrics,
    record,
    user,
    write_jsonl,
    write_model,
)
from support import dry_run, report
from support.config import Config, read_config
from support.preference import describe_preference
from support.sampler import greedy_answers


def test_a_run_leaves_its_files_and_no_checkpoints(finished):
    names = {path.name for path in finished.folder.iterdir() if not path.name.startswith(".")}
    assert names == {"config.yaml", "metrics.jsonl", "model", "report.md", "curves.png"}
    saved = yaml.safe_load((finished.folder / "config.yaml").read_text())
    (config,), _ = read_config(CONFIG, finished.arguments)
    assert saved == asdict(config) and saved["lr"] == 1e-3
    (again,), _ = read_config(finished.folder / "config.yaml")
    assert again == config


def test_metrics_have_a_row_for_each_step_and_each_evaluation(finished):
    rows = read_metrics(finished.folder, timed=True)
    trained, held_out = ([r for r in rows if r["split"] == split] for split in ("train", "eval"))
    assert [row["step"] for row in trained] == [1, 2, 3, 4, 5, 6]
    assert [row["step"] for row in held_out] == [0, 2, 4, 6]
    for row in trained:
        assert {"step", "split", *METRICS, "grad_norm", "lr", "tokens", "seconds"} <= row.keys()
        assert row["grad_norm"] > 0 and row["tokens"] > 10
    for row in held_out:
        assert {"step", "split", *METRICS, "seconds"} <= row.keys()
        assert {f"{name}/ci95" for name in METRICS} <= row.keys()
    clock = [row["seconds"] for row in rows]
    assert clock == sorted(clock) and clock[0] > 0


def test_metrics_agree_with_each_other(finished):
    rows = read_metrics(finished.folder)
    for row in rows:
        margin = row["rewards/chosen"] - row["rewards/rejected"]
        assert row["rewards/margins"] == pytest.approx(margin, abs=1e-6)
        assert 0 <= row["rewards/accuracies"] <= 1
        assert row["logps/chosen"] < 0 and row["logps/rejected"] < 0
    for first in (rows[0], next(row for row in rows if row["split"] == "train")):
        assert first["loss"] == pytest.approx(math.log(2), abs=1e-7)
        assert first["rewards/accuracies"] == 0.5 and first["rewards/margins"] == 0
    assert rows[0]["loss/ci95"] == 0 and rows[-1]["rewards/margins/ci95"] > 0


def test_the_report_shows_before_and_after_and_what_was_set(finished):
    report = (finished.folder / "report.md").read_text()
    for text in (report, finished.printed):
        assert re.search(r"before.*after", text) and "± " in text
        assert re.search(r"measurable change", text, re.IGNORECASE)
    assert re.search(r"\blr\W+0\.001\b", report) and "![curves](curves.png)" in report
    asked = json.loads(finished.pairs["eval"][0].prompt)[-1]["content"]
    assert f"\n| {asked} | " in report.partition("| prompt | before | trained |")[2]
    assert "license: other" in (finished.folder / "model" / "README.md").read_text()


def test_the_share_of_pairs_that_the_reference_prefers_is_told_by_sum_and_by_average():
    logps = torch.tensor([[-4.0, -6.0], [-8.0, -6.0], [-8.0, -6.0], [-5.0, -5.0]])
    lengths = torch.tensor([[2, 4], [8, 3], [4, 3], [5, 1]])
    reference = {"train": logps, "eval": logps[:0]}
    assert describe_preference(reference, {"train": lengths, "eval": lengths[:0]}) == [
        "the reference's log-probability is higher for the chosen answer: 25.0 % of train pairs",
        "  its average a token is higher: 50.0 % of train pairs",
    ]
    reference["eval"] = logps[:2]
    _, average = describe_preference(reference, {"train": lengths, "eval": lengths[:2]})
    assert average == "  its average a token is higher: 50.0 % of train pairs, 50.0 % of eval pairs"


def test_what_the_reference_prefers_stands_in_the_log_and_the_report(finished):
    told = re.compile(r"the reference's log-probability is higher for the chosen answer: .* eval")
    report = (finished.folder / "report.md").read_text()
    assert told.search(report)[0] == told.search(finished.printed)[0]


def test_sampled_answers_are_the_models_own_greedy_ones(ready, tiny_model):
    setup, config = ready(sample_prompts=2, train_pairs=2)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_model), setup.tokenizer
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    setup.model.generation_config.update(do_sample=True, temperature=9.0, top_k=0)
    answers = greedy_answers(setup, config)
    assert len(setup.answers) == 2 and answers == setup.answers
    for pair, answer in zip(setup.pairs["eval"], setup.answers, strict=False):
        ids = torch.tensor([pair.prompt_ids])
        longest = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=150,
            eos_token_id=end,
            pad_token_id=end,
        )
        own = tokenizer.decode(longest[0, ids.shape[1] :], skip_special_tokens=True)
        assert own.strip().startswith(answer.rstrip("\ufffd")) and answer


def test_the_curves_are_a_picture(finished):
    assert (finished.folder / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_works_without_evaluation_and_without_samples(dpo):
    assert dpo(eval_pairs=0, sample_prompts=0) == 0
    assert read_metrics(split="eval") == [] and len(read_metrics(split="train")) == 3
    assert Path("out/report.md").exists() and Path("out/model/model.safetensors").exists()


def test_a_single_evaluation_pair_has_no_interval_and_stops_nothing(dpo):
    assert dpo(eval_pairs=1, train_pairs=2) == 0
    assert dpo(eval_pairs=1, train_pairs=2, beta=[0.1, 0.2], output_dir="s/{beta}") == 0
    assert read_metrics(split="eval")[-1]["loss"] != pytest.approx(math.log(2), abs=1e-7)


def test_a_dry_run_shows_the_first_pair_and_writes_nothing(tmp_path, dpo, capsys):
    assert dpo("--dry-run", reference_cache="cache") == 0
    shown = capsys.readouterr().out
    assert "<|im_start|>assistant" in shown and "chosen" in shown and "GB" in shown
    assert not list(tmp_path.iterdir())


def pair_of(prompt, chosen, rejected, **more):
    """A pair of made-up token ids of these lengths."""
    messages = json.dumps([user(prompt)])
    return Pair(0, [5], [6] * chosen, [7] * rejected, messages, **more)


def test_a_set_is_described_by_what_its_pairs_have_in_common():
    several = json.dumps([user("Q"), assistant("A"), user("R")])
    pairs = [
        pair_of("Q", 3, 2, shape="prompt, chosen, rejected", unused=("source", "lang")),
        pair_of("Q", 3, 3, shape="prompt, chosen, rejected", unused=("source",), reversed=True),
        pair_of("R", 2, 3, shape="ranking"),
        replace(pair_of("", 1, 3, shape="prompt, chosen, rejected"), prompt=several),
    ]
    assert dry_run.describe(pairs) == [
        "  recognised as: prompt, chosen, rejected (3), ranking (1)",
        "  filled columns not used in the pair: source (2), lang (1)",
        "  prefer the answer of lower score: 1",
        "  prefer the longer answer: 25%",
        "  prompts in more than one pair: 33%",
        "  of several turns, of which only the last answer is scored: 1",
    ]
    assert "several turns" not in str(dry_run.describe(pairs[:3]))
    # a run says what it leaves out too
    lines = report.describe_pairs({"train": pairs}, {"train": {}}, Config())
    assert "  columns that are filled and not used: lang, source" in lines


def test_a_dry_run_shows_each_set_with_a_record_and_its_pair(tmp_path, dpo, capsys):
    first = record("First?", score_chosen=1, score_rejected=2, source="x", empty="")
    one = write_jsonl(tmp_path / "one.jsonl", [first])
    long = record("Second?", chosen=" ".join(["word"] * 400))
    two = write_jsonl(tmp_path / "two.jsonl", [long])
    three = write_jsonl(tmp_path / "three.jsonl", [record("Third?")])
    sets = {"dataset": f"{one}, {two}", "eval_dataset": three, "split": None, "eval_split": None}
    assert dpo("--dry-run", **sets) == 0
    shown = capsys.readouterr().out
    places = [shown.index(f"=== {path}: 1 pairs") for path in (one, two, three)]
    parts = [shown[place : place + 900] for place in places]
    for part, question in zip(parts, ("First?", "Second?", "Third?"), strict=True):
        assert f"  prompt = {question!r}" in part
        assert f"<|im_start|>user\n{question}<|im_end|>" in part
    assert "prefer the answer of lower score: 1" in parts[0]
    assert "  score_rejected = 2" in parts[0]
    assert "filled columns not used in the pair: source (1)\n" in parts[0]
    assert re.search(r"recognised as: \S.* \(1\)\n", parts[0])
    assert "  chosen = 'word word" in parts[1] and re.search(r"\[... \d+ tokens ...\]", parts[1])
    assert max(map(len, shown.splitlines())) < 1000


def test_the_logits_of_separate_sequences_are_in_the_estimate_of_memory(ready):
    setup, config = ready()
    needed = {}
    for shared in (True, False):
        setup.policy.share_prompts(shared)
        needed[shared] = dry_run._memory(setup.policy, 0, 100, config)
    vocabulary = setup.model.config.vocab_size
    assert needed[False] - needed[True] == 100 * vocabulary * dry_run.BYTES_A_LOGIT


def test_a_dry_run_of_a_sweep_shows_equal_data_once_and_other_data_too(dpo, capsys):
    assert dpo("--dry-run", lr=[1e-3, 1e-4], max_length=[40, 200]) == 0
    shown = capsys.readouterr().out
    assert shown.count("Estimate for out_") == 4
    assert shown.count("=== ") == 2 * 2
    assert not Path("runs").exists()


def test_a_dry_run_tells_what_sampled_answers_to_held_out_prompts_cost(dpo, capsys):
    Path("judge.py").write_text("def judge(messages, answer, record):\n    return len(answer)\n")
    given = {"eval_every": 1, "max_new_tokens": 4}
    for changes in ({}, {"reward": "judge.py:judge"}):
        assert dpo("--dry-run", **given, **changes) == 0
        shown = capsys.readouterr().out
        told = "answers to held-out prompts, sampled 4 times in at most"  # 3 steps, and before
        assert (told in shown) == bool(changes)


# What was really used


def test_card_and_report_name_the_stand_ins_that_were_used(
    hub_down, dpo, tiny_model, pairs_file, tmp_path
):
    offline = {"org/model": tiny_model, "org/pairs": pairs_file}
    assert dpo(model="org/model", dataset="org/pairs", offline=offline) == 0
    card = Path("out/model/README.md").read_text()
    used = f"of {Path(tiny_model).name} on pairs.jsonl;"
    for text in (card, Path("out/report.md").read_text()):
        assert used in text and "stand-in for org/model: tiny_llama" in text
        assert "\nmodel: org/model" not in text and "\ndataset: org/pairs" not in text
    _, metadata, _ = card.split("---\n", 2)
    assert yaml.safe_load(metadata) == {"license": "other"}
    for path in (tiny_model, pairs_file, str(tmp_path), "output_dir"):
        assert path not in card


@pytest.mark.parametrize("flags", [[], ["--overwrite"]], ids=str)
def test_a_runs_report_names_no_stand_in_of_the_run_before_it_in_a_sweep(
    hub_down, dpo, tiny_model, tmp_path, flags
):
    other = write_model(tmp_path / "other", seed=1)
    given = {"model": ["org/model", other], "offline": {"org/model": tiny_model}}
    assert dpo(*flags, **given, output_dir="s/run") == 0
    for path in Path("s").glob("*/report.md"):
        is_stood_in = "org-model" in path.parent.name
        assert ("stand-in for org/model" in path.read_text()) == is_stood_in
        noted = path.with_name("config.yaml").read_text().splitlines()[0]
        assert ("org/model" in noted) == is_stood_in


def report_of(evaluations=(), **settings):
    """write_report's card for a run with these settings and made-up figures."""
    (config,), _ = read_config(CONFIG, [f"{k}={json.dumps(v)}" for k, v in settings.items()])
    row = {"step": 1, "split": "train", "seconds": 1.0, "tokens_per_second": 9.0, "lr": 0.0}
    row |= dict.fromkeys([*METRICS, "grad_norm"], 0.5)
    folder = Path(config.output_dir)
    folder.mkdir(parents=True)
    lines = [json.dumps(one) + "\n" for one in (row, *evaluations)]
    (folder / "metrics.jsonl").write_text("".join(lines))
    return report.write_report(folder, config, [], [])[0]


def test_a_run_whose_best_is_the_model_before_training_is_judged_by_its_training():
    settings = {"keep": "best", "output_dir": "out", "lr": 1e-6}
    report_of(held_out(half_width=0.01, **WORSE), **settings)
    text = Path("out/report.md").read_text()
    assert "Saved: the model as it was before training" in text
    assert "Got worse on held-out pairs" in text and "Try a lower lr (now 1e-6)" in text


def test_the_cards_metadata_hold_hub_names_alone(pairs_file):
    card = report_of(dataset=f"{pairs_file}:train, org/a:train, b", model="org/model")
    _, metadata, text = card.split("---\n", 2)
    expected = {"license": "other", "base_model": "org/model", "datasets": ["org/a", "b"]}
    assert yaml.safe_load(metadata) == expected
    assert "on pairs.jsonl:train, org/a:train, b;" in text and str(pairs_file) not in card


def test_the_report_names_the_commits_that_were_read(monkeypatch):
    monkeypatch.setitem(report.revisions_used, "org/model", "0123abc")
    lines = report.describe_pairs({}, {}, Config())
    assert "org/model at commit 0123abc" in lines


def test_curves_show_the_rate_as_it_was_and_evaluations_in_front(figures, tmp_path):
    rows = held_out(**BETTER)
    for row in rows:
        row |= {"rewards/chosen": 0.1, "rewards/rejected": 0.0}
        row |= {"rewards/chosen/ci95": 0.1, "rewards/rejected/ci95": None}
    for step in range(1, 101):
        row = dict.fromkeys([*METRICS, "grad_norm"], math.sin(step))
        rows.append({"step": step, "split": "train", "lr": 1 / step, **row})
    Path("metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    report.draw_curves(tmp_path)
    panels = {axis.get_title(): axis for axis in figures[0].axes}
    (rate,) = panels["lr"].lines
    assert list(rate.get_ydata()) == [1 / step for step in range(1, 101)]
    for name in ("loss", "rewards/margins", "rewards/accuracies"):
        (evaluation,) = panels[name].containers
        behind = [*panels[name].lines, *panels[name].artists]
        behind.remove(evaluation.lines[0])
        smooth = [line for line in behind if "training" in str(line.get_label())]
        assert len(smooth) == 1 and smooth[0].get_alpha() < 1
        noise = [line for line in behind if line.get_marker() == "."]
        assert len(noise) == 1 and noise[0].get_alpha() < smooth[0].get_alpha()
        assert evaluation.lines[0].get_zorder() > smooth[0].get_zorder() > noise[0].get_zorder()
