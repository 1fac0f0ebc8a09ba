"""A peft LoRA's tensors, matched with its config and its base: what becomes of each of them."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from adaptermesh.artifact.manifest_parts import TENSOR_DTYPES, ModuleOp, TensorEntry
from adaptermesh.artifact.ops import LOWRANK
from adaptermesh.artifact.peft_config import LoraConfig
from adaptermesh.artifact.peft_targets import Targets
from adaptermesh.artifact.problems import Problems, shown
from adaptermesh.artifact.safetensors_file import TensorSpec
from adaptermesh.artifact.sites import Site, SiteMap

PREFIX = "base_model.model."
_SUFFIXES = {".lora_A.weight": "A", ".lora_B.weight": "B"}
_EMBEDDING_SUFFIXES = (".lora_embedding_A", ".lora_embedding_B", ".base_layer.weight")


@dataclass(frozen=True, slots=True)
class PlannedTensor:
    """A canonical tensor and the bytes of the uploaded file that it consists of."""

    spec: TensorSpec
    layer: int
    source_offset: int


@dataclass(frozen=True, slots=True)
class Plan:
    """What an adapter becomes: its ops and its tensors, in the order of the canonical file.

    `up_matrices` names the uploaded B of every module, which decide whether the adapter does anything.
    `unservable` is set, and all else empty, when it acts where nothing is served yet.
    """

    modules: tuple[ModuleOp, ...] = ()
    tensors: tuple[PlannedTensor, ...] = ()
    up_matrices: tuple[str, ...] = ()
    unservable: str = ""


def plan_lora(
    config: LoraConfig, tensors: Mapping[str, TensorEntry], sites: SiteMap, base_name: str, problems: Problems
) -> Plan:
    """Assigns every tensor to a site, notes what does not fit, and lays out the canonical form.

    The result is of use only if no problem was noted.
    """
    known = len(problems)
    targets = Targets(config, sites, problems)
    if len(problems) > known:
        return Plan()
    if config.fan_in_fan_out and not any(site.transposed for site in sites.sites):
        problems.add("adapter_config.json: fan_in_fan_out is true, but the base has no Conv1D modules")
    elsewhere = _outside_of_sites(tensors, targets, sites)
    if elsewhere:
        return Plan(
            unservable=f"not served yet: LoRA on {', '.join(elsewhere)}, which is no site of this base"
        )
    found = _group(tensors, problems)
    _compare(found, targets, sites, base_name, problems)
    for module, pair in found.items():
        place = sites.parts(module)
        if place is not None and place[1] < sites.num_layers:
            _check_pair(module, pair, place[0], targets.rank(module), problems)
    if len(problems):
        return Plan()
    ordered = [module for module in sites.module_paths() if module in found]
    if not ordered:
        problems.add("the adapter has no tensors: no module would be changed")
        return Plan()
    pieces = [piece for module in ordered for piece in _pieces(module, found[module], sites, targets)]
    return Plan(
        modules=tuple(op for op, _ in pieces),
        tensors=tuple(tensor for _, pair in pieces for tensor in pair),
        up_matrices=tuple(found[module]["B"].name for module in ordered),
    )


def _outside_of_sites(tensors: Mapping[str, TensorEntry], targets: Targets, sites: SiteMap) -> list[str]:
    """Real modules without a site that the config targets or that have LoRA tensors."""
    suffixes = (*_SUFFIXES, *_EMBEDDING_SUFFIXES)
    return [
        module
        for module in sites.other_modules
        if module in targets.others or any(f"{PREFIX}{module}{suffix}" in tensors for suffix in suffixes)
    ]


def _group(tensors: Mapping[str, TensorEntry], problems: Problems) -> dict[str, dict[str, TensorEntry]]:
    """The A and B of each module path."""
    found: dict[str, dict[str, TensorEntry]] = {}
    for name, entry in tensors.items():
        suffix = next((suffix for suffix in _SUFFIXES if name.endswith(suffix)), None)
        if suffix is None or not name.startswith(PREFIX):
            problems.add(f"tensor {shown(name)} is not expected: {_why_unexpected(name)}")
            continue
        found.setdefault(name[len(PREFIX) : -len(suffix)], {})[_SUFFIXES[suffix]] = entry
    return found


def _why_unexpected(name: str) -> str:
    if ".lora_magnitude_vector" in name:
        return "a magnitude belongs to DoRA, and the config has use_dora false"
    if name.endswith(".lora_B.bias"):
        return "a bias on lora_B needs lora_bias in the config"
    if name.startswith(PREFIX) and (".lora_A." in name or ".lora_B." in name):
        return "its name still holds the adapter's name; save the adapter with peft's save_pretrained"
    if name.startswith(PREFIX):
        return "it would replace a tensor of the base, and the config names no such module"
    return f"tensors of a peft LoRA are named {PREFIX}<module>.lora_A.weight and .lora_B.weight"


def _compare(
    found: Mapping[str, Mapping[str, TensorEntry]],
    targets: Targets,
    sites: SiteMap,
    base_name: str,
    problems: Problems,
) -> None:
    """Notes modules that are not in the base, not targeted, or targeted and absent."""
    wanted = frozenset(targets.modules)
    for module in found:
        if module in wanted:
            continue
        place = sites.parts(module)
        if place is None:
            problems.add(
                f"module {shown(module)} has tensors, but {base_name} has no such module with a site"
            )
        elif place[1] >= sites.num_layers:
            problems.add(
                f"module {shown(module)} is in layer {place[1]}, "
                f"but {base_name} has layers 0 to {sites.num_layers - 1}"
            )
        else:
            problems.add(f"module {shown(module)} has tensors, but the config does not target it")
    for module in targets.modules:
        if module not in found:
            problems.add(
                f"module {shown(module)} is targeted by the config, but the file has no tensors for it"
            )


def _check_pair(
    module: str, pair: Mapping[str, TensorEntry], sites: tuple[Site, ...], rank: int, problems: Problems
) -> None:
    width_in, width_out = sites[0].in_features, sum(site.out_features for site in sites)
    expected = {"A": (rank, width_in), "B": (width_out, rank)}
    for slot, shape in expected.items():
        entry = pair.get(slot)
        if entry is None:
            other = "B" if slot == "A" else "A"
            problems.add(f"module {shown(module)} has lora_{other} but no lora_{slot}")
            continue
        what = f"tensor {shown(entry.name)}"
        if entry.dtype not in TENSOR_DTYPES:
            problems.add(f"{what} is {entry.dtype}, expected one of {', '.join(TENSOR_DTYPES)}")
        if entry.shape != shape:
            problems.add(
                f"{what} has shape {list(entry.shape)}, expected {list(shape)}: rank {rank} from the config, "
                f"{width_in} in and {width_out} out from the base"
            )
    if len({entry.dtype for entry in pair.values()}) > 1:
        problems.add(f"module {shown(module)} has lora_A and lora_B of different dtypes; save both in one")


def _pieces(
    module: str, pair: Mapping[str, TensorEntry], sites: SiteMap, targets: Targets
) -> Iterator[tuple[ModuleOp, tuple[PlannedTensor, PlannedTensor]]]:
    """The ops of one module, one for each site in it.

    A fused module y = W x of stacked parts has one A and one B whose rows are stacked likewise, so each part
    is a low-rank op with the same A and its own rows of B; rows are consecutive bytes.
    """
    place = sites.parts(module)
    if place is None:
        return
    parts, layer = place
    a, b = pair["A"], pair["B"]
    rank, scale = targets.rank(module), targets.scale(module)
    row_bytes = b.size // b.shape[0]
    for site in parts:
        names = {slot: f"L{layer}.{site.name}.{slot}" for slot in ("A", "B")}
        spec_a = TensorSpec(names["A"], a.dtype, a.shape)
        spec_b = TensorSpec(names["B"], b.dtype, (site.out_features, rank))
        op = ModuleOp(site.name, layer, LOWRANK, rank, scale, names, a.dtype)
        yield (
            op,
            (
                PlannedTensor(spec_a, layer, a.offset),
                PlannedTensor(spec_b, layer, b.offset + site.out_offset * row_bytes),
            ),
        )
