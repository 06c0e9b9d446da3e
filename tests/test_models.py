import re
from io import StringIO

import pytest
from django.core.management import call_command
from django.db import IntegrityError, connection, transaction

from async_queue import codec, schedule
from async_queue.models import FINAL, LIVE, Attempt, Job, Status, Worker
from tests.factories import AttemptFactory, JobFactory, WorkerFactory, now

pytestmark = pytest.mark.django_db

TABLES = (Job, Attempt, Worker)
EXPECTED_INDEXES = {
    "async_queue_job_ready": ["suspect", "queue", "rank", "run_after", "id"],
    "async_queue_job_waiting": ["run_after", "id"],
    "async_queue_job_running": ["worker_id", "id"],
}


def constraints(model):
    with connection.cursor() as cursor:
        return connection.introspection.get_constraints(cursor, model._meta.db_table)


def indexes(model):
    return {
        name: found["columns"]
        for name, found in constraints(model).items()
        if (found["index"] or found["unique"]) and not found["primary_key"]
    }


@pytest.mark.parametrize("status", Status)
@pytest.mark.parametrize("has_worker", [True, False])
@pytest.mark.parametrize("is_finished", [True, False])
def test_a_row_of_no_consistent_state_is_refused(status, has_worker, is_finished):
    row = {
        "status": status,
        "worker": WorkerFactory() if has_worker else None,
        "finished_at": now() if is_finished else None,
    }
    is_consistent = has_worker == (status == Status.RUNNING)
    is_consistent &= is_finished == (status in FINAL)

    if is_consistent:
        JobFactory(**row)
        return
    with pytest.raises(IntegrityError), transaction.atomic():
        JobFactory(**row)


def test_a_status_of_nobodys_is_refused():
    with pytest.raises(IntegrityError), transaction.atomic():
        JobFactory(status="PAUSED")


def test_the_job_table_has_the_primary_key_and_three_indexes():
    found = indexes(Job)

    assert set(found) == set(EXPECTED_INDEXES)
    for name, columns in EXPECTED_INDEXES.items():
        partial = connection.features.supports_partial_indexes
        assert found[name] == (columns if partial else ["status", *columns])


@pytest.mark.parametrize("model", [Job, Attempt])
def test_no_reference_is_checked_by_the_database(model):
    assert [
        name for name, found in constraints(model).items() if found["foreign_key"]
    ] == []


def test_indexes_ascend_in_every_column():
    found = constraints(Job)

    for name in EXPECTED_INDEXES:
        assert set(found[name]["orders"]) == {"ASC"}


@pytest.mark.django_db(transaction=True)
def test_the_migration_makes_indexes_of_one_status_where_there_are_such():
    printed = StringIO()

    call_command("sqlmigrate", "async_queue", "0001", stdout=printed, no_color=True)

    pattern = r"CREATE INDEX .async_queue_job_(ready|waiting|running). (.*);"
    made = dict(re.findall(pattern, printed.getvalue()))
    assert list(made) == ["ready", "waiting", "running"]
    for name, columns in made.items():
        is_partial = columns.endswith(f" = '{name.upper()}'")
        assert is_partial == connection.features.supports_partial_indexes


def test_the_migrations_make_the_models():
    call_command("makemigrations", check=True, dry_run=True, verbosity=0)


@pytest.mark.django_db(transaction=True)
def test_the_migration_can_be_undone_and_done_again():
    call_command("migrate", "async_queue", "zero", verbosity=0)
    remaining = connection.introspection.table_names()
    call_command("migrate", "async_queue", verbosity=0)

    assert not {model._meta.db_table for model in TABLES} & set(remaining)
    assert JobFactory().pk


def call(args=(), **kwargs):
    return Job(
        function="shop.pay",
        args=codec.encode(list(args), "args"),
        kwargs=codec.encode(kwargs, "kwargs"),
    )


@pytest.mark.parametrize(
    ("job", "text"),
    [
        (call(), "shop.pay()"),
        (call([3, "a"], to=None), "shop.pay(3, 'a', to=None)"),
        (call(api_token="hush"), "shop.pay(api_token=***)"),
        (call(PASSWORD="hush"), "shop.pay(PASSWORD=***)"),
        (call(secrets=["hush"], n=1), "shop.pay(n=1, secrets=***)"),
        (call(to=[{"token": "hush"}]), "shop.pay(to=[{'token': ***}])"),
        (Job(function="shop.pay", args="["), "shop.pay(?)"),
        (Job(function="shop.pay", args="5"), "shop.pay(?)"),
        (Job(function="shop.pay", kwargs="[]"), "shop.pay(?)"),
        (Job(function="shop.pay", kwargs='{"$dict":5}'), "shop.pay(?)"),
    ],
)
def test_str_is_the_call_without_its_secrets(job, text):
    shown = str(job)

    assert "hush" not in shown
    assert sorted(shown) == sorted(text)


def test_str_hides_what_the_settings_name(settings):
    settings.ASYNC_QUEUE = {"REDACT": ["iban"]}

    assert str(call(iban="DE00", token="t")) == "shop.pay(iban=***, token='t')"


def test_str_of_the_other_tables_tells_which_row_it_is():
    attempt = AttemptFactory(number=2)

    assert str(attempt) == f"attempt 2 of job {attempt.job_id}: builtins.ValueError"
    assert str(Worker(pk=3, host="box", pid=9)) == "3 (box, process 9)"


@pytest.mark.parametrize(
    ("result", "value"), [(None, None), ("[1]", [1]), ('{"$date":"2026-01-02"}', ...)]
)
def test_return_value_is_what_the_function_returned(result, value):
    found = JobFactory(successful=True, result=result).return_value

    assert found == (codec.decode(result) if value is ... else value)


@pytest.mark.parametrize("state", ["waiting", "running", "failed", "cancelled"])
def test_return_value_of_an_unsuccessful_job_is_an_error(state):
    job = JobFactory(**{state: True})

    with pytest.raises(ValueError, match=f"job {job.pk} is {job.status}"):
        _ = job.return_value


def test_priority_is_the_negated_rank():
    assert Job(rank=-100).priority == 100


@pytest.mark.parametrize("status", Status)
def test_is_finished_in_the_final_states(status):
    assert Job(status=status).is_finished == (status not in LIVE)


def test_due_are_ready_jobs_and_waiting_ones_whose_moment_has_come():
    schedule("tests.jobs.leave", run_after=now())
    JobFactory(waiting=True, run_after=now(), rank=1)
    JobFactory(rank=-1)
    JobFactory(waiting=True)
    JobFactory(running=True)
    JobFactory(successful=True)

    assert [job.rank for job in Job.objects.due()] == [-1, 0, 1]


def test_deleting_a_job_deletes_its_attempts():
    attempt = AttemptFactory()

    attempt.job.delete()

    assert not Attempt.objects.exists()
