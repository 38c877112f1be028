"""Which rows of a batch carry loss, found before the head is read: where the host may wait for the device."""

from typing import NamedTuple

import torch
from torch import Tensor

from tisdpo.ops import values


class LossRows(NamedTuple):
    """The rows to walk over, and the sequences' boundaries [S+1] among them, on the device and on the host.

    index: of the rows that carry loss, None for all; ignored: a mask [N] of rows that do not, but are walked over nevertheless;
    lengths [S]: rows of each sequence that carry loss.
    """

    index: Tensor | None
    ignored: Tensor | None
    cu_seqlens: Tensor
    bounds: list[int]
    lengths: Tensor

    @classmethod
    def of(
        cls, target: Tensor, token_weights: Tensor | None, cu_seqlens: Tensor, vocabulary: int, ignore_index: int, backend: str, few: int
    ) -> "LossRows":
        """Rows without those that are ignored; bad values raise.

        The host does not wait where it knows everything (cu_seqlens lie on the CPU, and nothing is ignored), nor for up to `few` tokens,
        which make one chunk: waiting takes longer than walking over the ignored ones. A CUDA graph has the same rows at every replay.
        """
        tokens, batch = len(target), (target, token_weights, vocabulary, ignore_index)
        if capturing():
            return cls._captured(cu_seqlens, *batch)
        known, cu_seqlens = _known(cu_seqlens, target, ignore_index)
        if backend == "triton" and tokens:
            from tisdpo.kernels.boundaries import boundaries

            found = boundaries(target, token_weights, cu_seqlens, vocabulary, ignore_index)
            if known is not None or tokens <= few:
                return cls._not_waited_for(found, known, cu_seqlens, target, ignore_index)
            sound, *bounds = found.tolist()
            if not sound:  # found out here, it is an error like any other; asserted on the device, it would end the process
                _check(cu_seqlens.cpu(), target.cpu(), None if token_weights is None else token_weights.cpu(), vocabulary, ignore_index)
                raise ValueError("target, token_weights or cu_seqlens are wrong")
            cu_seqlens = found[1:]
        else:
            _check(cu_seqlens, *batch)
            if known is not None:
                return cls(None, None, cu_seqlens, known, cu_seqlens.diff())
            cu_seqlens = _kept_before(target != ignore_index)[cu_seqlens]
            bounds = cu_seqlens.tolist()
        kept = bounds[-1]
        index = None if kept == tokens else torch.nonzero_static(target != ignore_index, size=kept)[:, 0]
        return cls(index, None, cu_seqlens, bounds, cu_seqlens.diff())

    @classmethod
    def _not_waited_for(cls, found: Tensor, known: list[int] | None, cu_seqlens: Tensor, target: Tensor, ignore_index: int) -> "LossRows":
        message = "a target is outside of the vocabulary, a token weight negative or not finite, or cu_seqlens are wrong"
        torch._assert_async(found[0], message)
        unknown = [0] * (len(cu_seqlens) - 1) + [len(target)]  # of one chunk nobody asks for more than its end
        ignored = None if ignore_index == values.NOTHING else target == ignore_index
        return cls(None, ignored, cu_seqlens, known or unknown, found[1:].diff())

    @classmethod
    def _captured(cls, cu_seqlens: Tensor, target: Tensor, token_weights, vocabulary: int, ignore_index: int) -> "LossRows":
        """Nothing is compacted, and the host has to know the boundaries: they decide what is launched."""
        _check(cu_seqlens, target, token_weights, vocabulary, ignore_index)
        if cu_seqlens.device.type != "cpu":
            raise ValueError("while a CUDA graph is captured cu_seqlens must be on the CPU: its values decide what is launched")
        bounds, on_device = cu_seqlens.tolist(), boundaries_on(target.device, cu_seqlens)
        keep = target != ignore_index
        ignored = None if ignore_index == values.NOTHING else ~keep
        return cls(None, ignored, on_device, bounds, _kept_before(keep)[on_device].diff())


def capturing() -> bool:
    """Whether the current stream records a CUDA graph."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def refuse_in_graph() -> None:
    """ValueError while a CUDA graph is captured: to be called before the host waits to learn how many rows carry loss."""
    if capturing():
        raise ValueError("while a CUDA graph is captured pass ignore_index=None: how many rows carry loss decides what is launched")


def boundaries_on(device: torch.device, cu_seqlens: Tensor) -> Tensor:
    """cu_seqlens in int64 on this device; where they come from the host it does not wait."""
    cu_seqlens = cu_seqlens.to(torch.int64)
    if torch.compiler.is_compiling() or cu_seqlens.device.type != "cpu":
        return cu_seqlens.to(device)
    if capturing():  # as kernel arguments: a copy from the host would be read again at every replay
        found = torch.empty(cu_seqlens.shape, dtype=torch.int64, device=device)
        for place, bound in enumerate(cu_seqlens.tolist()):
            found[place].fill_(bound)
        return found
    if device.type == "cpu":
        return cu_seqlens
    # from memory of its own: the caller may overwrite his, and the host need not wait until it is read
    return torch.empty(cu_seqlens.shape, dtype=torch.int64, device="cpu", pin_memory=True).copy_(cu_seqlens).to(device, non_blocking=True)


def _known(cu_seqlens: Tensor, target: Tensor, ignore_index: int) -> tuple[list[int] | None, Tensor]:
    """(the boundaries among the rows that carry loss, if the host knows them; cu_seqlens beside target, in int64)."""
    bounds = None
    if cu_seqlens.device.type == "cpu":
        values.cu_seqlens(cu_seqlens, len(target))
        bounds = cu_seqlens.tolist() if ignore_index == values.NOTHING else None
    return bounds, boundaries_on(target.device, cu_seqlens)


def _kept_before(keep: Tensor) -> Tensor:
    """How many rows of the mask [N] are kept in front of every position, [N + 1]."""
    return torch.cat([keep.new_zeros(1, dtype=torch.int64), keep.cumsum(0)])


def _check(cu_seqlens: Tensor, target: Tensor, token_weights: Tensor | None, vocabulary: int, ignore_index: int) -> None:
    values.target(target, vocabulary, ignore_index)
    values.token_weights(token_weights)
    values.cu_seqlens(cu_seqlens, len(target))
