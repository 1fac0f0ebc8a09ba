"""Versions from one store to another, or to another name in the same one."""

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from adaptermesh.client.fetching import fetch_package, read_manifest
from adaptermesh.client.publishing import publish_package
from adaptermesh.client.records import Copied, Imported, ResolvedRef
from adaptermesh.client.transfer import ProgressCallback
from adaptermesh.core.errors import Code, MeshError, Reason
from adaptermesh.core.refs import AdapterName

if TYPE_CHECKING:
    from adaptermesh.client.store import StoreClient

MAX_COPIED = 256
"""Versions of one copy, with all that they were made from."""


class Copier:
    """Brings versions of one store into another one, each through a folder of its own."""

    def __init__(
        self,
        source: "StoreClient",
        target: "StoreClient",
        *,
        with_parents: bool = False,
        with_base: bool = False,
        actor: str = "",
        progress: ProgressCallback | None = None,
    ) -> None:
        self._source = source
        self._target = target
        self._with_parents = with_parents
        self._with_base = with_base
        self._actor = actor
        self._progress = progress

    async def copy(self, ref: str, adapter: AdapterName | None = None) -> Copied:
        """Copies the version that a ref means now, after those that it was made from.

        Args:
            ref: what to copy; a version that must not be used is refused.
            adapter: what to call it; None: as it is called. Parents keep their names.

        Raises:
            MeshError: as `publish_package`; FAILED_PRECONDITION if the target lacks what it was made from,
                and parents are not to be copied, or if these are more than 256.
        """
        found = await self._source.resolve(ref)
        missing = await self._missing_parents(found)
        if missing and not self._with_parents:
            names = ", ".join(one.version.ref for one in missing[:10])
            raise MeshError(
                Code.FAILED_PRECONDITION,
                Reason.VERSION_NOT_FOUND,
                f"'{found.version.ref}' was made from {names}, which the store at {self._target.target} does "
                "not have: copy it with its parents",
                metadata={"ref": found.version.ref, "parents": names},
            )
        if self._with_base:
            await self._bring_base(found)
        parents = [await self._move(one, None) for one in missing]
        return Copied(await self._move(found, adapter), tuple(parents))

    async def _missing_parents(self, found: ResolvedRef) -> list[ResolvedRef]:
        """What the target lacks of all that a version was made from; every one after its own parents."""
        ordered: dict[str, ResolvedRef] = {}
        looked: dict[str, ResolvedRef] = {}
        # A digest comes twice: first to look what is before it, then to take its place.
        todo = [(digest, False) for digest in reversed(read_manifest(found).parents)]
        while todo:
            digest, placed = todo.pop()
            if placed:
                ordered[digest] = looked[digest]
            elif digest not in looked and not await self._is_there(digest):
                if len(looked) == MAX_COPIED:
                    raise _too_many(found)
                parent = looked[digest] = await self._source.resolve_digest(digest)
                todo.append((digest, True))
                todo += [(one, False) for one in reversed(read_manifest(parent).parents)]
        return list(ordered.values())

    async def _is_there(self, digest: str) -> bool:
        try:
            await self._target.resolve_digest(digest)
        except MeshError as error:
            if error.code is not Code.NOT_FOUND:
                raise
            return False
        return True

    async def _bring_base(self, found: ResolvedRef) -> None:
        await self._target.copy_base_model(self._source, found.version.base_digest)

    async def _move(self, found: ResolvedRef, adapter: AdapterName | None) -> Imported:
        with tempfile.TemporaryDirectory(prefix="adaptermesh-") as room:
            package = await fetch_package(self._source, found, Path(room), self._progress)
            return await publish_package(
                self._target,
                package,
                adapter or package.adapter,
                actor=self._actor,
                progress=self._progress,
            )


def _too_many(found: ResolvedRef) -> MeshError:
    return MeshError(
        Code.FAILED_PRECONDITION,
        Reason.INVALID_FIELD,
        f"'{found.version.ref}' was made from more than {MAX_COPIED} versions that are not there: copy those "
        "first",
        metadata={"field": "parents", "ref": found.version.ref},
    )
