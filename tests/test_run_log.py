"""The progress bar: what it shows on terminals of different widths."""

import errno
import fcntl
import math
import os
import pty
import re
import struct
import sys
import termios
from pathlib import Path
from types import SimpleNamespace

from helpers import figures_of
from support import run_log
from support.config import Config


def shown_at(columns, monkeypatch):
    """What a step shows on a terminal of so many columns."""
    terminal, end = pty.openpty()
    fcntl.ioctl(end, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    monkeypatch.setattr(sys, "stderr", os.fdopen(end, "w"))
    figures = figures_of(0.5625, math.log(2), -0.00012345) | {"tokens": 123456}
    steps = [[[0, 1]]] * 30000
    with run_log.RunLog(Path(), Config(), steps, 0, 0.0, 1.234567e-7) as log:
        log.log_step(1, figures, 100.0)
        log.bar.refresh()
    sys.stderr.close()
    return re.split(r"[\r\n]+", read_to_the_end(terminal).strip())[-1]


def read_to_the_end(terminal):
    """All that was written to a terminal that is closed at its other end, as Linux's EIO tells."""
    shown = b""
    while True:
        try:
            shown += os.read(terminal, 4096)
        except OSError as error:
            assert error.errno == errno.EIO
            return shown.decode()


def test_the_bar_shows_loss_and_accuracy_at_80_columns(monkeypatch):
    shown = shown_at(80, monkeypatch)
    assert len(shown) <= 80 and shown.endswith("]")
    assert "loss 0.6931, accuracy 0.5625]" in shown


def test_the_bar_shows_all_figures_at_140_columns(monkeypatch):
    shown = shown_at(140, monkeypatch)
    assert len(shown) <= 140 and shown.endswith(", peak share 0.0001524]")
    assert "loss 0.6931, accuracy 0.5625, margin -0.0001234, tokens/s 1235," in shown


def test_the_time_left_is_that_of_steps_without_the_evaluation_before_them(monkeypatch, capsys):
    clock = [1000.0]
    monkeypatch.setattr(run_log, "time", SimpleNamespace(time=lambda: clock[0]))
    figures = figures_of(0.5, 0.69, 0.0) | {"tokens": 10}
    with run_log.RunLog(Path(), Config(), [[[0, 1]]] * 20, 0, 0.0, 1.0) as log:
        clock[0] += 300
        log.log_evaluation(0, {"loss": 0.69})
        for step in (1, 2):
            clock[0] += 5
            log.log_step(step, figures, 5.0)
    assert "training 2/20, 90 s left" in capsys.readouterr().out
