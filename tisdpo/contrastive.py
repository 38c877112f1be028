"""Contrastive models and what they say of every token: the raw contrast r_t = log pi+(y_t | ..) - log pi-(y_t | ..), and its diagnostics.

The constructions of the paper (arXiv 2410.04350, section 4.3), as pairs (pi+, pi-):

    P   one model under a positive and under a negative system prompt       `system_prompts`
    S   SFT on the chosen responses, SFT on the rejected ones                two `TISDPOTrainer` runs with method="sft"
    D   DPO, and DPO with the pairs swapped                                  two runs with method="dpo", one with swap_pairs=True
    R   DPO, and the reference it started from: half the cost of D           one run with method="dpo"

Which models they are makes no difference here: `score_contrast` takes two models and, where they differ, their prompts.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tisdpo.data import tokenize_pairs
from tisdpo.errors import InputError
from tisdpo.fingerprints import model_fingerprint, tokenizer_fingerprint
from tisdpo.hf import load_model, load_tokenizer
from tisdpo.scoring import iterate_logps, plan_batches
from tisdpo.weighting import Weighting, average_ranks, contrast_weights, positions

PART_TOKENS = 200_000  # tokens scored between two files of a resumable run


@dataclass
class Scorer:
    """A model, and the prompts it sees if they are not those of the rows."""

    model: torch.nn.Module
    prompts: Sequence[Sequence[int]] | None = None


def model_of_run(directory: str | Path, seed: int, name: str, tokenizer):
    """A contrastive model (or `base`) that a run made for this seed, to weigh the tokens of another run with it.

    Raises InputError where the run has no such model, and where its tokenizer has other ids than `tokenizer`.
    """
    path = Path(directory) / f"seed-{seed}" / ("base" if name == "base" else f"contrastive/{name}") / "model"
    if not path.is_dir():
        raise InputError(
            f"{directory} has no model {name!r} for seed {seed} ({path} is missing); run the constructions that need it there first, "
            "with this seed and a base model trained from scratch"
        )
    if tokenizer_fingerprint(load_tokenizer(str(path))) != tokenizer_fingerprint(tokenizer):
        raise InputError(f"the models in {directory} have another tokenizer than this run, so they cannot score its tokens")
    return load_model(str(path))


def system_prompts(pairs, rows, tokenizer, system_prompt: str) -> list[list[int]]:
    """Prompt ids of every row under a system prompt, through the tokenizer's chat template or as text in front (construction P).

    `pairs` are the pairs the rows were made from (found by the rows' `index`). Raises InputError where a completion's ids would change
    with the prompt, for then its tokens could not be compared.
    """
    by_index = {i: pairs[i] for i in rows["index"]}
    source = [{**by_index[i]} for i in rows["index"]]
    framed, _ = tokenize_pairs(source, tokenizer, max_length=None, system_prompt=system_prompt)
    found = dict(zip(framed["index"], zip(framed["prompt_ids"], framed["chosen_ids"], framed["rejected_ids"])))
    prompts = []
    for n, (index, chosen, rejected) in enumerate(zip(rows["index"], rows["chosen_ids"], rows["rejected_ids"])):
        prompt, *completions = found.get(n, (None, None, None))
        # rows may have been truncated, the framed ones are not
        if prompt is None or any(list(full[: len(ids)]) != list(ids) for full, ids in zip(completions, (chosen, rejected))):
            raise InputError(
                f"pair {index}: the completion is tokenised differently under the system prompt; "
                "end the system prompt with a line break or use a chat template"
            )
        prompts.append(prompt)
    return prompts


def tokens_to_score(rows, positive: Scorer, negative: Scorer) -> int:
    """How many tokens `score_contrast` will report as progress."""
    return sum(
        _lengths(
            [list(scorer.prompts or rows["prompt_ids"]) * 2 for scorer in (positive, negative)],
            [*rows["chosen_ids"], *rows["rejected_ids"]],
        )
    )


def _lengths(prompts, completions) -> list[int]:
    """Tokens of prompt and completion, with the longer of the two prompts."""
    return [max(len(p[i]) for p in prompts) + len(c) for i, c in enumerate(completions)]


def score_contrast(
    rows,
    positive: Scorer,
    negative: Scorer,
    *,
    pad_token_id: int,
    parts: str | Path,
    batch_tokens: int = 8192,
    progress: Callable[[int], None] | None = None,
):
    """The rows with chosen_contrast and rejected_contrast: raw r_t of every completion token (EOS included), float32, nats.

    Scored in batches by length. After every PART_TOKENS tokens a file in `parts` is written beside and renamed, so that a run killed at
    any moment goes on where it was, with the same result bit for bit; the files stand in a folder named after the ids, the models and
    the batch size, so that those of another scoring are never used. `progress` is called with tokens as they are done. The directory
    `parts` is the caller's to remove once the result is stored.
    """
    prompts = list(rows["prompt_ids"])
    completions = [*rows["chosen_ids"], *rows["rejected_ids"]]
    contexts = [(scorer.model.eval(), list(scorer.prompts or prompts) * 2) for scorer in (positive, negative)]
    lengths = _lengths([p for _, p in contexts], completions)
    directory = Path(parts) / _fingerprint(contexts, completions, batch_tokens)
    directory.mkdir(parents=True, exist_ok=True)
    contrast: list[Tensor | None] = [None] * len(completions)
    for number, batches in enumerate(_grouped(plan_batches(lengths, batch_tokens), lengths)):
        path = directory / f"part-{number:05d}.safetensors"
        if not path.exists():
            values = _score(contexts, completions, batches, pad_token_id)
            beside = path.with_suffix(".writing")
            save_file({"contrast": values}, beside)
            beside.rename(path)
        members = [i for batch in batches for i in batch]
        for i, values in zip(members, load_file(path)["contrast"].split([len(completions[i]) for i in members])):
            contrast[i] = values
        if progress is not None:
            progress(sum(lengths[i] for i in members))
    half = len(prompts)
    for side, values in (("chosen", contrast[:half]), ("rejected", contrast[half:])):
        rows = rows.add_column(f"{side}_contrast", [x.tolist() for x in values])
    return rows


def _score(contexts, completions, batches, pad_token_id) -> Tensor:
    """Contrasts of the completions of these batches, one after the other."""
    values = []
    for _, (positive, negative) in iterate_logps(contexts, completions, batches, pad_token_id):
        values += [p - n for p, n in zip(positive, negative)]
    return torch.cat(values)


def _grouped(batches: list[list[int]], lengths: list[int]) -> list[list[list[int]]]:
    """Batches in groups of about PART_TOKENS tokens."""
    groups, tokens = [], PART_TOKENS
    for batch in batches:
        if tokens >= PART_TOKENS:
            groups.append([])
            tokens = 0
        groups[-1].append(batch)
        tokens += sum(lengths[i] for i in batch)
    return groups


def _fingerprint(contexts, completions, batch_tokens: int) -> str:
    parts = [model_fingerprint(model) for model, _ in contexts] + [[list(p) for p in prompts] for _, prompts in contexts]
    parts += [[list(c) for c in completions], batch_tokens, PART_TOKENS]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def weight_diagnostics(rows, weighting: Weighting | None = None) -> dict:
    """What the weights of a scored set look like, per side, and plain sentences where they show a known failure.

    {"chosen": {...}, "rejected": {...}, "findings": [str]}; a side has, over its tokens: mean and std of the weight, clipped_low and
    clipped_high (share of contrasts at L and at U), ess (effective sample size (sum w)^2 / (n sum w^2), 1 = uniform),
    position_correlation (Spearman, weight against position in the completion), contrast_std (nats), tokens.
    """
    weighting = weighting or Weighting()
    sides = {side: _side_diagnostics(rows[f"{side}_contrast"], side == "chosen", weighting) for side in ("chosen", "rejected")}
    return {**sides, "findings": _findings(sides)}


def _side_diagnostics(contrasts, is_chosen: bool, weighting: Weighting) -> dict:
    lengths = torch.tensor([len(c) for c in contrasts], dtype=torch.long)
    flat = torch.tensor([x for c in contrasts for x in c], dtype=torch.float32)
    cu_seqlens = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    plain = Weighting(**{**weighting.__dict__, "eos_weight": None})  # EOS is looked at like any other token
    w = contrast_weights(flat, torch.full(flat.shape, is_chosen), plain, cu_seqlens=cu_seqlens).double()
    n = max(len(w), 1)
    return {
        "tokens": len(w),
        "mean": w.mean().item(),
        "std": w.std(correction=0).item(),
        "clipped_low": (flat <= weighting.lower).sum().item() / n,
        "clipped_high": (flat >= weighting.upper).sum().item() / n,
        "ess": (w.sum() ** 2 / (n * (w**2).sum())).item(),
        "position_correlation": rank_correlation(w, positions(cu_seqlens)),
        "contrast_std": flat.std(correction=0).item(),
    }


def rank_correlation(a: Tensor, b: Tensor) -> float:
    """Spearman's rank correlation of two tensors [n]; 0 where one of them is constant."""
    a, b = (average_ranks(x) - (len(x) - 1) / 2 for x in (a, b))
    scale = (a.square().sum() * b.square().sum()).sqrt()
    return (a @ b / scale).item() if scale > 0 else 0.0


def _findings(sides: dict[str, dict]) -> list[str]:
    """The known failures, as sentences with their figures and what to do."""
    found = []
    for side, d in sides.items():
        clipped = d["clipped_low"] + d["clipped_high"]
        if d["ess"] > 0.995:
            found.append(
                f"The {side} weights are almost uniform (effective sample size {d['ess']:.1%}): this is nearly plain DPO; "
                "the two contrastive models hardly differ, so train them longer, with a larger beta, or use clearer prompts."
            )
        if clipped > 0.5:
            found.append(
                f"{clipped:.0%} of the {side} contrasts lie at the clamp, so the weights are nearly two-valued: "
                "the contrastive models are too far apart; train them for fewer steps or widen lower and upper."
            )
        if d["ess"] < 0.3:
            found.append(
                f"The {side} weights are extreme (effective sample size {d['ess']:.1%}): a few tokens carry the sequence; "
                "lower mu or narrow the clamp."
            )
        if abs(d["position_correlation"]) > 0.5:
            where = "late" if d["position_correlation"] > 0 else "early"
            found.append(
                f"The {side} weights follow the position (rank correlation {d['position_correlation']:+.2f}): "
                f"{where} tokens carry the weight; look for a length effect."
            )
    low, high = sorted(sides.values(), key=lambda d: d["mean"])
    if low["mean"] > 0 and high["mean"] / low["mean"] > 2:
        heavy = next(side for side, d in sides.items() if d is high)
        found.append(
            f"The {heavy} side carries {high['mean'] / low['mean']:.1f} times the weight of the other: one side dominates the loss; "
            "centre the contrast, or use a symmetric clamp (lower = -upper)."
        )
    return found
