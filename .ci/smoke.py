"""What an installed wheel must do: bring the C++ backend, which computes what the torch backend computes. Run away from the sources."""

import shutil
import sys

import torch

import tisdpo
from tisdpo.ops import backend

reason = backend.available("cpu")["cpp"]
print(tisdpo.__file__, reason or "has the C++ backend")
if reason and shutil.which("c++") is None:
    print("no C++ compiler here, so the wheel is pure Python")
    sys.exit()
assert backend.resolve("auto", "cpu") == "cpp"
results = {}
for name in ("cpp", "torch"):
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
print("the wheel works: one loss and its gradients by both backends, on", torch.ops.tisdpo_cpp.capability())
