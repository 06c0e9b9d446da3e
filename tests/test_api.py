import json
from datetime import UTC, date, datetime, timedelta, timezone
from enum import Enum

import pytest
from django.db import OperationalError, connection, transaction
from django.test import TestCase
from django.test.utils import CaptureQueriesContext

import async_queue
from async_queue import (
    api,
    cancel,
    codec,
    context,
    deschedule,
    job,
    schedule,
    schedule_many,
    statements,
)
from async_queue.callables import registry
from async_queue.db import vendor
from async_queue.exceptions import (
    InvalidArguments,
    InvalidFunction,
    InvalidJob,
    InvalidOption,
)
from async_queue.models import FINAL, Attempt, Job, Status, Worker
from tests import jobs
from tests.factories import JobFactory, WorkerFactory, now
from tests.models import Effect
from tests.stepping import claim_next, execute_next

pytestmark = pytest.mark.django_db

MOMENT = datetime(2030, 3, 31, 1, 30, 0, 123456, UTC)


def status_of(job):
    return Job.objects.values_list("status", flat=True).get(pk=job.pk)


@pytest.fixture
def registered():
    """Forget the functions that a test registers."""
    before = dict(registry)
    yield
    registry.clear()
    registry.update(before)


@pytest.mark.parametrize("name", ["schedule", "schedule_many", "cancel", "health"])
def test_verbs_can_be_imported_from_the_package_and_from_api(name):
    assert getattr(api, name) is getattr(async_queue, name)


def test_an_unknown_name_of_the_package_is_an_attribute_error():
    with pytest.raises(AttributeError, match="has no attribute 'shedule'"):
        _ = async_queue.shedule


def test_schedule_inserts_a_ready_job_with_its_defaults():
    before = now()

    row = Job.objects.get(pk=schedule(jobs.leave).pk)

    assert (row.function, row.args, row.kwargs) == ("tests.jobs.leave", "[]", "{}")
    assert (row.queue, row.priority, row.meta) == ("default", 0, "{}")
    assert (row.status, row.attempt, row.failures) == (Status.READY, 0, 0)
    assert before <= row.run_after <= row.enqueued_at <= now()
    assert (row.worker_id, row.started_at, row.finished_at) == (None, None, None)


@pytest.mark.parametrize("run_after", [None, timedelta(hours=1), MOMENT], ids=str)
def test_schedule_returns_the_row_as_it_is_stored(run_after):
    returned = schedule(jobs.add, [1], {"b": 2}, run_after, {"max_attempts": 3})

    stored = Job.objects.get(pk=returned.pk)
    names = [field.attname for field in Job._meta.concrete_fields]
    assert [getattr(returned, n) for n in names] == [getattr(stored, n) for n in names]
    assert not returned._state.adding
    assert returned._state.db == "default"


def test_schedule_stores_each_option():
    row = schedule(
        "tests.jobs.add",
        (1,),
        {"b": 2},
        meta={"backoff": jobs.backoff_of_a_minute_each, "discard_on": [KeyError]},
        queue="slow.jobs-1",
        priority=-100,
        using="default",
    )

    row = Job.objects.get(pk=row.pk)
    assert (row.args, row.kwargs) == ("[1]", '{"b":2}')
    assert (row.queue, row.priority) == ("slow.jobs-1", -100)
    assert codec.decode(row.meta) == {
        "backoff": "tests.jobs.backoff_of_a_minute_each",
        "discard_on": ["KeyError"],
    }


@pytest.mark.parametrize(
    ("run_after", "status"),
    [
        (timedelta(0), Status.READY),
        (timedelta(days=-36_500), Status.READY),
        (timedelta(milliseconds=-1), Status.READY),
        (timedelta(hours=1), Status.WAITING),
        (timedelta(days=36_500), Status.WAITING),
        (datetime(1970, 1, 1, tzinfo=timezone(timedelta(hours=14))), Status.READY),
        (MOMENT, Status.WAITING),
        (datetime(9998, 12, 31, tzinfo=UTC), Status.WAITING),
    ],
    ids=str,
)
def test_schedule_makes_ready_what_may_run_and_lets_the_rest_wait(run_after, status):
    row = schedule(jobs.leave, run_after=run_after)

    assert status_of(row) == status
    if isinstance(run_after, datetime):
        assert Job.objects.get(pk=row.pk).run_after == run_after


def test_schedule_counts_a_timedelta_from_the_databases_now():
    before = now()

    row = schedule(jobs.leave, run_after=timedelta(minutes=10, microseconds=5000))

    wait = timedelta(minutes=10, microseconds=5000)
    assert before + wait <= row.run_after <= now() + wait


def test_schedule_keeps_the_moment_of_another_zone():
    local = MOMENT.astimezone(timezone(timedelta(hours=5, minutes=30)))

    row = schedule(jobs.leave, run_after=local)

    assert Job.objects.get(pk=row.pk).run_after == MOMENT


@pytest.mark.parametrize(
    ("options", "argument", "remedy"),
    [
        ({"args": "text"}, "args is 'text'", "pass a list such as ['text']"),
        ({"args": 3}, "args is 3", "pass a list such as [3]"),
        ({"args": {1}}, "args is {1}", "pass a list"),
        ({"args": [Effect(pk=3)]}, "args[0] is of type Effect", "primary key"),
        ({"args": ["x" * 2**18]}, "args has", "pass its key"),
        ({"args": ["x" * 2**17], "kwargs": {"b": "x" * 2**17}}, "args and", "a key"),
        ({"kwargs": [1]}, "kwargs is [1]", "pass a dict"),
        ({"kwargs": {1: 2}}, "kwargs is {1: 2}", "its keys must be str"),
        ({"kwargs": {"label": {1}}}, "kwargs['label'] is of type set", "sorted list"),
        ({"kwargs": {"labl": 1}}, "tests.jobs.leave(label", "unexpected keyword"),
        ({"args": [1, 2]}, "tests.jobs.leave(label", "too many positional"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_schedule_refuses_arguments_naming_the_argument_and_the_remedy(
    options, argument, remedy
):
    with pytest.raises(InvalidArguments) as refusal:
        schedule(jobs.leave, **options)

    assert str(refusal.value).startswith(argument)
    assert remedy in str(refusal.value)
    assert not Job.objects.exists()


@pytest.mark.parametrize(
    ("options", "argument", "remedy"),
    [
        ({"run_after": datetime(2030, 1, 1)}, "run_after is", "datetime.now(UTC)"),
        ({"run_after": 60}, "run_after is 60", "an aware datetime or a timedelta"),
        ({"run_after": date(2030, 1, 1)}, "run_after is", "an aware datetime or"),
        ({"run_after": timedelta(36_501)}, "run_after is", "up to 100 years"),
        ({"run_after": timedelta.min}, "run_after is", "up to 100 years"),
        (
            {"run_after": datetime.max.replace(tzinfo=timezone(-timedelta(hours=9)))},
            "run_after is",
            "up to 9998",
        ),
        (
            {"run_after": datetime.min.replace(tzinfo=timezone(timedelta(hours=9)))},
            "run_after is",
            "a year",
        ),
        ({"meta": {"max_atempts": 1}}, "meta has no key 'max_atempts'", "max_attempts"),
        ({"meta": {"backoff": "x"}}, "meta['backoff'] is none of", "exponential"),
        ({"meta": [1]}, "meta is [1]", "pass a dict"),
        ({"queue": ""}, "queue is ''", "up to 64 letters"),
        ({"queue": "a b"}, "queue is 'a b'", "up to 64 letters"),
        ({"queue": "a\n"}, "queue is 'a\\n'", "up to 64 letters"),
        ({"queue": "q" * 65}, "queue is", "up to 64 letters"),
        ({"queue": 3}, "queue is 3", "up to 64 letters"),
        ({"priority": 101}, "priority is 101", "from -100 to 100"),
        ({"priority": -101}, "priority is -101", "from -100 to 100"),
        ({"priority": "1"}, "priority is '1'", "from -100 to 100"),
        ({"priority": True}, "priority is True", "from -100 to 100"),
        ({"using": "replica"}, "using is 'replica'", "the databases are default"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_schedule_refuses_an_option_naming_it_and_the_remedy(options, argument, remedy):
    with pytest.raises(InvalidOption) as refusal:
        schedule(jobs.leave, **options)

    assert str(refusal.value).startswith(argument)
    assert remedy in str(refusal.value)
    with pytest.raises(InvalidJob):
        schedule_many([(jobs.leave,)], **options)


@pytest.mark.parametrize("key", ["discard_on", "retry_on"])
@pytest.mark.parametrize(
    "name", ["tests.models.Nope", "missing.Nope", "Nope", "tests.jobs.add", Effect]
)
def test_schedule_refuses_what_is_no_exception(key, name):
    with pytest.raises(InvalidOption, match=f"meta.'{key}'. names .* no exception"):
        schedule(jobs.leave, meta={key: [KeyError, name]})


@pytest.mark.parametrize(
    "name", ["ValueError", "builtins.ValueError", "tests.models.Effect.DoesNotExist"]
)
def test_schedule_takes_exceptions_by_name(name):
    row = schedule(jobs.leave, meta={"discard_on": [name], "retry_on": [name]})

    assert json.loads(row.meta) == {"discard_on": [name], "retry_on": [name]}


@pytest.mark.parametrize("function", [lambda: None, "tests.jobs.missing", jobs.Shop])
def test_schedule_refuses_a_function_that_no_worker_finds(function):
    with pytest.raises(InvalidFunction, match=r"^function "):
        schedule(function)


@pytest.mark.django_db(transaction=True)
def test_schedule_is_undone_with_the_callers_transaction():
    with transaction.atomic():
        schedule(jobs.leave)
        schedule_many([(jobs.leave,)] * 3)
        transaction.set_rollback(True)

    assert not Job.objects.exists()


@pytest.mark.django_db(transaction=True)
def test_schedule_is_undone_with_a_savepoint():
    with transaction.atomic():
        kept = schedule(jobs.leave)
        with transaction.atomic():
            schedule(jobs.leave)
            schedule_many([(jobs.leave,)] * 3)
            transaction.set_rollback(True)

    assert Job.objects.get() == kept


def test_schedule_many_returns_the_jobs_in_the_order_of_the_calls():
    calls = [("tests.jobs.add", [number], {"b": 0}) for number in range(1500)]

    rows = schedule_many(calls, queue="many", priority=3)

    numbers = [row.pk for row in rows]
    assert numbers == sorted(numbers)
    stored = Job.objects.order_by("pk").values_list("pk", "args", "queue", "rank")
    assert [*stored] == [(row.pk, f"[{n}]", "many", -3) for n, row in enumerate(rows)]


def test_schedule_many_seals_each_row():
    for row in schedule_many([(jobs.add, (1, 2)), (jobs.send, None, {"address": "a"})]):
        codec.verify(row.seal, row.function, row.args, row.kwargs, row.meta)


def test_schedule_many_of_nothing_inserts_nothing():
    assert schedule_many([]) == []


def test_schedule_many_takes_a_generator_and_short_calls():
    rows = schedule_many(call for call in [(jobs.leave,), [jobs.leave, ["a"]]])

    assert [row.args for row in rows] == ["[]", '["a"]']


def test_schedule_many_inserts_none_if_one_is_wrong():
    with pytest.raises(InvalidArguments, match=r"^call 1: "):
        schedule_many([(jobs.leave,), (jobs.add, [1])])

    assert not Job.objects.exists()


@pytest.mark.django_db(transaction=True)
def test_schedule_many_inserts_none_if_a_later_statement_fails():
    inserts = []

    def fail_at_the_second(execute, sql, *rest):
        inserts.append(sql)
        if len(inserts) == 2:
            raise OperationalError("as intended")
        return execute(sql, *rest)

    with (
        pytest.raises(OperationalError, match="as intended"),
        connection.execute_wrapper(fail_at_the_second),
    ):
        schedule_many([(jobs.leave,)] * 1500)

    assert not Job.objects.exists()


@pytest.mark.parametrize(
    "call", [(), (1, 2, 3, 4), "tests.jobs.leave", jobs.leave, None], ids=repr
)
def test_schedule_many_says_what_a_call_is(call):
    with pytest.raises(InvalidArguments, match=r"pass \(function, args, kwargs\)"):
        schedule_many([call])


def test_deschedule_cancels_the_live_jobs_of_exactly_this_call():
    wanted = [
        schedule(jobs.add, [1], {"b": 2}),
        schedule("tests.jobs.add", (1,), {"b": 2}, timedelta(1), queue="x", priority=9),
    ]
    others = [
        schedule(jobs.add, [1, 2]),
        schedule(jobs.add, [2], {"b": 1}),
        schedule(jobs.take, [1], {"b": 2}),
    ]

    assert deschedule(jobs.add, [1], {"b": 2}) == 2

    assert {status_of(row) for row in wanted} == {Status.CANCELLED}
    assert {status_of(row) for row in others} == {Status.READY}


class Paths(str, Enum):  # noqa: UP042
    ADD = "tests.jobs.add"


def test_member_of_an_enumeration_stands_for_its_value():
    row = schedule(Paths.ADD, [1, 2])
    assert deschedule(Paths.ADD, [1, 2]) == 1
    assert row.function == "tests.jobs.add"
    schedule(Paths.ADD, [1, 2])
    assert execute_next().action == "succeed"


def test_deschedule_does_not_mind_the_order_of_keywords():
    schedule(jobs.take, kwargs={"a": 1, "b": 2})

    assert deschedule(jobs.take, kwargs={"b": 2, "a": 1}) == 1


@pytest.mark.parametrize(
    ("stored", "asked"),
    [("Straße", "strasse"), ("a", "A"), ("e", "é"), ("a", "a "), (1, 1.0), (1, True)],
)
def test_deschedule_leaves_what_only_resembles_the_call(stored, asked):
    schedule(jobs.leave, [stored])

    assert deschedule(jobs.leave, [asked]) == 0
    assert deschedule(jobs.leave, [stored]) == 1


def test_deschedule_cancels_a_running_job_and_no_finished_one():
    running = schedule(jobs.leave)
    claim_next()
    finished = JobFactory(successful=True)

    assert deschedule(jobs.leave) == 1

    assert status_of(running) == Status.CANCELLED
    assert status_of(finished) == Status.SUCCESSFUL


def test_deschedule_reaches_jobs_of_a_function_that_is_gone():
    JobFactory(function="tests.jobs.gone")

    assert deschedule("tests.jobs.gone") == 1


def test_deschedule_refuses_what_cannot_be_a_call():
    with pytest.raises(InvalidArguments, match="args is"):
        deschedule(jobs.leave, "a")
    with pytest.raises(InvalidFunction):
        deschedule(lambda: None)
    with pytest.raises(InvalidOption, match="using is 'replica'"):
        deschedule(jobs.leave, using="replica")


@pytest.mark.parametrize("state", ["waiting", "orphaned", "successful", "failed"])
def test_cancel_of_a_job_cancels_it_unless_it_is_finished(state):
    row = JobFactory(**{state: True})
    before = row.status

    cancelled = cancel(row)

    assert cancelled == (before not in FINAL)
    assert status_of(row) == (Status.CANCELLED if cancelled else before)
    assert not Attempt.objects.exists()


def test_cancel_of_a_queryset_counts_the_live_ones():
    JobFactory.create_batch(3)
    JobFactory(failed=True)
    other = JobFactory(queue="other")

    assert cancel(Job.objects.filter(queue="default")) == 3
    assert status_of(other) == Status.READY


def test_cancel_of_a_slice_cancels_only_that():
    first, second, third = JobFactory.create_batch(3)

    assert cancel(Job.objects.order_by("pk")[1:2], "not needed") == 1

    assert [status_of(row) for row in (first, second, third)] == [
        Status.READY,
        Status.CANCELLED,
        Status.READY,
    ]


def test_cancel_goes_through_many_batches(monkeypatch):
    monkeypatch.setattr(api, "_BATCH", 2)
    JobFactory.create_batch(5)

    assert cancel(Job.objects.all(), "all of them") == 5
    assert Attempt.objects.count() == 5


def test_cancel_keeps_its_reason_as_an_attempt():
    JobFactory(waiting=True)
    running = JobFactory(running=True, attempt=3)

    cancel(Job.objects.all(), "the customer left")

    attempt = Attempt.objects.get(job=running)
    assert Attempt.objects.count() == 2
    assert (attempt.number, attempt.message) == (3, "the customer left")
    assert attempt.exception == "async_queue.exceptions.Cancel"


def test_cancel_gives_its_reason_to_no_job_that_was_cancelled_before():
    JobFactory(cancelled=True)
    live = JobFactory()

    assert cancel(Job.objects.order_by("pk")[:2], "once") == 1

    assert Attempt.objects.get().job_id == live.pk


@pytest.mark.parametrize("reason", ["a\0b", "\ud800", "x" * 10**6])
def test_cancel_keeps_any_reason_as_a_database_takes_it(reason):
    assert cancel(JobFactory(), reason) == 1

    assert Attempt.objects.get().message


def test_cancel_and_deschedule_leave_the_job_that_calls_them():
    schedule(jobs.leave, priority=1)
    current = claim_next()
    other = schedule(jobs.leave)

    with context.running(current):
        assert deschedule(jobs.leave) == 1
        assert cancel(Job.objects.get(pk=current.id)) == 0

    assert status_of(other) == Status.CANCELLED
    assert Job.objects.get(pk=current.id).status == Status.RUNNING


@pytest.mark.parametrize("jobs", [3, None, [1], WorkerFactory._meta.model.objects])
def test_cancel_refuses_what_is_no_job(jobs):
    with pytest.raises(InvalidOption, match="pass a Job or a queryset of them"):
        cancel(jobs)


def test_job_function_can_still_be_called():
    assert jobs.send("a", subject="b") == "a: b"
    assert jobs.send.__name__ == "send"
    assert repr(jobs.send) == "<job tests.jobs.send>"


def test_job_function_schedules_with_its_defaults():
    row = jobs.send.schedule("a@b", subject="c")

    assert (row.function, row.args, row.kwargs) == (
        "tests.jobs.send",
        '["a@b"]',
        '{"subject":"c"}',
    )
    assert (row.queue, row.priority, row.meta) == ("mail", 7, "{}")


@pytest.mark.parametrize("function", [jobs.send, "tests.jobs.send"])
def test_a_jobs_defaults_hold_however_it_is_scheduled(function):
    (many,) = schedule_many([(function, ["a"])])
    one = schedule(function, ["a"])

    assert {(row.queue, row.priority) for row in (many, one)} == {("mail", 7)}


def test_using_overrides_the_defaults_and_adds_up():
    later = jobs.send.using(queue="slow", priority=0).using(run_after=timedelta(1))

    row = later.using(meta={"max_attempts": 1}).schedule("a")

    assert (row.queue, row.priority, row.status) == ("slow", 0, Status.WAITING)
    assert codec.decode(row.meta) == {"max_attempts": 1}
    assert jobs.send.schedule("a").queue == "mail"


def test_job_function_refuses_what_its_function_does_not_take():
    with pytest.raises(InvalidArguments, match="missing a required argument"):
        jobs.send.schedule()


@pytest.mark.parametrize("option", ["run_after", "meta", "queue", "priority", "using"])
def test_job_function_that_is_given_an_option_tells_where_it_goes(option):
    with pytest.raises(InvalidArguments, match=rf"\.using\({option}=\.\.\.\)"):
        jobs.send.schedule(1, **{option: 1})


def test_job_that_is_given_a_name_tells_of_queue():
    with pytest.raises(InvalidOption, match="queue='mail'"):
        job("mail")


@pytest.mark.usefixtures("registered")
def test_job_without_options_is_a_decorator_too():
    decorated = job(jobs.add)

    row = decorated.schedule(1, b=2)

    assert decorated(1, b=2) == 3
    assert (row.queue, row.priority, row.args) == ("default", 0, "[1]")


@pytest.mark.usefixtures("registered")
def test_a_registered_class_method_keeps_its_class():
    decorated = job(queue="shops")(jobs.Branch.name)

    assert decorated.schedule().function == "tests.jobs.Branch.name"
    assert execute_next().action == "succeed"
    assert Job.objects.get().return_value == "Branch"


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"queue": "a b"}, "queue is 'a b'"),
        ({"priority": 500}, "priority is 500"),
        ({"max_atempts": 1}, "@job of tests.jobs.add has no key 'max_atempts'"),
        ({"max_attempts": 0}, "@job of tests.jobs.add['max_attempts'] must be"),
    ],
)
def test_job_refuses_wrong_options_where_it_stands(options, reason):
    with pytest.raises(InvalidOption) as refusal:
        job(**options)(jobs.add)

    assert str(refusal.value).startswith(reason)
    assert "tests.jobs.add" not in registry


def test_job_refuses_a_function_that_no_worker_finds():
    with pytest.raises(InvalidFunction, match="define it at the top"):
        job(lambda: None)


def test_the_setting_names_the_database(settings):
    settings.ASYNC_QUEUE = {"DATABASE": "elsewhere"}

    with pytest.raises(InvalidOption, match="using is 'elsewhere'"):
        schedule(jobs.leave)
    assert schedule(jobs.leave, using="default").pk


def test_a_database_without_returning_tells_the_same(monkeypatch):
    with connection.cursor() as cursor:
        if not hasattr(cursor, "lastrowid"):
            pytest.skip(
                "a driver that cannot tell the id has RETURNING in all versions"
            )
    returning = "can_return_rows_from_bulk_insert"
    monkeypatch.setattr(type(connection.features), returning, False)

    rows = schedule_many([(jobs.leave, [str(n)]) for n in range(3)], timedelta(hours=1))

    stored = Job.objects.order_by("pk").values_list("pk", "args", "run_after")
    assert [*stored] == [(row.pk, row.args, row.run_after) for row in rows]
    assert [row.args for row in rows] == ['["0"]', '["1"]', '["2"]']


@pytest.fixture
def listener(second_connection):
    """Another session, which hears what is sent to workers, with one that wants it."""
    facts = vendor(second_connection)
    if not facts.listens:
        pytest.skip("the database sends no word")
    WorkerFactory(wants_wakeup=True)
    facts.listen(second_connection)

    def heard():
        # What was sent before this statement has arrived with its answer.
        statements.now(second_connection)
        return sorted(facts.heard(second_connection))

    return heard


@pytest.mark.django_db(transaction=True)
class TestNotifications:
    def test_schedule_sends_the_queue_with_its_own_statement(self, listener):
        with CaptureQueriesContext(connection) as sent:
            schedule(jobs.leave, queue="mail")

        assert listener() == ["mail"]
        assert len(sent) == 1

    @pytest.mark.parametrize(
        ("run_after", "words"),
        [(timedelta(seconds=0.5), [""]), (timedelta(seconds=5), [])],
        ids=str,
    )
    def test_only_what_is_due_before_the_next_look_is_told(
        self, run_after, words, listener
    ):
        schedule(jobs.leave, run_after=run_after)
        with transaction.atomic():
            schedule(jobs.leave, run_after=run_after)

        assert listener() == 2 * words

    def test_a_transaction_sends_each_queue_once_and_after_its_commit(self, listener):
        with transaction.atomic():
            for queue in ("a", "b", "a"):
                schedule(jobs.leave, queue=queue)
            schedule_many([(jobs.leave,), (jobs.leave,)], queue="c")
            before = listener()
            hooks = len(connection.run_on_commit)

        assert (before, hooks) == ([], 1)
        assert listener() == ["a", "b", "c"]

    def test_schedule_many_sends_one_statement(self, listener):
        with CaptureQueriesContext(connection) as sent:
            schedule_many([(jobs.leave,)] * 3)

        assert listener() == ["default"]
        assert sum("pg_notify" in query["sql"] for query in sent) == 1

    def test_a_transaction_that_is_rolled_back_sends_nothing(self, listener):
        with transaction.atomic():
            schedule(jobs.leave)
            transaction.set_rollback(True)

        assert listener() == []
        with transaction.atomic():
            schedule(jobs.leave, queue="next")
        assert listener() == ["next"]

    def test_what_follows_a_savepoint_that_was_rolled_back_is_sent(self, listener):
        with transaction.atomic():
            with transaction.atomic():
                schedule(jobs.leave, queue="lost")
                transaction.set_rollback(True)
            schedule(jobs.leave, queue="kept")

        assert listener() == ["kept"]

    def test_savepoints_of_a_transaction_send_together(self, listener):
        with CaptureQueriesContext(connection) as sent, transaction.atomic():
            with transaction.atomic():
                for queue in ("a", "b"):
                    with transaction.atomic():
                        schedule(jobs.leave, queue=queue)
            schedule(jobs.leave, queue="c")
            with transaction.atomic():
                schedule(jobs.leave, queue="d")
                transaction.set_rollback(True)

        # Too much does no harm: whoever looks finds nothing.
        assert {"a", "b", "c"} <= set(listener())
        assert sum("pg_notify" in query["sql"] for query in sent) == 1

    def test_a_hook_that_schedules_in_a_transaction_sends_too(self, listener):
        def chain():
            with transaction.atomic():
                schedule(jobs.leave, queue="second")

        with transaction.atomic():
            schedule(jobs.leave, queue="first")
            transaction.on_commit(chain)

        assert listener() == ["first", "second"]

    def test_hooks_that_a_test_has_called_and_kept_do_not_swallow_the_next(
        self, listener
    ):
        with transaction.atomic():
            kept = []
            for queue in ("a", "b"):
                with TestCase.captureOnCommitCallbacks(execute=True) as hooks:
                    schedule(jobs.leave, queue=queue)
                kept.append(hooks)

        assert [len(hooks) for hooks in kept] == [1, 1]

    def test_a_job_that_schedules_sends_after_its_commit(self, listener):
        schedule(jobs.schedule_itself, [None], queue="first")
        listener()

        execute_next()

        assert listener() == ["default"]

    @pytest.mark.parametrize("change", [{"wants_wakeup": False}, {"dead_at": MOMENT}])
    def test_nothing_is_sent_where_no_living_worker_wants_it(self, change, listener):
        Worker.objects.update(**change)

        schedule(jobs.leave)
        with transaction.atomic():
            schedule(jobs.leave)

        assert listener() == []

    @pytest.mark.parametrize(
        ("queues", "is_told"),
        [
            ("", True),
            ("mail", True),
            ("bulk,mail", True),
            ("m*", True),
            ("-bulk", True),
            ("bulk", False),
            ("mails,email", False),
        ],
    )
    def test_word_is_sent_where_a_worker_that_wants_it_may_serve_the_queue(
        self, queues, is_told, listener
    ):
        Worker.objects.update(queues=queues)

        schedule(jobs.leave, queue="mail")
        schedule(jobs.leave, queue="mail", run_after=timedelta(0))
        with transaction.atomic():
            schedule(jobs.leave, queue="mail")

        assert listener() == 3 * is_told * ["mail"]

    def test_nothing_is_sent_where_it_is_switched_off(self, settings, listener):
        settings.ASYNC_QUEUE = {"NOTIFY": False}

        schedule(jobs.leave)
        with transaction.atomic():
            schedule(jobs.leave)
            assert connection.run_on_commit == []

        assert listener() == []

    def test_without_autocommit_nothing_is_sent_and_nothing_fails(self, listener):
        transaction.set_autocommit(False)
        try:
            schedule(jobs.leave)
            transaction.commit()
        finally:
            transaction.set_autocommit(True)

        assert listener() == []

    def test_a_session_that_ends_after_the_commit_does_not_reach_the_caller(
        self, listener, second_connection
    ):
        def end_session():
            number = connection.connection.info.backend_pid
            with second_connection.cursor() as cursor:
                cursor.execute("SELECT pg_terminate_backend(%s, 5000)", [number])

        with transaction.atomic():
            transaction.on_commit(end_session)
            row = schedule(jobs.leave)

        connection.close()
        assert Job.objects.filter(pk=row.pk).exists()
        assert listener() == []
