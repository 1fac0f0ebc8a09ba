"""What a scenario found."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from tests.bench.figures import Figure, Spread


@dataclass(frozen=True, slots=True)
class Lane:
    """One thing measured in each round."""

    name: str
    unit: str
    values: tuple[float, ...]

    @property
    def spread(self) -> Spread:
        return Spread.of(self.values)


@dataclass(frozen=True, slots=True)
class Check:
    """Answers compared token by token. `first_differences` are positions in the answers that differ."""

    ours: str
    theirs: str
    compared: int
    first_differences: tuple[int, ...]

    @property
    def different(self) -> int:
        return len(self.first_differences)


@dataclass(frozen=True, slots=True)
class Result:
    """All of one scenario. `left_out` names the peers without which it ran."""

    figures: tuple[Figure, ...]
    lanes: tuple[Lane, ...]
    checks: tuple[Check, ...] = ()
    versions: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()


def compare(ours: str, theirs: str, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> Check:
    """pairs: (our tokens, their tokens) of the same request; the shorter one of the two is compared."""
    differences = []
    for mine, other in pairs:
        length = min(len(mine), len(other))
        first = next((at for at in range(length) if mine[at] != other[at]), None)
        if first is not None or length == 0:
            differences.append(first or 0)
    return Check(ours, theirs, len(pairs), tuple(differences))
