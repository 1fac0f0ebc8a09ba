from typing import Any

import numpy as np
import pytest

from adaptermesh.artifact.canonical import (
    open_buffer,
    tensor_view,
    tensors,
    to_float32,
    verify_chunk,
    verify_file,
)
from adaptermesh.core.errors import MeshError, Reason


@pytest.mark.parametrize(("dtype", "view"), [("F32", "<f4"), ("F16", "<f2"), ("BF16", "<u2")])
def test_views_are_read_only_and_need_no_copy(folder: Any, dtype: str, view: str) -> None:
    manifest = folder.fill(dtype).ingest().manifest
    data = folder.out_file.read_bytes()
    found = dict(tensors(manifest, data))
    assert [entry.name for entry in found] == [entry.name for entry in manifest.tensors]
    for entry, array in found.items():
        assert array.dtype == np.dtype(view)
        assert array.shape == entry.shape
        assert not array.flags.writeable
        assert np.shares_memory(array, np.frombuffer(data, np.uint8))


def test_bfloat16_becomes_float32_exactly(folder: Any) -> None:
    manifest = folder.fill("BF16").ingest().manifest
    entry = manifest.tensors[0]
    with open_buffer(folder.out_file) as buffer:
        values = to_float32(entry, tensor_view(entry, buffer))
    np.testing.assert_array_equal(values, folder.source("model.layers.0.self_attn.q_proj", "A"))


def test_a_changed_byte_anywhere_is_found(folder: Any) -> None:
    manifest = folder.fill().ingest().manifest
    data = bytearray(folder.out_file.read_bytes())
    verify_file(manifest, data)
    for chunk in manifest.chunks:
        data[chunk.offset + chunk.size // 2] ^= 1
        with pytest.raises(MeshError) as caught:
            verify_file(manifest, data)
        assert caught.value.reason is Reason.DATA_CORRUPT
        assert caught.value.metadata["offset"] == str(chunk.offset)
        data[chunk.offset + chunk.size // 2] ^= 1


def test_a_missing_byte_is_found(folder: Any) -> None:
    manifest = folder.fill().ingest().manifest
    data = folder.out_file.read_bytes()
    with pytest.raises(MeshError, match="the manifest says"):
        verify_file(manifest, data[:-1])
    chunk = manifest.chunks[0]
    with pytest.raises(MeshError, match="expected"):
        verify_chunk(chunk, data[: chunk.size - 1])
