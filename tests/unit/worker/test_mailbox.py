import asyncio
from concurrent.futures import ThreadPoolExecutor

from hypothesis import given
from hypothesis import strategies as st

from adaptermesh.core.errors import Code, MeshError, Reason
from adaptermesh.core.logprobs import TokenLogprobs
from adaptermesh.worker.engine.request import FinishReason, Outcome, Timeline
from adaptermesh.worker.mailbox import Mail, Mailbox

OUTCOME = Outcome(FinishReason.STOP, 1, 2, Timeline())


async def take(mailbox: Mailbox) -> Mail:
    """As the reader does it."""
    await mailbox._arrived.wait()
    mailbox._arrived.clear()
    return mailbox.take()


async def test_what_was_not_taken_grows_together_into_one_mail() -> None:
    mailbox = Mailbox(asyncio.Event())
    for number in range(1000):
        mailbox.on_tokens(f"{number} ", [number])
    mail = await take(mailbox)
    assert mail.text == "".join(f"{number} " for number in range(1000))
    assert mail.token_ids == tuple(range(1000))
    assert mail.end is None


async def test_log_probabilities_come_with_their_tokens() -> None:
    mailbox = Mailbox(asyncio.Event())
    logprobs = [TokenLogprobs(token, -1.0) for token in range(3)]
    mailbox.on_tokens("a", [0, 1], logprobs[:2])
    mailbox.on_tokens("b", [2], logprobs[2:])
    assert (await take(mailbox)).logprobs == tuple(logprobs)
    mailbox.on_tokens("c", [3])
    assert (await take(mailbox)).logprobs == ()


async def test_what_the_prompt_says_comes_by_itself_or_before_the_output() -> None:
    mailbox = Mailbox(asyncio.Event())
    logprobs = tuple(TokenLogprobs(token, -1.0) for token in range(3))
    mailbox.on_prompt(logprobs[:1])
    mail = await take(mailbox)
    assert (mail.prompt_logprobs, mail.token_ids, mail.empty) == (logprobs[:1], (), False)
    mailbox.on_prompt(logprobs[1:2])
    mailbox.on_prompt(logprobs[2:])
    mailbox.on_tokens("a", [1])
    mail = await take(mailbox)
    assert (mail.prompt_logprobs, mail.token_ids, mail.logprobs) == (logprobs[1:], (1,), ())
    mailbox.on_finish(OUTCOME)
    mailbox.on_prompt(logprobs)
    assert (await take(mailbox)).prompt_logprobs == ()


async def test_mailboxes_of_several_answers_wake_one_reader() -> None:
    arrived = asyncio.Event()
    first, second = Mailbox(arrived, 0), Mailbox(arrived, 1)
    second.on_tokens("b", [2])
    await arrived.wait()
    assert first.take().empty
    assert second.take() == Mail("b", (2,), None, (), 1)
    first.on_finish(OUTCOME)
    await arrived.wait()
    assert first.take().end == OUTCOME


async def test_the_end_comes_with_the_last_output() -> None:
    mailbox = Mailbox(asyncio.Event())
    mailbox.on_tokens("a", [1])
    mailbox.on_finish(OUTCOME)
    mail = await take(mailbox)
    assert (mail.text, mail.end) == ("a", OUTCOME)


async def test_only_the_first_end_counts_and_nothing_follows_it() -> None:
    mailbox = Mailbox(asyncio.Event())
    error = MeshError(Code.CANCELLED, Reason.CANCELLED, "cancelled")
    mailbox.on_error(error)
    mailbox.on_finish(OUTCOME)
    mailbox.on_tokens("late", [1])
    mail = await take(mailbox)
    assert (mail.text, mail.end) == ("", error)


def test_every_token_arrives_once_and_in_order_whatever_the_reader_does() -> None:
    @given(st.lists(st.integers(1, 4), min_size=1, max_size=50))
    def check(sizes: list[int]) -> None:
        asyncio.run(deliver(sizes))

    async def deliver(sizes: list[int]) -> None:
        mailbox, sent = Mailbox(asyncio.Event()), list(range(sum(sizes)))

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
                mail = await take(mailbox)
                received.extend(mail.token_ids)
                if mail.end is not None:
                    break
            running.result()
        assert received == sent

    check()


def test_an_engine_that_outlives_the_loop_is_not_disturbed() -> None:
    async def make() -> Mailbox:
        return Mailbox(asyncio.Event())

    mailbox = asyncio.run(make())
    mailbox.on_tokens("x", [1])
    mailbox.on_finish(OUTCOME)
