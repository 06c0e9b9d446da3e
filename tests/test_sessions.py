"""Sessions are marked, found and ended, and no innocent one; they tell and are told."""

import os
import select
import subprocess
import sys
from concurrent import futures
from contextlib import contextmanager
from itertools import count
from threading import Event, Thread
from time import monotonic

import pytest
from django.db import (
    Error,
    IntegrityError,
    OperationalError,
    ProgrammingError,
    connection,
    connections,
    transaction,
)
from django.test.utils import CaptureQueriesContext

from async_queue.db import awake, private, vendor
from async_queue.exceptions import InsideTransaction
from tests import servers
from tests.factories import WorkerFactory
from tests.long import bound
from tests.models import Effect
from tests.stepping import database_settings, elsewhere

pytestmark = pytest.mark.django_db(transaction=True)

facts = vendor(connection)
has_sessions = pytest.mark.skipif(
    facts.runs_one_job_at_a_time, reason="a file has no sessions to find"
)
has_line = pytest.mark.skipif(
    not facts.runs_one_job_at_a_time, reason="its writers need no line"
)
has_words = pytest.mark.skipif(not facts.listens, reason="it sends no word")
has_pooler = pytest.mark.skipif(
    bool(servers.pgbouncer_obstacle()), reason=servers.pgbouncer_obstacle()
)
has_pool = pytest.mark.skipif(
    connection.vendor != "postgresql", reason="Django has no pool for it"
)
THREADS = 2
SLOW = {
    "postgresql": "SELECT pg_sleep(20)",
    "mysql": "SELECT SLEEP(20)",
    "sqlite": "WITH RECURSIVE c (n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM c) "
    "SELECT COUNT(*) FROM c",
}
# Numbers that no other test's sessions have.
numbers = count(1_000_000)


@pytest.fixture
def worker():
    return next(numbers)


@pytest.fixture
def other():
    """Another thread, which keeps its connection from call to call."""
    with futures.ThreadPoolExecutor(1) as pool:
        yield lambda function, *args: pool.submit(function, *args).result(20)
        pool.submit(connections.close_all).result(20)


@pytest.fixture
def own():
    """The connection of this thread as a keeper has it."""
    with private("default") as made:
        yield made


def ask(sql="SELECT 1"):
    with connections["default"].cursor() as cursor:
        cursor.execute(sql)
        return cursor.fetchone()[0]


def ask_awake(*place):
    with awake("default", *place):
        ask()


def lost_error():
    """Return what the next statement of this thread raises, if it lost its session."""
    mine = connections["default"]
    try:
        ask()
    except Error as error:
        return facts.is_session_lost(mine, error)
    return None


# Marks.


@has_sessions
def test_the_marked_session_of_a_worker_is_found_and_ended(
    own, other, worker, wait_until
):
    assert not facts.has_sessions_of(own, worker, THREADS)
    other(ask_awake, worker, 4 * THREADS + 4)
    assert facts.has_sessions_of(own, worker, THREADS)

    assert facts.end_sessions_of(own, worker, THREADS) == 1

    wait_until(lambda: not facts.has_sessions_of(own, worker, THREADS))
    assert other(lost_error) is True


@has_sessions
def test_no_innocent_session_is_ended(own, other, worker):
    other(ask_awake, worker, 1)

    assert facts.end_sessions_of(own, next(numbers), THREADS) == 0

    assert other(lost_error) is None
    assert facts.has_sessions_of(own, worker, THREADS)


@has_sessions
def test_the_session_with_the_life_of_a_worker_is_found_and_ended(own, other, worker):
    other(lambda: facts.take_life(connections["default"], worker))
    assert facts.has_sessions_of(own, worker, THREADS)

    assert facts.end_sessions_of(own, worker, THREADS) == 1

    assert other(lost_error) is True


@has_sessions
def test_nobody_ends_its_own_session(own, worker):
    facts.take_life(own, worker)
    facts.mark_session(own, worker, 1)

    assert not facts.has_sessions_of(own, worker, THREADS)
    assert facts.end_sessions_of(own, worker, THREADS) == 0
    assert not facts.end_session(own, facts.session_of(own)._replace(worker=None))

    assert ask() == 1


@has_sessions
def test_a_session_is_marked_once_for_each_worker(other, worker):
    assert other(statements_when_awake, worker) > 0
    assert other(statements_when_awake, worker) == 0
    assert other(statements_when_awake, next(numbers)) > 0


def statements_when_awake(worker):
    mine = connections["default"]
    mine.ensure_connection()
    with CaptureQueriesContext(mine) as queries, awake("default", worker, 1):
        pass
    return len(queries)


@has_sessions
def test_a_session_that_is_opened_while_awake_is_marked(own, other, worker):
    other(reopen_awake, worker)

    assert facts.has_sessions_of(own, worker, THREADS)


def reopen_awake(worker):
    connections["default"].close()
    with awake("default", worker, 1) as mine:
        ask()
        mine.close()
        with awake("default"):  # of somebody else
            pass
        ask()


@has_sessions
def test_only_the_threads_own_session_is_marked_and_only_while_awake(
    own, other, worker
):
    other(open_others, worker)

    assert not facts.has_sessions_of(own, worker, THREADS)


def open_others(worker):
    with awake("default", worker, 1) as mine:
        beside = mine.copy()
        beside.ensure_connection()
    ask()
    beside.close()
    # Nothing was opened in the block, and afterwards this is no worker's thread.
    assert facts.session_of(mine).worker is None


@has_sessions
def test_a_thread_is_marked_while_its_former_session_lingers(own, other, worker):
    lingering = connection.copy()
    mark(lingering, worker)

    other(ask_awake, worker, 1)

    assert facts.has_sessions_of(own, worker, THREADS)
    assert other(lost_error) is None
    lingering.close()


def mark(connection, worker):
    facts.mark_session(connection, worker, 1)


@has_sessions
def test_a_session_that_cannot_be_marked_is_not_used(other, worker, monkeypatch):
    monkeypatch.setattr(type(facts), "mark_session", ask_nonsense)

    with pytest.raises(ProgrammingError):
        other(ask_awake, worker, 1)

    monkeypatch.undo()
    other(ask_awake, worker, 1)


def ask_nonsense(*args):
    ask("SELECT nonsense FROM nowhere")


# Ends.


def hold_transaction(begun, go_on, hold=lambda: None):
    """Write in a turn, tell the session, wait; return what the end of it all raises."""
    mine = connections["default"]
    hooks = []
    try:
        with facts.turn(mine), transaction.atomic():
            Effect.objects.create(label="held")
            transaction.on_commit(lambda: hooks.append("called"))
            held = hold()
            begun.set_result(facts.session_of(mine))
            assert go_on.wait(20)
            del held
    except Error as error:
        return facts.is_session_lost(mine, error), hooks
    return None, hooks


@contextmanager
def holder_of_transaction(hold=lambda: None):
    begun, go_on = futures.Future(), Event()
    ended = elsewhere(hold_transaction, begun, go_on, hold)
    try:
        yield begun.result(20), go_on, ended
    finally:
        go_on.set()
        futures.wait([ended], 20)


def pause_cursor():
    """Hold a cursor that was not read to its end."""
    cursor = connections["default"].connection.cursor()
    cursor.execute("SELECT id FROM tests_effect")
    return cursor, cursor.fetchone()


@pytest.mark.parametrize("hold", [lambda: None, pause_cursor], ids=["plain", "cursor"])
def test_an_ended_session_cannot_commit_and_lets_go_of_all(own, hold):
    facts.prepare(own)  # or whoever reads keeps others from committing
    Effect.objects.bulk_create([Effect(label="there")] * 3)
    with holder_of_transaction(hold) as (session, go_on, ended):
        assert facts.end_session(own, session)

        # Its thread hangs still.
        elsewhere(write, "next").result(20)
        go_on.set()
        assert ended.result(20) == (True, [])

    assert {row.label for row in Effect.objects.all()} == {"there", "next"}


def write(label):
    with facts.turn(connections["default"]), transaction.atomic():
        Effect.objects.create(label=label)


def test_a_thread_whose_session_was_ended_works_on_in_a_new_one(own, other):
    begun = other(take_session_in_turn)

    assert not facts.end_session(own, begun) or other(lost_error) is True
    other(connections.close_all)
    other(write, "anew")

    assert Effect.objects.count() == 1


def take_session_in_turn():
    mine = connections["default"]
    with facts.turn(mine):
        mine.ensure_connection()
        return facts.session_of(mine)


def test_a_statement_under_way_ends_with_its_session(own):
    begun = futures.Future()
    ended = elsewhere(ask_slowly, begun)
    session = begun.result(20)
    began_at = monotonic()

    while not ended.done() and monotonic() < began_at + bound(2):
        facts.end_session(own, session)
        futures.wait([ended], 0.05)

    # Of an interrupt, SQLite's driver may say only that there is no row.
    with pytest.raises((Error, TypeError)):
        ended.result(20)
    assert monotonic() - began_at < bound(2)
    elsewhere(write, "next").result(20)


def ask_slowly(begun):
    mine = connections["default"]
    with facts.turn(mine), transaction.atomic():
        Effect.objects.create(label="held")
        begun.set_result(facts.session_of(mine))
        ask(SLOW[connection.vendor])


def test_a_session_that_is_gone_is_not_ended_again(own, worker, wait_until):
    session = elsewhere(marked_session, worker).result(20)

    wait_until(lambda: not facts.has_sessions_of(own, worker, THREADS))
    assert not facts.end_session(own, session)
    assert not facts.end_session(own, None)


def marked_session(worker):
    with awake("default", worker, 1) as mine:
        mine.ensure_connection()
        session = facts.session_of(mine)
        mine.close()
    return session


def test_there_is_no_session_before_there_is_one():
    connection.close()

    assert facts.session_of(connection) is None


@has_sessions
def test_a_session_without_a_mark_is_ended_by_its_number(own, other):
    session = other(session_of_mine)
    assert session.worker is None

    assert facts.end_session(own, session)

    assert other(lost_error) is True


def session_of_mine():
    ask()
    return facts.session_of(connections["default"])


@has_sessions
def test_a_session_that_is_anothers_by_now_is_not_ended(own, other, worker):
    other(ask_awake, worker, 1)
    session = other(session_of_mine)
    stale = session._replace(worker=next(numbers))

    assert not facts.end_session(own, stale)

    assert other(lost_error) is None


# Users that may not end the sessions of others.
USERS = {
    "postgresql": (
        ["CREATE ROLE {0} LOGIN PASSWORD '{1}'", "GRANT pg_read_all_stats TO {0}"],
        "DROP OWNED BY {0}; DROP ROLE {0}",
    ),
    "mysql": (
        [
            "CREATE USER {0}@'%%' IDENTIFIED BY '{1}'",
            "GRANT SELECT ON *.* TO {0}@'%%'",
        ],
        "DROP USER {0}@'%%'",
    ),
}


@pytest.fixture
def weak_user():
    made, dropped = USERS[connection.vendor]
    name = f"aq_weak_{os.getpid()}"
    password = connection.settings_dict["PASSWORD"]
    run(*(sql.format(name, password) for sql in made))
    yield name
    run(dropped.format(name))


def run(*statements):
    with connection.cursor() as cursor:
        for sql in statements:
            cursor.execute(sql, [])


@has_sessions
def test_a_session_that_we_have_no_right_to_end_is_told_of(
    other, worker, weak_user, caplog
):
    other(ask_awake, worker, 1)
    session = other(session_of_mine)

    with database_settings({}, USER=weak_user), private("default") as weak:
        assert facts.has_sessions_of(weak, worker, THREADS)
        assert facts.end_sessions_of(weak, worker, THREADS) == 0
        assert not facts.end_session(weak, session)

    assert caplog.text.count("cannot be ended") == 2
    assert other(lost_error) is None


# Losses.


@has_sessions
def test_that_no_server_is_there_is_a_loss_of_the_session(worker):
    with database_settings({}, HOST="127.0.0.1", PORT="1"):
        lost = elsewhere(lost_error).result(20)

    assert lost is True


def test_an_error_of_a_statement_is_no_loss_of_the_session():
    first = Effect.objects.create(label="first")
    errors = []

    for attempt in (ask_nonsense, lambda: Effect(pk=first.pk).save(force_insert=True)):
        with pytest.raises((IntegrityError, Error)) as caught:
            attempt()
        errors.append(caught.value)

    assert not any(facts.is_session_lost(connection, error) for error in errors)
    assert not facts.is_session_lost(connection, ValueError("of a job"))


@has_sessions
def test_a_loss_is_known_however_often_it_is_met(own, other, worker):
    other(ask_awake, worker, 1)

    facts.end_sessions_of(own, worker, THREADS)

    assert other(lost_error) is True
    assert other(lost_error) is True


# Patience.


@contextmanager
def patient(patience):
    with private("default", patience) as made:
        yield made


@has_sessions
def test_patience_ends_a_wait_for_a_row_with_a_transient_error():
    row = Effect.objects.create(label="first")
    with transaction.atomic():
        Effect.objects.update(label="mine")
        seconds = elsewhere(touch_patiently, row.pk).result(20)

    assert seconds < bound(3)


def touch_patiently(row):
    with patient(0.3):
        began_at = monotonic()
        with pytest.raises(OperationalError) as caught:
            Effect.objects.filter(pk=row).update(label="theirs")
        assert not facts.is_session_lost(connections["default"], caught.value)
        return monotonic() - began_at


@has_line
def test_patience_ends_a_wait_in_the_line_with_a_transient_error():
    with holder_of_transaction() as (_, go_on, ended), patient(0.5) as own:
        assert impatience_of(own) >= 0.5
        go_on.set()
        ended.result(20)
        write("in time")

    assert Effect.objects.count() == 2


def impatience_of(own):
    """Return for how long a turn was waited for, in vain."""
    began_at = monotonic()
    with pytest.raises(OperationalError) as caught:
        write("too late")
    assert facts.is_transient(caught.value)
    assert not facts.is_session_lost(own, caught.value)
    assert monotonic() - began_at < bound(5)
    return monotonic() - began_at


@has_line
def test_patience_ends_a_wait_for_a_writer_who_stands_in_no_line(own):
    with transaction.atomic(), patient_neighbour() as waited:
        # No turn: as the project's own code writes.
        Effect.objects.create(label="of a view")
        assert waited() >= 0.2


@contextmanager
def patient_neighbour():
    yield lambda: elsewhere(wait_in_vain).result(20)


def wait_in_vain():
    with patient(0.2) as own:
        return impatience_of(own)


LINE = """
import fcntl, sys
file = open(sys.argv[1], "r+")
fcntl.lockf(file, fcntl.LOCK_EX, 1, 0)
print("mine", flush=True)
sys.stdin.read()
"""


@has_line
def test_patience_ends_a_wait_for_another_process_in_the_line():
    with writing_process() as process, patient(0.2) as own:
        assert impatience_of(own) >= 0.2
        process.communicate(timeout=20)
        write("in time")

    assert Effect.objects.count() == 1


@contextmanager
def writing_process():
    """Another process, which has its turn until its input ends."""
    write("first")  # so that there is a file
    Effect.objects.all().delete()
    path = f"{connection.settings_dict['NAME']}-aqlock"
    command = [sys.executable, "-c", LINE, path]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, **pipes) as process:
        try:
            process.stdout.readline()
            yield process
        finally:
            process.kill()


@has_line
def test_a_session_that_is_ended_while_it_stands_in_line_does_not_write(
    own, wait_until
):
    with writing_process() as process:
        opened = futures.Future()
        late = elsewhere(stand_in_line, opened)
        theirs = opened.result(20)
        wait_until(lambda: facts.session_of(theirs).place is not None)
        assert facts.end_session(own, facts.session_of(theirs))
        process.communicate(timeout=20)

        with pytest.raises(OperationalError):
            late.result(20)

    elsewhere(write, "next").result(20)
    assert [row.label for row in Effect.objects.all()] == ["next"]


def stand_in_line(opened):
    mine = connections["default"]
    mine.ensure_connection()
    opened.set_result(mine)
    write("late")


@has_line
def test_the_turn_of_an_ended_session_is_kept_for_whoever_ended_it(own):
    with holder_of_transaction() as (session, go_on, ended), waiting_process() as mine:
        thread = elsewhere(write, "thread")
        assert facts.end_session(own, session)
        go_on.set()
        assert ended.result(20) == (True, [])
        assert not futures.wait([thread], 0.3).done
        assert not mine(0)

        write("record")

        assert mine(20)
    thread.result(20)
    written = Effect.objects.order_by("id").values_list("label", flat=True)
    assert list(written) == ["record", "thread"]


@has_line
def test_a_session_is_ended_though_no_thread_can_begin_any_more(own, monkeypatch):
    """As at the end of the interpreter, where a worker stops with its server."""
    with holder_of_transaction() as (session, go_on, ended):
        with monkeypatch.context() as patch:
            patch.setattr(Thread, "start", refuse)
            assert facts.end_session(own, session)
        write("record")
        go_on.set()
        assert ended.result(20) == (True, [])

    assert Effect.objects.get().label == "record"


def refuse(thread):
    raise RuntimeError("can't create new thread at interpreter shutdown")


@contextmanager
def waiting_process():
    """Another process, in line; yield what tells whether it has its turn in time."""
    path = f"{connection.settings_dict['NAME']}-aqlock"
    command = [sys.executable, "-u", "-c", f"print('waiting')\n{LINE}", path]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, **pipes, bufsize=0) as process:
        try:
            process.stdout.readline()
            yield lambda seconds: select.select([process.stdout], [], [], seconds)[0]
        finally:
            process.kill()


@has_line
def test_the_late_owner_of_a_place_leaves_the_next_one_its_turn(own):
    begun, go_on = futures.Future(), Event()
    first = elsewhere(hold_transaction, begun, go_on)
    assert facts.end_session(own, begun.result(20))
    with holder_of_transaction():
        go_on.set()
        assert first.result(20) == (True, [])

        with patient(0.1) as mine:
            assert impatience_of(mine) >= 0.1


# What a session is.


@has_sessions
def test_a_private_session_is_what_it_was_when_it_was_opened_anew():
    question = {
        "postgresql": "SELECT current_setting('lock_timeout') || ' '"
        " || current_setting('idle_session_timeout') || ' '"
        " || current_setting('tcp_keepalives_idle') || ' '"
        " || current_setting('tcp_user_timeout') || ' '"
        " || current_setting('client_connection_check_interval')",
        "mysql": "SELECT CONCAT(@@innodb_lock_wait_timeout, ' ', @@lock_wait_timeout,"
        " ' ', @@wait_timeout)",
    }[connection.vendor]
    expected = {"postgresql": "500ms 0 5 6000 500ms", "mysql": "1 1 31536000"}

    with patient(0.5) as own:
        first = ask(question)
        own.close()

        assert ask(question) == first == expected[connection.vendor]


@has_pool
def test_a_server_that_cannot_watch_its_clients_does_the_rest(monkeypatch, worker):
    monkeypatch.setattr(type(facts), "watch", {"no_such_setting": "500"})

    with private("default") as own:
        assert ask("SHOW tcp_keepalives_idle") == "5"
        facts.mark_session(own, worker, 1)
        assert elsewhere(sees_sessions, worker).result(20)


def sees_sessions(worker):
    return facts.has_sessions_of(connections["default"], worker, THREADS)


@has_pool
def test_another_error_of_the_settings_is_not_hidden(monkeypatch):
    monkeypatch.setattr(type(facts), "watch", {"lock_timeout": "', 1 / 0, '"})

    with pytest.raises(Error), private("default"):
        pass


def test_a_direct_session_lasts():
    assert facts.has_lasting_sessions(connection)
    assert not facts.marks_transactions(connection)


@has_pooler
def test_a_pooler_of_transactions_is_found_out_and_its_sessions_are_left_alone(worker):
    with servers.pgbouncer(connection.settings_dict) as pooler:
        settings = pooler.settings(connection.settings_dict["NAME"])
        with database_settings({}, **settings), patient(0.5) as own:
            assert not facts.has_lasting_sessions(own)
            assert facts.marks_transactions(own)
            assert facts.session_of(own) is None
            # What would be somebody else's next.
            assert ask("SHOW lock_timeout") == "0"
            assert ask("SHOW tcp_keepalives_idle") != "5"


@has_pooler
def test_a_transaction_behind_a_pooler_is_marked_found_and_ended(
    own, worker, wait_until
):
    with servers.pgbouncer(connection.settings_dict) as pooler:
        settings = pooler.settings(connection.settings_dict["NAME"])
        with database_settings({}, **settings):
            check_marked_transaction(own, worker, wait_until)


@has_pool
def test_a_transaction_in_a_session_of_a_pool_is_marked_found_and_ended(
    own, worker, wait_until
):
    with database_settings({"pool": True}, CONN_MAX_AGE=0):
        try:
            check_marked_transaction(own, worker, wait_until)
        finally:
            elsewhere(close_pool).result(20)


def close_pool():
    connections["default"].close_pool()


def check_marked_transaction(own, worker, wait_until):
    begun, go_on = futures.Future(), Event()
    ended = elsewhere(hold_marked, worker, begun, go_on)
    session = begun.result(20)
    assert facts.has_sessions_of(own, worker, THREADS)

    assert facts.end_session(own, session)

    wait_until(lambda: not facts.has_sessions_of(own, worker, THREADS))
    go_on.set()
    assert ended.result(20) is True
    assert not facts.end_session(own, session)


def hold_marked(worker, begun, go_on):
    try:
        with awake("default", worker, 1) as mine, transaction.atomic():
            assert facts.marks_transactions(mine)
            assert facts.session_of(mine) is None
            begun.set_result(facts.mark_transaction(mine, worker))
            assert go_on.wait(20)
            ask()
    except Error as error:
        return facts.is_session_lost(mine, error)


def test_a_free_life_is_told_from_one_that_is_held(own, other, worker):
    held, free = WorkerFactory(), WorkerFactory()
    other(lambda: facts.take_life(connections["default"], held.pk))

    assert not facts.is_life_free(own, held.pk)
    assert facts.is_life_free(own, free.pk)
    if facts.free_life:
        answers = {held.pk: False, free.pk: True}
        assert dict(lives_by_statement(own)) == answers
    other(lambda: facts.drop_life(connections["default"], held.pk))


def lives_by_statement(own):
    with own.cursor() as cursor:
        cursor.execute(
            f"SELECT id, {facts.free_life} FROM async_queue_worker AS worker"
        )
        return cursor.fetchall()


def test_a_server_tells_how_long_it_has_been_up(own):
    assert facts.seconds_up(own) > 0


def test_an_open_transaction_is_seen_whoever_has_begun_it():
    connection.ensure_connection()
    assert not facts.is_in_transaction(connection)

    with connection.cursor() as cursor:
        cursor.execute("BEGIN")
    try:
        assert facts.is_in_transaction(connection)
    finally:
        connection.close()
    assert not facts.is_in_transaction(connection)


@pytest.mark.parametrize(
    ("project", "seconds", "expected"),
    [("0", 2, "2s"), ("1s", 2, "1s"), ("1h", 2, "2s")],
)
@has_pool
def test_statements_are_limited_but_not_beyond_the_projects_limit(
    project, seconds, expected
):
    with database_settings({"options": f"-c statement_timeout={project}"}):
        with transaction.atomic():
            facts.limit_statements(connections["default"], seconds)
            assert ask("SHOW statement_timeout") == expected
        assert ask("SHOW statement_timeout") != expected or project == expected


# Words.


def send(*words):
    with connections["default"].cursor() as cursor:
        for word in words:
            cursor.execute("SELECT pg_notify('async_queue', %s)", [word])


def arrives(own, seconds=20):
    return bool(select.select([facts.descriptor(own)], [], [], seconds)[0])


@has_words
def test_a_listener_hears_while_it_idles(own, wait_until):
    facts.listen(own)
    assert facts.heard(own) == []

    elsewhere(send, "mail", "").result(20)

    assert arrives(own)
    heard = []
    wait_until(lambda: heard.extend(facts.heard(own)) or len(heard) == 2)
    assert heard == ["mail", ""]
    assert facts.heard(own) == []


@has_words
def test_a_listener_hears_what_comes_with_the_answer_to_a_statement(own):
    facts.listen(own)
    facts.listen(own)  # again, to be sure
    elsewhere(send, "mail").result(20)

    assert ask() == 1

    assert facts.heard(own) == ["mail"]


@has_words
def test_a_listener_whose_session_was_ended_is_told(own, other, worker):
    facts.listen(own)
    facts.mark_session(own, worker, 1)
    other(facts_end_sessions, worker)

    with pytest.raises(Error) as caught:
        hear_to_the_end(own)

    assert facts.is_session_lost(own, caught.value)


def hear_to_the_end(own):
    # The end of a session comes after its reason.
    while arrives(own):
        assert facts.heard(own) == []


def facts_end_sessions(worker):
    return facts.end_sessions_of(connections["default"], worker, THREADS)


@has_words
def test_a_new_session_hears_nothing_and_says_so(own):
    facts.listen(own)
    own.close()
    with pytest.raises(Error):
        facts.heard(own)
    own.ensure_connection()

    with pytest.raises(Error):
        facts.heard(own)


@has_sessions
def test_the_end_of_a_session_can_be_waited_for(own, other, worker):
    facts.mark_session(own, worker, 1)
    assert not arrives(own, 0)

    other(facts_end_sessions, worker)

    assert arrives(own)


def test_what_is_not_connected_has_nothing_to_wait_for():
    connection.close()

    assert facts.descriptor(connection) is None


@has_line
def test_a_commit_of_others_changes_the_version_of_the_data(own):
    before = facts.data_version(own)
    assert facts.data_version(own) == before

    elsewhere(write, "theirs").result(20)

    assert facts.data_version(own) != before


@has_sessions
def test_elsewhere_data_have_no_version_that_is_cheap(own):
    assert facts.data_version(own) is None


# How a project lets its idle sessions end, what tells, and what it is for a worker.
IDLE = {
    "postgresql": (
        {"options": "-c idle_session_timeout=500"},
        "SHOW idle_session_timeout",
        "0",
    ),
    "mysql": (
        {"init_command": "SET SESSION wait_timeout = 60"},
        "SELECT @@wait_timeout",
        365 * 24 * 3600,
    ),
}


@has_sessions
def test_session_that_holds_a_workers_lock_may_idle():
    options, question, expected = IDLE[connection.vendor]

    with database_settings(options), private("default") as own, own.cursor() as cursor:
        cursor.execute(question)
        assert cursor.fetchone() == (expected,)


def test_private_connection_inside_a_transaction_is_refused():
    shared = connections["default"]

    with transaction.atomic(), pytest.raises(InsideTransaction), private("default"):
        pass

    assert connections["default"] is shared
