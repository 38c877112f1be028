"""Every kernel is compiled ahead of time, with its production tiles, for GPUs that are not here; what the compiler made of it is read."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).parent.parent
ENVIRONMENT = {**os.environ, "TRITON_INTERPRET": "0"}  # the interpreter of the other tests compiles nothing


def report(*args) -> dict:
    command = [sys.executable, "-m", "benchmarks.kernel_report", "--json", *args]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.stdout, done.stderr
    return json.loads(done.stdout) | {"code": done.returncode, "errors": done.stderr}


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_no_kernel_spills_overflows_or_loads_in_small_pieces(arch):
    found = report("--arch", arch)
    assert len(found["rows"]) > 20
    assert [f"{row['kernel']}: {row['problems']}" for row in found["rows"] if row["problems"]] == [] and found["code"] == 0
    streams = [row for row in found["rows"] if row["wide_loads"] is not None]
    assert streams and all(row["registers"] > 16 and row["block"] >= 1024 for row in streams)


def test_a_tile_that_is_too_large_or_not_aligned_is_found():
    """The report must be able to fail: 8192 values on one warp spill, and rows that start anywhere cannot be loaded 16 bytes at a time."""
    code = """
import json
from benchmarks import kernel_report as k
from tisdpo.kernels import configs
variant = next(v for v in k.variants() if v.name == "gradient fp32 reverse")
configs.TABLE["gradient"]["sm_90"] = configs.Tile(8192, 1, 528)
large = k.compiled(variant, "sm_90").problems
configs.TABLE["gradient"]["sm_90"] = configs.Tile(4096, 8, 528)
source = k._source
k._source = lambda *args: (lambda s: (s.attrs.clear(), s)[1])(source(*args))
print(json.dumps([large, k.compiled(variant, "sm_90").problems]))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    large, unaligned = json.loads(done.stdout or "[[], []]")
    assert any("spills" in problem for problem in large), done.stderr
    assert any("16 at a time" in problem for problem in unaligned), done.stderr


def test_every_launch_asks_for_fused_multiply_adds():
    """As the report does: what is compiled there is what runs. Without, there are none, whatever Triton's default is."""
    sources = [path.read_text() for path in (ROOT / "tisdpo/kernels").glob("*.py")]
    launches = [text.count("_kernel[(") for text in sources]
    assert sum(launches) == 14 and launches == [text.count("**FUSED") for text in sources]
    code = """
from benchmarks import kernel_report as k
variant = next(v for v in k.variants() if v.name == "gradient fp32 reverse")
tile = k.configs.TABLE["gradient"]["sm_90"]
source = k._source(variant, variant.flags | dict(BLOCK=tile.block))
for options in (k.FUSED, {"enable_fp_fusion": False}):
    print(k.triton.compile(source, target=k.ARCHITECTURES["sm_90"][0], options=options).asm["ptx"].count("fma.rn"))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    fused, apart = (int(count) for count in (done.stdout or "0 0").split())
    assert fused > 0 == apart, done.stderr


def test_all_vocabularies_are_specialised_as_the_report_says():
    """By Triton's own rule for integer arguments: a vocabulary is divisible by 16 or not, 1 is a constant, everything else is one type."""
    code = """
from triton.runtime.jit import native_specialize_impl
from triton.compiler import make_backend
from benchmarks import kernel_report as k
backend = make_backend(k.ARCHITECTURES["sm_90"][0])
print([native_specialize_impl(type(backend), v, False, True, True) for v in (*k.VOCABULARIES, 1)])
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    found = eval(done.stdout or "[]")
    assert len(found) == 5 and len(set(found[:4])) == 1 and found[0] == ("i32", "D") and found[4][0] == "constexpr", (
        done.stdout + done.stderr
    )
