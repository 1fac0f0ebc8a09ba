"""What the store publishes, in memory: bases, versions, aliases, routes, policies, and who may use what.

One event loop owns a catalogue. A snapshot replaces it in one assignment and each change is applied in one
call without awaiting, so a resolution sees the catalogue as of exactly one position.
"""

import asyncio
from dataclasses import dataclass, field

from adaptermesh.core.policy_scope import tenant_scope
from adaptermesh.core.refs import AdapterName
from adaptermesh.core.roles import DEFAULT_TENANT, MESH_TENANT
from adaptermesh.core.signature_policy import SignaturePolicy
from adaptermesh.core.version_state import VersionState


@dataclass(frozen=True, slots=True)
class BaseModel:
    """A base model that the store knows."""

    model_id: str
    digest: str


@dataclass(frozen=True, slots=True)
class Version:
    """One immutable upload and its status; `published` is the store's message, handed on unread."""

    adapter: AdapterName
    number: int
    digest: str
    base_digest: str
    base_model_id: str
    op_kinds: tuple[str, ...] = ()
    size_bytes: int = 0
    servable: bool = True
    unservable_reason: str = ""
    state: VersionState = VersionState.ACTIVE
    state_reason: str = ""
    replacement: str = ""
    signing_key_ids: tuple[str, ...] = ()
    published: bytes = b""

    def __str__(self) -> str:
        return f"{self.adapter}:v{self.number}"

    @property
    def warning(self) -> str:
        """What whoever uses it should know; empty unless it is deprecated."""
        if self.state is not VersionState.DEPRECATED:
            return ""
        why = f": {self.state_reason}" if self.state_reason else ""
        return f"{self} is deprecated{why}" + (f"; use {self.replacement}" if self.replacement else "")


@dataclass(frozen=True, slots=True)
class VersionRemoved:
    """A version is gone; `time` is RFC 3339."""

    adapter: AdapterName
    number: int
    digest: str
    time: str = ""
    actor: str = ""
    reason: str = ""

    def __str__(self) -> str:
        return f"{self.adapter}:v{self.number}"


@dataclass(frozen=True, slots=True)
class Alias:
    """A movable pointer to a version."""

    adapter: AdapterName
    alias: str
    digest: str
    generation: int


@dataclass(frozen=True, slots=True)
class AliasRemoved:
    """A pointer is gone."""

    adapter: AdapterName
    alias: str


@dataclass(frozen=True, slots=True)
class RouteTarget:
    """One share of a route; `cohort` is the name under which it is reported."""

    ref: str
    weight: int
    cohort: str


@dataclass(frozen=True, slots=True)
class Route:
    """A rule: (tenant, task) to refs with weights."""

    tenant: str
    task: str
    targets: tuple[RouteTarget, ...]
    generation: int


@dataclass(frozen=True, slots=True)
class Policy:
    """What a namespace asks of its versions, and the keys that it trusts; or those of a tenant."""

    namespace: str
    """Or `tenant:<name>`."""
    signatures: SignaturePolicy
    key_ids: frozenset[str]


@dataclass(frozen=True, slots=True)
class Namespace:
    """Whose a namespace is."""

    name: str
    tenant: str


@dataclass(frozen=True, slots=True)
class Grant:
    """What another tenant, or everybody ("*"), may use."""

    namespace: str
    name: str
    """Empty: all adapters of the namespace."""
    grantee: str


@dataclass(frozen=True, slots=True)
class GrantRemoved:
    """It may no longer."""

    grant: Grant


@dataclass(frozen=True, slots=True)
class Reach:
    """What a tenant that has shown who it is may use at most."""

    tenant: str
    namespaces: frozenset[str] = frozenset()
    """Its key is good in these only. Empty: in all."""


@dataclass(frozen=True, slots=True)
class RouteRemoved:
    """A rule is gone."""

    tenant: str
    task: str


@dataclass(frozen=True, slots=True)
class NothingHere:
    """A change that a router needs not know of."""


Entry = BaseModel | Version | VersionRemoved | Alias | Route | Policy | Namespace | Grant
Event = Entry | AliasRemoved | RouteRemoved | GrantRemoved | NothingHere


@dataclass(frozen=True, slots=True)
class Change:
    """One mutation of the feed."""

    position: int
    event: Event


class FeedBrokenError(Exception):
    """The feed does not continue what is there: only a new snapshot helps."""


@dataclass(slots=True)
class CatalogueImage:
    """The catalogue as of one position of one feed."""

    feed_id: str
    position: int
    bases: dict[str, BaseModel] = field(default_factory=dict)
    versions: dict[AdapterName, dict[int, Version]] = field(default_factory=dict)
    by_digest: dict[str, Version] = field(default_factory=dict)
    removed: dict[AdapterName, dict[int, VersionRemoved]] = field(default_factory=dict)
    """Kept, so that whoever asks for one hears why it is gone."""
    aliases: dict[tuple[AdapterName, str], Alias] = field(default_factory=dict)
    routes: dict[tuple[str, str], Route] = field(default_factory=dict)
    policies: dict[str, Policy] = field(default_factory=dict)
    tenants: dict[str, str] = field(default_factory=dict)
    """Of each namespace; one that is not here is the default tenant's."""
    grants: dict[str, set[Grant]] = field(default_factory=dict)
    """Of each namespace."""

    def add(self, event: Event) -> None:
        """Takes in one entry or event; the position is the caller's to move."""
        match event:
            case Version():
                self.versions.setdefault(event.adapter, {})[event.number] = event
                self.by_digest[event.digest] = event
            case VersionRemoved():
                self._remove(event)
            case Alias():
                self.aliases[event.adapter, event.alias] = event
            case AliasRemoved():
                self.aliases.pop((event.adapter, event.alias), None)
            case Route():
                self.routes[event.tenant, event.task] = event
            case Policy():
                self.policies[event.namespace] = event
            case Namespace():
                self.tenants[event.name] = event.tenant
            case Grant():
                self.grants.setdefault(event.namespace, set()).add(event)
            case GrantRemoved():
                self.grants.get(event.grant.namespace, set()).discard(event.grant)
            case NothingHere():
                pass
            case RouteRemoved():
                self.routes.pop((event.tenant, event.task), None)
            case BaseModel():
                self.bases[event.digest] = event

    def _remove(self, event: VersionRemoved) -> None:
        self.removed.setdefault(event.adapter, {})[event.number] = event
        gone = self.versions.get(event.adapter, {}).pop(event.number, None)
        # The same content may be there again, under another number.
        if gone is not None and self.by_digest.get(gone.digest) is gone:
            del self.by_digest[gone.digest]

    def is_signed_enough(self, version: Version) -> bool:
        """Whether the version is signed as its namespace asks, by a key of the namespace or of its tenant."""
        namespace = version.adapter.namespace
        policy = self.policies.get(namespace)
        if policy is None or policy.signatures is SignaturePolicy.NONE:
            return True
        tenant = self.tenants.get(namespace, DEFAULT_TENANT)
        shared = self.policies.get(tenant_scope(tenant))
        trusted = policy.key_ids | (shared.key_ids if shared else frozenset())
        return not trusted.isdisjoint(version.signing_key_ids)

    def may_use(self, reach: Reach, adapter: AdapterName) -> bool:
        """Whether an adapter belongs to a tenant or is granted to it."""
        if reach.namespaces and adapter.namespace not in reach.namespaces:
            return False
        if self.tenants.get(adapter.namespace, DEFAULT_TENANT) == reach.tenant:
            return True
        return any(
            grant.grantee in (reach.tenant, MESH_TENANT) and grant.name in ("", adapter.name)
            for grant in self.grants.get(adapter.namespace, ())
        )

    def base_digests(self, base_model: str) -> frozenset[str]:
        """The digests of the bases that go by this name or digest; empty if none does."""
        if base_model in self.bases:
            return frozenset((base_model,))
        return frozenset(base.digest for base in self.bases.values() if base.model_id == base_model)


class Catalogue:
    """The newest image, how far the store is, and whoever waits for a position."""

    def __init__(self) -> None:
        self._image: CatalogueImage | None = None
        self._head = 0
        self._waiting: list[tuple[int, asyncio.Future[None]]] = []

    @property
    def image(self) -> CatalogueImage | None:
        """None before the first snapshot."""
        return self._image

    @property
    def position(self) -> int:
        return -1 if self._image is None else self._image.position

    @property
    def head(self) -> int:
        """The store's last change as the feed last said."""
        return max(self._head, self.position, 0)

    def replace(self, image: CatalogueImage) -> None:
        """Puts a whole snapshot in the place of what was there."""
        self._image = image
        self._head = image.position
        self._wake()

    def apply(self, change: Change) -> None:
        """Takes in the next change; one that is there already is left out.

        Raises:
            FeedBrokenError: changes are missing in between, or there is no snapshot yet.
        """
        image = self._image
        if image is None or change.position > image.position + 1:
            raise FeedBrokenError(f"change {change.position} does not follow {self.position}")
        if change.position <= image.position:
            return
        image.add(change.event)
        image.position = change.position
        self._wake()

    def heard_head(self, head: int) -> None:
        """Notes how far the store is.

        Raises:
            FeedBrokenError: the store is behind us: it was put back to an older state.
        """
        if head < self.position:
            raise FeedBrokenError(f"the store's head {head} is behind our position {self.position}")
        self._head = head

    async def reach(self, position: int, timeout: float) -> bool:
        """Waits until a position is there; False after `timeout` seconds."""
        if self.position >= position:
            return True
        reached: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        entry = (position, reached)
        self._waiting.append(entry)
        try:
            async with asyncio.timeout(timeout):
                await reached
        except TimeoutError:
            return False
        finally:
            if entry in self._waiting:
                self._waiting.remove(entry)
        return True

    def _wake(self) -> None:
        if not self._waiting:
            return
        position = self.position
        for wanted, reached in self._waiting:
            if wanted <= position and not reached.done():
                reached.set_result(None)
        self._waiting = [entry for entry in self._waiting if entry[0] > position]
