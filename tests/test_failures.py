"""A run that fails: what the user is told to do, and the other runs of its sweep."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

import train_dpo
from helpers import CONFIG, ROOT, weights_bytes
from support import processes, sweep
from support.config import Config
from support.errors import InputError
from support.failures import Failures


def fail_in(monkeypatch, *errors):
    """Training that raises errors[i] in the i-th run, and none where that is None."""
    runs, train = iter(errors), train_dpo.train

    def faulty(*given):
        train(*given)
        if error := next(runs):
            raise error

    monkeypatch.setattr(train_dpo, "train", faulty)


def has_model(folder):
    return (Path(folder) / "model").exists()


ERRORS = [
    FloatingPointError("not finite three times running: lower lr or use float32"),
    torch.OutOfMemoryError("CUDA out of memory"),
    OSError(28, "No space left on device"),
    RuntimeError("a bug"),
    InputError("wrong in this run"),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_a_sweep_trains_the_other_runs_where_one_fails(dpo, monkeypatch, capsys, error):
    fail_in(monkeypatch, None, error, None)
    told = []
    monkeypatch.setattr(sweep, "summarize_sweep", lambda *_, failed: told.append(failed))
    assert dpo(beta=[0.1, 0.2, 0.3]) == 1
    names = ["out_beta0.1", "out_beta0.2", "out_beta0.3"]
    assert [has_model(name) for name in names] == [True, False, True]
    assert list(told[0]) == ["out_beta0.2"]
    reason = told[0]["out_beta0.2"]
    printed = capsys.readouterr().out
    assert reason and printed.rstrip().endswith(f"Failed: out_beta0.2: {reason}")
    assert ("Traceback" in printed) == (str(error) == "a bug")  # only a bug needs one


def test_a_failed_run_leaves_the_next_the_weights_that_it_has_alone(dpo, monkeypatch):
    assert dpo(beta=0.3, output_dir="alone") == 0
    step, calls = train_dpo.make_optimizer, []

    def spoiled(weights, config):
        calls.append(config.beta)
        for weight in weights.values():
            if config.beta == 0.2:  # what an error amid a backward pass leaves
                weight.grad = torch.ones_like(weight)
        if config.beta == 0.2:
            raise MemoryError
        return step(weights, config)

    monkeypatch.setattr(train_dpo, "make_optimizer", spoiled)
    assert dpo(beta=[0.1, 0.2, 0.3]) == 1 and calls == [0.1, 0.2, 0.3]
    assert weights_bytes("out_beta0.3") == weights_bytes("alone")


def test_a_run_that_cannot_be_prepared_takes_no_other_with_it(dpo, monkeypatch):
    prepare = train_dpo.prepare

    def faulty(config, is_dry_run):
        if config.batch_size == 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return prepare(config, is_dry_run)

    monkeypatch.setattr(train_dpo, "prepare", faulty)
    assert dpo(beta=[0.1, 0.2], batch_size=[2, 3]) == 1
    for beta in (0.1, 0.2):
        assert has_model(f"out_beta{beta}_batch_size2")
        assert not has_model(f"out_beta{beta}_batch_size3")


def test_a_sweep_that_overwrites_and_is_stopped_goes_on_with_no_old_run(dpo, monkeypatch, capsys):
    assert dpo(beta=[0.1, 0.2, 0.3]) == 0
    with monkeypatch.context() as patch:
        fail_in(patch, None, processes.Interrupted(signal.SIGINT))
        assert dpo("--overwrite", beta=[0.1, 0.2, 0.3]) == 130
    assert [has_model(f"out_beta{beta}") for beta in (0.1, 0.2, 0.3)] == [True, False, False]
    capsys.readouterr()
    assert dpo(beta=[0.1, 0.2, 0.3]) == 0
    assert has_model("out_beta0.3") and capsys.readouterr().out.count("is finished") == 1


def test_wrong_input_before_any_run_ends_a_sweep_at_once(dpo, capsys):
    assert dpo(beta=[0.1, 0.2], dataset="no.jsonl") == 2
    assert capsys.readouterr().out.count("no.jsonl: no such file") == 1


def test_wrong_input_of_a_later_run_is_a_failed_run(dpo, capsys):
    assert dpo(max_length=[64, 2, 65]) == 1
    assert [has_model(f"out_max_length{length}") for length in (64, 2, 65)] == [True, False, True]
    assert "Failed: out_max_length2: " in capsys.readouterr().out


def test_the_same_command_trains_only_the_failed_run_of_a_sweep_again(dpo, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        fail_in(patch, FloatingPointError("not finite"), None)
        assert dpo(beta=[0.1, 0.2]) == 1
    assert dpo(beta=[0.1, 0.2]) == 0
    assert has_model("out_beta0.1") and "out_beta0.2 is finished" in capsys.readouterr().out


def test_a_sweep_all_of_whose_runs_failed_ends_with_1(dpo, monkeypatch):
    fail_in(monkeypatch, FloatingPointError("not finite"), MemoryError())
    assert dpo(beta=[0.1, 0.2]) == 1


# What to do, said only where it helps


@pytest.mark.parametrize(
    "error, told, goes_on",
    [
        (FloatingPointError("not finite"), "another output_dir, or add --overwrite", False),
        (MemoryError(), "batch_size", False),
        (torch.OutOfMemoryError("CUDA out of memory"), "activation_checkpointing=true", False),
        (OSError(12, "Cannot allocate memory"), "out of memory", False),
        (RuntimeError("CUBLAS_STATUS_ALLOC_FAILED"), "out of memory", False),
        (OSError(28, "No space left on device"), "Make room on the disk of output_dir", True),
        (SafetensorError("I/O error: No space left"), "Make room on the disk of output_dir", True),
        (torch.AcceleratorError("CUDA error"), "stops there again", True),
    ],
    ids=repr,
)
def test_the_same_command_is_said_to_go_on_only_where_it_can(
    dpo, monkeypatch, capsys, error, told, goes_on
):
    fail_in(monkeypatch, error)
    assert dpo() == 1
    printed = capsys.readouterr().out.partition("Stopped: ")[2]
    assert told in printed and ("same command goes on" in printed) == goes_on
    assert ("would likely end the same way" in printed) != goes_on


@pytest.mark.parametrize("error", [RuntimeError("a bug"), NotImplementedError("x"), KeyError("y")])
def test_a_bug_is_no_stop_that_the_same_command_goes_on_from(dpo, monkeypatch, capsys, error):
    fail_in(monkeypatch, error)
    with pytest.raises(type(error)):
        dpo()
    assert "same command" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "swept", [{"revision": [None, "v1"]}, {"revision": [None, "v1"], "beta": [0.1, 0.2]}], ids=str
)
def test_null_and_a_value_are_swept_to_their_table(dpo, capsys, swept):
    assert dpo(**swept) == 0
    printed = capsys.readouterr().out
    assert "The sweep is in sweep.csv and sweep.png" in printed
    table = printed[printed.rindex("held-out loss") :]
    assert ("null" in table or "None" in table) and "v1" in table


def test_nothing_at_import_or_in_a_run_is_for_linux_alone(overrides):
    """The libraries come first: what is hidden and faked afterwards is for this project alone.

    pathlib would make Windows paths where os.name is nt, which nothing here can open.
    """
    hidden = (
        "import os, sys, torch, transformers, datasets, pandas, yaml, pydantic, filelock\n"
        "import matplotlib.figure, torch.utils.benchmark, torch.distributed.fsdp\n"
        "import torch.distributed.tensor, multiprocessing.pool\n"
        "from transformers import LlamaForCausalLM, PreTrainedTokenizerFast\n"
        "sys.modules['resource'] = sys.modules['fcntl'] = sys.modules['pwd'] = None\n"
        "del os.sync, os.getuid, os.fork, os.killpg, os.setsid\n"
        "import pathlib, signal\n"
        "pathlib.WindowsPath = pathlib.PosixPath\n"
        "for name in ('SIGKILL', 'SIGHUP', 'SIGALRM', 'SIGUSR1', 'pthread_sigmask'):\n"
        "    delattr(signal, name)\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "sys.platform, os.name = 'win32', 'nt'\n"
        "import train_dpo\n"
        f"sys.exit(train_dpo.main(['--config', {CONFIG!r}, *sys.argv[1:]]))\n"
    )
    command = [sys.executable, "-c", hidden, *overrides(save_every=1, sample_prompts=1)]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    report = Path("out/report.md").read_text()
    assert "tokens/s, 0 updates skipped" in report and Path("out/model/model.safetensors").exists()


def test_a_later_round_that_fails_in_a_sweep_lets_the_other_runs_begin(capsys):
    config = Config(output_dir="run")
    failures = Failures(sweep=True)
    with pytest.raises(InputError), failures.noted(config):
        raise InputError("wrong for all")
    Path("run/round_1/model").mkdir(parents=True)
    with failures.noted(config):
        raise InputError("wrong in round 2")
    assert failures.reasons == {"run": "wrong in round 2"} and failures.summarize() == 1
    assert "Failed: run: wrong in round 2" in capsys.readouterr().out
