"""The system checks: what is wrong, or unwise, in the project's settings.

Django calls them. Whoever sets nothing is told nothing. What differs between
databases comes from `db`; what needs a server is tagged ``database``.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import UTC, datetime
from itertools import chain
from typing import Any

from cronsim import CronSim, CronSimError
from django.apps import apps
from django.conf import settings as django_settings
from django.core.checks import CheckMessage, Error, Tags, Warning, register
from django.core.exceptions import ImproperlyConfigured
from django.db import connections, router

from async_queue import callables, conf, retries
from async_queue.conf import Problem, Settings
from async_queue.db import Concern, vendor
from async_queue.exceptions import InvalidFunction, InvalidOption

# Accepted, so that a project may set them already, but nobody reads them yet.
WITHOUT_EFFECT = frozenset(
    {
        "EMAIL",
        "LOG_ARGS",
        "SCHEDULES",
    }
)

_CONCERNS: Mapping[str, tuple[Callable[..., CheckMessage], str]] = {
    "version": (Error, "async_queue.E011"),
    "pool": (Warning, "async_queue.W003"),
    "processes": (Warning, "async_queue.W004"),
    "memory": (Warning, "async_queue.W005"),
    "journal": (Warning, "async_queue.W006"),
    "network": (Warning, "async_queue.W007"),
    "isolation": (Warning, "async_queue.W008"),
    "server": (Warning, "async_queue.W009"),
}


@register("async_queue")
def check_settings(app_configs: Any, **kwargs: Any) -> list[CheckMessage]:
    """Check ``ASYNC_QUEUE`` and what it names, without asking a database."""
    if wrong := [_problem(problem) for problem in _problems()]:
        return wrong
    settings = conf.settings()
    parts = (_backoff, _unsealed, _schedules, _without_effect, _database)
    return list(chain.from_iterable(part(settings) for part in parts))


@register(Tags.database)
def check_database(
    app_configs: Any, databases: Iterable[str] | None = None, **kwargs: Any
) -> list[CheckMessage]:
    """Check the server that holds the jobs, if it is among ``databases``."""
    if _problems() or conf.settings().database not in (databases or ()):
        return []
    settings = conf.settings()
    if list(_home(settings)):
        return []
    connection = connections[settings.database]
    concerns = vendor(connection).server_concerns(connection, threads=settings.threads)
    return [_concern(concern) for concern in concerns]


def _problems() -> list[Problem]:
    return list(conf.problems(getattr(django_settings, "ASYNC_QUEUE", {})))


def _problem(problem: Problem) -> CheckMessage:
    number = "E003" if problem.key in conf.KEYS else "E002"
    if problem.key is None:
        number = "E001"
    return Error(problem.message, problem.hint, id=f"async_queue.{number}")


def _concern(concern: Concern) -> CheckMessage:
    kind, number = _CONCERNS[concern.kind]
    return kind(concern.message, concern.hint, id=number)


def _backoff(settings: Settings) -> Iterator[CheckMessage]:
    try:
        retries.backoff(settings.backoff)
    except InvalidOption as error:
        yield Error(
            f"ASYNC_QUEUE['BACKOFF']: {error}",
            "Name one of these, or a function (failures) -> timedelta.",
            id="async_queue.E006",
        )


def _unsealed(settings: Settings) -> Iterator[CheckMessage]:
    for path in settings.unsealed:
        reason = _unimportable(path)
        if not reason and path not in callables.registry:
            reason = f"function {path!r} is no function with @job."
        if reason:
            yield Error(
                f"ASYNC_QUEUE['UNSEALED']: {reason}",
                "List only the paths of functions with @job.",
                id="async_queue.E007",
            )


def _schedules(settings: Settings) -> Iterator[CheckMessage]:
    for name, schedule in settings.schedules.items():
        where = f"ASYNC_QUEUE['SCHEDULES'][{name!r}]"
        if not isinstance(schedule, Mapping):
            yield _bad_function(where, f"must be a dict; it is {schedule!r}.")
            continue
        function = schedule.get("function", schedule.get("job"))
        if reason := _unimportable(function):
            yield _bad_function(where, reason)
        if "cron" in schedule and (reason := _never_fires(schedule["cron"])):
            yield Error(
                f"{where}: cron {schedule['cron']!r} {reason}.",
                "Write minute, hour, day, month and weekday, such as '*/5 * * * *'.",
                id="async_queue.E010",
            )


def _bad_function(where: str, reason: str) -> CheckMessage:
    hint = "Write {'function': 'shop.jobs.refresh', 'cron': '*/5 * * * *'}."
    return Error(f"{where}: {reason}", hint, id="async_queue.E009")


def _unimportable(function: Any) -> str | None:
    try:
        callables.path_of(function)
    except InvalidFunction as error:
        return str(error)
    return None


def _never_fires(line: Any) -> str | None:
    """Return what is wrong with a cron line, if anything."""
    if not isinstance(line, str):
        return "is no text"
    try:
        next(CronSim(line, datetime.now(UTC)))
    except CronSimError as error:
        return f"is invalid: {error}"
    except StopIteration:
        return "never fires"
    return None


def _without_effect(settings: Settings) -> Iterator[CheckMessage]:
    idle = sorted(conf.changed_settings() & WITHOUT_EFFECT)
    names = [f"ASYNC_QUEUE[{key!r}]" for key in idle]
    if settings.health["TOKEN"]:
        names.append("ASYNC_QUEUE['HEALTH']['TOKEN']")
    for name in names:
        yield Warning(
            f"{name} has no effect yet in this release.",
            "Leave it out until a release uses it.",
            id="async_queue.W001",
        )


def _database(settings: Settings) -> Iterator[CheckMessage]:
    """Yield what is wrong with where the tables are."""
    if nowhere := list(_home(settings)):
        yield from nowhere
        return
    yield from _split_tables(settings.database)
    yield from _far_from_the_data(settings.database)
    connection = connections[settings.database]
    for concern in vendor(connection).setting_concerns(
        connection, threads=settings.threads, processes=settings.processes
    ):
        yield _concern(concern)


def _home(settings: Settings) -> Iterator[CheckMessage]:
    """Yield an error if there is no such database, or it cannot hold a queue."""
    if settings.database not in connections:
        yield Error(
            f"ASYNC_QUEUE['DATABASE'] is {settings.database!r}, which is no database "
            "of the project.",
            f"The databases are {', '.join(connections)}.",
            id="async_queue.E004",
        )
        return
    try:
        vendor(connections[settings.database])
    except ImproperlyConfigured as error:
        yield Error(
            f"{error}",
            "PostgreSQL, MariaDB, MySQL and SQLite can keep jobs.",
            id="async_queue.E005",
        )


def _split_tables(alias: str) -> Iterator[CheckMessage]:
    for model in apps.get_app_config("async_queue").get_models():
        label = model._meta.label
        if not router.allow_migrate_model(alias, model):
            reason = f"DATABASE_ROUTERS keep the table of {label} out of {alias!r}"
        elif (written := router.db_for_write(model)) != alias:
            reason = f"{label} is written to {written!r} but the jobs are in {alias!r}"
        else:
            continue
        yield Error(
            f"{reason}.",
            f"Route the whole app 'async_queue' to {alias!r} in DATABASE_ROUTERS, or "
            "set ASYNC_QUEUE['DATABASE'] to where it is routed.",
            id="async_queue.E008",
        )


def _far_from_the_data(alias: str) -> Iterator[CheckMessage]:
    homes = {
        router.db_for_write(model)
        for model in apps.get_models()
        if model._meta.app_label != "async_queue" and model._meta.managed
    }
    if homes and alias not in homes:
        yield Warning(
            f"The jobs are in {alias!r} and no other model is: a job is not scheduled "
            "in the transaction of the data that it is about.",
            f"Set ASYNC_QUEUE['DATABASE'] to one of {', '.join(sorted(homes))}.",
            id="async_queue.W002",
        )
