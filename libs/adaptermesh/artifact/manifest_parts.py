"""The parts of a manifest, and what bounds them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import Field

from adaptermesh.artifact.base_facts import BaseFacts
from adaptermesh.core.errors import Code, MeshError, Reason

SCHEMA = "adaptermesh.manifest.v1"
MAX_MANIFEST_BYTES = 3 * 2**20
"""A manifest travels in one message; this leaves room below gRPC's usual 4 MiB."""
MAX_CHUNK_BYTES = 2**20
"""No chunk is larger."""
TENSOR_ALIGNMENT = 64
"""Tensors begin at multiples of this in the file."""
HEADER_LAYER = -1
"""The layer of chunks that belong to none: the safetensors header and tensors outside of the layers."""
TENSOR_DTYPES: Mapping[str, int] = {"F32": 4, "F16": 2, "BF16": 2}
"""The dtypes of canonical tensors and their size in bytes."""


@dataclass(frozen=True, slots=True)
class BaseRef:
    """The base model an adapter was trained on; `revision` is the hub's, where the publisher gave one."""

    model_id: str
    digest: str
    config_digest: str
    weights_digest: str
    architecture: str
    hidden_size: int
    num_layers: int
    vocab_size: int
    revision: str | None = None

    @classmethod
    def from_facts(cls, facts: BaseFacts) -> "BaseRef":
        return cls(
            model_id=facts.model_id,
            digest=facts.digest,
            config_digest=facts.config_digest,
            weights_digest=facts.weights_digest,
            architecture=facts.architecture,
            hidden_size=facts.hidden_size,
            num_layers=facts.num_layers,
            vocab_size=facts.vocab_size,
        )


@dataclass(frozen=True, slots=True)
class SourceFile:
    """One uploaded file."""

    path: str
    size_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Source:
    """What was uploaded: its format, the libraries that wrote it, its config as it stood, its files."""

    format: str
    library_versions: Mapping[str, str]
    config: Mapping[str, Any]
    files: tuple[SourceFile, ...]


@dataclass(frozen=True, slots=True)
class ModuleOp:
    """One op at one site of one layer. `tensors` gives the tensor's name for each slot of the op.

    For `lowrank`: slots `A` (rank, in) and `B` (out, rank); `scale` is kept apart from B. `options` are the
    op's choices by name, `tokens` are ids of the base's vocabulary; both are absent from the JSON where the
    op has none. `member` is the place of the op among its like at one site, which only a group has; 0 is
    absent too.
    """

    site: str
    layer: int
    op: str
    rank: int
    scale: float
    tensors: Mapping[str, str]
    dtype: str = "F32"
    expert: int | None = None
    options: Annotated[Mapping[str, str] | None, Field(exclude_if=lambda value: not value)] = None
    tokens: Annotated[tuple[int, ...], Field(exclude_if=lambda value: not value)] = ()
    member: Annotated[int, Field(exclude_if=lambda value: value == 0)] = 0


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where a tensor is; `offset` counts from the start of the tensor file, `size` is in bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    size: int


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of the tensor file that is verified by itself; it holds bytes of one layer only."""

    offset: int
    size: int
    sha256: str
    layer: int


@dataclass(frozen=True, slots=True)
class Cost:
    """What residency takes: bytes of the tensors on the device, and the largest rank (0 without ranks)."""

    device_bytes: int
    max_rank: int


MAX_VIRTUAL_TOKENS = 4096
"""That an adapter may put in front of every prompt."""
MAX_INVOCATION_TOKENS = 256
"""Of an activated LoRA."""
MAX_TOKEN_ROWS = 65536
"""Tokens whose rows an adapter may have of its own."""


@dataclass(frozen=True, slots=True)
class Activation:
    """Where an adapter acts: from the last `invocation_tokens` of the prompt on, these included.

    Without them in the prompt it does not act at all. Source: activated LoRA (arXiv:2504.12397).
    """

    invocation_tokens: tuple[int, ...]


def corrupt(message: str) -> MeshError:
    """A manifest that can't be relied on."""
    return MeshError(Code.DATA_LOSS, Reason.DATA_CORRUPT, f"manifest: {message}")
