"""Servers, hosts and wires of our own do to a test what their names say."""

import os
import select
import socket
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as NotYet
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Thread
from time import monotonic
from typing import Any

import pytest
from django.db import Error, connection
from django.db.backends.base.base import BaseDatabaseWrapper

from tests import hosts, servers
from tests.hosts import Host
from tests.process import ROOT, finished
from tests.proxy import TO_CLIENT, TO_SERVER, Proxy, proxy
from tests.servers import Server, connected

WaitUntil = Callable[..., None]
Settings = dict[str, Any]
SOON = 0.25  # seconds, in which what is on its way would long have come
needs_server = pytest.mark.skipif(
    bool(servers.obstacle()), reason=servers.obstacle() or "there is one"
)
needs_pgbouncer = pytest.mark.skipif(
    bool(servers.obstacle() or servers.pgbouncer_obstacle()),
    reason=servers.obstacle() or servers.pgbouncer_obstacle() or "there is one",
)
MAX_CONNECTIONS = {
    "postgresql": "SELECT current_setting('max_connections')",
    "mysql": "SELECT @@max_connections",
}
# Sends what it is told, and tells what it hears.
SPEAKER = """
import socket, sys, threading
wire = socket.create_connection((sys.argv[1], int(sys.argv[2])))
def hear():
    while heard := wire.recv(100):
        print(heard.decode(), end="", flush=True)
    print("the end", flush=True)
threading.Thread(target=hear, daemon=True).start()
for line in sys.stdin:
    wire.sendall(line.encode())
"""
DYING = """
import os, signal
import django
django.setup()
from tests import servers
with servers.server() as made:
    made.freeze()
    print(made.folder, *made.processes(), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture(autouse=True)
def _databases(django_db_blocker: Any) -> Iterator[None]:
    """Let connections be made, though never to the database of the other tests."""
    with django_db_blocker.unblock():
        yield


@pytest.fixture(scope="module")
def shared() -> Iterator[Server]:
    with servers.server() as made:
        yield made


@pytest.fixture
def server(shared: Server) -> Server:
    """One server for all tests, up and with a table of its own for each."""
    if not shared.processes():
        shared.start()
    return shared


@pytest.fixture
def database(server: Server) -> Settings:
    settings = server.settings(server.create_database())
    with connected(settings) as made:
        ask(made, "CREATE TABLE effect (id int)")
        ask(made, "INSERT INTO effect VALUES (1)")
    return settings


def ask(made: BaseDatabaseWrapper, sql: str) -> Any:
    with made.cursor() as cursor:
        cursor.execute(sql)
        return cursor.fetchone() if cursor.description else None


def count_effects(settings: Settings) -> int:
    with connected(settings) as made:
        return int(ask(made, "SELECT count(*) FROM effect")[0])


@needs_server
@pytest.mark.parametrize("mode", ["fast", "immediate"])
def test_restart_breaks_connections_and_admits_new_ones(
    server: Server, database: Settings, mode: str
) -> None:
    with connected(database) as made:
        ask(made, "SELECT 1")
        server.restart(mode)

        with pytest.raises(Error):
            ask(made, "SELECT 1")

    assert count_effects(database) == 1


@needs_server
@pytest.mark.parametrize("end", [Server.kill, Server.stop])
def test_server_that_ended_is_down_until_it_is_started(
    server: Server, database: Settings, end: Callable[[Server], None]
) -> None:
    processes = server.processes()

    end(server)

    assert not server.is_up()
    assert not any(map(servers.is_running, processes))
    server.start()
    assert server.is_up()
    assert count_effects(database) == 1


@needs_server
def test_query_waits_while_the_server_is_frozen(
    server: Server, database: Settings
) -> None:
    with ThreadPoolExecutor(1) as pool:
        server.freeze()
        count: Future[int] = pool.submit(count_effects, database)
        with pytest.raises(NotYet):
            count.result(timeout=SOON)

        server.thaw()

        assert count.result(timeout=10) == 1


@needs_server
def test_frozen_server_is_not_up_and_can_be_killed(server: Server) -> None:
    server.freeze()
    assert not server.is_up()

    server.kill()

    assert server.processes() == []


@needs_server
def test_server_has_its_options() -> None:
    with (
        servers.server(fsync=False, options={"max_connections": 17}) as made,
        connected(made.settings()) as other,
    ):
        (value,) = ask(other, MAX_CONNECTIONS[connection.vendor])

    assert int(value) == 17


@needs_server
def test_server_is_gone_after_an_error_in_its_block() -> None:
    with pytest.raises(ZeroDivisionError), servers.server() as made:
        raise ZeroDivisionError(made.folder)

    assert made.processes() == []
    assert not made.folder.exists()


@needs_server
def test_server_that_cannot_start_tells_why() -> None:
    with (
        pytest.raises(RuntimeError, match="no_such_option"),
        servers.server(options={"no_such_option": 1}),
    ):
        pass


@needs_server
def test_server_of_a_killed_test_is_removed(wait_until: WaitUntil) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", DYING],
        cwd=ROOT,
        env={**os.environ, "DJANGO_SETTINGS_MODULE": "tests.settings"},
        stdout=subprocess.PIPE,
        text=True,
    )

    folder, *pids = ended.stdout.split()
    assert pids
    wait_until(lambda: not Path(folder).exists())
    wait_until(lambda: not any(servers.is_running(int(pid)) for pid in pids))


@needs_server
def test_migrated_database_is_that_of_a_process_too(server: Server) -> None:
    settings = servers.migrated(server)

    with connected(settings) as made:
        tables = made.introspection.table_names()
    ended = finished("migrate", "--check", **settings)
    empty = server.settings(server.create_database())
    unfinished = finished("migrate", "--check", **empty)

    assert {"async_queue_job", "tests_effect"} <= set(tables)
    assert (ended.returncode, unfinished.returncode) == (0, 1)


@needs_pgbouncer
def test_pgbouncer_changes_the_session_between_two_statements(
    database: Settings,
) -> None:
    pid = "SELECT pg_backend_pid()"
    with (
        servers.pgbouncer(database) as bouncer,
        connected(bouncer.settings()) as one,
        connected(bouncer.settings()) as other,
    ):
        (first,) = ask(one, pid)
        other.set_autocommit(False)
        (taken,) = ask(other, pid)
        (second,) = ask(one, pid)
        other.rollback()

    assert taken == first
    assert second != first


@needs_pgbouncer
def test_pgbouncer_that_was_killed_breaks_connections(database: Settings) -> None:
    with servers.pgbouncer(database, {"default_pool_size": 2}) as bouncer:
        with connected(bouncer.settings()) as made:
            ask(made, "SELECT 1")
            bouncer.kill()
            with pytest.raises(Error):
                ask(made, "SELECT 1")
        assert not bouncer.is_up()

        bouncer.start()

        assert count_effects(bouncer.settings()) == 1


@pytest.fixture
def echo() -> Iterator[socket.socket]:
    """A server that gives back what it gets."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        Thread(target=serve_echo, args=[listener], daemon=True).start()
        yield listener
        shut(listener)


def serve_echo(listener: socket.socket) -> None:
    while accepted := accept(listener):
        Thread(target=give_back, args=[accepted], daemon=True).start()


def accept(listener: socket.socket) -> socket.socket | None:
    try:
        return listener.accept()[0]
    except OSError:  # it was shut
        return None


def give_back(accepted: socket.socket) -> None:
    with accepted:
        while heard := accepted.recv(100):
            accepted.sendall(heard)


def shut(listener: socket.socket) -> None:
    with suppress(OSError):  # a test has shut it already
        listener.shutdown(socket.SHUT_RDWR)
    listener.close()


@pytest.fixture
def wire(echo: socket.socket) -> Iterator[Proxy]:
    with proxy(*echo.getsockname()) as made:
        yield made


@contextmanager
def client(wire: Proxy) -> Iterator[socket.socket]:
    """Give a connection over which one byte has come back."""
    with socket.create_connection(("127.0.0.1", wire.port), timeout=10) as made:
        made.sendall(b"0")
        assert made.recv(1) == b"0"
        yield made


def is_silent(end: socket.socket) -> bool:
    """Whether neither a byte nor an end comes."""
    return select.select([end], [], [], SOON)[0] == []


def test_cut_ends_all_connections_and_admits_new_ones(
    wire: Proxy, wait_until: WaitUntil
) -> None:
    with client(wire) as one, client(wire) as other:
        assert wire.cut_all() == 2

        assert (one.recv(1), other.recv(1)) == (b"", b"")
    wait_until(lambda: wire.count() == 0)
    with client(wire):
        assert wire.count() == 1


@pytest.mark.parametrize("directions", [(), (TO_SERVER,), (TO_CLIENT,)])
def test_stalled_wire_is_silent_and_loses_nothing(
    wire: Proxy, directions: tuple[str, ...]
) -> None:
    with client(wire) as made:
        wire.stall(*directions)
        made.sendall(b"1")
        assert is_silent(made)

        wire.resume(*directions)

        assert made.recv(1) == b"1"


def test_stalled_wire_keeps_the_end_of_a_connection_secret(
    wire: Proxy, wait_until: WaitUntil
) -> None:
    with client(wire) as made:
        wire.stall()
        made.shutdown(socket.SHUT_WR)
        assert is_silent(made)

        wire.resume()

        assert made.recv(1) == b""


def test_client_that_is_torn_off_is_gone_for_the_server_too() -> None:
    at_once = struct.pack("ii", 1, 0)
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        proxy(*listener.getsockname()) as wire,
    ):
        made = socket.create_connection(("127.0.0.1", wire.port), timeout=10)
        accepted, _ = listener.accept()
        accepted.settimeout(10)
        made.sendall(b"1")
        assert accepted.recv(1) == b"1"
        made.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, at_once)

        made.close()

        with accepted:
            assert accepted.recv(1) == b""


@pytest.mark.parametrize("direction", [TO_SERVER, TO_CLIENT])
def test_delayed_wire_is_late(wire: Proxy, direction: str) -> None:
    with client(wire) as made:
        wire.delay[direction] = SOON
        began = monotonic()
        made.sendall(b"1")

        assert made.recv(1) == b"1"

    assert SOON <= monotonic() - began < 5


def test_refusing_wire_admits_nobody_and_keeps_who_is_there(wire: Proxy) -> None:
    with client(wire) as made:
        wire.refuse()

        with pytest.raises(ConnectionRefusedError), client(wire):
            pass
        made.sendall(b"1")
        assert made.recv(1) == b"1"
    wire.admit()
    with client(wire):
        pass


def test_wire_survives_that_its_server_is_away(
    wire: Proxy, echo: socket.socket
) -> None:
    address = echo.getsockname()
    shut(echo)
    with socket.create_connection(("127.0.0.1", wire.port), timeout=10) as made:
        assert made.recv(1) == b""

    with socket.create_server(address) as again:
        Thread(target=serve_echo, args=[again], daemon=True).start()
        with client(wire):
            pass
        shut(again)


@pytest.fixture
def two_hosts() -> Iterator[list[Host]]:
    if reason := hosts.obstacle():
        pytest.skip(reason)
    with hosts.hosts(2) as made:
        yield made


@contextmanager
def speaking(host: Host) -> Iterator[tuple[socket.socket, subprocess.Popen[str]]]:
    """Give the two ends of a connection between this machine and one in the host."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with socket.create_server((host.gateway, 0)) as listener:
        listener.settimeout(10)
        port = str(listener.getsockname()[1])
        command = [sys.executable, "-c", SPEAKER, host.gateway, port]
        with host.run(*command, **pipes) as process:
            accepted, (address, _) = listener.accept()
            assert address == host.address
            accepted.settimeout(10)
            with accepted:
                yield accepted, process
            process.kill()


def say(process: subprocess.Popen[str], line: str) -> None:
    assert process.stdin
    process.stdin.write(f"{line}\n")
    process.stdin.flush()


def hear(process: subprocess.Popen[str]) -> str:
    assert process.stdout
    return process.stdout.readline().strip()


def hears_nothing(process: subprocess.Popen[str]) -> bool:
    assert process.stdout
    return select.select([process.stdout], [], [], SOON)[0] == []


def test_cut_host_is_silent_and_comes_back(two_hosts: list[Host]) -> None:
    cut, beside = two_hosts
    with speaking(cut) as (here, there), speaking(beside) as (near, neighbour):
        cut.cut()
        say(there, "from there")
        here.sendall(b"from here\n")
        assert is_silent(here)
        assert hears_nothing(there)
        say(neighbour, "meanwhile")
        assert near.recv(100) == b"meanwhile\n"

        cut.mend()

        assert here.recv(100) == b"from there\n"
        assert hear(there) == "from here"


def test_host_that_cannot_send_still_hears(two_hosts: list[Host]) -> None:
    host, _ = two_hosts
    with speaking(host) as (here, there):
        host.cut_outgoing()
        say(there, "from there")
        here.sendall(b"from here\n")

        assert hear(there) == "from here"
        assert is_silent(here)
        host.mend()
        assert here.recv(100) == b"from there\n"


def test_host_that_cannot_hear_still_sends(two_hosts: list[Host]) -> None:
    host, _ = two_hosts
    with speaking(host) as (here, there):
        host.cut_incoming()
        say(there, "from there")
        here.sendall(b"from here\n")

        assert here.recv(100) == b"from there\n"
        assert hears_nothing(there)
        host.mend()
        assert hear(there) == "from here"


def test_hosts_are_gone_after_their_block() -> None:
    if reason := hosts.obstacle():
        pytest.skip(reason)
    with hosts.hosts(1) as (host,):
        process = host.run("tail", "-f", "/dev/null")
        assert host.name in links_and_hosts()

    process.wait(10)
    assert host.name not in links_and_hosts()


def links_and_hosts() -> str:
    return subprocess.getoutput("ip netns list; ip link show")


def test_delayed_host_is_late(two_hosts: list[Host]) -> None:
    if not hosts.can_delay():
        pytest.skip("this kernel does not delay packets (netem)")
    host, _ = two_hosts
    with speaking(host) as (here, there):
        host.delay(100)
        began = monotonic()
        here.sendall(b"from here\n")

        assert hear(there) == "from here"

    assert monotonic() - began >= 0.1


@needs_server
def test_process_in_a_host_reaches_the_database_from_its_own_address(
    two_hosts: list[Host],
) -> None:
    host, _ = two_hosts
    with servers.server(listen=(servers.LOCALHOST, host.gateway)) as made:
        settings = servers.migrated(made, host.gateway)
        with host.started("migrate", "--check", **settings) as process:
            _, errors = process.communicate(timeout=60)

    assert (process.returncode, errors) == (0, "")
