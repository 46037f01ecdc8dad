"""What goes wrong on the user's side, in words that say what to do."""


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
