"""What must hold after any chaos, by the rows alone.

- I1: a successful job has exactly one effect, by its final attempt;
- I2: a job that has not succeeded has none;
- I3: attempts never fall, and none commits twice;
- I4: no job is RUNNING without a live owner;
- I5: no job is lost, and none is there that was rolled back;
- I6: final states are final.

Jobs outside of a transaction are at-least-once: they may have an effect of each
attempt.
"""

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from django.db import Error, connection
from django.db.models import Sum

from async_queue.models import FINAL, LIVE, Attempt, Job, Status
from benchmarks.chaos.background import Background
from benchmarks.chaos.workload import Ledger, child_of, is_phantom
from tests.models import Effect, Order

_PAUSE = 0.25  # seconds between two looks
_BATCH = 500
# Of these some are meant to fail, and those may.
_FAILING = ("fail",)


class Violation(NamedTuple):
    rule: str
    what: str


class Row(NamedTuple):
    """What is looked at of a job."""

    id: int
    function: str
    args: str
    status: str
    attempt: int
    result: str | None

    @property
    def kind(self) -> str:
        return self.function.rpartition(".")[2]

    @property
    def key(self) -> str:
        return str(json.loads(self.args)[0])

    @property
    def has_succeeded(self) -> bool:
        return self.status == Status.SUCCESSFUL


class Observer(Background):
    """Watches the rows while all goes on: what has fallen, what was final."""

    def __init__(self) -> None:
        super().__init__()
        self.live = 0
        self.violations: list[Violation] = []
        self._seen: dict[int, tuple[str, int]] = {}  # of live ones, and then of all
        self._final: dict[int, tuple[str, int]] = {}

    def run(self) -> None:
        while not self.is_over.wait(_PAUSE):
            try:
                self._look()
            except Error:  # the server is away
                connection.close()
        connection.close()

    def _look(self) -> None:
        live = {pk: (status, attempt) for pk, status, attempt in _states(status=LIVE)}
        self.live = len(live)
        gone = [pk for pk in self._seen if pk not in live]
        for start in range(0, len(gone), _BATCH):
            for pk, *state in _states(ids=gone[start:][:_BATCH]):
                if state[0] in FINAL:
                    self._final[pk] = state[0], state[1]
                self._compare(pk, state[1])
        for pk, (_, attempt) in live.items():
            self._compare(pk, attempt)
            if pk in self._final:
                self._note("I6", f"job {pk} was {self._final[pk][0]} and lives again")
        self._seen = live

    def _compare(self, pk: int, attempt: int) -> None:
        former = self._seen.get(pk, ("", 0))[1]
        if attempt < former:
            self._note("I3", f"job {pk} fell from attempt {former} to {attempt}")

    def _note(self, rule: str, what: str) -> None:
        self.violations.append(Violation(rule, what))

    def compare_final(self, rows: Iterable[Row]) -> Iterator[Violation]:
        """Yield what was final once, and is something else now."""
        for row in rows:
            former = self._final.get(row.id)
            if former and former != (row.status, row.attempt):
                now = row.status, row.attempt
                yield Violation("I6", f"job {row.id} was {former}, and is {now}")


def _states(
    *, status: Iterable[str] | None = None, ids: Iterable[int] | None = None
) -> Iterator[Any]:
    rows = Job.objects.all()
    rows = rows.filter(status__in=status) if status else rows.filter(pk__in=ids)
    yield from rows.values_list("pk", "status", "attempt")


def violations(ledger: Ledger, observer: Observer) -> list[Violation]:
    """Return all that is wrong, once nothing runs any more."""
    rows = [Row(*values) for values in Job.objects.values_list(*Row._fields)]
    return [
        *observer.violations,
        *observer.compare_final(rows),
        *_effects(rows),
        *_attempts(rows),
        *_unfinished(rows),
        *_presence(rows, ledger),
        *_cancelled(rows, ledger),
        *_counters(rows),
        *(Violation("client", text) for text in ledger.surprises),
    ]


def _effects(rows: list[Row]) -> Iterator[Violation]:
    left: dict[int, list[int]] = defaultdict(list)
    for label in Effect.objects.values_list("label", flat=True).iterator():
        number, _, attempt = label.partition(":")
        left[int(number)].append(int(attempt))
    for row in rows:
        attempts = left.pop(row.id, [])
        what = f"{row.kind} job {row.id} is {row.status} by attempt {row.attempt}"
        what += f", with effects of {attempts}"
        if len(set(attempts)) < len(attempts):
            yield Violation("I3", what)
        if row.kind == "loose":
            if row.has_succeeded and row.attempt not in attempts:
                yield Violation("I1", what)
        elif attempts != [row.attempt] * row.has_succeeded:
            yield Violation("I1" if row.has_succeeded else "I2", what)
    for number in left:
        yield Violation("I5", f"there are effects of job {number}, which is not there")


def _attempts(rows: list[Row]) -> Iterator[Violation]:
    last: dict[int, int] = {}
    made = Attempt.objects.order_by("id").values_list("job_id", "number")
    for job, number in made.iterator():
        if number <= last.get(job, 0):
            yield Violation("I3", f"job {job}: attempt {number} ended more than once")
        last[job] = number
    for row in rows:
        if row.has_succeeded and last.get(row.id, 0) >= row.attempt:
            what = f"attempt {row.attempt} of job {row.id} failed, and succeeded"
            yield Violation("I3", what)


def _unfinished(rows: list[Row]) -> Iterator[Violation]:
    for row in rows:
        if row.status not in FINAL:
            rule = "I4" if row.status == Status.RUNNING else "I5"
            yield Violation(rule, f"{row.kind} job {row.id} is {row.status} at the end")
        if row.status == Status.FAILED and row.kind not in _FAILING:
            yield Violation("I5", f"{row.kind} job {row.id}, which is sound, is FAILED")


def _presence(rows: list[Row], ledger: Ledger) -> Iterator[Violation]:
    keys = Counter(row.key for row in rows)
    ids = {row.key: row.id for row in rows}
    for key, number in ledger.committed.items():
        if keys[key] != 1 or ids[key] != number:
            yield Violation("I5", f"job {number} {key} is there {keys[key]} times")
    for key, times in keys.items():
        if times != 1 or key in ledger.rolled_back or is_phantom(key):
            yield Violation("I5", f"{key} is there {times} times, or was rolled back")
    for row in rows:
        children = keys[child_of(row.key)]
        if children != (row.has_succeeded and row.kind == "spawn"):
            what = f"{row.kind} job {row.id} is {row.status}, children: {children}"
            yield Violation("I5", what)


def _cancelled(rows: list[Row], ledger: Ledger) -> Iterator[Violation]:
    """Whoever was told that a job is cancelled must have been told the truth."""
    status = {row.id: row.status for row in rows}
    told = set(ledger.cancelled)
    for row in rows:
        if row.kind == "cancel_others" and row.has_succeeded:
            told.update(json.loads(row.result or "[]"))
    for number in sorted(told):
        if status.get(number) != Status.CANCELLED:
            what = f"job {number} was cancelled, and is {status.get(number)}"
            yield Violation("I6", what)


def _counters(rows: list[Row]) -> Iterator[Violation]:
    total = Order.objects.aggregate(total=Sum("total"))["total"] or 0
    swaps = sum(row.kind == "swap" and row.has_succeeded for row in rows)
    if total != 2 * swaps:
        yield Violation("I1", f"{swaps} swaps have counted {total} times, twice each")
