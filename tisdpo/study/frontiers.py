"""Frontiers of an arm and what follows from them. A line is one trained policy: points (KL, y) sorted by KL, from (0, y of the base) on
through its checkpoints. `Lines` of an arm: {seed: one line per search point}.

The frontier of an arm in a seed is, at every KL, the line of the search point that is best there on the *other* seeds: choosing by a seed
itself would count its luck as skill, and the more so the more the arm varies. All KL axes are axes of the root of the KL, in which reward
starts as a straight line (Gao et al., arXiv 2210.10760).
"""

import math
from dataclasses import dataclass

from tisdpo.intervals import Estimate, estimate
from tisdpo.summary import interpolated

Line = list[tuple[float, float]]
Lines = dict[int, list[Line]]
STEPS = 40  # of the integral


def best_point(values: dict[int, list[float]], seed: int) -> int:
    """The search point with the highest mean over the other seeds (this one, if there is no other); values[seed][point]."""
    others = [s for s in values if s != seed] or [seed]
    points = range(len(values[seed]))
    return max(points, key=lambda p: sum(values[s][p] for s in others))


def height(lines: Lines, seed: int, kl: float) -> float | None:
    """y of the frontier at this KL, or None where no line of this seed reaches it."""
    others = [s for s in lines if s != seed] or [seed]

    def worth(point: int) -> float:
        reached = [interpolated(lines[s][point], kl) for s in others if lines[s][point][-1][0] >= kl]
        return sum(reached) / len(reached) if reached else -math.inf

    reach = [p for p, line in enumerate(lines[seed]) if line[-1][0] >= kl]
    return interpolated(lines[seed][max(reach, key=worth)], kl) if reach else None


def reach(*arms: Lines) -> float:
    """The largest KL that all these arms reach in every seed."""
    return min(max(line[-1][0] for line in lines) for arm in arms for lines in arm.values())


def drawn(lines: Lines, points: int = 9) -> dict[int, list[tuple[float, float]]]:
    """{seed: points (KL, y) of the frontier}, the same KL for all seeds, as far as all seeds reach."""
    end = reach(lines)
    grid = [end * (n / (points - 1)) ** 2 for n in range(points)]
    return {seed: [(kl, height(lines, seed, kl)) for kl in grid] for seed in lines}


def lead(first: Lines, second: Lines) -> dict[int, float]:
    """{seed: mean of (first - second) over all KL from 0 to where both arms reach}, on the root axis: the area between, over its width."""
    end = reach(first, second)
    grid = [end * (n / STEPS) ** 2 for n in range(STEPS + 1)]
    found = {}
    for seed in sorted(first.keys() & second.keys()):
        gaps = [height(first, seed, kl) - height(second, seed, kl) for kl in grid]
        found[seed] = (sum(gaps) - (gaps[0] + gaps[-1]) / 2) / STEPS
    return found


def lead_at(first: Lines, second: Lines, kl: float | None) -> dict[int, float]:
    """{seed: first - second at one KL}, by default the largest that both reach; seeds that do not reach it are left out."""
    kl = reach(first, second) if kl is None else kl
    found = {}
    for seed in sorted(first.keys() & second.keys()):
        a, b = height(first, seed, kl), height(second, seed, kl)
        if a is not None and b is not None:
            found[seed] = a - b
    return found


@dataclass(frozen=True)
class Verdict:
    """What the paired differences of one comparison say: "confirmed", "opposite", "unclear" or "not measured"."""

    verdict: str
    difference: Estimate | None


def judged(differences: dict[int, float], expect: str, within: float | None) -> Verdict:
    """A difference expected "higher", "lower" or "equal" (all of its interval within +- `within`), by its 95 % t-interval over seeds.

    One seed has no interval, so it decides nothing.
    """
    found = estimate(differences.values())
    if found is None:
        return Verdict("not measured", None)
    if expect == "equal":
        if max(abs(found.low), abs(found.high)) <= within:
            return Verdict("confirmed", found)
        return Verdict("opposite" if found.low > within or found.high < -within else "unclear", found)
    low, high = (found.low, found.high) if expect == "higher" else (-found.high, -found.low)
    return Verdict("confirmed" if low > 0 else "opposite" if high < 0 else "unclear", found)


def slopes(comparisons: list[dict[int, float]]) -> dict[int, float]:
    """{seed: least-squares slope of its differences over the place of the comparison, per place}; seeds that lack one are left out."""
    found, middle = {}, (len(comparisons) - 1) / 2
    for seed in sorted(set.intersection(*(set(one) for one in comparisons))):
        weight = sum((n - middle) ** 2 for n in range(len(comparisons)))
        found[seed] = sum((n - middle) * one[seed] for n, one in enumerate(comparisons)) / weight
    return found


def overall(verdicts: list[str]) -> str:
    """Of a claim: confirmed where all its comparisons are, "depends on" where some are, else not confirmed."""
    confirmed = [verdict == "confirmed" for verdict in verdicts]
    return "confirmed" if all(confirmed) else "depends on" if any(confirmed) else "not confirmed"
