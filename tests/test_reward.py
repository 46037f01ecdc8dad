"""Rewards of answers: what a function of the user's or a reward model says, and what goes wrong."""

import json
import re
import shutil
from dataclasses import replace
from operator import itemgetter
from pathlib import Path

import numpy
import pytest
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from helpers import PAIRS, SIZES, assistant, build_tokenizer, read_metrics, user, weights_bytes
from support.config import Config
from support.errors import InputError
from support.reward import ORIGINAL, check_reward, reward_version, score_answers
from support.run_log import read_rows
from support.sampler import Sampler, Told

pytestmark = pytest.mark.usefixtures("quick")
FUNCTION = "judge.py:judge"
QUICK = {"max_new_tokens": 12, "eval_samples": 2, "samples_per_prompt": 4}


def write_function(body, before=""):
    """judge.py in the current folder, whose function has this body."""
    Path("judge.py").write_text(f"{before}\ndef judge(messages, answer, record):\n    {body}\n")


def asked(*prompts, record=None):
    """Pairs with these prompts."""
    pairs = []
    for prompt in prompts:
        messages = json.dumps([user(prompt)])
        pairs.append(replace(PAIRS[0], prompt=messages, record=record or {"n": prompt}))
    return pairs


def told(*texts, ended=True):
    return [Told(text, ended, 3) for text in texts]


def rewards_of(answers, pairs=None, reward=FUNCTION, **settings):
    """What score_answers says of answers to a prompt, or to several."""
    if isinstance(answers[0], Told):
        answers = [answers]
    pairs = pairs or asked(*(f"Q {number}" for number in range(len(answers))))
    config = Config(reward=reward, device="cpu", dtype="float32", **settings)
    found = score_answers(config, pairs, answers)
    assert found.dtype == torch.float64 and len(found) == len(answers)
    return found.tolist()


def test_a_function_is_given_the_prompts_messages_the_answer_and_the_record():
    write_function("return len(messages[-1]['content']) + 10 * len(answer) + 1000 * record['k']")
    pairs = asked("ab", "abcd", record={"k": 7})
    assert rewards_of([told("x", "xyz"), told("", "xy")], pairs) == [[7012, 7032], [7004, 7024]]


def test_the_record_of_a_held_out_pair_of_a_round_is_the_original_one():
    write_function("return record['k']")
    own = {"prompt": "p", "chosen": "c", "rejected": "r"}
    assert rewards_of(told("x"), asked("Q", record={**own, ORIGINAL: {"k": 5}})) == [[5]]


def test_a_column_of_the_set_that_is_called_record_is_left_to_it():
    write_function("return record['record']")
    assert rewards_of(told("x"), asked("Q", record={"record": 3})) == [[3]]


VALUES = [
    ("True", 1),
    ("False", 0),
    ("3", 3),
    ("-2.5", -2.5),
    ("numpy.float64(0.1)", 0.1),
    ("numpy.float32(0.5)", 0.5),
    ("numpy.int64(4)", 4),
    ("numpy.bool_(True)", 1),
    ("numpy.array(2.0)", 2),
    ("torch.tensor(1.5)", 1.5),
    ("torch.tensor(True)", 1),
    ("torch.tensor(1.5, dtype=torch.bfloat16)", 1.5),
    ("fractions.Fraction(1, 4)", 0.25),
    ("1 + 1e-9", 1 + 1e-9),  # not a number of float32
]


@pytest.mark.parametrize("value, expected", VALUES)
def test_any_finite_number_is_a_reward_and_none_is_rounded(value, expected):
    write_function(f"return {value}", before="import fractions, numpy, torch")
    assert rewards_of(told("x")) == [[expected]]


WRONG = [
    "float('nan')",
    "float('inf')",
    "-numpy.inf",
    "None",
    "'1.0'",
    "numpy.str_('1')",
    "[1.0]",
    "torch.ones(2)",
    "1j",
    "numpy.complex64(1)",
    "10**400",
]


@pytest.mark.parametrize("value", WRONG)
def test_what_is_no_finite_number_is_refused_with_prompt_and_answer(value):
    write_function(f"return {value}", before="import numpy, torch")
    with pytest.raises(InputError) as error:
        rewards_of(told("so it is"), asked("what is it?"))
    message = str(error.value)
    assert len(message.splitlines()) == 1 and "finite number" in message
    assert "judge.py:judge" in message and "'what is it?'" in message and "'so it is'" in message


@pytest.mark.parametrize("fault", ["1 / 0", "sys.exit(3)", "undefined"])
def test_a_function_that_fails_is_named_with_prompt_and_answer_in_one_line(fault):
    write_function(f"return {fault}", before="import sys")
    with pytest.raises(InputError) as error:
        rewards_of(told("so it is"), asked("what is it?"))
    message = str(error.value)
    assert len(message.splitlines()) == 1 and re.search(
        r"judge.py:judge fails in line \d: ", message
    )
    assert "'what is it?'" in message and "'so it is'" in message


MISSING = {
    "there is no file judge.py": None,
    "judge.py has no function judge": "judge = 3",
    "judge.py fails: ModuleNotFoundError: No module named 'nowhere'": "import nowhere",
    "judge.py fails: SyntaxError": "def judge(:",
    "judge.py fails: SystemExit": "raise SystemExit",
}


@pytest.mark.parametrize("message, text", MISSING.items())
def test_a_function_that_is_not_there_ends_a_run_before_anything_is_computed(
    dpo, message, text, capsys
):
    if text is not None:
        Path("judge.py").write_text(text)
    for settings in ({"rounds": 1}, {}):
        assert dpo(reward=FUNCTION, **settings, model="no/where", offline={}) == 2
        out = capsys.readouterr().out
        assert out.startswith("Error: reward judge.py:judge: ") and message in out, out
        assert len(out.splitlines()) == 1 and not Path("out/round_1/answers.jsonl").exists()


def test_a_file_may_hold_a_dataclass_and_read_its_annotations_late():
    write_function(
        "return Score(len(answer)).value",
        before="from __future__ import annotations\nfrom dataclasses import dataclass\n"
        "@dataclass\nclass Score:\n    value: int",
    )
    check_reward(Config(reward=FUNCTION))
    assert rewards_of(told("abc")) == [[3]]


def test_a_function_that_changes_what_it_is_given_changes_no_other_reward():
    write_function(
        "messages.append(answer); record['n'] += 'x'; return len(messages) + len(answer)"
    )
    pairs = asked("Q")
    assert rewards_of(told("a", "bcd", "ef"), pairs) == [[3, 5, 4]]
    assert pairs[0].record == {"n": "Q"}


def test_a_verifier_that_returns_0_somewhere_is_one_still():
    write_function("return len(answer) and 'good' in answer")
    answers = [*told("good", ""), *told("good", "bad", ended=False)]
    assert rewards_of(answers) == [[1, 0, 0, 0]]


def test_an_answer_that_did_not_end_fails_for_a_verifier():
    write_function("return 'good' in answer")
    answers = [*told("good", "bad"), *told("good", "bad", ended=False)]
    assert rewards_of(answers) == [[1, 0, 0, 0]]


@pytest.mark.parametrize("kind", ["bool", "numpy.bool_", "torch.tensor"])
def test_true_and_false_of_any_library_are_those_of_a_verifier(kind):
    write_function(f"return {kind}('good' in answer)", before="import numpy, torch")
    assert rewards_of([*told("good", "bad"), *told("good", ended=False)]) == [[1, 0, 0]]


@pytest.mark.parametrize("kind", ["int", "float", "numpy.int64"])
def test_an_answer_that_did_not_end_keeps_a_reward_that_is_a_number_if_it_is_1_or_0(kind):
    write_function(f"return {kind}(len(answer) > 1)", before="import numpy")
    answers = [*told("", "ab"), *told("", "ab", ended=False)]
    assert rewards_of(answers) == [[0, 1, 0, 1]]


# Reward models


def write_reward_model(
    folder, family="llama", template=True, pads=(2, "<pad>"), side="right", **given
):
    """A folder with a tiny random reward model; returns its path as text."""
    tokenizer = build_tokenizer(pad=pads[1])
    sizes = SIZES | {"vocab_size": len(tokenizer), "num_labels": 1, "pad_token_id": pads[0]}
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **sizes | given)
    model = AutoModelForSequenceClassification.from_config(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.3 * torch.randn(weight.shape))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    path = Path(folder) / "tokenizer_config.json"
    settings = json.loads(path.read_text()) | {"padding_side": side}
    path.write_text(json.dumps(settings))
    if not template:
        (Path(folder) / "chat_template.jinja").unlink()
    return str(folder)


PROMPTS = ["a", "the question?", "light " * 20]
ANSWERS = [told("x", "green stone", "light " * 30), told("", "q", "river"), told("a", "b c d", "e")]


def one_by_one(folder, template):
    """Rewards by a plain forward pass of each text alone."""
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rewards = []
    for prompt, answers in zip(PROMPTS, ANSWERS, strict=True):
        for answer in answers:
            if template:
                turns = [user(prompt), assistant(answer.text)]
                text = tokenizer.apply_chat_template(turns, tokenize=False)
                inputs = tokenizer(text, add_special_tokens=False, return_tensors="pt")
            else:
                inputs = tokenizer(prompt, answer.text, return_tensors="pt")
            with torch.no_grad():
                rewards.append(model(**inputs).logits.item())
    return torch.tensor(rewards, dtype=torch.float64).view(len(PROMPTS), -1)


MODELS = {
    "llama": ("llama", {}),
    "gpt2": ("gpt2", {}),
    "padded on the left": ("gpt2", {"side": "left"}),
    "padding that is the end": ("llama", {"pads": (4, "<|im_end|>")}),
    "another padding in model and tokenizer": ("llama", {"pads": (0, "<pad>")}),
    "no padding in the model": ("llama", {"pads": (None, "<|im_end|>")}),
    "no padding in the tokenizer": ("llama", {"pads": (2, None)}),
    "no padding at all": ("llama", {"pads": (None, None)}),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_reward_model_reads_a_conversation_as_alone_whatever_its_batch(name, tmp_path):
    family, given = MODELS[name]
    folder = write_reward_model(tmp_path / "rm", family, **given)
    found = rewards_of(ANSWERS, asked(*PROMPTS), reward=folder)
    expected = one_by_one(folder, template=True)
    assert expected.std() > 0.1
    assert torch.tensor(found) == pytest.approx(expected, abs=1e-5)


def test_a_reward_model_without_a_template_reads_prompt_and_answer_as_a_pair(tmp_path):
    folder = write_reward_model(tmp_path / "rm", "bert", template=False, pads=(2, "<pad>"))
    found = rewards_of(ANSWERS, asked(*PROMPTS), reward=folder)
    expected = one_by_one(folder, template=False)
    assert expected.std() > 0.01
    assert torch.tensor(found) == pytest.approx(expected, abs=1e-5)


def test_a_template_that_refuses_a_conversation_is_named_with_the_prompt(tmp_path):
    folder = write_reward_model(tmp_path / "rm")
    template = Path(folder) / "chat_template.jinja"
    template.write_text("{{ raise_exception('Only questions!') }}")
    with pytest.raises(InputError, match="refuses a conversation: .*Only questions!.*prompt 'a'"):
        rewards_of(ANSWERS, asked(*PROMPTS), reward=folder)


def test_conversations_that_a_reward_model_reads_no_further_are_counted(tmp_path, capsys):
    folder = write_reward_model(tmp_path / "rm")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.model_max_length = 25
    tokenizer.save_pretrained(folder)
    rewards_of(ANSWERS, asked(*PROMPTS), reward=folder)
    assert f"of 9 conversations were cut to the 25 tokens that {folder}" in capsys.readouterr().out


def test_a_reward_that_is_not_finite_is_told_with_the_prompt(tmp_path):
    folder = write_reward_model(tmp_path / "rm")
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    with torch.no_grad():
        model.score.weight.fill_(torch.nan)
    model.save_pretrained(folder)
    with pytest.raises(InputError, match="nan for the prompt 'a'"):
        rewards_of([told("x")], asked("a"), reward=folder)


def test_a_function_has_another_version_where_a_file_that_it_imports_has():
    write_function("return checks.passes(answer)", before="import json, checks\nfrom more import x")
    versions = []
    for passes in ("len", "len", "str"):
        Path("checks.py").write_text(f"import judge\npasses = {passes}\n")
        versions.append(reward_version(Config(reward=FUNCTION)))
    assert versions[0] == versions[1] != versions[2]


def test_a_reward_model_that_is_replaced_has_another_version(tmp_path):
    folder = write_reward_model(tmp_path / "rm")
    shutil.copytree(folder, tmp_path / "same")
    versions = []
    for name in (folder, str(tmp_path / "same")):
        versions.append(reward_version(Config(reward=name)))
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    with torch.no_grad():
        model.score.weight.neg_()
    model.save_pretrained(folder)
    versions.append(reward_version(Config(reward=folder)))
    assert versions[0] == versions[1] != versions[2]


def test_a_model_of_several_labels_is_refused_before_anything_is_sampled(dpo, tmp_path, capsys):
    folder = write_reward_model(tmp_path / "rm", num_labels=3)
    assert dpo(reward=folder, rounds=1) == 2
    said = f"Error: reward {folder}: it tells 3 numbers of a text"
    out = capsys.readouterr().out
    assert said in out and "sampling" not in out


def test_a_model_without_the_weights_of_a_head_is_refused_by_their_name(tiny_model):
    config = json.loads((Path(tiny_model) / "config.json").read_text())
    folder = Path("headless")
    folder.mkdir()
    for path in Path(tiny_model).iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "config.json").write_text(json.dumps(config | {"id2label": {"0": "reward"}}))
    with pytest.raises(InputError, match=r"headless: its files hold no weights for score\.weight"):
        rewards_of(told("x"), reward="headless")


def test_a_file_without_its_functions_name_is_refused_with_what_to_type(dpo, capsys):
    write_function("return 1")
    assert dpo(reward="judge.py") == 2
    said = "Error: reward judge.py: name the function in it too: judge.py:FUNCTION"
    assert said in capsys.readouterr().out


def test_a_function_that_cannot_be_called_so_is_told_without_a_line_of_this_project():
    Path("judge.py").write_text("def judge(answer):\n    return 1\n")
    with pytest.raises(InputError, match=r"judge.py:judge fails: TypeError: judge\(\) takes 1"):
        rewards_of(told("x"))


def test_a_function_that_fails_on_sampled_answers_does_so_after_the_first_batch(
    dpo, talker, monkeypatch, capsys
):
    drawn = []
    original = Sampler.draw
    monkeypatch.setattr(Sampler, "batches", lambda *given: [[number] for number in range(4)])
    monkeypatch.setattr(Sampler, "draw", lambda *given: drawn.append(0) or original(*given))
    write_function("asked.append(answer)\n    return 1 / (len(asked) - 3)", before="asked = [None]")
    settings = QUICK | {"model": talker, "rounds": 1, "eval_pairs": 0, "train_pairs": 4}
    assert dpo(reward=FUNCTION, **settings) == 2
    assert "ZeroDivisionError" in capsys.readouterr().out
    assert len(drawn) <= 1 and len(read_rows(Path("out/round_1/answers.jsonl"))) == 2


@pytest.mark.parametrize("name", ["no/where"])
def test_a_reward_model_that_is_not_there_ends_a_run_before_anything_is_sampled(
    dpo, name, capsys, hub_down
):
    assert dpo(reward=name, rounds=1, offline={}) == 2
    out = capsys.readouterr().out
    assert f"Error: reward: model {name} is neither" in out and "sampling" not in out, out


@pytest.mark.parametrize("settings", [{"rounds": 1, "eval_pairs": 0}, {"rounds": 1}, {}])
def test_a_function_that_cannot_read_the_records_fails_before_anything_is_sampled(
    dpo, talker, monkeypatch, capsys, settings
):
    monkeypatch.setattr(Sampler, "draw", None)
    write_function("return record['check']")
    assert dpo(reward=FUNCTION, model=talker, **QUICK, **settings) == 2
    last = capsys.readouterr().out.splitlines()[-1]
    said = rf"Error: reward {FUNCTION} fails in line \d: KeyError: 'check', for the prompt"
    assert re.match(said, last)
    assert not list(Path().glob("out/**/answers.jsonl"))


# A reward that fails in the middle of a run


def test_a_reward_that_fails_in_a_round_loses_no_answer_and_the_mended_one_goes_on(
    dpo, talker, capsys, monkeypatch
):
    settings = QUICK | {"model": talker, "rounds": 1, "eval_pairs": 0}
    write_function("return len(answer)")
    assert dpo(reward=FUNCTION, output_dir="whole", **settings) == 0
    write_function("asked.append(answer)\n    return 1 / (4 - len(asked))", before="asked = []")
    capsys.readouterr()
    assert dpo(reward=FUNCTION, **settings) == 2
    last = capsys.readouterr().out.splitlines()[-1]
    assert re.match(rf"Error: reward {FUNCTION} fails in line \d: ZeroDivisionError.* prompt", last)
    head, *answers = read_rows(Path("out/round_1/answers.jsonl"))
    write_function("return len(answer)")
    monkeypatch.setattr(Sampler, "draw", None)
    assert dpo(reward=FUNCTION, **settings) == 0
    scored = read_rows(Path("out/round_1/answers.jsonl"))
    assert scored == read_rows(Path("whole/round_1/answers.jsonl"))
    for row in scored[1:]:
        for answer in row["answers"]:
            assert answer.pop("reward") == len(answer["text"])
    assert [head, *sorted(answers, key=itemgetter("prompt"))] == scored
    assert weights_bytes("out/round_1") == weights_bytes("whole/round_1")


def test_a_reward_that_fails_in_an_evaluation_loses_no_step_and_the_mended_one_goes_on(
    dpo, talker, capsys
):
    settings = QUICK | {"model": talker, "eval_every": 2, "epochs": 2}
    write_function("return len(answer)")
    assert dpo(reward=FUNCTION, output_dir="whole", **settings) == 0
    write_function(
        "return len(answer) if not list(Path('out').glob('checkpoints/step*')) else None",
        before="from pathlib import Path",
    )
    capsys.readouterr()
    assert dpo(reward=FUNCTION, **settings) == 2
    out = capsys.readouterr().out
    assert f"Error: reward {FUNCTION} is to return a finite number, not None" in out
    assert [path.name for path in Path("out/checkpoints").iterdir()] == ["step_0000002.safetensors"]
    write_function("return len(answer)")
    assert dpo(reward=FUNCTION, **settings) == 0
    assert "Resuming from" in capsys.readouterr().out
    found, expected = read_metrics("out"), read_metrics("whole")
    for row in expected:
        if row["split"] == "eval" and row["step"] > 0:  # the mended function may be another reward
            row["samples/reward/change_ci95"] = None
    assert found == expected
    assert weights_bytes("out") == weights_bytes("whole")


def test_rewards_of_a_model_reach_the_figures_of_a_run(dpo, talker, tmp_path):
    folder = write_reward_model(tmp_path / "rm")
    assert dpo(model=talker, reward=folder, **QUICK) == 0
    row = read_metrics("out", "eval")[-1]
    lines = Path("out/samples/step_0000003.jsonl").read_text().splitlines()
    rewards = [json.loads(line)["reward"] for line in lines]
    assert len(set(rewards)) > 3
    assert row["samples/reward"] == pytest.approx(numpy.mean(rewards))
