"""What a training run needs of a GPU's memory, from the model's configuration alone: the numbers of `tisdpo plan`.

Parameters are counted exactly, on the model built without memory (torch's meta device); gradients and the optimiser's state follow from
their shapes. The rest is one peak: activations, and on top of them either the head or the backward of one layer.

Activations, in bytes, for n = S T tokens of S sequences (padded to T), hidden H, intermediate I, A = heads x head_dim, K = key-value heads
x head_dim (A where a padding mask makes torch repeat them), b bytes a number. What autograd saves of one Llama-like layer:

    two norms           2 n (4 H + 4 + 2 b H)    the input in float32, 1/rms, the normalised input in b, the output for the next linears
    attention           n b (2 A + 2 K)          q, k (rotated), v, and the output, which the last linear saves as well
                        + 4 n heads              the log-sum-exp of the flash or memory-efficient kernel; no T x T matrix
                        + b S T^2                the mask as numbers, made in every layer, with padding ("sdpa"); "flash" has none
    gated MLP           4 n b I                  gate, its activation, up, their product

With LoRA on every linear but the head the base is frozen: the norms save no normalised input, and the linears save what goes into their
A matrix: the same tensors for a float32 base, copies in float32 for a 16-bit one (PEFT keeps adapters in float32), and 4 n rank each.
Gradient checkpointing keeps n b H a layer, and one layer at a time as above. The backward of a layer
holds 2 n b I of its own, less 2 n b H that it has freed by then (measured); with LoRA on a 16-bit base 8 n (I + H).
Layers of another kind (no gate, state spaces, experts) are counted as if they were Llama's, with the experts of one token for I.

Head, for N = n completion tokens at most: the logits of one chunk in float32 (`tisdpo.ops.pairwise`, for policy and, with KL, reference),
where the head is trained its gradient (16 bits: with D that waits [max(N, H), V], N <= 2 H, on a GPU [max(N + H / 8, H), V], or [V, H] for
one chunk; else a float32 [V, H], which a 16-bit gradient is a part of), [N, H] three to five times. On an H100 or H200 a bfloat16 head
without KL needs less: no logits (`tisdpo.kernels.head`).

Not counted: fragmentation, buckets of ZeRO, quantised bases, autocast (which keeps float32 weights and casts them at every use).
"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch

from tisdpo.errors import InputError
from tisdpo.ops import backend, products
from tisdpo.ops.pairwise import PARTS, buffer_rows
from tisdpo.ops.rows import HIDDEN_ROWS

GIB = 1 << 30
RESERVE = GIB  # CUDA's context and its libraries' workspaces: an assumption

DTYPES = {"bfloat16": 2, "float16": 2, "float32": 4}
OPTIMIZERS = ("adamw", "adamw_8bit", "adafactor", "sgd")
SHARDINGS = ("ddp", "zero2", "zero3", "fsdp2")
REFERENCES = ("resident", "precomputed", "cached-hidden")
ATTENTIONS = ("sdpa", "flash")

# Published configurations for people without a network, by the name of the model; anything else is a directory, a config.json or a hub id.
_FIELDS = (
    "model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "tie_word_embeddings",
)  # fmt: skip
_PUBLISHED = {
    "Llama-3-8B": ("llama", 128256, 4096, 14336, 32, 32, 8, False),
    "Llama-3-70B": ("llama", 128256, 8192, 28672, 80, 64, 8, False),
    "Llama-3.2-1B": ("llama", 128256, 2048, 8192, 16, 32, 8, True),
    "Mistral-7B-v0.3": ("mistral", 32768, 4096, 14336, 32, 32, 8, False),
    "Qwen2.5-0.5B": ("qwen2", 151936, 896, 4864, 24, 14, 2, True),
    "Qwen2.5-3B": ("qwen2", 151936, 2048, 11008, 36, 16, 2, True),
    "Qwen2.5-7B": ("qwen2", 152064, 3584, 18944, 28, 28, 4, False),
}
KNOWN = {name: dict(zip(_FIELDS, values)) for name, values in _PUBLISHED.items()}


@dataclass(frozen=True)
class Plan:
    """How the model is trained.

    gpus            that share the work by `sharding`: "ddp" divides nothing and adds its buckets, "zero2" divides gradients and optimiser,
                    "zero3" and "fsdp2" also the weights
    seq_len         tokens of every sequence, prompt and completion; all of them count as completion (the head's worst case)
    pairs_per_gpu   pairs of one micro-batch
    lora            rank of adapters on every linear layer but the head; None trains everything
    kl              the sequence KL term, which needs the reference's distribution
    dtype           of the weights; DeepSpeed (zero2, zero3) adds float32 master weights to 16-bit ones
    optimizer       "adamw" (fused), "adamw_8bit" (bitsandbytes), "adafactor", "sgd"
    attention       "sdpa" on padded batches, or "flash" (flash-attn, padding-free)
    reference       "resident" (a whole copy on every GPU; none with LoRA), "precomputed" (log-probs in the rows), "cached-hidden" (its last
                    hidden states in the rows, its head on the GPU); None: "resident" with the KL term, else "precomputed"
    device          whose chunk budget the head follows: "cuda" or "cpu"
    """

    gpus: int = 1
    seq_len: int = 4096
    pairs_per_gpu: int = 1
    lora: int | None = None
    kl: bool = False
    dtype: str = "bfloat16"
    optimizer: str = "adamw"
    sharding: str = "ddp"
    gradient_checkpointing: bool = True
    attention: str = "sdpa"
    reference: str | None = None
    device: str = "cuda"

    def __post_init__(self):
        for name in ("gpus", "seq_len", "pairs_per_gpu", "lora"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name} must be at least 1, got {value}")
        choices = {"dtype": DTYPES, "optimizer": OPTIMIZERS, "sharding": SHARDINGS, "attention": ATTENTIONS, "reference": REFERENCES}
        for name, known in choices.items():
            value = getattr(self, name)
            if value is not None and value not in known:
                raise InputError(f"{name} must be one of {', '.join(known)}, got {value!r}")
        if self.reference is None:
            object.__setattr__(self, "reference", "resident" if self.kl else "precomputed")
        if self.kl and self.reference == "precomputed":
            raise InputError(
                "the KL term needs the reference's distribution, not only its log-probs; use reference 'resident' or 'cached-hidden'"
            )

    @property
    def itemsize(self) -> int:
        return DTYPES[self.dtype]

    @property
    def tokens(self) -> int:
        """Tokens of a micro-batch on one GPU."""
        return 2 * self.pairs_per_gpu * self.seq_len


@dataclass(frozen=True)
class Shape:
    """What the estimate needs to know of a model. `parameters`: shapes of all of them, tied ones once; `linears`: (in, out) of those that
    LoRA adapts; `layer`, `root`: parameters of the largest layer, and of everything outside of the layers."""

    parameters: tuple[tuple[int, ...], ...]
    linears: tuple[tuple[int, int], ...]
    layers: int
    layer: int
    root: int
    vocabulary: int
    hidden: int
    intermediate: int
    heads: int
    query: int
    key_value: int

    @property
    def count(self) -> int:
        return sum(map(math.prod, self.parameters))

    def adapters(self, rank: int) -> tuple[tuple[int, ...], ...]:
        """Shapes of LoRA's matrices A [rank, in] and B [out, rank]."""
        return tuple(shape for n, m in self.linears for shape in ((rank, n), (m, rank)))


@dataclass(frozen=True)
class Estimate:
    """Bytes on one GPU, by part. `total` is their sum: activations and, on top of them, the larger one of head and layer."""

    weights: int
    gradients: int
    optimizer: int
    reference: int
    gathered: int
    activations: int
    head: int
    layer: int
    reserve: int

    @property
    def total(self) -> int:
        return sum(getattr(self, f.name) for f in fields(self)) - min(self.head, self.layer)


# The model


def load_config(model: str):
    """Configuration of a name in KNOWN, a directory, a JSON file or a hub id; InputError where there is none."""
    from transformers import AutoConfig

    path = Path(model)
    try:
        if model in KNOWN:
            return AutoConfig.for_model(**KNOWN[model])
        file = path / "config.json" if path.is_dir() else path
        if file.is_file() or path.is_dir():
            values = json.loads(file.read_text())
            return AutoConfig.for_model(values.pop("model_type"), **values)
        return AutoConfig.from_pretrained(model, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}".rstrip(": ")
        raise InputError(
            f"no configuration could be read from {model!r} ({reason}); give a directory with a config.json, such a file, or one of "
            f"{', '.join(KNOWN)}"
        ) from error


def shape_of(config) -> Shape:
    """Sizes of a causal language model, counted on the model itself, built without memory."""
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except ValueError as error:
        raise InputError(f"{type(config).__name__} is no causal language model that transformers can build ({error})") from error
    return shape_of_model(model)


def shape_of_model(model) -> Shape:
    """Sizes of this model; InputError where it keeps them under names that are not known here."""
    text = model.config.get_text_config()
    for name in ("hidden_size", "num_attention_heads", "num_hidden_layers", "intermediate_size"):
        if not isinstance(getattr(text, name, None), int):
            raise InputError(f"the activations of {type(model).__name__} cannot be estimated: its configuration has no {name}")
    heads, output = text.num_attention_heads, model.get_output_embeddings()
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
    intermediate = text.intermediate_size
    if getattr(text, "num_experts_per_tok", None):
        intermediate = (getattr(text, "moe_intermediate_size", None) or intermediate) * text.num_experts_per_tok
    parameters = {id(p): p for p in model.parameters()}
    layers = [m for m in model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == text.num_hidden_layers]
    sizes = [sum(p.numel() for p in layer.parameters()) for layer in (layers[0] if layers else [])]
    count = sum(p.numel() for p in parameters.values())
    return Shape(
        parameters=tuple(tuple(p.shape) for p in parameters.values()),
        linears=tuple((m.in_features, m.out_features) for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not output),
        layers=text.num_hidden_layers,
        layer=max(sizes, default=count),
        root=count - sum(sizes),
        vocabulary=len(output.weight),
        hidden=text.hidden_size,
        intermediate=intermediate,
        heads=heads,
        query=heads * head_dim,
        key_value=(getattr(text, "num_key_value_heads", None) or heads) * head_dim,
    )


# The parts


def estimate(shape: Shape, plan: Plan) -> Estimate:
    """Memory of one GPU, bytes: an upper bound for a step with gradients of an earlier micro-batch already there."""
    trained = shape.parameters if plan.lora is None else shape.adapters(plan.lora)
    size = plan.itemsize if plan.lora is None else 4  # PEFT keeps adapters in float32
    count, base = sum(map(math.prod, trained)), shape.count * plan.itemsize
    weights = base + (0 if plan.lora is None else count * size)
    gradients = count * size
    optimizer = sum(optimizer_bytes(p, size, plan) for p in trained)
    gathered = 0
    n = plan.gpus
    if n > 1 and plan.sharding == "ddp":
        gathered = gradients  # the buckets of the all-reduce, beside the gradients themselves
    if n > 1 and plan.sharding != "ddp":
        gradients, optimizer = -(-gradients // n), -(-optimizer // n)
        if plan.sharding != "zero2":
            # a layer and the next one on its way, what is outside of the layers (embedding and head), and the whole gradient of both
            copies = 1 if plan.lora is not None else 2
            gathered = (2 * shape.layer + shape.root) * plan.itemsize + (copies - 1) * (shape.layer + shape.root) * plan.itemsize
            weights = -(-weights // n)
    reference = 0
    if plan.lora is None:
        reference = {"resident": base, "precomputed": 0, "cached-hidden": shape.vocabulary * shape.hidden * plan.itemsize}[plan.reference]
    stored, working = activation_bytes(shape, plan)
    return Estimate(
        weights, gradients, optimizer, reference, gathered, stored, head_bytes(shape, plan), working, RESERVE if plan.device != "cpu" else 0
    )


def optimizer_bytes(parameter: tuple[int, ...], itemsize: int, plan: Plan) -> int:
    """State of one parameter of this shape, in bytes."""
    numel = math.prod(parameter)
    sharded = plan.gpus > 1 and plan.sharding in ("zero2", "zero3")
    master = 4 * numel if sharded and itemsize < 4 else 0  # DeepSpeed steps a float32 copy of 16-bit weights
    itemsize = 4 if master else itemsize
    if plan.optimizer == "adamw":
        return master + 2 * numel * itemsize + 4  # two moments, and the step as one float32
    if plan.optimizer == "adamw_8bit":  # moments of small parameters stay in float32; else two bytes and a scale for 256 numbers, twice
        return master + (8 * numel if numel < 4096 else 2 * numel + 8 * -(-numel // 256))
    if plan.optimizer == "adafactor":  # second moments of rows and columns
        return master + 4 * (numel // parameter[-1] + numel // parameter[-2] if len(parameter) > 1 else numel)
    return master


def activation_bytes(shape: Shape, plan: Plan) -> tuple[int, int]:
    """(what the forward keeps for the backward, what the backward of one layer holds beside it), see the head of this module."""
    n, b, s, t = plan.tokens, plan.itemsize, 2 * plan.pairs_per_gpu, plan.seq_len
    layer, h = layer_bytes(shape, plan), shape.hidden
    final_norm = n * (4 * h + 4 + (b * h if plan.lora is None else 0))
    rotary = 2 * t * b * (shape.query // shape.heads)
    mask = s * t * t if plan.attention == "sdpa" else 0
    own = 8 * n * (shape.intermediate + h) if plan.lora is not None and b < 4 else 2 * n * b * max(shape.intermediate - h, 0)
    fixed = final_norm + rotary + mask + 8 * n
    if plan.gradient_checkpointing:
        return shape.layers * n * b * h + fixed, layer + own
    return shape.layers * layer + fixed, own


def layer_bytes(shape: Shape, plan: Plan) -> int:
    """What autograd saves of one layer."""
    n, b, h, i = plan.tokens, plan.itemsize, shape.hidden, shape.intermediate
    a, padded = shape.query, plan.attention == "sdpa"
    k = a if padded else shape.key_value
    mask = b * 2 * plan.pairs_per_gpu * plan.seq_len**2 if padded else 0
    attention = n * b * (2 * a + 2 * k) + 4 * n * shape.heads + mask
    if plan.lora is None:
        return 2 * n * (4 * h + 4 + 2 * b * h) + attention + 4 * n * b * i
    linears = len(shape.linears) // shape.layers  # of one layer
    adapters = 4 * n * plan.lora * linears
    if b == 4:
        return 2 * n * (4 * h + 4 + b * h) + attention + 4 * n * b * i + adapters
    copies = 4 * n * sum(width for width, _ in shape.linears) // shape.layers
    return 2 * n * (4 * h + 4) + attention + 3 * n * b * i + copies + adapters


def head_bytes(shape: Shape, plan: Plan) -> int:
    """Logits of a chunk, sum of the head's gradient, hidden states of the completion tokens and their gradient."""
    models, buffers = 2 if plan.reference != "precomputed" else 1, 2 if plan.kl else 1
    v, h, b, n = shape.vocabulary, shape.hidden, plan.itemsize, plan.tokens
    dtype, cpu = getattr(torch, plan.dtype), plan.device == "cpu"
    multiplied = b == 4 or not cpu or products.keeps_sums(torch.device("cpu"), dtype, dtype)
    widened = 0 if multiplied else min(v * h * 4, products.SLICE_BYTES)  # a slice of the head
    narrow = b < 4 and (not cpu or products.gradient_dtype(torch.device("cpu"), dtype) == dtype)
    later = backend.chunk_rows(v, buffers, 4, plan.device, True)
    alone = narrow and not cpu and n <= later  # one chunk: its product is dWeight
    whole = b == 4 and cpu  # a float32 head, where D of at most H rows waits in its gradient
    waits = plan.lora is None and not alone and (narrow or whole) and products.WaitingRows.few(n, h, b)
    rows = later if alone or waits or plan.lora is not None else backend.chunk_rows(v, buffers, 4, plan.device)
    states = (2 + models) * n * h * b
    logits = buffers * min(rows, n) * v * 4
    if plan.lora is not None:
        together = min(max(PARTS * rows, 2 * plan.seq_len), n)  # whose D @ W wait for their pair, in float32
        return logits + widened + 2 * 4 * together * h + states
    if alone:
        return logits + v * h * b + 2 * 4 * n * h + states
    if waits:
        buffer = min(v * h * 4, products.in_place_bytes(h) if whole else products.SLICE_BYTES)
        beside = n * products.WaitingRows.columns_without_room((v, h), n, not cpu) * b
        if whole and 8 * buffer <= v * h * 4:
            beside, buffer = buffer, 0
        finishing = buffer + 4 * n * h
        held = 4 * h * (n if cpu else min(n, HIDDEN_ROWS))  # D @ W
        return max(logits, finishing) + v * h * b + beside + held + states
    bounds = [i * plan.seq_len for i in range(2 * plan.pairs_per_gpu + 1)]
    held = buffer_rows(bounds, rows, backend.longest_held(rows, h, buffers))
    return v * h * 4 + buffers * held * v * 4 + 2 * 4 * held * h + widened + states


# The page


LABELS = {
    "weights": "weights", "gradients": "gradients", "optimizer": "optimiser state", "reference": "reference model",
    "gathered": "gathered shards, buckets", "activations": "activations", "head": "head and loss", "layer": "backward of one layer",
    "reserve": "CUDA context (assumed)",
}  # fmt: skip


ACCURACY = """\
Accuracy: weights, gradients and optimiser are counts (adamw_8bit: nearly). Activations and head are within 5 % of the peaks of small
float32 Llama models on a CPU; in 16 bits only what autograd saves was compared. Shards, buckets and the CUDA context are formulas that
were not measured, fragmentation is not counted: leave a tenth free."""


def report(name: str, shape: Shape, plan: Plan, gpu_memory: float) -> str:
    """Table and verdict, ready to print. gpu_memory in GiB."""
    if not gpu_memory > 0:
        raise InputError(f"gpu_memory must be positive (GiB), got {gpu_memory}")
    found = estimate(shape, plan)
    trained = shape.count if plan.lora is None else sum(map(math.prod, shape.adapters(plan.lora)))
    smaller = min(("head", "layer"), key=lambda part: getattr(found, part))
    how = "all trained" if plan.lora is None else f"{trained:,} in adapters trained"
    where = "1 GPU" if plan.gpus == 1 else f"{plan.gpus} GPUs ({plan.sharding})"
    reference = f"reference {'adapters off' if plan.reference == 'resident' and plan.lora else plan.reference}{', KL' if plan.kl else ''}"
    lines = [
        f"{name}: {shape.count:,} parameters, {how}, {plan.dtype}",
        f"{where}, {2 * plan.pairs_per_gpu} sequences of {plan.seq_len} tokens on each; {reference}",
        "",
        "  GiB per GPU",
    ]
    for part, label in LABELS.items():
        value = getattr(found, part)
        if value:
            note = f"   not at the same time as the {LABELS['layer' if part == 'head' else 'head']}" if part == smaller else ""
            lines.append(f"  {label:<26}{value / GIB:>9.2f}{note}")
    lines += [f"  {'together':<26}{found.total / GIB:>9.2f}", "", assumptions(plan), ACCURACY, ""]
    return "\n".join([*lines, verdict(shape, plan, gpu_memory)])


def assumptions(plan: Plan) -> str:
    """What the estimate takes for granted, in words."""
    kept = "gradient checkpointing" if plan.gradient_checkpointing else "the activations of all layers kept"
    attention = "padded batches (sdpa)" if plan.attention == "sdpa" else "no padding (flash)"
    return f"Assumed: every token is a completion's, {plan.optimizer}, {kept}, {attention}, layers like Llama's, no quantised weights."


def verdict(shape: Shape, plan: Plan, gpu_memory: float) -> str:
    """One sentence: whether it fits, what is largest, and the mildest change that makes it fit."""
    found = estimate(shape, plan)
    part = max(LABELS, key=lambda name: getattr(found, name))
    largest = f"largest is {LABELS[part]} ({getattr(found, part) / GIB:.1f} GiB)"
    if found.total <= gpu_memory * GIB:
        return f"fits in {gpu_memory:g} GiB: {found.total / GIB:.1f} GiB, {largest}."
    for words, other in alternatives(plan):
        total = estimate(shape, other).total
        if total <= gpu_memory * GIB:
            return f"does not fit in {gpu_memory:g} GiB: {found.total / GIB:.1f} GiB, {largest}; try {words} ({total / GIB:.1f} GiB)."
    return f"does not fit in {gpu_memory:g} GiB: {found.total / GIB:.1f} GiB, {largest}; try more GPUs or a smaller model."


def alternatives(plan: Plan) -> Iterator[tuple[str, Plan]]:
    """(options, plan) in the order of how little they change: each of them alone, then more and more of them together."""
    steps: list[tuple[str, dict]] = []
    if not plan.gradient_checkpointing:
        steps.append(("gradient checkpointing", {"gradient_checkpointing": True}))
    if plan.pairs_per_gpu > 1:
        steps.append(("--pairs-per-gpu 1", {"pairs_per_gpu": 1}))
    if plan.gpus > 1 and plan.sharding in ("ddp", "zero2"):
        steps.append(("--sharding fsdp2", {"sharding": "fsdp2"}))
    if plan.reference == "resident" and plan.lora is None:
        smaller = "cached-hidden" if plan.kl else "precomputed"
        steps.append((f"--reference {smaller}", {"reference": smaller}))
    if plan.dtype == "float32":
        steps.append(("--dtype bfloat16", {"dtype": "bfloat16"}))
    if plan.optimizer == "adamw" and plan.lora is None:
        steps.append(("--optimizer adamw_8bit", {"optimizer": "adamw_8bit"}))
    if plan.lora is None:
        steps.append(("--lora 16", {"lora": 16}))
    for words, change in steps:
        yield words, replace(plan, **change)
    for count in range(2, len(steps) + 1):
        changes = {name: value for _, change in steps[:count] for name, value in change.items()}
        yield " ".join(words for words, _ in steps[:count]), replace(plan, **changes)
