"""What operators share that compute the gradients of a loss in their forward: the backward, one factor from upstream."""

import torch
from torch import Tensor

from tisdpo.ops import backend as backends


def register(operator, *, needs: int, backend: int, function: str) -> None:
    """Register the backward of an operator (loss [], statistics, gradients of its first three inputs or empty ones): these gradients times
    that of the loss. needs, backend: positions of these inputs; function: what its users call."""

    def setup(ctx, inputs, output):
        ctx.needs, ctx.backend, ctx.inputs = inputs[needs], inputs[backend], len(inputs)
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)  # no zeros in the shape of the gradients that came out
        ctx.save_for_backward(*output[2:])

    def backward(ctx, g_loss, *_):
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError(
                f"{function} has no second derivative: drop create_graph=True, or use the plain formulas of tisdpo.reference"
            )
        if g_loss is None:  # autograd sends nothing for a loss that nothing depends on
            return (None,) * ctx.inputs
        return *_scaled(ctx, g_loss), *[None] * (ctx.inputs - 3)

    operator.register_autograd(backward, setup_context=setup)


def _scaled(ctx, g_loss: Tensor) -> list[Tensor | None]:
    """The stored gradients times g_loss [].

    In place where this is the last backward, so that dWeight exists once; a later one (retain_graph=True) needs the values as they are.
    g_loss stays in float32: torch then multiplies 16-bit gradients in float32 and rounds once.
    """
    last = is_last_backward(g_loss)
    scale = Tensor.mul_ if last else Tensor.mul
    unscaled = last and g_loss.device.type == "cpu" and g_loss == 1  # on a device the host would have to wait for the answer
    saved_tensors = ctx.saved_tensors  # under checkpointing they can be had once
    if last and backends.resolve(ctx.backend, g_loss.device.type, saved_tensors[0].dtype) == "triton":
        from tisdpo.kernels.scale import scale_ as scale
    return [(saved if unscaled else scale(saved, g_loss)) if need else None for saved, need in zip(saved_tensors, ctx.needs)]


def is_last_backward(g: Tensor) -> bool:
    """Whether the running backward frees the graph. Torch answers that for its own compiled graphs; where it does not, or traces: no."""
    is_kept = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return type(g) is Tensor and not torch.compiler.is_compiling() and is_kept is not None and not is_kept()
