import asyncio
from concurrent.futures import ThreadPoolExecutor

from hypothesis import given
from hypothesis import strategies as st

from adaptermesh.core.errors import Code, MeshError, Reason
from adaptermesh.worker.engine.request import FinishReason, Outcome, Timeline
from adaptermesh.worker.mailbox import Mailbox

OUTCOME = Outcome(FinishReason.STOP, 1, 2, Timeline())


async def test_what_was_not_taken_grows_together_into_one_mail() -> None:
    mailbox = Mailbox()
    for number in range(1000):
        mailbox.on_tokens(f"{number} ", [number])
    mail = await mailbox.take()
    assert mail.text == "".join(f"{number} " for number in range(1000))
    assert mail.token_ids == tuple(range(1000))
    assert mail.end is None


async def test_the_end_comes_with_the_last_output() -> None:
    mailbox = Mailbox()
    mailbox.on_tokens("a", [1])
    mailbox.on_finish(OUTCOME)
    mail = await mailbox.take()
    assert (mail.text, mail.end) == ("a", OUTCOME)


async def test_only_the_first_end_counts_and_nothing_follows_it() -> None:
    mailbox = Mailbox()
    error = MeshError(Code.CANCELLED, Reason.CANCELLED, "cancelled")
    mailbox.on_error(error)
    mailbox.on_finish(OUTCOME)
    mailbox.on_tokens("late", [1])
    mail = await mailbox.take()
    assert (mail.text, mail.end) == ("", error)


def test_every_token_arrives_once_and_in_order_whatever_the_reader_does() -> None:
    @given(st.lists(st.integers(1, 4), min_size=1, max_size=50))
    def check(sizes: list[int]) -> None:
        asyncio.run(deliver(sizes))

    async def deliver(sizes: list[int]) -> None:
        mailbox, sent = Mailbox(), list(range(sum(sizes)))

        def engine_thread() -> None:
            start = 0
            for size in sizes:
                mailbox.on_tokens("x" * size, sent[start : start + size])
                start += size
            mailbox.on_finish(OUTCOME)

        with ThreadPoolExecutor(1) as thread:
            running = thread.submit(engine_thread)
            received: list[int] = []
            while True:
                mail = await mailbox.take()
                received.extend(mail.token_ids)
                if mail.end is not None:
                    break
            running.result()
        assert received == sent

    check()


def test_an_engine_that_outlives_the_loop_is_not_disturbed() -> None:
    async def make() -> Mailbox:
        return Mailbox()

    mailbox = asyncio.run(make())
    mailbox.on_tokens("x", [1])
    mailbox.on_finish(OUTCOME)
