"""Attention over a row of pairs, in which both answers share their prompt."""

import math

import torch
import transformers
from torch.nn.functional import scaled_dot_product_attention

SHARED_PROMPT = "shared_prompt"  # its name among transformers' attention implementations
BLOCKED = ("cpu",)  # devices on which blocks of queries were measured to be the faster way
QUERIES = 128  # queries of a block


def shared_prompt_attention(
    module,
    query,
    key,
    value,
    mask,
    scaling=None,
    segments=(),
    kv_cache=None,
    **kwargs,
):
    """Attention over a data.Row: each answer sees its prompt and itself, no other answer or pair.

    Two products a pair: prompt and chosen answer causally, then the rejected answer over prompt
    and itself. Once share_prompts(True) is called, every attention layer calls it. A kernel put
    here must run in float32 on the CPU too, where choose_layout compares it with separate sequences
    and else goes back to them.

    query     (1, heads, t, head_dim); key, value (1, key-value heads, t, head_dim)
    segments  the lengths (prompt, chosen, rejected) of each pair, adding up to t; without them
              one plain causal sequence
    kv_cache  support.kv_cache.KVCache of answers that are being drawn, which then attend
    returns   (1, t, heads, head_dim), None
    """
    if scaling is None:
        scaling = query.shape[-1] ** -0.5
    if kv_cache is not None:
        return kv_cache.attend(module.layer_idx, query, key, value, scaling), None
    if not segments:  # generation
        sdpa = transformers.AttentionInterface()["sdpa"]
        return sdpa(module, query, key, value, mask, scaling=scaling)
    lengths = [sum(segment) for segment in segments]
    queries = query.split(lengths, 2)
    keys = key.split(lengths, 2)
    values = value.split(lengths, 2)
    outputs = []
    for q, k, v, segment in zip(queries, keys, values, segments, strict=True):
        outputs += attend_within_a_pair(q, k, v, segment, scaling)
    return torch.cat(outputs, 2).transpose(1, 2).contiguous(), None


def window_of(shape):
    """Up to how many tokens a sequence is computed alike, whatever stands beside it in a batch.

    Beyond a sliding window a token does not see all before it; where rotations depend on a row's
    length (RoPE of type dynamic or longrope), they do from a certain length on.

    shape    a model's text config
    returns  int, or inf where there is no limit
    """
    window = getattr(shape, "sliding_window", None) or math.inf
    rope = getattr(shape, "rope_parameters", None) or {}
    if rope.get("rope_type") not in ("dynamic", "longrope"):
        return window
    begun = rope.get("original_max_position_embeddings")
    begun = begun or getattr(shape, "original_max_position_embeddings", None)
    return min(window, begun or shape.max_position_embeddings)


def attend_within_a_pair(query, key, value, segment, scaling):
    """Attention of one pair: prompt and chosen answer, and the rejected answer's.

    query    (1, heads, t, head_dim); key, value (1, key-value heads, t, head_dim)
    segment  the lengths (prompt, chosen, rejected)
    returns  two tensors, (1, heads, prompt + chosen, head_dim) and (..., rejected, ...)
    """
    prompt, chosen, rejected = segment
    first = (prompt + chosen, rejected)
    query, later_query = query.split(first, 2)
    key, later_key = key.split(first, 2)
    value, later_value = value.split(first, 2)
    one = attend(query, key, value, scaling)

    later_key = torch.cat((key.narrow(2, 0, prompt), later_key), 2)
    later_value = torch.cat((value.narrow(2, 0, prompt), later_value), 2)
    other = attend(later_query, later_key, later_value, scaling)
    return one, other


transformers.AttentionInterface.register(SHARED_PROMPT, shared_prompt_attention)


def attend(query, key, value, scaling):
    """Causal attention of the last n of m positions, whose queries alone are given.

    query    (1, heads, n, head_dim); key, value (1, key-value heads, m, head_dim)
    scaling  float: the scores are scaling * query @ key.T
    returns  (1, heads, n, head_dim)
    """
    n = query.shape[2]
    m = key.shape[2]
    groups = query.shape[1] // key.shape[1]
    if query.device.type in BLOCKED:
        scaled = query[0] * scaling
        grouped = scaled.unflatten(0, (-1, groups))
        output = _BlockedAttention.apply(grouped, key[0], value[0])
        return output.flatten(0, 1)[None]
    # few kernels take grouped heads together with a mask
    key = key.repeat_interleave(groups, 1)
    value = value.repeat_interleave(groups, 1)
    if n == m:
        return scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling)
    seen = torch.ones(n, m, dtype=torch.bool, device=query.device)
    seen = seen.tril(m - n)
    return scaled_dot_product_attention(query, key, value, attn_mask=seen, scale=scaling)


class _BlockedAttention(torch.autograd.Function):
    """attend in blocks of queries; the backward pass computes the probabilities again.

    It takes 0.36 of the time of PyTorch's flash kernel for CPUs in bfloat16, 0.8 in float32. Heads
    that share a key are one product, and a block leaves out the keys that none of its queries sees.

    query  (key-value heads, groups, n, head_dim), scaled; key, value (key-value heads, m, head_dim)
    """

    @staticmethod
    def forward(ctx, query, key, value):
        ctx.save_for_backward(query, key, value)
        output = query.new_empty(*query.shape[:3], value.shape[-1])
        for block, seen in _blocks(query, key):
            q = query[:, :, block]
            k = key[:, :seen]
            v = value[:, :seen]
            p = _probabilities(q, k)
            found = p @ v
            output[:, :, block] = found.unflatten(1, (-1, q.shape[2]))
        return output

    @staticmethod
    def backward(ctx, grad):
        query, key, value = ctx.saved_tensors
        grad_query = torch.empty_like(query)
        # sums over blocks, in float32 or better
        dtype = torch.promote_types(key.dtype, torch.float32)
        grad_key = torch.zeros_like(key, dtype=dtype)
        grad_value = torch.zeros_like(value, dtype=dtype)
        for block, seen in _blocks(query, key):
            q = query[:, :, block]
            k = key[:, :seen]
            v = value[:, :seen]
            g = grad[:, :, block].flatten(1, 2)
            p = _probabilities(q, k)
            grad_value[:, :seen] += p.mT @ g
            grad_p = g @ v.mT
            grad_scores = torch._softmax_backward_data(grad_p, p, -1, p.dtype)
            grad_key[:, :seen] += grad_scores.mT @ q.flatten(1, 2)
            found = grad_scores @ k
            grad_query[:, :, block] = found.view_as(q)
        grad_key = grad_key.to(key.dtype)
        grad_value = grad_value.to(value.dtype)
        return grad_query, grad_key, grad_value


def _blocks(query, key):
    """Slices of queries, and how many keys the last query of each sees."""
    n = query.shape[2]
    m = key.shape[1]
    for start in range(0, n, QUERIES):
        end = min(start + QUERIES, n)
        yield slice(start, end), m - n + end


def _probabilities(query, key):
    """softmax(query @ key.T), where the last query sees all keys, and each other one fewer.

    query    (key-value heads, groups, n, head_dim); key (key-value heads, m, head_dim)
    returns  (key-value heads, groups * n, m)
    """
    n = query.shape[2]
    rows = query.flatten(1, 2)
    scores = rows @ key.mT
    later = torch.full((n, n), -torch.inf, dtype=query.dtype)
    later = later.triu(1)
    by_head = scores.unflatten(1, (-1, n))
    by_head[..., -n:] += later
    return scores.softmax(-1)
