"""Rewards of answers: by a function of the user's, or by a reward model."""

import ast
import contextlib
import copy
import hashlib
import importlib.util
import json
import math
import numbers
import os
import sys
import traceback
from pathlib import Path

import torch
import transformers
from jinja2 import TemplateError
from torch.nn.utils.rnn import pad_sequence

from support.errors import InputError, first_line
from support.processes import WORLD, fail_together, is_first, say, sum_over_processes
from support.sampler import Told
from support.shapes import read_preference
from support.sources import announce_download, note_commit, open_source
from support.template import dated_template

BOOLS = ("bool", "torch.bool")  # dtypes of a scalar of numpy or torch
AT_ONCE = 8  # texts that a reward model reads together
ORIGINAL = "original_record"  # column of a round's files that holds the record a prompt came from


def check_reward(config):
    """Refuse a reward that is not there, before anything is computed; no weights are read.

    raises   InputError
    """
    if not config.reward:
        return
    if _is_function(config.reward):
        _load_function(config.reward)
        return
    if config.reward.endswith(".py"):
        raise InputError(
            f"reward {config.reward}: name the function in it too: {config.reward}:FUNCTION"
        )
    _check_labels(config, _open(config, transformers.AutoConfig))


def _check_labels(config, shape):
    """Refuse a model that tells more of a text than a reward; `shape` is its config.json."""
    if shape.num_labels != 1:
        raise InputError(
            f"reward {config.reward}: it tells {shape.num_labels} numbers of a text, and a reward "
            "model tells one (num_labels in its config.json)"
        )


def _open(config, kind, **options):
    """What from_pretrained of a class of transformers gives for the reward model's name."""

    def load(path):
        of_weights = kind is transformers.AutoModelForSequenceClassification
        if of_weights and not os.path.exists(path):
            announce_download(path, "main")
        return kind.from_pretrained(path, trust_remote_code=config.trust_remote_code, **options)

    try:
        with open(os.devnull, "w") as silent, contextlib.redirect_stderr(silent):
            return open_source(config.reward, "model", config.offline, load)
    except InputError as error:
        raise InputError(f"reward: {error}") from error


def reward_version(config):
    """What tells two versions of a reward apart: a digest of its files, or a Hub model's commit.

    A function's files are its own and those of its folder that they import.
    """
    if _is_function(config.reward):
        files = {}
        _add_imported(Path(config.reward.rpartition(":")[0]), files)
        return _digest_files(files)

    def version_of(path):
        if os.path.isdir(path):
            return _digest_files(sorted(Path(path).iterdir()))
        return note_commit(path, "main")

    return open_source(config.reward, "model", config.offline, version_of)


def _add_imported(path, files):
    """Add a Python file, and those beside it that it imports, to the keys of a dict."""
    if path in files or not path.is_file():
        return
    files[path] = None
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):  # which the import tells
        return
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module]
        for name in names:
            _add_imported(path.with_name(f"{name}.py"), files)


def _digest_files(paths):
    digest = hashlib.sha256()
    for path in paths:
        if path.is_file():
            with open(path, "rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]


def try_reward(config, pairs):
    """Score the chosen answers of some pairs by a user's function, which may fail on the records.

    raises   InputError, as score_answers does, before a run samples and trains for nothing
    """
    for pair in pairs if config.reward else []:
        text = read_preference(pair.record, config.columns).chosen
        try_answers(config, [pair], [[Told(text, True, len(pair.chosen_ids))]])


def try_answers(config, pairs, answers):
    """Score answers by a user's function, which may fail on them, before all are sampled.

    raises   InputError, as score_answers does
    """
    if _is_function(config.reward):
        score_answers(config, pairs, answers)


def score_answers(config, pairs, answers):
    """The rewards of some answers, as setting `reward` says; the first process finds them.

    config   a run's settings
    pairs    list of data.Pair with their records: whose prompts these are
    answers  for each a list of support.sampler.Told
    returns  (pairs, answers) float64; an answer that did not end fails, where rewards are True
             and False, and else has the reward of the text up to there
    raises   InputError, in all processes, with the prompt for which the reward fails
    """
    rewards = torch.zeros(len(pairs), len(answers[0]), dtype=torch.float64)
    with fail_together(config.device):
        if is_first():
            rewards = _score(config, pairs, answers)
    if WORLD == 1:
        return rewards
    return sum_over_processes(rewards.to(config.device)).cpu()


def _score(config, pairs, answers):
    asked = []
    whole = []
    for pair, drawn in zip(pairs, answers, strict=True):
        record = pair.record.get(ORIGINAL, pair.record)
        for answer in drawn:
            # each its own, which a function may change
            asked.append((json.loads(pair.prompt), answer.text, copy.deepcopy(record)))
            whole.append(answer.ended)
    if _is_function(config.reward):
        found = _by_function(config.reward, asked)
    else:
        found = _by_model(config, asked)
    rewards = torch.tensor(found, dtype=torch.float64)
    # a function that tells True and False may return 0 or 1 somewhere, as of `and`
    if any(isinstance(reward, bool) for reward in found):
        tells = (rewards == 0) | (rewards == 1)
        rewards[~torch.tensor(whole) & tells] = 0.0
    return rewards.view(len(pairs), -1)


def _is_function(reward):
    return ".py:" in reward


def _load_function(reward):
    """The function that `file.py:function` names."""
    path, _, name = reward.rpartition(":")
    if not os.path.isfile(path):
        raise InputError(f"reward {reward}: there is no file {path}")
    # under a name that hides no other module
    spec = importlib.util.spec_from_file_location(f"reward of {path}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for it
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # whatever a user's file may raise
        raise InputError(f"reward {reward}: {path} fails: {first_line(error)}") from error
    function = getattr(module, name, None)
    if not callable(function):
        raise InputError(f"reward {reward}: {path} has no function {name}")
    return function


def _by_function(reward, asked):
    """A user's function of each (messages, answer, record): floats, or bools where it gives those.

    raises   InputError where it fails, or gives what is no finite number
    """
    function = _load_function(reward)
    rewards = []
    for messages, answer, record in asked:
        where = f"for the prompt {messages[-1]['content']!r:.300}, answer {answer!r:.300}"
        try:
            value = function(messages, answer, record)
        except (Exception, SystemExit) as error:  # whatever a user's function may raise
            raise InputError(
                f"reward {reward} fails{_line_of(error, function)}: {first_line(error)}, {where}"
            ) from error
        number = _as_number(value)
        if not math.isfinite(number):
            raise InputError(
                f"reward {reward} is to return a finite number, not {value!r}, {where}"
            )
        says_pass_or_fail = isinstance(value, bool) or str(getattr(value, "dtype", "")) in BOOLS
        rewards.append(bool(number) if says_pass_or_fail else number)
    return rewards


def _line_of(error, function):
    """In which line of a function's file an error arose, if it arose there."""
    file = getattr(getattr(function, "__code__", None), "co_filename", None)
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if frame.filename == file:
            return f" in line {frame.lineno}"
    return ""


def _as_number(value):
    """A number of Python, numpy or torch as a float; nan for anything else."""
    scalar = isinstance(value, numbers.Real) or getattr(value, "ndim", None) == 0
    other = isinstance(value, numbers.Complex) and not isinstance(value, numbers.Real)
    if not scalar or other or isinstance(value, str | bytes):
        return math.nan
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        return math.nan


@torch.no_grad()
def _by_model(config, asked):
    """A reward model's score of each (messages, answer, record), which is loaded for it and freed.

    By its chat template where it has one, else of the prompt's text and the answer as a pair.
    """
    model, tokenizer = _load_model(config)
    rewards = [math.nan] * len(asked)
    encoded = []
    for messages, answer, _ in asked:
        try:
            encoded.append(_encode(tokenizer, messages, answer))
        except (TemplateError, TypeError) as error:  # such as for roles that it refuses
            raise InputError(
                f"reward {config.reward}: its chat template refuses a conversation: "
                f"{first_line(error)}, for the prompt {messages[-1]['content']!r:.300}"
            ) from error
    longest = tokenizer.model_max_length
    cut = sum(len(text["input_ids"]) >= longest for text in encoded)
    if cut:
        say(
            f"!!! {cut} of {len(encoded)} conversations were cut to the {longest} tokens that "
            f"{config.reward} reads !!!"
        )
    order = sorted(range(len(asked)), key=lambda number: len(encoded[number]["input_ids"]))
    # the model tells a text's last token by its own padding, which need not be the tokenizer's
    padding = model.config.pad_token_id
    at_once = 1 if padding is None else AT_ONCE
    for start in range(0, len(order), at_once):
        part = order[start : start + at_once]
        inputs = _pad_right([encoded[number] for number in part], padding or 0, config.device)
        scores = model(**inputs).logits.float()
        for number, reward in zip(part, scores.squeeze(1).tolist(), strict=True):
            if not math.isfinite(reward):
                prompt = asked[number][0][-1]["content"]
                raise InputError(f"reward {config.reward}: {reward} for the prompt {prompt!r:.300}")
            rewards[number] = reward
    return rewards


def _encode(tokenizer, messages, answer):
    """The token ids of a conversation as a reward model reads it."""
    if tokenizer.chat_template:
        turns = [*messages, {"role": "assistant", "content": answer}]
        template = dated_template(tokenizer)
        text = tokenizer.apply_chat_template(turns, tokenize=False, chat_template=template)
        return tokenizer(text, add_special_tokens=False, truncation=True)
    prompt = "\n\n".join(message["content"] for message in messages)
    return tokenizer(prompt, answer, truncation="longest_first")


def _pad_right(encoded, padding, device):
    """What a tokenizer gives for several texts, as the inputs of one pass."""
    inputs = {}
    for name in encoded[0]:
        rows = [torch.tensor(text[name]) for text in encoded]
        filler = padding if name == "input_ids" else 0
        padded = pad_sequence(rows, batch_first=True, padding_value=filler)
        inputs[name] = padded.to(device)
    return inputs


def _load_model(config):
    """The reward model on the run's device, and its tokenizer."""
    model, found = _open(
        config,
        transformers.AutoModelForSequenceClassification,
        dtype=getattr(torch, config.dtype),
        use_safetensors=True,
        output_loading_info=True,
    )
    if found["missing_keys"]:
        raise InputError(
            f"reward {config.reward}: its files hold no weights for "
            f"{', '.join(sorted(found['missing_keys']))}: it is no reward model"
        )
    _check_labels(config, model.config)
    return model.eval().to(config.device), _open(config, transformers.AutoTokenizer)
