"""Any preference set in; token ids, rows and optimizer steps out. Of the model: its tokenizer.

load_records -> read_preference -> PairEncoder.encode -> select_pairs -> lay_out, in each step's
rows -> make_row, where the row is used

How files and the Hub are read is in support/sources.py, what columns mean in support/shapes.py.
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

from support.columns import check_columns
from support.errors import InputError, first_line, shorten
from support.processes import WORLD, say
from support.shapes import accepted_columns, read_preference
from support.sources import MissingSplit, Sets, open_source, read_records, split_names
from support.template import (
    after_opened_thought,
    compare_template,
    dated_template,
    left_out_of,
    render_around_an_answer,
    tell_day,
)
from support.turns import Drop, drop_if, with_arguments_as_text

HELD_OUT = "its prompt is held out for evaluation"


@dataclass(frozen=True, slots=True)
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
    repeated: bool = False  # whether both answers began with the prompt, which was taken out
    record: dict | None = None  # the record itself, where a reward is to see it

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

    segments                 the lengths (prompt, chosen, rejected) of each pair
    lengths                  those of the answers alone, one after the other
    input_ids, position_ids  (t,) int64; a rejected answer's positions restart after its prompt
    predictors               (n,) int64: the position whose hidden state predicts each answer token
    targets                  (n,) int64: those answer tokens
    """

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
    encoder = PairEncoder(
        tokenizer, config.max_length, config.max_prompt_length, config.keep_ties, config.columns
    )
    encoder.keep_records = config.reward is not None
    # a round samples answers of its own to a prompt, so that its other pairs tell it nothing
    select = partial(select_pairs, encoder=encoder, once=config.rounds > 0)
    drops = {"train": Counter(), "eval": Counter()}
    records = load_records(config.dataset, config.split, config.offline)
    check_columns(config.columns or {}, records)
    order = visiting_order(len(records), config.shuffle, config.seed)

    # evaluation pairs first, for their prompts are not trained on
    held_out = []
    eval_records = records
    if config.eval_pairs:
        eval_records, eval_order, wanted = _evaluation_records(config, records, order)
        held_out = select(eval_records, wanted=wanted, order=eval_order, drops=drops["eval"])
    if eval_records is records:
        taken = {pair.index for pair in held_out}
        order = [index for index in order if index not in taken]
    prompts = set()
    for pair in held_out:  # as they are written, and as the model sees them
        prompts |= {pair.prompt, pair.prompt_ids.tobytes()}
    wanted = config.train_pairs
    train = select(records, wanted=wanted, order=order, drops=drops["train"], without=prompts)

    if not train:
        raise _no_usable_pair(config.dataset, records, drops["train"], config.columns)
    if config.eval_pairs and not held_out:
        eval_source = config.eval_dataset or config.dataset
        raise _no_usable_pair(eval_source, eval_records, drops["eval"], config.columns)
    pairs = {"train": train, "eval": held_out}
    if len(train) == wanted < len(order) and not config.rounds:  # whose rounds take others
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
    both_ways = _count_both_ways(pairs["train"])
    if both_ways:
        say(f"!!! {both_ways} train pairs stand in the set the other way round too; used as is !!!")
    for split, part in pairs.items():
        findings = {
            "score the rejected answer above the chosen one; used as they are": "reversed",
            "repeat the prompt at the beginning of both answers; it is taken out": "repeated",
        }
        for finding, name in findings.items():
            number = sum(getattr(pair, name) for pair in part)
            if number:
                say(f"!!! {number} of {len(part)} {split} pairs {finding} !!!")
        prompts = len({pair.prompt for pair in part})
        if split == "eval" and prompts < len(part):
            say(f"eval: {len(part)} pairs of {prompts} prompts, of which the intervals are")
        stubs = 0
        for pair in part:
            room = encoder.max_length - len(pair.prompt_ids)
            stubs += pair.cut and room < encoder.max_length // 4
        if stubs:
            say(
                f"!!! {stubs} of {len(part)} {split} pairs leave an answer less than a quarter of "
                f"max_length={encoder.max_length}, and it is cut: lower max_prompt_length !!!"
            )
    first = read_preference(records[pairs["train"][0].index], encoder.columns)
    warning = compare_template(encoder, first.messages, first.chosen)
    if warning:
        say(f"!!! {warning} !!!")
    day = tell_day(encoder.tokenizer)
    if day:
        say(day)


def _count_both_ways(pairs):
    """How many pairs have a twin whose chosen answer is their rejected one, and the reverse."""
    own = []
    turned = set()
    for pair in pairs:
        # hashes of 8 bytes, for a large set's texts would all be held a second time
        answers = (bytes(array("i", pair.chosen_ids)), bytes(array("i", pair.rejected_ids)))
        own.append(hash((pair.prompt, *answers)))
        turned.add(hash((pair.prompt, *answers[::-1])))
    return sum(pair in turned for pair in own)


def _evaluation_records(config, records, order):
    """Where evaluation pairs come from: a set or a split of their own, or the training records.

    records, order  the training set's, and the order in which training takes them
    returns         records, the order in which to take them, and how many pairs are wanted
    """
    if config.eval_dataset or config.eval_split:
        own_split = not config.eval_dataset
        source = config.eval_dataset or config.dataset
        found = load_records(
            source, config.eval_split, config.offline, evaluation=own_split, setting="eval_split"
        )
        if len(found) or not own_split:
            eval_order = visiting_order(len(found), config.shuffle, config.seed)
            return found, eval_order, config.eval_pairs
    # held out from the end of the training order, a fifth of it at the most
    a_fifth = max(1, len(order) // 5)
    return records, order[::-1], min(config.eval_pairs, a_fifth)


def _no_usable_pair(source, records, drops, columns):
    """The error for a set of which no record is left, with the reasons and what would be right."""
    lines = [f"dataset {source}: no usable pair in {drops.total()} records."]
    for reason, number in drops.most_common(10):
        lines.append(f"  {number:6d}  {reason}")
    if drops["no room for an answer"]:
        lines.append("max_length holds prompt and answer: set it well above max_prompt_length")
    if drops[HELD_OUT]:
        lines.append("Set eval_pairs=0, or give other records to evaluate on: eval_dataset=...")
    if len(records) and not drops:
        lines.append("All are held out for evaluation: set eval_pairs=0, or give more records")
    for index in range(len(records)):
        try:
            read_preference(records[index], columns)
        except Drop as reason:
            if str(reason).startswith("tie"):
                continue
            lines += [f"Record {index}: {reason}", *shorten(records[index]), *accepted_columns()]
            break
    return InputError("\n".join(lines))


def load_records(source, split, stand_ins, evaluation=False, setting="split"):
    """Records of one or several sets: "name", "name:split" or "a:split, b:split".

    split       the split of every name that gives none
    stand_ins   as in open_source
    evaluation  take `split` of every name that has it, once, and skip the others
    setting     where `split` is from
    returns     Sets, or nothing where no name has the split
    raises      InputError, with what to choose a split by
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
        except MissingSplit as missing:
            if evaluation:
                continue
            if not missing.has_others:
                raise
            choice = f"{name}:NAME" if own_split else f"{setting}=NAME"
            raise InputError(f"{missing}. Choose with {choice}") from missing
    return Sets(sets) if sets else []


def visiting_order(count, shuffle, seed):
    """Indices 0..count-1 in file order, or in an order that the seed alone decides."""
    order = list(range(count))
    if shuffle:
        random.Random(seed).shuffle(order)
    return order


def select_pairs(records, encoder, wanted, order, drops, without=(), once=False):
    """The first `wanted` usable pairs in the order given; 0 is all.

    drops    Counter to which the reasons of the records passed over are added
    without  prompts that must not be taken, each as Pair.prompt or as the bytes of prompt_ids
    once     whether a prompt is taken once
    returns  list of Pair
    """

    def usable():
        taken = set()
        for index in order:
            try:
                pair = encoder.encode(records[index], index)
                drop_if(pair.prompt in without or pair.prompt_ids.tobytes() in without, HELD_OUT)
                drop_if(once and pair.prompt in taken, "its prompt is taken already")
                taken.add(pair.prompt)
                yield pair
            except Drop as reason:
                drops[str(reason)] += 1

    return list(islice(usable(), wanted or None))


class PairEncoder:
    """Encodes records with a model's own chat template.

    tokenizer          a fast transformers tokenizer
    max_length         tokens of prompt + answer, at most
    max_prompt_length  tokens of the prompt, at most
    keep_ties          whether pairs of equal score are kept
    columns            the setting of that name, {place: column}, or None
    keep_records       (attribute) whether a Pair holds its record
    end_of_turn        (attribute) id of the token that ends an answer
    raises             InputError if the tokenizer has no token that could end an answer, or a
                       chat template that fails on a plain question and answer
    """

    def __init__(
        self, tokenizer, max_length=1024, max_prompt_length=512, keep_ties=False, columns=None
    ):
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.keep_ties = keep_ties
        self.columns = columns
        self.keep_records = False
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

        # what the template writes before an answer, white space that it adds there, and the end
        asked, self.before, self.gap, after = render_around_an_answer(self)
        self.before_ids = self._ids(self.before)
        # where a BOS stands there again, it begins turns and not the text
        asked_ids = self.bos + self._ids(asked)
        begin = tokenizer.bos_token_id
        self.begins_with_bos = asked_ids[:1] == [begin] and asked_ids.count(begin) == 1
        # the end of turn is the first control token that the template puts after an answer
        self.end_of_turn = tokenizer.eos_token_id
        self.tail = ""  # white space between the two
        for token_id in self._ids(after):
            if control.get(token_id):
                self.end_of_turn = token_id
                space = after[: len(after) - len(after.lstrip())]
                if after.startswith(space + control[token_id]):
                    self.tail = space
                break
        if self.end_of_turn is None:
            raise InputError("the tokenizer has neither an end-of-turn token nor an eos_token")
        # a limit below BOS and generation prompt would leave nothing to answer to
        least = len(self.before_ids)
        if tokenizer.bos_token_id is not None:
            least += 1
        self.max_prompt_length = max(max_prompt_length, least)

    def render(self, messages, **options):
        """The chat template's text; of a base model, which has none, the turns' text alone."""
        if not self.tokenizer.chat_template:
            return "\n\n".join(message["content"] for message in messages)
        return self.tokenizer.apply_chat_template(
            messages,
            tokenize=False,
            chat_template=dated_template(self.tokenizer, options.get("tools")),
            **options,
        )

    def _render_prompt(self, messages, tools, options=None):
        """The text that an answer follows.

        tools    functions for it to describe, or None
        options  what else the template reads, or None
        """
        options = {"add_generation_prompt": True, **(options or {})}
        if tools:
            options["tools"] = tools
        try:
            return self.render(messages, **options)
        except TypeError:  # some templates, such as DeepSeek's, join arguments to other text
            return self.render(with_arguments_as_text(messages), **options)

    def _ids(self, text):
        return self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids

    def _answer_ids(self, rendered, text, is_whole):
        """The ids of an answer as they are behind its prompt, rendered, with its end if whole.

        Alone it would get from a tokenizer of SentencePiece's kind a space that the template does
        not write. Where both touch, as a newline may the answer's own, its ids are those alone.
        """
        text = after_opened_thought(rendered, text)
        if not text.startswith(self.gap):
            text = self.gap + text
        if is_whole and not text.endswith(self.tail):
            text += self.tail
        ids = self._ids(self.before + text)
        length = len(self.before_ids)
        own = ids[length:] if ids[:length] == self.before_ids else self._ids(text)
        return own + [self.end_of_turn] if is_whole else own

    def encode(self, record, index=0):
        """One record as a Pair; raises Drop with the reason if it cannot teach."""
        preference = read_preference(record, self.columns)
        self._check(preference)
        try:
            render = partial(self._render_prompt, options=preference.template_options)
            rendered = render(preference.messages, preference.tools)
            left_out = left_out_of(render, preference, rendered)
            prompt_ids = self.bos + self._ids(rendered)
            answer_ids = partial(self._answer_ids, rendered, is_whole=preference.is_whole)
            chosen_ids = answer_ids(preference.chosen)
            rejected_ids = answer_ids(preference.rejected)
        except (TemplateError, TypeError) as error:  # such as for roles that it refuses
            raise Drop(f"refused by the chat template: {first_line(error)}") from error
        drop_if(left_out, f"the chat template leaves out {left_out}")

        # a prompt loses its beginning but for a BOS, an answer its end
        kept = prompt_ids[-self.max_prompt_length :]
        begin = [self.tokenizer.bos_token_id]
        if self.begins_with_bos and prompt_ids[:1] == begin:
            kept[:1] = begin
        room = self.max_length - len(kept)
        longest = max(len(chosen_ids), len(rejected_ids))
        cut = len(kept) < len(prompt_ids) or longest > room
        drop_if(room < 1, "no room for an answer")
        chosen_ids = chosen_ids[:room]
        rejected_ids = rejected_ids[:room]
        drop_if(chosen_ids == rejected_ids, "same text once cut")
        scores = preference.scores
        is_reversed = scores is not None and scores[0] < scores[1]
        return Pair(
            index=index,
            # a list of numbers takes nine times the memory
            prompt_ids=array("i", kept),
            chosen_ids=array("i", chosen_ids),
            rejected_ids=array("i", rejected_ids),
            prompt=json.dumps(preference.messages),
            cut=cut,
            reversed=is_reversed,
            shape=preference.shape,
            unused=preference.unused,
            repeated=preference.repeated,
            record=record if self.keep_records else None,
        )

    def _check(self, preference):
        """Drop what is no preference, no text, or spells a control token of the model."""
        chosen, rejected, scores = preference.chosen, preference.rejected, preference.scores
        texts = [message["content"] for message in preference.messages] + [chosen, rejected]
        calls = [message.get("tool_calls") for message in preference.messages]
        functions = json.dumps([preference.tools, calls], ensure_ascii=False)
        for text in [*texts, functions]:
            found = self.control.search(text)
            drop_if(found, f"spells the control token {found and found[0]}: plain text is wanted")
        drop_if(chosen == rejected, "same text")
        drop_if(not chosen.strip() or not rejected.strip(), "empty answer")
        tie = scores is not None and scores[0] == scores[1]
        drop_if(tie and not self.keep_ties, "tie in score")
        for text in texts:
            drop_if(re.search("[\ud800-\udfff]", text), "malformed: not Unicode text")


def lay_out(pairs, config):
    """The rows of each step, by split; a row has room for batch_size of the longest pairs."""
    longest = 0
    for part in pairs.values():
        longest = max(longest, *(pair.tokens for pair in part), 0)
    steps = {}
    for split, part in pairs.items():
        steps[split] = group_into_steps(
            part,
            pairs_per_step=config.batch_size * config.gradient_accumulation_steps,
            row_tokens=config.batch_size * longest,
            least=WORLD,
        )
    return steps


def group_into_steps(pairs, pairs_per_step, row_tokens, least=1):
    """Share pairs out over optimizer steps, and a step's over rows.

    The pairs of a step fill as few rows as hold them within row_tokens, longest pair first, but as
    many as `least` where there are pairs for them, so that each process has one. Rows stay the
    same in every epoch: in bfloat16 a log-probability depends on its row, and the reference has
    seen each pair in one row only.

    returns  the steps, each a list of rows, each a list of its pairs' positions in `pairs`: what
             make_row lays out where it is used, for a row is several times as large as its pairs
    """
    steps = []
    for start in range(0, len(pairs), pairs_per_step):
        indices = range(len(pairs))[start : start + pairs_per_step]
        steps.append(_fill_rows(pairs, indices, row_tokens, least))
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


def order_steps(steps, config):
    """The steps of all epochs: first in the pairs' order, then with shuffle in another each."""
    order = []
    for epoch in range(config.epochs):
        shuffle = config.shuffle and epoch > 0
        for index in visiting_order(len(steps), shuffle, config.seed + epoch):
            order.append(steps[index])
    return order


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
        segments,
        lengths,
        as_tensor(input_ids),
        as_tensor(position_ids),
        as_tensor(predictors),
        as_tensor(targets),
    )
