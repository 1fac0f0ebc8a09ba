"""What differs between two versions."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class FieldDifference:
    """A field of the manifests, by its dotted path, with both values; None where one has no such field."""

    field: str
    a: Any
    b: Any


@dataclass(frozen=True, slots=True)
class ModuleDifference:
    """A module that only one has, so that the other's facts are None, or whose facts differ."""

    module: str
    a: Mapping[str, Any] | None
    b: Mapping[str, Any] | None


@dataclass(frozen=True, slots=True)
class MetricDifference:
    """A metric of the cards; None where one does not name it, or names no number."""

    task: str
    dataset: str
    split: str
    metric: str
    a: float | None
    b: float | None


@dataclass(frozen=True, slots=True)
class TensorChange:
    """How far a module's tensors are apart: ||b - a|| / ||a|| over all of them, in the Frobenius norm.

    `relative` is None where a is zero and b is not: then there is nothing to relate it to.
    """

    module: str
    relative: float | None
