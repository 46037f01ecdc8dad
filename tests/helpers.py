"""What several files of tests use: tiny models and tokenizers, made-up records, a run's figures."""

import functools
import io
import json
import math
import random
from pathlib import Path
from types import SimpleNamespace

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

import data
import train_dpo
from data import Pair, PairEncoder
from support import report

ROOT = Path(__file__).parent.parent
CONFIG = str(ROOT / "config.yaml")
METRICS = (
    "loss",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "rewards/accuracies",
    "logps/chosen",
    "logps/rejected",
    "nll/chosen",
)
TIMED = ("seconds", "tokens_per_second", "peak_share")

# Tiny models and tokenizers

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
DANUBE = (
    "{% for m in messages %}{% if m.role == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "{{ ('<|prompt|>' if m.role == 'user' else '<|answer|>') + m.content + '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}<|answer|>{% endif %}"
)
SPECIALS = ["<s>", "</s>", "<pad>", "<|im_start|>", "<|im_end|>", "<|prompt|>", "<|answer|>"]
# in the names of several families; each ignores those of the others
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "ffn_dim": 48,
    "word_embed_proj_dim": 32,
    "dropout": 0.0,
    "attn_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "resid_pdrop": 0.0,
}


@functools.cache
def build_tokenizer(template=CHATML, eos="<|im_end|>", pad="<pad>", bos=None):
    """A byte-level tokenizer that decodes to exactly what was encoded; it adds the BOS, if any."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=alphabet, special_tokens=SPECIALS, show_progress=False
    )
    backend.train_from_iterator(["user assistant system", "the answer to the question"], trainer)
    if bos:
        number = backend.token_to_id(bos)
        backend.post_processor = TemplateProcessing(f"{bos} $A", special_tokens=[(bos, number)])
    names = {"eos_token": eos, "pad_token": pad, "bos_token": bos}
    names = {name: token for name, token in names.items() if token}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **names)
    tokenizer.chat_template = template
    return tokenizer


def build_model(family, vocab_size=300, seed=0, **changes):
    """A tiny random model of a family, in train mode, whose every weight matters."""
    config = AutoConfig.for_model(family, **{**SIZES, "vocab_size": vocab_size, **changes})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).train()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            noise = torch.randn(weight.shape, generator=generator)
            weight.copy_(0.2 * noise if weight.ndim > 1 else weight + 0.1 * noise)
    return model


def write_model(folder, family="llama", tokenizer=None, ends=None, **changes):
    """A folder with a tiny model and its chat tokenizer; returns its path as text.

    ends  token ids that end its answers, beside the template's
    """
    tokenizer = tokenizer or build_tokenizer()
    model = build_model(family, len(tokenizer), **changes)
    if ends:
        model.generation_config.eos_token_id = ends
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def write_adapter(folder, base, **changes):
    """A folder with a tiny Llama's adapter of random matrices that names this base; needs peft."""
    from peft import LoraConfig, get_peft_model

    settings = {"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
    torch.manual_seed(3)
    lora = LoraConfig(**settings | changes, init_lora_weights=False)
    model = get_peft_model(build_model("llama", len(build_tokenizer())), lora)
    model.peft_config["default"].base_model_name_or_path = base
    model.save_pretrained(folder, save_embedding_layers=False)
    return str(folder)


def generation_ends(model):
    """The token ids at which a model's generation ends."""
    ends = model.generation_config.eos_token_id
    return ends if isinstance(ends, list) else [ends]


def plain_logps(model, prompt_ids, answer_ids):
    """Answer tokens' log-probabilities by the model's own forward over one sequence."""
    logits = model(input_ids=torch.tensor([prompt_ids + answer_ids]), use_cache=False).logits[0]
    logps = logits.float().log_softmax(1)[len(prompt_ids) - 1 : -1]
    return logps.gather(1, torch.tensor(answer_ids)[:, None]).squeeze(1)


def plain_row_logps(model, pairs):
    """The same of both answers to each pair, one after the other."""
    logps = []
    for pair in pairs:
        for answer in (pair.chosen_ids, pair.rejected_ids):
            logps.append(plain_logps(model, pair.prompt_ids, answer))
    return torch.cat(logps)


def normal(*shape, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


# Pairs, records and files of them


def random_pair(*lengths, seed=0):
    """A pair whose prompt and two answers have these lengths."""
    draw = random.Random(seed)
    return Pair(0, *([draw.randrange(3, 300) for _ in range(length)] for length in lengths))


PAIRS = [random_pair(7, 5, 9, seed=1), random_pair(12, 8, 1, seed=2), random_pair(1, 3, 4, seed=3)]
WORDS = ["river", "stone", "light", "green", "quick", "north", "table", "seven", "paper"]


def records(count=24, start=0):
    """So many records of random sentences; every third is of the split test_prefs."""
    for i in range(start, start + count):
        draw = random.Random(i)
        sentence = functools.partial(random_sentence, draw)
        yield {
            "prompt": f"{i} {sentence(5)}?",
            "chosen": sentence(7) + ".",
            "rejected": sentence(9),
            "split": "test_prefs" if i % 3 == 2 else "train_prefs",
        }


def random_sentence(draw, most):
    return " ".join(draw.choices(WORDS, k=draw.randint(1, most)))


def record(prompt="Q", chosen="good", rejected="bad", **more):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, **more}


def many(count, name="Q"):
    return [record(f"{name} {i}", f"good {i}", f"bad {i}") for i in range(count)]


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


def chatml(messages):
    """How the tiny tokenizer renders messages."""
    turns = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages)
    return turns + "<|im_start|>assistant\n"


def write_jsonl(path, records):
    path.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    return str(path)


def encoder(tokenizer=None, **limits):
    """An encoder that cuts nothing, unless limits say so."""
    limits = {"max_length": 10**9, "max_prompt_length": 10**9, **limits}
    return PairEncoder(tokenizer or build_tokenizer(), **limits)


def text(ids, tokenizer=None):
    return (tokenizer or build_tokenizer()).decode(ids, clean_up_tokenization_spaces=False)


def data_config(dataset, **changes):
    """The settings that concern data."""
    settings = {
        "dataset": dataset,
        "split": "train_prefs",
        "eval_dataset": None,
        "eval_split": "test_prefs",
        "train_pairs": 0,
        "eval_pairs": 0,
        "shuffle": True,
        "seed": 1,
        "max_length": 1024,
        "max_prompt_length": 512,
        "keep_ties": False,
        "columns": None,
        "reward": None,
        "rounds": 0,
        "offline": {},
    }
    return SimpleNamespace(**{**settings, **changes})


def load_pairs(config):
    """Training and evaluation pairs, and the drops."""
    pairs, drops = data.load_pairs(config, build_tokenizer())
    return pairs["train"], pairs["eval"], drops


# What a run leaves


class Output(io.TextIOWrapper):
    """A standard output that keeps what is printed."""

    def __init__(self):
        super().__init__(io.BytesIO(), encoding="utf-8")

    def getvalue(self):
        self.flush()
        return self.buffer.getvalue().decode()


def read_metrics(folder="out", split=None, timed=False):
    """The rows of a run's metrics.jsonl, without what depends on the clock."""
    rows = []
    for line in (Path(folder) / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        if split in (None, row["split"]):
            rows.append({k: v for k, v in row.items() if timed or k not in TIMED})
    return rows


def weights_bytes(folder="out"):
    return (Path(folder) / "model" / "model.safetensors").read_bytes()


def make_quick(monkeypatch):
    """Let runs neither measure the machine nor draw their curves."""
    monkeypatch.setattr(train_dpo, "matmul_peak", lambda config: 1e12)
    monkeypatch.setattr(report, "draw_curves", lambda folder: None)


# Figures that no run has left


def held_out(pairs=100, half_width=0.02, **after):
    """Two evaluations: before, and after with other figures; an interval is the same for each."""
    before = {"loss": math.log(2), "rewards/margins": 0.0, "rewards/accuracies": 0.5}
    rows = []
    for step, figures in enumerate([before, before | after]):
        row = {"step": step, "split": "eval", "pairs": pairs, **figures}
        for name in figures:
            row[f"{name}/ci95"] = half_width
        rows.append(row)
    return rows


BETTER = {"loss": 0.6, "rewards/margins": 0.2, "rewards/accuracies": 0.7}
WORSE = {"loss": 0.9, "rewards/margins": -0.2, "rewards/accuracies": 0.3}
UNFINITE = {"loss": None, "rewards/margins": None, "rewards/accuracies": None}


def figures_of(accuracy, loss, margin):
    return {"rewards/accuracies": accuracy, "loss": loss, "rewards/margins": margin}
