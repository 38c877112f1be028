"""Time and memory of a loss step at the head, beside the matrix products it cannot do without and beside plain torch.

    python -m benchmarks.head                  # N=1024 tokens, H=1024, V=32000, float32, this machine's CPU
    python -m benchmarks.head --smoke          # a tiny size, to see that it works

One step is forward and backward of TIS-DPO's loss from hidden states. All steps run interleaved in one process; medians are reported,
each next to the head-sized products (2 N H V FLOP) that its plan needs, measured in the same rounds. Peak memory is the growth of the
high-water mark of a fresh process (median of three), without the gradients that every step has to hand out. A step whose loss or
gradients differ from plain torch in float64 stops the run before anything is timed.

Sizes: P pairs, N completion tokens, H hidden, V vocabulary.
"""

import argparse
import json
import os
import platform
import re
import resource
import statistics
import subprocess
import sys
import time
from dataclasses import asdict
from datetime import datetime, timezone
from functools import partial
from pathlib import Path

import torch

import tisdpo
from benchmarks.registry import SMOKE, Problem, Size, Step, fused, plain, relative_error
from tisdpo.ops import backend as backends

RESULTS = Path(__file__).parent / "results"
MIB = 1 << 20

# Reported next to the figures, never enforced: time over the products of the plan, memory over plain torch's.
TIME_GOALS = {"one_pass": 1.15, "one_pass_kl": 1.25}
MEMORY_GOALS = {"one_pass": ("plain", 0.25), "one_pass_kl": ("plain_kl", 0.25)}


FULL = Size()


def plans(backend: str) -> dict:
    """Who computes a step."""
    return {"one_pass": partial(fused, backend=backend), "two_pass": partial(fused, plan="two_pass", backend=backend), "plain": plain}


PLANS = plans("auto")  # main() puts the backend that was asked for in its place

# name: (plan, what)
STEPS = {
    "one_pass": ("one_pass", Step()),
    "one_pass_kl": ("one_pass", Step(kl=True)),
    "one_pass_frozen": ("one_pass", Step(frozen=True)),
    "one_pass_kl_frozen": ("one_pass", Step(kl=True, frozen=True)),
    "two_pass": ("two_pass", Step()),
    "two_pass_kl": ("two_pass", Step(kl=True)),
    "plain": ("plain", Step()),
    "plain_kl": ("plain", Step(kl=True)),
}


def wrong_results(size: Size) -> list[str]:
    """Every step against plain torch in float64, at a small size in float64 and at the measured size in its own dtype."""
    failures = []
    for small, dtype, tolerance in ((SMOKE, torch.float64, 1e-12), (size, torch.float32, 1e-4)):
        ours = Problem(small, dtype)
        truth = ours.double()
        by = plans("torch") if dtype == torch.float64 else PLANS
        for kl in (False, True):
            expected = truth.run(plain, Step(kl=kl))
            for name, (plan, step) in STEPS.items():
                if step.kl != kl:
                    continue
                for what, x, y in zip(("loss", "dHidden", "dWeight"), ours.run(by[plan], step), expected):
                    error = 0.0 if x is None else relative_error(x, y)
                    if not error <= tolerance:
                        failures.append(f"{name}: {what} is off by {error:.2g} (relative, {dtype}, allowed {tolerance:.0e})")
    return failures


def measure_time(size: Size, rounds: int) -> dict[str, dict[str, float]]:
    """Seconds of every step and of its products: {name: {median, low, high, products, ratio}}, interleaved over the rounds."""
    problem = Problem(size)
    z, dh, dw = torch.empty(size.tokens, size.vocabulary), torch.empty_like(problem.hidden), torch.empty_like(problem.weight)
    jobs = {name: lambda plan=plan, step=step: problem.run(PLANS[plan], step) for name, (plan, step) in STEPS.items()}
    jobs |= {step: lambda step=step: problem.products(step, z, (dh, dw)) for _, step in STEPS.values()}
    seconds = {name: [] for name in jobs}
    for round_number in range(rounds + 1):  # the first warms up
        for name, job in jobs.items():
            start = time.perf_counter()
            job()
            if round_number:
                seconds[name].append(time.perf_counter() - start)
    results = {}
    for name, (_, step) in STEPS.items():
        median, products = statistics.median(seconds[name]), statistics.median(seconds[step])
        results[name] = dict(median=median, low=min(seconds[name]), high=max(seconds[name]), products=products, ratio=median / products)
    return results


def peak_memory(name: str, size: Size) -> dict[str, int]:
    """Bytes by which one step raises this process's high-water mark, of which its gradients are a known part."""
    plan, step = STEPS[name]
    Problem(SMOKE).run(PLANS[plan], step)  # loads code and starts threads
    problem = Problem(size)
    before = high_water()
    _, *gradients = problem.run(PLANS[plan], step)
    peak = high_water() - before
    if peak <= 0:
        raise RuntimeError("the step did not raise the high-water mark, so its memory cannot be measured this way")
    handed_out = sum(g.nbytes for g in gradients if g is not None)
    return {"peak": peak, "gradients": handed_out, "extra": max(peak - handed_out, 0)}


def high_water() -> int:
    """Largest resident size of this process so far, bytes.

    Linux: VmHWM, which starts afresh with the program; ru_maxrss would begin at the size of the process that started this one.
    """
    status = Path("/proc/self/status")
    if status.exists():
        return int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text()).group(1)) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def peak_memory_in_fresh_processes(name: str, size: Size, repeats: int, backend: str) -> dict:
    """Median of `peak_memory` over fresh processes (the allocator's heap differs by tens of MiB from run to run), with all of them."""
    command = [
        sys.executable,
        "-m",
        "benchmarks.head",
        "--memory-of",
        name,
        "--backend",
        backend,
        "--threads",
        str(torch.get_num_threads()),
        *size_arguments(size),
    ]
    runs = []
    for _ in range(repeats):
        output = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1])
        runs.append(json.loads(output.stdout))
    return {"extra": statistics.median(run["extra"] for run in runs), "gradients": runs[0]["gradients"], "runs": runs}


def size_arguments(size: Size) -> list[str]:
    return [text for field, value in asdict(size).items() for text in (f"--{field}", str(value))]


def environment() -> dict:
    """What the figures depend on: machine, load, versions, revision, date."""
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "revision": git("rev-parse", "--short", "HEAD") + ("+changes" if git("status", "--porcelain", "--untracked-files=no") else ""),
        "machine": {
            "cpu": cpu_name(), "cores": os.cpu_count(), "threads": torch.get_num_threads(), "platform": platform.platform(),
            "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), "load_before": os.getloadavg()[0],
        },
        "versions": {"tisdpo": tisdpo.__version__, "torch": torch.__version__, "python": platform.python_version()},
    }  # fmt: skip


def git(*arguments: str) -> str:
    result = subprocess.run(["git", *arguments], capture_output=True, text=True, cwd=Path(__file__).parent)
    return result.stdout.strip() if result.returncode == 0 else "unknown"


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    names = (
        [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    )
    return names[0] if names else platform.processor() or platform.machine()


def table(report: dict) -> str:
    """The report for a terminal: one line a step, goals beside the figures they belong to."""
    lines = [f"{'step':20} {'ms':>9} {'min..max':>17} {'products':>9} {'ratio':>6}  {'goal':>6} {'extra MiB':>10}  of plain"]
    for name, (_, step) in STEPS.items():
        t, memory = report["time"][name], report["memory"].get(name)
        spread = f"{1e3 * t['low']:.1f}..{1e3 * t['high']:.1f}"
        goal = f"<={TIME_GOALS[name]}" if name in TIME_GOALS else ""
        line = f"{name:20} {1e3 * t['median']:9.1f} {spread:>17} {step.products:>2} {1e3 * t['products']:6.1f} {t['ratio']:6.2f}  {goal:>6}"
        if memory:
            line += f" {memory['extra'] / MIB:10.1f}"
            other, limit = MEMORY_GOALS.get(name, (None, None))
            if other in report["memory"] and report["memory"][other]["extra"] > MIB:  # a smaller growth is no measurement
                line += f"  {memory['extra'] / report['memory'][other]['extra']:.2f} (goal <={limit})"
        lines.append(line)
    return "\n".join(lines)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.head", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    for field, value in asdict(FULL).items():
        parser.add_argument(f"--{field}", type=int, help=f"default {value}")
    parser.add_argument("--rounds", type=int, help="measured rounds over all steps (default 7)")
    parser.add_argument("--threads", type=int, help="threads of torch (default: its own choice)")
    parser.add_argument("--backend", choices=backends.BACKENDS, default="auto", help="of this library's folds (default: the fastest here)")
    parser.add_argument("--smoke", action="store_true", help="tiny size, two rounds, memory of one step, nothing written without --output")
    parser.add_argument("--output", type=Path, help="JSON file (default benchmarks/results/head-<system>-<date>.json)")
    parser.add_argument("--memory-of", choices=STEPS, help="measure only the peak memory of one step in this process and print it as JSON")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    default = SMOKE if args.smoke else FULL
    size = Size(**{field: getattr(args, field) or value for field, value in asdict(default).items()})
    if args.threads:
        torch.set_num_threads(args.threads)
    PLANS.update(plans(args.backend))
    if args.memory_of:
        print(json.dumps(peak_memory(args.memory_of, size)))
        return 0
    failures = wrong_results(size)
    if failures:
        print("wrong results, so nothing was timed:", *failures, sep="\n  ", file=sys.stderr)
        return 1
    report = environment() | {
        "size": asdict(size),
        "dtype": "float32",
        "backend": backends.resolve(args.backend, "cpu"),
        "rounds": args.rounds or (2 if args.smoke else 7),
    }
    report["time"] = measure_time(size, report["rounds"])
    names, repeats = (("one_pass",), 1) if args.smoke else (STEPS, 3)
    report["memory"] = {name: peak_memory_in_fresh_processes(name, size, repeats, args.backend) for name in names}
    report["goals"] = {"time": TIME_GOALS, "memory": {name: {"of": other, "ratio": r} for name, (other, r) in MEMORY_GOALS.items()}}
    print(table(report))
    output = args.output
    if output is None and not args.smoke:
        output = RESULTS / f"head-{platform.system().lower()}-{report['date'][:10]}.json"
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(report, indent=2) + "\n")
        print(f"written to {output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
