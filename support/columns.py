"""The setting `columns`: where a set with names of its own has what, {place: column}."""

import difflib
import itertools

from support.errors import InputError
from support.labels import as_label
from support.turns import is_filled

PAIR = ("chosen", "rejected")
LABELLED = ("a", "b", "winner")
LABEL_VALUES = ("a_if", "b_if")  # the values of winner that mean a and b
PLACES = ("prompt", "input", "system", "history", "tools", *PAIR, "score_chosen", "score_rejected")
PLACES += LABELLED + LABEL_VALUES
EXAMPLES = (
    "columns: {prompt: question, chosen: good, rejected: bad}, or of two answers with a label "
    "{prompt: question, a: output_1, b: output_2, winner: preference}"
)


def check_places(columns):
    """Raise InputError if the setting names a place that there is not, or half of what belongs."""
    for place, column in columns.items():
        if column is None:  # any column may be left out
            continue
        if place not in PLACES:
            near = difflib.get_close_matches(place, PLACES, n=1)
            hint = f"did you mean {near[0]}? " if near else ""
            if column in PLACES:
                hint = f"did you mean {column}: {place}? "
            raise InputError(
                f"columns: no place {place!r}, {hint}Places are {', '.join(PLACES)}; "
                f"{place}: null leaves a column out. As in {EXAMPLES}"
            )
        if place not in LABEL_VALUES and not isinstance(column, str):
            raise InputError(f"columns: {place} takes the name of a column, not {column!r}")
    given = {place for place, column in columns.items() if is_filled(column)}
    for together in (PAIR, LABELLED, LABEL_VALUES):
        missing = set(together) - given
        if given & set(together) and missing:
            raise InputError(
                f"columns: {' and '.join(together)} belong together, without "
                f"{' and '.join(sorted(missing))} they say nothing. As in {EXAMPLES}"
            )
    if given >= set(LABEL_VALUES) and not given >= set(LABELLED):
        raise InputError(
            f"columns: {' and '.join(LABEL_VALUES)} are values of winner: name a, b and winner too"
        )
    if given >= {*PAIR, *LABELLED}:
        raise InputError("columns: give chosen and rejected, or a, b and winner, not both")
    _check_all_differ(columns)


def _check_all_differ(columns):
    for one, other in itertools.combinations(columns, 2):
        of_a_kind = (one in LABEL_VALUES) == (other in LABEL_VALUES)
        form = as_label if one in LABEL_VALUES else str
        same = columns[one] is not None and form(columns[one]) == form(columns[other])
        if of_a_kind and same:
            raise InputError(f"columns: {one} and {other} are both {columns[one]!r}: change one")


def check_columns(columns, records):
    """Raise InputError if the setting names a column that none of the records has."""
    for place, column in columns.items():
        wanted = place if column is None else column
        if place in LABEL_VALUES and column is not None:
            continue
        others = set()
        for index in range(len(records)):
            record = records[index]
            if isinstance(record, dict):
                if wanted in record:
                    break
                others |= record.keys()
        else:
            names = sorted(map(str, others))
            near = difflib.get_close_matches(wanted, names, n=1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise InputError(
                f"columns: no record has a column {wanted!r}, {hint}There are: "
                f"{', '.join(names)[:300]}"
            )


def columns_of(record, columns):
    """What of the setting is about a record: sets that are joined have columns of their own."""
    columns = columns or {}
    about = {}
    for place, column in columns.items():
        named = columns.get("winner") if place in LABEL_VALUES else column
        if named is None or named in record:
            about[place] = column
    return about


def under_known_names(record, columns):
    """A record with the columns that the setting names in their places, less those it says null of.

    Where a column of the record's own has a place's name, the one that the setting names hides it.
    """
    if not columns:
        return dict(record)
    named = {}
    for place, column in columns.items():
        if place not in LABEL_VALUES:
            named[place] = column
    renamed = {}
    for column, value in record.items():
        if column not in named.values():
            renamed[column] = value
    for place, column in named.items():
        if column is None:
            renamed.pop(place, None)
        else:
            renamed[place] = record[column]
    return renamed
