"""The jobs of the chaos run, and the clients who schedule them.

Each job that does its work leaves one effect, labelled with its id and its attempt. A
client writes down what it knows to have committed, and what it rolled back itself.
"""

import random
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from threading import Event, Lock
from typing import Any

from django.db import Error, connection, transaction
from django.db.models import F

from async_queue import Retry, cancel, current_job, schedule, schedule_many
from async_queue.models import Job, Status
from benchmarks.chaos.background import Background
from benchmarks.chaos.settings import LONGEST
from tests.models import Effect, Order

COUNTERS = range(1, 9)  # rows that the swappers lock in any order
_PHANTOM = "/phantom"
_KINDS = {  # and their shares
    "leave": 40,
    "last": 20,
    "fail": 10,
    "retry": 8,
    "loose": 8,
    "swap": 8,
    "cancel_others": 4,
    "spawn": 5,
    "dream": 3,
}


class RolledBack(Exception):
    """What a client, or a job, has thought better of."""


def soon(failures: int) -> timedelta:
    """Return a backoff that a run of some seconds can wait for."""
    return timedelta(seconds=0.2 * failures)


# The jobs. The key is the client's name for what it scheduled.


def leave(key: str) -> None:
    job = current_job()
    assert job is not None
    Effect.objects.create(label=f"{job.id}:{job.attempt}")


def last(key: str, seconds: float) -> None:
    leave(key)
    Event().wait(seconds)


def loose(key: str, seconds: float) -> None:
    """Leave the effect in autocommit."""
    last(key, seconds)


def fail(key: str) -> None:
    leave(key)
    raise ValueError("as intended")


def retry(key: str, times: int) -> None:
    leave(key)
    job = current_job()
    assert job is not None
    if job.failures < times:
        raise Retry("once more", delay=0.1)


def swap(key: str, first: int, second: int) -> None:
    """Count on two rows, in any order: so two such jobs may meet in a deadlock."""
    leave(key)
    for number in (first, second):
        Order.objects.filter(pk=number).update(total=F("total") + 1)


def cancel_others(key: str, ids: list[int]) -> list[int]:
    """Cancel these jobs, and two that run beside it; return those that still lived."""
    leave(key)
    job = current_job()
    assert job is not None
    beside = Job.objects.filter(status=Status.RUNNING, worker_id=job.worker)
    beside = beside.exclude(pk=job.id).order_by("-pk")
    ids = [*beside.values_list("pk", flat=True)[:2], *ids]
    return [number for number in ids if cancel(Job.objects.filter(pk=number))]


def spawn(key: str) -> None:
    schedule(leave, [child_of(key)])
    leave(key)


def dream(key: str) -> None:
    """Schedule a job in a block that is rolled back."""
    leave(key)
    with suppress(RolledBack), transaction.atomic():
        schedule(leave, [f"{key}{_PHANTOM}"])
        raise RolledBack


def child_of(key: str) -> str:
    return f"{key}/child"


def is_phantom(key: str) -> bool:
    return key.endswith(_PHANTOM)


class Ledger:
    """What the clients know."""

    def __init__(self) -> None:
        self.committed: dict[str, int] = {}  # the ids of jobs by their keys
        self.unknown: set[str] = set()  # the answer to their commit was lost
        self.rolled_back: set[str] = set()
        self.cancelled: set[int] = set()
        self.surprises: list[str] = []  # errors that no client should see
        self._lock = Lock()

    def commit(self, jobs: dict[str, int]) -> None:
        with self._lock:
            self.committed.update(jobs)

    def sample(self, rng: random.Random, count: int) -> list[int]:
        """Return the ids of some of the latest jobs."""
        with self._lock:
            latest = list(self.committed.values())[-200:]
        return rng.sample(latest, min(count, len(latest)))


class Client(Background):
    """Schedules one job after the other until it is stopped."""

    def __init__(
        self, name: str, ledger: Ledger, rate: float, has_room: Callable[[], bool]
    ) -> None:
        super().__init__()
        self._name = name
        self._ledger = ledger
        self._rng = random.Random(name)
        self._pause = 1 / rate
        self._has_room = has_room

    def run(self) -> None:
        number = 0
        while not self.is_over.wait(self._pause * 2 * self._rng.random()):
            if self._has_room():
                number += 1
                self._act(f"{self._name}-{number}")
        connection.close()

    def _act(self, key: str) -> None:
        chance = self._rng.random()
        how = self._schedule_many if chance < 0.03 else self._schedule_one
        keys: dict[str, int] = {}
        try:
            if chance > 0.6:  # in autocommit
                keys.update(self._schedule_one(key))
            else:
                with transaction.atomic():
                    keys.update(how(key))
                    if chance > 0.57:
                        raise RolledBack
        except RolledBack:
            self._ledger.rolled_back |= keys.keys()
        except Error:
            self._ledger.unknown |= {key, *_numbered(key)}
            connection.close()
        except Exception as error:
            self._ledger.surprises.append(f"{key}: {error!r}")
        else:
            self._ledger.commit(keys)

    def _schedule_one(self, key: str) -> dict[str, int]:
        (kind,) = self._rng.choices(list(_KINDS), list(_KINDS.values()))
        args, meta = self._arguments(kind)
        row = schedule(
            f"{__name__}.{kind}",
            [key, *args],
            run_after=self._moment(),
            meta=meta,
            queue=self._rng.choice(["default", "bulk"]),
            priority=self._rng.choice([0, 0, 0, 5]),
        )
        return {key: row.pk}

    def _schedule_many(self, key: str) -> dict[str, int]:
        keys = _numbered(key)
        rows = schedule_many([(leave, [each]) for each in keys])
        return {each: row.pk for each, row in zip(keys, rows, strict=True)}

    def _moment(self) -> timedelta | None:
        if self._rng.random() < 0.8:
            return None
        return timedelta(seconds=3 * self._rng.random())

    def _arguments(self, kind: str) -> tuple[list[Any], dict[str, Any]]:
        rng = self._rng
        match kind:
            case "last" | "loose":
                is_atomic = kind == "last"
                return [round(LONGEST * rng.random() ** 2, 3)], {"atomic": is_atomic}
            case "fail":
                return [], {"max_attempts": 2}
            case "retry":
                return [rng.randint(1, 2)], {}
            case "swap":
                return rng.sample(COUNTERS, 2), {}
            case "cancel_others":
                return [self._ledger.sample(rng, 3)], {}
        return [], {}


def _numbered(key: str) -> list[str]:
    return [f"{key}.{number}" for number in range(3)]
