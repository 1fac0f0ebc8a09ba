import asyncio
import dataclasses
import io
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from adaptermesh.api.adapter.v1 import adapter_pb2
from adaptermesh.api.inference.v1 import inference_pb2
from adaptermesh.cli.demo.answers import Answer, Question, answers_table, ask_everything, check_answers
from adaptermesh.cli.demo.checks import Checks
from adaptermesh.cli.demo.hot_swap import (
    HotSwap,
    HotSwapStage,
    Move,
    Served,
    check_hot_swap,
    hot_swap_table,
    possible_versions,
)
from adaptermesh.cli.demo.plan import find_plan, load_plan
from adaptermesh.cli.demo.publish import Published, publish
from adaptermesh.cli.demo.switches import Sample, check_switches, switch_table, switch_times
from adaptermesh.cli.execute import CommandError
from adaptermesh.client import (
    Choice,
    Finished,
    Generation,
    MeshClient,
    Started,
    StoreClient,
    SwitchKind,
    Timings,
)
from adaptermesh.core.clock import SystemClock
from adaptermesh.core.refs import parse_ref
from adaptermesh.rpc import metadata as names
from tests.unit.client.fake_services import FakeGateway, FakeStore, FakeWorker, fake_store, fake_worker, serve

PLAN: dict[str, Any] = {
    "base_model": "tiny",
    "adapters": [
        {
            "ref": "demo/ner",
            "task": "ner",
            "versions": [{"dir": "ner-v1", "description": "one"}, {"dir": "ner-v2"}],
            "prompts": ["a", "b"],
            "max_tokens": 8,
            "license": "apache-2.0",
            "tags": ["x"],
        },
        {"ref": "demo/sql", "task": "sql", "versions": [{"dir": "sql-v1"}], "prompts": ["c"]},
    ],
}


@pytest.fixture
def plan_file(tmp_path: Path) -> Path:
    for name in ("ner-v1", "ner-v2", "sql-v1"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "adapter_config.json").write_text(json.dumps({"name": name}))
        (folder / "adapter_model.safetensors").write_bytes(name.encode())
    file = tmp_path / "demo.json"
    file.write_text(json.dumps(PLAN))
    return file


class RoutedGateway(FakeGateway):
    """Serves what the aliases point at; a stream goes on until the alias moves or `released` is set."""

    def __init__(self, store: FakeStore) -> None:
        super().__init__()
        self._store = store
        self.released: asyncio.Event | None = None
        self.worker: FakeWorker | None = None
        """Where adapters are held; without one each switch is cold."""

    def _started(self, sent: dict[str, str]) -> inference_pb2.GenerateStarted:
        started = super()._started(sent)
        ref = parse_ref(f"demo/{sent[names.TASK]}@prod") if names.TASK in sent else None
        if ref is None and started.ref != "base":
            ref = parse_ref(started.ref)
        if ref is not None:
            number = ref.version or self._store.aliases[str(ref)][-1].version_number
            version = self._store.versions[str(ref.adapter)][number - 1]
            started.adapter_version = f"{ref.adapter}:v{number}"
            started.adapter_digest = version.digest
            if self.worker is not None:
                held = self.worker.held.get(version.digest, 0)
                if held == adapter_pb2.TIER_DEVICE:
                    started.switch_kind = adapter_pb2.SWITCH_KIND_WARM
                if held == adapter_pb2.TIER_HOST:
                    started.switch_kind = adapter_pb2.SWITCH_KIND_COOL
                self.worker.held[version.digest] = adapter_pb2.TIER_DEVICE
        return started

    def _words(self, started: inference_pb2.GenerateStarted) -> list[str]:
        return ["This is ", started.adapter_version]

    async def Generate(self, request: Any, context: Any) -> AsyncIterator[inference_pb2.GenerateResponse]:
        moves = self._moves()
        async for response in super().Generate(request, context):
            if response.WhichOneof("event") == "finished" and self.released is not None:
                async with asyncio.timeout(30):
                    while not self.released.is_set() and self._moves() == moves:  # noqa: ASYNC110
                        await asyncio.sleep(0.001)
            yield response

    def _moves(self) -> int:
        return sum(len(moves) for moves in self._store.aliases.values())


@pytest.fixture
async def demo(plan_file: Path) -> AsyncIterator[tuple[StoreClient, MeshClient, Published, RoutedGateway]]:
    fake = fake_store()
    gateway = RoutedGateway(fake)
    async with (
        serve(fake) as store_address,
        serve(gateway) as gateway_address,
        StoreClient(store_address) as store,
        MeshClient(gateway_address) as mesh,
    ):
        published = await publish(store, load_plan(plan_file), plan_file.parent)
        yield store, mesh, published, gateway


def text_of(*renderables: Any) -> str:
    console = Console(file=io.StringIO(), width=110, markup=False, highlight=False)
    console.print(*renderables, sep="\n")
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_the_plan_of_the_repository_fits() -> None:
    plan = load_plan(find_plan(None))
    assert len(plan.adapters) >= 3
    assert any(len(adapter.versions) > 1 for adapter in plan.adapters)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"adapters": []}, "adapters"),
        ({"adapters": [{**PLAN["adapters"][0], "ref": "Demo"}]}, "ref"),
        ({"adapters": [{**PLAN["adapters"][0], "versions": [{"dir": "nowhere"}]}]}, "not there: nowhere"),
        ({"surprise": 1}, "surprise"),
    ],
)
def test_a_plan_that_does_not_fit_is_refused_with_the_place(
    plan_file: Path, change: dict[str, Any], words: str
) -> None:
    plan_file.write_text(json.dumps(PLAN | change))
    with pytest.raises(CommandError, match=words):
        load_plan(plan_file)


def test_a_plan_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(CommandError, match="there is no"):
        find_plan(tmp_path / "nothing.json")


async def test_publishing_again_changes_nothing(plan_file: Path) -> None:
    fake = fake_store()
    plan = load_plan(plan_file)
    async with serve(fake) as address, StoreClient(address) as store:
        first = await publish(store, plan, plan_file.parent)
        await store.set_alias("demo/ner@prod", 2)
        again = await publish(store, plan, plan_file.parent)
    assert [adapter.versions for adapter in again.adapters] == [
        adapter.versions for adapter in first.adapters
    ]
    assert fake.aliases["demo/ner@prod"][-1].version_number == 2
    assert len(fake.versions["demo/ner"]) == 2
    assert fake.routes["*", "sql"].targets[0].ref == "demo/sql@prod"


async def test_the_answers_are_checked_and_shown_side_by_side(
    demo: tuple[StoreClient, MeshClient, Published, RoutedGateway],
) -> None:
    _, mesh, published, gateway = demo
    worker = fake_worker()
    gateway.worker = worker
    async with serve(worker) as address:
        answers = await ask_everything(mesh, published, [address])
    checks = Checks()
    check_answers(answers, checks)
    assert checks.failed == []
    assert {answer.generation.started.switch_kind for answer in answers} == set(SwitchKind)
    shown = text_of(*answers_table(answers))
    assert "ref demo/ner:v2" in shown
    assert "task sql" in shown
    assert "cold" in shown


async def test_an_answer_by_another_version_fails_the_checks(
    demo: tuple[StoreClient, MeshClient, Published, RoutedGateway],
) -> None:
    _, mesh, published, gateway = demo
    gateway.worker = worker = fake_worker()
    async with serve(worker) as address:
        answers = await ask_everything(mesh, published, [address])
    question = dataclasses.replace(answers[0].question, expected="demo/ner:v2")
    checks = Checks()
    check_answers([Answer(question, 1, answers[0].generation), *answers[1:]], checks)
    (failed,) = checks.failed
    assert failed.detail == "task ner got demo/ner:v1"


async def test_a_hot_swap_serves_each_request_by_the_version_of_its_moment(
    demo: tuple[StoreClient, MeshClient, Published, RoutedGateway],
) -> None:
    store, mesh, published, gateway = demo
    stage = HotSwapStage(mesh, store, published.adapters[0], SystemClock())
    gateway.released = stage._ended
    swap = await stage.run(published.feed_position)
    checks = Checks()
    check_hot_swap(swap, checks)
    assert checks.failed == []
    assert [move.version.number for move in swap.moves] == [2, 1]
    assert "rollback of @prod" in text_of(hot_swap_table(swap))


def served(version: str, sent: float, started: float, finished: float) -> Served:
    return Served(0, sent, started, finished, version, "sha256:" + "a" * 64, "x")


@pytest.fixture
async def swap(demo: tuple[StoreClient, MeshClient, Published, RoutedGateway]) -> HotSwap:
    old, new = demo[2].adapters[0].versions
    moves = (Move("set", new, 2.0, 2.1, 5), Move("rollback", old, 4.0, 4.1, 6))
    return HotSwap(old, moves, ())


@pytest.mark.parametrize(
    ("sent", "started", "expected"),
    [
        (0.0, 1.0, {"demo/ner:v1"}),
        (1.9, 2.05, {"demo/ner:v1", "demo/ner:v2"}),
        (2.2, 2.3, {"demo/ner:v2"}),
        (2.2, 4.05, {"demo/ner:v2", "demo/ner:v1"}),
        (4.2, 4.3, {"demo/ner:v1"}),
    ],
)
async def test_a_request_may_get_only_versions_that_the_alias_pointed_to_meanwhile(
    swap: HotSwap, sent: float, started: float, expected: set[str]
) -> None:
    assert possible_versions(swap, served("x", sent, started, 9.0)) == expected


async def test_a_request_in_flight_that_changed_its_version_fails_the_checks(swap: HotSwap) -> None:
    broken = dataclasses.replace(swap, served=(served("demo/ner:v2", 0.0, 1.0, 3.0),))
    checks = Checks()
    check_hot_swap(broken, checks)
    assert any("got demo/ner:v2" in check.detail for check in checks.failed)


def sample(wanted: SwitchKind, got: SwitchKind, ttft: float) -> Sample:
    started = Started("r", "t", "demo/ner:v1", "d", "b", "demo/ner:v1", "", 0, "w", "store", got, 3)
    finished = Finished("stop", 3, 1, Timings(fetch=0.01, fetched_bytes=2048))
    return Sample(wanted, Generation((Choice("x", (1,), "stop"),), started, finished, ttft, ttft))


def test_the_cost_of_a_switch_is_the_median_of_its_kind() -> None:
    cold = [sample(SwitchKind.COLD, SwitchKind.COLD, seconds) for seconds in (0.1, 0.9, 0.2)]
    times = {entry["switch"]: entry for entry in switch_times(cold)}
    assert times["cold"]["ttft_seconds"] == 0.2
    assert times["warm"]["samples"] == 0
    assert "200.0 ms" in text_of(switch_table(cold))


def test_a_switch_of_another_kind_than_was_prepared_fails_the_checks() -> None:
    checks = Checks()
    check_switches([sample(SwitchKind.COOL, SwitchKind.COLD, 0.1)], checks)
    assert checks.failed[0].detail == "cool was cold"


def test_a_question_says_how_it_was_asked(plan_file: Path) -> None:
    subject: Any = None
    assert Question(subject, "p", "v", task="ner").asked_as == "task ner"
    assert Question(subject, "p", "v", adapter="base").asked_as == "base"
    assert Question(subject, "p", "v", adapter="demo/ner:v2").asked_as == "ref demo/ner:v2"
