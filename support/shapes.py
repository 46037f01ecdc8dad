"""Which columns of a record make a pair: the shapes of preference sets, in one table.

A shape finds the two answers and which of them is chosen; the prompt is found alike for all. A new
name goes into one of the tuples, a new structure into a function that SHAPES, at the end, lists.
"""

import contextlib
import json
import math
from dataclasses import dataclass, field
from statistics import fmean

from support.columns import EXAMPLES, LABEL_VALUES, columns_of, under_known_names
from support.labels import as_label, by_label, names_of
from support.turns import (
    Drop,
    as_tools,
    as_turns,
    drop_if,
    first_of,
    is_filled,
    parsed,
    texts_in,
    without_nulls,
)

SYSTEMS = ("system", "system_prompt")
DIALOGUES = ("messages", "conversations")
QUESTIONS = ("prompt", "instruction", "question", "query", *DIALOGUES)
PROMPTS = (*QUESTIONS, "context", "history", "input")  # the first that is filled holds the prompt
# What else would change a prompt: a record in which one of these is filled but not used is dropped.
TOOLS = ("tools", "functions", "tool_calls")
ATTACHED = ("documents", "image", "images", "video", "videos", "audio", "audios")
OF_A_PROMPT = (*SYSTEMS, *PROMPTS, *TOOLS, *ATTACHED)
ANSWERS = (
    ("chosen", "rejected"),
    ("chosen_response", "rejected_response"),
    ("response_chosen", "response_rejected"),
    ("response_j", "response_k"),
    ("accepted", "rejected"),
)
# {} is chosen or rejected
SCORES = ("score_{}", "{}_score", "{}_avg_rating", "{}_rating", "{}-rating", "rating_{}")
REWARDS = ("reward_{}", "{}_reward", "{}_rm_score")
LABELLED = (  # two answers, and what names the better one
    ("output_1", "output_2", "preference"),
    ("response_0", "response_1", "better_response_id"),
    ("conversation_a", "conversation_b", "winner"),
    ("response_a", "response_b", "winner"),
)
COMPARED = (  # two answers, and a number that is below zero where the first is better
    ("response1", "response2", "overall_preference"),
    ("response_1", "response_2", "preference_strength"),
)
RANKED = ("completions", "answers", "responses", "generations")
RATINGS = ("ratings", "scores", "rewards")  # of a list of texts, beside it
# of an answer in a list
TEXTS = ("response", "answer", "content", "text", "completion", "output")
SCORE_OF_ONE = ("overall_score", "score", "rating", "reward")


@dataclass(frozen=True)
class Preference:
    """A record's pair, as text."""

    messages: list[dict]  # the prompt's turns {"role", "content", ...}, ending before the answer
    chosen: str
    rejected: str
    scores: tuple[float, float] | None
    shape: str  # name of the function of SHAPES that took it
    unused: tuple[str, ...]  # filled columns that were not used
    tools: list[dict] | None = None  # functions for the chat template to describe
    template_options: dict | None = None  # what else it reads, such as enable_thinking
    is_whole: bool = True  # whether the answers come to their end; False for a step of them
    repeated: bool = False  # whether both answers began with the prompt, which is taken out


@dataclass(frozen=True)
class Answers:
    """What a shape finds: two cells, what a reason calls them, and their scores if any."""

    names: tuple[str, str]
    chosen: object
    rejected: object
    scores: tuple[float, float] | None = None


@dataclass
class Fields:
    """A record's columns under the names known here, and which of them were used."""

    record: dict
    columns: dict  # the setting of this name
    used: set[str] = field(default_factory=set)

    def has(self, *columns):
        """Whether the record has all of these columns."""
        return self.record.keys() >= set(columns)

    def find(self, *columns):
        """The first of these columns that is filled, which is used from now on; or None."""
        for column in columns:
            if is_filled(self.record.get(column)):
                self.used.add(column)
                return column
        return None

    def take(self, *columns):
        """The value of the first of these columns that is filled, or None."""
        column = self.find(*columns)
        return None if column is None else self.record[column]

    def answers(self, chosen, rejected, scores=None):
        """Answers of two columns, filled or not."""
        self.used |= {chosen, rejected}
        names = (self.name(chosen), self.name(rejected))
        return Answers(names, self.record[chosen], self.record[rejected], scores)

    def name(self, column):
        """What the set itself calls a column."""
        return self.columns.get(column) or column


def read_preference(record, columns=None):
    """A record's pair.

    record   mapping of columns
    columns  the setting of this name, {place: the record's column}, or None
    returns  Preference
    raises   Drop with the reason if the record is of none of the SHAPES, is malformed, or has a
             filled column OF_A_PROMPT that is not understood
    """
    drop_if(not isinstance(record, dict), f"not a record but {type(record).__name__}")
    columns = columns_of(record, columns)
    fields = Fields(under_known_names(record, columns), columns)
    shape, answers = _find_answers(fields)
    dialogues, holds_prompt = _find_dialogues(fields, answers)
    messages, *ends = _split(dialogues)
    _drop_if_half_read(fields, holds_prompt, messages, ends)

    chosen, rejected = ends[0]["content"], ends[1]["content"]
    asked = messages[-1]["content"]
    repeated = isinstance(answers.chosen, str) and _both_begin_with(asked, chosen, rejected)
    if repeated:
        chosen = chosen.removeprefix(asked).lstrip()
        rejected = rejected.removeprefix(asked).lstrip()
    begun = fields.take("initial_reason_steps") or ""
    drop_if(not isinstance(begun, str), "malformed: initial_reason_steps is not text")
    tools = fields.take("tools")
    options = _template_options(fields)
    return Preference(
        messages,
        begun + chosen,
        begun + rejected,
        answers.scores,
        shape,
        _unused(record, fields),
        as_tools(tools) if tools else None,
        options,
        is_whole=not fields.has("initial_reason_steps"),
        repeated=repeated,
    )


def _template_options(fields):
    """What a record gives its chat template besides turns and tools, or None."""
    options = parsed(fields.take("chat_template_kwargs"))
    fault = "malformed: chat_template_kwargs is no mapping"
    drop_if(not isinstance(options, dict | None), fault)
    return without_nulls(options)


def _unused(record, fields):
    """The columns of a record that are filled and were not used, in its order."""
    used = {fields.name(column) for column in fields.used}
    unused = []
    for column, value in record.items():
        if column not in used and is_filled(value):
            unused.append(str(column))
    return tuple(unused)


def _find_answers(fields):
    """The name of the first of the SHAPES that fits, and what it finds."""
    for shape in SHAPES:
        answers = shape(fields)
        if answers is not None:
            return shape.__name__, answers
    raise Drop(f"unknown columns: {sorted(map(str, fields.record))}"[:200])


def _find_prompt(fields):
    """The turns of the columns that hold a system message, and those of the prompt after it."""
    system = []
    column = fields.find(*SYSTEMS)
    if column:
        system = as_turns(fields.record[column], fields.name(column), "system")
    column = fields.find(*PROMPTS)
    if column is None:
        return system, []
    cell = fields.record[column]
    if column == "history" and not isinstance(parsed(cell), str):
        return system, _earlier_turns(cell)
    joined = fields.name(column) == "instruction" or "input" in fields.columns
    if joined and isinstance(cell, str) and isinstance(fields.record.get("input"), str):
        cell = _with_input(cell, fields.take("input"))
    if column in DIALOGUES:
        cell = parsed(cell)
    fault = f"malformed: {fields.name(column)} is a list of texts, which are no turns"
    drop_if(isinstance(cell, str) and _is_list_of_texts(cell), fault)
    prompt = as_turns(cell, fields.name(column), "user")
    history = None if column == "history" else fields.take("history")
    if history is not None:
        prompt = _earlier_turns(history) + prompt
    return system, prompt


def _is_list_of_texts(text):
    """Whether a cell is stored as text and was a list of texts."""
    value = parsed(text) if text.startswith("[") else None
    return isinstance(value, list) and value != [] and all(isinstance(x, str) for x in value)


def _with_input(instruction, given):
    """An instruction and what it is about, as Alpaca's template sets them: a blank line between."""
    return f"{instruction}\n\n{given}" if given else instruction


def _earlier_turns(cell):
    """The column history as turns: a list of [question, answer], or of turns."""
    fault = "malformed: history is no list of [question, answer]"
    cell = parsed(cell)
    drop_if(not isinstance(cell, list), fault)
    if cell and isinstance(cell[0], dict):
        return as_turns(cell, "history")
    turns = []
    for pair in cell:
        drop_if(not isinstance(pair, list | tuple) or len(pair) != 2, fault)
        for role, said in zip(("user", "assistant"), pair, strict=True):
            drop_if(not isinstance(said, str), fault)
            turns.append({"role": role, "content": said})
    return turns


def _find_dialogues(fields, answers):
    """Both answers' dialogues, {name: turns}, and whether it is they that hold the prompt."""
    system, prompt = _find_prompt(fields)
    dialogues = {}
    holds_prompt = False
    for name, cell in zip(answers.names, (answers.chosen, answers.rejected), strict=True):
        turns = as_turns(cell, name)
        if turns and turns[0]["role"] not in ("assistant", "tool"):
            holds_prompt = True
        dialogues[name] = _join(system, prompt, turns)
    return dialogues, holds_prompt


def _join(system, prompt, turns):
    """A dialogue: an answer's turns, after what of system message and prompt is not in them."""
    if not turns or turns[0]["role"] in ("system", "developer"):
        return turns
    if turns[0]["role"] == "user":
        return system + turns
    if prompt and prompt[-1] == {"role": "assistant", "content": ""}:
        # "... Assistant:" has opened the answer's turn, whose space after the colon is no text
        prompt = prompt[:-1]
        begun = turns[0]["content"].removeprefix(" ")
        turns = [{**turns[0], "content": begun}, *turns[1:]]
    if prompt and prompt[0]["role"] in ("system", "developer"):
        system = []
    return system + prompt + turns


def _split(dialogues):
    """Two dialogues, {name: turns}, as the turns that they share and the last turn of each."""
    for name, turns in dialogues.items():
        ended = len(turns) > 1 and turns[-1]["role"] == "assistant"
        drop_if(not ended, f"malformed: no prompt before {name}, or no assistant's turn at its end")
        drop_if("tool_calls" in turns[-1], f"{name} ends with a tool call, which is no text")
    (*messages, chosen), (*others, rejected) = dialogues.values()
    names = " and ".join(dialogues)
    drop_if(messages != others, f"malformed: {names} differ before the last answer")
    roles = [turn["role"] for turn in messages]
    asked = "user" in roles and roles[-1] in ("user", "tool") and messages[-1]["content"].strip()
    drop_if(not asked, "malformed: the prompt does not end with a user's turn")
    return messages, chosen, rejected


def _drop_if_half_read(fields, holds_prompt, messages, ends):
    """Drop a record with a filled column of a prompt that is not understood, nor said in a turn.

    A column of whole dialogues may hold the answers, `ends`, too. Where the answers' dialogues
    hold the prompt, any column of it is only compared with them.
    """
    understood = set() if holds_prompt else fields.used - set(SYSTEMS)
    for column in OF_A_PROMPT:
        value = fields.record.get(column)
        if column == "tools" or column in understood or not is_filled(value):
            continue
        turns = [*messages, *ends] if column in DIALOGUES else messages
        contents = [turn["content"].strip() for turn in turns]
        for text in _texts_of(column, value):
            text = text.strip()
            is_said = text in contents or (len(text) >= 20 and text in "\n".join(contents))
            added = "columns={input: input} adds it, " if column == "input" else ""
            drop_if(
                text and not is_said,
                f"{column} is filled and would change the prompt, but is not understood: "
                f"{added}columns={{{column}: null}} leaves it out",
            )


def _texts_of(column, value):
    """What a column of a prompt says: of a question's turns the contents, else all texts."""
    if column in QUESTIONS:
        with contextlib.suppress(Drop):  # what cannot be read as turns is compared as it is
            return [turn["content"] for turn in as_turns(parsed(value), column, "user")]
    return texts_in(value)


def _both_begin_with(prompt, chosen, rejected):
    """Whether both answers begin with a prompt that is too long for that to be chance."""
    is_long = len(prompt.split()) >= 5
    return is_long and chosen.startswith(prompt) and rejected.startswith(prompt)


def _number(value):
    """A finite number, also one that is stored as text, or None."""
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _scores(fields):
    """The scores of a chosen and a rejected answer, or None."""
    for pattern in (*SCORES, *REWARDS):
        chosen, rejected = pattern.format("chosen"), pattern.format("rejected")
        scores = (_number(fields.record.get(chosen)), _number(fields.record.get(rejected)))
        if None not in scores:
            fields.used |= {chosen, rejected}
            return scores
    if as_label(fields.record.get("status")) == "tie":  # as distilabel notes it
        fields.used.add("status")
        return 0.0, 0.0
    return None


# The shapes. A docstring's first line is what an error says of the shape, its example what of
# columns; the tests read the example.


def chosen_and_rejected(fields):
    """Two answers by name, or two dialogues: most sets.

    {"prompt": "Name a fruit.", "chosen": "An apple.", "rejected": "No."}
    """
    for chosen, rejected in ANSWERS:
        if not fields.has(chosen, rejected):
            continue
        cells = (fields.record[chosen], fields.record[rejected])
        others = fields.record.keys() - {chosen, rejected, *PROMPTS}
        names_columns = all(isinstance(cell, str) and cell in others for cell in cells)
        drop_if(names_columns, f"{chosen} and {rejected} are names of columns, not answers")
        return fields.answers(chosen, rejected, _scores(fields))
    return None


def rejected_beside_messages(fields):
    """A dialogue, and another last answer to it: ms-swift.

    {"messages": [{"role": "user", "content": "Name a fruit."},
                  {"role": "assistant", "content": "An apple."}], "rejected_response": "No."}
    """
    if not fields.has("messages", "rejected_response"):
        return None
    turns = parsed(fields.record["messages"])
    drop_if(not isinstance(turns, list) or not turns, "malformed: messages is no list of turns")
    fields.record["messages"] = turns[:-1]
    fields.record["messages, the last"] = turns[-1:]
    return fields.answers("messages, the last", "rejected_response")


def preferred_output(fields):
    """OpenAI's preference format.

    {"input": {"messages": [{"role": "user", "content": "Name a fruit."}]},
     "preferred_output": [{"role": "assistant", "content": "An apple."}],
     "non_preferred_output": [{"role": "assistant", "content": "No."}]}
    """
    if not fields.has("input", "preferred_output", "non_preferred_output"):
        return None
    asked = parsed(fields.record["input"])
    if isinstance(asked, dict):
        fields.used.add("input")
        fields.record |= {"messages": asked.get("messages"), "tools": asked.get("tools")}
    return fields.answers("preferred_output", "non_preferred_output")


def answers_with_a_label(fields):
    """Two answers, and which is better: alpaca_farm, PKU-SafeRLHF, lmarena.

    {"instruction": "Name a fruit.", "output_1": "An apple.", "output_2": "No.", "preference": 1}
    """
    for columns in LABELLED:
        if fields.has(*columns):
            return by_label(fields, columns, *names_of(*columns[:2]))
    return None


def answers_of_people(fields):
    """Two answers, 1 where A is better: SHP.

    {"history": "Name a fruit.", "human_ref_A": "An apple.", "human_ref_B": "No.", "labels": 1}
    """
    columns = ("human_ref_A", "human_ref_B", "labels")
    if not fields.has(*columns):
        return None
    return by_label(fields, columns, {"1"}, {"0"})


def answers_compared(fields):
    """Two answers, below zero where the first is better: HelpSteer2 and 3.

    {"context": [{"role": "user", "content": "Name a fruit."}], "response1": "An apple.",
     "response2": "No.", "overall_preference": -3}
    """
    for first, second, strength in COMPARED:
        if not fields.has(first, second, strength):
            continue
        number = _number(fields.take(strength))
        drop_if(number is None, f"malformed: {strength} is no number")
        drop_if(number == 0, f"tie: {strength} prefers neither answer")
        if number > 0:
            first, second = second, first
        return fields.answers(first, second)
    return None


def best_and_worst(fields):
    """A list of answers with scores or ranks: openbmb/UltraFeedback, Nectar.

    {"instruction": "Name a fruit.", "completions": [{"response": "No.", "overall_score": 1},
     {"response": "An apple.", "overall_score": 9}, {"response": "One.", "overall_score": 5}]}
    """
    for column in RANKED:
        rated = _rated(fields, column)
        if rated is not None:
            break
    else:
        return None
    drop_if(len(rated) < 2, f"fewer than two of {column} have a score")
    fields.used.add(column)
    best = max(rated, key=lambda answer: answer[0])
    worst = min(rated, key=lambda answer: answer[0])
    drop_if(best[0] == worst[0], "tie in score")
    names = (f"the best of {column}", f"the worst of {column}")
    return Answers(names, best[1], worst[1], (best[0], worst[0]))


def _rated(fields, column):
    """The answers in a column's list, each as (score, answer), or None if it has no such list."""
    answers = parsed(fields.record.get(column))
    if not isinstance(answers, list) or not answers:
        return None
    beside = fields.find(*RATINGS) if isinstance(answers[0], str) else None
    if beside is not None:
        scores = parsed(fields.record[beside])
        fault = not isinstance(scores, list) or len(scores) != len(answers)
        drop_if(fault, f"malformed: {beside} is no list with a number for each of {column}")
    elif all(isinstance(answer, dict) for answer in answers):
        scores = [_score_of_one(answer) for answer in answers]
        answers = [first_of(answer, TEXTS) for answer in answers]
    else:
        return None
    rated = []
    for score, answer in zip(scores, answers, strict=True):
        if _number(score) is not None:
            rated.append((_number(score), answer))
    return rated


def _score_of_one(answer):
    """What an answer of a list scored: the mean of its annotations' ratings, a score, or a rank.

    UltraFeedback's overall_score is wrong in some records, which its ratings by aspect are not.
    """
    ratings = []
    annotations = parsed(answer.get("annotations"))
    if isinstance(annotations, dict):
        for aspect in annotations.values():
            rating = _number(aspect.get("Rating")) if isinstance(aspect, dict) else None
            if rating is not None:
                ratings.append(rating)
    if ratings:
        return fmean(ratings)
    rank = _number(answer.get("rank"))
    if rank is not None:
        return -rank
    return first_of(answer, SCORE_OF_ONE)


def labelled_by_columns(fields):
    """Two answers, and which is better, where the setting `columns` says.

    {"prompt": "Name a fruit.", "a": "An apple.", "b": "No.", "winner": "a"}
    """
    columns = fields.columns
    if not fields.has("a", "b", "winner") or is_filled(columns.get("chosen")):
        return None
    if is_filled(columns.get("a_if")):
        means = [{as_label(columns[value])} for value in LABEL_VALUES]
    else:
        means = names_of(fields.name("a"), fields.name("b"))
    return by_label(fields, ("a", "b", "winner"), *means)


SHAPES = (  # in this order
    labelled_by_columns,
    chosen_and_rejected,
    rejected_beside_messages,
    preferred_output,
    answers_with_a_label,
    answers_of_people,
    answers_compared,
    best_and_worst,
)


def accepted_columns():
    """Lines for an error: each shape's columns by its example, and other names for them."""
    lines = ["Accepted are these columns, with any others beside them:"]
    own, *known = SHAPES
    for shape in (*known, own):
        known_from, _, example = shape.__doc__.partition("\n")
        columns = ", ".join(json.loads(example))
        lines.append(f"  {columns:54s}{known_from}")
    pairs = "; ".join(map(", ".join, ANSWERS))
    scores = ", ".join(SCORES).replace("{}", "chosen")
    dialogue = r'"\n\nHuman: ...\n\nAssistant: ..."'
    return (
        *lines,
        f"Two answers by name are {pairs}",
        f"The prompt is in {', '.join(PROMPTS)}; before it {', '.join(SYSTEMS)} and history",
        f"Each is text, {{role, content}}, {{from, value}}, a list of these, or {dialogue}",
        f"Scores are in {scores}, if anywhere",
        f"Other names: {EXAMPLES}",
    )
