"""The shared library of the C++ operators `torch.ops.tisdpo_cpp` (csrc/): loaded at first use, never needed at import."""

from functools import cache
from pathlib import Path

import torch

PACKAGE = Path(__file__).parents[1]
INTERFACE = 2  # of the operators, as csrc/register.cpp has it: to be raised with every change of a schema
INSTALL = "pip install --no-build-isolation --no-deps --force-reinstall ."  # from a source tree


@cache
def problem() -> str:
    """Loads the extension: "" if its operators are there, else one sentence why not."""
    built = sorted(PACKAGE.glob("_C*.so"))
    if not built:
        return f"its extension was not built (for want of a C++ compiler or torch, or by TISDPO_BUILD_CPP=0); in the sources run: {INSTALL}"
    try:
        torch.ops.load_library(str(built[0]))
    except (OSError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        return f"torch {torch.__version__} cannot load its extension ({reason}); in the sources run: {INSTALL}"
    if not hasattr(torch.ops.tisdpo_cpp, "interface") or torch.ops.tisdpo_cpp.interface() != INTERFACE:
        return f"its extension was built from older sources; run: {INSTALL}"
    return ""
