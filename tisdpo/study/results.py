"""results.json and results.csv of a study: every policy, every frontier, every claim with its verdict, what everything cost."""

import csv
import json
import math
from dataclasses import asdict
from pathlib import Path
from statistics import fmean

from tisdpo.errors import InputError
from tisdpo.files import beside, write_json
from tisdpo.study import frontiers
from tisdpo.study.config import OF_ONE, OF_TWO, Study, comparisons, sides
from tisdpo.study.shared import StudyRun
from tisdpo.summary import environment

PARTS = ("contrastive", "scoring", "policy")
CURVES = {"rewards/chosen": "chosen_reward", "rewards/rejected": "rejected_reward"}
WALL = "wall.json"  # what every call of `tisdpo study` took by the clock and how many policies it finished: see `note_wall`


def collect(study: Study) -> dict:
    """The content of results.json; every policy of the study must be finished."""
    policies = [_policy(study, arm, point, seed) for arm, point in study.runs for seed in study.config.seed_list]
    quality = _quality(policies)
    lines = {arm: _lines(study, arm, policies, quality) for arm in study.arms}
    values = {arm: _values(study, arm, policies, quality) for arm in study.arms}
    return {
        "name": study.config.name,
        "description": study.config.description,
        "command": study.command,
        "settings": study.settings,
        "environment": environment(),
        "quality": quality,
        "seeds": study.config.seed_list,
        "points": study.points,
        "baseline": study.baseline,
        "data": policies[0]["data"],
        "arms": [{"name": name, **asdict(arm), "against": study.against(name)} for name, arm in study.arms.items()],
        "claims": [_claim(study, claim, lines, values) for claim in study.claims],
        "values": values,
        "frontiers": {arm: frontiers.drawn(lines[arm]) for arm in study.arms},
        "leads": {arm: _lead(lines, arm, study.against(arm)) for arm in study.arms if arm != study.against(arm)},
        "costs": _costs(study, policies),
        "seconds": sum(p["seconds"].get(stage, 0.0) for p in {p["id"]: p for p in policies}.values() for stage in p["seconds"]),
        "wall": _wall(study.directory, len({p["id"] for p in policies})),
        "policies": policies,
    }


def note_wall(directory: Path, seconds: float, policies: int, jobs: int) -> None:
    """One more call of `tisdpo study` in wall.json: how long it trained by the clock, how many policies it finished, how many at a time."""
    write_json(directory / WALL, [*_calls(directory), {"seconds": round(seconds, 1), "policies": policies, "jobs": jobs}])


def _calls(directory: Path) -> list[dict]:
    path = directory / WALL
    return json.loads(path.read_text()) if path.exists() else []


def _wall(directory: Path, policies: int) -> dict | None:
    """Time by the clock of all calls; None where they did not train exactly these policies (one was killed, or the file has changed)."""
    calls = _calls(directory)
    if sum(call["policies"] for call in calls) != policies:
        return None
    return {"seconds": math.fsum(call["seconds"] for call in calls), "calls": len(calls), "jobs": sorted({call["jobs"] for call in calls})}


def _policy(study: Study, arm: str, point: int, seed: int) -> dict:
    run = StudyRun(study.runs[arm, point], seed, study.directory)
    outcome = run.outcome()
    metrics = outcome["metrics"] | {"flop": math.fsum(cost["flop"] for cost in outcome["costs"])}
    for name, metric in CURVES.items():
        known = [y for y in outcome["curves"][name] if y is not None]
        metrics[metric] = fmean(known[-max(1, len(known) // 5) :]) if known else None
    weights = outcome["weights"]
    if weights is not None:
        metrics |= {name: weights[name] for name in ("auc", "spearman", "signal_to_noise")}
        metrics["effective_size"] = fmean(weights[side]["ess"] for side in ("chosen", "rejected"))
    key = run.directory.name
    return {"arm": arm, "point": point, "settings": study.point(arm, point), "seed": seed, "id": key, **outcome, "metrics": metrics}


def _quality(policies: list[dict]) -> str:
    """What all policies are compared by."""
    arms = {p["quality"]: p["arm"] for p in policies}
    if len(arms) > 1:
        parts = " but ".join(f"{arm!r} by {quality}" for quality, arm in arms.items())
        raise InputError(f"arms of one study must be measured alike, here {parts}; put them into studies of their own")
    return policies[0]["quality"]


def _of(policies: list[dict], arm: str) -> dict[int, list[dict]]:
    """{seed: policies of an arm in the order of the search points}."""
    found = {}
    for policy in policies:
        if policy["arm"] == arm:
            found.setdefault(policy["seed"], []).append(policy)
    return found


def _lines(study: Study, arm: str, policies: list[dict], quality: str) -> frontiers.Lines:
    """The lines of an arm; a policy that ranks at random has an accuracy of one half."""
    return {
        seed: [[(0.0, p["base"].get(quality, 0.5)), *((at["kl"], at["y"]) for at in p["points"])] for p in found]
        for seed, found in _of(policies, arm).items()
    }


def _values(study: Study, arm: str, policies: list[dict], quality: str) -> dict[str, dict[int, float]]:
    """{metric: {seed: value}} of an arm, at the search point whose policies are best on the other seeds, and which point that is."""
    found = _of(policies, arm)
    quality_of = {seed: [p["metrics"][quality] for p in of_seed] for seed, of_seed in found.items()}
    best = {seed: frontiers.best_point(quality_of, seed) for seed in found}
    chosen = {seed: found[seed][best[seed]]["metrics"] for seed in found}
    names = [name for name in OF_ONE if any(metrics.get(name) is not None for metrics in chosen.values())]
    values = {name: {s: metrics[name] for s, metrics in chosen.items() if metrics.get(name) is not None} for name in names}
    return values | {"point": best}


def _lead(lines: dict, arm: str, other: str) -> dict:
    """Of an arm over the one it is compared with: over all common KL, and at the largest."""
    end = frontiers.reach(lines[arm], lines[other])
    at_end = frontiers.lead_at(lines[arm], lines[other], end)
    return {"over": other, "kl": end, "lead": frontiers.lead(lines[arm], lines[other]), "lead_at_kl": at_end}


def _claim(study: Study, claim, lines: dict, values: dict) -> dict:
    """A claim with its verdict and what each of its comparisons gave."""
    found, every = [], []
    for compare, metric in comparisons(claim):
        first, second = sides(compare, study.arms)
        if metric in OF_TWO:
            two = lines[first], lines[second]
            differences = frontiers.lead(*two) if metric == "lead" else frontiers.lead_at(*two, claim.kl)
        else:
            a = values[first].get(metric, {})
            b = values[second].get(metric, {}) if isinstance(second, str) else dict.fromkeys(a, second)
            differences = {seed: a[seed] - b[seed] for seed in sorted(a.keys() & b.keys())}
        every.append(differences)
        found.append(_comparison(compare, metric, differences, claim))
    if claim.trend:  # its differences are shown, their slope is judged
        slope = _comparison(f"{claim.expect} by, from each to the next", metric, frontiers.slopes(every), claim)
        return asdict(claim) | {"verdict": frontiers.overall([slope["verdict"]]), "comparisons": [*found, slope]}
    return asdict(claim) | {"verdict": frontiers.overall([f["verdict"] for f in found]), "comparisons": found}


def _comparison(compare: str, metric: str, differences: dict[int, float], claim) -> dict:
    expect = {"rising": "higher", "falling": "lower"}.get(claim.expect, claim.expect)
    verdict = frontiers.judged(differences, expect, claim.within)
    one = verdict.difference
    return {
        "compare": compare, "metric": metric, "verdict": verdict.verdict, "differences": differences,
        "mean": one and one.mean, "half_width": one and one.half_width,
    }  # fmt: skip


def _costs(study: Study, policies: list[dict]) -> dict:
    """FLOP: of one policy of an arm by part (mean over seeds and search points), of its whole search, of what it shares with other arms."""
    users: dict[str, set[str]] = {}
    for policy in policies:
        for cost in policy["costs"]:
            users.setdefault(cost["key"], set()).add(policy["arm"])
    arms = {}
    for arm in study.arms:
        own = [p for p in policies if p["arm"] == arm]
        stages = {cost["key"]: cost["flop"] for p in own for cost in p["costs"]}
        one = {part: fmean(math.fsum(c["flop"] for c in p["costs"] if c["part"] == part) for p in own) for part in PARTS}
        search = math.fsum(stages.values()) / len(study.config.seed_list)
        shared = math.fsum(flop for key, flop in stages.items() if len(users[key]) > 1) / len(study.config.seed_list)
        arms[arm] = {**one, "one": math.fsum(one.values()), "search": search, "shared": shared}
    stages = {cost["key"]: cost["flop"] for p in policies for cost in p["costs"]}
    shared = {key: flop for key, flop in stages.items() if len(users[key]) > 1}
    seeds = len(study.config.seed_list)
    return {"arms": arms, "all": math.fsum(stages.values()) / seeds, "shared": math.fsum(shared.values()) / seeds}


def write_results(results: dict, directory: Path) -> None:
    """results.json with everything, results.csv with one row per policy."""
    write_json(directory / "results.json", results)
    searched = list(dict.fromkeys(key for point in results["points"] for key in point))
    metrics = list(dict.fromkeys(name for policy in results["policies"] for name in policy["metrics"]))
    arms = {arm["name"]: arm for arm in results["arms"]}
    with beside(directory / "results.csv") as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["arm", "method", "seed", *searched, *metrics])
        for policy in results["policies"]:
            row = [policy["arm"], arms[policy["arm"]]["method"], policy["seed"], *(policy["settings"][key] for key in searched)]
            writer.writerow(row + [policy["metrics"].get(name) for name in metrics])
