"""Moments as the database keeps and tells them: in UTC, by its own clock."""

from datetime import datetime, timedelta
from typing import Any

from django.db import models
from django.db.backends.base.base import BaseDatabaseWrapper
from django.db.models.sql.compiler import SQLCompiler

from async_queue.db.vendors import vendor

# No database has moments for any timedelta: jobs and backoffs may ask for much.
_FURTHEST = timedelta(days=36_500)


class MomentField(models.DateTimeField):  # type: ignore[type-arg]  # not at runtime
    """A moment that is aware and in UTC, whatever USE_TZ and TIME_ZONE say."""

    def get_db_prep_value(
        self, value: Any, connection: BaseDatabaseWrapper, prepared: bool = False
    ) -> Any:
        if not isinstance(value, datetime):
            return super().get_db_prep_value(value, connection, prepared)
        return vendor(connection).write_moment(value)

    def from_db_value(
        self, value: Any, expression: Any, connection: BaseDatabaseWrapper
    ) -> datetime | None:
        return value and vendor(connection).read_moment(value, connection)

    def get_prep_value(self, value: Any) -> Any:
        # DateTimeField would make it naive, or warn, to suit USE_TZ.
        return self.to_python(value) if isinstance(value, str) else value


class Now(models.Func):
    """The moment at which the statement starts by the database's clock, plus ``after``.

    Django's own ``Now`` is the start of the transaction on PostgreSQL and in the
    server's time zone on MySQL.
    """

    arity = 0

    def __init__(self, after: timedelta = timedelta(0)) -> None:
        super().__init__(output_field=MomentField())
        self._after = max(-_FURTHEST, min(after, _FURTHEST))

    def as_sql(
        self,
        compiler: SQLCompiler,
        connection: BaseDatabaseWrapper,
        *args: Any,
        **extra: Any,
    ) -> tuple[str, tuple[Any, ...]]:
        facts = vendor(connection)
        if not self._after:
            return facts.now, ()
        return facts.shifted_now, (facts.shift(self._after.total_seconds()),)
