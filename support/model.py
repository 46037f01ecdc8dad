"""The model around the method: loading, adapters, float32 weights behind the rounded, saving."""

import contextlib
import copy
import json
import os
import re
import shutil
from dataclasses import replace
from functools import partial
from importlib.util import find_spec

import torch
import transformers
from gguf import GGUFReader
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

from support.adapters import ON_FOUR_BITS, find_adapter, merge
from support.errors import InputError, first_line
from support.files import digest_model
from support.four_bit import quantize, round_weights_to_4_bits
from support.processes import WORLD, say
from support.sources import (
    announce_download,
    bases_used,
    note_commit,
    open_source,
    revisions_used,
    stand_ins_used,
)


def load_model(config):
    """Load the model in float32 on the CPU, without dropout, and its tokenizer.

    A Hub model's commit is noted in support.sources.revisions_used.

    returns  model, tokenizer
    raises   InputError if it cannot be had or is no causal language model
    """

    def load(path):
        options = {
            "trust_remote_code": config.trust_remote_code,
            "revision": config.revision or "main",
        }
        weights = {
            "dtype": torch.float32,
            "use_safetensors": True,
            "output_loading_info": True,
            "ignore_mismatched_sizes": True,  # for _check_weights to name them
        }
        if path.endswith(".gguf"):
            _refuse_scaled_rope(path)
            path, options["gguf_file"] = os.path.split(os.path.abspath(path))
            weights["quantization_config"] = transformers.GgufConfig(dequantize=True)
        on_the_hub = not os.path.exists(path)
        if config.revision and not on_the_hub:
            say(f"!!! revision={config.revision} does nothing: {path} is no Hub model !!!")
        adapter = find_adapter(config.model, path, options["revision"])
        if adapter:
            model, tokenizer = _load_merged(adapter, config)
            if on_the_hub:
                options["revision"] = note_commit(path, options["revision"], "adapter_config.json")
            if adapter.has_tokenizer:
                tokenizer = load_tokenizer(path, **options)
            return model, tokenizer
        if "gguf_file" not in options:
            _refuse_quantised(transformers.AutoConfig.from_pretrained(path, **options))
        if on_the_hub:
            announce_download(path, options["revision"])
        model, found = transformers.AutoModelForCausalLM.from_pretrained(path, **options, **weights)
        _check_weights(found, config.model)
        if on_the_hub:  # the tokenizer of the same commit, should the branch move meanwhile
            options["revision"] = note_commit(path, options["revision"])
        return model, load_tokenizer(path, **options)

    # else transformers asks a service to convert .bin weights, and reads what that proposes
    os.environ["DISABLE_SAFETENSORS_CONVERSION"] = "1"
    with open(os.devnull, "w") as silent, contextlib.redirect_stderr(silent):
        model, tokenizer = open_source(config.model, "model", config.offline, load)
    _disable_dropout(model)
    return model.eval(), tokenizer


def load_tokenizer(path, **options):
    """A model's tokenizer as transformers reads it, with Mistral's splitting of text mended.

    Files that older versions wrote of Mistral's newer tokenizers split otherwise than the models
    have learned. transformers tells that in a warning, and mends it only where it is asked to.
    """
    read = partial(transformers.AutoTokenizer.from_pretrained, path, **options)
    tokenizer = read()
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if getattr(backend, "fix_mistral_regex", None) is False:
        say(f"!!! the tokenizer of {path} splits text otherwise than Mistral's models: mended !!!")
        return read(fix_mistral_regex=True)
    return tokenizer


def _refuse_scaled_rope(path):
    """InputError for a .gguf file with factors of RoPE, which transformers leaves out unsaid."""
    for tensor in GGUFReader(path).tensors:
        if tensor.name.startswith(("rope_freqs", "rope_factors")):
            raise InputError(
                f"model {path}: its rotary embeddings are scaled (tensor {tensor.name}, as of "
                "Llama 3.1), which is lost where a .gguf file is read: give its .safetensors files"
            )


def _refuse_quantised(shape):
    """InputError for a model whose weights are saved quantised; `shape` is its config.json."""
    quantised = getattr(shape, "quantization_config", None)
    if quantised:
        raise InputError(
            f"its weights are quantised ({quantised.get('quant_method', 'no name')}), and weights "
            "are trained in float32: give the model that it was made from. For less memory, "
            "load_in_4bit=true packs that one's under an adapter"
        )


def _load_merged(adapter, config):
    """The base of an adapter with the adapter merged into it, and the base's tokenizer.

    raises   InputError as load_model and merge do, or without peft
    """
    if not find_spec("peft"):
        raise InputError(f"model {adapter.name} is an adapter, which needs peft: pip install peft")
    try:
        on = replace(config, model=adapter.base, revision=adapter.base_revision)
        base, tokenizer = load_model(on)
    except InputError as error:
        raise InputError(
            f"model {adapter.name} is an adapter on {adapter.base} (base_model_name_or_path in its "
            f"adapter_config.json), which is not to be had: {error}"
        ) from error
    if adapter.on_four_bits:
        if not find_spec("bitsandbytes"):
            needed = "which needs bitsandbytes: pip install bitsandbytes"
            raise InputError(f"model {adapter.name} was trained on weights in 4 bits, {needed}")
        round_weights_to_4_bits(base)
        say(f"The linear layers of {adapter.base} are rounded to 4 bits, as the adapter knew them")
    model = merge(base, adapter)
    bases_used[adapter.name] = adapter.base
    say(f"Model {adapter.name} is an adapter: merged into {adapter.base}")
    return model, tokenizer


def load_other(config, setting, tokenizer):
    """Load the model of a setting as load_model does, where its tokenizer is the policy's.

    Its weights will be placed as the policy's, so that of the same model they are the same to the
    last digit.

    setting  reference_model, or kl_model, where null is the model itself
    raises   InputError, as _check_tokenizer does
    """
    name = getattr(config, setting) or config.model
    revision = config.revision if name == config.model else None
    try:
        model, its_tokenizer = load_model(replace(config, model=name, revision=revision))
    except InputError as error:
        raise InputError(f"{setting}: {error}") from error
    _check_tokenizer(its_tokenizer, tokenizer, config, setting)
    if config.load_in_4bit:
        quantize(model)
    return model


def check_other(config, setting, tokenizer):
    """Refuse a setting's model that is not there or has another tokenizer; no weights are read.

    raises   InputError, as load_other does of these
    """
    name = getattr(config, setting)
    if name is None:
        return

    def load(path):
        options = {"trust_remote_code": config.trust_remote_code}
        if path.endswith(".gguf"):
            path, options["gguf_file"] = os.path.split(os.path.abspath(path))
        adapter = find_adapter(name, path, "main")
        if adapter and not adapter.has_tokenizer:
            return open_source(adapter.base, "model", config.offline, load)
        if not adapter:  # a folder of a tokenizer alone is no model
            transformers.AutoConfig.from_pretrained(path, **options)
        return load_tokenizer(path, **options)

    try:
        its_tokenizer = open_source(name, "model", config.offline, load)
    except InputError as error:
        raise InputError(f"{setting}: {error}") from error
    _check_tokenizer(its_tokenizer, tokenizer, config, setting)


def _check_tokenizer(its_tokenizer, tokenizer, config, setting):
    """Refuse the tokenizer of a setting's model that is not the policy's.

    raises   InputError, with the first of the tokens whose ids differ
    """
    ids = tokenizer.get_vocab()
    its_ids = its_tokenizer.get_vocab()
    different = []
    for token in sorted(ids.keys() | its_ids.keys()):
        if ids.get(token) != its_ids.get(token):
            different.append(token)
    if different:
        token = different[0]
        raise InputError(
            f"{setting} {getattr(config, setting)}: its tokenizer is not that of model "
            f"{config.model}: {len(different)} tokens differ, such as {token!r}, id "
            f"{its_ids.get(token)} there and {ids.get(token)} here. Its log-probabilities would be "
            "of other texts: give a model with the same tokenizer, or null"
        )


def _check_weights(found, name):
    """Refuse a checkpoint that leaves weights of the model at random; name what it has too much.

    found   what transformers tells of loading it: missing_keys, unexpected_keys, mismatched_keys
    """
    surplus = _some(found["unexpected_keys"])
    names = list(found["missing_keys"])
    for name_in_file, *_ in found["mismatched_keys"]:
        names.append(f"{name_in_file} (there in another shape)")
    absent = _some(names)
    if absent:
        message = f"model {name}: its files do not hold these weights of the model: {absent}"
        if surplus:
            message += f". They hold these instead: {surplus}. Save the model again under its names"
        raise InputError(message)
    if surplus:
        say(f"Warning: the files of model {name} hold weights that it does not use: {surplus}")


def _some(names, most=4):
    """The first few names as text."""
    names = sorted(names)
    text = ", ".join(names[:most])
    if len(names) > most:
        text += f" and {len(names) - most} more"
    return text


def _disable_dropout(model):
    """Set every rate of dropout or jitter to 0: train mode is for checkpointing and lora_dropout.

    A mixture of experts may multiply its router's inputs by noise, which it calls jitter.
    """
    for module in model.modules():
        for name, value in vars(module).items():
            is_rate = "drop" in name or "jitter" in name or isinstance(module, nn.Dropout)
            if isinstance(value, float) and is_rate:
                setattr(module, name, 0.0)


def add_adapter(model, config):
    """Put LoRA matrices (arXiv 2106.09685) beside the model's layers; they alone are trained.

    With load_in_4bit the layers are packed first: the matrices are beside what computes.

    raises   InputError where the model has no layer that lora_target_modules names, or it names
             the LM head, which a row that shares a prompt computes by its base weights, or
             embeddings whose weights are the head's
    """
    from peft import LoraConfig

    base = stand_ins_used.get(config.model, config.model)
    if base.endswith(".gguf") and not config.lora_merge:
        raise InputError(
            f"lora_r: {base} is a .gguf file, which an adapter cannot be loaded on. "
            "lora_merge=true writes the whole model instead"
        )
    if config.load_in_4bit:
        quantize(model)
    torch.manual_seed(config.seed)
    # adapter_config.json names what was used, as the config does: not the path it was found at
    model.name_or_path = base
    lora = LoraConfig(
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        revision=config.revision,
        target_modules=config.lora_target_modules,
        task_type="CAUSAL_LM",
    )
    try:
        model.add_adapter(lora)
    except (ValueError, re.error) as error:
        raise InputError(
            f"lora_target_modules: {str(error).splitlines()[0]} Give all-linear, or a regular "
            "expression that fits the whole name of each layer, such as .*(q|v)_proj"
        ) from error
    if hasattr(model.get_output_embeddings(), "lora_A"):
        raise InputError(
            "lora_target_modules: it names the LM head too, of which an adapter would not be "
            "trained here. Leave it out, or give all-linear"
        )
    embeddings = model.get_input_embeddings()
    if hasattr(embeddings, "lora_A") and embeddings.weight is model.get_output_embeddings().weight:
        raise InputError(
            "lora_target_modules: it names the embeddings, which are this model's LM head too, and "
            "an adapter would not be trained there. Leave them out, or give all-linear"
        )
    model.eval()  # peft's own layers begin in train mode, with lora_dropout


def place_weights(policy, config):
    """Bring the model to its device and compute dtype, with float32 master weights to train.

    One process    the parameters compute in the compute dtype. Behind each trained one stands its
                   float32 master weight, which the optimizer updates: a hook moves gradients to it,
                   and round_weights rounds it back. In float32 both are one memory.
    an adapter     its parameters are float32 themselves, and are cast where they are used.
    processes      share the float32 parameters out by FSDP2, which gathers them, rounded, for use.

    returns  the master weights by their parameters' names
    """
    model = policy.model
    dtype = getattr(torch, config.dtype)
    device = config.device if WORLD == 1 else "cpu"  # FSDP2 moves and shards layer by layer
    weights = {}
    for name, parameter in model.named_parameters():
        placed = parameter.data.to(device)
        rounded = placed.to(dtype)
        if not parameter.requires_grad:
            parameter.data = rounded
            continue
        weight = nn.Parameter(_master_weight(placed, rounded))
        computes_in_float32 = WORLD > 1 or config.lora_r > 0
        parameter.data = weight.data if computes_in_float32 else rounded
        if WORLD == 1:
            weights[name] = weight
            parameter.register_post_accumulate_grad_hook(partial(_add_gradient, weight))
    model.to(device)  # what is no parameter
    if WORLD == 1:
        return weights
    _shard(policy, dtype)
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def _master_weight(weight, rounded):
    """A weight in float32: itself, or the rounded one where it is halfway between two of bfloat16.

    There, as 8 % of a dequantised model's are, an update would tip it, however small it is. The
    others keep their digits, for rounding would undo a part of an earlier run's training.
    """
    weight = weight.float()
    if rounded.dtype != torch.bfloat16:
        return weight
    halfway = weight.view(torch.int32) & 0xFFFF == 0x8000
    return torch.where(halfway, rounded.float(), weight)


def _add_gradient(weight, parameter):
    """Move a parameter's gradient to the float32 weight behind it, where gradients add up."""
    grad = parameter.grad
    parameter.grad = None
    if weight.grad is None:
        weight.grad = grad.float()
    else:
        weight.grad.add_(grad)


def _shard(policy, dtype):
    """Share the policy's parameters out over the processes, a decoder layer at a time."""
    precision = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    layer_types = policy.model._no_split_modules or ()
    for module in policy.model.modules():
        if type(module).__name__ in layer_types:
            fully_shard(module, mp_policy=precision)
    fully_shard(policy, mp_policy=precision)
    register_fsdp_forward_method(policy, "generate")
    register_fsdp_forward_method(policy, "next_logits")


def round_weights(policy, weights):
    """Let the parameters that compute follow the master weights that the optimizer updated."""
    if WORLD > 1:
        policy.reshard()  # a pass without gradients leaves old weights gathered
    else:
        policy.model.load_state_dict(weights, strict=False)  # rounds to the compute dtype


def untrained_state(model, config):
    """What a saved model holds beside trained weights: persistent buffers and frozen weights.

    An adapter is saved without its base, and holds nothing else.
    """
    if config.lora_r:
        return {}
    state = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if not tensor.requires_grad:
            state[name] = tensor
    return state


@torch.no_grad()
def save_model(model, tokenizer, state, end_of_turn, config, folder, card, base_digest):
    """Write folder/model, whole or not at all: weights, tokenizer, chat template, model card.

    state        whole tensors by their names, on the CPU
    end_of_turn  token id that ends an answer, which generation is to stop at
    card         text of the model card
    base_digest  digest_model of the model before training, which an adapter is merged into
    raises       InputError where that is another one by now
    """
    temporary = folder / "model.tmp"
    dtype = getattr(torch, config.save_dtype)
    if config.lora_r and config.lora_merge:
        model, state = _merge_adapter(model, state, config, temporary, base_digest)
    shutil.rmtree(temporary, ignore_errors=True)  # that adapter, or what a crash left
    own_generation = model.generation_config  # which the next run of a sweep needs as it is
    model.generation_config = copy.deepcopy(own_generation)
    base_stops = _stop_at(model.generation_config, end_of_turn)
    model.generation_config = _valid(model.generation_config)
    if config.lora_r and not config.lora_merge and not base_stops:
        stop = tokenizer.convert_ids_to_tokens(end_of_turn)
        advice = (
            f"Its answers end with {stop}, at which the base model's own generation does not stop: "
            "generate with generation_config=GenerationConfig.from_pretrained(this folder), or "
            "train with lora_merge=true"
        )
        say(f"!!! {folder / 'model'} is an adapter. {advice} !!!")
        card += f"\n{advice}.\n"
    saved = {}
    for name, tensor in state.items():
        saved[name] = tensor.to(dtype) if tensor.is_floating_point() else tensor
    model.save_pretrained(temporary, state_dict=saved)
    model.generation_config = own_generation
    if (temporary / "config.json").exists():  # not beside an adapter
        model.config.dtype = config.save_dtype  # save_pretrained notes the compute dtype
        model.config.save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    if hasattr(model.config, "vision_config"):
        where = f"{folder / 'model'} has no processor of images"
        say(f"!!! {where}: copy preprocessor_config.json and the like from {config.model} !!!")
    if config.load_in_4bit and not config.lora_merge:
        settings = {"quant_type": "nf4", "double_quant": True}
        (temporary / ON_FOUR_BITS).write_text(json.dumps(settings), encoding="utf-8")
    (temporary / "README.md").write_text(card, encoding="utf-8")
    if hasattr(os, "sync"):  # Windows has none
        os.sync()
    os.replace(temporary, folder / "model")


def _merge_adapter(model, state, config, temporary, base_digest):
    """The base model, loaded again in float32, with the trained adapter merged into it."""
    from peft import PeftModel

    model.save_pretrained(temporary, state_dict=state)
    commit = revisions_used.get(config.model, config.revision)
    base, _ = load_model(replace(config, revision=commit))
    if digest_model(base) != base_digest:
        raise InputError(
            f"lora_merge: model {config.model} is no longer what the adapter was trained on. Put "
            "it back, and the same command merges it (without --overwrite)"
        )
    if config.load_in_4bit:  # what the adapter was trained on
        round_weights_to_4_bits(base)
    merged = PeftModel.from_pretrained(base, temporary).merge_and_unload()
    merged.to(getattr(torch, config.save_dtype))  # before a tied head becomes two tensors
    return merged, merged.state_dict()


def _valid(generation_config):
    """A model's settings of generation if they can be saved and used, else what of them can."""
    fault = _fault_of(generation_config)
    if fault is None:
        return generation_config
    sampling = copy.deepcopy(generation_config)  # some models have its settings without do_sample
    sampling.do_sample = True
    if _fault_of(sampling) is None and sampling.temperature != 0:
        return sampling
    say(f"!!! of the model's generation_config only its ends are saved, for it is invalid: {fault}")
    return transformers.GenerationConfig(eos_token_id=generation_config.eos_token_id)


def _fault_of(generation_config):
    """Why transformers would not save settings of generation, or None."""
    try:
        generation_config.validate(strict=True)
    except ValueError as error:
        return first_line(error)
    return None


def _stop_at(generation_config, end_of_turn):
    """Let generation end at the end of a turn too; returns whether it did so before."""
    ends = generation_config.eos_token_id
    known = ends if isinstance(ends, list) else [ends]
    if end_of_turn in known:
        return True
    generation_config.eos_token_id = sorted({end_of_turn, *known} - {None})
    return False
