"""Attention over a row of pairs, in which both answers share their prompt."""

import torch
import transformers
from torch import nn

SHARED_PROMPT = "shared_prompt"  # its name among transformers' attention implementations


def shared_prompt_attention(module, query, key, value, mask, scaling=None, segments=(), **kwargs):
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
    attend = nn.functional.scaled_dot_product_attention
    # few kernels take grouped heads together with a mask
    groups = query.shape[1] // key.shape[1]
    key = key.repeat_interleave(groups, 1)
    value = value.repeat_interleave(groups, 1)
    outputs = []
    start = 0
    for prompt, chosen, rejected in segments:
        middle = start + prompt + chosen
        end = middle + rejected
        first = slice(start, middle)
        q, k, v = query[:, :, first], key[:, :, first], value[:, :, first]
        outputs.append(attend(q, k, v, is_causal=True, scale=scaling))

        q = query[:, :, middle:end]
        k = torch.cat((key[:, :, start : start + prompt], key[:, :, middle:end]), 2)
        v = torch.cat((value[:, :, start : start + prompt], value[:, :, middle:end]), 2)
        seen = torch.ones(rejected, prompt + rejected, dtype=torch.bool, device=query.device)
        outputs.append(attend(q, k, v, attn_mask=seen.tril(prompt), scale=scaling))
        start = end
    return torch.cat(outputs, 2).transpose(1, 2).contiguous(), None


transformers.AttentionInterface.register(SHARED_PROMPT, shared_prompt_attention)
