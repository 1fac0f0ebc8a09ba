"""The digest of a version is the same on every machine: each kind of adapter, from fixed numbers."""

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from adaptermesh.artifact.peft_methods import METHODS

Q, V, DOWN = "self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj"
WIDTHS = {Q: (16, 16), V: (16, 8), DOWN: (24, 16)}


def numbers(*shape: int, start: int = 1) -> npt.NDArray[np.float32]:
    """Thirds and sevenths, so that products have to be rounded."""
    count = int(np.prod(shape))
    values = np.arange(start, start + count, dtype=np.float32)
    return ((values % 11 - 5) / np.float32(3) + (values % 5) / np.float32(7)).reshape(shape)


def lora(path: str, *, vector: str = "") -> dict[str, npt.NDArray[np.float32]]:
    inputs, outputs = WIDTHS[path]
    found = {"lora_A.weight": numbers(4, inputs), "lora_B.weight": numbers(outputs, 4, start=3)}
    return {**found, vector: numbers(outputs, start=5)} if vector else found


def adalora(path: str) -> dict[str, npt.NDArray[np.float32]]:
    inputs, outputs = WIDTHS[path]
    return {"lora_A": numbers(4, inputs), "lora_B": numbers(outputs, 4), "lora_E": numbers(4, 1, start=2)}


def loha(path: str) -> dict[str, npt.NDArray[np.float32]]:
    inputs, outputs = WIDTHS[path]
    shapes = {"w1_a": (outputs, 3), "w1_b": (3, inputs), "w2_a": (outputs, 3), "w2_b": (3, inputs)}
    return {f"hada_{name}": numbers(*shape, start=len(name)) for name, shape in shapes.items()}


def vera(path: str) -> dict[str, npt.NDArray[np.float32]]:
    return {"vera_lambda_b": numbers(WIDTHS[path][1]), "vera_lambda_d": numbers(5, start=4)}


def ia3(path: str) -> dict[str, npt.NDArray[np.float32]]:
    inputs, outputs = WIDTHS[path]
    return {"ia3_l": numbers(1, inputs) if path == DOWN else numbers(outputs, 1)}


KINDS: dict[str, tuple[str, dict[str, Any], Any, dict[str, npt.NDArray[np.float32]]]] = {
    "dora": ("LORA", {"r": 4, "use_dora": True}, lambda path: lora(path, vector="lora_magnitude_vector"), {}),
    "lora_bias": ("LORA", {"r": 4, "lora_bias": True}, lambda path: lora(path, vector="lora_B.bias"), {}),
    "adalora": ("ADALORA", {"init_r": 4, "lora_alpha": 6, "rank_pattern": {}}, adalora, {}),
    "loha": ("LOHA", {"r": 3}, loha, {}),
    "vera": ("VERA", {"r": 5}, vera, {"vera_A": numbers(5, 24), "vera_B": numbers(16, 5, start=9)}),
    "ia3": ("IA3", {"feedforward_modules": ["down_proj"]}, ia3, {}),
    "alora": ("LORA", {"r": 4, "alora_invocation_tokens": [9, 33, 9]}, lora, {}),
}
GOLDEN = {
    "dora": "sha256:440aeee9a558ff78facb92dcc2b043de9ea757725ee100ef8f2934cc7c5c7cd3",
    "lora_bias": "sha256:9042fec23838ef8659c886c93294e5e316c412043f8aca89f8068b8d2000a39a",
    "adalora": "sha256:05bbe61ea8e8bbd80516d2ca3d782470c78cd2ea37a4cd0b489a5069ce9582e5",
    "loha": "sha256:5ce89ce14e54392ffa6be29032fa4c1b0c44ffb87eb687b391d21f7f3cb0f056",
    "vera": "sha256:009cb2b3f1b19c205e3d2c9e700a1c466497d067cfb08f3d8fcc6ad3e5bd3a8f",
    "ia3": "sha256:bc33b9003dd25780c2dc85b42323bd0ea9b060b6fef9ebd9e3784df67b053ff3",
    "alora": "sha256:83e077b4bc4606192c1767bead78d136be0bc20a1439715212041b951af92c2d",
}


VIRTUAL: dict[str, tuple[str, dict[str, Any], tuple[int, int], str]] = {
    "prompt": (
        "PROMPT_TUNING",
        {"token_dim": 16},
        (5, 16),
        "sha256:e95d1319fe34900a3c958e5d6848c94dc364f348fafaa3fa2db32e33acb43b8e",
    ),
    "p-tuning": (
        "P_TUNING",
        {"encoder_hidden_size": 9},
        (5, 16),
        "sha256:0b50b0b3343a2a6bc647bbceac579ba0128a631b3315a52f5228e44bd1ab3c22",
    ),
    "prefix": (
        "PREFIX_TUNING",
        {"num_layers": 3, "num_attention_heads": 2},
        (5, 48),
        "sha256:0072b0463f76bdceb3d41b636939ffe1bdfa4ea274680f88a4e0cfffc95ee3ab",
    ),
}


@pytest.mark.parametrize("kind", VIRTUAL)
def test_virtual_tokens_have_the_same_digest_everywhere(folder: Any, kind: str) -> None:
    method, changes, shape, digest = VIRTUAL[kind]
    folder.config = {**METHODS[method].defaults, "num_virtual_tokens": 5, **changes}
    folder.tensors["prompt_embeddings"] = ("F32", numbers(*shape))
    manifest = folder.ingest().manifest
    assert manifest.servable, manifest.unservable_reason
    assert manifest.digest == digest


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_has_the_same_digest_everywhere(folder: Any, kind: str) -> None:
    method, changes, tensors, shared = KINDS[kind]
    names = ["q_proj", "v_proj", "down_proj"]
    folder.config = {**METHODS[method].defaults, "target_modules": names, "peft_type": method, **changes}
    for name, values in shared.items():
        folder.tensors[f"base_model.{name}"] = ("F32", values)
    for layer in range(3):
        for path in WIDTHS:
            for name, values in tensors(path).items():
                folder.tensors[f"base_model.model.model.layers.{layer}.{path}.{name}"] = ("F32", values)
    manifest = folder.ingest().manifest
    assert manifest.servable, manifest.unservable_reason
    assert manifest.digest == GOLDEN[kind]
