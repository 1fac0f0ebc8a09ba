"""Interleaved and concurrent requests: by task, by explicit ref, and to the bare base model."""

import asyncio
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich.console import RenderableType
from rich.text import Text

from adaptermesh.cli.demo.checks import Checks
from adaptermesh.cli.demo.publish import Published, PublishedAdapter
from adaptermesh.cli.demo.residency import evict, load_to_host
from adaptermesh.cli.tables import milliseconds, short_digest, table
from adaptermesh.client import Ask, Generation, MeshClient, Prompt, SamplingParams, SwitchKind
from adaptermesh.core.refs import BASE

MAX_SHOWN = 180


@dataclass(frozen=True, slots=True)
class Question:
    """One request, naming a task or an adapter; `expected` is the version that must answer."""

    subject: PublishedAdapter
    prompt: str
    expected: str
    task: str = ""
    adapter: str = ""

    @property
    def asked_as(self) -> str:
        return (
            f"task {self.task}"
            if self.task
            else (self.adapter if self.adapter == BASE else f"ref {self.adapter}")
        )


@dataclass(frozen=True, slots=True)
class Answer:
    """A question with its answer; `wave` 1 is the first time that the worker meets the adapters."""

    question: Question
    wave: int
    generation: Generation


async def ask_everything(mesh: MeshClient, published: Published, workers: Sequence[str]) -> list[Answer]:
    """Two waves of concurrent requests; in each, adapters and base are interleaved.

    Between them the last adapter is moved to the workers' host memory, so that its next switch is a cool one.
    """
    answers: list[Answer] = []
    for wave in (1, 2):
        if wave == 2:
            digest = published.adapters[-1].versions[0].digest
            await evict(workers, digest)
            await load_to_host(workers, digest)
        questions = list(_wave(published.adapters, wave))
        generations = await asyncio.gather(
            *(ask(mesh, question, published.feed_position) for question in questions)
        )
        answers += [Answer(q, wave, g) for q, g in zip(questions, generations, strict=True)]
    return answers


async def ask(mesh: MeshClient, question: Question, feed_position: int) -> Generation:
    """One greedy request."""
    plan = question.subject.plan
    return await mesh.complete(
        Prompt.chat(question.prompt, system=plan.system),
        task=question.task,
        adapter=question.adapter,
        sampling=SamplingParams(max_tokens=plan.max_tokens, temperature=0.0),
        ask=Ask(min_feed_position=feed_position),
    )


def _wave(adapters: Sequence[PublishedAdapter], wave: int) -> Iterator[Question]:
    """Wave 1 names tasks and the base model, wave 2 tasks and explicit refs, newest versions among them."""
    for adapter in adapters:
        prompts = adapter.plan.prompts
        first = adapter.versions[0].ref
        yield Question(adapter, prompts[0], first, task=adapter.plan.task)
        if wave == 1:
            yield Question(adapter, prompts[0], BASE, adapter=BASE)
            continue
        for version in reversed(adapter.versions):
            yield Question(adapter, prompts[-1], version.ref, adapter=version.ref)


def check_answers(answers: Sequence[Answer], checks: Checks) -> None:
    """Every request must have been served by the version that it named, and say so truthfully."""
    digests = {
        version.ref: version.digest for answer in answers for version in answer.question.subject.versions
    }
    wrong = [
        f"{answer.question.asked_as} got {answer.generation.version}"
        for answer in answers
        if answer.generation.version != answer.question.expected
        or answer.generation.digest != digests.get(answer.question.expected, "")
    ]
    checks.expect(
        not wrong, "every answer names the version and digest that were asked for", "; ".join(wrong)
    )
    empty = [answer.question.asked_as for answer in answers if not answer.generation.text.strip()]
    checks.expect(not empty, "every answer has text", ", ".join(empty))
    kinds = {
        answer.generation.started.switch_kind
        for answer in answers
        if answer.wave == 1 and answer.question.adapter != BASE
    }
    checks.expect(
        kinds == {SwitchKind.COLD},
        "the first use of each adapter is a cold switch",
        f"it was {', '.join(sorted(kinds))}",
    )
    later = {answer.generation.started.switch_kind for answer in answers if answer.wave == 2}
    checks.expect(
        later >= {SwitchKind.COOL, SwitchKind.WARM},
        "later uses are warm switches, or cool ones from host memory",
        f"they were {', '.join(sorted(later))}",
    )
    pairs = [
        (answer, base)
        for answer in answers
        for base in answers
        if base.question.adapter == BASE
        and answer.question.prompt == base.question.prompt
        and answer.wave == base.wave == 1
        and answer is not base
    ]
    same = [a.question.asked_as for a, base in pairs if a.generation.text == base.generation.text]
    checks.expect(not same, "adapters answer otherwise than the base model", ", ".join(same))


def answers_table(answers: Sequence[Answer]) -> list[RenderableType]:
    """The answers side by side, grouped by prompt."""
    parts: list[RenderableType] = []
    prompts = list(dict.fromkeys(answer.question.prompt for answer in answers))
    for prompt in prompts:
        rows = table("asked as", "answer", "served by", "switch", "first token", right=("first token",))
        rows.columns[1].ratio = 1
        rows.expand = True
        for answer in answers:
            if answer.question.prompt != prompt:
                continue
            generation = answer.generation
            rows.add_row(
                answer.question.asked_as,
                Text(shortened(generation.text)),
                "\n".join(_server(generation)),
                switch_text(generation),
                milliseconds(generation.ttft),
            )
        parts += [Text(f"\n> {prompt}", "bold"), rows]
    return parts


def shortened(text: str) -> str:
    """An answer on one line, cut where it goes on and on."""
    line = " ".join(text.split())
    return line if len(line) <= MAX_SHOWN else f"{line[:MAX_SHOWN]}…"


def _server(generation: Generation) -> list[str]:
    """Version, digest and worker."""
    lines = [generation.version, short_digest(generation.digest), generation.started.worker_id]
    return [line for line in lines if line]


def switch_text(generation: Generation) -> Text:
    """The kind of switch in its colour, and the tier that the adapter was found in."""
    kind = generation.started.switch_kind
    color = {SwitchKind.COLD: "blue", SwitchKind.COOL: "cyan", SwitchKind.WARM: "red"}.get(kind, "dim")
    if kind is SwitchKind.NONE:
        return Text("-", "dim")
    return Text(f"{kind.value}\n({generation.started.tier})", color)
