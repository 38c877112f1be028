"""What an arm costs: floating-point operations, counted in tokens x parameters.

A forward pass takes 2, a backward pass 4 for every parameter and token (prompts included, padding and attention's own products not), as in
Kaplan et al., arXiv 2001.08361. Pretraining of models and the measurements are not counted, they belong to no arm.
"""

from dataclasses import dataclass

from tisdpo.config import CONSTRUCTIONS
from tisdpo.pipeline import CONTRASTIVE_MODELS

FORWARD, BACKWARD = 2, 4


@dataclass(frozen=True)
class Tokens:
    """Mean tokens of a training pair: both responses, and each with its prompt; `pairs` of them, and tokens of the system prompts of P."""

    pairs: int
    chosen: float
    rejected: float
    system: tuple[int, int] = (0, 0)

    @property
    def both(self) -> float:
        return self.chosen + self.rejected


def tokens_of(run) -> Tokens:
    """Counted from the training rows of a `SeedRun`."""
    rows = run.source.train
    prompt = sum(map(len, rows["prompt_ids"])) / len(rows)
    chosen, rejected = (prompt + sum(map(len, rows[f"{side}_ids"])) / len(rows) for side in ("chosen", "rejected"))
    system = tuple(len(run.tokenizer(text, add_special_tokens=False)["input_ids"]) for text in run.prompts_of_contrast())
    return Tokens(len(rows), chosen, rejected, system)


def costs(config, tokens: Tokens, parameters: int, contrast_parameters: int) -> list[dict]:
    """Stages of one policy of a run's configuration: {"stage", "part", "flop"}, "part" being contrastive, scoring or policy.

    parameters, contrast_parameters   of the policy and of each contrastive model
    """
    method = config.methods[0]
    construction = method if method in CONSTRUCTIONS else config.control if method in ("random", "swapped") else None
    found = []

    def add(stage: str, part: str, flop: float):
        found.append({"stage": stage, "part": part, "flop": flop})

    if construction is not None:
        names = CONTRASTIVE_MODELS[construction]
        for name in dict.fromkeys(names):
            if name.startswith("sft"):
                side = tokens.chosen if name == "sft-chosen" else tokens.rejected
                add(f"contrastive/{name}", "contrastive", _seen(config.contrast.sft) * side * (FORWARD + BACKWARD) * contrast_parameters)
            elif name != "base":
                flop = _seen(config.contrast.dpo) * tokens.both * (FORWARD + BACKWARD) * contrast_parameters
                add(f"contrastive/{name}", "contrastive", flop)
        if construction in "DR":  # contrastive DPO has no KL term: its reference is asked once
            add("contrast-reference", "contrastive", tokens.pairs * tokens.both * FORWARD * contrast_parameters)
        extra = 2 * sum(tokens.system) if construction == "P" else 0
        scored = tokens.pairs * (len(names) * tokens.both + extra)
        add(f"scored/{construction}", "scoring", scored * FORWARD * contrast_parameters)
    seen = _seen(config.train) * tokens.both
    add("policy", "policy", seen * (FORWARD + BACKWARD) * parameters)
    if config.objective.kl is None:
        add("reference", "policy", tokens.pairs * tokens.both * FORWARD * parameters)
    else:
        add("policy-reference", "policy", seen * FORWARD * parameters)
    return found


def _seen(stage) -> int:
    """Rows that a training stage sees, those seen twice counted twice."""
    return stage.steps * stage.batch_size * stage.arguments.get("gradient_accumulation_steps", 1)
