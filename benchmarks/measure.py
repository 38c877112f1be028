"""How things are measured: environment, interleaved times, peak memory, agreement with float64.

Times are interleaved over rounds, providers in turn, so that whatever else the machine does falls on all alike; a ratio is the median of
quotients, each of a time and that of the products just before and after, so that a machine that becomes slower or faster moves both; on a
CPU, whose neighbours may be busy, a ratio is measured on until its median is known to 2.5 %, five times the rounds at most. On a GPU by
events, with the L2 cache overwritten before every call. Peak memory is the allocator's on a GPU, and the growth of the high-water mark of
a fresh process on a CPU, beyond inputs and the gradients handed out.
"""

import ctypes
import gc
import json
import math
import multiprocessing
import os
import platform
import re
import resource
import shlex
import statistics
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import asdict
from datetime import datetime, timezone
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch

from benchmarks.registry import (
    OURS,
    PROVIDERS,
    SMOKE,
    Problem,
    Provider,
    Size,
    Step,
    forget_compiled,
    relative_error,
    versions,
)

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results"
MIB = 1 << 20
BUSY_CYCLES = 12_000_000  # of a GPU's clock, about 6 ms
SETTLED = 0.025  # relative standard error of a ratio at which a CPU's measurement ends, so that a rerun differs by less than a tenth
MORE = 5  # times the rounds, at most, until then

# What a provider may differ from the float64 truth, relative, loss and gradients. float32: a thousandth of what a wrong formula gives;
# 16 bits: rounded logits alone cost 0.4 % a number.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 5e-2}

OP_TESTS = ("tests/test_one_pass.py", "tests/test_token_stats.py", "tests/test_cpp.py")


# Environment


def git(*arguments: str) -> str:
    result = subprocess.run(["git", *arguments], capture_output=True, text=True, cwd=ROOT)
    return result.stdout.strip() if result.returncode == 0 else "unknown"


def revision() -> str:
    """Short hash of the checkout, "+changes" where files differ; or TISDPO_REVISION, for a copy of the files."""
    if "TISDPO_REVISION" in os.environ:
        return os.environ["TISDPO_REVISION"]
    short = git("rev-parse", "--short", "HEAD")
    return short if short == "unknown" else short + ("+changes" if git("status", "--porcelain", "--untracked-files=no") else "")


def command_line() -> str:
    """The command that this process runs, but for the place of its output."""
    words = []
    for word, before in zip(sys.argv[1:], sys.argv):
        if word != "--output" and before != "--output" and not word.startswith("--output="):
            words.append(word)
    return shlex.join(["python", "-m", f"benchmarks.{Path(sys.argv[0]).stem}", *words])


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def environment(device: str) -> dict:
    """What the figures depend on: device, load, versions, revision, date. On a CPU this process keeps freed memory from here on."""
    from tisdpo.ops import backend

    found = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": command_line(),
        "revision": revision(),
        "platform": platform.platform(), "versions": versions(), "backend": backend.resolve("auto", device),
    }  # fmt: skip
    if device != "cuda":
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        cpu = {"name": cpu_name(), "cores": os.cpu_count(), "threads": torch.get_num_threads(), "memory": memory}
        found["keeps_freed_memory"] = keep_freed_memory()
        return found | {"device": cpu | {"vectors": torch.backends.cpu.get_cpu_capability(), "load_before": os.getloadavg()[0]}}
    p = torch.cuda.get_device_properties(0)
    found["device"] = {"name": p.name, "capability": f"{p.major}.{p.minor}", "memory": p.total_memory, "sms": p.multi_processor_count}
    query = ["nvidia-smi", "--query-gpu=driver_version,clocks.max.sm", "--format=csv,noheader"]
    found["driver"] = subprocess.run(query, capture_output=True, text=True).stdout.strip()
    return found


def keep_freed_memory() -> bool:
    """Let this process keep what it frees, as the caching allocator of a GPU does; False where the C library is not glibc.

    By default glibc gives every large tensor back to the system, so that every step touches its memory for the first time. In a virtual
    machine that took 10 to 20 % of a step, of everybody's but the products', whose results lie in memory that is there already.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return False
    m_trim_threshold, m_mmap_max = -1, -4  # malloc.h
    return bool(mallopt(m_mmap_max, 0) and mallopt(m_trim_threshold, -1))


def release_kept_memory() -> None:
    """Give back what `keep_freed_memory` kept so far; nothing where the C library is not glibc."""
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)


def gpu_tests() -> list[str]:
    """Files with tests marked gpu."""
    files = ["tests/test_gpu.py", "tests/test_kernels.py", "tests/test_without_logits.py"]
    return [*files, "tests/test_padding_free.py"] if find_spec("datasets") else files  # which trains


def op_tests() -> str:
    """ "" where the tests of the measured functions pass, with a GPU those of its kernels as well, else the end of their output."""
    tests = dict.fromkeys((*OP_TESTS, *(gpu_tests() if torch.cuda.is_available() else ())))
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return "" if done.returncode == 0 else "\n".join(done.stdout.splitlines()[-30:])


def default_path(kind: str, device: str, date: str) -> Path:
    """Where the figures of a run go: results/<kind>-<device>-<day>.json, or $OUT/..."""
    name = re.sub(r"[^a-z0-9]+", "-", (torch.cuda.get_device_name(0) if device == "cuda" else cpu_name()).lower()).strip("-")
    folder = Path(os.environ["OUT"]) if os.environ.get("OUT") else RESULTS
    return folder / f"{kind}-{name}-{date[:10]}.json"


def save(report: dict, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    written = path.with_name(path.name + ".part")  # whoever ends the run in the middle of this leaves a whole file
    written.write_text(json.dumps(report, indent=1) + "\n")
    written.replace(path)


# Time


def l2_flush(device: str) -> torch.Tensor | None:
    """What `timed` overwrites to empty a GPU's L2 cache."""
    return None if device == "cpu" else torch.empty(256 * MIB, dtype=torch.int8, device=device)


def timed(job, device: str, flush: torch.Tensor | None) -> float:
    """Seconds of one call; on a GPU by events, with the L2 cache overwritten before.

    There the device is kept busy for some milliseconds first, as it is by a model's forward in training: the host runs ahead and what it
    needs to launch the first kernels is not measured, except after a point where it waits for the device. A call in which the allocator had
    to give memory back to the driver is repeated, and the second time in a row an error.
    """
    if device == "cpu":
        start = time.perf_counter()
        job()
        return time.perf_counter() - start
    for _ in range(2):
        given_back = torch.cuda.memory_stats()["num_alloc_retries"]
        flush.zero_()
        torch.cuda._sleep(BUSY_CYCLES)
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        job()
        end.record()
        end.synchronize()
        if torch.cuda.memory_stats()["num_alloc_retries"] == given_back:
            return start.elapsed_time(end) / 1e3
    raise RuntimeError("too little memory for a time: the allocator gives its cache back to the driver in every call")


def summary(seconds: list[float]) -> dict[str, float]:
    """Median, 20th and 80th percentile, and how many repetitions there were."""
    low, high = (statistics.quantiles(seconds, n=5)[i] for i in (0, 3)) if len(seconds) > 1 else (seconds[0], seconds[0])
    return {"seconds": statistics.median(seconds), "p20": max(low, min(seconds)), "p80": min(high, max(seconds)), "rounds": len(seconds)}


def interleaved(
    jobs: dict, rounds: int, device: str, failed: dict | None = None, beside: str = "", most: int | None = None
) -> dict[str, dict]:  # fmt: skip
    """`summary` of every job, run in turn `rounds` times.

    failed: a job that raises leaves and its reason is noted there. beside: this job runs before and after each of the others, whose `ratio`
    is the median of their quotients to the mean of both. most: jobs whose ratio is not `settled` by then go on, for so many rounds at most,
    or until Ctrl-C, which leaves them with the rounds they have.
    """
    flush, seconds, ratios = l2_flush(device), {name: [] for name in jobs}, {name: [] for name in jobs if name != beside}
    if beside:
        seconds[beside].append(timed(jobs[beside], device, flush))
    for number in range(max(rounds, most or 0)):
        others = [name for name in seconds if name != beside and (number < rounds or not settled(ratios[name]))]
        if not others and number >= rounds:
            break
        if number >= rounds:
            print(f"  round {number + 1} of {most} at most, for {len(others)} rows", file=sys.stderr, flush=True)
        try:
            for name in others:
                try:
                    seconds[name].append(timed(jobs[name], device, flush))
                except Exception as error:  # of any kind: a peer that fails must not end the run of the others
                    if failed is None:
                        raise
                    failed[name] = reason(error)
                    del seconds[name]
                    continue
                if beside:
                    seconds[beside].append(timed(jobs[beside], device, flush))
                    ratios[name].append(seconds[name][-1] / statistics.mean(seconds[beside][-2:]))
        except KeyboardInterrupt:
            if number < rounds:
                raise
            break
    return {name: summary(t) | ({"ratio": statistics.median(ratios[name])} if ratios.get(name) else {}) for name, t in seconds.items()}


def settled(ratios: list[float]) -> bool:
    """Whether the median of these is known to SETTLED: its standard error, 0.93 interquartile ranges over the root of their number."""
    if len(ratios) < 2:
        return False
    low, middle, high = statistics.quantiles(ratios, n=4)
    return 0.93 * (high - low) / math.sqrt(len(ratios)) <= SETTLED * middle


def reason(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"


# Memory


def allocator_peak(job) -> int:
    """Bytes allocated on the GPU at the peak of one call beyond what was there before and what it hands out."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    results = job()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before - sum(x.nbytes for x in results if x is not None)


def high_water() -> int:
    """Largest resident size of this process so far, bytes.

    Linux: VmHWM, which starts afresh with a process; ru_maxrss would begin at the size of the process that started this one.
    """
    status = Path("/proc/self/status")
    if status.exists():
        return int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text()).group(1)) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def growth(job) -> int:
    """Bytes by which one call raises this process's high-water mark, which is set to the present size first where the system allows."""
    gc.collect()
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    before = high_water()
    job()
    return high_water() - before


def fresh_process(function, *arguments):
    """The result of a function called in a new process that has imported this module and computed nothing."""
    release_kept_memory()  # the float64 truth of a large head leaves 13 GiB, which another process may need
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.measure"])
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *arguments).result()


def peak_memory(provider: str, size: Size, step: Step, dtype: torch.dtype, threads: int) -> int:
    """Bytes of one step on a CPU beyond inputs and gradients; to be called in a fresh process."""
    torch.set_num_threads(threads)
    who = next(p for p in PROVIDERS if p.name == provider)
    Problem(SMOKE, dtype).run(who, step)  # loads code and starts threads
    problem, results = Problem(size, dtype), []
    if step.op == "from logits":
        problem.logits  # noqa: B018 (made when asked for)
    peak = growth(lambda: results.extend(problem.run(who, step)))
    if peak <= 0:
        raise RuntimeError("the step did not raise the high-water mark, so its memory cannot be measured this way")
    return max(peak - sum(x.nbytes for x in results if x is not None), 0)


# One row of a table for every provider


def compare(
    size: Size, step: Step, providers: list[Provider], rounds: int, device: str, dtype: torch.dtype,
    check: bool = True, memory: bool = False,
) -> dict:  # fmt: skip
    """Time (medians over `rounds`), error and peak memory of everybody's step, beside the matrix products it cannot do without.

    check: compare with float64 first; who disagrees is not timed. memory: the peak on a CPU, a fresh process a provider;
    on a GPU it is always measured.
    """
    forget_compiled()
    problem = Problem(size, dtype, device)
    truths = {}
    jobs, rows = {}, {}
    for provider in providers:
        why = provider.missing(device, step, size)
        if why:
            rows[provider.name] = {"skipped": why}
            continue

        job = partial(problem.run, provider, step)
        row = rows[provider.name] = {"version": provider.version, "task": provider.task, "note": provider.note}
        try:
            results = job()  # compiles
            if check:
                if provider.task not in truths:
                    truth = problem.truth(provider.task, step)
                    truths[provider.task] = [None if x is None else x.to(torch.float32 if x.dim() else x.dtype) for x in truth]
                    del truth  # dWeight in float64
                row["error"] = errors(results, truths[provider.task], step)
                if wrong := unexplained(row["error"], dtype):
                    row["failed"] = wrong
                    continue
            del results
            if device == "cuda":
                problem.forget()  # else the step would free its gradients, and count that as its own
                row["extra_bytes"] = allocator_peak(job)
            elif memory:
                arguments = (peak_memory, provider.name, size, step, dtype, torch.get_num_threads())
                row["extra_bytes"] = fresh_process(*arguments)
            jobs[provider.name] = job
        except Exception as error:  # a peer that fails here must not end the run
            row["failed"] = reason(error)
        finally:
            problem.forget()
            gc.collect()
    truths.clear()
    out = (torch.empty_like(problem.hidden), torch.empty_like(problem.weight))
    z = torch.empty(size.tokens, size.vocabulary, dtype=dtype, device=device)
    failed = {}
    jobs = {"products": lambda: problem.products(step, z, out), **jobs}
    times = interleaved(jobs, rounds, device, failed, beside="products", most=MORE * rounds if device == "cpu" and rounds > 2 else None)
    for name, why in failed.items():  # memory that sufficed alone may not beside the buffers of the products
        rows[name]["failed"] = why
    products = times.pop("products")
    for name, figures in times.items():
        rows[name] |= figures
    flop = 2 * size.tokens * size.hidden * size.vocabulary * step.products
    return {
        "size": asdict(size), "step": step.name, "op": step.op, "products": step.products, "dtype": str(dtype).removeprefix("torch."),
        "products_seconds": products["seconds"], "products_tflops": flop / products["seconds"] / 1e12, "rows": rows,
    }  # fmt: skip


def floor(result: dict) -> str:
    """What a result's times are divided by, in words."""
    count = result["products"]
    return "a copy of the logits" if count == 0 else f"{count} product{'s' if count > 1 else ''}"


def errors(results, truth, step: Step) -> dict[str, float]:
    """Relative errors of what `Problem.run` gave, by name."""
    names = ("log-probs",) if step.op == "scores" else ("loss", "dLogits" if step.op == "from logits" else "dHidden", "dWeight")
    return {name: relative_error(x, y) for name, x, y in zip(names, results, truth) if x is not None}


def unexplained(found: dict[str, float], dtype: torch.dtype) -> str:
    """What is wrong with errors that the dtype does not explain, or ""."""
    wrong = [f"{name} is off by {e:.1e}" for name, e in found.items() if not e <= TOLERANCE[dtype]]
    return f"{', '.join(wrong)} (relative, allowed {TOLERANCE[dtype]:.0e}), so it was not timed" if wrong else ""


def table(steps: list[dict], goals: dict[tuple[str, str], float] | None = None) -> str:
    """Results of `compare` for a terminal; losing cases stand beside the others. goals: limits of our ratio by (head, step)."""
    lines = []
    for result in steps:
        size = result["size"]
        masked = f" masked={size['masked']:.0%}" if size["masked"] else ""
        lines.append(
            f"\n{result.get('head', '')} {result['dtype']}  N={size['tokens']} H={size['hidden']} V={size['vocabulary']}{masked}  "
            f"{result['step']}: {floor(result)} {1e3 * result['products_seconds']:.2f} ms"
            + (f" ({result['products_tflops']:.3g} TFLOP/s)" if result["products"] else "")
        )
        goal = (goals or {}).get((result.get("head"), result["step"]))
        for name, row in sorted(result["rows"].items(), key=lambda item: item[1].get("seconds", 9e9)):
            if "seconds" not in row:
                lines.append(f"  {name:<34}{row.get('skipped') or row.get('failed')}")
                continue
            extra = f"{row['extra_bytes'] / MIB:9.0f} MiB" if row.get("extra_bytes") is not None else ""
            error = f"  error {max(row['error'].values()):.1e}" if "error" in row else "  not compared"
            mark = "" if row["task"] == "TIS-DPO" else f"  computes {row['task']} only"
            if name == OURS and goal is not None:
                mark += f"  goal <= {goal}: {'holds' if row['ratio'] <= goal else 'MISSED'}"
            lines.append(f"  {name:<34}{1e3 * row['seconds']:10.2f} ms {row['ratio']:6.2f} x{extra}{error}{mark}")
    return "\n".join(lines)
