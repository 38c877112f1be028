"""What an installed wheel must do: compute what the torch backend computes, with the C++ backend if it has one. Run away from the sources.

python smoke.py cpp       # a wheel that was built where there is a C++ compiler
python smoke.py pure      # one that was built with TISDPO_BUILD_CPP=0
"""

import shutil
import sys

import torch

import tisdpo
from tisdpo.doctor import report
from tisdpo.ops import backend

kind, reason = sys.argv[1], backend.available("cpu")["cpp"]
print(tisdpo.__file__, reason or "has the C++ backend")
if reason and kind == "cpp" and shutil.which("c++") is None:
    print("no C++ compiler here, so the wheel is pure Python")
    kind = "pure"
assert backend.resolve("auto", "cpu") == ("torch" if kind == "pure" else "cpp")
if kind == "pure":
    assert "pip install --no-build-isolation" in reason and f"cannot run: {reason}" in report()
results = {}
for name in ("auto", "torch"):
    torch.manual_seed(0)
    hidden, weight = torch.randn(9, 16, requires_grad=True), torch.randn(50, 16, requires_grad=True)
    target, boundaries, ref_hidden = torch.randint(0, 50, (9,)), torch.tensor([0, 4, 9]), torch.randn(9, 16)
    loss = tisdpo.linear_tis_dpo_loss(
        hidden, weight, target, boundaries, ref_hidden=ref_hidden, ref_weight=torch.randn(50, 16),
        objective=tisdpo.Objective(kl="reverse"), backend=name,
    ).loss  # fmt: skip
    results[name] = [loss.detach(), *torch.autograd.grad(loss, [hidden, weight])]
for a, b in zip(*results.values()):
    torch.testing.assert_close(a, b)
how = "in torch alone" if kind == "pure" else f"by both backends, on {torch.ops.tisdpo_cpp.capability()}"
print(f"the wheel works: one loss and its gradients {how}")
