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


def lokr(path: str) -> dict[str, npt.NDArray[np.float32]]:
    # 8 is 2 times 4, 16 is 4 times 4, 24 is 4 times 6; of rank 1.
    outputs, inputs = ({8: (2, 4), 16: (4, 4), 24: (4, 6)}[width] for width in reversed(WIDTHS[path]))
    shapes = {"w1": (outputs[0], inputs[0]), "w2_a": (outputs[1], 1), "w2_b": (1, inputs[1])}
    return {f"lokr_{name}": numbers(*shape, start=len(name)) for name, shape in shapes.items()}


def oft(path: str) -> dict[str, npt.NDArray[np.float32]]:
    return {"oft_R.weight": numbers(WIDTHS[path][0] // 8, 28, start=2)}


def boft(path: str) -> dict[str, npt.NDArray[np.float32]]:
    inputs, outputs = WIDTHS[path]
    return {"boft_R": numbers(2, inputs // 4, 4, 4), "boft_s": numbers(outputs, 1, start=6)}


KINDS: dict[str, tuple[str, dict[str, Any], Any, dict[str, npt.NDArray[np.float32]]]] = {
    "dora": ("LORA", {"r": 4, "use_dora": True}, lambda path: lora(path, vector="lora_magnitude_vector"), {}),
    "lora_bias": ("LORA", {"r": 4, "lora_bias": True}, lambda path: lora(path, vector="lora_B.bias"), {}),
    "adalora": ("ADALORA", {"init_r": 4, "lora_alpha": 6, "rank_pattern": {}}, adalora, {}),
    "loha": ("LOHA", {"r": 3}, loha, {}),
    "vera": ("VERA", {"r": 5}, vera, {"vera_A": numbers(5, 24), "vera_B": numbers(16, 5, start=9)}),
    "ia3": ("IA3", {"feedforward_modules": ["down_proj"]}, ia3, {}),
    "lokr": ("LOKR", {"r": 1}, lokr, {}),
    "oft": ("OFT", {"oft_block_size": 8, "peft_version": "0.21.2"}, oft, {}),
    "oft, exact and bounded": (
        "OFT",
        {"oft_block_size": 8, "use_cayley_neumann": False, "coft": True, "eps": 0.4},
        oft,
        {},
    ),
    "boft": ("BOFT", {"boft_n_butterfly_factor": 2}, boft, {}),
    "alora": ("LORA", {"r": 4, "alora_invocation_tokens": [9, 33, 9]}, lora, {}),
}
GOLDEN = {
    "dora": "sha256:440aeee9a558ff78facb92dcc2b043de9ea757725ee100ef8f2934cc7c5c7cd3",
    "lora_bias": "sha256:9042fec23838ef8659c886c93294e5e316c412043f8aca89f8068b8d2000a39a",
    "adalora": "sha256:05bbe61ea8e8bbd80516d2ca3d782470c78cd2ea37a4cd0b489a5069ce9582e5",
    "loha": "sha256:5ce89ce14e54392ffa6be29032fa4c1b0c44ffb87eb687b391d21f7f3cb0f056",
    "vera": "sha256:009cb2b3f1b19c205e3d2c9e700a1c466497d067cfb08f3d8fcc6ad3e5bd3a8f",
    "ia3": "sha256:bc33b9003dd25780c2dc85b42323bd0ea9b060b6fef9ebd9e3784df67b053ff3",
    "lokr": "sha256:4bdbed5d8e667a097f68c5b035b2d64a0651de7eddd6f0c2b406f3c2f4ba22ed",
    "oft": "sha256:4ed7bc13bd1fea2ec9649361a13ac8630d55d61e1685f647949a299fed62caf8",
    "oft, exact and bounded": "sha256:9586d9d5e8b7876556e9406674a91c86581e9dbc052f91277fbe97ef17cac88f",
    "boft": "sha256:2a3d154e511b20308c35440bfb1af8b0747fb46214d40088a5066a961bc57b1e",
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


BESIDE: dict[str, tuple[dict[str, Any], dict[str, tuple[int, ...]]]] = {
    "ends": (
        {"r": 4, "target_modules": ["embed_tokens", "lm_head"]},
        {
            "model.embed_tokens.lora_embedding_A": (4, 64),
            "model.embed_tokens.lora_embedding_B": (16, 4),
            "model.embed_tokens.base_layer.weight": (64, 16),
            "lm_head.lora_A.weight": (4, 16),
            "lm_head.lora_B.weight": (64, 4),
        },
    ),
    "tokens": (
        {"peft_type": "TRAINABLE_TOKENS", "token_indices": [9, 63, 2]},
        {"model.embed_tokens.trainable_tokens_delta": (3, 16)},
    ),
    "saved": (
        {"r": 4, "target_modules": ["lm_head"], "modules_to_save": ["model.norm", "layers.1.mlp.up_proj"]},
        {
            "lm_head.lora_A.weight": (4, 16),
            "lm_head.lora_B.weight": (64, 4),
            "model.norm.weight": (16,),
            "model.layers.1.mlp.up_proj.weight": (24, 16),
        },
    ),
}
GOLDEN_BESIDE = {
    "ends": "sha256:9b64a7dd22f2b04c9214c7aebd971e376113b3d4ade649cd9cab2ba0ff11eee6",
    "tokens": "sha256:eead584f8f61c76e858b48c141e25c4d75f18b8b7ca5397463f054790c60243c",
    "saved": "sha256:57ae2bf039c44de93b0f02ead68e8abcc6cc2109c3e4989d2a37e7ffd76a8a6e",
}


@pytest.mark.parametrize("kind", BESIDE)
def test_what_stands_beside_a_method_has_the_same_digest_everywhere(folder: Any, kind: str) -> None:
    changes, shapes = BESIDE[kind]
    method = changes.get("peft_type", "LORA")
    folder.config = {**METHODS[method].defaults, "peft_type": method, **changes}
    for start, (name, shape) in enumerate(shapes.items()):
        folder.tensors[f"base_model.model.{name}"] = ("F32", numbers(*shape, start=start + 1))
    manifest = folder.ingest().manifest
    assert manifest.servable, manifest.unservable_reason
    assert manifest.digest == GOLDEN_BESIDE[kind]


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
