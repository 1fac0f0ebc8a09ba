"""Tests that need a card: torch for CUDA, triton, transformers, peft, pydantic; no gRPC, no OpenTelemetry.

Run them with `make test-gpu`. The engine and its references are those of the unit tests.
"""

from pathlib import Path

import pytest
import torch

from tests.unit.worker.engine.conftest import lab, make_bench, prompts

__all__ = ["lab", "make_bench", "prompts"]

_HERE = Path(__file__).parent


def pytest_configure(config: pytest.Config) -> None:
    # `make test-gpu` runs without the project's settings: their plug-ins may not be there.
    config.addinivalue_line("markers", "gpu: needs a CUDA card")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if _HERE not in item.path.parents:
            continue
        item.add_marker(pytest.mark.gpu)
        # Triton 3.9 announces another default at the first compilation.
        item.add_marker(pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION"))
        if not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA card"))
