"""What an arm costs: floating-point operations, counted in tokens x parameters.

A forward pass takes 2, a backward pass 4 for every parameter and token (prompts included, padding and attention's own products not), as in
Kaplan et al., arXiv 2001.08361. Pretraining of models (of a smaller contrastive one, too) and the measurements are not counted: they
belong to no arm.
"""

import itertools
from dataclasses import dataclass

from tisdpo.estimation import CONTRASTIVE_MODELS, numbered_stage

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


def tokens_of(run, rows) -> Tokens:
    """Counted from rows of a `SeedRun`."""
    prompt = sum(map(len, rows["prompt_ids"])) / len(rows)
    chosen, rejected = (prompt + sum(map(len, rows[f"{side}_ids"])) / len(rows) for side in ("chosen", "rejected"))
    system = tuple(len(run.tokenizer(text, add_special_tokens=False)["input_ids"]) for text in run.prompts_of_contrast())
    return Tokens(len(rows), chosen, rejected, system)


def costs(config, tokens: Tokens, learned: Tokens, parameters: int, contrast_parameters: int) -> list[dict]:
    """Stages of one policy of a run's configuration: {"stage", "part", "flop"}, "part" being contrastive, scoring or policy.

    tokens, learned   of the rows that the policy and that the contrastive models are trained on
    parameters, contrast_parameters   of the policy and of each contrastive model
    """
    construction, found = config.construction(config.methods[0]), []

    def add(stage: str, part: str, flop: float):
        found.append({"stage": stage, "part": part, "flop": flop})

    if construction is not None:
        names, contrast = CONTRASTIVE_MODELS[construction], config.contrast
        pairs, checkpoints = (1, 1) if construction == "P" else (contrast.pairs, contrast.checkpoints)
        scored = len(names) * tokens.both + (2 * sum(tokens.system) if construction == "P" else 0)
        for number, (pair, checkpoint) in itertools.product(range(contrast.rounds), itertools.product(range(pairs), range(checkpoints))):
            before = f"policy/round-{number}/" if number else ""  # a round of one policy is shared with no other
            for name in dict.fromkeys(names):
                if name != "base" and not checkpoint and contrast.models_from is None:  # another run's models cost nothing here
                    side = {"sft-chosen": learned.chosen, "sft-rejected": learned.rejected}.get(name, learned.both)
                    seen = _seen(contrast.sft if name.startswith("sft") else contrast.dpo) * side
                    stage = f"{before}contrastive/{numbered_stage(name, pair)}"
                    add(stage, "contrastive", seen * (FORWARD + BACKWARD) * contrast_parameters)
            share = 1 / pairs if contrast.crossfit else 1
            stage = f"{before}scored/{numbered_stage(construction, pair, checkpoint)}"
            add(stage, "scoring", share * tokens.pairs * scored * FORWARD * contrast_parameters)
        if construction in "DR" and contrast.models_from is None:  # contrastive DPO has no KL term: its reference is asked once,
            # and is that of the policy where both learn from the same rows, start from the same model and need log-probs alone
            same = contrast.model is None and contrast.data is None and config.objective.kl is None
            for number in range(int(same), contrast.rounds):
                stage = f"policy/round-{number}/reference" if number else "contrast-reference"
                add(stage, "contrastive", learned.pairs * learned.both * FORWARD * contrast_parameters)
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
