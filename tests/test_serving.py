import json
import logging

import pytest
from django.db import OperationalError

from async_queue import worker as workers
from async_queue.management.serving import Serving, Wishes
from async_queue.models import Job, Worker
from tests.factories import JobFactory
from tests.stepping import elsewhere

pytestmark = pytest.mark.django_db(transaction=True)


def wishes(**options):
    return Wishes(**{"alias": "default", "threads": 1, "shutdown_timeout": 5} | options)


def served(**options):
    """Run a worker here until it ends by itself."""
    serving = Serving(wishes(**options))
    serving.run()
    return serving


def test_wishes_reach_another_process_as_they_are():
    asked = wishes(queues=("mail", "bulk*"), max_jobs=3, max_memory=2**30)

    given = json.loads(asked.dumped())

    assert Wishes(**given | {"queues": tuple(given["queues"])}) == asked
    assert asked.patience > asked.shutdown_timeout


def test_worker_that_was_stopped_before_does_not_begin():
    serving = Serving(wishes())
    assert (serving.is_live(), serving.is_ready()) == (True, False)

    serving.stop()
    serving.run()

    assert serving.reason == "stopped"
    assert not serving.has_begun


@pytest.mark.parametrize(
    ("options", "reason", "left"),
    [
        ({"is_burst": True}, "drained", 0),
        ({"is_burst": True, "max_jobs": 2}, "max_jobs", 1),
        ({"is_burst": True, "max_jobs": 5}, "drained", 0),
        ({"max_jobs": 3}, "max_jobs", 0),
    ],
)
def test_reason_tells_why_it_ended(options, reason, left):
    JobFactory.create_batch(3)

    serving = served(**options)

    assert serving.reason == reason
    assert serving.has_begun
    assert Job.objects.filter(status="READY").count() == left


def test_worker_introduces_itself_and_stops_when_it_is_told(caplog, wait_until):
    caplog.set_level(logging.INFO, "async_queue")
    serving = Serving(wishes(queues=("mail",)))
    running = elsewhere(serving.run)
    wait_until(lambda: "serves the queues mail with 1 thread" in caplog.text)
    wait_until(serving.is_ready)
    assert serving.is_live()
    (number,) = Worker.objects.values_list("id", flat=True)

    serving.stop()
    running.result(20)

    assert f"worker {number} (pid " in caplog.text
    assert serving.reason == "stopped"
    assert not Worker.objects.exists()


def test_worker_whose_database_goes_at_first_starts_again(monkeypatch, caplog):
    JobFactory()
    errors = [OperationalError("server closed the connection")]
    run = workers.Worker.run

    def fail_once(worker):
        if errors:
            raise errors.pop()
        run(worker)

    monkeypatch.setattr(workers.Worker, "run", fail_once)

    serving = served(is_burst=True)

    assert (serving.reason, errors) == ("drained", [])
    assert "starting again: server closed the connection" in caplog.text


def test_worker_that_cannot_begin_gives_up_in_the_end(monkeypatch):
    def fail(worker):
        raise OperationalError("too many clients")

    monkeypatch.setattr(workers.Worker, "run", fail)
    monkeypatch.setattr("async_queue.management.serving.PATIENCE", 0)

    with pytest.raises(OperationalError, match="too many clients"):
        served()
