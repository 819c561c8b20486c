"""Database servers that the tests start themselves, on loopback ports, as an ordinary user."""

from __future__ import annotations

from collections.abc import Sequence
import os
from pathlib import Path
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from typing import Any
from typing import TYPE_CHECKING
import uuid

import sqlalchemy as sa


if TYPE_CHECKING:
    import pwd


# Set where the tests must not do without them.
REQUIRED = "OPTUNA_TTP_REQUIRE_SERVERS"


def find(name: str, *patterns: str) -> Path | None:
    """Where a server's program is: on the path, or where Debian keeps it, the newest first."""
    on_path = shutil.which(name)
    if on_path is not None:
        return Path(on_path)
    installed = [path for pattern in patterns for path in Path("/").glob(pattern)]
    return max(
        installed, key=lambda path: [int(p) for p in path.parts if p.isdigit()], default=None
    )


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _ordinary_user(*names: str) -> pwd.struct_passwd | None:
    """Someone else to run as, where the tests run as root, whom the servers refuse."""
    if os.name != "posix" or os.geteuid() != 0:
        return None
    import pwd

    present = {user.pw_name: user for user in pwd.getpwall()}
    return next(present[name] for name in (*names, "nobody") if name in present)


def _identity(user: pwd.struct_passwd | None) -> dict[str, Any]:
    if user is None:
        return {}
    return {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}


def _memory_folder() -> str | None:
    """A folder in memory with room for the databases of the tests, if there is one."""
    folder = "/dev/shm"
    has_room = Path(folder).is_dir() and shutil.disk_usage(folder).free > 4 * 2**30
    return folder if has_room else None


class PostgreSQL:
    """A server with a data folder of its own.

    Without ``durable`` it does not wait for the disk, which loses nothing when the server alone is
    killed, and its folder is in memory where there is room.
    """

    def __init__(self, *, durable: bool = False) -> None:
        initdb = find("initdb", "usr/lib/postgresql/*/bin/initdb")
        if initdb is None:
            raise FileNotFoundError("PostgreSQL's initdb is neither on the path nor in /usr/lib.")
        self._binaries = initdb.parent
        self._user = _ordinary_user("postgres")
        place = None if durable else _memory_folder()
        self.folder = Path(tempfile.mkdtemp(prefix="ttp-postgresql-", dir=place))
        self._password = secrets.token_hex(8)
        self.port = free_port()
        (self.folder / "password").write_text(self._password)
        if self._user is not None:
            for path in (self.folder, self.folder / "password"):
                os.chown(path, self._user.pw_uid, self._user.pw_gid)
        self._run(
            "initdb",
            *("-D", str(self._data), "-U", "ttp", "-A", "scram-sha-256", "-N"),
            f"--pwfile={self.folder / 'password'}",
        )
        options = {
            "listen_addresses": "'127.0.0.1'",
            "port": self.port,
            "unix_socket_directories": f"'{self.folder}'",
            "max_connections": 100,
            "fsync": "on" if durable else "off",
            "max_wal_size": "'4GB'",
        }
        with (self._data / "postgresql.conf").open("a") as file:
            file.writelines(f"{name} = {value}\n" for name, value in options.items())
        self.start()

    @property
    def _data(self) -> Path:
        return self.folder / "data"

    def url(self, database: str = "postgres") -> str:
        return f"postgresql+psycopg://ttp:{self._password}@127.0.0.1:{self.port}/{database}"

    def new_database(self, tablespace: str | None = None) -> str:
        """Make an empty database and return its URL."""
        name = f"ttp_{uuid.uuid4().hex[:12]}"
        suffix = "" if tablespace is None else f" TABLESPACE {tablespace}"
        self.execute(f"CREATE DATABASE {name}{suffix}")
        return self.url(name)

    def drop(self, url: str) -> None:
        self.execute(f"DROP DATABASE {sa.make_url(url).database} WITH (FORCE)")

    def execute(self, statement: str) -> None:
        engine = sa.create_engine(self.url(), isolation_level="AUTOCOMMIT")
        with engine.connect() as connection:
            connection.execute(sa.text(statement))
        engine.dispose()

    def make_folder(self, path: Path) -> None:
        """Make a folder that the server may write to."""
        path.mkdir()
        if self._user is not None:
            os.chown(path, self._user.pw_uid, self._user.pw_gid)

    def start(self) -> None:
        self._control("start", "-l", str(self.folder / "log"))

    def stop(self, mode: str = "fast") -> None:
        self._control("stop", "-m", mode)

    def restart(self, mode: str = "fast") -> None:
        """``mode`` "immediate" is a crash: the server recovers from its log."""
        self.stop(mode)
        self.start()

    def close(self) -> None:
        try:
            self.stop("immediate")
        finally:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _control(self, *arguments: str) -> None:
        self._run("pg_ctl", "-D", str(self._data), "-w", "-t", "60", *arguments)

    def _run(self, program: str, *arguments: str) -> None:
        run_as([str(self._binaries / program), *arguments], self._user, self.folder)


class MariaDB:
    """A server with a data folder of its own."""

    def __init__(self) -> None:
        install = find("mariadb-install-db", "usr/bin/mariadb-install-db")
        server = find("mariadbd", "usr/sbin/mariadbd")
        if install is None or server is None:
            raise FileNotFoundError("MariaDB's mariadbd is neither on the path nor in /usr/sbin.")
        user = _ordinary_user("mysql")
        self.folder = Path(tempfile.mkdtemp(prefix="ttp-mariadb-"))
        if user is not None:
            os.chown(self.folder, user.pw_uid, user.pw_gid)
        self.port = free_port()
        data = f"--datadir={self.folder / 'data'}"
        run_as(
            [
                *(str(install), "--no-defaults", data, "--skip-test-db"),
                "--auth-root-authentication-method=normal",
            ],
            user,
            self.folder,
        )
        command = [
            *(str(server), "--no-defaults", data, f"--port={self.port}"),
            *("--bind-address=127.0.0.1", f"--socket={self.folder / 'socket'}"),
            f"--pid-file={self.folder / 'pid'}",
        ]
        with (self.folder / "log").open("wb") as log:
            self._server = subprocess.Popen(
                command,
                stdout=log,
                stderr=log,
                cwd=self.folder,
                **_identity(user),
            )
        self._wait()

    def url(self, database: str = "") -> str:
        return f"mysql+pymysql://root@127.0.0.1:{self.port}/{database}"

    def new_database(self) -> str:
        name = f"ttp_{uuid.uuid4().hex[:12]}"
        self._execute(f"CREATE DATABASE {name}")
        return self.url(name)

    def drop(self, url: str) -> None:
        self._execute(f"DROP DATABASE {sa.make_url(url).database}")

    def close(self) -> None:
        self._server.send_signal(signal.SIGKILL)
        self._server.wait()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _execute(self, statement: str) -> None:
        engine = sa.create_engine(self.url())
        with engine.begin() as connection:
            connection.execute(sa.text(statement))
        engine.dispose()

    def _wait(self) -> None:
        deadline = time.monotonic() + 60
        while not self._answers():
            if time.monotonic() > deadline or self._server.poll() is not None:
                raise RuntimeError(f"mariadbd failed: {(self.folder / 'log').read_text()}")
            time.sleep(0.1)

    def _answers(self) -> bool:
        try:
            self._execute("SELECT 1")
        except sa.exc.OperationalError:
            return False
        return True


def run_as(command: Sequence[str], user: pwd.struct_passwd | None, folder: Path) -> None:
    """Run a program to its end, as another user where there is one, and show what went wrong."""
    with tempfile.TemporaryFile() as output:
        # Not a pipe: the server that is started would keep it open.
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            cwd=folder,
            check=False,
            **_identity(user),
        )
        if done.returncode:
            output.seek(0)
            text = output.read().decode(errors="replace")
            raise RuntimeError(f"{Path(command[0]).name} failed: {text}")
