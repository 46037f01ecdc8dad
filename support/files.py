"""Files that are whole whatever happens: written beside their place, flushed, then renamed."""

import hashlib
import inspect
import json
import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from support.processes import is_first

ABOUT_A_FILE = ("architectures", "dtype", "transformers_version")  # in config.json


def write_atomically(path, write):
    """Let write(temporary path) make a file; a crash leaves the old one or the new one whole."""
    if not is_first():
        return
    temporary = path.with_name(f"{path.name}.tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    write(temporary)
    with open(temporary, "rb+") as file:  # Windows flushes only what may be written
        os.fsync(file.fileno())
    os.replace(temporary, path)


def write_text(path, text):
    """Write a text file, whole or not at all."""
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_records(path, records):
    """Write a JSONL file of dicts, whole or not at all; what JSON has no form for becomes text."""
    lines = []
    for record in records:
        lines.append(json.dumps(record, default=str) + "\n")
    write_text(path, "".join(lines))


def digest_tensors(tensors):
    """sha256 of tensors and their names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode())
        data = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
        digest.update(data.numpy())
    return digest.hexdigest()


def digest_model(model):
    """sha256 of a transformers model's weights, and of what its config.json makes of them.

    Code that comes with the model is part of it. Where it is from, in what dtype, and who wrote it,
    is not.
    """
    shape = {}
    for name, value in model.config.to_dict().items():
        if name not in ABOUT_A_FILE and not name.startswith("_"):
            shape[name] = value
    digest = digest_tensors(model.state_dict())
    parts = [digest, shape]
    if type(model).__module__.startswith("transformers_modules."):  # trust_remote_code
        for path in sorted(Path(inspect.getfile(type(model))).parent.glob("*.py")):
            parts.append(path.read_text(encoding="utf-8"))
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def digest_records(pairs):
    """sha256 of the records of data.Pairs by split, without what JSON cannot hold."""
    digest = hashlib.sha256()
    for part in pairs.values():
        for pair in part:
            text = json.dumps(pair.record, default=lambda value: type(value).__name__)
            digest.update(text.encode())
    return digest.hexdigest()


def digest_pairs(pairs):
    """sha256 of the token ids of data.Pairs by split, in their order."""
    digest = hashlib.sha256()
    for split, part in pairs.items():
        digest.update(split.encode())
        for pair in part:
            ids = [list(pair.prompt_ids), list(pair.chosen_ids), list(pair.rejected_ids)]
            digest.update(json.dumps(ids).encode())
    return digest.hexdigest()


def read_tensors(path):
    """The tensors by name and the metadata of a file that write_tensors wrote.

    Both are None if there is none, or one of which a bit is another.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
        tensors = load_file(path)
    except (SafetensorError, OSError):
        return None, None
    if metadata.get("digest") != digest_tensors(tensors):
        return None, None
    return tensors, metadata


def write_tensors(path, tensors, metadata=None):
    """Write a safetensors file with a digest, whole or not at all; the first process's alone.

    metadata  {name: text} to be kept with them
    """

    def write(temporary):
        noted = {**(metadata or {}), "digest": digest_tensors(tensors)}
        save_file(tensors, temporary, noted)

    write_atomically(path, write)
