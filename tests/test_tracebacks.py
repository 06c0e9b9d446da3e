import pytest
from hypothesis import given
from hypothesis import strategies as st

from async_queue.tracebacks import (
    MAX_CLASS,
    MAX_MESSAGE,
    MAX_TRACEBACK,
    describe,
    storable,
)

ANY_TEXT = st.text(st.characters(categories=None, codec=None))


class SilentError(Exception):
    def __str__(self):
        raise ValueError("no text")


class OtherTypeError(Exception):
    def __str__(self):
        return 3


def raised(error, cause=None):
    try:
        raise error from cause
    except BaseException as caught:
        return caught


def assert_fits(text):
    limits = (MAX_CLASS, MAX_MESSAGE, MAX_TRACEBACK)
    for part, limit in zip(text, limits, strict=True):
        assert len(part.encode()) <= limit
        assert "\0" not in part


def test_describe_tells_class_message_and_where():
    text = describe(raised(ValueError("as intended")))

    assert text.exception == "builtins.ValueError"
    assert text.message == "as intended"
    assert text.traceback.startswith("Traceback (most recent call last):")
    assert text.traceback.endswith("ValueError: as intended\n")


def test_describe_tells_the_cause():
    text = describe(raised(ValueError("effect"), KeyError("cause")))

    assert "KeyError: 'cause'" in text.traceback


@given(ANY_TEXT)
def test_describe_fits_whatever_the_message(message):
    assert_fits(describe(raised(ValueError(message))))


@pytest.mark.parametrize("size", [MAX_MESSAGE, 10 * MAX_TRACEBACK])
@pytest.mark.parametrize("letter", ["x", "é", "\U0001f600", "\ud800", "\0"])
def test_describe_cuts_the_middle_of_what_is_too_long(letter, size):
    text = describe(raised(ValueError(f"begin {letter * size} end")))

    assert_fits(text)
    assert text.message.startswith("begin ")
    assert text.message.endswith(" end")
    assert "\n[...]\n" in text.message
    assert text.traceback.endswith(" end\n")


@pytest.mark.parametrize("silent", [SilentError(), OtherTypeError()])
def test_describe_survives_an_error_without_text(silent):
    text = describe(raised(silent))

    assert "__str__ raised" in text.message
    assert "in raised" in text.traceback


def test_describe_survives_an_error_without_text_in_the_chain():
    text = describe(raised(ValueError("as intended"), SilentError()))

    assert text.message == "as intended"
    assert "in raised" in text.traceback


def test_describe_survives_strange_notes():
    error = ValueError("as intended")
    error.__notes__ = SilentError()

    assert_fits(describe(raised(error)))


def test_describe_survives_the_end_of_the_stack():
    def descend():
        descend()

    with pytest.raises(RecursionError) as found:
        descend()

    assert_fits(describe(found.value))


def test_describe_survives_a_chain_that_is_long_or_ends_in_itself():
    first = last = ValueError(0)
    for number in range(2000):
        last.__context__ = last = ValueError(number)
    last.__context__ = first

    assert_fits(describe(first))


def test_describe_cuts_the_name_of_a_class():
    error = type("E" * 1000, (Exception,), {})

    assert_fits(describe(error()))


def test_describe_of_an_error_that_was_never_raised_has_no_frames():
    assert describe(ValueError("x")).traceback == "ValueError: x\n"


@given(ANY_TEXT, st.integers(20, 60))
def test_storable_keeps_what_fits(text, size):
    kept = storable(text, size)

    assert len(kept.encode()) <= size
    if text.isprintable() and len(text.encode()) <= size:
        assert kept == text
