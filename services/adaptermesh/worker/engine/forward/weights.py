"""The base's matrices as adapters need them that depend on them, however a forward holds them."""

from typing import Protocol

import torch

from adaptermesh.artifact.sites import Site
from adaptermesh.worker.engine.base import Base


class BaseWeights(Protocol):
    """W and b of each site, [out, in] and [out]."""

    def squares(self, site: Site, layer: int) -> torch.Tensor:
        """The sum of the squares of each row of W: [out] float32."""
        ...

    def project(self, site: Site, layer: int, a: torch.Tensor) -> torch.Tensor:
        """W a^T in float32. a: [n, in] -> [out, n]."""
        ...

    def bias(self, site: Site, layer: int) -> torch.Tensor | None:
        """[out], or None where the module has none."""
        ...

    def norm(self, site: str, layer: int) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """The weight and the bias of a norm, [hidden] each."""
        ...


class ModuleWeights:
    """Those of transformers' modules."""

    def __init__(self, base: Base) -> None:
        self._base = base
        self._model = base.model

    def squares(self, site: Site, layer: int) -> torch.Tensor:
        return self._matrix(site, layer).square().sum(1)

    def project(self, site: Site, layer: int, a: torch.Tensor) -> torch.Tensor:
        return self._matrix(site, layer) @ a.float().T

    def bias(self, site: Site, layer: int) -> torch.Tensor | None:
        bias: torch.Tensor | None = self._module(site, layer).bias
        return None if bias is None else bias.detach()[_rows(site)]

    def norm(self, site: str, layer: int) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        return norm_weights(self._base, site, layer)

    def _matrix(self, site: Site, layer: int) -> torch.Tensor:
        weight = self._module(site, layer).weight.detach()
        return (weight.T if site.transposed else weight)[_rows(site)].float()

    def _module(self, site: Site, layer: int) -> torch.nn.Linear:
        module: torch.nn.Linear = self._model.get_submodule(site.module.replace("{layer}", str(layer)))
        return module


def norm_weights(base: Base, site: str, layer: int) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """The weight and the bias of a norm, whoever computes it: [hidden] each, or None."""
    module = base.model.get_submodule(base.sites.norms[site].replace("{layer}", str(layer)))
    return getattr(module, "weight", None), getattr(module, "bias", None)


def _rows(site: Site) -> slice:
    return slice(site.out_offset, site.out_offset + site.out_features)
