"""Which records become which pairs: public sets by name, and what must be dropped and counted.

The columns are those of the sets' cards; what stands in them is made up.
"""

import json
from dataclasses import dataclass, field

import pytest

from helpers import (
    CHATML,
    assistant,
    build_tokenizer,
    chatml,
    data_config,
    encoder,
    load_pairs,
    record,
    text,
    user,
    write_jsonl,
)
from support.columns import check_columns, check_places
from support.config import read_config
from support.errors import InputError
from support.shapes import SHAPES, accepted_columns, read_preference
from support.turns import Drop

Q, GOOD, BAD, FAIR = "Name a fruit.", "An apple.", "No.", "Perhaps a pear."
EARLIER = [user("Hi"), assistant("Hello!")]
WHOLE = {"chosen": [user(Q), assistant(GOOD)], "rejected": [user(Q), assistant(BAD)]}
TEXT = {"chosen": GOOD, "rejected": BAD}


def system(content):
    return {"role": "system", "content": content}


def human(content):
    return {"from": "human", "value": content}


def gpt(content):
    return {"from": "gpt", "value": content}


def part(content):
    return [{"type": "text", "text": content, "image": None, "mimeType": None}]


def rating(number):
    return {"Rating": number, "Rationale": "because"}


@dataclass
class Known:
    """A public set: a record with its columns, and what must come of it."""

    record: dict
    shape: str = "chosen_and_rejected"
    messages: list = field(default_factory=lambda: [user(Q)])
    scores: tuple | None = None
    answers: tuple = (GOOD, BAD)
    # columns without which the record must be dropped; others may be missing
    needs: str = "chosen rejected"


SETS = {
    "HuggingFaceH4/ultrafeedback_binarized": Known(
        {
            "prompt": Q,
            "prompt_id": "8d9f",
            "messages": WHOLE["chosen"],
            "score_chosen": 8.5,
            "score_rejected": 4.0,
            **WHOLE,
        },
        scores=(8.5, 4.0),
    ),
    "trl-lib/ultrafeedback_binarized": Known(
        {**WHOLE, "score_chosen": 8.5, "score_rejected": 4.0}, scores=(8.5, 4.0)
    ),
    "trl-lib/tldr-preference": Known({"prompt": Q, **TEXT}, needs="prompt chosen rejected"),
    "Anthropic/hh-rlhf": Known(
        {
            "chosen": f"\n\nHuman: Hi\n\nAssistant: Hello!\n\nHuman: {Q}\n\nAssistant: {GOOD}",
            "rejected": f"\n\nHuman: Hi\n\nAssistant: Hello!\n\nHuman: {Q}\n\nAssistant: {BAD}",
        },
        messages=[*EARLIER, user(Q)],
    ),
    "Dahoas/full-hh-rlhf": Known(
        {
            "prompt": f"\n\nHuman: Hi\n\nAssistant: Hello!\n\nHuman: {Q}\n\nAssistant:",
            "response": " " + GOOD,
            "chosen": " " + GOOD,
            "rejected": " " + BAD,
        },
        messages=[*EARLIER, user(Q)],
        needs="prompt chosen rejected",
    ),
    "Dahoas/rm-static": Known(
        {
            "prompt": f"\n\nHuman: {Q}\n\nAssistant:",
            "response": " " + GOOD,
            "chosen": " " + GOOD,
            "rejected": " " + BAD,
        },
        needs="prompt chosen rejected",
    ),
    "Intel/orca_dpo_pairs": Known(
        {"system": "Be brief.", "question": Q, **TEXT},
        messages=[system("Be brief."), user(Q)],
        needs="question chosen rejected",
    ),
    "argilla/distilabel-intel-orca-dpo-pairs": Known(
        {
            "system": "Be brief.",
            "input": Q,
            **TEXT,
            "generations": [GOOD, BAD],
            "rating": [9, 3],
            "rationale": "because",
            "status": "unchanged",
        },
        messages=[system("Be brief."), user(Q)],
        needs="input chosen rejected",
    ),
    "argilla/distilabel-math-preference-dpo": Known(
        {
            "metadata": None,
            "instruction": Q,
            "chosen_response": GOOD,
            "chosen_rating": 9.0,
            "rejected_response": BAD,
            "rejected_rating": 7.0,
        },
        scores=(9.0, 7.0),
        needs="instruction chosen_response rejected_response",
    ),
    "argilla/ultrafeedback-binarized-preferences-cleaned": Known(
        {
            "source": "evol",
            "prompt": Q,
            **WHOLE,
            "chosen-rating": 5.0,
            "rejected-rating": 2.0,
            "chosen-model": "x",
        },
        scores=(5.0, 2.0),
    ),
    "argilla/dpo-mix-7k": Known(
        {"dataset": "x", **WHOLE, "chosen_rating": 5.0, "rejected_rating": 4.0}, scores=(5.0, 4.0)
    ),
    "argilla/distilabel-capybara-dpo-7k-binarized": Known(
        {
            "source": "Dove",
            "conversation": [{"input": Q, "output": FAIR}],
            "original_response": FAIR,
            "prompt": Q,
            **WHOLE,
            "rating_chosen": 5,
            "rating_rejected": 3,
        },
        scores=(5.0, 3.0),
    ),
    "OpenRLHF/preference_dataset_mixture2_and_safe_pku": Known(
        {**WHOLE, "chosen_score": 5.0, "rejected_score": 3.5}, scores=(5.0, 3.5)
    ),
    "Skywork/Skywork-Reward-Preference-80K-v0.2": Known({**WHOLE, "source": "magpie"}),
    "mlabonne/orpo-dpo-mix-40k": Known({"source": "x", **WHOLE, "prompt": Q, "question": Q}),
    "allenai/llama-3.1-tulu-3-8b-preference-mixture": Known(
        {"id": "1", "source": "x", "prompt": Q, **WHOLE}
    ),
    "snorkelai/Snorkel-Mistral-PairRM-DPO-Dataset": Known(
        {
            "prompt_id": "1",
            "prompt": Q,
            **WHOLE,
            "all_generated_responses": [GOOD, BAD],
            "all_rm_scores": [0.9, 0.1],
        }
    ),
    "jondurbin/truthy-dpo-v0.1": Known(
        {"id": "1", "source": "x", "system": "Be brief.", "prompt": Q, **TEXT},
        messages=[system("Be brief."), user(Q)],
        needs="prompt chosen rejected",
    ),
    "shibing624/DPO-En-Zh-20k-Preference": Known(
        {
            "system": "Be brief.",
            "history": [["Hi", "Hello!"]],
            "question": Q,
            "response_chosen": GOOD,
            "response_rejected": BAD,
        },
        messages=[system("Be brief."), *EARLIER, user(Q)],
        needs="question response_chosen response_rejected",
    ),
    "llamafactory/DPO-En-Zh-20k": Known(
        {
            "conversations": [human("Hi"), gpt("Hello!"), human(Q)],
            "chosen": gpt(GOOD),
            "rejected": gpt(BAD),
        },
        messages=[*EARLIER, user(Q)],
        needs="conversations chosen rejected",
    ),
    "rasbt/LLMs-from-scratch": Known(
        {"instruction": "Name one of these.", "input": "apple, lead", "output": GOOD, **TEXT},
        messages=[user("Name one of these.\n\napple, lead")],
        needs="chosen rejected",
    ),
    "LLaMA-Factory's Alpaca form": Known(
        {"instruction": Q, "input": "", "system": "", "history": [["Hi", "Hello!"]], **TEXT},
        messages=[*EARLIER, user(Q)],
        needs="instruction chosen rejected",
    ),
    "princeton-nlp/llama3-ultrafeedback": Known({"prompt": Q, **WHOLE, "all_rm_scores": [0.2]}),
    "Vezora/Code-Preference-Pairs": Known(
        {"input": Q, "accepted": GOOD, "rejected": BAD}, needs="input accepted rejected"
    ),
    "xinlai/Math-Step-DPO-10K": Known(
        {
            "dataset": "gsm",
            "prompt": Q,
            "initial_reason_steps": "Think.\nStep 1:",
            "chosen": " so",
            "rejected": " no",
            "full_chosen": " so, and on",
            "full_rejected": " no, and on",
            "answer": "5",
        },
        answers=("Think.\nStep 1: so", "Think.\nStep 1: no"),
        needs="prompt chosen rejected",
    ),
    "lvwerra/stack-exchange-paired": Known(
        {
            "qid": 5,
            "question": Q,
            "date": "2020",
            "metadata": ["https://x"],
            "response_j": GOOD,
            "response_k": BAD,
        },
        needs="question response_j response_k",
    ),
    "axolotl's chat_template.default": Known(
        {
            "messages": [*EARLIER, user(Q)],
            "chosen": assistant(GOOD),
            "rejected": assistant(BAD),
        },
        messages=[*EARLIER, user(Q)],
        needs="messages chosen rejected",
    ),
    "ms-swift's rejected_response": Known(
        {"messages": [user(Q), assistant(GOOD)], "rejected_response": BAD},
        shape="rejected_beside_messages",
        needs="messages rejected_response",
    ),
    "OpenAI's preference format": Known(
        {
            "input": {"messages": [user(Q)], "tools": [], "parallel_tool_calls": True},
            "preferred_output": [assistant(GOOD)],
            "non_preferred_output": [assistant(BAD)],
        },
        shape="preferred_output",
        needs="input preferred_output non_preferred_output",
    ),
    "tatsu-lab/alpaca_farm": Known(
        {
            "instruction": "Name one of these.",
            "input": "apple, lead",
            "output_1": BAD,
            "output_2": GOOD,
            "preference": 2,
        },
        shape="answers_with_a_label",
        messages=[user("Name one of these.\n\napple, lead")],
        needs="output_1 output_2 preference",
    ),
    "PKU-Alignment/PKU-SafeRLHF": Known(
        {
            "prompt": Q,
            "response_0": BAD,
            "response_1": GOOD,
            "is_response_0_safe": True,
            "better_response_id": 1,
            "safer_response_id": 0,
        },
        shape="answers_with_a_label",
        needs="prompt response_0 response_1 better_response_id",
    ),
    "lmsys/chatbot_arena_conversations": Known(
        {
            "question_id": "1",
            "model_a": "x",
            "model_b": "y",
            "winner": "model_b",
            "judge": "z",
            "conversation_a": [user(Q), assistant(BAD)],
            "conversation_b": [user(Q), assistant(GOOD)],
            "turn": 1,
        },
        shape="answers_with_a_label",
        needs="conversation_a conversation_b winner",
    ),
    "lmarena-ai/arena-human-preference-100k": Known(
        {
            "winner": "model_a",
            "conversation_a": json.dumps([user(Q), assistant(GOOD)]),
            "conversation_b": json.dumps([user(Q), assistant(BAD)]),
        },
        shape="answers_with_a_label",
        needs="conversation_a conversation_b winner",
    ),
    "lmarena-ai/arena-human-preference-140k": Known(
        {
            "winner": "model_a",
            "conversation_a": [user(part(Q)), assistant(part(GOOD))],
            "conversation_b": [user(part(Q)), assistant(part(BAD))],
        },
        shape="answers_with_a_label",
        needs="conversation_a conversation_b winner",
    ),
    "stanfordnlp/SHP": Known(
        {
            "post_id": "1",
            "domain": "askx",
            "history": Q,
            "human_ref_A": BAD,
            "human_ref_B": GOOD,
            "labels": 0,
            "score_A": 3,
            "score_B": 30,
        },
        shape="answers_of_people",
        needs="history human_ref_A human_ref_B labels",
    ),
    "nvidia/HelpSteer3": Known(
        {
            "domain": "general",
            "language": "english",
            "context": [*EARLIER, user(Q)],
            "response1": GOOD,
            "response2": BAD,
            "overall_preference": -2,
            "individual_preference": [{"score": -2, "reasoning": "x"}],
        },
        shape="answers_compared",
        messages=[*EARLIER, user(Q)],
        needs="context response1 response2 overall_preference",
    ),
    "nvidia/HelpSteer2 (preference)": Known(
        {"prompt": Q, "response_1": BAD, "response_2": GOOD, "preference_strength": 1},
        shape="answers_compared",
        needs="prompt response_1 response_2 preference_strength",
    ),
    "openbmb/UltraFeedback": Known(
        {
            "source": "evol",
            "instruction": Q,
            "models": ["x", "y", "z"],
            "completions": [
                {"response": FAIR, "overall_score": 10.0, "annotations": {"honesty": rating("3")}},
                {
                    "response": GOOD,
                    "overall_score": 8.0,
                    "annotations": {"honesty": rating("5"), "truthfulness": rating("N/A")},
                },
                {
                    "response": BAD,
                    "overall_score": 9.0,
                    "annotations": {"honesty": rating("1"), "truthfulness": rating("2")},
                },
            ],
        },
        shape="best_and_worst",
        scores=(5.0, 1.5),
        needs="instruction completions",
    ),
    "berkeley-nest/Nectar": Known(
        {
            "prompt": f"\n\nHuman: {Q}\n\nAssistant: ",
            "answers": [
                {"answer": BAD, "model": "x", "rank": 7.0},
                {"answer": GOOD, "model": "y", "rank": 1.0},
                {"answer": FAIR, "model": "z", "rank": 2.0},
            ],
            "turns": 1,
        },
        shape="best_and_worst",
        scores=(-1.0, -7.0),
        needs="prompt answers",
    ),
    "distilabel's generations and ratings": Known(
        {"instruction": Q, "generations": [BAD, GOOD], "ratings": [1, 5]},
        shape="best_and_worst",
        scores=(5.0, 1.0),
        needs="instruction generations ratings",
    ),
}


def reason(value, columns=None):
    with pytest.raises(Drop) as drop:
        read_preference(value, columns)
    return str(drop.value)


def pair(value, columns=None):
    found = read_preference(value, columns)
    return found.messages, found.chosen, found.rejected


@pytest.mark.parametrize("name", SETS)
def test_a_public_set_gives_the_right_pair(name):
    known = SETS[name]
    found = read_preference(known.record)
    assert found.messages == known.messages
    assert (found.chosen, found.rejected) == known.answers
    assert found.scores == known.scores
    assert found.shape == known.shape


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("store", [json.dumps, repr], ids=["as JSON", "as Python"])
def test_a_public_set_whose_lists_are_stored_as_text_gives_the_same_pair(name, store):
    known = SETS[name]
    stored = {}
    for column, value in known.record.items():
        stored[column] = store(value) if isinstance(value, list | dict) else value
    found = read_preference(stored)
    assert found.messages == known.messages
    assert (found.chosen, found.rejected) == known.answers


@pytest.mark.parametrize("name", SETS)
def test_a_public_set_without_a_column_that_it_needs_is_dropped(name):
    known = SETS[name]
    for column in known.needs.split():
        without = {name: value for name, value in known.record.items() if name != column}
        for broken in (without, {**known.record, column: None}, {**known.record, column: {"x": 5}}):
            assert reason(broken)
        if isinstance(known.record[column], list):
            assert reason({**known.record, column: [5]})


@pytest.mark.parametrize("name", SETS)
def test_text_for_a_list_is_dropped_or_read_as_the_text_that_it_is(name):
    known = SETS[name]
    for column, value in known.record.items():
        if isinstance(value, list | dict) and column in known.needs.split():
            try:
                messages, *answers = pair({**known.record, column: "just text"})
            except Drop:
                continue
            assert "just text" in [*answers, messages[-1]["content"]]


def test_the_sets_are_many():
    assert len(SETS) >= 25
    assert {known.shape for known in SETS.values()} | {"labelled_by_columns"} == {
        shape.__name__ for shape in SHAPES
    }


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.__name__)
def test_the_example_of_a_shape_is_of_that_shape_and_stands_in_the_error(shape):
    first_line, _, example = shape.__doc__.partition("\n")
    found = read_preference(json.loads(example))
    assert (found.messages, found.chosen, found.rejected) == ([user(Q)], GOOD, BAD)
    assert found.shape == shape.__name__
    (line,) = [line for line in accepted_columns() if line.endswith(first_line)]
    assert line.strip().startswith(", ".join(json.loads(example)))


# Filled columns that would change the prompt

HALF = (
    "{0} is filled and would change the prompt, but is not understood: "
    "columns={{{0}: null}} leaves it out"
)


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("input", "apple, lead"),
        ("context", "Fruit are eaten."),
        ("question", "Name a metal."),
        ("instruction", "Name a metal."),
        ("messages", [user("Name a metal.")]),
        ("functions", [{"name": "look"}]),
        ("tool_calls", [{"name": "look"}]),
        ("images", ["a.png"]),
        ("video", "a.mp4"),
        ("audio", {"array": [0.5], "sampling_rate": 8}),
        ("image", {"bytes": b"\x89", "path": None}),
        ("documents", ["Fruit are eaten."]),
    ],
)
def test_a_record_is_never_half_read(column, value):
    half = record(Q, GOOD, BAD, **{column: value})
    adds = "columns={input: input} adds it, "
    assert reason(half).replace(adds, "") == HALF.format(column)
    assert (adds in reason(half)) == (column == "input")
    assert pair(half, {column: None}) == ([user(Q)], GOOD, BAD)
    for empty in (None, "", [], float("nan")):
        assert pair(half | {column: empty}) == ([user(Q)], GOOD, BAD)


def test_an_input_that_an_answer_repeats_is_no_part_of_the_prompt_yet():
    given = "He go home at five every day."
    half = record("Mend the grammar.", f"Better than {given!r}: He goes.", BAD, input=given)
    assert "input is filled and would change the prompt" in reason(half)
    assert pair(half, {"input": "input"})[0] == [user(f"Mend the grammar.\n\n{given}")]


def test_an_instruction_keeps_its_input_where_it_is_named_as_the_prompt():
    made = {"instruction": "Name one:", "input": "a fruit", "good": GOOD, "bad": BAD}
    places = {"prompt": "instruction", "chosen": "good", "rejected": "bad"}
    assert pair(made, places)[0] == [user("Name one:\n\na fruit")]


def test_a_prompt_that_was_a_list_of_texts_is_dropped_and_a_list_in_an_answer_is_not():
    why = "malformed: prompt is a list of texts, which are no turns"
    assert reason(record('["Hi there", "and?"]', '["Hello", "x"]', '["No", "y"]')) == why
    for asked in ("[1, 2]: sort it", "[]", "[a]", "[1, 2]"):
        assert pair(record(asked, '["apple"]', BAD)) == ([user(asked)], '["apple"]', BAD)


def test_a_tie_that_only_a_status_tells_is_a_tie():
    for status, scores in (("tie", (0.0, 0.0)), ("unchanged", None)):
        assert read_preference(record(Q, GOOD, BAD, status=status)).scores == scores


def test_what_is_said_in_the_dialogue_anyway_changes_nothing():
    assert pair(record(Q, GOOD, BAD, question=Q, instruction=f" {Q}\n"))
    assert pair({**WHOLE, "prompt": f"\n\nHuman: {Q}\n\nAssistant:", "messages": [user(Q)]})
    assert reason(record(Q, GOOD, BAD, context="fruit")) == HALF.format("context")
    long = "Fruit are eaten, lead is not."
    assert pair(record(f"{long} {Q}", GOOD, BAD, context=long))
    assert reason({**WHOLE, "context": long}) == HALF.format("context")
    assert reason({**WHOLE, "system": "S"} | {"chosen": [system("T"), user(Q), assistant(GOOD)]})


@pytest.mark.parametrize(
    "prompt",
    ["Something else", f"A fruit is red. {Q}", "\n\nHuman: Else?", [system("S"), user(Q)]],
)
def test_a_prompt_beside_dialogues_that_do_not_say_it_is_not_thrown_away(prompt):
    assert reason({"prompt": prompt, **WHOLE}) == HALF.format("prompt")


@pytest.mark.parametrize(
    "prompt",
    [
        [user([{"type": "text", "text": Q}])],
        [user(Q) | {"turn": 1, "timestamp": "2026"}],
        [human(Q)],
        json.dumps([user(Q)]),
        f"Human: {Q}\n\nAssistant:",
    ],
)
def test_a_prompt_beside_dialogues_that_say_it_in_another_form_is_no_fault(prompt):
    assert pair({"prompt": prompt, **WHOLE})[0] == [user(Q)]


def test_a_second_system_message_is_not_lost():
    whole = {name: [system("S"), *turns] for name, turns in WHOLE.items()}
    assert pair(whole | {"system": "S"})[0] == [system("S"), user(Q)]
    assert reason(whole | {"system": "T"}) == HALF.format("system")
    turns = {"conversations": [system("S"), human(Q)], **TEXT}
    assert pair(turns)[0] == [system("S"), user(Q)]
    assert reason(turns | {"system_prompt": "T"}) == HALF.format("system_prompt")


def test_columns_that_are_filled_and_not_used_are_named():
    found = read_preference(SETS["nvidia/HelpSteer3"].record | {"note": None})
    assert found.unused == ("domain", "language", "individual_preference")


# History


@pytest.mark.parametrize(
    "history", [[["Hi", "Hello!"]], '[["Hi", "Hello!"]]', "[['Hi', 'Hello!']]", EARLIER]
)
def test_history_stands_before_the_prompt(history):
    assert pair(record(Q, GOOD, BAD, history=history))[0] == [*EARLIER, user(Q)]
    given = {"instruction": "Pick.", "input": "apple, lead", "system": "S", "history": history}
    messages = [system("S"), *EARLIER, user("Pick.\n\napple, lead")]
    assert pair(given | TEXT)[0] == messages


def test_an_empty_list_that_is_stored_as_text_is_empty():
    empty = dict.fromkeys(["history", "tools", "images", "tool_calls"], "[]")
    assert pair(record(Q, GOOD, BAD, **empty)) == ([user(Q)], GOOD, BAD)
    assert "no prompt" in reason({"messages": "[]", **TEXT})


def test_a_row_of_csv_with_a_cell_too_many_is_read():
    assert pair(record(Q, GOOD, BAD) | {None: ["x"]}) == ([user(Q)], GOOD, BAD)


@pytest.mark.parametrize("history", ["Hi", [["Hi"]], [["Hi", None]], ["Hi", "Hello!"], 5, {"a": 1}])
def test_a_history_that_is_none_is_dropped(history):
    why = "malformed: history is no list of [question, answer]"
    assert reason(record(Q, GOOD, BAD, history=history)) == why


# Turns, and what else a cell may hold


def test_roles_of_other_sets_are_read_and_unknown_ones_dropped():
    turns = [{"speaker": "human", "text": "Hi"}, {"speaker": "agent", "text": "Hello!"}, user(Q)]
    assert pair(record(turns, GOOD, BAD))[0] == [*EARLIER, user(Q)]
    turns = [{"role": "developer", "content": "S"}, user(Q)]
    assert pair(record(turns, GOOD, BAD))[0] == turns
    turns = [{"from": "Human", "value": "Hi"}, {"from": "AI", "value": "Hello!"}, user(Q)]
    assert pair(record(turns, GOOD, BAD))[0] == [*EARLIER, user(Q)]
    why = "prompt has a turn of the unknown role 'moderator'"
    assert reason(record([{"from": "moderator", "value": Q}])) == why


BESIDE = ["reasoning_content", "reasoning", "thinking", "tool_plan", "function_calls", "images"]


@pytest.mark.parametrize("name", BESIDE)
def test_what_stands_beside_an_answers_text_is_not_left_out_without_a_word(name):
    thought = [assistant(GOOD) | {name: "It is a fruit."}]
    assert reason(record(Q, thought, BAD)).startswith(f"chosen has {name} beside a turn's text")
    for nothing in ("", None, False, "[]", {"bytes": None, "path": None}):
        made = record(Q, [assistant(GOOD) | {name: nothing}], BAD)
        assert pair(made) == ([user(Q)], GOOD, BAD)


def test_names_of_columns_are_not_taken_for_answers():
    why = "chosen and rejected are names of columns, not answers"
    assert reason(record(Q, "one", "other", one=GOOD, other=BAD)) == why
    assert pair(record(Q, "prompt", BAD)) == ([user(Q)], "prompt", BAD)


@pytest.mark.parametrize("kind", ["image_url", "image", "input_audio"])
def test_parts_of_text_are_joined_and_other_parts_dropped(kind):
    text_parts = [{"type": "text", "text": "Name "}, {"type": "text", "text": "a fruit."}]
    assert pair(record([user(text_parts)], GOOD, BAD))[0] == [user(Q)]
    parts = [*text_parts, {"type": kind, kind: "x"}]
    why = f"prompt has a part of type {kind!r}: only text is read"
    assert reason(record([user(parts)])) == why


def test_a_list_that_numpy_printed_into_a_cell_is_read():
    turns = [str(turn) for turn in WHOLE["chosen"]]
    printed = "[" + "\n ".join(turns) + "]"
    rejected = printed.replace(GOOD, "It\\'s {\\n} one.")
    assert pair({"chosen": printed, "rejected": rejected}) == ([user(Q)], GOOD, "It's {\n} one.")


def test_text_that_only_looks_like_a_list_is_kept():
    for answer in ("[{'x': 1}] is Python", "[1]", '{"role": "admin", "rights": []}', '{"from": 1'):
        assert pair(record(Q, answer, BAD)) == ([user(Q)], answer, BAD)
    numbered = json.dumps([{"id": 1, **assistant(GOOD)}])
    assert pair(record(Q, numbered, BAD)) == ([user(Q)], GOOD, BAD)
    broken = '[{"role": "assistant", "content": "An app'
    why = "malformed: chosen is a list stored as text that cannot be read"
    assert reason(record(Q, broken, BAD)) == why
    unknown = '[{"role": "admin", "rights": 1}]'
    assert reason(record(Q, unknown, BAD)) == "chosen has a turn of the unknown role 'admin'"
    assert reason(record(Q, "[{'role':" * 10_000, BAD))


@pytest.mark.parametrize(
    "mark", ["[INST]", "<|im_start|>", "<|start_header_id|>", "<start_of_turn>", "### Instruction:"]
)
def test_text_that_a_template_has_written_is_dropped(mark):
    why = "{} is written in a chat template ({}): plain text is wanted"
    assert reason(record(f"{mark} {Q}", GOOD, BAD)) == why.format("prompt", mark)
    assert reason({"chosen": f"<s>{mark} {Q}", "rejected": BAD}) == why.format("chosen", mark)
    turns = f"{Q}\n<extra_id_1>Assistant\nLead\n<extra_id_1>User\nNo."
    assert reason(record(turns, GOOD, BAD)) == why.format("prompt", "<extra_id_1>")
    assert reason(record(Q, GOOD, BAD + "</s>\n")) == why.format("rejected", "</s>")
    assert pair(record(f"What does {mark} mean?", GOOD, BAD))


def test_a_dialogue_as_text_is_split_also_where_the_prompt_is_a_column():
    dialogue = f"Human: {Q}\n\nAssistant:"
    assert pair(record(dialogue, " " + GOOD, " " + BAD)) == ([user(Q)], GOOD, BAD)
    assert pair(record(f"\n\n{dialogue} ", GOOD, BAD)) == ([user(Q)], GOOD, BAD)
    answers = [f"\n\nAssistant: {answer}" for answer in (GOOD, BAD)]
    assert pair(record(f"\n\nHuman: {Q}", *answers)) == ([user(Q)], GOOD, BAD)
    whole = [f"\n\n{dialogue} {answer}" for answer in (GOOD, BAD)]
    assert pair(record(f"\n\n{dialogue}", *whole)) == ([user(Q)], GOOD, BAD)
    assert pair(record(Q, " " + GOOD, BAD)) == ([user(Q)], " " + GOOD, BAD)


def test_a_prompt_that_both_answers_repeat_is_taken_out_of_them():
    asked = "Name a fruit that is red."
    found = read_preference(record(asked, f"{asked}\n{GOOD}", f"{asked} {BAD}"))
    assert (found.chosen, found.rejected, found.repeated) == (GOOD, BAD, True)
    for kept in (record("Hi", "Hi there", "Hi you"), record(asked, f"{asked} {GOOD}", BAD)):
        found = read_preference(kept)
        assert (found.chosen, found.repeated) == (kept["chosen"], False)


def test_a_step_of_an_answer_is_not_taught_to_end():
    step = SETS["xinlai/Math-Step-DPO-10K"].record
    made = encoder().encode(step)
    assert text(made.chosen_ids) == "Think.\nStep 1: so"
    first = encoder().encode(step | {"initial_reason_steps": ""})
    assert text(first.chosen_ids) == " so"
    assert "malformed" in reason(step | {"initial_reason_steps": 5})


# Labels and scores

ALPACA = SETS["tatsu-lab/alpaca_farm"].record
ARENA = SETS["lmsys/chatbot_arena_conversations"].record
STEER = SETS["nvidia/HelpSteer3"].record
SHP = SETS["stanfordnlp/SHP"].record


@pytest.mark.parametrize("value", [1, 1.0, "1", " 1 ", "output_1", "OUTPUT_1"])
def test_a_label_names_the_better_answer(value):
    assert pair(ALPACA | {"preference": value})[1:] == (BAD, GOOD)


def test_labels_turn_the_pair_round():
    assert pair(ARENA | {"winner": "model_a"})[1:] == (BAD, GOOD)
    assert pair(STEER | {"overall_preference": 3})[1:] == (BAD, GOOD)
    assert pair(STEER | {"overall_preference": "-1"})[1:] == (GOOD, BAD)
    assert pair(SHP | {"labels": 1})[1:] == (BAD, GOOD)
    assert pair(SHP | {"labels": "0"})[1:] == (GOOD, BAD)


@pytest.mark.parametrize("tie", ["tie", "tie (bothbad)", "both_bad", "Tie"])
def test_ties_are_dropped(tie):
    assert reason(ARENA | {"winner": tie}) == "tie: winner prefers neither answer"
    why = "tie: overall_preference prefers neither answer"
    assert reason(STEER | {"overall_preference": 0}) == why
    rated = [{"answer": GOOD, "rank": 1}, {"answer": BAD, "rank": 1}]
    assert reason({"prompt": Q, "answers": rated}) == "tie in score"


@pytest.mark.parametrize("value", [3, -1, "good", True, [1], float("nan"), None])
def test_a_label_that_names_neither_answer_is_dropped(value):
    why = reason(ALPACA | {"preference": value})
    assert why.startswith("preference is ") and "names neither answer" in why


@pytest.mark.parametrize("value", [0, "0", 0.0])
def test_labels_that_count_from_0_beside_columns_that_count_from_1_are_not_guessed(value):
    places = {"prompt": "instruction", "input": "input", "a": "output_1", "b": "output_2"}
    for columns in (None, places):
        if columns:
            columns["winner"] = "preference"
        with pytest.raises(InputError, match="so 1 may mean either. Say which: .* a_if: 0"):
            read_preference(ALPACA | {"preference": value}, columns)
    told = columns | {"a_if": 0, "b_if": 1}
    assert read_preference(ALPACA | {"preference": value}, told).chosen == ALPACA["output_1"]
    ties = columns | {"a_if": 1, "b_if": 2}
    with pytest.raises(Drop, match="names neither answer"):
        read_preference(ALPACA | {"preference": value}, ties)
    safe = {"prompt": Q, "response_0": GOOD, "response_1": BAD, "better_response_id": 2}
    with pytest.raises(InputError, match="so 1 may mean either"):
        read_preference(safe)


def test_an_answer_without_a_score_takes_no_part_in_a_ranking():
    rated = [{"text": GOOD, "score": 3}, {"text": FAIR, "score": None}, {"text": BAD, "score": 1}]
    assert pair({"prompt": Q, "responses": rated}) == ([user(Q)], GOOD, BAD)
    assert reason({"prompt": Q, "responses": rated[:2]}) == (
        "fewer than two of responses have a score"
    )
    assert reason({"instruction": Q, "generations": [GOOD, BAD], "ratings": [1]}).startswith(
        "malformed: ratings"
    )


# Tools

LOOK = {"name": "look_up", "description": "Looks a fruit up.", "parameters": {"type": "object"}}
CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": LOOK | {"x": None}}]}
TOOLS = (
    "{% if tools %}{% for t in tools %}[{{ t.function.name }}]{% endfor %}{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for c in m.tool_calls or [] %}({{ c.function.name }}){% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
DIALOGUE = [user(Q), CALL, {"role": "tool", "content": "apple", "name": "look_up"}]


@pytest.mark.parametrize("write", [lambda tools: tools, json.dumps])
@pytest.mark.parametrize("tool", [LOOK, {"type": "function", "function": LOOK}])
def test_tools_and_calls_are_rendered_by_the_template(tool, write):
    made = record(DIALOGUE, GOOD, BAD, tools=write([tool]))
    found = encoder(build_tokenizer(TOOLS)).encode(made)
    rendered = text(found.prompt_ids)
    assert rendered.startswith("[look_up]<|im_start|>user\nName a fruit.")
    assert "<|im_start|>assistant\n(look_up)<|im_end|>" in rendered
    assert "<|im_start|>tool\napple<|im_end|>" in rendered


def test_what_a_template_leaves_out_is_dropped_and_said():
    call = CALL | {"tool_calls": [{"function": {"name": "f"}}]}  # a letter of the prompt
    for calls in (CALL, call):
        with pytest.raises(Drop, match="^the chat template leaves out tool calls$"):
            encoder().encode(record([user(Q), calls, *DIALOGUE[2:]], GOOD, BAD))
    with pytest.raises(Drop, match="^the chat template leaves out the tools$"):
        encoder().encode(record(Q, GOOD, BAD, tools=[LOOK]))
    deaf = CHATML.replace("{% for m in messages %}", "{% for m in messages if m.role == 'user' %}")
    with pytest.raises(Drop, match="^the chat template leaves out the turns of role developer$"):
        turns = [{"role": "developer", "content": "a fruit"}, user(Q)]
        encoder(build_tokenizer(deaf)).encode(record(turns, GOOD, BAD))


def test_text_beside_a_call_that_a_template_leaves_out_is_dropped_and_said():
    silent = TOOLS.replace("{{ m.content }}", "{{ '' if m.tool_calls else m.content }}")
    turns = [user(Q), CALL | {"content": "I look."}, *DIALOGUE[2:]]
    with pytest.raises(Drop, match="^the chat template leaves out the text beside tool calls$"):
        encoder(build_tokenizer(silent)).encode(record(turns, GOOD, BAD))
    assert encoder(build_tokenizer(silent)).encode(record(DIALOGUE, GOOD, BAD))


@pytest.mark.parametrize("arguments", [{"x": "é"}, '{"x": "é"}'])
@pytest.mark.parametrize(
    "written, expected",
    [("c.function.arguments | string", "{'x': 'é'}"), ("'' + c.function.arguments", '{"x": "é"}')],
)
def test_a_call_keeps_its_id_and_has_its_arguments_as_the_template_takes_them(
    arguments, written, expected
):
    template = TOOLS.replace("({{ c.function.name", f"({{{{ c.id + {written} + c.function.name")
    call = {"id": "abcdefghi", "function": {"name": "look", "arguments": arguments}}
    turns = [user(Q), CALL | {"tool_calls": [call]}, *DIALOGUE[2:]]
    rendered = text(encoder(build_tokenizer(template)).encode(record(turns, GOOD, BAD)).prompt_ids)
    assert f"(abcdefghi{expected}look)" in rendered


@pytest.mark.parametrize("write", [lambda options: options, json.dumps])
def test_a_records_options_reach_the_chat_template(write):
    template = CHATML.replace("assistant\n{% endif", "assistant\n{{ start or '' }}{% endif")
    given = record(Q, GOOD, BAD, chat_template_kwargs=write({"start": "<think>", "other": None}))
    prompt = text(encoder(build_tokenizer(template)).encode(given).prompt_ids)
    assert prompt == text(encoder().encode(record(Q, GOOD, BAD)).prompt_ids) + "<think>"
    assert read_preference(given).unused == ()
    assert "chat_template_kwargs is no mapping" in reason(given | {"chat_template_kwargs": "x"})


def test_function_calls_of_sharegpt_are_tool_calls():
    call = {"from": "function_call", "value": json.dumps({"name": "look_up", "arguments": "{}"})}
    turns = [human(Q), call, {"from": "observation", "value": "apple"}]
    messages = pair({"conversations": turns, "chosen": gpt(GOOD), "rejected": gpt(BAD)})[0]
    function = {"name": "look_up", "arguments": {}}
    assert messages[1]["tool_calls"] == [{"type": "function", "function": function}]
    assert messages[2] == {"role": "tool", "content": "apple"}
    broken = {"from": "function_call", "value": "look_up()"}
    assert "no list of functions" in reason({"conversations": [human(Q), broken], **TEXT})


def test_tools_that_are_a_list_of_texts_are_read():
    tool = {"type": "function", "function": {"name": "look_up", "description": "words"}}
    found = read_preference(record(Q, GOOD, BAD, tools=[json.dumps(tool["function"])]))
    assert found.tools == [tool]


def test_an_answer_that_is_a_tool_call_is_dropped():
    why = "chosen ends with a tool call, which is no text"
    assert reason(record(Q, [CALL], BAD)) == why


# Names of one's own

OWN = {"ask": Q, "good": GOOD, "bad": BAD, "persona": "Be brief.", "s1": 2, "s2": "1.5", "x": 1}


def test_columns_say_where_a_record_has_what():
    places = {
        "prompt": "ask",
        "chosen": "good",
        "rejected": "bad",
        "system": "persona",
        "score_chosen": "s1",
        "score_rejected": "s2",
    }
    found = read_preference(OWN, places)
    assert (found.messages, found.chosen, found.rejected) == (
        [system("Be brief."), user(Q)],
        GOOD,
        BAD,
    )
    assert (found.scores, found.unused) == ((2.0, 1.5), ("x",))
    why = "malformed: good is neither text nor a list of {role, content}"
    assert reason(OWN | {"good": 5}, places) == why
    assert pair(OWN | {"prompt": "hidden by ask", "input": "metal"}, places | {"input": None})
    joined = read_preference(OWN | {"about": "lead"}, places | {"input": "about"})
    assert joined.messages[-1] == user(f"{Q}\n\nlead")


@pytest.mark.parametrize(
    ("first", "second", "values"),
    [
        ("output_1", "output_2", [1, "2", "output_2", "b", "model_b", "B"]),
        ("reply0", "reply1", [0, 1, "reply1", "b"]),
        ("left", "right", ["left", "right", "B", "b"]),
        ("reply_b", "reply_a", ["b", "a", "A", "model_a", "reply_a"]),
    ],
)
def test_columns_of_two_answers_and_a_label(first, second, values):
    places = {"prompt": "ask", "a": first, "b": second, "winner": "pick"}
    for value in values:
        made = {"ask": Q, first: GOOD, second: BAD, "pick": value}
        turned = value != values[0]
        assert pair(made, places)[1:] == ((BAD, GOOD) if turned else (GOOD, BAD))
    assert reason({"ask": Q, first: GOOD, second: BAD, "pick": "tie"}, places).startswith("tie: ")


def test_the_number_of_a_model_is_no_label():
    places = {"prompt": "ask", "a": "gpt2", "b": "llama3", "winner": "pick"}
    for value in (1, 2, 3):
        made = {"ask": Q, "gpt2": GOOD, "llama3": BAD, "pick": value}
        assert reason(made, places).startswith(f"pick is {value}, which names neither answer")


@pytest.mark.parametrize("value", [0, 1, 2, True, "yes", ""])
def test_a_label_that_may_mean_either_answer_is_not_guessed(value):
    places = {"prompt": "ask", "a": "left", "b": "right", "winner": "pick"}
    made = {"ask": Q, "left": GOOD, "right": BAD, "pick": value}
    assert "names neither answer" in reason(made, places)
    said = places | {"a_if": 1, "b_if": 0}
    if value in (0, 1) and value is not True:
        assert pair(made, said)[1:] == ((GOOD, BAD) if value else (BAD, GOOD))


LABEL = {"a": "left", "b": "right", "winner": "pick"}


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"chosen": "x", "rejected": "x"}, "chosen and rejected are both 'x': change one"),
        ({**LABEL, "b": "x", "a": "x"}, "a and b are both 'x': change one"),
        ({**LABEL, "a_if": 1, "b_if": 1}, "a_if and b_if are both 1: change one"),
        ({**LABEL, "a_if": "A", "b_if": "a"}, "a_if and b_if are both 'A': change one"),
        ({"answer": "good"}, "no place 'answer'.*Places are prompt, input, system"),
        ({"promt": "ask"}, "no place 'promt', did you mean prompt?"),
        ({"ask": "prompt"}, "no place 'ask', did you mean prompt: ask?"),
        ({"chosen": "good"}, "chosen and rejected belong together, without rejected they"),
        ({"a": "x", "b": "y"}, "a and b and winner belong together, without winner they"),
        ({"a": "x", "b": "y", "winner": "z", "a_if": 1}, "a_if and b_if belong together"),
        ({"a_if": 1, "b_if": 2}, "a_if and b_if are values of winner: name a, b and winner too"),
        ({"prompt": 5}, "prompt takes the name of a column, not 5"),
    ],
)
def test_places_that_there_are_not_or_half_of_them_are_refused(columns, message, tmp_path):
    with pytest.raises(InputError, match=message):
        check_places(columns)
    path = tmp_path / "config.yaml"
    path.write_text(json.dumps({"columns": columns}))
    with pytest.raises(InputError, match=message):
        read_config(path)


def test_a_record_of_a_joined_set_without_the_named_columns_is_read_as_it_is():
    places = {"prompt": "instruction", "chosen": "good", "rejected": "bad"}
    found = read_preference(record(Q, GOOD, BAD, source="x"), places)
    assert (found.messages, found.unused) == ([user(Q)], ("source",))
    assert "input is filled and would" in reason(record(Q, GOOD, BAD, input="metadata"), places)


def test_a_labels_value_is_no_columns_name():
    places = {"a": "x", "b": "y", "winner": "better", "a_if": "system", "b_if": "other"}
    value = {"system": "S", "prompt": Q, "x": GOOD, "y": BAD, "better": "system"}
    assert pair(value, places) == ([system("S"), user(Q)], GOOD, BAD)


def test_answers_that_the_setting_names_win_over_a_sets_own_a_and_b():
    value = {"prompt": "Q", "a": "one", "b": "two", "winner": "a", "good": "best", "bad": "worst"}
    found = read_preference(value, {"chosen": "good", "rejected": "bad"})
    assert (found.chosen, found.rejected) == ("best", "worst")


def test_both_ways_to_name_the_answers_at_once_are_refused():
    names = dict.fromkeys(["chosen", "rejected", "a", "b", "winner"], "x")
    with pytest.raises(InputError, match="give chosen and rejected, or a, b and winner, not both"):
        check_places(names)


def test_columns_are_set_in_the_file_or_on_the_command_line(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("columns: {prompt: ask, images: null}\n")
    (config,), varied = read_config(path)
    assert (config.columns, varied) == ({"prompt": "ask", "images": None}, [])
    (config,), _ = read_config(path, ["columns={chosen: good, rejected: bad}"])
    assert config.columns == {"chosen": "good", "rejected": "bad"}


def test_a_column_that_no_record_has_is_refused_with_those_that_there_are(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"x": 1}, OWN])
    places = {"prompt": "asked", "chosen": "good", "rejected": "bad"}
    with pytest.raises(InputError) as error:
        load_pairs(data_config(path, columns=places))
    assert str(error.value) == (
        "columns: no record has a column 'asked', did you mean ask? "
        "There are: ask, bad, good, persona, s1, s2, x"
    )
    train, _, drops = load_pairs(data_config(path, columns=places | {"prompt": "ask"}))
    assert (len(train), drops["train"].total()) == (1, 1)
    check_columns(places | {"prompt": "ask", "a_if": 1}, [OWN])
    with pytest.raises(InputError, match="no record has a column 'images'"):
        check_columns({"images": None}, [OWN])


# What is counted and said of a whole set


def test_pairs_in_both_directions_and_repeated_prompts_are_counted_and_said(tmp_path, capsys):
    asked = "Name a fruit that is red."
    rows = [
        record(Q, GOOD, BAD),
        record(Q, BAD, GOOD),
        record(Q, BAD, GOOD),
        record(Q, GOOD, FAIR),
        record(asked, f"{asked} {GOOD}", f"{asked} {BAD}"),
    ]
    train, _, _ = load_pairs(data_config(write_jsonl(tmp_path / "a.jsonl", rows)))
    assert len(train) == 5
    said = capsys.readouterr().out
    assert "!!! 3 train pairs stand in the set the other way round too; used as is !!!" in said
    assert "!!! 1 of 5 train pairs repeat the prompt at the beginning of both answers" in said


def test_a_pair_keeps_its_shape_and_the_columns_that_were_not_used():
    made = encoder().encode(SETS["berkeley-nest/Nectar"].record)
    assert (made.shape, made.unused) == ("best_and_worst", ("turns",))
    assert text(made.prompt_ids) == chatml([user(Q)])


def test_drops_of_a_mixed_set_are_counted_by_reason(tmp_path):
    rows = [known.record for known in SETS.values()]
    rows += [ARENA | {"winner": "tie"}, record(Q, GOOD, BAD, images=["a.png"]), {"x": 1}]
    train, _, drops = load_pairs(data_config(write_jsonl(tmp_path / "a.jsonl", rows)))
    assert len(train) == len(SETS)
    assert drops["train"] == {
        "tie: winner prefers neither answer": 1,
        HALF.format("images"): 1,
        "unknown columns: ['x']": 1,
    }
