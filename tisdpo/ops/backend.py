"""Which backend runs the folds, and how much memory a chunk of logits, or of D where there are none, may take."""

import importlib.util
import logging
import os
from functools import cache, wraps

import torch

from tisdpo.ops import extension

BACKENDS = ("auto", "torch", "triton", "cpp")
GPUS = ("cuda", "xpu")  # devices that Triton compiles for; ROCm calls itself cuda

# Bytes of logits that may exist at one time: of one model, and of policy and reference together. CPU: large enough that accumulating
# dWeight once a chunk costs little, small enough for a quarter of plain torch's memory, see benchmarks/NOTES.md. Accelerators: an H200 took
# 1.25 x its products with 1 GiB, 1.16 x with 2 (16384 rows, V = 128256).
CHUNK_BYTES = {"cpu": (48 << 20, 96 << 20), "default": (2 << 30, 2 << 30)}

# The same where nothing in the logits waits for its pair and dWeight is not summed over chunks: fewer rows cost less.
CHUNK_BYTES_LATER = {"cpu": (40 << 20, 64 << 20), "default": (1 << 30, 1 << 30)}

# But never fewer rows than this: for every chunk the head is packed and a float32 dWeight read and written, whatever its rows, so with a
# large vocabulary a fixed number of bytes would make that the largest part (float32, V = 151936: 82 rows 1.34 x the products, 270 rows
# 1.22 x; 16 bits, V = 32000: 128 to 196 rows 1.19 x, 256 rows 1.11 x). TISDPO_CHUNK_MIB is taken as it is.
LEAST_ROWS = {"cpu": 256, "default": 1}

# Rows of a chunk come in multiples of this where there are so many: the tiles of a GPU's products.
ROW_MULTIPLE = {"cpu": 1, "default": 128}

# Up to so many tokens that make one chunk are walked over whether ignored or not: to count those that are not, the host would have to wait.
FEW_ROWS = {"cpu": 0, "default": 512}

# Rows of a chunk are visited in blocks of about this many bytes: on a CPU a block then stays in the last-level cache between the passes.
BLOCK_BYTES = {"cpu": 2 << 20, "default": 256 << 20}

log = logging.getLogger("tisdpo")


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def available(device: str) -> dict[str, str]:
    """Every backend with "" if it can run on tensors of `device` ("cpu", "cuda", ...), else one sentence why not."""
    return {"torch": "", "triton": _triton(device), "cpp": _cpp(device)}


def _triton(device: str) -> str:
    if importlib.util.find_spec("triton") is None:
        return "the triton package is not installed; a CUDA or ROCm build of torch brings it, else: pip install triton"
    if device in GPUS or os.environ.get("TRITON_INTERPRET") == "1":
        return ""
    return f"Triton has no compiler for {device}; set TRITON_INTERPRET=1 before Python starts to run the kernels, slowly, interpreted"


def _cpp(device: str) -> str:
    return extension.problem() if device == "cpu" else f"the C++ kernels run on a CPU, not on {device}"


def resolve(backend: str, device: str, dtype: torch.dtype = torch.float32) -> str:
    """The backend that runs for tensors on `device` ("cpu", "cuda", ...): the one asked for, TISDPO_BACKEND, or the fastest there is.

    Raises ValueError for an unknown name and RuntimeError when a forced backend cannot run there, or not in `dtype`.
    """
    forced = backend if backend != "auto" else os.environ.get("TISDPO_BACKEND", "auto")
    source = "backend" if backend != "auto" else "TISDPO_BACKEND"
    if forced not in BACKENDS:
        raise ValueError(f"{source} must be one of {', '.join(BACKENDS)}, got {forced!r}")
    if forced != "auto":
        reason = available(device)[forced]
        if not reason and not _serves(forced, device, dtype):
            reason = "its kernels compute in float32, not in float64"
        if reason:
            able = " and ".join(name for name in available(device) if _serves(name, device, dtype))
            raise RuntimeError(f"{source}={forced!r} was asked for, but only {able} can do this: {reason}")
        return forced
    chosen, why = _fastest(device)
    _announce(chosen, why, device)
    return "torch" if dtype == torch.float64 else chosen


def _serves(backend: str, device: str, dtype: torch.dtype) -> bool:
    return not available(device)[backend] and (backend == "torch" or dtype != torch.float64)


@cache
def _fastest(device: str) -> tuple[str, str]:
    """(backend, why) where nothing is forced. Triton's interpreter is for tests and never chosen."""
    can_run = {name for name, reason in available(device).items() if not reason}
    if device in GPUS and "triton" in can_run:
        return "triton", "its kernels are the fastest on a GPU"
    if device == "cpu" and "cpp" in can_run:
        return "cpp", "its kernels are the fastest on a CPU"
    return "torch", "no faster one can run here, see `tisdpo doctor`"


@cache
def _announce(backend: str, why: str, device: str) -> None:
    """Say once a device which backend runs and why; a GPU without its kernels is worth a warning."""
    level = logging.WARNING if device in GPUS and backend == "torch" else logging.INFO
    log.log(level, "tisdpo runs the %r backend on %s: %s", backend, device, why)


def chunk_rows(vocabulary: int, models: int, itemsize: int, device: str, later: bool = False) -> int:
    """Rows of logits that fit the byte budget: bytes / (V * itemsize * models), at least one; LEAST_ROWS without TISDPO_CHUNK_MIB."""
    least = 1 if "TISDPO_CHUNK_MIB" in os.environ else _for(device, LEAST_ROWS)
    return max(least, chunk_bytes(device, models, later) // (max(vocabulary, 1) * itemsize * models))


def chunk_bytes(device: str, models: int, later: bool = False) -> int:
    """The budget: CHUNK_BYTES or CHUNK_BYTES_LATER, or TISDPO_CHUNK_MIB of the environment; ValueError if that is not positive."""
    text = os.environ.get("TISDPO_CHUNK_MIB")
    if text is None:
        return _for(device, CHUNK_BYTES_LATER if later else CHUNK_BYTES)[models - 1]
    try:
        size = int(float(text) * (1 << 20))
    except (ValueError, OverflowError):
        size = 0
    if size <= 0:
        raise ValueError(f"TISDPO_CHUNK_MIB must be a positive number of MiB of logits, got {text!r}")
    return size


def operator(name: str, mutates: tuple[str, ...] = ()):
    """A custom operator of this name whose host reads values of its inputs: `torch.compile` leaves it outside of its own CUDA graphs,
    which would repeat what the first values made it launch. Its out-of-memory says what the budget governs. mutates: what it overwrites."""
    tags = (torch.Tag.cudagraph_unsafe,)
    return lambda function: torch.library.custom_op(name, names_the_budget(function), mutates_args=mutates, tags=tags)


def names_the_budget(function):
    """A function whose out-of-memory says what the budget governs, and what to do about the rest."""

    @wraps(function)
    def run(*args, **kwargs):
        try:
            return function(*args, **kwargs)
        except torch.OutOfMemoryError as error:
            device = next(x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)).device.type
            pairs = "" if "TISDPO_CHUNK_MIB" in os.environ else "; unset, a single pair may take as much as a head"
            raise torch.OutOfMemoryError(
                f"no memory for the loss on the head: lower the budget by TISDPO_CHUNK_MIB (now {chunk_bytes(device, 1) >> 20} MiB of "
                f"logits, or of their gradient, at a time{pairs}), or give fewer tokens at a time, on which the memory for the gradient of "
                f"a trained head depends. {error}"
            ) from None

    return run


def longest_held(chunk_rows: int, hidden_size: int, models: int) -> int:
    """Rows of the longest pair whose logits are kept instead of computed twice.

    A pair longer than the budget is kept while its logits, r * V * models, take no more than a head in their dtype, H * V: so much a
    step has anyway. With TISDPO_CHUNK_MIB the budget is all there is.
    """
    return chunk_rows if "TISDPO_CHUNK_MIB" in os.environ else max(chunk_rows, hidden_size // models)


def row_multiple(device: str) -> int:
    """Rows of a chunk are multiples of this where possible."""
    return _for(device, ROW_MULTIPLE)


def few_rows(device: str) -> int:
    """Tokens among which the ignored ones are not searched for, see FEW_ROWS."""
    return _for(device, FEW_ROWS)


def block_rows(vocabulary: int, itemsize: int, device: str) -> int:
    """Rows of one visit of the fold, see BLOCK_BYTES."""
    return max(1, _for(device, BLOCK_BYTES) // (max(vocabulary, 1) * itemsize))


def _for(device: str, table: dict):
    return table.get(device, table["default"])
