"""Align a causal language model with Direct Preference Optimization (arXiv 2305.18290).

    python train_dpo.py --config config.yaml                        one run
    python train_dpo.py --config config.yaml beta=0.2 lr=5e-7       with other settings
    python train_dpo.py --config config.yaml "lr=[1e-7, 1e-6]"      a sweep
    python train_dpo.py --config config.yaml --dry-run              look at the data, train nothing
    torchrun --nproc-per-node=2 train_dpo.py --config config.yaml   the same on two GPUs

The method first, then what it needs:
    main          command line and config.yaml -> a Config for each run of the sweep
    run           for each run: prepare, train, finish
    train         evaluate, then for each step: rate, step, log, save, evaluate
    train_step    rows of pairs -> log-probabilities -> DPO loss -> gradients -> AdamW
    AnswerLogps   the model's pass over a row, its prompts shared by both answers
    prepare       model, pairs, rows, and the reference's log-probabilities of each pair
    run_rounds    iterative DPO: sample answers, score them, train on better against worse, again
    finish        report.md, curves.png, model/ (support/report.py)

To understand or change DPO read the top level; support/ keeps a run safe and reports it.
"""

import itertools
import math
import sys
import time
import warnings
from collections import Counter
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
import transformers
from torch import nn

import data
from dpo_loss import score, sequence_logps, token_logps
from support import dry_run, processes, report, rounds, samples, sweep
from support.attention import SHARED_PROMPT
from support.cache import logps_key, read_or_compute
from support.checkpoint import (
    check_room,
    claim,
    describe_origin,
    is_finished,
    keep_best,
    leave_finished,
    load_best,
    load_checkpoint,
    save_checkpoint,
)
from support.checks import check_model, tell_first_loss
from support.config import parse_command_line, read_config, shares_setup
from support.errors import InputError
from support.failures import Failures, advise
from support.intervals import summarize
from support.machine import matmul_peak, operations_a_token, resolve_machine
from support.model import (
    add_adapter,
    check_other,
    load_model,
    load_other,
    place_weights,
    round_weights,
)
from support.preference import answer_lengths, describe_preference
from support.processes import say
from support.reward import check_reward, try_reward
from support.run_log import RunLog
from support.sampler import greedy_answers
from support.sources import check_paths, forget_sources


@dataclass
class Setup:
    """What the runs of a sweep share; dicts by split have "train" and "eval"."""

    policy: "AnswerLogps"
    tokenizer: transformers.PreTrainedTokenizerBase
    origin: dict[str, str]  # sha256 of the models before training, without adapter, and the pairs
    pairs: dict[str, list[data.Pair]]
    drops: dict[str, Counter]  # how many records were dropped, by reason
    lengths: dict[str, torch.Tensor]  # (pairs, 2) how many tokens both answers have
    steps: dict[str, list[list[list[int]]]]  # each one's rows, each a list of positions in pairs
    end_of_turn: int  # id of the token that ends an answer
    samples: list[data.Pair]  # those whose prompts the report shows answers to
    weights: dict[str, torch.Tensor] | None = None  # trained float32 master weights: place_weights
    peak_share: float = 0.0  # of the machine's peak, by each trained token a second (MFU)
    reference: dict[str, torch.Tensor] | None = None  # (pairs, 2) log-probabilities in nats
    start: torch.Tensor | None = None  # the policy's own of "eval" before its first step
    reference_seconds: float = 0.0  # how long these two took
    first: "AnswerLogps | None" = None  # kl_model; None where no answers are sampled and scored
    answers: list[str] | None = None  # before training, to the samples' prompts

    @property
    def model(self):
        """The transformers model in the policy."""
        return self.policy.model

    @property
    def rows(self):
        """All rows by split, each a list of positions in pairs."""
        rows = {}
        for split, steps in self.steps.items():
            rows[split] = list(itertools.chain.from_iterable(steps))
        return rows

    def make_row(self, split, members):
        """Pairs at these positions as one data.Row, where the model is."""
        return data.make_row(self.pairs[split], members, self.model.device)


def main(arguments=None):
    """The command line; returns the exit code."""
    sys.stdout.reconfigure(line_buffering=True)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.simplefilter("ignore")  # the libraries' own, which no user can do anything about
    try:
        options = parse_command_line(__doc__, arguments)
        processes.start()
        configs, varied = read_config(options.config, options.overrides)
        return run([resolve_machine(config) for config in configs], varied, options)
    except processes.Interrupted as stop:
        say("Interrupted. The same command goes on from the last checkpoint (without --overwrite).")
        return 128 + stop.number
    except InputError as error:
        say(f"Error: {error}")
        return 2
    except Exception as error:
        advice = advise(error)
        if advice is None:
            raise
        say(f"Stopped: {advice}.", from_all=True)
        return 1


def run(configs, varied, options):
    """All runs of a sweep (mostly one), sharing model and reference; returns the exit code."""
    prepared_for = None
    failures = Failures(sweep=len(configs) > 1 and not options.dry_run)
    for config in configs:
        folder = Path(config.output_dir)
        with failures.noted(config):
            if config.rounds and not options.dry_run:
                setup = prepared_for = None
                forget_sources()
                run_rounds(config, configs, options)
                continue
            if not options.dry_run and is_finished(folder, config, options.overwrite):
                leave_finished(folder)
                continue
            if not shares_setup(config, prepared_for):
                setup = prepared_for = None  # frees the old model before the next one loads
                if varied:
                    forget_sources()
                setup = prepare(config, options.dry_run)
                initial = {name: w.detach().clone() for name, w in setup.weights.items() if varied}
            if options.dry_run:
                dry_run.estimate(setup, config)
                prepared_for = config
                continue
            prepared_for = None  # a run that fails in the middle leaves its setup to no other
            rounds.begin_anew_once(configs, options)
            with claim(folder, config), processes.finish_step_first():
                # every run of a sweep starts from the same weights
                for name, weight in initial.items():
                    setup.weights[name].data.copy_(weight)
                train(setup, config, folder)
                report.finish(setup, config, folder)
            prepared_for = config
    if varied and not options.dry_run:
        sweep.summarize_sweep(configs, varied, failed=failures.reasons)
    return failures.summarize()


def run_rounds(config, configs, options):
    """Iterative DPO: rounds of runs, each on the model's own answers to prompts.

    In each the model as it is answers, a reward tells which of its answers are better, and it is
    trained on these against the worse (support/rounds.py). All runs of the sweep have `configs`.
    """
    for number in range(1, config.rounds + 1):
        processes.stop_if_signalled()
        one = rounds.config_of(config, number)
        setup = None
        if rounds.lacks_pairs(config, number, options.overwrite):
            setup = load(rounds.config_to_sample(config, number))
            setup.model.requires_grad_(False)
            place_weights(setup.policy, config)
        rounds.begin_anew_once(configs, options)
        with claim(Path(config.output_dir), config):
            if setup is not None:
                with claim(Path(one.output_dir), one):
                    rounds.make_pairs(setup, config, number)
                setup = None  # frees the model before it is loaded to be trained
            run([one], [], SimpleNamespace(dry_run=False, overwrite=False))
            rounds.summarize(config, number)


def train(setup, config, folder):
    """Train one run to its end, from its newest checkpoint if it has one; fills metrics.jsonl.

    raises   FloatingPointError; InputError if the model or the pairs are not those it began with;
             OSError or SafetensorError, as on a full disk; processes.Interrupted after a checkpoint
    """
    optimizer = make_optimizer(setup.weights, config)
    order = data.order_steps(setup.steps["train"], config)
    total = len(order)
    checkpoints = folder / "checkpoints"
    done = load_checkpoint(checkpoints, setup.weights, optimizer, setup.origin)
    # the policy computes with what was loaded, or with where this run of a sweep begins
    round_weights(setup.policy, setup.weights)
    skipped_in_a_row = 0
    tell_first_loss(config)

    with RunLog(folder, config, order, done, setup.reference_seconds, setup.peak_share) as log:
        # a kill may have come between a checkpoint and the evaluation after it
        if evaluation_due(setup, config, done, total) and done not in log.losses:
            evaluate(setup, config, log, done)
        for step, rows in enumerate(order[done:], done + 1):
            lr = learning_rate(step - 1, total, config)
            # lora_dropout draws from a generator seeded by the step, so there is no state to save
            torch.manual_seed(config.seed + step)
            began = time.time()
            figures = train_step(setup, config, rows, optimizer, lr)
            log.log_step(step, figures, time.time() - began)

            skipped_in_a_row = skipped_in_a_row + 1 if "skipped" in figures else 0
            if skipped_in_a_row == 3:
                raise FloatingPointError("not finite three times running: lower lr or use float32")

            evaluation = evaluation_due(setup, config, step, total)
            # a reward, which is a user's, may fail in an evaluation
            before_a_reward = evaluation and setup.first is not None
            saving = step == total or is_due(step, config.save_every) or before_a_reward
            # no checkpoint amid skipped steps unless asked to stop: a resumed run counts them anew
            due = skipped_in_a_row == 0 and saving
            if due:
                save_checkpoint(checkpoints, setup.weights, optimizer, step, setup.origin)
            if evaluation and not processes.stop_requested(config.device):
                evaluate(setup, config, log, step)
            stop = processes.stop_requested(config.device)
            if stop and not due:
                save_checkpoint(checkpoints, setup.weights, optimizer, step, setup.origin)
            if stop or due:
                report.draw_curves(folder)
            if stop:
                processes.stop()
    if config.keep == "best":
        load_best(checkpoints, setup.weights, log.losses)
        round_weights(setup.policy, setup.weights)


def is_due(step, every):
    """Whether something that is done every so many steps is; 0 is never."""
    return every > 0 and step % every == 0


def evaluation_due(setup, config, step, total):
    """Whether the evaluation pairs are scored after step 0, the last, or every eval_every."""
    if not setup.pairs["eval"]:
        return False
    return step in (0, total) or is_due(step, config.eval_every)


def train_step(setup, config, rows, optimizer, lr):
    """One optimizer step over some rows of pairs; skipped if loss or gradient is not finite.

    Gradients add up in setup.weights, the float32 master weights, where a hook of place_weights
    puts them; a row at a time, so that memory holds one row's activations. round_weights copies the
    updated weights into the model. A row's share is 1, or 0 where another process counts it.

    returns  the step's metrics: means over its pairs, gradient norm before clipping, lr, tokens,
             and `skipped`, the records of a step that was
    """
    positions = list(itertools.chain.from_iterable(rows))
    reference = setup.reference["train"]
    lengths = setup.lengths["train"]
    logps = torch.zeros(len(positions), 2, device=config.device)
    setup.model.train()
    for members, share in processes.share_rows(rows):
        row = setup.make_row("train", members)
        row_logps = sequence_logps(setup.policy(row), row.lengths)
        row_logps = row_logps.view(-1, 2)  # chosen, rejected
        losses, _ = score(row_logps, reference[members], lengths[members], config)
        # the mean over the step's pairs; FSDP2 averages gradients over processes
        (losses.sum() * (share * processes.WORLD / len(positions))).backward()
        in_step = [positions.index(position) for position in members]
        logps[in_step] += share * row_logps.detach()
    setup.model.eval()  # train mode is for activation checkpointing and lora_dropout alone

    norm = nn.utils.clip_grad_norm_(setup.weights.values(), config.max_grad_norm or math.inf)
    logps = processes.sum_over_processes(logps)
    # figures of the whole step: the losses above were a row's, and this process's alone
    _, metrics = score(logps, reference[positions], lengths[positions], config)
    figures = summarize(metrics)
    figures["grad_norm"] = processes.whole(norm).item()
    figures["lr"] = lr
    figures["tokens"] = sum(setup.pairs["train"][position].tokens for position in positions)

    # one bad step would leave nan in weights and moments for good
    if math.isfinite(figures["grad_norm"]) and math.isfinite(figures["loss"]):
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
    else:
        figures["skipped"] = [setup.pairs["train"][position].index for position in positions]
    optimizer.zero_grad()
    round_weights(setup.policy, setup.weights)
    return figures


def evaluate(setup, config, log, step):
    """Log the metrics of the evaluation pairs after a step, 0 for before training."""
    logps = compute_logps(setup, "eval", config, "evaluation") if step else setup.start
    reference, lengths = setup.reference["eval"], setup.lengths["eval"]
    _, before = score(setup.start, reference, lengths, config)
    _, metrics = score(logps, reference, lengths, config)
    prompts = [pair.prompt for pair in setup.pairs["eval"]]
    figures = summarize(metrics, before, prompts)
    if setup.first is not None:
        measured = samples.measure(setup, config, log.folder, step, data.lay_out, compute_logps)
        after, earlier, of_all = measured
        figures |= summarize(after, earlier, prompts) | of_all
    if config.keep == "best":  # before the row, so that no row is without its weights
        losses = log.losses | {step: figures["loss"]}
        keep_best(log.folder / "checkpoints", setup.weights, step, losses)
    log.log_evaluation(step, figures)


def learning_rate(step, total, config):
    """The rate of optimizer step `step` (from 0): linear warmup, then lr_schedule until `total`."""
    warmup = round(config.warmup_ratio * total)
    if step < warmup:
        return config.lr * (step + 1) / (warmup + 1)
    if config.lr_schedule == "constant":
        return config.lr
    done = (step - warmup) / (total - warmup)
    if config.lr_schedule == "linear":
        return config.lr * (1 - done)
    return config.lr * (1 + math.cos(math.pi * done)) / 2


def make_optimizer(weights, config):
    """AdamW; weight decay on matrices only, not on biases and norms."""
    matrices = []
    vectors = []
    for weight in weights.values():
        if weight.ndim > 1:
            matrices.append(weight)
        else:
            vectors.append(weight)
    groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.lr, weight_decay=config.weight_decay, fused=True)


class AnswerLogps(nn.Module):
    """The log-probability of each answer token of a data.Row under a causal language model.

    Each answer is a sequence of its own, until choose_layout (support/checks.py) finds that a row
    as it is gives the same, and calls share_prompts(True).
    """

    def __init__(self, model):
        super().__init__()
        self.model = model
        self.native_attention = model.config._attn_implementation
        self.shared = False
        self.takes_kv_cache = False  # whether check_cache found one right (support/kv_cache.py)

    def share_prompts(self, shared):
        """Choose whether a row runs as it is; this sets the model's attention to match."""
        self.shared = shared
        attention = SHARED_PROMPT if shared else self.native_attention
        self.model.set_attn_implementation(attention)

    def forward(self, row, temperature=1.0):
        """(n,) float32: log-probabilities of row.targets in nats, of logits / temperature."""
        if self.shared:
            return self.forward_shared(row, temperature)
        return self.forward_separate(row, temperature)

    def forward_separate(self, row, temperature):
        """Prompt and answer, each answer through the model's own forward: right for any model."""
        parts = row.input_ids.split([length for segment in row.segments for length in segment])
        logps = []
        for prompt, *answers in zip(parts[::3], parts[1::3], parts[2::3], strict=True):
            for answer in answers:
                ids = torch.cat((prompt, answer))
                logits = self.model(input_ids=ids[None], use_cache=False).logits[0]
                # the logits at position t predict token t + 1
                logits = logits[len(prompt) - 1 : -1].float() / temperature
                logps.append(logits.log_softmax(1).gather(1, answer[:, None]).squeeze(1))
        return torch.cat(logps)

    def forward_shared(self, row, temperature):
        """All pairs of the row in one pass, each prompt computed once for both answers."""
        position_ids = row.position_ids[None]
        hidden = self.hidden_states(row.input_ids[None], position_ids, segments=row.segments)
        # choose_layout has seen that the head is no more than these weights
        head = self.model.get_output_embeddings()
        return token_logps(hidden[0, row.predictors] / temperature, head.weight, row.targets)

    def hidden_states(self, input_ids, position_ids, **attention):
        """(b, t, d): the body's last; `attention` is what shared_prompt_attention is given."""
        inputs = {"input_ids": input_ids, "position_ids": position_ids, "use_cache": False}
        return self.model.base_model(**inputs, **attention).last_hidden_state

    def next_logits(self, input_ids, position_ids, kv_cache, places):
        """(b, v): what follows the token at each row's place, with the KVCache of earlier ones."""
        hidden = self.hidden_states(input_ids, position_ids, kv_cache=kv_cache)
        rows = torch.arange(len(places), device=places.device)
        return nn.functional.linear(hidden[rows, places], self.model.get_output_embeddings().weight)

    def generate(self, *arguments, **options):
        """The model's own generate, here so that FSDP2 gathers the weights for it."""
        return self.model.generate(*arguments, **options)


@torch.no_grad()
def compute_logps(setup, split, config, title, temperature=1.0):
    """log pi(y|x) of all pairs of a split under the policy as it is now.

    title        what the progress is called
    temperature  divides the logits, where answers sampled at that temperature are scored
    returns      (pairs, 2) float32: chosen, rejected, in nats
    """
    # Evaluation pairs see the float32 weights that a run saves. Where this stays empty, the policy
    # computes with its own, rounded ones, as in the steps; several processes gather no others.
    float32_weights = {}
    if split == "eval" and processes.WORLD == 1:
        float32_weights = {f"model.{name}": weight for name, weight in setup.weights.items()}
    logps = torch.zeros(len(setup.pairs[split]), 2, device=config.device)
    with processes.progress(f"{title}, {split}", len(logps)) as bar:
        for members, share in processes.share_rows(setup.rows[split]):
            row = setup.make_row(split, members)
            tokens = torch.func.functional_call(setup.policy, float32_weights, (row, temperature))
            answers = sequence_logps(tokens, row.lengths)
            logps[members] += share * answers.view(-1, 2).float()
            bar.update(len(members) * processes.WORLD)
    return processes.sum_over_processes(logps)


def reference_logps(setup, config, splits=("train", "eval")):
    """The reference's log-probabilities of all pairs, from the cache where they are in it.

    The reference is mostly the policy before its first step: computed with it, in the rows and the
    numerics of training, the first loss is exactly ln 2, and no second model takes memory.

    returns  split -> (pairs, 2) float32 in nats
    """

    def compute():
        return {split: compute_logps(setup, split, config, "reference") for split in splits}

    key = logps_key(config, setup, splits)
    title = "Reference log-probabilities"
    found = read_or_compute(title, config.reference_cache, key, compute, config.device)
    return {split: logps.to(config.device) for split, logps in found.items()}


def other_reference(setup, config):
    """reference_logps of reference_model, which is loaded for it, and freed before training."""
    policy = other_policy(setup, config, "reference_model")
    origin = {"model": setup.origin["reference model"]}
    policy.model.requires_grad_(config.lora_r == 0)  # its weights are the policy's, to be evaluated
    weights = place_weights(policy, config)
    return reference_logps(replace(setup, policy=policy, weights=weights, origin=origin), config)


def other_policy(setup, config, setting):
    """The model of a setting, reference_model or kl_model, where the pairs are right for it."""
    policy = AnswerLogps(load_other(config, setting, setup.tokenizer))
    check_model(policy, setup.pairs["train"] + setup.pairs["eval"], data.make_row, config)
    if getattr(config, setting):
        setup.origin |= describe_origin(config, {setting.replace("_", " "): policy.model})
    return policy


def load(config, dry=False):
    """Load model and pairs, and lay out rows: a Setup without weights to train, and reference.

    dry      show what the data are
    raises   InputError
    """
    check_paths(config)
    check_reward(config)
    model, tokenizer = load_model(config)
    for setting in ("reference_model", "kl_model"):
        check_other(config, setting, tokenizer)
    look = partial(dry_run.look, tokenizer=tokenizer) if dry else None
    pairs, drops = data.load_pairs(config, tokenizer, look)
    try_reward(config, pairs["eval"][:1])
    policy = AnswerLogps(model)
    check_model(policy, pairs["train"] + pairs["eval"], data.make_row, config)
    return Setup(
        policy=policy,
        tokenizer=tokenizer,
        origin=describe_origin(config, {"model": model}, pairs),
        pairs=pairs,
        drops=drops,
        lengths=answer_lengths(pairs, config.device),
        steps=data.lay_out(pairs, config),
        end_of_turn=data.PairEncoder(tokenizer).end_of_turn,
        samples=(pairs["eval"] or pairs["train"])[: config.sample_prompts],
    )


def prepare(config, dry=False):
    """All that a run needs before its first step, the reference's log-probabilities included.

    dry      without the reference, its answers, and the check of what can be written
    returns  Setup
    raises   InputError
    """
    setup = load(config, dry)
    policy, model, pairs = setup.policy, setup.model, setup.pairs
    if config.lora_r:
        add_adapter(model, config)
    if config.activation_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    if not dry:
        check_room(config, model)
    say("\n".join(report.describe_pairs(pairs, setup.drops, config)))
    began = time.time()
    if config.reference_model and not dry:
        # before the policy takes the device's memory
        setup.reference = other_reference(setup, config)
    setup.weights = place_weights(policy, config)
    setup.peak_share = operations_a_token(model, setup.weights) / matmul_peak(config)
    if not dry:
        own = reference_logps(setup, config, ["eval"] if setup.reference else ["train", "eval"])
        setup.start = own["eval"]
        setup.reference = setup.reference or own
        setup.reference_seconds = time.time() - began
        say("\n".join(describe_preference(setup.reference, setup.lengths)))
        setup.answers = greedy_answers(setup, config)
        if config.reward and config.eval_samples and pairs["eval"]:
            setup.first = other_policy(setup, config, "kl_model")
            setup.first.model.requires_grad_(False)
            place_weights(setup.first, config)
    return setup


if __name__ == "__main__":
    processes.leave(main())
