"""Tile sizes of the kernels: one table, with reasons. The architecture is looked up once a device.

A row's program streams through the vocabulary in blocks. Bandwidth needs some 30 KB in flight on every multiprocessor (4.3 TB/s x 0.8 us
/ 132): one block of 4096 float32 logits and 8 warps are 16 KB (with KL 32 KB), 16 values a thread, and three to eight programs fit beside
each other. Larger blocks spill with KL or leave one program a multiprocessor; smaller ones pay more for the reductions, two of which join
all warps once a block: few warps are better there (sm_90). `python -m benchmarks.kernel_report` prints registers, spills and shared memory
of every row. sm_90 was measured on an H200 (benchmarks/NOTES.md, 2026-11-27); the others on no GPU.
"""

import logging
from functools import cache
from typing import NamedTuple

import torch

log = logging.getLogger("tisdpo")


class Tile(NamedTuple):
    """Logits of one block, warps of a program, and how many programs fill the device (rows are split until there are so many)."""

    block: int
    warps: int
    programs: int


# kernel: {architecture: tile}. Programs: 32 warps for every multiprocessor (A100 108, H100/H200 132, B200 148; MI300X 16 for 304 units).
TABLE = {
    "statistics": {
        "sm_80": Tile(4096, 8, 4 * 108),
        "sm_90": Tile(2048, 4, 8 * 132),  # H200, GB/s: 3850, with KL 3965 and 3947; 4096 and 8 warps: 3861, 3264, 3255
        "sm_100": Tile(4096, 8, 4 * 148),
        "gfx942": Tile(4096, 4, 4 * 304),  # a wavefront has 64 lanes: as many values a lane
    },
    "gradient": {
        "sm_80": Tile(4096, 8, 4 * 108),
        "sm_90": Tile(4096, 8, 4 * 132),
        "sm_100": Tile(4096, 8, 4 * 148),
        "gfx942": Tile(4096, 4, 4 * 304),
    },
}
FALLBACK = Tile(2048, 4, 256)


class ProductTile(NamedTuple):
    """A tile of the product of `kernels.head`: rows, columns, items of H at a time; tiles down before the next column of tiles; warps of a
    program; loads under way at a time."""

    rows: int
    columns: int
    depth: int
    group: int
    warps: int
    stages: int


# Only where that was measured, and was faster than the library's product with the folds (or, 16384 rows of a trained head, as fast in two
# thirds of the memory). sm_90 (H200, 8192 rows, ms on a cool and on a hot card): 11.0 and 13.0; 3 stages 11.1 and 13.2, a group of 16 11.1
# and 13.3, 256 x 128 11.2 and 13.5, a program a tile 11.4 and 13.6, 32 items of H 11.7 and 13.4; in the four ranges of columns where D
# waits 11.1 and 13.4. The library with float32 logits and both folds: 13.7 and 15.7.
PRODUCT = {"sm_90": ProductTile(128, 256, 64, 8, 8, 4)}

MAX_SPLITS = 64
OCCUPIED = 8  # a narrow gradient keeps one program a row, and so its memory, down to an eighth of the programs that fill the device


def tile(kernel: str, device: torch.device) -> Tile:
    """The row of the table for this device; a fallback, with one log line, for an architecture that has none."""
    return _tile(kernel, architecture(device))


@cache
def _tile(kernel: str, arch: str) -> Tile:
    if arch not in TABLE[kernel]:
        log.warning("tisdpo.kernels.configs has no tile of %r for %s: using %s, which nobody tuned", kernel, arch, FALLBACK)
        return FALLBACK
    return TABLE[kernel][arch]


def product_tile(device: torch.device) -> ProductTile | None:
    """The row of PRODUCT for this device, if there is one."""
    return PRODUCT.get(architecture(device))


@cache
def multiprocessors(device: torch.device) -> int:
    """Programs that run at a time where one fills a multiprocessor."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 8


@cache
def architecture(device: torch.device) -> str:
    """sm_90, gfx942, ...; newer chips of a family count as the family (sm_89: sm_80, sm_103: sm_100). The interpreter counts as sm_90."""
    if device.type == "cpu":
        return "sm_90"
    if device.type != "cuda":
        return device.type
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return properties.gcnArchName.split(":")[0]
    return f"sm_{properties.major}0"


def splits(rows: int, vocabulary: int, tile: Tile) -> tuple[int, int]:
    """(programs of a row, logits of each): one where there are rows enough, else as many as fill the device, with at least a block each."""
    count = 1
    while rows * count < tile.programs and count < MAX_SPLITS and vocabulary > 2 * count * tile.block:
        count *= 2
    blocks = -(-vocabulary // tile.block)
    span = -(-blocks // count) * tile.block
    return -(-vocabulary // span), span
