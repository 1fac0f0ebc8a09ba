"""The tensors of an `adapters` file, whose names hold the module's path, the adapter's name and the slot."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from adaptermesh.artifact.adapters_places import Places
from adaptermesh.artifact.base_facts import BaseFacts
from adaptermesh.artifact.manifest_parts import TensorEntry
from adaptermesh.artifact.plan import Entries, Shape, check_entry
from adaptermesh.artifact.problems import Problems, shown
from adaptermesh.artifact.sites import SiteMap
from adaptermesh.artifact.uploaded import Uploaded

SHARED = "shared_parameters"
# The library's containers: each holds its modules by the adapters' names.
_CONTAINERS = frozenset(
    {"adapters", "loras", SHARED, "invertible_adapters", "prefix_tunings", "prefix_gates", "prompt_tunings"}
    | {"refts", "adapter_fusion_layer"}
)


@dataclass(frozen=True, slots=True)
class Grouped:
    """Tensors by slot for each module, by its path in the causal model, and those that all modules share."""

    modules: Mapping[str, Entries]
    shared: Entries


@dataclass(frozen=True, slots=True)
class Reading:
    """An adapter's file on its way to a plan: whose it is, which base it is for, and what is wrong with it.

    `name` is the adapter's, which the library puts into the names of its tensors. `places` are those of the
    base's architecture.
    """

    name: str
    upload: Uploaded
    places: Places
    sites: SiteMap
    base: BaseFacts
    problems: Problems
    known: int
    """How many problems there were before: all of an upload's are told at once."""

    @property
    def failed(self) -> bool:
        """Whether something is wrong with what was read since: then there is nothing to plan."""
        return len(self.problems) > self.known


def group(reading: Reading, container: str) -> Grouped:
    """Strips the adapter's name, and gives paths that a headless model saved the prefix they lack."""
    name, problems = reading.name, reading.problems
    prefix = reading.sites.layer_path.partition(".")[0]
    modules: dict[str, dict[str, TensorEntry]] = {}
    shared: dict[str, TensorEntry] = {}
    for entry in reading.upload.weights.tensors.values():
        parts = entry.name.split(".")
        at = _container(parts, name)
        if at is None:
            problems.add(f"tensor {shown(entry.name)} is not expected: {_why(parts, name)}")
            continue
        path = parts[:at] if parts[:1] == [prefix] else [prefix, *parts[:at]]
        slot = ".".join(parts[at + 2 :])
        if parts[at] == SHARED and path == [prefix]:
            place = shared
        elif parts[at] == container:
            place = modules.setdefault(".".join(path), {})
        else:
            problems.add(f"tensor {shown(entry.name)} is not expected: the config asks for no such part")
            continue
        if slot in place:
            problems.add(f"tensors {shown(place[slot].name)} and {shown(entry.name)} are the same one")
        place[slot] = entry
    return Grouped(modules, shared)


def container_of(tensor: str, name: str) -> str | None:
    """The library's container that holds a tensor of the adapter of that name; None if none does."""
    parts = tensor.split(".")
    at = _container(parts, name)
    return None if at is None else parts[at]


def _container(parts: list[str], name: str) -> int | None:
    """Where the container of this adapter is in a tensor's path."""
    return next((i for i in range(len(parts) - 2) if parts[i] in _CONTAINERS and parts[i + 1] == name), None)


def _why(parts: list[str], name: str) -> str:
    other = next((parts[i + 1] for i in range(len(parts) - 2) if parts[i] in _CONTAINERS), None)
    if other is not None:
        return f"it is of the adapter {shown(other)}, the config's name is {shown(name)}"
    return f"it is of no part of the adapter {shown(name)}"


def compare(reading: Reading, found: Grouped, wanted: Collection[str]) -> None:
    """Notes modules that are not in the base, not asked for by the config, or asked for and absent."""
    sites, problems = reading.sites, reading.problems
    for module in found.modules:
        if module in wanted:
            continue
        place = sites.within_layer(module)
        if place is not None and place[1] >= sites.num_layers:
            why = f"is in layer {place[1]}, but {reading.base.title} has layers 0 to {sites.num_layers - 1}"
        else:
            why = "has tensors, but the config asks for nothing there"
        problems.add(f"module {shown(module)} {why}")
    for module in wanted:
        if module not in found.modules:
            problems.add(
                f"module {shown(module)} is asked for by the config, but the file has no tensors for it"
            )


def check_slots(
    what: str, entries: Entries, shapes: Mapping[str, Shape], why: str, problems: Problems
) -> None:
    """Notes tensors that are absent, one too many, or of another shape or dtype than they have to be."""
    for slot, shape in shapes.items():
        entry = entries.get(slot)
        if entry is None:
            given = " and ".join(sorted(entries)) or "no tensors"
            problems.add(f"{what} has {given[:200]} but no {slot}")
        else:
            check_entry(entry, shape, why, problems)
    for slot, entry in entries.items():
        if slot not in shapes:
            problems.add(f"tensor {shown(entry.name)} is not expected: {what} has {', '.join(shapes)}")
