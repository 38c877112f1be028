"""The C++ kernels for CPUs that this one is not, compiled into a small program: NEON under qemu, sixteen lanes in vectors of four.

On an x86-64 machine the first needs `apt install g++-aarch64-linux-gnu qemu-user-static`.
"""

import math
import shutil
import struct
import subprocess
from pathlib import Path

import pytest
import torch
from cases import KLS, TRANSFORMS, truth
from test_cpp import assert_as_accurate, gradient, largest_of, normal, statistics

from tisdpo.ops import cpp_fold, torch_fold

pytestmark = pytest.mark.long

HERE = Path(__file__).parent
FLAGS = ["-std=c++17", "-O3", "-ffp-contract=fast", "-Wno-psabi", f"-I{HERE.parent / 'csrc'}"]
TYPES = [torch.float32, torch.bfloat16, torch.float16]
# name: (compiler, flags, emulator)
MACHINES = {
    "sixteen lanes": ("c++", ["-DLANES=16"], []),
    "NEON": ("aarch64-linux-gnu-g++", ["-static"], ["qemu-aarch64-static"]),
}


@pytest.fixture(scope="module", params=MACHINES)
def program(request, tmp_path_factory):
    compiler, flags, emulator = MACHINES[request.param]
    missing = [tool for tool in (compiler, *emulator) if not shutil.which(tool)]
    if missing:
        pytest.skip(f"needs {' and '.join(missing)}")
    path = tmp_path_factory.mktemp("kernels") / "kernels"
    subprocess.run([compiler, *FLAGS, *flags, str(HERE / "kernels_program.cpp"), "-o", path], check=True, timeout=120)
    return [*emulator, path]


def call(program, case: bytes, *tensors) -> torch.Tensor:
    case += b"".join(x.contiguous().view(torch.uint8).numpy().tobytes() for x in tensors)
    output = subprocess.run(program, input=case, capture_output=True, check=True, timeout=120).stdout
    return torch.frombuffer(bytearray(output), dtype=torch.float32)


def run(program, z, q, target, biases, g, g_kl, kl, transform):
    """(statistics [5, rows], D [rows, V]) of the program."""
    _, inner, outer, softcap = cpp_fold._options(kl, *transform)
    rows, V = z.shape
    sizes = (0, rows, V, TYPES.index(z.dtype), KLS.index(kl), biases[0] is not None, softcap)
    tensors = (z, q, *(b for b in biases if b is not None), target, g, g_kl)
    output = call(program, struct.pack("=7q2f", *sizes, inner, outer), *tensors)
    return output[: 5 * rows].view(5, rows), output[5 * rows :].view(rows, V)


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("kl", KLS)
@pytest.mark.parametrize("dtype", TYPES, ids=lambda t: str(t)[6:])
def test_folds_equal_the_formulas(program, dtype, kl, transform):
    transform = TRANSFORMS[transform]
    for V in (1, 3, 15, 16, 17, 1024, 2050):
        z, q = normal(5, V, seed=V, dtype=dtype), normal(5, V, seed=V + 1, dtype=dtype)
        z[1, V // 2], z[2, 0] = 1e4, -1e4
        if V > 2 and transform[1] is None:
            z[3, V // 3] = -math.inf
        target = torch.tensor([0, V - 1, V // 2, min(V - 1, 1), -1])
        biases = (normal(V, seed=2), normal(V, seed=3)) if V % 2 else (None, None)
        g, g_kl = normal(5, seed=4, scale=1.0), normal(5, seed=5, scale=1.0)
        stats, d = run(program, z, q, target, biases, g, g_kl, kl, transform)

        leaf = z.double().requires_grad_()
        expected = truth(leaf, target, q, *biases, kl, transform)
        largest = largest_of(z, q, *biases)
        by_torch = statistics(z.float(), target, q.float(), *biases, kl, transform, by=torch_fold)
        for column, true, what in zip((1, 3, 4), expected, ("logp", "ref_logp", "KL")):
            if true is not None:
                assert_as_accurate(stats[column], by_torch[column], true, largest, f"{what}, V = {V}")
        total = (g * expected[0]).sum() + (0 if kl is None else (g_kl * expected[2]).sum())
        (true,) = torch.autograd.grad(total, leaf)
        wide = gradient(z.float().clone(), target, q.float(), by_torch, g, g_kl if kl else None, *biases, kl, transform, by=torch_fold)
        assert_as_accurate(d, wide, true, largest, f"gradient, V = {V}")
        assert (d[4] == 0).all()


@pytest.mark.parametrize("by_columns", [(False, False), (False, True), (True, False), (True, True), "turned"])
@pytest.mark.parametrize("types", [(0, 0), (1, 1), (2, 2), (0, 1), (1, 2)])
def test_products_keep_their_float32_sums(program, types, by_columns):
    turned = by_columns == "turned"
    if turned and len(program) > 1:  # NEON's kernels have no such way (turned_width = 0), so nothing would be tested
        pytest.skip("only products of sixteen lanes are turned")
    by_columns = (False, True) if turned else by_columns
    for M, N, K in ((1, 1, 1), (5, 63, 17), (13, 65, 257), (97, 129, 300), (300, 33, 513)):
        a, b = normal(M, K, seed=1, scale=1.0, dtype=TYPES[types[0]]), normal(K, N, seed=2, scale=1.0, dtype=TYPES[types[1]])
        out = normal(M, N, seed=3)
        stored = [x.T if columns else x for x, columns in zip((a, b), by_columns)]
        found = call(program, struct.pack("=9q", 1, M, N, K, *types, *by_columns, turned), *stored, out).view(M, N)
        torch.testing.assert_close(found.double(), out.double() + a.double() @ b.double(), rtol=2e-7, atol=4e-7 * K)
