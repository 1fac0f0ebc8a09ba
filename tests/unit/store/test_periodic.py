import asyncio

from adaptermesh.core.errors import Reason, unavailable
from adaptermesh.store.periodic import PeriodicWork


async def test_work_comes_again_after_every_pause_whatever_it_raised_until_it_is_stopped() -> None:
    outcomes: list[Exception | None] = [
        None,
        unavailable(Reason.OVERLOADED, "busy", retry_after=1.0),
        ValueError("odd"),
        None,
    ]
    pauses: list[float] = []
    done = asyncio.Event()

    async def work() -> None:
        if not outcomes:
            done.set()
            await asyncio.Event().wait()
        outcome = outcomes.pop(0)
        if outcome is not None:
            raise outcome

    async def sleep(seconds: float) -> None:
        pauses.append(seconds)

    periodic = PeriodicWork("it", work, 7.0, sleep)
    periodic.start()
    periodic.start()
    async with asyncio.timeout(10):
        await done.wait()
    assert pauses == [7.0] * 4
    await periodic.stop()
    await periodic.stop()


async def test_what_was_never_started_can_be_stopped() -> None:
    async def work() -> None:
        raise AssertionError

    await PeriodicWork("it", work, 1.0).stop()
