"""TIS-DPO and DPO without any fusing, as the method's equations read: what a training script does that keeps all logits.

Written from the equations of arXiv 2410.04350 (and TDPO's sequence KL), over padded batches and the models' own logits. `reference` in
the package is the oracle for rounding; this is the oracle for time and memory: ordinary PyTorch, nothing wasted on purpose.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def token_logps(logits: Tensor, input_ids: Tensor) -> tuple[Tensor, Tensor]:
    """(log-softmax [B, T-1, V] in float32, log-probs [B, T-1] of the tokens that follow)."""
    logp = logits[:, :-1].float().log_softmax(-1)
    return logp, logp.gather(-1, input_ids[:, 1:, None])[..., 0]


def tis_dpo_loss(model, ref_model, batch: dict[str, Tensor], beta: float = 0.1, kl: bool = True, alpha: float = 1.0) -> Tensor:
    """Mean over pairs of -log sigmoid(u - eta), with token weights where the batch has them and the reverse sequence KL where asked.

    batch: input_ids, attention_mask, completion_mask and maybe token_weights [2B, T], rows chosen_0, rejected_0, chosen_1, ...
    """
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    mask = batch["completion_mask"][:, 1:].bool()
    weights = batch["token_weights"][:, 1:] if "token_weights" in batch else mask.float()
    logp, logps = token_logps(model(**inputs).logits, batch["input_ids"])
    with torch.no_grad():
        ref_logp, ref_logps = token_logps(ref_model(**inputs).logits, batch["input_ids"])
    weights = weights * mask
    sums = (weights * (logps - ref_logps)).sum(-1)
    if kl:
        sums = sums - alpha * (weights * (logp.exp() * (logp - ref_logp)).sum(-1)).sum(-1)
    chosen, rejected = sums.view(-1, 2).unbind(-1)
    return -F.logsigmoid(beta * (chosen - rejected)).mean()


@torch.no_grad()
def score(model, batch: dict[str, Tensor]) -> Tensor:
    """Log-probs [2B, T-1] of every token, through all logits."""
    return token_logps(model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits, batch["input_ids"])[1]
