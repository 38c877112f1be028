"""On a GPU: the compiled kernels at real sizes, 16-bit inputs, and everything that only exists there (graphs, streams, waiting)."""

import warnings
from dataclasses import replace

import pytest
import torch

import tisdpo
from benchmarks.registry import MODES, OP_STEPS, OUR_OPS, PLAIN, PROVIDERS, Problem, Size, Step, fused, plain, relative_error
from tisdpo import Objective
from tisdpo.ops import backend, products, rows, token_stats

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
SMALL = Size(tokens=777, hidden=256, vocabulary=4099, pairs=5)  # nothing is a multiple of anything
MASKED = replace(SMALL, masked=0.1)
CHUNKED = [  # tokens, vocabulary, masked, FEW_ITEMS
    *((tokens, 4096, 0.0, 0) for tokens in (200, 448, 512, 700, 1024, 1025)),
    *((tokens, 4099, 0.0, 1 << 24) for tokens in (200, 512, 1024)),
    (1024, 4099, 0.1, 0),
]
REAL = Size(tokens=600, hidden=1024, vocabulary=128256, pairs=4)


@pytest.fixture(autouse=True)
def memory_for_others():
    """Several processes share the GPU."""
    yield
    torch.cuda.empty_cache()


def error(results, truth):
    return [0.0 if x is None else relative_error(x, y) for x, y in zip(results, truth)]


def test_triton_is_what_runs():
    assert backend.resolve("auto", "cuda") == "triton" and not backend.available("cuda")["triton"]


@pytest.mark.parametrize("plan", ["one_pass", "two_pass"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("step", MODES, ids=lambda s: s.name)
@pytest.mark.parametrize("size", [SMALL, REAL], ids=["small", "real"])
def test_no_less_accurate_than_plain_torch(size, step, dtype, plan):
    """err(ours) <= 2 err(plain torch in the same dtype) + tiny, against float64, for the loss and all gradients."""
    problem = Problem(size, dtype, "cuda")
    truth = problem.double().run(plain, step)
    ours = error(problem.run(lambda p, s: fused(p, s, plan), step), truth)
    theirs = error(problem.run(plain, step), truth)
    tiny = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 4e-3}[dtype]  # half an ulp or so of the gradients' own dtype
    for name, x, y in zip(("loss", "dHidden", "dWeight"), ours, theirs):
        assert x <= 2 * y + tiny, f"{name}: ours {x:.2e}, plain torch {y:.2e}"


@pytest.mark.parametrize("plan", ["one_pass", "two_pass"])
@pytest.mark.parametrize("step", MODES, ids=lambda s: s.name)
@pytest.mark.parametrize("tokens, vocabulary, masked, few_items", CHUNKED)
def test_several_chunks(monkeypatch, tokens, vocabulary, masked, few_items, step, plan):
    """Heads of 16 bits whose D waits in the gradient (up to 7/8 H rows and more), also beside it (2 H), and whose sum has float32."""
    monkeypatch.setenv("TISDPO_CHUNK_MIB", "1")  # D of 128 rows, with KL 32 rows
    monkeypatch.setattr(rows, "DIRECT_ROWS", 96)
    monkeypatch.setattr(products, "SLICE_BYTES", 64 * 512)
    monkeypatch.setattr(products, "FEW_ITEMS", few_items)
    at_once, own = [], products.WaitingRows.product
    monkeypatch.setattr(products.WaitingRows, "product", lambda self, *args: (at_once.extend(self.at_once), own(self, *args))[1])
    size = Size(tokens=tokens, hidden=512, vocabulary=vocabulary, pairs=4, masked=masked)
    problem = Problem(size, torch.bfloat16, "cuda")
    truth = problem.double().run(plain, step)
    found = [None if x is None else x.clone() for x in problem.run(lambda p, s: fused(p, s, plan), step)]
    ours, theirs = error(found, truth), error(problem.run(plain, step), truth)
    for name, x, y in zip(("loss", "dHidden", "dWeight"), ours, theirs):
        assert x <= 2 * y + 4e-3, f"{name}: ours {x:.2e}, plain torch {y:.2e}"
    again = problem.run(lambda p, s: fused(p, s, plan), step)
    assert all(x is None or torch.equal(x, y) for x, y in zip(found, again))
    waits = not step.frozen and tokens <= 1024
    assert (len(at_once) > 1 and any(at_once)) if waits else not at_once


def test_a_product_with_long_sums_is_rounded_once():
    """Few tiles and a long sum: the library may split the sum and add its parts, which must not be rounded before."""
    g = torch.Generator("cuda").manual_seed(0)
    d, hidden = (torch.randn(100_000, n, device="cuda", generator=g).bfloat16() for n in (2000, 256))
    truth = d.double().T @ hidden.double()
    found = products.grad_weight(d, hidden)
    assert relative_error(found, truth) <= 1.1 * relative_error(truth.bfloat16(), truth)


def test_a_product_of_many_tiles_is_rounded_once():
    """Just above FEW_ITEMS, where the library rounds."""
    g = torch.Generator("cuda").manual_seed(0)
    widths = products.FEW_ITEMS // 256, 256
    d, hidden = (torch.randn(66_000, n, device="cuda", dtype=torch.bfloat16, generator=g) for n in widths)
    found = products.grad_weight(d, hidden)
    truth = torch.cat([part.double().T @ hidden.double() for part in d.split(8192, 1)])
    assert relative_error(found, truth) <= 1.1 * relative_error(truth.bfloat16(), truth)


@pytest.mark.parametrize("on_cpu", [True, False])
def test_bad_values_are_errors_where_the_host_waits(on_cpu):
    problem = Problem(MASKED, torch.bfloat16, "cuda")
    problem.target[5] = 4099
    problem.cu_seqlens_on_cpu = problem.cu_seqlens.cpu() if on_cpu else problem.cu_seqlens
    with pytest.raises(ValueError, match="got 4099 at position 5"):
        problem.run(fused, Step())


def test_log_probs_of_bfloat16_inputs():
    """Mean error of a log-prob at most 1e-3 nat: logits are never rounded to 16 bits."""
    p = Problem(REAL, torch.bfloat16, "cuda")
    p.weight *= 5  # sharp distributions, as trained models have
    with torch.no_grad():
        logps = tisdpo.linear_token_logps(p.hidden, p.weight, p.target).logps
        truth = (p.hidden.double() @ p.weight.double().T).log_softmax(-1).gather(-1, p.target[:, None])[:, 0]
    assert (logps.double() - truth).abs().mean() <= 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("tokens", [100, 200, 512, 600])  # of H = 256: fewer and more than those whose D waits for a backward
@pytest.mark.parametrize("step", OP_STEPS, ids=lambda s: s.name)
def test_log_probs_for_other_losses(monkeypatch, step, tokens, dtype):
    monkeypatch.setenv("TISDPO_CHUNK_MIB", "1")
    monkeypatch.setattr(products, "SLICE_BYTES", 64 * 256)  # several slices of what waits
    problem = Problem(replace(SMALL, tokens=tokens), dtype, "cuda")
    assert problem.logits.dtype == dtype  # made now, so that everybody reads the same
    waits = token_stats.waiting_sizes(problem.weight, problem.target, -100) is not None
    assert waits == (tokens in {torch.bfloat16: (200, 512), torch.float32: (200,)}.get(dtype, ()))
    truth = problem.double().run(PLAIN, step)
    ours = next(provider for provider in PROVIDERS if provider.name == OUR_OPS)
    found, theirs = error(problem.run(ours, step), truth), error(problem.run(PLAIN, step), truth)
    tiny = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 4e-3}[dtype]
    for x, y in zip(found, theirs):
        assert x <= 2 * y + tiny, f"ours {x:.2e}, plain torch {y:.2e}"


@pytest.mark.parametrize("step", MODES, ids=lambda s: s.name)
def test_reruns_are_equal_bit_for_bit(step):
    problem = Problem(REAL, torch.bfloat16, "cuda")
    first = [None if x is None else x.clone() for x in problem.run(fused, step)]
    assert all(x is None or torch.equal(x, y) for x, y in zip(first, problem.run(fused, step)))


def test_few_and_many_rows():
    """One long row split over programs, and rows of a whole chunk, give the same statistics."""
    g = torch.Generator("cuda").manual_seed(0)
    logits = torch.randn(3000, 32000, device="cuda", generator=g)
    target = torch.randint(32000, (3000,), device="cuda", generator=g)
    many = tisdpo.token_logps(logits, target).logps
    few = torch.cat([tisdpo.token_logps(logits[i : i + 1], target[i : i + 1]).logps for i in range(8)])
    truth = logits.double().log_softmax(-1).gather(-1, target[:, None])[:, 0]
    torch.testing.assert_close(many.double(), truth, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(few, many[:8], rtol=1e-6, atol=1e-5)


def test_offsets_beyond_32_bits():
    """More than 2^31 logits in one tensor."""
    if torch.cuda.mem_get_info()[0] < 14 << 30:
        pytest.skip("needs 14 GiB")
    logits = torch.zeros(2, 8501, 131072, dtype=torch.bfloat16, device="cuda")
    logits[-1, -2, 5] = 12.0
    last = logits[-1, -2].clone().double()
    target = torch.full((2, 8500), 5, device="cuda")
    logits.requires_grad_()
    logps = tisdpo.token_logps(logits[:, :-1], target, overwrite_logits=True).logps
    expected = last.log_softmax(-1)
    torch.testing.assert_close(logps[-1, -1].double(), expected[5], rtol=1e-5, atol=1e-5)
    (grad,) = torch.autograd.grad(logps[-1, -1], logits)
    d = -expected.exp()
    d[5] += 1
    torch.testing.assert_close(grad[-1, -2].double(), d, rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize("on_cpu", [True, False])
def test_the_host_waits_once(on_cpu):
    problem = Problem(MASKED, torch.bfloat16, "cuda")
    problem.cu_seqlens_on_cpu = problem.cu_seqlens.cpu() if on_cpu else problem.cu_seqlens
    torch.use_deterministic_algorithms(False)  # what that puts in place of other kernels waits for the device
    problem.run(fused, Step(kl="reverse"))
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            problem.run(fused, Step(kl="reverse"))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len([w for w in found if "synchroniz" in str(w.message)]) == 1, [str(w.message) for w in found]


@pytest.mark.parametrize(
    "size, on_cpu, budget",
    [
        (replace(MASKED, tokens=500), True, "64"),
        (replace(MASKED, tokens=500), False, "64"),
        (SMALL, True, "64"),
        (SMALL, True, "2"),  # summed over chunks
        (replace(SMALL, tokens=400), True, "2"),  # D waits
    ],
)
def test_the_host_never_waits(monkeypatch, size, on_cpu, budget):
    monkeypatch.setenv("TISDPO_CHUNK_MIB", budget)
    problem = Problem(size, torch.bfloat16, "cuda")
    problem.cu_seqlens_on_cpu = problem.cu_seqlens.cpu() if on_cpu else problem.cu_seqlens
    torch.use_deterministic_algorithms(False)
    found = [x.clone() for x in problem.run(fused, Step(kl="reverse"))]
    torch.cuda.set_sync_debug_mode("error")
    try:
        problem.run(fused, Step(kl="reverse"))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    truth = problem.double().run(plain, Step(kl="reverse"))
    assert max(error(found, truth)) < 0.02


def replayed(run):
    """What a replay of the captured graph of `run` leaves in its results."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for x in captured:
        x.zero_()
    graph.replay()
    return captured


@pytest.mark.parametrize("step", [Step(), Step(kl="reverse")], ids=lambda s: s.name)
def test_cuda_graphs(step):
    problem = Problem(MASKED, torch.bfloat16, "cuda")

    def run():
        problem.hidden.grad = problem.weight.grad = None
        return problem.run(fused, step)

    expected = tuple(x.clone() for x in run())
    torch.testing.assert_close(replayed(run), expected, rtol=2e-2, atol=1e-5)


@pytest.mark.parametrize("what, tokens", [("log-probs", 777), ("log-probs", 400), ("factors", 777), ("two passes", 777)])
def test_cuda_graphs_where_nothing_is_ignored(what, tokens):
    """Of 400 tokens D waits for the backward, of 777 it does not."""
    p = Problem(replace(SMALL, tokens=tokens), torch.bfloat16, "cuda")
    hidden, weight = (x.detach().clone().requires_grad_() for x in (p.hidden, p.weight))
    given = dict(token_weights=p.token_weights, ignore_index=None)

    def run():
        if what == "log-probs":
            loss = tisdpo.linear_token_logps(hidden, weight, p.target, ignore_index=None).logps.sum()
        elif what == "factors":
            loss = tisdpo.linear_nll_loss(hidden, weight, p.target, normalizer=1.0, **given).loss
        else:
            boundaries = p.cu_seqlens_on_cpu
            loss = tisdpo.linear_tis_dpo_loss(hidden, weight, p.target, boundaries, ref_logps=p.ref_logps, plan="two_pass", **given).loss
        return loss.detach(), *torch.autograd.grad(loss, (hidden, weight))

    expected = tuple(x.clone() for x in run())
    torch.testing.assert_close(replayed(run), expected, rtol=2e-2, atol=1e-5)


def test_compiled_without_a_graph_break():
    problem = Problem(SMALL, torch.bfloat16, "cuda")
    expected = problem.run(fused, Step(kl="reverse"))
    torch._dynamo.reset()

    def loss(hidden, weight):
        return tisdpo.linear_tis_dpo_loss(
            hidden, weight, problem.target, problem.cu_seqlens, token_weights=problem.token_weights, ref_hidden=problem.ref_hidden,
            ref_weight=problem.ref_weight, objective=Objective.preset("paper"),
        ).loss  # fmt: skip

    compiled = torch.compile(loss, fullgraph=True)
    results = problem.run(lambda p, s: compiled(p.hidden, p.weight), Step(kl="reverse"))
    torch.testing.assert_close(results, expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("on_cpu", [True, False])
def test_graphs_of_the_compiler_take_new_boundaries(on_cpu):
    """mode="reduce-overhead" records CUDA graphs from the second call on; what comes later has other pairs of the same number."""
    problem = Problem(SMALL, torch.bfloat16, "cuda")
    torch._dynamo.reset()

    @torch.compile(mode="reduce-overhead")
    def loss(hidden, weight, cu_seqlens):
        return tisdpo.linear_tis_dpo_loss(
            hidden * 1.0, weight, problem.target, cu_seqlens, token_weights=problem.token_weights, ref_logps=problem.ref_logps,
            ignore_index=None,
        ).losses  # fmt: skip

    first, tokens = problem.cu_seqlens_on_cpu, SMALL.tokens
    other = torch.tensor([0, *sorted(tokens - x for x in first[1:-1].tolist()), tokens])
    assert not torch.equal(first, other)
    for cu in (first, first, first, other, first):
        cu = cu if on_cpu else cu.cuda()
        torch.compiler.cudagraph_mark_step_begin()
        expected = tisdpo.linear_tis_dpo_loss(
            problem.hidden, problem.weight, problem.target, cu, token_weights=problem.token_weights, ref_logps=problem.ref_logps,
            ignore_index=None,
        ).losses  # fmt: skip
        torch.testing.assert_close(loss(problem.hidden, problem.weight, cu), expected, rtol=1e-3, atol=1e-5)


def test_autocast_and_checkpointing():
    problem = Problem(SMALL, torch.float32, "cuda")

    def checkpointed(p, step):
        with torch.autocast("cuda", torch.bfloat16):
            return torch.utils.checkpoint.checkpoint(fused, p, step, use_reentrant=False)

    low = Problem(SMALL, torch.float32, "cuda")
    truth = low.double().run(plain, Step(kl="reverse"))
    assert max(error(problem.run(checkpointed, Step(kl="reverse")), truth)) < 0.02


def test_peak_memory_stays_within_the_budget(monkeypatch):
    monkeypatch.setenv("TISDPO_CHUNK_MIB", "256")
    extra = []
    for tokens in (2048, 8192):
        p = Problem(Size(tokens, 512, 128256, pairs=tokens // 128), torch.bfloat16, "cuda")
        p.run(fused, Step(frozen=True))
        p.hidden.grad = None
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        p.run(fused, Step(frozen=True))
        extra.append(torch.cuda.max_memory_allocated() - before - p.hidden.grad.nbytes)
    assert extra[0] < 300 << 20 and extra[1] < 320 << 20, extra
