"""Processes that end, or stop, by their own hand when they come to a point.

AQ_DIE_AT and AQ_STOP_AT, each "point:n", say where and the how manieth time. Read by
tests.apps, once, in each process of the tests' project.
"""

import signal
import threading
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from itertools import count

from async_queue import hooks

_SIGNALS = {"AQ_DIE_AT": signal.SIGKILL, "AQ_STOP_AT": signal.SIGSTOP}
# Never left: the process is to end or to stop.
_arranged = ExitStack()


def arrange(environment: Mapping[str, str]) -> None:
    """Let this process die or stop where its environment says so."""
    for variable, number in _SIGNALS.items():
        if wanted := environment.get(variable):
            point, _, time = wanted.partition(":")
            action = _at_time(int(time or 1), number)
            _arranged.enter_context(hooks.at(point, action))


def _at_time(time: int, number: signal.Signals) -> Callable[[], None]:
    # Of C, so that two threads cannot get the same number.
    times = count(1)

    def act() -> None:
        if next(times) == time:
            # This thread itself: another would be stopped only a little later.
            signal.pthread_kill(threading.get_ident(), number)
            # Only who goes on again comes here: what it was sent is to be heard first.
            threading.Event().wait(0.2)

    return act
