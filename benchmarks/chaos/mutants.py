"""Deliberately broken protocols: a chaos run that finds no fault in one is worthless.

The settings' app patches the one that AQ_CONTROL names into each worker process.
"""

import os
import random
from collections.abc import Callable
from typing import Any

from django.apps import AppConfig


class Mutants(AppConfig):
    """Breaks what AQ_CONTROL names; nothing, if it names nothing."""

    name = "benchmarks.chaos"

    def ready(self) -> None:
        if name := os.environ.get("AQ_CONTROL"):
            CONTROLS[name]()


def _no_fence() -> None:
    """Let a run succeed whatever has become of its claim."""
    from async_queue.statements import ends

    sound = ends._finish_sql

    def unfenced(facts: Any) -> str:
        update, _, _ = sound(facts).partition(" WHERE ")
        # The same parameters, and no condition but the id.
        return f"{update} WHERE id = %s AND (%s IS NOT NULL OR %s IS NOT NULL)"

    ends._finish_sql = unfenced  # type: ignore[assignment]


def _early_ack() -> None:
    """Record the success in a transaction of its own, before the function's."""
    from django.db import connections

    from async_queue import executor, fence

    def run(job: Any, call: Callable[[], Any]) -> fence.Returned:
        connection = connections[job.alias]
        with executor._session(job), fence.transaction(connection):
            fence.pass_fence(connection, job, None)
        with executor._session(job), fence.transaction(connection):
            return fence.Returned(job.control.call(call), None, is_empty=False)

    executor._run = run


def _trigger_happy() -> None:
    """Take jobs of live workers, who know no attempt by which to be told apart."""
    from django.db import connections

    from async_queue import peers
    from async_queue.db import vendor
    from async_queue.models import Job, Status
    from async_queue.statements import ends

    sound_look, sound_sql = peers.Peers.look, ends._finish_sql

    def look(self: Any, *args: Any, **options: Any) -> bool:
        connection = connections[self._alias]
        running = Job.objects.filter(status=Status.RUNNING).order_by("id")
        with vendor(connection).turn(connection):
            for number in list(running.values_list("pk", flat=True)):
                if random.random() < 0.5:
                    running.filter(pk=number).transition("rescue")
        return sound_look(self, *args, **options)

    def without_attempt(facts: Any) -> str:
        text = sound_sql(facts)
        text = text.replace("worker_id = %s", "%s IS NOT NULL")
        return text.replace("attempt = %s", "%s IS NOT NULL")

    peers.Peers.look = look  # type: ignore[method-assign]
    ends._finish_sql = without_attempt  # type: ignore[assignment]


def _no_rescue() -> None:
    """Leave the jobs of the dead where they are."""
    from async_queue import maintenance

    maintenance.rescue = lambda alias: 0


CONTROLS = {
    "no-fence": _no_fence,
    "early-ack": _early_ack,
    "trigger-happy": _trigger_happy,
    "no-rescue": _no_rescue,
}
