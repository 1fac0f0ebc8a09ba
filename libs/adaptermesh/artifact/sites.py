"""Sites: the places of one base model where an adapter acts, with their modules and widths."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from adaptermesh.artifact.architectures import ARCHITECTURES, ENCODERS, Block, Family
from adaptermesh.artifact.base_facts import BaseFacts
from adaptermesh.core.errors import Code, MeshError, Reason, invalid_field

ATTENTION = "attention"
BLOCKS = (ATTENTION, "ffn")
"""The block sites of every layer: where a sub-layer's output joins the residual stream, as wide as it."""


EMBED = "embed"
"""The site of the tokens' embeddings, in front of the first layer and counted to it."""
HEAD = "lm_head"
"""The site of the product that makes the logits, behind the last layer and counted to it."""
EDGES = (EMBED, HEAD)
STREAM = "stream"
"""What goes into the first layer, after whatever the model adds to its embeddings."""
FINAL_NORM = "final_norm"
"""The norm in front of the head, counted to the last layer."""
LAYER_NORMS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {"attention_norm": ("q", "k", "v"), "ffn_norm": ("gate", "up")}
)
"""The norms of a layer in front of its sub-layers, and the sites that read what comes out of each."""
NORMS = (*LAYER_NORMS, FINAL_NORM)
_NORMS_OF = dict(zip(BLOCKS, LAYER_NORMS, strict=True))


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
    `blocks` has the modules of each block site, relative to the layer. `edges` has the sites around the
    layers, as products of one-hot rows for the embeddings; `tied` says that these two share their weight.
    `norms` has the norms by their sites, as paths with `{layer}` in them but for the last one; they multiply
    by their weight plus `norm_offset`. `biased` has the paths, with `{layer}`, of what has a bias.
    """

    sites: tuple[Site, ...]
    modules: Mapping[str, tuple[Site, ...]]
    num_layers: int
    other_modules: tuple[str, ...]
    layer_path: str
    blocks: Mapping[str, Block]
    hidden_size: int
    edges: Mapping[str, Site] = field(default_factory=dict)
    tied: bool = False
    norms: Mapping[str, str] = field(default_factory=dict)
    norm_offset: float = 0.0
    biased: frozenset[str] = frozenset()

    def get(self, name: str) -> Site | None:
        """The site of that name in every layer, e.g. `q`."""
        return next((site for site in self.sites if site.name == name), None)

    def parts(self, module_path: str) -> tuple[tuple[Site, ...], int] | None:
        """Every site of a module and its layer, which may lie past the last one: the caller checks."""
        for site in self.edges.values():
            if site.module == module_path:
                return (site,), self.layer_of(site.name)
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

    def layer_of(self, edge: str) -> int:
        """The layer to which something around the layers is counted."""
        return 0 if edge == EMBED else self.num_layers - 1

    def norm_at(self, path: str) -> tuple[str, int] | None:
        """The site and the layer of a norm by its path; None if it is none."""
        for name, pattern in self.norms.items():
            if pattern == path:
                return name, self.layer_of(name)
        place = self.within_layer(path)
        if place is None or place[1] >= self.num_layers:
            return None
        whole = f"{self.layer_path}.{place[0]}"
        return next(((name, place[1]) for name, pattern in self.norms.items() if pattern == whole), None)

    def has_bias(self, path: str) -> bool:
        """Whether a module, by its path, has a bias in the base."""
        place = self.within_layer(path)
        return (path if place is None else f"{self.layer_path}.{place[0]}") in self.biased

    def norm_paths(self) -> tuple[str, ...]:
        """The path of every norm that is a site."""
        paths = (
            pattern.replace("{layer}", str(layer))
            for pattern in self.norms.values()
            for layer in range(self.num_layers)
        )
        return tuple(dict.fromkeys(paths))

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
        edges=_edges(facts, family),
        tied=is_tied(facts),
        norms=_norms(family),
        norm_offset=family.norm_offset,
        biased=frozenset(_biased(facts, family)),
    )


def _biased(facts: BaseFacts, family: Family) -> Iterator[str]:
    for row in family.modules:
        if row.bias is not None and (not row.bias or facts.config.get(row.bias)):
            yield f"{family.layer_path}.{row.path}"
    if family.norm_bias:
        yield from _norms(family).values()


def _edges(facts: BaseFacts, family: Family) -> dict[str, Site]:
    hidden, vocabulary = facts.hidden_size, facts.vocab_size
    found = (Site(EMBED, family.embeddings, vocabulary, hidden), Site(HEAD, family.head, hidden, vocabulary))
    return {site.name: site for site in found if site.module}


def _norms(family: Family) -> dict[str, str]:
    """Of families whose norms come before the sub-layers."""
    found = {_NORMS_OF[block]: f"{family.layer_path}.{held.reads}" for block, held in family.blocks.items()}
    return {**found, FINAL_NORM: family.final_norm} if family.final_norm else found


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


def is_tied(facts: BaseFacts) -> bool:
    """Whether the base's head and embeddings share their weight; False for an unknown architecture."""
    family = ARCHITECTURES.get(facts.architecture)
    return family is not None and facts.config.get("tie_word_embeddings", family.tied) is True


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
