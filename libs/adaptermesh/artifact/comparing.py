"""Two versions side by side: what their manifests say otherwise, and how far their tensors are apart."""

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from adaptermesh.artifact.canonical import open_buffer, tensor_view, to_float32
from adaptermesh.artifact.differences import (
    FieldDifference,
    MetricDifference,
    ModuleDifference,
    TensorChange,
)
from adaptermesh.artifact.manifest import Manifest, ModuleOp, TensorEntry

# Of one tensor at a time, so that memory does not grow with the adapter.
_BLOCK_VALUES = 2**18
# Compared apart, or the same by nature of two versions being two.
_NO_FIELDS = frozenset({"modules", "tensors", "chunks", "metrics"})

ModuleKey = tuple[int, str, int, str, int]
"""Layer, site, expert (-1 for none), op and place in a group."""


def compare_fields(a: Manifest, b: Manifest) -> tuple[FieldDifference, ...]:
    """The fields that differ, in the order of their paths; of the source's files the paths that do."""
    one, other = _fields(a), _fields(b)
    return tuple(
        FieldDifference(path, one.get(path), other.get(path))
        for path in sorted(one.keys() | other.keys())
        if one.get(path) != other.get(path)
    )


def compare_modules(a: Manifest, b: Manifest) -> tuple[ModuleDifference, ...]:
    """The modules that differ, in the order of layers and sites."""
    one, other = _module_facts(a), _module_facts(b)
    return tuple(
        ModuleDifference(module_name(key), one.get(key), other.get(key))
        for key in sorted(one.keys() | other.keys())
        if one.get(key) != other.get(key)
    )


def compare_metrics(a: Manifest, b: Manifest) -> tuple[MetricDifference, ...]:
    """Every metric that one of them names, side by side."""
    one, other = _metrics(a), _metrics(b)
    return tuple(
        MetricDifference(*key, one.get(key), other.get(key)) for key in sorted(one.keys() | other.keys())
    )


def compare_tensors(a: Manifest, b: Manifest, a_file: Path, b_file: Path) -> tuple[TensorChange, ...]:
    """Of every module of which both have all tensors in equal shapes, how far they are apart.

    Reads both canonical tensor files once, block by block; call it from a thread.
    """
    shared = list(_shared_modules(a, b))
    if not shared:
        return ()
    changes = []
    with open_buffer(a_file) as a_data, open_buffer(b_file) as b_data:
        for key, pairs in shared:
            before = apart = 0.0
            for one, other in pairs:
                squares = _squares(one, other, a_data, b_data)
                before, apart = before + squares[0], apart + squares[1]
            changes.append(TensorChange(module_name(key), _relative(before, apart)))
    return tuple(changes)


def module_name(key: ModuleKey) -> str:
    """A module in words, e.g. "layer 3 q lowrank"."""
    layer, site, expert, op, member = key
    of_expert = "" if expert < 0 else f" expert {expert}"
    return f"layer {layer} {site}{of_expert} {op}" + (f" {member}" if member else "")


def _relative(before: float, apart: float) -> float | None:
    if before == 0:
        return None if apart else 0.0
    return math.sqrt(apart / before)


def _squares(
    one: TensorEntry, other: TensorEntry, a_data: memoryview, b_data: memoryview
) -> tuple[float, float]:
    """The sums of squares of a tensor and of its distance from the other."""
    before = apart = 0.0
    a_flat, b_flat = tensor_view(one, a_data).reshape(-1), tensor_view(other, b_data).reshape(-1)
    for start in range(0, a_flat.size, _BLOCK_VALUES):
        stop = start + _BLOCK_VALUES
        a_values = to_float32(one, a_flat[start:stop]).astype(np.float64)
        b_values = to_float32(other, b_flat[start:stop]).astype(np.float64)
        before += float(np.dot(a_values, a_values))
        difference = b_values - a_values
        apart += float(np.dot(difference, difference))
    return before, apart


def _shared_modules(
    a: Manifest, b: Manifest
) -> Iterator[tuple[ModuleKey, list[tuple[TensorEntry, TensorEntry]]]]:
    a_tensors = {entry.name: entry for entry in a.tensors}
    b_tensors = {entry.name: entry for entry in b.tensors}
    others = {_key(module): module for module in b.modules}
    for module in sorted(a.modules, key=_key):
        other = others.get(_key(module))
        if other is None or not module.tensors or module.tensors.keys() != other.tensors.keys():
            continue
        pairs = [(a_tensors[name], b_tensors[other.tensors[slot]]) for slot, name in module.tensors.items()]
        if all(one.shape == two.shape for one, two in pairs):
            yield _key(module), pairs


def _key(module: ModuleOp) -> ModuleKey:
    return module.layer, module.site, -1 if module.expert is None else module.expert, module.op, module.member


def _module_facts(manifest: Manifest) -> dict[ModuleKey, Mapping[str, Any]]:
    tensors = {entry.name: entry for entry in manifest.tensors}
    return {
        _key(module): {
            "rank": module.rank,
            "scale": module.scale,
            "dtype": module.dtype,
            "shapes": {slot: list(tensors[name].shape) for slot, name in sorted(module.tensors.items())},
            "options": dict(module.options or {}),
            "tokens": len(module.tokens),
        }
        for module in manifest.modules
    }


def _metrics(manifest: Manifest) -> dict[tuple[str, str, str, str], float | None]:
    """The last one where a card names one twice."""
    return {
        (
            str(metric.get("task", "")),
            str(metric.get("dataset", "")),
            str(metric.get("split", "")),
            str(metric.get("metric", "")),
        ): metric.get("value")
        for metric in manifest.metrics
    }


def _fields(manifest: Manifest) -> dict[str, Any]:
    document = json.loads(manifest.to_bytes())
    files = document["source"].pop("files")
    document["source"]["files"] = {file["path"]: file["sha256"] for file in files}
    return dict(_flat({name: value for name, value in document.items() if name not in _NO_FIELDS}, ""))


def _flat(document: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    """Every leaf by its path; lists are leaves."""
    for name, value in document.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
