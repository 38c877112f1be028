"""What this machine has and which backend would run: the text of `tisdpo doctor`."""

import importlib.metadata as metadata
import os
import platform
from pathlib import Path

import torch
from packaging.requirements import Requirement

import tisdpo
from tisdpo.ops import backend, products

# extra of the package: what it is for
EXTRAS = {
    "report": "the HTML report",
    "flash": "padding-free attention on NVIDIA GPUs",
    "trl": "trl.DPOTrainer",
    "peft": "LoRA",
    "annotate": "ratings of people",
}

# flags of /proc/cpuinfo that decide how fast the matrix products are
CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16", "asimd", "bf16", "sve", "i8mm")


def report() -> str:
    """The whole page, ready to print. It never fails: what is missing or wrong is said in its place."""
    parts = {"versions": versions(), "devices": devices(), "backend": backends(), "optional packages": optional_packages()}
    return "\n\n".join("\n".join([title, *(f"  {name:<16}{text}" for name, text in lines)]) for title, lines in parts.items())


def versions() -> list[tuple[str, str]]:
    """(package, version) of what the package cannot do without; a version too old is said."""
    system = f"{platform.python_version()} ({platform.system()} {platform.machine()})"
    needed = [(r.name, _installed(r)) for r in requirements() if _applies(r)]
    return [("tisdpo", f"{tisdpo.__version__} ({Path(tisdpo.__file__).parent})"), ("python", system), *needed]


def requirements() -> list[Requirement]:
    """What the installed package requires, extras included; empty for a source tree that was not installed."""
    try:
        return [Requirement(text) for text in metadata.requires("tisdpo") or []]
    except metadata.PackageNotFoundError:
        return []


def _applies(requirement: Requirement, extra: str = "") -> bool:
    return requirement.marker is None or requirement.marker.evaluate({"extra": extra})


def _installed(requirement: Requirement) -> str:
    try:
        found = metadata.version(requirement.name)
    except metadata.PackageNotFoundError:
        return f'missing; run: pip install "{requirement.name}{requirement.specifier}"'
    if not requirement.specifier.contains(found, prereleases=True):
        return f'{found}, but {requirement.specifier} is needed; run: pip install "{requirement.name}{requirement.specifier}"'
    return found


def devices() -> list[tuple[str, str]]:
    """(device, description) of everything that torch can compute on here."""
    flags = cpu_flags()
    lines = [("cpu", f"{cpu_name()}, {usable_cores()} of {os.cpu_count()} cores usable, {torch.get_num_threads()} torch threads")]
    lines.append(("", f"torch uses {torch.backends.cpu.get_cpu_capability()}" + (f"; the CPU has {', '.join(flags)}" if flags else "")))
    for number in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(number)
        kind = f"ROCm {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}, sm_{gpu.major}{gpu.minor}"
        lines.append((f"cuda:{number}", f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, {kind}"))
    if torch.xpu.is_available():
        lines += [(f"xpu:{n}", torch.xpu.get_device_name(n)) for n in range(torch.xpu.device_count())]
    if torch.backends.mps.is_available():
        lines.append(("mps", "Apple GPU"))
    if len(lines) == 2:
        build = "is a CPU build" if torch.version.cuda is None and torch.version.hip is None else "sees no GPU: is the driver installed?"
        lines.append(("accelerator", f"none; this torch {build}"))
    return lines


def default_device() -> str:
    """The type of device a run uses: the accelerator if there is one, else the CPU."""
    return torch.accelerator.current_accelerator().type if torch.accelerator.is_available() else "cpu"


def usable_cores() -> int:
    """Cores this process may run on: containers and `taskset` allow fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _multiplied(device: str, dtype: torch.dtype) -> str:
    if products.keeps_sums(torch.device(device), dtype, dtype):
        units = {"amx": " (AMX)", "avx512_bf16": " (in pairs, AVX-512 BF16)"}
        level = torch.ops.tisdpo_cpp.capability() if device == "cpu" else ""
        if device == "cpu" and level not in units:
            return "widened to float32 as they are packed: float32 sums, no faster than float32 heads"
        return f"multiplied as they are, with float32 sums{units.get(level, '')}"
    return "widened to float32 a slice at a time: no product here keeps float32 sums"


def _logits(device: str) -> str:
    from tisdpo.kernels import configs  # Triton is imported only where it runs

    arch = configs.architecture(torch.device(device))
    if arch in configs.PRODUCT:
        return "bfloat16 heads without KL have none: the product writes their gradient (tisdpo.kernels.head)"
    return f"all heads have some: the product that needs none was measured on {', '.join(configs.PRODUCT)}, this is {arch}"


def cpu_name() -> str:
    """The name the maker gave the CPU, or its architecture where the system does not tell."""
    names = _cpuinfo("model name")
    return names[0] if names else platform.processor() or platform.machine()


def cpu_flags() -> list[str]:
    """Those of CPU_FLAGS this CPU has; empty where the system does not tell."""
    flags = " ".join((_cpuinfo("flags") or _cpuinfo("Features"))[:1]).split()
    return [flag for flag in CPU_FLAGS if flag in flags]


def _cpuinfo(key: str) -> list[str]:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return [line.partition(":")[2].strip() for line in lines if line.partition(":")[0].strip() == key]


def backends() -> list[tuple[str, str]]:
    """(what, answer): the backend a run on this machine's device gets and why, and whether each of them can run."""
    forced = os.environ.get("TISDPO_BACKEND")
    lines = [("TISDPO_BACKEND", "not set: the fastest that can run is taken" if forced is None else repr(forced))]
    lines.append(("plan='auto'", "one pass, whatever the size; two for float16, and for nll_coef beside a KL term that is not detached"))
    devices = list(dict.fromkeys(["cpu", default_device()]))
    for device in devices:
        try:
            chosen = backend.resolve("auto", device)
        except (ValueError, RuntimeError) as error:
            lines.append((f"on {device}", f"none: {error}; unset TISDPO_BACKEND or set it to one that can run"))
            continue
        can_run = [name for name, reason in backend.available(device).items() if not reason]
        why = (
            "TISDPO_BACKEND says so"
            if forced not in (None, "", "auto")
            else "the only one here"
            if len(can_run) == 1
            else "the fastest here"
        )
        lines.append((f"on {device}", f"{chosen} ({why})"))
    for device in devices:
        for name, reason in backend.available(device).items():
            lines.append((f"{name} on {device}", f"cannot run: {reason}" if reason else "can run"))
        lines.append((f"bf16 on {device}", f"heads are {_multiplied(device, torch.bfloat16)}"))
        if not backend.available(device)["triton"]:
            lines.append((f"logits on {device}", f"in Triton {_logits(device)}"))
        if device == "cpu":
            own = torch.float32 in products.compiled()
            lines.append(
                ("float32 on cpu", f"matrix products are {'those compiled here: faster than' if own else 'those of'} torch's library")
            )
    return lines


def optional_packages() -> list[tuple[str, str]]:
    """(extra, state) of every optional part: its packages and their versions, or how to get them."""
    lines = []
    for extra, purpose in EXTRAS.items():
        needed = [r for r in requirements() if not _applies(r) and _applies(r, extra)]
        states = [f"{r.name} {_installed(r).split(';')[0]}" for r in needed]
        missing = any("missing" in state for state in states)
        lines.append(
            (
                extra,
                f"{', '.join(states) or 'unknown: tisdpo is not installed'} ({purpose})"
                + missing * f'; run: pip install "tisdpo[{extra}]"',
            )
        )
    return lines
