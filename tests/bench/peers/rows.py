"""Drives the engine as a library: submits a workload, steps until it is done, notes every token's time."""

import itertools
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from adaptermesh.core.errors import MeshError
from adaptermesh.core.logprobs import TokenLogprobs
from adaptermesh.core.sampling import SamplingParams
from adaptermesh.worker.engine.engine import Engine
from adaptermesh.worker.engine.request import Outcome, Request

_IDLE_SECONDS = 0.0002
_MAX_IDLE_SECONDS = 60.0


@dataclass(slots=True)
class Heard:
    """The listener of one request; `times` are those of its tokens."""

    submitted: float
    tokens: list[int] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    error: MeshError | None = None
    ended: threading.Event = field(default_factory=threading.Event)

    def on_prompt(self, logprobs: Sequence[TokenLogprobs]) -> None: ...

    def on_tokens(self, text: str, token_ids: list[int], logprobs: Sequence[TokenLogprobs] = ()) -> None:
        self.tokens.extend(token_ids)
        self.times.extend([time.perf_counter()] * len(token_ids))

    def on_finish(self, outcome: Outcome) -> None:
        self.ended.set()

    def on_error(self, error: MeshError) -> None:
        self.error = error
        self.ended.set()


class Rows:
    """Runs workloads one after the other on an engine that nobody else drives."""

    def __init__(self, engine: Engine, digest_of: Callable[[str], str]) -> None:
        self._engine = engine
        self._digest_of = digest_of
        self._count = 0

    def run(self, workload: dict[str, Any]) -> dict[str, Any]:
        """Seconds, tokens of each request, and the times of its tokens counted from its submission."""
        requests = iter(self._requests(workload))
        total = len(workload["items"])
        in_flight = workload["in_flight"] or total
        start = time.perf_counter()
        heard = [self._submit(request) for request in itertools.islice(requests, in_flight)]
        self._drive(heard, requests)
        seconds = time.perf_counter() - start
        for row in heard:
            if row.error is not None:
                raise row.error
        return {
            "seconds": seconds,
            "tokens": [row.tokens for row in heard],
            "times": [[round(at - row.submitted, 6) for at in row.times] for row in heard],
        }

    def _requests(self, workload: dict[str, Any]) -> list[Request]:
        requests = []
        for item in workload["items"]:
            self._count += 1
            adapter = item["adapter"]
            digest = None if adapter is None else self._digest_of(adapter)
            requests.append(
                make_request(f"r{self._count}", digest, item["prompt"], workload["output_tokens"])
            )
        return requests

    def _submit(self, request: Request) -> Heard:
        heard = Heard(time.perf_counter())
        self._engine.submit(request, heard)
        return heard

    def _drive(self, heard: list[Heard], more: Iterator[Request]) -> None:
        """Steps until all have ended; each one that ends makes room for the next."""
        running = list(heard)
        idle_since = time.perf_counter()
        while running:
            if self._engine.step():
                idle_since = time.perf_counter()
            elif time.perf_counter() - idle_since > _MAX_IDLE_SECONDS:
                raise TimeoutError(f"{len(running)} requests make no progress: {self._engine.status()}")
            else:
                # An adapter is on its way.
                time.sleep(_IDLE_SECONDS)
            still = [row for row in running if not row.ended.is_set()]
            joined = [self._submit(request) for request in itertools.islice(more, len(running) - len(still))]
            heard.extend(joined)
            running = still + joined


def make_request(request_id: str, digest: str | None, prompt: list[int], count: int) -> Request:
    """Greedy, `count` tokens whatever they are."""
    sampling = SamplingParams(max_tokens=count, temperature=0.0, ignore_eos=True)
    return Request(request_id, "bench", digest, tuple(prompt), sampling)
