"""Adapters that come, go and are replaced under a running load, many more than there are slots."""

import contextlib
from typing import Any

import pytest
import torch

from adaptermesh.core.errors import Code, MeshError
from adaptermesh.core.tiers import Tier
from tests.unit.worker.engine.conftest import Courier

TURNS = 500


class Churn:
    """Random arrivals of requests and of bytes, cancellations, evictions and loads; the same for a seed."""

    def __init__(self, lab: Any, bench: Any, adapters: list[Any], seed: int) -> None:
        self.lab = lab
        self.bench = bench
        self.adapters = adapters
        self.asked: list[tuple[Any, list[int], int, Any]] = []
        self.loads: list[list[MeshError | None]] = []
        self._couriers: list[Courier] = []
        self._generator = torch.Generator().manual_seed(seed)
        bench.source.held = True
        bench.source.adapters.update({adapter.digest: adapter for adapter in adapters})

    def pick(self, count: int) -> int:
        return int(torch.randint(0, count, (1,), generator=self._generator))

    def turn(self) -> None:
        action = self.pick(20)
        if action < 6:
            self.submit()
        elif action < 14:
            self.deliver(whole=action < 7)
        elif action == 14 and self.asked:
            self.bench.engine.cancel(f"c{self.pick(len(self.asked))}")
        elif action == 15:
            with contextlib.suppress(MeshError):
                self.bench.engine.evict(self.adapters[self.pick(len(self.adapters))].digest)
        elif action == 16:
            self.loads.append([])
            adapter = self.adapters[self.pick(len(self.adapters))]
            self.bench.engine.load(adapter.digest, Tier(2 + self.pick(3)), False, self.loads[-1].append)
        self.bench.clock.now += 0.5
        self.bench.engine.step()

    def submit(self) -> None:
        adapter = [*self.adapters, None][self.pick(len(self.adapters) + 1)]
        prompt = [(7 * place + self.pick(3)) % 250 for place in range(1 + self.pick(24))]
        count = 1 + self.pick(8)
        heard = self.bench.submit(
            adapter, prompt, count, request_id=f"c{len(self.asked)}", tenant=f"t{self.pick(3)}"
        )
        self.asked.append((adapter, prompt, count, heard))

    def deliver(self, *, whole: bool) -> None:
        """The next layer, or all that is left, of one of the transfers."""
        by_digest = {adapter.digest: adapter for adapter in self.adapters}
        waiting = self.bench.source.waiting
        self._couriers += [Courier(by_digest[digest], sink) for digest, sink in waiting]
        waiting.clear()
        if not self._couriers:
            return
        courier = self._couriers[self.pick(len(self._couriers))]
        try:
            if whole:
                courier.finish()
                self._couriers.remove(courier)
            else:
                courier.send_layers(courier.layers + 1)
        except MeshError:
            # It was called off, or finds no room now: then another one is asked for later.
            self._couriers.remove(courier)

    def finish(self) -> None:
        for _ in range(3000):
            if all(heard.ended.is_set() for *_, heard in self.asked) and all(self.loads):
                return
            self.deliver(whole=True)
            self.bench.clock.now += 0.5
            self.bench.engine.step()
        raise AssertionError("some requests never end")


@pytest.mark.parametrize("seed", [1, 2])
def test_every_answer_is_its_own_adapters_whatever_comes_and_goes(
    lab: Any, make_bench: Any, seed: int
) -> None:
    adapters = [
        *(lab.adapter(100 + number, 1 + number % 4, ("q_proj", "v_proj")) for number in range(5)),
        lab.adapter(1, 4),
        lab.adapter(4, 2, rank_pattern={"q_proj": 6, "layers.1.mlp.up_proj": 3}),
        lab.adapter(5, 3, ("o_proj", "gate_proj"), layers=[1]),
    ]
    largest = max(len(adapter.data) for adapter in adapters)
    bench = make_bench(
        device_slots=3,
        host_bytes=4 * largest,
        disk_bytes=2 * largest,
        kv_tokens=320,
        max_batch_rows=6,
        max_context_tokens=64,
        max_overtakes=4,
    )
    advance = bench.engine._runner.advance
    continued: list[int] = []

    def watch(one: Any, fresh: list[int]) -> Any:
        continued.append(one.early.done)
        return advance(one, fresh)

    bench.engine._runner.advance = watch
    churn = Churn(lab, bench, adapters, seed)
    for _ in range(TURNS):
        churn.turn()
    churn.finish()
    for adapter, prompt, count, heard in churn.asked:
        expected = lab.continuation(adapter, prompt, 8)[:count]
        if heard.outcome is not None:
            assert heard.tokens == expected
        else:
            assert heard.error.code is Code.CANCELLED
            assert heard.tokens == expected[: len(heard.tokens)]
    assert sum(heard.outcome is not None for *_, heard in churn.asked) > len(churn.asked) / 2
    assert sum(done > 0 for done in continued) > 10, "nothing was computed while it arrived"
    assert all(len(ends) == 1 for ends in churn.loads)
    bench.engine.step()
    bench.assert_empty()
