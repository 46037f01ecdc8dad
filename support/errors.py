"""What goes wrong on the user's side, in words that say what to do and show what was read."""

import reprlib

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 70  # letters of a text


class InputError(ValueError):
    """Something the user gave is wrong; the message says what, where, and what to type instead."""


def first_line(error):
    """An exception's type and the first line of its text."""
    kind = type(error).__name__
    lines = str(error).strip().splitlines()
    if not lines:
        return f"{kind}: no details"
    first = lines[0].strip()
    says_nothing_alone = first.endswith(":")
    if says_nothing_alone and len(lines) > 1:
        second = lines[1].strip()
        first = f"{first} {second}"
    return f"{kind}: {first[:300]}"


def shorten(record):
    """Lines with the columns of a record, each with how its value begins and ends."""
    if not isinstance(record, dict):
        return [f"  {_SHORT.repr(record)}"]
    lines = []
    for column, value in record.items():
        lines.append(f"  {column} = {_SHORT.repr(value)}")
    return lines
