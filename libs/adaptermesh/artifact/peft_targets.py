"""Which modules a peft config means, and with which rank and alpha, as peft itself decides it."""

from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

from adaptermesh.artifact.patterns import Budget, Matcher, PatternError, full_matcher, suffix_matcher
from adaptermesh.artifact.peft_models import LoraConfig, RankedConfig, TargetConfig
from adaptermesh.artifact.problems import Problems
from adaptermesh.artifact.sites import EDGES, EMBED, HEAD, SiteMap

_Value = TypeVar("_Value", int, float)

ALL_LINEAR = "all-linear"


class Targets:
    """A config's choice among the modules of one base.

    `modules` are the targeted modules that hold sites, in order; `others` the targeted real modules that are
    no site. A module that is saved whole is not targeted. Patterns that can't be matched safely are noted as
    problems.
    """

    def __init__(self, config: TargetConfig, sites: SiteMap, problems: Problems) -> None:
        self._config = config
        self._sites = sites
        budget = Budget()
        self.modules: tuple[str, ...] = ()
        self.others: tuple[str, ...] = ()
        self._ranks: dict[str, int] = {}
        self._alphas: dict[str, float] = {}
        key = "target_modules"
        try:
            wanted = self._wanted(sites, budget)
            layered = [path for path in sites.module_paths() if wanted(path)]
            # peft's "all-linear" leaves out the output layer and the embedding.
            before, after = ([], []) if _is_all_linear(config.target_modules) else self._edges(wanted)
            self.modules = (*before, *layered, *after)
            if not _is_all_linear(config.target_modules):
                self.others = tuple(path for path in sites.other_modules if wanted(path))
            if isinstance(config, RankedConfig):
                key = "rank_pattern"
                self._ranks = _first_matches(config.rank_pattern, self.modules, budget)
                key = "alpha_pattern"
                self._alphas = _first_matches(config.alpha_pattern, self.modules, budget)
        except PatternError as error:
            problems.add(f"adapter_config.json: {key}: {error}; use plain module names or paths")

    @property
    def widest(self) -> tuple[int, int]:
        """The most inputs and the most outputs of a targeted module; 0 without one."""
        found = [place[0] for module in self.modules if (place := self._sites.parts(module))]
        return (
            max((parts[0].in_features for parts in found), default=0),
            max((sum(site.out_features for site in parts) for parts in found), default=0),
        )

    def is_saved(self, path: str) -> bool:
        """Whether a module, or one that it is in, is saved whole: as peft matches, by the end of its path."""
        names = self._config.modules_to_save
        if not names:
            return False
        if self._is_tied and path == self._sites.edges[HEAD].module:
            path = self._sites.edges[EMBED].module
        parts = path.split(".")
        above = [".".join(parts[: end + 1]) for end in range(len(parts))]
        return any(one.endswith(tuple(names)) for one in above)

    def rank(self, module: str) -> int:
        """The rank of a module."""
        return self._ranks.get(module, self._ranked().r)

    def alpha(self, module: str) -> float:
        """The alpha of a module."""
        return self._alphas.get(module, self._ranked().alpha)

    def scale(self, module: str) -> float:
        """What B A x is multiplied by: alpha/r, or alpha/sqrt(r) with rsLoRA."""
        rank = self.rank(module)
        root = isinstance(self._config, LoraConfig) and self._config.use_rslora
        return float(self.alpha(module) / (rank**0.5 if root else rank))

    def _ranked(self) -> RankedConfig:
        if not isinstance(self._config, RankedConfig):
            raise TypeError(f"{type(self._config).__name__} gives its modules no ranks")
        return self._config

    @property
    def _is_tied(self) -> bool:
        """Whether the head follows whatever is done to the embeddings."""
        config = self._config
        return self._sites.tied and isinstance(config, LoraConfig) and config.ensure_weight_tying

    def _edges(self, wanted: Matcher) -> tuple[list[str], list[str]]:
        """The targeted ones of the modules before the layers and after them."""
        found = {name: site.module for name, site in self._sites.edges.items() if wanted(site.module)}
        if self._is_tied and EMBED in found:
            found[HEAD] = self._sites.edges[HEAD].module
        before, after = ([found[name]] if name in found else [] for name in EDGES)
        return before, after

    def _wanted(self, sites: SiteMap, budget: Budget) -> Matcher:
        config = self._config
        included = _choice(config.target_modules, budget)
        excluded = _choice(config.exclude_modules, budget) if config.exclude_modules else None
        layers = config.layers_to_transform
        chosen = {layers} if isinstance(layers, int) else set(layers or ())
        pattern_fits = self._layer_pattern_fits(sites, budget)

        def wanted(path: str) -> bool:
            if (excluded is not None and excluded(path)) or not included(path) or self.is_saved(path):
                return False
            if not chosen or isinstance(config.target_modules, str):
                return True
            found = sites.parts(path) if sites.within_layer(path) else None
            return found is not None and pattern_fits and found[1] in chosen

        return wanted

    def _layer_pattern_fits(self, sites: SiteMap, budget: Budget) -> bool:
        """Whether the layers' own path, e.g. `model.layers`, is one that `layers_pattern` means."""
        patterns = self._config.layers_pattern
        if not patterns:
            return True
        stem = sites.layer_path.removesuffix(".{layer}")
        named = [patterns] if isinstance(patterns, str) else patterns
        return any(suffix_matcher(pattern, budget)(stem) for pattern in named)


def _is_all_linear(names: str | Sequence[str]) -> bool:
    return isinstance(names, str) and names.lower() == ALL_LINEAR


def _choice(names: str | Sequence[str], budget: Budget) -> Matcher:
    """As peft matches: a text is a pattern for the whole path, a list holds paths or their ends."""
    if _is_all_linear(names):
        return lambda _: True
    if isinstance(names, str):
        return full_matcher(names, budget)
    exact = frozenset(names)

    def matches(path: str) -> bool:
        parts = path.split(".")
        return any(".".join(parts[start:]) in exact for start in range(len(parts)))

    return matches


def _first_matches(
    patterns: Mapping[str, _Value], modules: Iterable[str], budget: Budget
) -> dict[str, _Value]:
    matchers = [(suffix_matcher(pattern, budget), value) for pattern, value in patterns.items()]
    result: dict[str, _Value] = {}
    for module in modules:
        for matcher, value in matchers:
            if matcher(module):
                result[module] = value
                break
    return result
