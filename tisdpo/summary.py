"""From the results of all seeds to metrics.json: what the report shows, and the findings stated in plain sentences."""

import datetime
import itertools
import json
import math
import platform
import subprocess
from pathlib import Path

import torch

import tisdpo
from tisdpo.config import to_dict
from tisdpo.contrastive import weight_diagnostics
from tisdpo.doctor import cpu_name, usable_cores
from tisdpo.evaluate import truth_agreement
from tisdpo.intervals import estimate
from tisdpo.weighting import Weighting, contrast_weights

LABELS = {
    "base": ("base", "before preference training"),
    "dpo": ("DPO", "all weights 1"),
    "equal": ("TIS-DPO, equal weights", "control: the same as DPO"),
    "random": ("TIS-DPO, random weights", "control: the weights of the first construction, shuffled"),
    "swapped": ("TIS-DPO, swapped weights", "control: signs exchanged"),
    "P": ("TIS-DPO (P)", "contrast of two prompts"),
    "S": ("TIS-DPO (S)", "contrast of two SFT models"),
    "D": ("TIS-DPO (D)", "contrast of DPO and reverse DPO"),
    "R": ("TIS-DPO (R)", "contrast of DPO and the reference"),
    "truth": ("TIS-DPO, true contrast", "the known rewards as contrast, through the same clamp"),
    "oracle": ("TIS-DPO, true weights", "ceiling: the same, and 0 on tokens without reward"),
}
METRIC_INFO = {
    "right": {
        "label": "right answers",
        "unit": "",
        "better": "higher",
        "help": "Share of sampled answers to held-out prompts that are right.",
    },
    "reward": {"label": "reward", "unit": "", "better": "higher", "help": "Mean reward of sampled responses to held-out prompts."},
    "kl": {
        "label": "KL to base",
        "unit": "nats",
        "better": None,
        "help": "Mean over sampled responses of the summed per-token KL(policy || base).",
    },
    "accuracy": {
        "label": "held-out accuracy",
        "unit": "",
        "better": "higher",
        "help": "Share of held-out pairs whose chosen response has the larger implicit reward.",
    },
    "margin": {
        "label": "held-out margin",
        "unit": "",
        "better": None,
        "help": "Mean difference of the implicit rewards, beta times the unweighted log-ratios.",
    },
    "accuracy_by_length": {
        "label": "accuracy by length",
        "unit": "",
        "better": None,
        "help": "Baseline: held-out accuracy of guessing by length alone (the longer or the shorter wins, whichever fits better).",
    },
    "length": {
        "label": "response length",
        "unit": "tokens",
        "better": None,
        "help": "Mean length of sampled responses; those cut off at the limit count in full.",
    },
    "finished": {"label": "finished", "unit": "", "better": None, "help": "Share of sampled responses that ended by themselves."},
}
CURVES = ("loss", "rewards/margins", "rewards/accuracies", "rewards/chosen", "rewards/rejected")
BINS = 40
SIDES = ("chosen", "rejected")


def collect(config, seeds) -> dict:
    """The content of metrics.json, see the keys below; `seeds` are finished `pipeline.SeedRun`s."""
    methods = ["base", *config.methods]
    results = {(m, s.seed): s.base_results() if m == "base" else s.policy(m) for s in seeds for m in methods}
    first = seeds[0]
    names = [n for n in METRIC_INFO if any(n in r["metrics"] for r in results.values())]
    metrics = {
        "name": config.name,
        "description": config.description,
        "settings": to_dict(config),
        "environment": environment(),
        "seconds": {stage: sum(s.seconds.get(stage, 0.0) for s in seeds) for stage in dict.fromkeys(k for s in seeds for k in s.seconds)},
        "seeds": [s.seed for s in seeds],
        "data": {
            "train": len(first.source.train),
            "heldout": len(first.source.heldout),
            "dropped": first.source.dropped,
            "kind": first.source.kind,
        },
        "methods": [{"id": m, "label": LABELS[m][0], "note": LABELS[m][1]} for m in methods],
        "results": [
            {"method": m, "seed": s, "metrics": {n: r["metrics"][n] for n in names if n in r["metrics"]}} for (m, s), r in results.items()
        ],
        "metric_info": {n: METRIC_INFO[n] for n in names},
        "frontier_y": first.quality,
        "frontier": [{"method": m, "seed": s, "points": r["points"]} for (m, s), r in results.items() if r["points"]],
        "curves": [curve(s, m) for s in seeds for m in config.methods],
        "weights": [w for c in config.contrast.constructions for w in weights(seeds, c)],
        "heatmaps": [heat for c in config.contrast.constructions for heat in heatmaps(first, c)],
        "samples": samples(first, methods, results),
    }
    return metrics | {"notes": notes(metrics)}


def environment() -> dict:
    """Versions, device, date and revision: what a reader needs to repeat the run."""
    root = Path(tisdpo.__file__).resolve().parents[1]
    try:
        revision = subprocess.run(
            ["git", "-C", root, "describe", "--always", "--dirty"], capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        revision = "not a git checkout"
    return {
        "tisdpo": tisdpo.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads",
        "cpu": f"{cpu_name()}, {usable_cores()} cores usable",
        "vectors": torch.backends.cpu.get_cpu_capability(),
        "date": datetime.date.today().isoformat(),
        "revision": revision,
    }


def curve(seed_run, method: str) -> dict:
    """Learning curves of a policy from its log."""
    history = [h for h in json.loads((seed_run.directory / "policy" / method / "log.json").read_text()) if "loss" in h]
    return {
        "method": method,
        "seed": seed_run.seed,
        "step": [h["step"] for h in history],
        **{name: [h.get(name) for h in history] for name in CURVES},
    }


def weights(seeds, construction: str) -> list[dict]:
    """For every seed: how the weights of a construction are distributed, and how they agree with the truth where it is known."""
    weighting = seeds[0].config.weighting
    sides = {
        s.seed: {side: side_weights(s.scored(construction), side, weighting, s.tokenizer.eos_token_id) for side in SIDES} for s in seeds
    }
    pooled = torch.cat([w for by_side in sides.values() for ws in by_side.values() for w in ws])
    edges = torch.linspace(pooled.min().item(), pooled.max().item() + 1e-6, BINS + 1, dtype=torch.float64)  # the same for all seeds
    return [_weights_of_seed(s, construction, sides[s.seed], edges) for s in seeds]


def _weights_of_seed(seed_run, construction: str, sides: dict, edges) -> dict:
    rows = seed_run.scored(construction)
    out = {
        "construction": construction,
        "seed": seed_run.seed,
        "auc": None,
        "spearman": None,
        "signal_to_noise": None,
        **weight_diagnostics(rows, seed_run.config.weighting),
    }
    if "chosen_truth" in rows.column_names:
        flat = {kind: [x for side in SIDES for values in rows[f"{side}_{kind}"] for x in values] for kind in ("contrast", "truth")}
        out |= truth_agreement(torch.tensor(flat["contrast"]), torch.tensor(flat["truth"]))
        log_weights = torch.cat([w for side in SIDES for w in sides[side]]).log().abs()
        important = torch.tensor(flat["truth"]) != 0
        ratio = log_weights[important].mean() / log_weights[~important].mean()
        out["signal_to_noise"] = ratio.item() if ratio.isfinite() and log_weights.isfinite().all() else None  # weights of 0 have no log
    out["histogram"] = {
        "edges": edges.tolist(),
        **{side: torch.histogram(torch.cat(w).double(), edges).hist.int().tolist() for side, w in sides.items()},
    }
    out["position"] = {side: position_means(w) for side, w in sides.items()}
    return out


def side_weights(rows, side: str, weighting: Weighting, eos_token_id: int) -> list[torch.Tensor]:
    """Weights of every completion of one side."""
    contrasts, ids = rows[f"{side}_contrast"], rows[f"{side}_ids"]
    lengths = torch.tensor([len(c) for c in contrasts])
    flat = torch.tensor([x for c in contrasts for x in c])
    is_eos = torch.tensor([x == eos_token_id for row in ids for x in row])
    cu_seqlens = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    w = contrast_weights(flat, torch.full(flat.shape, side == "chosen"), weighting, cu_seqlens=cu_seqlens, is_eos=is_eos)
    return list(w.split(lengths.tolist()))


def position_means(weights: list[torch.Tensor]) -> list[float]:
    """Mean weight at position 0, 1, ..., as long as at least a twentieth of the completions reach it."""
    longest = sorted(len(w) for w in weights)[-max(1, len(weights) // 20)]
    padded = torch.nn.utils.rnn.pad_sequence([w[:longest] for w in weights], batch_first=True, padding_value=float("nan"))
    return padded.nanmean(0).tolist()


def heatmaps(seed_run, construction: str) -> list[dict]:
    """The first pairs of the training rows, token by token."""
    rows, tokenizer = seed_run.scored(construction), seed_run.tokenizer
    out = []
    for row in rows.select(range(min(seed_run.config.evaluation.heatmaps, len(rows)))):
        entry = {
            "construction": construction,
            "seed": seed_run.seed,
            "prompt": tokenizer.decode(row["prompt_ids"], skip_special_tokens=True),
        }
        entry |= {side: response(row, side, tokenizer, seed_run.config.weighting) for side in SIDES}
        out.append(entry)
    return out


def response(row: dict, side: str, tokenizer, weighting: Weighting) -> dict:
    """One response of a scored row in the form of `tisdpo.heatmap`: tokens, weights, contrast, truth."""
    one = {name: [row[name]] for name in (f"{side}_contrast", f"{side}_ids")}
    return {
        "tokens": pieces(tokenizer, row[f"{side}_ids"]),
        "weights": side_weights(one, side, weighting, tokenizer.eos_token_id)[0].tolist(),
        "contrast": row[f"{side}_contrast"],
        "truth": row.get(f"{side}_truth"),
    }


def pieces(tokenizer, ids: list[int]) -> list[str]:
    """The text each token adds, so that the pieces joined are the decoded response."""
    found, before = [], ""
    for n, token in enumerate(ids, start=1):
        text = tokenizer.decode(ids[:n])
        # a token may change what came before it (half a character, a space taken back); then it is shown alone
        found.append(text[len(before) :] if text.startswith(before) else tokenizer.decode([token]))
        before = text
    return found


def samples(seed_run, methods, results) -> list[dict]:
    """Responses of all methods to the same prompts, side by side."""
    count = min(len(results[m, seed_run.seed]["samples"]) for m in methods)
    out = []
    for i in range(count):
        responses = [{"method": m, **results[m, seed_run.seed]["samples"][i]} for m in methods]
        out.append(
            {
                "prompt": responses[0]["prompt"],
                "seed": seed_run.seed,
                "responses": [{k: r[k] for k in ("method", "text", "reward")} for r in responses],
            }
        )
    return out


def notes(metrics: dict) -> list[str]:
    """What was found, in sentences with figures; comparisons are paired over seeds."""
    y = metrics["frontier_y"]
    label = METRIC_INFO[y]["label"]
    values = {}
    for r in metrics["results"]:
        if y in r["metrics"]:
            values.setdefault(r["method"], {})[r["seed"]] = r["metrics"][y]
    labels = {m["id"]: m["label"] for m in metrics["methods"]}
    constructions = [m for m in values if m in ("P", "S", "D", "R")]
    found = []
    for construction in constructions:
        for other in [m for m in ("dpo", "random") if m in values]:
            found.append(compare(labels[construction], labels[other], label, values[construction], values[other]))
    if "oracle" in values:  # how much knowing the truth would still add
        found += [compare(labels["oracle"], labels[m], label, values["oracle"], values[m]) for m in constructions]
    if "dpo" in values:
        found += [at_equal_kl(m, labels, label, metrics) for m in [*constructions, *({"oracle"} & set(values))]]
    agreement = {}
    for w in metrics["weights"]:
        if w["auc"] is not None:
            agreement.setdefault(w["construction"], []).append(w["auc"])
    if agreement:
        parts = ", ".join(f"({c}) {estimate(a).mean:.2f}" for c, a in agreement.items())
        found.append(f"How well the contrast finds the tokens that truly carry reward (AUC, 0.5 is chance): {parts}.")
        ratios = {c: [w["signal_to_noise"] for w in metrics["weights"] if w["construction"] == c] for c in agreement}
        signal = {c: estimate(values).mean for c, values in ratios.items() if None not in values}
    if agreement and signal:
        order = ", ".join(f"({c}) {value:.1f}" for c, value in sorted(signal.items(), key=lambda item: -item[1]))
        found.append(
            "What AUC does not see is how far these tokens stand out after the clamp (mean |log w| where a token carries reward, over the "
            f"mean elsewhere): {order}. Here the clamp counts: it cuts off large contrasts and leaves the noise on filler."
        )
        best = max(constructions, key=lambda m: estimate(values[m].values()).mean, default=None)
        if "D" in constructions and best != "D" and {"D", best} <= set(signal):
            found.append(
                f"(D), the best construction of the paper, does not lead here: ({best}) has the higher mean {label}. Over other "
                "settings of the contrastive models (docs/results.md) the size of the contrasts against the clamp decided, not whether "
                "they find the tokens; a larger beta of the contrastive DPO makes them smaller."
            )
    return found


def at_equal_kl(method: str, labels: dict, label: str, metrics: dict) -> str:
    """One sentence: the method against DPO where both frontiers have the same KL, interpolated between checkpoints, paired over seeds.

    The KL is the smaller of the two final ones, for each seed. Interpolated in the root of the KL, in which reward starts as a straight
    line (Gao et al., arXiv 2210.10760): chords in the KL itself would lie below a frontier with few checkpoints.
    """
    points = {(f["method"], f["seed"]): [(p["kl"], p["y"]) for p in f["points"]] for f in metrics["frontier"]}
    base = {r["seed"]: r["metrics"].get(metrics["frontier_y"]) for r in metrics["results"] if r["method"] == "base"}
    differences, kls = [], []
    for seed in metrics["seeds"]:
        lines = [sorted([(0.0, base[seed] if base[seed] is not None else 0.5), *points[m, seed]]) for m in (method, "dpo")]
        kls.append(min(line[-1][0] for line in lines))
        differences.append(interpolated(lines[0], kls[-1]) - interpolated(lines[1], kls[-1]))
    found, kl = estimate(differences), estimate(kls).mean
    interval = "" if found.half_width is None else f" ± {found.half_width:.2f}"
    return f"At equal KL to the base model ({kl:.1f} nats), {labels[method]} has {found.mean:+.2f}{interval} {label} compared with DPO."


def interpolated(line: list[tuple[float, float]], kl: float) -> float:
    """y at this KL on a line through points (KL, y) sorted by KL, straight in the root of the KL."""
    for (a, y0), (b, y1) in itertools.pairwise(line):
        if a <= kl <= b:
            x0, x, x1 = math.sqrt(max(a, 0)), math.sqrt(max(kl, 0)), math.sqrt(max(b, 0))
            return y0 if x1 == x0 else y0 + (y1 - y0) * (x - x0) / (x1 - x0)
    return line[-1][1]


def compare(name: str, other: str, label: str, a: dict, b: dict) -> str:
    """One sentence on the difference of two methods over the same seeds."""
    seeds = sorted(a.keys() & b.keys())
    difference = estimate(a[s] - b[s] for s in seeds)
    head = f"{name}: {label} {estimate(a[s] for s in seeds).mean:.2f} against {estimate(b[s] for s in seeds).mean:.2f} for {other}"
    if difference.half_width is None:
        return f"{head} (one seed: no interval, so this says little)."
    verdict = "better" if difference.low > 0 else "worse" if difference.high < 0 else "no clear difference"
    return f"{head}; difference {difference.mean:+.2f} ± {difference.half_width:.2f} (95 %, {len(seeds)} seeds, paired): {verdict}."
