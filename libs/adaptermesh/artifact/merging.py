"""Merging adapters of one base into one LoRA, offline, a module at a time.

A module is one of the base's linear modules; a fused one (GPT-2's `c_attn`, Phi-3's `qkv_proj`) is one module
with all of its sites. A member without a delta at a module takes no part there, as if it were zero. With
delta_i = scale_i B_i A_i and the weights w_i, the methods are:

- `linear`: sum of w_i delta_i, exactly: the ranks add up. Weights may be negative.
- `average`: `linear` with the weights divided by their sum, over all members, wherever they act.
- `svd`: the sum of w_i delta_i, cut to a rank by its largest singular values.
- `ties`: `merging_arithmetic.ties` of the dense deltas (arXiv:2306.01708), cut to a rank.
- `dare`: `merging_arithmetic.dare` of the dense deltas (arXiv:2311.03099), cut to a rank.

The result is float32, in the form of peft: what merges is published like anything else, and peft can load it.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from adaptermesh.artifact.base_facts import BaseFacts
from adaptermesh.artifact.merging_arithmetic import (
    Floats,
    LowRank,
    Part,
    concatenated,
    cut,
    cut_sum,
    dare,
    ties,
)
from adaptermesh.artifact.merging_folder import MergedModule, write_card, write_config, write_weights
from adaptermesh.artifact.merging_members import Member, OpenMember, check_members, opened
from adaptermesh.artifact.merging_recipe import MergeMethod, MergeRecipe
from adaptermesh.artifact.peft_models import MAX_RANK
from adaptermesh.artifact.sites import Site, SiteMap, site_map
from adaptermesh.core.errors import invalid_field

OnModule = Callable[[int, int], None]
"""Hears how many modules are done, and of how many."""


def _unheard(done: int, of: int) -> None:
    del done, of


@dataclass(frozen=True, slots=True)
class MergeReport:
    """What a merge gave.

    `kept` is the share of the squared Frobenius norm that cutting to the rank left, over all modules
    together; `least_kept` that of the module which lost most. Both are 1 where nothing was cut.
    """

    modules: int
    max_rank: int
    kept: float
    least_kept: float
    least_kept_module: str


@dataclass(frozen=True, slots=True)
class _Planned:
    """A module of the result and where it is in the base."""

    module: MergedModule
    sites: tuple[Site, ...]
    layer: int


def merge(
    members: Sequence[Member],
    recipe: MergeRecipe,
    base: BaseFacts,
    folder: Path,
    on_module: OnModule = _unheard,
) -> MergeReport:
    """Merges `members`, which are those of the recipe, into a peft folder.

    Takes long for dense methods on a large base; call it from a thread. Memory is bounded by a few dense
    copies of the largest module.

    Raises:
        MeshError: INVALID_ARGUMENT (INVALID_FIELD) for a recipe that can't be followed; FAILED_PRECONDITION
            (BASE_MISMATCH or ADAPTER_UNSUPPORTED) for a member that can't be merged, with the reason.
    """
    recipe.check()
    named = {member.digest: member for member in members}
    weighted = [
        (named[member.digest], weight) for member, weight in zip(recipe.members, recipe.weights, strict=True)
    ]
    sites = site_map(base)
    check_members([member for member, _ in weighted], base.digest, sites)
    norms = _Norms()
    with opened(weighted) as open_members:
        planned = [
            plan for path in sites.module_paths() if (plan := _plan(path, open_members, recipe, sites))
        ]
        modules = [plan.module for plan in planned]
        folder.mkdir(parents=True, exist_ok=True)

        def factors() -> Iterator[tuple[Floats, Floats]]:
            for done, plan in enumerate(planned, start=1):
                merged = _merged(plan, open_members, recipe)
                norms.add(plan.module.path, merged)
                yield merged.a, merged.b
                on_module(done, len(planned))

        write_weights(folder, modules, factors())
    fan_in_fan_out = any(site.transposed for site in sites.sites)
    write_config(folder, modules, base.digest, fan_in_fan_out=fan_in_fan_out)
    names = {digest: f"{one.manifest.namespace}/{one.manifest.name}" for digest, one in named.items()}
    write_card(folder, recipe, names)
    return norms.report(len(modules), max(module.rank for module in modules))


def _plan(path: str, members: Sequence[OpenMember], recipe: MergeRecipe, sites: SiteMap) -> _Planned | None:
    """A module of the result with its rank; None where no member acts."""
    place = sites.parts(path)
    if place is None:
        return None
    parts, layer = place
    total = sum(member.rank(parts, layer) for member in members)
    if total == 0:
        return None
    width_in, width_out = parts[0].in_features, sum(site.out_features for site in parts)
    rank = total
    if recipe.rank is None and total > MAX_RANK:
        raise invalid_field(
            "members",
            f"have ranks that add up to {total} at {path}, over {MAX_RANK}: use svd with a rank",
        )
    if recipe.rank is not None:
        rank = min(recipe.rank, width_in, width_out)
        if recipe.method is MergeMethod.SVD:
            # No sum of deltas has more than the sum of their ranks.
            rank = min(rank, total)
    return _Planned(MergedModule(path, rank, width_in, width_out), parts, layer)


def _merged(plan: _Planned, members: Sequence[OpenMember], recipe: MergeRecipe) -> LowRank:
    found = (member.part(plan.sites, plan.layer) for member in members)
    parts: list[Part] = [part for part in found if part is not None]
    rank = plan.module.rank
    if recipe.method is MergeMethod.SVD:
        return cut_sum(parts, rank)
    if recipe.method is MergeMethod.TIES and recipe.density is not None:
        return cut(ties(parts, recipe.density), rank)
    if recipe.method is MergeMethod.DARE and recipe.density is not None and recipe.seed is not None:
        return cut(dare(parts, recipe.density, recipe.seed, plan.module.path), rank)
    return concatenated(parts)


class _Norms:
    """Adds up what cutting left of each module."""

    def __init__(self) -> None:
        self._kept = 0.0
        self._total = 0.0
        self._least = 1.0
        self._least_module = ""

    def add(self, module: str, merged: LowRank) -> None:
        self._kept += merged.kept
        self._total += merged.total
        share = _share(merged.kept, merged.total)
        if share < self._least or not self._least_module:
            self._least, self._least_module = share, module

    def report(self, modules: int, max_rank: int) -> MergeReport:
        return MergeReport(
            modules, max_rank, _share(self._kept, self._total), self._least, self._least_module
        )


def _share(kept: float, total: float) -> float:
    """1 for nothing out of nothing."""
    return min(1.0, kept / total) if total > 0 else 1.0
