"""Many rows into a table at once, as fast as the database takes them."""

from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import Table, insert
from sqlalchemy.ext.asyncio import AsyncConnection


async def add_rows(connection: AsyncConnection, table: Table, rows: Sequence[Mapping[str, Any]]) -> None:
    """Adds rows that all have the same columns, inside the caller's transaction."""
    if connection.dialect.name != "postgresql":
        await connection.execute(insert(table), rows)
        return
    columns = list(rows[0])
    processors = [
        table.c[name].type.dialect_impl(connection.dialect).bind_processor(connection.dialect)
        for name in columns
    ]
    records = [
        tuple(
            row[name] if process is None else process(row[name])
            for name, process in zip(columns, processors, strict=True)
        )
        for row in rows
    ]
    driver: Any = (await connection.get_raw_connection()).driver_connection
    await driver.copy_records_to_table(table.name, records=records, columns=columns)
