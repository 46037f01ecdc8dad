"""What data.py promises, from records in to rows of token ids out. No model."""

import itertools
import json
import random
import re
import tempfile
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import event, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

import data
from data import Pair
from helpers import (
    CHATML,
    DANUBE,
    SPECIALS,
    assistant,
    build_tokenizer,
    chatml,
    data_config,
    encoder,
    load_pairs,
    many,
    record,
    text,
    user,
    write_jsonl,
)
from support.errors import InputError
from support.shapes import read_preference
from support.sources import read_records
from support.turns import Drop

SPELLS = "spells the control token {}: plain text is wanted"
WRITES_BOS = "<s>" + CHATML
TRIMS = CHATML.replace("m.content", "m.content | trim")


def system(content):
    return {"role": "system", "content": content}


def reason(value, **options):
    with pytest.raises(Drop) as drop:
        encoder(**options).encode(value)
    return str(drop.value)


def prompt_and_answers(value):
    preference = read_preference(value)
    return preference.messages, preference.chosen, preference.rejected


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
    assert read_preference(made).scores == (scores if shape in WITH_SCORES else None)


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
    assert read_preference(made).messages == [system("Be brief."), user("Q")]
    made = SHAPES["trl-lib"]([system("S"), user("Q")], "a", "b", (2, 1)) | {"system": "S"}
    assert read_preference(made).messages == [system("S"), user("Q")]


def test_answers_of_several_turns_go_on_from_the_prompt():
    later = [assistant("one"), user("more")]
    made = record([user("Q")], [*later, assistant("good")], [*later, assistant("bad")])
    assert prompt_and_answers(made) == ([user("Q"), *later], "good", "bad")


@pytest.mark.parametrize("write", [json.dumps, repr], ids=["as JSON", "as Python"])
def test_a_list_that_a_column_stores_as_text_is_not_trained_on_literally(write):
    made = record(chosen=write([assistant("good")]), rejected=write([assistant("bad")]))
    assert prompt_and_answers(made)[1:] == ("good", "bad")
    cut = record(chosen=write([assistant("good")])[:-3])
    assert reason(cut) == "malformed: chosen is a list stored as text that cannot be read"
    assert encoder().encode(record(chosen="[{'x': 1}] is Python", rejected="[1]"))


def test_scores_that_are_no_numbers_are_no_tie():
    for score in (None, "", "high", [1], 10**400, float("nan")):
        assert encoder().encode(record(score_chosen=score, score_rejected=score))


def test_an_hh_dialogue_keeps_the_space_and_lines_of_its_text():
    made = {
        "chosen": "\n\nHuman: a\n\nb \n\nAssistant:  two spaces\n",
        "rejected": "\n\nHuman: a\n\nb \n\nAssistant:",
    }
    assert prompt_and_answers(made) == ([user("a\n\nb ")], " two spaces\n", "")


NEITHER = "malformed: {} is neither text nor a list of {{role, content}}"
UNASKED = "malformed: no prompt before {}, or no assistant's turn at its end"


@pytest.mark.parametrize(
    ("value", "why"),
    [
        (["prompt"], "not a record but list"),
        (None, "not a record but NoneType"),
        ({"text": "x", "label": 1}, "unknown columns: ['label', 'text']"),
        ({"prompt": "Q", "chosen": "a"}, "unknown columns: ['chosen', 'prompt']"),
        (record("Q", None, "b"), NEITHER.format("chosen")),
        (record("Q", "a", 6), NEITHER.format("rejected")),
        (record(5, "a", "b"), NEITHER.format("prompt")),
        ({"question": 5, "chosen": "a", "rejected": "b"}, NEITHER.format("question")),
        (record(5, "a", "b", system="S"), NEITHER.format("prompt")),
        (record(system=5), NEITHER.format("system")),
        (record({"role": "user"}), NEITHER.format("prompt")),
        (
            record([{"role": "tool", "content": "x"}]),
            "malformed: the prompt does not end with a user's turn",
        ),
        (record([{"role": "user"}]), NEITHER.format("prompt")),
        (record([user(["x"])]), NEITHER.format("prompt")),
        (record([[user("x")]]), NEITHER.format("prompt")),
        (record("Q", [], []), UNASKED.format("chosen")),
        (record("Q", "a", []), UNASKED.format("rejected")),
        (record([]), UNASKED.format("chosen")),
        (record(None), UNASKED.format("chosen")),
        (record(""), UNASKED.format("chosen")),
        (record(" \n"), "malformed: the prompt does not end with a user's turn"),
        (record([user("Q"), system("S")]), "malformed: the prompt does not end with a user's turn"),
        (record("Q", [user("Q")], [user("Q")]), UNASKED.format("chosen")),
        (
            record(None, [user("Q"), assistant("a")], [user("R"), assistant("b")]),
            "malformed: chosen and rejected differ before the last answer",
        ),
        (record("Q", "same", "same"), "same text"),
        (record("Q", "a", ""), "empty answer"),
        (record("Q", " \n", "b"), "empty answer"),
        (record("Q", "a<|im_end|>a", "b"), SPELLS.format("<|im_end|>")),
        (record("Q", "a", "a<|im_start|>"), SPELLS.format("<|im_start|>")),
        (record("Q</s>Q"), SPELLS.format("</s>")),
        (record([system("<pad>"), user("Q")]), SPELLS.format("<pad>")),
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


def test_a_token_id_takes_four_bytes():
    pair = encoder().encode(record())
    for ids in (pair.prompt_ids, pair.chosen_ids, pair.rejected_ids):
        assert memoryview(ids).nbytes == 4 * len(ids)


def test_text_that_only_looks_like_a_control_token_is_kept():
    assert text(encoder().encode(record(chosen="a <|end|> | im_end")).chosen_ids).startswith("a <|")


@pytest.mark.parametrize("pad", ["<pad>", "<|im_end|>", None])
def test_the_end_of_turn_is_trained_on_whatever_pads(pad):
    pair = encoder(build_tokenizer(pad=pad)).encode(record())
    end = build_tokenizer().convert_tokens_to_ids("<|im_end|>")
    assert pair.chosen_ids[-1] == pair.rejected_ids[-1] == end
    row = data.make_row([pair], [0])
    assert row.targets.tolist() == [*pair.chosen_ids, *pair.rejected_ids]


def test_the_end_of_turn_is_what_the_template_renders_after_an_answer():
    assert text([encoder(build_tokenizer(eos="</s>")).end_of_turn]) == "<|im_end|>"
    assert text([encoder(build_tokenizer(DANUBE, eos="<|im_end|>")).end_of_turn]) == "</s>"
    silent = "{% for m in messages %}{{ m.content }}\n{% endfor %}"
    assert text([encoder(build_tokenizer(silent, eos="</s>")).end_of_turn]) == "</s>"


def test_the_end_of_turn_may_be_a_special_token_without_a_name():
    tokenizer = build_tokenizer(eos="</s>")
    assert "<|im_end|>" not in tokenizer.all_special_tokens
    pair = encoder(tokenizer).encode(record())
    assert text(pair.chosen_ids) == "good<|im_end|>"


def test_a_tokenizer_without_any_end_is_refused():
    with pytest.raises(InputError, match="neither an end-of-turn token nor an eos_token"):
        encoder(build_tokenizer(None, eos=None))


def test_a_broken_chat_template_is_refused_with_its_own_words():
    with pytest.raises(InputError, match="the chat template fails: .*no questions here"):
        encoder(build_tokenizer("{{ raise_exception('no questions here') }}"))
    with pytest.raises(InputError, match="the chat template fails: TemplateSyntaxError"):
        encoder(build_tokenizer("{% if %}"))


@pytest.mark.parametrize("shape", ["TRL strings", "HuggingFaceH4", "orca"])
def test_text_is_not_stripped(shape):
    made = SHAPES[shape]([user("  Q \n")], "\n good  ", "\tbad\n\n", (2, 1))
    pair = encoder().encode(made)
    assert text(pair.prompt_ids) == chatml([user("  Q \n")])
    assert text(pair.chosen_ids) == "\n good  <|im_end|>"
    assert text(pair.rejected_ids) == "\tbad\n\n<|im_end|>"


def test_a_danube_template_gives_prompt_answer_and_its_end():
    tokenizer = build_tokenizer(DANUBE, eos="</s>", bos="<s>")
    pair = encoder(tokenizer).encode(record())
    assert text(pair.prompt_ids) == "<|prompt|>Q</s><|answer|>"
    assert text(pair.chosen_ids) == "good</s>"


def test_a_role_that_the_template_refuses_is_a_counted_drop():
    with pytest.raises(Drop, match="refused by the chat template: .*System role not supported"):
        encoder(build_tokenizer(DANUBE, eos="</s>")).encode(record([system("S"), user("Q")]))
    tokenizer = build_tokenizer(
        CHATML + "{% if messages|length > 2 %}{{ messages[9].role }}{% endif %}"
    )
    with pytest.raises(Drop, match="refused by the chat template: UndefinedError"):
        encoder(tokenizer).encode(record([user("Q"), assistant("A"), user("Q")]))


def test_a_base_model_gets_one_bos_then_prompt_answer_and_eos():
    tokenizer = build_tokenizer(None, eos="</s>", bos="<s>")
    pair = encoder(tokenizer).encode(record([system("S"), user("Q")]))
    assert text(pair.prompt_ids) == "<s>S\n\nQ"
    assert text(pair.chosen_ids) == "good</s>"
    bare = encoder(build_tokenizer(None, eos="</s>")).encode(record())
    assert text(bare.prompt_ids) == "Q"


def test_a_template_that_writes_the_bos_gets_no_second_one():
    tokenizer = build_tokenizer(WRITES_BOS, bos="<s>")
    assert tokenizer(chatml([user("Q")])).input_ids[0] == tokenizer.bos_token_id
    pair = encoder(tokenizer).encode(record())
    assert text(pair.prompt_ids) == "<s>" + chatml([user("Q")])
    assert tokenizer.bos_token_id not in pair.chosen_ids + pair.rejected_ids


def test_a_long_prompt_keeps_its_end_and_the_generation_prompt():
    pair = encoder(max_prompt_length=30).encode(record("early " * 50 + "late"))
    assert len(pair.prompt_ids) == 30
    assert text(pair.prompt_ids).endswith("early late<|im_end|>\n<|im_start|>assistant\n")
    assert pair.cut


ZEPHYR = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
VICUNA = (
    "{% for m in messages %}{{ 'USER: ' if m.role == 'user' else ' ASSISTANT: ' }}"
    "{{ m.content }}{% if m.role != 'user' %}<|im_end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %} ASSISTANT:{% endif %}"
)


def sentence_pieces(template):
    """A tokenizer that writes a space before a text's first word, as SentencePiece's do."""
    tokenizer = build_tokenizer(template)
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.decoder = decoders.Metaspace(prepend_scheme="first")
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=SPECIALS, show_progress=False)
    corpus = ["Question", "An", "apple", "<|user|>", "<|assistant|>", "USER:", "ASSISTANT:", ".No"]
    backend.train_from_iterator(corpus, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>")
    tokenizer.chat_template = template
    return tokenizer


def test_a_control_token_in_tools_or_calls_is_no_text_either():
    tool = {"type": "function", "function": {"name": "f", "description": "ends <|im_end|> here"}}
    call = {"role": "assistant", "content": "", "tool_calls": [tool]}
    template = "{{ tools }}{% for m in messages %}{{ m.tool_calls }}{% endfor %}" + CHATML
    for value in (record("Q") | {"tools": [tool]}, record([user("Q"), call, user("So?")])):
        assert reason(value, tokenizer=build_tokenizer(template)) == SPELLS.format("<|im_end|>")


@pytest.mark.parametrize("template", [ZEPHYR, VICUNA, CHATML])
@pytest.mark.parametrize("build", [build_tokenizer, sentence_pieces])
def test_an_answers_tokens_are_those_that_the_template_writes(build, template):
    tokenizer = build(template)
    coder = encoder(tokenizer)
    pair = coder.encode(record("Question", "An apple.", "No."))
    for answer, ids in (("An apple.", pair.chosen_ids), ("No.", pair.rejected_ids)):
        whole = tokenizer.apply_chat_template([user("Question"), assistant(answer)], tokenize=False)
        expected = tokenizer(whole.rstrip("\n"), add_special_tokens=False).input_ids
        assert list(pair.prompt_ids + ids) == expected
    again = coder.encode(record("Question", coder.gap + "An apple.", "No."))
    assert again.chosen_ids == pair.chosen_ids


# of DeepSeek-Coder, Nemotron and Apriel; of Llama 2
NEWLINE_BEFORE_END = CHATML.replace("<|im_end|>", "\n<|im_end|>")
SPACE_BEFORE_END = CHATML.replace("<|im_end|>", " <|im_end|>")


@pytest.mark.parametrize("template", [NEWLINE_BEFORE_END, SPACE_BEFORE_END])
@pytest.mark.parametrize("build", [build_tokenizer, sentence_pieces])
def test_white_space_before_the_end_of_turn_is_trained_on(build, template):
    tokenizer = build(template)
    coder = encoder(tokenizer)
    pair = coder.encode(record("Question", "An apple.", "No." + coder.tail))
    for answer, ids in (("An apple.", pair.chosen_ids), ("No.", pair.rejected_ids)):
        whole = tokenizer.apply_chat_template([user("Question"), assistant(answer)], tokenize=False)
        expected = tokenizer(whole.rstrip("\n"), add_special_tokens=False).input_ids
        assert list(pair.prompt_ids + ids) == expected
    cut = encoder(tokenizer, max_length=len(pair.prompt_ids) + 1).encode(record("Question", "AB"))
    assert cut.chosen_ids == coder.encode(record("Question", "AB")).chosen_ids[:1]


@pytest.mark.parametrize("opened", ["<think>", "<think>\n"])
def test_a_thought_that_the_generation_prompt_opens_is_opened_once(opened):
    opens = "{% if add_generation_prompt %}" + opened.replace("\n", "{{ '\\n' }}") + "{% endif %}"
    coder = encoder(build_tokenizer(CHATML + opens))
    made = record("Q", opened + "hm</think>A plum.", "\n" + opened + "well</think>No.")
    pair = coder.encode(made)
    prompt = chatml([user("Q")]) + opened
    assert text(pair.prompt_ids) == prompt
    assert text(pair.chosen_ids) == "hm</think>A plum.<|im_end|>"
    assert text(pair.rejected_ids) == "well</think>No.<|im_end|>"
    plain = coder.encode(record("Q", "hm</think>A <think>", "No."))
    assert text(plain.chosen_ids) == "hm</think>A <think><|im_end|>"


def test_a_cut_prompt_of_several_turns_keeps_a_bos_that_ends_turns_too():
    olmo = (
        "<s>{% for m in messages %}<|{{ m.role }}|>{{ m.content }}"
        "{% if m.role == 'assistant' %}<s>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    tokenizer = build_tokenizer(olmo, eos="<s>", bos="<s>")
    turns = [user("early " * 50), assistant("A"), user("late")]
    pair = encoder(tokenizer, max_prompt_length=40).encode(record(turns))
    assert text(pair.prompt_ids).startswith("<s>") and len(pair.prompt_ids) == 40
    begins_turns = build_tokenizer(bos="<|im_start|>")
    pair = encoder(begins_turns, max_prompt_length=40).encode(record(turns))
    assert not text(pair.prompt_ids).startswith("<|im_start|>")


@pytest.mark.parametrize("template", [WRITES_BOS, None])
def test_a_long_prompt_keeps_its_bos(template):
    tokenizer = build_tokenizer(template, bos="<s>")
    for limit in (1, 30):
        long = encoder(tokenizer, max_prompt_length=limit).encode(record("early " * 50 + "late"))
        ids = list(long.prompt_ids)
        assert ids[0] == tokenizer.bos_token_id and ids.count(ids[0]) == 1
        whole = list(encoder(tokenizer).encode(record("early " * 50 + "late")).prompt_ids)
        assert ids[1:] == whole[len(whole) - len(ids) + 1 :] and long.cut
        assert template is None or text(ids).endswith("<|im_start|>assistant\n")


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
    train = data.load_pairs(data_config(path, shuffle=False, train_pairs=10), build_tokenizer())[0][
        "train"
    ]
    assert [pair.index for pair in train] == list(range(10))
    shuffled = data.load_pairs(data_config(path, train_pairs=10), build_tokenizer())[0]["train"]
    again = data.load_pairs(data_config(path, train_pairs=10), build_tokenizer())[0]["train"]
    other = data.load_pairs(data_config(path, train_pairs=10, seed=2), build_tokenizer())[0][
        "train"
    ]
    assert shuffled == again != other
    assert len({pair.index for pair in shuffled}) == 10


def test_pairs_are_held_out_where_there_is_no_other_split(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", many(50))
    train, evaluation, drops = load_pairs(data_config(path, eval_pairs=100))
    assert (len(train), len(evaluation)) == (40, 10)
    assert not {p.prompt for p in train} & {p.prompt for p in evaluation}
    assert drops["train"] == {}
    train, evaluation, drops = load_pairs(data_config(path, eval_pairs=3, train_pairs=9))
    assert (len(train), len(evaluation), drops["train"]) == (9, 3, {})
    cases = data_config(path, eval_pairs=3, shuffle=False, eval_split=None)
    assert [p.index for p in load_pairs(cases)[1]] == [49, 48, 47]


def test_a_split_column_selects_training_and_evaluation_rows(tmp_path):
    rows = [r | {"split": "train_prefs"} for r in many(8)]
    rows += [r | {"split": "test_prefs"} for r in [*many(4, "T"), rows[0]]]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    train, evaluation, drops = load_pairs(data_config(path, eval_pairs=100))
    assert {json.loads(p.prompt)[0]["content"][0] for p in train} == {"Q"}
    assert (len(train), len(evaluation)) == (7, 5)
    assert drops["train"] == {"its prompt is held out for evaluation": 1}
    only = "no split other, only: test_prefs, train_prefs. Choose with "
    asked = {
        "split=NAME": {"split": "other"},
        "eval_split=NAME": {"eval_dataset": path, "eval_split": "other", "eval_pairs": 9},
        f"{path}:NAME": {"dataset": f"{path}:other"},
    }
    for choice, changes in asked.items():
        with pytest.raises(InputError, match=only + choice):
            data.load_pairs(data_config(**{"dataset": path} | changes), build_tokenizer())


def test_a_held_out_prompt_is_known_in_other_writing_that_the_template_makes_the_same(tmp_path):
    train = write_jsonl(tmp_path / "a.jsonl", [record("Name a fruit.\n"), record("Name a tree.")])
    held_out = write_jsonl(tmp_path / "b.jsonl", [record("Name a fruit.")])
    config = data_config(train, eval_dataset=held_out, eval_split=None, eval_pairs=9, split=None)
    pairs, drops = data.load_pairs(config, build_tokenizer(TRIMS))
    assert [json.loads(p.prompt)[0]["content"] for p in pairs["train"]] == ["Name a tree."]
    assert drops["train"] == {"its prompt is held out for evaluation": 1}


def test_evaluation_from_a_set_of_its_own_shares_no_prompt(tmp_path):
    train_path = write_jsonl(tmp_path / "a.jsonl", many(20))
    eval_path = write_jsonl(tmp_path / "b.jsonl", many(5) + many(5, "E"))
    cases = data_config(train_path, eval_dataset=eval_path, eval_pairs=100)
    train, evaluation, _ = load_pairs(cases)
    assert (len(train), len(evaluation)) == (15, 10)
    assert not {p.prompt for p in train} & {p.prompt for p in evaluation}


def test_several_sources_are_read_as_one_each_with_its_split(tmp_path):
    one = [r | {"split": "x"} for r in many(3, "a")] + [r | {"split": "y"} for r in many(2, "b")]
    a, b = write_jsonl(tmp_path / "a.jsonl", one), write_jsonl(tmp_path / "b.jsonl", many(4, "c"))
    train = data.load_pairs(data_config(f"{a}:x, {b} , {a} : y", shuffle=False), build_tokenizer())[
        0
    ]["train"]
    asked = [json.loads(p.prompt)[0]["content"] for p in train]
    assert asked == ["a 0", "a 1", "a 2", "c 0", "c 1", "c 2", "c 3", "b 0", "b 1"]
    assert [p.index for p in train] == list(range(9))


def test_evaluation_takes_its_split_once_from_those_sources_that_have_it(tmp_path):
    one = [r | {"split": "x"} for r in many(3)] + [r | {"split": "y"} for r in many(2, "b")]
    one += [r | {"split": "test_prefs"} for r in many(3, "T")]
    a, b = write_jsonl(tmp_path / "a.jsonl", one), write_jsonl(tmp_path / "b.jsonl", many(4, "c"))
    train, evaluation, _ = load_pairs(data_config(f"{a}:x, {b}, {a}:y", eval_pairs=50))
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
    monkeypatch.setattr(data, "read_records", lambda _, split, required: [split])
    assert list(data.load_records(path, "own", {})) == ["own"]
    assert list(data.load_records(path + ":other", "own", {})) == ["other"]
    assert asked == [path, path]


def test_no_usable_pair_is_an_error_with_the_counts_by_reason(tmp_path):
    rows = [{"text": "x", "mark": 2}] * 3 + [record("Q", "a", "a")]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    with pytest.raises(InputError) as error:
        data.load_pairs(data_config(path), build_tokenizer())
    message = str(error.value)
    assert f"dataset {path}: no usable pair in 4 records" in message
    assert re.search(r"3  unknown columns: \['mark', 'text'\]", message)
    assert re.search(r"1  same text", message)
    assert "chosen, rejected; chosen_response, rejected_response" in message
    assert '"\\n\\nHuman: ...' in message
    good = write_jsonl(tmp_path / "b.jsonl", many(3))
    with pytest.raises(InputError, match="a.jsonl: no usable pair in 4 records"):
        data.load_pairs(data_config(good, eval_dataset=path, eval_pairs=2), build_tokenizer())


lengths = st.tuples(st.integers(1, 40), st.integers(1, 40), st.integers(1, 40))


def numbered(sizes):
    """Pairs of these lengths whose token ids are all different."""
    ids = iter(range(10**6))
    return [Pair(i, *([next(ids) for _ in range(n)] for n in size)) for i, size in enumerate(sizes)]


@given(st.lists(lengths, min_size=1, max_size=40), st.integers(1, 9), st.integers(1, 200))
@settings(deadline=None)
def test_steps_hold_every_pair_once_in_few_rows_within_the_budget(sizes, per_step, budget):
    pairs = numbered(sizes)
    steps = data.group_into_steps(pairs, per_step, budget)
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
    assert data.group_into_steps(pairs, 4, 1000) == [[[0, 2, 3, 1]]]
    assert data.group_into_steps(pairs, 4, 40) == [[[0, 1], [2, 3]]]
    assert data.group_into_steps(pairs, 3, 30) == [[[0], [2, 1]], [[3]]]


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
    [
        "prompt",
        "instruction",
        "question",
        "system",
        "chosen",
        "rejected",
        "chosen_response",
        "rejected_response",
        "messages",
        "score_chosen",
        "score_rejected",
        "chosen-rating",
        "rejected-rating",
        "chosen_rating",
        "rejected_rating",
        "system_prompt",
        "input",
        "context",
        "history",
        "conversations",
        "tools",
        "images",
        "initial_reason_steps",
        "output_1",
        "output_2",
        "preference",
        "conversation_a",
        "conversation_b",
        "winner",
        "response1",
        "response2",
        "overall_preference",
        "completions",
    ]
)
# what the columns of the other shapes hold
cells = st.sampled_from(["Name a fruit.", "An apple.", "No.", [user("Hi")], [assistant("Yes")]])
labels = st.sampled_from([1, 2, 0, -3, "1", "model_a", "tie", "output_2", None])
ranked = st.dictionaries(st.sampled_from(["response", "overall_score", "rank"]), labels | plain)
asked = {name: cells for name in ("prompt", "instruction", "input", "context", "history", "tools")}
LABELLED = [
    ("output_1", "output_2", "preference"),
    ("conversation_a", "conversation_b", "winner"),
    ("human_ref_A", "human_ref_B", "labels"),
    ("response1", "response2", "overall_preference"),
]
labelled = st.sampled_from(LABELLED).flatmap(
    lambda names: st.fixed_dictionaries(
        {names[0]: cells, names[1]: cells, names[2]: labels}, optional=asked
    )
)
ranking = st.fixed_dictionaries(
    {"prompt": said, "completions": st.lists(st.one_of(ranked, junk), max_size=4)}
)
broken = st.one_of(
    junk,
    labelled,
    ranking,
    st.dictionaries(
        st.one_of(column_names, words),
        st.one_of(words, st.lists(message, max_size=4), junk),
        max_size=8,
    ),
    st.fixed_dictionaries(
        {
            name: st.one_of(words, st.lists(message, max_size=4), junk)
            for name in ("prompt", "chosen", "rejected")
        },
        optional={"system": junk, "score_chosen": junk, "score_rejected": junk},
    ),
)


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
    # text cannot say where a turn ends; a list of turns can
    if not isinstance(made.get("chosen"), list):
        contents = [m["content"] for m in messages] + [chosen, rejected]
        if any("\n\nHuman:" in content for content in contents):
            return made, None
    return made, (messages, chosen, rejected, scores if shape in WITH_SCORES else None)


def texts_of(value):
    """All texts in a value, read independently of the project."""
    if isinstance(value, str):
        return [value]
    inner = value.values() if isinstance(value, dict) else value
    return [t for item in inner for t in texts_of(item)] if isinstance(value, list | dict) else []


def answers_of(made, name):
    """The texts of a record that may be this answer."""
    for column in (name, f"{name}_response"):
        if column in made and (column.replace(name, OTHER[name]) in made):
            answer = made[column]
            return [answer if isinstance(answer, str) else answer[-1]["content"]]
    return texts_of(made)


OTHER = {"chosen": "rejected", "rejected": "chosen"}


def assert_pair_or_drop(example):
    """Never another exception, and never a wrong pair or a needless drop."""
    made, truth = example
    drops = Counter()
    try:
        pairs = data.select_pairs([made], encoder(), 0, [0], drops)
    except InputError as error:
        assert "so 1 may mean either" in str(error) and made["preference"] == 0
        return
    assert len(pairs) + sum(drops.values()) == 1
    event("a pair" if pairs else "a drop")
    for pair in pairs:
        for name, ids in (("chosen", pair.chosen_ids), ("rejected", pair.rejected_ids)):
            got = text(ids)
            if "initial_reason_steps" in made:
                got = got.removeprefix(made["initial_reason_steps"] or "")
            else:
                assert got.endswith("<|im_end|>")
            got = got.removesuffix("<|im_end|>")
            assert not CONTROL.search(got)
            said_in = answers_of(made, name)
            in_transcript = [t for t in said_in if t.endswith(got) and "\n\nAssistant:" in t]
            assert got in said_in or in_transcript
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
            records = [*read_records(str(path))]
    except InputError as error:
        assert re.search(r", line \d+ cannot be read: ", str(error))
        assert cut or tail.strip(b" \n")
        return
    drops = Counter()
    try:
        pairs = data.select_pairs(records, encoder(), 0, range(len(records)), drops)
    except InputError as error:
        assert "so 1 may mean either" in str(error)
        return
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


# What a set's owner is told


def test_held_out_pairs_are_not_counted_as_dropped_but_others_of_their_prompts_are(tmp_path):
    rows = [*many(9), record("Q 8", "another", "answer")]
    cases = data_config(
        write_jsonl(tmp_path / "a.jsonl", rows), eval_pairs=1, shuffle=False, eval_split=None
    )
    train, (held_out,), drops = load_pairs(cases)
    assert held_out.index == 9
    assert [pair.index for pair in train] == list(range(8))
    assert drops["train"] == {"its prompt is held out for evaluation": 1}


def test_what_of_ones_own_records_is_left_out_is_said(tmp_path, capsys):
    path = write_jsonl(tmp_path / "a.jsonl", many(1200))
    load_pairs(data_config(path, train_pairs=500))
    said = "train_pairs=500: 500 of 1,200 records are trained on; train_pairs=0 takes all"
    assert capsys.readouterr().out.splitlines() == [said]
    for wanted in (0, 1200, 1500):
        load_pairs(data_config(path, train_pairs=wanted))
    assert capsys.readouterr().out == ""


def test_pairs_whose_rejected_answer_has_the_higher_score_are_counted_and_said(tmp_path, capsys):
    rows = many(6)
    for i, row in enumerate(rows):
        row |= {"score_chosen": 5, "score_rejected": 7 if i < 2 else 3}
    train, _, _ = load_pairs(data_config(write_jsonl(tmp_path / "a.jsonl", rows), shuffle=False))
    assert [pair.reversed for pair in train] == [True, True, False, False, False, False]
    said = "!!! 2 of 6 train pairs score the rejected answer above the chosen one; used as they are"
    assert said in capsys.readouterr().out


def test_rounds_take_each_prompt_once_and_a_run_says_how_many_it_is_evaluated_on(tmp_path, capsys):
    rows = []
    for number in range(60):
        rows.append(record(f"Q {number // 5}", f"good {number}", "bad"))
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    settings = {"shuffle": False, "eval_pairs": 4, "train_pairs": 8}
    train, held, _ = load_pairs(data_config(path, **settings))
    assert (len({pair.prompt for pair in train}), len({pair.prompt for pair in held})) == (2, 1)
    assert "eval: 4 pairs of 1 prompts, of which the intervals are" in capsys.readouterr().out
    of_rounds = settings | {"rounds": 2, "reward": "judge.py:judge"}
    train, held, drops = load_pairs(data_config(path, **of_rounds))
    assert [len({pair.prompt for pair in part}) for part in (train, held)] == [8, 4]
    assert drops["train"]["its prompt is taken already"] > 0


@pytest.mark.parametrize("max_prompt_length, stubs", [(39, 1), (20, 0)])
def test_answers_that_long_prompts_cut_to_stubs_are_counted_and_said(
    tmp_path, capsys, max_prompt_length, stubs
):
    rows = [*many(3), record("word " * 100, "good " * 50, "bad " * 50)]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    load_pairs(data_config(path, max_length=40, max_prompt_length=max_prompt_length))
    said = f"!!! {stubs} of 4 train pairs leave an answer less than a quarter of max_length=40"
    assert (said in capsys.readouterr().out) == (stubs > 0)


def test_a_malformed_record_is_shown_by_its_columns_beginnings(tmp_path):
    rows = [record("Q", "a", "a"), record("Who?", {"text": "long " * 50}, "bad"), ["x"]]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    with pytest.raises(InputError) as error:
        data.load_pairs(data_config(path), build_tokenizer())
    lines = str(error.value).splitlines()
    assert f"Record 1: {NEITHER.format('chosen')}" in lines
    assert "  prompt = 'Who?'" in lines
    (shown,) = [line for line in lines if line.startswith("  chosen = {'text': 'long long")]
    assert len(shown) < 100
    assert sum("neither text nor" in line for line in lines) == 2  # counted once, shown once


@pytest.mark.parametrize("rows", [[], [record("Q", "a", "a")], [record("Q", "a", "")]])
def test_the_column_table_is_kept_for_faults_of_columns(tmp_path, rows):
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    with pytest.raises(InputError, match="no usable pair") as error:
        data.load_pairs(data_config(path), build_tokenizer())
    assert "Accepted are these columns" not in str(error.value)
    path = write_jsonl(tmp_path / "a.jsonl", [*rows, record("Q", 5, "b")])
    with pytest.raises(InputError, match="Accepted are these columns"):
        data.load_pairs(data_config(path), build_tokenizer())


def test_a_set_that_is_held_out_whole_says_how_to_train_on_it(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", many(1))
    with pytest.raises(InputError, match="All are held out for evaluation: set eval_pairs=0"):
        load_pairs(data_config(path, eval_pairs=5))
    path = write_jsonl(tmp_path / "b.jsonl", [record("Q", f"good {n}", "bad") for n in range(5)])
    with pytest.raises(InputError, match="Set eval_pairs=0, or give other records to evaluate on"):
        load_pairs(data_config(path, eval_pairs=1))
