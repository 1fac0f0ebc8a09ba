from pathlib import Path
from typing import Any

import numpy as np
import pytest

from adaptermesh.artifact import comparing
from adaptermesh.artifact.comparing import compare_tensors, module_name
from adaptermesh.artifact.manifest import Manifest
from adaptermesh.artifact.manifest_parts import ModuleOp
from adaptermesh.artifact.safetensors_file import TensorSpec, lay_out, write_file


def made(folder: Path, name: str, **arrays: np.ndarray[Any, Any]) -> tuple[Manifest, Path]:
    """A tensor file of one module, and as much of a manifest as comparing looks at."""
    layout = lay_out([TensorSpec(slot, "F32", array.shape) for slot, array in arrays.items()], {})
    place = folder / name
    write_file(place, layout, ([array.astype("<f4").tobytes()] for array in arrays.values()))
    module = ModuleOp("q", 0, "lowrank", 1, 1.0, {slot: slot for slot in arrays})
    manifest = object.__new__(Manifest)
    for field, value in (("tensors", layout.entries), ("modules", (module,))):
        object.__setattr__(manifest, field, value)
    return manifest, place


def compared(folder: Path, a: dict[str, Any], b: dict[str, Any]) -> list[float | None]:
    (one, a_place), (other, b_place) = made(folder, "a", **a), made(folder, "b", **b)
    return [change.relative for change in compare_tensors(one, other, a_place, b_place)]


def test_blocks_of_any_size_give_the_same_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(0)
    a, b = random.standard_normal((2, 7, 13)).astype(np.float32)
    whole = np.linalg.norm(b.astype(float) - a) / np.linalg.norm(a.astype(float))
    for values in (1, 5, 91, 1000):
        monkeypatch.setattr(comparing, "_BLOCK_VALUES", values)
        assert compared(tmp_path, {"A": a}, {"A": b}) == [pytest.approx(whole)]


def test_a_change_from_zero_has_no_measure(tmp_path: Path) -> None:
    zero, one = np.zeros((2, 2)), np.ones((2, 2))
    assert compared(tmp_path, {"A": zero}, {"A": one}) == [None]
    assert compared(tmp_path, {"A": zero}, {"A": zero}) == [0.0]
    assert compared(tmp_path, {"A": one}, {"A": zero}) == [1.0]


def test_other_shapes_or_slots_are_not_compared(tmp_path: Path) -> None:
    assert compared(tmp_path, {"A": np.ones((2, 2))}, {"A": np.ones((4, 1))}) == []
    assert compared(tmp_path, {"A": np.ones((2, 2))}, {"A": np.ones((2, 2)), "B": np.ones((2, 2))}) == []


def test_a_module_is_named_by_layer_site_expert_op_and_place() -> None:
    assert module_name((3, "q", -1, "lowrank", 0)) == "layer 3 q lowrank"
    assert module_name((0, "down", 2, "bottleneck", 1)) == "layer 0 down expert 2 bottleneck 1"
