"""Keys and values of answers that are drawn together, for support/sampler.py."""

import math

import torch
from torch.nn.functional import pad, scaled_dot_product_attention

ROOM = 32  # columns are added so many at a time
CLOSE = 1e-3  # nats: how far a log-probability may be off for a cache to be used


class KVCache:
    """Keys and values of answers that are drawn together, each in the column of its own position.

    So an answer sees the same columns whatever prompts share its batch: prompts are padded on the
    right, and an answer's tokens take the place of the padding. Attention layers come here by
    shared_prompt_attention; their first call brings whole prompts, each later one a token.

    count      answers to each prompt
    positions  (attribute) (answers,) int64: where the tokens of this pass stand; None for prompts
    """

    def __init__(self, count):
        self.count = count
        self.width = 0  # columns that there is room for
        self.positions = None
        self.rows = None
        self.later = None  # (answers, 1, 1, columns): which columns come after an answer's own
        self.keys = {}
        self.values = {}

    def next_token(self, positions):
        """Let the next pass be of one token of each answer, at these positions."""
        device = positions.device
        self._make_room(int(positions.max()) + 1)
        columns = torch.arange(self.width, device=device)
        later = columns > positions[:, None]
        self.later = later[:, None, None]
        self.rows = torch.arange(len(positions), device=device)
        self.positions = positions

    def _make_room(self, columns):
        """Let there be so many columns, and some more: whole tensors are faster than parts."""
        if columns <= self.width:
            return
        columns += -columns % ROOM
        for kept in (self.keys, self.values):
            for layer, tensor in kept.items():
                missing = columns - tensor.shape[2]
                kept[layer] = pad(tensor, (0, 0, 0, missing))
        self.width = columns

    def keep(self, rows):
        """Go on with these rows of answers alone."""
        for kept in (self.keys, self.values):
            for layer, tensor in kept.items():
                kept[layer] = tensor[rows]

    def attend(self, layer, query, key, value, scaling):
        """Attention of a layer's queries over prompts, or over all columns up to their own.

        query    (rows, heads, t, head_dim); key, value (rows, key-value heads, t, head_dim)
        returns  (rows, t, heads, head_dim)
        """
        if self.positions is None:
            self.keys[layer] = key.repeat_interleave(self.count, 0)
            self.values[layer] = value.repeat_interleave(self.count, 0)
            self.width = key.shape[2]
            return _attend_prompts(query, key, value, scaling)
        keys = self.keys[layer]
        values = self.values[layer]
        places = (self.rows, slice(None), self.positions)
        keys[places] = key.squeeze(2)
        values[places] = value.squeeze(2)
        # heads that share a key are one product
        heads = key.shape[1]
        scaled = query.squeeze(2) * scaling
        grouped = scaled.unflatten(1, (heads, -1))
        scores = grouped @ keys.mT
        scores.masked_fill_(self.later, -math.inf)
        probabilities = scores.softmax(-1)
        output = probabilities @ values
        return output.flatten(1, 2)[:, None]


def _attend_prompts(query, key, value, scaling):
    """Causal attention of prompts that are padded on the right, as KVCache.attend returns it."""
    groups = query.shape[1] // key.shape[1]
    key = key.repeat_interleave(groups, 1)
    value = value.repeat_interleave(groups, 1)
    output = scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling)
    return output.transpose(1, 2).contiguous()


@torch.no_grad()
def check_cache(policy, pair):
    """Note in policy.takes_kv_cache whether answers can be drawn by a KVCache.

    The beginning of a pair's chosen answer is read that way, beside a shorter prompt, and its
    tokens' log-probabilities are compared with those of the model's own forward pass.

    policy  AnswerLogps, its layout chosen, its model in float32 in main memory
    pair    data.Pair
    """
    policy.takes_kv_cache = False
    if not policy.shared:
        return
    prompt = list(pair.prompt_ids)[-64:]
    answer = list(pair.chosen_ids)[:4]
    try:
        found = _read_by_cache(policy, prompt, answer)
    except (TypeError, ValueError, RuntimeError, AttributeError):
        return  # it keeps to transformers' generate, and a Sampler says so
    ids = torch.tensor([prompt + answer])
    logits = policy.model(input_ids=ids, use_cache=False).logits[0]
    before = logits[len(prompt) - 1 : -1]
    own = before.log_softmax(1)[range(len(answer)), answer]
    difference = (found - own).abs().max().item()
    policy.takes_kv_cache = difference <= CLOSE


def _read_by_cache(policy, prompt, answer):
    """Log-probabilities of an answer's tokens, read one by one with a KVCache."""
    length = len(prompt)
    padded = [prompt[0]] + [0] * (length - 1)
    ids = torch.tensor([prompt, padded])
    position = torch.tensor([length, 1])
    cache = KVCache(1)
    all_positions = torch.arange(length).expand(2, -1)
    logits = policy.next_logits(ids, all_positions, cache, position - 1)
    found = []
    for token in answer:
        logps = logits[0].log_softmax(0)
        found.append(logps[token])
        cache.next_token(position)
        tokens = torch.full((2, 1), token)
        logits = policy.next_logits(tokens, position[:, None], cache, torch.tensor([0, 0]))
        position = position + 1
    return torch.stack(found)
