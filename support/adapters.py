"""A model that is a peft adapter: found, merged into its base, and checked to compute the same."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers.utils.hub import cached_file
from transformers.utils.peft_utils import find_adapter_config_file

from support.errors import InputError, first_line

ON_FOUR_BITS = "trained_on_4_bits.json"  # beside an adapter that was


@dataclass
class Adapter:
    """A peft adapter's files, in a folder or of the Hub."""

    name: str  # what the user called it
    base: str  # what it stands on, another model's name or folder
    base_revision: str | None
    folder: Path
    has_tokenizer: bool
    on_four_bits: bool  # whether it was trained on its base in 4 bits


def find_adapter(name, path, revision):
    """The Adapter at a folder or of the Hub; None where that is something else.

    name     what the user called it
    raises   InputError if it names no base, or has no weights that are safe to read
    """
    if Path(path).is_file():
        return None
    file = find_adapter_config_file(path, revision=revision)
    if file is None:
        return None
    settings = json.loads(Path(file).read_text(encoding="utf-8"))
    base = settings.get("base_model_name_or_path")
    if not base or base == name:
        raise InputError(
            f"model {name} is an adapter, and its adapter_config.json does not tell its base "
            "model: write that model's name or folder there, as base_model_name_or_path"
        )
    if _file(path, "adapter_model.safetensors", revision) is None:
        raise InputError(
            f"model {name} is an adapter without adapter_model.safetensors; a .bin file can run "
            "code when it is read. Save it again with save_pretrained of a newer peft"
        )
    return Adapter(
        name=name,
        base=base,
        base_revision=settings.get("revision"),
        folder=Path(file).parent,
        has_tokenizer=_file(path, "tokenizer_config.json", revision) is not None,
        on_four_bits=_file(path, ON_FOUR_BITS, revision) is not None,
    )


def _file(path, name, revision):
    """The path of a file in a folder or of the Hub, downloaded if need be; None without it."""
    return cached_file(path, name, revision=revision, _raise_exceptions_for_missing_entries=False)


@torch.no_grad()
def merge(base, adapter):
    """The base model with the adapter's weights added to its own.

    raises   InputError where adapter and base do not fit, or the sum would compute something else,
             as of an adapter to an LM head that is tied to the embeddings
    """
    from peft import PeftModel

    about = f"model {adapter.name} is an adapter on {adapter.base}"
    try:
        both = PeftModel.from_pretrained(base, adapter.folder).eval()
        found = both.load_adapter(adapter.folder, "default")
        unused = found.missing_keys + found.unexpected_keys
        if unused:
            raise InputError(f"{about}, which has no place for {unused[0]}: give the right base")
        ids = torch.arange(16)[None]
        expected = both(input_ids=ids, use_cache=False).logits
        merged = both.merge_and_unload(safe_merge=True)
    except InputError:
        raise
    except Exception as error:  # each kind of adapter has its own for a base that it does not fit
        raise InputError(f"{about}, and cannot be merged into it: {first_line(error)}") from error
    difference = (merged(input_ids=ids, use_cache=False).logits - expected).abs().max()
    if not difference <= 1e-3 * expected.abs().max():
        raise InputError(
            f"{about}, and merged into it computes something else (logits change by "
            f"{difference:.1e}). Merge it yourself, and give the merged model"
        )
    head = merged.get_output_embeddings()
    if head.weight is not merged.get_input_embeddings().weight:
        merged.config.tie_word_embeddings = False  # an adapter may hold one of the two
    return merged.requires_grad_(True)  # peft has frozen the base
