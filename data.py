"""Any preference set in; token ids, rows and optimizer steps out. Knows no model but its tokenizer.

load_records -> to_messages -> PairEncoder.encode -> select_pairs -> group_into_steps -> make_row

How files and the Hub are read is in support/sources.py.
"""

import json
import random
import re
from array import array
from collections import Counter
from dataclasses import dataclass
from functools import partial
from itertools import islice

import torch
from jinja2 import TemplateError

from support.errors import InputError, first_line, shorten
from support.processes import say
from support.sources import MissingSplit, Sets, open_source, read_records, split_names
from support.template import compare_template

# Columns by name. A new name goes into one of these three, a new structure into SHAPES below.
PROMPTS = ("prompt", "instruction", "question")
ANSWERS = (("chosen", "rejected"), ("chosen_response", "rejected_response"))
SCORES = ("score_{}", "{}_avg_rating", "{}_rating", "{}-rating")  # {} is chosen or rejected
LIST_AS_TEXT = re.compile(r"""\s*\[\s*\{\s*["'](role|content)["']\s*:""")
ACCEPTED_COLUMNS = r"""Accepted are these columns, with any others beside them:
  prompt, chosen, rejected                           strings, or lists of {role, content}
  chosen, rejected                                   lists of {role, content} with the prompt
  chosen, rejected                                   "\n\nHuman: ...\n\nAssistant: ..."
  instruction, chosen_response, rejected_response    strings
  system, question, chosen, rejected                 strings
Scores are in score_chosen, chosen_rating, chosen-rating or chosen_avg_rating, if anywhere."""


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
    prompt_ids: array  # of int32
    chosen_ids: array
    rejected_ids: array
    prompt: str = ""  # the prompt's messages as JSON
    cut: bool = False  # whether the prompt or an answer lost tokens to a limit
    reversed: bool = False  # whether the chosen answer has the lower score
    shape: str = ""  # what its record was recognised as
    unused: tuple[str, ...] = ()  # the record's columns that are filled and were not used

    @property
    def tokens(self):
        """Tokens of its row: the prompt counts once."""
        return len(self.prompt_ids) + len(self.chosen_ids) + len(self.rejected_ids)

    @property
    def length(self):
        """Tokens of its longer sequence: prompt and answer."""
        return len(self.prompt_ids) + max(len(self.chosen_ids), len(self.rejected_ids))


@dataclass(frozen=True)
class Row:
    """Pairs laid out as [prompt | chosen | rejected | prompt | ...], without padding.

    pairs                    the pairs' positions in the list that they were taken from
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


def load_pairs(config, tokenizer, look=None):
    """Training and evaluation pairs as the config asks for them; no prompt stands in both.

    look     called with Sets and the pairs of them; once more where evaluation has Sets of its own
    returns  {"train": list of Pair, "eval": list of Pair} and {"train": Counter, "eval": Counter}
             of drops
    raises   InputError if no pair is left to train or to evaluate on, with the counts by reason
    """
    encoder = PairEncoder(tokenizer, config.max_length, config.max_prompt_length, config.keep_ties)
    drops = {"train": Counter(), "eval": Counter()}
    records = load_records(config.dataset, config.split, config.offline)
    order = visiting_order(len(records), config.shuffle, config.seed)

    # evaluation pairs first, for their prompts are not trained on
    held_out = []
    eval_records = records
    if config.eval_pairs:
        eval_records, eval_order, wanted = _evaluation_records(config, records, order)
        held_out = select_pairs(eval_records, encoder, wanted, eval_order, drops["eval"])
    if eval_records is records:
        taken = {pair.index for pair in held_out}
        order = [index for index in order if index not in taken]
    prompts = {pair.prompt for pair in held_out}
    wanted = config.train_pairs
    train = select_pairs(records, encoder, wanted, order, drops["train"], without=prompts)

    if not train:
        raise _no_usable_pair(config.dataset, records, drops["train"])
    if config.eval_pairs and not held_out:
        eval_source = config.eval_dataset or config.dataset
        raise _no_usable_pair(eval_source, eval_records, drops["eval"])
    pairs = {"train": train, "eval": held_out}
    if len(train) == wanted < len(order):
        number = f"{wanted:,} of {len(records):,} records"
        say(f"train_pairs={wanted}: {number} are trained on; train_pairs=0 takes all")
    _say_what_is_odd(pairs, encoder, records)
    if look is not None and eval_records is records:
        look(records, train + held_out)
    elif look is not None:
        look(records, train)
        look(eval_records, held_out)
    return pairs, drops


def _say_what_is_odd(pairs, encoder, records):
    """Say loudly what a set or a template has that its owner may not know of."""
    for split, part in pairs.items():
        turned = sum(pair.reversed for pair in part)
        if turned:
            count = f"{turned} of {len(part)} {split} pairs"
            say(f"!!! {count} score the rejected answer above the chosen one; used as they are !!!")
    messages, chosen, *_ = to_messages(records[pairs["train"][0].index])
    warning = compare_template(encoder, messages, chosen)
    if warning:
        say(f"!!! {warning} !!!")


def _evaluation_records(config, records, order):
    """Where evaluation pairs come from: a set or a split of their own, or the training records.

    records, order  the training set's, and the order in which training takes them
    returns         records, the order in which to take them, and how many pairs are wanted
    """
    if config.eval_dataset or config.eval_split:
        own_split = not config.eval_dataset
        source = config.eval_dataset or config.dataset
        found = load_records(source, config.eval_split, config.offline, evaluation=own_split)
        if len(found) or not own_split:
            eval_order = visiting_order(len(found), config.shuffle, config.seed)
            return found, eval_order, config.eval_pairs
    # held out from the end of the training order, a fifth of it at the most
    a_fifth = max(1, len(order) // 5)
    return records, order[::-1], min(config.eval_pairs, a_fifth)


def _no_usable_pair(source, records, drops):
    """The error for a set of which no record is left, with the reasons and what would be right."""
    lines = [f"dataset {source}: no usable pair in {drops.total()} records."]
    for reason, number in drops.most_common(10):
        lines.append(f"  {number:6d}  {reason}")
    if drops["no room for an answer"]:
        lines.append("max_length holds prompt and answer: set it well above max_prompt_length")
    if len(records) and not drops:
        lines.append("All are held out for evaluation: set eval_pairs=0, or give more records")
    for index in range(len(records)):
        try:
            to_messages(records[index])
        except Drop as reason:
            lines += [f"Record {index}: {reason}", *shorten(records[index]), ACCEPTED_COLUMNS]
            break
    return InputError("\n".join(lines))


def load_records(source, split, stand_ins, evaluation=False):
    """Records of one or several sets: "name", "name:split" or "a:split, b:split".

    split       the split of every name that gives none
    stand_ins   as in open_source
    evaluation  take `split` of every name that has it, once, and skip the others
    returns     Sets, or nothing where no name has the split
    """
    sets = {}
    for name, own_split in split_names(source):
        wanted = split
        if own_split and not evaluation:
            wanted = own_split
        label = f"{name}:{wanted}" if wanted else name
        if label in sets:
            continue
        must_have_it = evaluation or own_split is not None
        read = partial(read_records, split=wanted, required=must_have_it)
        try:
            sets[label] = open_source(name, "dataset", stand_ins, read)
        except MissingSplit:
            if not evaluation:
                raise
    return Sets(sets) if sets else []


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


def to_messages(record):
    """One record as (messages of the prompt, chosen, rejected, scores).

    returns  list of {"role", "content"} that ends with the user's turn, two strings, and the pair
             of scores or None
    raises   Drop with the reason if the record is of none of the SHAPES (see ACCEPTED_COLUMNS)
    """
    drop_if(not isinstance(record, dict), f"not a record but {type(record).__name__}")
    dialogues = _dialogues(record)
    for column, dialogue in dialogues.items():
        ended = len(dialogue) > 1 and dialogue[-1]["role"] == "assistant"
        drop_if(
            not ended, f"malformed: no prompt before {column}, or no assistant's turn at its end"
        )
    (*messages, chosen), (*others, rejected) = dialogues.values()
    same = messages == others
    drop_if(not same, f"malformed: {' and '.join(dialogues)} differ before the last answer")
    asked = messages[-1]["role"] == "user" and messages[-1]["content"].strip()
    drop_if(not asked, "malformed: the prompt does not end with a user's turn")
    return messages, chosen["content"], rejected["content"], _scores(record)


def _dialogues(record):
    """The dialogues of a record's answer columns, {column: turns}, by the first shape that fits."""
    for columns in ANSWERS:
        if record.keys() >= set(columns):
            break
    else:
        raise Drop(f"unknown columns: {sorted(map(str, record))}"[:200])
    asked = _first_filled(record, PROMPTS)
    filled = [column for column in ("system", asked) if record.get(column)]
    for column in [*filled, *columns]:
        fault = f"malformed: {column} is neither text nor a list of {{role, content}}"
        drop_if(not _is_dialogue(record[column]), fault)
        if isinstance(record[column], str):
            as_text = LIST_AS_TEXT.match(record[column])
            drop_if(as_text, f"malformed: {column} is a list that is stored as text")
    system = _turns(record.get("system") or [], "system")
    answers = [record[column] for column in columns]
    for shape in SHAPES:
        dialogues = shape(system, record.get(asked), answers)
        if dialogues is not None:
            return dict(zip(columns, dialogues, strict=True))


def answers_to_a_prompt(system, prompt, answers):
    """{"prompt": "Name a fruit.", "chosen": "An apple.", "rejected": "No."}"""
    if not prompt:
        return None
    asked = _turns(prompt, "user")
    return [_join(system, asked, _turns(answer)) for answer in answers]


def transcripts(system, prompt, answers):
    r"""{"chosen": "\n\nHuman: Name a fruit.\n\nAssistant: An apple.", "rejected": ...}"""
    if not any(isinstance(answer, str) for answer in answers):
        return None
    dialogues = []
    for answer in answers:
        turns = _split_transcript(answer) if isinstance(answer, str) else _turns(answer)
        dialogues.append(_join(system, [], turns))
    return dialogues


def whole_dialogues(system, prompt, answers):
    """{"chosen": [{"role": "user", ...}, {"role": "assistant", ...}], "rejected": [...]}"""
    return [_join(system, [], _turns(answer)) for answer in answers]


SHAPES = (answers_to_a_prompt, transcripts, whole_dialogues)  # in this order; the last takes all


def _first_filled(record, columns):
    """The first of some columns that has a value, or None."""
    for column in columns:
        if record.get(column):
            return column
    return None


def _is_dialogue(value):
    """Whether a value is text, or a list of {role, content}."""
    if isinstance(value, str):
        return True
    if not isinstance(value, list):
        return False
    for turn in value:
        if not isinstance(turn, dict) or not isinstance(turn.get("content"), str):
            return False
        if turn.get("role") not in ("system", "user", "assistant"):
            return False
    return True


def _turns(value, role="assistant"):
    """Text as one turn of this role, or the turns of a list without what else stands in them."""
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    return [{"role": turn["role"], "content": turn["content"]} for turn in value]


def _join(system, prompt, turns):
    """A dialogue: an answer's turns, after what of system message and prompt is not in them."""
    if not turns or turns[0]["role"] == "system":
        return turns
    if turns[0]["role"] == "user":
        return system + turns
    return system + prompt + turns


def _split_transcript(text):
    """ "\n\nHuman: ...\n\nAssistant: ..." as a list of turns, empty if it is not one."""
    start, *parts = re.split(r"\n\n(Human|Assistant): ?", text)
    if start.strip():
        return []
    roles = {"Human": "user", "Assistant": "assistant"}
    turns = []
    for speaker, said in zip(parts[::2], parts[1::2], strict=True):
        turns.append({"role": roles[speaker], "content": said})
    return turns


def _scores(record):
    """The pair's scores as two floats, or None."""
    for pattern in SCORES:
        chosen = pattern.format("chosen")
        rejected = pattern.format("rejected")
        try:
            return float(record[chosen]), float(record[rejected])
        except (KeyError, TypeError, ValueError, OverflowError):
            continue  # no such columns, or no numbers in them
    return None


class PairEncoder:
    """Encodes records with a model's own chat template.

    tokenizer          a fast transformers tokenizer
    max_length         tokens of prompt + answer, at most
    max_prompt_length  tokens of the prompt, at most
    keep_ties          whether pairs of equal score are kept
    end_of_turn        (attribute) id of the token that ends an answer
    raises             InputError if the tokenizer has no token that could end an answer, or a
                       chat template that fails on a plain question and answer
    """

    def __init__(self, tokenizer, max_length=1024, max_prompt_length=512, keep_ties=False):
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.keep_ties = keep_ties
        control = {}
        for token_id, token in tokenizer.added_tokens_decoder.items():
            if token.special:
                control[token_id] = token.content
        matches_nothing = r"(?!)"
        self.control = re.compile("|".join(map(re.escape, control.values())) or matches_nothing)

        # one BOS at most: the template's own, or without a template what the tokenizer itself adds
        self.bos = []
        if not tokenizer.chat_template:
            first = tokenizer("a", verbose=False).input_ids[:1]
            if first == [tokenizer.bos_token_id]:
                self.bos = first

        before, after = self._render_around_an_answer()
        # the end of turn is the first control token that the template puts after an answer
        self.end_of_turn = tokenizer.eos_token_id
        for token_id in self._ids(after):
            if control.get(token_id):
                self.end_of_turn = token_id
                break
        if self.end_of_turn is None:
            raise InputError("the tokenizer has neither an end-of-turn token nor an eos_token")
        # a limit below the generation prompt itself would leave nothing to answer to
        self.max_prompt_length = max(max_prompt_length, len(self._ids(before)))

    def _render_around_an_answer(self):
        """What the template writes between question and answer, and after the answer."""
        question = {"role": "user", "content": "question"}
        answer = {"role": "assistant", "content": "ANSWER"}
        try:
            asked = self.render([question], add_generation_prompt=True)
            answered = self.render([question, answer])
        except TemplateError as error:
            raise InputError(f"the chat template fails: {first_line(error)}") from error
        return asked.rpartition("question")[2], answered.rpartition("ANSWER")[2]

    def render(self, messages, **options):
        """The chat template's text; of a base model, which has none, the turns' text alone."""
        if not self.tokenizer.chat_template:
            return "\n\n".join(message["content"] for message in messages)
        return self.tokenizer.apply_chat_template(messages, tokenize=False, **options)

    def _ids(self, text):
        return self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids

    def encode(self, record, index=0):
        """One record as a Pair; raises Drop with the reason if it cannot teach."""
        messages, chosen, rejected, scores = to_messages(record)
        self._check(messages, chosen, rejected, scores)
        try:
            rendered = self.render(messages, add_generation_prompt=True)
            prompt_ids = self.bos + self._ids(rendered)
            chosen_ids = [*self._ids(chosen), self.end_of_turn]
            rejected_ids = [*self._ids(rejected), self.end_of_turn]
        except (TemplateError, TypeError) as error:  # such as for roles that it refuses
            raise Drop(f"refused by the chat template: {first_line(error)}") from error

        # a prompt loses its beginning, an answer its end
        kept = prompt_ids[-self.max_prompt_length :]
        room = self.max_length - len(kept)
        longest = max(len(chosen_ids), len(rejected_ids))
        cut = len(kept) < len(prompt_ids) or longest > room
        drop_if(room < 1, "no room for an answer")
        chosen_ids = chosen_ids[:room]
        rejected_ids = rejected_ids[:room]
        drop_if(chosen_ids == rejected_ids, "same text once cut")
        is_reversed = scores is not None and scores[0] < scores[1]
        # a list of numbers takes nine times the memory
        ids = [array("i", part) for part in (kept, chosen_ids, rejected_ids)]
        return Pair(index, *ids, json.dumps(messages), cut, is_reversed)

    def _check(self, messages, chosen, rejected, scores):
        """Drop what is no preference, no text, or spells a control token of the model."""
        texts = [message["content"] for message in messages] + [chosen, rejected]
        for text in texts:
            drop_if(self.control.search(text), "spells a control token")
        drop_if(chosen == rejected, "same text")
        drop_if(not chosen.strip() or not rejected.strip(), "empty answer")
        tie = scores is not None and scores[0] == scores[1]
        drop_if(tie and not self.keep_ties, "tie in score")
        for text in texts:
            drop_if(re.search("[\ud800-\udfff]", text), "malformed: not Unicode text")


def group_into_steps(pairs, pairs_per_step, row_tokens, device="cpu", least=1):
    """Lay pairs out as rows, and rows as optimizer steps.

    The pairs of a step fill as few rows as hold them within row_tokens, longest pair first, but as
    many as `least` where there are pairs for them, so that each process has one. Rows stay the
    same in every epoch: in bfloat16 a log-probability depends on its row, and the reference has
    seen each pair in one row only.

    returns  the steps, each a list of Row
    """
    steps = []
    for start in range(0, len(pairs), pairs_per_step):
        indices = range(len(pairs))[start : start + pairs_per_step]
        rows = []
        for members in _fill_rows(pairs, indices, row_tokens, least):
            rows.append(make_row(pairs, members, device))
        steps.append(rows)
    return steps


def _fill_rows(pairs, indices, row_tokens, least):
    """Share a step's pairs out over rows: each goes to the emptiest row, or to a new one."""
    rows = [[] for _ in indices[:least]]
    tokens = [0] * len(rows)
    for index in sorted(indices, key=lambda i: -pairs[i].tokens):
        emptiest = tokens.index(min(tokens))
        if rows[emptiest] and tokens[emptiest] + pairs[index].tokens > row_tokens:
            emptiest = len(rows)
            rows.append([])
            tokens.append(0)
        rows[emptiest].append(index)
        tokens[emptiest] += pairs[index].tokens
    return rows


def make_row(pairs, indices, device="cpu"):
    """Lay pairs out as one Row on a device; `indices` point into `pairs`."""
    input_ids, position_ids, predictors, targets = [], [], [], []
    segments, lengths = [], []
    for index in indices:
        pair = pairs[index]
        prompt, chosen, rejected = (
            len(pair.prompt_ids),
            len(pair.chosen_ids),
            len(pair.rejected_ids),
        )
        # the prompt's last token predicts either answer's first; an answer's last predicts none
        before = len(input_ids) + prompt - 1
        between = before + chosen
        predictors += [*range(before, between)]
        predictors += [before, *range(between + 1, between + rejected)]
        input_ids += pair.prompt_ids + pair.chosen_ids + pair.rejected_ids
        # either answer follows the prompt
        position_ids += [*range(prompt + chosen)]
        position_ids += [*range(prompt, prompt + rejected)]
        targets += pair.chosen_ids + pair.rejected_ids
        segments.append((prompt, chosen, rejected))
        lengths += [chosen, rejected]
    as_tensor = partial(torch.tensor, device=device)
    return Row(
        list(indices),
        segments,
        lengths,
        as_tensor(input_ids),
        as_tensor(position_ids),
        as_tensor(predictors),
        as_tensor(targets),
    )
