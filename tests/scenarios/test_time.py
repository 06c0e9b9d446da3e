"""The database's time is the only one: zones, summer time, wrong clocks (29, 30)."""

import shutil
import subprocess
import time
from collections.abc import Callable
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from django.db import connection, connections

from async_queue import schedule
from async_queue.db import Now, vendor
from async_queue.models import Job, Status, Worker
from tests import hanging, jobs, servers
from tests.factories import now
from tests.figures import figure
from tests.fleet import at_database, employed
from tests.long import bound, long
from tests.models import Effect
from tests.stepping import database_settings, elsewhere
from tests.workers import registered, working

pytestmark = pytest.mark.django_db(transaction=True)
WaitUntil = Callable[..., None]
facts = vendor(connection)

DAY = 86_400  # seconds
HALF_PAST = timezone(timedelta(hours=5, minutes=30))
BERLIN = ZoneInfo("Europe/Berlin")
IN_INDIA = {
    "postgresql": {"timezone": "Asia/Kolkata"},
    "mysql": {"default-time-zone": "+05:30"},
}
ZONE_OF_SERVER = {
    "postgresql": "SELECT boot_val <> reset_val AND reset_val = 'Asia/Kolkata'"
    " FROM pg_settings WHERE name = 'TimeZone'",
    "mysql": "SELECT @@global.time_zone = '+05:30'",
}
# Seconds that a job may be late: a worker sleeps until the next one is due, of which it
# hears once in POLL_INTERVAL.
UNHEARD, LATE = 1.3, 0.3
SOON = [0.3 * number for number in range(long(6, 60))]


def schedule_soon_and_later() -> tuple[list[Job], list[Job]]:
    """Jobs that are due within seconds, and in an hour, said in several ways."""
    due = [
        schedule(jobs.leave, [f"soon-{seconds:.1f}"], run_after=timedelta(0, seconds))
        for seconds in SOON
    ]
    hour = timedelta(hours=1)
    later = [
        schedule(jobs.leave, ["too early"], run_after=run_after)
        for run_after in (hour, now() + hour, (now() + hour).astimezone(HALF_PAST))
    ]
    return due, later


def assert_in_time(due: list[Job], later: list[Job], name: str) -> None:
    lateness = []
    for job in due:
        job.refresh_from_db()
        assert job.status == Status.SUCCESSFUL
        lateness.append((job.started_at - job.run_after).total_seconds())
        assert job.enqueued_at <= job.started_at <= job.finished_at <= now()
    for job in later:
        job.refresh_from_db()
        assert job.status == Status.WAITING
        left = (job.run_after - now()).total_seconds()
        assert 3600 - bound(60) < left < 3600
    assert min(lateness) >= 0
    assert max(lateness) <= bound(UNHEARD)
    heard = max(
        late for late, seconds in zip(lateness, SOON, strict=True) if seconds > 1
    )
    figure(f"{name}: late at most", heard * 1000, "ms")
    assert heard <= bound(LATE)


def have_succeeded(scheduled: list[Job]) -> bool:
    rows = Job.objects.filter(pk__in=[job.pk for job in scheduled])
    return not rows.exclude(status=Status.SUCCESSFUL).exists()


@pytest.mark.skipif(bool(servers.obstacle()), reason=servers.obstacle())
def test_jobs_are_due_in_time_whatever_the_servers_time_zone(
    tmp_path: Path, wait_until: WaitUntil
) -> None:
    options = IN_INDIA[connection.vendor]
    with servers.server(fsync=False, options=options) as made:
        settings = servers.migrated(made)
        with at_database(settings), employed(tmp_path, on=settings) as worker:
            wait_until(lambda: registered(worker))
            with connection.cursor() as cursor:
                cursor.execute(ZONE_OF_SERVER[connection.vendor])
                assert cursor.fetchone()[0]

            due, later = schedule_soon_and_later()
            wait_until(lambda: have_succeeded(due), 60)

            assert_in_time(due, later, "29 server in +05:30")


def test_next_job_is_known_as_soon_as_one_was_promoted(
    tmp_path: Path, wait_until: WaitUntil
) -> None:
    due = [
        schedule(jobs.leave, [str(seconds)], run_after=timedelta(seconds=seconds))
        for seconds in (0.01, 4)
    ]

    # So long that the second one would not run meanwhile.
    with working(tmp_path, settings={"POLL_INTERVAL": 60, "STALL_AFTER": 600}):
        wait_until(lambda: have_succeeded(due), 30)


ZONES = ["Europe/Berlin", "Asia/Kolkata", "UTC"]


@pytest.mark.parametrize("zone", ZONES)
def test_moments_are_the_same_on_both_sides_of_summer_time(zone: str) -> None:
    with database_settings({}, TIME_ZONE=zone):
        elsewhere(check_moments, zone).result(20)


def check_moments(zone: str) -> None:
    assert_zone(zone)
    # Half past two comes twice, an hour apart.
    first = datetime(2026, 10, 25, 2, 30, tzinfo=BERLIN)
    second = first.replace(fold=1)
    # And here it does not come at all.
    missing = datetime(2027, 3, 28, 2, 30, tzinfo=BERLIN)
    moments = [first, second, missing]

    stored = [schedule(jobs.leave, run_after=moment).pk for moment in moments]

    read = [Job.objects.get(pk=pk).run_after for pk in stored]
    assert read == [moment.astimezone(UTC) for moment in moments]
    assert read[1] - read[0] == timedelta(hours=1)
    found = Job.objects.filter(run_after=second.astimezone(UTC))
    assert list(found.values_list("pk", flat=True)) == [stored[1]]


@pytest.mark.parametrize("zone", ZONES)
def test_delays_are_the_same_on_both_sides_of_summer_time(zone: str) -> None:
    with database_settings({}, TIME_ZONE=zone):
        elsewhere(check_delays, zone).result(20)


def check_delays(zone: str) -> None:
    assert_zone(zone)
    rows = Job.objects.filter(pk=schedule(jobs.leave, run_after=timedelta(1)).pk)

    for days in range(0, 366, 15):
        delay = timedelta(days=days, seconds=0.5)
        (found,) = rows.annotate(now=Now(), then=Now(after=delay))
        assert abs(found.then - found.now - delay) < timedelta(milliseconds=50)


def assert_zone(zone: str) -> None:
    mine = connections["default"]
    assert mine.timezone_name == zone
    if mine.vendor == "postgresql":
        with mine.cursor() as cursor:
            cursor.execute("SHOW TimeZone")
            assert cursor.fetchone()[0] == zone


CLOCK = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdlib.h>
#include <sys/time.h>
#include <time.h>

static time_t offset(void) {
    const char *seconds = getenv("AQ_CLOCK");
    return seconds ? atol(seconds) : 0;
}

int clock_gettime(clockid_t id, struct timespec *moment) {
    int (*real)(clockid_t, struct timespec *) = dlsym(RTLD_NEXT, "clock_gettime");
    int failed = real(id, moment);
    if (!failed && (id == CLOCK_REALTIME || id == CLOCK_REALTIME_COARSE))
        moment->tv_sec += offset();
    return failed;
}

int gettimeofday(struct timeval *moment, void *zone) {
    struct timespec precise;
    int failed = clock_gettime(CLOCK_REALTIME, &precise);
    moment->tv_sec = precise.tv_sec;
    moment->tv_usec = precise.tv_nsec / 1000;
    return failed;
}

time_t time(time_t *seconds) {
    struct timespec precise;
    clock_gettime(CLOCK_REALTIME, &precise);
    if (seconds) *seconds = precise.tv_sec;
    return precise.tv_sec;
}
"""


@pytest.fixture
def wrong_clock(tmp_path: Path) -> Callable[[int], dict[str, str]]:
    """The environment of a process whose clock is wrong by so many seconds.

    As libfaketime does, which in Debian 12 also disturbs Python's sleep().
    """
    if facts.runs_one_job_at_a_time:
        pytest.skip("a file has no clock but that of its process")
    compiler = shutil.which("cc") or shutil.which("gcc")
    if not compiler:
        pytest.skip("there is no C compiler")
    source, library = tmp_path / "clock.c", tmp_path / "clock.so"
    source.write_text(CLOCK)
    command = [compiler, "-shared", "-fPIC", "-o", library, source, "-ldl"]
    subprocess.run(command, check=True)
    return lambda seconds: {"LD_PRELOAD": str(library), "AQ_CLOCK": str(seconds)}


def test_workers_whose_clocks_are_wrong_by_a_day_run_all_in_time(
    wrong_clock: Any, tmp_path: Path, wait_until: WaitUntil
) -> None:
    with ExitStack() as stack:
        ahead, behind = (
            stack.enter_context(
                working(
                    tmp_path,
                    "--threads=4",
                    f"--queues={name},default",
                    environment=wrong_clock(seconds),
                )
            )
            for name, seconds in (("ahead", DAY), ("behind", -DAY))
        )
        wait_until(lambda: registered(ahead, behind))
        for name in ("ahead", "behind"):
            schedule(hanging.leave_clock, [name], queue=name)
        due, later = schedule_soon_and_later()
        wait_until(lambda: have_succeeded(due), 60)
        assert_in_time(due, later, "30 clocks wrong by a day")
        wait_until(lambda: len(clocks()) == 2)
        silence = [
            abs((now() - worker.seen_at).total_seconds())
            for worker in Worker.objects.all()
        ]

        # Nobody dies of it, and who does is found out.
        held = schedule(hanging.wait_for_go, [str(tmp_path)], queue="ahead")
        wait_until((tmp_path / "begun-effect").exists)
        assert not Worker.objects.exclude(dead_at=None).exists()
        ahead.kill()
        wait_until(lambda: Job.objects.get(pk=held.pk).status == Status.READY)

    wrong = clocks()
    assert abs(wrong["ahead"] - DAY) < 600
    assert abs(wrong["behind"] + DAY) < 600
    assert max(silence) < bound(3)
    assert not Effect.objects.filter(label="too early").exists()


def clocks() -> dict[str, float]:
    """Return by how many seconds the workers' clocks go before the test's."""
    labels = Effect.objects.values_list("label", flat=True)
    told = [label.split() for label in labels if label.startswith(("ahead", "behind"))]
    return {name: float(seconds) - time.time() for name, seconds in told}
