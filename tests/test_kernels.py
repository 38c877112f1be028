"""The Triton kernels against the plain formulas in float64: awkward shapes, one and several programs a row.

Without a GPU they run in Triton's interpreter, with one on it.
"""

import math

import pytest
import torch
from cases import KLS, SHAPES, TRANSFORMS, truth
from device_cases import DEVICE, ON_GPU, make_case, normal

import tisdpo
from tisdpo import Objective, Weighting, reference
from tisdpo.kernels import boundaries, configs, fold, scale, sequence_sums
from tisdpo.ops import backend as backends

pytestmark = [pytest.mark.gpu] if ON_GPU else []

ONE = configs.Tile(block=64, warps=4, programs=1)  # one program a row, several blocks
SPLIT = configs.Tile(block=16, warps=4, programs=1 << 20)  # as many programs a row as allowed
TILES = {"one": ONE, "split": SPLIT}


@pytest.fixture(autouse=True)
def default_device():
    """Every tensor of these tests lies where the kernels run."""
    with torch.device(DEVICE):
        yield


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
    with pytest.raises(RuntimeError, match="but only torch can do this: its kernels compute in float32"):
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
