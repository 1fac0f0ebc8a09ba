"""Adapters that their manifest finds in order and the base does not."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from adaptermesh.artifact.sites import site_map
from adaptermesh.core.errors import MeshError, Reason
from adaptermesh.worker.engine.admission import check_adapter
from adaptermesh.worker.engine.base import make_base
from tests.parity.adapters.goldens import ingest_folder, load_goldens
from tests.parity.engine.test_families import make_config
from tests.unit.artifact.boft_blocks import stand_in
from tests.unit.artifact.test_peft_beside import made
from tests.unit.artifact.test_peft_written import SMALL, ingested, write

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
]


@pytest.fixture(autouse=True, scope="module")
def butterflies() -> Iterator[None]:
    with stand_in():
        yield


@pytest.mark.parametrize(
    ("method", "slot", "shape", "good"),
    [
        (peft.LoKrConfig, "w1", (4, 4), True),
        (peft.LoKrConfig, "w1", (3, 4), False),
        (peft.LoKrConfig, "w2", (4, 5), False),
        (peft.LoKrConfig, "w2", (2, 4), False),
        (peft.OFTConfig, "R", (1, 1, 16, 16), True),
        (peft.OFTConfig, "R", (1, 1, 4, 4), True),
        (peft.OFTConfig, "R", (1, 3, 4, 4), False),
        (peft.OFTConfig, "R", (1, 1, 5, 5), False),
        (peft.BOFTConfig, "R", (2, 4, 4, 4), True),
        (peft.BOFTConfig, "R", (1, 2, 8, 8), True),
        (peft.BOFTConfig, "R", (1, 4, 8, 8), False),
        (peft.BOFTConfig, "row_scale", (15,), False),
    ],
)
def test_what_has_a_structure_fits_the_sites_widths(
    tmp_path: Path, method: Any, slot: str, shape: tuple[int, ...], good: bool
) -> None:
    facts, _ = write(LlamaConfig(**SMALL), method(target_modules=["q_proj"]), tmp_path / "a")
    manifest = ingested(tmp_path / "a", facts).manifest
    base = cast("Any", SimpleNamespace(facts=facts, sites=site_map(facts)))
    check_adapter("d", manifest, base)
    changed = tuple(
        replace(entry, shape=shape) if entry.name == f"L0.q.{slot}" else entry for entry in manifest.tensors
    )
    other = replace(manifest, tensors=changed)
    if good:
        check_adapter("d", other, base)
        return
    with pytest.raises(MeshError, match="of q in layer 0 is not") as caught:
        check_adapter("d", other, base)
    assert caught.value.reason is Reason.DATA_CORRUPT


@pytest.mark.parametrize("method", ["double_seq_bn", "fuse_static", "loreft", "prefix_tuning", "lora"])
@pytest.mark.parametrize("size", ["hidden_size", "num_layers", "vocab_size"])
def test_the_sizes_that_a_manifest_is_checked_by_are_those_of_the_base(
    tmp_path: Path, method: str, size: str
) -> None:
    goldens = load_goldens("llama")
    manifest = ingest_folder(goldens.folder(method), goldens.facts, tmp_path / "out")
    base = cast(
        "Any", SimpleNamespace(facts=goldens.facts, sites=site_map(goldens.facts), kv_heads=2, head_dim=8)
    )
    check_adapter("d", manifest, base)
    lie = replace(manifest.base, **{size: getattr(manifest.base, size) + 1})
    with pytest.raises(MeshError, match="it says that its base has the sizes") as caught:
        check_adapter("d", replace(manifest, base=lie), base)
    assert caught.value.reason is Reason.DATA_CORRUPT


def test_copies_of_the_bases_weights_are_compared_with_the_base(tmp_path: Path) -> None:
    folder, facts = made("both ends", tmp_path)
    manifest = ingested(folder, facts).manifest
    config = make_config(tmp_path)
    torch.manual_seed(0)
    base = make_base(facts, AutoModelForCausalLM.from_config(LlamaConfig(**SMALL)), None, config)
    assert base.edge_digest("embed") != base.edge_digest("lm_head")
    check_adapter("d", manifest, base)
    with torch.no_grad():
        # Another base, by one value.
        base.model.lm_head.weight[63, 15] += 1.0
    other = make_base(facts, base.model, None, config)
    with pytest.raises(MeshError, match="a weight of lm_head that is not the base's") as caught:
        check_adapter("d", manifest, other)
    assert caught.value.reason is Reason.ADAPTER_UNSUPPORTED


@pytest.mark.parametrize("case", ["saved norms", "head", "tokens"])
def test_a_base_without_the_sites_refuses_what_acts_there(tmp_path: Path, case: str) -> None:
    folder, facts = made(case, tmp_path)
    manifest = replace(ingested(folder, facts).manifest, same_as_base={})
    sites = site_map(facts)
    check_adapter("d", manifest, cast("Any", SimpleNamespace(facts=facts, sites=sites)))
    bare = cast("Any", SimpleNamespace(facts=facts, sites=replace(sites, edges={}, norms={})))
    with pytest.raises(MeshError, match="the base has no site") as caught:
        check_adapter("d", manifest, bare)
    assert caught.value.reason is Reason.DATA_CORRUPT


def test_a_fusion_is_not_taken_alone(tmp_path: Path) -> None:
    goldens = load_goldens("llama")
    manifest = ingest_folder(goldens.folder("fusion"), goldens.facts, tmp_path / "out")
    base = cast("Any", SimpleNamespace(facts=goldens.facts, sites=site_map(goldens.facts)))
    with pytest.raises(MeshError, match=r"can't be served: a fusion is served with") as caught:
        check_adapter("d", manifest, base)
    assert caught.value.reason is Reason.ADAPTER_UNSUPPORTED
    lie = replace(manifest, servable=True, unservable_reason="")
    with pytest.raises(MeshError, match="this worker has no op fusion"):
        check_adapter("d", lie, base)
