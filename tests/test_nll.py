"""`linear_nll_loss`: values and gradients against the plain formulas, chunks, dtypes, what it costs, what it refuses."""

import math

import pytest
import torch
from cases import BACKENDS, SHAPES, make_case
from test_operators import CHECKS, TRANSFORM
from test_products import IGNORED, LENGTHS, H, N, V, head_products
from test_token_stats import TRANSFORMS, assert_as_accurate

import tisdpo
from tisdpo import reference
from tisdpo.ops import backend as backends
from tisdpo.ops import nll

NEEDS = [(True, True, True), (True, False, False), (False, True, False), (False, False, True)]


def truth(hidden, weight, bias, target, weights, normalizer, transform):
    logps = reference.token_logps(reference.transform_logits(reference.linear_logits(hidden, weight, bias), **transform), target)
    return -(weights * logps).sum() / normalizer, logps


@pytest.mark.parametrize("needs", NEEDS)
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_formulas(monkeypatch, shape, transform, needs):
    monkeypatch.setattr(backends, "chunk_rows", lambda *a: 4)  # several chunks
    lengths, ignored = SHAPES[shape]
    case, options = make_case(lengths, ignored=ignored), TRANSFORMS[transform]
    head = [x.requires_grad_(need) for x, need in zip((case.hidden, case.weight, case.bias), needs)]
    trained = [x for x in head if x.requires_grad]
    weights = case.token_weights - 0.5  # of either sign
    count = max(len(case.target) - len(ignored), 1)
    for given, normalizer in ((weights, None), (None, 7.0), (weights, torch.tensor(7))):
        output = tisdpo.linear_nll_loss(head[0], head[1], case.target, bias=head[2], token_weights=given, normalizer=normalizer, **options)
        factors = torch.ones_like(weights) if given is None else given
        expected, logps = truth(*head, case.target, factors, normalizer or count, options)
        torch.testing.assert_close(output.loss, expected, rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(output.logps, logps.detach(), rtol=1e-12, atol=1e-13)
        assert not output.logps.requires_grad
        for scale in (1.0, -0.3):
            found, true = (torch.autograd.grad(scale * x, trained, retain_graph=True) for x in (output.loss, expected))
            torch.testing.assert_close(found, true, rtol=1e-11, atol=1e-12)


def test_leading_shapes():
    case = make_case((8, 8), ignored=(3,))
    flat = tisdpo.linear_nll_loss(case.hidden, case.weight, case.target, token_weights=case.token_weights)
    weights, target = case.token_weights.reshape(2, 8), case.target.reshape(2, 8)
    batched = tisdpo.linear_nll_loss(case.hidden.reshape(2, 8, -1), case.weight, target, token_weights=weights)
    assert torch.equal(batched.loss, flat.loss) and torch.equal(batched.logps, flat.logps.reshape(2, 8))


def test_is_the_mean_cross_entropy():
    case = make_case(ignored=(2, 9))
    loss = tisdpo.linear_nll_loss(case.hidden, case.weight, case.target).loss
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(case.hidden @ case.weight.T, case.target))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_accuracy(dtype, backend):
    case = make_case((40, 23), H=48, V=1003, ignored=(5,))
    inputs = [(0.5 * x).to(dtype).double() for x in (case.hidden, case.weight, case.bias)]
    results = []
    for run in ("ours", "plain", "truth"):
        d = torch.float64 if run == "truth" else dtype
        head = [x.to(d).requires_grad_() for x in inputs]
        if run == "ours":
            weights = case.token_weights.float()
            loss = tisdpo.linear_nll_loss(head[0], head[1], case.target, bias=head[2], token_weights=weights, backend=backend).loss
            assert loss.dtype == torch.float32
        else:
            logits = reference.linear_logits(*head).to(torch.float64 if run == "truth" else torch.float32)
            loss = -(case.token_weights * reference.token_logps(logits, case.target)).sum() / 62
        results.append([loss, *torch.autograd.grad(loss * 8, head)])
    for name, actual, plain, true in zip(("loss", "grad hidden", "grad weight", "grad bias"), *results, strict=True):
        assert_as_accurate(name, actual, plain, true)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("weighted, needs", [(True, NEEDS[0]), (False, NEEDS[1]), (True, (False, False, False))])
def test_opcheck(weighted, needs, backend):
    case = make_case((3, 2), H=4, V=7, ignored=(1,), dtype=torch.float32)
    head = [x.requires_grad_(need) for x, need in zip((case.hidden, case.weight, case.bias), needs)]
    weights, normalizer = (case.token_weights, torch.tensor(3.0)) if weighted else (None, None)
    args = (*head, case.target, weights, normalizer, *TRANSFORM, -100, list(needs), backend)
    torch.library.opcheck(nll.linear_nll, args, test_utils=CHECKS)


def test_compiled_without_a_graph_break_equals_eager():
    torch._dynamo.reset()
    case = make_case(ignored=(4,), dtype=torch.float32)

    def loss(hidden, weight, normalizer=3.0):
        options = dict(token_weights=case.token_weights, softcap=3.0, normalizer=normalizer)
        return tisdpo.linear_nll_loss(hidden, weight, case.target, **options).loss

    head = [case.hidden.requires_grad_(), case.weight.requires_grad_()]
    results = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        values = [function(*head, *more) for more in ((), (4.0,), (5,), (torch.tensor(6.0),))]
        results.append([torch.stack(values).detach(), *torch.autograd.grad(sum(values), head)])
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("frozen, price", [(False, 3), (True, 2)])
def test_costs_what_the_documentation_says(monkeypatch, frozen, price):
    monkeypatch.setattr(backends, "chunk_rows", lambda *a: 15)
    case = make_case(LENGTHS, H=H, V=V, ignored=IGNORED, dtype=torch.float32)
    hidden, weight = case.hidden.requires_grad_(), case.weight.requires_grad_(not frozen)
    assert head_products(lambda: tisdpo.linear_nll_loss(hidden, weight, case.target).loss.backward(), N) == price
    assert head_products(torch.no_grad()(lambda: tisdpo.linear_nll_loss(hidden, weight, case.target)), N) == 1


def test_float16_gradients_are_scaled_before_they_are_rounded():
    """A GradScaler multiplies the loss by 65536: without it gradients of 1e-8 would be 0."""
    case = make_case((40, 23), dtype=torch.float16)
    hidden, weight = case.hidden.requires_grad_(), case.weight.requires_grad_()
    loss = tisdpo.linear_nll_loss(hidden, weight, case.target, normalizer=1e7).loss
    found = torch.autograd.grad(loss * 65536, hidden)[0]
    wide = case.hidden.detach().double().requires_grad_()
    true = torch.autograd.grad(tisdpo.linear_nll_loss(wide, weight.detach().double(), case.target).loss * 63 * 65536 / 1e7, wide)[0]
    torch.testing.assert_close(found.double(), true, rtol=2e-3, atol=1e-6)
    mean = tisdpo.linear_nll_loss(hidden, weight, case.target.masked_fill(case.target == 3, -100))
    assert mean.loss.isfinite() and mean.logps.shape == (63,)
    with pytest.raises(ValueError, match="token_weights must be finite, got nan at position 0"):
        tisdpo.linear_nll_loss(hidden, weight, case.target, token_weights=torch.full((63,), math.nan))


def test_second_derivatives_raise():
    case = make_case()
    loss = tisdpo.linear_nll_loss(case.hidden.requires_grad_(), case.weight, case.target).loss
    with pytest.raises(RuntimeError, match="linear_nll_loss has no second derivative"):
        torch.autograd.grad(loss, case.hidden, create_graph=True)


@pytest.mark.parametrize(
    "changes, error, message",
    [
        (dict(token_weights=torch.ones(3)), ValueError, r"token_weights must have one weight a token, shape \(16,\), got \(3,\)"),
        (dict(token_weights=torch.full((16,), math.nan)), ValueError, "token_weights must be finite, got nan at position 0"),
        (dict(token_weights=torch.ones(16, requires_grad=True)), ValueError, "token_weights requires a gradient"),
        (dict(normalizer=0), ValueError, "normalizer must be positive"),
        (dict(normalizer=torch.tensor(0.0)), ValueError, "normalizer must be positive .*, got 0.0"),
        (dict(normalizer="3"), TypeError, "normalizer must be a number or a tensor of one, got str"),
        (dict(normalizer=torch.ones(2)), ValueError, r"normalizer must be one number, got a tensor of shape \(2,\)"),
        (dict(target=torch.full((16,), 11)), ValueError, "target must be in 0..10 or ignore_index=-100, got 11 at position 0"),
        (dict(temperature=0), ValueError, "temperature"),
    ],
)
def test_bad_input_is_named(changes, error, message):
    case = make_case(dtype=torch.float32)
    with pytest.raises(error, match=message):
        tisdpo.linear_nll_loss(**(dict(hidden=case.hidden, weight=case.weight, target=case.target) | changes))
