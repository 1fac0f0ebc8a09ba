"""What stands beside a method's own tensors in a file of peft, whichever the method.

Modules saved whole (`modules_to_save`), trained biases (`bias`), trained rows of the vocabulary
(`trainable_token_indices`, `TRAINABLE_TOKENS`), and copies of the base's embeddings, which peft saves beside
an adapter that targets them.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from adaptermesh.artifact.manifest_parts import TensorEntry
from adaptermesh.artifact.peft_models import PREFIX, LoraConfig, TargetConfig, TokensConfig
from adaptermesh.artifact.peft_targets import Targets
from adaptermesh.artifact.pieces import token_rows
from adaptermesh.artifact.plan import Entries, Piece, check_entry
from adaptermesh.artifact.problems import Problems, shown
from adaptermesh.artifact.replaced import Replaced, replaced_pieces
from adaptermesh.artifact.sites import EDGES, EMBED, HEAD, SiteMap

_ROWS = ".trainable_tokens_delta"
_WRAPPED = ".base_layer"
_SAVED, _ORIGINAL = ".modules_to_save", ".original_module"


@dataclass(slots=True)
class Beside:
    """The tensors that are not the method's, by what they are.

    Attributes:
        own: The others, which the method reads.
        replaced: Weight and bias by the module's path.
        rows: Of an edge's tokens, by the site.
        copies: Of the base's weight of an edge, by the site.
        unknown: Modules that the config replaces and nothing here can.
    """

    own: dict[str, TensorEntry] = field(default_factory=dict)
    replaced: dict[str, dict[str, TensorEntry]] = field(default_factory=dict)
    rows: dict[str, TensorEntry] = field(default_factory=dict)
    copies: dict[str, TensorEntry] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.replaced or self.rows)


def split(config: TargetConfig, targets: Targets, tensors: Entries, sites: SiteMap) -> Beside:
    """Gives each tensor to what it is; nothing is checked yet."""
    found = Beside()
    edges = {site.module: name for name, site in sites.edges.items()}
    for name, entry in tensors.items():
        if not name.startswith(PREFIX):
            found.own[name] = entry
            continue
        path, _, slot = name.removeprefix(PREFIX).rpartition(".")
        base_path = path.removesuffix(_WRAPPED)
        if slot == "bias" and path.endswith((_SAVED, _ORIGINAL)) and targets.is_saved(path):
            # With bias="all" peft writes the biases of a saved module three times: by its own name, as the
            # module that is saved, and as the one that it hides.
            continue
        if name.endswith(_ROWS) and path.removesuffix(".token_adapter") in edges:
            found.rows[edges[path.removesuffix(".token_adapter")]] = entry
        elif path != base_path and slot == "weight" and base_path in edges and base_path in targets.modules:
            found.copies[edges[base_path]] = entry
        elif slot in ("weight", "bias") and _is_replaced(config, targets, sites, path, slot):
            if sites.parts(base_path) is None and sites.norm_at(base_path) is None:
                found.unknown.append(base_path)
            found.replaced.setdefault(base_path, {})[slot] = entry
        else:
            found.own[name] = entry
    return found


def _is_replaced(config: TargetConfig, targets: Targets, sites: SiteMap, path: str, slot: str) -> bool:
    """Whether the config says that this tensor is one of the base's that was trained."""
    base_path = path.removesuffix(_WRAPPED)
    if path != base_path:
        return slot == "bias" and config.bias != "none" and base_path in targets.modules
    if targets.is_saved(path):
        return True
    is_known = sites.parts(path) is not None or sites.norm_at(path) is not None
    return slot == "bias" and config.bias == "all" and is_known


def check(
    found: Beside,
    config: TargetConfig,
    targets: Targets,
    sites: SiteMap,
    base_name: str,
    problems: Problems,
) -> str:
    """Notes what is wrong, and gives why it can't be served; empty if it can."""
    for module, entries in found.replaced.items():
        if module not in found.unknown:
            _check_replaced(module, entries, sites, base_name, problems)
    _check_presence(found, config, targets, sites, problems)
    for name, entry in found.copies.items():
        site = sites.edges[name]
        shape = (sites.edges[EMBED].in_features, sites.hidden_size)
        why = f"a copy of the weight of {site.module} of {base_name}, whose vocabulary must not be changed"
        check_entry(entry, shape, why, problems)
    ids = _token_ids(config, found, targets, sites, problems)
    for name, entry in found.rows.items():
        count = len(ids.get(name, ()))
        why = f"{count} trained tokens from the config, {sites.hidden_size} wide"
        check_entry(entry, (count, sites.hidden_size), why, problems)
    return _why_unservable(found, config, targets, sites)


def pieces(found: Beside, config: TargetConfig, targets: Targets, sites: SiteMap) -> Iterator[Piece]:
    """The ops of what was checked."""
    for module, entries in found.replaced.items():
        yield from replaced_pieces(Replaced(module, entries.get("weight"), entries.get("bias")), sites)
    ids = _token_ids(config, found, targets, sites, Problems())
    for name, entry in found.rows.items():
        yield token_rows(name, sites.layer_of(name), ids[name], entry)


def _check_replaced(
    module: str, entries: Mapping[str, TensorEntry], sites: SiteMap, base_name: str, problems: Problems
) -> None:
    place = sites.parts(module)
    if place is None:
        shapes: dict[str, tuple[int, ...]] = dict.fromkeys(("weight", "bias"), (sites.hidden_size,))
    else:
        parts, layer = place
        if layer >= sites.num_layers:
            problems.add(
                f"module {shown(module)} is in layer {layer}, "
                f"but {base_name} has layers 0 to {sites.num_layers - 1}"
            )
            return
        inputs, outputs = parts[0].in_features, sum(site.out_features for site in parts)
        turned = parts[0].transposed or parts[0].name == EMBED
        shapes = {"weight": (inputs, outputs) if turned else (outputs, inputs), "bias": (outputs,)}
    for slot, entry in entries.items():
        check_entry(entry, shapes[slot], f"the shape that {shown(module)} has in {base_name}", problems)


def _check_presence(
    found: Beside, config: TargetConfig, targets: Targets, sites: SiteMap, problems: Problems
) -> None:
    """A file that lacks a tensor would answer with the base's there."""
    paths = [*sites.module_paths(), *(site.module for site in sites.edges.values()), *sites.norm_paths()]
    for module in paths:
        given = found.replaced.get(module, {})
        saved = targets.is_saved(module)
        trained = saved or config.bias == "all" or (config.bias != "none" and module in targets.modules)
        if saved and "weight" not in given:
            problems.add(f"module {shown(module)} is in modules_to_save, but the file has no weight of it")
        if trained and sites.has_bias(module) and "bias" not in given:
            problems.add(f"the bias of {shown(module)} is trained by the config, but the file has none of it")
        if "bias" in given and not sites.has_bias(module):
            problems.add(f"the file has a bias of {shown(module)}, which has none in the base")


def _token_ids(
    config: TargetConfig, found: Beside, targets: Targets, sites: SiteMap, problems: Problems
) -> dict[str, tuple[int, ...]]:
    """The trained tokens of each edge that has rows, in the order of the rows."""
    ids: dict[str, tuple[int, ...]] = {}
    given = config.trainable_token_indices if isinstance(config, LoraConfig) else None
    if isinstance(config, TokensConfig):
        chosen = [name for name, site in sites.edges.items() if site.module in targets.modules]
        ids = dict.fromkeys(chosen or [EMBED], tuple(config.token_indices))
    elif isinstance(given, dict):
        for key, chosen_ids in given.items():
            edge = next((name for name, site in sites.edges.items() if _ends(site.module, key)), None)
            if edge is None:
                problems.add(
                    f"adapter_config.json: trainable_token_indices names {shown(key)}, which is neither the "
                    "embeddings nor the head of the base"
                )
            else:
                ids[edge] = tuple(chosen_ids)
    elif given is not None:
        ids = {EMBED: tuple(given)}
    for tokens in ids.values():
        _check_tokens(tokens, sites, problems)
    if sites.tied and EMBED in ids and EMBED in found.rows:
        # A tied head takes the rows of the embeddings, whether the file has them once or twice.
        ids[HEAD] = ids[EMBED]
        found.rows.setdefault(HEAD, found.rows[EMBED])
    for edge in ids:
        if edge not in found.rows:
            problems.add(f"the config has trained tokens of {sites.edges[edge].module}, the file has no rows")
    for edge in found.rows:
        if edge not in ids:
            problems.add(
                f"tensor {shown(found.rows[edge].name)} is not expected: the config trains no tokens there"
            )
    return ids


def _check_tokens(tokens: tuple[int, ...], sites: SiteMap, problems: Problems) -> None:
    vocabulary = sites.edges[EMBED].in_features
    if not tokens or len(set(tokens)) < len(tokens):
        problems.add("adapter_config.json: the trained tokens are none, or one of them is there twice")
    for token in tokens:
        if token >= vocabulary:
            problems.add(
                f"adapter_config.json: token {token} is trained, the base has tokens 0 to {vocabulary - 1}"
            )
            return


def _why_unservable(found: Beside, config: TargetConfig, targets: Targets, sites: SiteMap) -> str:
    if found.unknown:
        return f"not served: it replaces {', '.join(found.unknown[:8])}, which nothing here can"
    changed = {*found.replaced, *(() if isinstance(config, TokensConfig) else targets.modules)}
    twice = [name for name in EDGES if name in found.rows and sites.edges[name].module in changed]
    if twice:
        return f"not served: it trains rows of {sites.edges[twice[0]].module} and changes all of them as well"
    if isinstance(config, LoraConfig) and config.invocation_tokens and found:
        return "not served: an activated LoRA beside modules, biases or tokens that act from the start"
    return ""


def _ends(path: str, key: str) -> bool:
    return path == key or path.endswith(f".{key}")
