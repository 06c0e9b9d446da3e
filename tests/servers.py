"""Database servers of our own, which a test may stop, kill, freeze and restart.

PostgreSQL or MariaDB, whichever the tests run on, and PgBouncer before a PostgreSQL.
Each has a port and a temporary folder of its own, and both are gone when its block
ends; a test process that is itself killed leaves no server behind either.
"""

import os
import re
import shutil
import signal
import socket
import subprocess
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import count
from pathlib import Path
from pwd import getpwnam, getpwuid
from tempfile import TemporaryDirectory
from threading import Event
from time import monotonic
from typing import Any, cast

from django.db import connection, connections
from django.db.backends.base.base import BaseDatabaseWrapper

from tests.process import finished

LOCALHOST = "127.0.0.1"
Settings = Mapping[str, Any]
_PATIENCE = 60  # seconds, for a server to come up or to end
_ANSWERS_IN = 2  # seconds, the least that PostgreSQL's driver takes
_DATABASE = {"postgresql": "dbname", "mysql": "database"}  # as the driver calls it
_numbers = count(1)


@dataclass(frozen=True)
class Kind:
    """What differs between the servers."""

    accounts: tuple[str, ...]  # one of which runs it where we are root
    program: Callable[[], Path | None]
    prepare: Callable[["Server"], None]
    command: Callable[["Server"], list[str]]
    signals: Mapping[str, int]  # for each way to stop it
    database: Settings  # what its entry in DATABASES has for everyone
    create_database: str = 'CREATE DATABASE "{name}"'
    without_fsync: Settings | None = None  # options; its own death loses no commit


class Server:
    """One server, from the moment that it answers."""

    def __init__(
        self,
        kind: Kind,
        folder: Path,
        port: int,
        listen: Sequence[str] = (LOCALHOST,),
        options: Settings | None = None,
    ) -> None:
        self.folder, self.port, self.listen = folder, port, listen
        self.options = options or {}
        self.program = cast(Path, kind.program())
        self._kind = kind
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Return when it answers."""
        self._process = self._call(self._kind.command(self))
        self._pid_file.write_text(str(self._process.pid))
        _wait_until(self._answers)

    def stop(self, mode: str = "fast") -> None:
        """Stop it: "smart" (when its clients are done), "fast" or "immediate"."""
        self.thaw()
        family = self.processes()
        _send(family[:1], self._kind.signals[mode])
        self._await_end(family)

    def restart(self, mode: str = "immediate") -> None:
        self.stop(mode)
        self.start()

    def kill(self) -> None:
        """Kill it and all its processes with SIGKILL."""
        family = self.freeze()
        _send(family, signal.SIGKILL)
        self._await_end(family)

    def freeze(self) -> list[int]:
        """Stop its processes with SIGSTOP: it is silent, and the system acknowledges.

        Returns their ids, when all have stopped.
        """
        _stop(self.processes()[:1])  # so that it starts no other meanwhile
        family = self.processes()
        _stop(family)
        return family

    def thaw(self) -> None:
        """Let its processes go on."""
        _send(reversed(self.processes()), signal.SIGCONT)

    def is_up(self) -> bool:
        """Whether it accepts a connection within two seconds, and answers there."""
        try:
            self.execute("SELECT 1")
        except _driver().Error:
            return False
        return True

    def processes(self) -> list[int]:
        """Return the ids of its processes, the first of which started the others."""
        if self._process is None or self._process.poll() is not None:
            return []
        return [self._process.pid, *_children(self._process.pid)]

    def settings(
        self, name: str | None = None, host: str = LOCALHOST
    ) -> dict[str, Any]:
        """Return the entry in DATABASES, but for what the tests' own says.

        It fits ``connected``, ``process.started`` and ``stepping.database_settings``.
        """
        own = {"HOST": host, "PORT": str(self.port)}
        return {**self._kind.database, **own, **({"NAME": name} if name else {})}

    def create_database(self, name: str | None = None) -> str:
        """Create an empty database and return its name."""
        name = name or f"aq_{next(_numbers)}"
        self.execute(self._kind.create_database.format(name=name))
        return name

    def execute(self, sql: str) -> None:
        """Run a statement on a connection of its own, in autocommit."""
        with closing(_connect(self.settings())) as made, made.cursor() as cursor:
            cursor.execute(sql)

    def run(self, *command: str) -> None:
        """Run a command as the server's user."""
        if self._call(list(command)).wait(_PATIENCE):
            raise RuntimeError(f"{command[0]} failed:\n{self.read_log()}")

    def write(self, name: str, *lines: str) -> None:
        """Write a file of the folder that the server may read."""
        path = self.folder / name
        path.write_text("\n".join(lines) + "\n")
        shutil.chown(path, _account(self._kind))

    def read_log(self) -> str:
        return (self.folder / "log").read_text(errors="replace")

    def _call(self, command: list[str]) -> subprocess.Popen[bytes]:
        with (self.folder / "log").open("ab") as log:
            return subprocess.Popen(
                command,
                **self._identity(),
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # a Ctrl-C is meant for the tests
            )

    def _identity(self) -> dict[str, Any]:
        if os.geteuid() != 0:
            return {}
        account = getpwnam(_account(self._kind))
        return {"user": account.pw_uid, "group": account.pw_gid, "extra_groups": []}

    @property
    def _pid_file(self) -> Path:
        return self.folder / "pid"

    def _answers(self) -> bool:
        if not self.processes():
            raise RuntimeError(f"the server has ended:\n{self.read_log()[-2000:]}")
        return self.is_up()

    def _await_end(self, family: list[int]) -> None:
        if self._process is not None:
            self._process.wait(_PATIENCE)
        _wait_until(lambda: not any(map(is_running, family)))
        self._pid_file.unlink(missing_ok=True)


def obstacle() -> str:
    """Return why no server of the kind in use can be run here, or nothing."""
    if connection.vendor not in _KINDS:
        return f"{connection.vendor} has no server"
    return _missing(_KINDS[connection.vendor])


def pgbouncer_obstacle() -> str:
    """Return why no PgBouncer can be run here, or nothing."""
    if connection.vendor != "postgresql":
        return "PgBouncer speaks only with PostgreSQL"
    return _missing(_PGBOUNCER)


@contextmanager
def server(
    *,
    fsync: bool = True,
    listen: Sequence[str] = (LOCALHOST,),
    options: Settings | None = None,
) -> Iterator[Server]:
    """Run a server of the kind in use; ``options`` are settings of its own."""
    kind = _KINDS[connection.vendor]
    options = {**((not fsync and kind.without_fsync) or {}), **(options or {})}
    with _running(kind, listen=listen, options=options) as made:
        yield made


@contextmanager
def pgbouncer(database: Settings, options: Settings | None = None) -> Iterator[Server]:
    """Run a PgBouncer, pooling by transaction, before the PostgreSQL of ``database``.

    ``database`` is an entry of DATABASES, or ``Server.settings()``.
    """
    kind = replace(
        _PGBOUNCER,
        prepare=partial(_prepare_pgbouncer, database=database),
        database={
            **{key: database[key] for key in ("NAME", "USER", "PASSWORD")},
            # Such a cursor is lost with the transaction.
            "DISABLE_SERVER_SIDE_CURSORS": True,
        },
    )
    with _running(kind, options=options) as made:
        yield made


def migrated(made: Server, host: str = LOCALHOST) -> dict[str, Any]:
    """Create a database with all tables of the tests' project; return its settings."""
    name = made.create_database()
    ended = finished("migrate", "--run-syncdb", "--verbosity=0", **made.settings(name))
    assert ended.returncode == 0, ended.stderr
    return made.settings(name, host)


@contextmanager
def connected(settings: Settings) -> Iterator[BaseDatabaseWrapper]:
    """Give a connection of Django's to the database of these settings."""
    made = connections["default"].copy()
    made.settings_dict.update(settings)
    with closing(made):
        yield made


def is_running(pid: int) -> bool:
    """Whether the process has not ended; one that is frozen has not."""
    return _state(pid) != "Z"


@contextmanager
def guarded(script: str) -> Iterator[None]:
    """Have a shell run the script if this process ends before the block does."""
    guard = subprocess.Popen(
        ["sh", "-c", f"read _; {script}"],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        yield
    finally:
        guard.kill()
        guard.communicate()


@contextmanager
def _running(kind: Kind, **how: Any) -> Iterator[Server]:
    with (
        TemporaryDirectory(prefix="aq-", ignore_cleanup_errors=True) as folder,
        guarded(_removal(folder)),
        _reserved_port() as port,
    ):
        shutil.chown(folder, _account(kind))
        made = Server(kind, Path(folder), port, **how)
        try:
            kind.prepare(made)
            made.start()
            yield made
        finally:
            made.kill()


def _removal(folder: str) -> str:
    kill = "kill -STOP $pid; pkill -KILL -P $pid; kill -KILL $pid"
    return f"pid=$(cat {folder}/pid) && {{ {kill}; }}; rm -rf {folder}"


@contextmanager
def _reserved_port() -> Iterator[int]:
    """Give a port that nobody else is given, not even while its server is down."""
    with socket.socket() as holder:
        # A server, which has it too, may listen beside us, who do not.
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind((LOCALHOST, 0))
        yield holder.getsockname()[1]


def _connect(settings: Settings) -> Any:
    return _driver().connect(
        host=settings["HOST"],
        port=int(settings["PORT"]),
        user=settings["USER"],
        password=settings["PASSWORD"],
        connect_timeout=_ANSWERS_IN,
        autocommit=True,
        **{_DATABASE[connection.vendor]: settings["NAME"]},
    )


def _driver() -> Any:
    return connection.Database  # type: ignore[attr-defined]  # every vendor's has it


def _prepare_postgres(made: Server) -> None:
    made.run(
        f"{made.program.parent}/initdb",
        f"--pgdata={made.folder}/data",
        "--username=postgres",
        "--auth=trust",
        "--encoding=UTF8",
        "--locale=C",
        "--no-sync",
    )
    with (made.folder / "data" / "pg_hba.conf").open("a") as rules:
        rules.write("host all all all trust\n")  # it listens only where it was told to


def _postgres_command(made: Server) -> list[str]:
    options = {
        "listen_addresses": ",".join(made.listen),
        "port": made.port,
        "unix_socket_directories": made.folder,
        **made.options,
    }
    return [
        str(made.program),
        f"-D{made.folder}/data",
        *(f"--{name}={value}" for name, value in options.items()),
    ]


@cache
def _postgres() -> Path | None:
    """Return the newest PostgreSQL; Debian has none on the PATH."""
    found = [
        *Path("/usr/lib/postgresql").glob("*/bin/postgres"),
        *map(Path, filter(None, [shutil.which("postgres")])),
    ]
    return max(found, key=_version, default=None)


def _version(program: Path) -> list[int]:
    said = subprocess.run([program, "--version"], capture_output=True, text=True)
    return [int(part) for part in re.findall(r"\d+", said.stdout)]


def _prepare_mariadb(made: Server) -> None:
    made.run(
        "mariadb-install-db",
        "--no-defaults",
        f"--datadir={made.folder}/data",
        # One that starts removes the temporary tables of all others there.
        f"--tmpdir={made.folder}",
        "--auth-root-authentication-method=normal",
        "--skip-test-db",
    )
    made.write(
        "users.sql",  # from the addresses of other hosts too
        "CREATE USER IF NOT EXISTS root@'%';",
        "GRANT ALL ON *.* TO root@'%' WITH GRANT OPTION;",
    )


def _mariadb_command(made: Server) -> list[str]:
    options = {
        "datadir": made.folder / "data",
        "tmpdir": made.folder,
        "socket": made.folder / "socket",
        "port": made.port,
        "bind-address": ",".join(made.listen),
        "init-file": made.folder / "users.sql",
        "character-set-server": "utf8mb4",
        "innodb-buffer-pool-size": "64M",
        **made.options,
    }
    return [
        str(made.program),
        "--no-defaults",
        "--skip-name-resolve",
        *(f"--{name}={value}" for name, value in options.items()),
    ]


def _prepare_pgbouncer(made: Server, database: Settings) -> None:
    keys = {"HOST": "host", "PORT": "port", "USER": "user", "PASSWORD": "password"}
    behind = [f"{keys[key]}={database[key]}" for key in keys if database[key]]
    options = {
        "listen_addr": ",".join(made.listen),
        "listen_port": made.port,
        "unix_socket_dir": "",
        "auth_type": "any",
        "pool_mode": "transaction",
        "max_client_conn": 1000,
        **made.options,
    }
    made.write(
        "pgbouncer.ini",
        "[databases]",
        f"* = {' '.join(behind)}",
        "[pgbouncer]",
        *(f"{name} = {value}" for name, value in options.items()),
    )


def _pgbouncer_command(made: Server) -> list[str]:
    return [str(made.program), f"{made.folder}/pgbouncer.ini"]


def _program(name: str) -> Path | None:
    path = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin"])
    return Path(found) if (found := shutil.which(name, path=path)) else None


_KINDS = {
    "postgresql": Kind(
        accounts=("postgres", "nobody"),
        program=_postgres,
        prepare=_prepare_postgres,
        command=_postgres_command,
        signals={
            "smart": signal.SIGTERM,
            "fast": signal.SIGINT,
            "immediate": signal.SIGQUIT,
        },
        database={"NAME": "postgres", "USER": "postgres", "PASSWORD": ""},
        without_fsync={"fsync": "off"},
    ),
    "mysql": Kind(
        accounts=("mysql", "nobody"),
        program=partial(_program, "mariadbd"),
        prepare=_prepare_mariadb,
        command=_mariadb_command,
        signals={
            "smart": signal.SIGTERM,  # it waits for nobody
            "fast": signal.SIGTERM,
            "immediate": signal.SIGKILL,
        },
        database={"NAME": "mysql", "USER": "root", "PASSWORD": ""},
        create_database="CREATE DATABASE `{name}` CHARACTER SET utf8mb4",
        without_fsync={"innodb-flush-log-at-trx-commit": 2},
    ),
}
_PGBOUNCER = Kind(
    accounts=("postgres", "nobody"),
    program=partial(_program, "pgbouncer"),
    prepare=partial(_prepare_pgbouncer, database={}),
    command=_pgbouncer_command,
    signals={
        "smart": signal.SIGINT,
        "fast": signal.SIGTERM,
        "immediate": signal.SIGKILL,
    },
    database={},
)


def _missing(kind: Kind) -> str:
    if kind.program() is None:
        return "its programs are not installed here"
    if not any(map(_exists, _accounts(kind))):
        return f"root may not run it, and there is no user {' or '.join(kind.accounts)}"
    return ""


def _account(kind: Kind) -> str:
    """Return whom it runs as: the servers refuse root."""
    return next(filter(_exists, _accounts(kind)))


def _accounts(kind: Kind) -> tuple[str, ...]:
    return kind.accounts if os.geteuid() == 0 else (getpwuid(os.geteuid()).pw_name,)


def _exists(account: str) -> bool:
    try:
        getpwnam(account)
    except KeyError:
        return False
    return True


def _wait_until(is_true: Callable[[], bool]) -> None:
    deadline, pause = monotonic() + _PATIENCE, Event()
    while not is_true():
        if monotonic() > deadline:
            raise TimeoutError(f"a server did not change within {_PATIENCE} s")
        pause.wait(0.01)


def _children(parent: int) -> list[int]:
    numbers = (int(path.name) for path in Path("/proc").glob("[0-9]*"))
    return [pid for pid in numbers if _stat(pid)[1:2] == [str(parent)]]


def _state(pid: int) -> str:
    """Return R, S, D, T (stopped) and so on; Z where it has ended."""
    return (_stat(pid) or ["Z"])[0]


def _stat(pid: int) -> list[str]:
    """Return what the kernel tells about a process, from its state on."""
    try:
        said = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return []
    return said.rpartition(")")[2].split()


def _stop(pids: list[int]) -> None:
    _send(pids, signal.SIGSTOP)
    _wait_until(lambda: all(_state(pid) in "TZ" for pid in pids))


def _send(pids: Iterable[int], number: int) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)
