"""Means over seeds with their 95 % intervals, and how to print and compare them honestly; bootstrap intervals of any statistic."""

import math
import random
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache


@cache
def t_quantile(degrees: int, level: float = 0.95) -> float:
    """t with P(|T| <= t) = level for Student's T with `degrees` degrees of freedom (two-sided critical value).

    Solved by bisection on the closed forms of the distribution for whole degrees of freedom: Abramowitz and Stegun,
    Handbook of Mathematical Functions, 26.7.3 (odd) and 26.7.4 (even). Good to about 1e-12.
    """
    if degrees < 1 or not 0 < level < 1:
        raise ValueError(f"t_quantile needs degrees >= 1 and 0 < level < 1, got degrees={degrees}, level={level}")

    def inside(angle: float) -> float:  # P(|T| <= tan(angle) * sqrt(degrees))
        odd = degrees % 2
        term, total = (math.cos(angle) if odd else 1.0), 0.0
        for k in range(1 + odd, degrees, 2):
            total += term
            term *= math.cos(angle) ** 2 * k / (k + 1)
        return 2 / math.pi * (angle + math.sin(angle) * total) if odd else math.sin(angle) * total

    low, high = 0.0, math.pi / 2
    while low < (middle := (low + high) / 2) < high:
        low, high = (middle, high) if inside(middle) < level else (low, middle)
    return math.tan(low) * math.sqrt(degrees)


RESAMPLES = 1000


def bootstrap(
    statistics_of: Callable[[list], dict[str, float | None]], items: Sequence, *, resamples: int = RESAMPLES, seed: int = 0
) -> dict[str, tuple[float, float] | None]:
    """95 % percentile intervals {name: (low, high)} of `statistics_of(items)` over samples of the items, drawn with repetition.

    An interval is None for fewer than two items, and where its statistic is None for more than a twentieth of the samples.
    """
    names = list(statistics_of(list(items)))
    if len(items) < 2:
        return dict.fromkeys(names)
    drawn = random.Random(seed)
    samples = [statistics_of(drawn.choices(items, k=len(items))) for _ in range(resamples)]
    found = {}
    for name in names:
        values = [sample[name] for sample in samples if sample[name] is not None]
        steps = statistics.quantiles(values, n=40, method="inclusive") if len(values) >= max(2, 0.95 * resamples) else None
        found[name] = None if steps is None else (steps[0], steps[-1])
    return found


@dataclass(frozen=True)
class Estimate:
    """Mean of `values` (one per seed) and the half-width of its 95 % t-interval, None for fewer than two values."""

    mean: float
    half_width: float | None
    values: tuple[float, ...]

    @property
    def low(self) -> float:
        return self.mean - (math.inf if self.half_width is None else self.half_width)

    @property
    def high(self) -> float:
        return self.mean + (math.inf if self.half_width is None else self.half_width)


def estimate(values: Iterable[float | None]) -> Estimate | None:
    """Mean and 95 % t-interval of the finite `values`; None if there are none."""
    known = tuple(float(value) for value in values if value is not None and math.isfinite(value))
    if not known:
        return None
    half = t_quantile(len(known) - 1) * statistics.stdev(known) / math.sqrt(len(known)) if len(known) > 1 else None
    return Estimate(statistics.fmean(known), half, known)


def best_method(estimates: dict[str, Estimate | None], better: str | None) -> str | None:
    """The method whose interval lies beyond those of all others on the `better` side ("higher" | "lower"), or None.

    A method with one seed has no interval and could be anywhere: then there is no best one.
    """
    known = {method: one for method, one in estimates.items() if one is not None}
    if better not in ("higher", "lower") or len(known) < 2:
        return None
    sign = 1 if better == "higher" else -1
    best = max(known, key=lambda method: sign * known[method].mean)
    worst_of_best = known[best].low if sign > 0 else -known[best].high
    best_of_others = max((one.high if sign > 0 else -one.low) for method, one in known.items() if method != best)
    return best if worst_of_best > best_of_others else None


def decimals(estimates: Iterable[Estimate | None]) -> int:
    """Digits after the point for one column: those that a typical interval leaves meaningful, else three of the largest value.

    An interval is given with two digits if it starts below 3.55 and with one above, the rule of the Particle Data Group.
    """
    known = [one for one in estimates if one is not None]
    halves = sorted(one.half_width for one in known if one.half_width)
    if halves:
        digits = math.ceil(-math.log10(halves[len(halves) // 2] / 3.55))
    else:
        largest = max((abs(one.mean) for one in known), default=0.0)
        digits = 2 - math.floor(math.log10(largest)) if largest > 0 else 2
    return max(0, min(4, digits))


def number(value: float, digits: int) -> str:
    """`value` rounded, with a true minus and commas between thousands."""
    text = f"{value:,.{digits}f}"
    return text.lstrip("-") if float(f"{value:.{digits}f}") == 0 else text.replace("-", "−")
