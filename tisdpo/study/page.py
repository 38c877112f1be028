"""study.html: what was asked, the claims with their verdicts, frontiers, a table, costs, how to repeat it."""

from collections import Counter
from pathlib import Path

import yaml

from tisdpo import plots
from tisdpo.intervals import decimals, estimate, number
from tisdpo.report import duration, listed_methods, metric_table, render, write_html
from tisdpo.study.config import OF_ONE, OF_TWO
from tisdpo.summary import METRIC_INFO

VERDICTS = {"confirmed": "confirmed", "opposite": "the opposite", "unclear": "no clear difference", "not measured": "not measured"}
OF_EQUALS = VERDICTS | {"opposite": "differs by more", "unclear": "not shown to be equal"}
LABELS = {
    "lead": "mean lead",
    "lead_at_kl": "lead at equal KL",
    "auc": "AUC",
    "spearman": "rank correlation",
    "signal_to_noise": "signal / noise",
    "effective_size": "effective size",
    "chosen_reward": "implicit reward of chosen",
    "rejected_reward": "implicit reward of rejected",
    "flop": "FLOP",
}
# of a column of the table of all figures, where the text for writers of a claim does not fit
HELP = {
    "lead": "mean height of the frontier above that of the way it is compared with, over all KL that both reach (on the root-of-KL axis)",
    "lead_at_kl": "height of the frontier above that of the way it is compared with, at the largest KL that both reach",
}
TABLE = ("right", "reward", "accuracy", "kl", "lead", "lead_at_kl", "auc", "spearman", "signal_to_noise", "effective_size",
    "length", "finished")  # fmt: skip
CURVES = {"rewards/chosen": "Implicit reward of chosen", "rewards/rejected": "Implicit reward of rejected"}
PREFIXES = ((1e15, "PFLOP"), (1e12, "TFLOP"), (1e9, "GFLOP"), (1e6, "MFLOP"))


def write_page(results: dict, path: Path) -> Path:
    """Write the page of a study from what `collect` found; returns its path."""
    return write_html(render("study.html.j2", _page(results)), path)


def _page(results: dict) -> dict:
    arms = results["arms"]
    listed = [{"id": "base", "label": "base model"}, *({"id": a["name"], "note": _note(a, results["baseline"])} for a in arms)]
    methods = listed_methods({"methods": listed})
    kind = results["data"]["kind"]
    quality = _label(results["quality"], kind)
    return {
        "name": results["name"],
        "description": results["description"],
        "command": results["command"],
        "methods": methods,
        "quality": quality,
        "data": results["data"],
        "seeds": results["seeds"],
        "points": [", ".join(f"{key} = {value}" for key, value in point.items()) for point in results["points"] if point],
        "own_search": any(arm.get("search") for arm in arms),
        "best": best_settings(results),
        "baseline": results["baseline"],
        "policies": len({p["id"] for p in results["policies"]}),
        "claims": [claim_as_text(claim, kind) for claim in results["claims"]],
        "groups": _groups(results, methods, quality),
        "table": metric_table(_metrics(results), methods),
        "curves": _curves(results, methods),
        "costs": _costs(results),
        "compute": _compute(results, methods, quality),
        "environment": results["environment"],
        "settings": yaml.safe_dump(results["settings"], sort_keys=False, allow_unicode=True, width=100),
        "time": duration(results["seconds"]),
        "wall": wall_as_text(results["wall"]),
    }


def wall_as_text(wall: dict | None) -> str:
    """Time by the clock, with the number of policies at a time: "31 min 2 s by the clock, 2 jobs"; empty where it is not known."""
    if wall is None:
        return ""
    calls = "" if wall["calls"] == 1 else f" in {wall['calls']} calls"
    jobs = " or ".join(map(str, wall["jobs"]))
    return f"{duration(wall['seconds'])} by the clock{calls}, {jobs} {'job' if jobs == '1' else 'jobs'}"


def best_settings(results: dict) -> dict[str, dict[str, str]]:
    """{searched setting: {arm: its values at the best points, with the number of seeds}}: "0.0005 (3), 0.001 (1)"."""
    found: dict[str, dict[str, str]] = {}
    for key in results["points"][0]:
        searched = list(dict.fromkeys(point[key] for point in results["points"]))
        for arm in results["arms"]:
            own = arm["search"].get(key, searched)  # as many values, in the same order
            points = results["values"][arm["name"]]["point"].values()
            seeds = Counter(searched.index(results["points"][point][key]) for point in points)
            found.setdefault(key, {})[arm["name"]] = ", ".join(f"{setting(own[place])} ({seeds[place]})" for place in sorted(seeds))
    return found


def setting(value) -> str:
    """A searched value as text."""
    return f"{value:g}" if isinstance(value, float) else str(value)


def _note(arm: dict, baseline: str) -> str:
    settings = ", ".join(f"{key}: {value}" for key, value in arm["overrides"].items())
    against = "" if arm["against"] in (baseline, arm["name"]) else f"compared with {arm['against']}"
    return "; ".join(part for part in (arm["note"], settings, against) if part)


def _label(metric: str, kind: str, kl: float | None = None) -> str:
    """Title of a metric; on real text only a model of the reward can give one, in the worlds it is the truth."""
    if metric == "lead_at_kl" and kl is not None:
        return f"lead at a KL of {kl:g}"
    if metric == "reward" and kind != "text":
        return "true reward"
    return LABELS.get(metric) or METRIC_INFO[metric]["label"]


def claim_as_text(claim: dict, kind: str) -> dict:
    """A claim about data of this kind, with its comparisons as text."""
    shown, verdicts = [], OF_EQUALS if claim["expect"] == "equal" else VERDICTS
    for one in claim["comparisons"]:
        found = estimate(one["differences"].values())
        digits = max(2, decimals([found]))
        figure = "" if found is None else number(found.mean, digits)
        if found is not None and found.mean > 0:
            figure = f"+{figure}"
        half = "" if found is None or found.half_width is None else number(found.half_width, digits)
        seeds = "\n".join(f"seed {seed}: {value:.4g}".replace("-", "−") for seed, value in one["differences"].items())
        verdict = "one seed, so no interval" if found is not None and found.half_width is None else verdicts[one["verdict"]]
        shown.append(
            {
                "compare": one["compare"].replace(" - ", " − "), "metric": _label(one["metric"], kind, claim.get("kl")),
                "figure": figure, "half": half,
                "seeds": seeds, "verdict": verdict, "sign": {"confirmed": "yes", "opposite": "no"}.get(one["verdict"], "open"),
            }
        )  # fmt: skip
    if claim["expect"] in ("rising", "falling"):
        for one in shown[:-1]:
            one |= {"verdict": "", "sign": "open"}
        expected = claim["expect"]
    else:
        expected = {"higher": "above 0", "lower": "below 0", "equal": f"within ±{claim['within']}"}[claim["expect"]]
    return {"text": claim["text"], "verdict": claim["verdict"], "kind": claim["verdict"].replace(" ", "-"), "expected": expected} | {
        "comparisons": shown
    }


def _metrics(results: dict) -> dict:
    """The arms' figures in the form of `metric_table`."""
    found = []
    for arm, values in results["values"].items():
        lead = results["leads"].get(arm, {})
        both = values | {name: lead[name] for name in OF_TWO if name in lead}
        found += [
            {"method": arm, "seed": seed, "metrics": {name: both[name][seed] for name in TABLE if seed in both.get(name, {})}}
            for seed in results["seeds"]
        ]
    info = {}
    for name in TABLE:
        described = {"help": "", "unit": "", "better": None, **METRIC_INFO.get(name, {}), "label": _label(name, results["data"]["kind"])}
        described["help"] = described["help"] or {**OF_TWO, **OF_ONE, **HELP}[name]
        info[name] = described | ({"better": "higher"} if name in ("lead", "lead_at_kl") else {})
    return {"results": found, "metric_info": info}


def _groups(results: dict, methods: dict, quality: str) -> list[dict]:
    """One figure per group of arms: their frontiers, with those they are compared with."""
    base = estimate(p["base"].get(results["quality"], 0.5) for p in results["policies"])
    groups = {}
    for arm in results["arms"]:
        groups.setdefault(arm["group"], []).append(arm)
    figures = []
    for place, (group, arms) in enumerate(groups.items()):
        names = list(dict.fromkeys([a["against"] for a in arms] + [a["name"] for a in arms]))
        series = []
        for name in names:
            runs = [dict(enumerate(points)) for points in results["frontiers"][name].values()]
            series.append(plots.Series(methods[name]["index"], runs))
        svg = plots.frontier(series, base and base.mean, "KL to the base model (nats, square-root axis)", quality, name=f"frontier-{place}")
        figures.append({"title": group, "svg": svg, "indices": [one.index for one in series]})
    return figures


def _curves(results: dict, methods: dict) -> list[dict]:
    """Learning curves at the first search point."""
    panels = []
    for place, (key, title) in enumerate(CURVES.items()):
        series = []
        for arm in results["arms"]:
            found = [p["curves"] for p in results["policies"] if p["arm"] == arm["name"] and p["point"] == 0]
            runs = [{x: (x, y) for x, y in zip(c["step"], c[key]) if y is not None} for c in found]
            if all(runs):
                series.append(plots.Series(methods[arm["name"]]["index"], runs))
        if series:
            panels.append({"title": title, "svg": plots.curve(str(place), series), "indices": [one.index for one in series]})
    return panels


def _unit(results: dict) -> tuple[float, str]:
    """The largest unit in which no arm costs less than one."""
    smallest = min(cost["one"] for cost in results["costs"]["arms"].values())
    return next((p for p in PREFIXES if smallest >= p[0]), PREFIXES[-1])


def _compute(results: dict, methods: dict, quality: str) -> dict:
    """Figure of the quality at the best search point against the cost of one policy."""
    base = estimate(p["base"].get(results["quality"], 0.5) for p in results["policies"])
    size, unit = _unit(results)
    series = []
    for arm, values in results["values"].items():
        x = results["costs"]["arms"][arm]["one"] / size
        series.append(plots.Series(methods[arm]["index"], [{0: (x, y)} for y in values[results["quality"]].values()]))
    svg = plots.compute(series, base and base.mean, f"{unit} of one policy, weights included (logarithmic axis)", quality)
    return {"svg": svg, "indices": [one.index for one in series]}


def _costs(results: dict) -> dict:
    """FLOP of every arm as text, in one unit."""
    costs = results["costs"]
    smallest = min(cost["one"] for cost in costs["arms"].values())
    size, unit = _unit(results)
    baseline = costs["arms"][results["baseline"]]["one"]

    def text(flop: float) -> str:
        return "–" if flop == 0 else number(flop / size, decimals([estimate([smallest / size])]))

    rows = []
    for arm, cost in costs["arms"].items():
        parts = [text(cost[part]) for part in ("contrastive", "scoring", "policy", "one")]
        rows.append({"arm": arm, "cells": [*parts, f"{cost['one'] / baseline:.2f}", text(cost["search"]), text(cost["shared"])]})
    return {"unit": unit, "rows": rows, "all": text(costs["all"]), "shared": text(costs["shared"])}
