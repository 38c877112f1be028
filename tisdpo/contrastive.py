"""Contrastive models and what they say of every token: the raw contrast r_t = log pi+(y_t | ..) - log pi-(y_t | ..), and its diagnostics.

The constructions of the paper (arXiv 2410.04350, section 4.3), as pairs (pi+, pi-):

    P   one model under a positive and under a negative system prompt       `system_prompts`
    S   SFT on the chosen responses, SFT on the rejected ones                two `TISDPOTrainer` runs with method="sft"
    D   DPO, and DPO with the pairs swapped                                  two runs with method="dpo", one with swap_pairs=True
    R   DPO, and the reference it started from: half the training of D       one run with method="dpo"

Which models they are makes no difference here: `score_contrast` takes two models and, where they differ, their prompts.
"""

from pathlib import Path

import torch
from torch import Tensor

from tisdpo.data import tokenize_pairs
from tisdpo.errors import InputError
from tisdpo.fingerprints import tokenizer_fingerprint
from tisdpo.hf import load_model, load_tokenizer
from tisdpo.parts import Scorer, Scoring
from tisdpo.weighting import Weighting, average_ranks, contrast_weights, positions

__all__ = ["Scorer", "rank_correlation", "score_contrast", "system_prompts", "weight_diagnostics"]


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


def score_contrast(
    rows,
    positive: Scorer,
    negative: Scorer,
    *,
    pad_token_id: int,
    parts: str | Path,
    batch_tokens: int = 8192,
):
    """The rows with chosen_contrast and rejected_contrast: raw r_t of every completion token (EOS included), float32, nats.

    Scored in parts by `tisdpo.parts.Scoring`: a run killed at any moment goes on where it was, with the same result bit for bit. The
    directory `parts` is the caller's to remove once the result is stored.
    """
    scoring = Scoring(rows, positive, negative, pad_token_id=pad_token_id, parts=parts, batch_tokens=batch_tokens)
    scoring.score()
    return scoring.joined()


def combined(rows, parts: list[tuple], *, smooth: int = 1, std: float | None = None):
    """The rows with the contrast of several scorings made one.

    parts    (scored rows, their numbers among the rows), together covering every row; where several score a row, their mean is taken.
             Numbers None: all rows
    smooth   odd window of a moving average over neighbouring tokens of a completion (shorter at its ends); 1: none
    std      scale the contrasts of both sides together to this standard deviation, nats; None: as they are. Their zero stays where it is
    """
    sides, found = ("chosen", "rejected"), {}
    for side in sides:
        values: list[list[Tensor]] = [[] for _ in range(len(rows))]
        for scored, numbers in parts:
            for number, contrast in zip(range(len(rows)) if numbers is None else numbers, scored[f"{side}_contrast"]):
                values[number].append(torch.tensor(contrast, dtype=torch.float64))
        found[side] = [_smoothed(torch.stack(several).mean(0), smooth) for several in values]
    scale = 1.0
    if std is not None:
        spread = torch.cat([x for side in sides for x in found[side]]).std(correction=0).item()
        scale = std / spread if spread > 0 else 1.0
    for side in sides:
        rows = rows.add_column(f"{side}_contrast", [(scale * x).tolist() for x in found[side]])
    return rows


def _smoothed(contrast: Tensor, window: int) -> Tensor:
    if window == 1 or not len(contrast):
        return contrast
    padded = torch.nn.functional.avg_pool1d(contrast[None], window, stride=1, padding=window // 2, count_include_pad=False)
    return padded[0]


def weight_diagnostics(rows, weighting: Weighting | None = None) -> dict:
    """What the weights of a scored set look like, per side, and plain sentences where they show a known failure.

    {"chosen": {...}, "rejected": {...}, "findings": [str]}; a side has, over its tokens: mean and std of the weight, clipped_low and
    clipped_high (share of contrasts at L and at U, 0 where the rule has no clamp), ess (effective sample size (sum w)^2 / (n sum w^2),
    1 = uniform),
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
    mu = weighting.mu_chosen if is_chosen else weighting.mu_rejected
    clamped = {"exp": flat, "random": flat, "swapped": flat, "scale": mu * flat, "threshold": mu * flat}.get(weighting.transform, flat[:0])
    return {
        "tokens": len(w),
        "mean": w.mean().item(),
        "std": w.std(correction=0).item(),
        "clipped_low": (clamped <= weighting.lower).sum().item() / n,
        "clipped_high": (clamped >= weighting.upper).sum().item() / n,
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
