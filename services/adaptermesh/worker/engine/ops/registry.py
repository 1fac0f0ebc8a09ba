"""The ops that the engine knows. A new op is its own module and one line here."""

from collections.abc import Mapping

import torch

from adaptermesh.artifact.sites import SiteMap
from adaptermesh.worker.engine.forward.weights import BaseWeights
from adaptermesh.worker.engine.native.library import Kernels
from adaptermesh.worker.engine.ops.affine import Affine
from adaptermesh.worker.engine.ops.affine_plain import PlainAffine
from adaptermesh.worker.engine.ops.around import Around
from adaptermesh.worker.engine.ops.bottleneck import Bottleneck
from adaptermesh.worker.engine.ops.bottleneck_group import BottleneckGroup
from adaptermesh.worker.engine.ops.bottleneck_native import NativeBottleneck
from adaptermesh.worker.engine.ops.coupling import Coupling
from adaptermesh.worker.engine.ops.lowrank import LowRank
from adaptermesh.worker.engine.ops.lowrank_native import NativeLowRank
from adaptermesh.worker.engine.ops.lowrank_plain import PlainLowRank
from adaptermesh.worker.engine.ops.op import AROUND, Op
from adaptermesh.worker.engine.ops.reft import Reft
from adaptermesh.worker.engine.ops.replaced import Replaced
from adaptermesh.worker.engine.ops.structured import Structured
from adaptermesh.worker.engine.ops.structured_plain import PlainStructured
from adaptermesh.worker.engine.ops.virtual import PrefixRows, PromptRows

OP_KINDS = frozenset(
    {"lowrank", "affine", "bottleneck", "bottleneck_group", "reft", "structured", "replace", AROUND}
    | {"coupling", "prompt", "kv_prefix"}
)
"""The kinds that an adapter may consist of to be served here, by `kind_of`."""


def fast_ops(
    sites: SiteMap,
    dtype: torch.dtype,
    device: torch.device,
    kernels: Kernels | None,
    weights: BaseWeights | None = None,
) -> Mapping[str, Op]:
    """The ops that serve, by the kind's name in a manifest, in the order in which they act on an output.

    `kernels`: of a CPU that computes float32. `weights`: the base's, for adapters that depend on them.
    """
    lowrank: Op = LowRank(sites.sites, sites.num_layers, dtype, device)
    bottleneck: Op = Bottleneck(dtype, device)
    if kernels is not None:
        lowrank = NativeLowRank(sites, kernels)
        bottleneck = NativeBottleneck(sites, kernels)
    return {
        "lowrank": lowrank,
        "affine": Affine(sites, dtype, device, weights),
        "bottleneck": bottleneck,
        "bottleneck_group": BottleneckGroup(dtype, device),
        "reft": Reft(dtype, device),
        "structured": Structured(sites, dtype, device, weights),
        "replace": Replaced(sites, dtype, device, weights),
        AROUND: Around(sites, dtype, device, weights),
        "coupling": Coupling(dtype, device),
        "prompt": PromptRows(dtype, device),
        "kv_prefix": PrefixRows(dtype, device),
    }


def plain_ops(
    sites: SiteMap, dtype: torch.dtype, device: torch.device, weights: BaseWeights | None = None
) -> Mapping[str, Op]:
    """The same, straight from the formulas: what the fast ones are checked against."""
    return {
        "lowrank": PlainLowRank(dtype, device),
        "affine": PlainAffine(sites, dtype, device, weights),
        "bottleneck": Bottleneck(dtype, device),
        "bottleneck_group": BottleneckGroup(dtype, device),
        "reft": Reft(dtype, device),
        "structured": PlainStructured(sites, weights),
        "replace": Replaced(sites, dtype, device, weights),
        AROUND: Around(sites, dtype, device, weights),
        "coupling": Coupling(dtype, device),
        "prompt": PromptRows(dtype, device),
        "kv_prefix": PrefixRows(dtype, device),
    }
