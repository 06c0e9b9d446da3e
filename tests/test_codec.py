import json
import math
import uuid
from contextlib import suppress
from datetime import UTC, date, datetime, time, timedelta, timezone
from decimal import Decimal
from zoneinfo import ZoneInfo

import pytest
from django.db import models
from django.utils.translation import gettext_lazy
from hypothesis import HealthCheck, example, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from async_queue import codec, schedule
from async_queue.exceptions import (
    CorruptArguments,
    InvalidArguments,
    SealBroken,
    UnknownSealKey,
)
from async_queue.models import Job
from tests.factories import JobFactory
from tests.models import Effect

ROW = ("tests.jobs.leave", '["a"]', '{"b":1}', "{}")
LARGEST = 10**4300 - 1


class Colour(models.TextChoices):
    RED = "red", "Red"


class Size(models.IntegerChoices):
    LARGE = 3, "Large"


class Ratio(float): ...


class Named(str):
    def __str__(self) -> str:
        return "something else"


# A high surrogate before a low one would be read back as the character of both.
TEXTS = st.text(
    st.characters(exclude_characters="\0", categories=None, codec=None)
).filter(lambda text: not any("\ud800" <= char <= "\udbff" for char in text))
# Python itself misreads offsets of less than a second.
OFFSETS = st.integers(-86_399, 86_399).map(lambda s: timezone(timedelta(seconds=s)))
LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(-LARGEST, LARGEST),
    st.floats(allow_nan=False, allow_infinity=False),
    TEXTS,
    st.datetimes(),
    st.datetimes(timezones=OFFSETS),
    st.dates(),
    st.times(),
    st.times(timezones=OFFSETS),
    st.timedeltas(),
    st.decimals(allow_nan=False),
    st.uuids(),
)
KEYS = st.one_of(TEXTS, st.sampled_from([*codec._UNTAG, "$", "$other"]))
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=10,
)
EXAMPLES = {
    "large float": 1e16,
    "small float": 5e-324,
    "negative zero": -0.0,
    "longest number": LARGEST,
    "longest negative number": -LARGEST,
    "astral text": "\U0001f600 \U0010ffff",
    "lone surrogates": "\ud800 \udfff",
    "line separators": "\u2028\u2029\r\n\\\"'",
    "aware datetime": datetime(2026, 3, 29, 2, 30, 0, 1, timezone(timedelta(hours=5))),
    "datetime of a zone": datetime(2026, 7, 1, tzinfo=ZoneInfo("Europe/Paris")),
    "naive datetime": datetime(1, 1, 1, 0, 0, 0, 1),
    "last datetime": datetime.max,
    "date": date.max,
    "time": time.max,
    "aware time": time(1, 2, 3, 4, tzinfo=UTC),
    "longest timedelta": timedelta.max,
    "shortest timedelta": timedelta.min,
    "negative timedelta": timedelta(microseconds=-1),
    "decimal": Decimal("-0.1000"),
    "large decimal": Decimal("1E+999999"),
    "infinite decimal": Decimal("-Infinity"),
    "uuid": uuid.UUID(int=2**128 - 1),
    "tagged date": {"$date": "x"},
    "tagged dict": {"$dict": {}},
    "tagged twice": {"$dict": {"$dict": {"$uuid": 1}}},
    "unknown tag": {"$": [{"$set": []}]},
    "tag among others": {"$date": "x", "other": 1},
    "empty": [{}, [], "", {"": ""}],
    "wide": list(range(5000)),
}


def exactly(value):
    """Return what tells apart also what is equal: 1, 1.0, True, -0.0, other offsets."""
    if isinstance(value, list):
        return [exactly(item) for item in value]
    if isinstance(value, dict):
        return [(key, exactly(item)) for key, item in value.items()]
    if isinstance(value, datetime | time):
        return (type(value), value.isoformat())
    return (type(value), repr(value) if isinstance(value, float) else value)


def nested(levels):
    value = []
    for _ in range(levels - 1):
        value = [value]
    return value


@given(VALUES)
@example(list(EXAMPLES.values()))
@hypothesis_settings(suppress_health_check=list(HealthCheck), deadline=None)
def test_decode_returns_exactly_what_was_encoded(value):
    text = codec.encode(value, "args")

    assert text.isascii()
    assert exactly(codec.decode(text)) == exactly(value)


def test_encode_keeps_a_decimal_that_is_no_number():
    """Its text is exact, unlike a float's, which JSON has no word for."""
    kept = codec.decode(codec.encode([Decimal("NaN"), Decimal("-sNaN12")], "args"))

    assert [str(number) for number in kept] == ["NaN", "-sNaN12"]


@pytest.mark.parametrize(
    ("value", "stored"),
    [
        ((1, (2,)), [1, [2]]),
        (Colour.RED, "red"),
        (Size.LARGE, 3),
        (Ratio(0.5), 0.5),
        (Named("true self"), "true self"),
        ({Colour.RED: Size.LARGE}, {"red": 3}),
        (True, True),
    ],
)
def test_encode_makes_the_plain_value_of_its_kin(value, stored):
    found = codec.decode(codec.encode(value, "args"))

    assert exactly(found) == exactly(stored)


@pytest.mark.parametrize(
    ("value", "place", "remedy"),
    [
        ([1, Effect(pk=3)], "args[1] is of type Effect", "pass its primary key"),
        ([Effect.objects.all()], "args[0] is of type", "pass a list of primary keys"),
        ([{"tags": {"a"}}], "args[0]['tags'] is of type set", "pass a sorted list"),
        ([frozenset()], "args[0] is of type frozenset", "pass a sorted list"),
        ([b"x"], "args[0] is of type bytes", "base64"),
        ([bytearray()], "args[0] is of type bytearray", "base64"),
        ([gettext_lazy("x")], "args[0] is of type", "pass str(...) of it"),
        ([object()], "args[0] is of type object", "pass str, int, float"),
        ([math.nan], "args[0] is nan", "pass None or text"),
        ([{"x": [math.inf]}], "args[0]['x'][0] is inf", "pass None or text"),
        ([Ratio("-inf")], "args[0] is -inf", "pass None or text"),
        (["a\0b"], "args[0] contains a NUL", "remove it"),
        ([{"a\0b": 1}], "args[0] contains a NUL", "remove it"),
        ([{1: "x"}], "args[0] has the key 1 of type int", "keys must be str"),
        ([{None: "x"}], "args[0] has the key None", "keys must be str"),
        ([LARGEST + 1], "args[0] has more than 4,300 digits", "pass it as text"),
        ([-LARGEST - 1], "args[0] has more than 4,300 digits", "pass it as text"),
        (["x" * codec.MAX_BYTES], "args has 262,148 bytes", "store it elsewhere"),
        (nested(65), "args" + "[0]" * 64 + " is nested deeper than 64", "flatten it"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
def test_encode_refuses_what_is_not_json_with_its_place_and_remedy(
    value, place, remedy
):
    with pytest.raises(InvalidArguments) as refusal:
        codec.encode(value, "args")

    assert str(refusal.value).startswith(place)
    assert remedy in str(refusal.value)


def test_encode_refuses_a_value_that_contains_itself():
    value = []
    value.append(value)

    with pytest.raises(InvalidArguments, match="nested deeper"):
        codec.encode(value, "args")


def test_encode_takes_the_deepest_and_the_largest_that_fit():
    deepest, largest = nested(64), "x" * (codec.MAX_BYTES - 2)

    assert codec.decode(codec.encode(deepest, "args")) == deepest
    assert codec.decode(codec.encode(largest, "args")) == largest


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner) | st.dictionaries(KEYS, inner, max_size=2),
    max_leaves=5,
)


@given(st.sampled_from([*codec._UNTAG]), JSON)
@example("$uuid", 5)
@example("$dict", 5)
@example("$timedelta", 10**30)
@example("$decimal", "x")
def test_decode_reads_a_tagged_value_or_calls_it_corrupt(tag, value):
    text = json.dumps({tag: value})

    with suppress(CorruptArguments):
        codec.decode(text)


@pytest.mark.parametrize(
    "text", ["", "[", "nothing", "[1,]", "[" * 100_000, "1" * 5000, "\ufeff[]"]
)
def test_decode_calls_what_is_not_json_corrupt(text):
    with pytest.raises(CorruptArguments, match="cannot read"):
        codec.decode(text)


def test_decode_imports_nothing_for_an_unknown_tag():
    assert codec.decode('{"$module":"antigravity"}') == {"$module": "antigravity"}


@pytest.mark.parametrize("changed", range(4))
def test_verify_refuses_a_change_of_each_field(changed):
    seal = codec.seal(*ROW)
    tampered = [text + " " * (place == changed) for place, text in enumerate(ROW)]

    codec.verify(seal, *ROW)
    with pytest.raises(SealBroken, match="changed after schedule"):
        codec.verify(seal, *tampered)


def test_verify_refuses_text_that_moved_from_one_field_to_the_next():
    seal = codec.seal("f", "[12]", "{}", "{}")

    with pytest.raises(SealBroken):
        codec.verify(seal, "f", "[12]{", "}", "{}")


@pytest.mark.parametrize(
    "broken", [str.upper, lambda seal: seal[:-1], lambda seal: seal[:-1] + "é"]
)
def test_verify_refuses_a_seal_that_was_changed(broken):
    with pytest.raises((SealBroken, UnknownSealKey)):
        codec.verify(broken(codec.seal(*ROW)), *ROW)


@pytest.mark.parametrize("seal", ["", "v1", "v1:", "v1:abc", "v1:abc:", "v2:a:b"])
def test_verify_refuses_what_is_no_seal(seal):
    with pytest.raises(SealBroken, match=r"schedule\(\) it"):
        codec.verify(seal, *ROW)


def test_verify_takes_seals_of_an_older_key(settings):
    seal = codec.seal(*ROW)

    settings.SECRET_KEY, settings.SECRET_KEY_FALLBACKS = "new", [settings.SECRET_KEY]

    codec.verify(seal, *ROW)
    assert codec.seal(*ROW) != seal


def test_verify_tells_an_unknown_key_from_a_broken_seal(settings):
    seal = codec.seal(*ROW)

    settings.SECRET_KEY = "another"

    with pytest.raises(UnknownSealKey, match="SECRET_KEY_FALLBACKS"):
        codec.verify(seal, *ROW)


@pytest.mark.parametrize("keys", ["new", ["new", "old"]], ids=["str", "list"])
def test_seal_key_stands_in_for_the_secret_key(keys, settings):
    settings.ASYNC_QUEUE = {"SEAL_KEY": "new"}
    seal = codec.seal(*ROW)

    settings.ASYNC_QUEUE, settings.SECRET_KEY = {"SEAL_KEY": keys}, "another"

    codec.verify(seal, *ROW)
    assert codec.seal(*ROW) == seal


def test_seal_key_verifies_by_all_and_seals_by_the_first(settings):
    settings.ASYNC_QUEUE = {"SEAL_KEY": "old"}
    seal = codec.seal(*ROW)

    settings.ASYNC_QUEUE = {"SEAL_KEY": ["new", "old"]}

    codec.verify(seal, *ROW)
    assert codec.seal(*ROW) != seal


def test_seal_key_alone_does_not_verify_seals_of_the_secret_key(settings):
    seal = codec.seal(*ROW)

    settings.ASYNC_QUEUE = {"SEAL_KEY": "new"}

    with pytest.raises(UnknownSealKey):
        codec.verify(seal, *ROW)


def test_secret_keys_may_be_bytes(settings):
    settings.SECRET_KEY = b"\xff\x00"

    codec.verify(codec.seal(*ROW), *ROW)


def test_identity_is_the_calls_and_not_the_options():
    assert codec.identity("f", "[]", "{}") == codec.identity("f", "[]", "{}")
    assert codec.identity("f", "[]", "{}") != codec.identity("f", "[]{", "}")
    assert len(codec.identity("f" * 255, "[]", "{}")) == 64


def stored(job):
    """Return the sealed columns as the database gives them back."""
    return Job.objects.values_list("seal", "function", "args", "kwargs", "meta").get(
        pk=job.pk
    )


@pytest.mark.django_db
@pytest.mark.parametrize("name", EXAMPLES)
def test_seal_and_value_survive_storing(name):
    value = EXAMPLES[name]

    job = schedule("tests.jobs.take", [value], {"value": value})
    row = stored(job)

    codec.verify(*row)
    assert exactly(codec.decode(row[2])) == exactly([value])
    assert exactly(codec.decode(row[3])) == exactly({"value": value})


@pytest.mark.django_db
@given(VALUES)
@hypothesis_settings(
    max_examples=50, suppress_health_check=list(HealthCheck), deadline=None
)
def test_seal_and_any_value_survive_storing(value):
    row = stored(schedule("tests.jobs.take", [value]))

    codec.verify(*row)
    assert exactly(codec.decode(row[2])) == exactly([value])


@pytest.mark.django_db
def test_seal_survives_storing_with_the_largest_arguments():
    largest = "\U0001f600" * ((codec.MAX_BYTES - 10) // 12)

    codec.verify(*stored(schedule("tests.jobs.take", [largest])))


@pytest.mark.django_db
def test_factories_rows_carry_a_true_seal():
    codec.verify(*stored(JobFactory()))
