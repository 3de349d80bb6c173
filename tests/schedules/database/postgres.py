"""A PostgreSQL server of the tests' own, from Debian's package, as an unprivileged user."""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
from pathlib import Path

import sqlalchemy

from examples.demo import free_port

ACCOUNT = "postgres"  # Debian's package makes it; the server refuses to run as root
PASSWORD = secrets.token_hex(8)
ATTEMPTS = 5
LIMIT = "600"  # seconds to start or to stop in; a slow disk may need some


def binaries() -> Path | None:
    """Where initdb, postgres and pg_ctl are, newest version first; None if they are not installed."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: int(path.parts[-3]))
    if found:
        return found[-1].parent
    on_path = shutil.which("initdb")
    return Path(on_path).resolve().parent if on_path else None


class Server:
    """A running server; `url(name)` is that of a database in it."""

    def __init__(self, directory: Path, commands: Path) -> None:
        self.directory, self._commands = directory, commands
        password = directory / "password"
        password.write_text(PASSWORD)
        if os.geteuid() == 0:
            for path in (directory, password):
                shutil.chown(path, ACCOUNT)
        self._run("initdb", "-D", str(self.data), "-U", "owner", "-A", "scram-sha-256", "--pwfile", str(password), "-N")
        for attempt in range(ATTEMPTS):
            self.port = free_port()
            try:
                return self.start()
            except AssertionError as error:
                # Somebody may have taken the port since.
                if attempt == ATTEMPTS - 1:
                    raise AssertionError(f"{error}\n{(directory / 'log').read_text()}") from None

    @property
    def data(self) -> Path:
        return self.directory / "data"

    def start(self) -> None:
        options = f"-p {self.port} -k {self.directory} -c listen_addresses=127.0.0.1 -c max_connections=60"
        log = str(self.directory / "log")
        self._run("pg_ctl", "-D", str(self.data), "-w", "-t", LIMIT, "-o", options, "-l", log, "start")

    def stop(self, mode: str = "fast") -> None:
        self._run("pg_ctl", "-D", str(self.data), "-w", "-t", LIMIT, "-m", mode, "stop")

    def create(self, name: str) -> str:
        """The URL of a new, empty database."""
        self.execute(f"CREATE DATABASE {name}")
        return self.url(name)

    def url(self, name: str, user: str = "owner", password: str = PASSWORD) -> str:
        return f"postgresql://{user}:{password}@127.0.0.1:{self.port}/{name}"

    def execute(self, *statements: str, database: str = "postgres") -> None:
        engine = sqlalchemy.create_engine(self.url(database).replace("postgresql:", "postgresql+psycopg:", 1))
        with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            for statement in statements:
                connection.exec_driver_sql(statement)
        engine.dispose()

    def _run(self, command: str, *arguments: str) -> None:
        account = ["runuser", "-u", ACCOUNT, "--"] if os.geteuid() == 0 else []
        whole = [*account, str(self._commands / command), *arguments]
        done = subprocess.run(whole, cwd=self.directory, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        assert done.returncode == 0, done.stdout
