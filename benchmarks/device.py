"""Everything there is to find out on a GPU machine, in one command and at most nine minutes, without a network:

    python -m benchmarks.device                     # tests, sanitizer, loss steps, profile; JSON into benchmarks/results/ (or $OUT)
    python -m benchmarks.device --wheels wheels     # first install the peers' wheels lying in that folder (pip download --no-deps ...)
    python -m benchmarks.device --smoke             # tiny sizes, on any machine, to see that the script itself works

1. the tests marked `gpu`; on red the loss steps are still timed, but no ratio is printed as a result
2. compute-sanitizer over a small case of each kernel, where the tool exists
3. forward and backward of the loss in all four modes at three real heads and N = 2048, 8192, 16384, as ratios to the matrix products
   measured in the same run, with peak extra memory and errors against float64, for every provider of `benchmarks.registry` that imports
4. Nsight Compute on the folds (achieved bandwidth), where the tool exists; else bandwidth from their times
"""

import argparse
import gc
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path

import torch

from benchmarks.head import git
from benchmarks.registry import (
    HEADS,
    MODES,
    OURS,
    PROVIDERS,
    Problem,
    Provider,
    Size,
    Step,
    forget_compiled,
    plain,
    relative_error,
    versions,
)

ROOT = Path(__file__).parents[1]
MIB = 1 << 20

# (head, mode of the step): limit of our time over the products, from docs/design.md
GOALS = {("Llama-3-8B", mode.name): limit for mode, limit in zip(MODES, (1.13, 1.15, 1.12, 1.13))}
EXTRA_GOAL = 1.3e9  # bytes beyond inputs and outputs

SANITIZED = """
import torch, tisdpo
from benchmarks.registry import MODES, Problem, Size, fused
for step in MODES:
    for dtype in (torch.bfloat16, torch.float32):
        Problem(Size(70, 64, 5003, 3), dtype, "cuda").run(fused, step)
x = torch.randn(3, 5, 999, device="cuda", requires_grad=True)
tisdpo.token_logps(x[:, :-1], torch.ones(3, 4, dtype=torch.int64, device="cuda")).logps.sum().backward()
torch.cuda.synchronize()
"""


class Clock:
    """Seconds since the start, and whether there is time for more."""

    def __init__(self, limit: float):
        self.start, self.limit = time.monotonic(), limit

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.start

    def has(self, seconds: float) -> bool:
        return self.seconds + seconds < self.limit

    def say(self, text: str) -> None:
        print(f"[{self.seconds:5.0f} s] {text}", flush=True)


def gpu_tests(clock: Clock, smoke: bool) -> dict:
    """Result of `pytest -m gpu`; the last lines of its output on red."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "tests/test_gpu.py", "tests/test_kernels.py"]
    command += ["--collect-only"] if smoke else []
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=max(60.0, clock.limit * 0.5))
    except subprocess.TimeoutExpired as error:
        lines = (error.stdout or b"").decode(errors="replace").splitlines()
        return {"passed": False, "summary": f"took longer than {error.timeout:.0f} s", "failures": lines[-60:]}
    lines = done.stdout.strip().splitlines()
    passed = done.returncode == 0 or (smoke and done.returncode == 5)  # 5: nothing is marked gpu where there is no GPU
    return {"passed": passed, "summary": lines[-1] if lines else done.stderr[-500:], "failures": [] if passed else lines[-60:]}


def sanitizer() -> dict:
    """compute-sanitizer's verdict: memory errors of the kernels at sizes that are multiples of nothing."""
    tool = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    if tool is None:
        return {"ran": False, "reason": "compute-sanitizer is not installed"}
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    command = [tool, "--tool", "memcheck", "--error-exitcode", "9", sys.executable, "-c", SANITIZED]
    try:
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=150)
    except subprocess.TimeoutExpired:
        return {"ran": False, "reason": "took longer than 150 s"}
    return {"ran": True, "clean": done.returncode == 0, "tail": done.stdout.splitlines()[-15:] + done.stderr.splitlines()[-15:]}


def timed(job, device: str, flush: torch.Tensor | None) -> float:
    """Seconds of one call; on a GPU by events, with the L2 cache overwritten before."""
    if device == "cpu":
        start = time.perf_counter()
        job()
        return time.perf_counter() - start
    flush.zero_()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    job()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def extra_memory(job, device: str) -> int | None:
    """Bytes allocated at the peak of one call beyond what was there before and what it hands out."""
    if device == "cpu":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    results = job()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before - sum(x.nbytes for x in results if x is not None)


def measure(size: Size, step: Step, providers: list[Provider], rounds: int, device: str, dtype: torch.dtype, check: bool) -> dict:
    """One row of the table for every provider, and the products; interleaved over the rounds."""
    forget_compiled()
    problem = Problem(size, dtype, device)
    truth = None
    if check:
        truth = [None if x is None else x.clone() for x in problem.double().run(plain, step)]
    flush = None if device == "cpu" else torch.empty(256 * MIB, dtype=torch.int8, device=device)
    jobs, rows = {}, {}
    for provider in providers:
        name, why = provider.name, provider.missing(device, step)
        if why:
            rows[name] = {"skipped": why}
            continue

        def job(loss=provider.loss):
            return problem.run(loss, step)

        try:
            results = job()  # compiles
            rows[name] = {"version": provider.version, "note": provider.note}
            if truth is not None:
                parts = zip(("loss", "dHidden", "dWeight"), results, truth)
                rows[name]["error"] = {part: relative_error(x, y) for part, x, y in parts if x is not None}
            del results
            problem.hidden.grad = problem.weight.grad = None
            rows[name]["extra_bytes"] = extra_memory(job, device)
            jobs[name] = job
        except Exception as error:  # a peer that fails here must not end the run
            rows[name] = {"failed": _reason(error)}
        problem.hidden.grad = problem.weight.grad = None
        gc.collect()
    truth = None
    out = (torch.empty_like(problem.hidden), torch.empty_like(problem.weight))
    z = torch.empty(size.tokens, size.vocabulary, dtype=dtype, device=device)
    seconds = {name: [] for name in [*jobs, "products"]}
    for _ in range(rounds):
        seconds["products"].append(timed(lambda: problem.products(step, z, out), device, flush))
        for name, job in jobs.items():
            problem.hidden.grad = problem.weight.grad = None
            try:
                seconds[name].append(timed(job, device, flush))
            except Exception as error:  # memory that sufficed alone may not beside the buffers of the products
                rows[name] = {"failed": _reason(error)}
                seconds.pop(name)
        jobs = {name: job for name, job in jobs.items() if name in seconds}
    products = statistics.median(seconds.pop("products"))
    for name, values in seconds.items():
        median = statistics.median(values)
        rows[name] |= {"seconds": median, "low": min(values), "high": max(values), "ratio": median / products}
    flop = 2 * size.tokens * size.hidden * size.vocabulary * step.products
    return {"size": asdict(size), "step": step.name, "products_seconds": products, "products_tflops": flop / products / 1e12, "rows": rows}


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"


def bandwidth(device: str, rows: int, vocabulary: int, rounds: int) -> dict:
    """Bytes a second of the folds alone, from their own times, beside a device-to-device copy of the same size."""
    from tisdpo.kernels import fold

    g = torch.Generator(device).manual_seed(0)
    z, q = (torch.randn(rows, vocabulary, device=device, generator=g) for _ in range(2))
    target = torch.randint(vocabulary, (rows,), device=device, generator=g)
    flush = torch.empty(256 * MIB, dtype=torch.int8, device=device)
    plain_scaling = (1.0, None, 1.0)
    one = fold.statistics(z, target, None, None, None, False, None, *plain_scaling)
    two = fold.statistics(z, target, q, None, None, False, "reverse", *plain_scaling)
    ones = torch.ones(rows, device=device)
    narrow = dict(dtype=torch.bfloat16)
    jobs = {
        "copy (read and write)": (8, lambda: q.copy_(z)),
        "statistics, one model": (4, lambda: fold.statistics(z, target, None, None, None, False, None, *plain_scaling)),
        "statistics, reverse KL": (8, lambda: fold.statistics(z, target, q, None, None, False, "reverse", *plain_scaling)),
        "gradient to bf16, one model": (
            6, lambda: fold.gradient(z, target, None, one, None, None, None, None, False, None, *plain_scaling, **narrow),
        ),
        "gradient to bf16, reverse KL": (
            10, lambda: fold.gradient(z, target, q, two, None, ones, None, None, False, "reverse", *plain_scaling, **narrow),
        ),
    }  # fmt: skip
    found = {}
    for name, (item, job) in jobs.items():
        job()
        seconds = statistics.median(timed(job, device, flush) for _ in range(rounds))
        found[name] = {"seconds": seconds, "terabytes_per_second": item * rows * vocabulary / seconds / 1e12}
    return found


PROFILED = """
import torch
from benchmarks.device import bandwidth
bandwidth("cuda", 2048, 128256, 1)
"""


def nsight() -> dict:
    """Achieved DRAM bandwidth of the fold kernels as Nsight Compute sees it."""
    tool = shutil.which("ncu") or shutil.which("/usr/local/cuda/bin/ncu")
    if tool is None:
        return {"ran": False, "reason": "ncu is not installed"}
    metrics = "dram__throughput.avg.pct_of_peak_sustained_elapsed,gpu__time_duration.sum,sm__warps_active.avg.pct_of_peak_sustained_active"
    command = [tool, "--metrics", metrics, "-k", "regex:statistics_kernel|gradient_kernel", "--csv", sys.executable, "-c", PROFILED]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=90)
    except subprocess.TimeoutExpired:
        return {"ran": False, "reason": "took longer than 90 s"}
    lines = [line for line in done.stdout.splitlines() if line.startswith('"')]
    return {"ran": done.returncode == 0 and bool(lines), "csv": lines, "reason": "" if lines else done.stdout[-300:] + done.stderr[-300:]}


def install(wheels: Path) -> list[str]:
    """Install every wheel of a folder without its dependencies; what fails is only said."""
    notes = []
    for wheel in sorted(wheels.glob("*.whl")):
        done = subprocess.run(
            [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", wheel], capture_output=True, text=True
        )
        notes.append(f"{wheel.name}: {'installed' if done.returncode == 0 else done.stderr.strip()[-200:]}")
    return notes


def environment(device: str) -> dict:
    found = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "revision": git("rev-parse", "--short", "HEAD") + ("+changes" if git("status", "--porcelain", "--untracked-files=no") else ""),
        "platform": platform.platform(), "versions": versions(),
    }  # fmt: skip
    if device == "cuda":
        p = torch.cuda.get_device_properties(0)
        found["device"] = {"name": p.name, "capability": f"{p.major}.{p.minor}", "memory": p.total_memory, "sms": p.multi_processor_count}
        driver = subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version,clocks.max.sm", "--format=csv,noheader"], capture_output=True, text=True
        )
        found["driver"] = driver.stdout.strip()
    return found


def table(report: dict) -> str:
    """The report for a terminal; losing cases stand beside the others."""
    lines = []
    for result in report["steps"]:
        size = result["size"]
        lines.append(
            f"\n{result['head']}  N={size['tokens']} H={size['hidden']} V={size['vocabulary']}  {result['step']}: products "
            f"{1e3 * result['products_seconds']:.2f} ms ({result['products_tflops']:.0f} TFLOP/s)"
        )
        goal = GOALS.get((result["head"], result["step"]))
        for name, row in sorted(result["rows"].items(), key=lambda item: item[1].get("seconds", 9e9)):
            if "seconds" not in row:
                lines.append(f"  {name:<32}{row.get('skipped') or row.get('failed')}")
                continue
            extra = "" if row["extra_bytes"] is None else f"{row['extra_bytes'] / 1e9:8.2f} GB"
            error = max(row["error"].values()) if "error" in row else None
            mark = "" if name != OURS or goal is None else f"  goal <= {goal}: {'holds' if row['ratio'] <= goal else 'MISSED'}"
            lines.append(
                f"  {name:<32}{1e3 * row['seconds']:9.2f} ms {row['ratio']:6.2f} x{extra}"
                + ("" if error is None else f"  error {error:.1e}") + mark
            )  # fmt: skip
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.device", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=9.0, help="stop beginning new measurements after this long (default 9)")
    parser.add_argument("--rounds", type=int, default=7, help="repetitions of every measurement (default 7)")
    parser.add_argument("--wheels", type=Path, help="folder of wheels of peers to install first, without dependencies")
    parser.add_argument("--only", choices=("tests", "sanitizer", "steps", "bandwidth"), nargs="+", help="only these parts")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, any machine, nothing written without --output")
    parser.add_argument("--output", type=Path, help="JSON file (default: device-<name>-<date>.json in $OUT or benchmarks/results)")
    args = parser.parse_args(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not args.smoke:
        print("torch sees no GPU on this machine; --smoke shows that the script works, `python -m benchmarks.head` measures the CPU")
        return 2
    if args.smoke:
        torch.set_num_threads(1)
    clock = Clock(60 * args.minutes)
    parts = args.only or ("tests", "sanitizer", "steps", "bandwidth")
    report = environment(device) | {"steps": []}
    if args.wheels:
        report["wheels"] = install(args.wheels)
        print(*report["wheels"], sep="\n")
    output = args.output or (None if args.smoke else _default_output(report))

    def save():
        if output is not None:
            output.parent.mkdir(parents=True, exist_ok=True)
            output.write_text(json.dumps(report, indent=1) + "\n")

    if "tests" in parts:
        clock.say("tests marked gpu")
        report["tests"] = gpu_tests(clock, args.smoke)
        print(*report["tests"]["failures"], report["tests"]["summary"], sep="\n", flush=True)
        save()
    if "bandwidth" in parts and device == "cuda":
        clock.say("bandwidth of the folds")
        try:
            report["bandwidth"] = bandwidth(device, 2048, 128256, args.rounds)
            for name, row in report["bandwidth"].items():
                print(f"  {name:<32}{1e3 * row['seconds']:8.3f} ms {row['terabytes_per_second']:6.2f} TB/s")
        except Exception as error:  # the other parts still say something
            report["bandwidth"] = {"failed": _reason(error)}
            print(report["bandwidth"]["failed"])
        save()
    if "steps" in parts:
        heads = {"smoke": (48, 1003)} if args.smoke else HEADS
        tokens = (96,) if args.smoke else (8192, 2048, 16384)
        dtype = torch.float32 if device == "cpu" else torch.bfloat16
        for n in tokens:
            for head, (hidden, vocabulary) in heads.items():
                for step in MODES:
                    if not clock.has(25):
                        report.setdefault("left_out", []).append(f"{head}, N={n}, {step.name}: no time left")
                        continue
                    clock.say(f"{head}, N={n}, {step.name}")
                    size = Size(n, hidden, vocabulary, pairs=max(2, n // 512))
                    result = measure(size, step, PROVIDERS, args.rounds, device, dtype, check=n <= 2048)
                    report["steps"].append({"head": head} | result)
                    save()
                    gc.collect()
                    if device == "cuda":
                        torch.cuda.empty_cache()
    if "sanitizer" in parts and device == "cuda" and clock.has(60):
        clock.say("compute-sanitizer")
        report["sanitizer"] = sanitizer()
        print(report["sanitizer"].get("reason") or ("clean" if report["sanitizer"]["clean"] else "\n".join(report["sanitizer"]["tail"])))
    if "bandwidth" in parts and device == "cuda" and clock.has(60):
        clock.say("Nsight Compute")
        report["nsight"] = nsight()
        print(*report["nsight"].get("csv", [])[:30], report["nsight"].get("reason", ""), sep="\n")
    report["seconds"] = clock.seconds
    save()
    red = "tests" in report and not report["tests"]["passed"]
    print("the tests failed: no figure of this run is a result" if red else table(report))
    print(*report.get("left_out", []), sep="\n")
    if output is not None:
        print(f"written to {output}")
    return 1 if red else 0


def _default_output(report: dict) -> Path:
    name = re.sub(r"[^a-z0-9]+", "-", report["device"]["name"].lower()).strip("-")
    folder = Path(os.environ["OUT"]) if os.environ.get("OUT") else ROOT / "benchmarks/results"
    return folder / f"device-{name}-{report['date'][:10]}.json"


if __name__ == "__main__":
    sys.exit(main())
