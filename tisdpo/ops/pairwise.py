"""The one-pass plan: loss and gradients of a pairwise loss in a single walk over the logits, or over D without any (`rows.Visits`).

The upstream gradient of every token of a pair is (one scalar per sequence, known once the pair's sums are known) x w_t. So chunks hold
whole pairs: logits -> statistics -> D = dscore_t/dlogits, in place and unscaled -> the pair sums -> the pairwise loss and its gradient with
respect to the scores -> dHidden = c * (D @ W), dWeight += D^T @ (c * hidden), c_t = w_t * dloss/dscore. Nothing is recomputed, except
for a pair that is longer than a chunk may be. Where the factors c may come later than D (a frozen head: they go to dHidden; a trained
16-bit head with at most 2 H rows, on a CPU a float32 one with H: D waits in `products.WaitingRows`), a few rows of any pairs follow each
other instead.

Cost in head-sized products (u = 2 N H V FLOP): policy logits 1, reference logits 1 (KL or online reference), dHidden 1, dWeight 1
(none with a frozen head). Memory: the chunk's logits (with KL of both models) + a [V, H] sum in float32, where the head is trained
and D does not wait (but not for one chunk of a 16-bit head on a GPU). Without logits: the chunk's D, where it does not wait.
"""

import torch
from torch import Tensor

from tisdpo.losses import Objective, logp_gradients, losses_with_nll, score_gradients, sequence_scores
from tisdpo.ops import backend as backends
from tisdpo.ops import fold, one_pass
from tisdpo.ops.backend import accumulation_dtype
from tisdpo.ops.loss_rows import LossRows
from tisdpo.ops.rows import GradientSums, Visits, heads, needs_no_logits, visit_rows
from tisdpo.ops.sequence_sums import weighted_sums
from tisdpo.ops.token_stats import gradient_shapes


@backends.operator("tisdpo::linear_pairwise")
def linear_pairwise(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, cu_seqlens: Tensor, token_weights: Tensor | None,
    ref_logps: Tensor | None, ref_hidden: Tensor | None, ref_weight: Tensor | None, ref_bias: Tensor | None, normalizer: Tensor,
    loss: str, beta: float, kl: str | None, alpha: float, detach_chosen_kl: bool, label_smoothing: float,
    nll_coef: float, logit_scale: float, softcap: float | None, temperature: float, ignore_index: int, needs: list[bool], backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(loss [], sums [4, S]: weighted log-ratio, weighted KL, log-prob, tokens; gradients of hidden, weight, bias or empty ones).

    hidden [N, H], weight [V, H], bias [V], target [N], cu_seqlens [S+1], token_weights [N]; the reference as ref_logps [N] or as
    ref_hidden [N, H], ref_weight, ref_bias. `normalizer` [] divides the sum over pairs. `needs`: which of the three gradients.
    """
    objective = Objective(loss, beta, kl, alpha, detach_chosen_kl, label_smoothing, nll_coef)
    name = backends.resolve(backend, hidden.device.type, hidden.dtype)
    folds = fold.Fold(name, kl, fold.Transform(logit_scale, softcap, temperature), bias, ref_bias)
    policy, reference = heads(hidden, weight, ref_hidden, ref_weight, None)
    no_logits = needs_no_logits(policy, reference, folds)
    most = policy.chunk_rows(1 if kl is None else 2, True, no_logits)
    rows = LossRows.of(target, token_weights, cu_seqlens, len(weight), ignore_index, name, min(most, backends.few_rows(hidden.device.type)))
    index = rows.index
    if index is not None:
        target, token_weights, ref_logps = (None if x is None else x[index] for x in (target, token_weights, ref_logps))
    elif rows.ignored is not None:  # 0 times what is not a number would be none
        hidden = hidden.masked_fill(rows.ignored[:, None], 0)
        target, ref_logps = target.masked_fill(rows.ignored, -1), None if ref_logps is None else ref_logps.masked_fill(rows.ignored, 0)
    policy, reference = heads(hidden, weight, ref_hidden, ref_weight, index)
    folds = folds._replace(ignored=rows.ignored is not None)
    grads = GradientSums(policy, tuple(needs), most)
    walk = _Walk(policy, reference, target, token_weights, ref_logps, rows, objective, folds, no_logits, grads)
    chunks = [walk.chunk(first, rows.bounds[first : last + 1], normalizer) for first, last in walk.chunks(rows.bounds)]
    if chunks:
        total, sums = torch.stack([part for part, _ in chunks]).sum(), torch.cat([part for _, part in chunks], 1)
    else:
        total, sums = hidden.new_zeros((), dtype=walk.dtype), hidden.new_zeros(4, 0, dtype=walk.dtype)
    del walk  # and with it logits or D: what follows needs memory of its own
    return total, sums, *grads.result()


@linear_pairwise.register_fake
def _(
    hidden, weight, bias, target, cu_seqlens, token_weights, ref_logps, ref_hidden, ref_weight, ref_bias, normalizer,
    loss, beta, kl, alpha, detach_chosen_kl, label_smoothing, nll_coef, logit_scale, softcap, temperature, ignore_index, needs, backend,
):  # fmt: skip
    dtype = accumulation_dtype(hidden.dtype)
    sums = hidden.new_empty((4, cu_seqlens.shape[0] - 1), dtype=dtype)
    return hidden.new_empty((), dtype=dtype), sums, *gradient_shapes(hidden, weight, needs)


# A chunk whose rows are visited in parts, because only D @ W [rows, H] is held until its pairs are complete, has about this many: whole
# pairs divide into more equal parts, and [rows, H] stays small beside the logits of one part.
PARTS = 4


def _whole_pairs(bounds: list[int], rows: int) -> list[tuple[int, int]]:
    """(first, last) boundary of every chunk: whole pairs, at most `rows` rows unless a single pair has more."""
    chunks, start = [], 0
    for end in range(2, len(bounds), 2):
        following = bounds[end + 2] if end + 2 < len(bounds) else None
        if following is None or following - bounds[start] > rows:
            chunks.append((start, end))
            start = end
    return chunks


def buffer_rows(bounds: list[int], rows: int, longest: int) -> int:
    """Rows of logits that live at a time: the longest chunk; `rows` of it where a pair has more than `longest` and is computed twice."""
    lengths = (bounds[last] - bounds[first] for first, last in _whole_pairs(bounds, rows))
    return max((n if n <= longest else rows for n in lengths), default=0)


class _Walk:
    """What stays the same from chunk to chunk."""

    def __init__(self, policy, reference, target, token_weights, ref_logps, rows, objective, folds, no_logits, grads):
        # Without KL only the log-probs of the reference are needed: its logits are there and gone before those of the policy, in one buffer
        alone = objective.kl is None and not no_logits
        self.policy, self.reference, self.before = policy, *((None, reference) if alone else (reference, None))
        self.target, self.token_weights, self.ref_logps = target, token_weights, ref_logps
        self.cu_seqlens, self.lengths = rows.cu_seqlens, rows.lengths
        self.objective, self.folds, self.grads, self.with_gradient = objective, folds, grads, any(grads.needs)
        self.dtype = accumulation_dtype(policy.hidden.dtype)
        self.no_logits, models = no_logits, 1 if objective.kl is None else 2
        self.rows = visit_rows(policy, models, no_logits, grads if self.with_gradient else None)
        self.longest = backends.longest_held(self.rows, policy.hidden.shape[1], models)

    def chunks(self, bounds: list[int]) -> list[tuple[int, int]]:
        """(first, last) boundary of every chunk, after the memory for logits is there: one that grew would leave holes behind.

        Where the factors of D may come later, pairs need no logits of their own: a chunk is visited a few rows at a time, and where D
        waits, or there is none, all pairs are one chunk.
        """
        later = self.grads.later
        chunks = _whole_pairs(bounds, self.rows * (PARTS if later else 1))
        if later and (self.grads.waits or not self.with_gradient):
            chunks = [(0, len(bounds) - 1)] if len(bounds) > 1 else []
        if later:
            self.longest = 0
            ranges = [self.policy.ranges(bounds[first], bounds[last], self.rows) for first, last in chunks]
            rows = max((b - a for parts in ranges for a, b in parts), default=0)
        else:
            rows = buffer_rows(bounds, self.rows, self.longest)
        grads = self.grads if self.with_gradient else None
        self.visits = Visits(self.policy, self.reference, self.folds, self.no_logits, grads, rows)
        return chunks

    def chunk(self, first: int, bounds: list[int], normalizer: Tensor) -> tuple[Tensor, Tensor]:
        """Loss [] and sums [4, s] of the sequences from number `first` on, with these boundaries; adds their gradients."""
        start, stop = bounds[0], bounds[-1]
        rows = stop - start if stop - start <= self.longest else self.rows
        ranges = self.policy.ranges(start, stop, rows)
        cu = self.cu_seqlens[first : first + len(bounds)]
        kl_sign = self._token_kl_sign(cu, stop - start)

        held, stats = None, []
        hold = self.with_gradient and (self.grads.later or len(ranges) == 1)
        for a, b in ranges:
            ref_logp = None if self.before is None else self._reference_logp(a, b)
            sign = None if kl_sign is None else kl_sign[a - start : b - start]
            found, d = self.visits.visit(a, b, self.target[a:b], sign, wanted=hold)
            stats.append(found if ref_logp is None else found._replace(ref_logp=ref_logp))
            if hold and self.grads.later:
                self.grads.hold(a, b, d)
            elif hold:
                held = d

        # a device has its first products by now, and computes while the host goes on
        lengths = self.lengths[first : first + len(bounds) - 1].to(self.dtype)
        found = fold.concatenated(stats, self.dtype, cu.device)
        loss, sums, coefficient = self._pairs(found, start, stop, cu - start, lengths, normalizer)
        if not self.with_gradient:
            return loss, sums
        if self.grads.later:
            self.grads.scale(start, stop, found.scaled(coefficient))
            return loss, sums
        for (a, b), s in zip(ranges, stats):
            place, d = slice(a - start, b - start), held
            sign = None if kl_sign is None else kl_sign[place]
            if held is None:
                s, d = self.visits.visit(a, b, self.target[a:b], sign, wanted=True, stats=s)
            self.grads.add(a, b, d, s.scaled(coefficient[place]))
        return loss, sums

    def _reference_logp(self, a: int, b: int) -> Tensor:
        z = self.before.logits(a, b, self.visits.tiles.buffer[: b - a])
        return self.folds._replace(bias=self.folds.ref_bias, ref_bias=None).statistics(z, self.target[a:b], None).logp

    def _token_kl_sign(self, cu: Tensor, rows: int) -> Tensor | None:
        """Factor of KL_t in the gradient of the token's score: -/+ alpha, 0 where the chosen KL is detached."""
        if self.objective.kl is None:
            return None
        if not self.objective.detach_chosen_kl:
            return torch.full((rows,), self.objective.kl_sign, dtype=self.dtype, device=cu.device)
        signs = torch.full((len(cu) - 1,), self.objective.kl_sign, dtype=self.dtype, device=cu.device)
        signs[::2] = 0.0
        return torch.repeat_interleave(signs, cu.diff(), output_size=rows)

    def _pairs(
        self, stats: fold.Statistics, start: int, stop: int, cu: Tensor, lengths: Tensor, normalizer: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Loss [], sums [4, s] and the factors of D [n], dloss/dscore times the weight of the token and what the NLL of the chosen adds,
        from the statistics of whole pairs."""
        ref_logp = stats.ref_logp if self.ref_logps is None else self.ref_logps[start:stop]
        weights = None if self.token_weights is None else self.token_weights[start:stop]
        (D, K, logps), used = weighted_sums(self.folds.backend, stats.logp, ref_logp, stats.kl, cu, weights)
        scores = sequence_scores(D, K, self.objective)
        loss = losses_with_nll(scores, logps, lengths, self.objective).sum() / normalizer
        coefficient = None
        if self.with_gradient:
            slopes = score_gradients(scores, lengths, self.objective) / normalizer
            spread = fold.implementation(self.folds.backend).spread
            coefficient, _ = spread(slopes, None, used, cu)
            if self.objective.nll_coef:
                coefficient += spread(logp_gradients(lengths, self.objective) / normalizer, None, torch.ones_like(used), cu)[0]
        return loss, torch.stack([D, K, logps, lengths]), coefficient


one_pass.register(linear_pairwise, needs=22, backend=23, function="linear_tis_dpo_loss")
