"""Frontiers of an arm and what follows from them. A line is one trained policy: its points (KL, y) from (0, y of the base) on through its
checkpoints, in the order of training. `Lines` of an arm: {seed: one line per search point}.

The frontier of an arm is what it earns at most within a distance: the upper hull of all its checkpoints, up to the highest. Which those are
(setting of the search and checkpoint) is chosen by the means over the *other* seeds, and the points are the seed's own: choosing by a seed
itself would count its luck as skill, and the more so the more the arm varies. All KL axes are axes of the root of the KL, in which reward
starts as a straight line and then bends down (Gao et al., arXiv 2210.10760), so a straight line between two settings promises too little.
"""

import math
from dataclasses import dataclass
from statistics import fmean

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


def frontier(lines: Lines, seed: int) -> Line:
    """The frontier of a seed, by rising KL; beyond its last point it stays level. All policies have the same number of checkpoints."""
    others = [s for s in lines if s != seed] or [seed]
    places = [(0, 0)] + [(point, n) for point, line in enumerate(lines[seed]) for n in range(1, len(line))]
    means = {}
    for point, n in places:
        measured = [lines[s][point][n] for s in others]
        means[point, n] = fmean(math.sqrt(max(kl, 0.0)) for kl, _ in measured), fmean(y for _, y in measured)
    end = max(places, key=lambda place: (means[place][1], -means[place][0]))
    hull: list[tuple[int, int]] = []
    for place in sorted((p for p in places if means[p][0] <= means[end][0]), key=lambda p: (means[p], p == end)):
        while len(hull) > 1 and not _bends_down(*(means[p] for p in (*hull[-2:], place))):
            hull.pop()
        hull.append(place)
    found = []
    for point, n in reversed(hull):
        kl, y = lines[seed][point][n]
        if not found or kl < found[-1][0]:  # a point that this seed puts beyond a higher one is no step on the way to it
            found.append((kl, y))
    return found[::-1]


def _bends_down(a: tuple[float, float], b: tuple[float, float], c: tuple[float, float]) -> bool:
    """Whether b lies above the straight line from a to c."""
    return (b[0] - a[0]) * (c[1] - a[1]) < (b[1] - a[1]) * (c[0] - a[0])


def reach(*arms: Lines) -> float:
    """The largest KL that all these arms reach in every seed."""
    return min(max(kl for line in lines for kl, _ in line) for arm in arms for lines in arm.values())


def drawn(lines: Lines, points: int = 9) -> dict[int, list[tuple[float, float]]]:
    """{seed: points (KL, y) of the frontier}, the same KL for all seeds, as far as all seeds reach."""
    end = reach(lines)
    grid = [end * (n / (points - 1)) ** 2 for n in range(points)]
    return {seed: [(kl, interpolated(line, kl)) for kl in grid] for seed in lines for line in [frontier(lines, seed)]}


def lead(first: Lines, second: Lines) -> dict[int, float]:
    """{seed: mean of (first - second) over all KL from 0 to where both arms reach}, on the root axis: the area between, over its width."""
    end = reach(first, second)
    grid = [end * (n / STEPS) ** 2 for n in range(STEPS + 1)]
    found = {}
    for seed in sorted(first.keys() & second.keys()):
        a, b = frontier(first, seed), frontier(second, seed)
        gaps = [interpolated(a, kl) - interpolated(b, kl) for kl in grid]
        found[seed] = (sum(gaps) - (gaps[0] + gaps[-1]) / 2) / STEPS
    return found


def lead_at(first: Lines, second: Lines, kl: float | None) -> dict[int, float]:
    """{seed: first - second at one KL}, by default the largest that both reach; seeds in which one of them does not are left out."""
    kl = reach(first, second) if kl is None else kl
    found = {}
    for seed in sorted(first.keys() & second.keys()):
        if reach({seed: first[seed]}, {seed: second[seed]}) >= kl:
            found[seed] = interpolated(frontier(first, seed), kl) - interpolated(frontier(second, seed), kl)
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
