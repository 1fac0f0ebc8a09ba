import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.numpy import load

from adaptermesh.artifact.problems import Rejection
from adaptermesh.artifact.safetensors_file import (
    MAX_HEADER_BYTES,
    Header,
    TensorSpec,
    lay_out,
    read_header,
    write_file,
)
from adaptermesh.core.errors import MeshError, Reason

QUICK = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def file_bytes(header: Any, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def tensor(begin: int, end: int, shape: list[int], dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


VALID = file_bytes(
    {"__metadata__": {"a": "b"}, "y": tensor(8, 16, [2]), "x": tensor(0, 8, [2, 1])}, b"\0" * 16
)


@pytest.fixture
def read(tmp_path: Path) -> Callable[[bytes], Header]:
    def read(data: bytes) -> Header:
        path = tmp_path / "f.safetensors"
        path.write_bytes(data)
        return read_header(path)

    return read


def test_a_valid_header_gives_the_tensors_in_the_order_of_the_file(read: Any) -> None:
    header = read(VALID)
    assert list(header.tensors) == ["x", "y"]
    assert header.tensors["y"].offset == header.data_start + 8
    assert header.tensors["x"].shape == (2, 1)
    assert header.metadata == {"a": "b"}
    assert header.file_size == len(VALID)


def test_a_scalar_and_a_header_padded_with_spaces_are_legal(read: Any) -> None:
    text = json.dumps({"x": tensor(0, 4, [])}).encode() + b"   "
    assert read(file_bytes(text, b"\0" * 4)).tensors["x"].shape == ()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "needs at least 8"),
        (b"\0" * 7, "needs at least 8"),
        (b"\0" * 8, "claims 0 bytes"),
        ((2**63).to_bytes(8, "little"), "claims"),
        ((MAX_HEADER_BYTES + 1).to_bytes(8, "little"), "claims"),
        ((100).to_bytes(8, "little") + b"{}", "truncated"),
        (file_bytes(b" {}"), "does not begin"),
        (file_bytes(b"[]"), "does not begin"),
        (file_bytes(b"{}}"), "no valid JSON"),
        (file_bytes(b'{"a":\xff}'), "no valid JSON"),
        (file_bytes(b'{"a":NaN}'), "NaN is not JSON"),
        (file_bytes(b'{"a":' * 100_000), "nests deeper"),
        (file_bytes(b'{"a":[[[[1]]]]}'), "nests deeper"),
        (file_bytes(b'{"x":{},"x":{}}'), "is there twice"),
        (
            file_bytes(b'{"x":{"dtype":"F32","dtype":"F16","shape":[],"data_offsets":[0,4]}}'),
            "is there twice",
        ),
        (file_bytes(b'{"\\ud800":{}}'), "surrogate"),
        (file_bytes({"__metadata__": {"a": 1}}), "map of strings"),
        (file_bytes({"__metadata__": []}), "map of strings"),
        (file_bytes({"x": []}), "needs exactly"),
        (file_bytes({"x": {"dtype": "F32", "shape": []}}), "needs exactly"),
        (file_bytes({"x": {**tensor(0, 4, [1]), "more": 1}}, b"\0" * 4), "needs exactly"),
        (file_bytes({"": tensor(0, 4, [1])}, b"\0" * 4), "printable name"),
        (file_bytes({"a\nb": tensor(0, 4, [1])}, b"\0" * 4), "printable name"),
        (file_bytes({"x" * 513: tensor(0, 4, [1])}, b"\0" * 4), "printable name"),
        (file_bytes({"x": tensor(0, 4, [1], "F33")}, b"\0" * 4), "unknown dtype"),
        (file_bytes({"x": {**tensor(0, 4, [1]), "dtype": ["F32"]}}, b"\0" * 4), "unknown dtype"),
        (file_bytes({"x": tensor(0, 0, [0, 4])}), "zero-length"),
        (file_bytes({"x": tensor(0, 4, [-1])}, b"\0" * 4), "no valid shape"),
        (file_bytes({"x": {**tensor(0, 4, [1]), "shape": [True]}}, b"\0" * 4), "no valid shape"),
        (file_bytes({"x": {**tensor(0, 4, [1]), "shape": [1.0]}}, b"\0" * 4), "no valid shape"),
        (file_bytes({"x": tensor(0, 4, [1] * 9)}, b"\0" * 4), "no valid shape"),
        (
            file_bytes({"x": {**tensor(0, 4, [1]), "data_offsets": [0, 4, 8]}}, b"\0" * 4),
            "no valid data_offsets",
        ),
        (file_bytes({"x": tensor(-4, 0, [1])}, b"\0" * 4), "no valid data_offsets"),
        (file_bytes({"x": tensor(0, 2**60, [1])}, b"\0" * 4), "no valid data_offsets"),
        (file_bytes({"x": tensor(0, 8, [1])}, b"\0" * 8), "has 8 bytes, F32 of shape [1] needs 4"),
        (file_bytes({"x": tensor(8, 4, [1])}, b"\0" * 8), "has -4 bytes"),
        (file_bytes({"x": tensor(0, 4, [1]), "y": tensor(0, 4, [1])}, b"\0" * 4), "overlaps"),
        (file_bytes({"x": tensor(0, 8, [2]), "y": tensor(4, 12, [2])}, b"\0" * 12), "overlaps"),
        (file_bytes({"x": tensor(0, 4, [1]), "y": tensor(8, 12, [1])}, b"\0" * 12), "leaves a hole"),
        (file_bytes({"x": tensor(4, 8, [1])}, b"\0" * 8), "leaves a hole"),
        (VALID[:-1], "truncated"),
        (VALID + b"\0", "no tensor owns"),
        (file_bytes({}, b"\0"), "no tensor owns"),
    ],
)
def test_a_header_that_is_wrong_is_rejected_with_the_reason(read: Any, data: bytes, message: str) -> None:
    with pytest.raises(Rejection) as caught:
        read(data)
    assert caught.value.reason is Reason.ADAPTER_REJECTED
    assert message in caught.value.message


def test_a_message_about_a_hostile_name_stays_short(read: Any) -> None:
    with pytest.raises(Rejection) as caught:
        read(file_bytes({"\n" * 100_000: tensor(0, 4, [1])}, b"\0" * 4))
    assert len(caught.value.message) < 700
    assert "\n\n" not in caught.value.message


@QUICK
@given(data=st.binary(max_size=300))
def test_arbitrary_bytes_never_crash_the_reader(read: Any, data: bytes) -> None:
    with pytest.raises(MeshError):
        read(data)


@QUICK
@given(position=st.integers(0, len(VALID) - 17), value=st.integers(0, 255))
def test_what_is_accepted_after_a_changed_byte_is_accepted_by_the_safetensors_library(
    read: Any, position: int, value: int
) -> None:
    changed = bytearray(VALID)
    changed[position] = value
    try:
        header = read(bytes(changed))
    except MeshError:
        return
    arrays = load(bytes(changed))
    assert {name: array.shape for name, array in arrays.items()} == {
        name: entry.shape for name, entry in header.tensors.items()
    }
    assert sum(entry.size for entry in header.tensors.values()) == 16


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
ENTRY = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "F16", "U8", "I64"]) | JSON,
        "shape": st.lists(st.integers(-1, 4), max_size=3) | JSON,
        "data_offsets": st.lists(st.integers(-1, 32), min_size=2, max_size=2) | JSON,
    }
)


@QUICK
@given(header=st.dictionaries(st.text(max_size=4), ENTRY | JSON, max_size=3), size=st.integers(0, 64))
def test_arbitrary_json_headers_never_crash_the_reader_nor_fool_it(read: Any, header: Any, size: int) -> None:
    data = file_bytes(header, b"\0" * size)
    try:
        accepted = read(data)
    except MeshError:
        return
    try:
        load(data)
    except (SafetensorError, KeyError, TypeError):
        pytest.fail(f"accepted what the safetensors library refuses: {accepted}")


@QUICK
@given(
    shapes=st.lists(
        st.tuples(
            st.sampled_from(["F32", "F16", "BF16", "U8"]),
            st.lists(st.integers(1, 9), min_size=1, max_size=2).map(tuple),
        ),
        max_size=6,
    )
)
def test_what_is_written_is_aligned_legal_and_reads_back(tmp_path: Path, shapes: Any) -> None:
    specs = [TensorSpec(f"t{i}", dtype, shape) for i, (dtype, shape) in enumerate(shapes)]
    layout = lay_out(specs, {"format": "test"})
    path = tmp_path / "w.safetensors"
    contents = [bytes([i + 1]) * spec.size for i, spec in enumerate(specs)]
    write_file(path, layout, ([content[:5], content[5:]] for content in contents))
    data = path.read_bytes()
    assert len(data) == layout.file_size
    assert len(layout.head) % 64 == 0
    header = read_header(path)
    assert header.metadata == {"format": "test"}
    for entry, content in zip(layout.entries, contents, strict=True):
        assert entry.offset % 64 == 0
        assert header.tensors[entry.name] == entry
        assert data[entry.offset : entry.offset + entry.size] == content


def test_two_tensors_of_one_name_can_not_be_laid_out() -> None:
    with pytest.raises(ValueError, match="taken"):
        lay_out([TensorSpec("x", "F32", (1,)), TensorSpec("x", "F32", (1,))], {})
    with pytest.raises(ValueError, match="taken"):
        lay_out([TensorSpec("pad.0", "F32", (1,))], {})


@pytest.mark.parametrize("size", [3, 5])
def test_contents_of_another_size_can_not_be_written(tmp_path: Path, size: int) -> None:
    with pytest.raises(ValueError, match="needs 4"):
        write_file(tmp_path / "f", lay_out([TensorSpec("x", "F32", (1,))], {}), [[b"\0" * size]])


@pytest.mark.parametrize("part", [b"[],", b"{},", b"1,", b'{"":0},'])
def test_a_header_of_many_small_parts_is_refused_before_they_are_built(read: Any, part: bytes) -> None:
    text = b'{"a":[' + part * ((MAX_HEADER_BYTES - 20) // len(part)) + b"0]}"
    tracemalloc.start()
    with pytest.raises(Rejection, match="more than 524288 parts"):
        read(file_bytes(text))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    # As read, and once more in the file that the test writes.
    assert peak < 3 * MAX_HEADER_BYTES


def test_a_header_may_have_as_many_tensors_as_its_bytes_have_room_for(read: Any) -> None:
    count = 60_000
    header = {
        f"base_model.model.layers.{n % 99}.mlp.experts.{n}.down_proj.lora_A.weight": tensor(
            4 * n, 4 * n + 4, [1, 1]
        )
        for n in range(count)
    }
    text = json.dumps(header, separators=(",", ":")).encode()
    assert 0.9 * MAX_HEADER_BYTES < len(text) <= MAX_HEADER_BYTES
    assert len(read(file_bytes(text, b"\0" * 4 * count)).tensors) == count
