"""Direct Preference Optimization as pure functions of tensors (Rafailov et al., arXiv 2305.18290).

hidden states -> token_logps -> sequence_logps -> score (dpo_loss, pair_metrics)

Where each equation of the paper is:
    log pi(y|x), the sum over the answer's tokens      sequence_logps
    eq. 5, the implicit reward beta log(pi / pi_ref)   dpo_loss, chosen_rewards and rejected_rewards
    eq. 6, the Bradley-Terry model of a preference     dpo_loss, sigmoid of the margin beta h
    eq. 7, the loss                                    dpo_loss, loss="sigmoid"
    section 4, its gradient                            by autograd; test_dpo_loss.py, section_4

Of packages it imports torch alone.
"""

import torch
import torch.nn.functional as F

LOGITS_AT_ONCE = 2**25  # a chunk of logits holds this many numbers, whatever the vocabulary
BYTES_KEPT = 2**27  # of probabilities, for the backward pass, which computes the others again


def token_logps(hidden, weight, targets):
    """Log-probability of each target token, log softmax(hidden @ weight.T)[target], in nats.

    The labels are shifted by whoever selects `hidden`: row i is the final hidden state at the
    position before token i, since the logits at position t predict token t + 1. The largest
    intermediate tensor has LOGITS_AT_ONCE numbers, and BYTES_KEPT at most are kept for the
    backward pass, so memory does not grow with vocabulary times length.

    hidden   (n, d) float32, bfloat16 or float64: final hidden states, one for each target
    weight   (v, d), same dtype: the LM head
    targets  (n,) int64 token ids in [0, v)
    returns  (n,) float32 (float64 for float64 inputs), differentiable in hidden and weight
    raises   ValueError if there is not one target for each hidden state, RuntimeError if a target
             is outside the vocabulary
    """
    if len(hidden) != len(targets):  # a lone target would be broadcast over its chunk
        raise ValueError(f"{len(hidden)} hidden states, but {len(targets)} targets")
    return _TokenLogps.apply(hidden, weight, targets)


class _TokenLogps(torch.autograd.Function):
    """The LM head a chunk at a time; the backward pass has kept the first chunks' probabilities."""

    @staticmethod
    def forward(ctx, hidden, weight, targets):
        # with an odd number of rows, products in bfloat16 take an eighth more time
        ctx.rows = LOGITS_AT_ONCE // weight.shape[0] // 2 * 2 or 1
        bytes_a_chunk = ctx.rows * weight.shape[0] * weight.itemsize
        logps = []
        kept = []
        for h, y in zip(hidden.split(ctx.rows), targets.split(ctx.rows), strict=True):
            picked, probabilities = _softmax(h, weight, y)
            logps.append(picked)
            if len(kept) < BYTES_KEPT // bytes_a_chunk:
                kept.append(probabilities)
            del probabilities  # before the next chunk's take memory
        ctx.save_for_backward(hidden, weight, targets, *kept)
        return torch.cat(logps)

    @staticmethod
    def backward(ctx, grad):
        hidden, weight, targets, *kept = ctx.saved_tensors
        # d logp(y) / d logits = onehot(y) - softmax(logits)
        grad = grad[:, None]
        scaled = hidden.clone().mul_(grad)
        expected = torch.empty_like(hidden)  # softmax(logits) @ weight
        grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = torch.zeros_like(weight)
        for number, start in enumerate(range(0, len(targets), ctx.rows)):
            part = slice(start, start + ctx.rows)
            if number < len(kept):
                probabilities = kept[number]
            else:
                _, probabilities = _softmax(hidden[part], weight, targets[part])
            torch.mm(probabilities, weight, out=expected[part])
            if grad_weight is not None:
                grad_weight.addmm_(probabilities.T, scaled[part], alpha=-1)
            del probabilities
        if grad_weight is not None:
            grad_weight.index_add_(0, targets, scaled)
        grad_hidden = weight[targets].to(grad.dtype)
        grad_hidden.sub_(expected).mul_(grad)
        return grad_hidden.to(hidden.dtype), grad_weight, None


def _softmax(hidden, weight, targets):
    """The targets' log-probabilities and all probabilities, which take the place of the logits.

    In float32 or better, since a sum in bfloat16 would lose the last digits; a few rows at a time,
    which stay in the processor's cache. By exp and sum, as torch's softmax adds 49,152 numbers up
    with an error of 5e-6, and sum with one of 3e-7.

    returns  (n,) float32 or float64; (n, v) of the inputs' dtype
    """
    probabilities = F.linear(hidden, weight)
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    picked = []
    for part, y in zip(probabilities.split(8), targets.split(8), strict=True):
        logits = part.to(dtype, copy=True)
        top = logits.amax(1, keepdim=True)
        logits.sub_(top)
        chosen = logits.gather(1, y[:, None])
        total = logits.exp_().sum(1, keepdim=True)
        picked.append(chosen - total.log())
        part.copy_(logits.div_(total))
    return torch.cat(picked).squeeze(1), probabilities


def sequence_logps(logps, lengths):
    """log pi(y|x) of each answer in nats: the sum of its tokens' log-probabilities.

    logps    (n,) float: token log-probabilities of the answers, one answer after the other
    lengths  list of int that add up to n, each at least 1
    returns  (len(lengths),) of the same dtype
    raises   RuntimeError if the lengths do not add up to n
    """
    answers = []
    for answer in logps.split(lengths):
        answers.append(answer.sum())
    return torch.stack(answers)


def dpo_loss(
    policy_chosen_logps,
    policy_rejected_logps,
    reference_chosen_logps,
    reference_rejected_logps,
    beta=0.1,
    loss="sigmoid",
    label_smoothing=0.0,
):
    """Loss and implicit rewards of each pair, from four vectors of log pi(y|x).

    Each pair is by itself: gradients are of a row's pairs at a time, figures of a whole step's.

    With h = log(pi(y_w|x) / pi_ref(y_w|x)) - log(pi(y_l|x) / pi_ref(y_l|x)):
        sigmoid  -log sigmoid(beta h)     DPO, arXiv 2305.18290, eq. 7. With label_smoothing e, the
                 chance that a label is flipped:
                 -(1 - e) log sigmoid(beta h) - e log sigmoid(-beta h)     conservative DPO,
                 E. Mitchell, "A note on DPO with noisy preferences and relationship to IPO", eq. 3
        ipo      (h - 1 / (2 beta))^2     IPO, arXiv 2310.12036, eq. 17, whose tau is beta. There
                 log pi(y|x) is a whole answer's, a sum; what its authors ran, as TRL reports of
                 them, and score runs, is averages over an answer's tokens
        hinge    max(0, 1 - beta h)       the hinge-norm loss of RSO, arXiv 2309.06657, eq. 10;
                 SLiC's loss (arXiv 2305.10425) on normalised log-probabilities

    policy_*, reference_*  (n,) float: log pi(y|x) in nats (sequence_logps), or an average a token;
                           no gradient is needed through the reference's
    beta                   float > 0: how strongly the policy is held to the reference
    label_smoothing        float in [0, 0.5), for sigmoid only
    returns                losses, chosen_rewards, rejected_rewards: each (n,), not averaged. The
                           rewards are eq. 5's beta log(pi / pi_ref), whose beta log Z(x) cancels
                           in every margin; they carry no gradient
    raises                 ValueError for another loss, or for label_smoothing without sigmoid
    """
    chosen_logratios = policy_chosen_logps - reference_chosen_logps
    rejected_logratios = policy_rejected_logps - reference_rejected_logps
    h = chosen_logratios - rejected_logratios
    if label_smoothing and loss != "sigmoid":
        raise ValueError(f"label_smoothing is defined for loss sigmoid, not for {loss}")
    if loss == "sigmoid":
        losses = -(1 - label_smoothing) * F.logsigmoid(beta * h)
        losses = losses - label_smoothing * F.logsigmoid(-beta * h)
    elif loss == "ipo":
        losses = (h - 1 / (2 * beta)) ** 2
    elif loss == "hinge":
        losses = F.relu(1 - beta * h)
    else:
        raise ValueError(f"loss is sigmoid, ipo or hinge, not {loss!r}")
    # eq. 5, without beta log Z(x)
    chosen_rewards = beta * chosen_logratios.detach()
    rejected_rewards = beta * rejected_logratios.detach()
    return losses, chosen_rewards, rejected_rewards


def pair_metrics(losses, chosen_rewards, rejected_rewards, chosen_logps, rejected_logps):
    """The figures of each pair, by the names under which they are logged.

    losses, *_rewards  (n,) float, from dpo_loss
    *_logps            (n,) float: log pi(y|x) of the answers under the policy, in nats
    returns            dict of (n,) vectors without gradient. An accuracy is 1 where the chosen
                       answer has the larger reward, 0 where the rejected one has, and one half for
                       a tie, so that the policy before its first step scores one half
    """
    margins = chosen_rewards - rejected_rewards
    return {
        "loss": losses.detach(),
        "rewards/chosen": chosen_rewards,
        "rewards/rejected": rejected_rewards,
        "rewards/margins": margins,
        "rewards/accuracies": (margins.sign() + 1) / 2,
        "logps/chosen": chosen_logps.detach(),
        "logps/rejected": rejected_logps.detach(),
    }


def score(logps, reference, lengths, config):
    """The loss of each pair, with gradient, and its figures, without.

    To dpo_loss comes nll_weight times the chosen answer's mean negative log-likelihood a token
    (arXiv 2404.19733, eq. 1: a pair's own mean, so that a long answer counts as a short one). With
    length_normalize, and for loss ipo always, dpo_loss and the figures are of averages a token.

    logps, reference  (n, 2) float: log pi(y|x) of chosen and rejected answers, in nats
    lengths           (n, 2) how many tokens these answers have
    config            a run's settings
    returns           (n,) losses; dict of (n,) vectors: pair_metrics' and nll/chosen, nats a token
    """
    chosen_nll = -logps[:, 0] / lengths[:, 0]
    if config.length_normalize or config.loss == "ipo":
        logps = logps / lengths
        reference = reference / lengths
    losses, *rewards = dpo_loss(
        *logps.unbind(1), *reference.unbind(1), config.beta, config.loss, config.label_smoothing
    )
    losses = losses + config.nll_weight * chosen_nll
    metrics = pair_metrics(losses, *rewards, *logps.unbind(1))
    metrics["nll/chosen"] = chosen_nll.detach()
    return losses, metrics
