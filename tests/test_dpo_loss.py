"""The loss against its papers, and log-probabilities against brute force. Needs no model."""

import itertools
import math
from typing import get_args, get_type_hints

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import dpo_loss as module
from dpo_loss import dpo_loss, sequence_logps, token_logps
from helpers import normal
from support.config import Config

VARIANTS = [("sigmoid", 0.0), ("sigmoid", 0.2), ("ipo", 0.0), ("hinge", 0.0)]
variants = pytest.mark.parametrize("loss, smoothing", VARIANTS)
quadruples = st.tuples(*[st.floats(-500, 0)] * 4)  # chosen, rejected; then the reference's
betas = st.floats(1e-3, 10)
often = settings(max_examples=60, deadline=None)


def test_each_loss_of_config_is_among_those_tested_here():
    names = get_args(get_type_hints(Config)["loss"])
    assert {name for name, _ in VARIANTS} == set(names)


def doubles(*numbers):
    return [torch.tensor([number], dtype=torch.float64) for number in numbers]


def head_inputs(n, d, v, dtype=torch.float64, seed=0):
    """Hidden states and weight that want a gradient; targets with the vocabulary's two ends."""
    hidden, weight = normal(n, d, seed=seed).to(dtype), normal(v, d, seed=seed + 1).to(dtype)
    targets = torch.randint(v, (n,), generator=torch.Generator().manual_seed(seed))
    targets[0], targets[-1] = 0, v - 1
    return hidden.requires_grad_(), weight.requires_grad_(), targets


def rows_at_once(monkeypatch, rows, vocabulary):
    monkeypatch.setattr(module, "LOGITS_AT_ONCE", rows * vocabulary + vocabulary - 1)


def log_softmax_then_gather(hidden, weight, targets):
    return (hidden @ weight.T).log_softmax(1)[range(len(targets)), targets]


def brute_force_logp(hidden, weight, target):
    """log softmax of one position in Python's floats (float64)."""
    logits = [math.fsum(h * w for h, w in zip(hidden, row, strict=True)) for row in weight]
    return (
        logits[target]
        - max(logits)
        - math.log(math.fsum(math.exp(logit - max(logits)) for logit in logits))
    )


@often
@given(n=st.integers(1, 9), d=st.integers(1, 5), v=st.integers(1, 9), seed=st.integers(0, 999))
def test_token_logps_are_log_softmax_then_gather(n, d, v, seed):
    inputs = head_inputs(n, d, v, seed=seed)
    torch.testing.assert_close(
        token_logps(*inputs), log_softmax_then_gather(*inputs), rtol=0, atol=1e-12
    )


def test_log_probabilities_of_answers_are_the_brute_force_sums_over_their_tokens():
    hidden, weight, targets = head_inputs(12, 4, 11)
    lengths = [3, 1, 6, 2]
    tokens = [
        brute_force_logp(h, weight.tolist(), target)
        for h, target in zip(hidden.tolist(), targets.tolist(), strict=True)
    ]
    ends = list(itertools.accumulate(lengths))
    answers = [tokens[end - length : end] for end, length in zip(ends, lengths, strict=True)]
    found = token_logps(hidden, weight, targets)
    assert sequence_logps(found, lengths).tolist() == pytest.approx(
        [math.fsum(answer) for answer in answers], abs=1e-12
    )


@pytest.mark.parametrize("rows", [1, 2, 3, 7, 8])
def test_chunks_change_neither_log_probabilities_nor_gradients(monkeypatch, rows):
    def values_and_gradients():
        hidden, weight, targets = head_inputs(7, 4, 5)
        values = token_logps(hidden, weight, targets)
        values.backward(normal(7, seed=3))
        return values, hidden.grad, weight.grad

    whole = values_and_gradients()
    rows_at_once(monkeypatch, rows, vocabulary=5)
    torch.testing.assert_close(values_and_gradients(), whole, rtol=0, atol=1e-12)


def test_a_vocabulary_above_the_limit_is_taken_row_by_row(monkeypatch):
    monkeypatch.setattr(module, "LOGITS_AT_ONCE", 1)
    inputs = head_inputs(3, 4, 5)
    torch.testing.assert_close(
        token_logps(*inputs), log_softmax_then_gather(*inputs), rtol=0, atol=1e-12
    )


@pytest.mark.parametrize("rows", [1, 2, 3, 5])
def test_gradcheck_of_token_logps(monkeypatch, rows):
    rows_at_once(monkeypatch, rows, vocabulary=6)
    hidden, weight, targets = head_inputs(5, 3, 6)
    assert torch.autograd.gradcheck(token_logps, (hidden, weight, targets))


def test_gradients_are_those_of_log_softmax_then_gather():
    hidden, weight, targets = head_inputs(9, 4, 7)
    grad = normal(9, seed=5)
    found = torch.autograd.grad(token_logps(hidden, weight, targets), (hidden, weight), grad)
    expected = torch.autograd.grad(
        log_softmax_then_gather(hidden, weight, targets), (hidden, weight), grad
    )
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


class Spy(TorchDispatchMode):
    """Notes the shape of every tensor that an operation puts out, in the backward pass too."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.shapes += [leaf.shape for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_tensor_is_larger_than_logits_at_once(monkeypatch, dtype):
    n, d, v, limit = 101, 2, 5000, 20000  # all logits would be 505000 numbers
    monkeypatch.setattr(module, "LOGITS_AT_ONCE", limit)
    hidden, weight, targets = head_inputs(n, d, v, dtype)
    with Spy() as forward:
        logps = token_logps(hidden, weight, targets)
    with Spy() as backward:
        logps.sum().backward()
    for spy in (forward, backward):
        assert max(shape.numel() for shape in spy.shapes) == limit, "the spy sees the chunks"


@pytest.mark.parametrize("limit, chunks", [(0, 0), (2 * 50 * 8, 1), (3 * 2 * 50 * 8 - 1, 2)])
def test_forward_keeps_probabilities_up_to_a_limit_for_the_backward_pass(
    monkeypatch, limit, chunks
):
    monkeypatch.setattr(module, "BYTES_KEPT", limit)
    rows_at_once(monkeypatch, 2, vocabulary=50)
    hidden, weight, targets = head_inputs(6, 2, 50)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: kept.append(tensor) or tensor, lambda packed: packed
    ):
        logps = token_logps(hidden, weight, targets)
    probabilities = [tensor for tensor in kept if tensor.shape == (2, 50)]
    assert len(kept) == 3 + len(probabilities) and len(probabilities) == chunks
    found = torch.autograd.grad(logps, (hidden, weight), normal(6, seed=5))
    reference = log_softmax_then_gather(hidden, weight, targets)
    expected = torch.autograd.grad(reference, (hidden, weight), normal(6, seed=5))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_log_probabilities_are_the_same_bits_with_and_without_gradients():
    for dtype in (torch.float32, torch.bfloat16):
        hidden, weight, targets = head_inputs(21, 8, 1000, dtype)
        with torch.no_grad():
            reference = token_logps(hidden, weight, targets)
        assert torch.equal(token_logps(hidden, weight, targets), reference)


def test_float32_gradients_are_right_to_six_digits_over_a_large_vocabulary():
    hidden, weight, targets = head_inputs(16, 32, 49152, torch.float32)
    found = torch.autograd.grad(token_logps(hidden, weight, targets).sum(), (hidden, weight))
    exact = [tensor.detach().double().requires_grad_() for tensor in (hidden, weight)]
    reference = log_softmax_then_gather(*exact, targets)
    expected = torch.autograd.grad(reference.sum(), exact)
    for rounded, right in zip(found, expected, strict=True):
        assert (rounded - right).norm() / right.norm() < 1e-6


def test_a_frozen_head_gets_no_gradient_and_none_is_computed(monkeypatch):
    rows_at_once(monkeypatch, 4, vocabulary=7)
    hidden, weight, targets = head_inputs(9, 3, 7)
    weight.requires_grad_(False)
    expected = torch.autograd.grad(log_softmax_then_gather(hidden, weight, targets).sum(), hidden)
    logps = token_logps(hidden, weight, targets)
    with Spy() as spy:
        logps.sum().backward()
    assert weight.grad is None
    assert weight.shape not in spy.shapes
    torch.testing.assert_close(hidden.grad, expected[0], rtol=0, atol=1e-12)


def test_bfloat16_inputs_give_float32_log_probabilities_and_bfloat16_gradients():
    hidden, weight, targets = head_inputs(40, 8, 1000, torch.bfloat16)
    logps = token_logps(hidden, weight, targets)
    assert logps.dtype == torch.float32
    logits = (hidden @ weight.T).double()  # rounded to bfloat16 by the head, to nothing after it
    torch.testing.assert_close(
        logps.double(), logits.log_softmax(1)[range(40), targets], rtol=0, atol=1e-5
    )
    logps.sum().backward()
    assert hidden.grad.dtype == weight.grad.dtype == torch.bfloat16
    exact = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    log_softmax_then_gather(*exact, targets).sum().backward()
    for rounded, right in zip((hidden, weight), exact, strict=True):
        error = (rounded.grad.double() - right.grad).norm() / right.grad.norm()
        assert error < 0.01


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_float_inputs_keep_their_dtype(dtype):
    assert token_logps(*head_inputs(3, 2, 4, dtype)).dtype == dtype


@pytest.mark.parametrize("target", [-100, -1, 5, 2**40])
def test_token_logps_rejects_a_target_outside_the_vocabulary(target):
    hidden, weight, targets = head_inputs(4, 3, 5)
    targets[2] = target
    with pytest.raises(RuntimeError, match="out of bounds"):
        token_logps(hidden, weight, targets)


@pytest.mark.parametrize("rows", [2, 100])
@pytest.mark.parametrize("n", [0, 1, 2, 3, 5, 6])
def test_token_logps_rejects_another_number_of_targets_than_hidden_states(monkeypatch, rows, n):
    rows_at_once(monkeypatch, rows, vocabulary=5)
    hidden, weight, _ = head_inputs(4, 3, 5)
    with pytest.raises(ValueError, match=f"4 hidden states, but {n} targets"):
        token_logps(hidden, weight, torch.zeros(n, dtype=torch.long))


@given(st.lists(st.lists(st.integers(-64, 0), min_size=1, max_size=9), min_size=1, max_size=6))
def test_sequence_logps_sum_each_answer(answers):
    flat = torch.tensor(list(itertools.chain(*answers)), dtype=torch.float64)
    lengths = [len(answer) for answer in answers]
    assert sequence_logps(flat, lengths).tolist() == [sum(answer) for answer in answers]


@pytest.mark.parametrize("lengths", [[2, 2], [2, 4], [4], [6, -1], []])
def test_sequence_logps_rejects_lengths_that_do_not_add_up(lengths):
    with pytest.raises(RuntimeError, match="split"):
        sequence_logps(torch.zeros(5), lengths)


def test_equation_7_worked_by_hand():
    four = ([-10, -7], [-20, -9], [-12, -8], [-19, -4])
    losses, chosen, rejected = dpo_loss(
        *(torch.tensor(logps, dtype=torch.float64) for logps in four), beta=0.5
    )
    # log ratios 2 and -1, 1 and -5; margins 0.5 * 3 and 0.5 * 6
    assert chosen.tolist() == [1.0, 0.5]
    assert rejected.tolist() == [-0.5, -2.5]
    assert losses.tolist() == pytest.approx(
        [math.log1p(math.exp(-1.5)), math.log1p(math.exp(-3))], rel=1e-15
    )


@often
@given(quadruples, betas)
def test_equation_7_in_pythons_floats(logps, beta):
    chosen, rejected, ref_chosen, ref_rejected = logps
    margin = beta * (chosen - ref_chosen) - beta * (rejected - ref_rejected)
    expected = max(-margin, 0) + math.log1p(math.exp(-abs(margin)))  # -log sigmoid(margin)
    losses, _, _ = dpo_loss(*doubles(*logps), beta=beta)
    assert losses.item() == pytest.approx(expected, rel=1e-9, abs=1e-12)


@often
@given(quadruples, betas)
def test_rewards_are_equation_5_and_their_margin_gives_equation_6(logps, beta):
    chosen, rejected, ref_chosen, ref_rejected = logps
    for loss, smoothing in VARIANTS:
        losses, chosen_rewards, rejected_rewards = dpo_loss(*doubles(*logps), beta, loss, smoothing)
        assert chosen_rewards.item() == pytest.approx(beta * (chosen - ref_chosen))
        assert rejected_rewards.item() == pytest.approx(beta * (rejected - ref_rejected))
    losses, chosen_rewards, rejected_rewards = dpo_loss(*doubles(*logps), beta)
    preference = torch.sigmoid(chosen_rewards - rejected_rewards)
    torch.testing.assert_close(torch.exp(-losses), preference, rtol=1e-9, atol=1e-12)


def test_defaults_are_the_papers_loss_at_beta_a_tenth():
    four = [normal(5, seed=seed) for seed in range(4)]
    spelled_out = dpo_loss(*four, beta=0.1, loss="sigmoid", label_smoothing=0.0)
    assert all(map(torch.equal, dpo_loss(*four), spelled_out))


@variants
def test_each_pair_has_a_loss_of_its_own(loss, smoothing):
    four = [10 * normal(6, seed=seed) for seed in range(4)]
    together = dpo_loss(*four, 0.3, loss, smoothing)
    for i in range(6):
        alone = dpo_loss(*(logps[i : i + 1] for logps in four), 0.3, loss, smoothing)
        for all_pairs, one in zip(together, alone, strict=True):
            assert all_pairs.shape == (6,)
            torch.testing.assert_close(all_pairs[i : i + 1], one, rtol=1e-14, atol=0)


class TinyPolicy:
    """An autoregressive policy of 51 parameters, in float64."""

    def __init__(self, seed):
        self.parameters = [
            (normal(*shape, seed=seed + i) / 2).requires_grad_()
            for i, shape in enumerate([(7, 3), (3, 3), (7, 3)])
        ]

    def hidden(self, prompt, answer):
        """(len(answer), d): the state before each of the answer's tokens."""
        embedding, mixing, _ = self.parameters
        state, states = torch.zeros(3, dtype=torch.float64), []
        for token in prompt + answer:
            states.append(state)
            state = torch.tanh(embedding[token] + mixing @ state)
        return torch.stack(states[len(prompt) :])

    def logp(self, prompt, answer):
        """log pi(answer | prompt), token by token and without dpo_loss.py."""
        states = self.hidden(prompt, answer)
        return sum(
            (self.parameters[2] @ state).log_softmax(0)[token]
            for state, token in zip(states, answer, strict=True)
        )


PAIRS = [([1, 2], [3, 4, 5], [6]), ([0], [2, 2], [2, 3]), ([6, 5, 4], [0], [1, 1, 0, 6, 2])]


@pytest.mark.parametrize("beta", [0.1, 2.0])
def test_gradient_is_that_of_section_4_of_the_paper(beta):
    policy, reference = TinyPolicy(0), TinyPolicy(100)
    answers = [(prompt, answer) for prompt, *both in PAIRS for answer in both]
    tokens = token_logps(
        torch.cat([policy.hidden(*answer) for answer in answers]),
        policy.parameters[2],
        torch.tensor([token for _, answer in answers for token in answer]),
    )
    ours = sequence_logps(tokens, [len(answer) for _, answer in answers])
    ref = torch.stack([reference.logp(*answer) for answer in answers]).detach()
    losses, _, _ = dpo_loss(ours[::2], ours[1::2], ref[::2], ref[1::2], beta)

    def gradient(value):
        return torch.cat(
            [g.flatten() for g in torch.autograd.grad(value, policy.parameters, retain_graph=True)]
        )

    for loss, (prompt, chosen, rejected) in zip(losses, PAIRS, strict=True):
        logp_w, logp_l = policy.logp(prompt, chosen), policy.logp(prompt, rejected)
        reward_w = beta * (logp_w - reference.logp(prompt, chosen)).item()
        reward_l = beta * (logp_l - reference.logp(prompt, rejected)).item()
        weight = 1 / (1 + math.exp(reward_w - reward_l))  # sigmoid(r_l - r_w)
        expected = -beta * weight * (gradient(logp_w) - gradient(logp_l))
        assert expected.norm() > 1e-3
        torch.testing.assert_close(gradient(loss), expected, rtol=1e-10, atol=1e-12)


@variants
@pytest.mark.parametrize("beta", [0.05, 0.7])
def test_gradcheck_of_the_loss(loss, smoothing, beta):
    four = [3 * normal(8, seed=seed) for seed in range(4)]
    h = (four[0] - four[2]) - (four[1] - four[3])
    assert (1 - beta * h).abs().min() > 1e-3, "hinge has a kink there"
    assert torch.autograd.gradcheck(
        lambda *logps: dpo_loss(*logps, beta, loss, smoothing)[0],
        [logps.requires_grad_() for logps in four],
    )


@often
@given(quadruples, betas, st.floats(-300, 300), st.booleans())
def test_loss_stays_when_both_answers_log_probabilities_shift_together(logps, beta, shift, policy):
    chosen, rejected, ref_chosen, ref_rejected = logps
    shifted = (
        (chosen + shift, rejected + shift, ref_chosen, ref_rejected)
        if policy
        else (chosen, rejected, ref_chosen + shift, ref_rejected + shift)
    )
    for loss, smoothing in VARIANTS:
        before = dpo_loss(*doubles(*logps), beta, loss, smoothing)[0]
        after = dpo_loss(*doubles(*shifted), beta, loss, smoothing)[0]
        torch.testing.assert_close(after, before, rtol=1e-9, atol=1e-9)


@often
@given(quadruples, betas)
def test_swapping_chosen_and_rejected_negates_the_margin(logps, beta):
    chosen, rejected, ref_chosen, ref_rejected = doubles(*logps)
    for loss, smoothing in VARIANTS:
        there, there_w, there_l = dpo_loss(
            chosen, rejected, ref_chosen, ref_rejected, beta, loss, smoothing
        )
        back, back_w, back_l = dpo_loss(
            rejected, chosen, ref_rejected, ref_chosen, beta, loss, smoothing
        )
        assert (back_w, back_l) == (there_l, there_w)
        assert back_w - back_l == -(there_w - there_l)
        h = (there_w - there_l) / beta
        # loss(h) - loss(-h)
        difference = {
            "sigmoid": -(1 - 2 * smoothing) * beta * h,
            "ipo": -2 * h / beta,
            "hinge": (1 - beta * h).clamp(min=0) - (1 + beta * h).clamp(min=0),
        }[loss]
        torch.testing.assert_close(there - back, difference, rtol=1e-9, atol=1e-8)


@often
@given(
    st.lists(
        st.tuples(st.floats(-1e4, 0, width=32), st.floats(-1e4, 0, width=32)),
        min_size=1,
        max_size=40,
    ),
    betas,
)
def test_loss_is_ln_2_to_the_last_bit_where_policy_is_reference(pairs, beta):
    chosen, rejected = torch.tensor(pairs, dtype=torch.float32).T
    losses, chosen_rewards, rejected_rewards = dpo_loss(chosen, rejected, chosen, rejected, beta)
    assert losses.dtype == torch.float32
    assert set(losses.tolist()) == {torch.tensor(math.log(2), dtype=torch.float32).item()}
    assert not chosen_rewards.any() and not rejected_rewards.any()
    smoothed = dpo_loss(chosen, rejected, chosen, rejected, beta, label_smoothing=0.3)[0]
    assert smoothed.tolist() == pytest.approx([math.log(2)] * len(pairs), rel=1e-6)


@variants
@pytest.mark.parametrize("beta", [1e-3, 0.01, 0.1, 1, 10])
def test_extreme_log_ratios_give_finite_and_right_losses_and_gradients(loss, smoothing, beta):
    log_ratios = list(itertools.product([-1e4, -100, 0, 100, 1e4], repeat=2))

    def loss_and_gradient(dtype):
        policy = -2e4 + torch.tensor(log_ratios, dtype=dtype).T
        chosen, rejected = policy[0].requires_grad_(), policy[1].requires_grad_()
        reference = torch.full_like(chosen, -2e4)
        losses, *rewards = dpo_loss(chosen, rejected, reference, reference, beta, loss, smoothing)
        return losses, *torch.autograd.grad(losses.sum(), (chosen, rejected)), *rewards

    single, double = loss_and_gradient(torch.float32), loss_and_gradient(torch.float64)
    for value, exact in zip(single, double, strict=True):
        assert value.dtype == torch.float32
        assert value.isfinite().all() and exact.isfinite().all()
        torch.testing.assert_close(value.double(), exact, rtol=1e-5, atol=1e-30)
    losses, chosen_gradient, rejected_gradient, *_ = double
    worst = log_ratios.index((-1e4, 1e4))  # h = -2e4
    slope = {"sigmoid": -(1 - smoothing) * beta, "hinge": -beta, "ipo": 2 * (-2e4 - 0.5 / beta)}
    assert chosen_gradient[worst].item() == pytest.approx(slope[loss], rel=1e-6)
    assert torch.equal(rejected_gradient, -chosen_gradient)
    assert (losses >= 0).all()


def loss_of_margin(h, beta, loss, smoothing=0.0):
    """Loss and its slope at h, the policy's log ratio of the chosen answer less the rejected's."""
    h = torch.tensor([h], dtype=torch.float64, requires_grad=True)
    nought = torch.zeros_like(h)
    losses, _, _ = dpo_loss(h, nought, nought, nought, beta, loss, smoothing)
    return losses.item(), torch.autograd.grad(losses.sum(), h)[0].item()


@often
@given(st.floats(0.01, 0.49), betas, st.floats(0.1, 5))
def test_label_smoothing_is_least_at_the_log_odds_of_a_right_label(smoothing, beta, step):
    best = math.log((1 - smoothing) / smoothing) / beta
    least, slope = loss_of_margin(best, beta, "sigmoid", smoothing)
    assert slope == pytest.approx(0, abs=1e-12)
    entropy = -smoothing * math.log(smoothing) - (1 - smoothing) * math.log(1 - smoothing)
    assert least == pytest.approx(entropy)
    for side in (-1, 1):
        higher, slope = loss_of_margin(best + side * step / beta, beta, "sigmoid", smoothing)
        assert higher > least and slope * side > 0


@often
@given(quadruples, betas, st.floats(0, 0.49))
def test_label_smoothing_is_the_expected_loss_when_labels_are_flipped(logps, beta, smoothing):
    chosen, rejected, ref_chosen, ref_rejected = doubles(*logps)
    right = dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta)[0]
    flipped = dpo_loss(rejected, chosen, ref_rejected, ref_chosen, beta)[0]
    smoothed = dpo_loss(
        chosen, rejected, ref_chosen, ref_rejected, beta, label_smoothing=smoothing
    )[0]
    torch.testing.assert_close(
        smoothed, (1 - smoothing) * right + smoothing * flipped, rtol=1e-12, atol=0
    )


@often
@given(betas, st.floats(-50, 50))
def test_ipo_is_the_squared_distance_from_half_of_one_over_beta(beta, away):
    best = 1 / (2 * beta)
    assert loss_of_margin(best, beta, "ipo") == (0, 0)
    value, slope = loss_of_margin(best + away, beta, "ipo")
    assert value == pytest.approx(away**2, rel=1e-9, abs=1e-9)
    assert slope == pytest.approx(2 * away, rel=1e-9, abs=1e-9)


@often
@given(betas, st.floats(0.01, 50))
def test_hinge_falls_at_beta_until_one_over_beta_and_is_zero_beyond(beta, away):
    assert loss_of_margin(1 / beta + away, beta, "hinge") == (0, 0)
    value, slope = loss_of_margin(1 / beta - away, beta, "hinge")
    assert value == pytest.approx(beta * away, rel=1e-9)
    assert slope == -beta
    assert loss_of_margin(0.0, beta, "hinge")[0] == 1


@variants
def test_rewards_carry_no_gradient_and_the_loss_does(loss, smoothing):
    policy = [normal(3, seed=seed).requires_grad_() for seed in range(2)]
    reference = [normal(3, seed=seed) for seed in (2, 3)]
    losses, chosen_rewards, rejected_rewards = dpo_loss(*policy, *reference, 0.1, loss, smoothing)
    assert not chosen_rewards.requires_grad and not rejected_rewards.requires_grad
    assert losses.requires_grad


@pytest.mark.parametrize("loss", ["", "dpo", "Sigmoid", "kto_pair", None])
def test_unknown_losses_are_rejected(loss):
    with pytest.raises(ValueError, match="sigmoid, ipo or hinge"):
        dpo_loss(*doubles(-1, -2, -3, -4), loss=loss)


@pytest.mark.parametrize("loss", ["ipo", "hinge"])
def test_label_smoothing_is_rejected_without_sigmoid(loss):
    with pytest.raises(ValueError, match="label_smoothing"):
        dpo_loss(*doubles(-1, -2, -3, -4), loss=loss, label_smoothing=0.1)


@pytest.mark.parametrize("beta", [0.1, 0.5, 2.0])
def test_tabular_policy_trained_on_bradley_terry_preferences_is_the_theorems_optimum(beta):
    """pi_ref exp(r / beta) / Z (eq. 4), from the expected loss over all ordered pairs."""
    prompts, answers = 3, 5
    reference = normal(prompts, answers, seed=1).log_softmax(1)
    reward = normal(prompts, answers, seed=2)
    partition = (reference.exp() * (reward / beta).exp()).sum(1, keepdim=True)
    optimum = reference.exp() * (reward / beta).exp() / partition
    chosen, rejected = map(list, zip(*itertools.permutations(range(answers), 2), strict=True))
    preference = torch.sigmoid(reward[:, chosen] - reward[:, rejected])  # eq. 1
    logits = reference.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [logits],
        max_iter=1000,
        tolerance_grad=1e-12,
        tolerance_change=0,
        line_search_fn="strong_wolfe",
    )

    def expected_loss():
        optimizer.zero_grad()
        policy = logits.log_softmax(1)
        losses, _, _ = dpo_loss(
            *(
                logps.flatten()
                for logps in (
                    policy[:, chosen],
                    policy[:, rejected],
                    reference[:, chosen],
                    reference[:, rejected],
                )
            ),
            beta,
        )
        loss = (preference.flatten() * losses).sum()
        loss.backward()
        return loss

    def total_variation(policy):
        return (policy.exp() - optimum).abs().sum(1) / 2

    optimizer.step(expected_loss)
    assert total_variation(reference).min() > 0.1, "there was something to learn"
    assert total_variation(logits.detach().log_softmax(1)).max() < 1e-5
