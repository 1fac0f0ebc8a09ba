"""What the artifact checks need to know about a base model, and its identity."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from adaptermesh.core.digests import digest_json, is_digest
from adaptermesh.core.errors import Code, MeshError, Reason, invalid_field

# Config keys that say where a model came from or how it is run, not what it computes.
_VOLATILE = frozenset(
    {
        "_name_or_path",
        "_commit_hash",
        "_attn_implementation",
        "_attn_implementation_autoset",
        "_experts_implementation",
        "attn_implementation",
        "transformers_version",
        "torch_dtype",
        "dtype",
        "use_cache",
        "output_attentions",
        "output_hidden_states",
        "return_dict",
        "torchscript",
        "chunk_size_feed_forward",
        "id2label",
        "label2id",
        "problem_type",
    }
)

# The transformers spellings of each fact; the second one is GPT-2's.
_HIDDEN = ("hidden_size", "n_embd")
_LAYERS = ("num_hidden_layers", "n_layer")
_VOCAB = ("vocab_size",)


@dataclass(frozen=True, slots=True)
class BaseFacts:
    """A base model as the mesh knows it.

    `digest` is the identity: over `config_digest` and `weights_digest`. `config` is the transformers config
    as it was read, volatile keys included.
    """

    model_id: str
    digest: str
    config_digest: str
    weights_digest: str
    architecture: str
    hidden_size: int
    num_layers: int
    vocab_size: int
    config: Mapping[str, Any]

    @classmethod
    def from_config(cls, model_id: str, config: Mapping[str, Any], weights_digest: str) -> "BaseFacts":
        """Derives the facts and both digests from a transformers config.

        Raises:
            MeshError: INVALID_ARGUMENT (INVALID_FIELD) if the config lacks a fact or a digest is misspelt.
        """
        if not is_digest(weights_digest):
            raise invalid_field("weights_digest", f"{weights_digest[:80]!r} is not a sha256 digest")
        kept = {key: value for key, value in config.items() if key not in _VOLATILE}
        try:
            config_digest = digest_json(kept)
        except (TypeError, ValueError) as error:
            raise invalid_field("config", f"has no canonical JSON form: {error}") from None
        return cls(
            model_id=model_id,
            digest=digest_json({"config": config_digest, "weights": weights_digest}),
            config_digest=config_digest,
            weights_digest=weights_digest,
            architecture=_architecture(config),
            hidden_size=_positive(config, _HIDDEN),
            num_layers=_positive(config, _LAYERS),
            vocab_size=_positive(config, _VOCAB),
            config=dict(config),
        )

    @property
    def title(self) -> str:
        """How a message names it."""
        return f"base model '{self.model_id}' ({self.architecture})"

    def to_json(self) -> dict[str, Any]:
        """The JSON object that is kept as `base_model.json` in the model cache."""
        return {
            "model_id": self.model_id,
            "digest": self.digest,
            "config_digest": self.config_digest,
            "weights_digest": self.weights_digest,
            "architecture": self.architecture,
            "hidden_size": self.hidden_size,
            "num_layers": self.num_layers,
            "vocab_size": self.vocab_size,
            "config": dict(self.config),
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "BaseFacts":
        """Reads what `to_json` gave and derives it again, so that no fact can disagree with the config.

        Raises:
            MeshError: INVALID_ARGUMENT for a missing part; FAILED_PRECONDITION (DIGEST_MISMATCH) for a part
                that does not follow from the config.
        """
        model_id, config, weights = (value.get(key) for key in ("model_id", "config", "weights_digest"))
        if not isinstance(model_id, str) or not isinstance(config, dict) or not isinstance(weights, str):
            raise invalid_field("base_model", "needs model_id, config and weights_digest")
        facts = cls.from_config(model_id, config, weights)
        for key, derived in facts.to_json().items():
            if key != "config" and value.get(key) != derived:
                raise MeshError(
                    Code.FAILED_PRECONDITION,
                    Reason.DIGEST_MISMATCH,
                    f"base model '{model_id}': {key} is {value.get(key)!r}, the config gives {derived!r}",
                    metadata={"field": key, "name": model_id},
                )
        return facts


def _architecture(config: Mapping[str, Any]) -> str:
    names = config.get("architectures")
    if not isinstance(names, list) or len(names) != 1 or not isinstance(names[0], str) or not names[0]:
        raise invalid_field("config.architectures", f"{names!r} does not name exactly one transformers class")
    return names[0]


def _positive(config: Mapping[str, Any], keys: tuple[str, ...]) -> int:
    for key in keys:
        if key in config:
            value = config[key]
            if type(value) is int and 0 < value < 2**31:
                return value
            raise invalid_field(f"config.{key}", f"{value!r} is not a positive integer")
    raise invalid_field(f"config.{keys[0]}", "is missing")
