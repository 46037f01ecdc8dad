"""Fixtures that several files of tests share, and slow tests only on demand."""

import contextlib
import json
import logging
import os
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from matplotlib.figure import Figure
from transformers import AutoTokenizer

sys.path.insert(0, str(Path(__file__).parent.parent))

import data
import train_dpo
from helpers import (
    CONFIG,
    Output,
    build_model,
    build_tokenizer,
    make_quick,
    records,
    write_jsonl,
    write_model,
)
from support import sources
from support.config import read_config


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes minutes; runs only with -m slow")
    if "PYTEST_XDIST_WORKER" in os.environ:  # the other cores belong to the other workers
        os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start
        torch.set_num_threads(1)


def pytest_collection_modifyitems(config, items):
    if "slow" in config.getoption("-m"):
        return
    for item in items:
        if "slow" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="slow: run with -m slow"))


@pytest.fixture(autouse=True)
def apart(tmp_path, monkeypatch):
    """Each test in a folder of its own, with its own signal handlers and without pictures."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **_: Path(path).write_bytes(b""))
    logging.disable(logging.DEBUG)  # torch.distributed notes every tensor of a checkpoint
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    logging.disable(logging.NOTSET)
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def hub_down(monkeypatch):
    """The Hub out of reach; what open_source then switches off is switched on again afterwards."""
    import datasets
    from huggingface_hub import constants

    monkeypatch.setattr(sources, "hub_reachable", lambda seconds=4: False)
    monkeypatch.setattr(sources, "_told", set())
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    used = dict(sources.stand_ins_used)  # other rooms hold the same dict
    sources.stand_ins_used.clear()
    yield
    sources.stand_ins_used.clear()
    sources.stand_ins_used.update(used)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """A folder with a tiny Llama and its chat tokenizer."""
    folder = tmp_path_factory.mktemp("tiny_llama")
    tokenizer = build_tokenizer()
    model = build_model("llama", len(tokenizer))
    model.generation_config.eos_token_id = None
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def talker(tmp_path_factory):
    """A folder with a tiny Llama whose answers are short, for many tokens end one."""
    folder = tmp_path_factory.mktemp("talker")
    return write_model(folder, ends=list(range(10, 70)))


@pytest.fixture(scope="session")
def pairs_file(tmp_path_factory):
    return write_jsonl(tmp_path_factory.mktemp("pairs") / "pairs.jsonl", records())


@pytest.fixture(scope="session")
def overrides(tiny_model, pairs_file):
    """A function from settings to a command line for the tiny model, quick unless they say else."""
    quick = {
        "model": tiny_model,
        "dataset": pairs_file,
        "train_pairs": 6,
        "eval_pairs": 3,
        "sample_prompts": 0,
        "eval_every": 0,
        "save_every": 0,
        "lr": 1e-3,
        "dtype": "float32",
        "device": "cpu",
        "reference_cache": None,
        "output_dir": "out",
    }
    return lambda **changes: [f"{k}={json.dumps(v)}" for k, v in {**quick, **changes}.items()]


@pytest.fixture(scope="session")
def dpo(overrides):
    """main() on the tiny model, with flags and settings; returns its exit code."""
    return lambda *flags, **changes: train_dpo.main(
        ["--config", CONFIG, *flags, *overrides(**changes)]
    )


@pytest.fixture
def quick(monkeypatch):
    """Runs that neither measure the machine nor draw their curves: half the time of a tiny one."""
    make_quick(monkeypatch)


@pytest.fixture
def ready(overrides):
    """prepare() on the tiny model with settings; returns the setup and the config."""

    def prepared(**changes):
        (config,), _ = read_config(CONFIG, overrides(**changes))
        return train_dpo.prepare(config), config

    return prepared


@pytest.fixture
def figures(monkeypatch):
    """The figures that are drawn."""
    drawn = []

    def note(figure, path, **_):
        drawn.append(figure)
        Path(path).write_bytes(b"")

    monkeypatch.setattr(Figure, "savefig", note)
    return drawn


@pytest.fixture
def setups(monkeypatch):
    """The setups of the runs that a test trains, one after the other."""
    seen, train = [], train_dpo.train

    def watched(setup, *given):
        seen.append(setup)
        train(setup, *given)

    monkeypatch.setattr(train_dpo, "train", watched)
    return seen


@pytest.fixture(scope="session")
def finished(tmp_path_factory, overrides):
    """A finished run with all of its files, and what it printed."""
    folder, printed = tmp_path_factory.mktemp("finished"), Output()
    arguments = overrides(
        epochs=2,
        eval_every=2,
        save_every=2,
        train_pairs=5,
        sample_prompts=1,
        output_dir=str(folder / "out"),
        reference_cache=str(folder / "cache"),
    )
    with contextlib.redirect_stdout(printed):
        assert train_dpo.main(["--config", CONFIG, *arguments]) == 0
    (config,), _ = read_config(CONFIG, arguments)
    tokenizer = AutoTokenizer.from_pretrained(config.model)
    return SimpleNamespace(
        folder=folder / "out",
        printed=printed.getvalue(),
        arguments=arguments,
        pairs=data.load_pairs(config, tokenizer)[0],
    )
