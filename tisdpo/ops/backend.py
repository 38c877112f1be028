"""Which backend runs the folds, and how much memory a chunk of logits may take."""

import logging
import os
from functools import cache

import torch

BACKENDS = ("auto", "torch", "triton", "cpp")

# Bytes of logits (policy, and reference where needed) that may exist at one time. CPU: large enough that accumulating dWeight once a
# chunk costs little, see benchmarks/NOTES.md. Accelerators: a few thousand rows of the largest vocabularies.
CHUNK_BYTES = {"cpu": 64 << 20, "default": 1 << 30}

# Rows of a chunk are visited in blocks of about this many bytes: on a CPU a block then stays in the last-level cache between the passes.
BLOCK_BYTES = {"cpu": 2 << 20, "default": 256 << 20}

# A pair longer than the chunk is held nevertheless, up to this many times the budget; beyond that its logits are computed twice. On a CPU
# a second product costs far more than the memory.
LONG_PAIR = {"cpu": 8, "default": 1}

log = logging.getLogger("tisdpo")


def available() -> dict[str, str]:
    """Every backend with "" if it can run here, else one sentence why not."""
    missing = "not part of this version; the torch backend computes the same"
    return {"torch": "", "triton": missing, "cpp": missing}


def resolve(backend: str, device: str) -> str:
    """The backend that runs for tensors on `device` ("cpu", "cuda", ...): the one asked for, TISDPO_BACKEND, or the fastest there is.

    Raises ValueError for an unknown name and RuntimeError when a forced backend cannot run.
    """
    forced = backend if backend != "auto" else os.environ.get("TISDPO_BACKEND", "auto")
    source = "backend" if backend != "auto" else "TISDPO_BACKEND"
    if forced not in BACKENDS:
        raise ValueError(f"{source} must be one of {', '.join(BACKENDS)}, got {forced!r}")
    if forced != "auto":
        reason = available()[forced]
        if reason:
            raise RuntimeError(f"{source}={forced!r} was asked for, but: {reason}")
        return forced
    chosen = "torch"
    if not torch.compiler.is_compiling():  # a log message would break the graph
        _announce(chosen, device)
    return chosen


@cache
def _announce(backend: str, device: str) -> None:
    """Say once a device which backend runs and why."""
    log.info("tisdpo runs the %r backend on %s: it is the only one in this version", backend, device)


def chunk_rows(vocabulary: int, models: int, itemsize: int, device: str) -> int:
    """Rows of logits that fit the byte budget: CHUNK_BYTES / (V * itemsize * models), at least one."""
    return max(1, _for(device, CHUNK_BYTES) // (max(vocabulary, 1) * itemsize * models))


def longest_held(chunk_rows: int, device: str) -> int:
    """Rows of the longest pair whose logits are kept instead of computed twice."""
    return chunk_rows * _for(device, LONG_PAIR)


def block_rows(vocabulary: int, itemsize: int, device: str) -> int:
    """Rows of one visit of the fold, see BLOCK_BYTES."""
    return max(1, _for(device, BLOCK_BYTES) // (max(vocabulary, 1) * itemsize))


def _for(device: str, table: dict[str, int]) -> int:
    return table.get(device, table["default"])
