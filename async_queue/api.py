"""The verbs of whoever has work to be done: schedule, deschedule, cancel, health.

Everything wrong is said here and now, by name. A job is a row in the caller's
transaction: it is there if that commits, and was never there if it does not.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime, timedelta
from functools import partial
from typing import Any, NamedTuple

from django.db import connections, transaction
from django.db.models import QuerySet

from async_queue import callables, codec, conf, context, statements
from async_queue.callables import Registration
from async_queue.db import Now, persist
from async_queue.exceptions import Cancel, InvalidArguments, InvalidJob, InvalidOption
from async_queue.models import (
    HIGHEST,
    LIVE,
    LOWEST,
    MOMENTS,
    Attempt,
    Job,
    JobQuerySet,
    Status,
)
from async_queue.monitoring import health
from async_queue.retries import check_classes, checked_meta, class_path
from async_queue.statements import InsertedJob, NewJob
from async_queue.tracebacks import MAX_MESSAGE, storable

__all__ = [
    "cancel",
    "deschedule",
    "health",
    "schedule",
    "schedule_many",
]

Function = Callable[..., Any] | str
RunAfter = datetime | timedelta | None

_COLUMNS = [field.attname for field in Job._meta.concrete_fields]
_BATCH = 500
_FURTHEST = timedelta(days=36_500)
_QUEUE = re.compile(r"[\w.-]{1,64}")


def schedule(
    function: Function,
    args: Sequence[Any] | None = None,
    kwargs: Mapping[str, Any] | None = None,
    run_after: RunAfter = None,
    meta: Mapping[str, Any] | None = None,
    *,
    queue: str | None = None,
    priority: int | None = None,
    using: str | None = None,
) -> Job:
    """Insert a job that calls ``function(*args, **kwargs)``; return it.

    ``function`` is a dotted path, or a module's function or static or class method.
    ``args`` and ``kwargs`` hold what JSON has, and datetime, date, time, timedelta,
    Decimal and UUID. ``run_after`` is an aware datetime, or a timedelta from now by
    the database's clock. ``meta`` says how it is run: max_attempts, backoff,
    discard_on, retry_on, expires_after, timeout, atomic. ``priority`` is from -100 to
    100, higher ones run first within a ``queue``. What is not given comes from the
    function's ``@job``.

    The row is inserted in the caller's transaction on the database ``using``. Raises
    InvalidFunction, InvalidArguments or InvalidOption, all of them InvalidJob.
    """
    order = _Order(run_after, meta, queue, priority, using).checked()
    return _insert([_new_job(function, args, kwargs, order)], order)[0]


def schedule_many(
    calls: Iterable[Sequence[Any]],
    run_after: RunAfter = None,
    meta: Mapping[str, Any] | None = None,
    *,
    queue: str | None = None,
    priority: int | None = None,
    using: str | None = None,
) -> list[Job]:
    """Insert a job for each call (function, args, kwargs); return them in order.

    ``args`` and ``kwargs`` of a call may be left out. The options are those of
    `schedule` and hold for all. Either all jobs are inserted or none.
    """
    order = _Order(run_after, meta, queue, priority, using).checked()
    rows = list(_new_jobs(calls, order))
    with transaction.atomic(using=order.using):
        return _insert(rows, order)


def deschedule(
    function: Function,
    args: Sequence[Any] | None = None,
    kwargs: Mapping[str, Any] | None = None,
    *,
    using: str | None = None,
) -> int:
    """Cancel all live jobs of exactly this call; return how many there were.

    The job that calls this is not among them.
    """
    path = (
        str.__str__(function)
        if isinstance(function, str)
        else callables.path_of(function)
    )
    order = _Order(using=using).checked()
    identity = codec.identity(path, *_encoded(args, kwargs))
    return cancel(Job.objects.using(order.using).live().filter(identity=identity))


def cancel(jobs: "Job | QuerySet[Job]", reason: str = "") -> int:
    """Cancel those of ``jobs`` that are not finished; return how many there were.

    A job that is running is cancelled at once: its effects will not commit. The job
    that calls this is left out: it raises Cancel instead. A ``reason`` is kept as an
    attempt of the job.
    """
    found = _queryset(jobs)
    current = context.current_job()
    # Asked here, because a slice cannot be filtered.
    ids = [pk for pk, status in found.values_list("pk", "status") if status in LIVE]
    if current is not None and current.alias == found.db and current.id in ids:
        ids.remove(current.id)
    ids.sort()
    cancel_batch = partial(_cancel_batch, found.db, reason)
    return sum(
        persist(connections[found.db], partial(cancel_batch, ids[start:][:_BATCH]))
        for start in range(0, len(ids), _BATCH)
    )


class _Order(NamedTuple):
    """The options that all jobs of one call share."""

    run_after: RunAfter = None
    meta: Mapping[str, Any] | None = None
    queue: str | None = None
    priority: int | None = None
    using: str | None = None

    def checked(self) -> "_Checked":
        _check_run_after(self.run_after)
        if self.queue is not None:
            check_queue(self.queue)
        if self.priority is not None:
            check_priority(self.priority)
        if not isinstance(self.meta, Mapping | None):
            raise InvalidOption(f"meta is {self.meta!r}: pass a dict.")
        alias = conf.settings().database if self.using is None else self.using
        if alias not in connections:
            raise InvalidOption(
                f"using is {alias!r}: the databases are {', '.join(connections)}."
            )
        meta = checked_meta(self.meta or {})
        check_classes(meta)
        stored = codec.encode(meta, "meta")
        return _Checked(self.run_after, stored, self.queue, self.priority, alias)


class _Checked(NamedTuple):
    run_after: RunAfter
    meta: str
    queue: str | None
    priority: int | None
    using: str


_NO_OPTIONS = Registration(lambda: None, "default", 0, {})


def _new_job(
    function: Function,
    args: Sequence[Any] | None,
    kwargs: Mapping[str, Any] | None,
    order: _Checked,
) -> NewJob:
    path = callables.path_of(function)
    stored = _encoded(args, kwargs)
    callables.check_arguments(path, args or (), kwargs or {})
    defaults = callables.registry.get(path, _NO_OPTIONS)
    priority = defaults.priority if order.priority is None else order.priority
    return NewJob(
        path,
        *stored,
        order.meta,
        codec.seal(path, *stored, order.meta),
        codec.identity(path, *stored),
        order.queue or defaults.queue,
        -priority,
    )


def _new_jobs(calls: Iterable[Sequence[Any]], order: _Checked) -> Iterator[NewJob]:
    for number, call in enumerate(calls):
        try:
            yield _new_job(*_unpacked(call), order)
        except InvalidJob as error:
            raise type(error)(f"call {number}: {error}") from error


def _encoded(
    args: Sequence[Any] | None, kwargs: Mapping[str, Any] | None
) -> tuple[str, str]:
    if args is not None and not isinstance(args, (list, tuple)):
        raise InvalidArguments(f"args is {args!r}: pass a list such as [{args!r}].")
    if kwargs is not None and not isinstance(kwargs, Mapping):
        raise InvalidArguments(f"kwargs is {kwargs!r}: pass a dict.")
    if not all(isinstance(name, str) for name in kwargs or ()):
        raise InvalidArguments(f"kwargs is {kwargs!r}: its keys must be str.")
    stored = (
        codec.encode(args or [], "args"),
        # In order, so that the same call has the same identity.
        codec.encode(dict(sorted((kwargs or {}).items())), "kwargs"),
    )
    if (size := sum(map(len, stored))) > codec.MAX_BYTES:
        raise InvalidArguments(
            f"args and kwargs have {size:,} bytes as JSON and at most "
            f"{codec.MAX_BYTES:,} fit: store them elsewhere and pass a key."
        )
    return stored


def _unpacked(call: Sequence[Any]) -> tuple[Function, Any, Any]:
    if not isinstance(call, (list, tuple)) or not 1 <= len(call) <= 3:
        raise InvalidArguments(
            f"{call!r} is not a call: pass (function, args, kwargs)."
        )
    function, args, kwargs = (*call, None, None)[:3]
    return function, args, kwargs


def _insert(rows: list[NewJob], order: _Checked) -> list[Job]:
    connection = connections[order.using]
    settings = conf.settings()
    # What is due later is found by the workers in time.
    soon = settings.poll_interval if settings.notify else None
    given = len(NewJob._fields) + 2  # and the moment, twice
    most = connection.features.max_query_params or _BATCH * given
    size = min(_BATCH, most // given)
    jobs: list[Job] = []
    for start in range(0, len(rows), size):
        batch = rows[start : start + size]
        inserted = statements.insert(connection, batch, order.run_after, soon)
        for row, told in zip(batch, inserted, strict=True):
            jobs.append(_as_job(order.using, row, told))
    return jobs


def _as_job(alias: str, row: NewJob, inserted: InsertedJob) -> Job:
    values = {
        **row._asdict(),
        **inserted._asdict(),
        "attempt": 0,
        "failures": 0,
        "suspect": False,
        "crashes": 0,
        "worker_id": None,
        "started_at": None,
        "finished_at": None,
        "result": None,
    }
    return Job.from_db(alias, _COLUMNS, [values[name] for name in _COLUMNS])


def _queryset(jobs: "Job | QuerySet[Job]") -> JobQuerySet:
    if isinstance(jobs, Job):
        return Job.objects.using(jobs._state.db).filter(pk=jobs.pk)
    if isinstance(jobs, JobQuerySet):
        return jobs if jobs.query.is_sliced else jobs.live()
    raise InvalidOption(f"jobs is {jobs!r}: pass a Job or a queryset of them.")


def _cancel_batch(alias: str, reason: str, ids: list[int]) -> int:
    rows = Job.objects.using(alias).filter(pk__in=ids)
    with transaction.atomic(using=alias):
        if connections[alias].features.has_select_for_update:
            # In one order, so that no two who cancel wait for each other.
            locked = rows.live().select_for_update().order_by("pk")
            rows = rows.filter(pk__in=list(locked.values_list("pk", flat=True)))
        cancelled = rows.transition("cancel")
        if cancelled and reason:
            Attempt.objects.using(alias).bulk_create(
                Attempt(
                    job_id=row.pk,
                    number=row.attempt,
                    started_at=row.started_at,
                    finished_at=Now(),
                    exception=class_path(Cancel),
                    message=storable(reason, MAX_MESSAGE),
                    traceback="",
                )
                for row in rows.filter(status=Status.CANCELLED).only(
                    "attempt", "started_at"
                )
            )
    return cancelled


def check_queue(queue: Any) -> None:
    """Return if this can be the name of a queue; raise InvalidOption if not."""
    if not isinstance(queue, str) or not _QUEUE.fullmatch(queue):
        raise InvalidOption(
            f"queue is {queue!r}: pass up to 64 letters, digits, '_', '-' and '.'."
        )


def check_priority(priority: Any) -> None:
    """Return if this can be a priority; raise InvalidOption if not."""
    if type(priority) is not int or not LOWEST <= priority <= HIGHEST:
        raise InvalidOption(
            f"priority is {priority!r}: pass a whole number from {LOWEST} to {HIGHEST}."
        )


def _check_run_after(run_after: Any) -> None:
    if run_after is None:
        return
    if isinstance(run_after, timedelta):
        if abs(run_after) > _FURTHEST:
            raise InvalidOption(f"run_after is {run_after!r}: pass up to 100 years.")
    elif not isinstance(run_after, datetime):
        raise InvalidOption(
            f"run_after is {run_after!r}: pass an aware datetime or a timedelta."
        )
    elif run_after.tzinfo is None or run_after.utcoffset() is None:
        raise InvalidOption(
            f"run_after is {run_after!r}, which is naive: pass a timedelta, or an "
            "aware datetime such as datetime.now(UTC)."
        )
    elif not MOMENTS[0] <= run_after <= MOMENTS[1]:
        raise InvalidOption(f"run_after is {run_after!r}: pass a year up to 9998.")
