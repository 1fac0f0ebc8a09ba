"""The `adapters` library's LoRA, IA3, VeRA and DoRA, as the ops `lowrank` and `affine`."""

from collections.abc import Iterator, Mapping

from adaptermesh.artifact.adapters_methods import LoraConfig
from adaptermesh.artifact.adapters_places import Places
from adaptermesh.artifact.adapters_tensors import Grouped, Reading, check_slots, compare, group
from adaptermesh.artifact.base_facts import BaseFacts
from adaptermesh.artifact.ordered_product import matmul
from adaptermesh.artifact.pieces import computed_lowrank, lowrank, vector
from adaptermesh.artifact.plan import Entries, Piece, Plan, Shape, Values, check_one_dtype, values_of
from adaptermesh.artifact.problems import Problems, shown
from adaptermesh.artifact.sites import Site, SiteMap

MAX_VERA_RANK = 256
"""Its matrices are multiplied at ingest, which takes the longer the higher the rank is."""

_MAGNITUDE = "m.weight"
_Targets = Mapping[str, tuple[tuple[Site, ...], int]]
"""The sites that change, and the layer, for each module that is asked for."""


def plan_lora(
    config: LoraConfig,
    reading: Reading,
) -> Plan:
    """What the adapter becomes; of use only if no problem was noted."""
    places, problems = reading.places, reading.problems
    reason = "; ".join(_unserved(config, places, reading.base))
    if reason:
        return Plan(unservable=f"not served: {reason}")
    targets = _targets(config, places, reading.sites)
    found = group(reading, config.container)
    compare(reading, found, targets)
    if reading.failed:
        return Plan()
    if not targets:
        problems.add("the adapter has no LoRA in any layer: no module would be changed")
        return Plan()
    _check(config, found, targets, problems)
    if reading.failed:
        return Plan()
    pieces = [
        piece
        for module, (parts, layer) in targets.items()
        for piece in _pieces(config, parts, layer, found.modules[module], found.shared)
    ]
    decides = config.kind == "lora"
    plan = Plan(
        modules=tuple(op for op, _ in pieces),
        tensors=tuple(tensor for _, parts in pieces for tensor in parts),
        deciding=tuple(found.modules[module]["lora_B"].name for module in targets) if decides else (),
        decider="lora_B" if decides else "",
    )
    return plan.bounded("LoRA") if config.is_vera else plan


def _unserved(config: LoraConfig, places: Places, base: BaseFacts) -> Iterator[str]:
    """What the library computes otherwise than the method says, or not at all, on this architecture."""
    if config.is_vera and config.r > MAX_VERA_RANK:
        yield f"a VeRA of rank {config.r}, the highest that is served is {MAX_VERA_RANK}"
    merged = config.selfattn_lora and places.fused
    if config.is_vera and merged:
        yield f"{config.kind} on the fused attention of a {base.architecture}, which the library can't run"
    if config.use_dora and places.fused:
        yield (
            f"DoRA on a {base.architecture}, whose weights the library takes in the wrong orientation; "
            "train it with peft"
        )
    elif config.use_dora and any(not key or base.config.get(key) for key in places.bias_keys):
        yield (
            "DoRA on modules with biases, which the library multiplies by the magnitude too; "
            "train it with peft"
        )


def _targets(config: LoraConfig, places: Places, sites: SiteMap) -> _Targets:
    paths: dict[str, list[str]] = {}
    if config.selfattn_lora:
        for letter in "qkv":
            if letter in config.attn_matrices:
                paths.setdefault(places.matrices[letter], []).append(letter)
    for chosen, path in (
        (config.intermediate_lora, places.intermediate),
        (config.output_lora, places.output),
    ):
        if chosen:
            paths[path] = []
    # In the order of the computation.
    modules = {
        module: tuple(part for part in parts if not paths[path] or part.name in paths[path])
        for module, parts in sites.modules.items()
        if (path := module.removeprefix(f"{sites.layer_path}.")) in paths
    }
    return {
        module.replace("{layer}", str(layer)): (parts, layer)
        for layer in range(sites.num_layers)
        if layer not in config.leave_out
        for module, parts in modules.items()
    }


def _check(config: LoraConfig, found: Grouped, targets: _Targets, problems: Problems) -> None:
    shared: dict[str, Shape] = {}
    for module, (parts, _) in targets.items():
        inputs, outputs = parts[0].in_features, sum(part.out_features for part in parts)
        why = f"r {config.r} from the config, {inputs} in and {outputs} out from the base"
        shapes = _shapes(config, len(parts), inputs, outputs)
        check_slots(f"module {shown(module)}", found.modules[module], shapes, why, problems)
        check_one_dtype(module, found.modules[module], problems)
        if config.is_vera:
            wanted: dict[str, Shape] = {"lora_A": (config.r, inputs), "lora_B": (outputs, config.r)}
            if shared and shared != wanted:
                problems.add(
                    f"module {shown(module)} has {inputs} inputs and {outputs} outputs, unlike another one: "
                    "the matrices that a VeRA shares can't fit both"
                )
                return
            shared = wanted
    check_slots("what all modules share", found.shared, shared, f"r {config.r} from the config", problems)


def _shapes(config: LoraConfig, parts: int, inputs: int, outputs: int) -> dict[str, Shape]:
    """Of a module's own tensors; in a fused one A has the rows of each part, one part after the other."""
    rank = config.r
    magnitude: dict[str, Shape] = {_MAGNITUDE: (outputs, 1)} if config.use_dora else {}
    if config.is_vera:
        return {"vera_D": (rank, rank), "vera_B": (outputs, outputs), **magnitude}
    if config.is_ia3:
        return {"lora_B": (outputs, 1)}
    return {"lora_A": (rank * parts, inputs), "lora_B": (outputs, rank), **magnitude}


def _pieces(
    config: LoraConfig, parts: tuple[Site, ...], layer: int, entries: Entries, shared: Entries
) -> Iterator[Piece]:
    """Source: adapters 1.3.0, `methods/lora.py`, LoRALinear and LoRAMergedLinear.

    The rows of a fused module's tensors are those of its chosen parts only, in the order q, k, v.
    """
    row = 0
    for place, site in enumerate(parts):
        if config.is_ia3:
            yield vector(site, layer, "out_scale", entries["lora_B"], row=row)
        elif config.is_vera:
            yield from computed_lowrank((site,), layer, config.r, config.scale, *_vera(entries, shared))
        else:
            yield lowrank(
                site,
                layer,
                config.scale,
                entries["lora_A"],
                entries["lora_B"],
                rank=config.r,
                a_row=place * config.r,
                b_row=row,
            )
        if config.use_dora:
            # The library's norm is of W + B A, without the scale that the sum has.
            yield vector(site, layer, "magnitude", entries[_MAGNITUDE], 1.0, row=row)
        row += site.out_features


def _vera(entries: Entries, shared: Entries) -> tuple[Values, Values]:
    """A = D A0 [r, in] and B = Bv B0 [out, r]; D and Bv are whole matrices, whatever the method says."""
    d, a = values_of(entries["vera_D"]), values_of(shared["lora_A"])
    bv, b = values_of(entries["vera_B"]), values_of(shared["lora_B"])
    return (lambda file: matmul(d(file), a(file))), (lambda file: matmul(bv(file), b(file)))
