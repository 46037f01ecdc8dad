"""What a cell of a preference set says: text, a turn or a list of turns in, a list of turns out.

A turn is {"role", "content"}, as chat templates take it, with tool_calls, tool_call_id and name
where it has them.
"""

import ast
import json
import re

ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "agent": "assistant"}
ROLES |= {"observation": "tool"}
ROLES |= {role: role for role in ("system", "developer", "user", "assistant", "tool")}
SPEAKER_AND_TEXT = (("role", "content"), ("from", "value"), ("speaker", "text"))
LIST_AS_TEXT = re.compile(r"""\s*\[?\s*\{\s*["'](role|content|from|value|speaker)["']\s*:""")
TEMPLATED = re.compile(
    r"\s*(<s>\s*)?\[INST\]|<\|im_start\|>|<\|start_header_id\|>|<start_of_turn>"
    r"|\s*### (Instruction|Human|User)\b"
)


class Drop(Exception):
    """This record cannot teach; the message is the reason under which it is counted."""


def drop_if(fault, reason):
    """Drop with this reason where the fault holds."""
    if fault:
        raise Drop(reason)


def turns_of(value, column, role="assistant"):
    r"""A cell as turns.

    "text"                                      one turn of this role
    "\n\nHuman: ...\n\nAssistant: ..."          the turns of a transcript
    "[{'role': ..., 'content': ...}]"           the list that was stored as text, JSON or Python
    {"role", "content"}, {"from", "value"} or {"speaker", "text"}    one turn
    a list of such turns
    {"messages": such a list}

    column  its name, for the reasons
    raises  Drop for anything else
    """
    if isinstance(value, str):
        if not LIST_AS_TEXT.match(value):
            return split_transcript(value) or [{"role": role, "content": value}]
        value = _parse(value, column)
    if isinstance(value, dict):
        value = value.get("messages", [value])
    drop_if(not isinstance(value, list), _malformed(column))
    return [_turn(item, column) for item in value]


def _malformed(column):
    return f"malformed: {column} is neither text nor a list of {{role, content}}"


def _parse(text, column):
    """A list that a CSV or JSON cell holds as text, written by json or by Python's str."""
    for parse in (json.loads, ast.literal_eval):
        try:
            return parse(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
    raise Drop(f"malformed: {column} is a list stored as text that cannot be read")


def _turn(item, column):
    """One turn by the names that chat templates use."""
    drop_if(not isinstance(item, dict), _malformed(column))
    role = None
    for speaker, said in SPEAKER_AND_TEXT:
        if speaker in item:
            role = ROLES.get(str(item[speaker]).lower())
            content = item.get(said)
            break
    drop_if(role is None, _malformed(column))
    turn = {"role": role, "content": _content(content, column)}
    for name in ("tool_calls", "tool_call_id", "name"):
        if item.get(name):
            turn[name] = item[name]
    if turn["content"] is None:
        drop_if("tool_calls" not in turn, _malformed(column))
        turn["content"] = ""
    return turn


def _content(content, column):
    """The text of a turn, also where it stands in parts; None where there is none."""
    if not isinstance(content, list):
        drop_if(content is not None and not isinstance(content, str), _malformed(column))
        return content
    text = ""
    for part in content:
        drop_if(not isinstance(part, dict) or "type" not in part, _malformed(column))
        kind = part["type"]
        drop_if(kind != "text", f"{column} holds a part of type {kind}: only text is trained on")
        drop_if(not isinstance(part.get("text"), str), _malformed(column))
        text += part["text"]
    return text


def split_transcript(text):
    r""" "\n\nHuman: ...\n\nAssistant: ..." as turns, [] if it is not one.

    One that ends with "\n\nAssistant:" ends with an empty assistant's turn.
    """
    start, *parts = re.split(r"\n\n(Human|Assistant): ?", text)
    if start.strip():
        return []
    roles = {"Human": "user", "Assistant": "assistant"}
    turns = []
    for speaker, said in zip(parts[::2], parts[1::2], strict=True):
        turns.append({"role": roles[speaker], "content": said})
    return turns
