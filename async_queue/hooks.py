"""Named points of the protocol at which a test may act; no-ops otherwise."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

POINTS = frozenset({"after_claim", "before_fence", "after_fence"})

_actions: dict[str, Callable[[], object]] = {}


def point(name: str) -> None:
    """Say that the protocol has come to ``name``."""
    if _actions and name in _actions:
        _actions[name]()


@contextmanager
def at(name: str, action: Callable[[], object]) -> Iterator[None]:
    """Call ``action``, in whatever thread gets there, whenever ``name`` is reached."""
    if name not in POINTS:
        raise ValueError(f"{name!r} is none of {', '.join(sorted(POINTS))}")
    _actions[name] = action
    try:
        yield
    finally:
        del _actions[name]
