from threading import Event

import pytest

from async_queue.context import Control
from async_queue.exceptions import JobCancelled, JobStopped, JobTimeout, WorkerStopping
from tests.process import finished
from tests.stepping import elsewhere


class Run:
    """A function that is being called in another thread."""

    def __init__(self, function):
        self.control = Control()
        self.begun = Event()
        self.over = Event()
        self.ended = elsewhere(self.control.call, lambda: function(self))
        assert self.begun.wait(20)


def loop(run):
    run.begun.set()
    while not run.over.wait(0.01):
        pass
    return "returned"


def swallow(run):
    run.begun.set()
    while not run.over.is_set():
        try:
            run.over.wait(0.01)
        except JobStopped:
            run.over.set()
    return "returned"


def test_call_returns_what_the_function_returns():
    control = Control()

    assert control.call(lambda: control.is_in_call) is True

    assert not control.is_in_call
    assert control.deadline is None


def test_interrupt_raises_the_cause_in_the_function():
    run = Run(loop)

    assert "in loop" in run.control.stack()
    assert run.control.stop(JobTimeout("too long"))
    assert run.control.interrupt()

    with pytest.raises(JobTimeout):
        run.ended.result(20)
    assert not run.control.interrupt()


def test_interrupt_that_is_swallowed_is_not_raised_again():
    run = Run(swallow)
    run.control.stop(JobTimeout("too long"))

    run.control.interrupt()

    assert run.ended.result(20) == "returned"
    assert run.control.is_ended


def test_only_one_stops_a_run():
    run = Run(loop)

    assert run.control.stop(JobTimeout("too long"))
    assert not run.control.stop(JobCancelled("not needed"))

    run.over.set()
    assert run.ended.result(20) == "returned"
    assert isinstance(run.control.cause, JobTimeout)


@pytest.mark.parametrize("is_over", [False, True])
def test_nothing_is_interrupted_but_a_call(is_over):
    control = Control()
    if is_over:
        control.call(lambda: None)

    assert not control.stop(JobTimeout("too long"))
    assert not control.interrupt()
    assert control.stack() == ""


def test_function_is_not_called_once_its_run_was_prevented():
    control = Control()

    assert control.prevent(WorkerStopping("it is late"))

    with pytest.raises(WorkerStopping):
        control.call(lambda: None)
    assert control.began_at is None


def test_run_that_has_begun_is_prevented_no_more():
    run = Run(loop)

    assert not run.control.prevent(WorkerStopping("it is late"))

    run.over.set()
    assert run.ended.result(20) == "returned"


def test_check_raises_once_the_time_is_up():
    control = Control()
    control.timeout = 0.0

    with pytest.raises(JobTimeout):
        control.call(lambda: Event().wait(0.01) or control.check())


TRACED = """
import sys, threading
from tests import test_context
threading.settrace(lambda *event: None)
run = test_context.Run(test_context.loop)
run.control.stop(test_context.JobTimeout("too long"))
run.control.interrupt()
print(type(run.ended.exception(20)).__name__)
sys.settrace(lambda *event: None)
print(len(list(map(lambda number: number, range(100)))))
"""


def test_interrupt_leaves_no_thread_standing_where_code_is_traced():
    """As Python 3.11 does while one is under way, or was taken back."""
    ended = finished("shell", "-v0", "-c", TRACED)

    assert ended.stdout.split() == ["JobTimeout", "100"], ended.stderr
