"""Turns of a dialogue, {"role", "content"}, from whatever a set writes them as."""

import ast
import json
import re

# the role of each speaker that sets name, as role or as from
ROLES = {
    "system": "system",
    "developer": "developer",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "agent": "assistant",
    "bot": "assistant",
    "ai": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "observation": "tool",
}
# what stands beside a turn's text, and some templates write
BESIDE = ("reasoning_content", "reasoning", "thinking", "tool_plan", "tool_responses", "tools")
BESIDE += ("function_call", "function_calls", "functions", "documents")
BESIDE += ("image", "images", "video", "videos", "audio", "audios")
KEYS = ("role", "content", "from", "value")  # of a turn
MAPPING_AS_TEXT = re.compile(r"""\s*(\[)?\s*\{\s*["'](\w+)["']\s*:""")  # a list of them
# how text begins and ends that a chat template has written already
TEMPLATE_BEGINS = re.compile(
    r"\s*(<s>|<bos>|<\|begin_of_text\|>)?\s*"
    r"(\[INST\]|<\|(im_start|start_header_id|user|system)\|>|<start_of_turn>|### Instruction:"
    r"|Below is an instruction that describes a task)"
)
TEMPLATE_ENDS = ("</s>", "<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|endoftext|>")


class Drop(Exception):
    """This record cannot teach; the message is the reason under which it is counted."""


def drop_if(fault, reason):
    """Drop with this reason where the fault holds."""
    if fault:
        raise Drop(reason)


def is_filled(value):
    """Whether a cell holds anything: not null or NaN, nor an empty text, list or mapping."""
    is_nan = isinstance(value, float) and value != value
    is_empty = isinstance(value, str | list | dict) and not value
    return value is not None and not is_nan and not is_empty


def parse(text):
    """The list or mapping that a cell stores as text: JSON, or as Python or NumPy print it.

    raises  ValueError if the text is none of these
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    except ValueError:
        # NumPy puts a newline for the comma between items; no printed text holds one
        python = re.sub(r"\}\s*\n\s*\{", "}, {", text.strip())
    try:
        return ast.literal_eval(python)
    except (SyntaxError, TypeError, MemoryError, RecursionError) as error:
        raise ValueError("neither JSON nor Python") from error


def parsed(value):
    """What a cell that should hold a list or a mapping stores as text; else the cell itself."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return parse(value)
        except ValueError:
            return value
    return value


def first_of(mapping, keys):
    """The value of the first of some keys that a mapping has, or None."""
    for key in keys:
        if key in mapping:
            return mapping[key]
    return None


def as_turns(value, column, role="assistant"):
    """A cell's turns.

    value    text, which is one turn of the role given, or a transcript of several; or one turn or a
             list of turns, {role, content} or {from, value}, which may be stored as text
    column   its name, for the reasons
    returns  list of {"role", "content"}; content is text, tool_calls and the like stay beside it
    raises   Drop if the value is none of these, or text that a chat template has written
    """
    if isinstance(value, str):
        stored = _stored_turns(value, column)
        if stored is None:
            return _turns_of_text(value, column, role)
        value = stored
    if isinstance(value, dict):
        value = value.get("messages", [value])
    drop_if(not isinstance(value, list), _neither(column))
    return [_turn(turn, column) for turn in value]


def _neither(column):
    return f"malformed: {column} is neither text nor a list of {{role, content}}"


def _stored_turns(text, column):
    """The turns that a text stores as JSON or Python; None if it is just text."""
    begins = MAPPING_AS_TEXT.match(text)
    if not begins:
        return None
    is_list = begins[1] is not None
    is_sure = is_list and begins[2] in KEYS  # text that begins so is no answer
    try:
        value = parse(text)
    except ValueError:
        fault = f"malformed: {column} is a list stored as text that cannot be read"
        drop_if(is_sure, fault)
        return None
    if not is_list:
        is_turn = isinstance(value, dict) and set(value) in ({"role", "content"}, {"from", "value"})
        return value if is_turn else None
    return value if is_sure or all(map(_is_turn, value)) else None


def _is_turn(value):
    """Whether a value has what a turn must have."""
    if not isinstance(value, dict):
        return False
    return value.keys() >= {"role", "content"} or value.keys() >= {"from", "value"}


def _turns_of_text(text, column, role):
    r"""One turn, or those of "\n\nHuman: ...\n\nAssistant: ..."."""
    mark = _template_mark(text)
    drop_if(mark, f"{column} is written in a chat template ({mark}): plain text is wanted")
    start, *parts = split_dialogue(text)
    if start.strip() or not parts:
        return [{"role": role, "content": text}]
    roles = {"Human": "user", "Assistant": "assistant"}
    turns = []
    for speaker, said in zip(parts[::2], parts[1::2], strict=True):
        turns.append({"role": roles[speaker], "content": said})
    return turns


def split_dialogue(text):
    r"""What stands before the first turn of a dialogue; then for each turn its speaker and words.

    text  such as "\n\nHuman: ...\n\nAssistant: ...", or anything, which stands before all turns
    """
    if text.startswith("Human:") and "\n\nAssistant:" in text:
        text = "\n\n" + text
    return re.split(r"\n\n(Human|Assistant): ?", text)


def _template_mark(text):
    """The token or line of a chat template with which a text begins or ends, or None."""
    written = TEMPLATE_BEGINS.match(text)
    if written:
        return written[2]
    if "<extra_id_1>" in text:  # between the turns of HelpSteer2
        return "<extra_id_1>"
    end = text.rstrip()[-20:]
    for mark in TEMPLATE_ENDS:
        if end.endswith(mark):
            return mark
    return None


def _turn(turn, column):
    """A turn with the role and the text under this project's names."""
    drop_if(not isinstance(turn, dict), _neither(column))
    speaker = first_of(turn, ("role", "from", "speaker"))
    content = first_of(turn, ("content", "value", "text"))
    drop_if(not isinstance(speaker, str), _neither(column))
    speaker = speaker.lower()
    drop_if(speaker not in ROLES, f"{column} has a turn of the unknown role {speaker!r:.40}")
    for name in BESIDE:
        fault = f"{column} has {name} beside a turn's text, which is not read: leave it out there"
        value = without_nulls(parsed(turn.get(name)))
        is_told = is_filled(value) and not isinstance(value, bool | int | float)
        drop_if(is_told, f"{fault}, or write it into the text")
    calls = turn.get("tool_calls")
    if speaker == "function_call":
        calls, content = content, None
    whole = {"role": ROLES[speaker]}
    if is_filled(calls):
        whole["tool_calls"] = _as_functions(calls, column)
        content = content or ""
    whole["content"] = _as_text(content, column)
    for name in ("name", "tool_call_id"):
        if is_filled(turn.get(name)):
            whole[name] = turn[name]
    return whole


def _as_text(content, column):
    """A turn's content as text, of which the parts [{"type": "text", "text": ...}] are joined."""
    if not isinstance(content, list):
        drop_if(not isinstance(content, str), _neither(column))
        return content
    texts = []
    for part in content:
        drop_if(not isinstance(part, dict) or "type" not in part, _neither(column))
        kind = part["type"]
        drop_if(kind != "text", f"{column} has a part of type {kind!r:.20}: only text is read")
        drop_if(not isinstance(part.get("text"), str), _neither(column))
        texts.append(part["text"])
    drop_if(not texts, _neither(column))
    return "".join(texts)


def as_tools(value):
    """The column tools as chat templates take it: [{"type": "function", "function": {...}}]."""
    return _as_functions(value, "tools")


def _as_functions(value, column):
    """Tools or tool calls, which may be stored as text, as a list of wrapped functions."""
    value = parsed(value)
    if isinstance(value, dict):
        value = [value]
    drop_if(not isinstance(value, list), f"malformed: {column} is no list of functions")
    functions = []
    for item in value:
        item = parsed(item)  # a list of texts, as nvidia/When2Call's
        inner = item.get("function", item) if isinstance(item, dict) else None
        named = isinstance(inner, dict) and isinstance(inner.get("name"), str)
        drop_if(not named, f"malformed: {column} has a function without a name")
        function = without_nulls(inner)
        if "arguments" in function:
            function["arguments"] = parsed(function["arguments"])
        call = {"id": item["id"]} if is_filled(item.get("id")) else {}
        functions.append(call | {"type": "function", "function": function})
    return functions


def without_nulls(value):
    """A mapping without what is null in it, as Parquet sets it where records have other keys."""
    if isinstance(value, list):
        return [without_nulls(item) for item in value]
    if not isinstance(value, dict):
        return value
    kept = {}
    for key, item in value.items():
        if item is not None:
            kept[key] = without_nulls(item)
    return kept


def with_arguments_as_text(messages):
    """Messages whose tool calls have their arguments as JSON text, as a few templates take them."""
    turns = []
    for turn in messages:
        calls = []
        for call in turn.get("tool_calls", ()):
            function = call["function"]
            text = json.dumps(function.get("arguments", {}), ensure_ascii=False)
            calls.append(call | {"function": function | {"arguments": text}})
        turns.append(turn | {"tool_calls": calls} if calls else turn)
    return turns


def texts_in(value):
    """All that a cell says: its texts, those of its turns without their roles, else as printed."""
    value = parsed(value)
    if isinstance(value, list):
        inner = value
    elif isinstance(value, dict):
        inner = [value[key] for key in value if key not in ("role", "from")]
    else:
        return [str(value)] if is_filled(value) else []
    texts = []
    for item in inner:
        texts += texts_in(item)
    return texts
