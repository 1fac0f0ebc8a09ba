"""The GPU benchmark's harness, at a tiny scale on the CPU. Its figures mean nothing."""

import json
from pathlib import Path

import pytest
import torch

from tests.bench.gpu.__main__ import main


def test_the_harness_runs_and_writes_its_page(tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ["--tiny", "--device", "cpu", "--rounds", "1"]
    assert main([*arguments, "--cache", str(tmp_path / "cache"), "--out", str(out)]) == 0
    report = json.loads((out / "gpu.json").read_text())
    assert list(report["scenarios"]) == ["decode", "first_token", "peft"]
    lanes = {lane["name"] for entry in report["scenarios"].values() for lane in entry["lanes"]}
    assert {"base", "mixed", "adapter on the device", "peft adapter_names"} <= lanes
    assert "Card: card none" in (out / "gpu.md").read_text()


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a card")
def test_without_a_card_nothing_is_written(tmp_path: Path) -> None:
    assert main(["--out", str(tmp_path)]) == 2
    assert list(tmp_path.iterdir()) == []
