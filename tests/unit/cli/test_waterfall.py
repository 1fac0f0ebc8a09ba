import io
from typing import Any

from rich.console import Console

from adaptermesh.cli.waterfall import Waterfall, describe, tree_of
from adaptermesh.telemetry.trace_reader import SpanRecord

MS = 1_000_000
TRACE = "a" * 32
OTHER = "b" * 32


def span(
    span_id: str, parent: str, name: str, service: str, start_ms: float, end_ms: float, **fields: Any
) -> SpanRecord:
    values: dict[str, Any] = {"trace_id": TRACE, "attributes": {}, "links": (), "status": "unset"}
    values |= {"status_message": "", "kind": "internal", "instance": "1"}
    return SpanRecord(
        span_id=span_id,
        parent_id=parent,
        name=name,
        service=service,
        start_ns=10**18 + int(start_ms * MS),
        end_ns=10**18 + int(end_ms * MS),
        **(values | fields),
    )


COLD = [
    span(
        "1",
        "",
        "gateway.request",
        "gateway",
        0,
        100,
        attributes={
            "adaptermesh.adapter.version": "acme/ner:v1",
            "adaptermesh.adapter.digest": "sha256:" + "c" * 64,
            "adaptermesh.switch.kind": "cold",
            "adaptermesh.switch.tier": "store",
        },
    ),
    span("2", "1", "adaptermesh.api.router.v1.RouterService/Dispatch", "router", 1, 3),
    span("3", "1", "adaptermesh.api.worker.v1.WorkerService/Generate", "worker", 5, 100),
    span("4", "3", "adapter.fetch", "worker", 10, 40, attributes={"adaptermesh.adapter.bytes": 2_097_152}),
    span("5", "4", "adaptermesh.api.store.v1.StoreService/FetchAdapter", "store", 12, 38),
    span("6", "3", "engine.decode", "worker", 50, 100),
]


def drawn(spans: list[SpanRecord], width: int = 100, encoding: str = "utf-8") -> list[str]:
    buffer = io.BytesIO()
    file = io.TextIOWrapper(buffer, encoding=encoding)
    console = Console(file=file, width=width, markup=False, highlight=False)
    console.print(Waterfall(spans))
    file.flush()
    return buffer.getvalue().decode(encoding).splitlines()


def test_spans_stand_under_their_parents_with_offsets_and_bars_on_one_scale() -> None:
    lines = drawn(COLD)
    assert [line[:30].rstrip() for line in lines[1:]] == [
        "gateway.request",
        "├ RouterService/Dispatch",
        "└ WorkerService/Generate",
        "  ├ adapter.fetch",
        "  │ └ StoreService/FetchAdapter"[:30],
        "  └ engine.decode",
    ]
    assert all(len(line) <= 100 for line in lines)
    request, decode = lines[1], lines[6]
    assert request.split()[1:4] == ["gateway", "0.0", "100.0"]
    assert decode.split()[2:5] == ["worker", "50.0", "50.0"]
    length = request.count("━")
    assert abs(decode.count("━") - length / 2) <= 1
    assert decode.endswith("━")
    assert lines[0].endswith("100.0 ms")


def test_a_note_stands_beside_its_bar() -> None:
    assert "2.0 MiB" in drawn(COLD)[4]


def test_the_description_says_what_was_switched() -> None:
    first, second = describe(COLD)
    assert first.startswith(f"trace {TRACE}  100.0 ms  6 spans, gateway, router, store, worker")
    assert second == "version acme/ner:v1  digest cccccccccccc  switch cold  tier store"


def test_an_error_is_shown_under_its_span() -> None:
    failed = span("6", "3", "engine.decode", "worker", 50, 60, status="error", status_message="out of memory")
    lines = drawn([*COLD[:5], failed])
    assert lines[-1].strip() == "! out of memory"


def test_a_fetch_of_another_trace_is_marked_under_the_span_that_links_to_it() -> None:
    waiting = span("4", "3", "worker.admit", "worker", 10, 40, links=((OTHER, "9"),))
    fetch = span("9", "8", "adapter.fetch", "worker", -20, 38, trace_id=OTHER)
    rows = tree_of([*COLD[:3], waiting, fetch])
    assert [(row.span.span_id, row.shared) for row in rows] == [
        ("1", False),
        ("2", False),
        ("3", False),
        ("4", False),
        ("9", True),
    ]
    lines = drawn([*COLD[:3], waiting, fetch])
    assert "adapter.fetch (shared)" in lines[5]
    assert "-20.0" in lines[5]


def test_a_span_whose_parent_is_missing_is_a_root() -> None:
    rows = tree_of(COLD[2:])
    assert [row.prefix for row in rows] == ["", "├ ", "│ └ ", "└ "]


def test_a_terminal_without_unicode_gets_plain_bars() -> None:
    text = "\n".join(drawn(COLD, encoding="ascii"))
    assert "=" in text
    assert "━" not in text


def test_a_narrow_terminal_cuts_names_not_numbers() -> None:
    lines = drawn(COLD, width=70)
    assert all(len(line) <= 70 for line in lines)
    assert "0.0" in lines[1]
