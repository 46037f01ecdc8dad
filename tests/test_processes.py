"""Several processes by torchrun and FSDP2: the same run as one process, on gloo here."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from helpers import CONFIG, ROOT, read_metrics, weights_bytes, write_model

RUN = {
    "train_pairs": 7,
    "eval_pairs": 3,
    "epochs": 2,
    "eval_every": 2,
    "save_every": 1,
    "sample_prompts": 1,
    "lr": 1e-2,
    "lr_schedule": "linear",
    "loss": "ipo",
    "nll_weight": 0.2,
    "keep": "best",
}


@pytest.fixture(scope="module")
def start(overrides, tmp_path_factory):
    """A function that starts a run of so many processes in a folder of its own."""
    folder = tmp_path_factory.mktemp("distributed")
    reference = write_model(folder / "reference", seed=5, num_hidden_layers=1)

    def started(name, processes, **changes):
        launcher = [sys.executable]
        if processes > 1:
            launcher += [
                "-m",
                "torch.distributed.run",
                f"--nproc-per-node={processes}",
                "--rdzv-backend=c10d",
                "--rdzv-endpoint=localhost:0",
            ]
        settings = RUN | {"reference_model": reference, "output_dir": str(folder / name)} | changes
        environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
        command = [
            *launcher,
            str(ROOT / "train_dpo.py"),
            "--config",
            CONFIG,
            *overrides(**settings),
        ]
        return folder / name, subprocess.Popen(
            command,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    return started


@pytest.fixture(scope="module")
def finish(start):
    """A function that runs a run to its end; returns its folder and what it printed."""

    def finished(*given, **changes):
        folder, process = start(*given, **changes)
        printed, errors = process.communicate(timeout=300)
        assert process.returncode == 0, printed + errors
        return folder, printed

    return finished


@pytest.fixture(scope="module")
def one(finish):
    return finish("one", 1)


@pytest.fixture(scope="module")
def two(finish):
    return finish("two", 2)


@pytest.fixture(scope="module")
def killed(start):
    """The folder of a run of two processes, killed after its third checkpoint."""
    folder, process = start("killed", 2)
    while process.poll() is None and not (folder / "checkpoints/step_0000003.safetensors").exists():
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    search = ["pgrep", "-f", f'output_dir="?{folder}']
    left = subprocess.run(search, check=False, text=True, capture_output=True).stdout
    for pid in left.split():
        os.kill(int(pid), signal.SIGKILL)
    process.communicate()
    assert not (folder / "model").exists()
    return folder


def losses(folder):
    return [row["loss"] for row in read_metrics(folder)]


def weights(folder):
    return load_file(folder / "model/model.safetensors")


def assert_same_run(folder, other, tolerance=1e-5):
    """Every step and evaluation once in both, with the same losses."""
    steps = [[(row["step"], row["split"]) for row in read_metrics(f)] for f in (folder, other)]
    assert steps[0] == steps[1] and len(set(steps[0])) == len(steps[0]) == 8 + 5
    assert losses(folder) == pytest.approx(losses(other), rel=tolerance)


def test_two_processes_give_the_losses_and_the_model_of_one(one, two):
    assert_same_run(one[0], two[0])
    whole, gathered = weights(one[0]), weights(two[0])
    assert whole.keys() == gathered.keys()
    assert max((weight - gathered[n]).abs().max() for n, weight in whole.items()) < 1e-4
    assert AutoModelForCausalLM.from_pretrained(two[0] / "model").config.dtype == torch.float32
    for _, printed in (one, two):
        assert "keep=best: the weights after step 2 are saved" in printed
    names = [{path.name for path in folder.iterdir()} for folder, _ in (one, two)]
    assert names[0] == names[1]


def test_one_of_the_processes_alone_prints(one, two):
    assert two[1].count("| held out |") == one[1].count("| held out |") == 1
    assert two[1].count("training 1/8") == 1


def test_a_run_killed_at_two_processes_ends_at_two_with_the_same_bytes(finish, killed, two):
    shutil.copytree(killed, killed.with_name("again"))
    folder, printed = finish("again", 2)
    assert "Resuming from" in printed
    assert read_metrics(folder) == read_metrics(two[0])
    assert weights_bytes(folder) == weights_bytes(two[0])


def test_a_run_killed_at_two_processes_ends_at_one_with_the_same_losses(finish, killed, two):
    shutil.copytree(killed, killed.with_name("alone"))
    folder, printed = finish("alone", 1)
    assert "Resuming from" in printed
    assert_same_run(folder, two[0])


def test_sigterm_saves_the_step_in_hand_of_all_processes(start, finish, two):
    folder, process = start("stopped", 2, save_every=0)
    while process.poll() is None:
        with contextlib.suppress(OSError):
            if len(losses(folder)) > 2:
                break
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode != 0
    assert len(list((folder / "checkpoints").glob("step_*"))) == 1
    folder, printed = finish("stopped", 2, save_every=0)
    assert "Resuming from" in printed and read_metrics(folder) == read_metrics(two[0])


def test_an_adapter_of_two_processes_has_the_losses_of_one(finish):
    pytest.importorskip("peft")
    folders = [finish(f"adapter{n}", n, lora_r=4)[0] for n in (1, 2)]
    assert_same_run(*folders)
    whole, gathered = (load_file(f / "model/adapter_model.safetensors") for f in folders)
    assert whole.keys() == gathered.keys()
    assert max((weight - gathered[n]).abs().max() for n, weight in whole.items()) < 1e-4


def test_wrong_input_ends_all_processes_with_one_message(start):
    _, process = start("wrong", 2, dataset="no.jsonl")
    printed, _ = process.communicate(timeout=100)
    assert process.returncode != 0
    assert printed.count("Error: dataset no.jsonl: no such file") == 1


def test_what_the_first_process_alone_finds_wrong_ends_the_others_too(start):
    _, process = start("no_cache", 2, reference_cache="/proc/cache")
    printed, errors = process.communicate(timeout=100)
    assert process.returncode != 0
    assert printed.count("Error: reference_cache /proc/cache: nothing can be written there") == 1
    assert "[rank1]" not in errors, errors


APART = """
import torch
from support import processes
from support.cache import read_or_compute
from support.errors import InputError

processes.start()
together = lambda: {"sum": processes.sum_over_processes(torch.tensor([1.0]))}
for _ in range(2):  # the second time the first process finds what it wrote, and the other none
    found = read_or_compute("it", CACHE, processes.RANK, together, "cpu")
    assert found["sum"].item() == 2
assert processes.same_for_all("ab12", "model", "cpu") == "ab12"
try:
    processes.same_for_all(f"ab1{processes.RANK}", "pairs", "cpu")
except InputError as error:
    print(error)
processes.leave(0)
"""


def test_processes_that_read_different_things_do_not_mix_them_or_wait_for_each_other(tmp_path):
    script = tmp_path / "apart.py"
    script.write_text(APART.replace("CACHE", repr(str(tmp_path / "cache"))))
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    launch += ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", str(script)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    end = subprocess.run(
        launch, env=environment, check=False, text=True, capture_output=True, timeout=200
    )
    assert end.returncode == 0, end.stderr
    assert end.stdout.count("the processes have not read the same pairs") == 2


ROUNDS = {
    "rounds": 2,
    "reference_model": None,
    "loss": "sigmoid",
    "keep": "last",
    "lr": 1e-3,
    "epochs": 1,
    "train_pairs": 3,
    "samples_per_prompt": 5,
    "eval_samples": 3,
    "max_new_tokens": 9,
}


@pytest.fixture(scope="module")
def in_rounds(talker, tmp_path_factory):
    """Settings of a run of two rounds whose reward is the length of an answer."""
    path = tmp_path_factory.mktemp("reward") / "judge.py"
    path.write_text("def judge(messages, answer, record):\n    return len(answer) / 7\n")
    return ROUNDS | {"model": talker, "reward": f"{path}:judge"}


def test_two_processes_sample_train_and_measure_rounds_as_one(dpo, quick, finish, in_rounds):
    assert dpo(**RUN | in_rounds | {"output_dir": "one"}) == 0
    two, printed = finish("rounds2", 2, **in_rounds)
    assert printed.count("round 2: 3 pairs of 3 prompts (") == 1
    for number in (1, 2):
        folders = [Path(folder) / f"round_{number}" for folder in ("one", two)]
        pairs = [(folder / "pairs.jsonl").read_bytes() for folder in folders]
        assert pairs[0] == pairs[1] and pairs[0].count(b"\n") == 3
        assert losses(folders[0]) == pytest.approx(losses(folders[1]), rel=1e-5)
        evaluations = [read_metrics(folder, "eval") for folder in folders]
        for rows in zip(*evaluations, strict=True):
            names = [name for name in rows[0] if name.startswith("samples/")]
            assert len(names) > 12
            for name in names:
                assert rows[0][name] == pytest.approx(rows[1][name], rel=1e-4, abs=1e-4), name
    first = read_metrics(two / "round_1", "eval")[0]
    assert first["samples/kl"] == 0 and first["samples/reward"] > 0


def test_a_reward_that_fails_ends_all_processes_with_one_message_and_keeps_the_answers(
    start, in_rounds, tmp_path
):
    judge = tmp_path / "judge.py"
    judge.write_text(
        "asked = []\ndef judge(messages, answer, record):\n"
        "    asked.append(answer)\n    return len(answer) if len(asked) < 3 else None\n"
    )
    given = in_rounds | {"reward": f"{judge}:judge", "rounds": 1, "eval_samples": 0}
    folder, process = start("failing", 2, **given)
    printed, errors = process.communicate(timeout=100)
    assert process.returncode != 0 and "[rank1]" not in errors, errors
    assert printed.count("is to return a finite number, not None, for the prompt") == 1
    assert (folder / "round_1/answers.jsonl").read_bytes().count(b"\n") == 4


@pytest.mark.skipif("SMOLLM2" not in os.environ, reason="SMOLLM2 names no folder and no pairs")
def test_two_processes_give_the_losses_of_one_on_the_real_model(finish):
    model, pairs = os.environ["SMOLLM2"].split(",")
    changes = {
        "model": model,
        "dataset": pairs,
        "train_pairs": 6,
        "eval_pairs": 0,
        "epochs": 1,
        "lr": 5e-6,
        "max_length": 512,
        "save_every": 0,
        "sample_prompts": 0,
        "reference_model": None,
        "loss": "sigmoid",
        "nll_weight": 0.0,
        "lr_schedule": "cosine",
        "keep": "last",
    }
    one, two = (losses(finish(f"real{n}", n, **changes)[0]) for n in (1, 2))
    print(json.dumps([one, two]))
    assert one == pytest.approx(two, abs=1e-5) and len(one) == 3


HANGING = """
import sys, time
from concurrent.futures import ThreadPoolExecutor
import train_dpo

def hang(config):
    with ThreadPoolExecutor() as pool:  # as a download of several files does
        print("loading", flush=True)
        list(pool.map(time.sleep, [60, 60]))

train_dpo.load_model = hang
sys.exit(train_dpo.main(sys.argv[1:]))
"""
TWICE = """
import os, time
from support import processes

processes.start()
with processes.finish_step_first():
    os.kill(os.getpid(), 2)
    print("noted", flush=True)
    os.kill(os.getpid(), 2)
    time.sleep(60)
"""


def start_python(code, *arguments):
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_signal_ends_a_hanging_download_at_once(overrides, tmp_path):
    settings = overrides(output_dir=str(tmp_path / "out"))
    numbers = [signal.SIGINT, signal.SIGTERM]
    hanging = [start_python(HANGING, "--config", CONFIG, *settings) for _ in numbers]
    for number, process in zip(numbers, hanging, strict=True):
        assert process.stdout.readline() == "loading\n"
        process.send_signal(number)
        _, errors = process.communicate(timeout=20)  # of the 60 that the threads hang
        assert process.returncode == 128 + number
        assert errors.strip().startswith("Interrupted outside training: the same command goes on")
    assert not (tmp_path / "out").exists()


def test_the_second_signal_stops_at_once():
    process = start_python(TWICE)
    printed, errors = process.communicate(timeout=50)
    assert process.returncode == -signal.SIGINT and printed == "noted\n"
    assert errors.count("Once more stops at once") == 1
