"""The preference mathematics on pairs: values by hand, derivatives, degenerate cases, options and what they refuse."""

import math

import pytest
import torch
import torch.nn.functional as F

import tisdpo
from tisdpo import Objective, Weighting, reference
from tisdpo.losses import LOSSES, chosen_mask, pairwise_losses, resolve_normalizer, score_gradients, sequence_scores

CU = torch.tensor([0, 3, 5, 6, 10])
N = 10


def tensors(seed=0):
    g = torch.Generator().manual_seed(seed)
    logps, ref_logps, kl, weights = (torch.randn(N, generator=g, dtype=torch.float64) for _ in range(4))
    return logps - 3, ref_logps - 3, kl.abs(), weights.abs()


def loss(objective=None, *, weighted=True, seed=0, **kwargs):
    logps, ref_logps, kl, weights = tensors(seed)
    objective = objective or Objective()
    return tisdpo.tis_dpo_loss(
        logps.requires_grad_(), ref_logps, CU, token_weights=weights if weighted else None,
        kl=kl if objective.kl else None, objective=objective, **kwargs,
    )  # fmt: skip


def log_sigmoid(x):
    return -math.log1p(math.exp(-x))


# score_w = 6, score_l = 2, T = 3 and 4, beta = 0.5: z = 2
BY_HAND = {
    "sigmoid": (Objective(beta=0.5), -log_sigmoid(2)),
    "smoothed": (Objective(beta=0.5, label_smoothing=0.1), -0.9 * log_sigmoid(2) - 0.1 * log_sigmoid(-2)),
    "sigmoid_norm": (Objective("sigmoid_norm", beta=0.5), -log_sigmoid(0.5 * (6 / 3 - 2 / 4))),
    "hinge_met": (Objective("hinge", beta=0.5), 0.0),
    "hinge": (Objective("hinge", beta=0.125), 0.5),
    "ipo": (Objective("ipo", beta=0.5), (6 / 3 - 2 / 4 - 1) ** 2),
    "robust": (Objective("robust", beta=0.5, label_smoothing=0.1), (-0.9 * log_sigmoid(2) + 0.1 * log_sigmoid(-2)) / 0.8),
    "robust_without_noise": (Objective("robust", beta=0.5), -log_sigmoid(2)),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_values_by_hand(name):
    objective, expected = BY_HAND[name]
    scores, lengths = torch.tensor([6.0, 2.0], dtype=torch.float64), torch.tensor([3.0, 4.0], dtype=torch.float64)
    assert abs(pairwise_losses(scores, lengths, objective).item() - expected) < 1e-15


def test_every_loss_has_a_value_by_hand():
    assert {objective.loss for objective, _ in BY_HAND.values()} == set(LOSSES)


@pytest.mark.parametrize("name", BY_HAND)
def test_closed_form_derivatives_equal_autograd(name):
    objective = BY_HAND[name][0]
    scores = (4 * torch.randn(40, dtype=torch.float64)).requires_grad_()
    lengths = torch.arange(40, dtype=torch.float64)  # one is 0: an empty completion
    truth = torch.autograd.grad(pairwise_losses(scores, lengths, objective).sum(), scores)[0]
    torch.testing.assert_close(score_gradients(scores.detach(), lengths, objective), truth, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("name", BY_HAND)
def test_losses_and_derivatives_stay_finite_for_extreme_scores(name):
    scores = torch.tensor([1e4, -1e4, -1e4, 1e4, 0.0, 0.0])
    for f in (pairwise_losses, score_gradients):
        assert f(scores, torch.ones(6), BY_HAND[name][0]).isfinite().all()


@pytest.mark.parametrize("loss", ["sigmoid", "robust", "hinge"])
def test_a_pair_that_is_told_apart_for_certain_has_no_loss(loss):
    """As where the reference forbids a chosen token: not 0 times infinity."""
    for scores in ([math.inf, 0.0], [0.0, -math.inf]):
        scores = torch.tensor(scores)
        assert pairwise_losses(scores, torch.ones(2), Objective(loss)).tolist() == [0.0]
        assert reference.pairwise_losses(scores, torch.ones(2), loss).tolist() == [0.0]
        assert score_gradients(scores, torch.ones(2), Objective(loss)).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("kl, alpha, sign", [(None, 1.0, 0.0), ("reverse", 0.7, -0.7), ("forward", 0.7, 0.7)])
def test_scores_and_sign_of_the_kl(kl, alpha, sign):
    D, K = torch.tensor([1.0, 2.0]), torch.tensor([10.0, 20.0])
    objective = Objective(kl=kl, alpha=alpha)
    assert objective.kl_sign == sign
    torch.testing.assert_close(sequence_scores(D, K, objective), D + sign * K)
    torch.testing.assert_close(sequence_scores(D, K, objective), reference.scores(D, K, kl, alpha))


def test_detached_chosen_kl_keeps_its_value_and_loses_its_gradient():
    D, K = torch.zeros(4), torch.ones(4, requires_grad=True)
    plain, detached = (sequence_scores(D, K, Objective(kl="forward", alpha=0.5, detach_chosen_kl=flag)) for flag in (False, True))
    assert torch.equal(plain, detached)
    assert torch.autograd.grad(plain.sum(), K)[0].tolist() == [0.5] * 4
    assert torch.autograd.grad(detached.sum(), K)[0].tolist() == [0, 0.5, 0, 0.5]
    assert chosen_mask(4).tolist() == [True, False, True, False]


# Against the reference, start to end


@pytest.mark.parametrize("objective", [
    Objective(), Objective(kl="reverse", alpha=0.3), Objective.preset("tdpo2"), Objective("hinge", kl="forward"), Objective("ipo"),
    Objective("robust", label_smoothing=0.2), Objective(label_smoothing=0.3, beta=2.0), Objective("sigmoid_norm", kl="reverse"),
    Objective(nll_coef=0.7), Objective("ipo", kl="forward", nll_coef=1.0),
], ids=str)  # fmt: skip
@pytest.mark.parametrize("weighted", [True, False])
def test_loss_from_logps_equals_the_formulas(objective, weighted):
    logps, ref_logps, kl, weights = tensors()
    w = weights if weighted else torch.ones(N, dtype=torch.float64)
    D = reference.segment_sums(w * (logps - ref_logps), CU)
    K = reference.segment_sums(w * kl, CU)
    scores = reference.scores(D, K, objective.kl, objective.alpha, objective.detach_chosen_kl)
    truth = reference.pairwise_losses(scores, CU.diff().double(), objective.loss, objective.beta, objective.label_smoothing)
    nll = torch.stack([-logps[0:3].mean(), -logps[5:6].mean()])
    truth = truth + objective.nll_coef * nll
    output = loss(objective, weighted=weighted)
    torch.testing.assert_close(output.losses, truth)
    torch.testing.assert_close(output.loss.detach(), truth.mean())
    torch.testing.assert_close(output.chosen_rewards, objective.beta * scores[0::2])
    torch.testing.assert_close(output.rejected_rewards, objective.beta * scores[1::2])
    torch.testing.assert_close(output.logits, objective.beta * (scores[0::2] - scores[1::2]))
    torch.testing.assert_close(output.chosen_logps, reference.segment_sums(logps, CU)[0::2])
    assert (output.chosen_kl is None) == (objective.kl is None)
    assert (output.chosen_nll is None) == (objective.nll_coef == 0)
    if objective.nll_coef:
        torch.testing.assert_close(output.chosen_nll, nll)
    if objective.kl:
        torch.testing.assert_close((output.chosen_kl, output.rejected_kl), (K[0::2], K[1::2]))


def test_sums_of_sequences_with_every_source_of_weights():
    logps, ref_logps, kl, weights = tensors()
    pos, neg = torch.randn(N, dtype=torch.float64), torch.randn(N, dtype=torch.float64)
    is_chosen = torch.repeat_interleave(torch.tensor([True, False, True, False]), CU.diff())
    formed = reference.exp_weights(pos - neg, is_chosen)
    ranked = tisdpo.token_weights(pos, neg, is_chosen, Weighting("rank"), cu_seqlens=CU)
    for kwargs, w in (
        (dict(token_weights=weights), weights),
        (dict(pos_logps=pos, neg_logps=neg), formed),
        (dict(pos_logps=pos, neg_logps=neg, weighting=Weighting("rank")), ranked),
        ({}, torch.ones(N, dtype=torch.float64)),
    ):
        for cu in (CU, CU.int()):
            sums = tisdpo.sequence_sums(logps, ref_logps, cu, kl=kl, **kwargs)
            torch.testing.assert_close(sums.logratio, reference.segment_sums(w * (logps - ref_logps), CU))
            torch.testing.assert_close(sums.kl, reference.segment_sums(w * kl, CU))
            output = tisdpo.tis_dpo_loss(logps, ref_logps, cu, kl=kl, objective=Objective(kl="reverse"), **kwargs)
            expected = tisdpo.tis_dpo_loss(logps, ref_logps, CU, kl=kl, objective=Objective(kl="reverse"), token_weights=w)
            torch.testing.assert_close(output.losses, expected.losses)
    assert tisdpo.sequence_sums(logps, ref_logps, CU).kl is None


def test_no_gradient_reaches_the_contrastive_pair():
    logps, ref_logps, *_ = tensors()
    pos, neg = (torch.randn(N, dtype=torch.float64, requires_grad=True) for _ in range(2))
    sums = tisdpo.sequence_sums(logps.requires_grad_(), ref_logps, CU, pos_logps=pos, neg_logps=neg)
    sums.logratio.sum().backward()
    assert logps.grad is not None and pos.grad is None and neg.grad is None


# Degenerate identities


def test_weights_one_without_kl_is_dpo():
    logps, ref_logps, *_ = tensors()
    delta = reference.segment_sums(logps - ref_logps, CU)
    dpo = -F.logsigmoid(0.1 * (delta[0::2] - delta[1::2])).mean()
    for objective in (Objective(), Objective.preset("dpo"), Objective("robust")):
        torch.testing.assert_close(loss(objective, weighted=False).loss.detach(), dpo, rtol=1e-14, atol=0)
    ones = tisdpo.tis_dpo_loss(logps, ref_logps, CU, token_weights=torch.ones(N, dtype=torch.float64)).loss
    torch.testing.assert_close(ones, dpo, rtol=1e-14, atol=0)


def test_alpha_zero_is_no_kl():
    for kl in ("reverse", "forward"):
        assert torch.equal(loss(Objective(kl=kl, alpha=0.0)).losses, loss().losses)
    assert torch.equal(
        loss(Objective.preset("tdpo2", alpha=0.0), weighted=False).losses, loss(Objective.preset("dpo"), weighted=False).losses
    )


def test_scaling_weights_is_scaling_beta():
    logps, ref_logps, kl, weights = tensors()
    for name in ("sigmoid", "hinge", "robust"):
        a = tisdpo.tis_dpo_loss(logps, ref_logps, CU, token_weights=3 * weights, kl=kl, objective=Objective(name, kl="reverse", beta=0.1))
        b = tisdpo.tis_dpo_loss(logps, ref_logps, CU, token_weights=weights, kl=kl, objective=Objective(name, kl="reverse", beta=0.1 * 3))
        torch.testing.assert_close(a.losses, b.losses, rtol=1e-13, atol=0)
        torch.testing.assert_close(a.logits, b.logits, rtol=1e-13, atol=0)


def test_policy_equal_to_reference_is_ln_2_whatever_the_weights():
    logps, _, _, weights = tensors()
    output = tisdpo.tis_dpo_loss(logps, logps, CU, token_weights=weights, kl=torch.zeros_like(logps), objective=Objective(kl="reverse"))
    assert (output.losses == math.log(2)).all() and (output.logits == 0).all()


def test_exchanging_the_sides_negates_the_logit():
    logps, ref_logps, _, weights = tensors()
    order = torch.cat([torch.arange(3, 5), torch.arange(0, 3), torch.arange(6, 10), torch.arange(5, 6)])
    cu = torch.tensor([0, 2, 5, 9, 10])
    a = tisdpo.tis_dpo_loss(logps, ref_logps, CU, token_weights=weights)
    b = tisdpo.tis_dpo_loss(logps[order], ref_logps[order], cu, token_weights=weights[order])
    torch.testing.assert_close(a.logits, -b.logits)


# Reduction and normalizer


def test_reduction_and_normalizer():
    mean, total = loss(), loss(reduction="sum")
    torch.testing.assert_close(mean.loss * 2, total.loss)
    torch.testing.assert_close(loss(normalizer=8).loss * 8, total.loss)
    torch.testing.assert_close(loss(normalizer=torch.tensor(8.0)).loss * 8, total.loss)
    assert torch.equal(mean.losses, total.losses)
    assert resolve_normalizer(None, "mean", 0) == 1.0  # no pairs: a zero, not 0 / 0


@pytest.mark.parametrize("objective", [Objective("ipo"), Objective("sigmoid_norm"), Objective(nll_coef=1.0)], ids=str)
def test_ignored_positions_are_no_tokens(objective):
    logps, ref_logps, *_ = tensors()
    ignored = torch.zeros(N, dtype=torch.bool)
    ignored[[1, 8]] = True
    quiet = [x.masked_fill(ignored, 0) for x in (logps, ref_logps)]
    keep = torch.cat([torch.arange(0, 1), torch.arange(2, 8), torch.arange(9, 10)])
    short = tisdpo.tis_dpo_loss(logps[keep], ref_logps[keep], torch.tensor([0, 2, 4, 5, 8]), objective=objective)
    torch.testing.assert_close(tisdpo.tis_dpo_loss(*quiet, CU, objective=objective, ignored=ignored).losses, short.losses)
    assert not torch.allclose(tisdpo.tis_dpo_loss(*quiet, CU, objective=objective).losses, short.losses)
    weights = (~ignored).double()  # values there count for nothing either, where weights are 0
    loud = tisdpo.tis_dpo_loss(logps, ref_logps, CU, token_weights=weights, objective=objective, ignored=ignored)
    torch.testing.assert_close(loud.losses, short.losses)
    torch.testing.assert_close(loud.chosen_logps, short.chosen_logps)


def test_empty_completions_and_no_pairs_are_differentiable_zeros():
    logps = torch.tensor([-1.0, -2.0], requires_grad=True)
    for name in LOSSES:
        objective = Objective(name, nll_coef=0.5)  # of the one chosen that has tokens, and 0 of the one that has none
        output = tisdpo.tis_dpo_loss(logps, torch.tensor([-1.5, -1.5]), torch.tensor([0, 0, 2, 2, 2]), objective=objective)
        assert output.loss.isfinite() and torch.autograd.grad(output.loss, logps)[0].isfinite().all()
    nothing = torch.zeros(0, requires_grad=True)
    output = tisdpo.tis_dpo_loss(nothing, torch.zeros(0), torch.tensor([0]))
    assert output.loss == 0 and torch.autograd.grad(output.loss, nothing)[0].shape == (0,)


# Options

CHANGES = {
    "loss": Objective("hinge"),
    "beta": Objective(beta=0.2),
    "kl": Objective(kl="forward"),
    "label_smoothing": Objective(label_smoothing=0.1),
    "nll_coef": Objective(nll_coef=0.1),
}


@pytest.mark.parametrize("option", CHANGES)
def test_every_option_changes_the_loss(option):
    assert not torch.equal(loss(CHANGES[option]).losses, loss().losses)


def test_alpha_changes_the_loss_and_detaching_the_gradient():
    assert not torch.equal(loss(Objective(kl="reverse", alpha=0.5)).losses, loss(Objective(kl="reverse")).losses)
    logps, ref_logps, kl, _ = tensors()
    kl.requires_grad_()
    grads = [
        torch.autograd.grad(
            tisdpo.tis_dpo_loss(logps, ref_logps, CU, kl=kl, objective=Objective(kl="forward", detach_chosen_kl=flag)).loss, kl
        )[0]
        for flag in (False, True)
    ]
    assert (grads[0][:3] != 0).all() and (grads[1][:3] == 0).all() and torch.equal(grads[0][3:5], grads[1][3:5])
    assert set(CHANGES) | {"alpha", "detach_chosen_kl"} == set(Objective.__dataclass_fields__)


def test_presets():
    assert Objective.preset("paper") == Objective(kl="reverse", alpha=1.0)
    assert Objective.preset("official-code") == Objective.preset("dpo") == Objective()
    assert Objective.preset("tdpo1") == Objective(kl="forward", alpha=1.0)
    assert Objective.preset("tdpo2") == Objective(kl="forward", alpha=0.5, detach_chosen_kl=True)
    assert Objective.preset("paper", beta=0.3).beta == 0.3
    with pytest.raises(ValueError, match="preset must be one of paper, official-code, dpo, tdpo1, tdpo2, got 'simpo'"):
        Objective.preset("simpo")


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(loss="kto"), "loss must be one of sigmoid, sigmoid_norm, hinge, ipo, robust, got 'kto'"),
        (dict(kl="both"), "kl must be None, 'reverse' or 'forward', got 'both'"),
        (dict(beta=0.0), "beta must be positive, got 0.0"),
        (dict(beta=math.nan), "beta must be positive, got nan"),
        (dict(alpha=-1.0), "alpha must be a number of 0 or more, got -1.0"),
        (dict(label_smoothing=0.5), r"label_smoothing must be in \[0, 0.5\), got 0.5"),
        (dict(label_smoothing=-0.1), r"label_smoothing must be in \[0, 0.5\), got -0.1"),
        (dict(loss="hinge", label_smoothing=0.1), "label_smoothing has no effect with loss='hinge'"),
        (dict(loss="sigmoid_norm", label_smoothing=0.1), "label_smoothing has no effect with loss='sigmoid_norm'"),
        (dict(nll_coef="1.0"), "nll_coef must be a number, got '1.0'"),
        (dict(nll_coef=True), "nll_coef must be a number, got True"),
        (dict(beta=math.inf), "beta must be positive, got inf"),
        (dict(nll_coef=-0.1), "nll_coef must be a number of 0 or more, got -0.1"),
        (dict(nll_coef=math.nan), "nll_coef must be a number of 0 or more, got nan"),
        (dict(detach_chosen_kl=True), "detach_chosen_kl has no effect with kl=None"),
    ],
    ids=str,
)
def test_bad_fields(fields, message):
    with pytest.raises(ValueError, match=message):
        Objective(**fields)


# Losses of others, as docs/usage.md has them


def test_simpo_without_a_margin_and_ld_dpo():
    logps, ref_logps, _, _ = tensors()
    lengths = CU.diff()
    means = torch.stack([x.mean() for x in logps.split(lengths.tolist())])
    found = tisdpo.tis_dpo_loss(logps, torch.zeros(N), CU, objective=Objective("sigmoid_norm", beta=2.0)).losses
    torch.testing.assert_close(found, -F.logsigmoid(2.0 * (means[0::2] - means[1::2])))

    a = 0.3  # TRL: the log-ratios of what both lengths share, and a times those of the tail
    shared = torch.minimum(lengths[0::2], lengths[1::2]).repeat_interleave(2)
    sums = [x[:n].sum() + a * x[n:].sum() for x, n in zip((logps - ref_logps).split(lengths.tolist()), shared)]
    expected = -F.logsigmoid(0.1 * torch.stack([w - l for w, l in zip(sums[0::2], sums[1::2])]))
    weights = torch.cat([torch.where(torch.arange(length) < n, 1.0, a) for length, n in zip(lengths, shared)]).double()
    torch.testing.assert_close(tisdpo.tis_dpo_loss(logps, ref_logps, CU, token_weights=weights).losses, expected)
