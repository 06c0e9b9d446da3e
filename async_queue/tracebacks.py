"""An exception as text that fits into a row, whatever the exception does."""

import traceback
from typing import NamedTuple

MAX_MESSAGE = 16 * 1024
MAX_TRACEBACK = 64 * 1024
MAX_CLASS = 255


class ErrorText(NamedTuple):
    """An exception's class path, message and traceback; bounded, storable text."""

    exception: str
    message: str
    traceback: str


def describe(error: BaseException, *, in_ascii: bool = False) -> ErrorText:
    """Return ``error`` as text. Never raises: the record of a failure must not fail.

    ``in_ascii`` is for a database whose encoding lacks what stands in the text.
    """
    kind = type(error)
    path = f"{kind.__module__}.{kind.__qualname__}"
    texts = [path, _message(error), _traceback(error)]
    if in_ascii:
        texts = [text.encode("ascii", "backslashreplace").decode() for text in texts]
    return ErrorText(*map(storable, texts, (MAX_CLASS, MAX_MESSAGE, MAX_TRACEBACK)))


def storable(text: str, size: int) -> str:
    """Return ``text`` as databases take it, its middle cut to ``size`` bytes."""
    encoded = text.replace("\0", "\\0").encode(errors="backslashreplace")
    if len(encoded) <= size:
        return encoded.decode()
    cut = b"\n[...]\n"
    half = (size - len(cut)) // 2
    kept = encoded[:half] + cut + encoded[-half:]
    return kept.decode(errors="ignore")


def _message(error: BaseException) -> str:
    try:
        return str(error)
    except BaseException as broken:  # a __str__ of somebody's may do anything
        return f"(its __str__ raised {type(broken).__name__})"


def _traceback(error: BaseException) -> str:
    try:
        return "".join(traceback.format_exception(error))
    except BaseException as broken:  # the chain may hold others whose __str__ raises
        frames = "".join(traceback.format_tb(error.__traceback__))
        return f"{frames}(its message raised {type(broken).__name__})"
