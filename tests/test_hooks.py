"""The points of the protocol at which tests act."""

from contextlib import ExitStack
from functools import partial

import pytest

from async_queue import hooks, schedule
from async_queue.models import Status
from tests.jobs import leave
from tests.stepping import flush


@pytest.mark.django_db(transaction=True)
def test_one_pass_on_a_job_reaches_every_point() -> None:
    job = schedule(leave)
    reached: list[str] = []

    with ExitStack() as stack:
        for name in hooks.POINTS:
            stack.enter_context(hooks.at(name, partial(reached.append, name)))
        flush(1)

    job.refresh_from_db()
    assert job.status == Status.SUCCESSFUL
    # What nothing calls for: a failure, something to give back, to promote, to rescue.
    idle = [
        point
        for point in hooks.POINTS
        if point.endswith(("_record", "_release", "_promote", "_burial", "_rescue"))
    ]
    assert set(reached) == set(hooks.POINTS) - set(idle)
    assert reached.count("before_fence") == reached.count("after_fence") == 1


def test_a_point_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'behind_fence'.*before_fence, after_fence"):
        hooks.at("behind_fence", list).__enter__()


def test_no_point_acts_behind_its_block() -> None:
    reached: list[str] = []

    with hooks.at("after_claim", lambda: reached.append("inside")):
        hooks.point("after_claim")
    hooks.point("after_claim")

    assert reached == ["inside"]
