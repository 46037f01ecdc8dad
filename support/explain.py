"""What an error of the Hub's libraries means, and what to type instead.

Their own first line often names neither the cause nor the file: the errors behind it do.
"""

import contextlib
import json
import os
import re
import struct
from pathlib import Path

from gguf import GGUFReader
from huggingface_hub import constants
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError
from safetensors import SafetensorError, safe_open

from support.errors import first_line

UNREADABLE = (
    SafetensorError,
    ValueError,
    IndexError,
    KeyError,
    RecursionError,
    OSError,
    struct.error,
)
CONVERT = """\
import sys, transformers
name, folder = sys.argv[1:]
load = transformers.AutoModelForCausalLM.from_pretrained
load(name, use_safetensors=False).save_pretrained(folder)
transformers.AutoTokenizer.from_pretrained(name).save_pretrained(folder)"""


def explain(error, name, kind):
    """Why a model or a data set does not load, in a sentence or two.

    error  what the library raised
    name   the path or Hub name that it was given
    kind   "model" or "dataset"
    """
    errors = _behind(error)
    damaged = damaged_file(name) if kind == "model" else None
    return (
        _configurations(errors, name)
        or _different_columns(errors, name)
        or _weights_as_bin(errors, name, kind)
        or _refusal(errors, name, kind)
        or _broken_download(errors)
        or damaged
        or first_line(_cause(error))
    )


def _cause(error):
    """What the error says, or what it came from if `datasets` says only where it was met."""
    if type(error).__name__ == "DatasetGenerationError" and error.__cause__:
        return error.__cause__
    return error


def _behind(error):
    """An error and those that it came from, the last first."""
    errors = []
    while error is not None and error not in errors:
        errors.append(error)
        error = error.__cause__ or error.__context__
    return errors


def _configurations(errors, name):
    """Of a data set that is several: their names."""
    for error in errors:
        listed = re.search(r"(?:among the available configs|Available): (\[.*\])", str(error))
        if listed is None:
            continue
        choices = re.findall(r"'([^']+)'", listed[1])
        if os.path.isdir(name):
            return (
                f"it holds several sets ({', '.join(choices)}): give the path of one of its files"
            )
        path, at, revision = name.partition("@")
        repository = "/".join(path.split("/")[:2])
        choice = f"{repository}/{choices[0]}{at}{revision}"
        return f"it has the configurations {', '.join(choices)}. Choose one, as in {choice}"
    return None


def _different_columns(errors, name):
    """Of a folder of files that `datasets` cannot join: how they are read one by one."""
    differ = any(type(error).__name__ == "CastError" for error in errors)
    if not (differ and os.path.isdir(name)):
        return None
    return (
        f"its files have different columns. Give those that belong together, by a pattern such as "
        f"'{name}/part-*.jsonl'"
    )


def _weights_as_bin(errors, name, kind):
    """Of a model without .safetensors: how they are made."""
    missing = any("file named model.safetensors" in str(error) for error in errors)
    if kind != "model" or not missing:
        return None
    folder = f"{os.path.basename(name.rstrip('/'))}-safetensors"
    return (
        "it has no .safetensors file. If its weights are .bin files, which can run code when they "
        "are read, and you trust them, convert them once and give "
        f"{folder} in its place:\npython -c '{CONVERT}' {name} {folder}"
    )


def _refusal(errors, name, kind):
    """Of a request that the Hub refused: what would let it pass."""
    page = f"{constants.ENDPOINT}/{name}"
    if kind == "dataset":
        repository = "/".join(name.partition("@")[0].split("/")[:2])
        page = f"{constants.ENDPOINT}/datasets/{repository}"
    for error in errors:
        if isinstance(error, GatedRepoError) or "is a gated dataset" in str(error):
            return f"it is gated. Ask for access on {page}, then run: hf auth login"
        unknown = type(error).__name__ == "DatasetNotFoundError"
        if unknown or isinstance(error, RepositoryNotFoundError):
            return (
                f"the Hub has no {kind} of this name that you may read. Check the spelling; if it "
                "is private, run: hf auth login"
            )
        if isinstance(error, RevisionNotFoundError):
            return (
                f"it has no such revision. See its branches, tags and commits on {page}/tree/main"
            )
        response = getattr(error, "response", None)
        if response is None or response.status_code < 400:
            continue
        status = response.status_code
        if status in (401, 403):
            return f"the Hub refuses access ({status}). As a user who has it, run: hf auth login"
        if status >= 500:
            return f"the Hub answers with its error {status} for {response.url}. Try again later"
    return None


def _broken_download(errors):
    """Of a download that stopped: its file."""
    for error in errors:
        # of an error that no request led to, httpx raises RuntimeError
        with contextlib.suppress(AttributeError, RuntimeError):
            path = error.request.url.path
            file = re.split("/resolve/[^/]+/", path)[-1]
            return f"the download of {file} broke off ({first_line(error)}). Start again"
    return None


def damaged_file(name):
    """A sentence on the first file of a model that cannot be read, or None.

    name  a folder, a file, or a Hub model's name, whose files in the cache are then looked at
    """
    local = os.path.exists(name)
    folder = Path(name)
    pattern = "*"
    if os.path.isfile(name):
        folder, pattern = folder.parent, folder.name
    if not local:
        folder = Path(constants.HF_HUB_CACHE, f"models--{name.replace('/', '--')}")
        pattern = "snapshots/*/*"
    if not os.path.isdir(folder):
        return None
    if not os.access(folder, os.R_OK | os.X_OK):
        return f"you may not read the folder {folder}. Change its permissions"
    for file in sorted(folder.glob(pattern)):
        fault = _damage(file)
        if fault is None:
            continue
        advice = "Copy it anew"
        if not local:  # the name in a snapshot points to the file itself
            advice = f"Delete {file.resolve()} and start again: it is then downloaded anew"
        return f"the file {file} is damaged or unreadable ({fault}). {advice}"
    return None


def _damage(file):
    """What is wrong with a file of weights or of JSON, or None."""
    try:
        if file.suffix == ".json" and file.is_file():
            json.loads(file.read_bytes())
        if file.suffix == ".safetensors":
            safe_open(file, "pt")
        if file.suffix == ".gguf":
            GGUFReader(file)
    except UNREADABLE as error:
        return first_line(error)
    return None
