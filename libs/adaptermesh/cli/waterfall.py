"""One trace as a waterfall: a tree of spans, each with a bar on one scale of time."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

from adaptermesh.cli.tables import short_digest, size
from adaptermesh.telemetry.trace_reader import SpanRecord

_COLORS = {"gateway": "cyan", "router": "magenta", "worker": "green", "store": "yellow"}
_MIN_BAR = 20
_MAX_NAME = 44
_NUMBER = 8
_GAP = " "


@dataclass(frozen=True, slots=True)
class Row:
    """One span at its place in the tree."""

    span: SpanRecord
    prefix: str
    """The lines of the tree before the name."""
    shared: bool
    """It belongs to another trace: work that was done for both."""


def tree_of(spans: Sequence[SpanRecord]) -> list[Row]:
    """Spans in the order of the tree: children after their parents, by start.

    A span of another trace stands under the one that links to it. A span whose parent is missing (its service
    was killed, or the caller recorded nothing) is a root.
    """
    own_trace = _own_trace(spans)
    present = {span.span_id: span for span in spans}
    linked_from = {
        link: span.span_id for span in spans if span.trace_id == own_trace for _, link in span.links
    }
    children: dict[str, list[SpanRecord]] = defaultdict(list)
    for span in sorted(spans, key=lambda span: (span.start_ns, -span.end_ns)):
        parent = span.parent_id if span.trace_id == own_trace else linked_from.get(span.span_id, "")
        children[parent if parent in present and parent != span.span_id else ""].append(span)
    return list(_rows(children, "", "", own_trace, is_root=True))


def _rows(
    children: dict[str, list[SpanRecord]], parent: str, indent: str, own_trace: str, *, is_root: bool
) -> Iterator[Row]:
    siblings = children.pop(parent, [])
    for index, span in enumerate(siblings):
        is_last = index == len(siblings) - 1
        branch = "" if is_root else ("└ " if is_last else "├ ")
        yield Row(span, indent + branch, span.trace_id != own_trace)
        below = "" if is_root else indent + ("  " if is_last else "│ ")
        yield from _rows(children, span.span_id, below, own_trace, is_root=False)


def _own_trace(spans: Sequence[SpanRecord]) -> str:
    """The trace that was asked for: the only one that links to others."""
    linked = {trace for span in spans for trace, _ in span.links}
    traces = [span.trace_id for span in spans]
    owns = [trace for trace in traces if trace not in linked]
    return owns[0] if owns else max(set(traces), key=traces.count)


class Waterfall:
    """A renderable trace."""

    def __init__(self, spans: Sequence[SpanRecord]) -> None:
        self._rows = tree_of(spans)
        own = [row.span for row in self._rows if not row.shared]
        self._origin = min((span.start_ns for span in own), default=0)
        self._length = max(max((span.end_ns for span in own), default=0) - self._origin, 1)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width = options.max_width
        services = max([len(row.span.service) for row in self._rows], default=0)
        names = max([len(row.prefix) + len(_name(row)) for row in self._rows], default=0)
        fixed = services + 2 * _NUMBER + 4 * len(_GAP)
        name_width = max(min(names, _MAX_NAME, width - fixed - _MIN_BAR), 12)
        bar_width = max(width - fixed - name_width, _MIN_BAR)
        ascii_only = options.ascii_only
        yield self._header(name_width, services, bar_width)
        for row in self._rows:
            yield self._line(row, name_width, services, bar_width, ascii_only=ascii_only)
            if row.span.status == "error":
                message = row.span.status_message or "failed"
                yield Text(f"{' ' * len(row.prefix)}  ! {message}", "red", overflow="fold")

    def _header(self, name_width: int, services: int, bar_width: int) -> Text:
        scale = f"0{_duration(self._length):>{bar_width - 1}}"
        return Text(
            f"{'span':<{name_width}}{_GAP}{'service':<{services}}"[: name_width + services + 1]
            + f"{_GAP}{'at ms':>{_NUMBER}}{_GAP}{'took ms':>{_NUMBER}}{_GAP}{scale}",
            "dim",
            no_wrap=True,
            overflow="crop",
        )

    def _line(self, row: Row, name_width: int, services: int, bar_width: int, *, ascii_only: bool) -> Text:
        span = row.span
        failed = span.status == "error"
        color = "red" if failed else _COLORS.get(span.service, "blue")
        line = Text(no_wrap=True, overflow="crop")
        prefix = row.prefix.translate(_ASCII_TREE) if ascii_only else row.prefix
        name = _cut(_name(row), name_width - len(prefix))
        line.append(prefix, "dim")
        line.append(name, "bold red" if failed else "")
        line.append(" " * (name_width - len(prefix) - len(name)) + _GAP)
        line.append(f"{span.service:<{services}}", color)
        line.append(f"{_GAP}{_milliseconds(span.start_ns - self._origin):>{_NUMBER}}")
        line.append(f"{_GAP}{_milliseconds(span.end_ns - span.start_ns):>{_NUMBER}}{_GAP}")
        line.append_text(self._bar(span, bar_width, color, "=" if ascii_only else "━"))
        return line

    def _bar(self, span: SpanRecord, width: int, color: str, stroke: str) -> Text:
        """The bar, and a note beside it where there is room."""
        start = self._column(span.start_ns, width)
        end = self._column(span.end_ns, width)
        start = min(start, width - 1)
        length = max(end - start, 1)
        bar = Text(no_wrap=True)
        note = note_of(span)
        if note and width - start - length > len(note):
            bar.append(" " * start).append(stroke * length, color).append(f" {note}", "dim")
        elif note and start > len(note):
            bar.append(f"{note:>{start - 1}} ", "dim").append(stroke * length, color)
        else:
            bar.append(" " * start).append(stroke * length, color)
        return bar

    def _column(self, at_ns: int, width: int) -> int:
        return max(0, min(width, round((at_ns - self._origin) * width / self._length)))


def note_of(span: SpanRecord) -> str:
    """What is worth saying beside a span: kind of switch, tier, bytes, time to verify."""
    get = span.attributes.get
    words: list[str] = []
    if kind := get("adaptermesh.switch.kind"):
        words.append(str(kind))
    if (tier := get("adaptermesh.switch.tier")) and span.name != "gateway.request":
        words.append(f"tier {tier}")
    if (count := get("adaptermesh.adapter.bytes")) and span.name == "adapter.fetch":
        words.append(size(int(count)))
    if (verify := get("adaptermesh.switch.verify_ms")) and span.name == "adapter.fetch":
        words.append(f"verify {float(verify):.1f} ms")
    if get("adaptermesh.switch.shared_fetch") and span.name != "gateway.request":
        words.append("shared fetch")
    return ", ".join(words)


def describe(spans: Sequence[SpanRecord]) -> list[str]:
    """What a trace is about, in a few lines."""
    rows = tree_of(spans)
    own = [row.span for row in rows if not row.shared]
    about: dict[str, Any] = {}
    for span in sorted(own, key=lambda span: span.name != "gateway.request"):
        for key, value in span.attributes.items():
            about.setdefault(key, value)
    length = max(span.end_ns for span in own) - min(span.start_ns for span in own)
    services = sorted({span.service for span in own})
    first = f"trace {own[0].trace_id}  {_duration(length)}  {len(own)} spans, {', '.join(services)}"
    pairs = (
        ("version", about.get("adaptermesh.adapter.version")),
        ("digest", short_digest(str(about.get("adaptermesh.adapter.digest", "")))),
        ("switch", about.get("adaptermesh.switch.kind")),
        ("tier", about.get("adaptermesh.switch.tier")),
        ("task", about.get("adaptermesh.route.name")),
        ("cohort", about.get("adaptermesh.route.cohort")),
        ("worker", about.get("adaptermesh.worker.id")),
    )
    second = "  ".join(f"{name} {value}" for name, value in pairs if value)
    return [line for line in (first, second) if line]


_ASCII_TREE = str.maketrans({"└": "`", "├": "|", "│": "|"})


def _name(row: Row) -> str:
    """`package.Service/Method` without its package; work that was shared is marked."""
    package_and_service, slash, method = row.span.name.partition("/")
    name = f"{package_and_service.rpartition('.')[2]}/{method}" if slash else row.span.name
    return f"{name} (shared)" if row.shared else name


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else text[: max(width - 1, 0)] + "…"


def _milliseconds(ns: int) -> str:
    return f"{ns / 1e6:.1f}"


def _duration(ns: int) -> str:
    return f"{ns / 1e9:.2f} s" if ns >= 10**9 else f"{ns / 1e6:.1f} ms"
