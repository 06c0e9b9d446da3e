"""The database takes no writes for a while, as after a failover. Fault 42."""

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from django.db import connection

from async_queue.models import Job
from tests import fleet, servers
from tests.figures import figure
from tests.fleet import Stopwatch, employed, let_pass
from tests.invariants import assert_kept, assert_nobody_works
from tests.long import bound, long
from tests.servers import Server
from tests.workers import registered

pytestmark = [
    pytest.mark.django_db(transaction=True),
    pytest.mark.skipif(
        connection.vendor != "postgresql" or bool(servers.obstacle()),
        reason="only PostgreSQL can be made read-only for all who log in",
    ),
]
JOBS, TIMES = long(90, 1000), long(1, 5)
PATIENCE = 90  # seconds


def make_writable(server: Server, name: str, yes: bool) -> None:
    """Let nobody write who connects from now on, or everybody; end all sessions."""
    value = "off" if yes else "on"
    server.execute(f"ALTER DATABASE {name} SET default_transaction_read_only = {value}")
    server.execute(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
        f"WHERE datname = '{name}'"
    )
    connection.close()


def test_workers_wait_until_the_database_takes_writes_again(
    server: Server,
    database: dict[str, Any],
    tmp_path: Path,
    wait_until: Callable[..., None],
) -> None:
    fleet.schedule_work(JOBS, 0.02)
    resumed = []

    with ExitStack() as stack:
        workers = [stack.enter_context(employed(tmp_path, on=database)) for _ in "ab"]
        wait_until(lambda: registered(*workers))
        for number in range(1, TIMES + 1):
            share = JOBS * number // (TIMES + 2)
            wait_until(lambda least=share: fleet.count_successes() >= least, PATIENCE)
            make_writable(server, database["NAME"], yes=False)
            let_pass(3)
            before = fleet.count_successes()
            make_writable(server, database["NAME"], yes=True)
            watch = Stopwatch()
            wait_until(lambda least=before: fleet.count_successes() > least, PATIENCE)
            resumed.append(watch.seconds())
        wait_until(fleet.is_drained, PATIENCE)
        assert [worker.end() for worker in workers] == [0, 0]

    figure(f"42 read-only for 3 s, {TIMES} times: longest to first job", max(resumed))
    assert max(resumed) <= bound(2.0)
    assert fleet.counted() == {"SUCCESSFUL": JOBS}
    assert Job.objects.filter(failures__gt=TIMES).count() == 0
    assert_kept()
    assert_nobody_works()
