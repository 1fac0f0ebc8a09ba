"""Merges beside peft's own `add_weighted_adapter`, and merged folders loaded by peft.

Where the two agree: our `linear` is peft's `cat`, our `svd` is its `svd`, our `ties` its `ties_svd`. Where
they differ: peft's `linear` adds A to A and B to B, which is no sum of deltas (`ties` and `dare_linear`
without `_svd` likewise work on A and B alone); its `dare_linear_svd` is our `dare` with torch's generator, so
what is dropped differs.
"""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, Phi3Config

from adaptermesh.artifact.base_facts import BaseFacts
from adaptermesh.artifact.ingest import SourceBundle, ingest
from adaptermesh.artifact.merging import merge
from adaptermesh.artifact.merging_members import Member
from adaptermesh.artifact.merging_recipe import MergeMethod, recipe_of
from tests.unit.artifact.test_peft_written import SMALL

# peft 0.21 reads a property that transformers 5.23 has renamed, and warns of a missing model card.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
]

BASES: dict[str, tuple[Any, list[str], bool]] = {
    "llama": (LlamaConfig(**SMALL), ["q_proj", "v_proj", "down_proj"], False),
    "gpt2": (GPT2Config(n_embd=16, n_layer=2, n_head=4, vocab_size=64), ["c_attn", "c_proj"], True),
    "phi3": (Phi3Config(**SMALL), ["qkv_proj", "gate_up_proj", "o_proj"], False),
}
WEIGHTS = (0.7, -1.3)


class Pair:
    """Two adapters on one model of peft, and as members of a merge."""

    def __init__(self, root: Path, kind: str, ranks: tuple[int, int] = (3, 5)) -> None:
        config, modules, transposed = BASES[kind]
        torch.manual_seed(0)
        self.root = root
        self.model: Any = AutoModelForCausalLM.from_config(config)
        self.plain = copy.deepcopy(self.model)
        architectures = [type(self.model).__name__]
        self.base = BaseFacts.from_config(
            "tiny", {**config.to_dict(), "architectures": architectures}, "sha256:" + "0" * 64
        )
        self.tuned: Any = None
        for name, rank in zip(("one", "two"), ranks, strict=True):
            lora = peft.LoraConfig(
                r=rank,
                lora_alpha=6,
                target_modules=modules,
                fan_in_fan_out=transposed,
                task_type="CAUSAL_LM",
            )
            if self.tuned is None:
                self.tuned = peft.get_peft_model(self.model, lora, adapter_name=name)
            else:
                self.tuned.add_adapter(name, lora)
        for name, parameter in self.tuned.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, std=0.5)
        self.tuned.save_pretrained(str(root))
        self.members = [self._member(name) for name in ("one", "two")]

    def _member(self, name: str) -> Member:
        files = {path.name: path for path in (self.root / name).iterdir()}
        out = self.root / f"{name}.canonical"
        manifest = ingest(SourceBundle(files, "acme", name), self.base, out).manifest
        return Member(f"acme/{name}:v1", manifest.digest, manifest, out)

    def merged(self, method: str, **numbers: Any) -> Any:
        """Our merge, loaded by peft."""
        members = zip((member.digest for member in self.members), WEIGHTS, strict=True)
        folder = self.root / "merged"
        merge(self.members, recipe_of(MergeMethod(method), members, **numbers), self.base, folder)
        return peft.PeftModel.from_pretrained(copy.deepcopy(self.plain), str(folder))

    def theirs(self, combination_type: str, **options: Any) -> dict[str, Any]:
        self.tuned.add_weighted_adapter(
            ["one", "two"], list(WEIGHTS), "theirs", combination_type=combination_type, **options
        )
        return weight_changes(self.tuned, "theirs")

    def sums(self) -> dict[str, Any]:
        one, two = (weight_changes(self.tuned, name) for name in ("one", "two"))
        return {path: WEIGHTS[0] * one[path] + WEIGHTS[1] * two[path] for path in one}


def weight_changes(tuned: Any, name: str) -> dict[str, Any]:
    return {
        path: module.get_delta_weight(name).detach().numpy()
        for path, module in tuned.base_model.model.named_modules()
        if hasattr(module, "get_delta_weight")
    }


def check_equal(found: dict[str, Any], expected: dict[str, Any], tolerance: float = 2e-5) -> None:
    assert found.keys() == expected.keys()
    for path, change in expected.items():
        np.testing.assert_allclose(found[path], change, atol=tolerance, err_msg=path)


@pytest.mark.parametrize("kind", BASES)
def test_linear_is_the_cat_of_peft_and_peft_loads_it(tmp_path: Path, kind: str) -> None:
    pair = Pair(tmp_path, kind)
    loaded = pair.merged("linear")
    found = weight_changes(loaded, "default")
    check_equal(found, pair.theirs("cat"))
    check_equal(found, pair.sums())
    # The outputs too, not only the changes of the weights.
    pair.tuned.set_adapter("theirs")
    tokens = torch.tensor([[3, 5, 7, 11]])
    with torch.no_grad():
        ours, theirs = loaded.eval()(tokens).logits, pair.tuned.eval()(tokens).logits
    np.testing.assert_allclose(ours.numpy(), theirs.numpy(), atol=1e-4)


@pytest.mark.parametrize("kind", BASES)
def test_svd_is_that_of_peft(tmp_path: Path, kind: str) -> None:
    pair = Pair(tmp_path, kind)
    check_equal(weight_changes(pair.merged("svd", rank=4), "default"), pair.theirs("svd", svd_rank=4))


@pytest.mark.parametrize("kind", BASES)
@pytest.mark.parametrize(("density", "rank"), [(0.4, 4), (0.2, 8)])
def test_ties_is_the_ties_svd_of_peft(tmp_path: Path, kind: str, density: float, rank: int) -> None:
    pair = Pair(tmp_path, kind)
    found = weight_changes(pair.merged("ties", rank=rank, density=density), "default")
    check_equal(found, pair.theirs("ties_svd", svd_rank=rank, density=density), 1e-4)


def test_the_linear_of_peft_is_no_sum_of_deltas_and_ours_is(tmp_path: Path) -> None:
    pair = Pair(tmp_path, "llama", ranks=(4, 4))
    sums = pair.sums()
    check_equal(weight_changes(pair.merged("linear"), "default"), sums)
    theirs = pair.theirs("linear")
    assert all(np.abs(theirs[path] - change).max() > 0.1 for path, change in sums.items())
