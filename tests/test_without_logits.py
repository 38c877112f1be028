"""The head without logits: its kernels against the plain formulas in float64, and the drivers that take it instead of logits and folds.

Without a GPU the kernels run in Triton's interpreter, with one on it.
"""

import math
from itertools import pairwise

import pytest
import torch
from cases import TRANSFORMS, in_float64, truth
from device_cases import DEVICE, ON_GPU, make_case, normal

import tisdpo
from tisdpo import reference
from tisdpo.kernels import configs, head, head_kl
from tisdpo.ops import backend as backends
from tisdpo.ops import fold, products
from tisdpo.ops import rows as row_visits

pytestmark = [pytest.mark.gpu] if ON_GPU else []


@pytest.fixture(autouse=True)
def default_device():
    """Every tensor of these tests lies where the kernels run."""
    with torch.device(DEVICE):
        yield


PRODUCT_TILES = {"table": None, "small": configs.ProductTile(16, 16, 16, 2, 4, 2)}


def exponentials_case(rows, size, vocabulary, transform, bias=True, scale=1.0):
    """Inputs of `head.exponentials`, and the truth: logits after the transform [n, V], dlogp/draw logits, logp."""
    hidden, weight = normal(rows, size, scale=scale).bfloat16(), normal(vocabulary, size, seed=1, scale=1.0).bfloat16()
    bias = normal(vocabulary, seed=2, scale=1.0) if bias else None
    target = torch.arange(rows) * 7 % vocabulary
    if rows > 2:
        target[1], target[2] = vocabulary - 1, -1
    raw = (hidden.double() @ weight.double().T).requires_grad_()
    return hidden, weight, bias, target, *head_truth(raw, bias, target, transform)


def head_truth(raw, bias, target, transform):
    z = reference.transform_logits(raw if bias is None else raw + bias, *transform)
    kept = target >= 0
    logp = torch.where(kept, z.log_softmax(-1).gather(-1, target.clamp(min=0)[:, None])[:, 0], 0)
    return z.detach(), torch.autograd.grad(logp.sum(), raw)[0], logp.detach()


def derivative(hidden, weight, target, bias, transform, tile=None, cuts=(), dtype=torch.float32):
    """lse, logp and dlogp/draw logits in float64, of D that is written in pieces."""
    d, edges = normal(len(hidden), len(weight), seed=9).to(dtype), [0, *cuts, len(weight)]
    places = [(a, b, d[:, a:b]) for a, b in pairwise(edges)]
    lse, logp, factor = head.exponentials(hidden, weight, target, bias, places, *transform, tile=tile)
    return lse, logp, d.double() * factor.double()[:, None]


@pytest.mark.parametrize("tile", PRODUCT_TILES)
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize(
    "rows, size, vocabulary, cuts", [(1, 8, 1, ()), (5, 16, 37, (13, 16)), (20, 40, 300, (255, 257)), (33, 24, 64, ())]
)
def test_a_product_of_exponentials_equals_the_formulas(rows, size, vocabulary, cuts, transform, tile):
    case = exponentials_case(rows, size, vocabulary, TRANSFORMS[transform])
    hidden, weight, bias, target, z, expected, logp = case
    found = derivative(hidden, weight, target, bias, TRANSFORMS[transform], PRODUCT_TILES[tile], cuts)
    kept = target >= 0
    torch.testing.assert_close(found[0][kept].double(), z.logsumexp(-1)[kept], rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(found[1].double(), logp, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(found[2], expected, rtol=1e-4, atol=4e-6)
    alone = head.exponentials(hidden, weight, target, bias, None, *TRANSFORMS[transform], tile=PRODUCT_TILES[tile])
    torch.testing.assert_close(alone[:2], found[:2], rtol=1e-6, atol=4e-6)  # other tiles, other sums
    if rows > 2:
        assert found[0][2] == found[1][2] == 0 and (found[2][2] == 0).all()


@pytest.mark.parametrize("tile", PRODUCT_TILES)
def test_targets_far_below_the_maximum(tile):
    """Log-probs down to -376: tiles with shifts of their own, which are then scaled to one."""
    hidden, weight, bias, target, *_ = exponentials_case(24, 32, 300, TRANSFORMS["plain"])
    hidden *= torch.linspace(0.1, 20, 24).bfloat16()[:, None]
    raw = (hidden.double() @ weight.double().T).requires_grad_()
    _, expected, logp = head_truth(raw, bias, target, TRANSFORMS["plain"])
    assert logp.min() < -300 and ((logp > -30) & (target >= 0)).any()
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 2**-6)):
        found, d = derivative(hidden, weight, target, bias, TRANSFORMS["plain"], PRODUCT_TILES[tile], (100, 164), dtype)[1:]
        torch.testing.assert_close(found.double(), logp, rtol=1e-6, atol=1e-5)
        torch.testing.assert_close(d, expected, rtol=tolerance, atol=1e-5)


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_the_largest_item_of_a_rounded_gradient_is_exact(transform):
    """D at the target is as large as the others together: rounded to bfloat16 the row's factor makes up for it."""
    hidden, weight, bias, target, _, expected, _ = exponentials_case(20, 40, 300, TRANSFORMS[transform])
    d = derivative(hidden, weight, target, bias, TRANSFORMS[transform], dtype=torch.bfloat16)[2]
    kept = (target >= 0).nonzero()[:, 0]
    torch.testing.assert_close(d[kept, target[kept]], expected[kept, target[kept]], rtol=2e-5, atol=1e-6)
    torch.testing.assert_close(d, expected, rtol=2**-6, atol=1e-6)


def test_certain_and_impossible_targets():
    """log p near 0 to its last digit, where 1 - p would be 0; an impossible target has log-prob -inf and the gradient of plain torch."""
    hidden, weight, target = torch.ones(4, 8).bfloat16(), torch.zeros(50, 8).bfloat16(), torch.tensor([3, 3, 7, 3])
    bias = torch.zeros(50)
    bias[3], bias[7] = 25.0, -math.inf
    lse, logp, d = derivative(hidden, weight, target, bias, TRANSFORMS["plain"])
    torch.testing.assert_close(logp[0].double(), -torch.tensor(48 * math.exp(-25.0), dtype=torch.float64).log1p(), rtol=1e-5, atol=0)
    torch.testing.assert_close(d[0, 3], -logp[0].double(), rtol=1e-5, atol=0)
    assert logp[2] == -math.inf and lse.isfinite().all() and d.isfinite().all() and d[0, 7] == 0
    p = bias.double().softmax(-1)
    torch.testing.assert_close(d[2], torch.nn.functional.one_hot(target[2], 50) - p, rtol=1e-5, atol=1e-12)
    bias[:7] = bias[8:] = -200.0  # nothing is left of the others
    lse, logp, d = derivative(hidden, weight, target, bias, TRANSFORMS["plain"])
    assert logp[2] == -math.inf and d.isfinite().all() and (d[2] == 0).all()


def two_models(rows, size, vocabulary, extreme):
    """Hidden states and heads of policy and reference, and target; extreme: log-probs of both down to -200."""
    hidden, weight, _, target, *_ = exponentials_case(rows, size, vocabulary, TRANSFORMS["plain"])
    ref_hidden = hidden + normal(rows, size, seed=5, scale=0.3).bfloat16()
    ref_weight = weight + normal(vocabulary, size, seed=6, scale=0.3).bfloat16()
    if extreme:
        hidden *= torch.linspace(0.1, 20, rows).bfloat16()[:, None]
        ref_hidden *= torch.linspace(0.1, 20, rows).bfloat16()[:, None]
    return hidden, weight, ref_hidden, ref_weight, target


@pytest.mark.parametrize("tile", PRODUCT_TILES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("transform", ["plain", "scaled"])
@pytest.mark.parametrize("kl", ["reverse", "forward"])
@pytest.mark.parametrize(
    "kind, rows, size, vocabulary, cuts",
    [
        ("", 1, 8, 1, ()), ("", 5, 16, 37, (13, 16)), ("", 20, 40, 300, (255,)), ("", 3, 16, 9000, (4096,)),
        ("extreme", 24, 24, 100, (64,)), ("below", 9, 16, 300, (64,)),
    ],
)  # fmt: skip
def test_two_products_equal_the_formulas(kind, rows, size, vocabulary, cuts, kl, transform, dtype, tile):
    """extreme: log-probs down to -200, tiles with shifts of their own; below: all logits far below the 0 that stands beyond the edge."""
    if vocabulary == 9000 and tile == "small" and not ON_GPU:
        pytest.skip("takes minutes in the interpreter")
    scale, _, temperature = TRANSFORMS[transform]
    extreme = kind == "extreme"
    hidden, weight, ref_hidden, ref_weight, target = inputs = two_models(rows, size, vocabulary, extreme)
    if kind == "below":
        for h, w in ((hidden, weight), (ref_hidden, ref_weight)):
            h[:, 0], w[:, 0] = 1, -150
    raw = (hidden.double() @ weight.double().T).requires_grad_()
    expected = truth(raw, target, ref_hidden.double() @ ref_weight.double().T, None, None, kl, (scale, None, temperature))
    assert not extreme or min(x.min() for x in expected[:2]) < -100
    g, g_kl = normal(rows, seed=8, scale=1.0), normal(rows, seed=9, scale=0.1)
    gradient = torch.autograd.grad((g * expected[0]).sum() + (g_kl * expected[2]).sum(), raw)[0]
    d, scratch = torch.full((2, rows, vocabulary), math.nan, dtype=dtype)
    places = [(a, b, d[:, a:b]) for a, b in pairwise([0, *cuts, vocabulary])]
    options, exact = dict(tile=PRODUCT_TILES[tile]), dtype == torch.float32
    found = head_kl.divergences(*inputs, places, scratch, g, g_kl, kl, scale, temperature, **options)
    kept = target >= 0
    lse = [
        reference.transform_logits(z, scale, None, temperature).logsumexp(-1) for z in (raw, ref_hidden.double() @ ref_weight.double().T)
    ]
    for x, y in zip((found[0], found[2], found[1], found[3]), (*lse, *expected)):
        torch.testing.assert_close(x.double()[kept], y.detach()[kept], rtol=3e-6, atol=1e-4 if extreme else 2e-5)
    # Rounded exponentials: each by 2^-8, in the interpreter, which cuts, by 2^-7; logits by their own size.
    rounding = 0 if exact else 2**-8 if ON_GPU else 2**-7
    noise = 1e-5 + 5e-7 * raw.detach().abs().max().item()
    off, divergence = (found[4].double() - expected[2].detach()).abs(), expected[2].detach().clamp(min=0)
    assert (off <= rounding * (2 * divergence).sqrt() + noise * (1 + divergence)).all()
    # with log-ratios of hundreds the terms of the gradient are as large as these, and so is their rounding
    policy, both = shares(raw, inputs, scale / temperature)
    allowed = 2 * rounding * gradient.abs() + (2 * rounding + noise) * (g.abs()[:, None] * policy + (g_kl.abs() + 1e-2)[:, None] * both)
    assert ((d.double() - gradient).abs() <= allowed + 1e-6).all()
    alone = head_kl.divergences(*inputs, [(0, vocabulary, scratch)], None, None, None, kl, scale, temperature, **options)
    torch.testing.assert_close(alone, found, rtol=3e-6, atol=(2e-5 if exact else 1e-3) * max(1.0, expected[2].max().item()))
    if rows > 2:
        assert all(x[2] == 0 for x in found) and (d[2] == 0).all()


def shares(raw, inputs, scale):
    """What an item of D consists of, [n, V] each: p for log p(target), (p + q) (1 + |x - y|) for KL, x and y relative to the target."""
    _, _, ref_hidden, ref_weight, target = inputs
    z, q = scale * raw.detach(), scale * (ref_hidden.double() @ ref_weight.double().T)
    place = target.clamp(min=0)[:, None]
    p, apart = z.softmax(-1), (z - z.gather(1, place)) - (q - q.gather(1, place))
    return scale * p, scale * (p + q.softmax(-1)) * (1 + apart.abs())


@pytest.mark.parametrize("kl", ["reverse", "forward"])
def test_models_that_agree_have_no_divergence(kl):
    """Rounded exponentials do not show: they are the same in both sums. The gradient is off by their rounding, as always."""
    hidden, weight, *_, target = two_models(20, 40, 300, False)
    d, scratch = torch.empty(2, 20, 300, dtype=torch.bfloat16)
    g_kl = torch.full((20,), -1.0)
    _, logp, _, ref_logp, found = head_kl.divergences(
        hidden, weight, hidden, weight, target, [(0, 300, d)], scratch, None, g_kl, kl, 1.0, 1.0
    )
    torch.testing.assert_close(found, torch.zeros(20), rtol=0, atol=1e-5)
    torch.testing.assert_close(logp, ref_logp, rtol=1e-6, atol=1e-6)
    _, expected, _ = head_truth((hidden.double() @ weight.double().T).requires_grad_(), None, target, TRANSFORMS["plain"])
    torch.testing.assert_close(d.double(), expected, rtol=3 * (2**-8 if ON_GPU else 2**-7), atol=1e-6)


def test_the_head_without_logits_takes_aligned_bfloat16(monkeypatch):
    x, w = torch.zeros(4, 24).bfloat16(), torch.zeros(9, 24).bfloat16()
    assert head.serves(x, w) == (configs.architecture(x.device) in configs.PRODUCT)
    monkeypatch.setattr(configs, "PRODUCT", {configs.architecture(x.device): configs.ProductTile(16, 16, 16, 2, 4, 2)})
    assert head.serves(x, w) and head.serves(x[:, :16], w[:, :16])
    unaligned = ((x[:, :20], w[:, :20].clone()), (x[:, :20], w[:, :20]), (x[:, 1:], w[:, 1:]), (torch.zeros(24, 4).bfloat16().T, w))
    for a, b in ((x.half(), w.half()), (x.float(), w.float()), (x[:0], w), (x, w[:0]), *unaligned):
        assert not head.serves(a, b)
    monkeypatch.setattr(configs, "PRODUCT", {})
    assert not head.serves(x, w)


@pytest.fixture
def like_a_gpu(monkeypatch):
    """What products of bfloat16 do on a GPU, in small pieces: chunks and visits of 16 rows."""
    monkeypatch.setattr(products, "keeps_sums", lambda device, a, b: a == b == torch.bfloat16)
    monkeypatch.setattr(products, "rounds_itself", lambda x: x.dtype == torch.bfloat16)
    monkeypatch.setattr(products, "_mm", in_float64)
    monkeypatch.setattr(products, "SLICE_BYTES", 70 * 24)
    monkeypatch.setattr(backends, "chunk_rows", lambda *a: 16)
    monkeypatch.setattr(row_visits, "DIRECT_ROWS", 16)
    monkeypatch.setattr(row_visits, "HIDDEN_ROWS", 8)


def results(case, backend, dtype, kl, plan="one_pass", needs=(True, True, True), ref_dtype=None, bias=True, nll_coef=0.0, **options):
    """Loss and the gradients that are needed. With biases a KL needs logits."""
    policy = [x.detach().to(dtype).requires_grad_(need) for x, need in zip((case.hidden, case.weight, case.bias), needs)]
    names = ("ref_hidden", "ref_weight", *(["ref_bias"] if bias else []))
    output = tisdpo.linear_tis_dpo_loss(
        *policy[:2], case.target, case.cu_seqlens, bias=policy[2] if bias else None, token_weights=case.token_weights.float(),
        backend=backend, plan=plan, objective=tisdpo.Objective(kl=kl, beta=0.01, nll_coef=nll_coef),
        **{key: getattr(case, key).to(ref_dtype or dtype) for key in names}, **options,
    )  # fmt: skip
    trained = [x for x in policy[: 2 + bias] if x.requires_grad]
    return [output.loss.detach(), *(torch.autograd.grad(output.loss * 0.5, trained) if trained else ())]


def agree(case, kl, atol=0.02, ref_dtype=None, **options):
    found = results(case, "triton", torch.bfloat16, kl, ref_dtype=ref_dtype, **options)
    for x, y in zip(found, results(case, "torch", torch.float64, kl, **options), strict=True):
        torch.testing.assert_close(x.double(), y.double(), rtol=0.02, atol=atol * y.abs().max().item())


@pytest.mark.parametrize("plan", ["one_pass", "two_pass"])
@pytest.mark.parametrize("rows", [16, 20, 40, 48, 49])  # one chunk, D in the result, also beside it, dWeight summed
@pytest.mark.parametrize("kl, bias", [(None, True), ("reverse", True), ("reverse", False), ("forward", False)])
def test_a_gradient_that_is_written_where_it_waits(like_a_gpu, rows, kl, bias, plan):
    """What a GPU does with 16-bit heads: columns of D in the memory of dWeight and beside it."""
    case = make_case((rows // 2, rows - rows // 2 - 8, 5, 6), H=24, V=997, dtype=torch.bfloat16, ignored=(3, 4, 9))
    agree(case, kl, plan=plan, bias=bias)


@pytest.mark.parametrize("plan", ["one_pass", "two_pass"])
@pytest.mark.parametrize("needs", [(True, False, False), (False, True, False), (False, False, True), (False, False, False)])
@pytest.mark.parametrize("rows", [16, 40, 60])
@pytest.mark.parametrize("kl", [None, "reverse"])
def test_a_head_without_logits_for_every_gradient(like_a_gpu, kl, rows, needs, plan):
    case = make_case((rows // 2, rows - rows // 2 - 8, 5, 6), H=24, V=97, dtype=torch.bfloat16, ignored=(3, 4, 9))
    agree(case, kl, needs=needs, plan=plan, bias=kl is None)


def test_who_needs_no_logits_with_kl(monkeypatch):
    case = make_case((4, 5), H=24, V=97, dtype=torch.bfloat16)
    policy, ref = row_visits.heads(case.hidden, case.weight, case.ref_hidden, case.ref_weight, None)
    monkeypatch.setattr(configs, "PRODUCT", {configs.architecture(case.hidden.device): configs.ProductTile(16, 16, 16, 2, 4, 2)})
    plain = fold.Fold("triton", "reverse", fold.Transform())
    assert row_visits.needs_no_logits(policy, ref, plain)
    for other in (plain._replace(bias=case.bias), plain._replace(ref_bias=case.bias), plain._replace(transform=fold.Transform(softcap=3.0)),
                  plain._replace(transform=fold.Transform(-1.0)), plain._replace(backend="torch")):  # fmt: skip
        assert not row_visits.needs_no_logits(policy, ref, other)


def test_a_long_pair_with_kl_is_visited_twice(like_a_gpu, monkeypatch):
    calls, own = [], head_kl.divergences
    monkeypatch.setattr(head_kl, "divergences", lambda *args, **options: (calls.append(args[6] is not None), own(*args, **options))[1])
    monkeypatch.setattr(backends, "longest_held", lambda *args: 16)
    agree(make_case((30, 30, 2, 2), H=24, V=97, dtype=torch.bfloat16), "reverse", bias=False)
    assert (calls.count(False), calls.count(True)) == (4, 4 + 1)  # the long pair: four ranges, twice; the short one once


@pytest.mark.parametrize("rows", [16, 40, 60])
def test_an_nll_is_one_more_factor_of_what_waits(like_a_gpu, rows):
    agree(make_case((rows // 2, rows - rows // 2 - 8, 5, 6), H=24, V=97, dtype=torch.bfloat16, ignored=(3, 4, 9)), None, nll_coef=0.5)


def test_a_long_pair_without_logits_is_visited_twice_and_its_reference_once(like_a_gpu, monkeypatch):
    calls, own = [], head.exponentials
    monkeypatch.setattr(head, "exponentials", lambda *args, **options: (calls.append(args[4] is not None), own(*args, **options))[1])
    monkeypatch.setattr(backends, "longest_held", lambda *args: 16)
    case = make_case((30, 30, 2, 2), H=24, V=97, dtype=torch.bfloat16)
    agree(case, None)
    # the long pair: four ranges, policy and reference, then D; the short one: reference, and D with its statistics
    assert (calls.count(False), calls.count(True)) == (4 + 4 + 1, 4 + 1)


@pytest.mark.parametrize("ref_dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("rows", [16, 60])
def test_a_reference_of_another_dtype_has_logits(like_a_gpu, rows, ref_dtype):
    case = make_case((rows // 2, rows - rows // 2 - 8, 5, 6), H=24, V=97, dtype=torch.bfloat16)
    agree(case, None, ref_dtype=ref_dtype)
    case.ref_hidden, case.ref_weight = case.ref_hidden[:, :20], case.ref_weight[:, :20]  # rows that are not aligned
    agree(case, None)
