"""The registered operators: schema, fake, autograd registration, compiled graphs without a break, reruns bit for bit."""

import weakref

import pytest
import torch
from cases import BACKENDS, in_float64, make_case

import tisdpo
from tisdpo import Objective, Weighting
from tisdpo.ops import backend as backends
from tisdpo.ops import pairwise, products, sequence_sums, token_stats

TRANSFORM = (0.9, 3.0, 1.1)  # logit_scale, softcap, temperature
PLAIN = (1.0, None, 1.0)
CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


def head(case, *, bias=True, reference=True, trainable=True):
    """(hidden, weight, bias), (ref_hidden, ref_weight, ref_bias), with None for what is left out."""
    policy = [case.hidden, case.weight, case.bias if bias else None]
    policy = [None if x is None else x.clone().requires_grad_(trainable) for x in policy]
    ref = [case.ref_hidden, case.ref_weight, case.ref_bias if bias else None] if reference else [None] * 3
    return policy, ref


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reference, kl", [(False, None), (True, None), (True, "reverse"), (True, "forward")])
def test_opcheck_token_stats(reference, kl, backend):
    logits = torch.randn(5, 7, requires_grad=True)
    target, ref_logits = torch.tensor([0, -100, 6, 2, 3]), torch.randn(5, 7) if reference else None
    torch.library.opcheck(token_stats.token_stats, (logits, target, ref_logits, kl, *TRANSFORM, -100, False, backend), test_utils=CHECKS)
    stats = token_stats.token_stats(logits.detach(), target, ref_logits, kl, *TRANSFORM, -100, False, backend)
    stats = list(token_stats.for_backward(stats, kl))
    for g_logps, g_kl in ((torch.randn(5), torch.randn(5) if kl else None), (None, torch.randn(5) if kl else None)):
        args = (g_logps, g_kl, logits.detach(), target, ref_logits, stats, kl, *TRANSFORM, -100, backend)
        torch.library.opcheck(token_stats.token_stats_backward, args, test_utils=CHECKS)
        torch.library.opcheck(token_stats.token_stats_backward_, args, test_utils=CHECKS)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "bias, reference, kl, transform, needs",
    [
        (True, True, "reverse", TRANSFORM, (True, True, True)),
        (False, True, "forward", PLAIN, (True, True, False)),
        (True, False, None, PLAIN, (True, False, False)),
        (False, False, None, TRANSFORM, (False, True, False)),
    ],
)
def test_opcheck_linear_token_stats(bias, reference, kl, transform, needs, backend):
    case = make_case((3, 2), H=4, V=7, ignored=(1,), dtype=torch.float32)
    policy, ref = head(case, bias=bias, reference=reference)
    args = (*policy, case.target, *ref, kl, *transform, -100, backend, False, None)
    torch.library.opcheck(token_stats.linear_token_stats, args, test_utils=CHECKS)
    policy = [None if x is None else x.detach() for x in policy]
    stats = list(token_stats.for_backward(token_stats.linear_token_stats(*policy, *args[3:])[:5], kl))
    args = (torch.randn(5), torch.randn(5) if kl else None, *policy, case.target, *ref, stats, kl, *transform, -100, backend, list(needs))
    torch.library.opcheck(token_stats.linear_token_stats_backward, args, test_utils=CHECKS)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reference, kl", [(False, None), (True, None), (True, "reverse"), (True, "forward")])
def test_opcheck_with_slopes(reference, kl, backend):
    case = make_case((3, 2), H=4, V=7, ignored=(1,), dtype=torch.float32)
    (hidden, *head_), ref = head(case, reference=reference, trainable=False)
    args = (hidden.requires_grad_(), *head_, case.target, *ref, kl, *TRANSFORM, -100, backend, True, None)
    torch.library.opcheck(token_stats.linear_token_stats, args, test_utils=CHECKS)
    *slopes, nothing = token_stats.linear_token_stats(hidden.detach(), *args[1:])[5:]
    assert not nothing.numel()
    assert slopes[0].shape == (5, 4) and slopes[1].shape == ((5, 4) if kl else (0,))
    for g in ((torch.randn(5), torch.randn(5) if kl else None), (None, torch.randn(5) if kl else None)):
        torch.library.opcheck(token_stats.times_slopes, (*g, *slopes, case.target, -100, torch.bfloat16), test_utils=CHECKS)


@pytest.mark.parametrize("needs", [(True, True, True), (False, True, False)])
@pytest.mark.parametrize("length", [3, 7])
def test_opcheck_of_what_waits(monkeypatch, length, needs):
    monkeypatch.setattr(products, "keeps_sums", lambda device, a, b: a == b == torch.bfloat16)
    monkeypatch.setattr(products, "_mm", in_float64)
    case = make_case((length,), H=4, V=200, ignored=(1,), dtype=torch.bfloat16)
    policy, _ = head(case, trainable=False)
    policy = [x.requires_grad_(need) for x, need in zip(policy, needs)]
    sizes = token_stats.waiting_sizes(policy[1], case.target, -100)
    assert sizes[0] == length - 1 and (sizes[1] > 0) == (length > 5) and token_stats.waiting_sizes(policy[1], case.target[:1], -100) is None
    args = (*policy, case.target, None, None, None, None, *PLAIN, -100, "torch", False, sizes)
    # what no row of D is written to is different in every run
    torch.library.opcheck(token_stats.linear_token_stats, args, test_utils=CHECKS[:3])
    hidden, weight, bias = (x.detach() for x in policy)
    memory = token_stats.linear_token_stats(hidden, weight, bias, *args[3:])[5:]
    args = (torch.randn(length), *memory, hidden, weight, case.target, -100, list(needs))
    torch.library.opcheck(token_stats.waiting_gradients, args, test_utils=CHECKS)
    torch.library.opcheck(token_stats.waiting_gradients_, args, test_utils=CHECKS)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kl", [True, False])
@pytest.mark.parametrize("weights", ["given", "formed", "ones"])
def test_opcheck_sequence_sums(weights, kl, backend):
    logps, divergence = (torch.randn(7, requires_grad=True) for _ in range(2))
    cu = torch.tensor([0, 2, 2, 4, 7], dtype=torch.int32)
    given = (torch.rand(7) if weights == "given" else None, *((torch.randn(7), torch.randn(7)) if weights == "formed" else (None, None)))
    args = (logps, torch.randn(7), divergence if kl else None, cu, *given, 1.0, 1.0, -1.0, -0.5, 1.5, backend)
    torch.library.opcheck(sequence_sums.sequence_sums, args, test_utils=CHECKS)
    for g in ((torch.randn(4), torch.randn(4) if kl else None), (None, torch.randn(4))):
        torch.library.opcheck(sequence_sums.sequence_sums_backward, (*g, torch.rand(7), cu, backend), test_utils=CHECKS)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "objective, bias, weighted, online, needs",
    [
        (Objective(kl="reverse"), True, True, True, (True, True, True)),
        (Objective(kl="forward", detach_chosen_kl=True), False, False, True, (True, True, False)),
        (Objective(nll_coef=0.5), True, True, False, (True, False, False)),
        (Objective(loss="ipo"), False, False, True, (False, False, False)),
    ],
)
def test_opcheck_linear_pairwise(objective, bias, weighted, online, needs, backend):
    case = make_case((3, 2, 1, 1), H=4, V=7, ignored=(1,), dtype=torch.float32)
    policy, ref = head(case, bias=bias, reference=online, trainable=False)
    policy = [None if x is None else x.requires_grad_(need) for x, need in zip(policy, needs)]
    o = objective
    args = (
        *policy, case.target, case.cu_seqlens, case.token_weights if weighted else None, None if online else torch.randn(7), *ref,
        torch.tensor(2.0),
        o.loss, o.beta, o.kl, o.alpha, o.detach_chosen_kl, o.label_smoothing, o.nll_coef, *PLAIN, -100, list(needs), backend,
    )  # fmt: skip
    torch.library.opcheck(pairwise.linear_pairwise, args, test_utils=CHECKS)


CASE = make_case((3, 5, 1, 7), ignored=(4,), dtype=torch.float32)
REFERENCE = dict(ref_hidden=CASE.ref_hidden, ref_weight=CASE.ref_weight, ref_bias=CASE.ref_bias)
IS_CHOSEN = torch.repeat_interleave(torch.tensor([True, False, True, False]), torch.tensor([3, 5, 1, 7]))


def _logps(x):
    return x[:, 0] - 3.0


# Every public function as a function of (hidden, weight, bias) to a scalar that uses every differentiable result.
FUNCTIONS = {
    "token_logps": lambda h, w, b: sum(
        x.square().sum() for x in tisdpo.token_logps(h @ w.T + b, CASE.target, ref_logits=CASE.ref_hidden @ CASE.ref_weight.T, kl="reverse")
    ),
    "linear_token_logps": lambda h, w, b: sum(
        x.square().sum() for x in tisdpo.linear_token_logps(h, w, CASE.target, bias=b, kl="forward", softcap=4.0, **REFERENCE)
    ),
    "linear_token_logps_frozen": lambda h, w, b: (
        sum(
            x.square().sum()
            for x in tisdpo.linear_token_logps(h, w.detach(), CASE.target, bias=b.detach(), kl="forward", softcap=4.0, **REFERENCE)
        )
        + 0 * (w.sum() + b.sum())
    ),
    "token_weights": lambda h, w, b: (
        (tisdpo.token_weights(_logps(h), _logps(CASE.ref_hidden), IS_CHOSEN) * h[:, 1]).sum() + 0 * (w.sum() + b.sum())
    ),
    "sequence_sums": lambda h, w, b: (
        sum(
            x.square().sum()
            for x in tisdpo.sequence_sums(
                _logps(h), _logps(CASE.ref_hidden), CASE.cu_seqlens, pos_logps=h[:, 2].detach(), neg_logps=h[:, 3].detach(), kl=h[:, 4]
            )
        )
        + 0 * (w.sum() + b.sum())
    ),
    "tis_dpo_loss": lambda h, w, b: (
        tisdpo.tis_dpo_loss(
            _logps(h),
            _logps(CASE.ref_hidden),
            CASE.cu_seqlens,
            token_weights=CASE.token_weights,
            kl=h[:, 4],
            objective=Objective(kl="reverse"),
        ).loss
        + 0 * (w.sum() + b.sum())
    ),
    "linear_tis_dpo_loss": lambda h, w, b: (
        tisdpo.linear_tis_dpo_loss(
            h, w, CASE.target, CASE.cu_seqlens, token_weights=CASE.token_weights, bias=b, objective=Objective(kl="reverse"), **REFERENCE
        ).loss
    ),
    "linear_tis_dpo_loss_two_pass": lambda h, w, b: (
        tisdpo.linear_tis_dpo_loss(
            h, w, CASE.target, CASE.cu_seqlens, token_weights=CASE.token_weights, bias=b, plan="two_pass", **REFERENCE
        ).loss
    ),
}


def run(function):
    inputs = [x.clone().requires_grad_() for x in (CASE.hidden, CASE.weight, CASE.bias)]
    loss = function(*inputs)
    return [loss.detach(), *torch.autograd.grad(loss, inputs)]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_compiled_without_a_graph_break_equals_eager(name):
    torch._dynamo.reset()
    compiled = torch.compile(FUNCTIONS[name], fullgraph=True, backend="aot_eager")
    actual, expected = run(compiled), run(FUNCTIONS[name])
    assert expected[1].abs().sum() > 0
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", ["linear_tis_dpo_loss", "linear_token_logps", "linear_token_logps_frozen"])
def test_compiled_with_inductor_equals_eager(name):
    torch._dynamo.reset()
    torch.testing.assert_close(run(torch.compile(FUNCTIONS[name], fullgraph=True)), run(FUNCTIONS[name]), rtol=1e-5, atol=1e-6)


def test_compiled_graph_serves_other_numbers_of_tokens():
    torch._dynamo.reset()
    weight = CASE.weight.clone().requires_grad_()

    def loss(hidden, target, cu_seqlens, ref_logps):
        return tisdpo.linear_tis_dpo_loss(hidden, weight, target, cu_seqlens, ref_logps=ref_logps).loss

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=True)
    for lengths in ((3, 5, 1, 7), (2, 2), (4, 1, 6, 2, 9, 3)):
        case = make_case(lengths, dtype=torch.float32)
        args = (case.hidden, case.target, case.cu_seqlens, torch.zeros(len(case.target)))
        grads = [torch.autograd.grad(f(*args), weight)[0] for f in (compiled, loss)]
        torch.testing.assert_close(*grads)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_rerun_is_bitwise_equal(name):
    assert all(torch.equal(a, b) for a, b in zip(run(FUNCTIONS[name]), run(FUNCTIONS[name])))


def test_gradients_are_the_same_whether_the_graph_is_kept_or_not():
    """The last backward scales the stored gradients in place, one that keeps the graph must not."""

    def step(keep):
        inputs = [x.clone().requires_grad_() for x in (CASE.hidden, CASE.weight, CASE.bias)]
        for scale in (1.7, -0.3):  # the second step accumulates into gradients that the first one handed out
            loss = FUNCTIONS["linear_tis_dpo_loss"](*inputs)
            for _ in range(keep):
                torch.autograd.grad(loss, inputs, torch.tensor(5.0), retain_graph=True)
            (scale * loss).backward()
        return [x.grad for x in inputs]

    results = [step(keep) for keep in (0, 1, 2)]
    unit = run(FUNCTIONS["linear_tis_dpo_loss"])[1:]
    for grads in results:
        torch.testing.assert_close(grads, [1.4 * g for g in unit])
        assert all(torch.equal(a, b) for a, b in zip(grads, results[0]))


def test_operators_work_under_a_dispatch_mode():
    """FlopCounterMode and selective checkpointing push one; nothing inside an operator may depend on its absence."""
    from torch.utils.flop_counter import FlopCounterMode

    expected = run(FUNCTIONS["linear_tis_dpo_loss"])
    with FlopCounterMode(display=False):
        actual = run(FUNCTIONS["linear_tis_dpo_loss"])
    assert all(torch.equal(a, b) for a, b in zip(actual, expected))


def test_the_host_reads_values_so_no_graph_of_the_compiler_repeats_them():
    """`torch.compile(mode="reduce-overhead")` would replay the boundaries of the first call, see tests/test_gpu.py."""
    ways = ("linear_token_stats", "linear_token_stats_backward", "waiting_gradients", "waiting_gradients_")
    for name in ("linear_pairwise", "linear_nll", *ways):
        assert torch.Tag.cudagraph_unsafe in getattr(torch.ops.tisdpo, name).default.tags


@pytest.mark.parametrize("kl", [None, "reverse"])
@pytest.mark.parametrize("frozen", [False, True])
def test_the_reference_lives_no_longer_than_it_is_needed(frozen, kl):
    case = make_case((3, 2), dtype=torch.float32)
    logits, ref_logits = torch.randn(5, 7, requires_grad=True), torch.randn(5, 7)
    hidden, ref_hidden, ref_weight = case.hidden.clone().requires_grad_(), case.ref_hidden.clone(), case.ref_weight.clone()
    weight = case.weight.clone().requires_grad_(not frozen)
    outputs = [
        tisdpo.token_logps(logits, torch.tensor([0, 6, 2, 3, 1]), ref_logits=ref_logits, kl=kl),
        tisdpo.linear_token_logps(hidden, weight, case.target, ref_hidden=ref_hidden, ref_weight=ref_weight, kl=kl),
    ]
    alive = [weakref.ref(x) for x in (ref_logits, ref_hidden, ref_weight)]
    del ref_logits, ref_hidden, ref_weight
    of_logits, *of_hidden = (x() is not None for x in alive)
    assert of_logits == (kl is not None) and of_hidden == [kl is not None and not frozen] * 2
    sum(x.logps.sum() for x in outputs).backward()
    assert logits.grad.abs().sum() > 0 and hidden.grad.abs().sum() > 0


def test_backend_choice(monkeypatch, caplog):
    backends._announce.cache_clear()
    expected = "cpp" if "cpp" in BACKENDS else "torch"
    with caplog.at_level("INFO", logger="tisdpo"):
        assert backends.resolve("auto", "cpu") == backends.resolve("auto", "cpu") == expected
    assert len(caplog.records) == 1 and f"{expected!r} backend on cpu" in caplog.text
    assert backends.resolve("auto", "cpu", torch.float64) == "torch"
    monkeypatch.setenv("TISDPO_BACKEND", "torch")
    assert backends.resolve("auto", "cpu") == "torch"
    monkeypatch.setenv("TISDPO_BACKEND", "fastest")
    with pytest.raises(ValueError, match="TISDPO_BACKEND must be one of auto, torch, triton, cpp, got 'fastest'"):
        backends.resolve("auto", "cpu")
    assert backends.resolve("torch", "cpu") == "torch"  # an argument wins over the environment
    for name, reason in backends.available("cpu").items():
        if reason:
            with pytest.raises(RuntimeError, match=f"backend='{name}' was asked for, but only .*torch.* can do this: "):
                backends.resolve(name, "cpu")


@pytest.mark.parametrize("transform", ["swapped", "equal"])
def test_compiled_weights_of_elementwise_rules(transform):
    torch._dynamo.reset()
    weighting = Weighting(transform)

    def sums(logps, pos, neg):
        return tisdpo.sequence_sums(logps, logps.detach() - 1, CASE.cu_seqlens, pos_logps=pos, neg_logps=neg, weighting=weighting).logratio

    args = [torch.randn(16) for _ in range(3)]
    torch.testing.assert_close(torch.compile(sums, fullgraph=True, backend="aot_eager")(*args), sums(*args))
