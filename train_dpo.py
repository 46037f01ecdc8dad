"""Align a causal language model with Direct Preference Optimization (arXiv 2305.18290).

    python train_dpo.py --config config.yaml                        one run
    python train_dpo.py --config config.yaml beta=0.2 lr=5e-7       with other settings
    python train_dpo.py --config config.yaml "lr=[1e-7, 1e-6]"      a sweep
    python train_dpo.py --config config.yaml --dry-run              look at the data, train nothing
    torchrun --nproc-per-node=2 train_dpo.py --config config.yaml   the same on two GPUs

From top to bottom, as main() runs it:
    read_config   config.yaml and overrides -> a Config for each run of the sweep
    prepare       model, pairs, rows, and the reference's log-probabilities of each pair
    train         DPO loss -> gradients -> AdamW step; metrics, evaluations, checkpoints
    finish        evaluation before and after, report.md, curves.png, model/
"""

import argparse
import contextlib
import difflib
import hashlib
import itertools
import json
import math
import os
import re
import shutil
import signal
import sys
import time
import warnings
from dataclasses import asdict, fields, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from resource import RUSAGE_SELF, getrusage
from typing import Literal

import pandas
import torch
import torch.distributed as dist
import transformers
import yaml
from filelock import FileLock, Timeout
from matplotlib.figure import Figure
from pydantic import Field, ValidationError
from pydantic.dataclasses import dataclass
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.benchmark import Timer
from tqdm import tqdm

import data
from dpo_loss import dpo_loss, sequence_logps, token_logps

RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # torchrun's
KEPT = "meta" if RANK else "cpu"  # where gathered tensors go: the first process alone writes them
# settings that may change between two sessions of one run, and between the runs of a sweep that
# share a model and its reference log-probabilities
HARMLESS = {"logging_every", "eval_every", "save_every", "report_to", "reference_cache", "offline"}
SHARING = HARMLESS | {"loss", "beta", "label_smoothing", "epochs", "lr", "warmup_ratio",
                      "weight_decay", "max_grad_norm", "save_dtype", "lora_merge", "output_dir"}
METRICS = ("loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies",
           "logps/chosen", "logps/rejected")
PANELS = "loss rewards/accuracies rewards/margins grad_norm lr rewards/chosen,rewards/rejected"
SHOWN = ("loss", "rewards/margins", "rewards/accuracies", "tokens_per_second", "peak_share")
yaml.SafeLoader.add_implicit_resolver(  # YAML 1.1 takes 1e-7 for text
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+\.?\d*[eE][-+]?\d+$"), list("-+0123456789"))


@dataclass(frozen=True, config={"extra": "forbid", "strict": True, "allow_inf_nan": False})
class Config:
    """All settings of one run; config.yaml says what each one does."""

    model: str = "HuggingFaceTB/SmolLM2-135M-Instruct"
    revision: str | None = None
    trust_remote_code: bool = False
    lora_r: int = Field(0, ge=0)
    lora_alpha: float = Field(16.0, gt=0)
    lora_dropout: float = Field(0.0, ge=0, lt=1)
    lora_target_modules: str = "all-linear"
    lora_merge: bool = False
    dataset: str = "HuggingFaceH4/ultrafeedback_binarized"
    split: str | None = "train_prefs"
    eval_dataset: str | None = None
    eval_split: str | None = "test_prefs"
    train_pairs: int = Field(500, ge=0)
    eval_pairs: int = Field(100, ge=0)
    shuffle: bool = True
    keep_ties: bool = False
    seed: int = Field(42, ge=0, lt=2**32)
    max_length: int = Field(1024, ge=2)
    max_prompt_length: int = Field(512, ge=1)
    loss: Literal["sigmoid", "ipo", "hinge"] = "sigmoid"
    beta: float = Field(0.1, ge=1e-6, le=1e6)
    label_smoothing: float = Field(0.0, ge=0, lt=0.5)
    length_normalize: bool = False
    epochs: int = Field(1, ge=1)
    batch_size: int = Field(1, ge=1)
    gradient_accumulation_steps: int = Field(2, ge=1)
    lr: float = Field(1e-7, ge=0, le=1)
    warmup_ratio: float = Field(0.0, ge=0, le=1)
    weight_decay: float = Field(0.01, ge=0, le=1e3)
    max_grad_norm: float = Field(1.0, ge=0)
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    device: str = "auto"
    activation_checkpointing: bool = False
    output_dir: str = "runs/beta{beta}_lr{lr}"
    logging_every: int = Field(1, ge=1)
    eval_every: int = Field(50, ge=0)
    save_every: int = Field(50, ge=0)
    save_dtype: Literal["float32", "bfloat16"] = "float32"
    sample_prompts: int = Field(3, ge=0)
    report_to: Literal["none", "tensorboard", "wandb"] = "none"
    reference_cache: str | None = "runs/reference_cache"
    offline: dict[str, str] | None = None


def read_config(path, overrides=()):
    """Read config.yaml and `name=value` overrides; the last of a repeated override counts.

    returns  a Config for each run (several where settings are lists), and the names that vary
    raises   InputError for a file, a name or a value that is not right
    """
    try:
        settings = dict(yaml.safe_load(Path(path).read_text(encoding="utf-8-sig")) or {})
        for name, _, value in (override.partition("=") for override in overrides):
            settings[name] = yaml.safe_load(value)
    except (OSError, ValueError, TypeError, RecursionError, yaml.YAMLError) as error:
        raise data.InputError(f"cannot read config {path} {list(overrides)}: {error}") from error
    choices = {str(k): v if v and isinstance(v, list) else [v] for k, v in settings.items()}
    varied, configs = [name for name, values in choices.items() if len(values) != 1], []
    for values in itertools.product(*choices.values()):
        try:
            config = Config(**dict(zip(choices, values, strict=True)))
        except ValidationError as error:
            problem, names = error.errors()[0], [spec.name for spec in fields(Config)]
            name, value = str(problem["loc"][0]), f"{problem['input']!r:.200}"
            near = difflib.get_close_matches(name, names, 1, cutoff=0)[0]
            hint = f" (did you mean {near}? --help lists all settings)" * (name != near)
            raise data.InputError(f"{name}: {problem['msg']}, not {value}{hint}") from error
        if config.label_smoothing and config.loss != "sigmoid":
            raise data.InputError("label_smoothing is defined for loss sigmoid only: set it to 0")
        folder = config.output_dir
        folder += "".join(f"_{name}{{{name}}}" for name in varied if f"{{{name}}}" not in folder)
        for name, value in asdict(config).items():
            folder = folder.replace(f"{{{name}}}", str(value).replace("/", "-"))
        if "{" in folder:
            raise data.InputError(f"output_dir {folder}: braces must hold a setting's name")
        configs.append(replace(config, output_dir=folder))
    return [c for i, c in enumerate(configs) if c not in configs[:i]], varied


def progress(title, total, done=0):
    """A tqdm bar on a terminal; elsewhere a line, for logs are no place for a bar."""
    if not sys.stderr.isatty():
        say(f"{title}: {total} pairs")
    return tqdm(None, title, total, initial=done, unit="pair", disable=RANK > 0 or None)


def over_processes(tensor):
    """The sum of a tensor over all processes, in place."""
    if WORLD > 1:
        dist.all_reduce(tensor)
    return tensor


def full(tensor):
    """The whole of a tensor that FSDP2 may have sharded; all processes must ask for it."""
    return tensor.detach().full_tensor() if isinstance(tensor, DTensor) else tensor.detach()


def like(tensor, whole):
    """A copy of a whole tensor on the device of `tensor`, sharded as that is."""
    if isinstance(tensor, DTensor) and whole.ndim:
        return distribute_tensor(whole, tensor.device_mesh, tensor.placements, src_data_rank=None)
    return whole.to(tensor.device, copy=True)


def own_rows(rows):
    """(row, weight) of this process; one without a row runs another's at weight 0, for FSDP2."""
    for start in range(0, len(rows), WORLD):
        yield rows[min(start + RANK, len(rows) - 1)], float(start + RANK < len(rows))


say = tqdm.write if RANK == 0 else lambda text: None  # above any bar, and by one process
_signals = []  # numbers of SIGINT and SIGTERM, once they have arrived


def note_signal(number, frame):
    """Note a signal, to stop after the step in hand; a second one stops at once."""
    _signals.append(number)
    signal.signal(number, signal.SIG_DFL)


def resolve_machine(config):
    """The config with device and dtype decided: bfloat16 only where it is the faster one.

    raises   InputError for a device that is not there or a package that is not installed
    """
    needs = {"peft": config.lora_r, config.report_to: config.report_to != "none"}
    for package in (name for name, needed in needs.items() if needed and not find_spec(name)):
        raise data.InputError(f"this config needs {package}: pip install {package}")
    device, dtype, cpu = config.device, config.dtype, torch.cpu.get_capabilities()
    if device == "auto":
        device = str(torch.accelerator.current_accelerator(check_available=True) or "cpu")
    try:
        torch.empty(1, device=device)
        fast = (torch.cuda.get_device_capability(device) >= (8, 0) if device.startswith("cuda") else
                device == "cpu" and (cpu.get("amx_bf16") or cpu.get("avx512_bf16")))
    except (RuntimeError, AssertionError) as error:
        raise data.InputError(f"device {device}: {data.first_line(error)}") from error
    dtype = ("bfloat16" if fast else "float32") if dtype == "auto" else dtype
    return replace(config, device=device, dtype=dtype)


def load_model(config):
    """Load the model in float32 on the CPU, and its tokenizer.

    returns  model, tokenizer
    raises   InputError if it cannot be had or is no causal language model
    """
    def load(path):
        gguf, options = {}, {"trust_remote_code": config.trust_remote_code,
                             "revision": config.revision or "main"}
        if path.endswith(".gguf"):
            path, options["gguf_file"] = os.path.split(os.path.abspath(path))
            gguf["quantization_config"] = transformers.GgufConfig(dequantize=True)
        return transformers.AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.float32, use_safetensors=True, **options, **gguf
        ), transformers.AutoTokenizer.from_pretrained(path, **options)

    with open(os.devnull, "w") as silent, contextlib.redirect_stderr(silent):
        model, tokenizer = data.open_source(config.model, "model", config.offline, load)
    for module in model.modules():  # train mode is for checkpointing and lora_dropout
        for name, value in vars(module).items():
            if isinstance(value, float) and ("drop" in name or isinstance(module, nn.Dropout)):
                setattr(module, name, 0.0)
    return model.eval(), tokenizer


def shared_prompt_attention(module, query, key, value, mask, scaling=None, segments=(), **kwargs):
    """Attention over a data.Row: each answer sees its prompt and itself, no other answer or pair.

    Two products a pair: prompt and chosen answer causally, then the rejected answer over prompt
    and itself. Every attention layer calls it through transformers' AttentionInterface.

    query     (1, heads, t, head_dim); key, value (1, key-value heads, t, head_dim)
    segments  the lengths (prompt, chosen, rejected) of each pair, adding up to t; without them
              one plain causal sequence
    returns   (1, t, heads, head_dim), None
    """
    if not segments:  # generation
        sdpa = transformers.AttentionInterface()["sdpa"]
        return sdpa(module, query, key, value, mask, scaling=scaling)
    outputs, lengths = [], [sum(segment) for segment in segments]
    attend = partial(nn.functional.scaled_dot_product_attention, scale=scaling)
    # few kernels take grouped heads together with a mask
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    pairs = zip(*(x.split(lengths, 2) for x in (query, key, value)), segments, strict=True)
    for q, k, v, (prompt, chosen, rejected) in pairs:
        middle = prompt + chosen
        outputs.append(attend(*(x[:, :, :middle] for x in (q, k, v)), is_causal=True))
        k, v = (torch.cat((x[:, :, :prompt], x[:, :, middle:]), 2) for x in (k, v))
        seen = torch.ones(rejected, prompt + rejected, dtype=torch.bool, device=q.device)
        outputs.append(attend(q[:, :, middle:], k, v, attn_mask=seen.tril(prompt)))
    return torch.cat(outputs, 2).transpose(1, 2).contiguous(), None


transformers.AttentionInterface.register("shared_prompt", shared_prompt_attention)


class AnswerLogps(nn.Module):
    """The log-probability of each answer token of a data.Row under a causal language model.

    shared  whether a row runs as it is, its prompts computed once; otherwise each answer runs as a
            sequence of its own through the model's own forward, which is right for any model
    """

    def __init__(self, model, shared=True):
        super().__init__()
        self.model, self.shared, self.own = model, shared, model.config._attn_implementation
        self.generate = model.generate
        model.set_attn_implementation("shared_prompt" if shared else self.own)

    def forward(self, row):
        """(n,) float32: log-probabilities of row.targets in nats."""
        if self.shared:
            hidden = self.model.base_model(input_ids=row.input_ids[None], use_cache=False,
                position_ids=row.position_ids[None], segments=row.segments).last_hidden_state[0]
            head = self.model.get_output_embeddings().weight
            return token_logps(hidden[row.predictors], head, row.targets)
        logps, parts = [], row.input_ids.split([n for segment in row.segments for n in segment])
        for prompt, *answers in zip(parts[::3], parts[1::3], parts[2::3], strict=True):
            for answer in answers:
                ids = torch.cat((prompt, answer))[None]
                logits = self.model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1]
                logps.append(logits.float().log_softmax(1).gather(1, answer[:, None]).squeeze(1))
        return torch.cat(logps)


@torch.no_grad()
def choose_layout(model, pairs, tolerance=1e-3):
    """Whether rows may share prompts: the longest pair, both ways, within `tolerance` nats a token.

    Sequences beyond the model's sliding window never do.
    """
    reach = lambda pair: len(pair.prompt_ids) + max(len(pair.chosen_ids), len(pair.rejected_ids))
    longest, policy = max(pairs, key=reach), AnswerLogps(model, shared=False)
    row, difference = data.make_row([longest], [0], model.device), math.inf
    try:
        difference = (policy(row) - AnswerLogps(model)(row)).abs().max().item()
    except (TypeError, ValueError, RuntimeError, AttributeError) as error:
        say(f"The model refuses rows that share a prompt: {data.first_line(error)}")
    model.set_attn_implementation(policy.own)
    window = getattr(model.config.get_text_config(), "sliding_window", None) or math.inf
    shared = difference <= tolerance and reach(longest) <= window
    say(f"Layout: {'shared prompts' if shared else 'separate sequences'}, {difference:.1e} nat a "
        f"token apart on the longest of {reach(longest)} tokens (sliding window {window})")
    return shared


def add_adapter(model, config):
    """Put LoRA matrices (arXiv 2106.09685) beside the model's layers; they alone are trained.

    raises   InputError where the model has no layer that lora_target_modules names
    """
    from peft import LoraConfig

    torch.manual_seed(config.seed)
    model.name_or_path = config.model  # what adapter_config.json names, instead of a path of here
    try:
        model.add_adapter(LoraConfig(
            r=config.lora_r, lora_alpha=config.lora_alpha, lora_dropout=config.lora_dropout,
            target_modules=config.lora_target_modules, task_type="CAUSAL_LM"))
    except ValueError as error:
        raise data.InputError(f"lora_target_modules: {error}") from error


def place_weights(policy, config):
    """Bring the float32 model to its device and compute dtype; trained weights stay float32.

    One process    the parameters compute in the compute dtype. Behind each trained one stands a
                   float32 weight, which the optimizer updates: gradients add up in it, and
                   update_policy rounds it back. In float32 both are one memory.
    an adapter     its parameters are float32 themselves, and are cast where they are used.
    processes      share the float32 parameters out by FSDP2, which gathers them, rounded, for use.

    returns  the trained weights by their parameters' names
    """
    def add_up(parameter, weight):
        grad, parameter.grad = parameter.grad, None
        weight.grad = grad.float() if weight.grad is None else weight.grad.add_(grad)

    weights, model, dtype = {}, policy.model, getattr(torch, config.dtype)
    device = config.device if WORLD == 1 else "cpu"  # FSDP2 moves and shards layer by layer
    for name, parameter in model.named_parameters():
        rounded, trained = parameter.data.to(device, dtype), parameter.requires_grad
        # from the same start: an update tips a weight between two rounded ones, however small it is
        weight = nn.Parameter(rounded.float())
        parameter.data = weight.data if trained and (WORLD > 1 or config.lora_r) else rounded
        if trained and WORLD == 1:
            weights[name] = weight
            parameter.register_post_accumulate_grad_hook(partial(add_up, weight=weight))
    model.to(device)  # what is no parameter
    if WORLD > 1:
        precision = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
        layers = [m for m in model.modules() if type(m).__name__ in (model._no_split_modules or ())]
        for module in (*layers, policy):
            fully_shard(module, mp_policy=precision)
        register_fsdp_forward_method(policy, "generate")
    return weights or {name: p for name, p in model.named_parameters() if p.requires_grad}


def matmul_peak(config):
    """Floating point operations a second of matrix products in the compute dtype, measured."""
    size = 1024 if config.device == "cpu" else 8192  # enough to keep it busy
    a = torch.randn(size, size, device=config.device, dtype=getattr(torch, config.dtype))
    timer = Timer("a @ a", globals={"a": a}, num_threads=torch.get_num_threads())
    return WORLD * 2 * size**3 / timer.timeit(20).median


@torch.no_grad()
def compute_logps(setup, split, config, title):
    """log pi(y|x) of all pairs of a split under the policy as it is now.

    Evaluation pairs see the float32 weights that a run saves, training pairs the rounded ones of
    its steps, which lr 1e-7 hardly moves. Several processes see the rounded ones in both.

    returns  (pairs, 2) float32: chosen, rejected, in nats
    raises   KeyboardInterrupt, between two rows
    """
    logps = torch.zeros(len(setup.pairs[split]), 2, device=config.device)
    saved = {f"model.{n}": w for n, w in setup.weights.items() if (split, WORLD) == ("eval", 1)}
    with progress(f"{title}, {split}", len(logps)) as bar:
        for row, weight in own_rows(setup.rows[split]):
            tokens = torch.func.functional_call(setup.policy, saved, (row,))
            answers = sequence_logps(tokens, row.lengths, config.length_normalize)
            logps[row.pairs] += weight * answers.view(-1, 2).float()
            bar.update(len(row.pairs) * WORLD)
            if _signals and title == "reference":  # in training the step is saved first
                raise KeyboardInterrupt(_signals[0])
    return over_processes(logps)


def reference_logps(setup, config):
    """The reference's log-probabilities of all pairs, from the cache where they are in it.

    The reference is the policy before its first step, so they are computed with it, in the rows and
    the numerics in which they are used: the first loss is exactly ln 2, and no second model takes
    memory.
    """
    key = [setup.facts["weights"], setup.policy.shared, setup.policy.own, config.dtype, WORLD,
           config.lora_r > 0, torch.cuda.is_available() and torch.cuda.get_device_name(),
           config.device, config.length_normalize, torch.get_num_threads(), torch.__version__,
           transformers.__version__, torch.cpu.get_capabilities().get("cpu_name"),
           [(r.pairs, r.input_ids.tolist(), r.segments) for r in sum(setup.rows.values(), [])]]
    name = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]
    path = Path(config.reference_cache or os.devnull) / f"{name}.safetensors"
    with contextlib.suppress(SafetensorError, OSError):  # there is none, or a damaged one
        found = {split: logps.to(config.device) for split, logps in load_file(path).items()}
        say(f"Reference log-probabilities: read from {path}")
        return found
    found = {split: compute_logps(setup, split, config, "reference") for split in setup.pairs}
    if config.reference_cache:
        write_atomically(path, lambda file: save_file(found, file))
    return found


def prepare(config, dry=False):
    """Load model and pairs, lay out rows, and compute the reference's log-probabilities.

    returns  what the runs of a sweep share, as attributes:
        model, tokenizer, policy (AnswerLogps)
        weights           as from place_weights
        pairs, rows       "train" and "eval" -> list of data.Pair; list of data.Row
        steps             "train" and "eval" -> the rows by optimizer step, a list of lists
        samples           pairs whose prompts the report shows answers to
        reference         "train" and "eval" -> (pairs, 2) log-probabilities; not in a dry run
        answers           the reference's, to the sample prompts; not in a dry run
        facts             what report and dry run say of data and machine
    """
    model, tokenizer = load_model(config)
    pairs, drops = data.load_pairs(config, tokenizer)
    facts = {"drops": drops, "weights": digest_tensors(model.state_dict())}
    policy = AnswerLogps(model, choose_layout(model, sum(pairs.values(), [])))
    if config.lora_r:
        add_adapter(model, config)
    if config.activation_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    weights = place_weights(policy, config)
    facts["trained"] = trained = sum(weight.numel() for weight in weights.values())
    # a token takes two operations a weight forward, two backward, and two more if that is trained
    facts["peak_share"] = 2 * (2 * model.num_parameters() + trained) / matmul_peak(config)
    per_step = config.batch_size * config.gradient_accumulation_steps
    longest = config.batch_size * max(p.tokens for part in pairs.values() for p in part)
    steps = {split: list(data.group_into_steps(part, per_step, longest, config.device, WORLD))
             for split, part in pairs.items()}
    setup = argparse.Namespace(model=model, tokenizer=tokenizer, policy=policy, weights=weights,
        pairs=pairs, steps=steps, rows={split: sum(part, []) for split, part in steps.items()},
        samples=(pairs["eval"] or pairs["train"])[: config.sample_prompts], facts=facts)
    say("\n".join(describe_data(setup, config)))
    if not dry:
        start = time.time()
        setup.reference = reference_logps(setup, config)
        facts["reference_seconds"] = time.time() - start
        setup.answers = sample_answers(setup)
    return setup


def describe_data(setup, config):
    """Lines on the pairs: how many, token lengths, how many are cut, drops by reason."""
    for split, pairs in setup.pairs.items():
        wanted, lengths = getattr(config, f"{split}_pairs"), sorted(p.tokens for p in pairs) or [0]
        spread = [lengths[(len(lengths) - 1) * share // 100] for share in (0, 10, 50, 90, 100)]
        yield f"{split}: {len(pairs)} pairs" + ", fewer than asked" * (len(pairs) < wanted)
        yield f"  tokens, prompt once (0, 10, 50, 90, 100 %): {', '.join(map(str, spread))}"
        yield f"  cut to max_length or max_prompt_length: {sum(pair.cut for pair in pairs)}"
        yield from (f"  dropped, {why}: {n}" for why, n in setup.facts["drops"][split].items())
    yield from (f"stand-in for {name}: {used}" for name, used in data.stand_ins_used.items())


@torch.no_grad()
def sample_answers(setup):
    """Greedy answers to the prompts of setup.samples."""
    end, answers = data.PairEncoder(setup.tokenizer).end_of_turn, []
    greedy = transformers.GenerationConfig(max_new_tokens=128, do_sample=False, eos_token_id=end)
    for pair in setup.samples:
        ids = torch.tensor([pair.prompt_ids], device=setup.model.device)
        answer = setup.policy.generate(ids, greedy, attention_mask=torch.ones_like(ids))[0]
        answers.append(setup.tokenizer.decode(answer[ids.shape[1] :], skip_special_tokens=True))
    return answers


def score(logps, reference, config):
    """Losses of (n, 2) log-probabilities, with gradient, and an (n, 7) table of METRICS without."""
    losses, chosen, rejected = dpo_loss(
        *logps.unbind(1), *reference.unbind(1), config.beta, config.loss, config.label_smoothing)
    wins = ((chosen - rejected).sign() + 1) / 2  # a tie counts one half
    return losses, torch.stack((losses.detach(), chosen, rejected, chosen - rejected, wins,
                                *logps.detach().unbind(1)), 1)


def summarize(table, intervals=False):
    """Means of a score table as metrics; with intervals also name/ci95, the half widths.

    An evaluation's interval is also that of its paired change since the start, when policy and
    reference were one and every pair had the same loss, margin 0 and accuracy one half.
    """
    metrics = dict(zip(METRICS, table.cpu().double().mean(0).tolist(), strict=True))
    if intervals:
        halves = 1.96 * table.cpu().double().std(0) / math.sqrt(len(table))
        metrics |= {f"{name}/ci95": half.item() for name, half in zip(METRICS, halves, strict=True)}
    return metrics


def learning_rate(step, total, config):
    """The rate of optimizer step `step` (from 0): linear warmup, then a cosine to 0 at `total`."""
    warmup = round(config.warmup_ratio * total)
    if step < warmup:
        return config.lr * (step + 1) / (warmup + 1)
    return config.lr * (1 + math.cos(math.pi * (step - warmup) / (total - warmup))) / 2


def make_optimizer(weights, config):
    """AdamW; weight decay on matrices only, not on biases and norms."""
    groups = [{"params": [w for w in weights.values() if w.ndim > 1]},
              {"params": [w for w in weights.values() if w.ndim < 2], "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.lr, weight_decay=config.weight_decay, fused=True)


def update_policy(setup):
    """Let the parameters that compute follow the weights that the optimizer updates."""
    if WORLD > 1:
        setup.policy.reshard()  # a pass without gradients leaves old weights gathered
    else:
        setup.model.load_state_dict(setup.weights, strict=False)  # rounds to the compute dtype


def write_atomically(path, write):
    """Let write(temporary path) make a file; a crash leaves the old one or the new one whole."""
    if RANK:
        return
    temporary = path.with_name(f"{path.name}.tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    write(temporary)
    with open(temporary, "rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)


def digest_tensors(tensors):
    """sha256 of tensors and their names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def save_checkpoint(folder, weights, optimizer, step):
    """Write folder/step_N whole or not at all, then remove all but it and the one before.

    step    all else that a run goes on from; the rest follows from config and metrics.jsonl
    raises  OSError or SafetensorError, as on a full disk; the earlier ones stay
    """
    tensors = {f"{key}.{name}": full(tensor).to(KEPT) for name, weight in weights.items()
               for key, tensor in {"weight": weight, **optimizer.state[weight]}.items()}
    tensors["position"] = torch.tensor([step], dtype=torch.float64)
    write_atomically(folder / f"step_{step:07d}.safetensors", lambda file: save_file(
        tensors, file, {"digest": digest_tensors(tensors)}))
    for old in sorted(folder.glob("*.safetensors"))[:-2]:
        old.unlink(missing_ok=True)


def load_checkpoint(folder, weights, optimizer):
    """Fill weights and optimizer from the newest undamaged checkpoint; returns its step, or 0."""
    for path in sorted(folder.glob("*.safetensors"), reverse=True):
        with contextlib.suppress(SafetensorError, OSError), safe_open(path, "pt") as file:
            saved = load_file(path)
            if (file.metadata() or {}).get("digest") == digest_tensors(saved):
                for name, weight in weights.items():
                    weight.data.copy_(like(weight, saved[f"weight.{name}"]))
                    optimizer.state[weight] = {  # empty before the first step that was not skipped
                        key: like(weight, saved[f"{key}.{name}"])
                        for key in ("step", "exp_avg", "exp_avg_sq") if f"{key}.{name}" in saved}
                say(f"Resuming from {path}")
                return int(saved["position"][0])
        say(f"Warning: {path} is damaged; the one before it is tried")
        path.unlink(missing_ok=True)  # it would count as one of the two to keep
    return 0


def read_rows(path, split=None):
    """The rows of a JSONL file, of one split or all; a line that a crash has torn is left out."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError):
            rows.append(json.loads(line))
    return [row for row in rows if split in (None, row["split"])]


def open_tracker(config, folder, first):
    """A function of figures and their step, from `first` on, that sends them to report_to."""
    if config.report_to == "wandb" and not RANK:
        import wandb

        return wandb.init(project="train_dpo", name=folder.name, dir=folder, config=asdict(config),
                          reinit="finish_previous").log
    if config.report_to == "tensorboard" and not RANK:
        from torch.utils.tensorboard import SummaryWriter

        add = SummaryWriter(folder, purge_step=first).add_scalar
        return lambda figures, step: [add(name, value, step) for name, value in figures.items()]
    return lambda figures, step: None


def log_row(path, track, start, step, split, figures):
    """Append a row to metrics.jsonl; a figure that is not finite becomes JSON's nearest, null."""
    row = {"step": step, "split": split, **figures, "seconds": time.time() - start}
    row |= {k: None for k, v in row.items() if isinstance(v, float) and not math.isfinite(v)}
    if not RANK:
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
    track({f"{split}/{k}": v for k, v in row.items() if isinstance(v, float)}, step)


def evaluate(setup, config, logps=None):
    """Metrics of the evaluation pairs under the policy as it is now, or of these logps."""
    logps = compute_logps(setup, "eval", config, "evaluation") if logps is None else logps
    return summarize(score(logps, setup.reference["eval"], config)[1], intervals=True)


def train_step(setup, config, group, optimizer, lr):
    """One optimizer step over the rows of `group`; skipped if loss or gradient is not finite.

    returns  the step's metrics: means over its pairs, gradient norm before clipping, lr, tokens
    """
    pairs = [i for row in group for i in row.pairs]
    table = torch.zeros(len(setup.pairs["train"]), len(METRICS), device=config.device)
    setup.model.train()
    for row, weight in own_rows(group):
        logps = sequence_logps(setup.policy(row), row.lengths, config.length_normalize)
        losses, scores = score(logps.view(-1, 2), setup.reference["train"][row.pairs], config)
        (losses.sum() * (weight * WORLD / len(pairs))).backward()  # FSDP2 averages over processes
        table[row.pairs] += weight * scores
    setup.model.eval()  # without lora_dropout
    norm = nn.utils.clip_grad_norm_(setup.weights.values(), config.max_grad_norm or math.inf)
    norm, table = full(norm).item(), over_processes(table)[pairs]
    figures = summarize(table) | {
        "grad_norm": norm, "lr": lr, "tokens": sum(len(row.input_ids) for row in group)}
    if math.isfinite(norm) and math.isfinite(figures["loss"]):
        for options in optimizer.param_groups:
            options["lr"] = lr
        optimizer.step()
    else:
        figures["skipped"] = [setup.pairs["train"][i].index for i in pairs]
    optimizer.zero_grad()
    update_policy(setup)
    return figures


def train(setup, config, folder):
    """Train one run to its end, from its newest checkpoint if it has one; fills metrics.jsonl.

    raises   FloatingPointError, or KeyboardInterrupt after a checkpoint
    """
    optimizer, steps = make_optimizer(setup.weights, config), setup.steps["train"]
    path, began = folder / "metrics.jsonl", time.time()
    order = [steps[i] for epoch in range(config.epochs) for i in data.visiting_order(
        len(steps), config.shuffle and epoch > 0, config.seed + epoch)]
    first = load_checkpoint(folder / "checkpoints", setup.weights, optimizer)
    update_policy(setup)
    kept = [json.dumps(row) + "\n" for row in read_rows(path) if 0 < first >= row["step"]]
    write_atomically(path, lambda file: file.write_text("".join(kept), "utf-8"))
    start = began - (json.loads(kept[-1])["seconds"] if kept else setup.facts["reference_seconds"])
    pairs, total, lost = [sum(len(row.pairs) for row in group) for group in order], len(order), 0
    log = partial(log_row, path, open_tracker(config, folder, first + 1), start)
    if setup.pairs["eval"] and not first:
        log(0, "eval", evaluate(setup, config, setup.reference["eval"]))
    with progress("training", sum(pairs), sum(pairs[:first])) as bar:
        for step, group in enumerate(order[first:], first + 1):
            begin, last, lr = time.time(), step == total, learning_rate(step - 1, total, config)
            torch.manual_seed(config.seed + step)  # lora_dropout's; so there is no state to save
            figures = train_step(setup, config, group, optimizer, lr)
            rate = figures["tokens"] / (time.time() - begin)
            figures |= {"tokens_per_second": rate, "peak_share": rate * setup.facts["peak_share"]}
            log(step, "train", figures)
            shown = ", ".join(f"{name.rpartition('/')[2]} {figures[name]:.4g}" for name in SHOWN)
            left = (time.time() - began) / (step - first) * (total - step)
            bar.set_postfix_str(shown, refresh=step % config.logging_every == 0)
            if bar.disable and step * 20 // total > (step - 1) * 20 // total:
                say(f"training {step}/{total}, {left:.0f} s left: {shown}")
            bar.update(pairs[step - 1])
            lost = lost + 1 if "skipped" in figures else 0
            if lost:
                say(f"Step {step} skipped: not finite, with records {figures['skipped']}")
            if lost == 3:
                raise FloatingPointError("not finite three times running: lower lr or use float32")
            if setup.pairs["eval"] and (last or step % (config.eval_every or step + 1) == 0):
                log(step, "eval", evaluate(setup, config))
            stop = over_processes(torch.tensor(sum(_signals[:1]), device=config.device)).item()
            if stop or not lost and (last or step % (config.save_every or step + 1) == 0):
                save_checkpoint(folder / "checkpoints", setup.weights, optimizer, step)
                if not RANK:
                    draw_curves(path)
            if stop:
                raise KeyboardInterrupt((_signals or [signal.SIGTERM])[0])


def draw_curves(metrics):
    """curves.png beside metrics.jsonl: training smoothed, evaluation with 95 % intervals."""
    trained, held_out = (pandas.DataFrame(read_rows(metrics, s)) for s in ("train", "eval"))
    figure = Figure((12, 6.5), layout="constrained")
    for axis, panel in zip(figure.subplots(2, 3).flat, PANELS.split(), strict=True):
        for name, color in zip(panel.split(","), ("tab:blue", "tab:orange"), strict=False):
            smooth = trained[name].rolling(1 + len(trained) // 20, 1).mean()
            axis.plot(trained["step"], trained[name], color=color, alpha=0.25)
            axis.plot(trained["step"], smooth, color=color, label=f"{name}, training")
            if name in held_out:
                axis.errorbar(held_out["step"], held_out[name], fmt="o--", color=color, capsize=3,
                              yerr=held_out[f"{name}/ci95"].astype(float), label=f"{name}, eval")
        if panel == "loss":
            axis.axhline(math.log(2), color="gray", linestyle=":", label="ln 2")
        axis.set(title=panel.replace(",", ", "), xlabel="optimizer step")
        axis.legend(fontsize=8)
    write_atomically(metrics.with_name("curves.png"), partial(figure.savefig, format="png"))


@torch.no_grad()
def save_model(setup, state, config, folder, card):
    """Write folder/model, whole or not at all: weights, tokenizer, chat template and model card."""
    temporary, model, dtype = folder / "model.tmp", setup.model, getattr(torch, config.save_dtype)
    if config.lora_r and config.lora_merge:
        from peft import PeftModel

        model.save_pretrained(temporary, state_dict=state)
        model = PeftModel.from_pretrained(load_model(config)[0], temporary).merge_and_unload()
        state = model.to(dtype).state_dict()
    shutil.rmtree(temporary, ignore_errors=True)  # that adapter, or what a crash left
    end, ends = data.PairEncoder(setup.tokenizer).end_of_turn, model.generation_config
    known = ends.eos_token_id if isinstance(ends.eos_token_id, list) else [ends.eos_token_id]
    ends.eos_token_id = ends.eos_token_id if end in known else sorted({end, *known} - {None})
    model.save_pretrained(temporary, state_dict={
        n: t.to(dtype) if t.is_floating_point() else t for n, t in state.items()})
    if (temporary / "config.json").exists():  # not beside an adapter
        model.config.dtype = config.save_dtype  # save_pretrained notes the compute dtype
        model.config.save_pretrained(temporary)
    setup.tokenizer.save_pretrained(temporary)
    (temporary / "README.md").write_text(card, encoding="utf-8")
    os.sync()
    os.replace(temporary, folder / "model")


def markdown(header, rows):
    """A Markdown table; a cell may hold several lines."""
    cells = [[str(c).replace("|", "\\|").replace("\n", "<br>") for c in row] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in [header, ["---"] * len(header), *cells])


def compare(held_out):
    """Markdown: the evaluation before and after, and what of it changed measurably."""
    changed, rows = [], []
    for name in ("loss", "rewards/margins", "rewards/accuracies") if held_out else ():
        figures = held_out[0][name], held_out[-1][name], held_out[-1][f"{name}/ci95"]
        # null is what was not finite, such as the interval of one pair only
        before, after, half = (math.nan if figure is None else figure for figure in figures)
        changed += [name] * (abs(after - before) > half)
        rows.append((name, f"{before:.4f}", f"{after:.4f}", f"{after - before:+.4f} ± {half:.4f}"))
    table = markdown(("held out", "before", "after", "change, paired 95 % interval"), rows)
    return f"{table}\n\nMeasurable change: {', '.join(changed) or 'none' if rows else 'unknown'}."


def finish(setup, config, folder):
    """Print the evaluation before and after; write report.md, curves.png and, last, model/."""
    metrics, answers = folder / "metrics.jsonl", sample_answers(setup)
    fixed = {} if config.lora_r else {  # persistent buffers, frozen weights; no head that is tied
        n: t for n, t in setup.model.state_dict(keep_vars=True).items() if not t.requires_grad}
    state = {name: full(tensor).to(KEPT) for name, tensor in (fixed | setup.weights).items()}
    if RANK:
        return
    trained, evaluation = read_rows(metrics, "train"), compare(read_rows(metrics, "eval"))
    memory = torch.cuda.max_memory_allocated() or getrusage(RUSAGE_SELF).ru_maxrss * 1024
    rate = sorted(row["tokens_per_second"] for row in trained)[len(trained) // 2]
    speed = (f"{trained[-1]['seconds']:.0f} s since the reference pass began, {rate:.0f} tokens/s, "
             f"{memory / 1e9:.1f} GB, {sum('skipped' in row for row in trained)} updates skipped")
    facts = "\n".join([*describe_data(setup, config), speed])
    prompts = [json.loads(pair.prompt)[-1]["content"] for pair in setup.samples]
    samples = zip(prompts, setup.answers, answers, strict=True)
    about = {"base_model": config.model, "datasets": [config.dataset], "license": "other"}
    text = ("Direct Preference Optimization (arXiv 2305.18290); the base model's licence holds."
            f"\n\n{evaluation}\n\n```yaml\n{yaml.safe_dump(asdict(config), sort_keys=False)}"
            f"```\n```\n{facts}\n```\n{markdown(('prompt', 'reference', 'trained'), samples)}\n")
    report = f"# {folder.name}\n\n![curves](curves.png)\n\n{text}"
    draw_curves(metrics)
    write_atomically(folder / "report.md", lambda file: file.write_text(report, "utf-8"))
    save_model(setup, state, config, folder, f"---\n{yaml.safe_dump(about)}---\n{text}")
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    say(f"\n{evaluation}\n\n{speed}\nModel and report are in {folder}")


@torch.no_grad()
def dry_run(setup, config):
    """Print the first pair as the model sees it, and what a run would take."""
    pair, special = setup.pairs["train"][0], set(setup.tokenizer.all_special_ids)
    paint = ("\033[{}m{}\033[0m" if sys.stdout.isatty() else "{1}").format
    for title, color, ids in (("prompt", 34, pair.prompt_ids), ("chosen", 32, pair.chosen_ids),
                              ("rejected", 31, pair.rejected_ids)):
        text = (paint(35 if i in special else color, setup.tokenizer.decode(i)) for i in ids)
        say(f"--- {title}, {len(ids)} tokens\n{''.join(text)}")
    rows, shape = setup.rows["train"], setup.model.config.get_text_config()
    size, trained = getattr(torch, config.dtype).itemsize, setup.facts["trained"]
    longest = max(rows, key=lambda row: len(row.input_ids))
    timer = Timer("policy(row)", globals={"policy": setup.policy, "row": longest},
                  num_threads=torch.get_num_threads())
    evaluations = 2 + config.epochs * len(setup.steps["train"]) // (config.eval_every or 10**9)
    # a backward pass takes two forward ones, float32 at least twice the time of bfloat16
    passes = rows * (1 + 3 * config.epochs) + setup.rows["eval"] * (evaluations * 4 // size)
    per_token = timer.timeit(1).median / len(longest.input_ids)
    minutes = sum(len(row.input_ids) for row in passes) * per_token / WORLD / 60
    # in float32 each trained weight, its gradient and two moments; in one process also its copy
    each = 16 + size * (size < 4 and WORLD == 1 and not config.lora_r)
    weights = (setup.model.num_parameters() - trained) * size + trained * each
    activations = len(longest.input_ids) * shape.hidden_size * shape.num_hidden_layers * size
    memory = weights / WORLD + activations * (1 if config.activation_checkpointing else 30)
    say(f"Estimate: {minutes:.1f} minutes and {memory / 1e9 + 0.8:.1f} GB for each process")


def summarize_sweep(configs, varied):
    """Print the runs, best held-out accuracy first; write sweep.csv and sweep.png beside them."""
    rows = [{name: getattr(config, name) for name in varied} | row for config in configs
            for row in read_rows(Path(config.output_dir) / "metrics.jsonl", "eval")[-1:]]
    folder, names = Path(configs[0].output_dir).parent, ["rewards/accuracies", "rewards/margins"]
    frame = pandas.DataFrame(rows).sort_values(names, ascending=False)
    frame.to_csv(folder / "sweep.csv", index=False)
    shown = [*varied, *(f"{name}{end}" for name in names for end in ("", "/ci95")), "loss"]
    say(frame[shown].to_string(index=False, float_format="{:.4g}".format))
    x, *others = sorted(varied, key=lambda name: name != "lr")  # lr on the axis, if it varies
    figure = Figure((11, 4), layout="constrained")
    for axis, name in zip(figure.subplots(1, 2), names, strict=True):
        for label, part in frame.sort_values(x).groupby(others or ["split"]):
            axis.errorbar(part[x].astype(str), part[name], part[f"{name}/ci95"].astype(float),
                          marker="o", capsize=3, label=" ".join(map(str, (*others, *label))))
        axis.set(title=f"held out {name}, 95 % interval", xlabel=x)
        axis.legend(fontsize=8)
    write_atomically(folder / "sweep.png", partial(figure.savefig, format="png"))
    say(f"The sweep is in {folder / 'sweep.csv'} and {folder / 'sweep.png'}")


def is_finished(folder, config):
    """Whether the run in this folder is; raises InputError if its settings are not these."""
    path, fresh = folder / "config.yaml", asdict(config)
    old = yaml.safe_load(path.read_text()) if path.exists() else {}
    changed = [f"{name} was {value}, is {fresh[name]}" for name, value in old.items()
               if name in fresh.keys() - HARMLESS - {"output_dir"} and value != fresh[name]]
    if changed:
        raise data.InputError(f"{folder}: {'; '.join(changed)}. New output_dir, or --overwrite?")
    return (folder / "model").exists()


def claim(folder, config, overwrite):
    """Lock a run's folder and note its settings there; a dead process does not keep the lock.

    returns  the lock, which lasts until it is released
    raises   InputError if another process holds it
    """
    try:
        lock = FileLock(folder / ".lock").acquire(timeout=0)  # makes the folder too
    except Timeout:
        raise data.InputError(f"another process is training in {folder}") from None
    if overwrite:
        for name in ("checkpoints", "model.tmp"):
            shutil.rmtree(folder / name, ignore_errors=True)
        if (folder / "model").exists():
            os.replace(folder / "model", folder / "model.tmp")  # half of it would count as finished
    text = f"# stand-ins used: {data.stand_ins_used or 'none'}\n{yaml.safe_dump(asdict(config))}"
    write_atomically(folder / "config.yaml", lambda file: file.write_text(text, "utf-8"))
    return lock


def run(configs, varied, options):
    """All runs of a sweep (mostly one), sharing model and reference where they can."""
    setup = shared = None
    for config in configs:
        folder = Path(config.output_dir)
        if not (options.overwrite or options.dry_run) and is_finished(folder, config):
            shutil.rmtree(folder / "checkpoints", ignore_errors=True)  # a kill may have left them
            say(f"{folder} is finished. Add --overwrite to train it anew.")
            continue
        key = {name: value for name, value in asdict(config).items() if name not in SHARING}
        if key != shared:
            setup = None  # frees the old model before the next one loads
            setup, shared = prepare(config, options.dry_run), key
            first = {n: w.detach().clone() for n, w in setup.weights.items()} if varied else {}
        if options.dry_run:
            return dry_run(setup, config)
        with contextlib.nullcontext() if RANK else claim(folder, config, options.overwrite):
            over_processes(torch.zeros(1, device=config.device))  # the others wait for the claim
            for name, weight in first.items():
                setup.weights[name].data.copy_(weight)
            train(setup, config, folder)
            finish(setup, config, folder)
    if varied and configs[0].eval_pairs and not RANK:
        summarize_sweep(configs, varied)


def main(arguments=None):
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=Path(__file__).with_name("config.yaml").read_text(encoding="utf-8"))
    parser.add_argument("overrides", nargs="*", metavar="name=value", help="settings for this run")
    parser.add_argument("--config", required=True, help="YAML file of settings, listed below")
    parser.add_argument("--dry-run", action="store_true", help="show data and cost, train nothing")
    parser.add_argument("--overwrite", action="store_true", help="train finished runs anew")
    options = parser.parse_intermixed_args(arguments)
    sys.stdout.reconfigure(line_buffering=True)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.simplefilter("ignore")  # the libraries' own, which no user can do anything about
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, note_signal)
    if WORLD > 1:
        if torch.accelerator.is_available():
            torch.accelerator.set_device_index(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group(timeout=pandas.Timedelta(hours=12))  # for the first's checkpoints
    try:
        configs, varied = read_config(options.config, options.overrides)
        run([resolve_machine(config) for config in configs], varied, options)
        return 0
    except KeyboardInterrupt as stop:
        say("Interrupted. The same command goes on from the last checkpoint (without --overwrite).")
        return 128 + stop.args[0]
    except data.InputError as error:
        say(f"Error: {error}")
        return 2
    except (FloatingPointError, OSError, SafetensorError, MemoryError, RuntimeError) as error:
        if isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate mem" in str(error):
            error = "out of memory: lower batch_size, max_length, or set activation_checkpointing"
        elif type(error) is RuntimeError:
            raise
        tqdm.write(f"Stopped: {error}\nThe same command goes on (without --overwrite).")
    return 1


if __name__ == "__main__":
    # gloo's threads may still hold tensors, and abort if Python takes itself down before them
    (os._exit if RANK else sys.exit)(main())
