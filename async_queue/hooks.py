"""Named points of the protocol at which a test may act; no-ops otherwise."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

# In the order in which a worker and its jobs come to them.
POINTS = (
    "after_register",
    "before_claim",
    "after_claim",
    "before_run",
    "after_call",
    "before_fence",
    "after_fence",
    "after_commit",
    "before_record",
    "after_record",
    "before_release",
    "after_release",
    "after_beat",
    "after_promote",
    "after_burial",
    "after_rescue",
    "before_unregister",
)

_actions: dict[str, Callable[[], object]] = {}


def point(name: str) -> None:
    """Say that the protocol has come to ``name``."""
    if _actions and name in _actions:
        _actions[name]()


def is_watched(name: str) -> bool:
    """Tell whether somebody acts at ``name``; if not, it need not be stopped at."""
    return name in _actions


@contextmanager
def at(name: str, action: Callable[[], object]) -> Iterator[None]:
    """Call ``action``, in whatever thread gets there, whenever ``name`` is reached."""
    if name not in POINTS:
        raise ValueError(f"{name!r} is none of {', '.join(POINTS)}")
    _actions[name] = action
    try:
        yield
    finally:
        del _actions[name]
