"""From (tenant, task or ref, cohort key) to a version. Pure: one image in, one answer out.

The share of a route is drawn by weighted rendezvous hashing (Highest Random Weight: each target gets the
score `-weight / ln(u)` with `u` from sha256 over tenant, task, cohort key and target). The same key always
lands on the same share, shares are proportional to weights, and when one target's weight grows, keys move
to that target only.
"""

import hashlib
import math
from collections import Counter
from dataclasses import dataclass

from adaptermesh.artifact.ops import FUSION
from adaptermesh.core.composition import (
    Composition,
    composition_digest,
    fusions,
    is_composition,
    leaves,
    parse_composition,
    renamed,
)
from adaptermesh.core.errors import (
    Code,
    MeshError,
    Reason,
    base_mismatch,
    invalid_field,
    not_found,
    version_deleted,
    version_revoked,
    version_unsigned,
)
from adaptermesh.core.refs import BASE, LATEST, AdapterName, Ref, parse_ref
from adaptermesh.core.version_state import VersionState
from adaptermesh.router.catalogue import CatalogueImage, Reach, Route, RouteTarget, Version

ANY_TENANT = "*"


@dataclass(frozen=True, slots=True)
class Question:
    """What a request asks for: a task, a ref, or neither (the bare base)."""

    tenant: str
    cohort_key: str
    task: str | None = None
    ref: str | None = None
    base_model: str = ""
    reach: Reach | None = None
    """What the tenant may use; None: everything."""


@dataclass(frozen=True, slots=True)
class ComposedVersion:
    """Several versions that act together, seen as one. `resolved` is the composition over digests."""

    composition: Composition
    resolved: Composition
    digest: str
    members: tuple[Version, ...]

    @property
    def base_digest(self) -> str:
        return self.members[0].base_digest

    @property
    def base_model_id(self) -> str:
        return self.members[0].base_model_id

    @property
    def op_kinds(self) -> tuple[str, ...]:
        return tuple(sorted({op for member in self.members for op in member.op_kinds}))

    @property
    def size_bytes(self) -> int:
        return sum(member.size_bytes for member in self.members)

    def __str__(self) -> str:
        return str(self.composition)


@dataclass(frozen=True, slots=True)
class Resolution:
    """What answers it.

    `version` None is the bare base model. `base_digests` are the bases that may serve it; None is any.
    """

    ref: str
    version: Version | ComposedVersion | None
    base_digests: frozenset[str] | None
    route: Route | None = None
    cohort: str = ""

    @property
    def warnings(self) -> tuple[str, ...]:
        """What the caller should know of the versions."""
        version = self.version
        members = version.members if isinstance(version, ComposedVersion) else (version,)
        return tuple(member.warning for member in members if member is not None and member.warning)


def resolve(image: CatalogueImage, question: Question) -> Resolution:
    """Finds the version that a request means.

    Raises:
        MeshError: NOT_FOUND with the name; FAILED_PRECONDITION if the adapter is of another base than the one
            asked for, can't be served, is revoked or not signed as its namespace asks; INVALID_ARGUMENT for a
            malformed task or ref.
    """
    route: Route | None = None
    cohort = ""
    ref = question.ref if question.ref is not None else BASE
    if question.task is not None:
        route = find_route(image, question.tenant, question.task)
        target = choose_target(route, question.tenant, question.cohort_key)
        ref, cohort = target.ref, target.cohort
    asked = _asked_bases(image, question.base_model)
    if ref == BASE:
        return Resolution(ref, None, asked, route, cohort)
    if question.reach is not None and (hidden := _unreached(image, question.reach, ref)):
        if route is not None:
            # Where it leads is not told to who may not go there.
            raise _unknown_task(question.tenant, route.task)
        raise not_found(Reason.ADAPTER_NOT_FOUND, "adapter", str(hidden[0]))
    version = find_composition(image, ref) if is_composition(ref) else _servable(image, ref)
    if asked is not None and version.base_digest not in asked:
        raise base_mismatch(ref, version.base_digest, ", ".join(sorted(asked)))
    return Resolution(ref, version, frozenset((version.base_digest,)), route, cohort)


def find_route(image: CatalogueImage, tenant: str, task: str) -> Route:
    """The tenant's own rule for the task, else the one for every tenant."""
    if not task:
        raise invalid_field("task", "it is empty")
    route = image.routes.get((tenant, task)) or image.routes.get((ANY_TENANT, task))
    if route is None:
        raise _unknown_task(tenant, task)
    return route


def _unknown_task(tenant: str, task: str) -> MeshError:
    error = not_found(Reason.TASK_NOT_FOUND, "task", task)
    error.metadata["tenant"] = tenant
    return error


def choose_target(route: Route, tenant: str, cohort_key: str) -> RouteTarget:
    """The share of the route that the cohort key falls in."""
    open_targets = [(label, target) for label, target in _labelled(route.targets) if target.weight > 0]
    if not open_targets:
        # The store refuses such a route; without this check a max() of nothing would hide the reason.
        raise not_found(Reason.TASK_NOT_FOUND, "an open share of task", route.task)
    if len(open_targets) == 1:
        return open_targets[0][1]
    return max(open_targets, key=lambda item: _score(tenant, route.task, cohort_key, *item))[1]


def find_version(image: CatalogueImage, text: str) -> Version:
    """The version that a ref means now; raises MeshError NOT_FOUND, VERSION_REVOKED, VERSION_UNSIGNED.

    NOT_FOUND has the reason VERSION_DELETED for one that was removed.
    """
    ref = parse_ref(text)
    versions = image.versions.get(ref.adapter, {})
    if ref.adapter not in image.versions and ref.adapter not in image.removed:
        raise not_found(Reason.ADAPTER_NOT_FOUND, "adapter", str(ref.adapter))
    if ref.version is not None:
        found = versions.get(ref.version)
    elif ref.digest is not None:
        found = image.by_digest.get(ref.digest)
    else:
        found = _aliased(image, ref, text)
    if found is None or found.adapter != ref.adapter:
        raise _gone(image, ref, text)
    if found.state is VersionState.REVOKED:
        raise version_revoked(text, str(found), found.digest, found.state_reason)
    if not image.is_signed_enough(found):
        raise version_unsigned(text, str(found), found.digest, found.adapter.namespace)
    return found


def find_composition(image: CatalogueImage, text: str) -> ComposedVersion:
    """The versions that a composition of refs means now.

    Raises:
        MeshError: as `resolve` does for each of its refs; FAILED_PRECONDITION (BASE_MISMATCH) for members of
            different bases.
    """
    asked = parse_composition(text)
    weighing = {leaf.name for leaf in fusions(asked)}
    found = {
        leaf.name: _fusion(image, leaf.name) if leaf.name in weighing else _servable(image, leaf.name)
        for leaf in leaves(asked)
    }
    first = found[next(leaves(asked)).name]
    for name, version in found.items():
        if version.base_digest != first.base_digest:
            raise base_mismatch(name, version.base_digest, first.base_digest)
    resolved = renamed(asked, lambda name: found[name].digest)
    return ComposedVersion(
        composition=renamed(asked, lambda name: str(found[name])),
        resolved=resolved,
        digest=composition_digest(resolved),
        members=tuple({version.digest: version for version in found.values()}.values()),
    )


def _unreached(image: CatalogueImage, reach: Reach, ref: str) -> list[AdapterName]:
    """What a tenant may not use of all that a ref or a composition names: it is as if it weren't there."""
    names = [leaf.name for leaf in leaves(parse_composition(ref))] if is_composition(ref) else [ref]
    adapters = [parse_ref(name).adapter for name in names]
    return [adapter for adapter in adapters if not image.may_use(reach, adapter)]


def _servable(image: CatalogueImage, ref: str) -> Version:
    version = find_version(image, ref)
    if not version.servable:
        raise _unsupported(ref, version)
    return version


def _fusion(image: CatalogueImage, ref: str) -> Version:
    """What stands first in a fuse: it is never served by itself."""
    version = find_version(image, ref)
    if version.op_kinds != (FUSION,):
        raise MeshError(
            Code.FAILED_PRECONDITION,
            Reason.ADAPTER_UNSUPPORTED,
            f"'{ref}' ({version}) is no fusion: name first in a fuse what save_adapter_fusion wrote, then "
            "the adapters that it weighs",
            metadata={"ref": ref, "version": str(version), "digest": version.digest},
        )
    return version


def _gone(image: CatalogueImage, ref: Ref, text: str) -> MeshError:
    """The refusal of a version that isn't there: whether it ever was."""
    graves = image.removed.get(ref.adapter, {}).values()
    for grave in graves:
        if ref.alias is None and (grave.number == ref.version or grave.digest == ref.digest):
            return version_deleted(
                text, str(grave), grave.digest, time=grave.time, actor=grave.actor, why=grave.reason
            )
    return not_found(Reason.VERSION_NOT_FOUND, "version", str(ref))


def _aliased(image: CatalogueImage, ref: Ref, text: str) -> Version | None:
    alias = image.aliases.get((ref.adapter, ref.alias or LATEST))
    if alias is not None:
        return image.by_digest.get(alias.digest)
    if "@" in text:
        raise not_found(Reason.ALIAS_NOT_FOUND, "alias", str(ref))
    raise _latest_not_set(ref.adapter, text)


def _latest_not_set(adapter: AdapterName, text: str) -> MeshError:
    return MeshError(
        Code.NOT_FOUND,
        Reason.ALIAS_NOT_FOUND,
        f"'{text}' stands for the alias '{adapter}@{LATEST}', which nobody has set; uploads do not move it: "
        f"set it, or name a version such as '{adapter}:v1'",
        metadata={"name": f"{adapter}@{LATEST}"},
    )


def _asked_bases(image: CatalogueImage, base_model: str) -> frozenset[str] | None:
    if not base_model:
        return None
    digests = image.base_digests(base_model)
    if not digests:
        raise not_found(Reason.BASE_NOT_FOUND, "base model", base_model)
    return digests


def _unsupported(ref: str, version: Version) -> MeshError:
    reason = version.unservable_reason or "its kind can't be served"
    return MeshError(
        Code.FAILED_PRECONDITION,
        Reason.ADAPTER_UNSUPPORTED,
        f"adapter '{ref}' ({version}) is stored but can't be served: {reason}",
        metadata={"ref": ref, "version": str(version), "digest": version.digest, "why": reason},
    )


def _labelled(targets: tuple[RouteTarget, ...]) -> list[tuple[str, RouteTarget]]:
    """Each target with a name that stays when another target is added, dropped or re-weighted."""
    seen: Counter[str] = Counter()
    labelled = []
    for target in targets:
        labelled.append((f"{target.cohort}\x00{seen[target.cohort]}", target))
        seen[target.cohort] += 1
    return labelled


def _score(tenant: str, task: str, cohort_key: str, label: str, target: RouteTarget) -> float:
    """`-weight / ln(u)`. Source: Schindelhauer, Schomaker, "Weighted distributed hash tables", SPAA 2005."""
    text = "\x00".join((tenant, task, cohort_key, label))
    point = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) >> 12
    # 52 bits and a half: strictly between 0 and 1, and exact in a float.
    return -target.weight / math.log((point + 0.5) / 2**52)
