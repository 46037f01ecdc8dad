"""Attention over rows that share a prompt, against a dense mask in float64."""

import pytest
import torch

from support import attention
from support.attention import attend, shared_prompt_attention

QUERIES = attention.QUERIES


def states(t, heads=4, key_heads=2, size=8, dtype=torch.float64):
    """Query, key and value of t tokens, which want a gradient."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for count in (heads, key_heads, key_heads):
        state = torch.randn(1, count, t, size, generator=generator, dtype=torch.float64)
        made.append(state.to(dtype).requires_grad_())
    return made


def seen_by_each(segments):
    """(t, t) bool: which positions each token of a row sees."""
    total = sum(map(sum, segments))
    seen = torch.zeros(total, total, dtype=torch.bool)
    start = 0
    for prompt, chosen, rejected in segments:
        middle = start + prompt + chosen
        for token in range(start, middle):
            seen[token, start : token + 1] = True
        for token in range(middle, middle + rejected):
            seen[token, start : start + prompt] = True
            seen[token, middle : token + 1] = True
        start = middle + rejected
    return seen


def exact(query, key, value, segments):
    """(1, t, heads, head_dim), by a dense mask, a head at a time."""
    groups = query.shape[1] // key.shape[1]
    unseen = ~seen_by_each(segments)
    heads = []
    for head in range(query.shape[1]):
        scores = query[0, head] @ key[0, head // groups].T * 0.3
        heads.append(scores.masked_fill(unseen, -torch.inf).softmax(1) @ value[0, head // groups])
    return torch.stack(heads, 1)[None]


def blocked(query, key, value, segments):
    return shared_prompt_attention(None, query, key, value, None, 0.3, segments)[0]


def values_and_gradients(function, inputs, segments):
    output = function(*inputs, segments)
    direction = torch.randn(output.shape, generator=torch.Generator().manual_seed(9))
    return output, *torch.autograd.grad(output, inputs, direction.to(output.dtype))


def assert_exact(inputs, segments):
    found = values_and_gradients(blocked, inputs, segments)
    expected = values_and_gradients(exact, inputs, segments)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


LENGTHS = [
    [(1, 1, 1)],
    [(QUERIES - 2, 1, 1)],
    [(QUERIES - 1, 1, 1)],
    [(QUERIES, 1, 2)],
    [(3, QUERIES - 4, QUERIES - 1)],
    [(2, QUERIES - 2, QUERIES)],
    [(5, QUERIES + 3, QUERIES + 1)],
    [(7, 2, 1), (QUERIES + 9, 1, 5), (1, 3, 2 * QUERIES + 1)],
]


@pytest.mark.parametrize("segments", LENGTHS, ids=str)
def test_blocks_of_any_lengths_are_a_softmax_over_the_keys_that_a_query_sees(segments):
    assert_exact(states(sum(map(sum, segments))), segments)


@pytest.mark.parametrize("heads, key_heads", [(1, 1), (3, 3), (9, 3), (8, 1)])
def test_grouped_heads_read_the_keys_of_their_group(monkeypatch, heads, key_heads):
    monkeypatch.setattr(attention, "QUERIES", 4)
    assert_exact(states(26, heads, key_heads), [(3, 6, 5), (1, 2, 9)])


def test_values_may_be_of_another_size_than_queries_and_keys():
    query, key, _ = states(12)
    _, _, value = states(12, size=5)
    assert_exact([query, key, value], [(3, 4, 5)])


def test_gradcheck_of_attention(monkeypatch):
    monkeypatch.setattr(attention, "QUERIES", 3)
    inputs = states(12, size=2)
    assert torch.autograd.gradcheck(lambda q, k, v: blocked(q, k, v, [(3, 4, 5)]), inputs)


@pytest.mark.parametrize("dtype, digits", [(torch.float32, 2e-6), (torch.bfloat16, 0.02)])
def test_values_and_gradients_are_as_right_as_their_dtype(dtype, digits):
    segments = [(40, 150, 170)]
    inputs = states(360, size=16, dtype=dtype)
    doubles = [state.detach().double().requires_grad_() for state in inputs]
    found = values_and_gradients(blocked, inputs, segments)
    expected = values_and_gradients(exact, doubles, segments)
    for rounded, right in zip(found, expected, strict=True):
        assert rounded.dtype == dtype
        assert (rounded - right).norm() / right.norm() < digits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_gives_the_same_bits_with_and_without_gradients(dtype):
    inputs = states(360, dtype=dtype)
    with torch.no_grad():
        reference = blocked(*inputs, [(40, 150, 170)])
    assert torch.equal(blocked(*inputs, [(40, 150, 170)]), reference)


@pytest.mark.parametrize("n, m", [(7, 7), (4, 7), (1, 9)])
def test_other_devices_attend_with_the_same_result(monkeypatch, n, m):
    query, key, value = states(m)
    query = query[:, :, m - n :]
    here = attend(query, key, value, 0.3)
    monkeypatch.setattr(attention, "BLOCKED", ())
    torch.testing.assert_close(attend(query, key, value, 0.3), here, rtol=0, atol=1e-12)


def test_the_backward_pass_is_kept_no_scores():
    inputs = states(900, heads=2, key_heads=1)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: kept.append(tensor.numel()) or tensor, lambda packed: packed
    ):
        blocked(*inputs, [(300, 300, 300)])
    assert max(kept) <= inputs[0].numel()
