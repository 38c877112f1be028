"""`token_logps` and `linear_token_logps` against the reference: values, gradients for any upstream gradient, dtypes, awkward inputs."""

import math

import pytest
import torch
from cases import BACKENDS, SHAPES, make_case

import tisdpo
from tisdpo import Objective, reference
from tisdpo.ops import backend

TRANSFORMS = {
    "plain": {},
    "scaled": {"logit_scale": 0.7, "temperature": 1.3},
    "softcap": {"softcap": 2.0, "logit_scale": 1.1, "temperature": 0.8},
}
KLS = [None, "reverse", "forward"]
FAR = 1e4


def random_logits(*shape, seed=0, dtype=torch.float64):
    return (2 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)).to(dtype)


def upstreams(shape, dtype=torch.float64):
    """Upstream gradients that a caller may send: random signs with zeros in between, all zero, one constant."""
    mixed = torch.randn(shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64).to(dtype)
    mixed.reshape(-1)[::3] = 0
    return [mixed, torch.zeros(shape, dtype=dtype), torch.full(shape, -2.5, dtype=dtype)]


def reference_stats(logits, target, ref_logits, kl, transform):
    """(logps, ref_logps, kl) of raw logits by the plain formulas; KL of ignored positions is 0."""
    z = reference.transform_logits(logits, **transform)
    q = None if ref_logits is None else reference.transform_logits(ref_logits, **transform)
    ref_logps = None if q is None else reference.token_logps(q, target)
    divergence = None if kl is None else reference.token_kl(z, q, kl).masked_fill(target < 0, 0)
    return reference.token_logps(z, target), ref_logps, divergence


def gradients(stats, inputs, g):
    """Gradients of sum(g * logps + flipped g * kl); the two upstream gradients differ so that a swap shows."""
    loss = (g * stats[0]).sum()
    if stats[2] is not None:
        loss = loss + (g.flip(0) * stats[2]).sum()
    return torch.autograd.grad(loss, inputs, retain_graph=True)


def assert_stats(stats, truth, tolerance=1e-12):
    for name, x, true in zip(("logps", "ref_logps", "kl"), stats, truth):
        assert (x is None) == (true is None), name
        if x is not None:
            assert x.shape == true.shape
            torch.testing.assert_close(x, true, rtol=tolerance, atol=tolerance, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("kl", KLS)
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("frozen", [False, True])
def test_linear_equals_reference_for_any_upstream_gradient(monkeypatch, frozen, shape, transform, kl):
    monkeypatch.setattr(backend, "chunk_rows", lambda *a: 6)  # several visits
    lengths, ignored = SHAPES[shape]
    case, options = make_case(lengths, ignored=ignored), TRANSFORMS[transform]
    inputs = [x.requires_grad_() for x in ([case.hidden] if frozen else [case.hidden, case.weight, case.bias])]
    stats = tisdpo.linear_token_logps(
        case.hidden, case.weight, case.target, bias=case.bias, ref_hidden=case.ref_hidden, ref_weight=case.ref_weight,
        ref_bias=case.ref_bias, kl=kl, **options,
    )  # fmt: skip
    raw, ref_raw = (
        reference.linear_logits(*head)
        for head in ((case.hidden, case.weight, case.bias), (case.ref_hidden, case.ref_weight, case.ref_bias))
    )
    truth = reference_stats(raw, case.target, ref_raw, kl, options)
    assert_stats(stats, truth)
    assert not stats.ref_logps.requires_grad
    for g in upstreams(case.target.shape):
        torch.testing.assert_close(gradients(stats, inputs, g), gradients(truth, inputs, g), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("kl", KLS)
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_logits_equal_reference_for_any_upstream_gradient(transform, kl):
    options = TRANSFORMS[transform]
    logits, ref_logits = random_logits(2, 5, 11).requires_grad_(), random_logits(2, 5, 11, seed=1)
    target = torch.tensor([[0, 10, 3, -100, 4], [-100, 1, 1, 9, -100]])
    stats = tisdpo.token_logps(logits, target, ref_logits=ref_logits, kl=kl, **options)
    truth = reference_stats(logits, target, ref_logits, kl, options)
    assert_stats(stats, truth)
    assert (stats.logps[target < 0] == 0).all() and (stats.ref_logps[target < 0] == 0).all()
    for g in upstreams(target.shape):
        actual = gradients(stats, logits, g)[0]
        torch.testing.assert_close(actual, gradients(truth, logits, g)[0], rtol=1e-12, atol=1e-12)
        assert (actual[target < 0] == 0).all()


@pytest.mark.parametrize("frozen", [False, True])
def test_only_one_of_the_two_linear_results_is_used(frozen):
    case = make_case()
    inputs = [case.hidden.requires_grad_(), *([] if frozen else [case.weight.requires_grad_()])]
    stats = tisdpo.linear_token_logps(
        case.hidden, case.weight, case.target, ref_hidden=case.ref_hidden, ref_weight=case.ref_weight, kl="reverse"
    )
    raw, ref_raw = (reference.linear_logits(*head) for head in ((case.hidden, case.weight), (case.ref_hidden, case.ref_weight)))
    truth = reference_stats(raw, case.target, ref_raw, "reverse", {})
    for i in (0, 2):
        actual, expected = (torch.autograd.grad(x[i].square().sum(), inputs, retain_graph=True) for x in (stats, truth))
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("frozen", [False, True])
def test_what_comes_from_upstream_for_ignored_positions_counts_for_nothing(frozen):
    case = make_case(ignored=(4,))
    hidden, weight = case.hidden.requires_grad_(), case.weight.requires_grad_(not frozen)
    logps = tisdpo.linear_token_logps(hidden, weight, case.target).logps
    g = torch.ones_like(logps)
    g[4] = math.nan
    logps.backward(g)
    assert hidden.grad.isfinite().all() and (hidden.grad[4] == 0).all()
    assert frozen or weight.grad.isfinite().all()


def test_only_one_of_the_two_results_is_used():
    """Autograd then sends no gradient at all for the other one, not zeros."""
    logits, ref_logits, target = random_logits(4, 7).requires_grad_(), random_logits(4, 7, seed=1), torch.arange(4)
    stats = tisdpo.token_logps(logits, target, ref_logits=ref_logits, kl="reverse")
    truth = reference_stats(logits, target, ref_logits, "reverse", {})
    for i in (0, 2):
        actual, expected = (torch.autograd.grad(x[i].sum(), logits, retain_graph=True)[0] for x in (stats, truth))
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("N", [0, 1])
@pytest.mark.parametrize("V", [1, 2, 301])
def test_smallest_sizes(N, V):
    target = torch.full((N,), V - 1)
    logits, ref_logits = random_logits(N, V).requires_grad_(), random_logits(N, V, seed=1)
    stats = tisdpo.token_logps(logits, target, ref_logits=ref_logits, kl="forward")
    truth = reference_stats(logits, target, ref_logits, "forward", {})
    assert_stats(stats, truth)
    g = torch.ones(N, dtype=torch.float64)
    torch.testing.assert_close(gradients(stats, logits, g), gradients(truth, logits, g))
    hidden, weight = random_logits(N, 3).requires_grad_(), random_logits(V, 3, seed=2).requires_grad_()
    linear = tisdpo.linear_token_logps(
        hidden, weight, target, ref_hidden=random_logits(N, 3, seed=3), ref_weight=weight.detach(), kl="reverse"
    )
    assert linear.logps.shape == linear.kl.shape == (N,)
    (linear.logps.sum() + linear.kl.sum()).backward()
    assert hidden.grad.isfinite().all() and weight.grad.isfinite().all()
    if V == 1:  # a single possible token is certain
        assert (linear.logps == 0).all() and (stats.kl == 0).all() and (weight.grad == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0, 7), (2, 0, 7), (3, 1), (1, 2)], ids=str)
@pytest.mark.parametrize("kl", [None, "reverse", "forward"])
def test_smallest_sizes_in_float32(backend, shape, kl):
    """By every backend: float64, above, is torch's alone."""
    target = torch.full(shape[:-1], shape[-1] - 1)
    for overwrite in (False, True):
        leaf, ref = random_logits(*shape, dtype=torch.float32).requires_grad_(), random_logits(*shape, seed=1, dtype=torch.float32)
        stats = tisdpo.token_logps(leaf * 1, target, ref_logits=ref, kl=kl, overwrite_logits=overwrite, backend=backend)
        loss = stats.logps.sum() + (0 if kl is None else stats.kl.sum())
        loss.backward()
        wide = leaf.detach().double().reshape(-1, shape[-1]).requires_grad_()
        truth = reference_stats(wide, target.reshape(-1), ref.double().reshape(-1, shape[-1]), kl, {})
        (truth[0].sum() + (0 if kl is None else truth[2].sum())).backward()
        torch.testing.assert_close(leaf.grad.double().reshape(wide.shape), wide.grad, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(stats.logps.double().reshape(-1), truth[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_large_cap_multiplies_no_error(backend):
    z, target = random_logits(4, 300, dtype=torch.float32), torch.tensor([0, 1, 2, 299])
    for cap in (30.0, 1e4):
        truth = reference.token_logps(reference.transform_logits(z.double(), softcap=cap), target)
        found = tisdpo.token_logps(z, target, softcap=cap, backend=backend).logps
        torch.testing.assert_close(found.double(), truth, rtol=1e-6, atol=5e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_mass_of_one_model_where_the_other_has_none(backend):
    """exp(-1e4) is 0 in float32 and in float64: 0 log 0 = 0, not 0 times infinity."""
    z, q = torch.tensor([[0.0, -1e4, 1.0]]), torch.tensor([[0.0, -math.inf, 0.5]])
    leaf, target = z.clone().requires_grad_(), torch.tensor([2])
    stats = tisdpo.token_logps(leaf, target, ref_logits=q, kl="reverse", backend=backend)
    stats.kl.sum().backward()
    short = z[:, ::2].double().requires_grad_()
    truth = reference.token_kl(short, q[:, ::2].double(), "reverse")
    truth.sum().backward()
    torch.testing.assert_close(stats.kl.double(), truth, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(leaf.grad[:, ::2].double(), short.grad, rtol=1e-5, atol=1e-7)
    assert leaf.grad[0, 1] == 0
    torch.testing.assert_close(reference.token_kl(z.double(), q.double(), "reverse"), truth)


@pytest.mark.parametrize("rows", [2, 6, 20])  # of a trained head: two passes, D waits, two passes
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("kl", [None, "reverse"])
def test_results_may_be_edited_in_place(rows, frozen, kl):
    case = make_case((rows,), dtype=torch.float32)
    hidden, weight = case.hidden.requires_grad_(), case.weight.requires_grad_(not frozen)
    inputs = dict(ref_hidden=case.ref_hidden, ref_weight=case.ref_weight, kl=kl)
    grads = []
    for edited in (False, True):
        stats = tisdpo.linear_token_logps(hidden, weight, case.target, **inputs)
        keep = torch.arange(rows) > 0
        results = [x for x in stats if x is not None]
        if edited:
            for x in results:
                x[0] = 0
        else:
            results = [x * keep for x in results]
        grads.append(torch.autograd.grad(sum((i + 1) * x.sum() for i, x in enumerate(results)), hidden)[0])
    torch.testing.assert_close(*grads)
    assert (grads[0][0] == 0).all() and (grads[0][1:] != 0).any()
    leaf = random_logits(rows, 5, dtype=torch.float32).requires_grad_()
    stats = tisdpo.token_logps(leaf * 1, case.target % 5, ref_logits=random_logits(rows, 5, seed=1, dtype=torch.float32), kl=kl)
    for x in stats:
        if x is not None:
            x[0] = 0
    sum(x.sum() for x in stats if x is not None and x.requires_grad).backward()
    assert (leaf.grad[0] == 0).all() and leaf.grad.isfinite().all()


def test_leading_shapes_and_non_contiguous_inputs_change_nothing():
    case = make_case((8, 8), ignored=(3,))
    truth = tisdpo.linear_token_logps(case.hidden, case.weight, case.target)
    batched = tisdpo.linear_token_logps(case.hidden.reshape(2, 8, -1), case.weight, case.target.reshape(2, 8))
    assert torch.equal(batched.logps, truth.logps.reshape(2, 8))

    hidden = case.hidden.T.contiguous().T.requires_grad_()
    weight = case.weight.repeat_interleave(2, 1)[:, ::2].requires_grad_()
    target = case.target.repeat_interleave(3)[::3]
    assert not (hidden.is_contiguous() or weight.is_contiguous() or target.is_contiguous())
    strided = tisdpo.linear_token_logps(hidden, weight, target).logps
    torch.testing.assert_close(strided, truth.logps, rtol=1e-13, atol=0)
    strided.sum().backward()
    raw = reference.token_logps(reference.linear_logits(hidden, weight), target).sum()
    torch.testing.assert_close((hidden.grad, weight.grad), torch.autograd.grad(raw, (hidden, weight)), rtol=1e-12, atol=1e-13)


def test_shifted_and_transposed_logits():
    """The slice that every causal LM takes, and a vocabulary that is not the fastest dimension in memory."""
    tokens = torch.tensor([[1, 2, 3, 4], [5, 6, 0, 1]])
    shifted = random_logits(2, 4, 7).requires_grad_()
    transposed = random_logits(7, 2, 3).requires_grad_()
    for leaf, logits, target in ((shifted, shifted[:, :-1], tokens[:, 1:]), (transposed, transposed.permute(1, 2, 0), tokens[:, 1:])):
        assert not logits.is_contiguous()
        actual, truth = tisdpo.token_logps(logits, target).logps, reference.token_logps(logits, target)
        torch.testing.assert_close(actual, truth, rtol=1e-13, atol=0)
        grads = [torch.autograd.grad(x.square().sum(), leaf)[0] for x in (actual, truth)]
        torch.testing.assert_close(*grads, rtol=1e-12, atol=1e-14)


def test_inputs_are_left_as_they_were():
    case = make_case()
    logits, ref_logits, target = random_logits(3, 7).requires_grad_(), random_logits(3, 7, seed=1), torch.tensor([0, 1, 2])
    copies = [x.detach().clone() for x in (logits, ref_logits, case.hidden, case.weight)]
    sum(tisdpo.token_logps(logits, target, ref_logits=ref_logits, kl="reverse")).sum().backward()
    tisdpo.linear_token_logps(case.hidden.requires_grad_(), case.weight.requires_grad_(), case.target).logps.sum().backward()
    assert all(torch.equal(a, b) for a, b in zip(copies, (logits, ref_logits, case.hidden, case.weight)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kl", KLS)
def test_impossible_and_huge_logits(kl, dtype):
    """-inf (a masked vocabulary), +-1e4 (overflow without the maximum taken out) and planted certain targets; nothing becomes NaN."""
    logits, ref_logits = random_logits(5, 6, dtype=dtype), random_logits(5, 6, seed=1, dtype=dtype)
    logits[0, 1:3] = ref_logits[0, 1:3] = -math.inf  # impossible for both
    logits[1, 4], logits[2, 0] = FAR, -FAR  # all mass on one token; a target without mass
    ref_logits[1, 4] = FAR
    logits[3] = ref_logits[3] = -math.inf
    logits[3, 5] = ref_logits[3, 5] = 0.0  # certain, and known to be
    logits[4], ref_logits[4] = FAR, FAR  # huge and all alike: uniform
    target = torch.tensor([0, 4, 0, 5, 2])
    logits.requires_grad_()
    stats = tisdpo.token_logps(logits, target, ref_logits=ref_logits, kl=kl)
    truth = reference_stats(logits.double(), target, ref_logits.double(), kl, {})
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    assert_stats([None if x is None else x.double() for x in stats], truth, tolerance)
    assert stats.logps[1] == 0 and stats.logps[3] == 0 and abs(stats.logps[4] + math.log(6)) < 1e-5
    assert stats.logps[2] < -FAR + 10
    g = upstreams((5,), dtype)[0] + 1
    grad = gradients(stats, logits, g)[0]
    assert grad.isfinite().all()
    assert (grad[0, 1:3] == 0).all() and (grad[1] == 0).all() and (grad[3] == 0).all()
    if kl != "reverse":  # autograd of p * log p at p = 0 is NaN in the plain formula; the limit is 0
        true = gradients(truth, logits, g)[0]
        torch.testing.assert_close(grad.double(), true.double(), rtol=1e-4, atol=1e-4 if dtype == torch.float32 else 1e-12)


def test_softcap_saturates_without_nan():
    logits = torch.tensor([[FAR, -FAR, 0.0], [-math.inf, 1.0, FAR]], dtype=torch.float64, requires_grad=True)
    target = torch.tensor([1, 1])
    actual = tisdpo.token_logps(logits, target, softcap=5.0).logps
    truth = reference.token_logps(reference.transform_logits(logits, softcap=5.0), target)
    torch.testing.assert_close(actual, truth, rtol=1e-13, atol=0)
    torch.testing.assert_close(*(torch.autograd.grad(x.sum(), logits)[0] for x in (actual, truth)), rtol=1e-12, atol=1e-14)


def test_kl_of_identical_models_is_zero_and_has_no_gradient():
    case = make_case((30, 50), H=16, V=101, dtype=torch.float32)
    for kl in ("reverse", "forward"):
        weight = case.weight.clone().requires_grad_()
        stats = tisdpo.linear_token_logps(
            case.hidden, weight, case.target, ref_hidden=case.hidden, ref_weight=case.weight, kl=kl, softcap=3.0
        )
        assert (stats.kl == 0).all() and torch.equal(stats.logps.detach(), stats.ref_logps)
        assert torch.autograd.grad(stats.kl.sum(), weight)[0].abs().max() < 1e-6


def test_kl_is_not_negative_in_float32():
    logits = random_logits(50, 997, dtype=torch.float32)
    close = logits + 1e-3 * random_logits(50, 997, seed=1, dtype=torch.float32)
    for kl in ("reverse", "forward"):
        stats = tisdpo.token_logps(logits, torch.zeros(50, dtype=torch.long), ref_logits=close, kl=kl)
        assert stats.kl.min() > -1e-6


# float64: the derivatives by finite differences, independent of every formula in this repository


@pytest.mark.parametrize("kl", KLS)
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_gradcheck_of_both_functions(transform, kl):
    case, options = make_case((2, 3), H=3, V=5, ignored=(1,)), TRANSFORMS[transform]

    def linear(hidden, weight, bias):
        stats = tisdpo.linear_token_logps(
            hidden, weight, case.target, bias=bias, ref_hidden=case.ref_hidden, ref_weight=case.ref_weight, kl=kl, **options
        )
        return stats.logps if kl is None else (stats.logps, stats.kl)

    def from_logits(logits):
        stats = tisdpo.token_logps(logits, case.target, ref_logits=random_logits(5, 5, seed=1), kl=kl, **options)
        return stats.logps if kl is None else (stats.logps, stats.kl)

    inputs = [x.requires_grad_() for x in (case.hidden, case.weight, case.bias)]
    assert torch.autograd.gradcheck(linear, inputs)
    assert torch.autograd.gradcheck(lambda hidden: linear(hidden, case.weight.detach(), case.bias.detach()), inputs[:1])
    assert torch.autograd.gradcheck(from_logits, [random_logits(5, 5).requires_grad_()])


@pytest.mark.parametrize("plan", ["one_pass", "two_pass"])
@pytest.mark.parametrize("objective", [Objective(), Objective(kl="reverse"), Objective(loss="ipo", kl="forward", alpha=0.5)])
def test_gradcheck_of_the_loss(objective, plan):
    case = make_case((2, 1, 1, 3), H=3, V=5, ignored=(3,))

    def loss(hidden, weight, bias):
        return tisdpo.linear_tis_dpo_loss(
            hidden, weight, case.target, case.cu_seqlens, token_weights=case.token_weights, bias=bias, ref_hidden=case.ref_hidden,
            ref_weight=case.ref_weight, ref_bias=case.ref_bias, objective=objective, softcap=4.0, plan=plan,
        ).loss  # fmt: skip

    assert torch.autograd.gradcheck(loss, [x.requires_grad_() for x in (case.hidden, case.weight, case.bias)])


@pytest.mark.parametrize("plan", ["one_pass", "two_pass"])
def test_gradcheck_of_the_loss_from_logps(plan):
    logps, kl = -random_logits(8).abs(), random_logits(8, seed=1).abs()
    ref_logps, cu = -random_logits(8, seed=2).abs(), torch.tensor([0, 3, 4, 6, 8])
    weights = random_logits(8, seed=3).abs()

    def loss(logps, kl):
        return tisdpo.tis_dpo_loss(logps, ref_logps, cu, token_weights=weights, kl=kl, objective=Objective(kl="reverse")).loss

    def sums(logps, kl):
        return tuple(tisdpo.sequence_sums(logps, ref_logps, cu, token_weights=weights, kl=kl))

    assert torch.autograd.gradcheck(loss if plan == "one_pass" else sums, [logps.requires_grad_(), kl.requires_grad_()])


# 16-bit and float32: as accurate as plain torch in the same dtype, or better


def assert_as_accurate(name, actual, plain, truth, tiny=1e-6):
    """err(actual vs truth) <= 2 * err(plain torch of the same dtype vs truth) + tiny * scale, largest and RMS."""
    actual, plain, truth = (x.detach().double() for x in (actual, plain, truth))
    scale = truth.abs().max().item()
    for what, error in (("largest", lambda x: (x - truth).abs().max()), ("RMS", lambda x: (x - truth).square().mean().sqrt())):
        ours, theirs = error(actual).item(), error(plain).item()
        worst = (actual - truth).abs().argmax().item()
        values = [x.flatten()[worst].item() for x in (actual, plain, truth)]
        message = f"{name}: {what} error {ours:.3g}, plain torch {theirs:.3g}; worst at {worst}: (ours, plain, truth) = {values}"
        assert ours <= 2 * theirs + tiny * scale, message


def plain_linear(case, kl, dtype):
    """What a user writes in plain torch in this dtype: F.linear, then the formulas in float32 (float64 stays)."""
    head = [x.to(dtype).requires_grad_() for x in (case.hidden, case.weight, case.bias)]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    logits = reference.linear_logits(*head).to(wide)
    ref_logits = reference.linear_logits(*(x.to(dtype) for x in (case.ref_hidden, case.ref_weight, case.ref_bias))).to(wide)
    return head, (reference.token_logps(logits, case.target), None if kl is None else reference.token_kl(logits, ref_logits, kl))


@pytest.mark.parametrize("kl", KLS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("frozen", [False, True])
def test_accuracy_of_the_linear_operator(frozen, dtype, kl):
    case = make_case((40, 23), H=48, V=1003)
    for name in ("hidden", "weight", "bias", "ref_hidden", "ref_weight", "ref_bias"):  # the truth has the rounded inputs
        setattr(case, name, (getattr(case, name) * 0.5).to(dtype).double())
    head = [x.to(dtype).requires_grad_(not frozen) for x in (case.hidden, case.weight, case.bias)]
    head[0].requires_grad_()
    stats = tisdpo.linear_token_logps(
        head[0], head[1], case.target, bias=head[2], ref_hidden=case.ref_hidden.to(dtype), ref_weight=case.ref_weight.to(dtype),
        ref_bias=case.ref_bias.to(dtype), kl=kl,
    )  # fmt: skip
    runs = [(head, (stats.logps, stats.kl)), plain_linear(case, kl, dtype), plain_linear(case, kl, torch.float64)]
    assert stats.logps.dtype == torch.float32
    results = []
    for inputs, outputs in runs:
        g = upstreams(case.target.shape, outputs[0].dtype)[0]
        loss = (g * outputs[0]).sum() + (0 if kl is None else (g.flip(0) * outputs[1]).sum())
        results.append([*(x for x in outputs if x is not None), *torch.autograd.grad(loss, inputs[:1] if frozen else inputs)])
    names = [*(["logps"] if kl is None else ["logps", "kl"]), "grad hidden", *([] if frozen else ["grad weight", "grad bias"])]
    for name, actual, plain, truth in zip(names, *results, strict=True):
        # D of a column with one token is rounded before and after the upstream gradient, where plain torch has nothing left to round
        tiny = 2**-9 if name == "grad bias" and dtype == torch.bfloat16 else 1e-6
        assert_as_accurate(name, actual, plain, truth, tiny)
    if dtype == torch.bfloat16:
        assert (results[0][0].double() - results[2][0]).abs().mean() <= 1e-3  # nat a token


@pytest.mark.parametrize("kl", KLS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_accuracy_from_logits(dtype, kl):
    logits, ref_logits = random_logits(40, 1003, dtype=dtype), random_logits(40, 1003, seed=1, dtype=dtype)
    target = torch.randint(1003, (40,), generator=torch.Generator().manual_seed(0))
    results = []
    for run in ("ours", "plain", "truth"):
        wide = torch.float64 if run == "truth" else torch.float32
        leaf = logits.clone().to(torch.float64 if run == "truth" else dtype).requires_grad_()
        if run == "ours":
            stats = tisdpo.token_logps(leaf, target, ref_logits=ref_logits, kl=kl)
        else:
            stats = reference_stats(leaf.to(wide), target, ref_logits.to(wide), kl, {})
        g = upstreams((40,), stats[0].dtype)[0]
        results.append([stats[0], *([] if kl is None else [stats[2]]), *gradients(stats, leaf, g)])
    names = ["logps", *([] if kl is None else ["kl"]), "grad logits"]
    for name, actual, plain, truth in zip(names, *results, strict=True):
        assert_as_accurate(name, actual, plain, truth)
    assert results[0][-1].dtype == dtype


@pytest.mark.parametrize("plan", ["one_pass", "two_pass"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_accuracy_of_the_loss_and_its_gradients(dtype, plan):
    case = make_case((20, 23, 11, 9), H=48, V=1003)
    for name in ("hidden", "weight", "bias", "ref_hidden", "ref_weight", "ref_bias"):
        setattr(case, name, (getattr(case, name) * 0.2).to(dtype).double())
    options = dict(kl="reverse", alpha=0.5)
    results = []
    for run in ("ours", "plain", "truth"):
        d = torch.float64 if run == "truth" else dtype
        head = [x.to(d).requires_grad_() for x in (case.hidden, case.weight, case.bias)]
        ref_head = [x.to(d) for x in (case.ref_hidden, case.ref_weight, case.ref_bias)]
        if run == "ours":
            loss = tisdpo.linear_tis_dpo_loss(
                head[0], head[1], case.target, case.cu_seqlens, token_weights=case.token_weights.float(), bias=head[2],
                ref_hidden=ref_head[0], ref_weight=ref_head[1], ref_bias=ref_head[2], objective=Objective(**options), plan=plan,
            ).loss  # fmt: skip
            assert loss.dtype == torch.float32
        else:
            wide = torch.float64 if run == "truth" else torch.float32
            logits, ref_logits = (reference.linear_logits(*x).to(wide) for x in (head, ref_head))
            loss = reference.tis_dpo_losses(logits, ref_logits, case.target, case.cu_seqlens, case.token_weights, **options).mean()
        results.append([loss, *torch.autograd.grad(loss, head)])
    for name, actual, plain, truth in zip(("loss", "grad hidden", "grad weight", "grad bias"), *results, strict=True):
        assert_as_accurate(name, actual, plain, truth)


@pytest.mark.parametrize("plan", ["one_pass", "two_pass"])
def test_autocast_is_16_bit_inputs(plan):
    """Inside autocast the head runs on 16-bit operands as F.linear would, and everything after the product stays float32."""
    case = make_case((30, 50, 10, 70), H=32, V=501, dtype=torch.float32)
    results = []
    for dtype, autocast in ((torch.float32, True), (torch.bfloat16, False)):
        inputs = [(0.2 * x).to(dtype).requires_grad_() for x in (case.hidden, case.weight, case.bias)]
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = tisdpo.linear_tis_dpo_loss(
                inputs[0], inputs[1], case.target, case.cu_seqlens, bias=inputs[2], token_weights=case.token_weights,
                ref_hidden=case.ref_hidden.to(dtype), ref_weight=case.ref_weight.to(dtype),
                objective=Objective(kl="reverse", beta=0.01), plan=plan,
            ).loss  # fmt: skip
        results.append([loss, *torch.autograd.grad(loss, inputs)])
        assert [x.dtype for x in results[-1]] == [torch.float32, dtype, dtype, dtype]
    for a, b in zip(*results):
        assert a.abs().sum() > 0 and torch.equal(a, b.to(a.dtype))


def test_autocast_leaves_logits_alone():
    logits, target = random_logits(4, 9, dtype=torch.float32), torch.arange(4)
    with torch.autocast("cpu", torch.bfloat16):
        inside = tisdpo.token_logps(logits, target).logps
    assert torch.equal(inside, tisdpo.token_logps(logits, target).logps) and inside.dtype == torch.float32


@pytest.mark.parametrize("frozen", [False, True])
def test_second_derivatives_raise_instead_of_being_wrong(frozen):
    case = make_case()
    hidden = case.hidden.requires_grad_()
    case.weight.requires_grad_(not frozen)
    logps = tisdpo.linear_token_logps(hidden, case.weight, case.target).logps
    (first,) = torch.autograd.grad(logps.square().sum(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula was registered"):
        first.square().sum().backward()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kl", [None, "reverse", "forward"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_no_number_shows_in_the_gradient(backend, kl, value):
    """Who looks at gradients (GradScaler, clipping that refuses them) has to see it, whatever the loss."""
    z, q, target = torch.randn(2, 300), torch.randn(2, 300), torch.tensor([3, 4])
    z[0, 5] = value
    z.requires_grad_()
    stats = tisdpo.token_logps(z, target, ref_logits=q, kl=kl, backend=backend)
    (stats.logps if kl is None else stats.kl).sum().backward()
    assert z.grad[0].isnan().any() and z.grad[1].isfinite().all()
