import logging
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Event
from time import monotonic

import pytest
from django.db import Error, connection

from async_queue import schedule, statements
from async_queue.db import private, vendor
from async_queue.notifier import ECHO, Notifier
from tests import jobs
from tests.factories import WorkerFactory
from tests.stepping import elsewhere

pytestmark = pytest.mark.django_db(transaction=True)

LONG = 20  # seconds, of which none passes where word comes


@pytest.fixture
def notifier():
    made = Notifier()
    yield made
    made.close()


@pytest.fixture
def keeper():
    """The connection on which a keeper waits."""
    with private("default") as own:
        yield own


@pytest.fixture
def listening(notifier, keeper):
    if not vendor(keeper).listens:
        pytest.skip("the database sends no word")
    WorkerFactory(wants_wakeup=True)
    notifier.listen(keeper)
    # It knows now that it hears.
    tick(notifier, keeper)
    return notifier


def tick(notifier, keeper):
    """Tick and hear the echo, as a keeper does; return what was sent for one."""
    echo = notifier.echo()
    statements.tick(keeper, WorkerFactory().pk, echo=echo)
    notifier.wait(keeper, 0)
    return echo


@contextmanager
def early() -> Iterator[None]:
    """The block ends long before ``LONG`` is over."""
    began_at = monotonic()
    yield
    assert monotonic() - began_at < LONG / 2


@contextmanager
def meanwhile(function: Callable[..., object], *args: object) -> Iterator[None]:
    """Call ``function`` in another thread, after the block has come to wait."""

    def act() -> None:
        Event().wait(0.05)
        function(*args)

    called = elsewhere(act)
    with early():
        yield
    called.result(LONG)


def test_a_wait_ends_in_time_where_there_is_no_word(notifier, keeper):
    began_at = monotonic()

    assert notifier.wait(keeper, 0.05) == []

    assert 0.04 < monotonic() - began_at < LONG / 2


def test_another_thread_ends_a_wait(notifier, keeper):
    with meanwhile(notifier.wake):
        assert notifier.wait(keeper, LONG) == []


def test_who_is_woken_before_the_wait_does_not_wait_and_then_waits_again(
    notifier, keeper
):
    for _ in range(5_000):  # more than the pipe holds
        notifier.wake()

    with early():
        notifier.wait(keeper, LONG)
    began_at = monotonic()
    notifier.wait(keeper, 0.05)

    assert monotonic() - began_at > 0.04


def test_a_signal_handler_ends_a_wait(notifier, keeper):
    before = signal.signal(signal.SIGUSR1, lambda *args: notifier.wake())

    try:
        with meanwhile(os.kill, os.getpid(), signal.SIGUSR1):
            notifier.wait(keeper, LONG)
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_waking_what_is_closed_does_nothing():
    notifier = Notifier()
    notifier.close()

    notifier.wake()


def test_a_change_of_the_file_ends_a_wait(notifier, keeper):
    if vendor(keeper).data_version(keeper) is None:
        pytest.skip("the database does not show in passing that something changed")
    notifier.wait(keeper, 0)

    with meanwhile(schedule, jobs.leave):
        assert notifier.wait(keeper, LONG) == [""]

    assert notifier.wait(keeper, 0.05) == []


def test_a_change_between_two_waits_is_not_missed(notifier, keeper):
    if vendor(keeper).data_version(keeper) is None:
        pytest.skip("the database does not show in passing that something changed")
    notifier.wait(keeper, 0)
    elsewhere(schedule, jobs.leave).result(LONG)

    with early():
        assert notifier.wait(keeper, LONG) == [""]


def test_a_listener_hears_at_once_what_another_connection_schedules(listening, keeper):
    with meanwhile(schedule, jobs.leave):
        assert listening.wait(keeper, LONG) == ["default"]


def test_a_listener_hears_what_comes_with_its_tick(listening, keeper):
    elsewhere(schedule, jobs.leave).result(LONG)
    statements.tick(keeper, WorkerFactory().pk)

    with early():
        assert listening.wait(keeper, LONG) == ["default"]


def test_a_listener_does_not_listen_where_it_is_switched_off(
    notifier, keeper, settings
):
    settings.ASYNC_QUEUE = {"NOTIFY": False}

    notifier.listen(keeper)

    assert (notifier.is_listening, notifier.echo()) == (False, None)


def test_an_echo_proves_for_a_while_that_one_hears(notifier, keeper):
    if not vendor(keeper).listens:
        pytest.skip("the database sends no word")
    notifier.listen(keeper)

    sent = [tick(notifier, keeper) for _ in range(5)]

    assert sent[0] is not None
    assert sent[1:] == [None] * 4
    assert notifier.is_listening


def test_the_echo_of_another_worker_wakes_nobody(listening, keeper, second_connection):
    worker = WorkerFactory().pk
    statements.tick(second_connection, worker, echo=ECHO)

    assert listening.wait(keeper, 0.05) == []


def test_a_deaf_listener_gives_up_and_says_so_once(notifier, keeper, caplog):
    if not vendor(keeper).listens:
        pytest.skip("the database sends no word")
    notifier.listen(keeper)
    with keeper.cursor() as cursor:
        cursor.execute("UNLISTEN *")  # as if a pooler had lent us another session

    with caplog.at_level(logging.WARNING, "async_queue"):
        for _ in range(5):
            tick(notifier, keeper)
        notifier.listen(keeper)  # after it has reconnected

    assert not notifier.is_listening
    assert len(caplog.records) == 1


def test_word_resumes_after_a_reconnection(listening, keeper):
    keeper.close()
    listening.listen(keeper)
    elsewhere(schedule, jobs.leave).result(LONG)

    with early():
        assert "default" in listening.wait(keeper, LONG)


def test_a_server_that_hangs_up_ends_a_wait_with_an_error(notifier, keeper):
    session = vendor(keeper).session_of(keeper)
    if vendor(keeper).descriptor(keeper) is None:
        pytest.skip("there is no server that could hang up")

    with meanwhile(end_session, session), pytest.raises(Error):
        notifier.wait(keeper, LONG)


def test_a_server_that_hangs_up_on_a_listener_ends_its_wait(listening, keeper):
    session = vendor(keeper).session_of(keeper)

    with meanwhile(end_session, session), pytest.raises(Error):
        listening.wait(keeper, LONG)


def end_session(session):
    vendor(connection).end_session(connection, session)
