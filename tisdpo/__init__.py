"""tisdpo: preference training with a weight for every token.

TIS-DPO (arXiv 2410.04350) and its relatives, exact and without the [tokens, vocabulary] logits.

    linear_tis_dpo_loss                 the loss from hidden states and the LM head, in one pass; options in Objective
    linear_token_logps, linear_nll_loss   log-probs (and KL) of every token for a loss of your own; weighted cross-entropy
    token_logps, tis_dpo_loss           the same from logits, and from log-probs that are there
    token_weights, sequence_sums        weights from the contrast of two models; weighted sums of sequences; options in Weighting
    TISDPOTrainer, TISDPOConfig         on transformers.Trainer; on TRL's DPOTrainer: tisdpo.integrations.trl

These names, and those that docs/usage.md names of tisdpo.batches, data, hf, rows and scored, are kept; all else may change. The
parts, and who may import whom (an import goes from right to left, never against the arrows; tests/test_arrows.py holds them):

    errors -> files, fingerprints, intervals, kernels, losses, prompts, weighting
    -> ops -> checks -> arguments -> functional -> attention, world
    -> arithmetic, batches, doctor, first_step, heatmap, hf, memory, plots, processes, provenance, readers, settings, synthetic
    -> cached, config, rendering, report, scoring -> data, parts -> resume, rows
    -> contrastive, evaluate, scored, sources, trainer
    -> agreement, integrations, score, stages, summary -> annotate, estimation -> pipeline -> study -> cli -> __main__

Names between two arrows are one level and do not import each other. `reference` is the mathematics in plain PyTorch, the oracle of the
tests: it imports nothing of the package, nothing imports it.
Importing `tisdpo` loads torch alone; the trainer (and transformers) come with the first use of `TISDPOTrainer` or `TISDPOConfig`.
"""

from importlib import import_module

from tisdpo.functional import (
    NLLOutput,
    SequenceSums,
    TokenStats,
    linear_nll_loss,
    linear_tis_dpo_loss,
    linear_token_logps,
    sequence_sums,
    tis_dpo_loss,
    token_logps,
    token_weights,
)
from tisdpo.losses import Objective, PreferenceOutput
from tisdpo.weighting import Weighting

__version__ = "0.1.0"

_LAZY = {"TISDPOConfig": "tisdpo.trainer", "TISDPOTrainer": "tisdpo.trainer"}

__all__ = [
    "NLLOutput",
    "Objective",
    "PreferenceOutput",
    "SequenceSums",
    "TISDPOConfig",
    "TISDPOTrainer",
    "TokenStats",
    "Weighting",
    "linear_nll_loss",
    "linear_tis_dpo_loss",
    "linear_token_logps",
    "sequence_sums",
    "tis_dpo_loss",
    "token_logps",
    "token_weights",
]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def __getattr__(name: str):
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'tisdpo' has no attribute {name!r}")
