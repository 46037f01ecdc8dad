"""What ends a run too early: what to tell the user, and how the other runs of a sweep go on."""

import contextlib
import re
import traceback
from pathlib import Path

import torch
from safetensors import SafetensorError

from support.errors import InputError, first_line
from support.processes import WORLD, say, stop_if_signalled

OTHER_SETTINGS = (
    "The same command would likely end the same way. With other settings it is another run: give "
    "it another output_dir, or add --overwrite"
)
OUT_OF_MEMORY = re.compile("allocate mem|out of memory|ALLOC_FAILED")  # in errors of other types


def advise(error):
    """What stopped a run, and in a second line what to do; None for what only a bug explains."""
    if isinstance(error, InputError):
        return str(error)
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or OUT_OF_MEMORY.search(str(error)):
        return (
            "out of memory: set activation_checkpointing=true, or lower batch_size, or max_length "
            f"and with it max_prompt_length\n{OTHER_SETTINGS}"
        )
    if isinstance(error, FloatingPointError):
        return f"{error}\n{OTHER_SETTINGS}"
    if isinstance(error, OSError | SafetensorError):
        return (
            f"{error}\nMake room on the disk of output_dir and reference_cache, or mend what this "
            "names; then the same command goes on (without --overwrite)"
        )
    if isinstance(error, torch.AcceleratorError | torch.distributed.DistError):
        return (
            f"{first_line(error)}\nThe same command goes on (without --overwrite). If it stops "
            "there again, the device or this program is at fault"
        )
    return None


class Failures:
    """The runs of a sweep that failed: `reasons` by output_dir, in a line each.

    One run alone raises its failure, and so does one of several processes: the others wait for it.
    """

    def __init__(self, sweep):
        self.reasons = {}
        self.go_on = sweep and WORLD == 1
        self.started = False  # whether any run was more than wrong input

    @contextlib.contextmanager
    def noted(self, config):
        """Note what a run raises within it, and say so, instead of ending the sweep.

        raises   InputError as long as no run could start: it is mostly wrong for all of them;
                 Interrupted, before the run, if a signal came while the one before was finished
        """
        stop_if_signalled()
        try:
            yield
            self.started = True
        except Exception as error:  # whatever it is, it must not take the other runs along
            has_trained = any(Path(config.output_dir).glob("round_*/model"))
            self.started = self.started or has_trained or not isinstance(error, InputError)
            if not (self.go_on and self.started):
                raise
            advice = advise(error)
            known = advice is not None
            say(f"Failed: {config.output_dir}: {advice if known else traceback.format_exc()}")
            reason = advice.splitlines()[0] if known else first_line(error)
            self.reasons[config.output_dir] = reason

    def summarize(self):
        """Say again which runs failed, below what the others printed; returns the exit code."""
        for folder, reason in self.reasons.items():
            say(f"Failed: {folder}: {reason}")
        return 1 if self.reasons else 0
