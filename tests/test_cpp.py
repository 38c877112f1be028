"""The C++ kernels against the plain formulas in float64: every vector width of this CPU, any shape, value and number of threads."""

import math
import platform
import re
import subprocess
import sys
from contextlib import contextmanager
from itertools import product
from pathlib import Path

import pytest
import torch
from cases import KLS, SHAPES, TRANSFORMS, make_case, truth
from hypothesis import given, settings
from hypothesis import strategies as st

import tisdpo
from tisdpo import Objective, Weighting, reference
from tisdpo.ops import cpp_fold, extension, torch_fold

needs_extension = pytest.mark.skipif(bool(extension.problem()), reason=extension.problem())
NAMES = ["default", "avx2", "avx512", "avx512_bf16", "amx"]  # the last two differ from the third in products of bfloat16 alone
LEVELS = NAMES[:3]
if not extension.problem():
    LEVELS = LEVELS[: NAMES.index(torch.ops.tisdpo_cpp.capability()) + 1]
PLAIN = TRANSFORMS["plain"]


@contextmanager
def level(name: str):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TISDPO_CPU_CAPABILITY", name)
        yield


@contextmanager
def threads(count: int):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    yield
    torch.set_num_threads(before)


def normal(*shape, seed=0, scale=3.0, dtype=torch.float32):
    return (scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)).to(dtype)


def statistics(z, target, q=None, bias=None, ref_bias=None, kl=None, transform=PLAIN, by=cpp_fold):
    return by.statistics(z, target, q, bias, ref_bias, True, kl, *transform)


def gradient(z, target, q, stats, g, g_kl, bias=None, ref_bias=None, kl=None, transform=PLAIN, by=cpp_fold, **where):
    return by.gradient(z, target, q, stats, g, g_kl, bias, ref_bias, True, kl, *transform, **where)


def assert_as_accurate(x, by_torch, true, largest, name):
    """Error at most twice that of float32 torch operations, plus rounding of the result and of the largest logit that went into it."""
    true = true.detach()
    finite = true.isfinite()
    assert torch.equal(x.double()[~finite], true[~finite]), name
    error, allowed = ((y.double() - true)[finite].abs().amax().item() if finite.any() else 0.0 for y in (x, by_torch))
    allowed = 2 * allowed + 4e-6 * (1 + (true[finite].abs().amax().item() if finite.any() else 0)) + 2e-7 * largest
    assert error <= allowed, f"{name}: off by {error:.2g}, allowed {allowed:.2g}"


def largest_of(*tensors) -> float:
    """The largest finite number of them."""
    return max((x[x.isfinite()].abs().amax().item() for x in tensors if x is not None and x.isfinite().any()), default=0.0)


@st.composite
def fold_cases(draw):
    """Rows 0 to 4; vocabularies around the widths of vectors and blocks; padded and batched rows; targets at both ends; huge logits."""
    rows, V = draw(st.integers(0, 4)), draw(st.sampled_from([1, 2, 3, 7, 8, 9, 15, 16, 17, 33, 100, 1023, 1024, 1025, 2050]))
    dtype, seed = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16])), draw(st.integers(0, 1000))
    scale, padding, batched = draw(st.sampled_from([0.1, 3.0, 30.0])), draw(st.sampled_from([0, 3])), draw(st.booleans())
    shape = (rows, 2, V + padding) if batched else (rows, V + padding)
    z, q = (normal(*shape, seed=seed + i, scale=scale, dtype=dtype)[..., :V] for i in (0, 1))
    target = torch.randint(0, V, (z[..., 0].numel(),), generator=torch.Generator().manual_seed(seed))
    for i in range(len(target)):
        target[i] = draw(st.sampled_from([target[i].item(), 0, V - 1, -1]))
    if rows and draw(st.booleans()):
        # an impossible token only where the other model's probability of it is no number below 1e-38, which is taken for 0
        impossible = [-math.inf] if V > 2 and scale < 30 else []
        z[0, ..., draw(st.sampled_from([0, V // 2, V - 1]))] = draw(st.sampled_from([1e4, -1e4, *impossible]))
    biases = (normal(V, seed=seed + 2), normal(V, seed=seed + 3)) if draw(st.booleans()) else (None, None)
    return z, q, target, biases, draw(st.sampled_from(KLS)), TRANSFORMS[draw(st.sampled_from(sorted(TRANSFORMS)))]


@needs_extension
@pytest.mark.parametrize("name", LEVELS)
@settings(max_examples=150, deadline=None)
@given(fold_cases())
def test_folds_equal_the_formulas(name, case):
    z, q, target, biases, kl, transform = case
    leaf, V = z.double().requires_grad_(), z.shape[-1]
    _, *expected = None, *truth(leaf.reshape(-1, V), target, q.reshape(-1, V), *biases, kl, transform)
    largest = largest_of(z, q, *biases)
    by_torch = statistics(z.float(), target, q.float(), *biases, kl, transform, by=torch_fold)
    with level(name):
        stats = statistics(z, target, q, *biases, kl, transform)
    for column, true, what in zip((1, 3, 4), expected, ("logp", "ref_logp", "KL")):
        assert (stats[column] is None) == (true is None)
        if true is not None:
            assert_as_accurate(stats[column], by_torch[column], true, largest, what)
    g, g_kl = normal(len(target), seed=4, scale=1.0), normal(len(target), seed=5, scale=1.0) if kl else None
    total = (g * expected[0]).sum() + (0 if kl is None else (g_kl * expected[2]).sum())
    true = torch.autograd.grad(total, leaf)[0]
    wide = gradient(z.float().clone(), target, q.float(), by_torch, g, g_kl, *biases, kl, transform, by=torch_fold)
    with level(name):
        out = torch.full(z.shape, math.nan)
        d = gradient(z, target, q, stats, g, g_kl, *biases, kl, transform, out=out)
        assert d is out
        assert_as_accurate(d, wide, true, largest, "gradient")
        assert (d.reshape(-1, V)[target < 0] == 0).all()
        for columns in ((0, (V + 1) // 2), (V // 2, V)):
            for by, x, y in ((cpp_fold, z, q), (torch_fold, z.float(), q.float())):
                part = torch.full((*z.shape[:-1], columns[1] - columns[0]), math.nan)
                gradient(x, target, y, stats, g, g_kl, *biases, kl, transform, by=by, out=part, columns=columns)
                assert_as_accurate(part, wide[..., slice(*columns)], true[..., slice(*columns)], largest, f"{columns} by {by.__name__}")
        over = z.clone()  # in place, in a 16-bit type a rounding of the same
        assert gradient(over, target, q, stats, g, g_kl, *biases, kl, transform) is over
        assert torch.equal(over, d.to(z.dtype))


@needs_extension
@pytest.mark.parametrize("name", LEVELS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kl", KLS)
def test_a_narrow_gradient_shares_the_memory_of_the_logits(kl, dtype, name):
    """float32 logits, 16-bit gradient at the start of every row: nothing is read after it was overwritten."""
    z, q, target = normal(4, 3001), normal(4, 3001, seed=1), torch.tensor([5, 0, 3000, 150])
    with level(name):
        stats = statistics(z, target, q, kl=kl)
        wide = gradient(z.clone(), target, q, stats, None, torch.ones(4), kl=kl)
        parts = [torch.empty(4, b - a, dtype=dtype) for a, b in ((0, 1000), (1000, 3001))]
        for part, columns in zip(parts, ((0, 1000), (1000, 3001))):
            gradient(z, target, q, stats, None, torch.ones(4), kl=kl, out=part, columns=columns)
        narrow = gradient(z, target, q, stats, None, torch.ones(4), kl=kl, dtype=dtype)
    assert narrow.dtype == dtype and narrow.data_ptr() == z.data_ptr() and narrow.stride() == (6002, 1)
    assert torch.equal(narrow, wide.to(dtype)) and torch.equal(torch.cat(parts, 1), narrow)
    assert gradient(q.to(dtype), target, None, stats, None, None, dtype=torch.float32).dtype == torch.float32  # needs new memory


@needs_extension
@pytest.mark.parametrize("name", LEVELS)
def test_the_exponential_is_right_to_one_rounding(name):
    """D of a row with log-sum-exp 0 and g = -1 is e^z."""
    x = torch.cat([torch.linspace(-87.33, 88, 1_000_003), torch.linspace(-1, 1, 1_000_003)])[None]
    zero = torch.zeros(1)
    with level(name):
        y = gradient(x.clone(), torch.tensor([0]), None, (zero, zero, None, None, None), -torch.ones(1), None)[0, 1:]
        tiny = torch.tensor([[0.0, -87.34, -200.0, -1e30, -math.inf, math.nan]])
        low = gradient(tiny, torch.tensor([0]), None, (zero, zero, None, None, None), -torch.ones(1), None)[0, 1:]
    true = x[0, 1:].double().exp()
    ulp = torch.nextafter(true.float(), torch.tensor(math.inf)).double() - true.float()
    assert ((y - true).abs() / ulp).max() < (1.25 if name == "default" else 1)  # without fused multiply-add a little more
    assert (low[:-1] == 0).all() and low[-1].isnan()


@needs_extension
@pytest.mark.parametrize("name", LEVELS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_conversions(dtype, name):
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)[:, None]
    number = every[every.isfinite()][:, None]
    with level(name):
        assert torch.equal(statistics(number, torch.zeros(len(number), dtype=torch.int64))[0], number[:, 0].float())
        z = torch.linspace(-110, 88, 100_003)[None]  # e^z covers subnormal numbers and those too large for float16
        stats = (torch.zeros(1),) * 5
        wide, narrow = (
            gradient(z, torch.tensor([0]), None, stats, -torch.ones(1), None, out=torch.empty(z.shape, dtype=d))
            for d in (torch.float32, dtype)
        )
    assert torch.equal(wide.to(dtype), narrow)


@needs_extension
@pytest.mark.parametrize("name", LEVELS)
@pytest.mark.parametrize("kl", KLS)
def test_any_number_of_threads_gives_the_same_bits(kl, name):
    z, q, target = normal(7, 20_001), normal(7, 20_001, seed=1), torch.arange(7) * 1000
    results = []
    for count in (1, 2, 3):
        with level(name), threads(count):
            stats = statistics(z, target, q, kl=kl)
            results.append([*stats, gradient(z.clone(), target, q, stats, None, torch.ones(7), kl=kl)])
    for other in results[1:]:
        assert all(a is b is None or torch.equal(a, b) for a, b in zip(results[0], other))


@needs_extension
@pytest.mark.parametrize("name", LEVELS)
def test_extreme_logits(name):
    """Huge, certain and impossible tokens: no NaN, and the right limits. What is not a number stays visible."""
    z, q = torch.zeros(4, 2000), normal(4, 2000, seed=1)
    z[0, 3] = 1e4  # certain
    z[1] = 1e4  # uniform next to a huge constant
    z[2, :1500] = q[2, :1500] = -math.inf  # impossible for both, a whole block long
    z[3, ::2] = -math.inf  # impossible for the policy alone
    target = torch.tensor([3, 7, 1999, 1])
    with level(name):
        for kl in ("reverse", None):
            _, logp, _, _, divergence = stats = statistics(z, target, q, kl=kl)
            torch.testing.assert_close(logp, -torch.tensor([0.0, math.log(2000), math.log(500), math.log(1000)]))
            assert divergence is None or divergence.isfinite().all()
            d = gradient(z.clone(), target, q, stats, None, torch.ones(4), kl=kl)
            assert d.isfinite().all() and (d[2, :1500] == 0).all()
        assert statistics(q[2:3], target[2:3], z[2:3], kl="forward")[4].isfinite().all()
        assert statistics(z, target, q, kl="forward")[4][3] == math.inf
        for bits in (0x7FC00000, 0x7FC00001, 0x7FFFFFFF):  # Python's NaN, one with another payload, CUDA's
            z[0, 1700] = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
            stats = statistics(z, target, q, kl="reverse")
            assert stats[4][0].isnan() and statistics(z, target)[1][0].isnan()
            assert gradient(z.clone(), target, q, stats, None, torch.ones(4), kl="reverse")[0].isnan().any()
            for cap in (None, 5.0):
                assert tisdpo.token_logps(z, target, softcap=cap, backend="cpp").logps[0].isnan()


@needs_extension
def test_expanded_strided_and_transposed_tensors():
    z, target, bias = normal(3, 40), torch.tensor([1, 9, 2, 9, 3, 9])[::2], normal(80)[::2]
    stats = statistics(z, target, None, bias)
    torch.testing.assert_close(stats[1], (z + bias).log_softmax(-1).gather(1, target[:, None])[:, 0])
    dense = gradient(z.clone(), target, None, stats, torch.full((3,), 2.0), None, bias)
    assert torch.equal(gradient(z.clone(), target, None, stats, torch.tensor(2.0).expand(3), None, bias), dense)
    transposed = z.T.contiguous().T  # its rows are scattered: left to torch
    torch.testing.assert_close(statistics(transposed, target, None, bias)[1], stats[1])
    torch.testing.assert_close(gradient(transposed, target, None, stats, torch.full((3,), 2.0), None, bias), dense)


@needs_extension
@pytest.mark.parametrize("weights", ["ones", "given", "formed"])
@pytest.mark.parametrize("lengths", [(), (3, 1, 0, 5), (1,) * 10, (40_000, 70, 30_000, 9)])
def test_weighted_sums(lengths, weights):
    N, cu = sum(lengths), torch.tensor([0, *lengths]).cumsum(0)
    logps, ref_logps, kl, pos, neg, given_weights = (normal(N, seed=i, scale=1.0) for i in range(6))
    rule = Weighting(k=1.5, mu_chosen=0.8, mu_rejected=-1.2)
    args = (given_weights if weights == "given" else None, *((pos, neg) if weights == "formed" else (None, None)))
    args = (*args, rule.k, rule.mu_chosen, rule.mu_rejected, rule.lower, rule.upper)
    for divergence in (kl, None):
        sums, used = cpp_fold.sequence_sums(logps, ref_logps, divergence, cu.int(), *args)
        true = torch_fold.sequence_sums(*(None if x is None else x.double() for x in (logps, ref_logps, divergence)), cu, *args)
        torch.testing.assert_close(sums.double(), true[0], rtol=1e-6, atol=1e-5 * max(1, N) ** 0.5)
        torch.testing.assert_close(used.double(), true[1], rtol=1e-6, atol=0, check_dtype=False)
    g_D, g_K = normal(len(lengths), seed=8), normal(len(lengths), seed=9)
    for g in ((g_D, g_K), (g_D, None), (None, g_K)):
        assert all(torch.equal(a, b) for a, b in zip(cpp_fold.spread(*g, used, cu), torch_fold.spread(*g, used, cu)))


@needs_extension
def test_arguments_are_checked_by_name():
    z, target = normal(2, 5), torch.tensor([0, 1])
    ops = torch.ops.tisdpo_cpp

    def run(z=z, target=target, ref_z=None, bias=None, kl="", out=None):
        ops.statistics(z, target, ref_z, bias, None, kl, 1.0, 1.0, False, torch.empty(5, 2) if out is None else out)

    for message, arguments in {
        r"target must be below the vocabulary size 5, got 5 at 1": dict(target=torch.tensor([0, 5])),
        r"z must have 2 rows of 5 logits in two or three dimensions, got shape \[3, 5\]": dict(z=normal(3, 5)),
        r"z must be float32, bfloat16 or float16, got Double": dict(z=z.double()),
        r"z must have stride 1 within a row, got 2": dict(z=normal(5, 2).T),
        r"ref_z must have 2 rows of 5 logits .* got shape \[2, 4\]": dict(ref_z=normal(2, 4)),
        r"ref_z must be given with kl=reverse, got none": dict(kl="reverse"),
        r"kl must be empty, reverse or forward, got backward": dict(kl="backward"),
        r"bias must have 5 items, got shape \[4\]": dict(bias=normal(4)),
        r"bias must be Float, got Half": dict(bias=normal(5).half()),
        r"bias must be contiguous": dict(bias=normal(10)[::2]),
        r"out must have 10 items, got shape \[3, 2\]": dict(out=torch.empty(3, 2)),
    }.items():
        with pytest.raises(RuntimeError, match=message):
            run(**arguments)
    options = (None, None, None, "", 1.0, 1.0, False, torch.ones(2), None, None, None, None)
    with pytest.raises(RuntimeError, match="first and last must lie within the vocabulary size 5, got 3 and 6"):
        ops.gradient(z, target, *options, 3, 6, torch.empty(2, 3))
    with pytest.raises(RuntimeError, match=r"out must have 2 rows of 3 logits .* got shape \[2, 2\]"):
        ops.gradient(z, target, *options, 1, 4, torch.empty(2, 2))
    with pytest.raises(RuntimeError, match=r"cu_seqlens must not decrease and lie within 0..3, got 4 at 1"):
        ops.spread(None, None, torch.ones(3), torch.tensor([0, 4]), torch.ones(3), torch.ones(3))
    with level("default avx2"), pytest.raises(RuntimeError, match="got default avx2"):
        run()
    with level("sse9"), pytest.raises(RuntimeError, match=r"TISDPO_CPU_CAPABILITY must be one of .*\(default.*\), got sse9"):
        run()


# Matrix products


def can_run(name: str) -> bool:
    try:
        with level(name):
            return not extension.problem() and bool(torch.ops.tisdpo_cpp.capability())
    except RuntimeError:  # more than this CPU has, or no brgemm in this torch
        return False


# Skipped, because the instructions do not exist elsewhere: lower levels run on every CPU, sixteen lanes in test_cpp_elsewhere.py. "amx" is
# oneDNN's brgemm, which is taken on CPUs with AMX but does without.
marks = [pytest.param(n, marks=pytest.mark.skipif(not can_run(n), reason="not on this CPU, or no brgemm in this torch")) for n in NAMES]
levels = pytest.mark.parametrize("name", marks)
LAYOUTS = ["rows", "columns", "padded rows", "padded columns"]
TYPES = [torch.float32, torch.bfloat16, torch.float16]


def matrix(rows, columns, layout, seed, dtype=torch.bfloat16):
    x = normal(*((columns, rows) if "columns" in layout else (rows, columns)), seed=seed, scale=1.0, dtype=dtype)
    if "padded" in layout:
        x = torch.nn.functional.pad(x, (0, 3), value=math.nan)[:, :-3]
    return x.T if "columns" in layout else x


@levels
@settings(deadline=None, max_examples=150)
@given(
    st.tuples(*[st.sampled_from([0, 1, 2, 5, 6, 7, 12, 13, 15, 16, 17, 31, 33, 63, 64, 65, 95, 97, 130, 255, 257, 513, 1023, 1100])] * 3),
    st.tuples(*[st.sampled_from(LAYOUTS)] * 2), st.tuples(*[st.sampled_from(TYPES)] * 2), st.booleans(), st.integers(1, 3),
)  # fmt: skip
def test_products_keep_their_float32_sums(name, sizes, layouts, types, add, count):
    M, K, N = sizes
    a, b = matrix(M, K, layouts[0], 1, types[0]), matrix(K, N, layouts[1], 2, types[1])
    out = torch.full((M, N + 5), 0.5)
    with level(name), threads(count):
        torch.ops.tisdpo_cpp.mm(a, b, out[:, :N], add)
    expected = a.double() @ b.double() + (0.5 if add else 0.0)
    torch.testing.assert_close(out[:, :N].double(), expected, rtol=2e-7, atol=4e-7 * max(K, 1))
    assert (out[:, N:] == 0.5).all()


@levels
@pytest.mark.parametrize("layout", ["rows", "columns"])
def test_numbers_below_the_normal_ones_are_zeros_to_the_products_alone(name, layout):
    """Of a pair that is told apart for certain the slope is so small; with one such factor a product took a hundred times as long."""
    for dtype, value in ((torch.float32, 1e-39), (torch.bfloat16, 1e-39), (torch.float16, 2.0**-24)):
        a, b, out = torch.ones(70, 40, dtype=dtype), torch.full((40, 70), value, dtype=dtype), torch.empty(70, 70)
        with level(name):
            torch.ops.tisdpo_cpp.mm(a if layout == "rows" else a.T.contiguous().T, b, out, False)
        assert (b.float() > 0).all() and (torch.full((9,), 1e-39) * 0.5 > 0).all()
        if dtype == torch.float16:  # whose small numbers are normal ones of float32
            assert (out == 40 * value).all()
        elif platform.machine() == "x86_64":
            assert (out == 0).all()


@levels
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("layouts", product(LAYOUTS, ["rows", "columns"]))
def test_products_do_not_depend_on_the_number_of_threads(name, layouts, dtype):
    a, b, results = matrix(300, 1200, layouts[0], 1, dtype), matrix(1200, 333, layouts[1], 2, dtype), []
    for count in (1, 2, 3):
        results.append(torch.empty(300, 333))
        with level(name), threads(count):
            torch.ops.tisdpo_cpp.mm(a, b, results[-1], False)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@levels
@pytest.mark.parametrize("layouts", product(["rows", "columns"], repeat=2))
@pytest.mark.parametrize("dtype", TYPES)
def test_a_product_spreads_what_is_not_finite_no_further_than_it_must(name, dtype, layouts):
    """An infinite or missing number belongs to its row or column of the result: padding of the tiles is no part of it."""
    a, b = matrix(62, 300, layouts[0], 1, dtype), matrix(300, 70, layouts[1], 2, dtype)
    a[3, 299], b[17, 69] = math.inf, math.nan
    out = torch.empty(62, 70)
    with level(name):
        torch.ops.tisdpo_cpp.mm(a, b, out, False)
    finite = out.isfinite()
    assert not finite[3].any() and out[:, 69].isnan().all()
    assert finite.sum() == 61 * 69


@needs_extension
def test_arguments_of_products_are_checked_by_name():
    a, b, out = matrix(4, 6, "rows", 1), matrix(6, 5, "rows", 2), torch.empty(4, 5)

    def run(a=a, b=b, out=out):
        torch.ops.tisdpo_cpp.mm(a, b, out, False)

    for message, arguments in {
        r"a and b must be matrices, got shapes \[6\] and \[6, 5\]": dict(a=a[0]),
        r"a must be float32, bfloat16 or float16, got Double": dict(a=a.double()),
        r"b must be float32, bfloat16 or float16, got Long": dict(b=b.long()),
        r"b must have shape \[6, 5\], got \[7, 5\]": dict(b=matrix(7, 5, "rows", 1)),
        r"a must have stride 1 along rows or columns, got 24 and 2": dict(a=matrix(8, 12, "rows", 1)[::2, ::2]),
        r"out must have 4 rows of 5 logits .* got shape \[4, 6\]": dict(out=torch.empty(4, 6)),
        r"out must be a matrix of Float, got BFloat16": dict(out=out.bfloat16()),
    }.items():
        with pytest.raises(RuntimeError, match=message):
            run(**arguments)


# The public functions by these kernels


@needs_extension
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kl", KLS)
@pytest.mark.parametrize("shape", SHAPES)
def test_linear_loss_equals_the_torch_backend(shape, kl, dtype):
    lengths, ignored = SHAPES[shape]
    case = make_case(lengths, ignored=ignored, dtype=dtype)
    results = []
    for backend in ("cpp", "torch"):
        inputs = [x.clone().requires_grad_() for x in (case.hidden, case.weight, case.bias)]
        for plan in ("one_pass", "two_pass"):
            out = tisdpo.linear_tis_dpo_loss(
                inputs[0], inputs[1], case.target, case.cu_seqlens, bias=inputs[2], token_weights=case.token_weights, plan=plan,
                ref_hidden=case.ref_hidden, ref_weight=case.ref_weight, ref_bias=case.ref_bias, objective=Objective(kl=kl), softcap=4.0,
                backend=backend,
            )  # fmt: skip
            results.append([out.loss, out.logits, out.chosen_logps, *torch.autograd.grad(out.loss, inputs)])
    for plans in zip(results[:2], results[2:]):
        for a, b in zip(*plans):
            torch.testing.assert_close(a, b, rtol=1e-5 if a.dtype == torch.float32 else 2**-7, atol=1e-6)


@needs_extension
@pytest.mark.parametrize("overwrite", [False, True])
def test_shifted_logits_and_a_gradient_over_them(overwrite):
    padded, tokens = normal(2, 6, 19).requires_grad_(), torch.arange(12).reshape(2, 6)
    tokens[0, 3] = -100
    logits = padded * 1.0
    before = logits.detach().clone()
    loss = tisdpo.token_logps(logits[:, :-1], tokens[:, 1:], overwrite_logits=overwrite, backend="cpp").logps.square().sum()
    grad = torch.autograd.grad(loss, padded)[0]
    expected = torch.autograd.grad(reference.token_logps(padded[:, :-1], tokens[:, 1:]).square().sum(), padded)[0]
    torch.testing.assert_close(grad, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(logits, before) == (not overwrite)


@needs_extension
def test_float64_is_refused_by_name():
    with pytest.raises(RuntimeError, match="but only torch can do this: its kernels compute in float32"):
        tisdpo.token_logps(torch.zeros(2, 3, dtype=torch.float64), torch.tensor([0, 1]), backend="cpp")


# Without the extension, or with another


def test_an_extension_that_is_there_is_of_these_sources():
    """Else the tests above would be skipped."""
    assert "older sources" not in extension.problem()
    text = (Path(__file__).parents[1] / "csrc/register.cpp").read_text()
    assert re.search(r"INTERFACE = (\d+);", text)[1] == str(extension.INTERFACE)


@needs_extension
def test_an_extension_of_older_sources_is_told(monkeypatch):
    monkeypatch.setattr(extension, "INTERFACE", extension.INTERFACE + 1)
    assert extension.problem.__wrapped__().startswith("its extension was built from older sources; run: pip install")


@pytest.mark.parametrize("content", [None, b"no library"])
def test_a_missing_or_broken_extension_is_told_in_one_sentence(content, tmp_path, monkeypatch):
    if content:
        (tmp_path / "_C.abi3.so").write_bytes(content)
    monkeypatch.setattr(extension, "PACKAGE", tmp_path)
    reason = extension.problem.__wrapped__()
    assert ("was not built" if content is None else "cannot load its extension") in reason
    assert "\n" not in reason and extension.INSTALL in reason
    monkeypatch.setattr(extension, "problem", lambda: reason)
    with pytest.raises(RuntimeError, match="the cpp backend cannot run: "):
        statistics(torch.zeros(1, 2), torch.tensor([0]))


def test_importing_the_package_loads_no_extension():
    code = "import tisdpo; print([line.split()[-1] for line in open('/proc/self/maps') if '_C.abi3' in line and 'tisdpo' in line])"
    if not sys.platform.startswith("linux"):
        pytest.skip("reads /proc")
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
