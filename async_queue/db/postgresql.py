"""PostgreSQL 14 and later, through psycopg."""

from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any
from zoneinfo import ZoneInfo

from django.db.backends.base.base import BaseDatabaseWrapper

from async_queue.db.base import PRIVATE, Concern, Vendor, scalar, too_many_threads

# The first of the two numbers of our advisory locks; the second is the worker's.
_LIVES = 0x61715F6C
_SERIALIZATION_FAILURE, _DEADLOCK = "40001", "40P01"
_IDLE = 0  # of libpq's transaction states


_ISOLATION = "SHOW default_transaction_isolation"
_READ_COMMITTED = (
    "SET SESSION CHARACTERISTICS AS TRANSACTION ISOLATION LEVEL READ COMMITTED"
)


class PostgreSQL(Vendor):
    now = "statement_timestamp()"
    shifted_now = "(statement_timestamp() + make_interval(secs => %s))"
    claims_in_one_statement = True
    seeks_in_recursion = True

    def write_moment(self, moment: datetime) -> Any:
        return moment

    def read_moment(self, value: datetime, connection: BaseDatabaseWrapper) -> datetime:
        if value.tzinfo is None:  # USE_TZ is False: the session's local time
            value = value.replace(tzinfo=ZoneInfo(connection.timezone_name))
        return value.astimezone(UTC)

    def private_settings(self, settings: dict[str, Any]) -> dict[str, Any]:
        own = super().private_settings(settings)
        own["OPTIONS"].pop("pool", None)
        own["OPTIONS"].pop("isolation_level", None)
        return own

    def start_session(self, connection: BaseDatabaseWrapper) -> None:
        # Single statements take the session's default. It is changed only where it
        # must be: a setting may outlive us in a pooler's connection.
        with connection.cursor() as cursor:
            if scalar(connection, _ISOLATION, ()) != "read committed":
                cursor.execute(_READ_COMMITTED)
            # The lock of a worker is the session's: it must not end before its jobs.
            if scalar(connection, "SHOW idle_session_timeout", ()) != "0":
                cursor.execute("SET idle_session_timeout = 0")

    def is_transient(self, error: BaseException) -> bool:
        state = getattr(error.__cause__, "sqlstate", None)
        return state in (_SERIALIZATION_FAILURE, _DEADLOCK)

    def is_inside_transaction(
        self, connection: BaseDatabaseWrapper, has_sent: bool
    ) -> bool:
        # psycopg begins with the first statement.
        return not has_sent or connection.connection.info.transaction_status != _IDLE

    def setting_concerns(
        self, connection: BaseDatabaseWrapper, *, threads: int, processes: int
    ) -> Iterator[Concern]:
        size = _pool_size(connection.settings_dict["OPTIONS"].get("pool"))
        if size is not None and size < threads + PRIVATE:
            yield Concern(
                "pool",
                f"The connection pool lends {size} connections, too few for {threads} "
                "job threads and the code around them: jobs would wait for each other.",
                "Set OPTIONS['pool'] = {'max_size': "
                f"{threads + PRIVATE}}} or more, or lower ASYNC_QUEUE['THREADS'].",
            )

    def server_concerns(
        self, connection: BaseDatabaseWrapper, *, threads: int
    ) -> Iterator[Concern]:
        yield from super().server_concerns(connection, threads=threads)
        allowed = int(scalar(connection, "SHOW max_connections", ()))
        yield from too_many_threads(threads, allowed)

    def oldest(self, connection: BaseDatabaseWrapper) -> tuple[str, tuple[int, ...]]:
        return "PostgreSQL", (14,)

    def take_life(self, connection: BaseDatabaseWrapper, worker: int) -> bool:
        sql = "SELECT pg_try_advisory_lock(%s, %s)"
        return bool(scalar(connection, sql, _lock(worker)))

    def drop_life(self, connection: BaseDatabaseWrapper, worker: int) -> None:
        scalar(connection, "SELECT pg_advisory_unlock(%s, %s)", _lock(worker))


def _pool_size(pool: Any) -> int | None:
    """Return the most connections of psycopg's pool, whose own default is 4."""
    if not pool:
        return None
    options = pool if isinstance(pool, dict) else {}
    return int(options.get("max_size") or options.get("min_size", 4))


def _lock(worker: int) -> tuple[int, int]:
    # Numbers of advisory locks are signed and of 32 bits.
    return _LIVES, (worker + 2**31) % 2**32 - 2**31
