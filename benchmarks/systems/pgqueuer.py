"""pgqueuer, by what ``pgq run`` does: one asynchronous process on asyncpg and uvloop.

The command itself (1.6.0) ends at once with the typer that is installed with it.

Its jobs are coroutines. The one that inserts does so in autocommit on a connection of a
pool, as its users would: effect and completion do not commit together.
"""

import asyncio
import sys
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from functools import cache
from typing import Any

from benchmarks.ledger import record
from benchmarks.places import Place
from benchmarks.processes import python
from benchmarks.systems.base import System, scalar


class PgQueuer(System):
    package = "pgqueuer"
    vendors = ("postgres",)
    note = "asynchronous; an effect and its completion do not commit together"

    def __init__(self, name: str, batch_size: int) -> None:
        self.name = name  # type: ignore[misc]  # each has its own
        self._batch_size = batch_size

    def prepare(self) -> None:
        super().prepare()
        _run(_install())

    def enqueue(self, kind: str, numbers: range) -> None:
        _run(_enqueue(kind, numbers))

    def commands(self, place: Place, threads: int, processes: int) -> list[list[str]]:
        return [python("-m", __name__, str(self._batch_size))] * processes

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

    logconfig.setup_fancy_logger(logconfig.LogLevel.INFO)
    uvloop.run(pgqueuer.run(_application, batch_size=int(sys.argv[1])))


@asynccontextmanager
async def _application() -> AsyncIterator[Any]:
    """Give an application as its users write one."""
    import asyncpg
    from pgqueuer import PgQueuer as Application
    from pgqueuer.db import AsyncpgDriver

    application = Application(AsyncpgDriver(await asyncpg.connect()))
    pool = await asyncpg.create_pool()

    @application.entrypoint("noop")
    async def noop(job: Any) -> None:
        record(int(job.payload))

    @application.entrypoint("insert")
    async def insert(job: Any) -> None:
        number = int(job.payload)
        record(number)
        await pool.execute("INSERT INTO benchmarks_effect (number) VALUES ($1)", number)

    yield application


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
