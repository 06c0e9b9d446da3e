"""The birth of a job: its INSERT."""

import json
from collections.abc import Iterator, Sequence
from datetime import datetime, timedelta
from functools import lru_cache
from typing import Any

from django.db.backends.base.base import BaseDatabaseWrapper

from async_queue.db import Vendor, vendor
from async_queue.models import Status
from async_queue.statements.rows import JOB, InsertedJob, NewJob
from async_queue.statements.wakeups import CHANNEL, CLOCK, announce, wanted

_GIVEN = ", ".join(f'"{name}"' for name in NewJob._fields)
_BORN = "status, run_after, enqueued_at, attempt, failures, crashes, suspect"
_INTO = f"INSERT INTO {JOB} ({_GIVEN}, {_BORN})"


def insert(
    connection: BaseDatabaseWrapper,
    rows: Sequence[NewJob],
    run_after: datetime | timedelta | None,
    soon: timedelta | None = None,
) -> list[InsertedJob]:
    """Insert ``rows`` and return what they became, in their order.

    By one statement, where the database then tells; by one for each row on MySQL.
    On PostgreSQL idle workers are woken for what is READY, or due within ``soon``; no
    ``soon`` wakes nobody. Outside of transactions the same statement does so.
    """
    facts = vendor(connection)
    returning = connection.features.can_return_rows_from_bulk_insert
    if not returning and len(rows) > 1:
        return [insert(connection, [row], run_after)[0] for row in rows]
    wakes = soon is not None and _commits_at_once(connection)
    kind = _kind(run_after)
    moment = _moment(facts, run_after)
    if facts.reads_json_rows and len(rows) > 1:
        sql = _insert_json_sql(facts, kind, wakes)
        stored = json.dumps([row._asdict() for row in rows], ensure_ascii=False)
        params = [*moment, stored]
    else:
        sql = _insert_sql(facts, len(rows), kind, returning, wakes)
        params = [item for row in rows for item in (*row, *moment)]
    if soon is not None and wakes and kind != "now":
        params.append(facts.shift(soon.total_seconds()))
    with connection.cursor() as cursor:
        cursor.execute(sql, params)
        if not returning:
            columns = ", ".join(InsertedJob._fields)
            sql = f"SELECT {columns} FROM {JOB} WHERE id = %s"
            cursor.execute(sql, [cursor.lastrowid])
        found = cursor.fetchall()
    # RETURNING keeps no order, but the ids were given in ours.
    inserted = [_as_inserted(connection, row) for row in sorted(found)]
    if soon is not None and not wakes:
        announce(connection, set(_payloads(rows, inserted, soon)))
    return inserted


def _as_inserted(connection: BaseDatabaseWrapper, row: Any) -> InsertedJob:
    facts = vendor(connection)
    number, status, due, enqueued, *_ = row
    return InsertedJob(
        number,
        status,
        facts.read_moment(due, connection),
        facts.read_moment(enqueued, connection),
    )


def _commits_at_once(connection: BaseDatabaseWrapper) -> bool:
    # In a transaction of the caller's, a NOTIFY would make its commit wait for others.
    return (
        vendor(connection).listens
        and not connection.in_atomic_block
        and connection.get_autocommit()
    )


def _payloads(
    rows: Sequence[NewJob], inserted: Sequence[InsertedJob], soon: timedelta
) -> Iterator[str]:
    for row, told in zip(rows, inserted, strict=True):
        if told.status == Status.READY:
            yield row.queue
        elif told.run_after - told.enqueued_at <= soon:
            yield CLOCK


def _kind(run_after: datetime | timedelta | None) -> str:
    if run_after is None:
        return "now"
    return "shifted" if isinstance(run_after, timedelta) else "given"


def _moment(facts: Vendor, run_after: datetime | timedelta | None) -> tuple[Any, ...]:
    if run_after is None:
        return ()
    if isinstance(run_after, timedelta):
        return (facts.shift(run_after.total_seconds()),) * 2
    return (facts.write_moment(run_after),) * 2


@lru_cache
def _insert_sql(
    facts: Vendor, rows: int, kind: str, returning: bool, wakes: bool
) -> str:
    given = ", ".join(["%s"] * len(NewJob._fields))
    values = ", ".join([f"({given}, {_born(facts, kind)})"] * rows)
    return facts.spell(
        f"{_INTO} VALUES {values}"
        + (_returning_sql(facts, kind, wakes) if returning else "")
    )


@lru_cache
def _insert_json_sql(facts: Vendor, kind: str, wakes: bool) -> str:
    # One parameter for all rows: the driver would take longer to put in eight for each
    # than the database to insert them.
    kinds = {"rank": "smallint"}
    columns = [f'"{name}" {kinds.get(name, "text")}' for name in NewJob._fields]
    return facts.spell(
        f"{_INTO} SELECT {_GIVEN}, {_born(facts, kind)} "
        f"FROM json_to_recordset(%s::json) AS new ({', '.join(columns)})"
        + _returning_sql(facts, kind, wakes)
    )


def _born(facts: Vendor, kind: str) -> str:
    """Return the values of ``_BORN``; they may take the moment, as two parameters."""
    due = facts.shifted_now if kind == "shifted" else "%s"
    status = (
        f"CASE WHEN {due} > {facts.now} "
        f"THEN '{Status.WAITING}' ELSE '{Status.READY}' END"
    )
    if kind == "now":
        due, status = facts.now, f"'{Status.READY}'"
    return f"{status}, {due}, {facts.now}, 0, 0, 0, FALSE"


def _returning_sql(facts: Vendor, kind: str, wakes: bool) -> str:
    wakeup = f", {_wakeup_sql(facts, kind)}" if wakes else ""
    return f" RETURNING {', '.join(InsertedJob._fields)}{wakeup}"


def _wakeup_sql(facts: Vendor, kind: str) -> str:
    # Not a SELECT, which takes three times as long to plan.
    if kind == "now":
        return f"CASE WHEN {wanted('queue')} THEN pg_notify('{CHANNEL}', queue) END"
    return (
        f"CASE status WHEN '{Status.READY}' THEN {_wakeup_sql(facts, 'now')} "
        f"ELSE CASE WHEN run_after <= {facts.shifted_now} AND {wanted()} "
        f"THEN pg_notify('{CHANNEL}', '{CLOCK}') END END"
    )
