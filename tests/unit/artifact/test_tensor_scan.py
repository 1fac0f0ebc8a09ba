import io
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adaptermesh.artifact.manifest import TensorEntry
from adaptermesh.artifact.tensor_scan import TensorScan, read_blocks, scan_tensor

TORCH = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn,
}


def scan(dtype: str, data: bytes, width: int) -> TensorScan:
    return scan_tensor(
        io.BytesIO(b"head" + data), TensorEntry("t", dtype, (len(data) // width,), 4, len(data))
    )


@pytest.mark.parametrize("dtype", TORCH)
@given(data=st.data())
def test_any_bits_are_judged_as_torch_judges_them(dtype: str, data: st.DataObject) -> None:
    width = torch.empty(0, dtype=TORCH[dtype]).element_size()
    raw = data.draw(st.binary(min_size=width * 4, max_size=width * 4))
    values = torch.frombuffer(bytearray(raw), dtype=TORCH[dtype]).to(torch.float64)
    bad = [i for i, value in enumerate(values.tolist()) if not math.isfinite(value)]
    assert scan(dtype, raw, width).not_finite_at == (bad[0] if bad else None)


@pytest.mark.parametrize("dtype", TORCH)
def test_zeros_of_both_signs_are_zero(dtype: str) -> None:
    values = torch.tensor([0.0, -0.0]).to(TORCH[dtype])
    width = values.element_size()
    raw = values.view(torch.uint8).numpy().tobytes()
    assert scan(dtype, raw, width) == TensorScan(None, all_zero=True)
    assert not scan(dtype, raw + b"\x01" + b"\0" * (width - 1), width).all_zero


def test_integers_are_finite_and_may_be_zero() -> None:
    assert scan("U8", b"\xff" * 10, 1) == TensorScan(None, all_zero=False)
    assert scan("I32", b"\0" * 8, 4) == TensorScan(None, all_zero=True)


def test_the_place_is_right_past_the_first_block() -> None:
    values = np.ones(600_000, dtype="<f4")
    values[500_001] = np.nan
    assert scan("F32", values.tobytes(), 4).not_finite_at == 500_001


def test_a_file_that_ends_early_is_noticed() -> None:
    file: Any = io.BytesIO(b"abc")
    with pytest.raises(EOFError):
        list(read_blocks(file, 1, 3))
