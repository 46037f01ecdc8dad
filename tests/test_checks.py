"""What is asked of model and pairs before a run trains: refusals, warnings, and the layout."""

import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from helpers import build_model, build_tokenizer, read_metrics, write_model
from support.model import load_model


def rewrite_weights(folder, change):
    """Replace the tensors of a saved model by change(tensors)."""
    path = folder / "model.safetensors"
    tensors = change(load_file(path))
    save_file(tensors, path, metadata={"format": "pt"})


WRONG_WEIGHTS = {
    "a prefix as torch.compile leaves": lambda tensors: {
        f"_orig_mod.{name}": tensor for name, tensor in tensors.items()
    },
    "one layer's MLP absent": lambda tensors: {
        name: tensor for name, tensor in tensors.items() if "layers.1.mlp" not in name
    },
    "other shapes": lambda tensors: {
        name: tensor[:-1].clone() if "layers.1.mlp.up_proj" in name else tensor
        for name, tensor in tensors.items()
    },
}


@pytest.mark.parametrize("fault", WRONG_WEIGHTS)
def test_a_checkpoint_that_leaves_weights_at_random_is_refused_by_their_names(
    tmp_path, dpo, capsys, fault
):
    write_model(tmp_path / "model")
    rewrite_weights(tmp_path / "model", WRONG_WEIGHTS[fault])
    assert dpo(model=str(tmp_path / "model")) == 2
    printed = capsys.readouterr().out
    assert "Error: " in printed and "layers." in printed and "Traceback" not in printed
    assert "_orig_mod." in printed or "layers.1.mlp" in printed
    assert ("(there in another shape)" in printed) == (fault == "other shapes")


def test_weights_that_the_model_does_not_use_are_named(tmp_path, dpo, capsys):
    write_model(tmp_path / "model")
    extra = {"value_head.weight": torch.zeros(2)}
    rewrite_weights(tmp_path / "model", lambda tensors: tensors | extra)
    assert dpo(model=str(tmp_path / "model")) == 0
    assert "does not use: value_head.weight" in capsys.readouterr().out


def test_a_token_id_without_an_embedding_is_refused_with_both_numbers(tmp_path, dpo, capsys):
    build_model("llama", vocab_size=40).save_pretrained(tmp_path / "model")
    build_tokenizer().save_pretrained(tmp_path / "model")
    assert dpo(model=str(tmp_path / "model")) == 2
    printed = capsys.readouterr().out
    assert "Error: the tokenizer gives token id " in printed and "has 40 embeddings" in printed


def test_sequences_beyond_the_models_positions_are_warned_of_with_the_limit(tmp_path, dpo, capsys):
    write_model(tmp_path / "model", max_position_embeddings=16)
    assert dpo(model=str(tmp_path / "model")) == 0
    assert (
        "max_position_embeddings of 16. Set max_length=16, and a smaller max_prompt"
        in capsys.readouterr().out
    )


def test_sequences_beyond_learned_positions_are_refused_with_both_numbers(tmp_path, dpo, capsys):
    write_model(tmp_path / "model", "gpt2", max_position_embeddings=16)
    assert dpo(model=str(tmp_path / "model")) == 2
    printed = capsys.readouterr().out
    assert "Error: " in printed and "max_length=16" in printed


def test_a_bidirectional_model_is_refused(tmp_path, dpo, capsys):
    write_model(tmp_path / "bert", "bert")
    assert dpo(model=str(tmp_path / "bert")) == 2
    assert "BertLMHeadModel is no causal language model" in capsys.readouterr().out


def test_a_model_whose_weights_hold_nan_is_refused(tmp_path, dpo, capsys):
    write_model(tmp_path / "model")
    rewrite_weights(
        tmp_path / "model", lambda tensors: {n: t * math.nan for n, t in tensors.items()}
    )
    assert dpo(model=str(tmp_path / "model")) == 2
    assert "Error: the model's predictions are not finite" in capsys.readouterr().out


def test_router_jitter_is_off_so_that_the_first_loss_is_ln_2(tmp_path, dpo):
    write_model(tmp_path / "moe", "mixtral", router_jitter_noise=0.3, num_local_experts=4)
    assert dpo(model=str(tmp_path / "moe")) == 0
    first = read_metrics(split="train")[0]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-7)


def test_noise_of_the_models_own_in_train_mode_is_said(dpo, capsys, monkeypatch):
    from transformers.models.llama.modeling_llama import LlamaMLP

    forward = LlamaMLP.forward

    def noisy(module, x):
        out = forward(module, x)
        return out + 0.01 * torch.randn_like(out) if module.training else out

    monkeypatch.setattr(LlamaMLP, "forward", noisy)
    assert dpo() == 0
    printed = capsys.readouterr().out
    assert "Warning: the model computes with noise in training" in printed
    assert "the first loss will not be that of a margin of 0, and" in printed  # whatever the loss


def test_a_calm_model_is_not_called_noisy(dpo, capsys):
    assert dpo() == 0
    assert "Warning" not in capsys.readouterr().out


def test_the_bias_of_an_lm_head_is_trained(tmp_path, dpo, capsys):
    write_model(tmp_path / "phi", "phi")
    before = AutoModelForCausalLM.from_pretrained(tmp_path / "phi").lm_head.bias
    assert dpo(model=str(tmp_path / "phi")) == 0
    assert "separate sequences" in capsys.readouterr().out
    after = AutoModelForCausalLM.from_pretrained("out/model").lm_head.bias
    assert (after != before).float().mean() > 0.5


def test_no_rate_of_a_mixture_of_experts_is_left(tmp_path, ready):
    folder = write_model(tmp_path / "moe", "mixtral", router_jitter_noise=0.3, num_local_experts=4)
    _, config = ready(model=folder)
    model, _ = load_model(config)
    rates = []
    for module in model.modules():
        rates += [value for name, value in vars(module).items() if "jitter" in name]
    assert rates and not any(rates)
