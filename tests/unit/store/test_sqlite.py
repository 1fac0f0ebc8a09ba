from pathlib import Path

from sqlalchemy import text

from adaptermesh.store.database import Database, DatabaseConfig


async def test_commits_survive_and_readers_never_wait(tmp_path: Path) -> None:
    database = Database(DatabaseConfig(f"sqlite+aiosqlite:///{tmp_path}/deep/catalogue.db"), lambda: None)
    await database.open("id")
    async with database.reading() as connection:
        for pragma, value in (("journal_mode", "wal"), ("synchronous", 2), ("foreign_keys", 1)):
            assert (await connection.execute(text(f"PRAGMA {pragma}"))).scalar() == value
    await database.close()
