"""How the queue is doing: counts, estimates, and a verdict with the remedy.

Called by people, probes and ``queue_health``. It only reads: one pass over the jobs
counts them by status, queue and function, and nearly all else is summed from that.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from datetime import datetime, timedelta
from typing import Any, NamedTuple

from django.db import connections
from django.db.models import Case, Count, F, Max, Min, Q, Sum, Value, When

from async_queue import conf, statements
from async_queue.db import Now, vendor
from async_queue.exceptions import Cancel, FunctionUnavailable, UnknownSealKey
from async_queue.models import LIVE, Attempt, Job, Status, Worker
from async_queue.retries import class_path

# What counts as having happened lately.
_LATELY = timedelta(hours=1)
# Cron's minute and a slow start: for so long nobody worries that no worker lives.
_BETWEEN_PASSES = timedelta(seconds=90)


def health(estimation: str = "rough", using: str | None = None) -> dict[str, Any]:
    """Return how the queue is doing, ready for JSON: moments are ISO texts in UTC.

    ``status`` is the worst of the ``checks``: pass, warn or fail. ``queue`` and
    ``errors`` have the keys of django-async: executed are the SUCCESSFUL jobs,
    remaining the live ones, and not-executed those and the FAILED ones, which have
    ended without having executed. A job is ready once its moment has come, promoted
    or not. Ages and estimates are seconds; an estimate is None where no job has run
    to learn from. ``estimation`` is "rough" or "precise"; ValueError for others.
    """
    if estimation not in ESTIMATORS:
        names = " or ".join(map(repr, ESTIMATORS))
        raise ValueError(f"estimation must be {names}; it is {estimation!r}")
    seen = look(using, history=_HISTORY[estimation])
    checks = _checks(seen)
    return {
        "status": _worst(check["status"] for check in checks.values()),
        "checks": {name: [check] for name, check in checks.items()},
        "queue": {
            **_totals(seen),
            "estimated-completion-current-job": estimate_current_job_completion(seen),
            "estimated-completion": ESTIMATORS[estimation](seen),
        },
        "errors": {"number": seen.errors},
        "queues": _queues(seen),
        "workers": _workers(seen),
    }


class Tally(NamedTuple):
    """The jobs of one queue and function that stand alike, counted.

    They stand where their status says, but READY if they wait and are overdue.
    ``timed`` of them succeeded within the history, and ran for ``run_time`` in all.
    """

    queue: str
    function: str
    standing: str
    jobs: int
    due_at: datetime
    first_enqueued_at: datetime
    first_finished_at: datetime | None
    last_finished_at: datetime | None
    finished_lately: int
    timed: int
    run_time: timedelta | None


class Snapshot(NamedTuple):
    """What was seen of the queue, and the moment by the database's clock."""

    at: datetime
    tallies: list[Tally]
    running: list[tuple[str, int, datetime]]  # function, worker, started_at
    live: list[Worker]
    dead: list[Worker]  # since lately
    threads: int
    errors: int
    put_off: dict[str, int]  # live jobs by the class of what they wait for

    def standing(self, *standings: str) -> list[Tally]:
        """Return the tallies of the jobs that stand at one of these."""
        return [tally for tally in self.tallies if tally.standing in standings]

    def age(self, moment: datetime) -> float:
        """Return the seconds since ``moment``."""
        return max((self.at - moment).total_seconds(), 0.0)


def look(
    using: str | None = None, *, history: timedelta = timedelta(days=1)
) -> Snapshot:
    """Read what `health` and the estimators need, in six queries."""
    alias = using or conf.settings().database
    attempts = Attempt.objects.using(alias)
    # The latest attempt tells: the key may have come, and the job failed since.
    latest = attempts.filter(number=F("job__attempt"), job__status__in=LIVE)
    lately = Q(dead_at=None) | Q(dead_at__gt=Now(after=-_LATELY))
    workers = list(Worker.objects.using(alias).filter(lately).order_by("id"))
    at = statements.now(connections[alias])
    live = [worker for worker in workers if _is_live(alias, worker, at)]
    running = Job.objects.using(alias).filter(status=Status.RUNNING)
    return Snapshot(
        at=at,
        tallies=_tallies(alias, history),
        running=list(running.values_list("function", "worker_id", "started_at")),
        live=live,
        dead=[worker for worker in workers if worker.dead_at],
        threads=_threads(alias, live),
        errors=attempts.exclude(exception=class_path(Cancel)).count(),
        put_off=dict(latest.values_list("exception").annotate(Count("id"))),
    )


def _is_live(alias: str, worker: Worker, at: datetime) -> bool:
    """Tell whether a worker shows signs of life; nobody may have found it dead yet."""
    if worker.dead_at:
        return False
    connection = connections[alias]
    if vendor(connection).has_heartbeat:
        silence: timedelta = at - worker.seen_at
        return silence < conf.settings().stall_after
    is_alone = vendor(connection).is_single_connection(connection)
    return is_alone or not vendor(connection).is_life_free(connection, worker.pk)


def _tallies(alias: str, history: timedelta) -> list[Tally]:
    # Only workers promote: without one, what is overdue would count as waiting.
    overdue = Q(status=Status.WAITING, run_after__lte=Now())
    timed = Q(status=Status.SUCCESSFUL, finished_at__gt=Now(after=-history))
    standing = Case(When(overdue, then=Value(Status.READY)), default=F("status"))
    rows = Job.objects.using(alias).values("queue", "function", standing=standing)
    counted = rows.annotate(
        jobs=Count("id"),
        due_at=Min("run_after"),
        first_enqueued_at=Min("enqueued_at"),
        first_finished_at=Min("finished_at"),
        last_finished_at=Max("finished_at"),
        finished_lately=Count("id", filter=Q(finished_at__gt=Now(after=-_LATELY))),
        timed=Count("started_at", filter=timed),
        run_time=Sum(F("finished_at") - F("started_at"), filter=timed),
    )
    return [Tally(**row) for row in counted.order_by("queue", "function")]


def _threads(alias: str, live: Iterable[Worker]) -> int:
    """Return how many jobs run at a time; between two passes, in the next one."""
    if vendor(connections[alias]).runs_one_job_at_a_time:
        return 1
    return sum(worker.threads for worker in live) or conf.settings().threads


def _checks(seen: Snapshot) -> dict[str, dict[str, Any]]:
    """Return the checks by name, in the form of draft-inadarei-api-health-check."""
    found = {
        "queue:latency": _check_latency(seen),
        "queue:failed": _check_failed(seen),
        "queue:unknown-keys": _check_unknown_keys(seen),
        "queue:unavailable-functions": _check_unavailable_functions(seen),
        "workers:live": _check_live_workers(seen),
        "workers:dead": _check_dead_workers(seen),
    }
    return {
        name: {"componentType": "component", **check, "time": seen.at.isoformat()}
        for name, check in found.items()
    }


def _check_latency(seen: Snapshot) -> dict[str, Any]:
    age = _oldest_ready_age(seen, seen.tallies)
    longest = conf.settings().health["MAX_LATENCY"].total_seconds()
    remedy = (
        f"the oldest ready job has waited for {age:.0f} s, and {longest:.0f} s is the "
        "most by HEALTH['MAX_LATENCY']: run more workers or threads"
    )
    return _check(age, "s", "fail" if age > longest else "pass", remedy)


def _check_failed(seen: Snapshot) -> dict[str, Any]:
    failed = sum(tally.finished_lately for tally in seen.standing(Status.FAILED))
    remedy = (
        f"{_jobs_text(failed)} failed for good within the last hour: read their "
        "tracebacks, mend the cause and run them again"
    )
    return _check_none(failed, "jobs", "warn", remedy)


def _check_unknown_keys(seen: Snapshot) -> dict[str, Any]:
    count = seen.put_off.get(class_path(UnknownSealKey), 0)
    remedy = (
        f"{_jobs_text(count)} sealed with a key that workers do not have: add it to "
        "SECRET_KEY_FALLBACKS or ASYNC_QUEUE['SEAL_KEY']"
    )
    return _check_none(count, "jobs", "fail", remedy)


def _check_unavailable_functions(seen: Snapshot) -> dict[str, Any]:
    count = seen.put_off.get(class_path(FunctionUnavailable), 0)
    remedy = (
        f"{_jobs_text(count)} of functions that workers cannot import: deploy them, "
        "or cancel the jobs"
    )
    return _check_none(count, "jobs", "warn", remedy)


def _check_live_workers(seen: Snapshot) -> dict[str, Any]:
    ready = _jobs_text(_jobs(seen.standing(Status.READY)))
    age = _oldest_ready_age(seen, seen.tallies)
    is_abandoned = not seen.live and age > _BETWEEN_PASSES.total_seconds()
    remedy = f"{ready} ready, no live worker: run manage.py run_workers"
    return _check(len(seen.live), "workers", "warn" if is_abandoned else "pass", remedy)


def _check_dead_workers(seen: Snapshot) -> dict[str, Any]:
    dead = ", ".join(map(str, seen.dead))
    remedy = f"died within the last hour, their jobs run again: {dead}"
    return _check_none(len(seen.dead), "workers", "warn", remedy)


def _check_none(count: int, unit: str, verdict: str, remedy: str) -> dict[str, Any]:
    return _check(count, unit, verdict if count else "pass", remedy)


def _check(value: float, unit: str, verdict: str, remedy: str) -> dict[str, Any]:
    check = {"observedValue": value, "observedUnit": unit, "status": verdict}
    return check if verdict == "pass" else check | {"output": remedy}


def _worst(verdicts: Iterable[str]) -> str:
    return max(verdicts, key=("pass", "warn", "fail").index)


def _totals(seen: Snapshot) -> dict[str, Any]:
    remaining = seen.standing(*LIVE)
    not_executed = seen.standing(*LIVE, Status.FAILED)
    oldest = min((tally.first_enqueued_at for tally in remaining), default=None)
    return {
        "all-jobs": _jobs(seen.tallies),
        **_ended("executed", seen.standing(Status.SUCCESSFUL)),
        "remaining": _jobs(remaining),
        "oldest-remaining": oldest and oldest.isoformat(),
        "not-executed": _jobs(not_executed),
        "not-executed-details": _by_function(not_executed),
        **_ended("cancelled", seen.standing(Status.CANCELLED)),
    }


def _ended(name: str, tallies: list[Tally]) -> dict[str, Any]:
    first = [t.first_finished_at for t in tallies if t.first_finished_at]
    last = [t.last_finished_at for t in tallies if t.last_finished_at]
    return {
        name: _jobs(tallies),
        f"{name}-details": _by_function(tallies),
        f"oldest-{name}": min(first).isoformat() if first else None,
        f"most-recent-{name}": max(last).isoformat() if last else None,
    }


def _queues(seen: Snapshot) -> dict[str, dict[str, Any]]:
    queues = defaultdict(list)
    for tally in seen.tallies:
        queues[tally.queue].append(tally)
    return {
        queue: {
            **{
                standing.lower(): _jobs(t for t in tallies if t.standing == standing)
                for standing in (Status.READY, Status.WAITING, Status.RUNNING)
            },
            "oldest_ready_age": _oldest_ready_age(seen, tallies),
        }
        for queue, tallies in queues.items()
    }


def _workers(seen: Snapshot) -> list[dict[str, Any]]:
    busy = Counter(worker for _, worker, _ in seen.running)
    return [
        {
            "id": worker.pk,
            "host": worker.host,
            "pid": worker.pid,
            "version": worker.version,
            "queues": [queue for queue in worker.queues.split(",") if queue],
            "threads": worker.threads,
            "seen_at": worker.seen_at.isoformat(),
            "running": busy[worker.pk],
        }
        for worker in seen.live
    ]


def _jobs(tallies: Iterable[Tally]) -> int:
    return sum(tally.jobs for tally in tallies)


def _by_function(tallies: Iterable[Tally]) -> dict[str, dict[str, int]]:
    counts: Counter[str] = Counter()
    for tally in tallies:
        counts[tally.function] += tally.jobs
    return {function: {"count": count} for function, count in counts.items()}


def _oldest_ready_age(seen: Snapshot, tallies: Iterable[Tally]) -> float:
    ready = (tally.due_at for tally in tallies if tally.standing == Status.READY)
    return seen.age(min(ready, default=seen.at))


def _jobs_text(count: int) -> str:
    return "1 job" if count == 1 else f"{count} jobs"


def estimate_rough_queue_completion(seen: Snapshot) -> float | None:
    """Return the seconds until all is done, from one average for all remaining jobs.

    Unlike django-async's, it leaves the waits out: jobs wait side by side, so adding
    their waits up would count the same seconds once for each.
    """
    if not (remaining := _jobs(seen.standing(*LIVE))):
        return 0.0
    average = _average_seconds(seen.tallies)
    return None if average is None else round(remaining * average / seen.threads, 2)


def estimate_current_job_completion(seen: Snapshot) -> float | None:
    """Return the seconds until the last of the running jobs is done."""
    if not seen.running:
        return 0.0
    average = _average_seconds(seen.tallies)
    return None if average is None else round(max(_seconds_left(seen, average)), 2)


def estimate_queue_completion(seen: Snapshot) -> float | None:
    """Return the seconds until all is done, from an average for each function.

    What the running jobs have behind them is taken off. A function that has not run
    is taken for an average one.
    """
    if not seen.standing(*LIVE):
        return 0.0
    if (average := _average_seconds(seen.tallies)) is None:
        return None
    left = _seconds_left(seen, average)
    work = sum(left) + sum(
        tally.jobs * _expected_seconds(seen, tally.function, average)
        for tally in seen.standing(Status.WAITING, Status.READY)
    )
    return round(max([work / seen.threads, *left]), 2)


def _seconds_left(seen: Snapshot, average: float) -> list[float]:
    return [
        max(_expected_seconds(seen, function, average) - seen.age(started_at), 0.0)
        for function, _, started_at in seen.running
    ]


def _expected_seconds(seen: Snapshot, function: str, average: float) -> float:
    own = [tally for tally in seen.tallies if tally.function == function]
    expected = _average_seconds(own)
    return average if expected is None else expected


def _average_seconds(tallies: Iterable[Tally]) -> float | None:
    timed = [(tally.run_time, tally.timed) for tally in tallies if tally.timed]
    if not timed:
        return None
    seconds = sum(run_time.total_seconds() for run_time, _ in timed if run_time)
    return seconds / sum(count for _, count in timed)


ESTIMATORS: dict[str, Callable[[Snapshot], float | None]] = {
    "rough": estimate_rough_queue_completion,
    "precise": estimate_queue_completion,
}
# Probes shall not read the run times of all that is kept.
_HISTORY = {"rough": timedelta(days=1), "precise": timedelta(days=30)}
