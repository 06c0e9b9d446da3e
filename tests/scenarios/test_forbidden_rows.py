"""Rows that somebody wrote to the table by hand: refused, and the queue goes on."""

import sys

import pytest
from django.db import IntegrityError, connection

from async_queue import codec, schedule, schedule_many
from async_queue.callables import resolve
from async_queue.db import vendor
from async_queue.exceptions import SealBroken, UnknownSealKey
from async_queue.models import Attempt, Job, Status
from tests import jobs
from tests.factories import JobFactory, now
from tests.models import Effect
from tests.stepping import exceptions_of, flush, make_due

pytestmark = pytest.mark.django_db(transaction=True)

takes_any_type = pytest.mark.skipif(
    not vendor(connection).runs_one_job_at_a_time, reason="columns keep their types"
)

CANARY = "forbidden_canary"
FUNCTION = f"{CANARY}.sing"
OTHER_SEAL = codec.seal("tests.jobs.leave", '["other"]', "{}", "{}")
UNSEALED_PATHS = [
    FUNCTION,
    f"{CANARY}.os.system",
    f"{CANARY}.Bird",
    f"{CANARY}.Bird.__init__",
    f"{CANARY}.__builtins__.eval",
    f"{CANARY}.__loader__.load_module",
    f"{CANARY}.sing.__globals__.clear",
    "tests.jobs.leave",
    "tests.jobs.send",
    "tests.jobs.Event",
    "tests.jobs.Shop",
    "os.system",
    "os._exit",
    "posix.abort",
    "subprocess.run",
    "subprocess.Popen",
    "builtins.eval",
    "builtins.exec",
    "builtins.__import__",
    "importlib.import_module",
    "sys.exit",
    "shutil.rmtree",
    "django.core.management.call_command",
    "async_queue.codec.seal",
    "..",
    "",
]


def tampered(**changes):
    """Return a row with a true seal of which something was changed afterwards."""
    row = {"function": FUNCTION, "args": '["a"]', "kwargs": '{"b":1}', "meta": "{}"}
    return {**row, "seal": codec.seal(*row.values()), **changes}


FORBIDDEN = {
    **{f"unsealed {path}": {"function": path, "seal": ""} for path in UNSEALED_PATHS},
    "seal of another row": {"function": FUNCTION, "seal": OTHER_SEAL},
    "another function": tampered(function=f"{CANARY}.os.system"),
    "other args": tampered(args='["b"]'),
    "other kwargs": tampered(kwargs='{"b":2}'),
    "other meta": tampered(meta='{"max_attempts":null}'),
    "args moved to kwargs": tampered(args='["a"]{', kwargs='"b":1}'),
    "meta that is not JSON": tampered(meta="nonsense"),
    "truncated seal": tampered(seal=tampered()["seal"][:-1]),
    "seal without a mac": tampered(seal=tampered()["seal"][:12]),
    "seal of another version": tampered(seal="v2" + tampered()["seal"][2:]),
    "nonsense for a seal": tampered(seal="é\N{SNOWMAN}"),
}


@pytest.fixture
def canary(tmp_path, monkeypatch):
    """A module that nobody may import."""
    (tmp_path / f"{CANARY}.py").write_text("import os\ndef sing(*a, **k): ...\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield CANARY
    sys.modules.pop(CANARY, None)
    resolve.cache_clear()


def write(row):
    """Insert a row as somebody does who can write to the table, and to no more."""
    row = {
        "function": "tests.jobs.leave",
        "args": "[]",
        "kwargs": "{}",
        "meta": "{}",
        "seal": "",
        **row,
    }
    columns = {
        **row,
        "identity": codec.identity(row["function"], row["args"], row["kwargs"]),
        "queue": "default",
        "rank": -100,
        "run_after": "2020-01-01 00:00:00.000000",
        "enqueued_at": "2020-01-01 00:00:00.000000",
        "status": "READY",
        "attempt": 0,
        "failures": 0,
    }
    names = ", ".join(map(connection.ops.quote_name, columns))
    values = ", ".join(["%s"] * len(columns))
    with connection.cursor() as cursor:
        cursor.execute(
            f"INSERT INTO async_queue_job ({names}) VALUES ({values})",
            [*columns.values()],
        )
    return Job.objects.latest("pk")


def sealed(function="tests.jobs.take", args="[]", kwargs="{}", meta="{}"):
    """Return a row that holds nonsense under a true seal."""
    seal = codec.seal(function, args, kwargs, meta)
    return {
        "function": function,
        "args": args,
        "kwargs": kwargs,
        "meta": meta,
        "seal": seal,
    }


def test_forbidden_rows_fail_unimported_and_the_good_ones_among_them_run(canary):
    forbidden, good = [], []
    for name, row in FORBIDDEN.items():
        forbidden.append(write(row))
        good.append(schedule(jobs.leave, [name], priority=100))

    flush()

    assert len(forbidden) >= 30
    assert canary not in sys.modules
    for row in forbidden:
        row.refresh_from_db()
        assert (row.status, row.worker_id, row.failures) == (Status.FAILED, None, 1)
        assert exceptions_of(row) == [SealBroken.__name__]
    labels = Effect.objects.values_list("label", flat=True)
    assert sorted(labels) == sorted(FORBIDDEN)
    assert Job.objects.filter(status=Status.SUCCESSFUL).count() == len(good)


def test_the_canary_sings_when_its_row_is_ours(canary):
    """Without this, the test above could not fail."""
    write(sealed(FUNCTION))

    flush()

    assert canary in sys.modules
    assert Job.objects.get().status == Status.SUCCESSFUL


@pytest.mark.parametrize(
    "seal", ["", OTHER_SEAL, "v1:ffffffff:00"], ids=["none", "wrong", "unknown key"]
)
def test_a_row_is_refused_without_a_trace_of_what_it_names(seal, canary):
    row = write({"function": FUNCTION, "seal": seal, "args": "not JSON"})

    flush()

    row.refresh_from_db()
    assert row.status != Status.SUCCESSFUL
    assert canary not in sys.modules


def test_an_unsealed_row_runs_if_the_settings_name_its_job_function(settings):
    settings.ASYNC_QUEUE = {"UNSEALED": ["tests.jobs.send"]}
    row = write({"function": "tests.jobs.send", "args": '["a@b"]'})

    flush()

    row.refresh_from_db()
    assert row.return_value == "a@b: hello"


@pytest.mark.parametrize(
    ("row", "exception"),
    [
        ({"function": "tests.jobs.leave"}, "SealBroken"),  # named, but no @job
        ({"function": "tests.jobs.add"}, "SealBroken"),  # not named
        ({"function": "tests.jobs.send", "args": '"a"'}, "CorruptArguments"),
        ({"function": "tests.jobs.send", "kwargs": "[]"}, "CorruptArguments"),
        ({"function": "tests.jobs.send", "meta": "[]"}, "CorruptArguments"),
        ({"function": "tests.jobs.send", "meta": '{"x":1}'}, "CorruptArguments"),
        (
            {"function": "tests.jobs.send", "meta": '{"backoff":"os.abort"}'},
            "CorruptArguments",
        ),
        (
            {"function": "tests.jobs.send", "meta": '{"backoff":["os.abort"]}'},
            "CorruptArguments",
        ),
        ({"function": "tests.jobs.send", "seal": OTHER_SEAL}, "SealBroken"),
        ({"function": "tests.jobs.send", "args": "["}, "CorruptArguments"),
    ],
)
def test_an_unsealed_row_must_be_named_registered_and_sound(row, exception, settings):
    settings.ASYNC_QUEUE = {"UNSEALED": ["tests.jobs.leave", "tests.jobs.send"]}
    stored = write(row)

    flush()

    assert exceptions_of(stored) == [exception]
    stored.refresh_from_db()
    assert stored.status == Status.FAILED
    assert not Effect.objects.exists()


CORRUPT_ARGUMENTS = ["", "[", "nonsense", "null", "5", '"text"', '{"a":1}', "[1,]"]
CORRUPT_MAPPINGS = ["", "{", "nonsense", "null", "5", '"text"', "[]", '[["a",1]]']
CORRUPT = {
    **{f"args {text}": sealed(args=text) for text in CORRUPT_ARGUMENTS},
    **{f"kwargs {text}": sealed(kwargs=text) for text in CORRUPT_MAPPINGS},
    **{f"meta {text}": sealed(meta=text) for text in CORRUPT_MAPPINGS},
    **{
        f"tag {tag}": sealed(args=f'[{{"{tag}":[{{}}]}}]')
        for tag in codec._UNTAG
        if tag != "$dict"
    },
    "tag $dict": sealed(args='[{"$dict":5}]'),
    "tag at the top": sealed(args='{"$date":"2020-01-01"}'),
    "tagged kwargs": sealed(kwargs='{"$uuid":5}'),
    "too deep": sealed(args="[" * 100_000 + "]" * 100_000),
    "too long a number": sealed(args="[" + "1" * 5000 + "]"),
    "huge nonsense": sealed(args="x" * 2_000_000),
    "huge text without a seal": {"args": '["' + "x" * 2_000_000 + '"]'},
    "meta of another kind": sealed("tests.jobs.leave_then_fail", meta='{"retry_on":5}'),
}


@pytest.mark.parametrize("name", CORRUPT)
def test_a_corrupt_row_fails_at_once_and_the_queue_flows(name):
    row = write(CORRUPT[name])
    good = schedule(jobs.leave, priority=-100)

    flush(threads=1)

    row.refresh_from_db()
    good.refresh_from_db()
    assert (row.status, good.status) == (Status.FAILED, Status.SUCCESSFUL)
    assert len(Attempt.objects.get(job=row).message) < 20_000


BACKOFF_OF_CANARY = f'{{"backoff":"{FUNCTION}"}}'
SEALED_COLUMNS = ["seal", "function", "args", "kwargs", "meta"]
# Each in place of a value of a row that is ours.
ODD = {
    "attempt": "'x'",
    "rank": "'x'",
    "run_after": "'2020-99-99 00:00'",
    "args": "CAST(x'ff' AS TEXT)",
    "seal": "CAST(x'ff' AS TEXT)",
    "meta": "CAST(x'ff' AS TEXT)",
}


def put(row, column, sql):
    with connection.cursor() as cursor:
        cursor.execute(
            f"UPDATE async_queue_job SET {column} = {sql} WHERE id = %s", [row.pk]
        )


def status_of(row):
    return Job.objects.values_list("status", flat=True).get(pk=row.pk)


@takes_any_type
@pytest.mark.parametrize("column", SEALED_COLUMNS)
def test_a_row_that_holds_bytes_fails_unimported(column, canary):
    row = write(sealed(meta=BACKOFF_OF_CANARY))
    put(row, column, "x'ff'")
    good = schedule(jobs.leave, priority=-100)

    flush(threads=1)

    assert (status_of(row), status_of(good)) == (Status.FAILED, Status.SUCCESSFUL)
    assert exceptions_of(row) == ["CorruptArguments"]
    assert canary not in sys.modules


@takes_any_type
@pytest.mark.parametrize("column", ODD)
def test_a_row_that_holds_another_type_does_not_stop_the_queue(column):
    row = write(sealed())
    good = schedule(jobs.leave, priority=-100)
    try:
        put(row, column, ODD[column])
    except IntegrityError:
        return  # the table defends itself

    flush(threads=1)

    assert status_of(good) == Status.SUCCESSFUL
    assert status_of(row) in (Status.FAILED, Status.SUCCESSFUL)


def test_a_row_that_its_function_does_not_take_is_tried_again():
    """Another process may have the code to which its arguments belong."""
    row = write(sealed("tests.jobs.add", args="[1,2,3]"))

    flush()

    row.refresh_from_db()
    assert (row.status, row.failures) == (Status.WAITING, 1)
    assert exceptions_of(row) == ["TypeError"]


def test_huge_arguments_under_a_true_seal_are_no_reason_to_fail():
    row = write(sealed(args='["' + "x" * 2_000_000 + '"]'))

    flush()

    row.refresh_from_db()
    assert row.status == Status.SUCCESSFUL


def test_a_key_that_is_not_here_yet_puts_the_job_off_uncharged(settings):
    old, settings.SECRET_KEY = settings.SECRET_KEY, "new"
    row = schedule(jobs.leave)
    settings.SECRET_KEY = old

    flush()

    row.refresh_from_db()
    assert (row.status, row.failures) == (Status.WAITING, 0)
    assert row.run_after > now()
    assert exceptions_of(row) == [UnknownSealKey.__name__]

    settings.SECRET_KEY_FALLBACKS = ["new"]
    make_due(row)
    flush()

    row.refresh_from_db()
    assert (row.status, row.failures) == (Status.SUCCESSFUL, 0)
    assert Effect.objects.count() == 1


def test_jobs_sealed_before_a_change_of_keys_run_after_it(settings):
    rows = [*schedule_many([(jobs.leave,)] * 3), JobFactory()]
    old, settings.SECRET_KEY = settings.SECRET_KEY, "new"
    settings.SECRET_KEY_FALLBACKS = [old]

    flush()

    assert Job.objects.filter(status=Status.SUCCESSFUL).count() == len(rows)
