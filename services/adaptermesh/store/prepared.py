"""Queries that are compiled once and run by the driver itself: for what is asked most often."""

from collections import namedtuple
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from sqlalchemy import Dialect, Select


class Prepared:
    """A SELECT in the words of one driver. Its parameters are `bindparam`s, all of which get a value."""

    def __init__(self, query: Select[Any], dialect: Dialect) -> None:
        compiled = query.compile(dialect=dialect)
        self.sql = str(compiled)
        self._names: Sequence[str] = compiled.positiontup or ()
        self._constants = {name: value for name, value in compiled.params.items() if value is not None}
        columns = [(column.name, column.type) for column in query.selected_columns]
        self._row = _row_type([name for name, _ in columns])
        processors = (type_.dialect_impl(dialect).result_processor(dialect, None) for _, type_ in columns)
        self._processors = [(place, one) for place, one in enumerate(processors) if one is not None]

    def values(self, named: Mapping[str, Any]) -> tuple[Any, ...]:
        """The parameters in the order of the words."""
        known = {**self._constants, **named}
        return tuple(known[name] for name in self._names)

    def rows(self, found: Iterable[Sequence[Any]]) -> list[Any]:
        """The driver's rows, each with its columns as attributes, of the types of the query."""
        return [self._made(row) for row in found]

    def _made(self, row: Sequence[Any]) -> Any:
        values = list(row)
        for place, process in self._processors:
            values[place] = process(values[place])
        return self._row._make(values)


def _row_type(names: Sequence[str]) -> Any:
    """Rows like those of SQLAlchemy, without what these cost."""
    return type("PreparedRow", (namedtuple("PreparedRow", names),), {"__slots__": ()})
