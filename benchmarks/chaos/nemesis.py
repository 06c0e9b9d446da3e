"""Who breaks things, at random, by a seed: processes, sessions, wires and servers."""

import heapq
import random
import signal
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from itertools import count
from threading import Event, Thread
from time import monotonic
from typing import Any

from django.db import Error, connection, transaction

from async_queue import cancel
from async_queue.models import LIVE, Job, Status, Worker
from benchmarks.chaos.fleet import Fleet, Member
from benchmarks.chaos.settings import STALL_AFTER
from benchmarks.chaos.workload import Ledger
from tests.proxy import TO_CLIENT, TO_SERVER, Proxy
from tests.servers import Server

# For each database: its sessions but ours, those that hold a worker's life, and the
# end of one.
_SESSIONS = {
    "postgresql": "SELECT pid FROM pg_stat_activity WHERE datname = "
    "current_database() AND pid <> pg_backend_pid() "
    "AND backend_type = 'client backend'",
    "mysql": "SELECT id FROM information_schema.processlist "
    "WHERE db = DATABASE() AND id <> CONNECTION_ID()",
}
_KEEPERS = {
    "postgresql": "SELECT DISTINCT pid FROM pg_locks WHERE locktype = 'advisory' "
    "AND mode = 'ExclusiveLock' AND granted AND pid <> pg_backend_pid()",
    "mysql": "SELECT IS_USED_LOCK(CONCAT('async_queue:', LEFT(SHA2(DATABASE(), 256), "
    "16), ':', id)) FROM async_queue_worker WHERE dead_at IS NULL",
}
_ACTIVITY = {
    "postgresql": "SELECT pid, client_port, state, wait_event, now() - xact_start, "
    "pg_blocking_pids(pid), left(query, 200) FROM pg_stat_activity "
    "WHERE datname = current_database()",
    "mysql": "SELECT id, host, command, time, state, info "
    "FROM information_schema.processlist",
}
_END = {"postgresql": "SELECT pg_terminate_backend(%s)", "mysql": "KILL %s"}
_SHARES = {
    "kill": 12,
    "kill_all": 1,
    "terminate": 5,
    "terminate_twice": 1,
    "stop_briefly": 8,
    "stop_long": 4,
    "flush": 3,
    "cancel_some": 10,
    "reverse_locks": 6,
}
_SERVER_SHARES = {
    "end_sessions": 14,
    "end_keepers": 8,
    "restart_server": 1,
    "crash_server": 1,
    "kill_server": 1,
    "kill_server_and_workers": 1,
    "freeze_server": 3,
    "cut": 6,
    "cut_at_commit": 10,
    "stall": 4,
    "delay": 4,
    "refuse": 2,
}

_RECOVERY = 5  # seconds for which the next harm waits


class Nemesis:
    """Does one harm after the other; what lasts is undone in time, or by `mend`."""

    def __init__(
        self,
        seed: int,
        fleet: Fleet,
        ledger: Ledger,
        server: Server | None,
        wire: Proxy | None,
    ) -> None:
        self._rng = random.Random(seed)
        self._fleet = fleet
        self._ledger = ledger
        self._server = server
        self._wire = wire
        self.faults: Counter[str] = Counter()
        self._undoings: list[tuple[float, int, Callable[[], object]]] = []
        self._order = count()
        self._cancelling: list[Thread] = []
        self._shares = _SHARES | (_SERVER_SHARES if server else {})

    def storm(self, seconds: float) -> None:
        """Break something every second or so."""
        until = monotonic() + seconds
        while (now := monotonic()) < until:
            self._act()
            self._wait_until(min(until, now + 2 * self._rng.random() ** 2))

    def kill_in_calm(self, patience: float, recovery: float = _RECOVERY) -> None:
        """Kill one worker while all else is well, and let its jobs recover."""
        self.mend()
        self._wait_until(monotonic() + patience)
        watch = self._fleet.kill(self._busy_member(), is_calm=True)
        self.faults["kill in calm"] += 1
        if watch is not None:
            watch.join(recovery)
        self._fleet.keep_up()

    def mend(self) -> None:
        """Undo everything; see that all processes are there."""
        while self._undoings:
            heapq.heappop(self._undoings)[-1]()
        self._fleet.keep_up()

    def await_cancels(self) -> None:
        """Return once all that it has cancelled is known."""
        for thread in self._cancelling:
            thread.join()

    def sessions(self) -> list[int]:
        """Return the numbers of the sessions that others have at the server."""
        return _column(_SESSIONS[connection.vendor]) if self._server else []

    def activity(self) -> list[str]:
        """Return what the server says of its sessions, a line for each."""
        if not self._server:
            return []
        with connection.cursor() as cursor:
            cursor.execute(_ACTIVITY[connection.vendor])
            return [" | ".join(map(str, row)) for row in cursor.fetchall()]

    def _act(self) -> None:
        (name,) = self._rng.choices(list(self._shares), list(self._shares.values()))
        self.faults[name.replace("_", " ")] += 1
        try:
            getattr(self, f"_{name}")()
        except Error:  # by an earlier harm
            connection.close()

    def _wait_until(self, moment: float) -> None:
        pause = Event()
        while (now := monotonic()) < moment:
            while self._undoings and self._undoings[0][0] <= now:
                heapq.heappop(self._undoings)[-1]()
            for member in self._fleet.members:
                member.note_memory()
            next_at = self._undoings[0][0] if self._undoings else moment
            pause.wait(max(0.0, min(moment, next_at) - now))

    def _later(self, seconds: float, undo: Callable[[], object]) -> None:
        heapq.heappush(self._undoings, (monotonic() + seconds, next(self._order), undo))

    # Processes.

    def _busy_member(self) -> Member:
        """Return one that runs jobs, stopped: so it still does when it is killed."""
        until = monotonic() + 10
        while monotonic() < until:
            for member in self._rng.sample(self._mortals(), 2):
                if member.is_up and _is_busy(member):
                    member.send(signal.SIGSTOP)
                    if _is_busy(member):
                        return member
                    member.send(signal.SIGCONT)
        return self._mortals()[0]

    def _mortals(self) -> list[Member]:
        return self._fleet.members[1:]

    def _kill(self) -> None:
        self._fleet.kill(self._rng.choice(self._mortals()))
        self._later(self._rng.random(), self._fleet.keep_up)

    def _kill_all(self) -> None:
        for member in self._mortals():
            self._fleet.kill(member)
        self._later(1 + self._rng.random(), self._fleet.keep_up)

    def _terminate(self, times: int = 1) -> None:
        member = self._rng.choice(self._mortals())
        if member.is_stopped or not member.is_up:
            return
        for _ in range(times):
            member.send(signal.SIGTERM)
        self._later(self._rng.random(), self._fleet.keep_up)

    def _terminate_twice(self) -> None:
        self._terminate(2)

    def _stop_briefly(self) -> None:
        self._stop(self._rng.uniform(0.1, STALL_AFTER / 2))

    def _stop_long(self) -> None:
        self._stop(STALL_AFTER + self._rng.uniform(1, 3))

    def _stop(self, seconds: float) -> None:
        member = self._rng.choice(self._fleet.members)
        if not member.is_up or member.is_stopped:
            return
        process = member.process
        assert process is not None
        member.send(signal.SIGSTOP)

        def go_on() -> None:
            process.send_signal(signal.SIGCONT)  # nothing if it has ended
            if member.process is process:
                member.is_stopped = False

        self._later(seconds, go_on)

    def _flush(self) -> None:
        self._fleet.flush()

    # Rows.

    def _cancel_some(self) -> None:
        running = list(_live(Status.RUNNING)[:20])
        picked = self._rng.sample(running, min(2, len(running)))
        # In a thread, for it may wait for whoever is behind a wire that we must mend.
        thread = Thread(target=_cancel, args=(picked, self._ledger), daemon=True)
        thread.start()
        self._cancelling.append(thread)

    def _reverse_locks(self) -> None:
        """Hold some rows, locked against the order in which all others lock them."""
        if not connection.features.has_select_for_update:
            return
        rows = sorted(_live(*LIVE)[:50], reverse=True)
        picked = [pk for pk in rows if self._rng.random() < 0.2]
        seconds = self._rng.uniform(0.05, 0.5)
        Thread(target=_lock, args=(picked, seconds), daemon=True).start()

    # Sessions and wires.

    def _end_sessions(self) -> None:
        numbers = self.sessions()
        _end(self._rng.sample(numbers, min(len(numbers), self._rng.randint(1, 4))))

    def _end_keepers(self) -> None:
        numbers = list(filter(None, _column(_KEEPERS[connection.vendor])))
        _end(numbers[: self._rng.randint(1, 3)])

    def _cut(self) -> None:
        assert self._wire is not None
        self._wire.cut_all()

    def _cut_at_commit(self) -> None:
        assert self._wire is not None
        self._wire.cut = self._rng.choice(["before", "after"])

    def _stall(self) -> None:
        assert self._wire is not None
        ways = self._rng.choice([(TO_SERVER,), (TO_CLIENT,), (TO_SERVER, TO_CLIENT)])
        self._wire.stall(*ways)
        self._later(self._rng.uniform(0.2, STALL_AFTER + 2), self._wire.resume)

    def _delay(self) -> None:
        assert self._wire is not None
        delay = self._wire.delay
        delay.update(dict.fromkeys(delay, self._rng.uniform(0.005, 0.1)))
        self._later(2, lambda: delay.update(dict.fromkeys(delay, 0.0)))

    def _refuse(self) -> None:
        """Be a machine where no server runs."""
        wire = self._wire
        assert wire is not None
        if any(undo == wire.admit for _, _, undo in self._undoings):
            return
        wire.refuse()
        wire.cut_all()
        self._later(self._rng.uniform(0.5, 3), wire.admit)

    # The server.

    def _restart_server(self) -> None:
        self._bring_down(lambda server: server.stop("fast"))

    def _crash_server(self) -> None:
        self._bring_down(lambda server: server.stop("immediate"))

    def _kill_server(self) -> None:
        self._bring_down(Server.kill)

    def _kill_server_and_workers(self) -> None:
        self._bring_down(Server.kill)
        for member in self._mortals():
            member.end(signal.SIGKILL)
        self._later(2, self._fleet.keep_up)

    def _bring_down(self, how: Callable[[Server], object]) -> None:
        server = self._server
        assert server is not None
        if not server.processes():
            return
        connection.close()
        how(server)
        self._later(self._rng.uniform(0, 2), server.start)

    def _freeze_server(self) -> None:
        server = self._server
        assert server is not None
        if server.processes():
            server.freeze()
            # Nobody may ask it anything meanwhile, we neither.
            Event().wait(self._rng.choice([0.5, 1.5, STALL_AFTER + 1]))
            server.thaw()


def _is_busy(member: Member) -> bool:
    assert member.process is not None
    busy = Worker.objects.filter(jobs__status=Status.RUNNING)
    return busy.filter(pid=member.process.pid).exists()


def _live(*status: str) -> Any:
    return Job.objects.filter(status__in=status).values_list("pk", flat=True)


def _cancel(ids: list[int], ledger: Ledger) -> None:
    with suppress(Error):
        try:
            for pk in ids:
                if cancel(Job.objects.filter(pk=pk)):
                    ledger.cancelled.add(pk)
        finally:
            connection.close()


def _lock(ids: list[int], seconds: float) -> None:
    with suppress(Error):
        try:
            with transaction.atomic():
                for pk in ids:
                    list(Job.objects.select_for_update().filter(pk=pk))
                Event().wait(seconds)
        finally:
            connection.close()


def _column(sql: str) -> list[int]:
    with connection.cursor() as cursor:
        cursor.execute(sql)
        return [value for (value,) in cursor.fetchall()]


def _end(numbers: list[int]) -> None:
    for number in numbers:
        with suppress(Error), connection.cursor() as cursor:
            cursor.execute(_END[connection.vendor], [number])
