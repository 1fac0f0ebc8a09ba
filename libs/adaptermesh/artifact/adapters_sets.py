"""Several adapters in one upload of the `adapters` library: its set-ups.

A set-up of stacks, averages and fusions becomes the one adapter that its members are together, by our own
rules of composition. The library's differ in part: its average divides twice by the number of members, each
LoRA of its stack reads what the one before has put out, and of parallel bottlenecks in a stack only the last
is left.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import PurePosixPath
from typing import Any

from adaptermesh.artifact.adapters_config import is_written_by_adapters, read_config, read_version
from adaptermesh.artifact.adapters_fusion import AdapterFusion, are_names, read_fusion
from adaptermesh.artifact.base_copies import digest_copies
from adaptermesh.artifact.base_facts import BaseFacts
from adaptermesh.artifact.canonical import tensor_view, to_float32
from adaptermesh.artifact.composing import Opened, compose_modules
from adaptermesh.artifact.config_file import read_config_file
from adaptermesh.artifact.manifest_parts import TensorEntry
from adaptermesh.artifact.plan import Floats, Plan, PlannedTensor, computed
from adaptermesh.artifact.problems import Problems, shown
from adaptermesh.artifact.safetensors_file import TensorSpec
from adaptermesh.artifact.sites import SiteMap
from adaptermesh.artifact.source_files import ADAPTERS, CONFIG_FILE, FUSION, SETUP, Layout
from adaptermesh.artifact.uploaded import Uploaded
from adaptermesh.core.composition import (
    AVERAGE,
    FUSE,
    MAX_DEPTH,
    MAX_MEMBERS,
    MAX_WEIGHT,
    STACK,
    Composition,
    Group,
    Leaf,
    fusions,
    leaves,
)
from adaptermesh.core.errors import MeshError

_BLOCKS = {"Stack": STACK, "Average": AVERAGE, "Fuse": FUSE}


@dataclass(frozen=True, slots=True)
class AdaptersSet:
    """A set-up. `tree` is over the members' names; there is one unless `unservable` is set.

    `fusions` are by the names that they have in the tree, each with its folder.
    """

    raw: Mapping[str, Any]
    kind: str
    version: str
    unservable: str = ""
    tree: Composition | None = None
    fusions: Mapping[str, tuple[str, AdapterFusion]] = field(default_factory=dict)
    head: None = None

    @property
    def named_base(self) -> object:
        """What the config says of the base: a path or a name."""
        return self.raw.get("model_name")

    def plan(self, upload: Uploaded, sites: SiteMap, base: BaseFacts, problems: Problems) -> Plan:
        """What the members become together; of use only if no problem was noted."""
        if self.tree is None:
            return Plan(unservable=self.unservable)
        if len(problems):
            return Plan()
        opened: dict[str, Opened] = {}
        copies: dict[str, tuple[str, TensorEntry]] = {}
        for name in dict.fromkeys(leaf.name for leaf in leaves(self.tree)):
            if name in self.fusions:
                folder, fusion = self.fusions[name]
                member = _member(upload, folder, FUSION)
                plan = _plan_fusion(folder, fusion, member, sites, base, problems)
            else:
                folder = name
                member = _member(upload, name, ADAPTERS)
                plan = _plan_member(name, member, sites, base, problems)
            if plan.unservable:
                return Plan(unservable=f"member '{name}': {plan.unservable}")
            opened[name] = Opened(plan.modules, _values(plan, member))
            own = {site: (f"{folder}/{file}", entry) for site, (file, entry) in plan.copies.items()}
            first = {site: copies.setdefault(site, copy) for site, copy in own.items()}
            if digest_copies(own, upload.files) != digest_copies(first, upload.files):
                problems.add(f"member {shown(name)} has another lm head than those before it")
        if len(problems):
            return Plan()
        try:
            modules, tensors = compose_modules(self.tree, opened)
        except MeshError as error:
            return Plan(unservable=error.message)
        return Plan(
            modules=tuple(modules),
            tensors=tuple(_planned(name, layer, values) for name, (layer, values) in tensors.items()),
            composition={"expression": str(self.tree)},
            copies=copies,
        )


def read_setup(
    raw: Mapping[str, Any], upload: Uploaded, base: BaseFacts, problems: Problems
) -> AdaptersSet | None:
    """Reads `adapter_setup.json` and the config of each member's folder.

    None if there are problems that leave nothing to go on with.
    """
    version = read_version(raw, SETUP.config, problems)
    tree = raw.get("adapter_setup")
    kind = tree.get("type") if isinstance(tree, dict) else None
    if not isinstance(kind, str) or not are_names([kind]):
        problems.add(f"{SETUP.config}: adapter_setup has no type")
        return None
    members = sorted(path for path in upload.files if PurePosixPath(path).name == CONFIG_FILE)
    if not members:
        problems.add(f"{SETUP.config} is there, but no folder of an adapter: upload the whole folder")
    for path in members:
        config = read_config_file(path, upload.files[path], problems)
        if config is not None and not is_written_by_adapters(config):
            problems.add(f"{path} was not written by the 'adapters' library")
    if not version:
        return None
    try:
        found = _read_tree(tree, 0)
    except _NotServed as other:
        reason = f"not served yet: a set-up ({other}) of several adapters; upload the adapters one by one"
        return AdaptersSet(raw, "setup", version, reason)
    if found is None or sum(1 for _ in leaves(found)) > MAX_MEMBERS:
        problems.add(f"{SETUP.config}: adapter_setup is no tree of blocks with up to {MAX_MEMBERS} adapters")
        return None
    _compare_members(found, members, problems)
    weighing = _read_fusions(upload, base, problems)
    _compare_fusions(found, weighing, problems)
    return AdaptersSet(raw, kind.lower(), version, tree=found, fusions=weighing)


def _read_fusions(
    upload: Uploaded, base: BaseFacts, problems: Problems
) -> dict[str, tuple[str, AdapterFusion]]:
    """The fusions of a set-up by the names that they have in its tree, each with its folder."""
    found: dict[str, tuple[str, AdapterFusion]] = {}
    for path in sorted(path for path in upload.files if PurePosixPath(path).name == FUSION.config):
        folder = str(PurePosixPath(path).parent)
        raw = read_config_file(path, upload.files[path], problems)
        read = None if raw is None else read_fusion(raw, _member(upload, folder, FUSION), base, problems)
        if read is None:
            continue
        name = _fusion_name(read.names)
        if name in found:
            problems.add(f"folders {shown(found[name][0])} and {shown(folder)} fuse the same adapters")
        found[name] = folder, read
    return found


def _fusion_name(names: Sequence[str]) -> str:
    """Of a fusion in a tree: no folder, and so no adapter, can have a colon in its name."""
    return f"fusion:{'+'.join(names)}"


def _compare_fusions(
    tree: Composition, found: Mapping[str, tuple[str, AdapterFusion]], problems: Problems
) -> None:
    wanted = {leaf.name for leaf in fusions(tree)}
    for name in sorted(wanted - found.keys()):
        problems.add(
            f"{SETUP.config}: no folder with {FUSION.config} has the {shown(name)}, in this order: "
            f"upload the whole folder that {SETUP.written_by} wrote"
        )
    for name in sorted(found.keys() - wanted):
        problems.add(f"folder {shown(found[name][0])} holds a fusion that the set-up does not name")


class _NotServed(Exception):
    """A block that is served by nothing yet; the text is its type."""


def _read_tree(node: Any, depth: int) -> Composition | None:
    """A block over the members' names; None if it is malformed. Raises _NotServed."""
    kind, children = (node.get("type"), node.get("children")) if isinstance(node, dict) else (None, None)
    if depth > MAX_DEPTH or not isinstance(children, list) or not 0 < len(children) <= MAX_MEMBERS:
        return None
    if kind == "single":
        return Leaf(children[0]) if len(children) == 1 and are_names(children) else None
    if not isinstance(kind, str):
        return None
    if kind not in _BLOCKS:
        raise _NotServed(kind[:40])
    members = [_read_tree(child, depth + 1) for child in children]
    present = [member for member in members if member is not None]
    if len(present) < len(members):
        return None
    if kind == "Fuse":
        names = [member.name for member in present if isinstance(member, Leaf)]
        if len(names) < len(present):
            raise _NotServed("Fuse over other blocks")
        present = [Leaf(_fusion_name(names)), *present]
    if kind == "Average":
        weights = (node.get("kwargs") or {}).get("weights", [1.0] * len(present))
        if not isinstance(weights, list) or len(weights) != len(present):
            return None
        if not all(isinstance(weight, float | int) and 0 < weight <= MAX_WEIGHT for weight in weights):
            raise _NotServed("Average with weights that are not all above 0")
        present = [
            replace(member, weight=float(weight)) for member, weight in zip(present, weights, strict=True)
        ]
    return Group(_BLOCKS[kind], tuple(present))


def _compare_members(tree: Composition, configs: list[str], problems: Problems) -> None:
    names = {leaf.name for leaf in leaves(tree)} - {leaf.name for leaf in fusions(tree)}
    folders = {str(PurePosixPath(path).parent) for path in configs}
    for name in sorted(names - folders):
        problems.add(f"{SETUP.config}: member {shown(name)} has no folder with {CONFIG_FILE}")
    for folder in sorted(folders - names):
        problems.add(f"folder {shown(folder)} holds an adapter that the set-up does not name")


def _member(upload: Uploaded, name: str, layout: Layout) -> Uploaded:
    """A member's folder as an upload of its own."""
    start = f"{name}/"
    return Uploaded(
        files={path[len(start) :]: place for path, place in upload.files.items() if path.startswith(start)},
        layout=layout,
        headers={
            path[len(start) :]: header for path, header in upload.headers.items() if path.startswith(start)
        },
        all_zero=frozenset(),
    )


def _plan_member(name: str, member: Uploaded, sites: SiteMap, base: BaseFacts, problems: Problems) -> Plan:
    raw = read_config_file(CONFIG_FILE, member.files[CONFIG_FILE], problems)
    if ADAPTERS.weights not in member.headers:
        problems.add(f"member {shown(name)} has no {ADAPTERS.weights}")
        return Plan()
    config = None if raw is None else read_config(raw, member, base, problems)
    if config is None:
        return Plan()
    return (
        Plan(unservable=config.unservable)
        if config.unservable
        else config.plan(member, sites, base, problems)
    )


def _plan_fusion(
    folder: str, fusion: AdapterFusion, member: Uploaded, sites: SiteMap, base: BaseFacts, problems: Problems
) -> Plan:
    if FUSION.weights not in member.headers:
        problems.add(f"folder {shown(folder)} has no {FUSION.weights}")
        return Plan()
    return fusion.parts(member, sites, base, problems)


def _values(plan: Plan, member: Uploaded) -> Callable[[str], Floats]:
    """Reads a member's canonical tensors before they are anywhere."""
    tensors = {tensor.spec.name: tensor for tensor in plan.tensors}

    def read(name: str) -> Floats:
        tensor = tensors[name]
        with member.files[member.layout.weights].open("rb") as file:
            data = b"".join(tensor.blocks(file))
        spec = tensor.spec
        entry = TensorEntry(spec.name, spec.dtype, spec.shape, 0, spec.size)
        return to_float32(entry, tensor_view(entry, data))

    return read


def _planned(name: str, layer: int, values: Floats) -> PlannedTensor:
    return PlannedTensor(TensorSpec(name, "F32", values.shape), layer, computed(lambda _: values))
