"""One chaos run: its server, clients, workers and nemesis, and what came of it."""

import platform
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Event
from time import monotonic
from typing import Any, NamedTuple

import django
from django.core.management import call_command
from django.db import Error, connection, connections

from async_queue.db import Now, vendor
from async_queue.models import LIVE, Job, Status
from benchmarks.chaos import invariants
from benchmarks.chaos.fleet import Fleet, told
from benchmarks.chaos.invariants import Observer, Violation
from benchmarks.chaos.nemesis import Nemesis
from benchmarks.chaos.workload import COUNTERS, Client, Ledger
from tests.models import Order
from tests.proxy import Proxy, proxy
from tests.servers import LOCALHOST, Server, migrated, server

_CLIENTS = 3
_BACKLOG = 300  # live jobs, above which the clients wait
# Of a storm, then of the calm in which one worker is killed: longer than a server that
# has come back has to wait for its workers.
_STORM, _CALM = 12.0, 6.5
# The proxy has to read what it passes on.
_PLAIN = {"postgresql": {"sslmode": "disable"}, "mysql": {"ssl_mode": "DISABLED"}}
_DRAIN = 90.0  # seconds in which all that is left must end, when nothing is broken
_CONTROL_DRAIN = 10.0
_LAST_KILLS = 3
_MIB = 2**20
_LOSSES = ("I4", "I5")


class Place(NamedTuple):
    """Where the jobs are: for the workers, and the server behind it."""

    database: dict[str, Any]
    server: Server | None
    wire: Proxy | None


def run(
    *, seconds: float, seed: int, rate: float, control: str | None, logs: str | None
) -> dict[str, Any]:
    """Return the figures of a run, its violations among them."""
    with ExitStack() as around:
        folder = Path(logs or around.enter_context(TemporaryDirectory(prefix="aq-")))
        folder.mkdir(exist_ok=True, parents=True)
        place = around.enter_context(_place(folder))
        Order.objects.bulk_create(Order(pk=number, total=0) for number in COUNTERS)
        fleet = Fleet(place.database, folder, control)
        around.callback(fleet.destroy)
        ledger, observer = Ledger(), Observer()
        nemesis = Nemesis(seed, fleet, ledger, place.server, place.wire)
        clients = [
            Client(f"{seed}-{n}", ledger, rate / _CLIENTS, lambda: _has_room(observer))
            for n in range(_CLIENTS)
        ]
        fleet.start()
        observer.start()
        for client in clients:
            client.start()
        began_at = monotonic()
        _break(nemesis, seconds)
        # Jobs of one may be cancelled before they seem to be lost.
        for _ in range(_LAST_KILLS if control == "no-rescue" else 0):
            nemesis.kill_in_calm(0, recovery=0)
        broken_for = monotonic() - began_at
        nemesis.mend()
        for client in clients:
            client.stop()
        drained_in = _drain(_CONTROL_DRAIN if control else _DRAIN)
        if drained_in is None and not control:
            fleet.show_stacks()
            (folder / "sessions").write_text("\n".join(nemesis.activity()))
        if not control:
            fleet.await_watches()
        for member in fleet.members:
            member.note_memory()
        fleet.stop()
        observer.stop()
        nemesis.await_cancels()
        found = invariants.violations(ledger, observer)
        return {
            **_identity(seed, control, broken_for),
            **_jobs(ledger),
            "faults": dict(nemesis.faults.most_common()),
            "faults in all": nemesis.faults.total(),
            **_violations(found),
            "drained in s": drained_in,
            "recovery in calm": told(fleet.recoveries, is_calm=True),
            "recovery in storms": told(fleet.recoveries, is_calm=False),
            "memory in MiB": _memory(fleet),
            "connections left": _left(nemesis),
            "notes": dict(Counter(fleet.notes)),
        }


@contextmanager
def _place(folder: Path) -> Iterator[Place]:
    """Make an empty database with all tables, and be connected to it."""
    if connection.vendor == "sqlite":
        with TemporaryDirectory(prefix="aq-") as temporary:
            name = str(Path(temporary) / "db")
            with _connected({"NAME": name}):
                call_command("migrate", run_syncdb=True, verbosity=0)
                vendor(connection).prepare(connections["default"])
                yield Place({"NAME": name}, None, None)
        return
    with ExitStack() as around:
        made = around.enter_context(server(fsync=False))
        direct = migrated(made)
        wire = around.enter_context(proxy(LOCALHOST, made.port))
        around.enter_context(_connected(direct))
        own = connections.settings["default"]["OPTIONS"]
        options = {**own, **_PLAIN[connection.vendor]}
        through = {**direct, "PORT": str(wire.port), "OPTIONS": options}
        yield Place(through, made, wire)


@contextmanager
def _connected(changes: dict[str, Any]) -> Iterator[None]:
    """Let every thread of this process connect there."""
    connections.close_all()
    connections.settings["default"].update(changes)
    try:
        yield
    finally:
        connections.close_all()


def _has_room(observer: Observer) -> bool:
    return observer.live < _BACKLOG


def _break(nemesis: Nemesis, seconds: float) -> None:
    until = monotonic() + seconds
    while (left := until - monotonic()) > 0:
        nemesis.storm(min(left, _STORM))
        if until - monotonic() > 2 * _CALM:
            nemesis.kill_in_calm(_CALM)


def _drain(patience: float) -> float | None:
    """Return the seconds until nothing lived any more; None if that did not happen."""
    began_at, pause = monotonic(), Event()
    while (passed := monotonic() - began_at) < patience:
        try:
            if not Job.objects.filter(status__in=LIVE).exists():
                return round(passed, 1)
            # What was put off need not wait for its moment.
            Job.objects.filter(status=Status.WAITING).update(run_after=Now())
        except Error:
            connection.close()
        pause.wait(0.5)
    return None


def _identity(seed: int, control: str | None, seconds: float) -> dict[str, Any]:
    return {
        "database": f"{connection.display_name} "
        + ".".join(map(str, connection.get_database_version())),
        "python": platform.python_version(),
        "django": django.get_version(),
        "seed": seed,
        "control": control,
        "seconds": round(seconds),
    }


def _jobs(ledger: Ledger) -> dict[str, Any]:
    states = Counter(Job.objects.values_list("status", flat=True))
    runs = sum(Job.objects.values_list("attempt", flat=True))
    return {
        "jobs": states.total(),
        "runs": runs,
        "states": dict(states.most_common()),
        "known to clients": {
            "committed": len(ledger.committed),
            "rolled back": len(ledger.rolled_back),
            "unknown": len(ledger.unknown),
            "cancelled": len(ledger.cancelled),
        },
    }


def _violations(found: list[Violation]) -> dict[str, Any]:
    return {
        "violations": len(found),
        "jobs lost": sum(each.rule in _LOSSES for each in found),
        "by rule": dict(Counter(each.rule for each in found)),
        "examples": [f"{each.rule}: {each.what}" for each in found[:50]],
    }


def _memory(fleet: Fleet) -> dict[str, str]:
    """Return what each worker's process has had, in fifths of its life, and at most."""
    found = {}
    for member in fleet.members:
        if samples := member.memory:
            last = len(samples) - 1
            seconds = samples[-1][0] - samples[0][0]
            sizes = [samples[last * fifth // 5][1] for fifth in range(1, 6)]
            told = " ".join(f"{size / _MIB:.1f}" for size in sizes)
            most = max(size for _, size in samples) / _MIB
            found[f"worker-{member.number}"] = (
                f"{told}, at most {most:.1f}, in {seconds:.0f} s"
            )
    return found


def _left(nemesis: Nemesis) -> int:
    """Return how many sessions outlive all workers for five seconds."""
    pause: Callable[[float], object] = Event().wait
    for _ in range(50):
        if not (left := nemesis.sessions()):
            return 0
        pause(0.1)
    return len(left)
