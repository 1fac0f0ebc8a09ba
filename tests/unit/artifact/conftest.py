import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from adaptermesh.artifact.base_facts import BaseFacts
from adaptermesh.artifact.ingest import IngestResult, SourceBundle, ingest
from adaptermesh.artifact.peft_methods import LORA_DEFAULTS
from adaptermesh.artifact.safetensors_file import TensorSpec, lay_out, write_file
from adaptermesh.artifact.sites import site_map

WEIGHTS_DIGEST = "sha256:" + "5" * 64

LLAMA: Mapping[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
}


def encode(array: npt.NDArray[Any], dtype: str) -> bytes:
    if dtype == "BF16":
        return (array.astype("<f4").view("<u4") >> 16).astype("<u2").tobytes()
    return array.astype({"F32": "<f4", "F16": "<f2", "F64": "<f8"}[dtype]).tobytes()


class PeftFolder:
    """An adapter as peft would save it, made with numpy; change what it holds, then ingest."""

    def __init__(self, root: Path, base: BaseFacts) -> None:
        self.root = root
        self.base = base
        self.config: dict[str, Any] = {
            **LORA_DEFAULTS,
            "r": 4,
            "lora_alpha": 8,
            "target_modules": ["q_proj", "v_proj"],
            "task_type": "CAUSAL_LM",
            "peft_version": "0.21.2",
        }
        self.tensors: dict[str, tuple[str, npt.NDArray[Any]]] = {}
        self.files: dict[str, bytes] = {"README.md": b"# An adapter\n\nIt is small.\n"}
        self.bundle: dict[str, Any] = {"namespace": "acme", "name": "ner", "license": "Apache-2.0"}

    def fill(self, dtype: str = "F32", seed: int = 0) -> "PeftFolder":
        """Gives every targeted module random tensors; keys of `rank_pattern` are taken as suffixes."""
        random = np.random.default_rng(seed)
        sites = site_map(self.base)
        names = self.config["target_modules"]
        for path in sites.module_paths():
            if not any(path.endswith(f".{name}") for name in names):
                continue
            found = sites.parts(path)
            assert found is not None
            width_in, width_out = found[0][0].in_features, sum(site.out_features for site in found[0])
            rank = next(
                (r for key, r in self.config["rank_pattern"].items() if f".{path}".endswith(f".{key}")),
                self.config["r"],
            )
            self.put(path, "A", random.standard_normal((rank, width_in)), dtype)
            self.put(path, "B", random.standard_normal((width_out, rank)), dtype)
        return self

    def put(self, module: str, slot: str, array: npt.NDArray[Any], dtype: str = "F32") -> None:
        self.tensors[f"base_model.model.{module}.lora_{slot}.weight"] = (dtype, array)

    def source(self, module: str, slot: str) -> npt.NDArray[np.float32]:
        dtype, array = self.tensors[f"base_model.model.{module}.lora_{slot}.weight"]
        data = encode(array, dtype)
        if dtype == "BF16":
            bits = np.frombuffer(data, "<u2").astype(np.uint32) << np.uint32(16)
            return bits.view(np.float32).reshape(array.shape)
        values = np.frombuffer(data, {"F32": "<f4", "F16": "<f2"}[dtype])
        return values.astype(np.float32).reshape(array.shape)

    def write(self) -> dict[str, Path]:
        self.root.mkdir(exist_ok=True)
        weights = self.root / "adapter_model.safetensors"
        specs = [TensorSpec(name, dtype, array.shape) for name, (dtype, array) in self.tensors.items()]
        # Unpadded, as the safetensors library writes it.
        contents = [[encode(array, dtype)] for dtype, array in self.tensors.values()]
        write_plain(weights, specs, contents)
        (self.root / "adapter_config.json").write_text(json.dumps(self.config))
        for name, data in self.files.items():
            (self.root / name).write_bytes(data)
        names = ["adapter_model.safetensors", "adapter_config.json", *self.files]
        return {name: self.root / name for name in names}

    def ingest(self) -> IngestResult:
        return ingest(SourceBundle(files=self.write(), **self.bundle), self.base, self.out_file)

    @property
    def out_file(self) -> Path:
        return self.root.with_suffix(".canonical")


def write_plain(path: Path, specs: list[TensorSpec], contents: list[list[bytes]]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for spec in specs:
        header[spec.name] = {
            "dtype": spec.dtype,
            "shape": list(spec.shape),
            "data_offsets": [at, at + spec.size],
        }
        at += spec.size
    text = json.dumps(header).encode()
    data = b"".join(piece for pieces in contents for piece in pieces)
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


@pytest.fixture
def make_base() -> Callable[..., BaseFacts]:
    def make(**changes: Any) -> BaseFacts:
        config = {**LLAMA, **changes}
        return BaseFacts.from_config(
            "tiny", {k: v for k, v in config.items() if v is not ...}, WEIGHTS_DIGEST
        )

    return make


@pytest.fixture
def base(make_base: Callable[..., BaseFacts]) -> BaseFacts:
    return make_base()


@pytest.fixture
def folder(tmp_path: Path, base: BaseFacts) -> PeftFolder:
    return PeftFolder(tmp_path / "adapter", base)


@pytest.fixture
def make_folder(tmp_path: Path) -> Callable[[BaseFacts], PeftFolder]:
    return lambda base: PeftFolder(tmp_path / "adapter", base)


@pytest.fixture
def make_file(tmp_path: Path) -> Callable[[list[TensorSpec]], Path]:
    """Writes a canonical file of zeros."""

    def make(specs: list[TensorSpec]) -> Path:
        path = tmp_path / "file.safetensors"
        write_file(path, lay_out(specs, {"format": "test"}), ([b"\0" * spec.size] for spec in specs))
        return path

    return make
