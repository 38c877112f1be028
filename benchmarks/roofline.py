"""The two ceilings of a machine, and how close the parts of a loss step come to them.

    python -m benchmarks.roofline                         # this machine's device, float32 on a CPU, bfloat16 on a GPU

A step's head-sized products are bound by arithmetic, its folds by memory: the ceilings are the speed of torch's product and of a copy
that is larger than every cache, both measured here. Operations and bytes are counted from the algorithm, see `fold_bytes` and `step_work`.
"""

import argparse
import math
import statistics
import sys

import torch

from benchmarks.measure import l2_flush, timed
from benchmarks.registry import Size, Step
from tisdpo.ops import backend

FOLD_OPERATIONS = 13  # a logit and model: exponential, subtraction, comparison, sums; counted in csrc/fold_kernels.h


def fold_bytes(z: int, out: int, models: int) -> dict[str, int]:
    """Bytes a logit of policy logits with items of z bytes: statistics read every model once, the gradient reads them and writes D."""
    return {"statistics": z * models, "gradient": z * models + out}


def step_work(size: Size, step: Step, itemsize: int, device: str = "cpu") -> tuple[float, float]:
    """(operations, bytes) of one pass: its products, and the traffic of logits, D and the head.

    Float32 logits are written by the product and read by the statistics and the gradient; those of the reference too. D of float32 is
    written over them and read by two products (one with a frozen head); D of 16 bits likewise, and on a CPU copied to where it waits. The
    head is read for every chunk; so is, and written, the sum of its float32 gradient; a 16-bit one is written once.
    """
    N, H, V = size.tokens * (1 - size.masked), size.hidden, size.vocabulary
    models, trained = 1 + step.reference_products, not step.frozen
    rows = backend.chunk_rows(V, 1 if step.kl is None else 2, 4, device, later=step.frozen or itemsize == 2)
    d = itemsize * (2 + trained + (2 * trained if itemsize == 2 and device == "cpu" else 0))
    logits = N * V * (12 * models + d)
    chunks = math.ceil(N / rows)
    gradient = V * H * (8 * chunks if itemsize == 4 else itemsize) * trained
    return 2 * N * H * V * step.products, logits + chunks * V * H * itemsize * (models + 1) + gradient


def ceilings(size: Size, device: str, dtype: torch.dtype, rounds: int) -> dict[str, float]:
    """Operations and bytes a second: hidden @ weight.T of one size, and a copy of its logits (read and written)."""
    g = torch.Generator(device).manual_seed(0)
    hidden = torch.randn(size.tokens, size.hidden, device=device, dtype=dtype, generator=g)
    weight = torch.randn(size.vocabulary, size.hidden, device=device, dtype=dtype, generator=g)
    z = torch.empty(size.tokens, size.vocabulary, device=device, dtype=dtype)
    other, flush = torch.randn_like(z), l2_flush(device)
    product, copy = lambda: torch.mm(hidden, weight.T, out=z), lambda: other.copy_(z)
    seconds = {"product": [], "copy": []}
    for round_number in range(rounds + 1):  # the first warms up
        for name, job in (("product", product), ("copy", copy)):
            passed = timed(job, device, flush)
            if round_number:
                seconds[name].append(passed)
    product, copy = (statistics.median(values) for values in seconds.values())
    work = 2 * size.tokens * size.hidden * size.vocabulary
    return {"flops": work / product, "bytes_per_second": 2 * z.nbytes / copy}


def folds(size: Size, device: str, dtype: torch.dtype, rounds: int, backend: str = "auto") -> dict[str, dict[str, float]]:
    """Seconds, bytes and bytes a second of the folds alone, as the drivers call them: float32 logits, D of `dtype` written over them."""
    from tisdpo.ops import backend as backends
    from tisdpo.ops.fold import Fold, Transform

    backend = backends.resolve(backend, device)
    N, V = size.tokens, size.vocabulary
    g = torch.Generator(device).manual_seed(0)
    source, q = (torch.randn(N, V, device=device, generator=g) for _ in range(2))
    z, target = source.clone(), torch.randint(V, (N,), device=device, generator=g)
    ones, flush = torch.ones(N, device=device), l2_flush(device)
    found = {}
    for kl in (None, "reverse", "forward"):
        fold = Fold(backend, kl, Transform())
        ref = None if kl is None else q
        stats = fold.statistics(source, target, ref)
        jobs = {
            "statistics": lambda fold=fold, ref=ref: fold.statistics(source, target, ref),
            "gradient": lambda fold=fold, ref=ref, stats=stats: fold.gradient(
                z, target, ref, stats, ones, None if ref is None else ones, dtype=dtype
            ),
        }
        count = fold_bytes(4, dtype.itemsize, 1 if ref is None else 2)
        for name, job in jobs.items():
            seconds = []
            for round_number in range(rounds + 1):
                z.copy_(source)  # the gradient has written over it
                passed = timed(job, device, flush)
                if round_number:
                    seconds.append(passed)
            median, moved = statistics.median(seconds), count[name] * N * V
            found[f"{name}, {'one model' if kl is None else f'{kl} KL'}"] = {
                "seconds": median, "bytes": moved, "operations": FOLD_OPERATIONS * N * V * (1 if ref is None else 2),
                "bytes_per_second": moved / median,
            }  # fmt: skip
    return found


def products(size: Size, device: str, dtype: torch.dtype, rounds: int) -> dict[str, dict[str, float]]:
    """Seconds and operations a second of the head's products alone, as the drivers make them for one chunk; where there is one, also of the
    product that leaves D and sums instead of logits (`tisdpo.kernels.head`), to be compared with logits and both folds."""
    from tisdpo.ops import products as drivers
    from tisdpo.ops.fold import Fold, Transform
    from tisdpo.ops.rows import HeadRows, needs_no_logits

    N, H, V = size.tokens, size.hidden, size.vocabulary
    g = torch.Generator(device).manual_seed(0)
    hidden = torch.randn(N, H, device=device, generator=g).to(dtype)
    weight = torch.randn(V, H, device=device, generator=g).mul_(H**-0.5).to(dtype)
    z = torch.empty(N, V, device=device)
    d = torch.randn(N, V, device=device, generator=g).to(drivers.gradient_dtype(hidden.device, dtype))
    jobs = {
        "logits in float32": lambda: drivers.logits(hidden, weight, z),
        "dHidden": lambda: drivers.grad_hidden(d, weight, torch.float32),
    }
    if drivers.rounds_itself(weight):
        jobs["dWeight"] = lambda: drivers.grad_weight(d, hidden)
    else:
        total = torch.empty(V, H, device=device)
        jobs["dWeight in float32"] = lambda: drivers.add_grad_weight_(total, d, hidden, first=True)
    if needs_no_logits(HeadRows(hidden, weight, None), None, Fold(backend.resolve("auto", device), None, Transform())):
        from tisdpo.kernels.head import exponentials

        target = torch.randint(V, (N,), device=device, generator=g)
        jobs["D and sums, no logits"] = lambda: exponentials(hidden, weight, target, None, [(0, V, d)], *Transform())
    seconds, flush = {name: [] for name in jobs}, l2_flush(device)
    for round_number in range(rounds + 1):  # the first warms up
        for name, job in jobs.items():
            passed = timed(job, device, flush)
            if round_number:
                seconds[name].append(passed)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {name: {"seconds": median, "flops": 2 * N * H * V / median} for name, median in medians.items()}


def measure(size: Size, device: str, dtype: torch.dtype, rounds: int) -> dict:
    """Ceilings, products and folds of one size."""
    return {part.__name__: part(size, device, dtype, rounds) for part in (ceilings, products, folds)}


def table(result: dict) -> str:
    """`measure` for a terminal."""
    top = result["ceilings"]
    lines = [f"a product by torch {top['flops'] / 1e12:.3g} TFLOP/s, a copy {top['bytes_per_second'] / 1e9:.3g} GB/s"]
    for name, row in result["products"].items():
        share = row["flops"] / top["flops"]
        lines.append(f"  {name:<28}{1e3 * row['seconds']:9.3f} ms {row['flops'] / 1e12:8.3g} TFLOP/s {share:4.0%} of torch's")
    for name, row in result["folds"].items():
        share = row["bytes_per_second"] / top["bytes_per_second"]
        lines.append(f"  {name:<28}{1e3 * row['seconds']:9.3f} ms {row['bytes_per_second'] / 1e9:8.3g} GB/s  {share:5.0%} of the copy")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.roofline", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=7, help="repetitions (default 7)")
    args = parser.parse_args(argv)
    gpu = torch.cuda.is_available()
    size = Size(2048, 4096, 128256) if gpu else Size()
    print(table(measure(size, "cuda" if gpu else "cpu", torch.bfloat16 if gpu else torch.float32, args.rounds)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
