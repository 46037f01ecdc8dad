"""What the optional packages serve: LoRA adapters by peft, figures to TensorBoard and wandb."""

import json
import math
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import train_dpo
from helpers import (
    CONFIG,
    DANUBE,
    ROOT,
    assistant,
    build_tokenizer,
    plain_row_logps,
    read_metrics,
    records,
    user,
    write_adapter,
    write_jsonl,
    write_model,
)
from support import dry_run, machine, processes, report
from support.config import Config, read_config
from support.errors import InputError
from support.four_bit import FourBitLinear, count_weights
from support.model import add_adapter, load_model

ADAPTER = {"lora_r": 4, "lora_alpha": 8.0}


@pytest.fixture
def peft():
    return pytest.importorskip("peft")


def train_all(setup, config):
    """All steps of a run, without a folder; returns their figures."""
    optimizer, steps = train_dpo.make_optimizer(setup.weights, config), setup.steps["train"]
    return [train_dpo.train_step(setup, config, group, optimizer, config.lr) for group in steps]


def held_out_logps(model, setup):
    """Log-probabilities of the held-out answers by a loaded model's own forward."""
    with torch.no_grad():
        return plain_row_logps(model.eval(), setup.pairs["eval"])


def policy_logps(setup):
    with torch.no_grad():
        rows = [setup.policy(setup.make_row("eval", row)) for row in setup.rows["eval"]]
    order = [i for row in setup.rows["eval"] for i in row]
    answers = torch.cat(rows).split(setup.lengths["eval"][order].flatten().tolist())
    by_pair = {i: answers[2 * k : 2 * k + 2] for k, i in enumerate(order)}
    return torch.cat([logps for i in sorted(by_pair) for logps in by_pair[i]])


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_adapters_first_loss_is_exactly_ln_2(peft, ready, dtype, dropout):
    figures = train_all(*ready(**ADAPTER, dtype=dtype, lora_dropout=dropout))
    assert figures[0]["loss"] == pytest.approx(math.log(2), abs=1e-7)
    assert figures[0]["rewards/margins"] == 0.0
    assert figures[1]["loss"] != figures[0]["loss"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_only_the_adapter_is_trained_and_the_frozen_weights_are_in_the_compute_dtype(
    peft, ready, dtype
):
    setup, config = ready(**ADAPTER, dtype=dtype)
    parameters = dict(setup.model.named_parameters())
    before = {name: weight.detach().clone() for name, weight in parameters.items()}
    train_all(setup, config)
    changed = {name for name, weight in parameters.items() if not torch.equal(weight, before[name])}
    assert changed == {name for name in parameters if ".lora_" in name} == set(setup.weights)
    assert {weight.dtype for weight in setup.weights.values()} == {torch.float32}
    frozen = {weight.dtype for name, weight in parameters.items() if name not in setup.weights}
    assert frozen == {getattr(torch, dtype)}
    assert len(changed) == 2 * 7 * 2  # A and B at 7 linear layers of 2 blocks; not at the LM head


def test_an_adapter_reads_no_reference_of_full_training(peft, ready):
    cached = {"dtype": "bfloat16", "reference_cache": "cache"}
    full, _ = ready(**cached)
    setup, config = ready(**cached, **ADAPTER)
    assert not torch.equal(full.reference["eval"], setup.reference["eval"])
    again = train_dpo.compute_logps(setup, "eval", config, "evaluation")
    assert torch.equal(setup.reference["eval"], again)


def test_the_reference_is_the_base_model_without_the_adapter(peft, ready, tiny_model):
    setup, config = ready(**ADAPTER, train_pairs=4)
    train_all(setup, config)
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    lengths = [len(a) for p in setup.pairs["eval"] for a in (p.chosen_ids, p.rejected_ids)]
    sums = torch.stack([part.sum() for part in held_out_logps(base, setup).split(lengths)])
    torch.testing.assert_close(setup.reference["eval"].flatten(), sums, rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_base_model_as_reference_model_is_null_under_an_adapter_too(
    peft, ready, tiny_model, dtype
):
    null, _ = ready(**ADAPTER, dtype=dtype)
    setup, config = ready(**ADAPTER, dtype=dtype, reference_model=tiny_model)
    for split in ("train", "eval"):
        assert torch.equal(null.reference[split], setup.reference[split])
    assert train_all(setup, config)[0]["loss"] == pytest.approx(math.log(2), abs=1e-7)


def test_lora_dropout_acts_in_training_and_not_in_evaluation(peft, ready):
    norms = {}
    for dropout in (0.0, 0.5):
        setup, config = ready(**ADAPTER, lora_dropout=dropout, train_pairs=2)
        torch.manual_seed(0)
        norms[dropout] = train_all(setup, config)[0]["grad_norm"]
        assert torch.equal(policy_logps(setup), policy_logps(setup))
    assert norms[0.0] != pytest.approx(norms[0.5], rel=1e-3)


def test_layers_may_be_named_by_a_regular_expression(peft, ready):
    setup, _ = ready(**ADAPTER, lora_target_modules=r".*\.(q|v)_proj")
    assert {name.split(".")[4] for name in setup.weights} == {"q_proj", "v_proj"}


def test_layers_that_are_not_there_are_wrong_input(peft, dpo, capsys):
    assert dpo(**ADAPTER, lora_target_modules="q_prj") == 2
    assert "Error: lora_target_modules: " in capsys.readouterr().out


def test_the_adapter_that_is_saved_loads_on_the_base_model_as_it_was_trained(
    peft, dpo, setups, tiny_model
):
    assert dpo(**ADAPTER, epochs=2) == 0
    names = {path.name for path in Path("out/model").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "chat_template.jinja"} <= names
    assert not {"model.safetensors", "config.json"} & names
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    setup = setups[0]
    expected = policy_logps(setup)
    assert (held_out_logps(base, setup) - expected).abs().max() > 1e-2
    loaded = peft.PeftModel.from_pretrained(base, "out/model")
    torch.testing.assert_close(held_out_logps(loaded, setup), expected, rtol=0, atol=1e-4)
    by_folder = AutoModelForCausalLM.from_pretrained("out/model", dtype=torch.float32)
    torch.testing.assert_close(held_out_logps(by_folder, setup), expected, rtol=0, atol=1e-4)


def test_an_adapter_names_the_base_that_was_used_and_not_the_one_it_stood_in_for(
    peft, dpo, hub_down, tiny_model
):
    def named(folder):
        return json.loads(Path(folder, "model/adapter_config.json").read_text())

    assert dpo(**ADAPTER, model="org/model", offline={"org/model": tiny_model}) == 0
    assert named("out")["base_model_name_or_path"] == tiny_model


def test_an_adapter_on_a_gguf_file_is_refused_before_it_is_trained(peft):
    with pytest.raises(InputError, match="lora_merge=true writes the whole model instead"):
        add_adapter(None, Config(model="model.gguf", lora_r=4))


@pytest.mark.parametrize("stops", [True, False])
def test_an_adapter_whose_base_does_not_stop_at_the_end_of_its_answers_says_so(
    peft, dpo, tmp_path, capsys, stops
):
    end = build_tokenizer().convert_tokens_to_ids("<|im_end|>")
    model = write_model(tmp_path / "base", ends=[7, end] if stops else [7])
    assert dpo(**ADAPTER, model=model, train_pairs=2, eval_pairs=0) == 0
    told = "Its answers end with <|im_end|>, at which the base model's own generation does not stop"
    assert (told in capsys.readouterr().out) == (not stops)
    assert (told in Path("out/model/README.md").read_text()) == (not stops)


@pytest.mark.parametrize(
    "modules", ["", "(", "*", ".*", "embed_tokens", "model.layers", "all linear", "lm_head"]
)
def test_layers_named_in_odd_ways_are_adapted_or_wrong_input(peft, dpo, capsys, modules):
    code = dpo("--dry-run", **ADAPTER, lora_target_modules=modules, eval_pairs=0)
    printed = capsys.readouterr().out
    assert code in (0, 2)
    assert (code == 0) == ("Error: lora_target_modules: " not in printed)
    assert code == 0 or "such as .*(q|v)_proj\n" in printed or "the LM head" in printed
    assert len(printed.splitlines()) < 60 and "LayerNorm" not in printed


def test_an_adapter_of_the_lm_head_is_refused_and_not_left_untrained(peft, dpo, capsys):
    for modules in ("lm_head", ".*(q_proj|lm_head)"):
        assert dpo(**ADAPTER, lora_target_modules=modules) == 2
        assert "Error: lora_target_modules: it names the LM head too" in capsys.readouterr().out


def test_an_adapter_of_embeddings_that_are_the_lm_head_is_refused(peft, dpo, tmp_path, capsys):
    tied = write_model(tmp_path / "tied", tie_word_embeddings=True)
    assert dpo(**ADAPTER, lora_target_modules=".*(embed_tokens|q_proj)", model=tied) == 2
    assert "Error: lora_target_modules: it names the embeddings" in capsys.readouterr().out


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_merged_model_gives_the_log_probabilities_of_base_and_adapter(
    peft, tmp_path, dpo, setups, tiny_model, family
):
    model = tiny_model if family == "llama" else write_model(tmp_path / "base", family)
    assert dpo(**ADAPTER, model=model, lora_merge=True, epochs=2) == 0
    assert not list(Path("out/model").glob("adapter*"))
    merged = AutoModelForCausalLM.from_pretrained("out/model", dtype=torch.float32)
    assert merged.config.dtype == torch.float32 and "lora" not in str(merged)
    found, expected = held_out_logps(merged, setups[0]), policy_logps(setups[0])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    end = AutoTokenizer.from_pretrained("out/model").convert_tokens_to_ids("<|im_end|>")
    assert end in torch.tensor([merged.generation_config.eos_token_id]).flatten()


def test_each_adapter_of_a_sweep_says_where_its_answers_end(peft, quick, dpo, capsys):
    assert dpo(**ADAPTER, lr=[1e-3, 1e-4], output_dir="s/run") == 0
    assert capsys.readouterr().out.count("model is an adapter. Its answers end with") == 2


def test_an_adapter_is_not_merged_into_another_base_than_it_was_trained_on(
    peft, quick, dpo, capsys, monkeypatch, tmp_path
):
    base = write_model(tmp_path / "base")
    train = train_dpo.train

    def replaced(*given):
        train(*given)
        write_model(tmp_path / "base", seed=9)

    with monkeypatch.context() as patch:
        patch.setattr(train_dpo, "train", replaced)
        assert dpo(**ADAPTER, model=base, lora_merge=True) == 2
    assert "is no longer what the adapter was trained on" in capsys.readouterr().out
    write_model(tmp_path / "base")
    assert dpo(**ADAPTER, model=base, lora_merge=True) == 0
    assert "Resuming from" in capsys.readouterr().out


# Going on from an adapter


@pytest.fixture(scope="module")
def adapter(tmp_path_factory, tiny_model):
    """A folder with an adapter of the tiny model that matters, and a tokenizer of its own."""
    pytest.importorskip("peft")
    folder = tmp_path_factory.mktemp("sft") / "adapter"
    write_adapter(folder, tiny_model)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(folder)
    return str(folder)


def logps_of(peft, adapter, base, setup):
    """The held-out answers' log-probabilities by peft's own forward of base and adapter."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return held_out_logps(peft.PeftModel.from_pretrained(model, adapter), setup)


def test_an_adapter_is_merged_into_its_base_which_is_policy_and_reference(
    peft, dpo, setups, adapter, tiny_model, capsys
):
    assert dpo(model=adapter, lr=0.0) == 0
    shown = capsys.readouterr().out
    assert f"Model {adapter} is an adapter: merged into {tiny_model}" in shown
    expected = logps_of(peft, adapter, tiny_model, setups[0])
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    assert (held_out_logps(base, setups[0]) - expected).abs().max() > 1e-2
    torch.testing.assert_close(policy_logps(setups[0]), expected, rtol=0, atol=1e-4)
    lengths = setups[0].lengths["eval"].flatten().tolist()
    sums = torch.stack([part.sum() for part in expected.split(lengths)])
    torch.testing.assert_close(setups[0].reference["eval"].flatten(), sums, rtol=0, atol=1e-3)
    assert read_metrics()[0]["loss"] == pytest.approx(math.log(2), abs=1e-7)
    saved = AutoModelForCausalLM.from_pretrained("out/model", dtype=torch.float32)
    torch.testing.assert_close(held_out_logps(saved, setups[0]), expected, rtol=0, atol=1e-4)
    line = f"{Path(adapter).name} is an adapter, merged into {Path(tiny_model).name}"
    assert line in Path("out/report.md").read_text()


def test_a_new_adapter_on_an_adapter_names_it_and_goes_on_as_the_merged_model_does(
    peft, dpo, setups, adapter, capsys
):
    lora = ADAPTER | {"model": adapter, "lr": 1e-2}
    assert dpo(**lora, output_dir="two") == 0 and dpo(**lora, lora_merge=True, output_dir="m") == 0
    assert "must be merged first. lora_merge=true" in Path("two/model/README.md").read_text()
    assert "must be merged first" not in Path("m/model/README.md").read_text()
    assert read_metrics("two", "train")[0]["loss"] == pytest.approx(math.log(2), abs=1e-7)
    config = json.loads(Path("two/model/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == adapter
    assert dpo(model="two/model", lr=0.0, output_dir="three") == 0
    merged = AutoModelForCausalLM.from_pretrained("m/model", dtype=torch.float32)
    chained = AutoModelForCausalLM.from_pretrained("three/model", dtype=torch.float32)
    expected = policy_logps(setups[0])
    for model in (merged, chained):
        torch.testing.assert_close(held_out_logps(model, setups[0]), expected, rtol=0, atol=1e-4)


def test_an_adapters_base_may_have_a_stand_in(peft, dpo, tmp_path, tiny_model, hub_down):
    write_adapter(tmp_path / "sft", "org/base")
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained("sft")
    assert dpo(model="sft", offline={"org/base": tiny_model}) == 0
    assert f"stand-in for org/base: {Path(tiny_model).name}" in Path("out/report.md").read_text()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_an_adapter_that_merging_would_change_is_refused(
    peft, dpo, tmp_path, tiny_model, family, capsys
):
    """LoRA on a head that is tied to the embeddings: added to one, it changes both."""
    base = write_model(tmp_path / "base", family, tie_word_embeddings=True)
    model = AutoModelForCausalLM.from_pretrained(base)
    lora = peft.LoraConfig(r=4, target_modules=["lm_head"], init_lora_weights=False)
    peft.get_peft_model(model, lora).save_pretrained("sft", save_embedding_layers=False)
    assert dpo(model="sft") == 2
    assert "and merged into it computes something else (logits" in capsys.readouterr().out


def edit_config(**changes):
    path = Path("sft/adapter_config.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def rename_weights():
    Path("sft/adapter_model.safetensors").rename("sft/adapter_model.bin")


@pytest.mark.parametrize(
    "spoil, told",
    [
        (lambda: edit_config(base_model_name_or_path=None), "does not tell its base model: write"),
        (lambda: edit_config(base_model_name_or_path="sft"), "does not tell its base model: write"),
        (
            lambda: edit_config(base_model_name_or_path="./gone"),
            "is an adapter on ./gone (base_model_name_or_path in its adapter_config.json), which "
            "is not to be had: model ./gone: no such file or folder",
        ),
        (rename_weights, "is an adapter without adapter_model.safetensors"),
        (lambda: edit_config(base_model_name_or_path="wide"), "cannot be merged into it: "),
        (lambda: edit_config(base_model_name_or_path="gpt2"), "cannot be merged into it: "),
        (lambda: edit_config(base_model_name_or_path="deep"), "which has no place for base_model."),
        (lambda: edit_config(target_modules=["q_proj"]), "which has no place for base_model."),
        (lambda: edit_config(peft_type="PROMPT_TUNING"), "is an adapter on "),
    ],
    ids=["null", "itself", "gone", "bin", "wide", "gpt2", "deep", "fewer", "prompt"],
)
def test_an_adapter_that_does_not_fit_is_refused_with_what_to_mend(
    peft, dpo, adapter, spoil, told, capsys
):
    shutil.copytree(adapter, "sft")
    write_model("wide", hidden_size=64, head_dim=16)
    write_model("gpt2", "gpt2")
    write_model("deep", num_hidden_layers=1)
    spoil()
    assert dpo(model="sft") == 2
    shown = capsys.readouterr().out
    assert "Error: model sft is an adapter" in shown and told in shown
    assert not Path("out").exists()


SHAPES = {
    "HuggingFaceH4/ultrafeedback_binarized": lambda r: {
        "prompt": r["prompt"],
        "chosen": [user(r["prompt"]), assistant(r["chosen"])],
        "rejected": [user(r["prompt"]), assistant(r["rejected"])],
    },
    "Intel/orca_dpo_pairs": lambda r: {
        "system": "",
        "question": r["prompt"],
        "chosen": r["chosen"],
        "rejected": r["rejected"],
    },
    "argilla/distilabel-math-preference-dpo": lambda r: {
        "instruction": r["prompt"],
        "chosen_response": r["chosen"],
        "rejected_response": r["rejected"],
        "chosen_rating": 5,
        "rejected_rating": 2,
    },
}


def test_the_readmes_danube_recipe_trains_a_model_of_that_architecture(peft, tmp_path, dpo, capsys):
    readme = (ROOT / "README.md").read_text()
    (command,) = re.findall(r"config\.yaml (model=h2oai/h2o-danube.*)", readme)
    recipe = dict(word.split("=", 1) for word in shlex.split(command))
    names = recipe["dataset"].split(", ")
    tokenizer = build_tokenizer(DANUBE, eos="</s>")
    model = write_model(tmp_path / "danube", "mistral", tokenizer, sliding_window=4096)
    assert [name.partition(":")[0] for name in names] == list(SHAPES)
    for i, (name, shape) in enumerate(zip(names, SHAPES.values(), strict=True)):
        split = name.partition(":")[2]
        rows = [shape(r) | {"split": split} for r in records(4, 100 * i)]
        recipe["dataset"] = recipe["dataset"].replace(name.partition(":")[0], f"set{i}.jsonl")
        write_jsonl(tmp_path / f"set{i}.jsonl", rows)
    settings = {name: yaml.safe_load(value) for name, value in recipe.items()}
    assert dpo(**settings | {"model": model, "lr": float(settings["lr"])}) == 0
    shown = capsys.readouterr().out
    assert "train: 10 pairs" in shown and "eval: 2 pairs" in shown  # a fifth is held out
    config = yaml.safe_load(Path(settings["output_dir"], "config.yaml").read_text())
    told = {"lora_r": 4, "lora_alpha": 16.0, "epochs": 1, "batch_size": 2, "lr": 1e-5, "beta": 0.2}
    assert config | told == config
    first = read_metrics(settings["output_dir"], "train")[0]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-7)
    (command,) = re.findall(r"config\.yaml (model=runs/danube/model.*)", readme)
    second = dict(word.split("=", 1) for word in shlex.split(command))
    own = [{n: text for n, text in r.items() if n != "split"} for r in records(12, 500)]
    second["dataset"] = write_jsonl(tmp_path / "oasst2.jsonl", own)
    settings = {name: yaml.safe_load(value) for name, value in second.items()}
    assert dpo(**settings | {"lr": float(settings["lr"])}) == 0
    (row,) = read_metrics("runs/danube2", "train")[:1]
    assert row["loss"] == pytest.approx(math.log(2), abs=1e-7)
    assert Path("runs/danube2/model/model.safetensors").exists()


@pytest.mark.parametrize("changed", ["nothing", "activation_checkpointing", "load_in_4bit"])
def test_an_interrupted_adapter_with_dropout_ends_with_the_same_bytes(peft, dpo, changed):
    settings = ADAPTER | {"lora_dropout": 0.3, "epochs": 2, "save_every": 2}
    settings["eval_every"] = 3  # which the stop leaves to the run that goes on
    if changed != "nothing":
        settings[changed] = True
    if changed == "load_in_4bit":
        pytest.importorskip("bitsandbytes")
    assert dpo(**settings, output_dir="whole") == 0
    steps, step = [], train_dpo.train_step

    def stopped(*given):
        steps.append(1)
        if len(steps) == 3:
            processes._signals.append(15)
        return step(*given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(processes, "_signals", [])
        patch.setattr(train_dpo, "train_step", stopped)
        assert dpo(**settings) == 143
    assert dpo(**settings) == 0
    whole = load_file("whole/model/adapter_model.safetensors")
    resumed = load_file("out/model/adapter_model.safetensors")
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(weight, resumed[name]) for name, weight in whole.items())
    assert read_metrics("whole") == read_metrics()


def test_runs_of_a_sweep_start_from_the_same_adapter(peft, dpo):
    assert dpo(**ADAPTER, lr=[1e-3, 1e-4], output_dir="s/{lr}") == 0
    assert dpo(**ADAPTER, lr=1e-4, output_dir="alone") == 0
    swept = Path("s/0.0001/model/adapter_model.safetensors").read_bytes()
    assert swept == Path("alone/model/adapter_model.safetensors").read_bytes()


@pytest.mark.parametrize(
    "package, changes",
    [
        ("peft", {"lora_r": 4}),
        ("bitsandbytes", {"lora_r": 4, "load_in_4bit": True}),
        ("wandb", {"report_to": "wandb"}),
        ("tensorboard", {"report_to": "tensorboard"}),
    ],
    ids=str,
)
def test_a_package_that_is_not_installed_is_named_before_anything_is_loaded(
    dpo, capsys, monkeypatch, package, changes
):
    monkeypatch.setattr(machine, "find_spec", lambda name: None if name == package else name)
    monkeypatch.setattr(train_dpo, "prepare", lambda *_: pytest.fail("loaded a model"))
    assert dpo(**changes) == 2
    assert f"pip install {package}" in capsys.readouterr().out


def test_all_packages_that_are_missing_are_named_at_once(dpo, capsys, monkeypatch):
    monkeypatch.setattr(machine, "find_spec", lambda name: None)
    assert dpo(lora_r=4, load_in_4bit=True) == 2
    assert "pip install peft bitsandbytes" in capsys.readouterr().out


def test_no_optional_package_is_needed_where_none_is_asked_for(overrides, monkeypatch):
    monkeypatch.setattr(machine, "find_spec", lambda name: None)
    (config,), _ = read_config(CONFIG, overrides())
    assert machine.resolve_machine(config) == config


def test_tensorboard_gets_every_figure_of_metrics_once_also_after_a_resume(dpo):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    settings = {"report_to": "tensorboard", "save_every": 1}
    save, saves = train_dpo.save_checkpoint, []

    def full_disk(*given):
        saves.append(1)
        if len(saves) == 2:
            raise OSError("no space left")
        save(*given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_dpo, "save_checkpoint", full_disk)
        assert dpo(**settings) == 1  # step 2 is logged, but goes on from step 1
    assert dpo(**settings) == 0
    events = EventAccumulator("out", size_guidance={"scalars": 0}).Reload()
    for split, name in (("train", "loss"), ("train", "lr"), ("eval", "rewards/margins")):
        sent = [(event.step, event.value) for event in events.Scalars(f"{split}/{name}")]
        expected = [(row["step"], row[name]) for row in read_metrics(split=split)]
        assert [step for step, _ in sent] == [step for step, _ in expected]
        assert [value for _, value in sent] == pytest.approx([value for _, value in expected])


def test_wandb_gets_the_figures_offline(dpo, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    assert dpo(report_to="wandb") == 0
    wandb.finish()
    (file,) = Path("out").rglob("run-*.wandb")
    sent, rows = file.read_bytes(), read_metrics()
    for row in rows:
        assert json.dumps(row["loss"]).encode() in sent
    assert sent.count(b"train/loss") >= len(read_metrics(split="train")) == 3


# Frozen weights in 4 bits


@pytest.fixture
def bits(peft):
    """The settings of an adapter on 4-bit weights, where bitsandbytes is to be had."""
    pytest.importorskip("bitsandbytes")
    return ADAPTER | {"load_in_4bit": True}


def unpack(model):
    """Put plain linear layers with the same dequantised weights in the place of packed ones."""
    for name, layer in list(model.named_modules()):
        if isinstance(layer, FourBitLinear):
            plain = torch.nn.Linear(layer.in_features, layer.out_features, layer.bias is not None)
            plain.weight = torch.nn.Parameter(layer.weight, requires_grad=False)
            plain.bias = layer.bias
            parent, _, place = name.rpartition(".")
            setattr(model.get_submodule(parent), place, plain)


def step_gradients(setup, config):
    """The adapter's gradients of one row, after the matrices that begin at 0 were filled."""
    generator = torch.Generator().manual_seed(1)
    for weight in setup.weights.values():
        weight.data.add_(0.05 * torch.randn(weight.shape, generator=generator))
    train_dpo.round_weights(setup.policy, setup.weights)
    setup.model.train()
    setup.policy(setup.make_row("train", setup.rows["train"][0])).sum().backward()
    setup.model.eval()
    return torch.cat([weight.grad.flatten() for weight in setup.weights.values()])


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradients_on_4_bits_are_those_on_the_dequantised_weights(
    bits, ready, tmp_path, dtype, family
):
    bits["model"] = write_model(tmp_path / "base", family)
    found = step_gradients(*ready(**bits, dtype=dtype))
    place = train_dpo.place_weights

    def unpacked(policy, config):
        unpack(policy.model)
        return place(policy, config)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_dpo, "place_weights", unpacked)
        setup, config = ready(**bits, dtype=dtype)
    assert not any(isinstance(layer, FourBitLinear) for layer in setup.model.modules())
    expected = step_gradients(setup, config)
    assert (found - expected).norm() <= 1e-6 * expected.norm() and expected.norm() > 1


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_first_loss_on_4_bits_is_exactly_ln_2(bits, ready, dtype, checkpointing):
    setup, config = ready(**bits, dtype=dtype, activation_checkpointing=checkpointing)
    figures = train_all(setup, config)
    assert figures[0]["loss"] == pytest.approx(math.log(2), abs=1e-7)
    assert figures[0]["rewards/margins"] == 0.0 != figures[1]["rewards/margins"]


def test_linear_layers_are_in_4_bits_and_embeddings_and_head_are_not(bits, ready, capsys):
    setup, _ = ready(**bits)
    packed = {n.split(".")[-2] for n, m in setup.model.named_modules() if type(m) is FourBitLinear}
    assert packed == {f"{n}_proj" for n in ("q", "k", "v", "o", "gate", "up", "down")}
    frozen = [n for n, w in setup.model.named_parameters() if n not in setup.weights]
    assert sum("norm" in name for name in frozen) == len(frozen) - 2  # embeddings and LM head
    weights = sum(m.packed.numel() for m in setup.model.modules() if type(m) is FourBitLinear) * 2
    base = count_weights(setup.model) - sum(w.numel() for w in setup.weights.values())
    percent = 100 * weights / base
    told = f"load_in_4bit: {percent:.1f} % of the weights are in 4 bits (NF4)"
    assert 40 < percent < 50 and told in capsys.readouterr().out
    layer = next(m for m in setup.model.modules() if type(m) is FourBitLinear)
    assert layer.packed.nbytes == layer.in_features * layer.out_features / 2


def test_the_reference_on_4_bits_is_another_and_is_cached_apart(bits, ready):
    cached = ADAPTER | {"reference_cache": "cache"}
    plain, _ = ready(**cached)
    setup, _ = ready(**cached | bits)
    assert not torch.equal(plain.reference["eval"], setup.reference["eval"])
    assert len(list(Path("cache").glob("*.safetensors"))) == 2


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_base_model_as_reference_model_is_null_in_4_bits_too(bits, ready, tiny_model, dtype):
    null, _ = ready(**bits, dtype=dtype)
    setup, _ = ready(**bits, dtype=dtype, reference_model=tiny_model)
    for split in ("train", "eval"):
        assert torch.equal(null.reference[split], setup.reference[split])


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_an_adapter_on_4_bits_is_merged_into_the_weights_that_it_was_trained_on(
    bits, tmp_path, dpo, setups, family
):
    bits["model"] = write_model(tmp_path / "base", family)
    assert dpo(**bits, lora_merge=True, epochs=2) == 0
    merged = AutoModelForCausalLM.from_pretrained("out/model", dtype=torch.float32)
    found, expected = held_out_logps(merged, setups[0]), policy_logps(setups[0])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    assert "merged is what was trained" in Path("out/model/README.md").read_text()


def test_going_on_from_an_adapter_on_4_bits_is_from_what_was_trained(bits, dpo, setups, capsys):
    assert dpo(**bits, epochs=2) == 0
    model, _ = load_model(Config(model="out/model"))
    assert "rounded to 4 bits, as the adapter knew them" in capsys.readouterr().out
    found, expected = held_out_logps(model, setups[0]), policy_logps(setups[0])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def test_an_adapter_on_4_bits_names_its_base_and_says_how_to_load_it(bits, dpo, tiny_model):
    assert dpo(**bits) == 0
    config = json.loads(Path("out/model/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == tiny_model
    assert not [n for n in load_file("out/model/adapter_model.safetensors") if "lora_" not in n]
    for file in ("model/README.md", "report.md"):
        assert "with its linear layers in 4 bits (NF4" in Path("out", file).read_text()


def test_a_run_on_4_bits_goes_on_only_on_the_model_it_began_with(bits, dpo, tmp_path, capsys):
    bits["model"] = write_model(tmp_path / "base")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "finish", lambda *_: None)
        assert dpo(**bits, save_every=1) == 0
    write_model(tmp_path / "base", seed=7)
    assert dpo(**bits, save_every=1) == 2
    assert "the model changed since this run began" in capsys.readouterr().out


def test_4_bits_are_in_the_estimate_of_memory(bits, ready):
    """A packed weight takes half a byte and its scales in the place of bfloat16's two bytes."""
    setup, config = ready(**bits, dtype="bfloat16")
    plain, _ = ready(**ADAPTER, dtype="bfloat16")
    sizes = [dry_run._memory(s.policy, 0, 1, config) for s in (plain, setup)]
    packed = [m for m in setup.model.modules() if type(m) is FourBitLinear]
    weights = sum(m.in_features * m.out_features for m in packed)
    scales = sum(b.nbytes for m in packed for b in m.buffers()) - weights / 2
    largest = 2 * max(m.in_features * m.out_features for m in packed)
    assert sizes[0] - sizes[1] == pytest.approx(1.5 * weights - scales - largest)
    assert count_weights(setup.model) == count_weights(plain.model)


def test_4_bits_without_an_adapter_are_wrong_input(dpo, capsys):
    assert dpo(load_in_4bit=True) == 2
    assert "add lora_r=16, or set load_in_4bit to false" in capsys.readouterr().out


JUDGE = "def judge(messages, answer, record):\n    return len(answer)\n"
ROUNDS = ADAPTER | {
    "reward": "judge.py:judge",
    "rounds": 3,
    "samples_per_prompt": 8,
    "eval_samples": 2,
    "max_new_tokens": 8,
    "train_pairs": 3,
    "lr": 1e-2,
}


@pytest.mark.parametrize(
    "changes", [{}, {"lora_merge": True}, {"round_reference": "first"}, {"dtype": "bfloat16"}]
)
def test_each_round_trains_an_adapter_on_the_model_of_the_one_before(peft, dpo, talker, changes):
    Path("judge.py").write_text(JUDGE)
    assert dpo(**ROUNDS | {"model": talker} | changes) == 0
    divergences = []
    for number in (1, 2, 3):
        rows = read_metrics(f"out/round_{number}")
        evaluations = [row for row in rows if row["split"] == "eval"]
        divergences += [row["samples/kl"] for row in evaluations]
        first = next(row for row in rows if row["split"] == "train")
        is_kept = number == 1 or "round_reference" not in changes
        assert is_kept == (first["loss"] == pytest.approx(math.log(2), abs=1e-6))
    assert divergences[0] == 0 and all(divergences[1:])
    exact = 0.5 if "dtype" in changes else 1e-4
    assert divergences[1::2][:2] == pytest.approx(divergences[2::2], abs=exact)
    (config,), _ = read_config(CONFIG, ["model=out/round_3/model", "dtype=float32", "device=cpu"])
    last, _ = load_model(config)
    start = AutoModelForCausalLM.from_pretrained(talker)
    pairs = zip(last.parameters(), start.parameters(), strict=True)
    assert any((mine.data - its.data).abs().max() > 1e-3 for mine, its in pairs)
