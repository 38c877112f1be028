"""A made-up run with the form of metrics.json, for the tests of the report and for looking at it."""

import math
import random

METHODS = [
    ("base", "base", "before any preference training"),
    ("dpo", "DPO", ""),
    ("random", "TIS-DPO, random weights", "the control: weights that know nothing"),
    ("P", "TIS-DPO (P)", ""),
    ("S", "TIS-DPO (S)", ""),
    ("D", "TIS-DPO (D)", ""),
    ("R", "TIS-DPO (R)", ""),
    ("rank", "TIS-DPO (S), rank weights", ""),
    ("kl", "TIS-DPO (S), KL", "with the sequence-KL term"),
    ("truth", "TIS-DPO, true weights", "the ceiling: weights from the known rewards"),
]
QUALITY = {"base": 0.0, "dpo": 1.9, "random": 0.7, "P": 1.2, "S": 3.1, "D": 2.2, "R": 2.0, "rank": 2.6, "kl": 2.9, "truth": 6.4}
METRIC_INFO = {
    "reward": {
        "label": "true reward",
        "unit": "",
        "better": "higher",
        "help": "Mean known reward of what the policy writes to held-out prompts.",
    },
    "accuracy": {
        "label": "accuracy",
        "unit": "%",
        "better": "higher",
        "help": "Held-out pairs whose implicit reward ranks chosen above rejected.",
    },
    "margin": {
        "label": "margin",
        "unit": "",
        "better": None,
        "help": "Mean implicit reward of chosen minus rejected; it grows with the weights.",
    },
    "kl": {"label": "KL", "unit": "nats", "better": None, "help": "KL of policy to reference, summed over a generated response."},
    "length": {"label": "length", "unit": "tokens", "better": None, "help": "Mean length of the generated responses."},
    "accuracy_by_length": {
        "label": "longer wins",
        "unit": "%",
        "better": None,
        "help": "Accuracy of always preferring the longer response.",
    },
}
EDGES = [0.2 * 1.17**i for i in range(22)]
RESPONSES = (
    "the gardener was gentle . the fountain was rough . on monday the garden is open . the visitor seemed rather warm . </s>",
    "the gardener looked dull . we walked home before dusk . the hedge was gentle . the visitor seemed very harsh . </s>",
)
TRUTH = {("gardener", "gentle"): 1.0, ("gardener", "dull"): -1.0, ("visitor", "warm"): 1.0, ("visitor", "harsh"): -1.0}


def fake_metrics(methods: int = 8, seeds: int = 5, truth: bool = True) -> dict:
    """A run with `methods` methods; without `truth` there is no reward, no AUC and no marked token."""
    draw = random.Random(7)
    listed = METHODS[:methods] if methods < len(METHODS) else METHODS
    ids = [method[0] for method in listed]
    quality = "reward" if truth else "accuracy"
    constructions = [name for name in ("P", "S", "D", "random", "truth") if name in ids and (truth or name != "truth")]
    runs = [(name, seed) for name in ids for seed in range(seeds)]
    return {
        "name": "Five ways to weight a token" if methods > 2 else "DPO alone",
        "description": "Demo: a tiny Llama trained from scratch in a world where the reward of every token is known.",
        "settings": {
            "model": {"layers": 4, "hidden": 128, "vocabulary": 412},
            "objective": {"loss": "sigmoid", "beta": 0.1, "kl": None},
            "weighting": {"transform": "exp", "lower": -0.5, "upper": 1.5},
            "seeds": seeds,
        },
        "environment": {
            "tisdpo": "0.1.0",
            "torch": "2.13.0+cpu",
            "python": "3.11.2",
            "device": "cpu, 2 cores",
            "date": "2026-01-02",
            "revision": "abc1234",
        },
        "seconds": {
            "world and base model": 31.2,
            "contrastive models": 58.0,
            "scoring": 4.4,
            "training": 92.5,
            "evaluation": 28.1,
            "report": 3.9,
        },
        "seeds": list(range(seeds)),
        "data": {"train": 2000, "heldout": 400, "dropped": {"identical responses": 12}, "kind": "synthetic" if truth else "text"},
        "methods": [{"id": name, "label": label, "note": note} for name, label, note in listed],
        "metric_info": METRIC_INFO,
        "results": [{"method": name, "seed": seed, "metrics": _metrics(draw, name, truth)} for name, seed in runs],
        "weights": [_weights(draw, name, seed, truth) for name in constructions for seed in range(seeds)],
        "frontier_y": quality,
        "frontier": [{"method": name, "seed": seed, "points": _frontier(draw, name, truth)} for name, seed in runs if name != "base"],
        "curves": [{"method": name, "seed": seed, **_curve(draw, name)} for name, seed in runs if name != "base"],
        "heatmaps": [_heatmap(draw, name, prompt, truth) for prompt in range(4) for name in constructions],
        "samples": [_sample(draw, ids, prompt, truth) for prompt in range(6)],
        "notes": [
            "TIS-DPO (S) earns 3.1 ± 0.2 true reward per response, DPO 1.9 ± 0.2 and random weights 0.7 ± 0.2 (95 % intervals, 5 seeds).",
            "The contrast of (S) finds the important tokens with an AUC of 0.88, that of (D) with 0.71.",
            "Weights from the truth itself reach 6.4: better estimates of the weights, not more training, are what is missing.",
        ],
    }


def _metrics(draw: random.Random, name: str, truth: bool) -> dict:
    good = QUALITY[name]
    found = {
        "accuracy": 50 + 6 * good + draw.gauss(0, 1.2),
        "margin": 0.0 if name == "base" else 0.4 * good + 0.6 + draw.gauss(0, 0.1),
        "kl": 0.0 if name == "base" else 4 + 1.5 * good + draw.gauss(0, 0.5),
        "length": 41 + good + draw.gauss(0, 0.8),
        "accuracy_by_length": 51.5,
    }
    return {"reward": good + draw.gauss(0, 0.15), **found} if truth else found


def _frontier(draw: random.Random, name: str, truth: bool) -> list[dict]:
    points = []
    for i in range(1, 8):
        kl = (0.6 + 0.1 * QUALITY[name]) * i**1.5 * draw.uniform(0.9, 1.1)
        gain = QUALITY[name] * (1 - math.exp(-i / 2.5)) - (0.004 * kl**2 if name in ("dpo", "random") else 0) + draw.gauss(0, 0.1)
        points.append({"step": 25 * i, "kl": kl, "y": gain if truth else 50 + 6 * gain})
    return points


def _curve(draw: random.Random, name: str) -> dict:
    steps = list(range(5, 176, 5))
    rise = [(0.3 + 0.2 * QUALITY[name]) * (1 - math.exp(-step / 60)) for step in steps]
    return {
        "step": steps,
        "loss": [0.693 - 0.3 * x + draw.gauss(0, 0.02) for x in rise],
        "rewards/margins": [x + draw.gauss(0, 0.05) for x in rise],
        "rewards/accuracies": [min(1.0, 0.5 + 0.3 * x + draw.gauss(0, 0.03)) for x in rise],
        "rewards/chosen": [0.3 * x + draw.gauss(0, 0.03) for x in rise],
        "rewards/rejected": [-0.7 * x + draw.gauss(0, 0.03) for x in rise],
    }


def _weights(draw: random.Random, name: str, seed: int, truth: bool) -> dict:
    auc = {"P": 0.64, "S": 0.88, "D": 0.71, "random": 0.5, "truth": 1.0}[name]

    def side(mean: float) -> dict:
        jitter = draw.gauss(0, 0.01)
        return {
            "mean": mean + jitter,
            "std": 0.4 + jitter,
            "clipped_low": 0.12 + jitter / 4,
            "clipped_high": 0.03 + abs(jitter) / 4,
            "ess": 0.86 - abs(jitter),
            "position_correlation": -0.08 + jitter,
            "contrast_std": 0.61 + jitter,
        }

    def counts(centre: float) -> list[int]:
        return [int(4000 * math.exp(-((math.log(low / centre) / 0.3) ** 2))) + draw.randrange(40) for low in EDGES[:-1]]

    clamped = "{:.0%} of the chosen contrasts lie at the clamp, so the weights are nearly two-valued; train for fewer steps."
    return {
        "construction": name,
        "seed": seed,
        "auc": min(1.0, auc + draw.gauss(0, 0.01)) if truth else None,
        "signal_to_noise": 20 * auc - 8 if truth else None,
        "spearman": auc - 0.35 + draw.gauss(0, 0.01) if truth else None,
        "chosen": side(1.2),
        "rejected": side(0.85),
        "findings": [clamped.format(0.55 + 0.01 * seed)] if name == "D" else [],
        "histogram": {"edges": EDGES, "chosen": counts(1.15), "rejected": counts(0.85)},
        "position": {
            "chosen": [1.2 - 0.003 * t + draw.gauss(0, 0.02 + 0.002 * t) for t in range(60)],
            "rejected": [0.85 + draw.gauss(0, 0.03) for _ in range(52)],
        },
    }


def _heatmap(draw: random.Random, name: str, prompt: int, truth: bool) -> dict:
    sharpness = {"P": 0.4, "S": 1.0, "D": 0.6, "random": 0.0, "truth": 1.5}[name]
    noise = {"truth": 0.0, "random": 0.6}.get(name, 0.2)
    sides = {}
    for side, text in zip(("chosen", "rejected"), RESPONSES):
        words = text.split()
        rewards = [
            next((r for (who, what), r in TRUTH.items() if what == word and who in words[max(0, i - 4) : i]), 0.0)
            for i, word in enumerate(words)
        ]
        contrast = [sharpness * reward + draw.gauss(0, 1) * noise for reward in rewards]
        sign = 1 if side == "chosen" else -1
        tokens = [word if i == 0 or word in (".", "</s>") else f" {word}" for i, word in enumerate(words)]
        weights = [math.exp(sign * min(max(r, -0.5), 1.5)) for r in contrast]
        sides[side] = {"tokens": tokens, "weights": weights, "contrast": contrast, "truth": rewards if truth else None}
    places = ("garden", "harbour", "library", "market")
    return {"construction": name, "seed": 0, "prompt": f"what is the {places[prompt]} like?", **sides}


def _sample(draw: random.Random, ids: list[str], prompt: int, truth: bool) -> dict:
    responses = []
    for name in ids:
        text = " ".join(draw.sample(RESPONSES[0].split()[:-1] + RESPONSES[1].split()[:-1], 22))
        responses.append({"method": name, "text": text, "reward": round(draw.gauss(QUALITY[name], 1)) if truth else None})
    return {
        "prompt": f"please describe the {('garden', 'harbour', 'library')[prompt % 3]} to me. ({prompt + 1})",
        "seed": 0,
        "responses": responses,
    }
