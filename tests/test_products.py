"""How many head-sized matrix products a loss step runs, counted by torch's profiler: the price list of the documentation; 16-bit ones."""

import math
from functools import partial

import pytest
import torch
import torch.utils.checkpoint
from cases import in_float64, make_case
from torch.profiler import ProfilerActivity, profile

import tisdpo
from tisdpo import Objective
from tisdpo.ops import backend, extension, products

H, V = 24, 997  # in no other size, so that a product with the head is recognised by them
LENGTHS = (5, 9, 1, 7, 12, 3)
IGNORED = (0, 6, 15, 16)
N = sum(LENGTHS) - len(IGNORED)
OPTIONS = {"plain": {}, "transformed": {"softcap": 5.0, "logit_scale": 0.8, "temperature": 1.3}}


# name of a product: position of its first operand among the inputs
PRODUCTS = {"aten::mm": 0, "aten::addmm": 1, "aten::addmm_": 1, "aten::bmm": 0, "aten::baddbmm": 1, "tisdpo_cpp::mm": 0}


def head_products(step, rows: int, vocabulary=(V,)) -> float:
    """Multiply-adds of all matrix products between H and V (or slices of it), in units of rows * H * V."""
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        step()
    total = 0
    for event in profiler.events():
        if event.name in PRODUCTS and not (event.cpu_parent and event.cpu_parent.name in PRODUCTS):
            first = PRODUCTS[event.name]
            (*batch, n, k), (*_, m) = event.input_shapes[first : first + 2]
            total += math.prod(batch) * n * k * m if H in (n, k, m) and {n, k, m} & set(vocabulary) else 0
    return total / (rows * H * V)


def step(*, kl=None, online=False, frozen=False, grad=True, bias=False, plan="auto", lengths=LENGTHS, ignored=IGNORED, **options):
    """One forward and backward of the loss as a function without arguments."""
    case = make_case(lengths, H=H, V=V, ignored=ignored, dtype=torch.float32)
    hidden, weight = case.hidden.requires_grad_(), case.weight.requires_grad_(not frozen)
    reference = dict(ref_logps=torch.zeros(len(case.target)))
    if kl or online:
        reference = dict(ref_hidden=case.ref_hidden, ref_weight=case.ref_weight, ref_bias=case.ref_bias if bias else None)

    def run():
        loss = tisdpo.linear_tis_dpo_loss(
            hidden, weight, case.target, case.cu_seqlens, token_weights=case.token_weights, bias=case.bias if bias else None,
            objective=Objective(kl=kl), plan=plan, **reference, **options,
        ).loss  # fmt: skip
        if grad:
            loss.backward()

    return run if grad else torch.no_grad()(run)


# (products of the trainable head, of the frozen one, without gradients)
PRICES = {"precomputed": (3, 2, 1), "online": (4, 3, 2), "reverse": (4, 3, 2), "forward": (4, 3, 2)}


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("reference", PRICES)
def test_one_pass_costs_what_the_documentation_says(reference, bias, options):
    """Ignored positions are not projected: the unit counts the others only."""
    kwargs = dict(
        kl=reference if reference in ("reverse", "forward") else None, online=reference == "online", bias=bias, **OPTIONS[options]
    )
    counted = (
        head_products(step(**kwargs), N),
        head_products(step(frozen=True, **kwargs), N),
        head_products(step(grad=False, **kwargs), N),
    )
    assert counted == PRICES[reference]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("reference, trainable, frozen", [("precomputed", 4, 2), ("online", 5, 3), ("reverse", 6, 4), ("forward", 6, 4)])
def test_two_passes_cost_what_the_documentation_says(reference, trainable, frozen, options):
    kl = reference if reference in ("reverse", "forward") else None
    kwargs = dict(kl=kl, online=reference == "online", plan="two_pass", **OPTIONS[options])
    assert head_products(step(**kwargs), N) == trainable
    assert head_products(step(frozen=True, **kwargs), N) == frozen


def test_chunks_do_not_add_products(monkeypatch):
    monkeypatch.setattr(backend, "chunk_rows", lambda *a: 15)  # two pairs, then one
    assert head_products(step(kl="reverse"), N) == 4
    assert head_products(step(kl="reverse", plan="two_pass"), N) == 6
    assert head_products(step(kl="reverse", plan="two_pass", frozen=True), N) == 4


def test_a_long_pair_is_held_while_its_logits_are_no_larger_than_a_head(monkeypatch):
    assert [backend.longest_held(10, 64, models) for models in (1, 2)] == [64, 32]
    assert backend.longest_held(100, 64, 1) == 100
    monkeypatch.setenv("TISDPO_CHUNK_MIB", "1")  # who names a budget gets it
    assert backend.longest_held(10, 64, 1) == 10


def test_a_pair_longer_than_the_budget_is_recomputed_and_no_other(monkeypatch):
    """Three pairs of 14, 8 and 15 tokens, none ignored, and room for 14: only the third needs its logits a second time."""
    monkeypatch.setattr(backend, "chunk_rows", lambda *a: 14)
    monkeypatch.setattr(backend, "longest_held", lambda rows, *a: rows)
    rows = sum(LENGTHS)
    for kwargs, models, price in ((dict(), 1, 3), (dict(kl="forward"), 2, 4)):
        counted = head_products(step(ignored=(), **kwargs), rows)
        assert counted == pytest.approx(price + models * 15 / rows, abs=1e-12)
    assert head_products(step(ignored=(), grad=False), rows) == 1  # nothing to recompute for
    assert head_products(step(ignored=(), frozen=True), rows) == 2  # the factors go to dHidden
    assert head_products(step(ignored=(), frozen=True, kl="forward"), rows) == 3


def test_nothing_to_project():
    assert head_products(step(ignored=range(sum(LENGTHS)), kl="reverse"), 1) == 0


@pytest.mark.parametrize("needs, price", [((True, False), 2), ((False, True), 3), ((True, True), 4), ((False, False), 1)])
def test_per_token_logps_recompute_once_and_with_a_frozen_head_never(needs, price):
    case = make_case(LENGTHS, H=H, V=V, ignored=IGNORED, dtype=torch.float32)
    hidden, weight = case.hidden.requires_grad_(needs[0]), case.weight.requires_grad_(needs[1])

    def run():
        total = tisdpo.linear_token_logps(hidden, weight, case.target).logps.sum()
        return total.backward() if any(needs) else total

    assert head_products(run, N) == price
    assert head_products(torch.no_grad()(lambda: tisdpo.linear_token_logps(hidden, weight, case.target)), N) == 1


SETS = {  # dtypes whose products are compiled: without an extension, on a CPU whose library is taken for float32, and with all of them
    "none": frozenset(),
    "16 bits": frozenset([torch.bfloat16, torch.float16]),
    "all": frozenset([torch.bfloat16, torch.float16, torch.float32]),
}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture
def compiles(monkeypatch):
    """Sets what is compiled, for this test."""

    def choose(name: str):
        if name != "none" and extension.problem():
            pytest.skip("no C++ extension")  # a pure-Python install has no such products; the set "none" is tested there
        monkeypatch.setattr(products, "compiled", lambda: SETS[name])
        products.keeps_sums.cache_clear()

    yield choose
    products.keeps_sums.cache_clear()


def test_too_little_memory_says_nothing_of_a_product():
    """`keeps_sums` remembers its answer: on a full device there is none."""
    calls = []

    def product(x):
        calls.append(x)
        raise (torch.OutOfMemoryError if len(calls) == 1 else RuntimeError)("no")

    with pytest.raises(torch.OutOfMemoryError):
        products._works(product, torch.device("cpu"))
    assert not products._works(product, torch.device("cpu"))


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_heads_of_all_dtypes_cost_the_same(monkeypatch, compiles, dtype, name):
    """By the products compiled here, and without; where a weight is widened slice by slice, that must not cost a second product."""
    compiles(name)
    monkeypatch.setattr(products, "SLICE_BYTES", 250 * H * 4)
    case = make_case(LENGTHS, H=H, V=V, dtype=dtype)
    hidden, weight, ref = case.hidden.requires_grad_(), case.weight.requires_grad_(), torch.zeros(sum(LENGTHS))

    def run():
        options = dict(ref_logps=ref, plan="one_pass")
        tisdpo.linear_tis_dpo_loss(hidden, weight, case.target, case.cu_seqlens, **options).loss.backward()

    # the head, its slices, the halves that dWeight is summed in, and columns of D that wait in the result and beside it
    sizes = (V, 250, V - 750, 496, V - 496, 640, V - 640)
    assert head_products(run, sum(LENGTHS), vocabulary=sizes) == 3
    if name != "none" and dtype == torch.bfloat16:  # a pair of more rows than may be there at a time, too: D waits
        monkeypatch.setattr(backend, "chunk_rows", lambda *a: 5)
        assert head_products(run, sum(LENGTHS), vocabulary=sizes) == 3


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_a_compiled_product_widens_no_slice_of_the_head(monkeypatch, compiles, dtype):
    compiles("16 bits")
    monkeypatch.setattr(products, "_slices", lambda *a: pytest.fail("the head was cut into slices"))
    weight = torch.randn(V, H).to(dtype)
    d = torch.randn(5, V).to(products.gradient_dtype(weight.device, dtype))
    found = products.grad_hidden(d, weight, torch.float32)
    torch.testing.assert_close(found, d.float() @ weight.float(), rtol=1e-4, atol=1e-4)
    products.logits(torch.randn(5, H).to(dtype), weight, torch.empty(5, V))


@pytest.mark.parametrize("plan", ["one_pass", "two_pass"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_compiled_products_and_those_of_the_library_agree(compiles, dtype, plan):
    """Whatever this CPU takes: loss and gradients of each, against float64."""
    case = make_case((40, 70, 55, 80), H=96, V=500, ignored=(3, 60), dtype=dtype)
    reference = {name: getattr(case, name) for name in ("ref_hidden", "ref_weight", "ref_bias")}

    def gradients(dtype):
        policy = [x.detach().to(dtype).requires_grad_() for x in (case.hidden, case.weight, case.bias)]
        ref = {name: x.to(dtype) for name, x in reference.items()}
        output = tisdpo.linear_tis_dpo_loss(
            *policy[:2], case.target, case.cu_seqlens, bias=policy[2], token_weights=case.token_weights.float(), plan=plan,
            objective=tisdpo.Objective(kl="reverse"), **ref,
        )  # fmt: skip
        return [output.loss.detach(), *torch.autograd.grad(output.loss, policy)]

    true, errors = gradients(torch.float64), {}
    for name in SETS:
        compiles(name)
        errors[name] = [((x.double() - y).norm() / y.norm()).item() for x, y in zip(gradients(dtype), true)]
    rounding = torch.finfo(dtype).eps
    for name in ("16 bits", "all"):
        for own, library in zip(errors[name], errors["none"]):
            assert own <= 2 * library + rounding, errors


# Without an extension, a supported install, nothing is compiled and there is nothing to be found.
@pytest.mark.skipif(bool(extension.problem()), reason="no C++ extension")
def test_what_is_compiled_is_found_under_autocast_too():
    expected = products.compiled.__wrapped__()
    with torch.autocast("cpu", torch.bfloat16):
        assert products.compiled.__wrapped__() == expected
    assert bool(expected) == (torch.ops.tisdpo_cpp.capability() != "default")


@pytest.mark.parametrize("rows", [0, 1, H // 2, H - 1, H, H + 1, 3 * H // 2, 2 * H, 3 * H])
@pytest.mark.parametrize("slice_bytes", [70 * H * 4, 250 * H * 4, 1 << 20])
@pytest.mark.parametrize("dtype, rounds", [(torch.bfloat16, True), (torch.bfloat16, False), (torch.float32, False)])
def test_waiting_rows_make_the_product(monkeypatch, rows, slice_bytes, dtype, rounds):
    monkeypatch.setattr(products, "_mm", in_float64)
    monkeypatch.setattr(products, "rounds_itself", lambda x: rounds)
    monkeypatch.setattr(products, "IN_PLACE_BYTES", slice_bytes)
    monkeypatch.setattr(products, "SLICE_BYTES", slice_bytes // 4)
    monkeypatch.setattr(products, "ALIGNED", 16)
    d, hidden, weight = (torch.randn(n, m).to(dtype) for n, m in ((rows, V), (rows, H), (V, H)))
    waiting = products.WaitingRows(weight, rows)
    waiting.result.fill_(math.nan)
    for a in range(0, rows, 7):
        b = min(a + 7, rows)
        for first, last, place in waiting.places(a, b):
            place.copy_(d[a:b, first:last])
    if dtype == torch.float32 and 0 < rows <= H and slice_bytes == 70 * H * 4:  # a slice is no more than an eighth: no buffer
        assert all(waiting.at_once) and waiting.others.shape[1] == math.ceil(5 * rows / H) * 16
    columns = [(first, last) for first, last, _ in waiting.slices]
    assert [first for first, _ in columns] == [0, *(last for _, last in columns[:-1])] and columns[-1][1] == V
    coefficient = torch.randn(rows)
    torch.testing.assert_close(waiting.column_sums(coefficient), d.float().T @ coefficient, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(waiting.product(hidden.float()), (d.double().T @ hidden.double()).to(dtype), rtol=2**-7, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("rows", [0, 1, 40])
@pytest.mark.parametrize("vocabulary", [1, 2, 3, 41, 301])
def test_sums_that_lie_in_the_memory_of_the_result(monkeypatch, dtype, rows, vocabulary):
    monkeypatch.setattr(products, "IN_PLACE_BYTES", 3 * 4 * H)  # of three rows
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    d, hidden, weight = torch.randn(rows, vocabulary, dtype=wide), torch.randn(rows, H, dtype=wide), torch.empty(vocabulary, H, dtype=dtype)
    summed = products.SummedRows(weight)
    for memory in (summed.result, *summed.sums):
        memory.fill_(math.nan)
    for a in range(0, rows, 7):
        summed.add(d[a : a + 7], hidden[a : a + 7])
    result = summed.product()
    assert result.dtype == dtype and sum(x.nbytes for x in summed.sums) == vocabulary * H * wide.itemsize
    assert summed.sums[0].untyped_storage().data_ptr() == result.untyped_storage().data_ptr()
    rtol = torch.finfo(dtype).eps if dtype.itemsize == 2 else 1e-5
    torch.testing.assert_close(result, (d.double().T @ hidden.double()).to(dtype), rtol=rtol, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("rows", [H - 5, H, H + 1, 2 * H, 2 * H + 1])
def test_rows_wait_where_that_takes_no_more_memory(monkeypatch, rows, dtype):
    """D of 2 H rows in 16 bits is as large as a float32 sum, of H rows in float32 as dWeight."""
    monkeypatch.setattr(products, "keeps_sums", lambda device, a, b: a == b == torch.bfloat16)
    monkeypatch.setattr(products, "_mm", in_float64)
    monkeypatch.setattr(products, "IN_PLACE_BYTES", 70 * H * 4)
    monkeypatch.setattr(products, "ALIGNED", 16)
    monkeypatch.setattr(backend, "chunk_rows", lambda *a: 7)
    case = make_case((rows // 2, rows - rows // 2 - 9, 5, 6), H=H, V=V, dtype=dtype, ignored=(3, rows // 2))  # `rows` carry loss
    inputs = [case.hidden, case.weight, case.bias]
    waited = []
    own = products.WaitingRows.product
    monkeypatch.setattr(products.WaitingRows, "product", lambda *args: (waited.append(1), own(*args))[1])

    def gradients(dtype, **options):
        policy = [x.detach().to(dtype).requires_grad_() for x in inputs]
        reference = {name: getattr(case, name).to(dtype) for name in ("ref_hidden", "ref_weight", "ref_bias")}
        objective = tisdpo.Objective(kl="reverse", detach_chosen_kl=True, beta=0.01)
        output = tisdpo.linear_tis_dpo_loss(
            *policy[:2], case.target, case.cu_seqlens, bias=policy[2], token_weights=case.token_weights.float(), objective=objective,
            **reference, **options,
        )  # fmt: skip
        return torch.autograd.grad(output.loss, policy)

    true, error = gradients(torch.float64), 0.01 if dtype == torch.bfloat16 else 1e-5
    for plan in ("one_pass", "two_pass"):
        for found, expected in zip(gradients(dtype, plan=plan), true):
            torch.testing.assert_close(found.double(), expected, rtol=2 * error, atol=error * expected.abs().max().item())
    assert bool(waited) == (rows <= (2 * H if dtype == torch.bfloat16 else H))


@pytest.mark.parametrize("frozen_hidden", [False, True])
@pytest.mark.parametrize("dtype, rounds", [(torch.bfloat16, True), (torch.bfloat16, False), (torch.float32, False)])
@pytest.mark.parametrize("rows", [H // 2 - 1, H // 2, 3 * H // 4, H, H + 1, 2 * H, 2 * H + 1])
def test_log_probs_whose_derivatives_wait(monkeypatch, rows, dtype, rounds, frozen_hidden):
    """Three products instead of four for H / 2 to 2 H rows, of float32 to H, for any gradient a token, as often as asked for."""
    work = []
    monkeypatch.setattr(products, "IN_PLACE_BYTES", 70 * H * 4)
    monkeypatch.setattr(products, "keeps_sums", lambda device, a, b: a == b == torch.bfloat16)
    monkeypatch.setattr(products, "rounds_itself", lambda x: rounds and x.dtype == torch.bfloat16)

    def mm(a, b, out, add=False):
        if a.dtype == dtype:
            work.append(len(a) * a.shape[1] * b.shape[1])
        return in_float64(a, b, out, add)

    monkeypatch.setattr(products, "_mm", mm)
    monkeypatch.setattr(backend, "chunk_rows", lambda *a: 7)
    ignored = (1, rows)
    case = make_case((rows + 2,), H=H, V=V, dtype=dtype, ignored=ignored)

    def outputs(dtype):
        policy = [(0.3 * x).to(dtype).requires_grad_() for x in (case.hidden, case.weight, case.bias)]
        policy[0].requires_grad_(not frozen_hidden)
        online = [x.to(dtype) for x in (case.ref_hidden, case.ref_weight)]
        stats = tisdpo.linear_token_logps(*policy[:2], case.target, bias=policy[2], ref_hidden=online[0], ref_weight=online[1])
        return policy[frozen_hidden:], stats.logps

    (trained, logps), (true_trained, true) = outputs(dtype), outputs(torch.float64)
    tolerance = 0.01 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(logps.double(), true, rtol=2 * tolerance, atol=2 * tolerance)
    g = torch.randn(rows + 2)
    g[list(ignored)] = math.nan  # counts for nothing
    expected = torch.autograd.grad(true, true_trained, g.double().nan_to_num())
    results = [torch.autograd.grad(logps, trained, g, retain_graph=keep) for keep in (True, True, False)]
    for found in results:
        assert all(torch.equal(x, y) for x, y in zip(found, results[0]))
    for found, exact in zip(results[0], expected):
        torch.testing.assert_close(found.double(), exact, rtol=2 * tolerance, atol=tolerance * exact.abs().max().item())
    most, by_columns = (2 * H, 2 / H) if dtype == torch.bfloat16 else (H, 0)  # dBias of bfloat16: two columns more
    backward = (1 if frozen_hidden else 2) + (not H // 2 <= rows <= most) * (dtype == torch.bfloat16) + by_columns
    assert sum(work) / (rows * H * V) == pytest.approx(2 * (dtype == torch.bfloat16) + 3 * backward, rel=1e-3)


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("rows, price", [(H // 2 - 1, 4), (H // 2, 3), (H - 3, 3), (H, 3), (H + 1, 4)])
def test_derivatives_of_a_float32_head_wait_too(monkeypatch, compiles, rows, price, name):
    """Counted by the profiler, whoever makes the products, which write where other slices of D still wait."""
    compiles(name)
    monkeypatch.setattr(products, "IN_PLACE_BYTES", 70 * H * 4)
    monkeypatch.setattr(backend, "chunk_rows", lambda *a: 7)
    case, g = make_case((rows,), H=H, V=V, dtype=torch.float32), torch.randn(rows)

    def run(dtype=torch.float32):
        policy = [x.detach().to(dtype).requires_grad_() for x in (case.hidden, case.weight, case.bias)]
        tisdpo.linear_token_logps(*policy[:2], case.target, bias=policy[2]).logps.backward(g.to(dtype))
        return [x.grad for x in policy]

    assert head_products(run, rows, vocabulary=(V, *range(1, V))) == price
    for found, exact in zip(run(), run(torch.float64)):
        torch.testing.assert_close(found.double(), exact, rtol=1e-4, atol=1e-5 * exact.abs().max().item())


@pytest.mark.parametrize("rows", [H, 2 * H])
def test_a_second_derivative_is_refused_whether_something_waits_or_not(rows):
    case = make_case((rows,), H=H, V=V, dtype=torch.float32)
    hidden, weight = case.hidden.requires_grad_(), case.weight.requires_grad_()
    logps = tisdpo.linear_token_logps(hidden, weight, case.target).logps
    (grad,) = torch.autograd.grad(logps.sum(), weight, create_graph=True, retain_graph=False)
    with pytest.raises(RuntimeError, match="autograd"):
        grad.square().sum().backward()


@pytest.fixture
def sixteen_bits(monkeypatch):
    """Products of bfloat16 that keep their sums, as on a GPU."""
    monkeypatch.setattr(products, "keeps_sums", lambda device, a, b: a == b == torch.bfloat16)
    monkeypatch.setattr(products, "rounds_itself", lambda x: x.dtype == torch.bfloat16)
    monkeypatch.setattr(products, "_mm", in_float64)
    monkeypatch.setattr(products, "IN_PLACE_BYTES", 70 * H * 4)  # slices, of which one is less than an eighth of the vocabulary
    monkeypatch.setattr(products, "ALIGNED", 16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("way", ["waiting", "slopes", "two passes"])
def test_what_lives_until_the_backward(sixteen_bits, way, dtype):
    """Besides head and hidden states the memory of the head's gradient (float32: and a slice), or [N, H], or nothing; numbers a token."""
    rows = H * 7 // 8 if way != "two passes" else H // 2 - 1
    case = make_case((rows,), H=H, V=V, dtype=dtype)
    hidden, weight = case.hidden.requires_grad_(), case.weight.requires_grad_(way != "slopes")
    found = {}

    def pack(x):
        storage = x.untyped_storage()
        if storage.data_ptr() not in (hidden.data_ptr(), weight.data_ptr()):
            found[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        tisdpo.linear_token_logps(hidden, weight, case.target).logps.sum().backward()
    columns = 80 if dtype == torch.float32 else 0  # beside it
    expected = {"waiting": dtype.itemsize * (V * H + rows * columns), "slopes": 4 * rows * H, "two passes": 0}[way]
    assert expected <= sum(found.values()) <= expected + 40 * rows


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_gradient_of_the_head_lies_where_its_derivatives_waited(sixteen_bits, dtype):
    case = make_case((H,), H=H, V=V, dtype=dtype)
    hidden, weight = case.hidden.requires_grad_(), case.weight.requires_grad_()
    places = []

    def pack(x):
        places.append(x.data_ptr())
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        logps = tisdpo.linear_token_logps(hidden, weight, case.target).logps
    kept = torch.autograd.grad(logps.sum(), weight, retain_graph=True)[0]
    assert kept.data_ptr() not in places
    found = torch.autograd.grad(logps.sum(), weight)[0]
    assert found.data_ptr() in places and found.data_ptr() != weight.data_ptr() and torch.equal(found, kept)


class NoGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("frozen", [False, True])
def test_autograd_may_send_nothing(sixteen_bits, frozen, dtype):
    case = make_case((H,), H=H, V=V, dtype=dtype)
    hidden, weight = case.hidden.requires_grad_(), case.weight.requires_grad_(not frozen)
    NoGradient.apply(tisdpo.linear_token_logps(hidden, weight, case.target).logps).sum().backward()
    assert hidden.grad is None or (hidden.grad == 0).all()


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_log_probs_inside_of_gradient_checkpointing(sixteen_bits, dtype, frozen, reentrant):
    """Two calls before one backward."""
    case, results = make_case((H,), H=H, V=V, dtype=dtype), []
    for checkpointed in (False, True):
        hidden, weight = case.hidden.clone().requires_grad_(), case.weight.clone().requires_grad_(not frozen)

        def loss(hidden, weight):
            return tisdpo.linear_token_logps(hidden * 1.0, weight, case.target).logps.square().sum()

        call = partial(torch.utils.checkpoint.checkpoint, loss, use_reentrant=reentrant) if checkpointed else loss
        total = call(hidden, weight) + call(hidden.flip(0), weight)
        total.backward()
        results.append([total.detach(), hidden.grad] + ([] if frozen else [weight.grad]))
    for a, b in zip(*results):
        assert torch.equal(a, b)


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
def test_the_default_dtype_does_not_matter(monkeypatch, default):
    for name in ("keeps_sums", "compiled"):
        monkeypatch.setattr(products, name, getattr(products, name).__wrapped__)  # without its cache
    case = make_case(LENGTHS, H=H, V=V, dtype=torch.bfloat16)
    expected = tisdpo.linear_token_logps(case.hidden, case.weight, case.target).logps
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        assert torch.equal(tisdpo.linear_token_logps(case.hidden, case.weight, case.target).logps, expected)
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize("plan", ["one_pass", "two_pass"])
def test_policy_and_reference_of_different_dtypes(plan):
    """The reference in 16 bits, the policy in float64: its logits are what float64 makes of them."""
    case = make_case(LENGTHS, H=H, V=V, dtype=torch.bfloat16)
    wide = {name: getattr(case, name).double() for name in ("hidden", "weight")}

    def loss(**reference):
        objective = tisdpo.Objective(kl="reverse")
        return tisdpo.linear_tis_dpo_loss(*wide.values(), case.target, case.cu_seqlens, objective=objective, plan=plan, **reference).loss

    names = ("ref_hidden", "ref_weight")
    found = loss(**{name: getattr(case, name) for name in names})
    torch.testing.assert_close(found, loss(**{name: getattr(case, name).double() for name in names}))
