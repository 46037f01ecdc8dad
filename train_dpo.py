"""Align a causal language model with Direct Preference Optimization (arXiv 2305.18290).

    python train_dpo.py --config config.yaml                        one run
    python train_dpo.py --config config.yaml beta=0.2 lr=5e-7       with other settings
    python train_dpo.py --config config.yaml "lr=[1e-7, 1e-6]"      a sweep
    python train_dpo.py --config config.yaml --dry-run              look at the data, train nothing

From top to bottom, as main() runs it:
    read_config   config.yaml and overrides -> a Config for each run of the sweep
    prepare       model, pairs, rows, and the reference's log-probabilities of each pair
    train         DPO loss -> gradients -> AdamW step; metrics, evaluations, checkpoints
    finish        evaluation before and after, report.md, curves.png, model/
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
import resource
import shutil
import signal
import sys
import time
import typing
import warnings
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
import transformers
import yaml
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm import tqdm
from transformers import AttentionInterface, AutoModelForCausalLM, AutoTokenizer, GgufConfig

import data
from data import InputError
from dpo_loss import dpo_loss, sequence_logps, token_logps

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
WANTED = {bool: "true or false", str: "text", dict: "lines of `name: stand-in`",
          int: "a whole number from {low} to {high}", float: "a number from {low} to {high}"}
# settings that may change between two sessions of one run, and between the runs of a sweep that
# share a model and its reference log-probabilities
HARMLESS = {"logging_every", "eval_every", "save_every", "reference_cache", "offline", "output_dir"}
SHARING = HARMLESS | {"loss", "beta", "label_smoothing", "epochs", "lr", "warmup_ratio",
                      "weight_decay", "max_grad_norm", "save_dtype"}
METRICS = ("loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies",
           "logps/chosen", "logps/rejected")
SHOWN = ("loss", "rewards/margins", "rewards/accuracies", "tokens_per_second")


class TrainingError(RuntimeError):
    """Training cannot go on; the message says why and what to change."""


class Interrupted(Exception):
    """SIGINT or SIGTERM arrived; the argument is its number."""


def setting(default, low=-math.inf, high=math.inf, choices=()):
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
    output_dir: str = "runs/beta{beta}_lr{lr}"
    logging_every: int = setting(1, 1)
    eval_every: int = setting(50, 0)
    save_every: int = setting(50, 0)
    save_dtype: str = setting("float32", choices=tuple(DTYPES))
    sample_prompts: int = setting(3, 0)
    reference_cache: str | None = "runs/reference_cache"
    offline: dict | None = None


def check_setting(spec, kind, value):
    """The value as the setting's type; "1e-7", which YAML reads as text, is a number.

    spec, kind  dataclasses.Field of Config and its type hint
    raises      InputError that names the setting, the value and what would be right
    """
    if value is None and type(None) in typing.get_args(kind):
        return None
    kind, rule = (*typing.get_args(kind), kind)[0], spec.metadata or setting(None).metadata
    with contextlib.suppress(ValueError, TypeError, OverflowError):  # no number: told below
        number = kind in (int, float) and not isinstance(value, bool)
        if number and kind(value) == float(value):
            value = kind(value)
        if (type(value) is kind and (value in rule["choices"] or not rule["choices"])
                and (not number or rule["low"] <= value <= rule["high"])):
            return value
    wanted = WANTED[kind].format(**rule) if not rule["choices"] else ", ".join(rule["choices"])
    raise InputError(f"{spec.name} must be {wanted}, not {value!r}")


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
        raise InputError(f"config {path} is no readable `name: value` list: {error}") from error
    specs, kinds = {spec.name: spec for spec in fields(Config)}, typing.get_type_hints(Config)
    choices, configs = {}, []
    for name, value in settings.items():
        if name not in specs:
            near = difflib.get_close_matches(str(name), specs, 1, cutoff=0)[0]
            raise InputError(f"unknown setting {name!r}: did you mean {near}? --help lists all")
        values = value if isinstance(value, list) and kinds[name] is not bool else [value]
        values = [check_setting(specs[name], kinds[name], v) for v in values]
        choices[name] = [v for i, v in enumerate(values) if v not in values[:i]]
    varied = [name for name, values in choices.items() if len(values) != 1]
    for values in itertools.product(*choices.values()):
        config = Config(**dict(zip(choices, values, strict=True)))
        if config.label_smoothing and config.loss != "sigmoid":
            raise InputError("label_smoothing is defined for loss sigmoid only: set it to 0")
        folder = config.output_dir
        folder += "".join(f"_{name}{{{name}}}" for name in varied if f"{{{name}}}" not in folder)
        for name, value in asdict(config).items():
            folder = folder.replace(f"{{{name}}}", str(value).replace("/", "-"))
        if "{" in folder:
            raise InputError(f"output_dir {folder}: what is in braces must be a setting's name")
        configs.append(replace(config, output_dir=folder))
    if not configs:
        raise InputError(f"{', '.join(varied)}: an empty list; give at least one value")
    return configs, varied


def say(text):
    """Print a line, above any bar."""
    tqdm.write(text)
    sys.stdout.flush()


def progress(title, total, done=0):
    """A tqdm bar on a terminal; elsewhere nothing, for logs get plain lines instead."""
    return tqdm(total=total, initial=done, desc=title, unit="pair", dynamic_ncols=True,
                disable=not sys.stderr.isatty())


_signals = []


def note_signal(number, frame):
    """Signal handler: stop after the step in hand; a second signal stops at once."""
    _signals.append(number)
    signal.signal(number, signal.SIG_DFL)


def resolve_machine(config):
    """The config with device and dtype decided: bfloat16 only where it is the faster one."""
    device, dtype, cpu = config.device, config.dtype, torch.cpu.get_capabilities()
    if device == "auto":
        device = str(torch.accelerator.current_accelerator() or "cpu")
    try:
        torch.empty(1, device=device)
        fast = (torch.cuda.get_device_capability(device) >= (8, 0) if device.startswith("cuda") else
                device == "cpu" and (cpu.get("amx_bf16") or cpu.get("avx512_bf16")))
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"device {device}: {data.first_line(error)}") from error
    automatic = "bfloat16" if fast else "float32"
    return replace(config, device=device, dtype=automatic if dtype == "auto" else dtype)


def load_model(config):
    """Load the model in float32 on the CPU, and its tokenizer.

    returns  model, tokenizer, and the stand-in's name or None
    raises   InputError if it cannot be had or is no causal language model
    """
    def load(path):
        options, gguf = {"revision": config.revision or "main"}, {}
        if path.endswith(".gguf"):
            path, options["gguf_file"] = os.path.split(os.path.abspath(path))
            gguf["quantization_config"] = GgufConfig(dequantize=True)
        options["trust_remote_code"] = config.trust_remote_code
        tokenizer = AutoTokenizer.from_pretrained(path, **options)
        return tokenizer, AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.float32, use_safetensors=True, **options, **gguf)

    with open(os.devnull, "w") as silent, contextlib.redirect_stderr(silent):
        (tokenizer, model), stand_in = data.open_source(config.model, "model", config.offline, load)
    for module in model.modules():  # the model stays in train mode, without dropout
        for name, value in vars(module).items():
            if isinstance(value, float) and ("drop" in name or isinstance(module, nn.Dropout)):
                setattr(module, name, 0.0)
    return model.train(), tokenizer, stand_in


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
        return AttentionInterface()["sdpa"](module, query, key, value, mask, scaling=scaling)
    outputs, start = [], 0
    options = {"scale": scaling, "enable_gqa": query.shape[1] != key.shape[1]}
    for prompt, chosen, rejected in segments:
        middle, end = start + prompt + chosen, start + prompt + chosen + rejected
        q, k, v = (x[:, :, start:middle] for x in (query, key, value))
        outputs.append(F.scaled_dot_product_attention(q, k, v, is_causal=True, **options))
        k, v = (torch.cat((x[:, :, start : start + prompt], x[:, :, middle:end]), 2)
                for x in (key, value))
        seen = torch.ones(rejected, prompt + rejected, dtype=torch.bool, device=q.device)
        outputs.append(F.scaled_dot_product_attention(
            query[:, :, middle:end], k, v, attn_mask=seen.tril(prompt), **options))
        start = end
    return torch.cat(outputs, 2).transpose(1, 2).contiguous(), None


AttentionInterface.register("shared_prompt", shared_prompt_attention)


class AnswerLogps(nn.Module):
    """The log-probability of each answer token of a data.Row under a causal language model.

    shared  whether a row runs as it is, its prompts computed once; otherwise each answer runs as a
            sequence of its own through the model's own forward, which is right for any model
    """

    def __init__(self, model, shared=True):
        super().__init__()
        self.model, self.shared, self.own = model, shared, model.config._attn_implementation
        if shared:
            model.set_attn_implementation("shared_prompt")

    def forward(self, row):
        """(n,) float32: log-probabilities of row.targets in nats."""
        if self.shared:
            hidden = self.model.base_model(
                input_ids=row.input_ids[None], position_ids=row.position_ids[None],
                segments=row.segments, use_cache=False).last_hidden_state[0]
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
    longest, policy = max(pairs, key=lambda pair: pair.tokens), AnswerLogps(model, shared=False)
    row, difference = data.make_row([longest], [0], model.device), math.inf
    expected = policy(row)
    try:
        difference = (AnswerLogps(model)(row) - expected).abs().max().item()
    except (TypeError, ValueError, RuntimeError, AttributeError) as error:
        say(f"The model refuses rows that share a prompt: {data.first_line(error)}")
    model.set_attn_implementation(policy.own)
    window = getattr(model.config.get_text_config(), "sliding_window", None) or math.inf
    reach = max(len(p.prompt_ids) + max(len(p.chosen_ids), len(p.rejected_ids)) for p in pairs)
    shared = difference <= tolerance and reach <= window
    say(f"Layout: {'shared prompts' if shared else 'separate sequences'}. On the longest pair "
        f"({longest.tokens} tokens) the two differ by {difference:.1e} nat a token at most; the "
        f"longest sequence is {reach}, the sliding window {window}")
    return shared


def place_weights(model, config):
    """Bring the float32 model to its device and compute dtype; trained weights stay float32.

    Where the compute dtype is another, each weight keeps a float32 copy, which the optimizer
    updates and in which its gradients add up.

    returns  weights by name, as the optimizer updates them, and (parameter, weights) copies
    """
    def add_up(parameter, weight):
        grad, parameter.grad = parameter.grad, None
        weight.grad = grad.float() if weight.grad is None else weight.grad.add_(grad)

    weights, copies = dict(model.to(config.device).named_parameters()), []
    for name, parameter in weights.items() if config.dtype != "float32" else ():
        weights[name] = weight = nn.Parameter(parameter.data)
        parameter.data = weight.data.to(DTYPES[config.dtype])
        parameter.register_post_accumulate_grad_hook(lambda p, w=weight: add_up(p, w))
        copies.append((parameter, weight))
    return weights, copies


@torch.no_grad()
def compute_logps(setup, split, config, title):
    """log pi(y|x) of all pairs of a split under the policy as it is now.

    returns  (pairs, 2) float32 on the CPU: chosen, rejected, in nats
    raises   Interrupted, between two rows
    """
    logps, title = torch.zeros(len(setup.pairs[split]), 2), f"{title}, {split} pairs"
    say(f"{title}: {len(logps)}")
    with progress(title, len(logps)) as bar:
        for row in all_rows(setup, split):
            answers = sequence_logps(setup.policy(row), row.lengths, config.length_normalize)
            logps[row.pairs] = answers.view(-1, 2).float().cpu()
            bar.update(len(row.pairs))
            if _signals and title.startswith("reference"):  # in training the step is saved first
                raise Interrupted(_signals[0])
    return logps


def reference_logps(setup, config):
    """The reference's log-probabilities of all pairs, from the cache where they are in it.

    The reference is the policy before its first step, so they are computed with it, in the rows and
    the numerics of training: the first loss is exactly ln 2, and no second model takes memory.
    """
    key = [setup.facts["weights"], setup.policy.shared, setup.policy.own, config.dtype,
           config.device, config.length_normalize, torch.get_num_threads(), torch.__version__,
           transformers.__version__, torch.cpu.get_capabilities()["cpu_name"],
           [(row.input_ids.tolist(), row.segments) for split in setup.pairs
            for row in all_rows(setup, split)]]
    name = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]
    path = Path(config.reference_cache or os.devnull) / f"{name}.safetensors"
    with contextlib.suppress(SafetensorError, OSError):  # there is none, or a damaged one
        found = load_file(path)
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
        weights, copies   as from place_weights
        pairs, steps      "train" and "eval" -> list of data.Pair; list of steps, lists of data.Row
        reference         "train" and "eval" -> (pairs, 2) log-probabilities; not in a dry run
        answers           the reference's, to the sample prompts; not in a dry run
        facts             what report and dry run say of data and machine
    """
    model, tokenizer, stand_in = load_model(config)
    train, held_out, drops, stand_ins = data.load_pairs(config, tokenizer)
    pairs = {"train": train, "eval": held_out}
    facts = {"drops": drops, "weights": digest_tensors(model.state_dict()),
             "stand_ins": stand_ins + [f"{config.model} -> {stand_in}"] * bool(stand_in)}
    policy = AnswerLogps(model, choose_layout(model, train + held_out))
    if config.activation_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    weights, copies = place_weights(model, config)
    per_step = config.batch_size * config.gradient_accumulation_steps
    longest = config.batch_size * max(pair.tokens for pair in train + held_out)
    steps = {split: [[data.make_row(part, indices, config.device) for indices in rows] for rows in
                     data.group_into_steps(part, per_step, longest)]
             for split, part in pairs.items()}
    setup = SimpleNamespace(model=model, tokenizer=tokenizer, policy=policy, weights=weights,
                            copies=copies, pairs=pairs, steps=steps, facts=facts)
    say("\n".join(describe_data(setup, config)))
    if not dry:
        start = time.time()
        setup.reference = reference_logps(setup, config)
        facts["reference_seconds"] = time.time() - start
        setup.answers = sample_answers(setup, config)
    return setup


def all_rows(setup, split):
    """All rows of a split, in order."""
    return [row for rows in setup.steps[split] for row in rows]


def describe_data(setup, config):
    """Lines on the pairs: how many, token lengths, how many are cut, drops by reason."""
    for split, pairs in setup.pairs.items():
        wanted, lengths = getattr(config, f"{split}_pairs"), sorted(p.tokens for p in pairs) or [0]
        spread = [lengths[(len(lengths) - 1) * share // 100] for share in (0, 10, 50, 90, 100)]
        yield f"{split}: {len(pairs)} pairs" + ", fewer than asked" * (len(pairs) < wanted)
        yield f"  tokens, prompt once (0, 10, 50, 90, 100 %): {', '.join(map(str, spread))}"
        yield f"  cut to max_length or max_prompt_length: {sum(pair.cut for pair in pairs)}"
        yield from (f"  dropped, {why}: {n}" for why, n in setup.facts["drops"][split].items())


@torch.no_grad()
def sample_answers(setup, config):
    """Greedy answers to the first held-out prompts (training prompts if none is held out)."""
    end, answers = data.PairTokenizer(setup.tokenizer).end_of_turn, []
    for pair in (setup.pairs["eval"] or setup.pairs["train"])[: config.sample_prompts]:
        ids = torch.tensor([pair.prompt_ids], device=setup.model.device)
        answer = setup.model.eval().generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=128, do_sample=False,
            temperature=None, top_p=None, top_k=None, eos_token_id=end, pad_token_id=end)[0]
        answers.append(setup.tokenizer.decode(answer[ids.shape[1] :], skip_special_tokens=True))
    setup.model.train()
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
    metrics = dict(zip(METRICS, table.double().mean(0).tolist(), strict=True))
    if intervals:
        halves = 1.96 * table.double().std(0) / math.sqrt(len(table))
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


@torch.no_grad()
def copy_weights(copies):
    """Round the float32 weights into the parameters that compute."""
    for parameter, weight in copies:
        parameter.copy_(weight)


def write_atomically(path, write):
    """Let write(temporary path) make a file; a crash leaves the old one or the new one whole."""
    temporary = path.with_name(f"{path.name}.tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        write(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def checkpoint_tensors(weights, optimizer):
    """All tensors of a checkpoint by name, made where they are missing; to be saved or filled."""
    for weight in weights.values():
        optimizer.state[weight] = optimizer.state[weight] or {
            "step": torch.tensor(0.0), "exp_avg": torch.zeros_like(weight),
            "exp_avg_sq": torch.zeros_like(weight)}
    return {f"{key}.{name}": tensor.data for name, weight in weights.items()
            for key, tensor in {"weight": weight, **optimizer.state[weight]}.items()}


def digest_tensors(tensors):
    """sha256 of tensors and their names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def save_checkpoint(folder, weights, optimizer, step, seconds):
    """Write folder/step_N whole or not at all, then remove all but it and the one before.

    step, seconds  all else that a run goes on from; the rest is derived from the config
    raises         OSError or SafetensorError, as on a full disk; the earlier ones stay
    """
    tensors = checkpoint_tensors(weights, optimizer)
    tensors["position"] = torch.tensor([step, seconds], dtype=torch.float64)
    write_atomically(folder / f"step_{step:07d}.safetensors", lambda file: save_file(
        tensors, file, {"digest": digest_tensors(tensors)}))
    for old in sorted(folder.glob("*.safetensors"))[:-2]:
        old.unlink()


def load_checkpoint(folder, weights, optimizer):
    """Fill weights and optimizer from the newest undamaged checkpoint; returns step, seconds."""
    for path in sorted(folder.glob("*.safetensors"), reverse=True):
        try:
            with safe_open(path, "pt") as file:
                digest, saved = file.metadata()["digest"], load_file(path)
            if digest != digest_tensors(saved):
                raise ValueError("its tensors are not those that were saved")
            for name, tensor in checkpoint_tensors(weights, optimizer).items():
                tensor.copy_(saved[name])
            say(f"Resuming from {path}")
            return int(saved["position"][0]), saved["position"][1].item()
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            say(f"Warning: {path} is damaged ({error}); the one before it is tried")
            path.unlink()  # it would count as one of the two to keep
    return 0, 0.0


def read_rows(path, split=None):
    """The rows of a JSONL file, of one split or all; a line that a crash has torn is left out."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError):
            rows.append(json.loads(line))
    return [row for row in rows if split in (None, row["split"])]


def log_row(path, step, split, figures, start):
    """Append a row to metrics.jsonl; a figure that is not finite becomes JSON's nearest, null."""
    row = {"step": step, "split": split, **figures, "seconds": time.time() - start}
    row |= {k: None for k, v in row.items() if isinstance(v, float) and not math.isfinite(v)}
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def evaluate(setup, config, logps=None):
    """Metrics of the evaluation pairs under the policy as it is now, or of these logps."""
    logps = compute_logps(setup, "eval", config, "evaluation") if logps is None else logps
    return summarize(score(logps, setup.reference["eval"], config)[1], intervals=True)


def train_step(setup, config, group, optimizer, lr):
    """One optimizer step over the rows of `group`; skipped if loss or gradient is not finite.

    returns  the step's metrics: means over its pairs, gradient norm before clipping, lr, tokens
    """
    pairs, tables = [i for row in group for i in row.pairs], []
    for row in group:
        logps = sequence_logps(setup.policy(row), row.lengths, config.length_normalize)
        reference = setup.reference["train"][row.pairs].to(logps.device)
        losses, table = score(logps.view(-1, 2), reference, config)
        (losses.sum() / len(pairs)).backward()
        tables.append(table)
    norm = nn.utils.clip_grad_norm_(setup.weights.values(), config.max_grad_norm or math.inf).item()
    figures = summarize(torch.cat(tables)) | {
        "grad_norm": norm, "lr": lr, "tokens": sum(len(row.input_ids) for row in group)}
    if math.isfinite(norm) and math.isfinite(figures["loss"]):
        for options in optimizer.param_groups:
            options["lr"] = lr
        optimizer.step()
    else:
        figures["skipped"] = [setup.pairs["train"][i].index for i in pairs]
    optimizer.zero_grad()
    copy_weights(setup.copies)
    return figures


def train(setup, config, folder):
    """Train one run to its end, from its newest checkpoint if it has one; fills metrics.jsonl.

    raises   TrainingError, or Interrupted after a checkpoint
    """
    optimizer, steps = make_optimizer(setup.weights, config), setup.steps["train"]
    path, began = folder / "metrics.jsonl", time.time()
    order = [i for epoch in range(config.epochs) for i in data.visiting_order(
        len(steps), config.shuffle and epoch > 0, config.seed + epoch)]
    first, seconds = load_checkpoint(folder / "checkpoints", setup.weights, optimizer)
    start = began - (seconds if first else setup.facts["reference_seconds"])
    copy_weights(setup.copies)
    kept = [json.dumps(row) + "\n" for row in read_rows(path) if 0 < first >= row["step"]]
    write_atomically(path, lambda file: file.write_text("".join(kept), "utf-8"))
    if setup.pairs["eval"] and not first:
        log_row(path, 0, "eval", evaluate(setup, config, setup.reference["eval"]), start)
    pairs, lost = [sum(len(row.pairs) for row in steps[i]) for i in order], 0
    with progress("training", sum(pairs), sum(pairs[:first])) as bar:
        for step, index in enumerate(order[first:], first + 1):
            begin, last = time.time(), step == len(order)
            rate = learning_rate(step - 1, len(order), config)
            figures = train_step(setup, config, steps[index], optimizer, rate)
            figures["tokens_per_second"] = figures["tokens"] / (time.time() - begin)
            log_row(path, step, "train", figures, start)
            shown = ", ".join(f"{name.rpartition('/')[2]} {figures[name]:.4g}" for name in SHOWN)
            left = (time.time() - began) / (step - first) * (len(order) - step)
            if step == 1:
                say(f"First loss minus ln 2: {figures['loss'] - math.log(2):.0e}")
            if step % config.logging_every == 0:
                bar.set_postfix_str(shown, refresh=False)
            if bar.disable and step * 20 // len(order) > (step - 1) * 20 // len(order):
                say(f"training {step}/{len(order)}, {left:.0f} s left: {shown}")
            bar.update(pairs[step - 1])
            lost = lost + 1 if "skipped" in figures else 0
            if lost:
                say(f"Step {step} skipped: not finite, with records {figures['skipped']}")
            if lost == 3:
                raise TrainingError("not finite in three steps running: lower lr or take float32")
            if setup.pairs["eval"] and (last or step % (config.eval_every or step + 1) == 0):
                log_row(path, step, "eval", evaluate(setup, config), start)
            if _signals or not lost and (last or step % (config.save_every or step + 1) == 0):
                save_checkpoint(folder / "checkpoints", setup.weights, optimizer, step,
                                time.time() - start)
                draw_curves(path)
            if _signals:
                raise Interrupted(_signals[0])


def draw(path, panels, size):
    """Write a picture of panels: (title, x label, lines), a line being its style for errorbar."""
    from matplotlib.figure import Figure

    figure = Figure(size, layout="constrained")
    axes = figure.subplots(-(-len(panels) // 3), min(len(panels), 3)).flat
    for axis, (title, label, lines) in zip(axes, panels, strict=True):
        for line in lines:
            axis.errorbar(**{"capsize": 3} | line)
        axis.set(title=title, xlabel=label)
        axis.legend(fontsize=8)
    write_atomically(path, lambda file: figure.savefig(file, dpi=90, format="png"))


def draw_curves(metrics):
    """curves.png beside metrics.jsonl: training smoothed, evaluation with 95 % intervals."""
    import pandas

    trained, held_out = (pandas.DataFrame(read_rows(metrics, s)) for s in ("train", "eval"))
    panels, x = [], {"x": trained["step"]}
    for title in ("loss", "rewards/accuracies", "rewards/margins", "grad_norm", "lr",
                  "rewards/chosen rewards/rejected"):
        lines = [x | {"y": x["x"] * 0 + 0.6931, "fmt": "k:", "label": "ln 2"}] * (title == "loss")
        for name, color in zip(title.split(), ("tab:blue", "tab:orange"), strict=False):
            window = 1 if name == "lr" else 1 + len(trained) // 20
            smooth = trained[name].rolling(window, min_periods=1).mean()
            lines += [x | {"y": trained[name], "color": color, "alpha": 0.25, "linewidth": 0.8},
                      x | {"y": smooth, "color": color, "label": f"{name}, training"}]
            if f"{name}/ci95" in held_out:
                lines.append({"x": held_out["step"], "y": held_out[name], "fmt": "o--", "mfc": "w",
                              "yerr": held_out[f"{name}/ci95"].astype(float), "color": color,
                              "label": f"{name}, held out"})
        panels.append((title.replace(" ", ", "), "optimizer step", lines))
    draw(metrics.with_name("curves.png"), panels, (12, 6.5))


@torch.no_grad()
def save_model(setup, config, folder, card):
    """Write folder/model, whole or not at all: weights, tokenizer, chat template and model card."""
    temporary, model, dtype = folder / "model.tmp", setup.model, DTYPES[config.save_dtype]
    shutil.rmtree(temporary, ignore_errors=True)
    end, ends = data.PairTokenizer(setup.tokenizer).end_of_turn, model.generation_config
    known = ends.eos_token_id if isinstance(ends.eos_token_id, list) else [ends.eos_token_id]
    ends.eos_token_id = end if known in ([end], [None]) else sorted({end, *known})
    model.save_pretrained(temporary, state_dict={n: w.to(dtype) for n, w in setup.weights.items()})
    model.config.dtype = config.save_dtype  # save_pretrained notes the compute dtype
    model.config.save_pretrained(temporary)
    setup.tokenizer.save_pretrained(temporary)
    (temporary / "README.md").write_text(card, encoding="utf-8")
    os.sync()
    os.replace(temporary, folder / "model")


def markdown(header, rows):
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def compare(held_out):
    """Markdown: the evaluation before and after, and whether anything measurably changed."""
    changed, rows = [], []
    for name in ("loss", "rewards/margins", "rewards/accuracies") if held_out else ():
        before, after, half = held_out[0][name], held_out[-1][name], held_out[-1][f"{name}/ci95"]
        half = math.nan if half is None else half  # there was one pair only
        changed += [name] * (abs(after - before) > half)
        rows.append((name, f"{before:.4f}", f"{after:.4f}", f"{after - before:+.4f} ± {half:.4f}"))
    table = markdown(("held out", "before", "after", "change, paired 95 % interval"), rows)
    return f"{table}\n\nMeasurable change: {', '.join(changed) or 'no measurable change'}."


def finish(setup, config, folder):
    """Print the evaluation before and after; write report.md, curves.png and, last, model/."""
    metrics = folder / "metrics.jsonl"
    trained, evaluation = read_rows(metrics, "train"), compare(read_rows(metrics, "eval"))
    memory = (torch.cuda.max_memory_allocated() if config.device.startswith("cuda") else
              resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
    rate = sorted(row["tokens_per_second"] for row in trained)[len(trained) // 2]
    speed = (f"{trained[-1]['seconds']:.0f} s since the reference pass began, at a median of "
             f"{rate:.0f} tokens/s; {memory / 1e9:.1f} GB at most; "
             f"{sum('skipped' in row for row in trained)} updates skipped")
    facts = "\n".join([*describe_data(setup, config), *setup.facts["stand_ins"], speed])
    quote = lambda text: "\n".join(f"> {line}" for line in text.splitlines() or [""])
    samples = "\n\n---\n\n".join(
        f"Prompt\n\n{quote(json.loads(pair.prompt)[-1]['content'])}\n\nReference\n\n{quote(before)}"
        f"\n\nTrained\n\n{quote(after)}" for pair, before, after in zip(
            setup.pairs["eval"] or setup.pairs["train"], setup.answers,
            sample_answers(setup, config), strict=False))
    body = (f"{evaluation}\n\n```yaml\n{yaml.safe_dump(asdict(config), sort_keys=False)}```\n\n"
            f"```\n{facts}\n```\n")
    card = (f"---\nbase_model: {config.model}\ndatasets: [{config.dataset}]\nlicense: other\n"
            "tags: [dpo]\n---\nAligned with Direct Preference Optimization (arXiv 2305.18290). The "
            f"base model's licence applies.\n\n{body}")
    draw_curves(metrics)
    report = f"# {folder.name}\n\n![curves](curves.png)\n\n{body}\n## Answers\n\n{samples}\n"
    write_atomically(folder / "report.md", lambda file: file.write_text(report, "utf-8"))
    save_model(setup, config, folder, card)
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    say(f"\n{evaluation}\n\n{speed}\nModel and report are in {folder}")


def dry_run(setup, config):
    """Print the first pair as the model sees it, and what a run would take."""
    pair, decode, shape = setup.pairs["train"][0], setup.tokenizer.decode, setup.model.config
    for title, color, ids in (("prompt", 34, pair.prompt_ids), ("chosen", 32, pair.chosen_ids),
                              ("rejected", 31, pair.rejected_ids)):
        special = {i: 35 for i in setup.tokenizer.all_special_ids}
        text = (f"\033[{special.get(i, color)}m{decode(i)}\033[0m" if sys.stdout.isatty() else
                decode(i) for i in ids)
        say(f"--- {title}, {len(ids)} tokens\n{''.join(text)}")
    rows = sorted(all_rows(setup, "train"), key=lambda row: len(row.input_ids))
    middle = rows[len(rows) // 2]
    with torch.no_grad():
        setup.policy(middle)
        start = time.time()
        setup.policy(middle)
    per_token = (time.time() - start) / len(middle.input_ids)
    passes = rows * (1 + 3 * config.epochs) + all_rows(setup, "eval") * 2
    minutes = sum(len(row.input_ids) for row in passes) * per_token / 60
    # weights, float32 gradients and AdamW's moments; then the longest row's activations
    size, kept = DTYPES[config.dtype].itemsize, 1 if config.activation_checkpointing else 30
    memory = 0.8e9 + setup.model.num_parameters() * (16 + size * (size < 4)) + (
        len(rows[-1].input_ids) * shape.hidden_size * shape.num_hidden_layers * size * kept)
    say(f"Estimate: {minutes:.1f} minutes and {memory / 1e9:.1f} GB of memory")


def summarize_sweep(configs, varied):
    """Print the runs, best held-out accuracy first; write sweep.csv and sweep.png beside them."""
    import pandas

    rows = [{name: getattr(config, name) for name in varied} | row for config in configs
            for row in read_rows(Path(config.output_dir) / "metrics.jsonl", "eval")[-1:]]
    folder, names = Path(configs[0].output_dir).parent, ["rewards/accuracies", "rewards/margins"]
    frame = pandas.DataFrame(rows).sort_values(names, ascending=False)
    frame.to_csv(folder / "sweep.csv", index=False)
    best = frame[[*varied, *(f"{name}{end}" for name in names for end in ("", "/ci95")), "loss"]]
    say(markdown(list(best), best.map(lambda v: f"{v:.4g}" if isinstance(v, float) else v).values))
    x = "lr" if "lr" in varied else varied[0]
    others = [name for name in varied if name != x] or ["split"]
    draw(folder / "sweep.png", [(f"held out {name}, 95 % interval", x, [
        {"x": part[x].astype(str), "y": part[name], "yerr": part[f"{name}/ci95"].astype(float),
         "marker": "o", "label": " ".join(map(str, (*others, *label)))}
        for label, part in frame.sort_values(x).groupby(others)]) for name in names], (11, 4))
    say(f"The sweep is in {folder / 'sweep.csv'} and {folder / 'sweep.png'}")


def claim(folder, config, overwrite, stand_ins=()):
    """Lock a run's folder and note its settings there; a dead process does not keep the lock.

    returns  the lock, which lasts until it is closed
    raises   InputError if another process holds it, or an unfinished run has other settings
    """
    path, fresh = folder / "config.yaml", asdict(config)
    folder.mkdir(parents=True, exist_ok=True)
    lock = open(folder / ".lock", "w")  # noqa: SIM115
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise InputError(f"another process is training in {folder}") from None
    for name in ("checkpoints", "model.tmp") if overwrite else ():
        shutil.rmtree(folder / name, ignore_errors=True)
    if overwrite and (folder / "model").exists():
        os.replace(folder / "model", folder / "model.tmp")  # half a model would count as finished
    old = yaml.safe_load(path.read_text()) if (folder / "checkpoints").exists() else {}
    changed = [f"{name} was {value}, is {fresh[name]}" for name, value in old.items()
               if name in fresh.keys() - HARMLESS and value != fresh[name]]
    if changed:
        raise InputError(f"{folder} holds an unfinished run in which {'; '.join(changed)}. Set it "
                         "back, give another output_dir, or add --overwrite.")
    notes = "".join(f"# Used as the Hub was out of reach: {name}\n" for name in stand_ins)
    write_atomically(path, lambda file: file.write_text(notes + yaml.safe_dump(fresh), "utf-8"))
    return lock


def run(configs, varied, options):
    """All runs of a sweep (mostly one), sharing model and reference where they can."""
    setup = shared = None
    for config in configs:
        folder = Path(config.output_dir)
        if (folder / "model").exists() and not (options.overwrite or options.dry_run):
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
        with claim(folder, config, options.overwrite, setup.facts["stand_ins"]):
            for name, weight in first.items():
                setup.weights[name].data.copy_(weight)
            train(setup, config, folder)
            finish(setup, config, folder)
    if varied and configs[0].eval_pairs:
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
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.simplefilter("ignore")  # the libraries' own, which no user can do anything about
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, note_signal)
    try:
        configs, varied = read_config(options.config, options.overrides)
        run([resolve_machine(config) for config in configs], varied, options)
        return 0
    except Interrupted as stop:
        say("Interrupted. The same command goes on from the last checkpoint.")
        return 128 + stop.args[0]
    except InputError as error:
        say(f"Error: {error}")
        return 2
    except (TrainingError, OSError, SafetensorError) as error:
        say(f"Stopped: {error}\nThe same command goes on from the last checkpoint, if any.")
    except (MemoryError, RuntimeError) as error:
        if type(error) is RuntimeError and "allocate memory" not in str(error):  # the CPU's words
            raise
        say("Stopped: out of memory. Lower batch_size, max_length or max_prompt_length, or set "
            "activation_checkpointing=true")
    return 1


if __name__ == "__main__":
    sys.exit(main())
