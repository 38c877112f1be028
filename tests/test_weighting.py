"""Every rule that turns a contrast into weights, on values worked out by hand."""

import math

import pytest
import torch

import tisdpo
from tisdpo import Weighting, reference
from tisdpo.weighting import TRANSFORMS, average_ranks, chosen_tokens, contrast_weights, positions, relative_ranks

E = math.e
CU = torch.tensor([0, 4, 8])
R = torch.tensor([-2.0, -0.25, 0.5, 3.0, -2.0, -0.25, 0.5, 3.0], dtype=torch.float64)  # the same contrast on both sides
IS_CHOSEN = torch.tensor([True] * 4 + [False] * 4)


def weights(weighting=None, r=R, is_chosen=IS_CHOSEN, cu=CU, **kwargs):
    return contrast_weights(r, is_chosen, weighting or Weighting(), cu_seqlens=cu, **kwargs)


HAND = {
    "exp": (Weighting(), [E**-0.5, E**-0.25, E**0.5, E**1.5, E**0.5, E**0.25, E**-0.5, E**-1.5]),
    "exp_k": (Weighting(k=2.0), [2 * E**-0.5, 2 * E**-0.25, 2 * E**0.5, 2 * E**1.5, 2 * E**0.5, 2 * E**0.25, 2 * E**-0.5, 2 * E**-1.5]),
    "exp_mu": (Weighting(mu_chosen=0.5, mu_rejected=0.0), [E**-0.25, E**-0.125, E**0.25, E**0.75, 1, 1, 1, 1]),
    "exp_clamp": (Weighting(lower=-1.0, upper=0.1), [E**-1, E**-0.25, E**0.1, E**0.1, E**1, E**0.25, E**-0.1, E**-0.1]),
    "swapped": (Weighting("swapped"), [E**0.5, E**0.25, E**-0.5, E**-1.5, E**-0.5, E**-0.25, E**0.5, E**1.5]),
    "rank": (Weighting("rank"), [0.7, 0.9, 1.1, 1.3, 1.3, 1.1, 0.9, 0.7]),
    "rank_range": (Weighting("rank", low=0.0, high=3.0, k=2.0), [0, 2, 4, 6, 6, 4, 2, 0]),
    "scale": (Weighting("scale"), [0.7, 0.775, 1.0, 1.3, 1.3, 0.925, 0.7, 0.7]),
    "threshold": (Weighting("threshold", lower=0.1, upper=1.5), [0.1, 0.1, 0.5, 1.5, 1.5, 0.25, 0.1, 0.1]),
    "binary": (Weighting("binary"), [0, 0, 1, 1, 1, 1, 0, 0]),
    "binary_top": (Weighting("binary", top=0.25, k=3.0), [0, 0, 0, 3, 3, 0, 0, 0]),
    "binary_all": (Weighting("binary", top=1.0), [1] * 8),
    "equal": (Weighting("equal", k=0.4), [0.4] * 8),
    "gamma": (Weighting("equal", gamma=0.5), [1, 0.5, 0.25, 0.125] * 2),
    "gamma_exp": (Weighting(gamma=0.5, upper=1.0), [E**-0.5, E**-0.25 / 2, E**0.5 / 4, E / 8, E**0.5, E**0.25 / 2, E**-0.5 / 4, E**-1 / 8]),
}  # fmt: skip


@pytest.mark.parametrize("name", HAND)
def test_values_by_hand(name):
    weighting, expected = HAND[name]
    torch.testing.assert_close(weights(weighting), torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-15)


def test_scale_is_affine_between_the_bounds():
    w = weights(Weighting("scale", low=0.0, high=1.0))
    torch.testing.assert_close(w[:4], torch.tensor([0.0, 0.125, 0.5, 1.0], dtype=torch.float64))  # (clamp(r, -0.5, 1.5) + 0.5) / 2
    torch.testing.assert_close(w[4:], torch.tensor([1.0, 0.375, 0.0, 0.0], dtype=torch.float64))  # of -r


def test_every_transform_has_a_value_by_hand():
    assert {w.transform for w, _ in HAND.values()} | {"random"} == set(TRANSFORMS)


def test_exp_is_the_rule_of_the_reference():
    r = torch.randn(8, dtype=torch.float64)
    torch.testing.assert_close(weights(Weighting(k=0.3, upper=0.8), r), reference.exp_weights(r, IS_CHOSEN, k=0.3, upper=0.8))


@pytest.mark.parametrize("transform", sorted(TRANSFORMS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_weights_are_finite_not_negative_and_constants(transform, dtype):
    r = (5 * torch.randn(300, dtype=dtype)).requires_grad_()
    cu, is_chosen = torch.tensor([0, 100, 300]), torch.arange(300) < 100
    w = weights(Weighting(transform, lower=0.0), r, is_chosen, cu)
    assert w.dtype == dtype and w.shape == r.shape and not w.requires_grad
    assert (w >= 0).all() and w.isfinite().all()
    assert (w > 0).all() or transform in ("binary", "threshold")


@pytest.mark.parametrize("transform", ["exp", "rank", "scale", "threshold", "binary"])
def test_weights_rise_with_the_contrast_on_the_chosen_side_and_fall_on_the_rejected(transform):
    r = torch.linspace(-3, 3, 41, dtype=torch.float64).repeat(2)
    lower = 0.1 if transform == "threshold" else -0.5
    w = weights(Weighting(transform, lower=lower), r, torch.arange(82) < 41, torch.tensor([0, 41, 82]))
    assert (w[:41].diff() >= 0).all() and (w[41:].diff() <= 0).all()
    assert w[40] > w[0] and w[81] < w[41]


def test_swapped_reverses_the_order():
    w = weights(Weighting("swapped"))
    assert (w[:4].diff() < 0).all() and (w[4:].diff() > 0).all()


# Ties


def test_ties_share_the_average_rank():
    assert average_ranks(torch.tensor([5.0, 1.0, 5.0, 2.0, 5.0])).tolist() == [3, 0, 3, 1, 3]
    assert average_ranks(torch.tensor([2.0, 2.0])).tolist() == [0.5, 0.5]
    assert average_ranks(torch.tensor([])).tolist() == []
    assert relative_ranks(torch.tensor([1.0, 1.0, 3.0])).tolist() == [0.25, 0.25, 1.0]
    assert relative_ranks(torch.tensor([7.0])).tolist() == [0.5]
    w = weights(Weighting("rank"), torch.zeros(8), cu=CU)
    torch.testing.assert_close(w, torch.ones(8))  # nothing to choose from: the middle of 0.7 .. 1.3


def test_ties_stay_together_in_binary():
    r = torch.tensor([1.0, 2.0, 2.0, 0.0, 1.0, 1.0, 1.0, 1.0])
    assert weights(Weighting("binary", top=0.25), r).tolist() == [0, 1, 1, 0, 1, 1, 1, 1]


def test_rank_does_not_depend_on_the_order_of_tokens():
    r = torch.tensor([0.3, 0.3, -1.0, 2.0])
    order = torch.tensor([3, 1, 0, 2])
    first, second = (weights(Weighting("rank"), x, torch.ones(4, dtype=torch.bool), torch.tensor([0, 4])) for x in (r, r[order]))
    assert torch.equal(first[order], second)


# Sequences


@pytest.mark.parametrize("transform", ["rank", "binary"])
def test_rules_on_whole_sequences_keep_to_their_sequence(transform):
    both = weights(Weighting(transform))
    for a, b in ((0, 4), (4, 8)):
        assert torch.equal(weights(Weighting(transform), R[a:b], IS_CHOSEN[a:b], torch.tensor([0, 4])), both[a:b])


@pytest.mark.parametrize("transform", sorted(TRANSFORMS))
def test_empty_sequences_and_no_tokens(transform):
    weighting = Weighting(transform, lower=0.0, gamma=0.9)
    cu = torch.tensor([0, 0, 4, 4, 8])
    assert weights(weighting, cu=cu).shape == (8,)
    nothing = torch.zeros(0)
    for cu in (torch.tensor([0]), torch.tensor([0, 0, 0])):
        assert weights(weighting, nothing, nothing.bool(), cu).shape == (0,)


def test_positions_and_sides():
    cu = torch.tensor([0, 3, 3, 4, 6])
    assert positions(cu).tolist() == [0, 1, 2, 0, 0, 1]
    assert chosen_tokens(cu, 6).tolist() == [True, True, True, True, False, False]
    assert chosen_tokens(cu.int(), 6).tolist() == [True, True, True, True, False, False]
    assert positions(torch.tensor([0])).tolist() == []


def test_eos_weight_overrides_every_rule():
    is_eos = torch.tensor([False, False, False, True] * 2)
    w = weights(Weighting("equal", gamma=0.5, eos_weight=0.3), is_eos=is_eos)
    torch.testing.assert_close(w[is_eos], torch.tensor([0.3, 0.3], dtype=torch.float64))
    torch.testing.assert_close(w[:3], torch.tensor([1, 0.5, 0.25], dtype=torch.float64))
    assert weights(Weighting.preset("official-code"), is_eos=is_eos)[3] == 0


# The control experiment


def test_random_weights_are_those_of_exp_in_another_order():
    r, is_chosen = torch.randn(400, dtype=torch.float64), torch.arange(400) % 3 == 0
    w, expected = (contrast_weights(r, is_chosen, Weighting(t, seed=3)) for t in ("random", "exp"))
    for side in (is_chosen, ~is_chosen):
        assert torch.equal(w[side].sort().values, expected[side].sort().values)  # the same distribution, side by side
        assert abs(torch.corrcoef(torch.stack([w[side], r[side]]))[0, 1]) < 0.2  # that knows nothing of its tokens
    assert torch.equal(w, contrast_weights(r, is_chosen, Weighting("random", seed=3)))
    assert not torch.equal(w, contrast_weights(r, is_chosen, Weighting("random", seed=4)))


# Presets, properties, the public function


def test_presets():
    assert Weighting.preset("paper") == Weighting("exp", k=1.0, mu_chosen=1.0, mu_rejected=-1.0, lower=-0.5, upper=1.5)
    assert Weighting.preset("official-code") == Weighting("rank", low=0.7, high=1.3, eos_weight=0.0)
    assert all((weights(Weighting.preset(name)) == 1).all() for name in ("dpo", "tdpo1", "tdpo2"))
    assert Weighting.preset("paper", upper=2.0) == Weighting(upper=2.0)
    with pytest.raises(ValueError, match="preset must be one of paper, official-code, dpo, tdpo1, tdpo2, got 'ppo'"):
        Weighting.preset("ppo")


def test_properties_say_what_a_rule_needs():
    assert [w for w in TRANSFORMS if Weighting(w, lower=0.0).needs_sequences] == ["rank", "binary"]
    assert Weighting(gamma=0.9).needs_sequences
    assert Weighting().elementwise and not Weighting(gamma=0.9).elementwise and not Weighting(eos_weight=1.0).elementwise


def test_public_function_forms_the_contrast():
    pos, neg = torch.randn(8), torch.randn(8)
    expected = reference.exp_weights(reference.contrast(pos, neg), IS_CHOSEN)
    torch.testing.assert_close(tisdpo.token_weights(pos, neg, IS_CHOSEN), expected)
    halves = tisdpo.token_weights(pos.bfloat16(), neg.bfloat16(), IS_CHOSEN)
    assert halves.dtype == torch.float32
    torch.testing.assert_close(halves, reference.exp_weights(pos.bfloat16().float() - neg.bfloat16().float(), IS_CHOSEN))
    ranked = tisdpo.token_weights(pos, neg, IS_CHOSEN, Weighting("rank"), cu_seqlens=CU)
    assert torch.equal(ranked, contrast_weights(pos - neg, IS_CHOSEN, Weighting("rank"), cu_seqlens=CU))


CHANGES = {
    "k": dict(k=2.0), "mu_chosen": dict(mu_chosen=2.0), "mu_rejected": dict(mu_rejected=-2.0), "lower": dict(lower=-1.0),
    "upper": dict(upper=1.0), "gamma": dict(gamma=0.9), "eos_weight": dict(eos_weight=0.0), "low": dict(transform="rank", low=0.1),
    "high": dict(transform="rank", high=2.0), "top": dict(transform="binary", top=0.9), "seed": dict(transform="random", seed=1),
}  # fmt: skip


@pytest.mark.parametrize("option", CHANGES)
def test_every_option_has_an_effect(option):
    is_eos = torch.tensor([False, False, False, True] * 2)
    change = CHANGES[option]
    before = {"transform": change["transform"]} if "transform" in change else {}
    assert not torch.equal(weights(Weighting(**change), is_eos=is_eos), weights(Weighting(**before), is_eos=is_eos))


def test_every_field_is_in_the_table_of_effects():
    assert set(CHANGES) | {"transform"} == set(Weighting.__dataclass_fields__)


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(transform="tanh"), "transform must be one of exp, rank, scale, threshold, binary, random, equal, swapped, got 'tanh'"),
        (dict(k=0.0), "k must be positive and finite, got 0.0"),
        (dict(k=math.inf), "k must be positive and finite, got inf"),
        (dict(mu_chosen=math.nan), "mu_chosen and mu_rejected must be finite, got nan and -1.0"),
        (dict(lower=2.0), "lower must be below upper, got lower=2.0, upper=1.5"),
        (dict(lower=math.nan), "lower must be below upper, got lower=nan, upper=1.5"),
        (dict(transform="threshold"), "needs lower >= 0, got lower=-0.5"),
        (dict(low=-0.1), "low and high must satisfy 0 <= low <= high, got low=-0.1, high=1.3"),
        (dict(low=2.0), "low and high must satisfy 0 <= low <= high, got low=2.0, high=1.3"),
        (dict(top=0.0), r"top must be in \(0, 1\], got 0.0"),
        (dict(gamma=1.1), r"gamma must be in \(0, 1\], got 1.1"),
        (dict(eos_weight=-1.0), "eos_weight must not be negative, got -1.0"),
        (dict(eos_weight=math.nan), "eos_weight must not be negative, got nan"),
    ],
    ids=str,
)  # fmt: skip
def test_bad_fields(fields, message):
    with pytest.raises(ValueError, match=message):
        Weighting(**fields)


def test_missing_companions_are_named():
    with pytest.raises(ValueError, match=r"transform='rank', gamma=1\.0 look at whole sequences: pass cu_seqlens"):
        contrast_weights(R, IS_CHOSEN, Weighting("rank"))
    with pytest.raises(ValueError, match="eos_weight is set: pass is_eos"):
        weights(Weighting(eos_weight=0.0))


def test_fields_by_name():
    assert Weighting.of({"upper": 2.0}) == Weighting(upper=2.0) and Weighting.of(None) == Weighting()
    with pytest.raises(ValueError, match="weighting has no field 'uper'; did you mean upper"):
        Weighting.of({"uper": 2.0})
    with pytest.raises(ValueError, match="weighting has no field 'x'; there are transform, k, "):
        Weighting.of({"x": 2.0})
