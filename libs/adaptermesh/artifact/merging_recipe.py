"""How a version was merged from others: method, members and weights, as its manifest keeps them."""

import enum
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from pydantic import ConfigDict, TypeAdapter, ValidationError

from adaptermesh.core.digests import canonical_json, is_digest
from adaptermesh.core.errors import invalid_field

MAX_PARENTS = 32
MAX_RECIPE_BYTES = 16 * 1024
MAX_WEIGHT = 1e6
MAX_MERGE_RANK = 4096
MAX_SEED = 2**32 - 1

_FIELD = "merge_recipe"


class MergeMethod(enum.StrEnum):
    """The ways to merge; `artifact/merging.py` says what each one computes."""

    LINEAR = "linear"
    AVERAGE = "average"
    SVD = "svd"
    TIES = "ties"
    DARE = "dare"

    @property
    def numbers(self) -> tuple[str, ...]:
        """The numbers that it takes beside the weights; each of them is needed."""
        return _NUMBERS[self]


_NUMBERS: Mapping[MergeMethod, tuple[str, ...]] = {
    MergeMethod.LINEAR: (),
    MergeMethod.AVERAGE: (),
    MergeMethod.SVD: ("rank",),
    MergeMethod.TIES: ("rank", "density"),
    MergeMethod.DARE: ("rank", "density", "seed"),
}

_WANTED: Mapping[str, str] = {
    "rank": f"a rank in [1, {MAX_MERGE_RANK}]: the largest that the result may have at a module",
    "density": "a density in (0, 1]: the share of each delta's entries to keep",
    "seed": f"a seed in [0, {MAX_SEED}]: it decides which entries are dropped",
}


@dataclass(frozen=True, slots=True)
class MergeMember:
    """One version that took part, and its weight: finite and not zero."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    digest: str
    weight: float


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeRecipe:
    """Everything that the result depends on beside the members' bytes. Weights stand as they were given."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    method: MergeMethod
    members: tuple[MergeMember, ...]
    rank: int | None = None
    """Upper bound of the result's rank at each module, [1, 4096]."""
    density: float | None = None
    """The share of each delta's entries that is kept, (0, 1]."""
    seed: int | None = None
    """What decides which entries are dropped, [0, 2^32)."""

    def check(self) -> "MergeRecipe":
        """Returns the recipe if it is one that can be followed.

        Raises:
            MeshError: INVALID_ARGUMENT (INVALID_FIELD) with what is wrong.
        """
        self._check_members()
        for name in ("rank", "density", "seed"):
            given = getattr(self, name) is not None
            if given and name not in self.method.numbers:
                raise invalid_field(name, f"{self.method} takes no {name}: leave it out")
            if not given and name in self.method.numbers:
                raise invalid_field(name, f"{self.method} needs {_WANTED[name]}")
        if self.rank is not None and not 1 <= self.rank <= MAX_MERGE_RANK:
            raise invalid_field("rank", f"{self.rank} is not in [1, {MAX_MERGE_RANK}]")
        if self.density is not None and not 0 < self.density <= 1:
            raise invalid_field("density", f"{self.density:g} is not in (0, 1]")
        if self.seed is not None and not 0 <= self.seed <= MAX_SEED:
            raise invalid_field("seed", f"{self.seed} is not in [0, {MAX_SEED}]")
        return self

    def _check_members(self) -> None:
        if not 1 <= len(self.members) <= MAX_PARENTS:
            raise invalid_field("members", f"are {len(self.members)}, a merge takes 1 to {MAX_PARENTS}")
        _check_digests("members", [member.digest for member in self.members])
        for member in self.members:
            weight = member.weight
            if not math.isfinite(weight) or not 0 < abs(weight) <= MAX_WEIGHT:
                raise invalid_field("weight", f"{weight:g} is not a number other than 0 up to {MAX_WEIGHT:g}")
            if self.method is MergeMethod.AVERAGE and weight < 0:
                raise invalid_field("weight", f"{weight:g} is negative: an average takes none, linear does")

    @property
    def weights(self) -> tuple[float, ...]:
        """What each member's delta is multiplied by: of an average, its share in the sum of all weights."""
        given = tuple(member.weight for member in self.members)
        if self.method is not MergeMethod.AVERAGE:
            return given
        total = math.fsum(given)
        return tuple(weight / total for weight in given)

    def to_json(self) -> dict[str, Any]:
        """As it stands in a manifest."""
        return {
            "method": self.method.value,
            "members": [{"digest": member.digest, "weight": float(member.weight)} for member in self.members],
            "rank": self.rank,
            "density": None if self.density is None else float(self.density),
            "seed": self.seed,
        }

    @classmethod
    def from_json(cls, data: str | bytes) -> "MergeRecipe":
        """Reads and checks a recipe.

        Raises:
            MeshError: INVALID_ARGUMENT (INVALID_FIELD) with what is wrong.
        """
        size = len(data.encode(errors="replace") if isinstance(data, str) else data)
        if size > MAX_RECIPE_BYTES:
            raise invalid_field(_FIELD, f"has {size} bytes, at most {MAX_RECIPE_BYTES} are allowed")
        try:
            recipe = _ADAPTER.validate_json(data, strict=True)
        except ValidationError as error:
            first = error.errors(include_url=False, include_context=False, include_input=False)[0]
            where = ".".join(str(part)[:40] for part in first["loc"][:4])
            raise invalid_field(_FIELD, f"{where}: {first['msg'][:200]}") from None
        return recipe.check()


_ADAPTER = TypeAdapter(MergeRecipe)


def check_lineage(parents: Sequence[str], recipe: MergeRecipe | None) -> None:
    """Checks what an upload says it was made from.

    Raises:
        MeshError: INVALID_ARGUMENT (INVALID_FIELD).
    """
    if len(parents) > MAX_PARENTS:
        raise invalid_field("parents", f"are {len(parents)}, at most {MAX_PARENTS} are allowed")
    _check_digests("parents", parents)
    if recipe is None:
        return
    recipe.check()
    for member in recipe.members:
        if member.digest not in parents:
            raise invalid_field(_FIELD, f"its member {member.digest} is none of the parents")


def check_kept_recipe(parents: Sequence[str], value: Mapping[str, Any] | None) -> None:
    """Checks a manifest's parents and recipe, the latter in the one spelling that `to_json` gives.

    Raises:
        MeshError: INVALID_ARGUMENT (INVALID_FIELD).
    """
    if value is None:
        check_lineage(parents, None)
        return
    data = canonical_json(value)
    recipe = MergeRecipe.from_json(data)
    if canonical_json(recipe.to_json()) != data:
        raise invalid_field(_FIELD, "is not in its canonical spelling")
    check_lineage(parents, recipe)


def recipe_of(
    method: MergeMethod,
    members: Iterable[tuple[str, float]],
    *,
    rank: int | None = None,
    density: float | None = None,
    seed: int | None = None,
) -> MergeRecipe:
    """The recipe for members given by digest and weight; a weight of zero drops its member.

    Raises:
        MeshError: INVALID_ARGUMENT (INVALID_FIELD).
    """
    kept = tuple(MergeMember(digest, weight) for digest, weight in members if weight != 0)
    if not kept:
        raise invalid_field("members", "are none, or all have weight 0: there is nothing to merge")
    return MergeRecipe(method=method, members=kept, rank=rank, density=density, seed=seed).check()


def _check_digests(field: str, digests: Sequence[str]) -> None:
    seen: set[str] = set()
    for digest in digests:
        if not is_digest(digest):
            raise invalid_field(field, f"{digest[:80]!r} is not a digest: give sha256:<64 hex digits>")
        if digest in seen:
            raise invalid_field(field, f"{digest} is there twice; give it once")
        seen.add(digest)
