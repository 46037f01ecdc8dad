"""What settings do: read, checked and refused with one message, swept, and shown by --help."""

import re
import typing
from dataclasses import asdict, fields
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import train_dpo
from helpers import CONFIG, write_jsonl
from support.config import OTHER_NAMES, Config, _Loader, read_config, shares_setup
from support.errors import InputError


def test_config_yaml_gives_every_setting_its_default():
    (config,), varied = read_config(CONFIG)
    apart = {"offline": None, "output_dir": Config.output_dir}
    assert asdict(config) | apart == asdict(Config())
    assert yaml.safe_load(Path(CONFIG).read_text())["output_dir"] == Config.output_dir
    assert config.output_dir == "runs/beta0.1_lr1e-07" and varied == []


def test_every_setting_has_one_commented_line_in_config_yaml():
    lines = re.findall(r"^(\w+):[^#\n]* # \w.+$", Path(CONFIG).read_text(), re.MULTILINE)
    assert lines == [spec.name for spec in fields(Config)]


def one(*overrides):
    (config,), _ = read_config(CONFIG, overrides)
    return config


def test_a_rate_that_yaml_reads_as_text_is_a_number(tmp_path):
    assert one("lr=1e-7").lr == 1e-7
    (tmp_path / "c.yaml").write_text("lr: 5e-6\nbeta: 1\nweight_decay: 1E+2\n")
    (config,), _ = read_config(tmp_path / "c.yaml")
    assert (config.lr, config.beta, config.weight_decay) == (5e-6, 1.0, 100.0)
    assert type(config.beta) is float


@pytest.mark.parametrize(
    "typed, name",
    [("betta", "beta"), ("Seed", "seed"), ("batchsize", "batch_size")],
)
def test_an_unknown_setting_is_told_with_the_nearest_name(typed, name):
    with pytest.raises(InputError, match=rf"^{typed}: no such setting, did you mean {name}\?"):
        one(f"{typed}=1")


def test_a_name_like_no_setting_gets_no_guess():
    with pytest.raises(InputError, match="^zzz: no such setting, --help lists all$"):
        one("zzz=1")


@pytest.mark.parametrize(
    "override, right",
    [
        ("beta=0", "equal to 0.000001"),
        ("beta=.nan", "finite"),
        ("beta=.inf", "finite"),
        ("lr=-0.1", "equal to 0"),
        ("lora_alpha=0", "greater than 0"),
        ("seed=4294967296", "less than"),
        ("lr=1.5", "equal to 1"),
        ("label_smoothing=0.5", "less than 0.5"),
        ("seed=-1", "equal to 0"),
        ("batch_size=0", "equal to 1"),
        ("epochs=0", "equal to 1"),
        ("max_length=1", "equal to 2"),
        ("gradient_accumulation_steps=0", "equal to 1"),
        ("train_pairs=-1", "equal to 0"),
        ("warmup_ratio=1.01", "equal to 1"),
        ("weight_decay=-1", "equal to 0"),
        ("lora_r=-1", "to 0"),
        ("loss=dpo", "'sigmoid', 'ipo' or 'hinge'"),
        ("dtype=float16", "'float32' or 'bfloat16'"),
        ("report_to=mlflow", "'none', 'tensorboard' or 'wandb'"),
        ("lora_dropout=1", "less than 1"),
    ],
)
def test_a_value_out_of_range_is_told_with_what_would_be_right(override, right):
    name, _, value = override.partition("=")
    with pytest.raises(InputError, match=f"^{name}: Input should be .*{right}.*, not") as error:
        one(override)
    assert value.strip(".") in str(error.value)


@pytest.mark.parametrize(
    "override, right",
    [
        ("beta=high", "number, not 'high'"),
        ("beta=null", "number, not None"),
        ("beta=true", "number, not True"),
        ("epochs=1.5", "integer, not 1.5"),
        ("epochs=true", "integer, not True"),
        ("seed=false", "integer, not False"),
        ("shuffle=1", "boolean, not 1"),
        ("shuffle=maybe", "boolean, not 'maybe'"),
        ("model=3", "string, not 3"),
        ("model=null", "string, not None"),
        ("offline=x", ".*not 'x'"),
        ("beta={a: 1}", "number, not {'a': 1}"),
        ("lr=[1e-7, x]", "number, not 'x'"),
        ("beta=[]", r"number, not \[\]"),
    ],
)
def test_a_value_of_the_wrong_type_is_told_with_the_right_one(override, right):
    name = override.partition("=")[0]
    with pytest.raises(InputError, match=f"^{name}: Input should be a valid {right}"):
        one(override)


def test_label_smoothing_is_refused_where_the_loss_has_none():
    with pytest.raises(InputError, match="label_smoothing"):
        one("label_smoothing=0.1", "loss=ipo")


def test_the_last_of_a_repeated_override_counts():
    assert one("beta=0.2", "lr=1e-6", "beta=0.3").beta == 0.3


def test_flags_and_overrides_come_in_any_order(monkeypatch):
    seen = []
    monkeypatch.setattr(train_dpo, "run", lambda *given: seen.append(given) or 0)
    assert train_dpo.main(["beta=0.2", "--dry-run", "lr=1e-6", "--config", CONFIG, "beta=0.3"]) == 0
    assert train_dpo.main(["--config", CONFIG, "beta=0.2", "lr=1e-6", "beta=0.3", "--dry-run"]) == 0
    assert seen[0][0] == seen[1][0] and (seen[0][0][0].beta, seen[0][0][0].lr) == (0.3, 1e-6)
    assert seen[0][-1].dry_run and seen[1][-1].dry_run


def test_lists_sweep_as_a_grid_with_a_folder_for_each_run():
    configs, varied = read_config(CONFIG, ["beta=[0.1, 0.5]", "epochs=[1, 2, 2]"])
    assert varied == ["beta", "epochs"]
    assert [(c.beta, c.epochs) for c in configs] == [(0.1, 1), (0.1, 2), (0.5, 1), (0.5, 2)]
    assert len({c.output_dir for c in configs}) == 4
    assert configs[3].output_dir == "runs/beta0.5_lr1e-07_epochs2"


def test_a_list_of_one_value_is_no_sweep():
    configs, varied = read_config(CONFIG, ["beta=[0.2]"])
    assert [c.beta for c in configs] == [0.2] and varied == []


def test_output_dir_is_filled_in_from_the_settings_it_names():
    assert one("output_dir='a/{model}/s{seed}'", "model=x/y").output_dir == "a/x-y/s42"


def test_two_runs_of_a_sweep_do_not_share_a_folder():
    with pytest.raises(InputError, match="two runs of the sweep would be in runs/.*a-p.jsonl"):
        read_config(CONFIG, ["dataset=[a/p.jsonl, a-p.jsonl]"])


def test_names_of_columns_can_be_swept():
    configs, varied = read_config(CONFIG, ["columns=[{prompt: a}, {chosen: b, rejected: c}]"])
    folders = [
        "runs/beta0.1_lr1e-07_columns" + part for part in ("prompt-a", "chosen-b,rejected-c")
    ]
    assert varied == ["columns"] and [c.output_dir for c in configs] == folders


ODD = st.sampled_from(["1e-7", "auto", "{lr}", "{", "{nope}", "{0}", "{beta.x}", "none", "-0.", ""])
PLAIN = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9) | ODD
LISTS = st.lists(PLAIN, max_size=2)
VALUES = PLAIN | LISTS | st.dictionaries(st.text(max_size=3), PLAIN, max_size=2)
NAMES = st.sampled_from([spec.name for spec in fields(Config)])
SETTINGS = st.dictionaries(NAMES, VALUES, max_size=5) | st.dictionaries(
    NAMES | st.text(max_size=5) | st.integers(), VALUES, max_size=3
)
DOCUMENTS = SETTINGS.map(yaml.safe_dump) | st.text(max_size=30)


def is_of_its_kind(name, value):
    """Whether a setting's value has the type that Config gives it."""
    kind = typing.get_type_hints(Config)[name]
    if name in ("offline", "columns"):
        return isinstance(value, dict | None)
    if typing.get_origin(kind) is typing.Literal:
        return isinstance(value, str)
    return isinstance(value, kind)


def check_any_config(path, document, override):
    """A list of Config whose every value has its type, or InputError; nothing else."""
    path.write_text(document, encoding="utf-8", errors="replace")
    try:
        configs, varied = read_config(path, override)
    except InputError as error:
        assert str(error) and len(str(error)) < 2000
        return
    assert configs and len(set(varied)) == len(varied)
    for config in configs:
        for name, value in asdict(config).items():
            assert is_of_its_kind(name, value), name
        assert type(config.seed) is int and 0 <= config.seed < 2**32
        assert 0 <= config.lr <= 1 and 1e-6 <= config.beta <= 1e6 and config.batch_size >= 1


OVERRIDES = st.lists(st.builds("{}={}".format, NAMES | st.text(max_size=4), PLAIN), max_size=2)
ANY_EXAMPLE = {"deadline": None, "suppress_health_check": list(HealthCheck)}


@settings(max_examples=100, **ANY_EXAMPLE)
@given(document=DOCUMENTS, override=OVERRIDES)
def test_any_config_is_read_or_refused_with_a_message(tmp_path, document, override):
    check_any_config(tmp_path / "c.yaml", document, override)


@pytest.mark.slow
@settings(max_examples=1000, **ANY_EXAMPLE)
@given(document=DOCUMENTS, override=OVERRIDES)
def test_any_of_many_configs_is_read_or_refused_with_a_message(tmp_path, document, override):
    check_any_config(tmp_path / "c.yaml", document, override)


@pytest.mark.parametrize("document", ["just text", "7", "- a\n- b", "a: [", "\x00"])
def test_a_file_that_is_no_list_of_settings_is_refused(tmp_path, document):
    (tmp_path / "c.yaml").write_text(document)
    with pytest.raises(InputError):
        read_config(tmp_path / "c.yaml")


WRONG = {
    "a config that is not there": (["--config", "no.yaml"], {}, "no.yaml"),
    "a config of broken YAML": (["--config", "in/broken.yaml"], {}, "broken.yaml"),
    "an unknown setting": ([], {"betta": 1}, "did you mean beta?"),
    "a value out of range": ([], {"lr": 2}, "lr: Input should be less than or equal to 1"),
    "a value of the wrong type": ([], {"epochs": "many"}, "epochs: Input should be a valid int"),
    "a missing data file": ([], {"dataset": "no.jsonl"}, "no.jsonl: no such file"),
    "a missing evaluation file": ([], {"eval_dataset": "no.csv"}, "no.csv: no such file"),
    "unknown columns": ([], {"dataset": "in/columns.jsonl"}, "['first', 'second']"),
    "a broken line": ([], {"dataset": "in/line.jsonl"}, "line 2"),
    "no pair left": ([], {"dataset": "in/same.jsonl"}, "same text"),
    "no room for an answer": ([], {"max_length": 2}, "set it well above max_prompt_length"),
    "a missing split": ([], {"split": "tests"}, "tests"),
    "a missing model folder": ([], {"model": "./no/model"}, "./no/model: no such file"),
    "a folder that holds no model": ([], {"model": "in"}, "model in does not load"),
    "an unknown device": ([], {"device": "abacus"}, "device abacus"),
    "an empty sweep": ([], {"beta": []}, "beta: Input should be a valid number, not []"),
}


@pytest.mark.parametrize("fault", WRONG)
def test_wrong_input_is_one_message_exit_code_2_and_nothing_written(tmp_path, capsys, dpo, fault):
    flags, changes, told = WRONG[fault]
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "broken.yaml").write_text("model: [")
    write_jsonl(tmp_path / "in" / "columns.jsonl", [{"first": "a", "second": "b"}] * 3)
    write_jsonl(tmp_path / "in" / "same.jsonl", [{"prompt": "p", "chosen": "a", "rejected": "a"}])
    (tmp_path / "in" / "line.jsonl").write_text('{"prompt": "p"}\n{"prompt": \n')
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert dpo(*flags, **changes) == 2
    output, errors = capsys.readouterr()
    assert len(re.findall("^Error:", output, re.MULTILINE)) == 1
    assert told in output.partition("Error:")[2]
    assert "Traceback" not in output + errors
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


@pytest.mark.usefixtures("hub_down")
@pytest.mark.parametrize("changes", [{"model": "a/b"}, {"dataset": "a/b"}], ids=str)
@pytest.mark.parametrize("stand_ins", [None, {"c/d": "e.jsonl"}], ids=str)
def test_a_name_out_of_reach_without_a_stand_in_is_wrong_input(dpo, capsys, changes, stand_ins):
    assert dpo(offline=stand_ins, **changes) == 2
    assert re.search("^Error: .* a/b .*out of reach", capsys.readouterr().out, re.MULTILINE)


def test_help_shows_every_setting_with_its_line(capsys):
    with pytest.raises(SystemExit) as stop:
        train_dpo.main(["--help"])
    shown = capsys.readouterr().out
    assert stop.value.code == 0
    assert not [spec.name for spec in fields(Config) if f"\n{spec.name}: " not in shown]
    assert "\nbeta: 0.1  # " in shown


def names_of_ours(hint):
    return set(re.findall(r"\w+", hint)) & {spec.name for spec in fields(Config)}


@pytest.mark.parametrize(
    "typed, hint",
    [
        ("learning_rate=1e-5", "here it is lr"),
        ("num_train_epochs=3", "here it is epochs"),
        ("per_device_train_batch_size=4", "here it is batch_size"),
        ("warmup_steps=100", "here it is warmup_ratio, the share of all steps"),
        ("loss_type=ipo", "here it is loss"),
        ("gradient_checkpointing=true", "here it is activation_checkpointing"),
        ("bf16=true", "here it is dtype: float32, bfloat16 or auto"),
        ("model_name_or_path=m", "here it is model"),
        ("dataset_name=d", "here it is dataset"),
        ("eval_steps=10", "here it is eval_every"),
        ("save_steps=10", "here it is save_every"),
        ("logging_steps=1", "metrics.jsonl has every step"),
        ("ref_model=m", "here it is reference_model"),
        ("optim=adamw", "the optimizer is always AdamW"),
        ("lr_scheduler_type=linear", "here it is lr_schedule"),
        ("per_device_eval_batch_size=8", "batch_size holds for evaluation too"),
        ("Learning_Rate=1", "here it is lr"),
    ],
)
def test_another_trainers_name_gets_ours_or_what_stands_in_its_place(typed, hint):
    name = typed.partition("=")[0]
    with pytest.raises(InputError, match=rf"^{name}: no such setting, {hint}$"):
        one(typed)


def test_the_names_of_other_trainers_are_none_of_ours_and_lead_to_ours():
    others = yaml.load(OTHER_NAMES.read_text(), _Loader)
    assert len(others) > 80 and not others.keys() & {spec.name for spec in fields(Config)}
    for name, hint in others.items():
        if hint.startswith("here it is") and "the flag" not in hint:
            assert names_of_ours(hint), name


@pytest.mark.parametrize(
    "flags, told",
    [
        (["--beta", "0.2"], "--beta: settings are written without dashes: beta=0.2"),
        (["--beta=0.2", "lr=1e-6"], "--beta: settings are written without dashes: beta=0.2"),
        (["lr=1e-6", "--max-length", "64"], "without dashes: max_length=64"),
        (["--learning_rate", "1e-5"], "learning_rate: no such setting, here it is lr. Settings"),
        (["--dryrun"], "--dryrun: no such flag, did you mean --dry-run?"),
        (["--dry_run"], "--dry_run: no such flag, did you mean --dry-run?"),
        (["--over-write"], "did you mean --overwrite?"),
        (["--seed"], "without dashes: seed=..."),
        (["beta", "=", "0.2"], "cannot read setting 'beta': write name=value without spaces"),
    ],
)
def test_an_unknown_flag_is_told_with_what_to_type_instead(capsys, flags, told):
    assert train_dpo.main(["--config", CONFIG, *flags]) == 2
    output, errors = capsys.readouterr()
    assert output.startswith("Error: ") and told in output and not errors


def test_a_command_without_config_says_how_to_give_it(capsys):
    assert train_dpo.main(["beta=0.2"]) == 2
    assert train_dpo.main(["--confg", CONFIG]) == 2
    missing, misspelt = capsys.readouterr().out.splitlines()
    assert "add --config config.yaml" in missing and "did you mean --config?" in misspelt


def test_a_setting_that_stands_twice_in_a_file_is_refused_with_its_lines(tmp_path):
    (tmp_path / "c.yaml").write_text("beta: 0.1\nlr: 1e-6\n\nbeta: 0.5\n")
    with pytest.raises(InputError, match="c.yaml: beta is set in lines 1 and 4: remove one"):
        read_config(tmp_path / "c.yaml")
    (tmp_path / "c.yaml").write_text("lr: 1e-6\noffline:\n  a/b: c\n  a/b: d\n")
    with pytest.raises(InputError, match="a/b is set in lines 3 and 4"):
        read_config(tmp_path / "c.yaml")


@pytest.mark.parametrize("name", ["dataset", "eval_dataset", "lora_target_modules"])
def test_a_list_of_what_one_string_can_join_says_that_it_sweeps(tmp_path, capsys, name):
    (tmp_path / "c.yaml").write_text(f"{name}: [a, b]\nlora_r: 8\n")
    configs, _ = read_config(tmp_path / "c.yaml")
    assert [getattr(config, name) for config in configs] == ["a", "b"]
    printed = capsys.readouterr().out
    joined = ".*(q_proj|v_proj)" if name.startswith("lora") else '"a, b"'
    assert printed == f"{name}: a list sweeps, a run for each; one run of all is {name}: {joined}\n"
    (tmp_path / "c.yaml").write_text(f"{name}: {joined}\nlora_r: 8\n")
    assert len(read_config(tmp_path / "c.yaml")[0]) == 1 and not capsys.readouterr().out


@pytest.mark.parametrize("device", ["meta", "cpu:7", "nonsense", "hpu", "''", "cuda:99"])
def test_a_device_that_cannot_compute_is_refused_with_those_that_can(dpo, capsys, device):
    assert dpo(device=device.strip("'")) == 2
    printed = capsys.readouterr().out
    assert re.match(f"Error: device {device.strip(chr(39))}: .*Give cpu, cuda or mps", printed)


def test_a_gpu_that_is_not_there_is_refused(dpo, capsys, monkeypatch):
    def fail(*given, **options):
        raise AssertionError("Torch not compiled with CUDA enabled")

    monkeypatch.setattr(torch, "zeros", fail)
    assert dpo(device="cuda") == 2
    assert "device cuda: AssertionError: Torch not compiled" in capsys.readouterr().out


def test_a_file_of_anything_but_settings_says_what_lines_are_to_be(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("- beta: 0.1\n- lr: 1e-6\n")
    with pytest.raises(InputError, match="its lines are to be name: value, as in beta: 0.1"):
        read_config(path)


@pytest.mark.parametrize("alpha", ["32", "[16, 32]"])
@pytest.mark.parametrize("rank, told", [("0", True), ("16", False), ("[0, 8]", False)])
def test_an_adapters_settings_without_an_adapter_are_said_to_do_nothing(rank, told, alpha, capsys):
    read_config(CONFIG, [f"lora_r={rank}", f"lora_alpha={alpha}"])
    assert ("lora_alpha does nothing, since lora_r is 0" in capsys.readouterr().out) == told


def test_settings_of_rounds_and_rewards_without_them_are_said_to_do_nothing(capsys):
    given = ["samples_per_prompt=2", "kl_model=x", "temperature=0.5"]
    read_config(CONFIG, given)
    out = capsys.readouterr().out
    assert "samples_per_prompt does nothing, since rounds is 0; rounds=4 trains on" in out
    assert "kl_model does nothing, since reward is null" in out and "temperature" in out
    read_config(CONFIG, [*given, "reward=judge.py:judge", "rounds=1"])
    assert "does nothing" not in capsys.readouterr().out
    read_config(CONFIG, ["reward=judge.py:judge", "eval_pairs=0"])
    out = capsys.readouterr().out
    assert "reward does nothing, since eval_pairs and rounds are 0" in out


def test_runs_that_merge_their_adapters_and_runs_that_do_not_are_prepared_apart():
    (one, other), _ = read_config(CONFIG, ["lora_r=4", "lora_merge=[true, false]"])
    assert not shares_setup(one, other)
    stand_ins = '[{"a/b": "c.jsonl"}, {"a/b": "d.jsonl"}]'
    (one, other), _ = read_config(CONFIG, [f"offline={stand_ins}"])
    assert not shares_setup(one, other)
