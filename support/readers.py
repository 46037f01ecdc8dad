"""Files and folders of records in: JSON lines, JSON, CSV, Parquet, and what `datasets` saved.

Of JSON lines, Parquet and saved sets a record is read where it is used, so that memory does not
grow with the set; JSON, CSV and compressed files are read as a whole.
"""

import csv
import io
import json
import os
import re
from array import array
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import datasets
import pyarrow
from pyarrow.dataset import ParquetFragmentScanOptions
from torch.utils.data import ConcatDataset, Subset

from support.errors import InputError, first_line
from support.processes import say

TEXT_FILES = (".jsonl", ".json", ".csv")
DATA_FILES = (*TEXT_FILES, ".parquet")
COMPRESSED = (".gz", ".zst")  # behind the ending of a text file
OTHER_FILES = (
    ".tsv",
    ".txt",
    ".ndjson",
    ".xlsx",
    ".xls",
    ".ods",
    ".xml",
    ".yaml",
    ".yml",
    ".arrow",
    ".zip",
    ".bz2",
    ".xz",
    *COMPRESSED,
)
SAVED_BY_DATASETS = ("state.json", "dataset_dict.json")


class MissingSplit(InputError):
    """The data set has no split of this name.

    has_others  whether it has splits of other names, of which one could be chosen
    """

    def __init__(self, message, has_others=True):
        super().__init__(message)
        self.has_others = has_others


def ending(path):
    """The ending of a file's name: of "a/b.JSONL.gz" it is .jsonl.gz, of "a.b" it is .b."""
    last = Path(path).suffix.lower()
    inner = Path(path).with_suffix("").suffix.lower() if last in COMPRESSED else ""
    return inner + last


def is_data_file(path):
    """Whether a file of this name can be read, which has nothing to do with whether it is there."""
    kind, compression = _kind(path)
    return kind in (TEXT_FILES if compression else DATA_FILES)


def _kind(path):
    """A file's ending without its compression's, and that."""
    whole = ending(path)
    for compression in COMPRESSED:
        if whole.endswith(compression):
            return whole.removesuffix(compression), compression
    return whole, ""


def unsupported_ending(name):
    """The InputError for a file of a kind that is not read."""
    found = name[len(name) - len(ending(name)) :] or "(none)"
    return InputError(
        f"dataset {name}: unsupported ending {found}, use .jsonl, .json, .csv or .parquet"
    )


def read_files(paths, name, split, required):
    """Read files as one set.

    split     selects rows where the files have a column `split`; None reads all
    required  whether files without that column have no such split, instead of one
    returns   a sequence of dict
    raises    InputError for a file that cannot be read (a broken JSON line with its number),
              MissingSplit
    """
    parts = []
    for path in paths:
        if not is_data_file(path):
            raise unsupported_ending(path)
        parts.append(_read_file(path))
    return select_split(parts, name, split, required)


def read_folder(path, split, required):
    """Read a folder that `datasets` saved, or one of data files of one kind; as read_files.

    A saved DatasetDict, and files whose names tell their splits, are read as a Hub set is: without
    a split given, the split train.
    """
    if any(Path(path, file).exists() for file in SAVED_BY_DATASETS):
        found = datasets.load_from_disk(path)
    else:
        _check_one_kind(path)
        _check_all_are_read(path)
        found = datasets.load_dataset(path)
    if not isinstance(found, dict):
        return select_split([found], path, split, required)
    if set(found) == {"train"} and split != "train":
        return select_split([found["train"]], path, split, required)
    wanted = split or "train"
    if wanted not in found:
        raise MissingSplit(f"{path} has no split {wanted}, only: {', '.join(found)}")
    return found[wanted]


def _check_one_kind(folder):
    """Refuse a folder of which nothing tells what in it is the set."""
    kinds = Counter(ending(file) for file in _data_files(folder))
    if _has_card_of_files(folder):
        return
    _check_all_shards(folder)
    if not kinds:
        raise InputError(
            f"dataset {folder}: the folder holds no .jsonl, .json, .csv or .parquet file"
        )
    if len(kinds) > 1:
        ((commonest, _),) = kinds.most_common(1)
        raise InputError(
            f"dataset {folder}: the folder holds files of several kinds ({', '.join(kinds)}). Give "
            f"those of one, as in '{Path(folder)}/**/*{commonest}'"
        )


def _data_files(folder):
    """The data files of a folder and those below it, without hidden ones and descriptions."""
    files = []
    for file in sorted(Path(folder).rglob("*")):
        hidden = any(part.startswith(".") for part in file.relative_to(folder).parts)
        described = file.name in ("dataset_infos.json", "dataset_info.json")
        if file.is_file() and is_data_file(file) and not hidden and not described:
            files.append(file)
    return files


def _has_card_of_files(folder):
    """Whether the folder's README.md says which of its files are the set."""
    card = Path(folder, "README.md")
    return card.exists() and "configs:" in card.read_text(encoding="utf-8", errors="replace")


def _check_all_are_read(folder):
    """Refuse a folder of which `datasets` would leave out files: those that name no split."""
    if _has_card_of_files(folder):
        return
    read = set()
    for files in datasets.load_dataset_builder(folder).config.data_files.values():
        read |= {os.path.realpath(file) for file in files}
    left_out = [str(file) for file in _data_files(folder) if os.path.realpath(file) not in read]
    if left_out:
        raise InputError(
            f"dataset {folder}: {', '.join(left_out)[:300]} would be left out, for the names of "
            "other files tell a split (train, test, ...) and theirs do not. Rename them, or name "
            f"all: '{Path(folder)}/**/*{ending(left_out[0])}'"
        )


def _check_all_shards(folder):
    """Refuse a folder from which some of the files train-00000-of-00002.parquet are absent."""
    found = Counter()
    for file in Path(folder).rglob("*-of-*"):
        path = file.relative_to(folder)
        shard = re.search(r"(.*-)\d{5}(-of-(\d{5})\..*)", str(path))
        if shard and is_data_file(path) and not str(path).startswith("."):
            found[shard[1], shard[2], int(shard[3])] += 1
    for (before, after, wanted), number in found.items():
        if number < wanted:
            raise InputError(
                f"dataset {folder}: of the files {before}...{after} {number} are there. Add the "
                "others, or rename these"
            )


def select_split(parts, name, split, required):
    """The rows of a split of a set's parts, each a sequence of dict, as one sequence.

    Rows of a data set of `datasets` stay where they are.
    """
    names = [_split_names(part) for part in parts]
    known = set().union(*names) - {None}
    if split is None or (not known and not required):
        return _join(parts)
    if not known:
        raise MissingSplit(
            f"{name} has no column split, which would tell what belongs to split {split}. To read "
            f"all rows give the name alone: {name}",
            has_others=False,
        )
    if split not in known:
        raise MissingSplit(f"{name} has no split {split}, only: {', '.join(sorted(known))}")
    selected = []
    without = 0
    for part, of_rows in zip(parts, names, strict=True):
        if not any(of_rows) and not required:  # a file without the column is read whole
            selected.append(part)
            continue
        rows = [row for row, of_row in enumerate(of_rows) if of_row == split]
        selected.append(Subset(part, rows))
        without += of_rows.count(None) if any(of_rows) else 0
    if without:
        say(f"!!! {without} records of {name} say nothing in column split, and are left out !!!")
    return _join(selected)


def _split_names(part):
    """What the column `split` says of each record: text or None."""
    values = []
    if not isinstance(part, datasets.Dataset):
        for record in part:
            values.append(record.get("split") if isinstance(record, dict) else None)
    elif "split" in part.column_names:
        values = part["split"]
    return [str(value) if value else None for value in values]


def _join(parts):
    return parts[0] if len(parts) == 1 else ConcatDataset(parts)


def _read_file(path):
    """The records of a file; InputError if it is broken."""
    readers = {".jsonl": JsonLines, ".json": _read_json, ".csv": _read_csv}
    kind, _ = _kind(path)
    try:
        if kind == ".parquet":
            return _read_parquet(path)
        with pyarrow.input_stream(str(path), compression="detect") as stream:
            return readers[kind](io.BufferedReader(stream), path)
    except InputError:
        raise
    except UnicodeDecodeError as error:
        fault = f"{path} cannot be read: it is not in UTF-8. Save it in that ({first_line(error)})"
        raise InputError(fault) from error
    except (OSError, ValueError, RecursionError, csv.Error) as error:
        fault = f"{path} cannot be read: {first_line(error)}"
        if kind == ".parquet" and isinstance(error, OSError):
            copy = datasets.config.HF_DATASETS_CACHE
            fault += f" (datasets keeps a copy of it in {copy}; the variable HF_HOME moves that)"
        raise InputError(fault) from error


def _read_parquet(path):
    """The records of a file, of which one row group at a time is in memory."""
    row_group_by_row_group = ParquetFragmentScanOptions(pre_buffer=False, use_buffered_stream=True)
    records = datasets.Dataset.from_parquet(
        path, batch_size=1000, fragment_scan_options=row_group_by_row_group
    )
    pyarrow.default_memory_pool().release_unused()
    return records


def _check_encoding(file, path):
    """Refuse UTF-16 and UTF-32, which begin with a mark or have zeros between their letters."""
    encoding = json.detect_encoding(file.peek(4)[:4])
    if not encoding.startswith("utf-8"):
        raise InputError(f"{path} is in {encoding.upper()}: save it as UTF-8")


class JsonLines(Sequence):
    """The records of a file of JSON lines: all are checked at once, and parsed where they are used.

    file  what the file holds, decompressed
    path  its name
    """

    def __init__(self, file, path):
        _check_encoding(file, path)
        _, compression = _kind(path)
        self.path = path
        self.content = file.read() if compression else None
        self.state = os.stat(path)
        self.starts = array("q")  # where each record's line begins
        start = 0
        with self._open() as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    _check_line(line, number, path)
                    self.starts.append(start)
                start += len(line)

    def _open(self):
        """The lines; not of a file that was changed since it was checked."""
        if self.content is not None:
            return io.BytesIO(self.content)
        now = os.stat(self.path)
        if (now.st_ino, now.st_size, now.st_mtime_ns) != (
            self.state.st_ino,
            self.state.st_size,
            self.state.st_mtime_ns,
        ):
            raise InputError(f"{self.path} was changed while it was read: start again")
        return open(self.path, "rb")

    def __len__(self):
        return len(self.starts)

    def __getitem__(self, index):
        with self._open() as lines:
            lines.seek(self.starts[index])
            return _parse(lines.readline())


def _check_line(line, number, path):
    """Refuse a line that is not JSON."""
    try:
        _parse(line)
    except (ValueError, RecursionError) as error:
        hint = ""
        if number == 1 and line.strip() in (b"[", b"\xef\xbb\xbf["):
            hint = ". It begins as a JSON list does: name it .json"
        fault = f"{path}, line {number} cannot be read: {first_line(error)}{hint}"
        raise InputError(fault) from error


def _read_json(file, path):
    try:
        records = _parse(file.read())
    except json.JSONDecodeError as error:
        if not error.msg.startswith("Extra data"):
            raise
        fault = f"{path} cannot be read: {first_line(error)}"
        hint = "If each of its lines is a record, name it .jsonl"
        raise InputError(f"{fault}. {hint}") from error
    if not isinstance(records, list):
        raise InputError(f"{path} holds no list of records, but one {type(records).__name__}")
    return records


def _parse(text):
    return json.loads(text, object_pairs_hook=_without_repeats)


def _without_repeats(pairs):
    """An object of JSON as a dict; ValueError for a repeated key, of which only one would count."""
    found = dict(pairs)
    if len(found) < len(pairs):
        repeated, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise ValueError(f"the key {repeated!r} stands twice in {str(pairs)[:80]} ...")
    return found


def _read_csv(file, path):
    _check_encoding(file, path)
    csv.field_size_limit(2**31 - 1)
    reader = csv.DictReader(io.TextIOWrapper(file, "utf-8-sig", newline=""), strict=True)
    for column, times in Counter(reader.fieldnames or ()).items():
        if times > 1:
            raise InputError(f"{path} has {times} columns called {column!r}: rename them")
    records = []
    for record in reader:
        if None in record:
            raise InputError(
                f"{path}, line {reader.line_num} has more fields than the header: text that holds "
                'a comma needs quotes, as in "Apple, of course"'
            )
        records.append(record)
    return records
