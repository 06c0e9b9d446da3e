from datetime import timedelta
from itertools import pairwise

import pytest
from django.core.exceptions import ObjectDoesNotExist

from async_queue import Retry, Snooze
from async_queue.exceptions import CorruptArguments, InvalidFunction, InvalidOption
from async_queue.retries import (
    NAMED,
    Policy,
    backoff,
    checked_meta,
    class_path,
    deferral,
    is_named,
    policy,
)
from tests import jobs
from tests.models import Effect

SECOND, MINUTE, HOUR = (
    timedelta(**{unit: 1}) for unit in ("seconds", "minutes", "hours")
)


@pytest.mark.parametrize(
    ("failures", "longest"),
    [
        (1, 5 * SECOND),
        (2, 10 * SECOND),
        (5, 80 * SECOND),
        (10, 2560 * SECOND),
        (11, HOUR),
        (10**9, HOUR),
    ],
)
def test_exponential_waits_at_random_between_a_second_and_its_bound(failures, longest):
    waits = [backoff("exponential")(failures) for _ in range(500)]

    assert min(waits) >= SECOND
    assert longest * 0.9 < max(waits) <= longest
    assert min(waits) < longest * 0.3


@pytest.mark.parametrize(
    ("name", "failures", "wait"),
    [
        ("linear", 1, MINUTE),
        ("linear", 59, 59 * MINUTE),
        ("linear", 61, HOUR),
        ("linear", 2**31, HOUR),
        ("constant", 1, MINUTE),
        ("constant", 2**31, MINUTE),
        ("ancestor", 1, 60 * SECOND),
        ("ancestor", 2, timedelta(seconds=60 * 2**1.6)),
        ("ancestor", 10, timedelta(seconds=60 * 10**1.6)),
        ("tests.jobs.backoff_of_a_minute_each", 3, 3 * MINUTE),
    ],
)
def test_backoff_waits_as_its_name_says(name, failures, wait):
    assert backoff(name)(failures) == wait


@pytest.mark.parametrize("name", NAMED)
def test_named_backoffs_stand_any_number_of_failures(name):
    assert timedelta(0) < backoff(name)(2**31) < timedelta(days=36_500)


def test_backoff_that_does_not_exist_is_told_with_the_names():
    with pytest.raises(InvalidOption, match="exponential, linear, constant, ancestor"):
        backoff("tests.jobs.missing")


def test_backoff_that_returns_no_timedelta_is_told():
    with pytest.raises(InvalidOption, match="returned 3: return a timedelta"):
        backoff("builtins.abs")(3)


def test_deferral_grows_to_a_quarter_of_an_hour():
    waits = [deferral(deferrals) for deferrals in range(100)]

    assert waits[:3] == [5 * SECOND, 10 * SECOND, 20 * SECOND]
    assert all(sooner <= later for sooner, later in pairwise(waits))
    assert waits[-1] == 15 * MINUTE


def test_policy_is_the_settings_where_nothing_is_said():
    assert policy() == Policy(5, "exponential")


def test_policy_takes_what_is_said_last(settings):
    settings.ASYNC_QUEUE = {"MAX_ATTEMPTS": 7, "BACKOFF": "linear"}

    merged = policy({"max_attempts": 2, "retry_on": ["E"]}, {"max_attempts": None})

    assert merged == Policy(None, "linear", retry_on=["E"])


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("max_attempts", "3"),
        ("backoff", None),
        ("discard_on", "ValueError"),
        ("retry_on", 5),
        ("expires_after", 5),
    ],
)
def test_policy_refuses_what_no_version_wrote(key, value):
    with pytest.raises(CorruptArguments, match=f"meta\\['{key}'\\]"):
        policy({key: value})


def test_policy_leaves_a_key_to_the_newer_version_that_knows_it():
    assert policy({"unheard_of": 1}) == policy()


@pytest.mark.parametrize(
    ("meta", "stored"),
    [
        ({}, {}),
        ({"max_attempts": None}, {"max_attempts": None}),
        ({"backoff": "ancestor"}, {"backoff": "ancestor"}),
        (
            {"backoff": jobs.backoff_of_a_minute_each},
            {"backoff": "tests.jobs.backoff_of_a_minute_each"},
        ),
        ({"discard_on": ValueError}, {"discard_on": ["ValueError"]}),
        (
            {"retry_on": ("a.B", Effect.DoesNotExist)},
            {"retry_on": ["a.B", "tests.models.Effect.DoesNotExist"]},
        ),
        ({"expires_after": "2m"}, {"expires_after": 2 * MINUTE}),
        ({"expires_after": 60}, {"expires_after": MINUTE}),
        ({"expires_after": None}, {"expires_after": None}),
    ],
    ids=str,
)
def test_checked_meta_is_what_can_be_stored(meta, stored):
    assert checked_meta(meta) == stored


def test_checked_meta_refuses_an_unknown_key_and_lists_the_known():
    with pytest.raises(InvalidOption) as refusal:
        checked_meta({"max_atempts": 3})

    assert str(refusal.value) == (
        "meta has no key 'max_atempts'; its keys are "
        "max_attempts, backoff, discard_on, retry_on, expires_after, timeout, "
        "atomic."
    )


@pytest.mark.parametrize(
    ("key", "value", "remedy"),
    [
        ("max_attempts", 0, "must be a whole number of at least 1, or None"),
        ("max_attempts", "3", "must be a whole number of at least 1, or None"),
        ("max_attempts", 1.5, "must be a whole number of at least 1, or None"),
        ("max_attempts", True, "must be a whole number of at least 1, or None"),
        ("backoff", "exponentail", "is none of exponential, linear, constant"),
        ("backoff", lambda failures: MINUTE, "define it at the top of a module"),
        ("backoff", 30, "is none of exponential, linear, constant, ancestor"),
        ("backoff", [], "is none of exponential, linear, constant, ancestor"),
        ("discard_on", 3, "must be exception classes or their dotted paths"),
        ("retry_on", [3], "must be exception classes or their dotted paths"),
        ("retry_on", ValueError(), "must be exception classes or their dotted paths"),
        ("expires_after", "soon", "must be seconds, a timedelta or text"),
        ("expires_after", -1, "must not be negative"),
        ("expires_after", float("inf"), "must not be longer"),
        ("expires_after", float("nan"), "is nan"),
    ],
    ids=str,
)
def test_checked_meta_names_the_key_and_the_remedy(key, value, remedy):
    with pytest.raises(InvalidOption) as refusal:
        checked_meta({key: value}, "@job of a.b")

    assert str(refusal.value).startswith(f"@job of a.b[{key!r}] ")
    assert remedy in str(refusal.value)


class Outer:
    class Inner(KeyError): ...


@pytest.mark.parametrize(
    ("error", "name"),
    [
        (ValueError(), "ValueError"),
        (ValueError(), "builtins.ValueError"),
        (ValueError(), "Exception"),
        (Outer.Inner(), "tests.test_retries.Outer.Inner"),
        (Outer.Inner(), "LookupError"),
        (Effect.DoesNotExist(), class_path(ObjectDoesNotExist)),
        (Retry(), "async_queue.exceptions.Retry"),
        (SystemExit(), "BaseException"),
    ],
)
def test_is_named_knows_a_class_by_its_path_and_its_bases(error, name):
    assert is_named(error, ["a.B", name])


@pytest.mark.parametrize("name", ["KeyError", "valueerror", "tests.ValueError", ""])
def test_is_named_tells_other_names_apart(name):
    assert not is_named(ValueError(), [name])


def test_is_named_imports_nothing():
    assert not is_named(ValueError(), ["missing_package.Error"])


def test_checked_meta_says_what_is_wrong_with_the_function():
    with pytest.raises(InvalidOption) as refusal:
        checked_meta({"backoff": "tests.jobs.missing"})

    assert isinstance(refusal.value.__cause__.__cause__, InvalidFunction)


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (lambda: Snooze(-1), ValueError),
        (lambda: Snooze(-SECOND), ValueError),
        (lambda: Snooze("5m"), TypeError),
        (lambda: Retry(delay=-1), ValueError),
        (lambda: Retry(delay="5m"), TypeError),
    ],
)
def test_wrong_delay_is_refused_where_it_is_given(make, error):
    with pytest.raises(error, match=r"^delay is "):
        make()
