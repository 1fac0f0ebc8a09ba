"""Adapters on their way to the device, with events that are written down instead of CUDA's."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from adaptermesh.artifact.manifest import Manifest
from adaptermesh.core.errors import MeshError
from adaptermesh.worker.engine.arrivals import Arrival, LayerReader, LayerWaits
from adaptermesh.worker.engine.ops.op import Segment, StepTokens
from adaptermesh.worker.engine.ops.registry import fast_ops
from adaptermesh.worker.engine.slots import DeviceSlots
from tests.unit.worker.engine.conftest import LAYERS, Courier

CPU = torch.device("cpu")


class FakeArrival:
    """Notes what lands and who waits; under way until `done_ns` is set."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.done_ns: int | None = None

    def landed(self, layer: int) -> None:
        self.log.append(f"landed {layer}")

    def wait(self, layer: int) -> None:
        self.log.append(f"wait {layer}")

    def wait_all(self) -> None:
        self.log.append("wait all")

    def elapsed_ns(self) -> int | None:
        return self.done_ns


class FakeCopies:
    """Copies at once, and claims to be under way."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        self.dtype = dtype
        self.arrivals: list[FakeArrival] = []

    @contextlib.contextmanager
    def begin(self) -> Iterator[Arrival]:
        self.arrivals.append(FakeArrival())
        yield self.arrivals[-1]

    def reader(self, manifest: Manifest, data: torch.Tensor) -> LayerReader:
        return LayerReader(manifest, data, CPU, self.dtype)


@pytest.fixture
def copies() -> FakeCopies:
    return FakeCopies()


def make_slots(bench: Any, copies: FakeCopies, count: int = 2) -> DeviceSlots:
    return DeviceSlots(count, LAYERS, fast_ops(bench.base.sites, copies.dtype, CPU, None), copies)


def load(
    slots: DeviceSlots, slot: int, adapter: Any, data: torch.Tensor | None = None, until: int = LAYERS
) -> Arrival | None:
    slots.reserve(slot, adapter.digest, adapter.manifest)
    return slots.fill(slot, until, host(adapter) if data is None else data)


def host(adapter: Any) -> torch.Tensor:
    return torch.frombuffer(bytearray(adapter.data), dtype=torch.uint8)


def test_every_layer_lands_in_order(lab: Any, bench: Any, copies: FakeCopies) -> None:
    adapter = lab.adapter(1)
    slots = make_slots(bench, copies)
    assert load(slots, 0, adapter) is copies.arrivals[0]
    assert copies.arrivals[0].log == ["landed 0", "landed 1", "landed 2"]


def test_a_step_waits_for_its_own_adapters_layer_by_layer_and_once(
    lab: Any, bench: Any, copies: FakeCopies
) -> None:
    slots = make_slots(bench, copies)
    for slot in (0, 1):
        adapter = lab.adapter(slot + 1)
        load(slots, slot, adapter)
        copies.arrivals[slot].log.clear()
    plan = slots.plan(StepTokens((Segment(-1, 0, 1), Segment(1, 1, 3))))
    x, y = torch.randn(3, 64), torch.zeros(3, 64)
    plan.apply("q", 0, x, y)
    plan.apply("o", 0, x, y)
    assert copies.arrivals[1].log == ["wait 0"]
    plan.apply("q", 2, x, y)
    assert copies.arrivals[1].log == ["wait 0", "wait 1", "wait 2"]
    assert copies.arrivals[0].log == []


def test_what_has_arrived_is_not_waited_for(lab: Any, bench: Any, copies: FakeCopies) -> None:
    adapter, slots = lab.adapter(1), make_slots(bench, copies)
    load(slots, 0, adapter)
    slots.await_arrivals([0, -1])
    assert copies.arrivals[0].log[-1] == "wait all"
    copies.arrivals[0].done_ns = 5
    assert slots.plan(StepTokens((Segment(0, 0, 1),))).waits is None
    assert slots._arrivals == {}


def test_an_emptied_slot_waits_for_nobody(lab: Any, bench: Any, copies: FakeCopies) -> None:
    adapter, slots = lab.adapter(1), make_slots(bench, copies)
    load(slots, 0, adapter)
    slots.unload(0)
    slots.await_arrivals([0])
    assert "wait all" not in copies.arrivals[0].log


def test_a_cpu_has_nothing_to_wait_for(lab: Any, bench: Any) -> None:
    adapter = lab.adapter(1)
    slots = DeviceSlots(1, LAYERS, fast_ops(bench.base.sites, torch.float32, CPU, None))
    assert load(slots, 0, adapter) is None
    assert slots.plan(StepTokens((Segment(0, 0, 1),))).waits is None


def test_waits_skip_no_layer() -> None:
    arrival = FakeArrival()
    waits = LayerWaits([arrival])
    waits.before(3)
    waits.before(3)
    waits.before(1)
    assert arrival.log == ["wait 0", "wait 1", "wait 2", "wait 3"]


def test_a_layer_is_copied_once_and_its_tensors_are_those_of_the_file(lab: Any) -> None:
    adapter = lab.adapter(5, layers=[0, 2])
    data = host(adapter)
    read = LayerReader(adapter.manifest, data, CPU, torch.float32)
    entries = {entry.name: entry for entry in adapter.manifest.tensors}
    for module in adapter.manifest.modules:
        for name in module.tensors.values():
            entry = entries[name]
            raw = data[entry.offset : entry.offset + entry.size]
            assert torch.equal(read(name).flatten().view(torch.uint8), raw)
    assert read._ranges == {}


def test_a_weight_too_large_for_half_precision_is_refused_before_the_copy(lab: Any, bench: Any) -> None:
    adapter, copies = lab.adapter(1), FakeCopies(torch.float16)
    slots = make_slots(bench, copies)
    data = host(adapter)
    entry = adapter.manifest.tensors[-1]
    data[entry.offset : entry.offset + entry.size].view(torch.float32)[0] = 1e6
    with pytest.raises(MeshError, match="too large"):
        load(slots, 0, adapter, data)
    assert slots.digest(0) is None
    assert slots._arrivals == {}


def test_an_engine_whose_adapters_arrive_late_answers_right_and_tells_how_long_the_copy_took(
    lab: Any, make_bench: Callable[..., Any], prompts: Any, copies: FakeCopies
) -> None:
    bench, adapter, prompt = make_bench(forward="lean"), lab.adapter(1), prompts(1)[0]
    bench.engine._slots._copies = copies
    heard = bench.submit(adapter, prompt, max_tokens=4)
    while len(heard.tokens) < 2:
        bench.engine.step()
    copies.arrivals[0].done_ns = 7_000_000
    bench.run(heard)
    assert heard.tokens == lab.continuation(adapter, prompt, 4)
    assert "wait 2" in copies.arrivals[0].log
    timeline = heard.outcome.timeline
    # The clock counts in floats of seconds.
    assert abs(timeline.h2d_end_ns - timeline.h2d_start_ns - 7_000_000) < 1000
    assert bench.engine._residency._arriving == []
    bench.assert_empty()


def test_an_adapter_that_comes_in_parts_is_waited_for_part_by_part(
    lab: Any, bench: Any, copies: FakeCopies
) -> None:
    adapter, slots = lab.adapter(1), make_slots(bench, copies)
    data = host(adapter)
    load(slots, 0, adapter, data, until=1)
    plan = slots.plan(StepTokens((Segment(0, 0, 1),)))
    x, y = torch.randn(1, 64), torch.zeros(1, 64)
    plan.apply("q", 0, x, y)
    first = copies.arrivals[0]
    assert first.log == ["landed 0", "wait 0"]
    first.done_ns = 5
    slots.fill(0, LAYERS, data)
    slots.plan(StepTokens((Segment(0, 0, 1),))).apply("q", 2, x, y)
    assert copies.arrivals[1].log == ["landed 1", "landed 2", "wait 0", "wait 1", "wait 2"]
    assert first.log == ["landed 0", "wait 0"]


def test_the_rest_of_an_adapter_is_read_from_the_transfer_that_brings_it(
    lab: Any, bench: Any, copies: FakeCopies
) -> None:
    adapter, slots, plain = lab.adapter(1), make_slots(bench, copies), make_slots(bench, copies)
    broken = host(adapter)
    ends = {chunk.layer: chunk.offset + chunk.size for chunk in adapter.manifest.chunks}
    broken[ends[0] :] = 0
    load(slots, 0, adapter, broken, until=1)
    slots.fill(0, LAYERS, host(adapter))
    load(plain, 0, adapter)
    tokens, x = StepTokens((Segment(0, 0, 1),)), torch.randn(1, 64)
    for layer in range(LAYERS):
        found, expected = torch.zeros(1, 64), torch.zeros(1, 64)
        slots.plan(tokens).apply("q", layer, x, found)
        plain.plan(tokens).apply("q", layer, x, expected)
        assert torch.equal(found, expected)


def test_layers_that_arrive_from_the_store_are_computed_behind_their_copies(
    lab: Any, make_bench: Callable[..., Any], copies: FakeCopies
) -> None:
    bench, adapter, prompt = make_bench(forward="lean"), lab.adapter(1), [3, 1, 4, 1, 5]
    bench.engine._slots._copies = copies
    bench.source.held = True
    heard = bench.submit(adapter, prompt, max_tokens=4)
    courier: Courier = bench.courier(adapter)
    courier.send_layers(1)
    bench.engine.step()
    assert copies.arrivals[0].log == ["landed 0", "wait 0"]
    bench.clock.now += 2
    courier.finish()
    bench.engine.step()
    assert copies.arrivals[1].log == ["landed 1", "landed 2", "wait 0", "wait 1", "wait 2"]
    for arrival in copies.arrivals:
        arrival.done_ns = 7_000_000
    bench.run(heard)
    assert heard.tokens == lab.continuation(adapter, prompt, 4)
    timeline = heard.outcome.timeline
    assert abs(timeline.h2d_end_ns - timeline.h2d_start_ns - 2_007_000_000) < 1000
    bench.assert_empty()
