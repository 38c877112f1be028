"""Builds the package; everything declarative is in pyproject.toml.

The C++ backend (csrc/) is optional: without torch or a compiler, or with TISDPO_BUILD_CPP=0, the package is pure Python and does the same.

The extension uses libtorch's stable ABI and no Python at all, so it is built as any shared library, for every Python and every later torch;
each vector width has a file of its own that is chosen at run time, so there are no flags of this machine's CPU.
"""

import os
import sys

from setuptools import Extension, setup

SOURCES = ["register", "kernels_default", "kernels_avx2", "kernels_avx512", "product_bf16"]
HEADERS = ["fold", "fold_kernels", "product", "product_kernels", "vectors"]


def extensions() -> list[Extension]:
    if os.environ.get("TISDPO_BUILD_CPP") == "0":
        return without("TISDPO_BUILD_CPP=0")
    if sys.platform == "win32":
        return without("its vectors need GCC or Clang, and torch on Windows uses another compiler")
    try:
        from torch.utils.cpp_extension import include_paths, library_paths
    except ImportError as error:
        return without(f"{error}; install torch first and build with: pip install --no-build-isolation")
    return [
        Extension(
            "tisdpo._C",
            [f"csrc/{name}.cpp" for name in SOURCES],
            depends=[f"csrc/{name}.h" for name in HEADERS],
            include_dirs=include_paths(),
            library_dirs=library_paths(),
            libraries=["torch_cpu"],
            define_macros=[("TORCH_TARGET_VERSION", "0x020a000000000000")],  # torch 2.10, the oldest that is supported
            extra_compile_args=["-std=c++17", "-O3", "-ffp-contract=fast", "-fvisibility=hidden", "-Wno-psabi"],
            language="c++",
            py_limited_api=True,  # names the file _C.abi3.so
            optional=True,  # a compiler that fails leaves the package without it
        )
    ]


def without(reason: str) -> list[Extension]:
    print(f"tisdpo: building without the C++ backend: {reason}", file=sys.stderr)
    return []


modules = extensions()
setup(ext_modules=modules, options={"bdist_wheel": {"py_limited_api": "cp310"}} if modules else {})
