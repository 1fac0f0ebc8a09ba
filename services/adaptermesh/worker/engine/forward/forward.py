"""What a way through the base model offers, and which one a model takes."""

import logging
from typing import Protocol, runtime_checkable

import torch

from adaptermesh.core.errors import MeshError, invalid_field
from adaptermesh.worker.engine.base import Base
from adaptermesh.worker.engine.batch import StepBatch
from adaptermesh.worker.engine.config import EngineConfig
from adaptermesh.worker.engine.forward.int8 import check_int8
from adaptermesh.worker.engine.forward.linear import LinearKind
from adaptermesh.worker.engine.forward.llama import LlamaForward, is_lean
from adaptermesh.worker.engine.forward.native import NativeForward
from adaptermesh.worker.engine.forward.passage import Passage
from adaptermesh.worker.engine.forward.plain import PlainForward
from adaptermesh.worker.engine.forward.rotation import check_rotation
from adaptermesh.worker.engine.forward.weights import BaseWeights
from adaptermesh.worker.engine.kv import KvCache
from adaptermesh.worker.engine.native.build import NoKernels
from adaptermesh.worker.engine.native.library import Kernels, load_kernels

log = logging.getLogger(__name__)


class Forward(Protocol):
    """Runs a packed batch through the base model and the adapters.

    `weights`: the base's, for adapters that depend on them; None where they are not kept as they were.
    `heads_apart`: it keeps the cache as `KvCache.write_apart` does.
    """

    heads_apart: bool

    @property
    def weights(self) -> BaseWeights | None: ...

    def run(self, batch: StepBatch, cache: KvCache) -> torch.Tensor:
        """Fills the cache and gives the logits of the batch's outputs: [outputs, vocabulary] float32."""
        ...


@runtime_checkable
class ResumableForward(Forward, Protocol):
    """One that can stop between layers."""

    def start(self, batch: StepBatch, cache: KvCache) -> Passage:
        """Begins to run a batch, before its first layer. Its tokens' places in the cache are its own."""
        ...


def find_kernels(base: Base, config: EngineConfig) -> Kernels | None:
    """The native kernels if this base is computed with them or beside them; None where torch computes it all.

    Raises:
        MeshError: INVALID_ARGUMENT (INVALID_FIELD) if the config asks for kernels that can't be had.
    """
    if config.forward == "lean" or base.device.type != "cpu" or base.dtype != torch.float32:
        return None
    try:
        return load_kernels(config.kernel_dir)
    except NoKernels as error:
        if config.forward == "native":
            raise _unusable(error) from error
        log.warning("no native kernels: the CPU path is slower", extra={"reason": str(error)})
        return None


def make_forward(base: Base, config: EngineConfig, kernels: Kernels | None) -> Forward:
    """The fastest way that machine, architecture and config allow, or the one that the config names.

    Raises:
        MeshError: INVALID_ARGUMENT (INVALID_FIELD) if the way that the config names is not open to this base;
            FAILED_PRECONDITION (ADAPTER_UNSUPPORTED) for a base that would be computed wrong.
    """
    check_rotation(base, config.max_context_tokens)
    lean = config.forward in ("auto", "lean") and is_lean(base)
    if config.quantization == "int8":
        check_int8(base, lean=lean)
        return LlamaForward(base, LinearKind(pack=config.pack_weights, int8=True))
    if config.forward in ("auto", "native"):
        try:
            return NativeForward(base, kernels, config.block_tokens)
        except NoKernels as error:
            if config.forward == "native":
                raise _unusable(error) from error
            log.info("the base is computed by torch", extra={"reason": str(error)})
    if lean:
        return LlamaForward(base, LinearKind(pack=config.pack_weights))
    if config.forward == "lean":
        raise invalid_field("forward", f"this {base.facts.architecture} has no lean forward")
    return PlainForward(base)


def _unusable(error: NoKernels) -> MeshError:
    return invalid_field("forward", f"the native kernels can't be used: {error}")
