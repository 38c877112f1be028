"""What is measured (sizes, steps, inputs) and who is measured (providers): every one of them gets the same tensors in the same process.

Sizes: P pairs, N completion tokens, H hidden, V vocabulary. A step is forward and backward of a loss from hidden states; the task of
most providers is TIS-DPO's loss with arbitrary token weights. A provider that computes less has another `task`, and its own truth.
Other steps are the parts that other trainers import: log-probs of the targets (`OPS`).
"""

import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import KW_ONLY, dataclass
from functools import cached_property, partial
from importlib import metadata
from itertools import pairwise

import torch
import torch.nn.functional as F
from packaging.version import Version
from torch import Tensor

import tisdpo
from tisdpo import Objective

IGNORED = -100  # target of a position that does not count


@dataclass(frozen=True)
class Size:
    """`masked` is the share of the N tokens that are ignored positions."""

    tokens: int = 1024
    hidden: int = 1024
    vocabulary: int = 32000
    pairs: int = 8
    masked: float = 0.0


SMOKE = Size(tokens=96, hidden=48, vocabulary=1003, pairs=3)

# The heads of real models: (hidden, vocabulary)
HEADS = {"Llama-3-8B": (4096, 128256), "Qwen2.5-3B": (2048, 151936), "Gemma-3-4B": (2560, 262208)}


@dataclass(frozen=True)
class Step:
    """What is computed: a loss step, or what `op` says in its place, a key of `OPS`.

    kl: None, "reverse" or "forward", the sequence KL; online: the reference's log-probs come from its hidden states (a KL term needs
    them anyway) instead of being at hand; frozen: the head gets no gradient.
    """

    kl: str | None = None
    frozen: bool = False
    online: bool = False
    op: str | None = None

    @property
    def reference_products(self) -> int:
        return int(self.online or self.kl is not None)

    @property
    def products(self) -> int:
        """Head-sized products that one pass needs: logits, dHidden; dWeight of a trainable head; logits of the reference."""
        if self.op in ("scores", "from logits"):
            return int(self.op == "scores")
        return 2 + (not self.frozen) + self.reference_products

    @property
    def name(self) -> str:
        if self.op is not None:
            return OPS[self.op] + (", frozen head" if self.frozen else "")
        names = {None: "online reference" if self.online else "no KL", "reverse": "KL, online reference"}
        return names.get(self.kl, f"{self.kl} KL, online reference") + (", frozen head" if self.frozen else "")


# Log-probs of the targets, one a token
OPS = {
    "scores": "log-probs of hidden states, no gradients",
    "log-probs": "log-probs of hidden states, any gradient a token",
    "nll": "cross-entropy with a factor a token, known beforehand",
    "from logits": "log-probs of logits, any gradient a token",
}

MODES = [Step(), Step(frozen=True), Step(kl="reverse"), Step(kl="reverse", frozen=True)]
ALL_MODES = [*MODES, Step(kl="forward"), Step(online=True), Step(kl="forward", frozen=True), Step(online=True, frozen=True)]
OP_STEPS = [*(Step(op=op) for op in OPS), Step(op="log-probs", frozen=True)]


OF_TOKENS = ("hidden", "ref_hidden", "target", "token_weights", "ref_logps", "logits")  # what a problem has of every token


class Problem:
    """Inputs of one size: flat pairs of unequal lengths, random weights, a reference close to the policy."""

    def __init__(self, size: Size, dtype: torch.dtype = torch.float32, device: str = "cpu"):
        g = torch.Generator(device).manual_seed(0)

        def normal(*shape: int, std: float = 1.0) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=device).normal_(0, std, generator=g)

        N, H, V = size.tokens, size.hidden, size.vocabulary
        self.size = size
        self.hidden, self.weight = normal(N, H), normal(V, H, std=H**-0.5)
        self.ref_hidden, self.ref_weight = normal(N, H).mul_(0.1).add_(self.hidden), normal(V, H, std=0.1 * H**-0.5).add_(self.weight)
        self.target = torch.randint(V, (N,), generator=g, device=device)
        if size.masked:
            self.target[torch.randperm(N, generator=g, device=device)[: round(size.masked * N)]] = IGNORED
        self.token_weights = torch.rand(N, generator=g, device=device).mul_(1.5).add_(0.5)
        self.ref_logps = torch.full((N,), -8.0, device=device)
        cuts = torch.randperm(N - 1, generator=g, device=device)[: 2 * size.pairs - 1].add_(1).sort().values
        self.cu_seqlens = torch.cat([cuts.new_zeros(1), cuts, cuts.new_tensor([N])])
        self.cu_seqlens_on_cpu = self.cu_seqlens.cpu()  # as a collator has them
        if dtype == torch.float64:
            self.token_weights, self.ref_logps = self.token_weights.double(), self.ref_logps.double()

    @cached_property
    def logits(self) -> Tensor:
        """hidden @ weight.T [N, V]: the input of log-probs from logits, made when asked for."""
        with torch.no_grad():
            return self.hidden @ self.weight.T

    def double(self) -> "Problem":
        """The same inputs in float64."""
        other = object.__new__(Problem)
        other.__dict__ = {
            name: x.detach().double() if isinstance(x, Tensor) and x.is_floating_point() else x for name, x in vars(self).items()
        }
        return other

    def pair_by_pair(self) -> Iterator["Problem"]:
        """A problem of every pair, on the same head."""
        bounds = self.cu_seqlens_on_cpu.tolist()[::2]
        for i, (a, b) in enumerate(pairwise(bounds)):
            pair = object.__new__(Problem)
            pair.__dict__ = {name: x[a:b] if name in OF_TOKENS else x for name, x in vars(self).items()}
            pair.cu_seqlens = self.cu_seqlens[2 * i : 2 * i + 3] - a
            yield pair

    def truth(self, task: str, step: Step) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """What `run` gives for a task, computed by plain torch in float64, pair by pair: all logits would take gigabytes."""
        values, gradients, weight = [], [], 0.0
        for pair in self.double().pair_by_pair():
            tokens = len(pair.target)
            share = tokens / self.size.tokens if task == "mean cross-entropy" else 1 / self.size.pairs if step.op is None else 1.0
            value, gradient, d_weight = pair.run(TASKS[task], step)
            values.append(share * value)
            gradients.append(None if gradient is None else share * gradient)
            weight = None if d_weight is None else d_weight.mul_(share).add_(weight)
        total = torch.cat(values) if values[0].dim() else torch.stack(values).sum()
        return total, None if gradients[0] is None else torch.cat(gradients), weight

    def forget(self) -> None:
        """Free the gradients of the last run."""
        for name in ("hidden", "weight", "logits"):
            if name in vars(self):
                vars(self)[name].grad = None

    def run(self, loss: Callable[["Problem", Step], Tensor], step: Step) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Forward and backward: (loss, dHidden or dLogits, dWeight or None); of scores the log-probs alone."""
        self.forget()
        if step.op == "scores":
            with torch.no_grad():
                return loss(self, step), None, None
        x = self.logits if step.op == "from logits" else self.hidden
        x.requires_grad_(True)
        self.weight.requires_grad_(not (step.frozen or step.op == "from logits"))
        total = loss(self, step)
        total.backward()
        return total.detach(), x.grad, self.weight.grad

    @torch.no_grad()
    def products(self, step: Step, z: Tensor, out: tuple[Tensor, Tensor]) -> None:
        """The head-sized products of the step and nothing else, from logits a copy of these; z [N, V] and the gradients' memory are there
        already."""
        if step.op == "from logits":
            z.copy_(self.logits)
            return
        torch.mm(self.hidden, self.weight.T, out=z)
        if step.op == "scores":
            return
        if step.reference_products:
            torch.mm(self.ref_hidden, self.ref_weight.T, out=z)
        torch.mm(z, self.weight, out=out[0])
        if not step.frozen:
            torch.mm(z.T, self.hidden, out=out[1])


def objective(step: Step) -> Objective:
    return Objective(kl=step.kl)


# Ways to compute the loss: (problem, step) -> scalar


def fused(p: Problem, step: Step, plan: str = "one_pass", backend: str = "auto") -> Tensor:
    """This library, called as its trainer does; with masked tokens, as somebody who has not taken them out."""
    online = dict(ref_hidden=p.ref_hidden, ref_weight=p.ref_weight)
    reference = online if step.reference_products else dict(ref_logps=p.ref_logps)
    return tisdpo.linear_tis_dpo_loss(
        p.hidden, p.weight, p.target, p.cu_seqlens_on_cpu, token_weights=p.token_weights, objective=objective(step), plan=plan,
        backend=backend, ignore_index=IGNORED if p.size.masked else None, **reference,
    ).loss  # fmt: skip


def fused_in_one_chunk(p: Problem, step: Step) -> Tensor:
    """This library with room for all logits at once: what its chunks cost in time."""
    before = os.environ.get("TISDPO_CHUNK_MIB")
    os.environ["TISDPO_CHUNK_MIB"] = str(1 << 30)
    try:
        return fused(p, step)
    finally:
        os.environ.pop("TISDPO_CHUNK_MIB") if before is None else os.environ.update(TISDPO_CHUNK_MIB=before)


def plain(p: Problem, step: Step, upcast: bool = False, weighted: bool = True) -> Tensor:
    """What a careful user writes: every log-softmax once, the reference under no_grad; `upcast`: logits widened to float32 first.

    Ignored positions are projected with the others and masked afterwards.
    """
    widen = (lambda z: z.float()) if upcast else (lambda z: z)
    logp = widen(p.hidden @ p.weight.T).log_softmax(-1)
    ref_logps, divergence = p.ref_logps, None
    if step.reference_products:
        with torch.no_grad():
            ref_logp = widen(p.ref_hidden @ p.ref_weight.T).log_softmax(-1)
            ref_logps = _at_target(ref_logp, p)
    if step.kl is not None:
        first, second = (logp, ref_logp) if step.kl == "reverse" else (ref_logp, logp)
        divergence = (first.exp() * (first - second)).sum(-1)
        divergence = divergence if not p.size.masked else divergence.where(p.target != IGNORED, 0.0)
    return _loss(p, step, _at_target(logp, p), ref_logps, divergence, weighted)


def plain_logps(logits: Tensor, target: Tensor, upcast: bool = False) -> Tensor:
    return (logits.float() if upcast else logits).log_softmax(-1).gather(-1, target[:, None])[:, 0]


def _at_target(logp: Tensor, p: Problem) -> Tensor:
    if not p.size.masked:
        return logp.gather(-1, p.target[:, None])[:, 0]
    return logp.gather(-1, p.target.clamp(min=0)[:, None])[:, 0].where(p.target != IGNORED, 0.0)


def _loss(p: Problem, step: Step, logps: Tensor, ref_logps: Tensor, divergence: Tensor | None = None, weighted: bool = True) -> Tensor:
    weights = p.token_weights if weighted else torch.ones_like(p.token_weights)
    if p.size.masked:
        ref_logps = ref_logps.where(p.target != IGNORED, 0.0)
    return tisdpo.tis_dpo_loss(logps, ref_logps, p.cu_seqlens, token_weights=weights, kl=divergence, objective=objective(step)).loss


def per_token(p: Problem, step: Step, logps: Callable[[Tensor, Tensor, Tensor], Tensor], divergence: Callable | None = None) -> Tensor:
    """A library's per-token log-probs (and KL, where it has one) with this library's loss on top."""
    ref_logps = p.ref_logps
    if step.reference_products:
        with torch.no_grad():
            ref_logps = logps(p.ref_hidden, p.ref_weight, p.target)
    kl = None if step.kl is None else divergence(p, step)
    return _loss(p, step, logps(p.hidden, p.weight, p.target), ref_logps, kl)


_compiled = {}


def forget_compiled() -> None:
    """Start torch.compile afresh: after eight shapes of one function it would silently run the rest uncompiled."""
    torch._dynamo.reset()
    _compiled.clear()


def compiled(p: Problem, step: Step, upcast: bool) -> Tensor:
    """`plain` under torch.compile, one graph for every kind of step."""
    if (step, upcast) not in _compiled:
        _compiled[step, upcast] = torch.compile(partial(_compiled_body, size=p.size, step=step, upcast=upcast), dynamic=False)
    return _compiled[step, upcast](p.hidden, p.weight, p.ref_hidden, p.ref_weight, p.target, p.token_weights, p.ref_logps, p.cu_seqlens)


def _compiled_body(hidden, weight, ref_hidden, ref_weight, target, token_weights, ref_logps, cu_seqlens, size, step, upcast):
    p = object.__new__(Problem)
    p.hidden, p.weight, p.ref_hidden, p.ref_weight, p.target = hidden, weight, ref_hidden, ref_weight, target
    p.token_weights, p.ref_logps, p.cu_seqlens, p.size = token_weights, ref_logps, cu_seqlens, size
    return plain(p, step, upcast)


def compiled_logps(logits: Tensor, target: Tensor, upcast: bool) -> Tensor:
    key = ("logps", upcast)
    if key not in _compiled:
        _compiled[key] = torch.compile(partial(plain_logps, upcast=upcast), dynamic=False)
    return _compiled[key](logits, target)


def _torch_linear_cross_entropy(hidden, weight, target, options=None):
    options = torch.nn.LinearCrossEntropyOptions(**(options or {}))
    return -F.linear_cross_entropy(hidden, weight, target, reduction="none", options=options)


_one_chunk = partial(_torch_linear_cross_entropy, options={"chunking_method": None})


def _trl_logps(hidden, weight, target):
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    columns = 8192 if hidden.device.type == "cpu" else 32768  # the fastest of five, NOTES.md; else TRL's own
    return ChunkedLogProbFunction.apply(hidden, weight, None, target, 1.0, columns, None, 1.0, ())[0]


def _trl_logps_of_logits(logits, target):
    from trl.trainer.utils import selective_log_softmax

    return selective_log_softmax(logits, target)


def _trl_divergence(p: Problem, step: Step) -> Tensor:
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    direction = {"reverse": 1.0, "forward": 0.0}[step.kl]
    return ChunkedDivergenceFunction.apply(p.hidden, p.weight, None, p.ref_hidden, p.ref_weight, None, direction)[0]


def _liger_logps(hidden, weight, target):
    from liger_kernel.ops.fused_linear_scaled_cross_entropy import LigerFusedLinearScaledCrossEntropyFunction

    return -LigerFusedLinearScaledCrossEntropyFunction.apply(hidden, weight, target)


def _liger_dpo(p: Problem, step: Step) -> Tensor:
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

    def batch(x: Tensor, fill: float) -> Tensor:  # [2P, T, ...]: chosen rows first, padded
        rows = x.split(p.cu_seqlens.diff().tolist())
        return torch.nn.utils.rnn.pad_sequence([*rows[0::2], *rows[1::2]], batch_first=True, padding_value=fill)

    pairs = max(1, p.size.pairs // 2) if p.hidden.device.type == "cpu" else 1  # the fastest of four, NOTES.md; else Liger's default
    loss = LigerFusedLinearDPOLoss(beta=objective(step).beta, use_ref_model=True, chunk_size=pairs)
    return loss(p.weight, batch(p.hidden, 0.0), batch(p.target, IGNORED), None, batch(p.ref_hidden, 0.0), p.ref_weight)[0]


def _cce_logps(hidden, weight, target):
    from cut_cross_entropy import linear_cross_entropy

    return -linear_cross_entropy(hidden, weight, target, reduction="none", filter_eps=None)  # exact: no gradient is filtered away


def _quack(p: Problem, step: Step) -> Tensor:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return chunked_linear_cross_entropy(p.hidden, p.weight, p.target)


def _cross_entropy(p: Problem, step: Step) -> Tensor:
    return F.cross_entropy(p.hidden @ p.weight.T, p.target)


@dataclass(frozen=True)
class Provider:
    """Somebody who computes the step.

    loss: of (problem, step); logps: log-probs [N] of (hidden, weight, target), and of_logits those of (logits, target), for the steps of
    `OPS`; weighted: their sum with a factor each, of (hidden, weight, target, factors), where that is another function; package: what must
    be importable; devices: where it runs; task: a key of `TASKS`; modes: the loss steps it can compute (None: all); masked: whether it
    takes ignored positions; note: what a reader should know.
    """

    name: str
    loss: Callable[[Problem, Step], Tensor] | None = None
    logps: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None
    of_logits: Callable[[Tensor, Tensor], Tensor] | None = None
    _: KW_ONLY
    weighted: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor] | None = None
    package: str = "torch"
    devices: tuple[str, ...] = ("cpu", "cuda", "xpu")
    task: str = "TIS-DPO"
    kl: bool = True
    modes: tuple[Step, ...] | None = None
    masked: bool = False
    note: str = ""

    def __call__(self, p: Problem, step: Step) -> Tensor:
        """Its loss [], or with an `op` the sum of its log-probs times a number a token; of scores the log-probs [N]."""
        compute = self.function(step)
        if step.op is None:
            return compute(p, step)
        if step.op == "nll" and self.weighted is not None:
            return self.weighted(p.hidden, p.weight, p.target, p.token_weights)
        logps = compute(p.logits, p.target) if step.op == "from logits" else compute(p.hidden, p.weight, p.target)
        return logps if step.op == "scores" else (logps * p.token_weights).sum()

    def function(self, step: Step) -> Callable | None:
        """What it computes such a step with, or None where it has nothing for it."""
        if step.op is None:
            return self.loss
        return self.of_logits if step.op == "from logits" else self.logps

    def missing(self, device: str, step: Step | None = None, size: Size | None = None) -> str:
        """Why it does not take part, or ""."""
        if importlib.util.find_spec(self.package) is None:
            return f"{self.package} is not installed"
        if device not in self.devices:
            return f"does not run on {device}"
        if self.name.startswith("F.linear_cross_entropy") and not hasattr(torch.nn, "LinearCrossEntropyOptions"):
            return f"torch {torch.__version__} does not have it"
        if self.name == "TRL chunked" and Version(metadata.version("trl")) < Version("1.15"):
            return f"{self.version} does not have it"
        if step is not None and self.function(step) is None:
            return "has no such function"
        if step is not None and step.kl is not None and not self.kl:
            return "has no KL"
        if step is not None and step.op is None and self.modes is not None and step not in self.modes:
            return "takes part only in steps with " + " or ".join(mode.name for mode in self.modes)
        if size is not None and size.masked and not (self.masked and step is not None and step.op is None):
            return "not measured with masked tokens"
        return ""

    @property
    def version(self) -> str:
        if self.package == "tisdpo":  # which may run from a checkout
            return f"tisdpo {tisdpo.__version__}"
        names = metadata.packages_distributions().get(self.package, [self.package])
        return f"{names[0]} {metadata.version(names[0])}"


def _ours(hidden, weight, target):
    return tisdpo.linear_token_logps(hidden, weight, target, ignore_index=None).logps


def _ours_weighted(hidden, weight, target, factors):
    return -tisdpo.linear_nll_loss(hidden, weight, target, token_weights=factors, normalizer=1.0, ignore_index=None).loss


def _ours_of_logits(logits, target):
    return tisdpo.token_logps(logits, target, ignore_index=None).logps


def _with_logits(of_logits: Callable[[Tensor, Tensor], Tensor]) -> dict[str, Callable]:
    """Log-probs of hidden states by those of all their logits."""
    return {"logps": lambda hidden, weight, target: of_logits(hidden @ weight.T, target), "of_logits": of_logits}


def _torch_cross_entropy(logits, target):
    return -F.cross_entropy(logits, target, reduction="none")


def _liger_logps_of_logits(logits, target):
    from liger_kernel.ops.cross_entropy import LigerCrossEntropyFunction

    # its gradient is written over its input, in the forward: a copy, for these logits serve everybody
    return -LigerCrossEntropyFunction.apply(logits.clone(), target, None, IGNORED, 0.0, 0.0, "none", None, False)[0]


GPU = ("cuda",)
OURS, OUR_OPS = "tisdpo one pass", "tisdpo log-probs"
PLAIN = Provider("plain torch", plain, masked=True, note="log-softmax in the dtype of the model", **_with_logits(plain_logps))
PROVIDERS = [
    Provider(OURS, fused, package="tisdpo", masked=True),
    Provider("tisdpo one pass, one chunk", fused_in_one_chunk, package="tisdpo", masked=True, note="TISDPO_CHUNK_MIB without limit"),
    Provider("tisdpo two passes", partial(fused, plan="two_pass"), package="tisdpo", masked=True),
    Provider("tisdpo one pass, torch folds", partial(fused, backend="torch"), package="tisdpo", masked=True),
    Provider(OUR_OPS, logps=_ours, of_logits=_ours_of_logits, weighted=_ours_weighted, package="tisdpo"),
    PLAIN,
    Provider(
        "plain torch, float32 logits", partial(plain, upcast=True), masked=True, **_with_logits(partial(plain_logps, upcast=True))
    ),
    Provider("torch.compile", partial(compiled, upcast=False), **_with_logits(partial(compiled_logps, upcast=False))),
    Provider("torch.compile, float32 logits", partial(compiled, upcast=True), **_with_logits(partial(compiled_logps, upcast=True))),
    Provider("F.cross_entropy", **_with_logits(_torch_cross_entropy)),
    Provider(
        "F.linear_cross_entropy", partial(per_token, logps=_torch_linear_cross_entropy), _torch_linear_cross_entropy, kl=False,
        note="the release's own chunks",
    ),
    Provider("F.linear_cross_entropy, one chunk", partial(per_token, logps=_one_chunk), _one_chunk, kl=False),
    Provider(
        "TRL chunked", partial(per_token, logps=_trl_logps, divergence=_trl_divergence), _trl_logps, package="trl",
        note="log-probs and KL composed",
    ),
    Provider("TRL selective_log_softmax", package="trl", **_with_logits(_trl_logps_of_logits)),
    Provider("Liger scaled CE", partial(per_token, logps=_liger_logps), _liger_logps, package="liger_kernel", devices=GPU, kl=False),
    Provider("Liger CE", of_logits=_liger_logps_of_logits, package="liger_kernel", devices=GPU, note="on a copy: it overwrites its input"),
    Provider(
        "Liger DPO", _liger_dpo, package="liger_kernel", task="DPO", modes=(Step(online=True), Step(online=True, frozen=True)),
        note="no token weights, padded batch",
    ),
    Provider(
        "Cut Cross-Entropy, exact", partial(per_token, logps=_cce_logps), _cce_logps, package="cut_cross_entropy", devices=GPU, kl=False
    ),
    Provider(
        "quack", _quack, package="quack", devices=GPU, task="mean cross-entropy", modes=(Step(),),
        note="one scalar: no token weights, no pairs",
    ),
]  # fmt: skip

# What a provider computes, and how plain torch computes the same
TASKS = {
    "TIS-DPO": PLAIN,
    "DPO": Provider("DPO", partial(plain, weighted=False)),
    "mean cross-entropy": Provider("mean cross-entropy", _cross_entropy),
}


def relative_error(x: Tensor, truth: Tensor) -> float:
    """|x - truth| / |truth| in the Euclidean norm."""
    return ((x.double() - truth.double()).norm() / truth.double().norm()).item()


def versions() -> dict[str, str]:
    """Versions of everything that takes part."""
    packages = dict.fromkeys(p.package for p in PROVIDERS)
    found = {"python": sys.version.split()[0], "tisdpo": tisdpo.__version__}
    for package in (*packages, "triton"):
        if package != "tisdpo" and importlib.util.find_spec(package) is not None:
            name = metadata.packages_distributions().get(package, [package])[0]
            found[package] = metadata.version(name)
    return found
