"""A run's folder: the lock on it, its checkpoints, and whether the run is finished.

The folder holds config.yaml, metrics.jsonl, checkpoints/ while the run trains, and model/ once it
is finished, which is renamed into place last. How a run goes on after a kill:
    is_finished       model/ is there: nothing to do. Other settings than those noted in the
                      folder's config.yaml: refused
    load_checkpoint   master weights, AdamW's state and the number of steps done, from the newest
                      checkpoint that is whole; order, rate and random numbers follow from the
                      steps done and the settings
    keep_best         with keep: best, weights of the lowest held-out loss up to each checkpoint
    RunLog            cuts rows of later steps from metrics.jsonl (support/run_log.py)
Each file is written beside its place and renamed (support/files.py), so that none is ever half.
"""

import contextlib
import os
import shutil
import tempfile
from dataclasses import asdict, fields
from os.path import exists  # Path's own raises where a folder may not be entered
from pathlib import Path

import torch
import yaml
from filelock import FileLock, Timeout

from support.config import Config, changes_on_resume
from support.errors import InputError
from support.files import (
    digest_model,
    digest_pairs,
    digest_records,
    read_tensors,
    write_tensors,
    write_text,
)
from support.four_bit import count_weights
from support.processes import (
    fail_together,
    gather,
    is_first,
    same_for_all,
    say,
    shard_like,
    wait_for_all,
)
from support.run_log import best_step
from support.sources import revisions_used, stand_ins_used

ADAMW_STATE = ("step", "exp_avg", "exp_avg_sq")  # what it keeps of each weight
ANSWERS_FILE = "answers.jsonl"  # that a round of support/rounds.py has sampled
PAIRS_FILE = "pairs.jsonl"  # that it made of them, and trains on
HELD_OUT_FILE = "held_out.jsonl"  # that all rounds are evaluated on
OF_A_RUN = ("metrics.jsonl", "report.md", "curves.png", "rounds.png")  # what one leaves
FOLDERS_OF_A_RUN = ("model", "model.tmp", "checkpoints", "samples")
KEPT_CHECKPOINTS = 2  # the one before is for when the newest is damaged


def describe_origin(config, models, pairs=None):
    """What a run begins with: {name: digest}, the same in all processes and when it goes on.

    models   {name: model without an adapter}
    pairs    {split: list of data.Pair}; None for models alone
    raises   InputError, in all processes, where they have read different ones
    """
    digests = {name: digest_model(model) for name, model in models.items()}
    if pairs is not None:
        digests["pairs"] = digest_pairs(pairs)
    if pairs is not None and config.reward:  # which may read more of a record than is trained on
        digests["records"] = digest_records(pairs)
    return {name: same_for_all(found, name, config.device) for name, found in digests.items()}


def save_checkpoint(folder, weights, optimizer, step, origin):
    """Write folder/step_N whole or not at all, then remove all but it and the one before.

    step    how many optimizer steps are done
    origin  {name: digest} of what the run began with, which must be the same when it goes on
    raises  OSError or SafetensorError, as on a full disk; the earlier ones stay
    """
    tensors = {}
    for name, weight in weights.items():
        tensors[f"weight.{name}"] = weight
        for key, tensor in optimizer.state[weight].items():
            tensors[f"{key}.{name}"] = tensor
    tensors = gather(tensors)
    tensors["position"] = torch.tensor([step], dtype=torch.float64)
    write_tensors(folder / f"step_{step:07d}.safetensors", tensors, origin)
    if is_first():  # others may see an older list of files on a shared disk
        for old in _checkpoints(folder)[:-KEPT_CHECKPOINTS]:
            old.unlink(missing_ok=True)


def _checkpoints(folder):
    """The paths of checkpoints, the oldest first."""
    return sorted(folder.glob("step_*.safetensors"))


def load_checkpoint(folder, weights, optimizer, origin):
    """Fill weights and optimizer from the newest undamaged checkpoint; returns its step, or 0.

    origin  as in save_checkpoint
    raises  InputError if the run began with another model or other pairs
    """
    for path in reversed(_checkpoints(folder)):
        saved, metadata = read_tensors(path)
        if saved is None:
            say(f"Warning: {path} is damaged; the one before it is tried")
            path.unlink(missing_ok=True)  # it would count as one of the two to keep
            continue
        _check_origin(folder, metadata, origin)
        for name, weight in weights.items():
            weight.data.copy_(shard_like(saved[f"weight.{name}"], weight))
            optimizer.state[weight] = {}
            for key in ADAMW_STATE:
                tensor = saved.get(f"{key}.{name}")
                if tensor is not None:  # there is none before a step that was not skipped
                    optimizer.state[weight][key] = shard_like(tensor, weight)
        say(f"Resuming from {path}")
        return int(saved["position"][0])
    return 0


def keep_best(folder, weights, step, losses):
    """Write folder/best_N of the weights after this step, if its held-out loss is the lowest.

    A run that goes on from a checkpoint needs the best one up to there: others are removed.

    losses  {step: held-out loss} of all evaluations, with this one
    """
    if best_step(losses) == step:
        write_tensors(_best(folder, step), gather(weights))
    if not is_first():
        return
    needed = {_best(folder, best_step(losses))}
    for path in _checkpoints(folder):
        reached = int(path.stem.removeprefix("step_"))
        until = {step: loss for step, loss in losses.items() if step <= reached}
        needed.add(_best(folder, best_step(until)))
    for path in set(folder.glob("best_*.safetensors")) - needed:
        path.unlink(missing_ok=True)


def _best(folder, step):
    """Where the weights of an evaluation are kept."""
    return folder / f"best_{step or 0:07d}.safetensors"


def load_best(folder, weights, losses):
    """Fill weights with those of the lowest held-out loss, which keep_best wrote.

    raises  InputError if they are gone or damaged
    """
    step = best_step(losses)
    if step is None:
        say("Warning: no evaluation has a finite loss to keep the best of: the last step is saved")
        return
    wait_for_all()  # the first process has written them
    path = _best(folder, step)
    saved, _ = read_tensors(path)
    if saved is None:
        raise InputError(
            f"{path}, the weights of the lowest held-out loss, is gone or damaged: train anew with "
            "--overwrite"
        )
    for name, weight in weights.items():
        weight.data.copy_(shard_like(saved[name], weight))
    say(f"keep=best: the weights after step {step} are saved")


def _check_origin(folder, metadata, origin):
    """Refuse to go on with a run on another model or other pairs than it began with."""
    changed = [name for name, digest in origin.items() if metadata.get(name) != digest]
    if changed:
        raise InputError(
            f"{folder.parent}: the {' and the '.join(changed)} changed since this run began "
            "(files that were edited or replaced, or a branch of the Hub that moved on). Put them "
            "back, give another output_dir, or train anew with --overwrite"
        )


def check_room(config, model):
    """Refuse to begin what could not be written: a folder that is read-only, or too full a disk.

    raises  InputError, in all processes
    """
    with fail_together(config.device):
        if is_first():
            _check_room(config, model)


def _check_room(config, model):
    run = Path(config.output_dir)
    _check_writable(run, "output_dir")
    if config.reference_cache:
        _check_writable(Path(config.reference_cache), "reference_cache")
    # a weight, its two moments, in float32; two checkpoints are kept while a third is written
    before_a_reward = config.reward and config.eval_samples and config.eval_every
    checkpoints = KEPT_CHECKPOINTS + 1 if config.save_every or before_a_reward else 1
    bytes_a_weight = 12 * checkpoints
    if config.keep == "best":
        bytes_a_weight += 4 * (checkpoints + 1)
    needed = 0
    for weight in model.parameters():
        if weight.requires_grad:
            needed += bytes_a_weight * weight.numel()
    if config.lora_r == 0 or config.lora_merge:
        needed += getattr(torch, config.save_dtype).itemsize * count_weights(model)
    for path in run.glob("checkpoints/*"):
        needed -= path.stat().st_size
    free = shutil.disk_usage(_existing(run)).free
    if free < needed:
        raise InputError(
            f"output_dir {run}: {free / 1e9:.3g} GB are free on its disk, and the run needs "
            f"{needed / 1e9:.3g} GB for {checkpoints} checkpoints and the model. Make room, or "
            "give another output_dir; save_every=0 writes one checkpoint only, and with a reward "
            "one before each evaluation"
        )


def _existing(folder):
    """The folder itself, or the nearest one above it that is there."""
    folder = folder.absolute()
    while not exists(folder):
        folder = folder.parent
    return folder


def _check_writable(folder, setting):
    try:
        with tempfile.TemporaryFile(dir=_existing(folder)):
            pass
    except OSError as error:
        fault = f"{setting} {folder}: nothing can be written there ({error.strerror})"
        raise InputError(f"{fault}. Give another {setting}") from error


def is_finished(folder, config, overwrite=False):
    """Whether the run in this folder is finished and to be left alone.

    raises   InputError as check_noted does
    """
    check_noted(folder, config, overwrite)
    return not overwrite and exists(folder / "model")


def leave_finished(folder):
    """Say that a run is finished, and remove its checkpoints, which a kill may have left."""
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    say(f"{folder} is finished. If what it read has changed: --overwrite trains anew.")


def check_noted(folder, config, overwrite):
    """Refuse to go on in a folder that is not this run's, where it is not to be overwritten.

    raises   InputError if its settings are not these, or if the folder is not a run's
    """
    path = folder / "config.yaml"
    _check_is_a_runs(folder, config)
    if exists(path) and not overwrite:
        changes = changes_on_resume(config, _read_noted(path))
        if changes:
            raise InputError(f"{folder}: {'; '.join(changes)}. New output_dir, or --overwrite?")


def _check_is_a_runs(folder, config):
    """Refuse a folder that holds the program, or what no run has written and one would replace."""
    has_figures = exists(folder / "metrics.jsonl") and exists(folder / "config.yaml")
    foreign = ["train_dpo.py"]
    if not (has_figures or exists(folder / ".lock")):
        foreign += ["config.yaml", *OF_A_RUN, *FOLDERS_OF_A_RUN]
        if config.rounds:
            foreign.append(HELD_OUT_FILE)
    for name in foreign:
        if exists(folder / name):
            raise InputError(
                f"output_dir {folder} is no run's folder, for it holds {name}: what is there would "
                "be replaced. Give a folder of its own, such as output_dir=runs/mine"
            )


def _read_noted(path):
    """The settings that a run noted; InputError for a file that tells none, or not all of them."""
    try:
        saved = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        saved = None
    names = {field.name for field in fields(Config)}
    if not isinstance(saved, dict) or not names <= saved.keys():
        raise InputError(
            f"{path} is empty, broken or of another version, so nothing tells which settings made "
            "what is in this folder. Give another output_dir, or train anew with --overwrite"
        )
    return saved


@contextlib.contextmanager
def claim(folder, config, overwrite=False):
    """Hold the lock on a run's folder, with its settings noted there, while the run lasts.

    A dead process does not keep the lock. Several processes all wait for the first one's.

    raises   InputError, in all processes, if another one holds it or has finished the run
    """
    lock = FileLock(folder / ".lock")
    with fail_together(config.device):
        if is_first():
            _acquire(lock, folder)
            if not overwrite and not config.rounds and exists(folder / "model"):
                raise InputError(f"another process has finished the run in {folder} meanwhile")
            _prepare_folder(folder, config, overwrite)
    try:
        yield
    finally:
        lock.release()


def _acquire(lock, folder):
    try:
        lock.acquire(timeout=0)  # makes the folder too
    except Timeout:
        raise InputError(f"another process is training in {folder}") from None


def _prepare_folder(folder, config, overwrite):
    """Remove what an earlier run left, if it is to be trained anew, and note the settings."""
    noted = folder / "config.yaml"
    used = stand_ins_used
    if overwrite:
        used = {}  # they are of what was loaded last, which may be for another run of a sweep
        shutil.rmtree(folder / "model.tmp", ignore_errors=True)
        if (folder / "model").exists():  # first, and whole: half of it would count as finished
            os.replace(folder / "model", folder / "model.tmp")
        for name in ("checkpoints", "samples"):
            shutil.rmtree(folder / name, ignore_errors=True)
        for name in OF_A_RUN:
            (folder / name).unlink(missing_ok=True)
    elif noted.exists():
        _recall_stand_ins(noted, config)
    settings = yaml.safe_dump(asdict(config))
    write_text(noted, f"# stand-ins used: {used or 'none'}\n{settings}")


def _recall_stand_ins(noted, config):
    """Take the stand-ins of a run that goes on for used, where this process has loaded nothing."""
    first = noted.read_text(encoding="utf-8").partition("\n")[0]
    for name, stand_in in (config.offline or {}).items():
        if str({name: stand_in})[1:-1] in first and name not in revisions_used:
            stand_ins_used.setdefault(name, stand_in)
