"""``claims``: the time of a claim, and of an idle worker's look, in full tables."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from statistics import median
from time import perf_counter
from typing import Any, NamedTuple

from benchmarks.places import Place
from benchmarks.report import Measured
from benchmarks.run import Run, together
from benchmarks.systems import SYSTEMS, fill, home

_CLAIMED = 10
_DONE = 100  # jobs that are claimed and finished at a time to use up a table
# By the alias of their databases.
_SUBJECTS = {"default": "async_queue", "empty": "empty table"}
_WHAT = ("claim of 10", "probe: heads", "probe: tick")
# The columns in which the rows beside differ: status, queue, rank, seconds from now.
BESIDE: Mapping[str, tuple[str, str, int, int]] = {
    "READY elsewhere": ("READY", "elsewhere", 0, -60),
    "WAITING of higher priority": ("WAITING", "default", -100, 30 * 86400),
    "WAITING": ("WAITING", "default", 0, 30 * 86400),
    "SUCCESSFUL": ("SUCCESSFUL", "default", 0, -60),
}


def measure(run: Run) -> None:
    """Measure in a full table and in an empty one, by turns from claim to claim."""
    count = 20 if run.is_quick else 200
    with table(run.vendor) as empty:
        for what, columns in list(BESIDE.items())[: 2 if run.is_quick else None]:
            with table(run.vendor) as beside:
                beside.call(insert_rows, run.rows, *columns)
                compare(run, "claims", what, beside, empty, count)
        # SQLite has no vacuum to wait for, and nobody writes beside a writer.
        if run.vendor != "sqlite":
            _measure_used(run, empty, count)


def compare(
    run: Run, figure: str, what: str, beside: Place, empty: Place, count: int
) -> None:
    """Compare claims, and looks, in a table that holds ``what`` with an empty one."""
    units = {f"{each}, {what}": "ms" for each in _WHAT}
    looks = together(_SUBJECTS.values(), partial(_look, beside, empty, what, count))
    run.look(figure, units, looks)


def _measure_used(run: Run, empty: Place, count: int) -> None:
    """Measure claims from a table that has seen many jobs, and no vacuum since."""
    for case, is_held in (("unvacuumed", False), ("behind a writer", True)):
        with ExitStack() as around:
            used = around.enter_context(table(run.vendor))
            _forbid_vacuum(used)
            around.enter_context(_writer(used) if is_held else nullcontext())
            used.call(use_up, run.rows // 5)
            for what, is_first in (("claim of 10", False), ("first claim of 10", True)):
                subjects = together(
                    _SUBJECTS.values(), partial(_claim_on, used, empty, count, is_first)
                )
                run.compare("claims", f"{what}, {case}", "ms", subjects)


@contextmanager
def table(vendor: str) -> Iterator[Place]:
    """Make an empty table of jobs."""
    with home(SYSTEMS["async_queue"], vendor) as place:
        place.call(fill, "async_queue", "noop", 0)
        place.settle()
        yield place


def _look(
    beside: Place, empty: Place, what: str, count: int
) -> dict[str, dict[str, Measured]]:
    _empty(empty)
    beside.settle()
    found = _both(beside, empty).call(look, count)
    return {
        subject: {
            f"{each}, {what}": _measured(times[alias]) for each, times in found.items()
        }
        for alias, subject in _SUBJECTS.items()
    }


def _claim_on(
    used: Place, empty: Place, count: int, is_first: bool
) -> dict[str, Measured]:
    _empty(empty)
    found = _both(used, empty).call(claim_on, count, is_first)
    return {subject: _measured(found[alias]) for alias, subject in _SUBJECTS.items()}


def _both(place: Place, empty: Place) -> Place:
    """Return the place, with the other as a second database of Django's."""
    databases = {"default": place.database, "empty": empty.database}
    return replace(place, wanted={**place.wanted, "DATABASES": databases})


def _measured(times: list[float]) -> Measured:
    return Measured(median(times), {"worst": max(times)})


def _empty(place: Place) -> None:
    verb = "DELETE FROM" if place.vendor == "sqlite" else "TRUNCATE"
    with closing(place.connect()) as connection:
        connection.cursor().execute(f"{verb} async_queue_job")
    place.settle()


def _forbid_vacuum(place: Place) -> None:
    if place.vendor == "postgres":
        sql = "ALTER TABLE async_queue_job SET (autovacuum_enabled = false)"
        with closing(place.connect()) as connection:
            connection.cursor().execute(sql)


@contextmanager
def _writer(place: Place) -> Iterator[None]:
    """Leave a transaction open that has written a row, so that nothing is cleaned."""
    begin = {
        "postgres": "BEGIN",
        # There it is not what was written but the snapshot that keeps what is dead.
        "mariadb": "START TRANSACTION WITH CONSISTENT SNAPSHOT",
    }
    with closing(place.connect()) as connection:
        cursor = connection.cursor()
        cursor.execute(begin[place.vendor])
        cursor.execute("INSERT INTO benchmarks_effect (number) VALUES (0)")
        yield
        cursor.execute("ROLLBACK")


# What is called where Django is set up.


def insert_rows(count: int, status: str, queue: str, rank: int, seconds: int) -> None:
    """Insert rows by one statement; ``seconds`` from now is when they may run."""
    from django.db import connection

    from async_queue.db import vendor

    facts = vendor(connection)
    numbers = {
        "postgresql": "SELECT number FROM generate_series(1, %s) AS numbers (number)",
        "mysql": f"SELECT seq AS number FROM seq_1_to_{count} WHERE %s",
        "sqlite": "WITH RECURSIVE numbers (number) AS (SELECT 1 UNION ALL SELECT "
        "number + 1 FROM numbers LIMIT %s) SELECT number FROM numbers",
    }[connection.vendor]
    finished = facts.now if status == "SUCCESSFUL" else "NULL"
    quoted = connection.ops.quote_name
    with connection.cursor() as cursor:
        cursor.execute(
            f"INSERT INTO async_queue_job ({quoted('function')}, args, kwargs, meta, "
            f"seal, identity, queue, {quoted('rank')}, status, attempt, failures, "
            "suspect, crashes, run_after, enqueued_at, finished_at) "
            "SELECT 'benchmarks.work.noop', '[0]', '{}', '{}', %s, %s, %s, %s, %s, "
            f"0, 0, FALSE, 0, {facts.shifted_now}, {facts.now}, {finished} "
            f"FROM ({numbers}) AS numbers",
            [
                *("s" * 70, "i" * 64, queue, rank, status),
                facts.shift(seconds),
                count,
            ],
        )


def look(count: int) -> dict[str, dict[str, list[float]]]:
    """Return the milliseconds of claims, and of an idle worker's looks after them."""
    from async_queue import claims, statements

    with _workers(count, priority=100) as workers:
        claimed = _times(
            count,
            {
                alias: partial(claims.claim, alias, worker.number, _CLAIMED)
                for alias, worker in workers.items()
            },
            _CLAIMED,
        )
        for alias, worker in workers.items():
            _finish(alias, worker.number)
        heads = {
            alias: partial(statements.heads, worker.connection)
            for alias, worker in workers.items()
        }
        ticks = {
            alias: partial(statements.tick, worker.connection, worker.number)
            for alias, worker in workers.items()
        }
        return {
            "claim of 10": claimed,
            "probe: heads": _times(count, heads),
            "probe: tick": _times(count, ticks),
        }


def use_up(count: int) -> None:
    """Claim jobs and finish them, as workers do, but many at a time."""
    from async_queue import claims
    from async_queue.db import private

    insert_rows(count, "READY", "default", 0, -60)
    with private("default"):
        number = _registered("default")
        claimer = claims.Claimer("default")
        while claimer.claim(number, _DONE):
            _finish("default", number)


def claim_on(count: int, is_first: bool) -> dict[str, list[float]]:
    """Return the milliseconds of the claims of one worker, or of many new ones."""
    from async_queue import claims

    with _workers(count) as workers:
        acts = {
            alias: partial(claims.claim, alias, worker.number, _CLAIMED)
            if is_first
            else partial(claims.Claimer(alias).claim, worker.number, _CLAIMED)
            for alias, worker in workers.items()
        }
        times = _times(count, acts, _CLAIMED)
        for alias, worker in workers.items():
            _finish(alias, worker.number)
    return times


class _Worker(NamedTuple):
    connection: Any
    number: int


@contextmanager
def _workers(count: int, priority: int = 0) -> Iterator[dict[str, _Worker]]:
    """Give a worker for each database, and to both as many jobs to claim."""
    from async_queue import schedule_many
    from async_queue.db import private

    calls = [("benchmarks.work.noop", [0])] * (_CLAIMED * count)
    with ExitStack() as around:
        workers = {}
        for alias in _SUBJECTS:
            schedule_many(calls, priority=priority, using=alias)
            connection = around.enter_context(private(alias))
            workers[alias] = _Worker(connection, _registered(alias))
        yield workers


def _registered(alias: str) -> int:
    from django.utils.timezone import now

    from async_queue.models import Worker

    row = Worker.objects.using(alias).create(
        host="benchmarks", pid=0, version="", queues="", threads=4, seen_at=now()
    )
    return int(row.pk)


def _finish(alias: str, worker: int) -> None:
    from async_queue.models import Job

    Job.objects.using(alias).filter(worker=worker).transition("succeed")


def _times(
    count: int, acts: Mapping[str, Callable[[], Any]], wanted: int | None = None
) -> dict[str, list[float]]:
    """Return how many milliseconds each act took, by turns."""
    times: dict[str, list[float]] = {name: [] for name in acts}
    for _ in range(count):
        for name, act in acts.items():
            began_at = perf_counter()
            found = act()
            times[name].append(1000 * (perf_counter() - began_at))
            assert wanted in (None, len(found)), f"claimed {len(found)} jobs"
    return times
