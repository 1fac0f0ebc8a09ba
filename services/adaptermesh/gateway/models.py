"""What can be asked for: the live base models, then the adapters of the store."""

from collections import OrderedDict
from collections.abc import Awaitable
from dataclasses import dataclass, replace
from typing import TypeVar

import grpc.aio

from adaptermesh.api.adapter.v1 import adapter_pb2
from adaptermesh.api.store.v1 import store_pb2, store_pb2_grpc
from adaptermesh.core.errors import Code, Reason, invalid_field, unavailable
from adaptermesh.core.refs import BASE
from adaptermesh.gateway.deadline import Deadline
from adaptermesh.gateway.dispatch import LiveBase, Router
from adaptermesh.gateway.page_token import Place, decode, encode
from adaptermesh.rpc import metadata as names
from adaptermesh.rpc.status import mesh_error_from

T = TypeVar("T")

DEFAULT_PAGE_SIZE = 100
MAX_PAGE_SIZE = 1000
_REMEMBERED_VERSIONS = 4096


@dataclass(frozen=True, slots=True)
class Model:
    """One thing that can be named."""

    id: str
    digest: str
    base_model_id: str
    task: str = ""
    aliases: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ModelPage:
    """Some models and how to get the next ones."""

    models: tuple[Model, ...]
    next_page_token: str


@dataclass(frozen=True, slots=True)
class _Version:
    number: int
    digest: str
    base_model_id: str
    task: str
    servable: bool


class StoreCatalogue:
    """Reads adapters from the store. What is kept of a version never changes, so it is kept for later."""

    def __init__(self, channel: grpc.aio.Channel, timeout_seconds: float) -> None:
        self._stub = store_pb2_grpc.StoreServiceStub(channel)
        self._timeout = timeout_seconds
        self._versions: OrderedDict[str, _Version] = OrderedDict()

    async def adapters(
        self, page_size: int, page_token: str, deadline: Deadline, authorization: str
    ) -> store_pb2.ListAdaptersResponse:
        """One page of the store's adapters that a caller may see, in order of their names."""
        request = store_pb2.ListAdaptersRequest(page_size=page_size, page_token=page_token)
        call = self._stub.ListAdapters(
            request, timeout=deadline.remaining(self._timeout), metadata=_shown(authorization)
        )
        return await self._asked(call, deadline)

    async def models(
        self, summary: store_pb2.AdapterSummary, deadline: Deadline, authorization: str
    ) -> list[tuple[int, Model]]:
        """An adapter's newest version and those that aliases point at, newest first, with their numbers.

        What can't be served, or must not be used, can't be asked for.
        """
        name = f"{summary.newest.namespace}/{summary.newest.name}"
        versions = {summary.newest.number: _from_wire(summary.newest)}
        unusable = frozenset(summary.unusable_numbers)
        for alias in summary.aliases:
            if alias.version_number not in versions and alias.version_number not in unusable:
                versions[alias.version_number] = await self._version(
                    name, alias.digest, deadline, authorization
                )
        return [
            (
                number,
                Model(
                    id=f"{name}:v{number}",
                    digest=version.digest,
                    base_model_id=version.base_model_id,
                    task=version.task,
                    aliases=tuple(sorted(a.alias for a in summary.aliases if a.version_number == number)),
                ),
            )
            for number, version in sorted(versions.items(), reverse=True)
            if version.servable and number not in unusable
        ]

    async def _version(self, name: str, digest: str, deadline: Deadline, authorization: str) -> _Version:
        found = self._versions.get(digest)
        if found is None:
            # It may be unusable by now: then the next list leaves it out.
            request = store_pb2.ResolveRefRequest(ref=f"{name}@{digest}", include_unusable=True)
            timeout = deadline.remaining(self._timeout)
            call = self._stub.ResolveRef(request, timeout=timeout, metadata=_shown(authorization))
            response = await self._asked(call, deadline)
            found = _from_wire(response.version)
            self._versions[digest] = found
        self._versions.move_to_end(digest)
        while len(self._versions) > _REMEMBERED_VERSIONS:
            self._versions.popitem(last=False)
        return found

    async def _asked(self, call: Awaitable[T], deadline: Deadline) -> T:
        try:
            return await call
        except grpc.aio.AioRpcError as error:
            found = mesh_error_from(error, Reason.STORE_UNREACHABLE)
        if found.code is Code.DEADLINE_EXCEEDED:
            deadline.remaining()
            raise unavailable(Reason.STORE_UNREACHABLE, "the adapter store does not answer", 1.0)
        raise found


class ModelList:
    """Pages through base models and adapters as one list."""

    def __init__(self, router: Router, store: StoreCatalogue) -> None:
        self._router = router
        self._store = store

    async def page(
        self, page_size: int, page_token: str, deadline: Deadline, authorization: str = ""
    ) -> ModelPage:
        """One page, of adapters those that the caller may see who has shown `authorization`.

        Raises:
            MeshError: INVALID_ARGUMENT (page_size, page_token); UNAVAILABLE: router or store can't be asked.
        """
        if not 0 <= page_size <= MAX_PAGE_SIZE:
            raise invalid_field("page_size", f"{page_size} is not in [0, {MAX_PAGE_SIZE}]")
        wanted = page_size or DEFAULT_PAGE_SIZE
        place: Place | None = decode(page_token)
        models: list[Model] = []
        while place is not None and len(models) < wanted:
            room = wanted - len(models)
            if place.bases_after is not None:
                found, place = await self._bases(place, place.bases_after, room, deadline)
            else:
                found, place = await self._adapters(place, room, deadline, authorization)
            models.extend(found)
        return ModelPage(tuple(models), "" if place is None else encode(place))

    async def _bases(
        self, place: Place, after: str, room: int, deadline: Deadline
    ) -> tuple[list[Model], Place | None]:
        left = [base for base in await self._router.live_bases(deadline) if _base_key(base) > after]
        models = [Model(id=BASE, digest=base.digest, base_model_id=base.model_id) for base in left[:room]]
        if len(left) > room:
            return models, replace(place, bases_after=_base_key(left[room - 1]))
        return models, replace(place, bases_after=None)

    async def _adapters(
        self, place: Place, room: int, deadline: Deadline, authorization: str
    ) -> tuple[list[Model], Place | None]:
        page = await self._store.adapters(room, place.store_token, deadline, authorization)
        models: list[Model] = []
        for index, summary in enumerate(page.adapters):
            name = f"{summary.newest.namespace}/{summary.newest.name}"
            listed = place.after_number if name == place.after_adapter else None
            for number, model in await self._store.models(summary, deadline, authorization):
                if listed is not None and number >= listed:
                    continue
                if len(models) == room:
                    token = await self._token_before(index, place.store_token, deadline, authorization)
                    return models, Place(None, token, name if listed else "", listed or 0)
                models.append(model)
                listed = number
        if not page.next_page_token:
            return models, None
        return models, Place(store_token=page.next_page_token)

    async def _token_before(self, index: int, page_token: str, deadline: Deadline, authorization: str) -> str:
        """The store's token for the page that begins with the adapter at `index` of an earlier page."""
        if index == 0:
            return page_token
        return (await self._store.adapters(index, page_token, deadline, authorization)).next_page_token


def _shown(authorization: str) -> tuple[tuple[str, str], ...]:
    """What the store is shown; without it, the channel's own key is."""
    return ((names.AUTHORIZATION, authorization),) if authorization else ()


def _base_key(base: LiveBase) -> str:
    return f"{base.model_id} {base.digest}"


def _from_wire(version: adapter_pb2.Version) -> _Version:
    return _Version(version.number, version.digest, version.base_model_id, version.task, version.servable)
