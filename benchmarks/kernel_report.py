"""What the compiler makes of every Triton kernel, for GPUs that need not be there: registers, spills, shared memory, width of the loads.

    python -m benchmarks.kernel_report                    # a table for sm_80, sm_90, sm_100 and gfx942
    python -m benchmarks.kernel_report --arch sm_90 --json

The kernels are compiled ahead of time with the tile sizes of `tisdpo.kernels.configs` and the types and alignments that a head with a
vocabulary of 32000, 128256, 151936 or 262208 gives them: the vocabulary is an argument, and all of these are multiples of 16, so they share
the compiled code. Exit code 1 where a kernel spills, needs more shared memory than the chip has, loads rows less than 16 bytes at a time
although it could, or is a product without the chip's matrix instructions, bulk loads and wide stores.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "0"  # the interpreter compiles nothing

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tisdpo.kernels import boundaries, configs, fold, head, head_kl, scale, sequence_sums
from tisdpo.kernels.launch import FUSED

VOCABULARIES = (32000, 128256, 151936, 262208)

# name: (target, bytes of shared memory a program may have)
ARCHITECTURES = {
    "sm_80": (GPUTarget("cuda", 80, 32), 163 << 10),
    "sm_90": (GPUTarget("cuda", 90, 32), 227 << 10),
    "sm_100": (GPUTarget("cuda", 100, 32), 227 << 10),
    "gfx942": (GPUTarget("hip", "gfx942", 64), 64 << 10),
}


# (kernel, architecture, Triton): bytes of the stack. Seven stores and seven loads once a tile, outside of the loop of the product, of 5000
# instructions. 3.6, with which it was measured, 3.7 and 3.9 need none, and what helps 3.8 makes 3.9 spill.
KNOWN_SPILLS = {("exponentials, D", "sm_90", "3.8"): 48}


@dataclass(frozen=True)
class Variant:
    """One compiled form of a kernel: its compile-time flags, and the types of the pointers that have no fixed one."""

    name: str
    kernel: object
    tile: str | None  # the row of configs.TABLE; "product": of configs.PRODUCT
    flags: dict
    types: dict
    streams: bool = True  # reads whole rows, so that the width of its loads matters
    ones: tuple[str, ...] = ()  # integer arguments equal to 1: Triton makes compile-time constants of them


@dataclass
class Row:
    """What one variant became on one architecture."""

    kernel: str
    arch: str
    block: int
    warps: int
    registers: int
    spilled_bytes: int
    shared_bytes: int
    shared_limit: int
    wide_loads: float | None  # share of the loaded bytes that come 16 at a time; None where the kernel reads no rows
    reads_before_writing: bool  # where the gradient shares the memory of the logits: all of a block is loaded before any of it is stored
    missing: list[str]  # instructions that a product needs and does not have

    @property
    def problems(self) -> list[str]:
        found = []
        if self.spilled_bytes > KNOWN_SPILLS.get((self.kernel, self.arch, ".".join(triton.__version__.split(".")[:2])), 0):
            found.append(f"spills {self.spilled_bytes} bytes")
        if self.shared_bytes > self.shared_limit:
            found.append(f"needs {self.shared_bytes} bytes of shared memory, {self.arch} has {self.shared_limit}")
        if self.wide_loads is not None and self.wide_loads < 0.6:  # a third may be the few scalars of a row, counted once
            found.append(f"loads only {self.wide_loads:.0%} of its bytes 16 at a time")
        if not self.reads_before_writing:
            found.append("writes over logits that were not read yet")
        return found + [f"has no {name}" for name in self.missing]


def variants() -> list[Variant]:
    """The forms that the drivers launch: float32 logits of a product, 16-bit logits of a caller, with and without a reference and KL; D in
    their place, or where it waits. float16 differs from bfloat16 in no width and has one form of each."""
    none = dict(SOFTCAP=False, HAS_BIAS=False, HAS_REF_BIAS=False)
    everything = dict(SOFTCAP=True, HAS_BIAS=True, HAS_REF_BIAS=True)
    wide, bf16 = dict(z_ptr="*fp32", q_ptr="*fp32"), dict(z_ptr="*bf16", q_ptr="*bf16")
    found = []
    for label, types in (("fp32", wide), ("bf16", bf16)):
        for name, flags in (
            ("one model", dict(HAS_REF=False, KL=0, **none)),
            ("reference", dict(HAS_REF=True, KL=0, **none)),
            ("reverse", dict(HAS_REF=True, KL=1, **none)),
            ("forward", dict(HAS_REF=True, KL=2, **none)),
            ("reverse, bias, softcap", dict(HAS_REF=True, KL=1, **everything)),
        ):
            found.append(Variant(f"statistics {label} {name}", fold.statistics_kernel, "statistics", flags, types))
    half, alone = dict(z_ptr="*fp16", q_ptr="*fp16"), dict(HAS_REF=False, KL=0, **none)
    found.append(Variant("statistics fp16 one model", fold.statistics_kernel, "statistics", alone, half))
    alone = dict(KL=0, HAS_G=False, NARROW_IN_PLACE=False, **none)
    found.append(Variant("gradient fp16 one model", fold.gradient_kernel, "gradient", alone, half | dict(d_ptr="*fp16")))
    for label, types, narrow in (
        ("fp32>bf16 in place", wide | dict(d_ptr="*bf16"), True),
        ("fp32>bf16 elsewhere", wide | dict(d_ptr="*bf16"), False),
        ("fp32", wide | dict(d_ptr="*fp32"), False),
        ("bf16", bf16 | dict(d_ptr="*bf16"), False),
    ):
        for name, flags in (
            ("one model", dict(KL=0, HAS_G=False, **none)),
            ("reverse", dict(KL=1, HAS_G=False, **none)),
            ("forward", dict(KL=2, HAS_G=False, **none)),
            ("reverse, bias, softcap", dict(KL=1, HAS_G=True, **everything)),
        ):
            flags = flags | dict(NARROW_IN_PLACE=narrow)
            found.append(Variant(f"gradient {label} {name}", fold.gradient_kernel, "gradient", flags, types))
    combine = dict(HAS_REF=True, KL=1, **everything, ROWS=128, SPLITS=2)
    found.append(Variant("combine reverse, bias, softcap", fold.combine_kernel, None, combine, wide, streams=False))
    # a chunk that needs no splitting, and the smallest inputs
    found.append(Variant("combine, one split", fold.combine_kernel, None, combine, wide, streams=False, ones=("splits",)))
    single = dict(streams=False, ones=("rows", "inner_rows", "splits", "sequences", "vocabulary", "z_inner", "q_inner", "d_inner"))
    one_row = dict(HAS_REF=True, KL=2, **none)
    found.append(Variant("combine, all integers one", fold.combine_kernel, None, one_row | dict(ROWS=128, SPLITS=2), wide, **single))
    found.append(Variant("statistics, all integers one", fold.statistics_kernel, "statistics", one_row, wide, **single))
    one_row = dict(KL=2, HAS_G=True, NARROW_IN_PLACE=False, **none)
    found.append(Variant("gradient, all integers one", fold.gradient_kernel, "gradient", one_row, wide | dict(d_ptr="*fp32"), **single))
    for softcap in (False, True):
        for bias in (False, True):
            for write in (True, False):
                flags = dict(SOFTCAP=softcap, HAS_BIAS=bias, WRITE=write, WIDEN=False, AHEAD=not (softcap or bias))
                options = [name for name, on in (("D", write), ("bias", bias), ("softcap", softcap)) if on]
                name = ", ".join(["exponentials", *options])
                found.append(Variant(name, head.exponentials_kernel, "product", flags, dict(d_ptr="*bf16"), streams=False))
    models = {
        "e": dict(SECOND=False, LOG=False, WRITE=True), "reverse": dict(SECOND=True, LOG=True, WRITE=True),
        "forward": dict(SECOND=True, LOG=False, WRITE=True), "statistics": dict(SECOND=True, LOG=False, WRITE=False),
    }  # fmt: skip
    for name, flags in models.items():
        flags, types = flags | dict(WIDEN=False, PARTS=head_kl.PARTS), dict(e_ptr="*bf16", r_ptr="*fp16" if flags["LOG"] else "*bf16")
        found.append(Variant(f"product of a model, {name}", head_kl.model_kernel, "product", flags, types, streams=False))
    for reverse in (False, True):
        kind, types = "reverse" if reverse else "forward", dict(e_ptr="*bf16", r_ptr="*fp16" if reverse else "*bf16")
        flags = dict(REVERSE=reverse, HAS_G=True, WRITE=True, ROWS=head.FINISH_ROWS, TILES=head.FINISH_TILES)
        found.append(Variant(f"finish two models, {kind}", head_kl.finish_kernel, None, flags, {}, streams=False))
        flags = dict(REVERSE=reverse, COLUMNS=configs.PRODUCT["sm_90"].columns)
        found.append(Variant(f"combine two models, {kind}", head_kl.combine_kernel, "gradient", flags, types))
    for softcap in (False, True):
        flags, types = dict(SOFTCAP=softcap, HAS_BIAS=softcap), dict(hidden_ptr="*bf16", weight_ptr="*bf16", d_ptr="*bf16")
        label = "softcap" if softcap else "plain"
        found.append(Variant(f"target logits, {label}", head.target_kernel, None, flags | dict(BLOCK=1024), types, streams=False))
        flags = dict(SOFTCAP=softcap, ROWS=head.FINISH_ROWS, TILES=head.FINISH_TILES)
        found.append(Variant(f"finish exponentials, {label}", head.finish_kernel, None, flags, types, streams=False))
    flags = dict(COLUMNS=configs.PRODUCT["sm_90"].columns, BLOCK=head.FIX_BLOCK)
    found.append(Variant("fix exponentials", head.fix_kernel, None, flags, dict(d_ptr="*bf16"), streams=False))
    sums = dict(HAS_KL=True, WEIGHTS=2, BLOCK=sequence_sums.BLOCK)
    found.append(Variant("weighted sums", sequence_sums.sums_kernel, None, sums, {}, streams=False))
    found.append(Variant("weighted sums, one sequence", sequence_sums.sums_kernel, None, sums, {}, **single))
    spread = dict(HAS_D=True, HAS_K=True, BLOCK=sequence_sums.BLOCK)
    found.append(Variant("spread", sequence_sums.spread_kernel, None, spread, {}, streams=False))
    counted, types = dict(HAS_WEIGHTS=True, BLOCK=boundaries.BLOCK), dict(before_ptr="*i64", out_ptr="*i64")
    found.append(Variant("boundaries", boundaries.boundaries_kernel, None, counted, types, streams=False))
    ones = ("tokens", "vocabulary")
    found.append(Variant("boundaries, one token", boundaries.boundaries_kernel, None, counted, types, streams=False, ones=ones))
    found.append(Variant("scale bf16", scale.scale_kernel, None, dict(BLOCK=scale.BLOCK), dict(x_ptr="*bf16")))
    found.append(Variant("scale, one number", scale.scale_kernel, None, dict(BLOCK=scale.BLOCK), {}, streams=False, ones=("numel",)))
    return found


_INTEGERS = {"target_ptr": "*i64", "cu_ptr": "*i64"}
_FLOATS = ("inner", "outer", "scale", "slope", "k", "mu_chosen", "mu_rejected", "lower", "upper")


def _source(variant: Variant, flags: dict) -> ASTSource:
    signature, aligned = {}, {}
    constants = flags | {name: 1 for name in variant.ones if name in variant.kernel.arg_names}
    for place, name in enumerate(variant.kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name.endswith("_desc"):
            rows = constants["ROWS" if name == "hidden_desc" else "COLUMNS"]
            signature[name] = f"tensordesc<bf16[{rows}, {constants['DEPTH']}]>"
        elif name.endswith("_ptr"):
            signature[name] = variant.types.get(name) or _INTEGERS.get(name, "*fp32")
            aligned[(place,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32" if name in _FLOATS else "i32"
            told = name not in (variant.kernel.do_not_specialize or ())
            if told and (name in ("vocabulary", "first", "span", "numel", "columns") or name.endswith(("_outer", "_inner", "_stride"))):
                aligned[(place,)] = [["tt.divisibility", 16]]
    return ASTSource(variant.kernel, signature, constants, aligned)


def compiled(variant: Variant, arch: str) -> Row:
    """Compile one variant for one architecture and read the result."""
    target, limit = ARCHITECTURES[arch]
    flags, options, block = variant.flags, {"num_warps": 4}, 0
    if variant.tile == "product":
        tile = configs.PRODUCT[arch]
        flags = flags | dict(ROWS=tile.rows, COLUMNS=tile.columns, DEPTH=tile.depth, GROUP=tile.group)
        options, block = {"num_warps": tile.warps, "num_stages": tile.stages}, tile.columns
    elif variant.tile:
        tile = configs.TABLE[variant.tile][arch]
        flags, options, block = flags | dict(BLOCK=tile.block), {"num_warps": tile.warps}, tile.block
    kernel = triton.compile(_source(variant, flags), target=target, options=options | FUSED)
    registers, spilled, wide, ordered = _nvidia(kernel) if target.backend == "cuda" else _amd(kernel)
    return Row(
        variant.name, arch, block or flags.get("BLOCK", 0), options["num_warps"], registers, spilled, kernel.metadata.shared, limit,
        wide if variant.streams else None, ordered or not flags.get("NARROW_IN_PLACE", False),
        _missing(kernel.asm["ptx"], flags["WRITE"]) if variant.tile == "product" else [],
    )  # fmt: skip


def _missing(ptx: str, writes: bool) -> list[str]:
    """What the PTX of a product on sm_90 lacks: asynchronous matrix products, bulk loads of tiles, stores of 16 bytes."""
    wanted = {"wgmma": r"wgmma\.mma_async", "bulk tensor loads": r"cp\.async\.bulk\.tensor"}
    wanted |= {"16-byte stores": r"st\.global\S*\.v4\.b32"} if writes else {}
    return [name for name, pattern in wanted.items() if not re.search(pattern, ptx)]


def _nvidia(kernel) -> tuple[int, int, float, bool]:
    cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = subprocess.run([cuobjdump, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", usage))
    text = kernel.asm["ptx"]
    widths = [int(count or 1) * int(bits) // 8 for count, bits in re.findall(r"ld\.global\S*?(?:\.v(\d))?\.b(\d+)", text)]
    ordered = _barrier_between(text, r"ld\.global\S*\.v\d", r"bar\.sync|barrier", r"st\.global")
    return int(found["REG"]), int(found["STACK"]) + int(found["LOCAL"]), _wide_share(widths), ordered


def _amd(kernel) -> tuple[int, int, float, bool]:
    text = kernel.asm["amdgcn"]
    found = dict(re.findall(r"\.(vgpr_count|vgpr_spill_count|private_segment_fixed_size):\s*(\d+)", text))
    spilled = 4 * int(found["vgpr_spill_count"]) + int(found["private_segment_fixed_size"])
    sizes = {"": 4, "x2": 8, "x3": 12, "x4": 16}
    widths = [sizes[size] for size in re.findall(r"(?:global|buffer)_load_dword(x\d)?\s", text)]
    ordered = _barrier_between(text, r"(?:global|buffer)_load_dwordx4", r"s_barrier", r"(?:global|buffer)_store")
    return int(found["vgpr_count"]), spilled, _wide_share(widths), ordered


def _wide_share(widths: list[int]) -> float:
    return sum(w for w in widths if w >= 16) / max(sum(widths), 1)


def _barrier_between(text: str, load: str, barrier: str, store: str) -> bool:
    """Whether a barrier stands between the last wide load in front of the first store, and that store, in the order of the text."""
    first_store = re.search(store, text).start()
    loads = [m.end() for m in re.finditer(load, text[:first_store])]
    return bool(loads) and re.search(barrier, text[loads[-1] : first_store]) is not None


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", nargs="+", choices=ARCHITECTURES, default=list(ARCHITECTURES), help="architectures (default: all)")
    parser.add_argument("--kernel", default="", help="only kernels whose name contains this text")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    args = parser.parse_args(argv)
    rows = []
    if not args.json:
        print(f"triton {triton.__version__}; V = {', '.join(map(str, VOCABULARIES))}: the same code\n")
        print(f"{'kernel':<50}{'arch':>7}{'block':>7}{'warps':>6}{'regs':>6}{'spill':>6}{'shared':>8}  16-byte loads")
    for variant in variants():
        if args.kernel not in variant.name:
            continue
        for arch in args.arch:
            if variant.tile == "product" and arch not in configs.PRODUCT:
                continue
            row = compiled(variant, arch)
            rows.append(row)
            if not args.json:
                wide = "-" if row.wide_loads is None else f"{row.wide_loads:.0%}"
                print(
                    f"{row.kernel:<50}{arch:>7}{row.block:>7}{row.warps:>6}{row.registers:>6}{row.spilled_bytes:>6}{row.shared_bytes:>8}  "
                    f"{wide}",
                    flush=True,
                )
    if args.json:
        print(json.dumps({"triton": triton.__version__, "rows": [asdict(row) | {"problems": row.problems} for row in rows]}, indent=1))
    bad = [f"{row.kernel} on {row.arch} {problem}" for row in rows for problem in row.problems]
    for line in bad:
        print(line, file=sys.stderr)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
