"""Nothing can lose a run: kills, signals, damage, full disks, bad numbers, and what is never read.

Most of a run's time is importing libraries, so the runs here are forks: run as a program, this file
is a nursery that imports train_dpo once and then forks a `train_dpo.main(...)` for each request.
"""

import importlib
import itertools
import json
import math
import os
import pickle
import random
import re
import resource
import select
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import transformers.modeling_utils
import yaml
from matplotlib.figure import Figure
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import data
import dpo_loss
import train_dpo
from helpers import CONFIG, ROOT, read_metrics, records, weights_bytes, write_jsonl, write_model
from support import checkpoint, files, processes, report, rounds, run_log
from support.cache import read_or_compute
from support.checkpoint import claim
from support.config import Config, _Loader, read_config
from support.errors import InputError
from support.model import load_model

STEPS, SAVE_EVERY = 10, 2
PHASES = {
    "prepare": "preparing",
    "train": "training",
    "evaluate": "evaluation",
    "save_checkpoint": "checkpoint",
    "finish": "finishing",
    "save_model": "model",
    "make_pairs": "sampling",
    "score_answers": "scoring",
}


# where a function is looked up that train_dpo does not call by its own name
ROOMS = {
    "draw_curves": report,
    "finish": report,
    "save_model": report,
    "write_atomically": files,
    "make_pairs": rounds,
    "write_records": rounds,
    "score_answers": rounds,
}


def write_config(folder):
    """Model, pairs and config.yaml in a folder; returns the config's path."""
    settings = {
        "model": write_model(folder / "model"),
        "dataset": write_jsonl(folder / "pairs.jsonl", records(15)),
        "train_pairs": STEPS,
        "eval_pairs": 4,
        "epochs": 2,
        "lr": 1e-3,
        "warmup_ratio": 0.2,
        "dtype": "float32",
        "device": "cpu",
        "eval_every": 5,
        "save_every": SAVE_EVERY,
        "sample_prompts": 1,
        "output_dir": "run",
        "reference_cache": str(folder / "cache"),
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    return folder / "config.yaml"


def kill_at_event(number):
    """SIGKILL right before (even number) or after (odd) a call that writes, renames or removes."""
    moments = itertools.count()

    def kill_if_due():
        if next(moments) == number:
            os.kill(os.getpid(), signal.SIGKILL)

    def wrap(module, name):
        original = getattr(module, name)

        def wrapped(*args, **kwargs):
            kill_if_due()
            result = original(*args, **kwargs)
            kill_if_due()
            return result

        setattr(module, name, wrapped)

    for name in ("replace", "fsync", "sync", "mkdir", "unlink"):
        wrap(os, name)
    wrap(shutil, "rmtree")
    wrap(files, "save_file")
    wrap(transformers.modeling_utils, "safe_save_file")


def around_call(name, number, before, after=lambda: None):
    """Do something before the number-th call (from 1) of a function, and after it."""
    module = ROOMS.get(name, train_dpo)
    original, calls = getattr(module, name), [0]

    def wrapped(*args, **kwargs):
        calls[0] += 1
        if calls[0] != number:
            return original(*args, **kwargs)
        before()
        try:
            return original(*args, **kwargs)
        finally:
            after()

    setattr(module, name, wrapped)


def signal_at(name, call, number):
    """A signal to the run itself at the begin of the call-th call of a function."""
    around_call(name, call, lambda: os.kill(os.getpid(), number))


def kill_within_file(name, call, size):
    """The kernel kills where a file grows beyond `size` in the call-th call of a function."""
    full_disk(name, call, size, signal.SIG_DFL)


def limit_files(size, action=signal.SIG_IGN):
    """No file may grow beyond `size` bytes: an error, or with SIG_DFL a kill by the kernel."""
    signal.signal(signal.SIGXFSZ, action)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def full_disk(name, call, size, action=signal.SIG_IGN):
    """No file may grow beyond `size` bytes during the call-th call of a function."""
    around_call(
        name,
        call,
        lambda: limit_files(size, action),
        lambda: limit_files(resource.getrlimit(resource.RLIMIT_FSIZE)[1]),
    )


def torn_row(number, size, action=signal.SIG_IGN):
    """No file may grow beyond what metrics.jsonl has before its number-th row, and `size` bytes."""
    count, original = [0], open

    def opened(path, mode="r", *args, **kwargs):
        file = original(path, mode, *args, **kwargs)
        if str(path).endswith("metrics.jsonl") and "a" in mode:
            count[0] += 1
            if count[0] == number:
                limit_files(os.path.getsize(path) + size, action)
        return file

    run_log.open = opened


def out_of_memory(call, where):
    """PyTorch's own error, of CUDA or of the CPU, at the call-th step."""

    def fail():
        if where == "cpu":
            torch.empty(2**45)
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    around_call("train_step", call, fail)


def not_finite(steps, where):
    """A loss or a gradient that is nan in these calls of train_step; checks that weights stay."""
    original_step, original_loss, calls = train_dpo.train_step, dpo_loss.dpo_loss, [0]
    inside = []  # a step, not an evaluation after it

    def step(*args, **kwargs):
        calls[0] += 1
        optimizer = next(a for a in args if isinstance(a, torch.optim.Optimizer))
        weights = [p for group in optimizer.param_groups for p in group["params"]]
        state = lambda: [t.clone() for w in weights for t in (w.data, *optimizer.state[w].values())]
        before = state()
        inside.append(calls[0])
        figures = original_step(*args, **kwargs)
        inside.pop()
        same = all(map(torch.equal, before, state()))
        told = "unchanged" if same else "changed"
        print(f"call {calls[0]}: weights and moments {told}", flush=True)
        return figures

    def loss(policy_chosen_logps, *args, **kwargs):
        losses, *rewards = original_loss(policy_chosen_logps, *args, **kwargs)
        if inside and calls[0] in steps:
            if where == "loss":
                losses = losses * float("nan")
            elif losses.requires_grad:
                losses.register_hook(lambda grad: grad * float("nan"))
        return losses, *rewards

    train_dpo.train_step, dpo_loss.dpo_loss = step, loss


FAULTS = {
    "kill_at_event": kill_at_event,
    "kill_within_file": kill_within_file,
    "signal_at": signal_at,
    "full_disk": full_disk,
    "torn_row": torn_row,
    "out_of_memory": out_of_memory,
    "not_finite": not_finite,
}


def nursery():
    """With the trainer imported, fork a run for each line of stdin and answer with its end."""
    for module in ("pandas", "transformers.models.llama.modeling_llama"):
        importlib.import_module(module)
    # most of a tiny run would be drawing; the file is still written and renamed
    Figure.savefig = lambda figure, path, **options: Path(path).write_bytes(b"a picture")
    train_dpo.matmul_peak = lambda config: 1e12  # nor is the machine measured for each
    for line in sys.stdin:
        request = json.loads(line)
        reading, writing = os.pipe()
        pid = os.fork()
        if not pid:
            os.close(reading)
            _child(request, writing)
        os.close(writing)
        print(json.dumps(_watch(pid, reading, request["signal"])), flush=True)
        os.close(reading)


def _child(request, writing):
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.chdir(request["cwd"])
    stack, code = ["starting"], 1
    if request["fault"]:
        name, *arguments = request["fault"]
        FAULTS[name](*arguments)

    def tell(name, original):
        def told(*args, **kwargs):
            stack.append(PHASES[name])
            os.write(writing, f"+{stack[-1]}\n".encode())
            try:
                return original(*args, **kwargs)
            finally:
                stack.pop()
                os.write(writing, f"-{stack[-1]}\n".encode())

        return told

    for name in PHASES:
        module = ROOMS.get(name, train_dpo)
        setattr(module, name, tell(name, getattr(module, name)))
    try:
        code = train_dpo.main(request["argv"])
    except SystemExit as stop:
        code = stop.code
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _watch(pid, reading, plan):
    """Send a signal so long after the run enters a phase for so-many-th time; returns its end.

    plan  None or [signal, phase, entry (from 1), seconds]
    """
    deadline, phase, entries, lengths, entered = None, "starting", Counter(), {}, time.time()
    while True:
        wait = None if deadline is None else max(0, deadline - time.time())
        if not select.select([reading], [], [], wait)[0]:
            os.kill(pid, plan[0])
            if plan[0] == signal.SIGSTOP:
                return {"pid": pid}
            deadline = None
            continue
        told = os.read(reading, 4096)
        if not told:
            break
        for line in told.decode().splitlines():
            now = time.time()
            lengths[phase] = lengths.get(phase, 0) + now - entered
            phase, entered = line[1:], now
            entries[phase] += line[0] == "+"
            if plan and [phase, entries[phase], "+"] == [plan[1], plan[2], line[0]]:
                deadline = now + plan[3]
    _, status = os.waitpid(pid, 0)
    code = os.waitstatus_to_exitcode(status)
    return {"code": code, "phase": phase, "lengths": lengths, "entries": entries}


class Runner:
    """Runs in folders of their own, forked by one nursery."""

    def __init__(self, folder):
        self.folder, self.config, self.names = folder, write_config(folder), Counter()
        self.process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        )

    def new(self, name="work", source=None):
        """A new working folder, or a copy of another one."""
        self.names[name] += 1
        path = self.folder / f"{name}{self.names[name]}"
        if source:
            shutil.copytree(source, path)
        else:
            path.mkdir()
        return path

    def __call__(self, work, *arguments, fault=None, signal=None):
        """Run the command in `work`; returns its end, with `text`, what it printed."""
        log = work / "log.txt"
        start = log.stat().st_size if log.exists() else 0
        request = {
            "argv": ["--config", str(self.config), *arguments],
            "cwd": str(work),
            "log": str(log),
            "fault": fault,
            "signal": signal,
        }
        print(json.dumps(request), file=self.process.stdin, flush=True)
        end = json.loads(self.process.stdout.readline())
        return end | {"text": log.read_text()[start:]}

    def close(self):
        self.process.stdin.close()
        self.process.wait()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    runner = Runner(tmp_path_factory.mktemp("resume"))
    yield runner
    runner.close()


@pytest.fixture(scope="module")
def undisturbed(run):
    """The folder of a run that nothing disturbed."""
    work = run.new("undisturbed")
    end = run(work)
    assert end["code"] == 0, end["text"]
    (run.folder / "lengths.json").write_text(json.dumps(end["lengths"]))
    return work


@pytest.fixture(scope="module")
def unfinished(run):
    """The folder of a run that SIGINT stopped after step 7, with the checkpoints of 6 and 7."""
    work = run.new("unfinished")
    end = run(work, fault=["signal_at", "train_step", 7, signal.SIGINT])
    assert end["code"] == 130, end["text"]
    assert checkpoints(work) == [6, 7]
    return work


def checkpoint_paths(work):
    """Files or folders of the checkpoints by their step, oldest first."""
    paths = (work / "run/checkpoints").glob("step_*")
    steps = {int(re.search(r"\d+", path.name)[0]): path for path in paths if path.suffix != ".tmp"}
    return dict(sorted(steps.items()))


def checkpoints(work):
    """The steps of which there is a checkpoint."""
    return list(checkpoint_paths(work))


def resumed(text):
    """The step after which a run went on, by what it printed; 0 if it started anew."""
    found = re.search(r"Resuming.*?step[_ ](\d+)", text)
    return int(found[1]) if found else 0


def steps(work, split):
    """The steps of which metrics.jsonl has a row, in its order."""
    return [row["step"] for row in read_metrics(work / "run", split)]


def assert_same(work, undisturbed):
    """The same weights to the byte, the same rows, every step once, and nothing left behind."""
    names = lambda folder: sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))
    assert names(work / "run") == names(undisturbed / "run")
    for path in (undisturbed / "run/model").iterdir():
        if path.name != "README.md":
            assert path.read_bytes() == (work / "run/model" / path.name).read_bytes(), path.name
    assert steps(work, "train") == [*range(1, STEPS + 1)]
    assert steps(work, "eval") == [0, 5, 10]
    assert read_metrics(work / "run") == read_metrics(undisturbed / "run")


def draw_kill(draw, lengths, size):
    """A random moment: at a file operation, within a file, or so long after a phase began.

    lengths  seconds that each phase of an undisturbed run took in all
    size     bytes of the model's file; a checkpoint has three times as many
    """
    kind, saves = draw.random(), draw.randint(1, 3)
    if kind < 0.35:
        return {"fault": ["kill_at_event", draw.randrange(70)]}
    if kind < 0.5:
        faults = [
            ["kill_within_file", "save_checkpoint", saves, draw.randrange(3 * size)],
            ["kill_within_file", "save_model", 1, draw.randrange(size)],
            ["kill_within_file", "draw_curves", saves, draw.randrange(9)],
            ["torn_row", draw.randint(2, 9), draw.randrange(200), signal.SIG_DFL],
        ]
        return {"fault": draw.choice(faults)}
    entries = [("preparing", 1), ("training", 1), ("training", 1)]
    entries += [("evaluation", draw.randint(1, 2)), ("checkpoint", saves), ("checkpoint", saves)]
    entries += [("finishing", 1), ("model", 1)]
    phase, entry = draw.choice(entries)
    length = lengths[phase] / {"checkpoint": STEPS / SAVE_EVERY, "evaluation": 3}.get(phase, 1)
    return {"signal": [signal.SIGKILL, phase, entry, draw.uniform(0, length)]}


def survive(run, undisturbed, kills, seed):
    """Kill runs until so many kills are done; each run that ends must equal the undisturbed one.

    returns  kills by the phase in which they fell, and the number of runs that ended
    """
    lengths = json.loads((run.folder / "lengths.json").read_text())
    size = (undisturbed / "run/model/model.safetensors").stat().st_size
    draw, fell, ended = random.Random(seed), Counter(), 0
    while fell.total() < kills:
        work = run.new("killed")
        while True:
            more = fell.total() < kills
            end = run(work, **(draw_kill(draw, lengths, size) if more else {}))
            if end["code"] == 0:
                break
            assert end["code"] in (-signal.SIGKILL, -signal.SIGXFSZ), end["text"]
            fell[end["phase"]] += 1
        again = run(work)  # what a kill left after the model was whole, the next command removes
        assert again["code"] == 0
        assert_same(work, undisturbed)
        ended += 1
    print(f"\n{fell.total()} kills in {ended} runs survived: {dict(fell)}")
    return fell, ended


def test_24_sigkills_at_random_moments_leave_the_same_bytes(run, undisturbed):
    fell, _ = survive(run, undisturbed, kills=24, seed=1)
    assert fell["training"] and fell["checkpoint"] and fell["finishing"] + fell["model"], fell


@pytest.mark.slow
def test_200_sigkills_at_random_moments_leave_the_same_bytes(run, undisturbed):
    fell, _ = survive(run, undisturbed, kills=200, seed=2)
    assert fell["training"] > 20 and fell["checkpoint"] > 20 and fell["finishing"] + fell["model"]


def finished_as(work, run, undisturbed):
    """What the same command prints as it ends the run in `work`, equal to the undisturbed one."""
    end = run(work)
    assert end["code"] == 0, end["text"]
    assert "Traceback" not in end["text"]
    assert_same(work, undisturbed)
    return end["text"]


def clear(end, code):
    """The last three lines that a run printed, having ended with this exit code, no traceback."""
    assert end["code"] == code, end["text"]
    assert "Traceback" not in end["text"], end["text"]
    lines = end["text"].strip().splitlines()[-3:]
    print("\n" + "\n".join(lines))
    return "\n".join(lines)


def test_sigint_saves_says_how_to_go_on_and_the_same_command_ends_with_the_same_bytes(
    run, undisturbed
):
    work = run.new()
    end = run(work, fault=["signal_at", "train_step", 3, signal.SIGINT])
    assert "same command" in clear(end, 130)
    # at once, before the step that is finished first is told
    assert 0 < end["text"].index("Finishing what is in hand") < end["text"].index("training 3/")
    assert checkpoints(work) == [2, 3]
    assert steps(work, "train") == [1, 2, 3]
    assert resumed(finished_as(work, run, undisturbed)) == 3


def test_sigterm_to_the_real_command_saves_and_writes_no_token_anywhere(run, undisturbed):
    work = run.new()
    tokens = {"HF_TOKEN": "hf_secret-value", "WANDB_API_KEY": "secret-value-of-wandb"}
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "train_dpo.py"), "--config", str(run.config)],
        cwd=work,
        env=os.environ | tokens | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    metrics = work / "run/metrics.jsonl"
    rows_written = lambda: metrics.read_text().count("\n") if metrics.exists() else 0
    while process.poll() is None and rows_written() < 2:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    text = process.communicate()[0]
    assert "same command" in clear({"code": process.returncode, "text": text}, 143)
    assert checkpoints(work) and max(checkpoints(work)) < STEPS
    finished_as(work, run, undisturbed)
    for path in filter(Path.is_file, run.folder.rglob("*")):
        assert b"secret-value" not in path.read_bytes(), path
    assert "secret-value" not in text


def test_a_signal_during_an_evaluation_loses_no_step(run, undisturbed):
    work = run.new()
    end = run(work, fault=["signal_at", "evaluate", 2, signal.SIGTERM])  # after step 5
    clear(end, 143)
    assert max(checkpoints(work)) == 5
    finished_as(work, run, undisturbed)


def largest(checkpoint):
    """The file that holds the tensors."""
    files = [path for path in (checkpoint, *checkpoint.glob("*")) if path.is_file()]
    return max(files, key=lambda path: path.stat().st_size)


def flip_a_byte(checkpoint):
    content = bytearray(largest(checkpoint).read_bytes())
    content[len(content) // 2] ^= 1
    largest(checkpoint).write_bytes(content)


def cut_a_byte(checkpoint):
    os.truncate(largest(checkpoint), largest(checkpoint).stat().st_size - 1)


def empty(checkpoint):
    """As a power cut can leave it."""
    os.truncate(largest(checkpoint), 0)


def zero_the_start(checkpoint):
    content = largest(checkpoint).read_bytes()
    largest(checkpoint).write_bytes(bytes(4096) + content[4096:])


def change_its_step(checkpoint, value):
    """Another number where the file holds the step after which it was saved; the rest as it was."""
    path = largest(checkpoint)
    with safe_open(path, "pt") as file:
        notes = file.metadata()
    tensors = load_file(path)
    tensors["position"][0] = value
    save_file(tensors, path, notes)


def flip_its_step(checkpoint):
    change_its_step(checkpoint, 5)


def spoil_its_step(checkpoint):
    change_its_step(checkpoint, math.nan)


DAMAGES = (flip_a_byte, cut_a_byte, empty, zero_the_start, flip_its_step, spoil_its_step)


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_damaged_checkpoint_is_recognised_and_the_one_before_used(
    damage, run, undisturbed, unfinished
):
    work = run.new(source=unfinished)
    damage(checkpoint_paths(work)[7])
    text = finished_as(work, run, undisturbed)
    assert re.search("step_0000007.* is damaged", text) and resumed(text) == 6


@pytest.mark.parametrize("damage", [flip_a_byte, spoil_its_step], ids=lambda d: d.__name__)
def test_two_damaged_checkpoints_start_the_run_anew_and_its_new_ones_are_kept(
    damage, run, undisturbed, unfinished
):
    work = run.new(source=unfinished)
    checkpoint_paths(work)[6].unlink()
    shutil.copyfile(checkpoint_paths(work)[7], work / "run/checkpoints/step_0000006.safetensors")
    for path in checkpoint_paths(work).values():
        damage(path)
    end = run(work, fault=["signal_at", "train_step", 3, signal.SIGINT])
    assert end["code"] == 130 and end["text"].count("is damaged") == 2, end["text"]
    assert not resumed(end["text"])
    assert resumed(finished_as(work, run, undisturbed)) == 3


def change_a_number(path):
    """The exponent of the last one that the file holds."""
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [change_a_number, cut_a_byte], ids=lambda d: d.__name__)
def test_a_damaged_reference_cache_is_computed_anew(damage, run, undisturbed):
    work, command = run.new(), ("reference_cache=cache",)
    run(work, *command, fault=["signal_at", "train_step", 1, signal.SIGINT])
    (cache,) = (work / "cache").glob("*.safetensors")
    damage(cache)
    end = run(work, *command)
    assert end["code"] == 0, end["text"]
    assert_same(work, undisturbed)


def test_a_torn_line_of_metrics_is_left_out(run, undisturbed, unfinished):
    work = run.new(source=unfinished)
    with open(work / "run/metrics.jsonl", "a") as file:
        file.write('{"step": 8, "split": "tra')
    finished_as(work, run, undisturbed)


@pytest.mark.parametrize("call", [1, 2], ids=["settings", "metrics"])
def test_a_kill_while_a_small_file_is_rewritten_leaves_the_old_one(
    call, run, undisturbed, unfinished
):
    work = run.new(source=unfinished)
    files = [work / "run/config.yaml", work / "run/metrics.jsonl"]
    before = [path.read_bytes() for path in files]
    end = run(work, fault=["kill_within_file", "write_atomically", call, 100])
    assert end["code"] == -signal.SIGXFSZ, end["text"]
    assert [path.read_bytes() for path in files] == before
    finished_as(work, run, undisturbed)


def test_changed_settings_of_an_unfinished_run_are_refused_by_name(run, undisturbed, unfinished):
    work = run.new(source=unfinished)
    text = clear(run(work, "lr=2e-3", "beta=0.2", "seed=1", "save_every=3"), 2)
    assert all(name in text for name in ("lr was 0.001", "beta was 0.1", "seed was 42")), text
    assert "save_every" not in text and "--overwrite" in text
    finished_as(work, run, undisturbed)


def test_settings_that_change_no_weight_may_change_in_an_unfinished_run(
    run, undisturbed, unfinished
):
    work = run.new(source=unfinished)
    end = run(work, "save_every=3", "eval_every=0", "reference_cache=null")
    assert end["code"] == 0 and resumed(end["text"]) == 7, end["text"]
    model = "run/model/model.safetensors"
    assert (work / model).read_bytes() == (undisturbed / model).read_bytes()


def test_a_finished_run_is_left_alone_and_overwrite_trains_it_anew(run, undisturbed):
    work, model = run.new(source=undisturbed), "run/model/model.safetensors"
    files = lambda: {path: path.stat().st_mtime_ns for path in (work / "run").rglob("*")}
    before = files()
    assert "is finished" in clear(run(work), 0)
    assert "lr was 0.001, is 0.0005" in clear(run(work, "lr=5e-4"), 2)
    assert files() == before
    assert run(work, "lr=5e-4", "--overwrite")["code"] == 0
    assert steps(work, "train") == [*range(1, STEPS + 1)]
    assert (work / model).read_bytes() != (undisturbed / model).read_bytes()


def test_overwrite_of_an_unfinished_run_starts_at_step_0(run, unfinished):
    end = run(run.new(source=unfinished), "beta=0.2", "--overwrite")
    assert end["code"] == 0 and not resumed(end["text"]), end["text"]


def test_checkpoints_that_a_kill_after_the_model_was_whole_left_are_removed(
    run, undisturbed, unfinished
):
    work = run.new(source=undisturbed)
    shutil.copytree(unfinished / "run/checkpoints", work / "run/checkpoints")
    finished_as(work, run, undisturbed)


@pytest.mark.parametrize("event", [3, 4, 6])
def test_an_overwrite_that_is_killed_leaves_the_old_model_whole_or_away(event, run, undisturbed):
    work = run.new(source=undisturbed)
    end = run(work, "--overwrite", fault=["kill_at_event", event])
    assert end["code"] == -signal.SIGKILL
    if not (work / "run/model").exists():
        assert run(work)["code"] == 0
    assert_same(work, undisturbed)


def test_a_second_run_in_one_folder_is_refused_and_a_dead_one_keeps_no_lock(run, undisturbed):
    work = run.new()
    sleeper = run(work, signal=[signal.SIGSTOP, "training", 1, 0.0])["pid"]
    try:
        assert "another process" in clear(run(work), 2)
        assert "another process" in clear(run(work, "--overwrite"), 2)
    finally:
        os.kill(sleeper, signal.SIGKILL)
    finished_as(work, run, undisturbed)


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_step_that_is_not_finite_is_skipped_counted_and_logged_with_its_records(where, run):
    work = run.new()
    order = list(range(STEPS))
    random.Random(42).shuffle(order)  # two records a step, in the order that the seed decides
    end = run(work, fault=["not_finite", [4], where])
    assert end["code"] == 0, end["text"]
    unchanged = re.findall(r"call (\d+): weights and moments unchanged", end["text"])
    assert unchanged == ["4"] and end["text"].count(": weights and moments changed") == STEPS - 1
    rows = read_metrics(work / "run")
    skipped = {row["step"]: row["skipped"] for row in rows if "skipped" in row}
    assert list(skipped) == [4] and sorted(skipped[4]) == sorted(order[6:8])
    assert re.search(rf"Step 4\b.*not finite.*{re.escape(str(skipped[4]))}", end["text"])
    row = next(row for row in rows if row["step"] == 4)
    assert row["grad_norm"] is None and (row["loss"] is None) == (where == "loss")
    assert "1 updates skipped" in (work / "run/report.md").read_text()


def test_three_steps_not_finite_in_a_row_stop_and_the_last_good_checkpoint_is_kept(
    run, undisturbed
):
    work = run.new()
    text = clear(run(work, fault=["not_finite", [3, 4, 7, 8, 9], "gradient"]), 1)
    assert "three times" in text and "lower lr" in text and "--overwrite" in text
    assert "same command goes on" not in text
    assert checkpoints(work) == [2, 6]
    work = run.new()
    clear(run(work, fault=["not_finite", [7, 8, 9], "loss"]), 1)
    assert checkpoints(work) == [4, 6]
    finished_as(work, run, undisturbed)


def test_a_run_of_which_no_step_was_finite_still_ends_clearly(run):
    short = ("train_pairs=4", "epochs=1", "reference_cache=null")
    end = run(run.new(), *short, fault=["not_finite", [1, 2], "loss"])
    assert end["code"] == 0 and "2 updates skipped" in end["text"], end["text"]


@pytest.mark.parametrize(
    "fault, kept",
    [
        (["full_disk", "save_checkpoint", 3, 4096], [2, 4]),
        (["full_disk", "save_model", 1, 4096], [8, 10]),
        (["torn_row", 9, 20], [4, 6]),
        (["full_disk", "draw_curves", 2, 1], [2, 4]),
    ],
    ids=["checkpoint", "model", "metrics", "curves"],
)
def test_a_full_disk_is_a_clear_error_and_the_checkpoints_before_are_resumed(
    fault, kept, run, undisturbed
):
    work = run.new()
    text = clear(run(work, fault=fault), 1)
    assert re.search("File too large|No space left|[Dd]isk", text)
    assert checkpoints(work) == kept
    assert resumed(finished_as(work, run, undisturbed)) == kept[-1]


@pytest.mark.parametrize("where", ["cuda", "cpu"])
def test_out_of_memory_names_the_settings_to_lower(where, run, undisturbed):
    work = run.new()
    text = clear(run(work, fault=["out_of_memory", 5, where]), 1)
    assert "memory" in text
    assert all(name in text for name in ("batch_size", "max_length", "activation_checkpointing"))
    finished_as(work, run, undisturbed)


class Trap:
    """Runs a command when it is unpickled."""

    def __init__(self, sprung):
        self.sprung = sprung

    def __reduce__(self):
        return os.mkdir, (self.sprung,)


def test_a_model_of_pickled_weights_alone_is_refused_unread(run):
    work = run.new()
    folder, sprung = work / "pickled", work / "sprung"
    shutil.copytree(run.folder / "model", folder)
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Trap(str(sprung))))
    assert "pickled" in clear(run(work, f"model={folder}"), 2)
    assert not sprung.exists()


def test_no_code_reads_pickles_or_unsafe_yaml_or_runs_text(tmp_path, tiny_model, monkeypatch):
    unsafe = r"\bpickle\b|yaml\.(unsafe_|full_)?load\(|\b(exec|eval)\(|os\.system"
    assert issubclass(_Loader, yaml.SafeLoader)
    models = []
    for path in [*ROOT.glob("*.py"), *ROOT.glob("support/*.py")]:
        source = path.read_text()
        for call in re.findall(r"torch\.load\([^)]*\)", source):
            assert "weights_only=True" in call, f"{path.name}: {call}"
        if path.name == "config.py":
            source = re.sub(r"yaml\.load\(\w+, _Loader\)", "", source)
        assert not re.search(unsafe, source.replace(".eval()", "")), path.name
        models += re.findall(r"\bAutoModel\w*\.from_pretrained\(", source)
    assert len(models) == 1

    (tmp_path / "c.yaml").write_text("model: !!python/object/apply:os.mkdir [sprung]")
    with pytest.raises(InputError, match="python/object/apply:os.mkdir"):
        read_config(tmp_path / "c.yaml")
    assert not (tmp_path / "sprung").exists()

    given, load = [], AutoModelForCausalLM.from_pretrained

    def watched(path, **options):
        given.append(options)
        return load(path, **options)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", watched)
    load_model(Config(model=tiny_model))
    assert [options["use_safetensors"] for options in given] == [True]


# Finished runs and the lock on a folder, in this process


def test_a_finished_run_is_left_alone(finished, capsys):
    files = [path for path in finished.folder.rglob("*") if path.is_file()]
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in files}
    assert train_dpo.main(["--config", CONFIG, *finished.arguments]) == 0
    assert "finished" in capsys.readouterr().out
    assert before == {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


def test_overwrite_trains_a_finished_run_anew(dpo):
    assert dpo(train_pairs=2, eval_pairs=0) == 0
    first = weights_bytes()
    assert dpo("--overwrite", train_pairs=2, eval_pairs=0, lr=1e-4) == 0
    assert weights_bytes() != first and read_metrics()[0]["lr"] == 1e-4


def test_a_run_cannot_start_where_another_is_training(dpo, overrides, capsys):
    (config,), _ = read_config(CONFIG, overrides(train_pairs=2, eval_pairs=0))
    with claim(Path("out"), config):
        assert dpo(train_pairs=2, eval_pairs=0) == 2
    with claim(Path("out"), config):
        pass  # the lock is free again
    assert "another process is training in out" in capsys.readouterr().out


@pytest.mark.parametrize(
    "noted",
    [b"", b"null", b"# nothing", b"model: [", b"- a", b"beta: 0.1", b"\xff\xfe\x00", b"? {a: b}"],
    ids=repr,
)
def test_a_folder_whose_settings_are_lost_is_refused_until_overwritten(dpo, capsys, noted):
    assert dpo(train_pairs=2, eval_pairs=0) == 0
    Path("out/config.yaml").write_bytes(noted)
    before = weights_bytes()
    capsys.readouterr()
    assert dpo(train_pairs=2, eval_pairs=0) == 2
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("Error: out/config.yaml is empty, broken or of another version")
    assert "Give another output_dir, or train anew with --overwrite" in line
    assert weights_bytes() == before
    assert dpo("--overwrite", train_pairs=2, eval_pairs=0) == 0


def test_a_signal_before_training_ends_at_once_and_leaves_nothing(run):
    work = run.new()
    end = run(work, signal=[signal.SIGTERM, "preparing", 1, 0.0])
    assert end["code"] == 143 and "Interrupted outside training" in end["text"]
    assert not (work / "run").exists()


def test_a_signal_amid_the_last_writing_lets_it_end_and_no_other_run_begin(run):
    sweep, folders = ["beta=[0.1, 0.2]", "train_pairs=2"], ["run_beta0.1", "run_beta0.2"]
    work = run.new()
    end = run(work, *sweep, fault=["signal_at", "finish", 1, signal.SIGINT])
    assert "Interrupted" in clear(end, 130)
    assert [(work / folder / "model").exists() for folder in folders] == [True, False]
    end = run(work, *sweep, fault=["signal_at", "finish", 1, signal.SIGINT])
    assert end["code"] == 0, end["text"]  # it was the last


if __name__ == "__main__":
    nursery()


def interrupt_after(steps, monkeypatch):
    """Let a run be interrupted after so many optimizer steps."""
    calls, step = [], train_dpo.train_step

    def stopped(*given):
        calls.append(1)
        if len(calls) == steps:
            processes._signals.append(signal.SIGTERM)
        return step(*given)

    monkeypatch.setattr(processes, "_signals", [])
    monkeypatch.setattr(train_dpo, "train_step", stopped)


def start_and_interrupt(dpo, **settings):
    with pytest.MonkeyPatch.context() as patch:
        interrupt_after(2, patch)
        assert dpo(**settings) == 143


CHANGED_MODELS = {
    "other weights": {"seed": 1},
    "another architecture": {"num_hidden_layers": 1},
    "another config.json": {"rms_norm_eps": 1e-2},
}


@pytest.mark.parametrize("change", CHANGED_MODELS)
def test_a_run_does_not_go_on_with_a_model_that_was_replaced(tmp_path, dpo, capsys, change):
    model = write_model(tmp_path / "model")
    start_and_interrupt(dpo, model=model)
    shutil.rmtree(model)
    write_model(tmp_path / "model", **CHANGED_MODELS[change])
    assert dpo(model=model) == 2
    assert "Error: out: the model changed since this run began" in capsys.readouterr().out


def test_a_run_does_not_go_on_with_pairs_that_were_edited(tmp_path, dpo, capsys):
    pairs = write_jsonl(tmp_path / "pairs.jsonl", records())
    start_and_interrupt(dpo, dataset=pairs)
    text = (tmp_path / "pairs.jsonl").read_text()
    (tmp_path / "pairs.jsonl").write_text(text.replace("river", "ocean"))
    assert dpo(dataset=pairs) == 2
    assert "Error: out: the pairs changed since this run began" in capsys.readouterr().out
    (tmp_path / "pairs.jsonl").write_text(text)
    assert dpo(dataset=pairs) == 0


def test_a_kill_during_an_evaluation_loses_no_step(dpo, monkeypatch):
    settings = {"train_pairs": 8, "eval_every": 2, "save_every": 2}
    assert dpo(**settings, output_dir="whole") == 0
    evaluate, calls = train_dpo.evaluate, []

    def fails_after_step_2(*given):
        calls.append(1)
        if len(calls) == 2:
            raise OSError("killed")
        return evaluate(*given)

    with monkeypatch.context() as patch:
        patch.setattr(train_dpo, "evaluate", fails_after_step_2)
        assert dpo(**settings) == 1
    assert [path.stem for path in Path("out/checkpoints").iterdir()] == ["step_0000002"]
    assert dpo(**settings) == 0
    assert read_metrics("out") == read_metrics("whole")
    assert weights_bytes("out") == weights_bytes("whole")


@pytest.mark.parametrize("flags", [[], ["--overwrite"]], ids=str)
@pytest.mark.parametrize("name", ["model", "checkpoints", "samples", "report.md", "metrics.jsonl"])
def test_what_no_run_has_written_is_not_taken_for_a_runs(dpo, capsys, flags, name):
    mine = Path("project", name)
    if "." in name:
        mine.parent.mkdir()
        file = mine
    else:
        mine.mkdir(parents=True)
        file = mine / "my_sft.pt"
    file.write_text("mine")
    assert dpo(*flags, output_dir="project") == 2
    assert f"no run's folder, for it holds {name}: " in capsys.readouterr().out
    assert file.read_text() == "mine"


def test_overwrite_leaves_a_users_own_pairs_in_a_runs_folder(dpo, quick, pairs_file):
    Path("out").mkdir()
    shutil.copy(pairs_file, "out/pairs.jsonl")
    assert dpo(dataset="out/pairs.jsonl") == 0
    assert dpo("--overwrite", dataset="out/pairs.jsonl") == 0
    assert Path("out/pairs.jsonl").read_bytes() == Path(pairs_file).read_bytes()


@pytest.mark.parametrize("setting", ["model", "reference_model"])
def test_overwrite_does_not_empty_a_folder_whose_model_it_begins_with(dpo, quick, capsys, setting):
    assert dpo() == 0
    before = weights_bytes("out")
    assert dpo("--overwrite", **{setting: "out/model"}) == 2
    assert "model out/model would be removed by --overwrite" in capsys.readouterr().out
    assert weights_bytes("out") == before


def test_a_run_that_another_process_has_finished_meanwhile_is_left_as_it_is(
    dpo, capsys, monkeypatch
):
    prepare = train_dpo.prepare

    def slowly(*given):
        setup = prepare(*given)
        Path("out/model").mkdir(parents=True)
        return setup

    monkeypatch.setattr(train_dpo, "prepare", slowly)
    assert dpo() == 2
    assert "another process has finished the run in out meanwhile" in capsys.readouterr().out
    assert not Path("out/metrics.jsonl").exists()


def test_overwrite_leaves_no_report_of_the_earlier_run(dpo, quick, monkeypatch):
    assert dpo() == 0 and Path("out/report.md").exists()

    def fail(*_):
        raise FloatingPointError("not finite")

    monkeypatch.setattr(train_dpo, "train_step", fail)
    assert dpo("--overwrite") == 1
    assert not Path("out/report.md").exists()


def test_the_best_of_other_evaluations_is_another_run(dpo, quick, capsys):
    assert dpo(keep="best", eval_every=1) == 0
    assert dpo(keep="best", eval_every=0) == 2
    assert "eval_every was 1, is 0" in capsys.readouterr().out
    assert dpo(output_dir="last", eval_every=1) == dpo(output_dir="last", eval_every=0) == 0


def test_what_a_reward_reads_of_a_record_is_part_of_what_a_run_began_with(ready, tmp_path):
    Path("judge.py").write_text("def judge(messages, answer, record):\n    return record['key']\n")
    origins = []
    for key in (1, 5):
        rows = [row | {"key": key} for row in records()]
        path = write_jsonl(tmp_path / f"{key}.jsonl", rows)
        setup, _ = ready(dataset=path, reward="judge.py:judge")
        origins.append(setup.origin)
    first, second = origins
    assert first["pairs"] == second["pairs"] and first["records"] != second["records"]


def test_a_record_with_an_object_has_the_same_digest_again():
    one, two = (data.Pair(0, [1], [2], [3], record={"image": object()}) for _ in range(2))
    digests = {files.digest_records({"train": [pair]}) for pair in (one, two)}
    assert len(digests) == 1


def test_another_process_than_the_first_removes_no_file(ready, monkeypatch):
    setup, config = ready(keep="best")
    optimizer = train_dpo.make_optimizer(setup.weights, config)
    folder = Path("out/checkpoints")
    for step in (1, 2, 3, 4):
        monkeypatch.setattr("support.checkpoint.is_first", lambda step=step: step < 4)
        losses = {earlier: 1 / earlier for earlier in range(1, step + 1)}
        checkpoint.keep_best(folder, setup.weights, step, losses)
        checkpoint.save_checkpoint(folder, setup.weights, optimizer, step, {})
    assert len(list(folder.glob("step_*"))) == 3 and len(list(folder.glob("best_*"))) == 4


@pytest.mark.parametrize("flags", [[], ["--overwrite"]], ids=str)
@pytest.mark.parametrize("place", [".", "project"])
def test_a_folder_that_is_no_runs_keeps_its_files(dpo, capsys, monkeypatch, flags, place):
    Path("project").mkdir()
    settings = Path("project", "config.yaml")
    settings.write_text(Path(CONFIG).read_text())
    kept = settings.read_bytes()
    if place == ".":
        monkeypatch.chdir("project")
        Path("train_dpo.py").write_text("")
    assert dpo(*flags, output_dir=place) == 2
    (line,) = capsys.readouterr().out.splitlines()
    file = "train_dpo.py" if place == "." else "config.yaml"
    assert line.startswith(f"Error: output_dir {place} is no run's folder, for it holds {file}")
    assert "Give a folder of its own, such as output_dir=runs/mine" in line
    monkeypatch.undo()
    assert settings.read_bytes() == kept if settings.exists() else True


def test_runs_that_fill_one_cache_at_the_same_time_do_not_stop_each_other():
    begun = threading.Barrier(4)

    def compute():
        begun.wait()
        return {"logps": torch.zeros(10**6)}

    with ThreadPoolExecutor(4) as pool:
        runs = [
            pool.submit(read_or_compute, "it", "cache", "key", compute, "cpu") for _ in range(4)
        ]
    assert all(len(run.result()["logps"]) == 10**6 for run in runs)
    assert len(list(Path("cache").glob("*.safetensors*"))) == 2  # and its lock


@pytest.mark.parametrize("setting", ["output_dir", "reference_cache"])
@pytest.mark.parametrize("place", ["a_file/run", "/proc/run"])
def test_a_folder_that_cannot_be_written_is_told_before_the_reference_pass(
    dpo, capsys, setting, place
):
    Path("a_file").write_text("")
    assert dpo(**{setting: place}) == 2
    printed = capsys.readouterr().out
    assert f"Error: {setting} {place}: nothing can be written there" in printed
    assert "reference, train" not in printed


def test_too_full_a_disk_is_told_before_the_reference_pass_with_both_numbers(
    dpo, capsys, monkeypatch
):
    free = shutil._ntuple_diskusage(10**9, 10**9, 1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    Path("judge.py").write_text("def judge(messages, answer, record):\n    return len(answer)\n")
    rewarded = {"save_every": 0, "reward": "judge.py:judge", "eval_every": 1}
    for settings in ({"save_every": 1}, rewarded):  # with a reward, one before each evaluation
        assert dpo(**settings) == 2
        printed = capsys.readouterr().out
        assert "Error: output_dir out: 1e-06 GB are free on its disk" in printed
        assert "for 3 checkpoints and the model" in printed
        assert "reference, train" not in printed


# keep: best

BEST = {"lr": 1e-2, "epochs": 3, "eval_every": 1, "save_every": 2, "keep": "best"}


@pytest.fixture(scope="module")
def kept(tmp_path_factory, dpo):
    """The folder of an undisturbed run whose held-out loss is the lowest after step 2 of 9."""
    folder = tmp_path_factory.mktemp("best") / "whole"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", lambda figure, path, **_: Path(path).write_bytes(b""))
        assert dpo(**BEST, output_dir=str(folder)) == 0
    losses = [row["loss"] for row in read_metrics(folder, "eval")]
    assert losses.index(min(losses)) == 2 and len(losses) == 10
    return folder


def test_the_weights_of_the_lowest_held_out_loss_are_saved_and_the_report_says_which(
    dpo, kept, monkeypatch, capsys
):
    weights, evaluate = {}, train_dpo.evaluate

    def watched(setup, config, log, step):
        weights[step] = {name: weight.detach().clone() for name, weight in setup.weights.items()}
        evaluate(setup, config, log, step)

    monkeypatch.setattr(train_dpo, "evaluate", watched)
    assert dpo(**BEST) == 0
    assert weights_bytes() == weights_bytes(kept)
    for name, saved in load_file("out/model/model.safetensors").items():
        assert torch.equal(saved, weights[2][name]) and name in weights[9]
    report = Path("out/report.md").read_text()
    told = "Saved: the weights after step 2, the lowest held-out loss of 10 evaluations"
    assert told in report and told in Path("out/model/README.md").read_text()
    after = read_metrics(split="eval")[2]["loss"]
    assert f"| loss | 0.6931 | {after:.4f} |" in report.replace("loss |", "| loss |", 1)
    assert "keep=best: the weights after step 2 are saved" in capsys.readouterr().out


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("call", [2, 4, 5])
def test_a_run_that_keeps_the_best_ends_with_the_same_bytes_wherever_it_was_killed(
    dpo, kept, monkeypatch, call, when
):
    """Files are, in this order: best_0, best_1, step_2, best_2, step_4, step_6, step_8, step_9."""
    write, calls = files.write_tensors, []

    def killed(*given):
        calls.append(given[0].stem)
        if when == "after":
            write(*given)
        if len(calls) == call:
            raise OSError("killed")
        if when == "before":
            write(*given)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write_tensors", killed)
        assert dpo(**BEST) == 1
    assert dpo(**BEST) == 0
    assert weights_bytes() == weights_bytes(kept)
    assert read_metrics() == read_metrics(kept)


def test_the_best_up_to_the_older_checkpoint_is_there_when_the_newer_one_is_damaged(
    dpo, monkeypatch
):
    """Of a loss that falls, where each evaluation would else remove the best before it."""
    summarize = train_dpo.summarize

    def falling(metrics, before=None, prompts=None):
        figures = summarize(metrics, before, prompts)
        if before is not None:
            moved = metrics["logps/chosen"] - before["logps/chosen"]
            figures["loss"] = -moved.abs().mean().item()
        return figures

    monkeypatch.setattr(train_dpo, "summarize", falling)
    steady = BEST | {"lr": 1e-3, "lr_schedule": "constant"}
    assert dpo(**steady, output_dir="whole") == 0
    with monkeypatch.context() as patch:
        interrupt_after(6, patch)
        assert dpo(**steady) == 143
    losses = [row["loss"] for row in read_metrics(split="eval")]
    assert losses == sorted(losses, reverse=True)
    left = sorted(path.stem[-1] for path in Path("out/checkpoints").glob("best_*"))
    assert left == ["2", "4", "5"]  # 2 until the next evaluation
    Path("out/checkpoints/step_0000006.safetensors").write_bytes(b"")
    Path("out/checkpoints/best_0000005.safetensors").write_bytes(b"")
    assert dpo(**steady) == 0
    assert weights_bytes("out") == weights_bytes("whole")


def test_no_evaluation_better_than_the_first_saves_the_model_as_it_was(dpo, tiny_model):
    assert dpo(**BEST | {"lr": 1.0}) == 0
    text = "Saved: the model as it was before training (step 0, the lowest held-out loss of 10"
    assert (
        "\n\nOf the last step's weights, which are not saved: " in Path("out/report.md").read_text()
    )
    assert text in Path("out/report.md").read_text()
    before = load_file(f"{tiny_model}/model.safetensors")
    after = load_file("out/model/model.safetensors")
    assert all(torch.equal(after[name], weight) for name, weight in before.items())


def test_the_best_weights_gone_or_damaged_are_told(dpo, monkeypatch, capsys):
    load = train_dpo.load_best

    def spoiled(folder, *given):
        Path(folder, "best_0000002.safetensors").write_bytes(b"")
        load(folder, *given)

    monkeypatch.setattr(train_dpo, "load_best", spoiled)
    assert dpo(**BEST) == 2
    assert "the weights of the lowest held-out loss, is gone or damaged" in capsys.readouterr().out


def test_keep_best_without_held_out_pairs_is_refused(dpo, capsys):
    assert dpo(keep="best", eval_pairs=0) == 2
    assert "keep=best needs held-out pairs to tell which: eval_pairs=100" in capsys.readouterr().out
