"""Figures over seeds: the mean, the spread, and the paired comparison of two methods that ran with the same seeds.

A seed that was run twice counts once, with the mean of its runs. The spread is the sample standard deviation over seeds. A
paired test takes the differences at the seeds that both have: Student's t from three pairs on, and Wilcoxon's exact signed
ranks from six on (with five pairs its two-sided p cannot fall below 1/16). Below that the differences are given and no p.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import mean, stdev

from velora.report.records import Record
from velora.report.text import human_number

MIN_T, MIN_WILCOXON = 3, 6
Figure = Callable[[Record], float | None]


def score(key: str) -> Figure:
    return lambda record: record.scores.get(key)


def measured(section: str, key: str) -> Figure:
    """A figure of `memory`, `speed` or `parameters`."""
    return lambda record: record[section].get(key)


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation (None with one seed) over `num_seeds` seeds."""

    mean: float
    deviation: float | None
    num_seeds: int

    def __str__(self) -> str:
        if self.deviation is None:
            return human_number(self.mean)
        return f"{human_number(self.mean)} ± {self.deviation:.2g}, n={self.num_seeds}"


@dataclass(frozen=True)
class Paired:
    """B less A at the seeds of both; p-values are two-sided, None where there are too few pairs or no difference varies."""

    num_pairs: int
    difference: float
    deviation: float | None
    t_p: float | None
    wilcoxon_p: float | None

    def __str__(self) -> str:
        text = f"{self.difference:+.4g}"
        if self.deviation is not None:
            text += f" ± {self.deviation:.2g}"
        if self.t_p is None:
            return f"{text}, n={self.num_pairs} ({self._why_none()})"
        wilcoxon = f", Wilcoxon p={self.wilcoxon_p:.2g}" if self.wilcoxon_p is not None else ""
        return f"{text}, n={self.num_pairs}: paired t p={self.t_p:.2g}{wilcoxon}"

    def _why_none(self) -> str:
        return "too few for a test" if self.num_pairs < MIN_T else "all differences are the same: no test"


def by_seed(records: Iterable[Record], figure: Figure) -> dict[int, float]:
    """The figure at each seed that has one."""
    found: dict[int, list[float]] = {}
    for record in records:
        if (value := figure(record)) is not None:
            found.setdefault(record["seed"], []).append(float(value))
    return {seed: mean(values) for seed, values in found.items()}


def spread(records: Iterable[Record], figure: Figure) -> Spread | None:
    """None where no run has the figure."""
    values = list(by_seed(records, figure).values())
    if not values:
        return None
    return Spread(mean(values), stdev(values) if len(values) > 1 else None, len(values))


def paired(a: Iterable[Record], b: Iterable[Record], figure: Figure) -> Paired | None:
    """The comparison of two methods; None where no seed has both."""
    at_a, at_b = by_seed(a, figure), by_seed(b, figure)
    return paired_values([(at_a[seed], at_b[seed]) for seed in sorted(at_a.keys() & at_b.keys())])


def paired_values(pairs: Sequence[tuple[float, float]]) -> Paired | None:
    differences = [y - x for x, y in pairs]
    if not differences:
        return None
    deviation = stdev(differences) if len(differences) > 1 else None
    testable = deviation is not None and deviation > 1e-12 * max(abs(d) for d in differences)  # rounding is no spread
    t_p = _t(differences) if testable and len(differences) >= MIN_T else None
    wilcoxon_p = _wilcoxon(differences) if t_p is not None and len(differences) >= MIN_WILCOXON else None
    return Paired(len(differences), mean(differences), deviation, t_p, wilcoxon_p)


def _t(differences: list[float]) -> float | None:
    from scipy.stats import ttest_1samp

    p = float(ttest_1samp(differences, 0.0).pvalue)
    return p if math.isfinite(p) else None


def _wilcoxon(differences: list[float]) -> float | None:
    from scipy.stats import wilcoxon

    nonzero = [d for d in differences if d != 0]
    sizes = {abs(d) for d in nonzero}
    if len(nonzero) < MIN_WILCOXON or len(sizes) < len(nonzero):  # with ties the exact distribution is another
        return None
    return float(wilcoxon(nonzero, method="exact").pvalue)
