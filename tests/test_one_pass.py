"""One pass, two passes and autograd of the reference: the same loss and the same gradients in float64, for every option."""

import itertools
import math

import pytest
import torch
import torch.utils.checkpoint
from cases import BACKENDS, SHAPES, make_case

import tisdpo
from tisdpo import Objective, reference
from tisdpo.ops import backend, loss_rows, pairwise, rows, token_stats

TRANSFORMS = {
    "plain": {},
    "scaled": {"logit_scale": 0.7, "temperature": 1.3},
    "softcap": {"softcap": 2.0, "logit_scale": 1.1, "temperature": 0.8},
}
OBJECTIVES = {
    "dpo": Objective(),
    "reverse": Objective(kl="reverse", alpha=0.7),
    "forward": Objective(kl="forward", alpha=0.7),
    "tdpo2": Objective.preset("tdpo2"),
    "reverse_detached": Objective(kl="reverse", detach_chosen_kl=True),
    "smoothed": Objective(label_smoothing=0.2, beta=0.5),
    "hinge": Objective(loss="hinge", beta=0.3),
    "ipo": Objective(loss="ipo", kl="reverse"),
    "robust": Objective(loss="robust", label_smoothing=0.1, kl="forward"),
    "norm": Objective(loss="sigmoid_norm", kl="reverse", beta=2.0),
    "nll": Objective(nll_coef=0.7),
    "nll_tdpo2": Objective.preset("tdpo2", nll_coef=0.7),
}


def loss_and_gradients(case, objective, transform, *, bias=True, weighted=True, plan="reference", frozen=False, reduction="mean"):
    hidden = case.hidden.clone().requires_grad_()
    weight = case.weight.clone().requires_grad_(not frozen)
    b = case.bias.clone().requires_grad_(not frozen) if bias else None
    weights = case.token_weights if weighted else None
    rb = case.ref_bias if bias else None
    if plan == "reference":
        losses = reference.tis_dpo_losses(
            reference.linear_logits(hidden, weight, b, **transform),
            reference.linear_logits(case.ref_hidden, case.ref_weight, rb, **transform),
            case.target, case.cu_seqlens, weights, kl=objective.kl, alpha=objective.alpha, detach_chosen_kl=objective.detach_chosen_kl,
            loss=objective.loss, beta=objective.beta, label_smoothing=objective.label_smoothing,
            nll_coef=objective.nll_coef,
        )  # fmt: skip
        loss = losses.mean() if reduction == "mean" else losses.sum()
        output = None
    else:
        output = tisdpo.linear_tis_dpo_loss(
            hidden, weight, case.target, case.cu_seqlens, token_weights=weights, bias=b,
            ref_hidden=case.ref_hidden, ref_weight=case.ref_weight,
            ref_bias=rb, objective=objective, plan=plan, reduction=reduction, **transform,
        )  # fmt: skip
        loss = output.loss
    (loss * 1.7).backward()
    return loss.detach(), [x.grad for x in (hidden, weight, b) if x is not None], output


def assert_same(actual, expected, tolerance=1e-12):
    (loss, grads, _), (true_loss, true_grads, _) = actual, expected
    assert abs(loss - true_loss) <= tolerance * max(1, abs(true_loss)), (loss, true_loss)
    for grad, true in zip(grads, true_grads, strict=True):
        assert (grad is None) == (true is None)
        if true is not None:
            assert grad.shape == true.shape
            assert (grad - true).abs().max() <= tolerance * max(1, true.abs().max()), (grad - true).abs().max()


@pytest.mark.parametrize("plan", ["one_pass", "two_pass"])
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_option_equals_autograd_of_the_reference(objective, transform, plan):
    for shape, (bias, weighted) in itertools.product(["plain", "ignored", "empty_side", "empty_pair"], [(True, True), (False, False)]):
        case = make_case(*SHAPES[shape][:1], ignored=SHAPES[shape][1])
        args = (case, OBJECTIVES[objective], TRANSFORMS[transform])
        options = dict(bias=bias, weighted=weighted)
        assert_same(loss_and_gradients(*args, **options, plan=plan), loss_and_gradients(*args, **options))


def test_an_nll_beside_a_kl_with_a_gradient_takes_two_passes():
    for kl in ("reverse", "forward"):
        args = (make_case(ignored=(1,)), Objective(kl=kl, nll_coef=0.7), {})
        for plan in ("auto", "two_pass"):
            assert_same(loss_and_gradients(*args, plan=plan), loss_and_gradients(*args))
        with pytest.raises(ValueError, match=f"kl='{kl}' and nll_coef=0.7 .* use plan='auto', or detach_chosen_kl=True"):
            loss_and_gradients(*args, plan="one_pass")


@pytest.mark.parametrize("plan", ["one_pass", "two_pass"])
@pytest.mark.parametrize("shape", SHAPES)
def test_awkward_shapes(shape, plan):
    lengths, ignored = SHAPES[shape]
    for objective in (Objective(), Objective(kl="reverse"), Objective(kl="forward"), Objective("sigmoid_norm", nll_coef=0.3)):
        args = (make_case(lengths, ignored=ignored), objective, {})
        assert_same(loss_and_gradients(*args, plan=plan), loss_and_gradients(*args))


@pytest.mark.parametrize("rows", [1, 2, 6, 9, 100])
@pytest.mark.parametrize("kl, nll_coef", [(None, 0.0), (None, 0.5), ("reverse", 0.0), ("forward", 0.5)])
@pytest.mark.parametrize("frozen", [False, True])
def test_chunks_and_recomputed_long_pairs_change_nothing(rows, kl, nll_coef, frozen, monkeypatch):
    """6 rows hold some pairs and not others; with 1 and 2 every pair is longer than the chunk and computed twice, or visited in parts."""
    monkeypatch.setattr(backend, "chunk_rows", lambda *a: rows)
    monkeypatch.setattr(backend, "longest_held", lambda rows, *a: rows)
    monkeypatch.setattr(backend, "block_rows", lambda *a: 2)
    objective = Objective(kl=kl, detach_chosen_kl=kl is not None, nll_coef=nll_coef)
    args = (make_case((3, 5, 1, 2, 2, 4, 1, 1), ignored=(1, 9)), objective, {"softcap": 3.0})
    truth = loss_and_gradients(*args, frozen=frozen)
    for plan in ("one_pass", "two_pass"):
        assert_same(loss_and_gradients(*args, plan=plan, frozen=frozen), truth)


@pytest.mark.parametrize("plan", ["one_pass", "two_pass"])
def test_frozen_head_and_sum_reduction(plan):
    args = (make_case(), Objective(kl="reverse"), {})
    actual = loss_and_gradients(*args, plan=plan, frozen=True, reduction="sum")
    assert actual[1][1] is None and actual[1][2] is None
    assert_same(actual, loss_and_gradients(*args, frozen=True, reduction="sum"))


@pytest.mark.parametrize("plan", ["one_pass", "two_pass"])
def test_normalizer_splits_a_batch_into_parts_that_add_up(plan):
    case = make_case((3, 5, 1, 7))
    whole = tisdpo.linear_tis_dpo_loss(
        case.hidden, case.weight, case.target, case.cu_seqlens, ref_hidden=case.ref_hidden, ref_weight=case.ref_weight, plan=plan
    )
    parts = 0.0
    for tokens, normalizer in ((slice(0, 8), 2), (slice(8, 16), torch.tensor(2.0))):
        cu = torch.tensor([0, 3, 8]) if tokens.start == 0 else torch.tensor([0, 1, 8])
        parts += tisdpo.linear_tis_dpo_loss(
            case.hidden[tokens],
            case.weight,
            case.target[tokens],
            cu,
            ref_hidden=case.ref_hidden[tokens],
            ref_weight=case.ref_weight,
            normalizer=normalizer,
            plan=plan,
        ).loss
    assert abs(parts - whole.loss) < 1e-14


@pytest.mark.parametrize("plan", ["one_pass", "two_pass"])
@pytest.mark.parametrize("objective", ["dpo", "reverse", "forward", "tdpo2"])
def test_output_fields(objective, plan):
    case, objective = make_case((3, 5, 1, 7), ignored=(4,)), OBJECTIVES[objective]
    output = loss_and_gradients(case, objective, {}, plan=plan)[2]
    logits, ref_logits = (
        reference.linear_logits(case.hidden, case.weight, case.bias),
        reference.linear_logits(case.ref_hidden, case.ref_weight, case.ref_bias),
    )
    logps = reference.token_logps(logits, case.target)
    sums = reference.segment_sums(logps, case.cu_seqlens)
    torch.testing.assert_close(output.chosen_logps, sums[0::2])
    torch.testing.assert_close(output.rejected_logps, sums[1::2])
    weights = case.token_weights * (case.target >= 0)
    D = reference.segment_sums(weights * (logps - reference.token_logps(ref_logits, case.target)), case.cu_seqlens)
    K = (
        None
        if objective.kl is None
        else reference.segment_sums(weights * reference.token_kl(logits, ref_logits, objective.kl), case.cu_seqlens)
    )
    rewards = objective.beta * reference.scores(D, K, objective.kl, objective.alpha)
    torch.testing.assert_close(output.chosen_rewards, rewards[0::2])
    torch.testing.assert_close(output.logits, rewards[0::2] - rewards[1::2])
    torch.testing.assert_close(output.losses.mean(), output.loss.detach())
    assert (output.chosen_kl is None) == (objective.kl is None)
    if K is not None:
        torch.testing.assert_close(output.rejected_kl, K[1::2])
    assert output.loss.requires_grad and not any(x.requires_grad for x in output[1:] if x is not None)


def test_policy_equal_to_reference_gives_ln_2_whatever_the_weights():
    case = make_case()
    for kl in (None, "reverse", "forward"):
        output = tisdpo.linear_tis_dpo_loss(
            case.hidden,
            case.weight,
            case.target,
            case.cu_seqlens,
            token_weights=case.token_weights,
            ref_hidden=case.hidden,
            ref_weight=case.weight,
            objective=Objective(kl=kl),
        )
        assert abs(output.loss - math.log(2)) < 1e-15
        assert (output.chosen_rewards == 0).all()


def test_scaling_the_weights_is_scaling_beta():
    case = make_case()
    args = dict(ref_hidden=case.ref_hidden, ref_weight=case.ref_weight)
    a = tisdpo.linear_tis_dpo_loss(
        case.hidden,
        case.weight,
        case.target,
        case.cu_seqlens,
        token_weights=3 * case.token_weights,
        objective=Objective(kl="reverse"),
        **args,
    )
    b = tisdpo.linear_tis_dpo_loss(
        case.hidden,
        case.weight,
        case.target,
        case.cu_seqlens,
        token_weights=case.token_weights,
        objective=Objective(kl="reverse", beta=0.3),
        **args,
    )
    torch.testing.assert_close(a.loss, b.loss, rtol=1e-13, atol=0)


def test_precomputed_reference_equals_the_online_one():
    case = make_case(ignored=(2,))
    ref = tisdpo.linear_token_logps(case.ref_hidden, case.ref_weight, case.target).logps
    outputs = []
    for kwargs in (dict(ref_logps=ref), dict(ref_hidden=case.ref_hidden, ref_weight=case.ref_weight)):
        for plan in ("one_pass", "two_pass"):
            hidden = case.hidden.clone().requires_grad_()
            loss = tisdpo.linear_tis_dpo_loss(hidden, case.weight, case.target, case.cu_seqlens, plan=plan, **kwargs).loss
            loss.backward()
            outputs.append((loss.detach(), hidden.grad))
    for loss, grad in outputs[1:]:
        torch.testing.assert_close(loss, outputs[0][0], rtol=1e-13, atol=0)
        torch.testing.assert_close(grad, outputs[0][1], rtol=1e-12, atol=1e-15)


def test_a_second_backward_gives_the_same_and_a_second_derivative_raises():
    case = make_case()
    hidden = case.hidden.clone().requires_grad_()
    loss = tisdpo.linear_tis_dpo_loss(
        hidden, case.weight, case.target, case.cu_seqlens, ref_hidden=case.ref_hidden, ref_weight=case.ref_weight
    ).loss
    first = torch.autograd.grad(loss, hidden, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(loss, hidden, retain_graph=True)[0])
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(loss, hidden, create_graph=True)


def test_nothing_is_multiplied_for_gradients_under_no_grad(monkeypatch):
    case, needs = make_case(), []
    made = pairwise.GradientSums.__init__
    monkeypatch.setattr(pairwise.GradientSums, "__init__", lambda self, rows, n, *a, **k: needs.append(n) or made(self, rows, n, *a, **k))
    hidden = case.hidden.clone().requires_grad_()
    for on in (False, True):
        with torch.set_grad_enabled(on):
            output = tisdpo.linear_tis_dpo_loss(
                hidden, case.weight, case.target, case.cu_seqlens, ref_hidden=case.ref_hidden, ref_weight=case.ref_weight
            )
        assert output.loss.requires_grad == on
    assert needs == [(False, False, False), (True, False, False)]


def test_a_shared_frozen_head_has_one_bias():
    """ref_hidden without ref_weight is read through the policy's head, bias included."""
    case = make_case()
    other_bias = case.bias + torch.randn_like(case.bias)
    options = dict(bias=case.bias, ref_hidden=case.ref_hidden, objective=Objective(kl="reverse"))
    args = (case.hidden.clone().requires_grad_(), case.weight, case.target, case.cu_seqlens)
    for plan in ("one_pass", "two_pass"):
        shared = tisdpo.linear_tis_dpo_loss(*args, plan=plan, **options)
        named = tisdpo.linear_tis_dpo_loss(*args, plan=plan, ref_weight=case.weight, ref_bias=case.bias, **options)
        other = tisdpo.linear_tis_dpo_loss(*args, plan=plan, ref_weight=case.weight, ref_bias=other_bias, **options)
        torch.testing.assert_close(shared.losses, named.losses)
        assert not torch.allclose(shared.losses, other.losses)


@pytest.mark.parametrize("bias", [False, True])
def test_log_probs_of_the_reference_may_have_any_format(bias):
    """float64 from NumPy beside float32 hidden states: results have the dtype that is promised, whatever the backend."""
    case = make_case((9, 7, 8, 5), dtype=torch.float32)
    logps = torch.randn(len(case.target), dtype=torch.float64) - 5
    losses = []
    for backend_name in ("auto", "torch"):
        for plan in ("one_pass", "two_pass"):
            b = case.bias.clone().requires_grad_() if bias else None
            inputs = [case.hidden.clone().requires_grad_(), case.weight.clone().requires_grad_()]
            out = tisdpo.linear_tis_dpo_loss(
                *inputs, case.target, case.cu_seqlens, bias=b, ref_logps=logps, plan=plan, backend=backend_name
            )
            assert out.loss.dtype == out.logits.dtype == torch.float32
            out.loss.backward()
            losses.append(out.losses)
    for other in losses[1:]:
        torch.testing.assert_close(losses[0], other)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("backend_name", BACKENDS)
@pytest.mark.parametrize("plan", ["one_pass", "two_pass"])
def test_inside_of_gradient_checkpointing(plan, backend_name, reentrant):
    """The forward runs twice, and saved tensors can be had once."""
    case, grads = make_case((9, 7, 8, 5), dtype=torch.float32), []
    for checkpointed in (False, True):
        inputs = [case.hidden.clone().requires_grad_(), case.weight.clone().requires_grad_(), case.bias.clone().requires_grad_()]

        def loss(hidden, weight, bias):
            return tisdpo.linear_tis_dpo_loss(
                hidden * 1.0, weight, case.target, case.cu_seqlens, token_weights=case.token_weights, bias=bias, ref_hidden=case.ref_hidden,
                ref_weight=case.ref_weight, objective=Objective(kl="reverse"), plan=plan, backend=backend_name,
            ).loss  # fmt: skip

        total = torch.utils.checkpoint.checkpoint(loss, *inputs, use_reentrant=reentrant) if checkpointed else loss(*inputs)
        (1.7 * total).backward()
        grads.append([total.detach(), *(x.grad for x in inputs)])
    for a, b in zip(*grads):
        assert torch.equal(a, b)


def test_no_pairs_at_all():
    hidden = torch.zeros(0, 4, requires_grad=True)
    weight = torch.randn(7, 4, requires_grad=True)
    for plan in ("one_pass", "two_pass"):
        output = tisdpo.linear_tis_dpo_loss(
            hidden, weight, torch.zeros(0, dtype=torch.long), torch.zeros(1, dtype=torch.long), ref_logps=torch.zeros(0), plan=plan
        )
        output.loss.backward()
        assert output.loss == 0 and (weight.grad == 0).all()


def test_rerun_is_bitwise_equal():
    case = make_case((30, 50, 10, 70), H=32, V=501, dtype=torch.float32)
    results = [loss_and_gradients(case, Objective(kl="reverse"), {}, plan="one_pass") for _ in range(2)]
    assert torch.equal(results[0][0], results[1][0])
    assert all(torch.equal(a, b) for a, b in zip(results[0][1], results[1][1]))


@pytest.mark.parametrize("options", [dict(kl="reverse"), dict(loss="ipo"), dict(kl="forward", detach_chosen_kl=True)])
@pytest.mark.parametrize("shape", SHAPES)
def test_without_compaction(shape, options, monkeypatch):
    """What runs while a CUDA graph is captured: ignored rows are walked over instead of left out."""
    lengths, ignored = SHAPES[shape]
    case, results = make_case(lengths, ignored=ignored), []
    online = dict(ref_hidden=case.ref_hidden, ref_weight=case.ref_weight)
    reference = online if "kl" in options else dict(ref_logps=torch.randn(len(case.target), dtype=torch.float64))
    for capturing in (False, True):
        monkeypatch.setattr(loss_rows, "capturing", lambda capturing=capturing: capturing)
        inputs = [x.clone().requires_grad_() for x in (case.hidden, case.weight, case.bias)]
        out = tisdpo.linear_tis_dpo_loss(
            inputs[0], inputs[1], case.target, case.cu_seqlens, bias=inputs[2], token_weights=case.token_weights,
            objective=Objective(**options), **reference,
        )  # fmt: skip
        results.append([out.loss, out.logits, out.chosen_logps, *torch.autograd.grad(out.loss, inputs)])
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-13)


def test_a_graph_cannot_depend_on_how_many_rows_carry_loss(monkeypatch):
    case = make_case([3, 2], ignored=[1])
    hidden, weight = case.hidden.float().requires_grad_(), case.weight.float().requires_grad_()

    def logps(**options):
        return tisdpo.linear_token_logps(hidden, weight, case.target, **options).logps

    def nll(**options):
        return tisdpo.linear_nll_loss(hidden, weight, case.target, **options).loss

    def two_passes(**options):
        given = dict(ref_logps=torch.zeros(len(case.target)), plan="two_pass")
        return tisdpo.linear_tis_dpo_loss(hidden, weight, case.target, case.cu_seqlens, **given, **options).loss

    monkeypatch.setattr(loss_rows, "capturing", lambda: True)
    for compute in (logps, nll, two_passes):
        with pytest.raises(ValueError, match="while a CUDA graph is captured pass ignore_index=None: how many rows carry loss"):
            compute()
    case.target.clamp_(min=0)
    for compute in (logps, nll, two_passes):
        assert compute(ignore_index=None).isfinite().all()


@pytest.mark.parametrize("plan", ["one_pass", "two_pass"])
def test_a_forced_backend_is_the_only_one(plan, monkeypatch):
    from tisdpo.ops import cpp_fold

    for name in ("statistics", "gradient", "sequence_sums", "spread"):
        monkeypatch.setattr(cpp_fold, name, lambda *args, **options: pytest.fail("not torch's"))
    case = make_case(dtype=torch.float32)
    inputs = dict(token_weights=case.token_weights, ref_logps=torch.zeros(len(case.target)), backend="torch", plan=plan)
    tisdpo.linear_tis_dpo_loss(case.hidden.requires_grad_(), case.weight, case.target, case.cu_seqlens, **inputs).loss.backward()
    assert case.hidden.grad.isfinite().all()


def test_the_budget_can_be_set_and_must_be_a_number(monkeypatch):
    monkeypatch.setenv("TISDPO_CHUNK_MIB", "0.5")
    assert backend.chunk_rows(1024, 2, 4, "cpu") == 64
    for text in ("0", "-3", "much", "inf"):
        monkeypatch.setenv("TISDPO_CHUNK_MIB", text)
        with pytest.raises(ValueError, match=f"TISDPO_CHUNK_MIB must be a positive number of MiB of logits, got '{text}'"):
            backend.chunk_rows(1024, 2, 4, "cpu")


@pytest.mark.parametrize("part", ["Tiles", "GradientSums"])
def test_out_of_memory_names_the_budget(monkeypatch, part):
    def refuse(*args, **options):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    case = make_case()
    for module in (rows, pairwise, token_stats):
        if hasattr(module, part):
            monkeypatch.setattr(module, part, refuse)
    for plan in ("one_pass", "two_pass"):
        with pytest.raises(torch.OutOfMemoryError, match=r"lower the budget by TISDPO_CHUNK_MIB \(now 48 MiB .* CUDA out of memory"):
            loss_and_gradients(case, Objective(), {}, plan=plan)


def test_float16_gradients_are_scaled_before_they_are_rounded():
    """A GradScaler multiplies the loss so that small gradients survive float16; gradients formed in the forward would be gone by then."""
    case, results = make_case((9, 7, 8, 5), dtype=torch.float16), {}
    truth = [x.double().requires_grad_() for x in (case.hidden, case.weight)]
    zeros = torch.zeros(len(case.target))
    options = dict(ref_logps=zeros, normalizer=4e4)
    tisdpo.linear_tis_dpo_loss(*truth, case.target, case.cu_seqlens, **options).loss.backward()
    for scale in (1.0, 65536.0):
        inputs = [x.clone().requires_grad_() for x in (case.hidden, case.weight)]
        (tisdpo.linear_tis_dpo_loss(*inputs, case.target, case.cu_seqlens, **options).loss * scale).backward()
        results[scale] = [relative(x.grad.double() / scale, y.grad) for x, y in zip(inputs, truth)]
    assert max(results[65536.0]) < 2e-3 and max(results[1.0]) > 5 * max(results[65536.0])


def relative(x, truth):
    return ((x - truth).norm() / truth.norm()).item()


def test_bfloat16_gradients_are_multiplied_in_float32():
    """An upstream gradient of 1/3 must not be rounded to bfloat16 itself, which would make every gradient 0.2 % too large."""
    case = make_case((9, 7, 8, 5), H=64, dtype=torch.bfloat16)
    grads = []
    for g in (1.0, 1 / 3):
        weight = case.weight.clone().requires_grad_()
        loss = tisdpo.linear_tis_dpo_loss(case.hidden, weight, case.target, case.cu_seqlens, ref_logps=torch.zeros(29)).loss
        loss.backward(torch.tensor(g))
        grads.append(weight.grad.double())
    ratio = (grads[1] * grads[0]).sum() / (grads[0] ** 2).sum()
    assert abs(ratio * 3 - 1) < 5e-4


@pytest.mark.parametrize("upstream", [1.0, 2.0])
def test_gradients_after_any_upstream(upstream):
    """An upstream gradient of 1 leaves the gradients untouched, another scales them; with the graph kept, twice."""
    c = make_case()
    grads = []
    for scaled in (False, True):
        hidden, weight = c.hidden.clone().requires_grad_(), c.weight.clone().requires_grad_()
        loss = tisdpo.linear_tis_dpo_loss(hidden, weight, c.target, c.cu_seqlens, ref_logps=torch.full(c.target.shape, -2.0)).loss
        if scaled:
            loss.backward(torch.tensor(upstream, dtype=loss.dtype), retain_graph=True)
            loss.backward(torch.tensor(upstream, dtype=loss.dtype))
        else:
            loss.backward()
        grads.append((hidden.grad, weight.grad))
    for once, twice in zip(*grads):
        torch.testing.assert_close(twice, 2 * upstream * once)


@pytest.mark.parametrize("backend", ["auto", "torch", "triton"])
@pytest.mark.parametrize("plan", ["one_pass", "two_pass"])
@pytest.mark.parametrize("kl", [None, "reverse"])
def test_without_an_ignore_index_every_position_counts(backend, plan, kl):
    case = make_case((4, 7, 3, 6), dtype=torch.float32)

    def results(**options):
        policy = [x.clone().requires_grad_() for x in (case.hidden, case.weight)]
        output = tisdpo.linear_tis_dpo_loss(
            *policy, case.target, case.cu_seqlens, token_weights=case.token_weights, objective=Objective(kl=kl), plan=plan, backend=backend,
            ref_hidden=case.ref_hidden, ref_weight=case.ref_weight, **options,
        )  # fmt: skip
        return [*(x for x in output if x is not None), *torch.autograd.grad(output.loss, policy)]

    for x, y in zip(results(ignore_index=None), results(), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-6)
    case.target[3] = -100
    results()
    # few tokens by the Triton kernels are asserted as on a device: a RuntimeError here
    with pytest.raises((ValueError, RuntimeError), match="target"):
        results(ignore_index=None)


def test_without_an_ignore_index_wrong_boundaries_are_an_error():
    case = make_case((4, 7), dtype=torch.float32)
    for wrong in ([0, 4, 10], [0, 12, 11], [1, 4, 11]):
        with pytest.raises(ValueError, match="cu_seqlens must"):
            tisdpo.linear_tis_dpo_loss(
                case.hidden, case.weight, case.target, torch.tensor(wrong), ref_logps=torch.zeros(11), ignore_index=None
            )


def test_per_token_functions_without_an_ignore_index():
    case = make_case((4, 7), dtype=torch.float32)
    logits = case.hidden @ case.weight.T
    for function, inputs in ((tisdpo.token_logps, (logits,)), (tisdpo.linear_token_logps, (case.hidden, case.weight))):
        expected = function(*inputs, case.target).logps
        torch.testing.assert_close(function(*inputs, case.target, ignore_index=None).logps, expected, rtol=1e-6, atol=1e-6)
        with pytest.raises(ValueError, match=r"target must be in 0\.\.10, got -100 at position 2"):
            function(*inputs, case.target.index_fill(0, torch.tensor([2]), -100), ignore_index=None)


def test_rows_of_a_chunk_are_multiples_where_that_leaves_no_small_rest():
    sizes = lambda *args: [b - a for a, b in rows.row_ranges(*args)]  # noqa: E731
    assert sizes(0, 8192, 2092, 128) == [2048] * 4
    assert sizes(0, 7777, 2092, 128) == [2048, 2048, 2048, 1633]
    assert sizes(0, 257, 256, 128) == [129, 128]
    assert sizes(5, 105, 40) == [34, 34, 32]
    assert sizes(0, 0, 40, 128) == []
