"""The method in plain PyTorch, one function per equation: the oracle of every test, and the place to read the mathematics.

Any float dtype, any device, ordinary autograd, nothing fused, nothing clever. It imports nothing of the package, and nothing of
the package imports it. Papers: TIS-DPO (arXiv 2410.04350), TDPO (2404.11999), DPO (2305.18290), IPO (2310.12036), robust DPO
(2403.00409).

Sizes: P pairs, S = 2P sequences (chosen_0, rejected_0, chosen_1, ...), N completion tokens, H hidden, V vocabulary.
Log-probs and KL are in nats.
"""

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor


def transform_logits(raw: Tensor, logit_scale: float = 1.0, softcap: float | None = None, temperature: float = 1.0) -> Tensor:
    """z = cap(logit_scale * raw) / temperature with cap(x) = softcap * tanh(x / softcap); the order in which models apply them."""
    z = logit_scale * raw
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    return z / temperature


def linear_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None = None, **transform) -> Tensor:
    """The head: hidden [N, H], weight [V, H], bias [V] -> logits [N, V]."""
    return transform_logits(F.linear(hidden, weight, bias), **transform)


def token_logps(logits: Tensor, target: Tensor, ignore_index: int = -100) -> Tensor:
    """log pi(y_t | x, y_<t) of logits [N, V] at target [N]; 0 where the target is ignored."""
    keep = target != ignore_index
    logps = logits.log_softmax(-1).gather(-1, target.where(keep, 0)[..., None])[..., 0]
    return logps.where(keep, 0)


def token_kl(logits: Tensor, ref_logits: Tensor, kl: str) -> Tensor:
    """KL(pi || pi_ref) ("reverse") or KL(pi_ref || pi) ("forward") of every row of logits [N, V]; 0 log 0 = 0."""
    logp, logq = logits.log_softmax(-1), ref_logits.log_softmax(-1)
    if kl == "forward":
        logp, logq = logq, logp
    possible = logp.exp() > 0
    difference = logp.where(possible, 0) - logq.where(possible, 0)
    return (logp.exp() * difference).sum(-1)


def contrast(pos_logps: Tensor, neg_logps: Tensor) -> Tensor:
    """r_t = log pi+(y_t | x, y_<t) - log pi-(y_t | x, y_<t)   (TIS-DPO, the estimate of a token's reward)."""
    return pos_logps - neg_logps


def exp_weights(
    contrast: Tensor,
    is_chosen: Tensor,
    k: float = 1.0,
    mu_chosen: float = 1.0,
    mu_rejected: float = -1.0,
    lower: float = -0.5,
    upper: float = 1.5,
) -> Tensor:
    """w_t = k * exp(mu_s * clamp(r_t, L, U))   (TIS-DPO, Theorem 2 with the clamp of the paper's experiments)."""
    mu = torch.where(is_chosen, mu_chosen, mu_rejected).to(contrast.dtype)
    return k * torch.exp(mu * contrast.clamp(lower, upper))


def segment_sums(values: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Sum of values [N] over every sequence: cu_seqlens [S+1] -> [S]."""
    bounds = cu_seqlens.tolist()
    return torch.stack([values[a:b].sum() for a, b in itertools.pairwise(bounds)]) if len(bounds) > 1 else values.new_zeros(0)


def scores(logratio: Tensor, sequence_kl: Tensor | None, kl: str | None, alpha: float, detach_chosen_kl: bool = False) -> Tensor:
    """D_s - alpha K_s ("reverse": A = Q - V with V under pi_theta) or D_s + alpha K_s ("forward", TDPO: V under pi_ref)."""
    if kl is None:
        return logratio
    if detach_chosen_kl:
        is_chosen = torch.arange(len(logratio), device=logratio.device) % 2 == 0
        sequence_kl = torch.where(is_chosen, sequence_kl.detach(), sequence_kl)
    return logratio - alpha * sequence_kl if kl == "reverse" else logratio + alpha * sequence_kl


def pairwise_losses(score: Tensor, lengths: Tensor, loss: str = "sigmoid", beta: float = 0.1, label_smoothing: float = 0.0) -> Tensor:
    """Loss of every pair [P] from the scores [S] and lengths [S] of its two sequences; z = beta * (score_w - score_l).

    sigmoid  -(1 - e) log sigmoid(z) - e log sigmoid(-z)                          (DPO; e = label_smoothing, conservative DPO)
    sigmoid_norm  -log sigmoid(beta * (score_w / T_w - score_l / T_l))             (length-normalised DPO)
    hinge    max(0, 1 - z)                                                        (SLiC)
    ipo      (score_w / T_w - score_l / T_l - 1 / (2 beta))^2                     (IPO, averaged per token as its authors ran it)
    robust   (-(1 - e) log sigmoid(z) + e log sigmoid(-z)) / (1 - 2 e)            (robust DPO)
    """
    z = beta * (score[0::2] - score[1::2])
    e = label_smoothing
    if loss == "sigmoid":
        return -(1 - e) * F.logsigmoid(z) - (e * F.logsigmoid(-z) if e else 0)  # not 0 times infinity
    if loss == "sigmoid_norm":
        mean = score / lengths.clamp(min=1)
        return -F.logsigmoid(beta * (mean[0::2] - mean[1::2]))
    if loss == "hinge":
        return torch.relu(1 - z)
    if loss == "ipo":
        mean = score / lengths.clamp(min=1)
        return (mean[0::2] - mean[1::2] - 1 / (2 * beta)) ** 2
    if loss == "robust":
        return (-(1 - e) * F.logsigmoid(z) + (e * F.logsigmoid(-z) if e else 0)) / (1 - 2 * e)
    raise ValueError(f"unknown loss {loss!r}")


def chosen_nll(logps: Tensor, lengths: Tensor) -> Tensor:
    """-log pi(y_w | x) / T_w of every pair [P], from log-probs [S] and lengths [S] of its sequences (RPO, arXiv 2404.19733, Eq. 1)."""
    return -logps[0::2] / lengths[0::2].clamp(min=1)


def tis_dpo_losses(
    logits: Tensor,
    ref_logits: Tensor,
    target: Tensor,
    cu_seqlens: Tensor,
    token_weights: Tensor | None = None,
    *,
    kl: str | None = None,
    alpha: float = 1.0,
    detach_chosen_kl: bool = False,
    loss: str = "sigmoid",
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    nll_coef: float = 0.0,
    ignore_index: int = -100,
) -> Tensor:
    """The objective, start to end: u - eta inside the pairwise loss (TIS-DPO Eqs. 16-17), from logits [N, V] to losses [P].

    nll_coef adds the chosen's NLL a token, without weights.
    """
    keep = (target != ignore_index).to(logits.dtype)
    weights = keep if token_weights is None else keep * token_weights.to(logits.dtype)
    logps = token_logps(logits, target, ignore_index)
    logratio = logps - token_logps(ref_logits, target, ignore_index)
    D = segment_sums(weights * logratio, cu_seqlens)
    K = None if kl is None else segment_sums(weights * token_kl(logits, ref_logits, kl), cu_seqlens)
    lengths = segment_sums(keep, cu_seqlens)
    losses = pairwise_losses(scores(D, K, kl, alpha, detach_chosen_kl), lengths, loss, beta, label_smoothing)
    return losses + nll_coef * chosen_nll(segment_sums(logps, cu_seqlens), lengths)


def logits_gradient(
    logits: Tensor, ref_logits: Tensor | None, target: Tensor, g_logp: Tensor, g_kl: Tensor | None = None, kl: str | None = None
) -> Tensor:
    """d/dz of sum_t g_logp_t * logp_t + g_kl_t * KL_t, in closed form: what every fused backward computes.

    logp        g * (onehot(y) - p)
    reverse KL  g * p * (log p - log q - KL)
    forward KL  g * (p - q)
    """
    p = logits.softmax(-1)
    D = g_logp[:, None] * (F.one_hot(target, logits.shape[-1]).to(p.dtype) - p)
    if kl == "forward":
        D = D + g_kl[:, None] * (p - ref_logits.softmax(-1))
    elif kl == "reverse":
        difference = logits.log_softmax(-1) - ref_logits.log_softmax(-1)
        D = D + g_kl[:, None] * p * (difference - token_kl(logits, ref_logits, kl)[:, None])
    return D
