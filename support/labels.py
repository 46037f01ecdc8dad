"""Which of two answers a label means."""

import re

from support.errors import InputError
from support.turns import Drop, drop_if

TIES = ("tie", "tie (bothbad)", "bothbad", "both_bad", "both bad", "equal", "same", "draw")
FOREIGN = {"1": "0", "0": "2"}  # a label that answers numbered from so much on do not have


def as_label(value):
    """A label, or a value that the setting `columns` gives for one, as text to compare."""
    return str(value).strip().lower().removesuffix(".0")


def by_label(fields, columns, first_means, second_means):
    """Answers of two columns in the order that a label gives.

    fields        support.shapes.Fields
    columns       (first, second, label)
    first_means   the label's values for the first answer, in lower case
    second_means  and for the second
    returns       support.shapes.Answers
    raises        Drop for a tie, or a label that is neither; InputError for one that tells that
                  the labels count from another number than the columns
    """
    first, second, label = columns
    value = fields.take(label)
    said = as_label(value)
    drop_if(said in TIES, f"tie: {label} prefers neither answer")
    if said in first_means:
        return fields.answers(first, second)
    if said in second_means:
        return fields.answers(second, first)
    names = [fields.name(column) for column in columns]
    first_number = names[0][-1]
    # of output_1 and output_2 a label of 1 is the first answer, unless labels are 0 and 1
    if names[0].lower() in first_means and said == FOREIGN.get(first_number):
        a, b, winner = names
        raise InputError(
            f"{winner} is {said} in a record with {a} and {b}, so 1 may mean either. Say which: "
            f"columns={{prompt: ..., a: {a}, b: {b}, winner: {winner}, a_if: 0, b_if: 1}} where "
            "labels count from 0; a_if: 1, b_if: 2 where they count from 1. Others are dropped"
        )
    raise Drop(
        f"{names[2]} is {value!r:.40}, which names neither answer: see columns in config.yaml"
    )


def names_of(first, second):
    """What a label may call either of two answers, as two sets of words in lower case.

    Its column; a or b, model_a or model_b; the ending of output_1 and output_2, or of any two
    columns that differ in nothing else.
    """
    names = ({first.lower()}, {second.lower()})
    endings = ("a", "b")
    pattern = r"(.*?)(\d+|[ab])"
    one = re.fullmatch(pattern, first.lower())
    other = re.fullmatch(pattern, second.lower())
    if one and other and one[1] == other[1]:
        if one[2].isdigit():
            names[0].add(one[2])
            names[1].add(other[2])
        else:
            endings = (one[2], other[2])
    for known, ending in zip(names, endings, strict=True):
        known.update((ending, f"model_{ending}"))
    return names
