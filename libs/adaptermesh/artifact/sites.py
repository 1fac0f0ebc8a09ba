"""Sites: the places of one base model where an adapter acts, with their modules and widths."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from adaptermesh.artifact.architectures import ARCHITECTURES, ENCODERS, Block, Family
from adaptermesh.artifact.base_facts import BaseFacts
from adaptermesh.core.errors import Code, MeshError, Reason, invalid_field

ATTENTION = "attention"
BLOCKS = (ATTENTION, "ffn")
"""The block sites of every layer: where a sub-layer's output joins the residual stream, as wide as it."""


EMBED = "embed"
"""The site of the tokens' embeddings, in front of the first layer."""


@dataclass(frozen=True, slots=True)
class Site:
    """One place in every layer.

    `module` is the transformers module's path with `{layer}` in it. In a fused module the site is the rows
    [`out_offset`, `out_offset + out_features`) of its output. `transposed` says that the module keeps its
    weight as (in, out).
    """

    name: str
    module: str
    in_features: int
    out_features: int
    out_offset: int = 0
    fused: bool = False
    transposed: bool = False


@dataclass(frozen=True, slots=True)
class SiteMap:
    """All sites of one base model.

    `sites` is in the order of the computation. `modules` has the sites of each module (several where it is
    fused) by the module's path with `{layer}` in it. `other_modules` are real modules that are no site.
    `blocks` has the modules of each block site, relative to the layer.
    """

    sites: tuple[Site, ...]
    modules: Mapping[str, tuple[Site, ...]]
    num_layers: int
    other_modules: tuple[str, ...]
    layer_path: str
    blocks: Mapping[str, Block]
    hidden_size: int

    def get(self, name: str) -> Site | None:
        """The site of that name, e.g. `q`."""
        return next((site for site in self.sites if site.name == name), None)

    def match(self, module_path: str) -> tuple[Site, int] | None:
        """The one site and the layer that a module path means; None for anything else, fused modules too."""
        found = self.parts(module_path)
        if found is None or len(found[0]) != 1 or found[1] >= self.num_layers:
            return None
        return found[0][0], found[1]

    def parts(self, module_path: str) -> tuple[tuple[Site, ...], int] | None:
        """Every site of a module and its layer, which may lie past the last one: the caller checks."""
        place = self.within_layer(module_path)
        sites = None if place is None else self.modules.get(f"{self.layer_path}.{place[0]}")
        return None if place is None or sites is None else (sites, place[1])

    def within_layer(self, path: str) -> tuple[str, int] | None:
        """Where in its layer a path is, and the layer, which may lie past the last one; None outside."""
        head, _, tail = f"{self.layer_path}.".partition("{layer}")
        if not path.startswith(head):
            return None
        digits, found, rest = path[len(head) :].partition(tail)
        if not digits.isascii() or not digits.isdigit() or len(digits) > 9 or str(int(digits)) != digits:
            return None
        return (rest, int(digits)) if found else None

    def module_paths(self) -> tuple[str, ...]:
        """The path of every module of every layer that holds sites, layer by layer."""
        return tuple(
            module.replace("{layer}", str(layer))
            for layer in range(self.num_layers)
            for module in self.modules
        )


def site_map(facts: BaseFacts, *, encoders: bool = False) -> SiteMap:
    """The sites of a base model; of an encoder only if asked to, so that no decoder's engine takes one.

    Raises:
        MeshError: FAILED_PRECONDITION (ADAPTER_UNSUPPORTED) for an architecture without a module map;
            INVALID_ARGUMENT (INVALID_FIELD) for a config without the widths.
    """
    family = _family(facts, {**ARCHITECTURES, **ENCODERS} if encoders else ARCHITECTURES)
    widths = _widths(facts, family)
    modules: dict[str, tuple[Site, ...]] = {}
    for row in family.modules:
        path = f"{family.layer_path}.{row.path}"
        sites: list[Site] = []
        offset = 0
        for name, dim in row.parts:
            width = widths[dim]
            fused = len(row.parts) > 1
            sites.append(Site(name, path, widths[row.in_dim], width, offset, fused, family.conv1d))
            offset += width
        modules[path] = tuple(sites)
    return SiteMap(
        sites=tuple(site for sites in modules.values() for site in sites),
        modules=modules,
        num_layers=facts.num_layers,
        other_modules=family.other_modules,
        layer_path=family.layer_path,
        blocks=family.blocks,
        hidden_size=facts.hidden_size,
    )


def _family(facts: BaseFacts, known: Mapping[str, Family] = ARCHITECTURES) -> Family:
    family = known.get(facts.architecture)
    if family is None:
        raise MeshError(
            Code.FAILED_PRECONDITION,
            Reason.ADAPTER_UNSUPPORTED,
            f"base model '{facts.model_id}' is a {facts.architecture}, for which there is no module map "
            f"(known: {', '.join(known)})",
            metadata={"architecture": facts.architecture, "base_digest": facts.digest},
        )
    return family


def key_heads(facts: BaseFacts) -> tuple[int, int]:
    """How many heads the keys of each layer have, and how wide one is; the same for the values.

    Raises:
        MeshError: As `site_map`.
    """
    _, kv_heads, head_dim = _heads(facts, _family(facts))
    return kv_heads, head_dim


def _heads(facts: BaseFacts, family: Family) -> tuple[int, int, int]:
    """Heads, heads of keys, and the width of one."""
    config = {**family.defaults, **facts.config}
    heads = _size(config, "num_attention_heads", "n_head", "n_heads")
    head_dim, kv_heads = facts.hidden_size // heads, heads
    if family.grouped_heads:
        # An explicit null means "derive it", in every one of these classes.
        head_dim = _optional_size(config, "head_dim") or head_dim
        kv_heads = _optional_size(config, "num_key_value_heads") or kv_heads
    return heads, kv_heads, head_dim


def _widths(facts: BaseFacts, family: Family) -> dict[str, int]:
    config = {**family.defaults, **facts.config}
    hidden = facts.hidden_size
    heads, kv_heads, head_dim = _heads(facts, family)
    if "n_inner" in config:
        ffn = _optional_size(config, "n_inner") or 4 * hidden
    else:
        ffn = _size(config, "intermediate_size", "hidden_dim")
    return {"hidden": hidden, "q": heads * head_dim, "kv": kv_heads * head_dim, "ffn": ffn}


def _size(config: Mapping[str, Any], *keys: str) -> int:
    for key in keys:
        value = _optional_size(config, key)
        if value is not None:
            return value
    raise invalid_field(f"config.{keys[0]}", "is missing")


def _optional_size(config: Mapping[str, Any], key: str) -> int | None:
    value = config.get(key)
    if value is None:
        return None
    if type(value) is not int or not 0 < value < 2**31:
        raise invalid_field(f"config.{key}", f"{value!r} is not a positive integer")
    return value
