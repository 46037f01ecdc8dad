"""One process or several: torchrun's ranks, collectives, sharded tensors, signals, and what to say.

torchrun starts a process for each GPU. The first of them writes the files and prints; the others
only compute. Without torchrun the one process is the first.
"""

import contextlib
import os
import signal
import sys
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, distribute_tensor
from tqdm import tqdm

from support.errors import InputError

RANK = int(os.environ.get("RANK", 0))
WORLD = int(os.environ.get("WORLD_SIZE", 1))
_signals = []  # numbers of SIGINT and SIGTERM, once they have arrived


class Interrupted(BaseException):
    """A signal asked the run to stop; `number` is the signal's. No failure, so no Exception."""

    def __init__(self, number):
        super().__init__(f"signal {number}")
        self.number = number


def is_first():
    """Whether this process is the one that writes files and prints."""
    return RANK == 0


def start():
    """Watch for signals, and join the other processes if there are any."""
    _on_signal(_end_at_once)
    if WORLD > 1:
        if torch.accelerator.is_available():
            torch.accelerator.set_device_index(int(os.environ["LOCAL_RANK"]))
        # the others wait for as long as the first one writes a checkpoint
        dist.init_process_group(timeout=timedelta(hours=12))


def leave(code):
    """End this process with an exit code."""
    if is_first():
        sys.exit(code)
    # gloo's threads may still hold tensors, and abort if Python takes itself down before them
    os._exit(code)


def say(text, from_all=False):
    """Print above any progress bar: once, or from_all processes that have something to say."""
    if is_first() or from_all:
        tqdm.write(text)


def progress(title, total, done=0, unit="pair"):
    """A tqdm bar on a terminal; elsewhere a line, for logs are no place for a bar."""
    if not sys.stderr.isatty():
        say(f"{title}: {total} {unit}s")
    hidden = None if is_first() else True  # None: hidden unless on a terminal
    shape = {"unit": unit, "dynamic_ncols": True}
    return tqdm(desc=title, total=total, initial=done, disable=hidden, **shape)


def sum_over_processes(tensor):
    """The sum of a tensor over all processes, in place."""
    if WORLD > 1:
        dist.all_reduce(tensor)
    return tensor


def any_of(flag, device):
    """Whether it is so in any process; all must ask, and all get the same answer."""
    number = torch.tensor(float(flag), device=device)
    return bool(sum_over_processes(number).item())


def same_for_all(digest, name, device):
    """The digest, where all processes have the same; all must ask.

    digest   hexadecimal
    name     what it is of
    raises   InputError, in all processes, where they have not
    """
    number = int(digest[:15], 16)  # as much of it as an int64 holds
    first = torch.tensor(number if is_first() else 0, device=device)
    if any_of(sum_over_processes(first).item() != number, device):
        raise InputError(
            f"the processes have not read the same {name}: the Hub may have been out of reach for "
            "some of them, or a branch moved on meanwhile. Start again, or give local paths"
        )
    return digest


def wait_for_all():
    """Return once all processes are here."""
    if WORLD > 1:
        dist.barrier()


@contextlib.contextmanager
def fail_together(device):
    """Raise the first process's InputError in all of them, which else wait for it in vain."""
    fault = None
    try:
        yield
    except InputError as error:
        fault = error
    failed = sum_over_processes(torch.tensor(float(fault is not None), device=device))
    if fault:
        raise fault
    if failed:
        raise InputError("another process has found what is wrong")


def whole(tensor):
    """The whole of a tensor that FSDP2 may have sharded; all processes must ask for it."""
    tensor = tensor.detach()
    if isinstance(tensor, DTensor):
        return tensor.full_tensor()
    return tensor


def gather(tensors):
    """Whole tensors in the first process's main memory; the others get tensors without data."""
    target = "cpu" if is_first() else "meta"
    return {name: whole(tensor).to(target) for name, tensor in tensors.items()}


def shard_like(tensor, other):
    """A copy of a whole tensor on the device of `other`, sharded as that is."""
    if isinstance(other, DTensor) and tensor.ndim:
        mesh, placements = other.device_mesh, other.placements
        return distribute_tensor(tensor, mesh, placements, src_data_rank=None)
    return tensor.to(other.device, copy=True)


def share_rows(rows):
    """This process's part of some rows, as (row, share).

    FSDP2 needs the same number of passes in all processes: one for which no row is left runs
    another's with a share of 0.
    """
    for start in range(0, len(rows), WORLD):
        index = start + RANK
        if index < len(rows):
            yield rows[index], 1.0
        else:
            yield rows[-1], 0.0


def _on_signal(handler):
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handler)


@contextlib.contextmanager
def finish_step_first():
    """Let a signal wait for stop_requested(); outside of it one ends the process at once."""
    _on_signal(_note_signal)
    try:
        yield
    finally:
        _on_signal(_end_at_once)


def _note_signal(number, frame):
    """Note a signal, to stop after the step in hand; a second one stops at once."""
    _signals.append(number)
    signal.signal(number, signal.SIG_DFL)
    _tell("Finishing what is in hand (a step, an evaluation, the model). Once more stops at once.")


def _end_at_once(number, frame):
    """End without unwinding: threads that hang in a download would be waited for."""
    _tell(
        "Interrupted outside training: the same command goes on (without --overwrite, if anything "
        "was trained or sampled)."
    )
    os._exit(128 + number)


def _tell(text):
    """Print from a signal handler, which may have stopped a print in the middle."""
    if is_first():
        os.write(2, f"\n{text}\n".encode())


def stop_requested(device):
    """Whether a signal has reached any process; all must ask, and all get the same answer."""
    return any_of(len(_signals) > 0, device)


def stop_if_signalled():
    """Raise Interrupted if a signal has reached this process."""
    if _signals:
        raise Interrupted(_signals[0])


def stop():
    """Raise Interrupted with the signal that arrived, here or in another process."""
    stop_if_signalled()
    raise Interrupted(signal.SIGTERM)
