"""The one setting: what it accepts, what it becomes, and what it says of mistakes."""

from dataclasses import FrozenInstanceError, fields
from datetime import timedelta

import pytest
from django.core.exceptions import ImproperlyConfigured
from django.test import override_settings

from async_queue import conf


def problem(raw) -> conf.Problem:
    (only,) = conf.problems(raw)
    return only


@pytest.mark.parametrize(
    ("value", "duration"),
    [
        (0, timedelta(0)),
        (30, timedelta(seconds=30)),
        (0.5, timedelta(milliseconds=500)),
        (timedelta(hours=2), timedelta(hours=2)),
        ("90s", timedelta(seconds=90)),
        ("5m", timedelta(minutes=5)),
        ("6h", timedelta(hours=6)),
        ("7d", timedelta(days=7)),
        ("2w", timedelta(weeks=2)),
    ],
)
def test_duration_is_seconds_a_timedelta_or_text(value, duration):
    assert conf.parse_duration(value) == duration


@pytest.mark.parametrize(
    "value",
    [
        None,
        True,
        "",
        "7",
        "d",
        "7 d",
        "7y",
        "-7d",
        "1.5h",
        -1,
        timedelta(-1),
        [7],
        1e300,
        "9999999999w",
    ],
)
def test_duration_refuses_anything_else(value):
    with pytest.raises(ValueError, match="must"):
        conf.parse_duration(value)


def test_project_without_the_setting_has_the_defaults(settings):
    del settings.ASYNC_QUEUE

    assert conf.settings() == conf.Settings()
    assert conf.settings().threads == 4
    assert conf.settings().max_attempts == 5
    assert conf.changed_settings() == set()


def test_each_default_is_a_value_that_its_setting_accepts():
    defaults = {
        field.name.upper(): field.metadata["default"] for field in fields(conf.Settings)
    }

    assert list(conf.problems(defaults)) == []


def test_given_values_replace_defaults(settings):
    settings.ASYNC_QUEUE = {"THREADS": 9, "TIMEOUT": "5m", "REDACT": ["pin"]}

    assert conf.settings().threads == 9
    assert conf.settings().timeout == timedelta(minutes=5)
    assert conf.settings().redact == ("pin",)
    assert conf.changed_settings() == {"THREADS", "TIMEOUT", "REDACT"}


def test_dicts_are_merged_with_their_defaults(settings):
    settings.ASYNC_QUEUE = {
        "RETENTION": {"failed": None},
        "HEALTH": {"MAX_LATENCY": "1m"},
    }

    week = timedelta(days=7)
    assert conf.settings().retention == {
        "successful": week,
        "cancelled": week,
        "failed": None,
    }
    assert conf.settings().health == {
        "MAX_LATENCY": timedelta(minutes=1),
        "TOKEN": None,
    }


@pytest.mark.parametrize(
    ("given", "keys"),
    [(None, ()), ("new", ("new",)), (["new", "old"], ("new", "old"))],
)
def test_seal_key_is_one_or_several(settings, given, keys):
    settings.ASYNC_QUEUE = {"SEAL_KEY": given}

    assert conf.settings().seal_key == keys


def test_settings_are_read_once_until_they_change(settings):
    first = conf.settings()
    assert conf.settings() is first

    with override_settings(ASYNC_QUEUE={"THREADS": 2}):
        assert conf.settings().threads == 2

    assert conf.settings().threads == first.threads


def test_other_settings_leave_what_was_read(settings):
    first = conf.settings()

    settings.USE_TZ = not settings.USE_TZ

    assert conf.settings() is first


def test_settings_cannot_be_changed():
    with pytest.raises(FrozenInstanceError):
        conf.settings().threads = 1


@pytest.mark.parametrize("raw", [None, [], "x", 1, {1, 2}])
def test_what_is_no_dict_is_a_problem(raw):
    assert problem(raw) == (
        None,
        "ASYNC_QUEUE is not a dict.",
        "Write ASYNC_QUEUE = {...}.",
    )


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("THREAD", "Did you mean 'THREADS'?"),
        ("max_attempts", "Did you mean 'MAX_ATTEMPTS'?"),
        ("QQQ", "The settings are DATABASE, THREADS,"),
        (7, "The settings are"),
    ],
)
def test_unknown_key_is_a_problem_with_a_suggestion(key, hint):
    found = problem({key: 1})

    assert f"{key!r}" in found.message
    assert found.hint.startswith(hint)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("DATABASE", ""),
        ("DATABASE", None),
        ("THREADS", 0),
        ("THREADS", "4"),
        ("THREADS", True),
        ("THREADS", 1.5),
        ("PROCESSES", -1),
        ("NOTIFY", 1),
        ("POLL_INTERVAL", None),
        ("POLL_INTERVAL", 0),
        ("STALL_AFTER", 0),
        ("STALL_AFTER", "soon"),
        ("SHUTDOWN_TIMEOUT", float("nan")),
        ("SHUTDOWN_TIMEOUT", float("inf")),
        ("TIMEOUT", -1),
        ("TIMEOUT", 0),
        ("BACKOFF", 5),
        ("RETENTION", "7d"),
        ("RETENTION", {"failed": "never"}),
        ("RETENTION", {"faled": "7d"}),
        ("RETENTION", {"faled": "7d", 1: 2}),
        ("SCHEDULES", []),
        ("SEAL_KEY", ""),
        ("SEAL_KEY", [b"bytes"]),
        ("SEAL_KEY", {"a", "b"}),
        ("UNSEALED", "shop.jobs.pay"),
        ("REDACT", [None]),
        ("HEALTH", {"TOKEN": 7}),
        ("EMAIL", None),
    ],
)
def test_wrong_value_is_a_problem_that_tells_the_default(key, value):
    found = problem({key: value})

    assert found.key == key
    assert found.message.startswith(f"ASYNC_QUEUE[{key!r}] ")
    assert found.hint.startswith("The default is ")


@pytest.mark.parametrize("raw", [{"SEAL_KEY": b"s3cret"}, {"HEALTH": "s3cret"}])
def test_problem_with_a_secret_does_not_repeat_it(raw):
    assert "s3cret" not in problem(raw).message


def test_all_problems_are_listed():
    raw = {"THREAD": 1, "THREADS": 0, "NOTIFY": True, "REDACT": 1}

    assert [found.key for found in conf.problems(raw)] == [
        "THREAD",
        "THREADS",
        "REDACT",
    ]


def test_wrong_setting_is_an_error_where_it_is_needed_first(settings):
    settings.ASYNC_QUEUE = {"THREAD": 1}

    with pytest.raises(ImproperlyConfigured, match="Did you mean 'THREADS'"):
        conf.settings()


@pytest.mark.parametrize(
    ("raw", "is_fit"),
    [
        ({"POLL_INTERVAL": 10}, True),
        ({"POLL_INTERVAL": 10.5}, False),
        ({"STALL_AFTER": 3}, True),
        ({"STALL_AFTER": 2}, False),
        ({"STALL_AFTER": 2, "POLL_INTERVAL": 0.5}, True),
    ],
)
def test_a_worker_may_miss_a_beat_before_it_has_stalled(raw, is_fit):
    found = [problem.key for problem in conf.problems(raw)]

    assert found == ([] if is_fit else ["STALL_AFTER"])
