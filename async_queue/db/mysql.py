"""MariaDB 10.6 and MySQL 8, and later."""

import hashlib
from collections.abc import Iterator
from typing import Any

from django.db.backends.base.base import BaseDatabaseWrapper
from django.db.utils import DatabaseError

from async_queue.db.base import (
    ENDINGS,
    Concern,
    Vendor,
    scalar,
    statement_pattern,
    too_many_threads,
)

_A_YEAR = 365 * 24 * 3600  # in seconds; the most that there is
_GENTLE = ("READ-COMMITTED", "READ-UNCOMMITTED")
_DEADLOCK, _LOCK_TIMEOUT, _LOCK_TABLE_FULL, _RECORD_CHANGED = 1213, 1205, 1206, 1020

# Statements that commit by themselves before they do their work.
_IMPLICIT_COMMITS = (
    r"(?:CREATE(?:\s+OR\s+REPLACE)?|DROP)(?!\s+(?:OR|TEMPORARY)\b)|ALTER|RENAME|"
    r"TRUNCATE|GRANT|REVOKE|(?:UN)?LOCK\s+TABLES?|ANALYZE(?!\s+(?:SELECT|UPDATE|DELETE))|"
    r"OPTIMIZE|REPAIR|CHECK\s+(?:TABLE|VIEW)|CACHE\s+INDEX|LOAD\s+INDEX|FLUSH|RESET|"
    r"INSTALL|UNINSTALL|BACKUP|XA|EXECUTE|"
    r"SET\s+(?:STATEMENT|PASSWORD|DEFAULT\s+ROLE)|SET\b[^;]*?\bAUTOCOMMIT"
)


class MySQL(Vendor):
    # Not NOW(): a session's time zone is the server's, and columns are in UTC.
    now = "UTC_TIMESTAMP(6)"
    shifted_now = "(UTC_TIMESTAMP(6) + INTERVAL %s MICROSECOND)"

    _ends_transaction = statement_pattern(
        rf"(?:/\*M?!\d*\s*)?(?:{ENDINGS}|{_IMPLICIT_COMMITS})"
    )

    def spell(self, sql: str) -> str:
        return sql.replace('"', "`")

    def shift(self, seconds: float) -> Any:
        return round(seconds * 1_000_000)

    def private_settings(self, settings: dict[str, Any]) -> dict[str, Any]:
        own = super().private_settings(settings)
        own["OPTIONS"]["isolation_level"] = "read committed"
        return own

    def start_session(self, connection: BaseDatabaseWrapper) -> None:
        # The lock of a worker is the session's: it must not end before its jobs.
        with connection.cursor() as cursor:
            cursor.execute(f"SET SESSION wait_timeout = {_A_YEAR}")

    def is_transient(self, error: BaseException) -> bool:
        return _code(error) in (_DEADLOCK, _LOCK_TIMEOUT, _RECORD_CHANGED)

    def rolls_back(self, connection: BaseDatabaseWrapper, error: BaseException) -> bool:
        # InnoDB undoes the whole transaction and goes on in a new one, in silence.
        if _code(error) == _LOCK_TIMEOUT:
            return bool(scalar(connection, "SELECT @@innodb_rollback_on_timeout", ()))
        return _code(error) in (_DEADLOCK, _RECORD_CHANGED, _LOCK_TABLE_FULL)

    def server_concerns(
        self, connection: BaseDatabaseWrapper, *, threads: int
    ) -> Iterator[Concern]:
        yield from super().server_concerns(connection, threads=threads)
        allowed = int(scalar(connection, "SELECT @@max_connections", ()))
        yield from too_many_threads(threads, allowed)
        if (isolation := _isolation(connection)) not in _GENTLE:
            yield Concern(
                "isolation",
                f"The project's sessions are {isolation.replace('-', ' ')}: jobs lock "
                "gaps between rows and end more often in deadlocks.",
                "Set OPTIONS['isolation_level'] = 'read committed'.",
            )

    def oldest(self, connection: Any) -> tuple[str, tuple[int, ...]]:
        return ("MariaDB", (10, 6)) if connection.mysql_is_mariadb else ("MySQL", (8,))

    def take_life(self, connection: BaseDatabaseWrapper, worker: int) -> bool:
        name = _lock(connection, worker)
        return bool(scalar(connection, "SELECT GET_LOCK(%s, 0)", name))

    def drop_life(self, connection: BaseDatabaseWrapper, worker: int) -> None:
        scalar(connection, "SELECT RELEASE_LOCK(%s)", _lock(connection, worker))


def _isolation(connection: BaseDatabaseWrapper) -> str:
    # The variable has one name in MySQL and in new MariaDB, another in old MariaDB.
    with connection.cursor() as cursor:
        cursor.execute(
            "SHOW VARIABLES WHERE variable_name RLIKE '^(tx|transaction)_iso'"
        )
        return str(cursor.fetchone()[1])


def _code(error: BaseException) -> Any:
    return error.args[0] if isinstance(error, DatabaseError) and error.args else None


def _lock(connection: BaseDatabaseWrapper, worker: int) -> tuple[str]:
    # The names are the whole server's and at most 64 characters long.
    database = str(connection.settings_dict["NAME"]).encode()
    return (f"async_queue:{hashlib.sha256(database).hexdigest()[:16]}:{worker}",)
