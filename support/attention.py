"""Attention over a row of pairs, in which both answers share their prompt."""

import torch
import transformers
from torch import nn

SHARED_PROMPT = "shared_prompt"  # its name among transformers' attention implementations


def shared_prompt_attention(
    module,
    query,
    key,
    value,
    mask,
    scaling=None,
    segments=(),
    **kwargs,
):
    """Attention over a data.Row: each answer sees its prompt and itself, no other answer or pair.

    Two products a pair: prompt and chosen answer causally, then the rejected answer over prompt
    and itself. Once share_prompts(True) is called, every attention layer calls it. A kernel put
    here must run in float32 on the CPU too, where choose_layout compares it with separate sequences
    and else goes back to them. Then delete runs/reference_cache: its keys do not know of this code.

    query     (1, heads, t, head_dim); key, value (1, key-value heads, t, head_dim)
    segments  the lengths (prompt, chosen, rejected) of each pair, adding up to t; without them
              one plain causal sequence
    returns   (1, t, heads, head_dim), None
    """
    if not segments:  # generation
        sdpa = transformers.AttentionInterface()["sdpa"]
        return sdpa(module, query, key, value, mask, scaling=scaling)
    # few kernels take grouped heads together with a mask
    groups = query.shape[1] // key.shape[1]
    key = key.repeat_interleave(groups, 1)
    value = value.repeat_interleave(groups, 1)
    lengths = [sum(segment) for segment in segments]
    queries = query.split(lengths, 2)
    keys = key.split(lengths, 2)
    values = value.split(lengths, 2)
    outputs = []
    for q, k, v, segment in zip(queries, keys, values, segments, strict=True):
        outputs += attend_within_a_pair(q, k, v, segment, scaling)
    return torch.cat(outputs, 2).transpose(1, 2).contiguous(), None


def attend_within_a_pair(query, key, value, segment, scaling):
    """Attention of one pair: prompt and chosen answer, and the rejected answer's.

    query, key, value  (1, heads, t, head_dim)
    segment            the lengths (prompt, chosen, rejected)
    returns            two tensors, (1, heads, prompt + chosen, head_dim) and (..., rejected, ...)
    """
    attend = nn.functional.scaled_dot_product_attention
    prompt, chosen, rejected = segment
    first = (prompt + chosen, rejected)
    query, later_query = query.split(first, 2)
    key, later_key = key.split(first, 2)
    value, later_value = value.split(first, 2)
    one = attend(query, key, value, is_causal=True, scale=scaling)

    later_key = torch.cat((key.narrow(2, 0, prompt), later_key), 2)
    later_value = torch.cat((value.narrow(2, 0, prompt), later_value), 2)
    seen = torch.ones(rejected, prompt + rejected, dtype=torch.bool, device=query.device)
    seen = seen.tril(prompt)
    other = attend(later_query, later_key, later_value, attn_mask=seen, scale=scaling)
    return one, other


transformers.AttentionInterface.register(SHARED_PROMPT, shared_prompt_attention)
