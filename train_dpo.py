"""Align a causal language model with Direct Preference Optimization (arXiv 2305.18290).

    python train_dpo.py --config config.yaml                      one process
    python train_dpo.py --config config.yaml beta=0.2 lr=5e-7     with other settings
    python train_dpo.py --config config.yaml lr=[1e-7,1e-6]       a sweep
    python train_dpo.py --config config.yaml --dry-run            look at the data, train nothing
    torchrun --nproc-per-node=8 train_dpo.py --config config.yaml several GPUs

The run from top to bottom, as main() does it:
    read_config   config.yaml and overrides -> a Config for each run of the sweep
    prepare       model, pairs, rows, and the reference's log-probabilities of each pair
    train         DPO loss -> gradients -> AdamW step, with metrics, checkpoints and evaluations
    finish        evaluation before and after, model/, report.md, curves.png
"""

import argparse
import contextlib
import difflib
import fcntl
import hashlib
import itertools
import json
import math
import os
import re
import resource
import shutil
import signal
import sys
import time
import typing
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
import transformers
import yaml
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from tqdm import tqdm
from transformers import AttentionInterface, AutoModelForCausalLM, AutoTokenizer, GgufConfig

import data
from data import InputError
from dpo_loss import dpo_loss, sequence_logps, token_logps

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
# what may change between two sessions of one run
HARMLESS = {"logging_every", "eval_every", "save_every", "report_to", "reference_cache", "offline"}
# what runs of a sweep may differ in and still share the model and its reference log-probabilities
AFTER_REFERENCE = HARMLESS | {
    *("loss", "beta", "label_smoothing", "epochs", "lr", "warmup_ratio", "weight_decay"),
    *("max_grad_norm", "save_dtype", "output_dir"),
}
METRICS = ("loss", "rewards/chosen", "rewards/rejected", "logps/chosen", "logps/rejected")


class TrainingError(RuntimeError):
    """Training cannot go on; the message says why and what to change."""


class Interrupted(Exception):
    """SIGINT or SIGTERM arrived."""


def setting(default, low=None, high=None, choices=None):
    """A config field with its inclusive bounds or its choices."""
    return field(default=default, metadata={"low": low, "high": high, "choices": choices})


@dataclass(frozen=True)
class Config:
    """All settings of one run; config.yaml says what each one does."""

    model: str = "HuggingFaceTB/SmolLM2-135M-Instruct"
    revision: str | None = None
    trust_remote_code: bool = False
    dataset: str = "HuggingFaceH4/ultrafeedback_binarized"
    split: str | None = "train_prefs"
    eval_dataset: str | None = None
    eval_split: str | None = "test_prefs"
    train_pairs: int = setting(500, 0)
    eval_pairs: int = setting(100, 0)
    shuffle: bool = True
    keep_ties: bool = False
    seed: int = setting(42, 0, 2**32 - 1)
    max_length: int = setting(1024, 2)
    max_prompt_length: int = setting(512, 1)
    loss: str = setting("sigmoid", choices=("sigmoid", "ipo", "hinge"))
    beta: float = setting(0.1, 1e-6, 1e6)
    label_smoothing: float = setting(0.0, 0, 0.499)
    length_normalize: bool = False
    epochs: int = setting(1, 1)
    batch_size: int = setting(1, 1)
    gradient_accumulation_steps: int = setting(2, 1)
    lr: float = setting(1e-7, 0, 1)
    warmup_ratio: float = setting(0.0, 0, 1)
    weight_decay: float = setting(0.01, 0, 1e3)
    max_grad_norm: float = setting(1.0, 0)
    dtype: str = setting("auto", choices=("auto", *DTYPES))
    device: str = "auto"
    activation_checkpointing: bool = False
    lora_r: int = setting(0, 0)
    lora_alpha: float = setting(16, 0)
    lora_dropout: float = setting(0.0, 0, 0.99)
    lora_target_modules: str = "all-linear"
    lora_merge: bool = False
    output_dir: str = "runs/beta{beta}_lr{lr}"
    logging_every: int = setting(1, 1)
    eval_every: int = setting(50, 0)
    save_every: int = setting(50, 0)
    save_dtype: str = setting("float32", choices=tuple(DTYPES))
    sample_prompts: int = setting(3, 0)
    report_to: str = setting("none", choices=("none", "tensorboard", "wandb"))
    reference_cache: str | None = "runs/reference_cache"
    offline: dict = field(default_factory=dict)


def check_setting(spec, value, kind):
    """The value as the setting's type; "1e-7", which YAML reads as text, is a number.

    spec     dataclasses.Field of Config
    kind     its type hint
    raises   InputError that names the setting, the value and what would be right
    """
    kinds = typing.get_args(kind) or (kind,)
    wanted = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
    if value is None and type(None) in kinds:
        return None
    if kinds[0] is dict:
        if value is not None and not isinstance(value, dict):
            raise InputError(f"{spec.name} must be lines of `name: stand-in`, not {value!r}")
        return {str(k): str(v) for k, v in (value or {}).items()}
    try:
        if isinstance(value, bool) != (kinds[0] is bool) or isinstance(value, (dict, type(None))):
            raise ValueError
        if kinds[0] is str and not isinstance(value, str):
            raise ValueError
        if kinds[0] is int and float(value) != int(float(value)):
            raise ValueError
        value = kinds[0](float(value)) if kinds[0] is int else kinds[0](value)
    except (ValueError, TypeError, OverflowError):
        raise InputError(f"{spec.name} must be {wanted[kinds[0]]}, not {value!r}") from None
    low, high, choices = (spec.metadata.get(key) for key in ("low", "high", "choices"))
    if choices and value not in choices:
        raise InputError(f"{spec.name} must be one of {', '.join(choices)}, not {value!r}")
    if isinstance(value, float) and not math.isfinite(value):
        raise InputError(f"{spec.name} must be finite, not {value}")
    if (low is not None and value < low) or (high is not None and value > high):
        upper = "" if high is None else f" and at most {high}"
        raise InputError(f"{spec.name} must be at least {low}{upper}, not {value}")
    return value


def read_config(path, overrides=()):
    """Read config.yaml and `name=value` overrides; the last of a repeated override counts.

    returns  a Config for each run (several where settings are lists), and the names that vary
    raises   InputError for a file, name or value that is not right
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
        settings = yaml.safe_load(text) or {}
        given = {}
        for override in overrides:
            name, equals, value = override.partition("=")
            if not equals:
                raise InputError(f"{override!r} is no override: type name=value")
            given[name.strip()] = yaml.safe_load(value)
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"config {path} cannot be read: {error}") from error
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"config {path} is not YAML: {error}") from error
    if not isinstance(settings, dict):
        raise InputError(f"config {path} must be lines of `name: value`")
    settings |= given
    specs, kinds = {f.name: f for f in fields(Config)}, typing.get_type_hints(Config)
    choices = {}
    for name, value in settings.items():
        if name not in specs:
            near = difflib.get_close_matches(str(name), specs, 1)
            raise InputError(
                f"unknown setting {name!r}"
                + (f": did you mean {near[0]}?" if near else f"; there are {', '.join(specs)}")
            )
        swept = isinstance(value, list) and kinds[name] not in (bool, dict)
        if swept and not value:
            raise InputError(f"{name} is an empty list: give at least one value")
        values = [check_setting(specs[name], v, kinds[name]) for v in (value if swept else [value])]
        choices[name] = list(dict.fromkeys(values)) if swept else values
    varied = [name for name, values in choices.items() if len(values) > 1]
    configs = []
    for values in itertools.product(*choices.values()):
        config = Config(**dict(zip(choices, values, strict=True)))
        if config.label_smoothing and config.loss != "sigmoid":
            raise InputError("label_smoothing is defined for loss sigmoid only: set it to 0")
        template = config.output_dir
        template += "".join(f"_{n}{{{n}}}" for n in varied if f"{{{n}}}" not in template)
        try:
            filled = {k: str(v).replace("/", "-") for k, v in asdict(config).items()}
            configs.append(replace(config, output_dir=template.format_map(filled)))
        except (KeyError, ValueError, IndexError, AttributeError) as error:
            raise InputError(f"output_dir {template!r}: {error} is no setting's name") from error
    return configs, varied


def say(text=""):
    """Print a line, from one process only."""
    if RANK == 0:
        tqdm.write(str(text))
        sys.stdout.flush()


@contextlib.contextmanager
def progress(total, title, done=0):
    """A bar on a terminal; elsewhere a plain line for every tenth. Yields tick(n, **figures)."""
    bar = tqdm(
        total=total, initial=done, desc=title, unit="pair", leave=True, dynamic_ncols=True,
        disable=RANK > 0 or not sys.stderr.isatty(),
    )  # fmt: skip
    state = {"n": done, "start": time.time()}

    def tick(n, **figures):
        before, state["n"] = state["n"], state["n"] + n
        bar.set_postfix(figures, refresh=False)
        bar.update(n)
        if bar.disable and before * 10 // total != state["n"] * 10 // total:
            seconds = time.time() - state["start"]
            left = seconds / (state["n"] - done) * (total - state["n"])
            shown = " ".join(f"{k}={v}" for k, v in figures.items())
            say(f"{title} {state['n']}/{total} {seconds:.0f} s, {left:.0f} s left {shown}")

    with bar:
        yield tick


def all_sum(tensor):
    """Sum over the processes, in place."""
    if WORLD > 1:
        dist.all_reduce(tensor)
    return tensor


def from_first(value):
    """The first process's value, on every process."""
    box = [value]
    if WORLD > 1:
        dist.broadcast_object_list(box)
    return box[0]


def resolve_machine(config):
    """The config with device and dtype decided: bfloat16 only where it is the faster one."""
    device = config.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
        device = "mps" if torch.backends.mps.is_available() else device
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"device {device}: {data.first_line(error)}") from error
    dtype = config.dtype
    if dtype == "auto":
        cpu = torch.cpu.get_capabilities()
        fast = cpu.get("amx_bf16") or cpu.get("avx512_bf16")
        if device.startswith("cuda"):
            fast = torch.cuda.get_device_capability(device) >= (8, 0)
        dtype = "bfloat16" if fast and not device.startswith("mps") else "float32"
    return replace(config, device=device, dtype=dtype)


def load_model(config):
    """Load the model in float32 on the CPU, and its tokenizer.

    returns  model, tokenizer, and the stand-in's name or None
    raises   InputError if it cannot be had, or is not a causal language model
    """
    options = {"revision": config.revision, "trust_remote_code": config.trust_remote_code}

    def load(path):
        extra = {}
        if path.endswith(".gguf"):
            path, extra["gguf_file"] = os.path.split(os.path.abspath(path))
        tokenizer = AutoTokenizer.from_pretrained(path, **extra, **options)
        if extra:
            extra["quantization_config"] = GgufConfig(dequantize=True)
        model = AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.float32, use_safetensors=True, **extra, **options
        )
        return model, tokenizer

    (model, tokenizer), stand_in = data.open_source(config.model, "model", config.offline, load)
    for module in model.modules():  # the model stays in train mode, without dropout
        for name, value in vars(module).items():
            if isinstance(value, float) and ("drop" in name or isinstance(module, nn.Dropout)):
                setattr(module, name, 0.0)
    return model, tokenizer, stand_in


def shared_prompt_attention(module, query, key, value, mask, scaling=None, segments=(), **kwargs):
    """Attention over a Row: each answer sees its prompt and itself, no other answer or pair.

    Two products a pair: prompt and chosen answer causally, then the rejected answer over prompt
    and itself. Called by every attention layer through transformers' AttentionInterface.

    query     (1, heads, t, head_dim); key, value (1, key-value heads, t, head_dim)
    segments  the lengths (prompt, chosen, rejected) of each pair, adding up to t
    returns   (1, t, heads, head_dim) and None
    """
    outputs, start = [], 0
    options = {"scale": scaling, "enable_gqa": query.shape[1] != key.shape[1]}
    for prompt, chosen, rejected in segments:
        middle, end = start + prompt + chosen, start + prompt + chosen + rejected
        q, k, v = (x[:, :, start:middle] for x in (query, key, value))
        outputs.append(F.scaled_dot_product_attention(q, k, v, is_causal=True, **options))
        q, (k, v) = query[:, :, middle:end], (
            torch.cat((x[:, :, start : start + prompt], x[:, :, middle:end]), 2)
            for x in (key, value)
        )
        seen = torch.ones(rejected, prompt + rejected, dtype=torch.bool, device=q.device)
        mask = seen.tril(prompt)
        outputs.append(F.scaled_dot_product_attention(q, k, v, attn_mask=mask, **options))
        start = end
    return torch.cat(outputs, 2).transpose(1, 2).contiguous(), None


AttentionInterface.register("shared_prompt", shared_prompt_attention)


class AnswerLogps(nn.Module):
    """Log-probability of each answer token of a Row under a causal language model.

    shared    whether the row runs as it is, its prompts computed once; otherwise each answer runs
              as a sequence of its own through the model's own forward, which is right for any model
    """

    def __init__(self, model, shared=True):
        super().__init__()
        self.model, self.shared = model, shared
        self.own_attention = model.config._attn_implementation
        if shared:
            model.set_attn_implementation("shared_prompt")

    def forward(self, row):
        """(n,) float32: log-probabilities of row.targets in nats."""
        row = row.to(self.model.device)
        if self.shared:
            hidden = self.model.base_model(
                input_ids=row.input_ids[None], position_ids=row.position_ids[None],
                segments=row.segments, use_cache=False,
            ).last_hidden_state[0]  # fmt: skip
            head = self.model.get_output_embeddings().weight
            return token_logps(hidden[row.predictors], head, row.targets)
        logps, start = [], 0
        for prompt, *answers in row.segments:
            prompt_ids, start = row.input_ids[start : start + prompt], start + prompt
            for length in answers:
                answer, start = row.input_ids[start : start + length], start + length
                ids = torch.cat((prompt_ids, answer))[None]
                logits = self.model(input_ids=ids, use_cache=False).logits[0, prompt - 1 : -1]
                logps.append(logits.float().log_softmax(-1).gather(1, answer[:, None]).squeeze(1))
        return torch.cat(logps)

    @torch.no_grad()
    def generate(self, prompt_ids, eos, max_new_tokens=128):
        """Token ids of the greedy answer to a prompt."""
        self.model.eval().set_attn_implementation(self.own_attention)
        ids = torch.tensor([prompt_ids], device=self.model.device)
        out = self.model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, eos_token_id=eos,
            pad_token_id=eos, max_new_tokens=max_new_tokens, temperature=None, top_p=None,
        )  # fmt: skip
        self.model.train().set_attn_implementation(
            "shared_prompt" if self.shared else self.own_attention
        )
        return out[0, len(prompt_ids) :].tolist()


@torch.no_grad()
def choose_layout(model, pairs, tolerance=1e-3):
    """Compute the longest pair with a shared prompt and as two sequences, and compare.

    returns  whether rows may share prompts, and the largest difference in nats a token (None if
             the shared row was not tried or the model refuses it)
    """
    longest = max(pairs, key=lambda pair: pair.tokens)
    windows = [getattr(model.config, "sliding_window", None) or math.inf]
    reach = max(
        len(p.prompt_ids) + max(len(p.chosen_ids), len(p.rejected_ids)) for p in pairs
    )
    if reach > min(windows):
        say(f"Prompt and answer exceed the model's sliding window of {windows[0]} tokens:"
            " separate sequences.")  # fmt: skip
        return False, None
    row = data.make_row([longest], [0])
    expected = AnswerLogps(model, shared=False)(row)
    own = model.config._attn_implementation
    try:
        difference = (AnswerLogps(model)(row) - expected).abs().max().item()
    except (TypeError, ValueError, RuntimeError, AttributeError, NotImplementedError) as error:
        say(f"The model takes no shared-prompt rows ({data.first_line(error)}).")
        difference = math.inf
    finally:
        model.set_attn_implementation(own)
    shared = difference <= tolerance
    say(f"Self-check on the longest pair ({longest.tokens} tokens): shared prompt and separate "
        f"sequences differ by {difference:.1e} nat a token"
        + ("" if shared else ": separate sequences are used (slower, right)."))  # fmt: skip
    return shared, difference


@dataclass
class Setup:
    """What the runs of a sweep share."""

    config: Config
    model: nn.Module
    tokenizer: typing.Any
    policy: AnswerLogps
    adapter: typing.Any  # peft's model around `model`, or None
    weights: dict  # name -> float32 tensor that the optimizer updates
    copies: list  # (parameter in the compute dtype, its float32 weights)
    pairs: dict  # "train" and "eval" -> list of data.Pair
    steps: list  # optimizer steps, each a list of Rows
    eval_rows: list
    facts: dict  # what the report says of data, machine and reference
    reference: dict = field(default_factory=dict)  # "train" and "eval" -> (pairs, 2) log-probs
    answers: list = field(default_factory=list)  # the reference's, to the sample prompts
    initial: dict | None = None  # the first weights, kept where another run follows


def add_adapter(model, config):
    """Inject a LoRA adapter into the model's layers; returns peft's wrapper, which saves it."""
    try:
        import peft
    except ImportError as error:
        raise InputError("lora_r above 0 needs peft. Type: pip install peft") from error
    names = config.lora_target_modules
    if names != "all-linear":
        names = [name.strip() for name in names.split(",")]
    options = peft.LoraConfig(
        r=config.lora_r, lora_alpha=config.lora_alpha, lora_dropout=config.lora_dropout,
        target_modules=names, task_type="CAUSAL_LM",
    )  # fmt: skip
    try:
        return peft.get_peft_model(model, options)
    except ValueError as error:
        raise InputError(f"lora_target_modules {config.lora_target_modules}: {error}") from error


def place_weights(model, policy, config):
    """Bring the float32 model to its device and compute dtype; trained weights stay float32.

    One process keeps a float32 copy of each trained weight and adds up its gradients there.
    Several shard float32 weights with FSDP2, which casts them as it gathers them.

    returns  weights by name, as the optimizer updates them, and the (parameter, weights) copies
    """
    dtype = DTYPES[config.dtype]
    if WORLD > 1:
        precision = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
        mesh = dist.init_device_mesh(torch.device(config.device).type, (WORLD,))
        layers = max((m for m in model.modules() if isinstance(m, nn.ModuleList)), key=len)
        for layer in layers:
            fully_shard(layer, mesh=mesh, mp_policy=precision)
        fully_shard(policy, mesh=mesh, mp_policy=precision)
        register_fsdp_forward_method(policy, "generate")
        return {n: p for n, p in model.named_parameters() if p.requires_grad}, []
    weights, copies = {}, []

    def add_up(parameter, master):
        grad, parameter.grad = parameter.grad.float(), None
        master.grad = grad if master.grad is None else master.grad.add_(grad)

    model.to(config.device)
    for name, parameter in model.named_parameters():
        weight = parameter.detach()
        if not parameter.requires_grad or dtype != torch.float32 and not config.lora_r:
            parameter.data = weight.to(dtype)
        if parameter.requires_grad:
            weights[name] = parameter
            if parameter.dtype != torch.float32:
                weights[name] = nn.Parameter(weight)
                copies.append((parameter, weights[name]))
                parameter.register_post_accumulate_grad_hook(
                    lambda p, master=weights[name]: add_up(p, master)
                )
    return weights, copies


def row_flops(row, model):
    """Floating point operations of a forward pass over a Row: two per weight and token."""
    config = model.config.get_text_config()
    matrices = sum(
        p.numel() for n, p in model.named_parameters() if p.ndim > 1 and "emb" not in n
    )
    head = config.vocab_size * config.hidden_size
    seen = sum((p + c) ** 2 / 2 + r * (p + r / 2) for p, c, r in row.segments)
    attention = 4 * seen * config.hidden_size * config.num_hidden_layers
    return 2 * matrices * len(row.input_ids) + 2 * head * len(row.targets) + attention


def matmul_peak(config, size=1024, seconds=0.3):
    """Measured floating point operations a second of a matrix product in the compute dtype."""
    a = torch.randn(size, size, device=config.device, dtype=DTYPES[config.dtype])
    b, best, start = a.clone(), math.inf, time.time()
    while time.time() - start < seconds:
        begin = time.perf_counter()
        (a @ b)[0, 0].item()
        best = min(best, time.perf_counter() - begin)
    return 2 * size**3 / best


@torch.no_grad()
def compute_logps(policy, rows, count, config, title):
    """log pi(y|x) of all pairs of these rows, shared out over the processes.

    returns  (count, 2) float32 on the CPU: chosen, rejected, in nats
    raises   Interrupted between two rows
    """
    logps = torch.zeros(count, 2)
    with progress(count, title) as tick:
        for start in range(0, len(rows), WORLD):
            row = rows[min(start + RANK, len(rows) - 1)]
            answers = sequence_logps(policy(row), row.lengths, config.length_normalize)
            if start + RANK < len(rows):
                logps[row.pairs] = answers.view(-1, 2).float().cpu()
            tick(sum(len(row.pairs) for row in rows[start : start + WORLD]))
            check_signal()
    if WORLD > 1:
        policy.reshard()  # FSDP2: an optimizer built on gathered weights would go wrong silently
    return all_sum(logps.to(policy.model.device)).cpu()


def reference_logps(setup, config, digest):
    """The reference's log-probabilities of all pairs, from the cache where they are in it.

    They are the policy's own before its first step, in the rows and numerics of training, so that
    the first loss is exactly ln 2. digest is a hash of the model's weights.
    """
    every = [row for rows in setup.steps for row in rows]
    layout = [(r.input_ids.tolist(), r.segments, r.pairs) for r in every + setup.eval_rows]
    machine = [config.dtype, config.device, torch.get_num_threads(), WORLD, config.length_normalize]
    key = [digest, layout, machine, setup.policy.shared, torch.cpu.get_capabilities()["cpu_name"]]
    key += [torch.__version__, transformers.__version__, setup.policy.own_attention]
    name = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32] + ".safetensors"
    path = Path(config.reference_cache or "/nonexistent") / name
    cached = load_file(path) if RANK == 0 and path.exists() else None
    cached = from_first(cached)
    if cached:
        say(f"Reference log-probabilities: from {path}")
        return cached
    found = {
        "train": compute_logps(setup.policy, every, len(setup.pairs["train"]), config, "reference"),
        "eval": compute_logps(
            setup.policy, setup.eval_rows, len(setup.pairs["eval"]), config, "reference, evaluation"
        ),
    }
    if config.reference_cache and RANK == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(found, path.with_suffix(".tmp"))
        os.replace(path.with_suffix(".tmp"), path)
    return found


def prepare(config, keep_initial=False, dry=False):
    """Load model and pairs, lay out rows, and compute the reference's log-probabilities."""
    begin = time.time()
    model, tokenizer, stand_in = load_model(config)
    train, evaluation, drops, stand_ins = data.load_pairs(config, tokenizer)
    pairs = {"train": train, "eval": evaluation}
    for split, wanted in (("train", config.train_pairs), ("eval", config.eval_pairs)):
        dropped = ", ".join(f"{n} {why}" for why, n in drops[split].most_common())
        say(f"{len(pairs[split])} {split} pairs ({dropped or 'none'} dropped)")
        if len(pairs[split]) < wanted:
            say(f"Warning: {split}_pairs asks for {wanted}, there are {len(pairs[split])}.")
    shared, difference = choose_layout(model, train + evaluation)
    digest = hashlib.sha256()
    for _, tensor in sorted(model.state_dict().items()):
        digest.update(tensor.contiguous().view(torch.uint8).numpy())
    torch.manual_seed(config.seed)
    adapter = add_adapter(model, config) if config.lora_r else None
    policy = AnswerLogps(model, shared)
    if config.activation_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    weights, copies = place_weights(model, policy, config)
    pairs_per_step = config.batch_size * config.gradient_accumulation_steps
    row_tokens = config.batch_size * max(pair.tokens for pair in train + evaluation)
    layout = lambda split: [
        [data.make_row(pairs[split], indices) for indices in rows]
        for rows in data.group_into_steps(pairs[split], pairs_per_step, row_tokens, WORLD)
    ]
    facts = {
        "drops": {split: dict(counts) for split, counts in drops.items()},
        "stand_ins": stand_ins + ([f"{config.model} -> {stand_in}"] if stand_in else []),
        "self_check": difference, "shared": shared, "peak": matmul_peak(config),
        "load_seconds": time.time() - begin,
    }  # fmt: skip
    setup = Setup(
        config, model, tokenizer, policy, adapter, weights, copies, pairs, layout("train"),
        [row for rows in layout("eval") for row in rows], facts,
    )  # fmt: skip
    if dry:
        return setup
    begin = time.time()
    context = adapter.disable_adapter() if adapter else contextlib.nullcontext()
    with context:
        setup.reference = reference_logps(setup, config, digest.hexdigest())
    facts["reference_seconds"] = time.time() - begin
    setup.answers = sample_answers(setup, config.sample_prompts)
    if keep_initial:
        setup.initial = {name: w.detach().cpu().clone() for name, w in weights.items()}
    return setup


def sample_answers(setup, count):
    """Greedy answers to the first held-out prompts, as text."""
    tokenizer, eos = setup.tokenizer, data.PairTokenizer(setup.tokenizer).end_of_turn
    prompts = [pair.prompt_ids for pair in (setup.pairs["eval"] or setup.pairs["train"])[:count]]
    answers = [setup.policy.generate(ids, eos) for ids in prompts]
    return [tokenizer.decode(answer, skip_special_tokens=True) for answer in answers]


def score(logps, reference, config):
    """Per-pair figures from (n, 2) log-probabilities of policy and reference.

    returns  losses (n,) with their gradient, and a detached (n, 5) table in the order of METRICS
    """
    losses, chosen, rejected = dpo_loss(
        logps[:, 0], logps[:, 1], reference[:, 0], reference[:, 1],
        config.beta, config.loss, config.label_smoothing,
    )  # fmt: skip
    table = torch.stack((losses, chosen, rejected, logps[:, 0], logps[:, 1]), 1)
    return losses, table.detach()


def summarize(table):
    """A score table's means as metrics; a margin of exactly 0 counts as half accurate."""
    margins = table[:, 1] - table[:, 2]
    wins = (margins > 0).float() + (margins == 0).float() / 2
    means = dict(zip(METRICS, table.double().mean(0).tolist(), strict=True))
    return means | {
        "rewards/margins": margins.double().mean().item(),
        "rewards/accuracies": wins.double().mean().item(),
    }


def interval(values):
    """Mean of independent values and the half width of its 95 % interval (normal)."""
    values = values.double()
    half = 1.96 * values.std().item() / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return values.mean().item(), half


def learning_rate(step, total, config):
    """The rate of optimizer step `step` (from 0): linear warmup, then a cosine to 0 at `total`."""
    warmup = round(config.warmup_ratio * total)
    if step < warmup:
        return config.lr * step / warmup
    return config.lr * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup))) / 2


def step_order(count, config):
    """The order in which all epochs visit the optimizer steps' groups; the seed decides it."""
    order = list(range(count))
    for epoch in range(1, config.epochs):
        order += data.visiting_order(count, config.shuffle, config.seed + epoch)
    return order


def make_optimizer(weights, config):
    """AdamW; weight decay on matrices only, not on biases and norms."""
    decayed = [w for w in weights.values() if w.ndim > 1]
    rest = [w for w in weights.values() if w.ndim < 2]
    groups = [{"params": decayed}, {"params": rest, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.lr, weight_decay=config.weight_decay, fused=True)


@torch.no_grad()
def copy_weights(copies):
    """Round the float32 weights into the parameters that compute."""
    for parameter, weight in copies:
        parameter.copy_(weight)


def write_atomically(path, text):
    """Write a file so that a reader, or a crash, finds the old one or the new one, never half."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def file_hashes(folder):
    """sha256 of each file in a checkpoint folder, its manifest apart."""
    hashes = {}
    for path in sorted(folder.iterdir()):
        if path.name != "manifest.json":
            with open(path, "rb") as file:
                hashes[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return hashes


def checkpoint_state(weights, optimizer):
    """The tensors of a checkpoint, by name; reading one fills them in place."""
    for weight in weights.values():
        if not optimizer.state[weight]:
            optimizer.state[weight] = {
                "step": torch.tensor(0.0),
                "exp_avg": torch.zeros_like(weight), "exp_avg_sq": torch.zeros_like(weight),
            }  # fmt: skip
    return {
        f"{kind}.{name}": optimizer.state[weight][kind] if kind != "weight" else weight
        for name, weight in weights.items()
        for kind in ("weight", "step", "exp_avg", "exp_avg_sq")
    }


def save_checkpoint(folder, weights, optimizer, position):
    """Write folder/step_N whole or not at all; then remove all but it and the one before.

    position  {"step", "skipped", "seconds"}: what cannot be derived from step and config
    raises    OSError if the disk is full; earlier checkpoints stay
    """
    path = folder / f"step_{position['step']:07d}"
    temporary = path.with_suffix(".tmp")
    if RANK == 0:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    try:
        dcp.save(checkpoint_state(weights, optimizer), checkpoint_id=temporary, no_dist=WORLD == 1)
        if RANK == 0:
            manifest = {"position": position, "files": file_hashes(temporary)}
            write_atomically(temporary / "manifest.json", json.dumps(manifest))
            shutil.rmtree(path, ignore_errors=True)
            os.replace(temporary, path)
            for old in sorted(folder.glob("step_*"))[:-2]:
                shutil.rmtree(old)
    except Exception:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def load_checkpoint(folder, weights, optimizer):
    """Fill weights and optimizer from the newest undamaged checkpoint; its position, or None."""
    for path in sorted(folder.glob("step_*[0-9]"), reverse=True):
        try:
            manifest = json.loads((path / "manifest.json").read_text())
            whole = RANK > 0 or manifest["files"] == file_hashes(path)
        except (OSError, ValueError, KeyError):
            whole = False
        if from_first(whole):
            dcp.load(
                checkpoint_state(weights, optimizer), checkpoint_id=path, no_dist=WORLD == 1
            )
            return manifest["position"]
        say(f"Warning: checkpoint {path} is damaged; the one before it is tried.")
    return None


def read_metrics(path, last_step=math.inf):
    """The rows of metrics.jsonl up to a step; a torn last line is left out."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError):
            rows.append(json.loads(line))
    return [row for row in rows if row["step"] <= last_step]


def open_tracker(config):
    """A function that sends one metrics row to TensorBoard or Weights & Biases, or does nothing."""
    if config.report_to == "none" or RANK > 0:
        return lambda row: None
    try:
        if config.report_to == "wandb":
            import wandb

            run = wandb.init(project="train_dpo", dir=config.output_dir, config=asdict(config))
            return lambda row: run.log({f"{row['split']}/{k}": v for k, v in row.items()})
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        package = config.report_to
        raise InputError(f"report_to {package} needs it. Type: pip install {package}") from error
    writer = SummaryWriter(config.output_dir)

    def track(row):
        for name, value in row.items():
            if isinstance(value, (int, float)) and name != "step":
                writer.add_scalar(f"{row['split']}/{name}", value, row["step"])
        writer.flush()

    return track


_signals = []


def catch_signals():
    """Note SIGINT and SIGTERM; training stops after the step in hand, a second one at once."""

    def note(number, frame):
        _signals.append(number)
        signal.signal(number, signal.SIG_DFL)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, note)


def check_signal():
    """Raise Interrupted if any process has been asked to stop."""
    asked = all_sum(torch.tensor([float(_signals[0] if _signals else 0)] * (WORLD > 1) or [0.0]))
    if _signals or asked[0]:
        raise Interrupted(_signals[0] if _signals else signal.SIGTERM)


def evaluate(setup, config):
    """The score table of the evaluation pairs under the policy as it is now."""
    logps = compute_logps(
        setup.policy, setup.eval_rows, len(setup.pairs["eval"]), config, "evaluation"
    )
    return score(logps, setup.reference["eval"], config)[1]


def train(setup, config, folder):
    """Train one run to its end, from its newest checkpoint if it has one.

    returns  the evaluation's score table after training (None without evaluation pairs), and a
             dict of figures for the report
    raises   TrainingError, Interrupted (after a checkpoint), OSError
    """
    weights, policy = setup.weights, setup.policy
    optimizer = make_optimizer(weights, config)
    order = step_order(len(setup.steps), config)
    position = load_checkpoint(folder / "checkpoints", weights, optimizer)
    position = position or {"step": 0, "skipped": 0, "seconds": setup.facts["reference_seconds"]}
    if position["step"]:
        say(f"Resuming after step {position['step']} of {len(order)}.")
    copy_weights(setup.copies)
    metrics_path, track = folder / "metrics.jsonl", open_tracker(config)
    rows = read_metrics(metrics_path, position["step"])
    if RANK == 0:
        write_atomically(metrics_path, "".join(json.dumps(row) + "\n" for row in rows))
    metrics = open(metrics_path, "a", encoding="utf-8") if RANK == 0 else None
    begin = time.time() - position["seconds"]
    figures = {"tokens": 0, "flops": 0.0, "seconds": 0.0}

    def log(split, values):
        row = {"step": position["step"], "split": split, **values}
        row["seconds"] = round(time.time() - begin, 3)
        row = {k: None if v != v or v in (math.inf, -math.inf) else v for k, v in row.items()}
        if RANK == 0:
            metrics.write(json.dumps(row) + "\n")
            metrics.flush()
        if split == "eval" or position["step"] % config.logging_every == 0:
            track(row)

    def checkpoint():
        if RANK == 0:
            os.fsync(metrics.fileno())
        position["seconds"] = time.time() - begin
        save_checkpoint(folder / "checkpoints", weights, optimizer, position)

    table = None
    if setup.pairs["eval"] and not position["step"]:
        reference = setup.reference["eval"]
        log("eval", summarize(score(reference, reference, config)[1]))
    pairs_total = sum(len(row.pairs) for g in order for row in setup.steps[g])
    pairs_done = sum(len(row.pairs) for g in order[: position["step"]] for row in setup.steps[g])
    in_a_row = 0
    with progress(pairs_total, "training", pairs_done) as tick:
        while position["step"] < len(order):
            start, step = time.time(), position["step"]
            group = setup.steps[order[step]]
            indices = [i for row in group for i in row.pairs]
            torch.manual_seed(config.seed + step * WORLD + RANK)  # LoRA's dropout; no state to save
            scores = torch.zeros(len(indices), len(METRICS), device=policy.model.device)
            for turn in range(0, len(group), WORLD):
                # a process without a row of its own runs one of weight 0
                row = group[min(turn + RANK, len(group) - 1)]
                weight = WORLD / len(indices) if turn + RANK < len(group) else 0.0
                logps = sequence_logps(policy(row), row.lengths, config.length_normalize)
                reference = setup.reference["train"][row.pairs].to(logps.device)
                losses, part = score(logps.view(-1, 2), reference, config)
                (losses.sum() * weight).backward()
                if weight:
                    scores[[indices.index(i) for i in row.pairs]] = part
            scores = all_sum(scores)
            norm = nn.utils.clip_grad_norm_(weights.values(), config.max_grad_norm or math.inf)
            norm = (norm.full_tensor() if hasattr(norm, "full_tensor") else norm).item()
            rate = learning_rate(step, len(order), config)
            values = summarize(scores.cpu())
            finite = math.isfinite(norm) and math.isfinite(values["loss"])
            if finite:
                for group_options in optimizer.param_groups:
                    group_options["lr"] = rate
                optimizer.step()
                copy_weights(setup.copies)
            else:
                lost = [setup.pairs["train"][i].index for i in indices]
                position["skipped"] += 1
                values["skipped"] = lost
                say(f"Step {step + 1}: loss or gradient is not finite, update skipped; records "
                    f"{lost}")  # fmt: skip
            optimizer.zero_grad()
            in_a_row = 0 if finite else in_a_row + 1
            tokens = sum(len(row.input_ids) for row in group)
            position["step"] += 1
            log("train", values | {"grad_norm": norm, "lr": rate, "tokens": tokens})
            if step == 0:
                say(f"First loss {values['loss']:.6f}, {abs(values['loss'] - math.log(2)):.1e} "
                    "from ln 2")  # fmt: skip
            seconds = time.time() - start
            flops = 3 * sum(row_flops(row, setup.model) for row in group)
            figures["tokens"] += tokens
            figures["flops"] += flops
            figures["seconds"] += seconds
            shown = {
                "loss": f"{values['loss']:.4f}", "acc": f"{values['rewards/accuracies']:.2f}",
                "margin": f"{values['rewards/margins']:.4f}", "tok/s": f"{tokens / seconds:.0f}",
                "peak": f"{flops / seconds / setup.facts['peak'] / WORLD:.0%}",
            }  # fmt: skip
            tick(len(indices), **(shown if step % config.logging_every == 0 else {}))
            if in_a_row == 3:
                raise TrainingError(
                    "three steps in a row had a loss or gradient that is not finite. Lower lr, or "
                    "take dtype=float32; the last good checkpoint is kept and the same command "
                    f"goes on from it: {folder / 'checkpoints'}"
                )
            last = position["step"] == len(order)
            if setup.pairs["eval"] and (
                last or config.eval_every and position["step"] % config.eval_every == 0
            ):
                table = evaluate(setup, config)
                log("eval", summarize(table))
            try:
                check_signal()
            except Interrupted:
                checkpoint()
                raise
            if config.save_every and position["step"] % config.save_every == 0 and not last:
                checkpoint()
                if RANK == 0:
                    draw_curves(read_metrics(metrics_path), folder / "curves.png")
    figures["skipped"] = position["skipped"]
    return table, figures


def full(tensor):
    """A whole CPU tensor from a sharded one, on every process."""
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().cpu()


def save_model(setup, config, folder, card):
    """Write folder/model, whole or not at all: weights, tokenizer, chat template and model card."""
    model, dtype, seen = setup.model, DTYPES[config.save_dtype], set()
    deltas = {}
    if config.lora_merge and setup.adapter:
        for name, module in model.named_modules():
            if hasattr(module, "get_delta_weight"):
                deltas[f"{name}.base_layer.weight"] = full(module.get_delta_weight("default"))
    state = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:  # tied weights stand once
            seen.add(id(tensor))
            state[name] = full(setup.weights.get(name, tensor)).to(dtype)
            if name in deltas:
                state[name] = (state[name].float() + deltas[name].float()).to(dtype)
    if RANK > 0:
        return
    temporary, final = folder / "model.tmp", folder / "model"
    shutil.rmtree(temporary, ignore_errors=True)
    if setup.adapter and not config.lora_merge:
        state = {f"base_model.model.{name}": tensor for name, tensor in state.items()}
        setup.adapter.save_pretrained(temporary, state_dict=state)
    else:
        state = {k.replace(".base_layer", ""): v for k, v in state.items() if ".lora_" not in k}
        eos, generation = model.generation_config.eos_token_id, model.generation_config
        eos = {eos} if isinstance(eos, int) else set(eos or ())
        eos.add(data.PairTokenizer(setup.tokenizer).end_of_turn)
        generation.eos_token_id = sorted(eos) if len(eos) > 1 else eos.pop()
        model.save_pretrained(temporary, state_dict=state)
        described = json.loads((temporary / "config.json").read_text())
        described["dtype"] = config.save_dtype
        (temporary / "config.json").write_text(json.dumps(described, indent=2) + "\n")
    setup.tokenizer.save_pretrained(temporary)
    (temporary / "README.md").write_text(card, encoding="utf-8")
    for path in temporary.iterdir():
        with open(path, "rb") as file:
            os.fsync(file.fileno())
    shutil.rmtree(final, ignore_errors=True)
    os.replace(temporary, final)


def draw_curves(rows, path):
    """curves.png from the rows of metrics.jsonl."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = {
        "loss": ["loss"], "accuracy": ["rewards/accuracies"], "margin": ["rewards/margins"],
        "rewards": ["rewards/chosen", "rewards/rejected"], "gradient norm": ["grad_norm"],
        "learning rate": ["lr"],
    }  # fmt: skip
    train = [row for row in rows if row["split"] == "train"]
    held_out = [row for row in rows if row["split"] == "eval"]
    window = max(1, len(train) // 20)
    figure, axes = plt.subplots(2, 3, figsize=(12, 6), layout="constrained")
    for axis, (title, names) in zip(axes.flat, panels.items(), strict=True):
        for name, color in zip(names, ("#0072B2", "#D55E00"), strict=False):
            values = [math.nan if r.get(name) is None else r[name] for r in train]
            steps = [r["step"] for r in train]
            label = f"{name.removeprefix('rewards/')}, " if len(names) > 1 else ""
            if title != "learning rate":
                axis.plot(steps, values, color=color, alpha=0.2, linewidth=0.8)
                values = [
                    sum(part) / len(part)
                    for part in (values[max(0, i - window) : i + 1] for i in range(len(values)))
                ]
            axis.plot(steps, values, color=color, label=label + "train, smoothed")
            shown = [r for r in held_out if r.get(name) is not None]
            axis.errorbar(
                [r["step"] for r in shown], [r[name] for r in shown],
                [r.get(name + "_ci") or 0 for r in shown], fmt="o-", markersize=4, capsize=3,
                color="#009E73" if color == "#0072B2" else "#CC79A7", label=label + "held out",
            )  # fmt: skip
        if title in ("loss", "accuracy"):
            level = math.log(2) if title == "loss" else 0.5
            axis.axhline(level, color="gray", linestyle=":", linewidth=1)
        axis.set(title=title, xlabel="optimizer step")
    axes.flat[0].legend(fontsize=8)
    axes.flat[3].legend(fontsize=8)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def compare(before, after):
    """Rows (name, before, after, change, half width of its 95 % interval), paired by pair."""
    def columns(table):
        margins = table[:, 1] - table[:, 2]
        wins = (margins > 0).double() + (margins == 0).double() / 2
        return {"loss": table[:, 0], "rewards/margins": margins, "rewards/accuracies": wins}

    first, last = columns(before), columns(after)
    return [
        (name, first[name].mean().item(), last[name].mean().item(),
         *interval(last[name].double() - first[name].double())) for name in first
    ]  # fmt: skip


def verdict(comparison):
    """One sentence: what changed measurably, if anything did."""
    changed = [name for name, *_, change, half in comparison if abs(change) > half]
    if not changed:
        return "no measurable change: each 95 % interval includes 0"
    return f"measurable change in {', '.join(changed)}"


def markdown(header, rows):
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def finish(setup, config, folder, table, figures):
    """Print and write what the run has come to: report.md, model/, curves.png, results.json."""
    results, answers = {}, sample_answers(setup, config.sample_prompts)
    rows, sentence = [], "no evaluation pairs"
    if table is not None:
        reference = setup.reference["eval"]
        comparison = compare(score(reference, reference, config)[1], table)
        sentence = verdict(comparison)
        rows = [
            (name, f"{a:.4f}", f"{b:.4f}", f"{change:+.4f} ± {half:.4f}")
            for name, a, b, change, half in comparison
        ]
        results = {name: [b, half] for name, _, b, _, half in comparison}
    evaluation = markdown(("held out", "before", "after", "change, 95 % interval"), rows)
    say(f"\n{evaluation}\n{sentence}\n")
    facts = setup.facts
    lengths = sorted(pair.tokens for pair in setup.pairs["train"])
    speed = figures["tokens"] / max(figures["seconds"], 1e-9)
    share = figures["flops"] / max(figures["seconds"], 1e-9) / facts["peak"] / WORLD
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    if config.device.startswith("cuda"):
        memory = torch.cuda.max_memory_allocated() / 2**30
    defaults = Config()
    changed = {k: v for k, v in asdict(config).items() if v != getattr(defaults, k)}
    shown = {"model": config.model, "dataset": config.dataset, "beta": config.beta, "lr": config.lr}
    settings = markdown(("setting", "value"), (shown | changed | {"offline": "..."}).items())
    drops = [(s, n, why) for s, counts in facts["drops"].items() for why, n in counts.items()]
    samples = "".join(
        f"\n### Prompt\n\n{quote(json.loads(pair.prompt)[-1]['content'])}\n\n**before**\n\n"
        f"{quote(old)}\n\n**after**\n\n{quote(new)}\n"
        for pair, old, new in zip(
            setup.pairs["eval"] or setup.pairs["train"], setup.answers, answers, strict=False
        )
    )
    speed_text = (
        f"{len(lengths)} training pairs; tokens a pair: median {lengths[len(lengths) // 2]}, "
        f"longest {lengths[-1]}; {sum(p.cut for p in setup.pairs['train'])} cut to fit.\n"
        f"Reference pass {facts['reference_seconds']:.0f} s, training {figures['seconds']:.0f} s, "
        f"{speed:.0f} tokens/s, {share:.0%} of the measured matmul peak, "
        f"{memory:.1f} GB at most. Updates skipped: {figures['skipped']}."
    )
    stand_ins = "".join(f"\n> **Stand-in:** {name}\n" for name in facts["stand_ins"])
    report = (
        f"# DPO run\n{stand_ins}\n{evaluation}\n\n{sentence}\n\n![curves](curves.png)\n\n"
        f"## Settings\n\n{settings}\n\n## Data and speed\n\n{speed_text}\n\n"
        f"{markdown(('split', 'dropped', 'reason'), drops)}\n\n## Answers\n{samples}"
    )
    card = (
        f"---\nbase_model: {config.model}\ndatasets:\n- {config.dataset}\nlicense: {'unknown'}\n"
        f"tags:\n- dpo\n---\n\n# {config.model}, aligned with DPO\n\n{evaluation}\n\n{settings}\n"
    )
    save_model(setup, config, folder, card)
    if RANK == 0:
        write_atomically(folder / "report.md", report)
        draw_curves(read_metrics(folder / "metrics.jsonl"), folder / "curves.png")
        write_atomically(folder / "results.json", json.dumps(results))
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    say(f"Model: {folder / 'model'}   Report: {folder / 'report.md'}")


def quote(text):
    """Text as a Markdown quotation."""
    return "\n".join("> " + line for line in text.splitlines() or [""])


def main(arguments=None):
    parser = argparse.ArgumentParser()
    parser.add_argument("--config", default="config.yaml")
    parser.add_argument("--overwrite", action="store_true")
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_intermixed_args(arguments)
    try:
        configs, varied = read_config(options.config, options.overrides)
        catch_signals()
        configs = [resolve_machine(c) for c in configs]
        setup = None
        for config in configs:
            folder = Path(config.output_dir)
            if (folder / "results.json").exists() and not options.overwrite:
                say(f"{folder} is finished; --overwrite does it again.")
                continue
            setup = setup or prepare(config, len(configs) > 1)
            folder.mkdir(parents=True, exist_ok=True)
            write_atomically(folder / "config.yaml", yaml.safe_dump(asdict(config)))
            if setup.initial:
                with torch.no_grad():
                    for n, w in setup.weights.items(): w.copy_(setup.initial[n])
            table, figures = train(setup, config, folder)
            finish(setup, config, folder, table, figures)
    except InputError as error:
        say(f"Error: {error}")
        return 2


if __name__ == "__main__":
    sys.exit(main())
