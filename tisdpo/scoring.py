"""Per-token log-probs of many completions under a model: for weights, references and evaluation. No [N, V] logits, any batch size.

Sizes: n sequences (prompt + completion), N completion tokens of a batch.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from tisdpo.attention import evaluating
from tisdpo.batches import flatten_batch
from tisdpo.functional import linear_token_logps
from tisdpo.hf import Head, attach_head, model_inputs

Ids = Sequence[int]


def plan_batches(lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """Indices of sequences in batches of similar length, at most `batch_tokens` padded tokens each (a longer sequence stands alone).

    Depends on the lengths alone, so that a resumed run sees the same batches. Longest first: a lack of memory shows at once.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    batches: list[list[int]] = []
    for i in order:
        if batches and lengths[batches[-1][0]] * (len(batches[-1]) + 1) <= batch_tokens:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches


def pad_batch(prompts: Sequence[Ids], completions: Sequence[Ids], pad_token_id: int, device=None) -> dict[str, Tensor]:
    """input_ids, attention_mask and completion_mask [n, T] of right-padded prompt + completion sequences."""
    length = max(len(p) + len(c) for p, c in zip(prompts, completions))
    ids = torch.full((len(prompts), length), pad_token_id)
    attention, completion = torch.zeros_like(ids), torch.zeros(ids.shape, dtype=torch.bool)
    for i, (p, c) in enumerate(zip(prompts, completions)):
        ids[i, : len(p) + len(c)] = torch.tensor([*p, *c])
        attention[i, : len(p) + len(c)] = 1
        completion[i, len(p) : len(p) + len(c)] = True
    return {name: x.to(device) for name, x in (("input_ids", ids), ("attention_mask", attention), ("completion_mask", completion))}


@torch.no_grad()
def batch_logps(model, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probs [N] (nats) of the completion tokens of a padded batch, the hidden states [N, H] that predict them, and the sequence
    boundaries cu_seqlens."""
    flat = flatten_batch(batch)

    def score(hidden: Tensor, head: Head) -> tuple[Tensor, Tensor]:
        taken = flat.take(hidden)
        return linear_token_logps(taken, head.weight, flat.target, bias=head.bias, ignore_index=None, **head.transform).logps, taken

    return *attach_head(model)(**model_inputs(batch), head=score), flat.cu_seqlens


def iterate_logps(
    models_and_prompts, completions: Sequence[Ids], batches: list[list[int]], pad_token_id: int, hidden_of: int | None = None
) -> Iterator[tuple[list[int], list[list[Tensor]], Tensor | None]]:
    """For each batch: its indices, per (model, prompts) the log-probs of each completion of the batch (float32, on the CPU), and the
    hidden states [N, H] of the model with number `hidden_of`, if there is one."""
    for batch in batches:
        results, kept = [], None
        for number, (model, prompts) in enumerate(models_and_prompts):
            padded = pad_batch([prompts[i] for i in batch], [completions[i] for i in batch], pad_token_id, next(model.parameters()).device)
            logps, hidden, cu_seqlens = batch_logps(model, padded)
            results.append(list(logps.float().cpu().split(cu_seqlens.diff().tolist())))
            kept = hidden if number == hidden_of else kept
        yield batch, results, kept


def completion_logps(
    model,
    prompts: Sequence[Ids],
    completions: Sequence[Ids],
    *,
    pad_token_id: int,
    batch_tokens: int = 16384,
) -> list[Tensor]:
    """Log-probs (nats, float32) of every token of each completion after its prompt, in the order they came.

    The model is put into evaluation mode for it.
    """
    lengths = [len(p) + len(c) for p, c in zip(prompts, completions)]
    out: list[Tensor | None] = [None] * len(lengths)
    with evaluating(model):
        for batch, (logps,), _ in iterate_logps([(model, prompts)], completions, plan_batches(lengths, batch_tokens), pad_token_id):
            for i, values in zip(batch, logps):
                out[i] = values
    return out
