"""What a switch costs: cold from the store, cool from host memory, warm in its slot."""

import asyncio
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import RenderableType

from adaptermesh.cli.demo.checks import Checks
from adaptermesh.cli.demo.publish import PublishedAdapter
from adaptermesh.cli.demo.residency import evict, load_to_host
from adaptermesh.cli.tables import milliseconds, size, table
from adaptermesh.client import (
    ROUTER_SERVICE,
    STORE_SERVICE,
    WORKER_SERVICE,
    Code,
    Generation,
    MeshClient,
    MeshError,
    Prompt,
    SamplingParams,
    SwitchKind,
)
from adaptermesh.core.refs import BASE
from adaptermesh.telemetry.trace_reader import SpanRecord, load_trace

ROUNDS = 5
_ORDER = (SwitchKind.NONE, SwitchKind.WARM, SwitchKind.COOL, SwitchKind.COLD)
_SERVICES = frozenset({"gateway", "router", "store", "worker"})
# The switch path, as every cold switch takes it.
_STEPS = frozenset(
    {
        "gateway.request",
        "router.resolve",
        "router.pick",
        "worker.admit",
        "adapter.fetch",
        "adapter.h2d",
        "engine.prefill",
        "engine.decode",
        f"{ROUTER_SERVICE}/Dispatch",
        f"{WORKER_SERVICE}/Generate",
        f"{STORE_SERVICE}/FetchAdapter",
    }
)
_ATTEMPTS = 100
_PAUSE_SECONDS = 0.1


@dataclass(frozen=True, slots=True)
class Sample:
    """One request on an idle mesh: the kind of switch that was prepared, and what came of it."""

    wanted: SwitchKind
    generation: Generation


async def measure_switches(
    mesh: MeshClient, workers: Sequence[str], adapter: PublishedAdapter
) -> list[Sample]:
    """Each kind of switch several times, one after the other, with one token generated."""
    version = adapter.versions[0]
    samples: list[Sample] = []
    for _ in range(ROUNDS):
        await evict(workers, version.digest)
        samples.append(Sample(SwitchKind.COLD, await _ask(mesh, adapter, version.ref)))
        await evict(workers, version.digest)
        await load_to_host(workers, version.digest)
        samples.append(Sample(SwitchKind.COOL, await _ask(mesh, adapter, version.ref)))
        samples.append(Sample(SwitchKind.WARM, await _ask(mesh, adapter, version.ref)))
        samples.append(Sample(SwitchKind.NONE, await _ask(mesh, adapter, BASE)))
    return samples


def check_switches(samples: Sequence[Sample], checks: Checks) -> None:
    """Each request must have taken the kind of switch that was prepared."""
    wrong = [
        f"{sample.wanted} was {sample.generation.started.switch_kind}"
        for sample in samples
        if sample.generation.started.switch_kind is not sample.wanted
    ]
    checks.expect(
        not wrong, "evicted adapters switch cold, those in host memory cool, the rest warm", ", ".join(wrong)
    )


def switch_times(samples: Sequence[Sample]) -> list[dict[str, object]]:
    """Medians by kind, in seconds, for programs."""
    found: list[dict[str, object]] = []
    for kind in _ORDER:
        generations = [sample.generation for sample in samples if sample.wanted is kind]
        timings = [generation.finished.timings for generation in generations]
        found.append(
            {
                "switch": kind.value,
                "samples": len(generations),
                "ttft_seconds": _median([generation.ttft for generation in generations]),
                "worker_ttft_seconds": _median([timing.time_to_first_token for timing in timings]),
                "queue_seconds": _median([timing.queue for timing in timings]),
                "fetch_seconds": _median([timing.fetch for timing in timings]),
                "verify_seconds": _median([timing.verify for timing in timings]),
                "h2d_seconds": _median([timing.h2d for timing in timings]),
                "prefill_seconds": _median([timing.prefill for timing in timings]),
                "fetched_bytes": int(_median([float(timing.fetched_bytes) for timing in timings])),
            }
        )
    return found


def switch_table(samples: Sequence[Sample]) -> RenderableType:
    """Medians by kind, for people."""
    steps = ("first token", "queue", "fetch", "verify", "h2d", "prefill")
    rows = table("switch", "samples", *steps, "fetched", right=("samples", *steps, "fetched"))
    names = {
        SwitchKind.NONE: "base (none)",
        SwitchKind.WARM: "warm",
        SwitchKind.COOL: "cool",
        SwitchKind.COLD: "cold",
    }
    for kind, times in zip(_ORDER, switch_times(samples), strict=True):
        columns = ("ttft", "queue", "fetch", "verify", "h2d", "prefill")
        fetched = int(str(times["fetched_bytes"]))
        rows.add_row(
            names[kind],
            str(times["samples"]),
            *(milliseconds(float(str(times[f"{column}_seconds"]))) for column in columns),
            size(fetched) if fetched else "-",
        )
    return rows


async def trace_cold_switch(
    mesh: MeshClient, workers: Sequence[str], adapter: PublishedAdapter, traces: Path, checks: Checks
) -> list[SpanRecord]:
    """One cold switch by task, and its spans from all four services."""
    digest = adapter.versions[0].digest
    await evict(workers, digest)
    answer = await mesh.complete(
        Prompt.chat(adapter.plan.prompts[0], system=adapter.plan.system),
        task=adapter.plan.task,
        sampling=SamplingParams(max_tokens=8, temperature=0.0),
    )
    checks.expect(
        answer.started.switch_kind is SwitchKind.COLD and answer.digest == digest,
        "the traced request was a cold switch",
        f"it was {answer.started.switch_kind} of {answer.version}",
    )
    checks.expect(bool(answer.trace_id), "the answer names its trace", "it names none")
    if not answer.trace_id:
        return []
    spans = await _spans(traces, answer.trace_id)
    checks.expect(
        not _missing(spans),
        "one trace has every step of the switch in gateway, router, worker and store",
        f"{', '.join(sorted(_missing(spans)))} missing",
    )
    return spans


async def _spans(traces: Path, trace_id: str) -> list[SpanRecord]:
    """The trace's spans; the services write them a moment after the answer."""
    spans: list[SpanRecord] = []
    for _ in range(_ATTEMPTS):
        try:
            spans = await asyncio.to_thread(load_trace, traces, trace_id)
        except MeshError as error:
            if error.code is not Code.NOT_FOUND:
                raise
        if not _missing(spans):
            break
        await asyncio.sleep(_PAUSE_SECONDS)
    return spans


def _missing(spans: Sequence[SpanRecord]) -> frozenset[str]:
    """Steps and services that a whole trace of a cold switch has and this one lacks."""
    names, services = {span.name for span in spans}, {span.service for span in spans}
    return (_STEPS - names) | (_SERVICES - services)


async def _ask(mesh: MeshClient, adapter: PublishedAdapter, ref: str) -> Generation:
    return await mesh.complete(
        Prompt.chat(adapter.plan.prompts[0], system=adapter.plan.system),
        adapter=ref,
        sampling=SamplingParams(max_tokens=1, temperature=0.0),
    )


def _median(values: Sequence[float]) -> float:
    return statistics.median(values) if values else 0.0
