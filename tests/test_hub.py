"""Models and sets from a Hub, through the real clients: train_dpo.py against one on 127.0.0.1."""

import json
import os
import sys
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from helpers import CONFIG, records, write_adapter, write_model
from hub import Client, Hub, folder_files
from support.explain import CONVERT, explain


def as_jsonl(rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


SPLITS = b"""---
configs:
- config_name: default
  data_files:
  - split: train_prefs
    path: a.jsonl
  - split: test_prefs
    path: b.jsonl
---
"""
CONFIGURATIONS = b"""---
configs:
- config_name: en
  data_files: a.jsonl
- config_name: fr
  data_files: b.jsonl
---
"""
SET = {"README.md": SPLITS, "a.jsonl": as_jsonl(records(12)), "b.jsonl": as_jsonl(records(12, 99))}


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """A Hub, a client of it, a model's files and its folder."""
    folder = tmp_path_factory.mktemp("hub")
    (folder / "home").mkdir()
    hub = Hub()
    client = Client(hub.port, folder / "home")
    model = write_model(folder / "model")
    yield SimpleNamespace(hub=hub, client=client, model=model, files=folder_files(model))
    client.close()
    hub.stop()


@pytest.fixture
def run(here):
    """main() with --dry-run; a set or model that a test does not name is there."""
    here.hub.faults.clear()
    here.hub.add("datasets/org/set", SET)
    here.hub.add("models/org/model", here.files)

    def dry_run(flags=("--dry-run",), **changes):
        quick = {
            "model": here.model,
            "dataset": "org/set",
            "train_pairs": 4,
            "eval_pairs": 2,
            "sample_prompts": 0,
            "eval_every": 0,
            "save_every": 0,
            "dtype": "float32",
            "device": "cpu",
            "reference_cache": None,
            "offline": {},
        }
        settings = [f"{k}={json.dumps(v)}" for k, v in {**quick, **changes}.items()]
        code, printed = here.client.run("--config", CONFIG, *flags, *settings)
        assert "Traceback" not in printed, printed
        return code, printed

    return dry_run


def commits(printed):
    return json.loads(printed.rpartition("commits read: ")[2])


def test_a_model_and_a_set_of_the_hub_are_trained_on_and_their_commits_noted(here, run, tmp_path):
    model = here.hub.add("models/org/first", here.files)
    code, printed = run((), model="org/first", output_dir=str(tmp_path / "out"))
    assert code == 0, printed
    assert (tmp_path / "out" / "model" / "model.safetensors").is_file()
    assert printed.count("Downloading org/first from the Hub") == 1
    assert commits(printed) == {
        "org/first": model,
        "org/set": here.hub.add("datasets/org/set", SET),
    }


def test_what_is_cached_is_read_with_the_hub_gone_and_its_commit_is_known(here, run):
    assert run(model="org/model")[0] == 0
    code, printed = run(model="org/model")
    assert code == 0
    assert "Downloading" not in printed
    here.hub.stop()
    try:
        code, printed = run(model="org/model")
        other, said = run(model="org/never_loaded")
    finally:
        here.hub.start()
    assert code == 0, printed
    assert "Downloading" not in printed
    assert set(commits(printed)) == {"org/model", "org/set"}
    assert other == 2
    assert "neither a local path nor in the Hub's cache, and the Hub is out of reach" in said


def test_a_hub_that_hangs_does_not_keep_what_is_cached(here, run):
    assert run(model="org/model")[0] == 0
    here.hub.faults["/"] = "hang"
    code, printed = run(model="org/model")
    assert code == 0, printed


def test_a_branch_a_tag_and_a_commit_are_loaded_and_noted_as_the_commit(here, run, tmp_path):
    older = folder_files(write_model(tmp_path / "older", seed=5))
    older = here.hub.add("models/org/model", older, "v1")
    for revision in ("v1", older):
        code, printed = run(model="org/model", revision=revision)
        assert code == 0, printed
        assert commits(printed)["org/model"] == older
    code, printed = run(model="org/model", revision="nope")
    assert code == 2
    assert "model org/model does not load: it has no such revision. See its branches" in printed


def test_a_moved_branch_is_noted_as_its_new_commit(here, run, tmp_path):
    first = here.hub.add("models/org/moves", here.files)
    assert commits(run(model="org/moves")[1])["org/moves"] == first
    second = folder_files(write_model(tmp_path / "newer", seed=6))
    second = here.hub.add("models/org/moves", second)
    assert commits(run(model="org/moves")[1])["org/moves"] == second != first


LOGIN = "run: hf auth login"


@pytest.mark.parametrize(
    ("kind", "fault", "said"),
    [
        ("model", (403, "GatedRepo"), ["it is gated. Ask for access on", "/org/refused", LOGIN]),
        ("model", (401, "GatedRepo"), ["it is gated. Ask for access on", "/org/refused", LOGIN]),
        ("model", (401, None), ["the Hub refuses access (401)", LOGIN]),
        ("model", (403, None), ["the Hub refuses access (403)", LOGIN]),
        ("model", (404, "RepoNotFound"), ["of this name that you may read. Check", LOGIN]),
        ("model", (500, None), ["the Hub answers with its error 500", "Try again later"]),
        ("dataset", (403, "GatedRepo"), ["it is gated. Ask", "/datasets/org/refused", LOGIN]),
        ("dataset", (401, None), ["the Hub refuses access (401)", LOGIN]),
        ("dataset", (500, None), ["the Hub answers with its error 500", "Try again later"]),
    ],
)
def test_a_refusal_of_the_hub_says_what_to_do(here, run, kind, fault, said):
    files = {"model": here.files, "dataset": SET}[kind]
    here.hub.add(f"{kind}s/org/refused", files, fault=fault)
    code, printed = run(**{kind: "org/refused"})
    assert code == 2
    error = printed.partition(f"Error: {kind} org/refused does not load: ")[2]
    for part in said:
        assert part in error, printed


def test_a_name_that_the_hub_does_not_know_may_be_misspelt_or_private(here, run):
    for kind in ("model", "dataset"):
        code, printed = run(**{kind: "org/gone"})
        assert code == 2
        assert f"the Hub has no {kind} of this name that you may read" in printed


def test_an_absurd_name_of_a_model_is_one_clear_error(run):
    for name in ("x" * 5000, "org/a b", "a/b/c/d"):
        code, printed = run(model=name)
        assert code == 2
        assert f"Error: model {name} does not load: " in printed


def test_the_configurations_of_a_set_are_listed_and_one_can_be_chosen(here, run):
    here.hub.add("datasets/org/two", {**SET, "README.md": CONFIGURATIONS})
    for name in ("org/two", "org/two/de"):
        code, printed = run(dataset=name)
        assert code == 2
        assert "it has the configurations en, fr. Choose one, as in org/two/en" in printed
    code, printed = run(dataset="org/two/fr", split="train", eval_split=None)
    assert code == 0, printed
    assert "99 " in printed or "100 " in printed  # the beginnings of fr's prompts
    assert "org/two/fr" in commits(printed)


def test_a_revision_of_a_set_is_read_and_noted_as_its_commit(here, run):
    moved = {**SET, "a.jsonl": as_jsonl(records(12, 500))}
    old = here.hub.add("datasets/org/revised", SET, "v1")
    new = here.hub.add("datasets/org/revised", moved)
    expected = {"org/revised": new, "org/revised@v1": old, f"org/revised@{old}": old}
    for name, commit in expected.items():
        code, printed = run(dataset=name)
        assert code == 0, printed
        assert commits(printed)[name] == commit
    two = here.hub.add("datasets/org/two", {**SET, "README.md": CONFIGURATIONS}, "v2")
    code, printed = run(dataset="org/two/fr@v2:train", eval_split=None)
    assert code == 0, printed
    assert commits(printed)["org/two/fr@v2"] == two
    code, printed = run(dataset="org/two@v2:train", eval_split=None)
    assert code == 2
    assert "Choose one, as in org/two/en@v2" in printed


def test_another_revision_in_the_cache_is_not_taken_for_the_one_asked_for(here, run):
    new = here.hub.add("datasets/org/kept", SET)
    assert run(dataset="org/kept")[0] == 0
    for revision in ("nope", "0" * 40):
        code, printed = run(dataset=f"org/kept@{revision}")
        assert code == 2, printed
        assert f"Error: dataset org/kept@{revision}" in printed
    here.hub.stop()
    try:
        known, printed = run(dataset=f"org/kept@{new}")
        other, said = run(dataset=f"org/kept@{'0' * 40}")
        branch, told = run(dataset="org/kept@v1")
    finally:
        here.hub.start()
    assert known == 0, printed
    assert (other, branch) == (2, 2)
    assert f"the cache holds commit {new} of it" in said
    assert "the Hub is out of reach" in told


def test_a_split_that_is_not_there_is_answered_with_those_that_are(run):
    code, printed = run(dataset="org/set:nope")
    assert code == 2
    assert "Unknown split" in printed
    assert "['train_prefs', 'test_prefs']. Choose with org/set:NAME" in printed


@pytest.mark.parametrize(
    ("kind", "file", "fault"),
    [
        ("model", "model.safetensors", "cut"),
        ("model", "tokenizer.json", "cut"),
        ("dataset", "a.jsonl", "cut"),
        ("model", "model.safetensors", "hang"),
        ("dataset", "a.jsonl", "hang"),
    ],
)
def test_a_download_that_breaks_off_names_its_file(here, run, kind, file, fault):
    name = f"org/{fault}_{file.partition('.')[0]}"
    here.hub.add(f"{kind}s/{name}", {"model": here.files, "dataset": SET}[kind])
    here.hub.faults[f"{kind}s/{name}/{file}"] = fault
    code, printed = run(**{kind: name})
    assert code == 2
    assert f"{kind} {name} does not load: the download of {file} broke off" in printed
    assert "pytorch_model.bin" not in printed
    if fault == "cut":
        here.hub.faults.clear()
        assert run(**{kind: name})[0] == 0  # nothing broken stays behind


def test_a_model_with_bin_weights_alone_says_how_to_convert_it(here, run, tmp_path):
    files = dict(here.files)
    files["pytorch_model.bin"] = files.pop("model.safetensors")
    here.hub.add("models/org/bin", files)
    folder = tmp_path / "local"
    folder.mkdir()
    for file, content in files.items():
        (folder / file).write_bytes(content)
    for name in ("org/bin", str(folder)):
        code, printed = run(model=name)
        assert code == 2
        assert f"model {name} does not load: it has no .safetensors file" in printed
        assert "save_pretrained(folder)" in printed
    assert f"{folder} local-safetensors" in printed


def test_the_command_that_converts_bin_weights_does_so(tmp_path, monkeypatch):
    folder = tmp_path / "bin"
    converted = tmp_path / "converted"
    write_model(folder)
    weights = load_file(folder / "model.safetensors")
    torch.save(weights, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    monkeypatch.setattr(sys, "argv", ["-c", str(folder), str(converted)])
    exec(CONVERT, {})
    again = load_file(converted / "model.safetensors")
    assert all(torch.equal(again[name], weight) for name, weight in weights.items())
    assert (converted / "tokenizer.json").is_file()


@pytest.mark.parametrize("file", ["model.safetensors", "tokenizer.json", "config.json"])
def test_a_damaged_file_of_a_folder_is_named(here, run, tmp_path, file):
    for name, content in here.files.items():
        (tmp_path / name).write_bytes(content[: len(content) // 2] if name == file else content)
    code, printed = run(model=str(tmp_path))
    assert code == 2
    assert f"the file {tmp_path / file} is damaged" in printed
    assert "Copy it anew" in printed


@pytest.mark.parametrize("content", [b"text", b"GGUF" + bytes(60), b""])
def test_a_damaged_gguf_file_is_named(run, tmp_path, content):
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    code, printed = run(model=str(path))
    assert code == 2
    assert f"the file {path} is damaged or unreadable" in printed


def test_a_folder_without_permission_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(os, "access", lambda *_: False)  # an administrator may read any
    fault = explain(ValueError("Unrecognized model"), str(tmp_path), "model")
    assert fault == f"you may not read the folder {tmp_path}. Change its permissions"


def test_a_damaged_file_of_the_cache_is_named_and_mended_as_it_says(here, run):
    here.hub.add("models/org/damaged", here.files)
    assert run(model="org/damaged")[0] == 0
    (file,) = here.client.home.glob("hub/models--org--damaged/snapshots/*/model.safetensors")
    whole = file.read_bytes()
    file.resolve().write_bytes(whole[:5000])
    code, printed = run(model="org/damaged")
    assert code == 2
    assert f"the file {file} is damaged" in printed
    assert f"Delete {file.resolve()} and start again" in printed
    file.resolve().unlink()
    assert run(model="org/damaged")[0] == 0
    assert file.read_bytes() == whole


def test_an_adapter_and_its_base_come_from_the_hub_and_both_commits_are_noted(here, run, tmp_path):
    pytest.importorskip("peft")
    sft = folder_files(write_adapter(tmp_path / "sft", "org/model"))
    commit = here.hub.add("models/org/sft", sft)
    code, printed = run(model="org/sft")
    assert code == 0, printed
    assert "Model org/sft is an adapter: merged into org/model" in printed
    model = here.hub.add("models/org/model", here.files)
    assert commits(printed) | {"org/sft": commit, "org/model": model} == commits(printed)
    here.hub.stop()
    try:
        code, printed = run(model="org/sft")
    finally:
        here.hub.start()
    assert code == 0, printed  # from the cache
    unsafe = {"adapter_model.bin": b"", "adapter_config.json": sft["adapter_config.json"]}
    here.hub.add("models/org/bin", unsafe)
    code, printed = run(model="org/bin")
    assert code == 2 and "model org/bin is an adapter without adapter_model.safetensors" in printed
