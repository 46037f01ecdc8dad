"""Answers that a model draws: greedy ones for the report, sampled ones for rewards and rounds.

An answer's random numbers are seeded by its prompt and its number, not by the batch it is drawn in.
"""

import contextlib
import hashlib
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import transformers
from torch.nn.functional import pad

from support.attention import window_of
from support.kv_cache import KVCache
from support.processes import RANK, WORLD, any_of, progress, say, sum_over_processes

ANSWERS_AT_ONCE = 256  # drawn together
BYTES_AT_ONCE = 2**31  # of their keys and values
KEPT_SHARE = 0.8  # finished answers leave the batch once no more than this share goes on
NONE = -1  # where no token was drawn
BLOCK = 256  # tokens of the vocabulary whose probabilities are added up first


@dataclass(frozen=True)
class Answer:
    """Token ids of an answer, the one that ended it included, and whether the model ended it."""

    ids: list[int]
    ended: bool  # not where it was cut at max_new_tokens, or went on with another control token


class Told(NamedTuple):
    """An Answer as people and rewards read it."""

    text: str  # without spaces around it, and without control tokens
    ended: bool
    tokens: int


class Sampler:
    """Draws answers of a policy as it is at that moment.

    By a KVCache where check_cache has found that this gives the model's own log-probabilities, and
    on CPUs, where it was measured; elsewhere by transformers' generate, a prompt at a time, with a
    line that says so.

    policy          AnswerLogps
    tokenizer       its tokenizer
    end_of_turn     token id that ends an answer
    max_new_tokens  tokens of an answer at most
    temperature     logits are divided by it; 0 takes the likeliest token
    min_p           tokens less than this share as likely as the likeliest one are not drawn
    """

    def __init__(self, policy, tokenizer, end_of_turn, max_new_tokens, temperature=1.0, min_p=0.0):
        self.policy = policy
        self.tokenizer = tokenizer
        self.max_new_tokens = max_new_tokens
        self.temperature = temperature
        self.min_p = min_p
        ends = policy.model.generation_config.eos_token_id
        known = ends if isinstance(ends, list) else [ends]
        self.ends = {end_of_turn, *known} - {None}
        control = set(tokenizer.all_special_ids)
        for token_id, token in tokenizer.added_tokens_decoder.items():
            if token.special:  # not all of them have a role, which all_special_ids asks for
                control.add(token_id)
        self.stops = sorted(self.ends | control)
        self.device = policy.model.device
        self.shape = policy.model.config.get_text_config()
        self.positions = getattr(self.shape, "max_position_embeddings", None) or math.inf
        self.said = False

    def tell(self, answer):
        """An Answer as Told."""
        text = self.tokenizer.decode(answer.ids, skip_special_tokens=True)
        return Told(text.strip(), answer.ended, len(answer.ids))

    def tell_all(self, answers):
        """Answers as a list of Told."""
        return [self.tell(answer) for answer in answers]

    def batches(self, prompts, count):
        """Positions of prompts whose answers are drawn together: always the same ones.

        prompts  lists of token ids
        count    answers to each
        returns  list of lists of positions, short prompts first
        """
        order = sorted(range(len(prompts)), key=lambda position: len(prompts[position]))
        batches = []
        for position in order:
            tokens = len(prompts[position]) + self.max_new_tokens
            room = BYTES_AT_ONCE // (tokens * self._bytes_a_token())
            room = min(room, ANSWERS_AT_ONCE)
            if not batches or (len(batches[-1]) + 1) * count > room:
                batches.append([])
            batches[-1].append(position)
        return batches

    def _bytes_a_token(self):
        """Bytes of a token's keys and values in all layers, where a KVCache holds them."""
        if not self.policy.takes_kv_cache:
            return 1  # and a model without attention has no heads to count
        heads = self.shape.num_attention_heads
        usual = self.shape.hidden_size // heads
        head_dim = getattr(self.shape, "head_dim", None) or usual
        heads = getattr(self.shape, "num_key_value_heads", None) or heads
        numbers = 2 * self.shape.num_hidden_layers * heads * head_dim
        return numbers * self.policy.model.dtype.itemsize

    @torch.no_grad()
    def draw(self, prompts, batch, count, seed):
        """Answers to some prompts, drawn together; processes share them out.

        prompts  lists of token ids
        batch    positions of some of them
        count    answers to each
        seed     text that decides the answers, together with a prompt's position
        returns  for each of the batch a list of Answer
        """
        if not self._is_cached(prompts):
            tokens = self._generate(prompts, batch, count, seed)
        else:
            # each process has a prompt, if only another's, as all must make the same passes
            mine = batch[RANK::WORLD] or batch[:1]
            drawn = self._draw(prompts, mine, count, seed)
            tokens = torch.full((len(batch), count, self.max_new_tokens), NONE)
            if len(batch) > RANK:
                tokens[RANK::WORLD] = drawn.unflatten(0, (-1, count))
            apart = (tokens - NONE).to(self.device)
            tokens = sum_over_processes(apart) + NONE
        answers = []
        for rows in tokens.tolist():
            answers.append([self._answer(row) for row in rows])
        return answers

    def draw_all(self, prompts, count, seed, title=None):
        """The same for all prompts, batch by batch; a `title` shows the progress."""
        answers = [None] * len(prompts)
        bar = contextlib.nullcontext()
        if title:
            bar = progress(title, len(prompts), unit="prompt")
        with bar:
            for batch in self.batches(prompts, count):
                drawn = self.draw(prompts, batch, count, seed)
                for position, found in zip(batch, drawn, strict=True):
                    answers[position] = found
                if title:
                    bar.update(len(batch))
        return answers

    def _is_cached(self, prompts):
        """Whether these prompts can be drawn by a KVCache."""
        longest = max(map(len, prompts)) + self.max_new_tokens
        fits = longest <= window_of(self.shape) and self.device.type == "cpu"
        return fits and self.policy.takes_kv_cache

    def _answer(self, tokens):
        """The tokens up to the first that stops an answer, as an Answer."""
        ids = []
        for token in tokens:
            if token == NONE:
                break
            ids.append(token)
            if token in self.stops:
                break
        return Answer(ids, ids[-1] in self.ends)

    def _draw(self, prompts, batch, count, seed):
        """(answers, max_new_tokens) int64: tokens, and NONE after an answer's last."""
        ids, lengths = _pad_right([prompts[position] for position in batch])
        width = ids.shape[1]
        cache = KVCache(count)
        positions = torch.arange(width).expand_as(ids)
        logits = self.policy.next_logits(ids, positions, cache, lengths - 1)
        logits = logits.repeat_interleave(count, 0)
        uniform = _uniform(seed, batch, count, self.max_new_tokens)

        tokens = torch.full(uniform.shape, NONE)
        going = torch.arange(len(tokens))  # the answers that are in the batch still
        stopped = torch.zeros(len(tokens), dtype=torch.bool)
        position = lengths.repeat_interleave(count)  # of each one's next token
        for step in range(self.max_new_tokens):
            token = self._pick(logits, uniform[going, step])
            tokens[going[~stopped], step] = token[~stopped]
            stopped |= torch.isin(token, torch.tensor(self.stops))
            stopped |= position + 1 >= self.positions
            full = step + 1 == self.max_new_tokens
            if not any_of(not (full or stopped.all()), self.device):
                break
            keep = _going_on(stopped)
            if keep is not None:
                cache.keep(keep)
                going = going[keep]
                token = token[keep]
                stopped = stopped[keep]
                position = position[keep]
            cache.next_token(position)
            first = torch.zeros_like(token)
            logits = self.policy.next_logits(token[:, None], position[:, None], cache, first)
            # one that has stopped stays where the model has a position
            position = torch.where(stopped, position, position + 1)
        return tokens

    def _pick(self, logits, uniform):
        """A token of each row of logits, (n, v): the inverse of their distribution at `uniform`.

        Sums of blocks first, for a cumulative sum over a whole vocabulary is slow.
        """
        if self.temperature == 0:
            return logits.argmax(1)
        weights = logits.to(torch.float32, copy=True)
        if self.temperature != 1:
            weights.div_(self.temperature)
        weights.sub_(_largest(weights)).exp_()
        if self.min_p > 0:
            weights.masked_fill_(weights < self.min_p, 0)
        missing = -weights.shape[1] % BLOCK
        blocks = pad(weights, (0, missing)).unflatten(1, (-1, BLOCK))
        sums = blocks.sum(2)
        target = uniform * sums.sum(1)
        block, rest = _inverse(sums, target)
        rows = torch.arange(len(block))
        within = blocks[rows, block]
        place, _ = _inverse(within, rest)
        return block * BLOCK + place

    def _generate(self, prompts, batch, count, seed):
        """The same by transformers' generate, for a prompt at a time, in all processes."""
        if not self.said:
            say("Answers are drawn by transformers' generate, a prompt at a time")
            self.said = True
        settings = transformers.GenerationConfig(
            do_sample=False, eos_token_id=self.stops, pad_token_id=self.stops[0]
        )
        if self.temperature > 0:
            settings.update(
                do_sample=True,
                temperature=self.temperature,
                top_k=0,
                top_p=1.0,
                min_p=self.min_p,
                num_return_sequences=count,
            )
        shape = (len(batch), count, self.max_new_tokens)
        tokens = torch.full(shape, NONE, device=self.device)
        for position, row in zip(batch, tokens, strict=True):
            torch.manual_seed(_number(f"{seed} {position}"))
            ids = torch.tensor([list(prompts[position])], device=self.device)
            length = ids.shape[1]
            settings.max_new_tokens = max(1, min(self.max_new_tokens, self.positions - length))
            with _without_settings(self.policy.model):
                output = self.policy.generate(
                    ids,
                    settings,
                    attention_mask=torch.ones_like(ids),
                    logits_processor=[_check_logits] if self.temperature > 0 else [],
                )
            answers = output[:, length:]
            row[:, : answers.shape[1]] = answers
        return tokens


@contextlib.contextmanager
def _without_settings(model):
    """A model's own generation settings, such as a penalty for repetition, out of the way."""
    own = model.generation_config
    model.generation_config = transformers.GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own


def _largest(logits):
    """(n, 1): the largest of each row of logits, (n, v).

    raises   FloatingPointError where there is none to draw by
    """
    largest = logits.amax(1, keepdim=True)
    if not largest.isfinite().all():
        raise FloatingPointError("the model's predictions are not finite: lower lr or use float32")
    return largest


def _check_logits(input_ids, logits):
    """A LogitsProcessor that lets no token be drawn of what is not finite."""
    _largest(logits)
    return logits


def _going_on(stopped):
    """The rows of a batch to go on with, or None for all: to leave out a few costs more.

    One row stays in any case, for the passes of other processes.
    """
    rows = (~stopped).nonzero().squeeze(1)
    if len(rows) > KEPT_SHARE * len(stopped):
        return None
    return rows if len(rows) else torch.tensor([0])


def _pad_right(prompts):
    """Lists of token ids as one tensor, (n, the longest's), and their lengths."""
    lengths = torch.tensor(list(map(len, prompts)))
    longest = int(lengths.max())
    ids = torch.zeros(len(prompts), longest, dtype=torch.int64)
    for row, prompt in zip(ids, prompts, strict=True):
        row[: len(prompt)] = torch.tensor(prompt)
    return ids, lengths


def _number(text):
    """A generator's seed from a text."""
    digest = hashlib.sha256(text.encode()).digest()
    return int.from_bytes(digest[:7])


def _uniform(seed, batch, count, tokens):
    """(answers, tokens) random numbers in [0, 1); an answer's are of its own."""
    numbers = []
    for position in batch:
        for sample in range(count):
            generator = torch.Generator()
            generator.manual_seed(_number(f"{seed} {position} {sample}"))
            numbers.append(torch.rand(tokens, generator=generator))
    return torch.stack(numbers)


def _inverse(weights, target):
    """Where the cumulative sum of each row of weights, (n, k), first exceeds its target.

    returns  (n,) int64, and what of the target that entry itself has to cover
    """
    sums = weights.cumsum(1)
    # rounding must not lead beyond the last entry that has a weight
    most = sums[:, -1] * (1 - 2**-22)
    target = torch.minimum(target, most)[:, None]
    place = torch.searchsorted(sums, target, right=True)
    before = sums.gather(1, place) - weights.gather(1, place)
    rest = (target - before).clamp(min=0)  # nor before the first one
    return place.squeeze(1), rest.squeeze(1)


def greedy_answers(setup, config):
    """The likeliest answers to the prompts of a Setup's samples, as text."""
    length = config.max_new_tokens
    sampler = Sampler(setup.policy, setup.tokenizer, setup.end_of_turn, length, temperature=0)
    prompts = [pair.prompt_ids for pair in setup.samples]
    texts = []
    for (answer,) in sampler.draw_all(prompts, 1, "greedy"):
        texts.append(sampler.tell(answer).text)
    return texts
