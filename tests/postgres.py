"""A real PostgreSQL for the tests: one server for a session, one database for each test."""

import asyncio
import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote

import pytest

BINARIES = Path("/usr/lib/postgresql/15/bin")
USER = "postgres"
# Each has a meaning in a URL, so that one that is not escaped is found.
PASSWORD = "p@ss/w:rd?%41"
EMPTY = "template0"
MIGRATED = "migrated"
_START_SECONDS = 60.0
_POLL_SECONDS = 0.02
# Set by `.ci/run`: what is not there is then a failure.
_REQUIRED = "ADAPTERMESH_TESTS_REQUIRE_COMPONENTS"


class PostgresServer:
    """A PostgreSQL of its own on loopback, in a folder of its own; it ends when this process does.

    Args:
        durable: whether a commit waits for the disk, as it does by default; a process that is killed loses
            nothing either way.
    """

    def __init__(self, *, durable: bool) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="adaptermesh-postgres-"))
        self._durable = durable
        self._process: subprocess.Popen[bytes] | None = None
        self._made = 0
        self._left: list[str] = []
        self.port = _free_port()

    def create(self) -> None:
        """Makes the files of an empty server."""
        password = self._folder / "password"
        password.write_text(PASSWORD, encoding="utf-8")
        if os.geteuid() == 0:
            owner = pwd.getpwnam(USER)
            for path in (self._folder, password):
                os.chown(path, owner.pw_uid, owner.pw_gid)
        command: list[str | Path] = [
            BINARIES / "initdb",
            "-D",
            self._data,
            "-U",
            USER,
            "-A",
            "scram-sha-256",
            "-N",
        ]
        command += [f"--pwfile={password}", "-E", "UTF8", "--locale=C.UTF-8"]
        subprocess.run([*_as_owner(), *command], check=True, stdout=subprocess.DEVNULL, cwd=self._folder)

    def start(self) -> None:
        """Starts the server and waits until it answers; after a kill, as soon as what was killed has gone."""
        deadline = time.monotonic() + _START_SECONDS
        self._launch()
        while not self._answers():
            if time.monotonic() > deadline:
                pytest.fail(f"PostgreSQL did not start:\n{self.log()}")
            if self._process is None or self._process.poll() is not None:
                # Its children from before a kill -9 take a moment to notice.
                self._launch()
            time.sleep(_POLL_SECONDS)

    def kill(self) -> None:
        """kill -9."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Nothing answers meanwhile, and no connection is closed."""
        stopped = self._processes()
        for process in stopped:
            os.kill(process, signal.SIGSTOP)
        try:
            yield
        finally:
            for process in stopped:
                os.kill(process, signal.SIGCONT)

    def stop(self) -> None:
        """Stops the server at once and removes its files."""
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGQUIT)
            try:
                self._process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                self.kill()
        shutil.rmtree(self._folder, ignore_errors=True)

    def url(self, database: str) -> str:
        """The store's URL of a database."""
        login = f"{USER}:{quote(PASSWORD, safe='')}"
        return f"postgresql+asyncpg://{login}@127.0.0.1:{self.port}/{database}"

    def sql(self, *statements: str, database: str = "postgres") -> None:
        """Runs statements, each in a transaction of its own, on a connection that no store has."""
        command: list[str | Path] = [
            BINARIES / "psql",
            "-h",
            "127.0.0.1",
            "-p",
            str(self.port),
            "-U",
            USER,
            "-d",
            database,
        ]
        command += ["-q", "-X", "-v", "ON_ERROR_STOP=1"]
        for statement in statements:
            command += ["-c", statement]
        environment = {**os.environ, "PGPASSWORD": PASSWORD}
        subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)

    @contextmanager
    def database(self, template: str = EMPTY) -> Iterator[str]:
        """A database for a while; gives its URL."""
        self._made += 1
        name = f"test_{self._made}"
        # In one go with the next creation: a connection costs more than either.
        drop = [f"DROP DATABASE {old} WITH (FORCE)" for old in self._left]
        self._left = []
        self.sql(*drop, f"CREATE DATABASE {name} TEMPLATE {template}")
        try:
            yield self.url(name)
        finally:
            self._left.append(name)

    def log(self) -> str:
        """What the server has said."""
        return (self._folder / "log").read_text(encoding="utf-8")

    @property
    def _data(self) -> Path:
        return self._folder / "data"

    def _launch(self) -> None:
        options = {
            "port": str(self.port),
            "listen_addresses": "127.0.0.1",
            "unix_socket_directories": str(self._folder),
            "max_connections": "200",
        }
        if not self._durable:
            options |= {"fsync": "off", "full_page_writes": "off"}
        command: list[str | Path] = [*_as_owner(), BINARIES / "postgres", "-D", self._data]
        for name, value in options.items():
            command += ["-c", f"{name}={value}"]
        with (self._folder / "log").open("ab") as log:
            # Not from a thread: it would take the server with it when it ends.
            self._process = subprocess.Popen(command, stdout=log, stderr=log, cwd=self._folder)

    def _processes(self) -> list[int]:
        if self._process is None:
            return []
        main = self._process.pid
        children = Path(f"/proc/{main}/task/{main}/children").read_text(encoding="utf-8")
        return [main, *map(int, children.split())]

    def _answers(self) -> bool:
        command: list[str | Path] = [BINARIES / "pg_isready", "-q", "-h", "127.0.0.1", "-p", str(self.port)]
        return subprocess.run(command, check=False).returncode == 0


def _as_owner() -> list[str | Path]:
    """The server refuses to run as root. It gets SIGQUIT when its parent ends: it then stops at once."""
    if os.geteuid() == 0:
        become = [f"--reuid={USER}", f"--regid={USER}", "--init-groups"]
        return ["setpriv", *become, "--pdeathsig", "QUIT"]
    return ["setpriv", "--pdeathsig", "QUIT"]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def running_postgres(*, durable: bool) -> Iterator[PostgresServer]:
    """A server that is up; skips the test if there is none on this machine, where it may be missing."""
    if not (BINARIES / "postgres").exists():
        message = f"needs PostgreSQL 15 in {BINARIES} (Debian: postgresql-15)"
        if os.environ.get(_REQUIRED):
            pytest.fail(message)
        pytest.skip(message)
    server = PostgresServer(durable=durable)
    try:
        server.create()
        server.start()
        yield server
    finally:
        server.stop()


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[PostgresServer]:
    """The session's server. Not for tests that kill it."""
    with running_postgres(durable=False) as server:
        server.sql(f"CREATE DATABASE {MIGRATED} TEMPLATE {EMPTY}")
        # In a thread: the session's own event loop is left alone.
        with ThreadPoolExecutor(1) as thread:
            thread.submit(asyncio.run, _migrate(server.url(MIGRATED))).result()
        yield server


@pytest.fixture
def postgres_url(postgres_server: PostgresServer) -> Iterator[str]:
    """A PostgreSQL database that no store has opened."""
    with postgres_server.database(MIGRATED) as url:
        yield url


@pytest.fixture
def bare_postgres_url(postgres_server: PostgresServer) -> Iterator[str]:
    """As above, without any table."""
    with postgres_server.database() as url:
        yield url


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A database of each kind that no store has opened."""
    return _url(request, tmp_path, "postgres_url")


@pytest.fixture(params=["sqlite", "postgresql"])
def bare_database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """As above, without any table."""
    return _url(request, tmp_path, "bare_postgres_url")


def _url(request: pytest.FixtureRequest, folder: Path, postgres: str) -> str:
    if request.param == "sqlite":
        return f"sqlite+aiosqlite:///{folder}/deep/catalogue.db"
    url: str = request.getfixturevalue(postgres)
    return url


async def _migrate(url: str) -> None:
    """Saves each test the time; a store that opens a copy of it still gives it an identity of its own."""
    from sqlalchemy import delete

    from adaptermesh.store.database import Database, DatabaseConfig
    from adaptermesh.store.schema import feed

    database = Database(DatabaseConfig(url), lambda: None)
    await database.open("")
    await database.write(lambda connection: connection.execute(delete(feed)))
    await database.close()
