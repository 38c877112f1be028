"""The Triton kernels against the plain formulas in float64: awkward shapes, one and several programs a row.

Without a GPU they run in Triton's interpreter, with one on it.
"""

import math
from itertools import pairwise

import cases
import pytest
import torch
from cases import KLS, SHAPES, TRANSFORMS, truth
from test_products import in_float64

import tisdpo
from tisdpo import Objective, Weighting, reference
from tisdpo.kernels import boundaries, configs, fold, head, scale, sequence_sums
from tisdpo.ops import backend as backends
from tisdpo.ops import products
from tisdpo.ops import rows as row_visits

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
pytestmark = [pytest.mark.gpu] if ON_GPU else []

ONE = configs.Tile(block=64, warps=4, programs=1)  # one program a row, several blocks
SPLIT = configs.Tile(block=16, warps=4, programs=1 << 20)  # as many programs a row as allowed
TILES = {"one": ONE, "split": SPLIT}


@pytest.fixture(autouse=True)
def default_device():
    """Every tensor of these tests lies where the kernels run."""
    with torch.device(DEVICE):
        yield


def make_case(*args, **options):
    with torch.device("cpu"):
        case = cases.make_case(*args, **options)
    for name, x in vars(case).items():
        setattr(case, name, x.to(DEVICE))
    return case


def normal(*shape, seed=0, scale=3.0, dtype=torch.float32):
    g = torch.Generator("cpu").manual_seed(seed)
    return (scale * torch.randn(*shape, generator=g, dtype=torch.float64, device="cpu")).to(DEVICE, dtype)


def statistics(z, target, q, bias=None, ref_bias=None, kl=None, transform=TRANSFORMS["plain"], tile=ONE):
    return fold.statistics(z, target, q, bias, ref_bias, True, kl, *transform, tile=tile)


def gradient(z, target, q, stats, g, g_kl, bias=None, ref_bias=None, kl=None, transform=TRANSFORMS["plain"], tile=ONE, **where):
    return fold.gradient(z, target, q, stats, g, g_kl, bias, ref_bias, True, kl, *transform, tile=tile, **where)


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kl", KLS)
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_folds_equal_the_formulas(transform, kl, bias, tile):
    rows, V = 5, 201  # V is no multiple of a block
    z, q, target = normal(rows, V), normal(rows, V, seed=1), torch.tensor([0, V - 1, -1, 63, 64])
    biases = (normal(V, seed=2), normal(V, seed=3)) if bias else (None, None)
    leaf = z.double().requires_grad_()
    expected = truth(leaf, target, q, *biases, kl, TRANSFORMS[transform])
    stats = statistics(z, target, q, *biases, kl, TRANSFORMS[transform], TILES[tile])
    _, logp, _, ref_logp, divergence = stats
    for x, true in ((logp, expected[0]), (ref_logp, expected[1]), (divergence, expected[2])):
        assert (x is None) == (true is None)
        if x is not None:
            torch.testing.assert_close(x.double(), true.detach(), rtol=2e-6, atol=4e-6)
    g, g_kl = normal(rows, seed=4, scale=1.0), normal(rows, seed=5, scale=1.0)
    total = (g * expected[0]).sum() + (0 if kl is None else (g_kl * expected[2]).sum())
    d = gradient(z, target, q, stats, g, g_kl, *biases, kl, TRANSFORMS[transform], TILES[tile])
    assert d.data_ptr() == z.data_ptr() and (d[2] == 0).all()
    torch.testing.assert_close(d.double(), torch.autograd.grad(total, leaf)[0], rtol=1e-5, atol=4e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kl", KLS)
def test_a_narrow_gradient_shares_the_memory_of_the_logits(dtype, kl):
    """float32 logits, 16-bit gradient at the start of every row: nothing is read after it was overwritten."""
    rows, V = 4, 300
    z, q, target = normal(rows, V), normal(rows, V, seed=1), torch.tensor([5, 0, 299, 150])
    g_kl = torch.linspace(-1, 1, rows)
    stats = statistics(z, target, q, kl=kl)
    wide = gradient(z.clone(), target, q, stats, None, g_kl, kl=kl)
    narrow = gradient(z, target, q, stats, None, g_kl, kl=kl, dtype=dtype)
    assert narrow.dtype == dtype and narrow.data_ptr() == z.data_ptr() and narrow.stride() == (2 * V, 1)
    # the interpreter cuts bfloat16 off, a GPU rounds
    torch.testing.assert_close(narrow, wide.to(dtype), rtol=2**-7 if dtype == torch.bfloat16 and not ON_GPU else 0, atol=0)
    split = gradient(normal(rows, V), target, q, stats, None, g_kl, kl=kl, dtype=dtype, tile=SPLIT)
    assert split.is_contiguous() and torch.equal(split, narrow)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_tiles_of_16_bits(dtype):
    z, q, target = normal(3, 100, dtype=dtype), normal(3, 100, seed=1, dtype=dtype), torch.tensor([1, 99, 7])
    expected = truth(z, target, q, None, None, "reverse", TRANSFORMS["plain"])
    stats = statistics(z, target, q, kl="reverse")
    torch.testing.assert_close(stats[1].double(), expected[0], rtol=1e-6, atol=4e-6)
    torch.testing.assert_close(stats[4].double(), expected[2], rtol=1e-6, atol=4e-6)
    out = torch.empty_like(z)
    gradient(z, target, q, stats, None, torch.ones(3), kl="reverse", out=out)
    assert out.isfinite().all() and out.float().sum(-1).abs().max() < 0.1


@pytest.mark.parametrize("tile", TILES)
def test_strided_logits_are_read_in_place(tile):
    """Rows of a slice of padded logits, numbered through two dimensions; and rows with a gap behind them."""
    padded, target = normal(3, 5, 37), torch.arange(12)
    sliced = padded[:, :-1]
    flat = sliced.reshape(12, 37)
    expected = statistics(flat, target, None, tile=TILES[tile])
    assert all(torch.equal(a, b) for a, b in zip(statistics(sliced, target, None, tile=TILES[tile])[:2], expected))
    wide = torch.full((12, 50), math.nan)
    wide[:, :37] = flat
    assert all(torch.equal(a, b) for a, b in zip(statistics(wide[:, :37], target, None, tile=TILES[tile])[:2], expected))
    d = gradient(flat.clone(), target, None, expected, None, None, tile=TILES[tile])
    gradient(sliced, target, None, expected, None, None, tile=TILES[tile])
    assert torch.equal(sliced.reshape(12, 37), d)
    with pytest.raises(ValueError, match=r"must lie next to each other, got strides \(1, 12\)"):
        statistics(normal(37, 12).T, target, None)


@pytest.mark.parametrize("tile", TILES)
def test_extreme_logits(tile):
    """Huge, certain and impossible tokens: no NaN, and the right limits."""
    z, q = torch.zeros(4, 200), normal(4, 200, seed=1)
    z[0, 3] = 1e4  # certain
    z[1] = 1e4  # uniform next to a huge constant
    z[2, :150] = -math.inf  # impossible for both
    q[2, :150] = -math.inf
    z[3, ::2] = -math.inf  # impossible for the policy alone
    target = torch.tensor([3, 7, 199, 1])
    for kl in ("reverse", None):
        _, logp, _, _, divergence = stats = statistics(z, target, q, kl=kl, tile=TILES[tile])
        torch.testing.assert_close(logp, -torch.tensor([0.0, math.log(200), math.log(50), math.log(100)]))
        assert divergence is None or divergence.isfinite().all()
        d = gradient(z.clone(), target, q, stats, None, torch.ones(4), kl=kl, tile=TILES[tile])
        assert d.isfinite().all() and (d[2, :150] == 0).all()
    impossible = statistics(q[2:3], target[2:3], z[2:3], kl="forward", tile=TILES[tile])
    assert impossible[4].isfinite().all()


def test_expanded_and_strided_vectors():
    """Autograd sends `expand`ed upstream gradients; targets, biases and statistics may be slices."""
    z, target, bias = normal(3, 40), torch.tensor([1, 9, 2, 9, 3, 9])[::2], normal(80)[::2]
    stats = statistics(z, target, None, bias)
    torch.testing.assert_close(stats[1], (z + bias).log_softmax(-1).gather(1, target[:, None])[:, 0])
    dense = gradient(z.clone(), target, None, stats, torch.full((3,), 2.0), None, bias)
    assert torch.equal(gradient(z.clone(), target, None, stats, torch.tensor(2.0).expand(3), None, bias), dense)


def test_no_rows():
    z, target = torch.empty(0, 7), torch.empty(0, dtype=torch.int64)
    stats = statistics(z, target, None)
    assert stats[0].shape == stats[1].shape == (0,)
    assert gradient(z, target, None, stats, None, None).shape == (0, 7)


def test_splits_fill_the_device_and_cover_the_vocabulary():
    tile = configs.Tile(4096, 8, 528)
    for rows in (1, 3, 16, 200, 528, 10_000):
        for vocabulary in (1, 4096, 32000, 128256, 262208):
            count, span = configs.splits(rows, vocabulary, tile)
            assert span % tile.block == 0 and (count - 1) * span < vocabulary <= count * span
            assert count == 1 or rows < tile.programs
    assert configs.splits(4096, 128256, tile)[0] == 1 and configs.splits(1, 128256, tile)[0] == 16


def test_an_unknown_architecture_falls_back_with_one_log_line(caplog):
    configs._tile.cache_clear()
    with caplog.at_level("WARNING", logger="tisdpo"):
        assert configs._tile("gradient", "gfx1234") == configs._tile("gradient", "gfx1234") == configs.FALLBACK
    assert len(caplog.records) == 1 and "no tile of 'gradient' for gfx1234" in caplog.text


@pytest.mark.parametrize("weights", ["ones", "given", "formed"])
@pytest.mark.parametrize("lengths", [(3, 1, 0, 5), (1,) * 10, (2500, 7)])
def test_weighted_sums(lengths, weights):
    N, cu = sum(lengths), torch.tensor([0, *lengths]).cumsum(0)
    logps, ref_logps, kl, pos, neg = (normal(N, seed=i, scale=1.0) for i in range(5))
    rule = Weighting(k=1.5, mu_chosen=0.8, mu_rejected=-1.2)
    chosen = torch.repeat_interleave(torch.arange(len(lengths)) % 2 == 0, torch.tensor(lengths))
    w = {
        "ones": torch.ones(N), "given": normal(N, seed=6).abs(), "formed": tisdpo.token_weights(pos, neg, chosen, rule)
    }[weights]  # fmt: skip
    given = w if weights == "given" else None
    contrast = (pos, neg) if weights == "formed" else (None, None)
    sums, used = sequence_sums.sequence_sums(
        logps, ref_logps, kl, cu, given, *contrast, rule.k, rule.mu_chosen, rule.mu_rejected, rule.lower, rule.upper
    )
    torch.testing.assert_close(used, w, rtol=1e-6, atol=0)
    for row, values in zip(sums, (w * (logps - ref_logps), w * kl, logps)):
        expected = torch.stack([x.double().sum() for x in values.split(lengths)])
        torch.testing.assert_close(row.double(), expected, rtol=1e-5, atol=1e-4)
    g_D, g_K = normal(len(lengths), seed=8), normal(len(lengths), seed=9)
    out_D, out_K = sequence_sums.spread(g_D, g_K, used, cu)
    spread = [torch.repeat_interleave(g, torch.tensor(lengths)) for g in (g_D, g_K)]
    assert torch.equal(out_D, spread[0] * used) and torch.equal(out_K, spread[1] * used)
    assert (sequence_sums.spread(None, g_K, used, cu)[0] == 0).all()


# The public functions by these kernels, against the torch backend in float64


@pytest.mark.parametrize("kl", KLS)
@pytest.mark.parametrize("shape", SHAPES)
def test_linear_loss_equals_the_torch_backend(shape, kl):
    lengths, ignored = SHAPES[shape]
    results = {}
    for backend, dtype in (("triton", torch.float32), ("torch", torch.float64)):
        case = make_case(lengths, ignored=ignored, dtype=torch.float32)
        inputs = [x.to(dtype).requires_grad_() for x in (case.hidden, case.weight, case.bias)]
        ref = dict(zip(("ref_hidden", "ref_weight", "ref_bias"), (x.to(dtype) for x in (case.ref_hidden, case.ref_weight, case.ref_bias))))
        outputs = [
            tisdpo.linear_tis_dpo_loss(
                inputs[0], inputs[1], case.target, case.cu_seqlens, bias=inputs[2], token_weights=case.token_weights.to(dtype), plan=plan,
                objective=Objective(kl=kl), softcap=4.0, backend=backend, **ref,
            )
            for plan in ("one_pass", "two_pass")
        ]  # fmt: skip
        results[backend] = [
            x.detach().double()
            for out in outputs
            for x in (out.loss, out.logits, out.chosen_logps, out.rejected_rewards, *torch.autograd.grad(out.loss, inputs))
        ]
    for a, b in zip(results["triton"], results["torch"]):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_shifted_logits_and_a_gradient_over_them(backend, overwrite):
    padded, tokens = normal(2, 6, 19).requires_grad_(), torch.arange(12).reshape(2, 6)
    tokens[0, 3] = -100
    logits = padded * 1.0
    address = logits.data_ptr()
    loss = tisdpo.token_logps(logits[:, :-1], tokens[:, 1:], overwrite_logits=overwrite, backend=backend).logps.square().sum()
    before = logits.detach().clone()
    grad = torch.autograd.grad(loss, padded, retain_graph=True)[0]
    expected = torch.autograd.grad(reference.token_logps(padded[:, :-1], tokens[:, 1:]).square().sum(), padded)[0]
    torch.testing.assert_close(grad, expected, rtol=1e-5, atol=1e-5)
    assert logits.data_ptr() == address and torch.equal(logits, before) == (not overwrite)
    if overwrite:  # the logits are gone
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            torch.autograd.grad(loss, padded)


def test_reruns_are_equal_bit_for_bit():
    def run():
        case = make_case((8, 5, 1, 6), V=211, dtype=torch.float32)
        inputs = [x.requires_grad_() for x in (case.hidden, case.weight)]
        loss = tisdpo.linear_tis_dpo_loss(
            *inputs, case.target, case.cu_seqlens, token_weights=case.token_weights, ref_hidden=case.ref_hidden,
            ref_weight=case.ref_weight, objective=Objective(kl="reverse"), backend="triton",
        ).loss  # fmt: skip
        return [loss.detach(), *torch.autograd.grad(loss, inputs)]

    assert all(torch.equal(a, b) for a, b in zip(run(), run()))


def test_float64_is_refused_by_name():
    with pytest.raises(RuntimeError, match="float64 is served by backend='torch'"):
        tisdpo.token_logps(torch.zeros(2, 3, dtype=torch.float64), torch.tensor([0, 1]), backend="triton")


@pytest.mark.parametrize("kl", [None, "reverse", "forward"])
@pytest.mark.parametrize("columns", [(0, 64), (64, 100), (37, 101), (0, 101)])
def test_columns_of_a_gradient(kl, columns):
    n, V = 5, 101
    z, q = torch.randn(n, V), torch.randn(n, V)
    target, bias = torch.tensor([0, 63, 64, 100, -1]), torch.randn(V)
    g = torch.randn(n)
    options = dict(ref_z=None if kl is None else q, bias=bias, ref_bias=None, ignored=True, kl=kl)
    options |= dict(logit_scale=0.9, softcap=4.0, temperature=1.2)
    stats = fold.statistics(z, target, **options)
    options = dict(target=target, stats=stats, g_logp=g, g_kl=None if kl is None else g.flip(0), **options)
    whole = fold.gradient(z, out=torch.empty_like(z), **options)
    first, last = columns
    found = fold.gradient(z, out=torch.full((n, last - first), math.nan), columns=columns, **options)
    assert torch.equal(found, whole[:, first:last])


@pytest.mark.parametrize("g", [1.0, -0.3, 0.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_scaling_in_place(g, dtype):
    x = torch.randn(37, 1001).to(dtype)
    expected = (x.float() * g).to(dtype)
    found = scale.scale_(x, torch.tensor(g))
    assert found is x
    torch.testing.assert_close(found, expected, rtol=2**-7 if dtype == torch.bfloat16 else 0, atol=0)  # the interpreter cuts bfloat16


@pytest.mark.parametrize("lengths, ignored", [((3, 0, 4, 2), ()), ((1, 0), (0,)), ((1500, 700, 3, 0), (0, 1499, 1500, 2202))])
@pytest.mark.parametrize("integer", [torch.int32, torch.int64])
def test_boundaries_among_the_tokens_that_carry_loss(lengths, ignored, integer):
    target = torch.randint(7, (sum(lengths),))
    target[list(ignored)] = -100
    cu = torch.tensor([0, *lengths]).cumsum(0).to(integer)
    kept = [((target != -100)[:end]).sum().item() for end in cu.tolist()]
    weights = torch.rand(len(target))
    assert boundaries.boundaries(target, weights, cu, 7, -100).tolist() == [1, *kept]
    assert boundaries.boundaries(target, None, cu, 7, -100).tolist() == [1, *kept]
    for bad in (7, -1):
        wrong = target.clone()
        wrong[-1] = bad
        assert boundaries.boundaries(wrong, weights, cu, 7, -100)[0] == 0
    for bad in (-1.0, math.nan, math.inf):
        wrong = weights.clone()
        wrong[0] = bad
        assert boundaries.boundaries(target, wrong, cu, 7, -100)[0] == 0
    for place, change in ((0, 1), (-1, 1), (-1, -1), (1, -5000)):
        wrong = cu.clone()
        wrong[place] += change
        assert boundaries.boundaries(target, weights, wrong, 7, -100)[0] == 0


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


def test_the_head_without_logits_takes_aligned_bfloat16(monkeypatch):
    x, w = torch.zeros(4, 24).bfloat16(), torch.zeros(9, 24).bfloat16()
    assert head.serves(x, w) == (configs.architecture(x.device) in configs.PRODUCT)
    monkeypatch.setattr(configs, "PRODUCT", {configs.architecture(x.device): configs.ProductTile(16, 16, 16, 2, 4, 2)})
    assert head.serves(x, w) and head.serves(x[:, :16], w[:, :16])
    unaligned = ((x[:, :20], w[:, :20].clone()), (x[:, 1:], w[:, 1:]), (torch.zeros(24, 4).bfloat16().T, w))
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


def results(case, backend, dtype, kl, plan="one_pass", needs=(True, True, True), ref_dtype=None, **options):
    """Loss and the gradients that are needed."""
    policy = [x.detach().to(dtype).requires_grad_(need) for x, need in zip((case.hidden, case.weight, case.bias), needs)]
    reference = {key: getattr(case, key).to(ref_dtype or dtype) for key in ("ref_hidden", "ref_weight", "ref_bias")}
    output = tisdpo.linear_tis_dpo_loss(
        *policy[:2], case.target, case.cu_seqlens, bias=policy[2], token_weights=case.token_weights.float(), backend=backend, plan=plan,
        objective=tisdpo.Objective(kl=kl, beta=0.01), **reference, **options,
    )  # fmt: skip
    trained = [x for x in policy if x.requires_grad]
    return [output.loss.detach(), *(torch.autograd.grad(output.loss * 0.5, trained) if trained else ())]


def agree(case, kl, atol=0.02, ref_dtype=None, **options):
    found = results(case, "triton", torch.bfloat16, kl, ref_dtype=ref_dtype, **options)
    for x, y in zip(found, results(case, "torch", torch.float64, kl, **options), strict=True):
        torch.testing.assert_close(x.double(), y.double(), rtol=0.02, atol=atol * y.abs().max().item())


@pytest.mark.parametrize("plan", ["one_pass", "two_pass"])
@pytest.mark.parametrize("rows", [16, 20, 40, 48, 49])  # one chunk, D in the result, also beside it, dWeight summed
@pytest.mark.parametrize("kl", [None, "reverse"])
def test_a_gradient_that_is_written_where_it_waits(like_a_gpu, rows, kl, plan):
    """What a GPU does with 16-bit heads: columns of D in the memory of dWeight and beside it."""
    agree(make_case((rows // 2, rows - rows // 2 - 8, 5, 6), H=24, V=997, dtype=torch.bfloat16, ignored=(3, 4, 9)), kl, plan=plan)


@pytest.mark.parametrize("plan", ["one_pass", "two_pass"])
@pytest.mark.parametrize("needs", [(True, False, False), (False, True, False), (False, False, True), (False, False, False)])
@pytest.mark.parametrize("rows", [16, 40, 60])
def test_a_head_without_logits_for_every_gradient(like_a_gpu, rows, needs, plan):
    agree(
        make_case((rows // 2, rows - rows // 2 - 8, 5, 6), H=24, V=97, dtype=torch.bfloat16, ignored=(3, 4, 9)),
        None,
        needs=needs,
        plan=plan,
    )


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


def test_bad_values_are_an_error_and_not_an_assertion_on_the_device(monkeypatch):
    """Wherever the host waits anyway; few tokens are asserted on a GPU."""
    monkeypatch.setattr(backends, "few_rows", lambda device: 0)
    case = make_case((4, 5), dtype=torch.float32)
    target = case.target.clone()
    target[2] = 11
    with pytest.raises(ValueError, match=r"target must be in 0\.\.10 or ignore_index=-100, got 11 at position 2"):
        tisdpo.linear_tis_dpo_loss(case.hidden, case.weight, target, case.cu_seqlens, ref_logps=torch.zeros(9), backend="triton")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kl", [None, "reverse", "forward"])
def test_few_tokens_are_walked_over_without_waiting(monkeypatch, kl, dtype):
    """What a GPU does with up to 512 tokens."""
    case = make_case((7, 0, 3, 9, 1, 4), H=8, V=37, ignored=(0, 7, 8, 9, 12), dtype=dtype)  # one completion without a token
    case.hidden[0] = case.ref_hidden[8] = math.nan  # as behind padding; ignored

    def results():
        policy = [x.clone().requires_grad_() for x in (case.hidden, case.weight, case.bias)]
        output = tisdpo.linear_tis_dpo_loss(
            *policy[:2], case.target, case.cu_seqlens, bias=policy[2], token_weights=case.token_weights, backend="triton",
            objective=Objective(kl=kl), ref_hidden=case.ref_hidden, ref_weight=case.ref_weight, ref_bias=case.ref_bias,
        )  # fmt: skip
        return [*(x for x in output if x is not None), *torch.autograd.grad(output.loss, policy)]

    monkeypatch.setattr(backends, "few_rows", lambda device: 0)
    expected = results()
    monkeypatch.setattr(backends, "few_rows", lambda device: 512)
    for x, y in zip(results(), expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5 if dtype == torch.float32 else 2e-2, atol=1e-6 if dtype == torch.float32 else 1e-3)
