"""Steps of decodes alone, recorded once and replayed: a graph for a count of rows, with adapters or without.

A graph reads buffers that stay where they are. A step is written into them and the graph of the next larger
count of rows is replayed; the rows beyond the step's own see no keys, write into the scratch block and have
no adapter. A graph with adapters has room for one adapter a row, of at most the rank that it was recorded
for, at the sites that the arenas then had. A step that needs more gets another graph or runs without one; it
never goes through one that is too small (sglang#28371).
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

from adaptermesh.worker.engine.batch import HostStep
from adaptermesh.worker.engine.forward.forward import Forward
from adaptermesh.worker.engine.kv import KvCache
from adaptermesh.worker.engine.slots import AdapterPlan, CapturedSlots, DeviceSlots
from adaptermesh.worker.engine.static_step import StaticStep

log = logging.getLogger(__name__)

_LEAST_RANK = 16
"""Ranks below it share a graph: the launches of a graph for fewer would hardly be smaller."""

Replay = Callable[[], torch.Tensor]


class Recorder(Protocol):
    """Records a function over static buffers."""

    def record(self, run: Callable[[], torch.Tensor]) -> Replay:
        """What runs it again, on what the buffers then hold. Its result is valid until the next replay."""
        ...


class CudaRecorder:
    """CUDA graphs. All share one pool of memory: only one of them runs at a time."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def record(self, run: Callable[[], torch.Tensor]) -> Replay:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            # Kernels are compiled and libraries set up here: a capture may not do that.
            run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # thread_local: threads that bring adapters allocate page-locked memory meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"):
            out = run()

        def replay() -> torch.Tensor:
            graph.replay()
            return out

        return replay


@dataclass(frozen=True, slots=True)
class GraphKey:
    """What a graph was recorded for: rows, and the largest rank of their adapters; 0 is the base alone."""

    rows: int
    rank: int


class DecodeGraphs:
    """The graphs of one engine, recorded when a step first asks for one, at most `most` of them."""

    def __init__(
        self,
        forward: Forward,
        cache: KvCache,
        slots: DeviceSlots,
        static: StaticStep,
        recorder: Recorder,
        most: int,
    ) -> None:
        self._forward = forward
        self._cache = cache
        self._slots = slots
        self._static = static
        self._recorder = recorder
        self._most = most
        self._buckets = row_buckets(static.rows)
        self._graphs: dict[GraphKey, Replay] = {}
        self._adapters: dict[int, CapturedSlots] = {}
        self._layout = slots.layout
        self._broken = False

    def run(self, step: HostStep) -> torch.Tensor | None:
        """The step's logits, [rows, vocabulary] float32; None: run it without a graph."""
        rows = len(step.spans)
        if self._broken or step.decodes != rows or rows > self._static.rows or len(step.outputs) != rows:
            return None
        self._forget_moved()
        bucket = next(bucket for bucket in self._buckets if bucket >= rows)
        key = self._find(bucket, self._slots.rank_of(step.slots))
        if key is None:
            return None
        self._static.fill(step, bucket)
        if key.rank:
            self._adapters[key.rank].fill(step.slots, bucket)
            self._slots.await_arrivals(step.slots)
        replay = self._graphs.get(key) or self._record(key)
        return None if replay is None else replay()[:rows]

    def _find(self, bucket: int, rank: int | None) -> GraphKey | None:
        """The smallest graph that has room, or the key of one that may be recorded. None for neither."""
        if rank is None:
            return None
        ranks = [key.rank for key in self._graphs if key.rows == bucket and key.rank >= rank]
        fitting = [found for found in ranks if (found == 0) == (rank == 0)]
        if fitting:
            return GraphKey(bucket, min(fitting))
        if len(self._graphs) >= self._most:
            return None
        wanted = 0 if rank == 0 else max(_LEAST_RANK, 1 << (rank - 1).bit_length())
        if wanted and wanted not in self._adapters:
            captured = self._slots.capture(self._static.rows, wanted)
            if captured is None:
                return None
            self._adapters[wanted] = captured
        return GraphKey(bucket, wanted)

    def _record(self, key: GraphKey) -> Replay | None:
        adapters = self._adapters[key.rank].plan(key.rows) if key.rank else AdapterPlan()
        batch = self._static.batch(key.rows, adapters)

        def run() -> torch.Tensor:
            return self._forward.run(batch(), self._cache)

        try:
            replay = self._recorder.record(run)
        except Exception:
            # What a model does may not be recordable; without graphs it is right all the same.
            log.exception("recording a step failed; steps run without graphs from now on")
            self._broken = True
            return None
        self._graphs[key] = replay
        return replay

    def _forget_moved(self) -> None:
        """Drops the graphs with adapters if an arena has moved or a site has got its first rows."""
        if self._slots.layout == self._layout:
            return
        self._layout = self._slots.layout
        self._graphs = {key: graph for key, graph in self._graphs.items() if key.rank == 0}
        self._adapters.clear()


def row_buckets(most: int) -> tuple[int, ...]:
    """Counts of rows that have graphs: 1, 2, 4, 8, then steps of 8, up to `most`."""
    return tuple(sorted({*(count for count in (1, 2, 4) if count < most), *range(8, most, 8), most}))
