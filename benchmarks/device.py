"""Everything there is to find out on a GPU machine, in one command and at most nine minutes, without a network:

    python -m benchmarks.device                     # tests, sanitizer, loss steps, profile; JSON into benchmarks/results/ (or $OUT)
    python -m benchmarks.device --wheels wheels     # first install the peers' wheels lying in that folder (pip download --no-deps ...)
    python -m benchmarks.device --smoke             # tiny sizes, on any machine, to see that the script itself works

1. the tests marked `gpu`; on red the loss steps are still timed, but no ratio is printed as a result
2. compute-sanitizer over a small case of each kernel, where the tool exists
3. forward and backward of the loss in all four modes at three real heads and N = 256 to 16384, and log-probs alone at one of them, as
   ratios to the matrix products measured in the same run, with peak extra memory and errors against float64, for every provider of
   `benchmarks.registry` that imports
4. Nsight Compute on the folds (achieved bandwidth), where the tool exists; else bandwidth from their times
"""

import argparse
import gc
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import torch

from benchmarks import roofline
from benchmarks.measure import ROOT, compare, default_path, environment, gpu_tests, reason, save, table
from benchmarks.registry import HEADS, MODES, OP_STEPS, PROVIDERS, Size

# (head, mode of the step): limit of our time over the products, on an H200, from docs/design.md
GOALS = {("Llama-3-8B", mode.name): limit for mode, limit in zip(MODES, (1.13, 1.15, 1.12, 1.13))}

# (head, N) in the order of what matters most, for as long as there is time; log-probs alone at one of them
OPS_AT = ("Llama-3-8B", 4096)
ORDER = [("Llama-3-8B", 8192), OPS_AT, *((head, 8192) for head in HEADS if head != "Llama-3-8B")]
ORDER += [("Llama-3-8B", n) for n in (2048, 256, 16384)]
ORDER += [(head, n) for n in (2048, 16384) for head in HEADS if head != "Llama-3-8B"]
COMPILED_ANEW = ("torch.compile", "torch.compile, float32 logits", "Liger scaled CE")  # for every shape, a minute or so: at the first only

SANITIZED = """
import os, torch, tisdpo
from tisdpo.ops import products, rows
from benchmarks.registry import MODES, Problem, Size, fused
os.environ["TISDPO_CHUNK_MIB"] = "1"  # one chunk (20 rows), several whose D waits (120), whose products are summed (200)
rows.DIRECT_ROWS = 0  # without logits: visits of 104 rows
products.SLICE_BYTES, products.FEW_ITEMS = 64 * 64, 0  # small slices of D, written at once
for step in MODES:
    for dtype in (torch.bfloat16, torch.float32):
        for tokens, masked in ((20, 0.0), (120, 0.1), (200, 0.0)):
            Problem(Size(tokens, 64, 5003, 3, masked), dtype, "cuda").run(lambda p, s: 0.5 * fused(p, s), step)
for dtype in (torch.bfloat16, torch.float32):  # D waits for the backward
    hidden, weight = (torch.randn(n, 64, device="cuda", dtype=dtype, requires_grad=True) for n in (40, 5003))
    tisdpo.linear_token_logps(hidden, weight, torch.ones(40, dtype=torch.int64, device="cuda")).logps.sum().backward()
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

    @property
    def left(self) -> float:
        return self.limit - self.seconds

    def say(self, text: str) -> None:
        print(f"[{self.seconds:5.0f} s] {text}", flush=True)


def finished(command: list, seconds: float, **options) -> subprocess.CompletedProcess:
    """As `subprocess.run`; but when the time is over, or this process is told to end, so does the whole process group of the command."""
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace")
    with subprocess.Popen(command, cwd=ROOT, start_new_session=True, **pipes, **options) as process:
        try:
            out, err = process.communicate(timeout=seconds)
        except BaseException as error:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            if isinstance(error, subprocess.TimeoutExpired):
                error.output = ""
                with suppress(subprocess.TimeoutExpired):  # somebody who left the group may hold the other end
                    error.output = process.communicate(timeout=10)[0]
            raise
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def tests_marked_gpu(clock: Clock, smoke: bool) -> dict:
    """Result of `pytest -m gpu`; the last lines of its output on red."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", *gpu_tests()]
    command += ["--collect-only"] if smoke else []
    if importlib.util.find_spec("xdist") and not smoke:  # most of the time is the compiler's
        command += ["-n", "8"]
    try:
        done = finished(command, max(60.0, clock.limit * 0.5))
    except subprocess.TimeoutExpired as error:
        failures = error.output.splitlines()[-60:]
        return {"passed": False, "summary": f"took longer than {error.timeout:.0f} s", "failures": failures}
    lines = done.stdout.strip().splitlines()
    passed = done.returncode == 0 or (smoke and done.returncode == 5)  # 5: nothing is marked gpu where there is no GPU
    return {"passed": passed, "summary": lines[-1] if lines else done.stderr[-500:], "failures": [] if passed else lines[-60:]}


def sanitizer(seconds: float) -> dict:
    """compute-sanitizer's verdict: memory errors of the kernels at sizes that are multiples of nothing."""
    tool = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    if tool is None:
        return {"ran": False, "reason": "compute-sanitizer is not installed"}
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    command = [tool, "--tool", "memcheck", "--error-exitcode", "9", sys.executable, "-c", SANITIZED]
    try:
        done = finished(command, seconds, env=environment)
    except subprocess.TimeoutExpired:
        return {"ran": False, "reason": f"took longer than {seconds:.0f} s"}
    return {"ran": True, "clean": done.returncode == 0, "tail": done.stdout.splitlines()[-15:] + done.stderr.splitlines()[-15:]}


PROFILED = """
import torch
from benchmarks.registry import Size
from benchmarks.roofline import folds
folds(Size(2048, 4096, 128256), "cuda", torch.bfloat16, 1)
"""


def nsight(seconds: float) -> dict:
    """Achieved DRAM bandwidth of the fold kernels as Nsight Compute sees it."""
    tool = shutil.which("ncu") or shutil.which("/usr/local/cuda/bin/ncu")
    if tool is None:
        return {"ran": False, "reason": "ncu is not installed"}
    metrics = "dram__throughput.avg.pct_of_peak_sustained_elapsed,gpu__time_duration.sum,sm__warps_active.avg.pct_of_peak_sustained_active"
    command = [tool, "--clock-control", "none", "--metrics", metrics, "-k", "regex:statistics_kernel|gradient_kernel", "--csv"]
    command += [sys.executable, "-c", PROFILED]
    try:
        done = finished(command, seconds)
    except subprocess.TimeoutExpired:
        return {"ran": False, "reason": f"took longer than {seconds:.0f} s"}
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
    importlib.invalidate_caches()
    return notes


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
        print("torch sees no GPU on this machine; --smoke shows that the script works, `python -m benchmarks.run` measures the CPU")
        return 2
    if args.smoke:
        torch.set_num_threads(1)
    clock = Clock(60 * args.minutes)
    parts = args.only or ("tests", "sanitizer", "steps", "bandwidth")
    notes = {"wheels": install(args.wheels)} if args.wheels else {}
    report = environment(device) | notes | {"steps": [], "ops": []}
    print("".join(f"{note}\n" for note in notes.get("wheels", [])), end="")
    output = args.output or (None if args.smoke else default_path("device", device, report["date"]))

    def keep():
        if output is not None:
            save(report, output)

    if "tests" in parts:
        clock.say("tests marked gpu")
        report["tests"] = tests_marked_gpu(clock, args.smoke)
        print(*report["tests"]["failures"], report["tests"]["summary"], sep="\n", flush=True)
        keep()
    if "bandwidth" in parts and device == "cuda":
        clock.say("ceilings, products, folds")
        try:
            report["roofline"] = roofline.measure(Size(2048, 4096, 128256), device, torch.bfloat16, args.rounds)
            print(roofline.table(report["roofline"]))
        except Exception as error:  # the other parts still say something
            report["roofline"] = {"failed": reason(error)}
            print(report["roofline"]["failed"])
        keep()
    if "steps" in parts:
        heads = {"smoke": (48, 1003)} if args.smoke else HEADS
        dtype = torch.float32 if device == "cpu" else torch.bfloat16
        tools = 120 if device == "cuda" and {"sanitizer", "bandwidth"} & set(parts) else 0
        for head, n in ORDER if not args.smoke else [("smoke", 96), ("smoke", 97)]:
            hidden, vocabulary = heads[head]
            for step in OP_STEPS if (head, n) in (OPS_AT, ("smoke", 97)) else MODES:
                if not clock.has(15 + tools):
                    report.setdefault("left_out", []).append(f"{head}, N={n}, {step.name}: no time left")
                    continue
                clock.say(f"{head}, N={n}, {step.name}")
                size = Size(n, hidden, vocabulary, pairs=max(2, n // 512))
                first = (head, n) in (ORDER[0], ("smoke", 96)) and not step.frozen
                able = [p for p in PROVIDERS if p.function(step)]
                providers = [p for p in able if first or p.name not in COMPILED_ANEW]
                try:  # of many tokens the truth is time that is not there
                    result = compare(size, step, providers, args.rounds, device, dtype, check=n <= 8192)
                except Exception as error:  # of any kind: other steps are results, and the sanitizer, a new process, may name the cause
                    report.setdefault("failed", []).append(f"{head}, N={n}, {step.name}: {reason(error)}")
                    clock.say(f"given up: {report['failed'][-1]}")
                    keep()
                    continue
                what = "compiled anew for every shape: " + (
                    "not measured" if step.op else "at the first head, length and kinds of step only"
                )
                others = {p.name: {"skipped": what} for p in able}
                result["rows"] = {name: result["rows"].get(name, other) for name, other in others.items()}
                report["ops" if step.op else "steps"].append({"head": head} | result)
                keep()
                gc.collect()
                if device == "cuda":
                    torch.cuda.empty_cache()
    if "sanitizer" in parts and device == "cuda" and clock.has(60):
        clock.say("compute-sanitizer")
        report["sanitizer"] = sanitizer(min(140.0, clock.left - 25))
        print(report["sanitizer"].get("reason") or ("clean" if report["sanitizer"]["clean"] else "\n".join(report["sanitizer"]["tail"])))
        keep()
    if "bandwidth" in parts and device == "cuda" and clock.has(20):
        clock.say("Nsight Compute")
        report["nsight"] = nsight(min(90.0, clock.left))
        print(*report["nsight"].get("csv", [])[:30], report["nsight"].get("reason", ""), sep="\n")
    report["seconds"] = clock.seconds
    keep()
    red = "tests" in report and not report["tests"]["passed"]
    goals = GOALS if "H200" in report["device"].get("name", "") else None
    print("the tests failed: no figure of this run is a result" if red else table(report["steps"] + report["ops"], goals))
    print(*report.get("left_out", []), *report.get("failed", []), sep="\n")
    if output is not None:
        print(f"written to {output}")
    return 1 if red or report.get("failed") else 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # by way of an exception, see `finished`
    sys.exit(main())
