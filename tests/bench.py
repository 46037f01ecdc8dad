"""Speed and memory, against TRL on the same pairs, and how both grow.

    python tests/bench.py --model FOLDER --dataset pairs.jsonl      this project and TRL, in turn
    python tests/bench.py --model FOLDER --dataset pairs.jsonl --sweep 9    a run of a sweep of nine
    python tests/bench.py --growth                                  length, vocabulary, pairs
    python tests/bench.py --model FOLDER --dataset pairs.jsonl --data    reading many records
    python tests/bench.py --model FOLDER --dataset pairs.jsonl --sampling    drawing answers

The comparison needs `pip install trl==1.16.0`, in this environment or in the one whose interpreter
--trl-python names. Each measurement is a process of its own, the two sides take turns, and medians
are printed; a first round is not counted, since memory that a machine has not used yet is slow. A
pair's seconds hold its share of the reference pass and of the optimizer steps, not the loading; its
system seconds are those that the kernel took, on all cores. In a sweep this project computes the
reference once, and TRL in each run. The peak is a matrix product's, measured here. Run it on an
otherwise idle machine: two programs that share cores spoil each other's times.
"""

import argparse
import json
import os
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
STEP_PAIRS = 2  # batch 1, accumulation 2
# options that a side's own process is given
NUMBERS_AND_NAMES = (
    "model",
    "dataset",
    "pairs",
    "max_length",
    "dtype",
    "ids",
    "vocabulary",
    "sweep",
)


def peak_memory():
    """Bytes of memory that this process held at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def matmul_peak(dtype, size=1024, seconds=1.0):
    """Floating point operations a second of a matrix product, measured."""
    import torch

    a, best, start = torch.randn(size, size, dtype=dtype), 1e9, time.perf_counter()
    while time.perf_counter() - start < seconds:
        begin = time.perf_counter()
        a @ a
        best = min(best, time.perf_counter() - begin)
    return 2 * size**3 / best


def our_config(options):
    """The settings of the comparison."""
    from support.config import Config

    return Config(
        model=options.model,
        dataset=options.dataset,
        split=None,
        eval_pairs=0,
        shuffle=False,
        train_pairs=options.pairs,
        lr=5e-6,
        max_length=options.max_length,
        dtype=options.dtype,
        activation_checkpointing=options.checkpointing,
        device="cpu",
        sample_prompts=0,
        reference_cache=None,
    )


def measure_ours(options):
    """One epoch of this project's own loop, for each run of a sweep; figures are a run's."""
    import torch

    import train_dpo
    from support.machine import prepare_cpu

    prepare_cpu()
    config = our_config(options)
    setup = train_dpo.prepare(config)
    steps = setup.steps["train"]
    initial = {}
    if options.sweep > 1:
        initial = {name: weight.detach().clone() for name, weight in setup.weights.items()}
    start, system = time.perf_counter(), os.times().system
    for _ in range(options.sweep):
        for name, weight in initial.items():
            setup.weights[name].data.copy_(weight)
        train_dpo.round_weights(setup.policy, setup.weights)
        optimizer = train_dpo.make_optimizer(setup.weights, config)
        losses = []
        for step, group in enumerate(steps):
            rate = train_dpo.learning_rate(step, len(steps), config)
            losses.append(train_dpo.train_step(setup, config, group, optimizer, rate)["loss"])
    training = (time.perf_counter() - start) / options.sweep
    system = (os.times().system - system) / options.sweep
    seconds = training + setup.reference_seconds / options.sweep
    shape = setup.model.config.get_text_config()
    matrices = sum(p.numel() for n, p in setup.model.named_parameters() if "emb" not in n)
    flops = 0
    for members in setup.rows["train"]:
        row = setup.make_row("train", members)
        seen = sum((p + c) ** 2 / 2 + r * (p + r / 2) for p, c, r in row.segments)
        flops += 2 * matrices * len(row.input_ids)
        flops += 2 * shape.vocab_size * shape.hidden_size * len(row.targets)
        flops += 4 * seen * shape.hidden_size * shape.num_hidden_layers
    tokens = sum(pair.tokens for pair in setup.pairs["train"])
    peak = matmul_peak(getattr(torch, config.dtype))
    return {
        "seconds": seconds / len(setup.pairs["train"]),
        "system": system / len(setup.pairs["train"]),
        "memory": peak_memory(),
        "losses": losses,
        "tokens": tokens / seconds,
        "peak": (3 + 1 / options.sweep) * flops / seconds / peak,
        "reference": setup.reference_seconds,
        "threads": torch.get_num_threads(),
    }


def measure_trl(options):
    """One epoch of TRL's DPOTrainer on the token ids in options.ids."""
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    class Trainer(DPOTrainer):
        """TRL tokenises whatever it is given; these pairs are token ids already."""

        def _prepare_dataset(self, dataset, *args, **kwargs):
            return dataset

        def _precompute_ref_logps(self, *args, **kwargs):
            begin = time.perf_counter()
            result = super()._precompute_ref_logps(*args, **kwargs)
            times.append(time.perf_counter() - begin)
            return result

    class Times(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            self.begin = time.perf_counter()

        def on_step_end(self, *args, **kwargs):
            times.append(time.perf_counter() - self.begin)

    times, pairs = [], json.loads(Path(options.ids).read_text())
    config = DPOConfig(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=1,
        num_train_epochs=1,
        gradient_accumulation_steps=STEP_PAIRS,
        beta=0.1,
        learning_rate=5e-6,
        warmup_steps=0,
        lr_scheduler_type="cosine",
        weight_decay=0.01,
        max_grad_norm=1.0,
        max_length=options.max_length,
        train_sampling_strategy="sequential",
        bf16=options.dtype == "bfloat16",
        gradient_checkpointing=options.checkpointing,
        precompute_ref_log_probs=options.precompute,
        model_init_kwargs={"dtype": "float32"},
        optim="adamw_torch_fused",
        save_strategy="no",
        report_to="none",
        logging_steps=1,
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = Trainer(
        model=options.model,
        args=config,
        train_dataset=Dataset.from_list(pairs),
        processing_class=AutoTokenizer.from_pretrained(options.model),
        callbacks=[Times()],
    )
    system = os.times().system
    trainer.train()
    system = os.times().system - system
    tokens = sum(len(ids) for pair in pairs for ids in pair.values())
    return {
        "seconds": sum(times) / len(pairs),
        "system": system / len(pairs),
        "memory": peak_memory(),
        "losses": [row["loss"] for row in trainer.state.log_history if "loss" in row],
        "tokens": tokens / sum(times),
        "peak": 0.0,
    }


def measure_growth(options):
    """Seconds and memory of a forward and backward pass of random weights over one made-up pair."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from data import Pair, make_row
    from dpo_loss import sequence_logps
    from train_dpo import AnswerLogps

    torch.manual_seed(0)
    policy = AnswerLogps(
        LlamaForCausalLM(
            LlamaConfig(
                vocab_size=options.vocabulary,
                hidden_size=256,
                intermediate_size=768,
                num_hidden_layers=4,
                num_attention_heads=4,
                num_key_value_heads=4,
                max_position_embeddings=2**16,
            )
        )
    )
    policy.share_prompts(True)
    before, third = peak_memory(), options.max_length // 3
    ids = torch.randint(3, options.vocabulary, (3, third)).tolist()
    row = make_row([Pair(0, *ids)], [0])
    times = []
    for _ in range(3):
        begin = time.perf_counter()
        for _ in range(options.pairs):
            sequence_logps(policy(row), row.lengths).sum().backward()
        times.append(time.perf_counter() - begin)
    gradients = sum(parameter.grad.nbytes for parameter in policy.parameters())
    return {"seconds": min(times), "memory": peak_memory() - before - gradients}


def memory_of_process(field):
    """Bytes that this process holds (VmRSS) or held at most (VmHWM), the parent's not counted."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(rf"{field}:\s+(\d+)", status)[1]) * 1024


def measure_data(options):
    """Reading, recognition and tokenisation of the records in options.dataset, on one core.

    Seconds are the process's own, so that other programs do not count.

    pairs  of the options: how many to train on, 0 for all
    """
    import torch
    from transformers import AutoTokenizer

    import data
    from support.config import Config

    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    config = Config(
        dataset=options.dataset,
        split=None,
        eval_split=None,
        train_pairs=options.pairs,
        device="cpu",
    )
    before = memory_of_process("VmRSS")
    start = time.process_time()
    records = data.load_records(config.dataset, None, None)
    read = time.process_time() - start
    encoder = data.PairEncoder(tokenizer)
    drops = Counter()
    start = time.process_time()
    sample = data.select_pairs(records, encoder, 1000, range(len(records)), drops)
    encoded = time.process_time() - start
    count = len(records)
    seen = len(sample) + drops.total()
    del records, sample
    pairs, _ = data.load_pairs(config, tokenizer)
    steps = data.lay_out(pairs, config)
    return {
        "read": count / read,
        "seen": seen / encoded,
        "tokens": sum(pair.tokens for pair in pairs["train"]),
        "steps": len(steps["train"]),
        "before": before,
        "held": memory_of_process("VmRSS"),
        "peak": memory_of_process("VmHWM"),
    }


def measure_sampling(options):
    """Answers drawn by the project's sampler, or by transformers' generate with padding.

    One core, bfloat16, temperature 1, eight answers of at most 80 tokens to each prompt; seconds
    are the process's own.
    """
    import torch
    from transformers import GenerationConfig

    import train_dpo
    from support.config import Config
    from support.model import place_weights
    from support.sampler import Sampler

    torch.set_num_threads(1)
    settings = {"model": options.model, "dataset": options.dataset, "dtype": "bfloat16"}
    config = Config(**settings, eval_pairs=0, train_pairs=options.pairs, device="cpu")
    setup = train_dpo.load(config)
    setup.model.requires_grad_(False)
    place_weights(setup.policy, config)
    prompts = [list(pair.prompt_ids) for pair in setup.pairs["train"]]
    sampler = Sampler(setup.policy, setup.tokenizer, setup.end_of_turn, max_new_tokens=80)
    tokens = 0
    start = time.process_time()
    if not options.precompute:
        for batch in sampler.batches(prompts, 8):
            for answers in sampler.draw(prompts, batch, 8, "bench"):
                tokens += sum(len(answer.ids) for answer in answers)
        return {"tokens": tokens / (time.process_time() - start)}
    setup.policy.share_prompts(False)
    generation = GenerationConfig(
        do_sample=True,
        top_k=0,
        top_p=1.0,
        max_new_tokens=80,
        num_return_sequences=8,
        eos_token_id=setup.end_of_turn,
        pad_token_id=setup.end_of_turn,
    )
    setup.tokenizer.padding_side = "left"
    order = sorted(range(len(prompts)), key=lambda position: len(prompts[position]))
    for first in range(0, len(order), 8):
        ids = [prompts[position] for position in order[first : first + 8]]
        inputs = setup.tokenizer.pad({"input_ids": ids}, return_tensors="pt")
        found = setup.model.generate(**inputs, generation_config=generation)
        for row in found[:, inputs["input_ids"].shape[1] :].tolist():
            end = row.index(setup.end_of_turn) + 1 if setup.end_of_turn in row else len(row)
            tokens += end
    return {"tokens": tokens / (time.process_time() - start)}


def compare_sampling(options):
    """Both ways of drawing answers in turn; prints tokens a second of one core."""
    print("| side | tokens/s |\n| --- | --- |")
    found = {"this project": [], "transformers' generate": []}
    for _ in range(1 + options.repeats):
        for side, precompute in zip(found, (False, True), strict=True):
            result = run_side(options, "sampling", precompute=precompute)
            found[side].append(result["tokens"])
    for side, (_, *rates) in found.items():
        print(f"| {side} | {statistics.median(rates):.0f} |", flush=True)


def write_many(source, folder, count):
    """Files of so many records: those of a set again and again, with other texts each time."""
    from datasets import Dataset

    import data

    originals = data.load_records(source, None, None)
    records = []
    for number in range(count):
        record = dict(originals[number % len(originals)])
        for column in ("prompt", "chosen", "rejected"):
            record[column] = _changed(record[column], f" ({number})")
        records.append(record)
    paths = [Path(folder) / f"{count}.jsonl", Path(folder) / f"{count}.parquet"]
    with open(paths[0], "w", encoding="utf-8") as file:
        for record in records:
            file.write(json.dumps(record) + "\n")
    Dataset.from_list(records).to_parquet(paths[1])
    return paths


def _changed(value, added):
    if isinstance(value, str):
        return value + added
    return [{**turn, "content": turn["content"] + added} for turn in value]


def read_many(options):
    """Records a second and peak memory of 6,000 and 60,000 records, some and all of them used."""
    from support.model import load_model

    with tempfile.TemporaryDirectory() as folder:
        os.environ["HF_DATASETS_CACHE"] = folder
        load_model(our_config(options))[1].save_pretrained(Path(folder) / "tokenizer")
        print(
            "| file | records | train_pairs | read, records/s | encoded, records/s | tokens | "
            "GB before | GB held | GB at peak |\n" + "| --- " * 9 + "|"
        )
        for count in (6000, 60000):
            for path in write_many(options.dataset, folder, count):
                for wanted in (500, 0):
                    changes = {"dataset": str(path), "pairs": wanted}
                    result = run_side(options, "data", model=f"{folder}/tokenizer", **changes)
                    memory = [result[name] / 1e9 for name in ("before", "held", "peak")]
                    gigabytes = " | ".join(f"{value:.2f}" for value in memory)
                    print(
                        f"| {path.suffix} | {count} | {wanted} | {result['read']:.0f} | "
                        f"{result['seen']:.0f} | {result['tokens']} | {gigabytes} |",
                        flush=True,
                    )


def run_side(options, side, python=sys.executable, **changes):
    """Measure in a process of its own; returns what it measured."""
    with tempfile.TemporaryDirectory() as folder:
        out, values = Path(folder) / "out.json", vars(options) | changes
        command = [python, __file__, "--side", side, "--out", str(out)]
        for name in NUMBERS_AND_NAMES:
            command += [f"--{name}", str(values[name])]
        command += [f"--{name}" for name in ("checkpointing", "precompute") if values[name]]
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
        subprocess.run(
            command,
            check=True,
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        return json.loads(out.read_text())


def compare(options):
    """Both sides in turn; prints the table."""
    import data
    from support.model import load_model

    config = our_config(options)
    pairs = data.load_pairs(config, load_model(config)[1])[0]["train"]
    ids = Path(tempfile.mkdtemp()) / "ids.json"
    ids.write_text(
        json.dumps(
            [
                {
                    "prompt_ids": list(p.prompt_ids),
                    "chosen_ids": list(p.chosen_ids),
                    "rejected_ids": list(p.rejected_ids),
                }
                for p in pairs
            ]
        )
    )
    trl = {"python": options.trl_python, "ids": str(ids)}
    print(
        "| dtype | checkpointing | side | s a pair | system s | tokens/s | share of peak | "
        "peak GB | first, last loss |\n" + "| --- " * 9 + "|"
    )
    for dtype in options.dtypes.split(","):
        for checkpointing in (False, True):
            settings = {"dtype": dtype, "checkpointing": checkpointing}
            sides = {"this project": [], "TRL": [], "TRL, reference first": []}
            for counted in range(1 + options.repeats):
                sweep = options.sweep if counted else 1  # one run is enough to warm up
                sides["this project"].append(run_side(options, "ours", sweep=sweep, **settings))
                sides["TRL"].append(run_side(options, "trl", **trl, **settings))
                sides["TRL, reference first"].append(
                    run_side(options, "trl", precompute=True, **trl, **settings)
                )
            for side, (_, *runs) in sides.items():
                middle = {
                    name: statistics.median(run[name] for run in runs)
                    for name in ("seconds", "system", "tokens", "peak", "memory")
                }
                share = f"{middle['peak']:.0%}" if middle["peak"] else ""
                losses = runs[0]["losses"]
                print(
                    f"| {dtype} | {'on' if checkpointing else 'off'} | {side} | "
                    f"{middle['seconds']:.2f} | {middle['system']:.2f} | "
                    f"{middle['tokens']:.0f} | {share} | "
                    f"{middle['memory'] / 1e9:.2f} | {losses[0]:.6f}, {losses[-1]:.6f} |",
                    flush=True,
                )


def growth(options):
    """Time, and memory beyond weights and gradients, over length, vocabulary, number of pairs."""
    print(
        "| tokens a row | vocabulary | pairs | seconds | MB beyond weights and gradients |\n"
        "| --- | --- | --- | --- | --- |"
    )
    changes = [(n, 32768, 1) for n in (256, 512, 1024, 2048, 4096)]
    changes += [(1024, n, 1) for n in (65536, 131072, 262144)]
    changes += [(256, 32768, n) for n in (4, 16, 64)]
    for length, vocabulary, pairs in changes:
        result = run_side(options, "growth", max_length=length, vocabulary=vocabulary, pairs=pairs)
        print(
            f"| {length} | {vocabulary} | {pairs} | {result['seconds']:.2f} | "
            f"{result['memory'] / 1e6:.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="", help="folder of the model")
    parser.add_argument("--dataset", default="", help="preference file")
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--max_length", type=int, default=1024)
    parser.add_argument("--dtypes", default="bfloat16,float32")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--sweep", type=int, default=1, metavar="RUNS")
    parser.add_argument("--trl-python", default=sys.executable)
    parser.add_argument("--growth", action="store_true")
    parser.add_argument("--data", action="store_true")
    parser.add_argument("--sampling", action="store_true")
    for name in ("side", "out", "ids"):
        parser.add_argument(f"--{name}", default="", help=argparse.SUPPRESS)
    parser.add_argument("--dtype", default="bfloat16", help=argparse.SUPPRESS)
    parser.add_argument("--vocabulary", type=int, default=32768, help=argparse.SUPPRESS)
    for name in ("checkpointing", "precompute"):
        parser.add_argument(f"--{name}", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    sides = {
        "ours": measure_ours,
        "trl": measure_trl,
        "growth": measure_growth,
        "data": measure_data,
        "sampling": measure_sampling,
    }
    if arguments.data:
        read_many(arguments)
    elif arguments.sampling:
        compare_sampling(arguments)
    elif arguments.side:
        Path(arguments.out).write_text(json.dumps(sides[arguments.side](arguments)))
    else:
        growth(arguments) if arguments.growth else compare(arguments)
