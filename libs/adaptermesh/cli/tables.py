"""How records look in a terminal."""

import datetime
from collections.abc import Iterable

from rich.table import Table
from rich.text import Text

SHORT_DIGEST = 12


def table(*columns: str, title: str = "", right: Iterable[str] = ()) -> Table:
    """A plain table; `right` names the columns of numbers."""
    made = Table(title=title or None, title_justify="left", box=None, pad_edge=False, header_style="bold")
    numbers = frozenset(right)
    for column in columns:
        made.add_column(column, justify="right" if column in numbers else "left", overflow="fold")
    return made


def short_digest(digest: str) -> str:
    """Enough of a digest to tell two apart."""
    return digest.removeprefix("sha256:")[:SHORT_DIGEST]


def size(count: int) -> str:
    """Bytes for people."""
    value = float(count)
    for unit in ("B", "KiB", "MiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} GiB"


def moment(time: datetime.datetime) -> str:
    """A time in the reader's zone; "" for none."""
    if time.timestamp() <= 0:
        return ""
    return time.astimezone().strftime("%Y-%m-%d %H:%M:%S")


def milliseconds(seconds: float) -> str:
    """A duration; "-" if nothing happened."""
    return f"{seconds * 1000:.1f} ms" if seconds > 0 else "-"


def facts(**values: str) -> Table:
    """Names and values, one pair a line; empty values are left out."""
    made = Table(box=None, show_header=False, pad_edge=False)
    made.add_column(style="bold")
    made.add_column(overflow="fold")
    for name, value in values.items():
        if value:
            made.add_row(name.replace("_", " "), Text(value))
    return made
