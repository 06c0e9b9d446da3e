"""pgqueuer, by what ``pgq run`` does: one asynchronous process on asyncpg and uvloop.

The command itself (1.6.0) ends at once with the typer that is installed with it.

Its jobs are coroutines. Those of a Django project insert by the asynchronous methods of
its ORM; or they call plain functions, as all others do, by `asyncio.to_thread`; without
Django, they use asyncpg. All insert in autocommit, as its users would: an effect and
its completion do not commit together.
"""

import asyncio
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from functools import cache, partial
from typing import Any

from benchmarks.ledger import record
from benchmarks.places import Place
from benchmarks.processes import python
from benchmarks.systems.base import KINDS, System, scalar

Functions = dict[str, Callable[[int], Awaitable[None]]]  # by their kinds


class PgQueuer(System):
    package = "pgqueuer"
    vendors = ("postgres",)
    note = "an effect and its completion do not commit together"

    def __init__(self, name: str, batch_size: int = 10, way: str = "orm") -> None:
        self.name = name  # type: ignore[misc]  # each has its own
        self._batch_size = batch_size
        self._way = way

    def prepare(self) -> None:
        super().prepare()
        _run(_install())

    def enqueue(self, kind: str, numbers: range) -> None:
        _run(_enqueue(kind, numbers))

    def commands(self, place: Place, threads: int, processes: int) -> list[list[str]]:
        options = (self._way, str(self._batch_size), str(threads))
        return [python("-m", __name__, *options)] * processes

    def variables(self, place: Place) -> dict[str, str]:
        server = place.database
        keys = {
            "HOST": "PGHOST",
            "PORT": "PGPORT",
            "USER": "PGUSER",
            "NAME": "PGDATABASE",
        }
        return {
            **{variable: str(server[key]) for key, variable in keys.items()},
            "PGPASSWORD": server["PASSWORD"],
        }

    def remaining(self, place: Place, connection: Any) -> int:
        return scalar(connection, "SELECT COUNT(*) FROM pgqueuer")

    def finished(self, connection: Any) -> int:
        return scalar(
            connection, "SELECT COUNT(*) FROM pgqueuer_log WHERE status = 'successful'"
        )


def main() -> None:
    """Do what ``pgq run`` does, with its defaults."""
    import pgqueuer
    import uvloop
    from pgqueuer.core import logconfig

    way, batch_size, threads = sys.argv[1], *map(int, sys.argv[2:])
    logconfig.setup_fancy_logger(logconfig.LogLevel.INFO)
    application = partial(_application, way, threads)
    uvloop.run(pgqueuer.run(application, batch_size=batch_size))


@asynccontextmanager
async def _application(way: str, threads: int) -> AsyncIterator[Any]:
    """Give an application as its users write one."""
    import asyncpg
    from pgqueuer import PgQueuer as Application
    from pgqueuer.db import AsyncpgDriver

    ways = {"orm": _by_orm, "threads": _in_threads, "asyncpg": _without_django}
    application = Application(AsyncpgDriver(await asyncpg.connect()))
    for kind, function in (await ways[way](threads)).items():

        @application.entrypoint(kind)
        async def call(job: Any, function: Any = function) -> None:
            await function(int(job.payload))

    yield application


async def _by_orm(threads: int) -> Functions:
    import django

    django.setup()
    from benchmarks.models import Effect

    async def insert(number: int) -> None:
        record(number)
        await Effect.objects.acreate(number=number)

    return {"noop": _noop, "insert": insert}


async def _in_threads(threads: int) -> Functions:
    import django

    django.setup()
    from benchmarks import work

    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(threads))
    return {
        kind: partial(asyncio.to_thread, getattr(work, kind))  # type: ignore[misc]
        for kind in KINDS
    }


async def _without_django(threads: int) -> Functions:
    import asyncpg

    pool = await asyncpg.create_pool()

    async def insert(number: int) -> None:
        record(number)
        await pool.execute("INSERT INTO benchmarks_effect (number) VALUES ($1)", number)

    return {"noop": _noop, "insert": insert}


async def _noop(number: int) -> None:
    record(number)


def _run(coroutine: Coroutine[Any, Any, None]) -> None:
    _runner().run(coroutine)


@cache
def _runner() -> asyncio.Runner:
    """Return the loop of this process, to which its connection belongs."""
    return asyncio.Runner()


_connections: list[Any] = []


async def _queries() -> Any:
    import asyncpg
    from pgqueuer.db import AsyncpgDriver
    from pgqueuer.queries import Queries

    if not _connections:
        _connections.append(await asyncpg.connect())
    return Queries(AsyncpgDriver(_connections[0]))


async def _install() -> None:
    await (await _queries()).install()


async def _enqueue(kind: str, numbers: range) -> None:
    payloads = [str(number).encode() for number in numbers]
    queries = await _queries()
    await queries.enqueue([kind] * len(numbers), payloads, [0] * len(numbers))


if __name__ == "__main__":
    main()
