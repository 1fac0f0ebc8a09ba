"""Figures: a ratio or a time with its target, from the values that each round gave."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Spread:
    """Median and quartiles."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high)


@dataclass(frozen=True, slots=True)
class Figure:
    """One line of the table. `target` None: nothing is promised, the figure is shown only."""

    name: str
    spread: Spread
    target: float | None = None
    at_most: bool = False
    """Whether less is better."""
    unit: str = "ratio"
    aim: bool = False
    """The target is a wish, not a promise."""

    @property
    def reached(self) -> bool | None:
        if self.target is None:
            return None
        return self.spread.median <= self.target if self.at_most else self.spread.median >= self.target


def ratio(
    name: str,
    over: Sequence[float],
    under: Sequence[float],
    target: float | None = None,
    *,
    at_most: bool = False,
    aim: bool = False,
) -> Figure:
    """over / under, taken in each round, so that what slows a whole round down cancels out."""
    values = [a / b for a, b in zip(over, under, strict=True)]
    return Figure(name, Spread.of(values), target, at_most=at_most, aim=aim)


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest value that at least `percent` of all do not exceed."""
    ordered = sorted(values)
    rank = max(1, -(-len(ordered) * percent // 100))
    return ordered[int(rank) - 1]
