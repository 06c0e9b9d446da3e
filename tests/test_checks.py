"""The system checks, each by its id."""

import ast
from dataclasses import fields
from io import StringIO
from pathlib import Path

import pytest
from django.contrib.auth.models import User
from django.core.checks import run_checks
from django.core.management import call_command
from django.db import connection, connections
from django.db.utils import load_backend

import async_queue
from async_queue.checks import WITHOUT_EFFECT
from async_queue.conf import Settings
from async_queue.db import vendor
from async_queue.db.sqlite import SQLite
from tests import jobs

POSTGRESQL = "django.db.backends.postgresql"
SQLITE = "django.db.backends.sqlite3"

has_server = pytest.mark.skipif(
    not connection.features.test_db_allows_multiple_connections,
    reason="the database has no server",
)

# Django's own checks of fields ask some databases.
pytestmark = pytest.mark.django_db


class Router:
    """Sends the models, or apps, with these labels to one database."""

    def __init__(self, home: str, *labels: str) -> None:
        self.home, self.labels = home, set(labels)

    def db_for_write(self, model, **hints):
        names = {model._meta.label, model._meta.app_label}
        return self.home if names & self.labels else None


class KeepOut:
    """Keeps the table of jobs out of every database."""

    def allow_migrate(self, db, app_label, model_name=None, **hints):
        return model_name != "job"


def found(*databases: str):
    messages = run_checks(databases=databases or None)
    return [message for message in messages if message.id.startswith("async_queue.")]


def ids(*databases: str) -> list[str]:
    return [message.id.removeprefix("async_queue.") for message in found(*databases)]


def only(identity: str, *databases: str) -> str:
    """Return the text of the only message, which has this id and a hint."""
    (message,) = found(*databases)
    assert message.id == f"async_queue.{identity}"
    assert message.hint
    return message.msg


@pytest.fixture
def default_is(db):
    """Put a database like the tests', with changes, in the place of the default one."""
    shared = connections["default"]

    def replace(**changes) -> None:
        changed = {**shared.settings_dict, **changes}
        backend = load_backend(changed["ENGINE"])
        connections["default"] = backend.DatabaseWrapper(changed, "default")

    yield replace
    if connections["default"] is not shared:
        connections["default"].close()
        connections["default"] = shared


@pytest.fixture
def jobs_database(monkeypatch, settings):
    """Keep the jobs in a second database, which the settings alone know."""
    # Of SQLite, which Django's own checks do not ask.
    other = {"ENGINE": "django.db.backends.sqlite3", "NAME": "jobs.db", "OPTIONS": {}}
    unused = connection.settings_dict | other
    monkeypatch.setitem(connections.databases, "jobs", unused)
    settings.ASYNC_QUEUE = {"DATABASE": "jobs"}
    yield
    connections["jobs"].close()
    del connections["jobs"]


def test_project_that_sets_nothing_is_told_nothing(settings):
    del settings.ASYNC_QUEUE
    output = StringIO()

    call_command("check", databases=["default"], stdout=output, stderr=output)

    assert found("default") == []
    assert "async_queue" not in output.getvalue()


def test_e001_setting_is_no_dict(settings):
    settings.ASYNC_QUEUE = [("THREADS", 4)]

    assert "not a dict" in only("E001")


def test_e002_unknown_key(settings):
    settings.ASYNC_QUEUE = {"THREAD": 4}

    assert "'THREAD'" in only("E002")
    assert found()[0].hint == "Did you mean 'THREADS'?"


def test_e003_wrong_value(settings):
    settings.ASYNC_QUEUE = {"THREADS": 0}

    assert "'THREADS'" in only("E003")


def test_all_wrong_values_are_told_at_once(settings):
    settings.ASYNC_QUEUE = {"THREAD": 4, "THREADS": 0, "REDACT": 1, "BACKOFF": "none"}

    assert ids("default") == ["E002", "E003", "E003"]


def test_e004_unknown_database(settings):
    settings.ASYNC_QUEUE = {"DATABASE": "defautl"}

    assert "'defautl'" in only("E004", "default")


def test_e005_unsupported_database(default_is):
    default_is(ENGINE="django.db.backends.dummy")

    assert "cannot keep jobs in unknown" in only("E005", "default")


@pytest.mark.parametrize(
    "name", ["exponentially", "shop.backoff", "tests.jobs.nothing", "tests.jobs.Shop"]
)
def test_e006_unknown_backoff(settings, name):
    settings.ASYNC_QUEUE = {"BACKOFF": name}

    assert name in only("E006")


@pytest.mark.parametrize("name", ["linear", "tests.jobs.add"])
def test_known_backoff_passes(settings, name):
    settings.ASYNC_QUEUE = {"BACKOFF": name}

    assert found() == []


@pytest.mark.parametrize("path", ["tests.jobs.missing", "send", "tests.jobs.leave"])
def test_e007_unsealed_path_is_no_function_with_job(settings, path):
    settings.ASYNC_QUEUE = {"UNSEALED": [path, "tests.jobs.send"]}

    assert path in only("E007")


def test_e008_router_keeps_a_table_out(settings):
    settings.DATABASE_ROUTERS = [KeepOut()]

    assert "async_queue.Job" in only("E008")


def test_e008_router_sends_a_table_elsewhere(settings, jobs_database):
    settings.ASYNC_QUEUE = {}
    settings.DATABASE_ROUTERS = [Router("jobs", "async_queue.Attempt")]

    assert "async_queue.Attempt is written to 'jobs'" in only("E008")


def test_e008_nothing_routes_the_tables_to_their_database(jobs_database):
    assert set(ids()) == {"E008", "W002"}


@pytest.mark.parametrize(
    "schedule",
    [
        "tests.jobs.leave",
        {},
        {"cron": "* * * * *"},
        {"function": "tests.jobs.missing"},
        {"job": "leave"},
        {"job": 7},
    ],
)
def test_e009_schedule_without_a_function_that_imports(settings, schedule):
    settings.ASYNC_QUEUE = {"SCHEDULES": {"nightly": schedule}}

    assert ids() == ["E009", "W001"]
    assert "'nightly'" in found()[0].msg


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("* * * *", "invalid"),
        ("61 * * * *", "invalid"),
        ("1--100000000 * * * *", "invalid"),
        ("", "invalid"),
        ("0 0 30 2 *", "invalid"),
        ("0 0 30 2 *#6", "invalid"),
        ("0 0 */31 2 1#5", "never fires"),
        (5, "no text"),
    ],
)
def test_e010_cron_line_that_never_fires(settings, line, reason):
    settings.ASYNC_QUEUE = {"SCHEDULES": {"a": {"function": jobs.leave, "cron": line}}}

    assert ids() == ["E010", "W001"]
    assert reason in found()[0].msg


@pytest.mark.parametrize("line", ["*/5 * * * *", "0 0 29 2 *", "0 9 L * *"])
def test_cron_line_that_fires_passes(settings, line):
    schedule = {"function": "tests.jobs.leave", "cron": line}
    settings.ASYNC_QUEUE = {"SCHEDULES": {"a": schedule}}

    assert ids() == ["W001"]


def test_e011_database_is_too_old(monkeypatch):
    monkeypatch.setattr(connection, "get_database_version", lambda: (3, 1))

    name, _ = vendor(connection).oldest(connection)
    assert f"{name} 3.1 is older than" in only("E011", "default")


@pytest.mark.parametrize("key", sorted(WITHOUT_EFFECT))
def test_w001_setting_without_effect(settings, key):
    default = Settings.__dataclass_fields__[key.lower()].metadata["default"]
    settings.ASYNC_QUEUE = {key: default}

    assert f"'{key}'" in only("W001")


def test_w001_token_without_effect(settings):
    settings.ASYNC_QUEUE = {"HEALTH": {"TOKEN": "s3cret", "MAX_LATENCY": 60}}

    message = only("W001")
    assert "'TOKEN'" in message
    assert "s3cret" not in message


def test_settings_without_effect_are_those_that_nothing_reads():
    package = Path(async_queue.__file__).parent
    read = {
        node.attr.upper()
        for path in package.rglob("*.py")
        if path.name != "checks.py"
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and _is_settings(node.value)
    }

    names = {field.name.upper() for field in fields(Settings)}
    assert names - read == WITHOUT_EFFECT


def test_w002_jobs_are_far_from_the_data(settings, jobs_database):
    settings.DATABASE_ROUTERS = [Router("jobs", "async_queue")]

    assert "'jobs'" in only("W002")


def test_jobs_beside_some_of_the_data_pass(settings, jobs_database):
    settings.DATABASE_ROUTERS = [Router("jobs", "async_queue", User._meta.label)]

    assert found() == []


@pytest.mark.parametrize(
    "pool", [True, {"max_size": 5}, {"min_size": 5}, {"min_size": 2, "max_size": None}]
)
def test_w003_pool_is_smaller_than_the_threads(default_is, pool):
    pytest.importorskip("psycopg_pool")
    default_is(ENGINE=POSTGRESQL, OPTIONS={"pool": pool})

    assert "4 job threads" in only("W003")


@pytest.mark.parametrize("pool", [None, False, {"max_size": 6}, {"min_size": 6}])
def test_large_pool_passes(default_is, pool):
    pytest.importorskip("psycopg_pool")
    default_is(ENGINE=POSTGRESQL, OPTIONS={"pool": pool})

    assert found() == []


def test_w004_several_processes_on_sqlite(settings, default_is, tmp_path):
    default_is(ENGINE=SQLITE, NAME=tmp_path / "db", OPTIONS={})
    settings.ASYNC_QUEUE = {"PROCESSES": 2}

    assert ids() == ["W004"]


def test_w004_several_processes_on_sqlite_and_windows(
    monkeypatch, settings, default_is, tmp_path
):
    monkeypatch.setattr("async_queue.db.sqlite.HAS_PROCESSES", False)
    default_is(ENGINE=SQLITE, NAME=tmp_path / "db", OPTIONS={})
    settings.ASYNC_QUEUE = {"PROCESSES": 2}

    assert "Windows" in found()[-1].msg


def test_w005_default_is_memory(default_is):
    default_is(ENGINE=SQLITE, NAME=":memory:", OPTIONS={})

    assert "in memory" in only("W005", "default")


def test_database_in_memory_of_a_test_run_passes(default_is):
    name = "file:memorydb_default?mode=memory&cache=shared"
    default_is(ENGINE=SQLITE, NAME=name, OPTIONS={})

    assert found() == []


def test_w006_project_takes_the_database_out_of_wal(default_is, tmp_path):
    init = {"init_command": "PRAGMA journal_mode = DELETE"}
    default_is(ENGINE=SQLITE, NAME=tmp_path / "db", OPTIONS=init)

    assert "WAL" in only("W006", "default")


@pytest.mark.parametrize(
    "options", [{}, {"init_command": "PRAGMA journal_mode=WAL; PRAGMA cache_size=9"}]
)
def test_database_that_workers_can_switch_to_wal_passes(default_is, tmp_path, options):
    default_is(ENGINE=SQLITE, NAME=tmp_path / "db", OPTIONS=options)

    assert found("default") == []


@pytest.mark.parametrize("kind", ["nfs4", "cifs", "ext4"])
def test_w007_sqlite_on_a_network(monkeypatch, default_is, tmp_path, kind):
    folder = tmp_path / "a folder"
    folder.mkdir()
    mounts = tmp_path / "mounts"
    written = str(folder.resolve()).replace(" ", "\\040")
    mounts.write_text(f"disk / nfs rw 0 0\nserver:/ {written} {kind} rw 0 0\n")
    monkeypatch.setattr(SQLite, "mounts", mounts)
    default_is(ENGINE=SQLITE, NAME=folder / "db", OPTIONS={})

    assert ids("default") == ([] if kind == "ext4" else ["W007"])


def test_sqlite_passes_where_mounts_are_not_told(monkeypatch, default_is, tmp_path):
    monkeypatch.setattr(SQLite, "mounts", tmp_path / "missing")
    default_is(ENGINE=SQLITE, NAME=tmp_path / "db", OPTIONS={})

    assert found("default") == []


@pytest.mark.skipif(
    connection.features.can_rollback_ddl, reason="only InnoDB locks gaps"
)
@pytest.mark.parametrize("level", ["repeatable read", "serializable"])
def test_w008_isolation_that_locks_gaps(default_is, level):
    options = {**connection.settings_dict["OPTIONS"], "isolation_level": level}
    default_is(OPTIONS=options)

    assert level.upper() in only("W008", "default")


@has_server
def test_w009_more_threads_than_the_server_has_connections(settings):
    settings.ASYNC_QUEUE = {"THREADS": 200_000}

    assert "200000 threads" in only("W009", "default")


def test_server_is_asked_only_if_its_database_is_checked(settings):
    settings.ASYNC_QUEUE = {"THREADS": 200_000}

    # Without the mark django_db a query would be an error.
    assert found() == []


def _is_settings(node: ast.expr) -> bool:
    """Whether this is ``settings`` or a call of it."""
    match node:
        case ast.Call(func=ast.Attribute(attr="settings") | ast.Name(id="settings")):
            return True
        case ast.Name(id="settings"):
            return True
    return False
