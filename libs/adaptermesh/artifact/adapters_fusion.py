"""AdapterFusion of the `adapters` library: what weighs several of its bottlenecks for each token.

It becomes the op `fusion`. It is saved without the adapters that it was trained on, and is kept for
compositions that name them.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict

from adaptermesh.artifact.adapters_config import TopConfig, check_base, read_version
from adaptermesh.artifact.adapters_head import read_head
from adaptermesh.artifact.adapters_places import PLACES
from adaptermesh.artifact.adapters_tensors import Reading, check_slots, compare, group
from adaptermesh.artifact.base_facts import BaseFacts
from adaptermesh.artifact.config_file import check_unknown_keys, validated
from adaptermesh.artifact.manifest_parts import ModuleOp, TensorEntry
from adaptermesh.artifact.ops import FUSION as FUSION_OP
from adaptermesh.artifact.ops import MAX_FUSED
from adaptermesh.artifact.plan import (
    Entries,
    Piece,
    Plan,
    PlannedTensor,
    Shape,
    check_one_dtype,
    copied,
    tensor_name,
)
from adaptermesh.artifact.problems import Problems, shown
from adaptermesh.artifact.safetensors_file import TensorSpec
from adaptermesh.artifact.sites import HEAD, SiteMap
from adaptermesh.artifact.source_files import FUSION, HEAD_FILE
from adaptermesh.artifact.uploaded import Uploaded
from adaptermesh.core.composition import MAX_MEMBERS

_KNOWN = frozenset(
    {"adapter_names", "config", "hidden_size", "model_class", "model_name", "model_type", "name", "version"}
)
# Where the value is applied changes nothing: it is linear, has no bias, and the shares add up to 1.
_NO_EFFECT = frozenset({"dropout_prob", "regularization", "value_before_softmax", "value_initialized"})
_NOT_SERVED = "not served yet: "
_SLOTS = {
    "query": "query.weight",
    "query_bias": "query.bias",
    "key": "key.weight",
    "key_bias": "key.bias",
    "value": "value.weight",
}


class FusionConfig(BaseModel):
    """How the library computes a fusion; keys are those of adapters 1.3.0, `AdapterFusionConfig`."""

    container: ClassVar[str] = "adapter_fusion_layer"

    model_config = ConfigDict(strict=True, frozen=True, extra="ignore")

    query: bool
    key: bool
    value: bool
    query_before_ln: bool = False
    residual_before: bool = False
    temperature: bool = False

    def unserved(self) -> Iterator[str]:
        """Why it can't be served, whatever the base."""
        if not (self.query and self.key):
            yield "query or key false: a fusion that compares without them"
        if self.residual_before:
            yield "residual_before: a fusion that weighs the residual stream with its adapters"
        if self.temperature:
            yield "temperature: shares that depend on how often the library has computed them"


@dataclass(frozen=True, slots=True)
class AdapterFusion:
    """A fusion that was read; `names` are the adapters that it weighs, in their order."""

    raw: Mapping[str, Any]
    name: str
    names: tuple[str, ...]
    version: str
    config: FusionConfig
    head: Mapping[str, Any] | None = None
    unservable: str = ""
    head_copy: TensorEntry | None = None
    kind: str = "fusion"

    @property
    def named_base(self) -> object:
        """What the config says of the base: a path or a name."""
        return self.raw.get("model_name")

    def plan(self, upload: Uploaded, sites: SiteMap, base: BaseFacts, problems: Problems) -> Plan:
        """What a fusion becomes that was uploaded alone; of use only if no problem was noted."""
        found = self.parts(upload, sites, base, problems)
        if found.unservable:
            return found
        return replace(
            found,
            unservable="a fusion is served with the adapters that it weighs: ask for "
            "'fuse(acme/fusion:v1,acme/one:v1,...)' with refs of this fusion and then of "
            f"{', '.join(self.names)}",
        )

    def parts(self, upload: Uploaded, sites: SiteMap, base: BaseFacts, problems: Problems) -> Plan:
        """Its modules, for a composition with the adapters; of use only if no problem was noted."""
        if self.unservable:
            return Plan(unservable=self.unservable)
        places = PLACES.get(base.architecture)
        if places is None or places.post_norm:
            return Plan(
                unservable=f"not served yet: a fusion in a {base.architecture}, whose bottlenecks are not "
                "served or come after its layer norms"
            )
        reading = Reading(self.name, upload, places, sites, base, problems, len(problems))
        pieces = list(self._pieces(reading))
        if reading.failed:
            return Plan()
        return Plan(
            modules=tuple(op for op, _ in pieces),
            tensors=tuple(tensor for _, parts in pieces for tensor in parts),
            copies={} if self.head_copy is None else {HEAD: (HEAD_FILE, self.head_copy)},
        )

    def _pieces(self, reading: Reading) -> Iterator[Piece]:
        """Layer by layer; the library makes one in every layer, wherever its adapters act."""
        found = group(reading, self.config.container)
        sites, hidden = reading.sites, reading.base.hidden_size
        every = {
            f"{sites.layer_path}.{path}".replace("{layer}", str(layer)): (site, layer)
            for layer in range(sites.num_layers)
            for site, path in reading.places.blocks.items()
        }
        used = {every[module][0] for module in found.modules if module in every}
        wanted = {module: place for module, place in every.items() if place[0] in used}
        compare(reading, found, wanted)
        if not used:
            reading.problems.add(f"it has no fusion of the name {shown(self.name)} in any layer")
        shapes, why = self._shapes(hidden), f"{hidden} from the base; query, key and value from the config"
        for module, entries in found.modules.items():
            check_slots(f"module {shown(module)}", entries, shapes, why, reading.problems)
            check_one_dtype(module, entries, reading.problems)
        if not reading.failed:
            yield from (self._piece(*place, found.modules[module]) for module, place in wanted.items())

    def _shapes(self, hidden: int) -> dict[str, Shape]:
        slots = [slot for slot in _SLOTS if self.config.value or slot != "value"]
        return {_SLOTS[slot]: (hidden,) if slot.endswith("bias") else (hidden, hidden) for slot in slots}

    def _piece(self, site: str, layer: int, entries: Entries) -> Piece:
        tensors = {
            slot: PlannedTensor(
                TensorSpec(tensor_name(site, layer, slot), entries[source].dtype, entries[source].shape),
                layer,
                copied(entries[source].offset, entries[source].size),
            )
            for slot, source in _SLOTS.items()
            if source in entries
        }
        options = {
            "members": str(len(self.names)),
            "query": "output" if self.config.query_before_ln else "input",
        }
        names = {slot: tensor.spec.name for slot, tensor in tensors.items()}
        dtype = tensors["query"].spec.dtype
        return (
            ModuleOp(site, layer, FUSION_OP, 0, 1.0, names, dtype, options=options),
            tuple(tensors.values()),
        )


def read_fusion(
    raw: Mapping[str, Any], upload: Uploaded, base: BaseFacts, problems: Problems
) -> AdapterFusion | None:
    """Reads `adapter_fusion_config.json`; None if there are problems that leave nothing to go on with."""
    known = len(problems)
    check_unknown_keys(raw, _KNOWN, FUSION.config, problems)
    version = read_version(raw, FUSION.config, problems)
    top = validated(TopConfig, raw, FUSION.config, problems)
    # Older versions of the library name the adapters in the fusion's own name alone.
    names = raw.get("adapter_names", str(raw.get("name")).split(","))
    if not isinstance(names, list) or not are_names(names):
        problems.add(f"{FUSION.config}: it names no adapters")
    head = read_head(upload, base, problems)
    if top is None or len(problems) > known:
        return None
    check_base(top, base, FUSION.config, problems)
    where = f"{FUSION.config}: config"
    check_unknown_keys(top.config, FusionConfig.model_fields.keys() | _NO_EFFECT, where, problems)
    config = validated(FusionConfig, top.config, where, problems)
    if config is None:
        return None
    reasons = list(config.unserved())
    if len(names) > MAX_FUSED:
        reasons.append(f"a fusion of {len(names)} adapters, the most is {MAX_FUSED}")
    if head is not None and head.unservable:
        reasons.append(head.unservable.removeprefix(_NOT_SERVED))
    return AdapterFusion(
        raw,
        top.name,
        tuple(names),
        version,
        config,
        None if head is None else head.described,
        f"{_NOT_SERVED}{'; '.join(reasons)}" if reasons else "",
        None if head is None else head.copy,
    )


def are_names(names: list[Any]) -> bool:
    """Whether these may be adapters' names: they stand in messages and in expressions."""
    return 0 < len(names) <= MAX_MEMBERS and all(
        isinstance(name, str) and 0 < len(name) <= 64 and name.isprintable() for name in names
    )
