"""The folder that a merge leaves: a plain LoRA as peft's `save_pretrained` writes it."""

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adaptermesh.artifact.merging_arithmetic import Floats
from adaptermesh.artifact.merging_recipe import MergeRecipe
from adaptermesh.artifact.peft_models import PREFIX
from adaptermesh.artifact.safetensors_file import TensorSpec, lay_out, write_file
from adaptermesh.artifact.source_files import CARD_FILE, CONFIG_FILE, WEIGHTS_FILE

_FLOAT_BYTES = 4


@dataclass(frozen=True, slots=True)
class MergedModule:
    """A module of the result, before its numbers are there: path, rank, inputs and outputs."""

    path: str
    rank: int
    in_features: int
    out_features: int


def write_weights(
    folder: Path, modules: Sequence[MergedModule], factors: Iterable[tuple[Floats, Floats]]
) -> None:
    """Writes A and B of each module, float32, in the order of `modules`; takes one module at a time."""
    specs: list[TensorSpec] = []
    for module in modules:
        name = f"{PREFIX}{module.path}.lora"
        specs.append(TensorSpec(f"{name}_A.weight", "F32", (module.rank, module.in_features)))
        specs.append(TensorSpec(f"{name}_B.weight", "F32", (module.out_features, module.rank)))
    # Without padding, which peft would take for tensors of the adapter.
    layout = lay_out(specs, {"format": "pt"}, alignment=_FLOAT_BYTES)
    contents = ((values.astype("<f4").tobytes(),) for pair in factors for values in pair)
    write_file(folder / WEIGHTS_FILE, layout, contents)


def write_config(
    folder: Path, modules: Sequence[MergedModule], base_digest: str, *, fan_in_fan_out: bool
) -> None:
    """Writes the config: exact paths, and alpha equal to the rank, so that every scale is exactly 1."""
    rank = Counter(module.rank for module in modules).most_common(1)[0][0]
    others = {module.path: module.rank for module in modules if module.rank != rank}
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_digest,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": others,
        "alpha_pattern": others,
        "target_modules": [module.path for module in modules],
        "fan_in_fan_out": fan_in_fan_out,
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
    }
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def write_card(folder: Path, recipe: MergeRecipe, names: Mapping[str, str]) -> None:
    """Writes the card; `names` gives each member's `namespace/name` by its digest."""
    numbers = {"rank": recipe.rank, "density": recipe.density, "seed": recipe.seed}
    given = "".join(f", {name} {value:g}" for name, value in numbers.items() if value is not None)
    rows = "".join(
        f"| {names[member.digest]} | {member.weight:g} | `{member.digest}` |\n" for member in recipe.members
    )
    text = (
        "---\nlibrary_name: peft\ntags:\n- merge\n---\n\n# A merged adapter\n\n"
        f"Merged by `adaptermesh adapters merge` with the method {recipe.method}{given}.\n\n"
        f"| member | weight | digest |\n|---|---|---|\n{rows}"
    )
    (folder / CARD_FILE).write_text(text, encoding="utf-8")
