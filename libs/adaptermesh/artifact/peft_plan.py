"""What becomes of an upload's tensors: given to a module, checked, laid out in the canonical form.

What the methods of peft share; a method's own part is a `Reader`.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence

from adaptermesh.artifact.manifest_parts import TensorEntry
from adaptermesh.artifact.peft_models import PREFIX as PREFIX
from adaptermesh.artifact.peft_models import TargetConfig
from adaptermesh.artifact.peft_targets import Targets
from adaptermesh.artifact.plan import Entries, Piece, Plan, Shape, check_entry, check_one_dtype
from adaptermesh.artifact.problems import Problems, shown
from adaptermesh.artifact.sites import EMBED, HEAD, Site, SiteMap


class Reader(ABC):
    """One method: which tensors a module has, of which shapes, and what they become.

    `suffixes` gives the slot of a tensor by how its name ends; `decider` what the tensor is called that
    decides whether a module does anything, or "". `edges` are the sites around the layers where it can act.
    """

    method: str
    suffixes: Mapping[str, str]
    decider: str
    edges: frozenset[str] = frozenset()

    def why_unexpected(self, name: str) -> str:  # noqa: ARG002 (one answer for all, unless a method knows more)
        """Why a tensor of that name is none of this method's."""
        return f"tensors of a peft {self.method} are named {PREFIX}<module>{', '.join(self.suffixes)}"

    def may_lack(self, module: str) -> bool:  # noqa: ARG002 (none may, unless a method prunes)
        """Whether a targeted module may have no tensors."""
        return False

    def deciding(self, entries: Entries) -> TensorEntry:
        """The tensor of a module that makes it do nothing when it is zero, where there is a `decider`."""
        return entries[self.decider]

    @abstractmethod
    def because(self, module: str) -> str:
        """What the shapes of a module come from, beside the base's widths."""

    @abstractmethod
    def shapes(self, module: str, sites: Sequence[Site], entries: Entries) -> Mapping[str, Shape]:
        """What each slot of a module has to be."""

    @abstractmethod
    def pieces(self, module: str, sites: Sequence[Site], layer: int, entries: Entries) -> Iterator[Piece]:
        """The ops of one module, one or more for each site in it."""


def plan(
    config: TargetConfig,
    targets: Targets,
    reader: Reader,
    tensors: Mapping[str, TensorEntry],
    sites: SiteMap,
    base_name: str,
    problems: Problems,
) -> Plan:
    """Assigns every tensor to a site, notes what does not fit, and lays out the canonical form.

    The result is of use only if no problem was noted.
    """
    if config.fan_in_fan_out and not any(site.transposed for site in sites.sites):
        problems.add("adapter_config.json: fan_in_fan_out is true, but the base has no Conv1D modules")
    elsewhere = _outside_of_sites(tensors, targets, sites)
    if elsewhere:
        return Plan(
            unservable=f"not served yet: it acts on {', '.join(elsewhere)}, which is no site of this base"
        )
    strange = [
        site.module
        for name, site in sites.edges.items()
        if site.module in targets.modules and name not in reader.edges
    ]
    if strange:
        return Plan(unservable=f"not served: a {reader.method} of {' and '.join(strange)}")
    found = _group(tensors, reader, problems)
    _compare(found, targets, reader, sites, base_name, problems)
    for module, entries in found.items():
        place = sites.parts(module)
        if place is not None and place[1] < sites.num_layers:
            _check(module, entries, reader, place[0], problems)
    if len(problems):
        return Plan()
    edges = {name: site.module for name, site in sites.edges.items()}
    paths = [edges.get(EMBED), *sites.module_paths(), edges.get(HEAD)]
    ordered = [module for module in paths if module in found]
    if not ordered:
        problems.add("the adapter has no tensors: no module would be changed")
        return Plan()
    pieces = [piece for module in ordered for piece in _pieces(module, found[module], reader, sites)]
    return Plan(
        modules=tuple(op for op, _ in pieces),
        tensors=tuple(tensor for _, parts in pieces for tensor in parts),
        deciding=tuple(reader.deciding(found[module]).name for module in ordered) if reader.decider else (),
        decider=reader.decider,
    )


def _pieces(module: str, entries: Entries, reader: Reader, sites: SiteMap) -> Iterator[Piece]:
    place = sites.parts(module)
    if place is not None:
        yield from reader.pieces(module, *place, entries)


def _outside_of_sites(tensors: Mapping[str, TensorEntry], targets: Targets, sites: SiteMap) -> list[str]:
    """Real modules without a site that the config targets or that have tensors of an adapter."""
    heads = {name.removeprefix(PREFIX) for name in tensors}
    return [
        module
        for module in sites.other_modules
        if module in targets.others or any(head.startswith(f"{module}.") for head in heads)
    ]


def _group(
    tensors: Mapping[str, TensorEntry], reader: Reader, problems: Problems
) -> dict[str, dict[str, TensorEntry]]:
    """The tensors of each module path by slot."""
    found: dict[str, dict[str, TensorEntry]] = {}
    for name, entry in tensors.items():
        suffix = next((suffix for suffix in reader.suffixes if name.endswith(suffix)), None)
        if suffix is None or not name.startswith(PREFIX):
            problems.add(f"tensor {shown(name)} is not expected: {reader.why_unexpected(name)}")
            continue
        module, slot = name[len(PREFIX) : -len(suffix)], reader.suffixes[suffix]
        found.setdefault(module, {})[slot] = entry
    return found


def _compare(
    found: Mapping[str, Entries],
    targets: Targets,
    reader: Reader,
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
        if module not in found and not reader.may_lack(module):
            problems.add(
                f"module {shown(module)} is targeted by the config, but the file has no tensors for it"
            )


def _check(module: str, entries: Entries, reader: Reader, parts: Sequence[Site], problems: Problems) -> None:
    width_in, width_out = parts[0].in_features, sum(site.out_features for site in parts)
    why = f"{reader.because(module)}, {width_in} in and {width_out} out from the base"
    shapes = reader.shapes(module, parts, entries)
    for slot in sorted(entries.keys() - shapes.keys()):
        problems.add(
            f"tensor {shown(entries[slot].name)} is not expected: "
            f"the module has {' and '.join(shapes)} with {reader.because(module)}"
        )
    for slot, shape in shapes.items():
        entry = entries.get(slot)
        if entry is None:
            problems.add(f"module {shown(module)} has {' and '.join(sorted(entries))} but no {slot}")
            continue
        check_entry(entry, shape, why, problems)
    check_one_dtype(module, entries, problems)
