"""Bringing versions nearer and dropping them, by an operator's or the router's wish."""

import asyncio
import contextlib

from opentelemetry.context import Context

from adaptermesh.core.digests import is_digest
from adaptermesh.core.errors import Code, MeshError, Reason, invalid_field
from adaptermesh.core.tiers import Tier
from adaptermesh.worker.backend import Backend
from adaptermesh.worker.engine.status import ResidencyView


async def load_adapter(
    backend: Backend, digest: str, tier: Tier, pin: bool, context: Context, limit_seconds: float
) -> ResidencyView:
    """Returns when the version is in the tier.

    Raises:
        MeshError: INVALID_ARGUMENT, NOT_FOUND, RESOURCE_EXHAUSTED, UNAVAILABLE, or DEADLINE_EXCEEDED after
            `limit_seconds`; the load itself goes on then.
    """
    _check(digest)
    loop = asyncio.get_running_loop()
    done: asyncio.Future[None] = loop.create_future()

    def settle(error: MeshError | None) -> None:
        if done.done():
            return
        if error is None:
            done.set_result(None)
        else:
            done.set_exception(error)

    def on_done(error: MeshError | None) -> None:
        # A closed loop has nobody left who waits.
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(settle, error)

    backend.load(digest, tier, pin, on_done, context)
    try:
        async with asyncio.timeout(limit_seconds):
            await done
    except TimeoutError:
        raise MeshError(
            Code.DEADLINE_EXCEEDED,
            Reason.DEADLINE_EXCEEDED,
            f"adapter {digest} was not loaded within {limit_seconds:g} s",
            metadata={"digest": digest},
        ) from None
    return _view(backend, digest)


async def unpin_adapter(backend: Backend, digest: str) -> ResidencyView:
    """Lets the version go like any other; gives where it is now."""
    _check(digest)
    # The engine may wait for its own thread.
    return await asyncio.to_thread(backend.unpin, digest)


async def evict_adapter(backend: Backend, digest: str) -> None:
    """Drops the version from every tier; raises MeshError FAILED_PRECONDITION while requests use it."""
    _check(digest)
    # The engine may wait for its own thread and deletes files.
    await asyncio.to_thread(backend.evict, digest)


def _check(digest: str) -> None:
    if not is_digest(digest):
        raise invalid_field("digest", f"{digest[:80]!r} is not a digest")


def _view(backend: Backend, digest: str) -> ResidencyView:
    for view in backend.status().residencies:
        if view.digest == digest:
            return view
    raise MeshError(
        Code.ABORTED,
        Reason.OVERLOADED,
        f"adapter {digest} was evicted again at once",
        metadata={"digest": digest},
    )
