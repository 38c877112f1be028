"""What a public function says about an input it cannot use: the right type of error, the argument, what was expected, what came."""

import math
import re

import pytest
import torch
from cases import make_case

import tisdpo
from tisdpo import Objective, Weighting

CASE = make_case((3, 2, 1, 2), H=4, V=7, dtype=torch.float32)
N, H, V = 8, 4, 7
META = "meta"  # a device that every machine has


def linear_loss(**changes):
    kwargs = dict(hidden=CASE.hidden, weight=CASE.weight, target=CASE.target, cu_seqlens=CASE.cu_seqlens, ref_logps=torch.zeros(N))
    return tisdpo.linear_tis_dpo_loss(**(kwargs | changes))


def linear_loss_online(**changes):
    return linear_loss(**(dict(ref_logps=None, ref_hidden=CASE.ref_hidden, ref_weight=CASE.ref_weight) | changes))


def linear_logps(**changes):
    kwargs = dict(hidden=CASE.hidden, weight=CASE.weight, target=CASE.target)
    return tisdpo.linear_token_logps(**(kwargs | changes))


def logps(**changes):
    return tisdpo.token_logps(**(dict(logits=torch.randn(N, V), target=CASE.target) | changes))


def loss(**changes):
    kwargs = dict(logps=-torch.ones(N), ref_logps=-torch.ones(N), cu_seqlens=CASE.cu_seqlens)
    return tisdpo.tis_dpo_loss(**(kwargs | changes))


def sums(**changes):
    kwargs = dict(logps=-torch.ones(N), ref_logps=-torch.ones(N), cu_seqlens=CASE.cu_seqlens)
    return tisdpo.sequence_sums(**(kwargs | changes))


def weights(**changes):
    kwargs = dict(pos_logps=-torch.ones(N), neg_logps=-torch.ones(N), is_chosen=torch.ones(N, dtype=torch.bool))
    return tisdpo.token_weights(**(kwargs | changes))


def with_value(x, value, place=3):
    x = x.clone()
    x[place] = value
    return x


def asking(*shape):
    return torch.randn(*shape, requires_grad=True)


BAD = [
    # hidden, weight, bias
    (linear_loss, dict(hidden=[1.0]), TypeError, "hidden must be a tensor, got list"),
    (
        linear_loss,
        dict(hidden=torch.ones(N, H, dtype=torch.long)),
        TypeError,
        "hidden must be float16, bfloat16, float32 or float64, got torch.int64",
    ),
    (linear_loss, dict(hidden=torch.randn(2, 4, H)), ValueError, r"hidden must be [N, H] over flat sequences, got shape (2, 4, 4)"),
    (linear_loss, dict(weight=torch.randn(V, H + 1)), ValueError, "weight must be [V, 4] to go with hidden (8, 4), got (7, 5)"),
    (linear_loss, dict(weight=torch.randn(V)), ValueError, "weight must be [V, 4] to go with hidden (8, 4), got (7,)"),
    (
        linear_loss,
        dict(weight=CASE.weight.bfloat16()),
        TypeError,
        "hidden, weight must share one dtype, got hidden torch.float32, weight torch.bfloat16",
    ),
    (linear_loss, dict(weight=CASE.weight.to(META)), ValueError, "must share one device, got hidden cpu, weight meta"),
    (linear_loss, dict(bias=torch.zeros(V + 1)), ValueError, "bias must be [7] to go with weight (7, 4), got (8,)"),
    (linear_loss, dict(bias=0.0), TypeError, "bias must be a tensor, got float"),
    (linear_logps, dict(hidden=torch.tensor(1.0)), ValueError, "hidden must have at least 1 dimension, got shape ()"),
    # target
    (linear_loss, dict(target=CASE.target.int()), TypeError, "target must be int64, got torch.int32"),
    (
        linear_loss,
        dict(target=CASE.target[:-1]),
        ValueError,
        "target must have the shape (8,) of hidden without its last dimension, got (7,)",
    ),
    (linear_loss, dict(target=with_value(CASE.target, V)), ValueError, "target must be in 0..6 or ignore_index=-100, got 7 at position 3"),
    (
        linear_logps,
        dict(target=with_value(CASE.target, -1)),
        ValueError,
        "target must be in 0..6 or ignore_index=-100, got -1 at position 3",
    ),
    (logps, dict(target=with_value(CASE.target, V)), ValueError, "target must be in 0..6 or ignore_index=-100, got 7 at position 3"),
    (linear_loss, dict(target=CASE.target.to(META)), ValueError, "must share one device, got hidden cpu, weight cpu, target meta"),
    (linear_loss, dict(ignore_index="pad"), TypeError, "ignore_index must be an integer outside the vocabulary 0..6, or None, got 'pad'"),
    (linear_loss, dict(ignore_index=-1.0), TypeError, "ignore_index must be an integer outside the vocabulary 0..6, or None, got -1.0"),
    (linear_loss, dict(ignore_index=0), ValueError, "ignore_index must lie outside the vocabulary 0..6, or be None, got 0"),
    # cu_seqlens
    (linear_loss, dict(cu_seqlens=[0, 8]), TypeError, "cu_seqlens must be a tensor, got list"),
    (linear_loss, dict(cu_seqlens=CASE.cu_seqlens.float()), TypeError, "cu_seqlens must be int32 or int64, got torch.float32"),
    (
        linear_loss,
        dict(cu_seqlens=CASE.cu_seqlens[None]),
        ValueError,
        "cu_seqlens must be [S + 1], boundaries from 0 to 8, got shape (1, 5)",
    ),
    (linear_loss, dict(cu_seqlens=torch.tensor([0, 3, 5, 8])), ValueError, "cu_seqlens must bound an even number of sequences"),
    (loss, dict(cu_seqlens=torch.tensor([0, 3, 5, 8])), ValueError, "cu_seqlens must bound an even number of sequences"),
    (linear_loss, dict(cu_seqlens=torch.tensor([0, 3, 5, 4, 8])), ValueError, "cu_seqlens must not decrease, got [0, 3, 5, 4, 8]"),
    (
        linear_loss,
        dict(cu_seqlens=torch.tensor([0, 3, 7])),
        ValueError,
        "cu_seqlens must start at 0 and end at the number of tokens, 8, got 0 and 7",
    ),
    (
        sums,
        dict(cu_seqlens=torch.tensor([1, 3, 8])),
        ValueError,
        "cu_seqlens must start at 0 and end at the number of tokens, 8, got 1 and 8",
    ),
    (sums, dict(cu_seqlens=torch.tensor([0, 9, 8])), ValueError, "cu_seqlens must not decrease, got [0, 9, 8]"),
    (sums, dict(cu_seqlens=CASE.cu_seqlens.to(META)), ValueError, "must share one device, got logps cpu, ref_logps cpu, cu_seqlens meta"),
    # token weights
    (
        linear_loss,
        dict(token_weights=with_value(torch.ones(N), -0.5)),
        ValueError,
        "token_weights must be finite and not negative, got -0.5 at position 3",
    ),
    (
        linear_loss,
        dict(token_weights=with_value(torch.ones(N), math.nan)),
        ValueError,
        "token_weights must be finite and not negative, got nan at position 3",
    ),
    (
        loss,
        dict(token_weights=with_value(torch.ones(N), math.inf)),
        ValueError,
        "token_weights must be finite and not negative, got inf at position 3",
    ),
    (linear_loss, dict(token_weights=torch.ones(N - 1)), ValueError, "token_weights must have one weight a token, shape (8,), got (7,)"),
    (
        linear_loss,
        dict(token_weights=torch.ones(N, dtype=torch.bool)),
        TypeError,
        "token_weights must be float16, bfloat16, float32 or float64, got torch.bool",
    ),
    (
        linear_loss,
        dict(token_weights=torch.ones(N, requires_grad=True)),
        ValueError,
        "token_weights requires a gradient, but weights are constants of the loss: pass token_weights.detach()",
    ),
    (sums, dict(token_weights=2.0), TypeError, "token_weights must be a tensor, got float"),
    # the reference
    (linear_loss, dict(ref_logps=None), ValueError, "the reference is ref_logps or ref_hidden, exactly one of them; neither came"),
    (linear_loss, dict(ref_hidden=CASE.ref_hidden, ref_weight=CASE.ref_weight), ValueError, "exactly one of them; both came"),
    (linear_loss, dict(ref_weight=CASE.ref_weight), ValueError, "ref_weight and ref_bias go with ref_hidden, which is missing"),
    (linear_loss, dict(ref_logps=torch.zeros(N - 1)), ValueError, "ref_logps must have the shape (8,) of target, got (7,)"),
    (
        linear_loss,
        dict(ref_logps=asking(N)),
        ValueError,
        "ref_logps requires a gradient, but the reference is a constant of the loss: pass ref_logps.detach()",
    ),
    (
        linear_loss,
        dict(objective=Objective(kl="reverse")),
        ValueError,
        "objective.kl='reverse' needs the reference's distribution: pass ref_hidden and ref_weight instead of ref_logps",
    ),
    (linear_loss_online, dict(ref_hidden=asking(N, H)), ValueError, "ref_hidden requires a gradient, but the reference is a constant"),
    (linear_loss_online, dict(ref_weight=asking(V, H)), ValueError, "ref_weight requires a gradient, but the reference is a constant"),
    (linear_loss_online, dict(weight=asking(V, H), ref_weight=None), ValueError, "ref_weight is missing and weight requires a gradient"),
    (
        linear_loss_online,
        dict(ref_weight=torch.randn(V + 1, H)),
        ValueError,
        "ref_weight must have the vocabulary of weight, 7 rows, got 8",
    ),
    (
        linear_loss_online,
        dict(ref_hidden=torch.randn(N, H + 1)),
        ValueError,
        "ref_weight must be [V, 5] to go with ref_hidden (8, 5), got (7, 4)",
    ),
    (
        linear_loss_online,
        dict(ref_hidden=torch.randn(N - 1, H)),
        ValueError,
        "ref_hidden must have the leading shape (8,) of hidden, got (7, 4)",
    ),
    (linear_loss_online, dict(ref_weight=CASE.ref_weight.half()), TypeError, "ref_hidden, ref_weight must share one dtype"),
    (linear_loss_online, dict(ref_bias=torch.zeros(3)), ValueError, "ref_bias must be [7] to go with ref_weight (7, 4), got (3,)"),
    (linear_logps, dict(kl="reverse"), ValueError, "kl='reverse' needs a reference: pass ref_hidden"),
    (logps, dict(kl="forward"), ValueError, "kl='forward' needs a reference: pass ref_logits"),
    (logps, dict(kl="both", ref_logits=torch.randn(N, V)), ValueError, "kl must be None, 'reverse' or 'forward', got 'both'"),
    (logps, dict(ref_logits=torch.randn(N, V + 1)), ValueError, "ref_logits must have the shape (8, 7) of logits, got (8, 8)"),
    (
        logps,
        dict(ref_logits=torch.randn(N, V).half()),
        TypeError,
        "ref_logits must have the dtype torch.float32 of logits, got torch.float16",
    ),
    (logps, dict(ref_logits=asking(N, V)), ValueError, "ref_logits requires a gradient, but the reference is a constant"),
    (
        logps,
        dict(logits=torch.zeros(N, V, dtype=torch.int32)),
        TypeError,
        "logits must be float16, bfloat16, float32 or float64, got torch.int32",
    ),
    # per-token log-probs
    (loss, dict(logps=torch.zeros(2, 4)), ValueError, "logps must be [N] over flat sequences, got shape (2, 4)"),
    (loss, dict(ref_logps=torch.zeros(7)), ValueError, "ref_logps must have the shape (8,) of logps, got (7,)"),
    (loss, dict(ref_logps=asking(N)), ValueError, "ref_logps requires a gradient, but the reference is a constant"),
    (loss, dict(kl=torch.zeros(N)), ValueError, "objective.kl is None, but kl is given: drop it or set objective.kl"),
    (loss, dict(objective=Objective(kl="forward")), ValueError, "objective.kl is 'forward', but kl is missing: pass the per-token KL"),
    (loss, dict(kl=torch.zeros(N - 1), objective=Objective(kl="forward")), ValueError, "kl must have the shape (8,) of logps, got (7,)"),
    (sums, dict(kl=torch.zeros(N, device=META)), ValueError, "logps, kl must share one device, got logps cpu, kl meta"),
    (loss, dict(ignored=torch.zeros(N)), ValueError, "ignored must be a bool tensor of shape (8,), got torch.float32 (8,)"),
    (
        loss,
        dict(ignored=torch.zeros(N - 1, dtype=torch.bool)),
        ValueError,
        "ignored must be a bool tensor of shape (8,), got torch.bool (7,)",
    ),
    # the contrastive pair
    (loss, dict(pos_logps=torch.zeros(N)), ValueError, "pos_logps and neg_logps go together; neg_logps is missing"),
    (sums, dict(neg_logps=torch.zeros(N)), ValueError, "pos_logps and neg_logps go together; pos_logps is missing"),
    (
        sums,
        dict(token_weights=torch.ones(N), pos_logps=torch.zeros(N), neg_logps=torch.zeros(N)),
        ValueError,
        "the weights are token_weights or pos_logps and neg_logps, not both",
    ),
    (
        sums,
        dict(pos_logps=torch.full((N,), 100.0), neg_logps=torch.zeros(N), weighting=Weighting(lower=-math.inf, upper=math.inf)),
        ValueError,
        "the weights k * exp(mu * clamp(pos_logps - neg_logps, lower, upper)) must be finite, got inf at position",
    ),
    (
        loss,
        dict(pos_logps=torch.zeros(N), neg_logps=torch.zeros(N), weighting=Weighting("rank"), cu_seqlens=torch.tensor([0, 3, 7])),
        ValueError,
        "cu_seqlens must start at 0 and end at the number of tokens, 8",
    ),
    (sums, dict(weighting=Weighting()), ValueError, "weighting has no effect without pos_logps and neg_logps"),
    (
        sums,
        dict(pos_logps=torch.zeros(N), neg_logps=torch.zeros(N - 1)),
        ValueError,
        "neg_logps must have the shape (8,) of logps, got (7,)",
    ),
    (
        sums,
        dict(pos_logps=with_value(torch.zeros(N), math.nan), neg_logps=torch.zeros(N)),
        ValueError,
        "pos_logps - neg_logps must be finite, got nan at position 3",
    ),
    (
        sums,
        dict(pos_logps=with_value(torch.zeros(N), math.nan), neg_logps=torch.zeros(N), weighting=Weighting("rank")),
        ValueError,
        "pos_logps - neg_logps must be finite, got nan at position 3",
    ),
    (
        sums,
        dict(pos_logps=torch.zeros(N), neg_logps=torch.zeros(N), weighting=Weighting.preset("official-code")),
        ValueError,
        "weighting.eos_weight needs to know the EOS tokens",
    ),
    (weights, dict(neg_logps=torch.zeros(N - 1)), ValueError, "neg_logps must have the shape (8,) of pos_logps, got (7,)"),
    (
        weights,
        dict(pos_logps=with_value(torch.zeros(N), -math.inf)),
        ValueError,
        "pos_logps - neg_logps must be finite, got -inf at position 3",
    ),
    (weights, dict(is_chosen=torch.ones(N)), ValueError, "is_chosen must be a bool tensor of shape (8,), got torch.float32 (8,)"),
    (weights, dict(is_chosen=True), TypeError, "is_chosen must be a tensor, got bool"),
    (weights, dict(weighting=Weighting("rank")), ValueError, "look at whole sequences: pass cu_seqlens"),
    (
        weights,
        dict(weighting=Weighting("rank"), cu_seqlens=torch.tensor([0, 3, 7])),
        ValueError,
        "cu_seqlens must start at 0 and end at the number of tokens, 8, got 0 and 7",
    ),
    (weights, dict(weighting=Weighting(eos_weight=0.0)), ValueError, "eos_weight is set: pass is_eos"),
    (weights, dict(is_eos=torch.ones(3, dtype=torch.bool)), ValueError, "is_eos must be a bool tensor of shape (8,), got torch.bool (3,)"),
    # options
    (linear_loss, dict(objective="paper"), TypeError, "objective must be a tisdpo.Objective or None, got str: 'paper'"),
    (loss, dict(objective=Weighting()), TypeError, "objective must be a tisdpo.Objective or None, got Weighting"),
    (weights, dict(weighting="exp"), TypeError, "weighting must be a tisdpo.Weighting or None, got str: 'exp'"),
    (
        linear_loss,
        dict(reduction="none"),
        ValueError,
        "reduction must be 'mean' or 'sum', got 'none'; per-pair losses are in the output's `losses`",
    ),
    (loss, dict(reduction="none"), ValueError, "reduction must be 'mean' or 'sum', got 'none'"),
    (linear_loss, dict(reduction="sum", normalizer=2), ValueError, "normalizer goes with reduction='mean'"),
    (linear_loss, dict(normalizer=0), ValueError, "normalizer must be positive (pairs or tokens of the global batch), got 0"),
    (loss, dict(normalizer=-1.0), ValueError, "normalizer must be positive (pairs or tokens of the global batch), got -1.0"),
    (linear_loss, dict(normalizer=torch.ones(2)), ValueError, "normalizer must be one number, got a tensor of shape (2,)"),
    (linear_loss, dict(plan="fast"), ValueError, "plan must be one of auto, one_pass, two_pass, got 'fast'"),
    (linear_loss, dict(backend="cuda"), ValueError, "backend must be one of auto, torch, triton, cpp, got 'cuda'"),
    (linear_loss, dict(temperature=0.0), ValueError, "temperature must be positive and finite, got 0.0"),
    (logps, dict(temperature=math.nan), ValueError, "temperature must be positive and finite, got nan"),
    (linear_logps, dict(softcap=-30.0), ValueError, "softcap must be positive and finite, or None, got -30.0"),
    (logps, dict(softcap=math.inf), ValueError, "softcap must be positive and finite, or None, got inf"),
    (logps, dict(logit_scale=math.inf), ValueError, "logit_scale must be positive and finite, got inf"),
    (logps, dict(logit_scale=math.nan), ValueError, "logit_scale must be positive and finite, got nan"),
    (logps, dict(logits=torch.zeros(1, V).expand(N, V), overwrite_logits=True), ValueError, "overwrite_logits needs rows with memory of"),
    (logps, dict(logit_scale=0.0), ValueError, "logit_scale must be positive and finite, got 0.0"),
]


@pytest.mark.parametrize(
    "function, changes, error, message", BAD, ids=[f"{f.__name__}-{'-'.join(c)}-{i}" for i, (f, c, *_) in enumerate(BAD)]
)
def test_message_names_argument_expectation_and_what_came(function, changes, error, message):
    with pytest.raises(error, match=re.escape(message)):
        function(**changes)


@pytest.mark.parametrize("function", [linear_loss, linear_loss_online, linear_logps, logps, loss, sums, weights])
def test_the_unchanged_inputs_are_good(function):
    function()


@pytest.mark.parametrize("plan", ["one_pass", "two_pass"])
@pytest.mark.parametrize(
    "changes", [dict(target=with_value(CASE.target, V)), dict(token_weights=-torch.ones(N)), dict(cu_seqlens=torch.tensor([0, 3, 7]))]
)
def test_both_plans_check_values(plan, changes):
    with pytest.raises(ValueError):
        linear_loss(plan=plan, **changes)


def test_a_reference_that_would_get_a_gradient_is_fine_without_gradients():
    with torch.no_grad():
        assert linear_loss(ref_logps=asking(N)).loss.isfinite()
        assert loss(ref_logps=asking(N)).loss.isfinite()


def test_an_ignored_target_may_be_any_index_outside_the_vocabulary():
    for ignore_index in (-100, -1, V, 10_000):
        target = CASE.target.clone()
        target[2] = ignore_index
        assert logps(target=target, ignore_index=ignore_index).logps[2] == 0
        assert linear_logps(target=target, ignore_index=ignore_index).logps[2] == 0
