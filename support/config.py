"""Settings: config.yaml and the command line in, a checked Config for each run out."""

import argparse
import difflib
import itertools
import json
import re
import sys
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Literal

import yaml
from pydantic import Field, ValidationError
from pydantic.dataclasses import dataclass

from support.columns import check_places
from support.errors import InputError
from support.processes import say

CONFIG_FILE = Path(__file__).parent.parent / "config.yaml"  # with a comment for each setting
OTHER_NAMES = Path(__file__).parent / "other_names.yaml"  # other trainers' settings
# A setting, those that do nothing without it, and how it is set.
SERVE_ANOTHER = {
    "lora_r": (
        ["lora_alpha", "lora_dropout", "lora_target_modules", "lora_merge"],
        "lora_r=16 trains an adapter",
    ),
    "rounds": (["samples_per_prompt", "round_reference"], "rounds=4 trains on sampled answers"),
    "reward": (
        ["eval_samples", "kl_model", "temperature"],
        "reward=file.py:function scores sampled answers",
    ),
}
# Settings on which no trained weight depends: these alone may change where a run goes on.
MAY_CHANGE_ON_RESUME = {"eval_every", "save_every", "report_to", "reference_cache", "offline"}
# Runs of a sweep that differ in these alone share the model, the pairs and the reference.
MAY_DIFFER_ON_ONE_SETUP = MAY_CHANGE_ON_RESUME - {"offline"} | {
    "loss",
    "beta",
    "label_smoothing",
    "length_normalize",
    "nll_weight",
    "epochs",
    "lr",
    "lr_schedule",
    "warmup_ratio",
    "weight_decay",
    "max_grad_norm",
    "keep",
    "save_dtype",
    "output_dir",
}
FLAGS = ["--config", "--dry-run", "--overwrite", "--help"]
# Settings that take several values in one string, which a list sweeps.
JOINED = {
    "dataset": '"a, b"',
    "eval_dataset": '"a, b"',
    "lora_target_modules": ".*(q_proj|v_proj)",
}


class _Loader(yaml.SafeLoader):
    """YAML 1.1, which takes 1e-7 for text, with 1e-7 as a number and no name set twice."""

    def construct_mapping(self, node, deep=False):
        """The mapping as a dict; InputError for a repeated key, of which YAML would take the last.

        node  yaml.MappingNode
        """
        lines = {}
        for key, _ in node.value:
            name = str(key.value)
            line = key.start_mark.line + 1
            if name in lines:
                raise InputError(f"{name} is set in lines {lines[name]} and {line}: remove one")
            lines[name] = line
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?\d+\.?\d*[eE][-+]?\d+$"),
    list("-+0123456789"),
)


@dataclass(frozen=True, config={"extra": "forbid", "strict": True, "allow_inf_nan": False})
class Config:
    """All settings of one run; config.yaml says what each one does."""

    model: str = "HuggingFaceTB/SmolLM2-135M-Instruct"
    revision: str | None = None
    trust_remote_code: bool = False
    reference_model: str | None = None
    lora_r: int = Field(0, ge=0)
    lora_alpha: float = Field(16.0, gt=0)
    lora_dropout: float = Field(0.0, ge=0, lt=1)
    lora_target_modules: str = "all-linear"
    lora_merge: bool = False
    load_in_4bit: bool = False
    dataset: str = "HuggingFaceH4/ultrafeedback_binarized"
    split: str | None = "train_prefs"
    eval_dataset: str | None = None
    eval_split: str | None = "test_prefs"
    train_pairs: int = Field(500, ge=0)
    eval_pairs: int = Field(100, ge=0)
    shuffle: bool = True
    columns: dict[str, str | int | float | bool | None] | None = None
    keep_ties: bool = False
    seed: int = Field(42, ge=0, lt=2**32)
    max_length: int = Field(1024, ge=2)
    max_prompt_length: int = Field(512, ge=1)
    loss: Literal["sigmoid", "ipo", "hinge"] = "sigmoid"
    beta: float = Field(0.1, ge=1e-6, le=1e6)
    label_smoothing: float = Field(0.0, ge=0, lt=0.5)
    length_normalize: bool = False
    nll_weight: float = Field(0.0, ge=0, le=1e3)
    epochs: int = Field(1, ge=1)
    batch_size: int = Field(1, ge=1)
    gradient_accumulation_steps: int = Field(2, ge=1)
    lr: float = Field(1e-7, ge=0, le=1)
    lr_schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_ratio: float = Field(0.0, ge=0, le=1)
    weight_decay: float = Field(0.01, ge=0, le=1e3)
    max_grad_norm: float = Field(1.0, ge=0)
    reward: str | None = None
    eval_samples: int = Field(4, ge=0)
    kl_model: str | None = None
    temperature: float = Field(1.0, ge=0.01, le=100)
    max_new_tokens: int = Field(128, ge=1)
    rounds: int = Field(0, ge=0)
    samples_per_prompt: int = Field(8, ge=2)
    round_reference: Literal["previous", "first"] = "previous"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    device: str = "auto"
    activation_checkpointing: bool = False
    output_dir: str = "runs/beta{beta}_lr{lr}"
    eval_every: int = Field(50, ge=0)
    save_every: int = Field(50, ge=0)
    keep: Literal["last", "best"] = "last"
    save_dtype: Literal["float32", "bfloat16"] = "float32"
    sample_prompts: int = Field(3, ge=0)
    report_to: Literal["none", "tensorboard", "wandb"] = "none"
    reference_cache: str | None = "runs/reference_cache"
    offline: dict[str, str] | None = None


def parse_command_line(description, arguments=None):
    """The command line's options: config (a path), overrides, dry_run, overwrite.

    raises   InputError for an unknown flag, with what to type instead, or without --config
    """
    parser = argparse.ArgumentParser(
        description=description,
        epilog=CONFIG_FILE.read_text(encoding="utf-8"),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("overrides", nargs="*", metavar="name=value", help="settings for this run")
    parser.add_argument("--config", help="YAML file of settings, listed below")
    parser.add_argument("--dry-run", action="store_true", help="show data and cost, train nothing")
    parser.add_argument("--overwrite", action="store_true", help="train finished runs anew")
    if arguments is None:
        arguments = sys.argv[1:]
    options, unknown = parser.parse_known_intermixed_args(arguments)
    for position, argument in enumerate(arguments):
        if argument in unknown and argument.startswith("-"):
            raise InputError(_explain_flag(argument, arguments[position + 1 :]))
    if options.config is None:
        raise InputError("no settings are given: add --config config.yaml. --help lists them")
    return options


def _explain_flag(flag, following):
    """What to type instead of an unknown flag, before these arguments."""
    typed, _, value = flag.partition("=")
    near = difflib.get_close_matches(typed.replace("_", "-"), FLAGS, n=1, cutoff=0.8)
    if near:
        return f"{typed}: no such flag, did you mean {near[0]}?"
    name = typed.strip("-").replace("-", "_")
    if name not in _known():
        return f"{_explain_name(name)}. Settings are written name=value, without dashes"
    if not value and following:
        value = following[0]
    return f"{typed}: settings are written without dashes: {name}={value or '...'}"


def read_config(path, overrides=()):
    """Read config.yaml and `name=value` overrides; the last of a repeated override counts.

    returns  a Config for each run (several where settings are lists), and the names that vary
    raises   InputError for a file, a name or a value that is not right
    """
    settings = _read_settings(path, overrides)
    choices = {}
    for name, value in settings.items():
        is_list = isinstance(value, list) and value
        choices[str(name)] = value if is_list else [value]
    varied = [name for name, values in choices.items() if len(values) > 1]
    for name in varied:
        if name in JOINED:
            say(f"{name}: a list sweeps, a run for each; one run of all is {name}: {JOINED[name]}")
    configs = []
    for values in itertools.product(*choices.values()):
        config = _check(dict(zip(choices, values, strict=True)))
        config = replace(config, output_dir=_output_dir(config, varied))
        if config not in configs:
            configs.append(config)
    _check_folders(configs)
    _tell_what_does_nothing(configs)
    return configs, varied


def _check_folders(configs):
    """InputError where two runs of a sweep would have one folder, as of a/b and a-b."""
    folders = set()
    for config in configs:
        if config.output_dir in folders:
            raise InputError(
                f"output_dir: two runs of the sweep would be in {config.output_dir}. Change it, or "
                "one of the values that are in its name"
            )
        folders.add(config.output_dir)


def _tell_what_does_nothing(configs):
    """Say so where settings were changed that serve only with another, which no run has."""
    usual = asdict(Config())
    for main, (others, advice) in SERVE_ANOTHER.items():
        if any(getattr(config, main) for config in configs):
            continue
        for name in others:
            if any(getattr(config, name) != usual[name] for config in configs):
                off = json.dumps(usual[main])
                say(f"!!! {name} does nothing, since {main} is {off}; {advice} !!!")
    idle = [config for config in configs if config.reward and not config.rounds]
    for needed in ("eval_pairs", "eval_samples"):
        if idle and not any(getattr(config, needed) for config in idle):
            say(f"!!! reward does nothing, since {needed} and rounds are 0 !!!")


def _read_settings(path, overrides):
    """The settings of a YAML file and of overrides, as they were typed."""
    source = f"config {path}"
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
        settings = yaml.load(text, _Loader) or {}
        if not isinstance(settings, dict):
            raise InputError("its lines are to be name: value, as in beta: 0.1")
        for override in overrides:
            source = f"setting {override!r}"
            name, equals, value = override.partition("=")
            if not (name and equals):
                raise InputError("write name=value without spaces, as in beta=0.2")
            settings[name] = yaml.load(value, _Loader)
    except (OSError, ValueError, TypeError, RecursionError, yaml.YAMLError) as error:
        raise InputError(f"cannot read {source}: {error}") from error
    return settings


def _check(settings):
    """The settings as a Config; InputError names the first wrong one and what would be right."""
    try:
        config = Config(**settings)
    except ValidationError as error:
        raise InputError(_explain(error.errors()[0])) from error
    check_places(config.columns or {})
    if config.keep == "best" and not config.eval_pairs:
        raise InputError(
            "keep=best needs held-out pairs to tell which: eval_pairs=100, or keep=last"
        )
    if config.load_in_4bit and not config.lora_r:
        raise InputError(
            "load_in_4bit keeps the frozen weights under an adapter in 4 bits, and without one all "
            "are trained: add lora_r=16, or set load_in_4bit to false"
        )
    _check_rounds(config)
    if config.label_smoothing and config.loss != "sigmoid":
        raise InputError("label_smoothing is defined for loss sigmoid only: set it to 0")
    return config


def _check_rounds(config):
    """Refuse rounds that could not be had."""
    if not config.rounds:
        return
    if not config.reward:
        raise InputError(
            "rounds sample answers, and need a reward that tells which are better: "
            "reward=file.py:function, or the name of a reward model"
        )
    if config.load_in_4bit:
        raise InputError(
            "rounds sample from weights that are not packed, and load_in_4bit would train on "
            "others: set it to false"
        )
    if config.keep == "best":
        raise InputError(
            "keep=best goes by the loss on the set's own pairs, and rounds train on others: "
            "keep=last"
        )
    if config.revision:
        raise InputError(
            "rounds go back to the first model by its name: with revision, download that commit "
            "(hf download) and give its folder as model"
        )


def _known():
    """The names of all settings."""
    return [field.name for field in fields(Config)]


def _explain(problem):
    """One line on a problem that pydantic found."""
    name = str(problem["loc"][0])
    if name not in _known():
        return _explain_name(name)
    return f"{name}: {problem['msg']}, not {problem['input']!r:.200}"


def _explain_name(name):
    """One line on an unknown setting: what it is here, the nearest name, or where all stand."""
    others = yaml.safe_load(OTHER_NAMES.read_text(encoding="utf-8"))
    nearest = difflib.get_close_matches(name, _known(), n=1)
    hint = others.get(name.lower(), "--help lists all")
    if name.lower() not in others and nearest:
        hint = f"did you mean {nearest[0]}? {hint}"
    return f"{name}: no such setting, {hint}"


def _output_dir(config, varied):
    """The run's folder: braces filled in, and a part for each setting that varies."""
    folder = config.output_dir
    for name in varied:
        if f"{{{name}}}" not in folder:
            folder += f"_{name}{{{name}}}"
    parts = {}
    for name, value in asdict(config).items():
        if isinstance(value, dict):
            value = ",".join(f"{key}-{of_key}" for key, of_key in value.items())
        parts[name] = str(value).replace("/", "-")
    try:
        return folder.format_map(parts)
    except (LookupError, ValueError, AttributeError, TypeError) as error:
        raise InputError(f"output_dir {folder}: braces must hold a setting's name") from error


def shares_setup(config, other):
    """Whether two runs can share one model, its pairs and the reference's log-probabilities.

    other  the settings of the other run, or None, with which nothing is shared
    """
    if other is None:
        return False
    fixed, others = asdict(config), asdict(other)
    return all(fixed[name] == others[name] for name in fixed.keys() - MAY_DIFFER_ON_ONE_SETUP)


def changes_on_resume(config, saved):
    """What was changed in an unfinished run's settings that decides what it computes.

    saved    the settings in the run's config.yaml
    returns  list of "beta was 0.1, is 0.2"
    """
    changes = []
    harmless = {*MAY_CHANGE_ON_RESUME, "output_dir"}
    if config.keep == "best":
        harmless.remove("eval_every")  # of the weights after evaluations the best are kept
    if config.rounds >= saved.get("rounds", 0) > 0:
        harmless.add("rounds")  # more may follow
    for name, value in asdict(config).items():
        if name in saved and saved[name] != value and name not in harmless:
            changes.append(f"{name} was {saved[name]}, is {value}")
    return changes
