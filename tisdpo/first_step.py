"""Where policy and reference are the same model, the first step says whether they are treated as such."""

import torch
from torch import Tensor


def check_first_step(output, flat, beta: float, exact: bool) -> None:
    """RuntimeError unless every log-ratio and KL is 0, and so the rewards, whatever the weights (sigmoid: a loss of ln 2).

    output: `PreferenceOutput` of the batch `flat`; exact: everything is computed in float32 (16-bit hidden states depend on the padding of
    their batch).
    """
    rewards = torch.stack([output.chosen_rewards, output.rejected_rewards], 1).flatten()
    weights = torch.ones_like(flat.target, dtype=rewards.dtype) if flat.token_weights is None else flat.token_weights
    squares: Tensor = torch.stack([w.square().sum() for w in weights.split(flat.cu_seqlens.diff().tolist())])
    # rounding has no direction: the sum over tokens grows with the root of their number, where another model's grows with the number
    found = (rewards.abs() / (beta * squares.sqrt().clamp(min=1e-6))).mean().item()
    if not found <= (1e-3 if exact else 0.1):
        raise RuntimeError(
            "at the first step policy and reference are the same model, so their log-probs must be the same, but they differ by "
            f"{found:.2g} nats times the root of a sequence's tokens (the loss is {output.losses.mean().item():.6f}): are the reference "
            "log-probs those of this model, as it is now, of its tokenizer and max_length? (sanity_check=False turns this check off)"
        )


def computes_exactly(model, args) -> bool:
    """Whether a trainer's model and arguments (bf16, fp16, tf32) compute in float32 throughout."""
    return all(p.dtype == torch.float32 for p in model.parameters()) and not (args.bf16 or args.fp16 or args.tf32)
