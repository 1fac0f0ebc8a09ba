from pathlib import Path

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from safetensors.torch import save_file

from adaptermesh.artifact.base_copies import digest_copies, rounded_digest
from adaptermesh.artifact.safetensors_file import read_header
from adaptermesh.core.digests import digest_bytes


@settings(deadline=None)
@given(
    arrays(np.float32, (7, 3), elements=st.floats(width=32, allow_nan=False, allow_infinity=False)),
    st.integers(1, 6),
)
def test_the_digest_is_of_what_torch_rounds_to_bfloat16(values: np.ndarray, cut: int) -> None:
    rounded = torch.from_numpy(values).to(torch.bfloat16).view(torch.int16).numpy()
    expected = digest_bytes(rounded.astype("<i2").tobytes())
    assert rounded_digest([values]) == expected
    assert rounded_digest([values[:cut], values[cut:]]) == expected


def test_a_copy_has_one_digest_whatever_it_was_saved_in(tmp_path: Path) -> None:
    base = torch.randn(9000, 3).to(torch.bfloat16)
    found = set()
    for dtype in (torch.bfloat16, torch.float32):
        file = tmp_path / f"{dtype}.safetensors"
        save_file({"other": torch.ones(3), "weight": base.to(dtype)}, file)
        entry = read_header(file).tensors["weight"]
        found |= set(digest_copies({"embed": ("x", entry)}, {"x": file}).values())
    assert found == {rounded_digest([base.float().numpy()])}
    assert found != {rounded_digest([(1.01 * base.float()).numpy()])}
