"""Public preference sets by their columns: the pair that must come out, and what must be dropped.

The columns are those of the sets' cards and files; the rows are made up.
"""

import copy
import json

import pytest

import data
from helpers import (
    CHATML,
    assistant,
    build_tokenizer,
    chatml,
    data_config,
    encoder,
    record,
    text,
    user,
    write_jsonl,
)
from support.config import read_config
from support.errors import InputError
from support.shapes import ANSWERS, LABELLED, accepted_columns, read_preference
from support.turns import Drop

ASK = [user("Name a fruit.")]
GOOD = "An apple."
BAD = "No, I will not."
DIALOGUES = {"chosen": [*ASK, assistant(GOOD)], "rejected": [*ASK, assistant(BAD)]}
TEXTS = {"chosen": GOOD, "rejected": BAD}
SYSTEM = {"role": "system", "content": "Be brief."}
HH = "\n\nHuman: Hi\n\nAssistant: Hello!\n\nHuman: Name a fruit.\n\nAssistant:"
HH_ASK = [user("Hi"), assistant("Hello!"), *ASK]


def from_value(speaker, said):
    return {"from": speaker, "value": said}


def parts(role, said):
    return {"role": role, "content": [{"type": "text", "text": said}]}


# (set, a record of it, the prompt's turns); the answers are GOOD and BAD
SETS = [
    (
        "HuggingFaceH4/ultrafeedback_binarized",
        DIALOGUES
        | {"prompt": "Name a fruit.", "prompt_id": "8d", "messages": DIALOGUES["chosen"]}
        | {"score_chosen": 8.0, "score_rejected": 3.5},
        ASK,
    ),
    ("trl-lib/ultrafeedback_binarized", DIALOGUES | {"score_chosen": 8.0}, ASK),
    (
        "argilla/ultrafeedback-binarized-preferences",
        {"source": "evol", "instruction": "Name a fruit.", "chosen_response": GOOD}
        | {"rejected_response": BAD, "chosen_avg_rating": 5.0, "rejected_avg_rating": 3.0},
        ASK,
    ),
    (
        "argilla/ultrafeedback-binarized-preferences-cleaned",
        DIALOGUES | {"prompt": "Name a fruit.", "chosen-rating": 5.0, "rejected-rating": 4.0},
        ASK,
    ),
    (
        "argilla/distilabel-math-preference-dpo",
        {"metadata": None, "instruction": "Name a fruit.", "chosen_response": GOOD}
        | {"rejected_response": BAD, "chosen_rating": 9.0, "rejected_rating": 7.0},
        ASK,
    ),
    (
        "argilla/distilabel-intel-orca-dpo-pairs",
        TEXTS | {"system": "Be brief.", "input": "Name a fruit.", "status": "unchanged"},
        [SYSTEM, *ASK],
    ),
    ("argilla/dpo-mix-7k", DIALOGUES | {"dataset": "x", "chosen_rating": 5.0}, ASK),
    (
        "Intel/orca_dpo_pairs",
        TEXTS | {"system": "Be brief.", "question": "Name a fruit."},
        [SYSTEM, *ASK],
    ),
    ("Anthropic/hh-rlhf", {"chosen": f"{HH} {GOOD}", "rejected": f"{HH} {BAD}"}, HH_ASK),
    (
        "Dahoas/full-hh-rlhf",
        {"prompt": HH, "response": f" {GOOD}", "chosen": f" {GOOD}", "rejected": f" {BAD}"},
        HH_ASK,
    ),
    (
        "openbmb/UltraFeedback",
        {"source": "evol", "instruction": "Name a fruit.", "correct_answers": ["None"]}
        | {
            "completions": [
                {"response": "A plum.", "overall_score": 5.0, "model": "m"},
                {"response": BAD, "overall_score": 2.5, "model": "n"},
                {"response": GOOD, "overall_score": 9.0, "model": "o"},
            ]
        },
        ASK,
    ),
    (
        "berkeley-nest/Nectar",
        {"prompt": "\n\nHuman: Name a fruit.\n\nAssistant: ", "turns": 1, "source": ["x"]}
        | {
            "answers": [
                {"answer": BAD, "model": "m", "rank": 7.0},
                {"answer": GOOD, "model": "n", "rank": 1.0},
            ]
        },
        ASK,
    ),
    (
        "stanfordnlp/SHP",
        {"history": "Name a fruit.", "human_ref_A": BAD, "human_ref_B": GOOD, "labels": 0}
        | {"post_id": "x", "score_A": 3, "score_B": 90},
        ASK,
    ),
    (
        "nvidia/HelpSteer3",
        {"context": HH_ASK, "response1": GOOD, "response2": BAD, "overall_preference": -2}
        | {"domain": "general", "language": "english"},
        HH_ASK,
    ),
    (
        "nvidia/HelpSteer2, preference",
        {"prompt": "Name a fruit.", "response_1": BAD, "response_2": GOOD}
        | {"preference_strength": 3, "preference_statement": "better"},
        ASK,
    ),
    (
        "PKU-Alignment/PKU-SafeRLHF",
        {"prompt": "Name a fruit.", "response_0": BAD, "response_1": GOOD}
        | {"better_response_id": 1, "safer_response_id": 0},
        ASK,
    ),
    (
        "lmsys/chatbot_arena_conversations",
        {"conversation_a": DIALOGUES["rejected"], "conversation_b": DIALOGUES["chosen"]}
        | {"winner": "model_b", "model_a": "m", "model_b": "n", "turn": 1},
        ASK,
    ),
    (
        "lmarena-ai/arena-human-preference-140k",
        {"conversation_a": [parts("user", "Name a fruit."), parts("assistant", GOOD)]}
        | {"conversation_b": [parts("user", "Name a fruit."), parts("assistant", BAD)]}
        | {"winner": "model_a"},
        ASK,
    ),
    (
        "lvwerra/stack-exchange-paired",
        {"question": "Name a fruit.", "response_j": GOOD, "response_k": BAD, "qid": 5},
        ASK,
    ),
    (
        "tatsu-lab/alpaca_farm",
        {"instruction": "Name it.", "input": "A fruit.", "output_1": BAD, "output_2": GOOD}
        | {"preference": 2},
        [user("Name it.\n\nA fruit.")],
    ),
    (
        "rasbt's instruction-data-with-preference.json",
        TEXTS | {"instruction": "Name it.", "input": "A fruit.", "output": "An apple"},
        [user("Name it.\n\nA fruit.")],
    ),
    (
        "xinlai/Math-Step-DPO-10K",
        {"prompt": "Name a fruit.", "initial_reason_steps": "An", "chosen": " apple."}
        | {"rejected": " elk.", "full_chosen": "An apple.", "answer": "apple"},
        ASK,
    ),
    (
        "llamafactory's dpo_en_demo",
        {"conversations": [from_value("human", "Name a fruit.")]}
        | {"chosen": from_value("gpt", GOOD), "rejected": from_value("gpt", BAD)},
        ASK,
    ),
    (
        "LLaMA-Factory's Alpaca form",
        TEXTS | {"instruction": "Name a fruit.", "system": "", "history": [["Hi", "Hello!"]]},
        HH_ASK,
    ),
    (
        "axolotl's chat_template.default",
        {"messages": HH_ASK, "chosen": assistant(GOOD), "rejected": assistant(BAD)},
        HH_ASK,
    ),
    (
        "OpenAI's preference format",
        {"input": {"messages": ASK, "tools": [], "parallel_tool_calls": True}}
        | {"preferred_output": [assistant(GOOD)], "non_preferred_output": [assistant(BAD)]},
        ASK,
    ),
    ("jondurbin/truthy-dpo-v0.1", TEXTS | {"system": "", "prompt": "Name a fruit."}, ASK),
    (
        "mlabonne/orpo-dpo-mix-40k",
        DIALOGUES | {"prompt": "Name a fruit.", "question": "Name a fruit.", "source": "x"},
        ASK,
    ),
    (
        "princeton-nlp/llama3-ultrafeedback",
        DIALOGUES | {"prompt": "Name a fruit.", "all_rm_scores": [0.1, 0.2]},
        ASK,
    ),
    ("Skywork/Skywork-Reward-Preference-80K-v0.2", DIALOGUES | {"source": "x"}, ASK),
]
NAMES = [name for name, *_ in SETS]


def why(value, columns=None):
    with pytest.raises(Drop) as drop:
        read_preference(value, columns)
    return str(drop.value)


@pytest.mark.parametrize(("made", "asked"), [row[1:] for row in SETS], ids=NAMES)
def test_a_public_set_gives_the_right_pair(made, asked):
    good, bad = (GOOD, "An elk.") if "initial_reason_steps" in made else (GOOD, BAD)
    found = read_preference(made)
    assert (found.messages, found.chosen, found.rejected) == (asked, good, bad)
    pair = encoder().encode(made)
    assert text(pair.prompt_ids) == chatml(asked)
    assert text(pair.chosen_ids) == f"{good}<|im_end|>"
    assert text(pair.rejected_ids) == f"{bad}<|im_end|>"


@pytest.mark.parametrize(("made", "asked"), [row[1:] for row in SETS], ids=NAMES)
def test_a_public_set_stored_as_text_in_csv_cells_gives_the_same_pair(made, asked):
    cells = {}
    for column, value in made.items():
        is_list = isinstance(value, list | dict) and column not in ("history", "completions")
        is_list = is_list and column != "answers"
        cells[column] = repr(value) if is_list else value
    if isinstance(made.get("input"), dict):
        cells["input"] = json.dumps(made["input"]["messages"])
    found, same = read_preference(cells), read_preference(made)
    assert (found.messages, found.chosen) == (same.messages, same.chosen)


def answer_columns(made):
    for names in ANSWERS:
        if made.keys() >= set(names):
            return names
    for *names, _ in LABELLED:
        if made.keys() >= set(names):
            return names
    return ("completions",) if "completions" in made else ("answers",)


@pytest.mark.parametrize(("made", "asked"), [row[1:] for row in SETS], ids=NAMES)
def test_a_damaged_record_of_a_public_set_is_dropped(made, asked):
    for column in answer_columns(made):
        for damage in (None, 5.5, "[{'role': 'assistant', 'content': 'cut", [["x"]]):
            damaged = copy.deepcopy(made) | {column: damage}
            assert why(damaged), (column, damage)
        missing = {name: value for name, value in made.items() if name != column}
        assert why(missing), column


@pytest.mark.parametrize(
    ("added", "reason"),
    [
        ({"input": "the text in question"}, "input is filled"),
        ({"history": [["Hi", "Hello!"]], "question": "Another one?"}, "question is filled"),
        ({"context": "A shop sells fruit."}, "context is filled"),
        ({"images": ["a.png"]}, "images is filled"),
        ({"tool_calls": [{"name": "f"}]}, "tool_calls is filled"),
        ({"system": "Be brief.", "system_prompt": "Be long."}, "system_prompt is filled"),
        ({"tools": "no list"}, "malformed: tools is no list"),
        ({"history": [["Hi"]]}, "malformed: history"),
        ({"initial_reason_steps": 5}, "malformed: initial_reason_steps is no text"),
    ],
)
def test_a_filled_column_that_would_change_the_prompt_is_never_half_read(added, reason):
    assert why(record("Name a fruit.", GOOD, BAD) | added).startswith(reason)


def test_a_column_that_repeats_what_the_prompt_says_changes_nothing():
    made = record("Name a fruit.", GOOD, BAD, question="Name a fruit.", input="", images=[])
    assert read_preference(made).messages == ASK


@pytest.mark.parametrize("winner", ["tie", "tie (bothbad)", "both_bad"])
def test_a_tie_between_two_answers_is_dropped_as_one(winner):
    made = {"conversation_a": DIALOGUES["chosen"], "conversation_b": DIALOGUES["rejected"]}
    assert why(made | {"winner": winner}) == "tie in winner"


def test_a_label_that_names_no_answer_is_dropped():
    made = {"instruction": "Q", "output_1": "a", "output_2": "b"}
    assert why(made | {"preference": 0}) == "tie in preference"
    for label in (None, 3, "first", [1], True and 7):
        assert "names no answer" in why(made | {"preference": label})
    assert read_preference(made | {"preference": "2"}).chosen == "b"


def test_a_ranking_takes_the_best_against_the_worst():
    ranked = [{"response": str(n), "overall_score": score} for n, score in enumerate((5, 9, 2, 7))]
    found = read_preference({"instruction": "Q", "completions": ranked})
    assert (found.chosen, found.rejected, found.scores) == ("1", "2", (9.0, 2.0))
    assert why({"instruction": "Q", "completions": ranked[:1]}).startswith("fewer than two")
    assert why({"instruction": "Q", "completions": [ranked[0]] * 2}) == "tie in score"
    unscored = [{"response": "a"}, {"response": "b"}]
    assert why({"instruction": "Q", "completions": unscored}).startswith("malformed")


def test_parts_that_are_no_text_are_dropped():
    picture = {"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}
    expected = "prompt holds a part of type image_url: only text is trained on"
    assert why(record([picture], GOOD, BAD)) == expected


@pytest.mark.parametrize(
    "begun", ["[INST] Q [/INST]", "<|im_start|>user\nQ", "### Instruction:\nQ"]
)
def test_a_prompt_in_another_models_template_is_dropped(begun):
    assert why(record(begun, GOOD, BAD)).startswith("written in a chat template already")


def test_answers_that_both_begin_with_the_prompt_are_dropped():
    asked = "Name a fruit that is red."
    made = record(asked, f"{asked} {GOOD}", f"{asked} {BAD}")
    assert "both answers begin with the prompt" in why(made)
    assert read_preference(record(asked, f"{asked} {GOOD}", BAD))


CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]}
RESULT = {"role": "tool", "content": "7 fruits"}
WITH_TOOLS = "{% for t in tools or [] %}{{ t.name }};{% endfor %}" + CHATML.replace(
    "message['content']", "message['content'] ~ (message.tool_calls or '')"
)


def test_tool_calls_are_rendered_by_a_template_that_can_and_else_dropped():
    made = record([*ASK, CALL, RESULT], GOOD, BAD, tools=[{"name": "f"}])
    with pytest.raises(Drop, match="tools, which the chat template does not render"):
        encoder().encode(made)
    found = read_preference(made)
    assert [turn["role"] for turn in found.messages] == ["user", "assistant", "tool"]
    assert found.tools == [{"name": "f"}]
    assert "7 fruits" in text(encoder(build_tokenizer(WITH_TOOLS)).encode(made).prompt_ids)
    assert why(record(ASK, [CALL], [assistant(BAD)])).startswith("the answer is a tool call")


def test_a_developers_turn_keeps_its_role():
    turns = [{"role": "developer", "content": "Be brief."}, *ASK]
    assert read_preference(record(turns, GOOD, BAD)).messages == turns


def test_two_different_system_messages_are_not_half_read():
    assert "differ" in why(record([SYSTEM, *ASK], GOOD, BAD, system="Be long."))
    assert (
        read_preference(record([SYSTEM, *ASK], GOOD, BAD, system="Be brief.")).messages[0] == SYSTEM
    )


def test_what_was_recognised_and_what_was_not_used_is_told():
    found = read_preference(record("Q", GOOD, BAD, rating=5, note="", score_chosen=1))
    assert found.shape == "chosen_and_rejected, a_prompt"
    assert found.unused == ("rating", "score_chosen")


OWN = {"persona": "Be brief.", "ask": "Name a fruit.", "good": GOOD, "bad": BAD, "s1": 2, "s2": 1}


def test_columns_maps_names_of_ones_own():
    columns = {"prompt": "ask", "chosen": "good", "rejected": "bad", "system": "persona"}
    columns |= {"score_chosen": "s1", "score_rejected": "s2"}
    found = read_preference(OWN, columns)
    assert (found.messages, found.chosen, found.rejected) == ([SYSTEM, *ASK], GOOD, BAD)
    assert found.scores == (2.0, 1.0)


@pytest.mark.parametrize("winner", ["a", "A", "model_a", "good"])
def test_columns_maps_two_answers_and_a_label(winner):
    columns = {"prompt": "ask", "a": "good", "b": "bad", "winner": "label"}
    assert read_preference(OWN | {"label": winner}, columns).chosen == GOOD
    assert read_preference(OWN | {"label": "b"}, columns).chosen == BAD
    assert why(OWN | {"label": "tie"}, columns) == "tie in label"
    assert "say which it names" in why(OWN | {"label": 1}, columns)
    numbered = columns | {"a_if": 1, "b_if": 2}
    assert read_preference(OWN | {"label": 2}, numbered).chosen == BAD
    assert "names no answer" in why(OWN | {"label": 3}, numbered)


def test_turns_of_speaker_and_text_are_read_as_turns():
    said = [{"speaker": "human", "text": "Name a fruit."}]
    answers = {"better": {"speaker": "agent", "text": GOOD}}
    answers |= {"worse": {"speaker": "agent", "text": BAD}, "conversation": said}
    columns = {"prompt": "conversation", "chosen": "better", "rejected": "worse"}
    found = read_preference(answers, columns)
    assert (found.messages, found.chosen, found.rejected) == (ASK, GOOD, BAD)


def test_columns_leaves_sets_with_other_columns_to_the_table():
    columns = {"prompt": "ask", "chosen": "good", "rejected": "bad"}
    assert read_preference(DIALOGUES, columns).chosen == GOOD


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("{prompt: q}", "two answers are not named"),
        ("{prompt: q, chosen: a, rejcted: b}", "rejcted is no meaning of a column"),
        ("[a, b]", "columns: Input should be a"),
    ],
)
def test_a_mapping_that_says_too_little_is_refused(tmp_path, value, message):
    path = tmp_path / "c.yaml"
    path.write_text(f"columns: {value}\n" if value[0] == "{" else "columns: x\n")
    with pytest.raises(InputError, match=message):
        read_config(path)


def test_a_mapping_works_from_the_command_line(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("beta: 0.1\n")
    (config,), varied = read_config(path, ["columns={prompt: ask, chosen: good, rejected: bad}"])
    assert config.columns["chosen"] == "good"
    assert varied == []


def test_a_mapping_of_columns_that_are_not_there_is_refused(tmp_path):
    path = write_jsonl(tmp_path / "own.jsonl", [OWN] * 3)
    columns = {"prompt": "ask", "chosen": "god", "rejected": "bad"}
    with pytest.raises(InputError, match="has no column god, only: persona, ask, good"):
        data.load_pairs(data_config(path, columns=columns), build_tokenizer())
    columns["chosen"] = "good"
    pairs, _ = data.load_pairs(data_config(path, columns=columns, eval_pairs=0), build_tokenizer())
    assert len(pairs["train"]) == 3


def test_pairs_that_stand_in_both_directions_are_said(tmp_path, capsys):
    rows = [record("Q", "a", "b"), record("Q", "b", "a"), record("R", "a", "b")]
    path = write_jsonl(tmp_path / "both.jsonl", rows)
    data.load_pairs(data_config(path, eval_pairs=0), build_tokenizer())
    assert "2 train pairs stand in the set the other way round too" in capsys.readouterr().out


def test_the_error_lists_every_shape():
    table = accepted_columns()
    for names in (*ANSWERS, *(row[:3] for row in LABELLED)):
        for name in names:
            assert name in table
