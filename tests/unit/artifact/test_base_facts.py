from collections.abc import Callable
from typing import Any

import pytest

from adaptermesh.artifact.base_facts import BaseFacts
from adaptermesh.core.errors import MeshError, Reason


def test_facts_survive_json(base: BaseFacts) -> None:
    assert BaseFacts.from_json(base.to_json()) == base


def test_volatile_keys_do_not_change_the_identity(
    make_base: Callable[..., BaseFacts], base: BaseFacts
) -> None:
    other = make_base(
        _name_or_path="/elsewhere", transformers_version="9", torch_dtype="float16", use_cache=False
    )
    assert other.digest == base.digest
    assert other.config != base.config


def test_arithmetic_and_weights_change_the_identity(
    make_base: Callable[..., BaseFacts], base: BaseFacts
) -> None:
    assert make_base(rms_norm_eps=1e-3).digest != base.digest
    weights = BaseFacts.from_config("tiny", base.config, "sha256:" + "6" * 64)
    assert weights.config_digest == base.config_digest
    assert weights.digest != base.digest


def test_the_name_is_not_part_of_the_identity(base: BaseFacts) -> None:
    assert BaseFacts.from_config("other", base.config, base.weights_digest).digest == base.digest


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"architectures": None}, "config.architectures"),
        ({"architectures": ["A", "B"]}, "config.architectures"),
        ({"hidden_size": ...}, "config.hidden_size"),
        ({"num_hidden_layers": 0}, "config.num_hidden_layers"),
        ({"vocab_size": True}, "config.vocab_size"),
        ({"rope_theta": float("nan")}, "config"),
        ({"rope_theta": object()}, "config"),
    ],
)
def test_a_config_without_the_facts_is_refused(make_base: Any, changes: Any, field: str) -> None:
    with pytest.raises(MeshError) as caught:
        make_base(**changes)
    assert caught.value.reason is Reason.INVALID_FIELD
    assert caught.value.metadata["field"] == field


def test_a_misspelt_weights_digest_is_refused(base: BaseFacts) -> None:
    with pytest.raises(MeshError, match="weights_digest"):
        BaseFacts.from_config("tiny", base.config, "5" * 64)


@pytest.mark.parametrize("key", ["digest", "config_digest", "hidden_size", "num_layers", "architecture"])
def test_a_fact_that_disagrees_with_the_config_is_refused(base: BaseFacts, key: str) -> None:
    with pytest.raises(MeshError) as caught:
        BaseFacts.from_json({**base.to_json(), key: "other"})
    assert caught.value.reason is Reason.DIGEST_MISMATCH
    assert caught.value.metadata["field"] == key


@pytest.mark.parametrize("key", ["model_id", "config", "weights_digest"])
def test_json_without_a_part_is_refused(base: BaseFacts, key: str) -> None:
    value = base.to_json()
    del value[key]
    with pytest.raises(MeshError, match="base_model"):
        BaseFacts.from_json(value)
