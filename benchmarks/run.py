"""Everybody's loss step, in one process, beside the matrix products it cannot do without: time, peak memory, error.

    python -m benchmarks.run                                  # all parts on this machine's device; JSON into benchmarks/results/
    python -m benchmarks.run steps --dtype bfloat16 --hidden 896 --vocabulary 151936
    python -m benchmarks.run steps --modes 0 2 --providers tisdpo TRL --rounds 3    # only those with such a name, or such a word in it
    python -m benchmarks.run ops                              # log-probs alone, for other trainers
    python -m benchmarks.run --list                           # who takes part here, and why somebody doesn't
    python -m benchmarks.run --smoke                          # tiny sizes, to see that it works

Parts: `steps`, every kind of loss step at one head; `ops`, log-probs alone, of hidden states and of logits; `scaling`, time against
tokens, vocabulary and the share of ignored positions; `roofline`, the machine's ceilings and the folds. `python -m
benchmarks.end_to_end` measures whole training steps, `python -m benchmarks.plot` makes RESULTS.md of all of it. The tests of the measured
functions run first, and nothing is timed on red; a provider that differs from float64 by more than its dtype explains stands in the table
with its error and without a time.
"""

import argparse
import math
import statistics
import sys
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch

from benchmarks import roofline
from benchmarks.measure import (
    MIB,
    compare,
    default_path,
    environment,
    errors,
    fresh_process,
    interleaved,
    op_tests,
    peak_memory,
    save,
    table,
    unexplained,
)
from benchmarks.registry import ALL_MODES, MODES, OP_STEPS, OURS, PROVIDERS, SMOKE, Problem, Provider, Size, Step

PARTS = ("steps", "ops", "scaling", "roofline")

# Time over the products: (step): limit on a CPU, docs/design.md G6
GOALS = {
    "float32": {Step().name: 1.15, Step("reverse").name: 1.25},
    "bfloat16": {Step().name: 1.2, Step("reverse").name: 1.3, Step(frozen=True).name: 1.25},
}

# What is varied, and the size around it. The head is small enough that the largest point takes seconds.
CURVES = {
    "tokens": (Size(hidden=512, vocabulary=16000), (128, 256, 512, 1024, 2048, 4096)),
    "vocabulary": (Size(tokens=512, hidden=512), (2000, 4000, 8000, 16000, 32000, 64000, 128000)),
    "masked": (Size(tokens=2048, hidden=512, vocabulary=16000), (0.0, 0.25, 0.5, 0.75, 0.9)),
}
SMOKE_MEMORY = Size(512, 64, 8003, 4)  # large enough to raise a process's high-water mark
IN_CURVES = (OURS, "tisdpo two passes", "plain torch", "TRL chunked")


def measure_step(args, size: Size, step: Step, providers: list[Provider], device: str, dtype: torch.dtype) -> dict:
    memory, providers = not (args.no_memory or args.smoke), [p for p in providers if p.function(step)]
    result = compare(size, step, providers, args.rounds, device, dtype, not args.no_check, memory)
    return {"head": str(dtype).removeprefix("torch.")} | result


def measure_scaling(curve: str, rounds: int, device: str, dtype: torch.dtype, check: bool, smoke: bool) -> dict:
    """Medians of the step without KL at every point of a curve, and each provider's exponent."""
    size, values = CURVES[curve]
    if smoke:
        size, values = replace(SMOKE, masked=0.0), (values[:2] if curve == "masked" else (64, 128))
    providers = [p for p in PROVIDERS if p.name in IN_CURVES]
    if curve == "masked":
        points = measure_masked(size, values, providers, rounds, device, dtype, check)
        return {"size": asdict(size), "points": points, "fits": {p.name: fit(curve, points, p.name) for p in providers}}
    points = []
    for value in values:
        print(f"{curve} = {value} ...", flush=True)
        result = compare(replace(size, **{curve: value}), Step(), providers, rounds, device, dtype, check)
        points.append({"value": value} | result)
    return {"size": asdict(size), "points": points, "fits": {p.name: fit(curve, points, p.name) for p in providers}}


def measure_masked(
    size: Size, shares: tuple[float, ...], providers: list[Provider], rounds: int, device: str, dtype: torch.dtype, check: bool
) -> list[dict]:
    """The points of the curve `masked`, all of them in turn within every round: their times are compared with each other."""
    print(f"masked = {', '.join(map(str, shares))} ...", flush=True)
    sizes = [replace(size, masked=share) for share in shares]
    problems = [Problem(s, dtype, device) for s in sizes]
    skipped = {p.name: p.missing(device, Step(), sizes[-1]) for p in providers}
    rows = [{p.name: {"skipped": skipped[p.name]} if skipped[p.name] else {"task": p.task} for p in providers} for _ in sizes]
    jobs = {}
    for i, problem in enumerate(problems):
        truth = problem.truth("TIS-DPO", Step()) if check else None
        for p in (p for p in providers if not skipped[p.name]):
            job = partial(problem.run, p, Step())
            results = job()
            found = errors(results, truth, Step()) if check else {}
            if wrong := unexplained(found, dtype):
                rows[i][p.name]["failed"] = wrong
            else:
                jobs[i, p.name] = job
            rows[i][p.name] |= {"error": found} if check else {}
    times = interleaved(jobs, max(rounds, 9) if rounds > 2 else rounds, device)
    for (i, name), figures in times.items():
        rows[i][name] |= figures
    return [
        {"value": share, "size": asdict(s), "dtype": str(dtype).removeprefix("torch."), "step": Step().name, "rows": rows[i]}
        for i, (share, s) in enumerate(zip(shares, sizes))
    ]


def fit(curve: str, points: list[dict], provider: str) -> dict[str, float]:
    """tokens, vocabulary: b of time ~ value**b, least squares of the logarithms over the upper half of the curve (below it, fixed costs
    count). masked: the largest departure of time from the share of unmasked tokens, relative to the time without masked ones."""
    timed = [(p["value"], p["rows"][provider]["seconds"]) for p in points if "seconds" in p["rows"][provider]]
    if len(timed) < 2:
        return {}
    if curve == "masked":
        (_, whole), *others = timed
        return {"departure": max(abs(seconds / whole - (1 - share)) for share, seconds in others)}
    x, y = zip(*((math.log(value), math.log(seconds)) for value, seconds in timed[len(timed) // 2 - 1 :]))
    slope, _ = statistics.linear_regression(x, y)
    return {"exponent": slope}


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.run", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)} (default: all)")
    for name, value in asdict(Size()).items():
        parser.add_argument(f"--{name}", type=type(value), help=f"of `steps` and `ops` (default {value})")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default: float32 on a CPU, bfloat16 on a GPU")
    modes = "; ".join(f"{i}: {m.name}" for i, m in enumerate(ALL_MODES))
    parser.add_argument("--modes", type=int, nargs="+", choices=range(len(ALL_MODES)), help=f"of `steps` (default all): {modes}")
    words = "names, or words of names, to take part in `steps` and `ops` (default: all)"
    parser.add_argument("--providers", nargs="+", default=[""], help=words)
    parser.add_argument("--rounds", type=int, help="repetitions (default 7)")
    parser.add_argument("--threads", type=int, help="threads of torch on a CPU (default: its own choice)")
    parser.add_argument("--no-tests", action="store_true", help="don't run the tests of the measured functions first")
    parser.add_argument("--no-check", action="store_true", help="no comparison with float64, which takes memory and time")
    parser.add_argument("--no-memory", action="store_true", help="no peak memory, which takes a fresh process a figure on a CPU")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, two rounds, no tests, nothing written without --output")
    parser.add_argument("--list", action="store_true", help="print the providers and whether they run here")
    parser.add_argument(
        "--output", type=Path, help="JSON file (default: results/cpu-<dtype>[-<parts>][-<size>]-<device>-<date>.json or gpu-...)"
    )
    args = parser.parse_args(argv)
    if unknown := set(args.parts) - set(PARTS):
        parser.error(f"there is no part {', '.join(sorted(unknown))}; parts are {', '.join(PARTS)}")
    if args.rounds is not None and args.rounds < 1:
        parser.error(f"--rounds must be at least 1, got {args.rounds}")
    args.parts, args.rounds = args.parts or PARTS, args.rounds or (2 if args.smoke else 7)
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    names = [p.name.lower() for p in PROVIDERS]
    words = [word.lower() for word in args.providers]
    providers = [p for p in PROVIDERS if any(word == p.name.lower() if word in names else word in p.name.lower() for word in words)]
    if not providers:
        words, names = " or ".join(args.providers), ", ".join(p.name for p in PROVIDERS)
        print(f"no provider's name contains {words}; there are: {names}", file=sys.stderr)
        return 2
    if args.list:
        for p in providers:
            less = "" if p.task == "TIS-DPO" else f"; computes {p.task} only"
            print(f"{p.name:<36}{p.missing(device) or p.version}{'' if p.kl else '; has no KL'}{less}")
        return 0
    if args.threads:
        torch.set_num_threads(args.threads)
    if not (args.smoke or args.no_tests):
        print("tests of the measured functions ...", flush=True)
        if failures := op_tests():
            print(failures, "the tests failed, so nothing is timed", sep="\n", file=sys.stderr)
            return 1
    dtype = getattr(torch, args.dtype or ("bfloat16" if device == "cuda" else "float32"))
    size = Size(**{name: getattr(args, name) or value for name, value in asdict(SMOKE if args.smoke else Size()).items()})
    modes = [ALL_MODES[i] for i in args.modes] if args.modes else (MODES if args.smoke else ALL_MODES)
    report = environment(device) | {"dtype": str(dtype).removeprefix("torch."), "goals": GOALS}
    kind = f"{'gpu' if device == 'cuda' else 'cpu'}-{report['dtype']}"
    report["size"] = asdict(size)
    if set(args.parts) != set(PARTS) and "steps" not in args.parts:  # never in the place of a table of steps
        kind += "-" + "-".join(part for part in PARTS if part in args.parts)
    if size != Size():
        kind += f"-{size.tokens}x{size.hidden}x{size.vocabulary}" + (f"-masked{100 * size.masked:.0f}" if size.masked else "")
    output = args.output or (None if args.smoke else default_path(kind, device, report["date"]))

    def keep():
        if output is not None:
            save(report, output)

    if "roofline" in args.parts:
        report["roofline"] = {"size": asdict(size)} | roofline.measure(size, device, dtype, args.rounds)
        print(roofline.table(report["roofline"]), flush=True)
        keep()
    limits = {(kind, step): x for kind, goals in GOALS.items() for step, x in goals.items()}
    for part, steps in (("steps", modes), ("ops", OP_STEPS)):
        if part not in args.parts:
            continue
        report[part] = []
        for step in steps:
            print(f"{step.name} ...", flush=True)
            report[part].append(measure_step(args, size, step, providers, device, dtype))
            print(table(report[part][-1:], limits), flush=True)
            keep()
        if args.smoke and part == "steps":
            peak = fresh_process(peak_memory, OURS, SMOKE_MEMORY, Step(), dtype, 1)
            print(f"peak memory of one pass at N={SMOKE_MEMORY.tokens}, V={SMOKE_MEMORY.vocabulary}: {peak / MIB:.0f} MiB")
    if "scaling" in args.parts:
        report["scaling"] = {}
        for curve in CURVES:
            report["scaling"][curve] = measure_scaling(curve, args.rounds, device, dtype, not args.no_check, args.smoke)
            for name, found in report["scaling"][curve]["fits"].items():
                print(f"  {name:<36}" + ", ".join(f"{key} {value:.2f}" for key, value in found.items()), flush=True)
            keep()
    if output is not None:
        print(f"written to {output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
