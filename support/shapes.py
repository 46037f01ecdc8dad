"""Which columns of a preference set mean what: a record in, a Preference or a Drop out.

ANSWER_SHAPES finds the two answers and which is better, PROMPT_SHAPES what was asked; each shape is
a function with an example in its docstring. A set that fits none is taken by the setting `columns`.
"""

import json
from dataclasses import dataclass

from support.errors import InputError
from support.turns import TEMPLATED, Drop, drop_if, turns_of

# Columns by name. A new name goes into one of these tables, a new structure into the shapes below.
ANSWERS = (
    ("chosen", "rejected"),
    ("chosen_response", "rejected_response"),
    ("preferred_output", "non_preferred_output"),
    ("response_j", "response_k"),
    ("response_chosen", "response_rejected"),
    ("accepted", "rejected"),
)
BY_SIGN = {-3: 0, -2: 0, -1: 0, 1: 1, 2: 1, 3: 1}  # negative: the first is better
LABELLED = (  # two answers, the label, and which answer its values name
    ("output_1", "output_2", "preference", {1: 0, 2: 1}),
    ("human_ref_A", "human_ref_B", "labels", {1: 0, 0: 1}),
    ("response_0", "response_1", "better_response_id", {0: 0, 1: 1}),
    ("response1", "response2", "overall_preference", BY_SIGN),
    ("response_1", "response_2", "preference_strength", BY_SIGN),
    ("conversation_a", "conversation_b", "winner", {"model_a": 0, "model_b": 1}),
)
TIES = {0, "tie", "tie (bothbad)", "both_bad"}
RANKED = (("completions", "response"), ("answers", "answer"))
SCORES = (
    "score_{}",
    "{}_score",
    "{}_avg_rating",
    "{}_rating",
    "{}-rating",
    "rating_{}",
)  # of chosen, rejected
SYSTEMS = ("system", "system_prompt")
CHANGES_THE_PROMPT = (
    *("prompt", "instruction", "question", "input", "context", "history", *SYSTEMS),
    *("tools", "functions", "tool_calls", "documents", "image", "images", "videos", "audios"),
)
MAPPED = ("prompt", "chosen", "rejected", "system", "score_chosen", "score_rejected")
MAPPED_LABEL = ("a", "b", "winner", "a_if", "b_if")
NAMES_OF_TWO = {"a": 0, "b": 1, "A": 0, "B": 1, "model_a": 0, "model_b": 1}


@dataclass(frozen=True)
class Preference:
    """What a record says: a prompt, and a better and a worse answer to it."""

    messages: list[
        dict
    ]  # the prompt's turns {"role", "content"}; the last is the user's or a tool's
    chosen: str
    rejected: str
    scores: tuple[float, float] | None  # of chosen and rejected
    shape: str  # the names of the shapes that took the answers and the prompt
    unused: tuple[str, ...]  # filled columns that were not read
    tools: list | None = None  # descriptions of tools, for the chat template


@dataclass(frozen=True)
class Answers:
    """The two answers of a record as they stand in it."""

    names: tuple[str, str]  # their columns, better one first
    values: tuple
    scores: tuple[float, float] | None = None


class Columns:
    """A record's columns, which notes those that are read."""

    def __init__(self, record):
        self.record = record
        self.read = set()

    def has(self, *names):
        """Whether there are columns of all these names."""
        return self.record.keys() >= set(names)

    def filled(self, *names):
        """The first of some columns that holds something, or None."""
        for name in names:
            value = self.record.get(name)
            if value is not None and value != "" and value != [] and value != {}:
                return name
        return None

    def take(self, name):
        """A column's value."""
        self.read.add(name)
        return self.record[name]


def chosen_and_rejected(columns):
    """{"prompt": "Name a fruit.", "chosen": "An apple.", "rejected": "No."}"""
    for names in ANSWERS:
        if columns.has(*names):
            return Answers(names, (columns.take(names[0]), columns.take(names[1])))
    return None


def two_answers_and_a_label(columns):
    """{"instruction": "A fruit?", "output_1": "No.", "output_2": "An apple.", "preference": 2}"""
    for first, second, label, winners in LABELLED:
        if columns.has(first, second, label):
            winner = _winner(columns.take(label), label, winners)
            names = (first, second) if winner == 0 else (second, first)
            return Answers(names, (columns.take(names[0]), columns.take(names[1])))
    return None


def _winner(value, label, winners):
    """Which of two answers a label names: 0 or 1."""
    value = _plain(value)
    known = isinstance(value, str | int | float) and value in winners
    if not known:
        drop_if(isinstance(value, str | int | float) and value in TIES, f"tie in {label}")
        raise Drop(f"malformed: {label} is {value!r:.40}, which names no answer")
    return winners[value]


def _plain(value):
    """A label without the space around it; a number also where a CSV cell holds it as text."""
    if not isinstance(value, str):
        return value
    number = _number(value)
    return value.strip() if number is None else number


def ranked_answers(columns):
    """{"prompt": "Name a fruit.", "answers": [{"answer": "An apple.", "rank": 1}, ...]}"""
    for column, text in RANKED:
        if isinstance(columns.record.get(column), list):
            return _best_and_worst(columns.take(column), column, text)
    return None


def _best_and_worst(found, column, text):
    """The two ends of a ranking, a list of answers with a score or a rank each."""
    scored = []
    for item in found:
        drop_if(not isinstance(item, dict) or text not in item, f"malformed: {column}")
        scored.append((_score(item, column), item[text]))
    drop_if(len(scored) < 2, f"fewer than two answers in {column}")
    best = max(scored, key=lambda pair: pair[0])
    worst = min(scored, key=lambda pair: pair[0])
    drop_if(best[0] == worst[0], "tie in score")
    return Answers((column, column), (best[1], worst[1]), (best[0], worst[0]))


def _score(item, column):
    """How good one of several answers is; a rank of 1 is the best."""
    for name, sign in (("overall_score", 1), ("fine-grained_score", 1), ("rank", -1)):
        number = _number(item.get(name))
        if number is not None:
            return sign * number
    raise Drop(f"malformed: {column} without a score or a rank")


ANSWER_SHAPES = (chosen_and_rejected, two_answers_and_a_label, ranked_answers)


def a_prompt(columns):
    """{"prompt": "Name a fruit."}, or question"""
    return _take_filled(columns, "prompt", "question")


def an_instruction(columns):
    """{"instruction": "Translate.", "input": "Apfel"}, joined by an empty line"""
    if not columns.filled("instruction"):
        return None
    turns = turns_of(columns.take("instruction"), "instruction", "user")
    if columns.filled("input") and turns:
        added = columns.take("input")
        drop_if(not isinstance(added, str), "malformed: input is no text")
        last = turns[-1]
        return [*turns[:-1], last | {"content": f"{last['content']}\n\n{added}"}]
    return turns


def a_context(columns):
    """{"context": [{"role": "user", "content": "Name a fruit."}]}, or input, or history as text"""
    return _take_filled(columns, "context", "input", "history")


def a_conversation(columns):
    """{"conversations": [{"from": "human", "value": "Name a fruit."}]}, or messages"""
    return _take_filled(columns, "conversations", "messages")


def _take_filled(columns, *names):
    """The turns of the first of some columns that holds something, or None."""
    name = columns.filled(*names)
    if name is None:
        return None
    return turns_of(columns.take(name), name, "user")


PROMPT_SHAPES = (a_prompt, an_instruction, a_context, a_conversation)


def accepted_columns():
    """What is accepted, as lines for an error message: the examples of all shapes."""
    lines = ["Accepted are these columns, with any others beside them:"]
    for shape in (*ANSWER_SHAPES, *PROMPT_SHAPES):
        lines.append(f"  {shape.__doc__}")
    lines.append("Instead of text also {role, content} or {from, value}, lists of them, and")
    lines.append(r'  "\n\nHuman: ...\n\nAssistant: ..."; answers may hold the prompt')
    for names in ANSWERS[1:]:
        lines.append(f"  {names[0]}, {names[1]} are chosen and rejected")
    for first, second, label, _ in LABELLED:
        lines.append(f"  {first}, {second}, {label}")
    lines.append("Other names: columns={prompt: question, chosen: good, rejected: bad}, or with a")
    lines.append("  label columns={prompt: question, a: output_1, b: output_2, winner: label}")
    return "\n".join(lines)


def check_mapping(columns):
    """Refuse a setting `columns` that names no two answers, or meanings that there are not.

    raises   InputError with what to type instead
    """
    unknown = sorted(set(columns) - {*MAPPED, *MAPPED_LABEL})
    labelled = columns.keys() >= {"a", "b", "winner"}
    labelled = labelled and ("a_if" in columns) == ("b_if" in columns)
    if not unknown and (labelled or columns.keys() >= {"chosen", "rejected"}):
        return
    fault = f"{unknown[0]} is no meaning of a column" if unknown else "two answers are not named"
    raise InputError(
        f"columns: {fault}. Write {{prompt: question, chosen: good, rejected: bad}}, with system, "
        "score_chosen, score_rejected if you like, or with a label "
        "{prompt: question, a: output_1, b: output_2, winner: label, a_if: 1, b_if: 2}"
    )


def absent_columns(columns, record):
    """Those columns of the setting `columns` that a record does not have."""
    absent = []
    for meaning, column in columns.items():
        if meaning not in ("a_if", "b_if") and column not in record:
            absent.append(column)
    return absent


def _rename(record, columns):
    """A record with its columns under the names that ANSWERS and PROMPT_SHAPES know."""
    if absent_columns(columns, record):
        return record  # one of another set, read by its own names
    renamed = {name: value for name, value in record.items() if name not in columns.values()}
    for meaning, column in columns.items():
        if meaning in MAPPED:
            renamed[meaning] = record[column]
    if "winner" in columns:
        first, second = record[columns["a"]], record[columns["b"]]
        if _mapped_winner(record[columns["winner"]], columns) == 1:
            first, second = second, first
        renamed["chosen"], renamed["rejected"] = first, second
    return renamed


def _mapped_winner(value, columns):
    """Which answer the mapped label names; a bare number only by a_if and b_if."""
    if "a_if" in columns:
        winners = {_plain(columns["a_if"]): 0, _plain(columns["b_if"]): 1}
    else:
        winners = NAMES_OF_TWO | {columns["a"]: 0, columns["b"]: 1}
        is_number = _number(value) is not None
        drop_if(is_number, f"winner is {value!r:.40}: say which it names, as in a_if: 1, b_if: 2")
    return _winner(value, columns["winner"], winners)


def read_preference(record, columns=None):
    """One record as a Preference.

    columns  the setting of that name, {meaning: column}, or None
    raises   Drop with the reason if the record is of no known shape, or not taken right by one
    """
    drop_if(not isinstance(record, dict), f"not a record but {type(record).__name__}")
    if columns:
        record = _rename(record, columns)
    cells = Columns(record)
    answers = None
    for answer_shape in ANSWER_SHAPES:
        answers = answer_shape(cells)
        if answers is not None:
            break
    drop_if(answers is None, f"unknown columns: {sorted(map(str, record))}"[:200])

    system = _system(cells)
    dialogues = []
    for name, value in zip(answers.names, answers.values, strict=True):
        dialogues.append(turns_of(value, name))
    starts = [turns[0]["role"] if turns else "assistant" for turns in dialogues]
    prompt_shape, asked = "whole_dialogues", []
    if "assistant" in starts:
        prompt_shape, asked = _asked(cells)
    elif cells.filled("prompt"):  # the beginning of the dialogues once more
        turns_of(cells.take("prompt"), "prompt", "user")
    dialogues = [_join(system, asked, turns) for turns in dialogues]
    messages, texts = _last_answers(dict(zip(("chosen", "rejected"), dialogues, strict=True)))
    if cells.filled("initial_reason_steps"):
        begun = cells.take("initial_reason_steps")
        drop_if(not isinstance(begun, str), "malformed: initial_reason_steps is no text")
        texts = [begun + text for text in texts]
    tools = _tools(cells)
    _check(messages, texts)
    if not columns:
        _refuse_half_read(cells, messages)
    scores = answers.scores or _scores(cells)
    unused = tuple(name for name in record if name not in cells.read and cells.filled(name))
    return Preference(
        messages=messages,
        chosen=texts[0],
        rejected=texts[1],
        scores=scores,
        shape=f"{answer_shape.__name__}, {prompt_shape}",
        unused=unused,
        tools=tools,
    )


def _system(cells):
    """The system message of a column, as turns."""
    name = cells.filled(*SYSTEMS)
    if name is None:
        return []
    return turns_of(cells.take(name), name, "system")


def _asked(cells):
    """The shape that took the prompt, and its turns; none where no column holds one."""
    for shape in PROMPT_SHAPES:
        turns = shape(cells)
        if turns is not None:
            return shape.__name__, _history(cells) + turns
    return "no prompt", []


def _history(cells):
    """LLaMA-Factory's earlier questions and answers, [["Hi", "Hello!"], ...], as turns."""
    if not isinstance(cells.record.get("history"), list):
        return []
    turns = []
    for exchange in cells.take("history"):
        drop_if(not isinstance(exchange, list) or len(exchange) != 2, "malformed: history")
        for role, said in zip(("user", "assistant"), exchange, strict=True):
            drop_if(not isinstance(said, str), "malformed: history")
            turns.append({"role": role, "content": said})
    return turns


def _join(system, prompt, turns):
    """A dialogue: an answer's turns, after what of system message and prompt is not in them."""
    if turns and turns[0]["role"] == "assistant":
        turns = _closed(prompt, turns) + turns
    if not system or not turns:
        return turns
    if turns[0]["role"] not in ("system", "developer"):
        return system + turns
    same = turns[0]["content"].strip() == system[0]["content"].strip()
    drop_if(not same, "malformed: the system column and the dialogue's system message differ")
    return turns


def _closed(prompt, answer):
    """A prompt without the empty assistant's turn at the end of a transcript, "...Assistant:"."""
    if not prompt or prompt[-1] != {"role": "assistant", "content": ""}:
        return prompt
    answer[0] = answer[0] | {"content": answer[0]["content"].removeprefix(" ")}
    return prompt[:-1]


def _last_answers(dialogues):
    """The turns before the last answers, which must be the same, and the texts of those answers.

    dialogues  {"chosen": turns, "rejected": turns}
    """
    for column, turns in dialogues.items():
        ended = len(turns) > 1 and turns[-1]["role"] == "assistant"
        fault = f"malformed: no prompt before {column}, or no assistant's turn at its end"
        drop_if(not ended, fault)
    (*messages, chosen), (*others, rejected) = dialogues.values()
    drop_if(messages != others, "malformed: chosen and rejected differ before the last answer")
    for answer in (chosen, rejected):
        drop_if("tool_calls" in answer, "the answer is a tool call: only text is trained on")
    return messages, [chosen["content"], rejected["content"]]


def _check(messages, texts):
    """Drop a prompt that asks nothing, or text that is already written for another model."""
    last = messages[-1]
    asked = last["role"] in ("user", "tool") and last["content"].strip()
    asked = asked and any(turn["role"] == "user" for turn in messages)
    drop_if(not asked, "malformed: the prompt does not end with a user's turn")
    for turn in messages:
        drop_if(
            TEMPLATED.match(turn["content"]),
            "written in a chat template already: plain text is wanted, without its marks",
        )
    question = last["content"].strip()
    repeated = len(question) >= 20 and all(text.lstrip().startswith(question) for text in texts)
    drop_if(repeated, "malformed: both answers begin with the prompt; leave it out of them")


def _tools(cells):
    """The descriptions of tools that a record gives, or None."""
    given = cells.record.get("input")
    if isinstance(given, dict) and given.get("tools"):
        return given["tools"]
    if not cells.filled("tools"):
        return None
    tools = cells.take("tools")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except ValueError as error:
            raise Drop("malformed: tools is no list") from error
    drop_if(not isinstance(tools, list), "malformed: tools is no list")
    return tools or None


def _refuse_half_read(cells, messages):
    """Drop a record with a filled column that would change the prompt and was not read.

    What stands in the prompt already changes nothing.
    """
    texts = [turn["content"] for turn in messages]
    for name in CHANGES_THE_PROMPT:
        if name in cells.read or not cells.filled(name):
            continue
        value = cells.record[name]
        known = isinstance(value, str) and any(value.strip() in text for text in texts)
        drop_if(not known, f"{name} is filled, and not understood beside the other columns")


def _scores(cells):
    """The pair's scores as two floats, or None."""
    for pattern in SCORES:
        names = [pattern.format("chosen"), pattern.format("rejected")]
        if cells.has(*names):
            scores = [_number(cells.take(name)) for name in names]
            if None not in scores:
                return tuple(scores)
    return None


def _number(value):
    """A cell as a float, or None."""
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return None
