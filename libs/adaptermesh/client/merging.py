"""Merging on the client's side: members come from the store, the result goes back to it. Needs numpy."""

import asyncio
import dataclasses
import tempfile
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from adaptermesh.artifact.base_facts import BaseFacts
from adaptermesh.artifact.manifest import Manifest
from adaptermesh.artifact.merging import MergeReport, merge
from adaptermesh.artifact.merging_members import Member, check_members
from adaptermesh.artifact.merging_recipe import MergeMethod, MergeRecipe, recipe_of
from adaptermesh.artifact.sites import site_map
from adaptermesh.client.records import Merge, MergedMember, MergeResult, Publication, UploadResult, Version
from adaptermesh.client.transfer import ProgressCallback
from adaptermesh.core.errors import base_mismatch, invalid_field
from adaptermesh.core.refs import AdapterName

if TYPE_CHECKING:
    from adaptermesh.client.store import StoreClient

OnModule = Callable[[int, int], None]


@dataclasses.dataclass(frozen=True, slots=True)
class _Chosen:
    """A member as the store has it."""

    version: Version
    manifest: Manifest


class Merger:
    """Merges versions of one store; `on_module` is called from another thread."""

    def __init__(
        self, store: "StoreClient", progress: ProgressCallback | None, on_module: OnModule | None
    ) -> None:
        self._store = store
        self._progress = progress
        self._on_module = on_module

    async def merge(
        self, adapter: str, plan: Merge, publication: Publication, *, validate_only: bool
    ) -> MergeResult:
        """See `StoreClient.merge`. What can be refused is, before any tensor is fetched."""
        AdapterName.parse(adapter)
        chosen, recipe = await self._choose(plan)
        base = await self._store.base_facts(chosen[0].version.base_digest)
        with tempfile.TemporaryDirectory(prefix="adaptermesh-merge-") as name:
            members = [_member(one, Path(name) / f"member-{index}") for index, one in enumerate(chosen)]
            check_members(members, base.digest, site_map(base))
            for member in members:
                await self._store.fetch(member.digest, member.tensors, progress=self._progress)
            report = await self._merge(members, recipe, base, Path(name) / "merged")
            upload = await self._store.upload(
                Path(name) / "merged",
                adapter,
                _completed(publication, [one.version for one in chosen]),
                parents=[member.digest for member in members],
                merge_recipe=recipe.to_json(),
                validate_only=validate_only,
                progress=self._progress,
            )
        return _result(upload, report, recipe, chosen)

    async def _choose(self, plan: Merge) -> tuple[list[_Chosen], MergeRecipe]:
        """The members with a weight, in the order given, and the recipe over their digests."""
        try:
            method = MergeMethod(plan.method)
        except ValueError:
            known = ", ".join(MergeMethod)
            raise invalid_field("method", f"{plan.method[:40]!r} is none of {known}") from None
        seed = 0 if plan.seed is None and method is MergeMethod.DARE else plan.seed
        weighted: list[tuple[_Chosen, float]] = []
        for ref, weight in plan.members:
            resolved = await self._store.resolve(ref)
            if weight != 0:
                chosen = _Chosen(resolved.version, Manifest.from_bytes(resolved.manifest))
                weighted.append((chosen, weight))
        recipe = recipe_of(
            method,
            ((chosen.version.digest, weight) for chosen, weight in weighted),
            rank=plan.rank,
            density=plan.density,
            seed=seed,
        )
        members = [chosen for chosen, _ in weighted]
        for member in members:
            if member.version.base_digest != members[0].version.base_digest:
                raise base_mismatch(
                    member.version.ref, member.version.base_digest, members[0].version.base_digest
                )
        return members, recipe

    async def _merge(
        self, members: Sequence[Member], recipe: MergeRecipe, base: BaseFacts, folder: Path
    ) -> MergeReport:
        given_up = threading.Event()

        def on_module(done: int, of: int) -> None:
            if given_up.is_set():
                raise InterruptedError("nobody waits for this merge any more")
            if self._on_module is not None:
                self._on_module(done, of)

        work = asyncio.ensure_future(asyncio.to_thread(merge, members, recipe, base, folder, on_module))
        try:
            return await asyncio.shield(work)
        except asyncio.CancelledError:
            # A thread can't be cancelled: it looks at this after each module.
            given_up.set()
            await asyncio.gather(work, return_exceptions=True)
            raise


def _member(chosen: _Chosen, place: Path) -> Member:
    version = chosen.version
    return Member(version.ref, version.digest, chosen.manifest, place.with_suffix(".safetensors"))


def _completed(publication: Publication, versions: Sequence[Version]) -> Publication:
    """What the publisher left out and all members agree on; the base is the members' own."""
    tasks, licenses = {version.task for version in versions}, {version.license for version in versions}
    return dataclasses.replace(
        publication,
        base_model=publication.base_model or versions[0].base_digest,
        task=publication.task or (tasks.pop() if len(tasks) == 1 else ""),
        license=publication.license or (licenses.pop() if len(licenses) == 1 else ""),
    )


def _result(
    upload: UploadResult, report: MergeReport, recipe: MergeRecipe, chosen: Sequence[_Chosen]
) -> MergeResult:
    return MergeResult(
        version=upload.version,
        created=upload.created,
        feed_position=upload.feed_position,
        members=tuple(
            MergedMember(one.version.ref, member.digest, member.weight)
            for one, member in zip(chosen, recipe.members, strict=True)
        ),
        method=recipe.method.value,
        rank=recipe.rank,
        density=recipe.density,
        seed=recipe.seed,
        modules=report.modules,
        max_rank=report.max_rank,
        kept=report.kept,
        least_kept=report.least_kept,
        least_kept_module=report.least_kept_module,
    )
