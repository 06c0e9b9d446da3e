"""The text in a row: values as tagged JSON, and the seal over it.

Never pickle, and no tag that imports. The text is plain ASCII, so that no database's
encoding can change a byte of what was sealed.
"""

import hashlib
import hmac
import json
import math
from collections.abc import Callable, Mapping
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from functools import lru_cache
from typing import Any
from uuid import UUID

from django.conf import settings as django_settings
from django.core.signals import setting_changed
from django.db.models import Model, QuerySet
from django.utils.functional import Promise

from async_queue import conf
from async_queue.exceptions import (
    CorruptArguments,
    InvalidArguments,
    SealBroken,
    UnknownSealKey,
)

MAX_BYTES = 256 * 1024
_MAX_DEPTH = 64
_NUMBERS_END = 10**4_300  # Python reads no longer numbers
_MICROSECOND = timedelta(microseconds=1)
_to_json = json.JSONEncoder(separators=(",", ":")).encode

# A tagged value is an object of one key. An object of the caller's that looks like
# one is wrapped in "$dict".
_TAGS: dict[type, tuple[str, Callable[[Any], Any]]] = {
    datetime: ("$datetime", datetime.isoformat),
    date: ("$date", date.isoformat),
    time: ("$time", time.isoformat),
    timedelta: ("$timedelta", lambda duration: duration // _MICROSECOND),
    Decimal: ("$decimal", str),
    UUID: ("$uuid", str),
}
_UNTAG: dict[str, Callable[[Any], Any]] = {
    "$datetime": datetime.fromisoformat,
    "$date": date.fromisoformat,
    "$time": time.fromisoformat,
    "$timedelta": lambda microseconds: microseconds * _MICROSECOND,
    "$decimal": Decimal,
    "$uuid": UUID,
    "$dict": lambda items: {key: _untag(item) for key, item in items.items()},
}
# What json, and the types' own parsers, raise for text that is not theirs.
_UNREADABLE = (
    ValueError,
    TypeError,
    AttributeError,
    ArithmeticError,
    RecursionError,
)
_REMEDIES: tuple[tuple[type | tuple[type, ...], str], ...] = (
    (Model, "pass its primary key and load it in the job"),
    (QuerySet, "pass a list of primary keys"),
    ((set, frozenset), "pass a sorted list"),
    ((bytes, bytearray, memoryview), "decode it, or pass it as base64 text"),
    (Promise, "pass str(...) of it"),
)
_LEGAL = (
    "pass str, int, float, bool, None, list, dict, datetime, date, time, timedelta, "
    "Decimal or UUID"
)


def encode(value: Any, name: str) -> str:
    """Return ``value`` as the text that is stored.

    Tuples become lists. Aware datetimes keep their offset, not their zone's name.
    Raises InvalidArguments, which tells where inside ``name`` what is wrong.
    """
    try:
        text = _to_json(_tagged(value, 0))
    except _Misfit as misfit:
        where = "".join(f"[{key!r}]" for key in reversed(misfit.path))
        raise InvalidArguments(f"{name}{where} {misfit.reason}") from None
    if len(text) > MAX_BYTES:
        raise InvalidArguments(
            f"{name} has {len(text):,} bytes as JSON and at most {MAX_BYTES:,} fit: "
            "store it elsewhere and pass its key."
        )
    return text


def decode(text: str) -> Any:
    """Return the value of which `encode` made ``text``.

    Raises CorruptArguments for text that `encode` never wrote.
    """
    if text == "{}":  # as most kwargs and meta are
        return {}
    try:
        value = json.loads(text)
        return _untag(value) if '"$' in text else value
    except _UNREADABLE as error:
        raise CorruptArguments(f"cannot read {text[:80]!r}: {error}") from error


def seal(function: str, args: str, kwargs: str, meta: str) -> str:
    """Return the seal of a row: ``v1:key id:HMAC-SHA256 in hexadecimal``."""
    key_id, key = next(iter(_keys().items()))
    return f"v1:{key_id}:{_mac(key, function, args, kwargs, meta)}"


def verify(seal: str, function: str, args: str, kwargs: str, meta: str) -> None:
    """Return if ``seal`` was made by this project over exactly these texts.

    Raises SealBroken, or UnknownSealKey where the key may only not be here yet.
    """
    version, _, rest = seal.partition(":")
    key_id, _, mac = rest.partition(":")
    if version != "v1" or not mac:
        raise SealBroken(
            "the row has no seal of async_queue: schedule() it instead of inserting it"
        )
    key = _keys().get(key_id)
    if key is None:
        raise UnknownSealKey(
            f"the row was sealed with the key {key_id[:8]!r}, which this process does "
            "not have: add it to SECRET_KEY_FALLBACKS or ASYNC_QUEUE['SEAL_KEY']"
        )
    if not hmac.compare_digest(
        mac.encode(), _mac(key, function, args, kwargs, meta).encode()
    ):
        raise SealBroken(
            "the function, the arguments or meta were changed after schedule()"
        )


def identity(function: str, args: str, kwargs: str) -> str:
    """Return what all jobs of the same call have in common, 64 characters."""
    return hashlib.sha256(_framed(function, args, kwargs)).hexdigest()


class _Misfit(Exception):
    def __init__(self, reason: str) -> None:
        self.reason = reason
        self.path: list[Any] = []


def _tagged(value: Any, depth: int) -> Any:
    """Return ``value`` built of nothing but what JSON has."""
    kind = type(value)
    if kind is str:
        return _checked_text(value)
    if kind is int:
        return _checked_number(value)
    if value is None or kind is bool:
        return value
    if kind is float:
        return _checked_float(value)
    if depth == _MAX_DEPTH:
        raise _Misfit(f"is nested deeper than {_MAX_DEPTH} levels: flatten it.")
    if isinstance(value, (list, tuple)):
        return [_inside(key, item, depth) for key, item in enumerate(value)]
    if isinstance(value, Mapping):
        return _tagged_items(value, depth)
    return _tagged_other(value)


def _inside(key: Any, item: Any, depth: int) -> Any:
    try:
        return _tagged(item, depth + 1)
    except _Misfit as misfit:
        misfit.path.append(key)
        raise


def _tagged_items(value: Mapping[Any, Any], depth: int) -> dict[str, Any]:
    items = {}
    for key, item in value.items():
        if not isinstance(key, str):
            name = type(key).__name__
            raise _Misfit(f"has the key {key!r} of type {name}: keys must be str.")
        items[_checked_text(str.__str__(key))] = _inside(key, item, depth)
    looks_tagged = len(items) == 1 and next(iter(items)).startswith("$")
    return {"$dict": items} if looks_tagged else items


def _tagged_other(value: Any) -> Any:
    for kind in type(value).__mro__:
        if kind in _TAGS:
            tag, write = _TAGS[kind]
            return {tag: write(value)}
    # Members of TextChoices, IntegerChoices and the like.
    if isinstance(value, str):
        return _checked_text(str.__str__(value))
    if isinstance(value, int):
        return _checked_number(int(value))
    if isinstance(value, float):
        return _checked_float(float(value))
    remedy = next((text for kind, text in _REMEDIES if isinstance(value, kind)), _LEGAL)
    raise _Misfit(f"is of type {type(value).__name__}, which is not JSON: {remedy}.")


def _checked_text(text: str) -> str:
    if "\0" in text:
        raise _Misfit("contains a NUL character, which databases refuse: remove it.")
    return text


def _checked_number(number: int) -> int:
    if not -_NUMBERS_END < number < _NUMBERS_END:
        raise _Misfit("has more than 4,300 digits: pass it as text.")
    return number


def _checked_float(number: float) -> float:
    if not math.isfinite(number):
        raise _Misfit(f"is {number}, which is not JSON: pass None or text.")
    return number


def _untag(value: Any) -> Any:
    if isinstance(value, list):
        return [_untag(item) for item in value]
    if not isinstance(value, dict):
        return value
    if len(value) == 1:
        ((key, item),) = value.items()
        if key in _UNTAG:
            return _UNTAG[key](item)
    return {key: _untag(item) for key, item in value.items()}


def _framed(*parts: str) -> bytes:
    # With their lengths, in bytes, no two different lists of parts give the same bytes.
    framed = "".join([f"{len(part)}:" + part for part in parts])
    if framed.isascii():
        return framed.encode()
    encoded = [part.encode() for part in parts]
    return b"".join([b"%d:%b" % (len(part), part) for part in encoded])


def _mac(key: hmac.HMAC, *parts: str) -> str:
    mac = key.copy()
    mac.update(_framed(*parts))
    return mac.hexdigest()


@lru_cache(maxsize=1)
def _keys() -> dict[str, hmac.HMAC]:
    """Return the keys by id; the first one seals, all of them verify.

    Each stands ready in an HMAC, of which a copy costs half of a new one.
    """
    secrets: tuple[str | bytes, ...] = conf.settings().seal_key or (
        django_settings.SECRET_KEY,
        *django_settings.SECRET_KEY_FALLBACKS,
    )
    keys = {}
    for secret in secrets:
        raw = secret if isinstance(secret, bytes) else secret.encode()
        key = hashlib.sha256(b"async_queue.seal" + raw).digest()
        key_id = hashlib.sha256(key).hexdigest()[:8]
        keys[key_id] = hmac.new(key, digestmod="sha256")
    return keys


def _forget(*, setting: str, **kwargs: Any) -> None:
    if setting in ("ASYNC_QUEUE", "SECRET_KEY", "SECRET_KEY_FALLBACKS"):
        _keys.cache_clear()


setting_changed.connect(_forget)
