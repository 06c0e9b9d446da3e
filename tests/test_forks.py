"""A forked child harms no session of its parent, and keeps none alive."""

import os
import signal
from contextlib import contextmanager, suppress
from threading import Event
from time import monotonic

import pytest
from django.db import Error, connection, connections, transaction

from async_queue import schedule
from async_queue.db import awake, keep_connection, private, vendor
from async_queue.db.sidefile import Place, open_side_file
from tests.long import bound
from tests.models import Effect
from tests.process import started
from tests.servers import is_running
from tests.stepping import database_settings, elsewhere, execute_next

pytestmark = [
    pytest.mark.django_db(transaction=True),
    pytest.mark.skipif(not hasattr(os, "fork"), reason="nothing forks here"),
]
facts = vendor(connection)
WORKER = 2_000_001


def fork(act):
    """Call ``act`` in a forked child; return its exit code when it is over."""
    child = os.fork()
    if child == 0:
        code = 99
        try:
            act()
            code = 0
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


def use_the_orm():
    assert not connections["default"].in_atomic_block
    # Where all stand in one line, the parent has the turn.
    if not facts.runs_one_job_at_a_time:
        Effect.objects.create(label="child")
    Effect.objects.count()
    connections.close_all()


def fork_in_transaction(act):
    """As a job does that forks; return what became of the child."""
    keep_connection("default")
    with writing():
        code = fork(act)
        Effect.objects.create(label="parent")
    return code


@contextmanager
def writing(label="parent"):
    """A transaction of a job thread's that has written."""
    with (
        awake("default", WORKER, 1) as mine,
        facts.turn(mine),
        transaction.atomic(),
    ):
        Effect.objects.create(label=label)
        yield mine


def test_a_job_that_forks_commits_and_its_child_has_a_session_of_its_own():
    assert elsewhere(fork_in_transaction, use_the_orm).result(20) == 0

    labels = sorted(row.label for row in Effect.objects.all())
    theirs = [] if facts.runs_one_job_at_a_time else ["child"]
    assert labels == [*theirs, "parent", "parent"]


def test_a_child_that_closes_what_it_has_inherited_closes_nothing():
    assert elsewhere(fork_in_transaction, connections.close_all).result(20) == 0

    assert Effect.objects.count() == 2


def test_a_child_gets_nothing_through_the_connection_of_its_parent():
    assert elsewhere(fork_with_connection).result(20) == 0

    assert [row.label for row in Effect.objects.all()] == ["parent"]


def fork_with_connection():
    def use_it():
        with pytest.raises(Error):
            mine.cursor().execute("SELECT 1")
        with suppress(Error):
            mine.close()

    with writing() as mine:
        return fork(use_it)


def test_a_private_session_outlives_a_child():
    assert elsewhere(fork_privately).result(20) == (0, True)


def fork_privately():
    with private("default") as own:
        facts.take_life(own, WORKER)
        code = fork(use_the_orm)
        is_free = elsewhere(is_life_free).result(20)
        facts.drop_life(own, WORKER)
        return code, not is_free


def is_life_free():
    return facts.is_life_free(connections["default"], WORKER)


def test_a_session_of_another_thread_is_unharmed_by_a_child():
    begun, go_on = Event(), Event()
    other = elsewhere(hold, begun, go_on)
    assert begun.wait(20)
    connection.close()  # it is not the queue's, so this is up to whoever forks

    assert fork(Effect.objects.count) == 0
    go_on.set()
    other.result(20)

    assert Effect.objects.count() == 1


def hold(begun, go_on):
    with writing("other"):
        begun.set()
        assert go_on.wait(20)


def test_a_child_is_no_worker():
    assert elsewhere(fork_in_transaction, be_unmarked).result(20) == 0


def be_unmarked():
    mine = connections["default"]
    mine.ensure_connection()
    session = facts.session_of(mine)
    assert getattr(session, "worker", None) is None


@pytest.mark.skipif(not facts.runs_one_job_at_a_time, reason="its writers need no line")
def test_a_child_inherits_no_place_in_the_line():
    """Nor a mutex that nobody there would ever give back."""
    assert elsewhere(fork_within_turn).result(20) == 0


def fork_within_turn():
    reader, writer = os.pipe()
    with writing():
        child = os.fork()
        if child == 0:
            stand_in_line_when_told(reader)
    os.write(writer, b"!")
    _, status = os.waitpid(child, 0)
    os.close(reader)
    os.close(writer)
    return os.waitstatus_to_exitcode(status)


def stand_in_line_when_told(reader):
    code = 99
    try:
        os.read(reader, 1)
        file = open_side_file(f"{connection.settings_dict['NAME']}-aqlock")
        with file.line(Place(), monotonic() + 10):
            code = 0
    finally:
        os._exit(code)


@pytest.mark.skipif(
    connection.vendor != "postgresql", reason="Django has no pool for it"
)
def test_a_child_borrows_from_a_pool_of_its_own():
    with database_settings({"pool": True}, CONN_MAX_AGE=0):
        try:
            assert elsewhere(fork_with_pool).result(20) == 0
        finally:
            connection.copy().close_pool()

    assert Effect.objects.count() == 3


def fork_with_pool():
    with writing():
        code = fork(use_the_orm)
        Effect.objects.create(label="parent")
    return code


@pytest.mark.skipif(facts.runs_one_job_at_a_time, reason="a file has no sessions")
def test_a_child_leaves_a_file_alone_that_has_the_number_of_a_lost_socket(tmp_path):
    with private("default") as own:
        number = facts.descriptor(own)
        own.close()
        file = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
        if file != number:
            os.dup2(file, number)

        assert fork(lambda: os.write(number, b"written")) == 0

        for opened in {file, number}:
            os.close(opened)
    assert (tmp_path / "file").read_bytes() == b"written"


PARENT = """
import os, signal
from async_queue.db import private, vendor
with private("default") as own:
    vendor(own).take_life(own, %d)
    if child := os.fork():
        print(child, flush=True)
    signal.pause()
"""


def test_the_life_of_a_killed_worker_is_free_while_its_child_lives(wait_until):
    with started("shell", "-v0", "-c", PARENT % WORKER) as process:
        child = int(process.stdout.readline())
        try:
            assert not is_life_free()

            process.kill()

            wait_until(is_life_free, seconds=bound(2))
            assert is_running(child)
        finally:
            os.kill(child, signal.SIGKILL)


@pytest.mark.parametrize("is_atomic", [True, False])
@pytest.mark.parametrize(("error", "code"), [(None, 0), ("no reason", 1)])
def test_a_child_that_comes_back_from_the_function_of_its_job_ends_there(
    is_atomic, error, code, capfd
):
    job = schedule("tests.misbehaving.fork", [error], meta={"atomic": is_atomic})

    outcome = execute_next()

    job.refresh_from_db()
    assert (outcome.action, job.result) == ("succeed", str(code))
    assert ("RuntimeError: no reason" in capfd.readouterr().err) == bool(error)
