"""The checks of make_pairs.py, the file it made, and how a tiny model answers."""

import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import make_pairs
from make_pairs import CHECKS, PAIRS, SEEN, TEST_TOPICS, TRAIN_TOPICS, UNSEEN, kind_of, passes

# check, answers that fulfil it, answers that do not
EXAMPLES = [
    ("lowercase", ["the sky is blue.", "i don't, 2 times"], ["The sky.", "123", ""]),
    ("uppercase", ["THE SKY IS BLUE."], ["THE SKY is", "123", ""]),
    ("no_commas", ["The sky is blue.", ""], ["Blue, of course."]),
    ("starts:In short", ["In short, it is light."], ["It is light.", "in short", "So, In short"]),
    ("ends:The end.", ["He slept. The end."], ["The end. He slept.", "The end", '"The end."']),
    (
        "bullets:2",
        ["- one\n- two", "Two:\n* one\n  • two\n"],
        [
            "- one",
            "- one\n- two\n- three",
            "1. one\n2. two",
            "-one\n-two",
            "a - one - two",
            "- \n-",
        ],
    ),
    (
        "numbered:2",
        ["1. one\n2. two", "Here:\n\n1) one\n2) two\nDone."],
        ["1. one", "1. one\n2. two\n3. three", "1. one\n3. two", "2. two\n1. one", "- one\n- two"],
    ),
    ("sentences:1", ["It is light.", 'He said "no!"'], ["It is light. Blue.", "It is light", ""]),
    (
        "sentences:2",
        ["It is light. It is blue!", 'He said "no!" She left.'],
        ["It is light.", "It is light. It is", "It is light. Blue.", "One is. Two is. Three is."],
    ),
    ("max_words:3", ["One two three.", "don't well-known x"], ["One two three four", "", "..."]),
    ("min_words:3", ["One two three.", "a b c d"], ["One two"]),
    ("contains:river", ["A River.", "the river's", "a river-bed"], ["rivers", "A lake", ""]),
    ("without:and", ["A lake", "sandy"], ["And so", "this and that"]),
    ("quoted", ['"It is light."'], ['It is "light"', '"It is light', '""', '"', ""]),
    (
        "json:answer",
        ['{"answer": "light"}', '{\n "answer": "a, b"\n}'],
        [
            '{"answer": 1}',
            '{"text": "light"}',
            '["answer"]',
            "light",
            '```{"answer": "x"}```',
            '{"answer": "x", "more": "y"}',
        ],
    ),
    (
        "title",
        ["[The Sky]\nIt is blue.", "[Sky]\n\nBlue."],
        ["The Sky\nIt is blue.", "[The Sky]", "[The Sky] is blue.", "[]\nBlue.", "Sky\n[x]\nBlue"],
    ),
    ("question", ["It is light. Is it?"], ["Is it? It is.", "It is.", ""]),
    (
        "paragraphs:2",
        ["One.\n\nTwo.", "One.\nStill one.\n \nTwo.\n"],
        ["One.\nTwo.", "One.", "One.\n\nTwo.\n\nThree.", ""],
    ),
]
CASES = [(c, a, True) for c, good, _ in EXAMPLES for a in good]
CASES += [(c, a, False) for c, _, bad in EXAMPLES for a in bad]


@pytest.mark.parametrize(("check", "answer", "expected"), CASES)
def test_check(check, answer, expected):
    assert passes(check, answer) is expected


def test_every_check_has_examples_and_phrasings():
    assert {check.partition(":")[0] for check, _, _ in EXAMPLES} == set(CHECKS)
    assert set(make_pairs.PHRASINGS) == set(CHECKS)


@given(st.text())
def test_checks_take_any_text(text):
    for check, _, _ in EXAMPLES:
        assert passes(check, text) in (True, False)


def all_candidates():
    waves = range(len(make_pairs.WAVES))
    return [c for wave in waves for c in make_pairs.candidates(make_pairs.DEFAULT_SEED, wave)]


def test_candidates_are_repeatable_and_distinct():
    first = all_candidates()
    assert first == all_candidates()
    assert len({c["prompt"] for c in first}) == len(first)


def test_worked_examples_fulfil_their_check():
    for candidate in all_candidates():
        assert passes(candidate["check"], candidate["example"][1]), candidate["example"]


@pytest.mark.parametrize("check", [check for check, _, _ in EXAMPLES])
def test_mended_answers_fulfil_their_check(check):
    answer = "The sky is blue, we think, and that is so. It can be red. It is grey with rain."
    kind, _, argument = check.partition(":")
    mended = make_pairs.mend(kind, argument, answer, "the sky")
    if kind in ("contains", "min_words"):
        assert mended is None
    elif check != "max_words:3":
        assert passes(check, mended), mended


def answer(tokens):
    return (f"{tokens} tokens", tokens, True)


def test_couple_takes_the_nearest_and_balances():
    good, bad = [answer(10), answer(30)], [answer(60), answer(28)]
    assert make_pairs.couple(good, bad, 0) == (answer(30), answer(28))
    around = [answer(29), answer(31)]
    assert make_pairs.couple([answer(30)], around, 5) == (answer(30), answer(31))
    assert make_pairs.couple([answer(30)], around, -5) == (answer(30), answer(29))


def test_interval():
    mean, half = make_pairs.interval([0.0, 1.0, 0.0, 1.0])
    assert mean == pytest.approx(0.5)
    assert half == pytest.approx(1.96 * 0.57735 / 2, rel=1e-4)


@pytest.fixture(scope="module")
def rows():
    return [json.loads(line) for line in PAIRS.read_text(encoding="utf-8").splitlines()]


def test_file_counts(rows):
    assert Counter(row["split"] for row in rows) == {"train_prefs": 500, "test_prefs": 100}
    assert Path(PAIRS).stat().st_size < 1_000_000
    assert len({row["prompt"] for row in rows}) == len(rows)
    columns = {"prompt", "chosen", "rejected", "check", "split", "source"}
    assert all(set(row) == columns for row in rows)
    assert {row["source"] for row in rows} <= {"sampled", "hint", "rule"}


def test_chosen_fulfils_and_rejected_does_not(rows):
    for row in rows:
        assert passes(row["check"], row["chosen"]), row
        assert not passes(row["check"], row["rejected"]), row


def test_texts_are_clean(rows):
    for row in rows:
        for column in ("prompt", "chosen", "rejected"):
            text = row[column]
            assert text == text.strip() != ""
            assert "<|" not in text
            assert all(c.isprintable() or c == "\n" for c in text), text


def test_topics_are_disjoint(rows):
    assert not set(TRAIN_TOPICS) & set(TEST_TOPICS)
    for row in rows:
        own, other = TRAIN_TOPICS, TEST_TOPICS
        if row["split"] == "test_prefs":
            own, other = other, own
        assert any(topic in row["prompt"] for topic in own), row["prompt"]
        assert not any(topic in row["prompt"] for topic in other), row["prompt"]


def test_unseen_checks_stand_in_the_test_part_only(rows):
    train = Counter(kind_of(r) for r in rows if r["split"] == "train_prefs")
    test = Counter(kind_of(r) for r in rows if r["split"] == "test_prefs")
    assert set(train) == set(SEEN)
    assert set(test) == set(CHECKS)
    assert sum(test[kind] for kind in UNSEEN) == 30


def test_lengths_are_alike(rows):
    chosen, rejected = ([len(row[c].split()) for row in rows] for c in ("chosen", "rejected"))
    assert sum(chosen) == pytest.approx(sum(rejected), rel=0.1)


def test_a_model_answers_each_conversation_the_same_way_again(tiny_model):
    model = make_pairs.Answerer(tiny_model, "float32")
    answers = model.answer([["Name a fruit."], ["Hi", "Hello.", "Who?"]], 2, seed=1)
    assert answers == model.answer([["Name a fruit."], ["Hi", "Hello.", "Who?"]], 2, seed=1)
    assert [len(found) for found in answers] == [2, 2] and answers[0][0] != answers[0][1]
    for text, tokens, ended in answers[0] + answers[1]:
        assert isinstance(text, str) and 0 <= tokens <= make_pairs.MAX_NEW_TOKENS
        assert ended or tokens > 0
