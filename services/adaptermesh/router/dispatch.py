"""One decision: resolve, pick, book. Awaits only when something is missing from the local catalogue."""

from contextlib import suppress
from dataclasses import dataclass

from opentelemetry.trace import Span

from adaptermesh.core.clock import Clock
from adaptermesh.core.errors import Code, MeshError, Reason, invalid_field, unavailable
from adaptermesh.core.tiers import Tier
from adaptermesh.router.bases import check_served, choose_base
from adaptermesh.router.booking import Bookings
from adaptermesh.router.catalogue import Catalogue, CatalogueImage, Version
from adaptermesh.router.catch_up import CatchUp
from adaptermesh.router.picking import Pick, Wanted, pick
from adaptermesh.router.resolution import ComposedVersion, Question, Resolution, resolve
from adaptermesh.router.settings import RouterSettings
from adaptermesh.router.workers import WorkerRegistry
from adaptermesh.telemetry.tracing import Tracing

_ANSWER_SECONDS = 0.05
"""What is kept of the caller's deadline, so that it gets our reason and not its own timeout."""


@dataclass(frozen=True, slots=True)
class Request:
    """What is to be decided."""

    request_id: str
    question: Question
    excluded: frozenset[str] = frozenset()
    min_feed_position: int = 0


@dataclass(frozen=True, slots=True)
class Decision:
    """What was decided."""

    resolution: Resolution
    pick: Pick
    feed_position: int


class Dispatcher:
    """Decides for every request of this router."""

    def __init__(
        self,
        catalogue: Catalogue,
        catch_up: CatchUp,
        registry: WorkerRegistry,
        bookings: Bookings,
        clock: Clock,
        tracing: Tracing,
        settings: RouterSettings,
    ) -> None:
        self._catalogue = catalogue
        self._catch_up = catch_up
        self._registry = registry
        self._bookings = bookings
        self._clock = clock
        self._tracer = tracing.tracer
        self._settings = settings

    async def dispatch(self, request: Request, remaining: float | None = None) -> Decision:
        """Decides within `remaining` seconds (None: no deadline) and books the request.

        Raises:
            MeshError: as `router.proto` says for Dispatch.
        """
        if not request.request_id:
            raise invalid_field("request_id", "it is empty")
        deadline = None if remaining is None else self._clock.monotonic() + remaining - _ANSWER_SECONDS
        with self._tracer.start_as_current_span("router.resolve", record_exception=False) as span:
            resolution, position = await self._resolve(request, deadline)
            _describe_resolution(span, request, resolution, position)
        with self._tracer.start_as_current_span("router.pick", record_exception=False) as span:
            picked = self._pick(request, resolution)
            _describe_pick(span, request, picked)
        return Decision(resolution, picked, position)

    async def _resolve(self, request: Request, deadline: float | None) -> tuple[Resolution, int]:
        image = self._image()
        if image.position < request.min_feed_position:
            await self._reach(request.min_feed_position, deadline)
            image = self._image()
        try:
            return resolve(image, request.question), image.position
        except MeshError as missing:
            if missing.code is not Code.NOT_FOUND or _is_final(missing):
                raise
        # Unknown here does not yet mean unknown: it may have been published a moment ago.
        limit = self._left(deadline, self._settings.catch_up_seconds)
        try:
            await self._catch_up.wait(limit)
        except (MeshError, TimeoutError) as error:
            raise self._stale("the name is not known here and the store can't be asked about it") from error
        image = self._image()
        return resolve(image, request.question), image.position

    async def _reach(self, position: int, deadline: float | None) -> None:
        """Waits until the catalogue is at a position that the caller knows of."""
        limit = self._left(deadline, self._settings.feed_wait_seconds)
        started = self._clock.monotonic()
        with suppress(MeshError, TimeoutError):
            # Sooner than the feed may bring it, if another replica of the store took the write.
            await self._catch_up.wait(min(limit, self._settings.catch_up_seconds))
        left = max(0.0, limit - (self._clock.monotonic() - started))
        if not await self._catalogue.reach(position, left):
            raise self._stale(f"the catalogue is at change {self._catalogue.position}, not yet at {position}")

    def _image(self) -> CatalogueImage:
        image = self._catalogue.image
        if image is None:
            raise self._stale("the store's catalogue is not there yet")
        return image

    def _left(self, deadline: float | None, limit: float) -> float:
        return limit if deadline is None else max(0.0, min(limit, deadline - self._clock.monotonic()))

    def _stale(self, message: str) -> MeshError:
        return unavailable(Reason.CATALOGUE_STALE, message, self._settings.retry_after_seconds)

    def _pick(self, request: Request, resolution: Resolution) -> Pick:
        self._bookings.expire()
        workers = self._registry.live()
        retry_after = self._settings.retry_after_seconds
        version = resolution.version
        if version is None:
            base_digest = choose_base(workers, resolution.base_digests, retry_after)
        else:
            base_digest = version.base_digest
            check_served(
                workers,
                resolution,
                base_digest,
                may_return=self._registry.base_may_return(base_digest),
                retry_after=retry_after,
            )
        digest = None if version is None else version.digest
        picked = pick(workers, Wanted(base_digest, digest, request.excluded), self._bookings, retry_after)
        worker_id = picked.worker.info.worker_id
        self._bookings.book(request.request_id, worker_id)
        if digest is not None and picked.tier is Tier.STORE:
            self._bookings.expect(worker_id, digest)
        return picked


def _describe_resolution(span: Span, request: Request, resolution: Resolution, position: int) -> None:
    if not span.is_recording():
        return
    span.set_attribute("adaptermesh.tenant.id", request.question.tenant)
    span.set_attribute("adaptermesh.catalogue.position", position)
    span.set_attribute("adaptermesh.adapter.ref", resolution.ref)
    if resolution.route is not None:
        span.set_attribute("adaptermesh.route.name", f"{resolution.route.tenant}/{resolution.route.task}")
        span.set_attribute("adaptermesh.route.generation", resolution.route.generation)
        span.set_attribute("adaptermesh.route.cohort", resolution.cohort)
        span.set_attribute("adaptermesh.route.variant", resolution.ref)
    if resolution.version is not None:
        _describe_version(span, resolution.version)


def _describe_version(span: Span, version: Version | ComposedVersion) -> None:
    span.set_attribute("adaptermesh.adapter.version", str(version))
    span.set_attribute("adaptermesh.adapter.digest", version.digest)
    span.set_attribute("adaptermesh.adapter.op_kinds", version.op_kinds)
    span.set_attribute("adaptermesh.adapter.bytes", version.size_bytes)


def _describe_pick(span: Span, request: Request, picked: Pick) -> None:
    if not span.is_recording():
        return
    span.set_attribute("adaptermesh.worker.id", picked.worker.info.worker_id)
    span.set_attribute("adaptermesh.switch.tier", picked.tier.name.lower())
    span.set_attribute("adaptermesh.pick.candidates", picked.candidates)
    span.set_attribute("adaptermesh.pick.excluded", len(request.excluded))


def _is_final(missing: MeshError) -> bool:
    """Whether no later change can bring it: the number of a removed version is never given again.

    Its digest may be there again by now.
    """
    by_number = missing.metadata.get("ref") == missing.metadata.get("version")
    return missing.reason is Reason.VERSION_DELETED and by_number
