"""Any order of the protocol's steps, against a model: no job is lost, none twice."""

import sys
import traceback
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import pytest
from django.db import Error, transaction
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

from async_queue import api, claims, executor, maintenance, schedule, statements
from async_queue.exceptions import (
    JobCancelled,
    JobStopped,
    JobTimeout,
    WorkerStopping,
)
from async_queue.models import FINAL, LIVE, Attempt, Job, Status, Worker
from async_queue.places import DeclaredDead
from async_queue.statements import Selection
from tests import protocol
from tests.long import long
from tests.models import Effect
from tests.protocol import FACTS, Hand, Run, here
from tests.stepping import elsewhere

pytestmark = pytest.mark.django_db(transaction=True)

# Nobody else can write while a job's transaction is open.
IS_SERIAL = FACTS.runs_one_job_at_a_time
EXAMPLES, LENGTH = long(24 if IS_SERIAL else 8, 400), 60
HANDS, MOST = 3, 12
KINDS = ["leave", "fail", "outside", "leave"]
SHARES = {
    "schedule": 6,
    "claim": 6,
    "start": 6,
    "step": 20,
    "finish": 2,
    "promote": 2,
    "tick": 6,
    "let_pass": 2,
    "overlook": 3,
    "give_back": 2,
    "cancel": 4,
    "hire": 4,
    "cut": 4,
    "cut_keeper": 2,
    "cut_dispatcher": 1,
    "time_out": 2,
    "die": 2,
    "leave": 1,
    "overtake": 6,
}
STEPS = [what for what, share in SHARES.items() for _ in range(share)]
CUTS = 2  # of one run: more of them put the job off
STALL = 30
FEW = st.integers(0, 5)


@dataclass
class Known:
    """What the model knows of a job."""

    kind: str
    status: str
    attempt: int = 0
    worker: int | None = None
    failures: int = 0
    lost: int = 0
    suspect: bool = False
    effects: list[int] = field(default_factory=list)
    cancelling: Future[int] | None = None

    @property
    def is_atomic(self) -> bool:
        return self.kind != "outside"

    @property
    def state(self) -> tuple[Any, ...]:
        return self.status, self.attempt, self.worker, self.failures, self.suspect

    def move(self, status: str) -> None:
        self.status, self.worker = status, None

    def stands(self, run: Run) -> bool:
        claim = (Status.RUNNING, run.job.worker, run.job.attempt)
        return (self.status, self.worker, self.attempt) == claim

    def fail(self) -> None:
        self.failures += 1
        self.suspect = False
        self.move(Status.FAILED if self.failures == 2 else Status.WAITING)

    def rescue(self) -> None:
        self.move(Status.READY)
        self.suspect = self.suspect or self.lost > 0
        self.lost += 1


class Protocol(RuleBasedStateMachine):
    """A step that does not apply does nothing: so the draws are the same in each run.

    One rule takes them all, because Hypothesis leaves out some of several rules in each
    example, and most of these steps lead nowhere without the others.
    """

    def __init__(self) -> None:
        super().__init__()
        for model in (Attempt, Job, Worker, Effect):
            model.objects.all().delete()
        self.jobs: dict[int, Known] = {}
        self.hands: list[Hand] = []  # those that live
        self.runs: list[Run] = []
        self.buried: set[int] = set()
        self.clock = 0

    @initialize()
    def begin(self) -> None:
        for number in range(HANDS):
            self.hire(number, 0)
        for number in range(len(KINDS)):
            self.schedule(number, 2)

    @rule(what=st.sampled_from(STEPS), which=FEW, how=FEW)
    def take(self, what: str, which: int, how: int) -> None:
        getattr(self, what)(which, how)

    # Whoever schedules, and cancels.

    def schedule(self, which: int, how: int) -> None:
        if self.is_taken() or len(self.jobs) == MOST:
            return
        kind, is_later, commits = picked(KINDS, which), how == 0, how != 1
        delay = timedelta(days=1) if is_later else None
        meta = {"max_attempts": 2, "atomic": kind != "outside"}
        with transaction.atomic():
            job = schedule(protocol.act, [kind], run_after=delay, meta=meta)
            transaction.set_rollback(not commits)
        if commits:
            status = Status.WAITING if is_later else Status.READY
            self.jobs[job.pk] = Known(kind, status)

    def cancel(self, which: int, how: int) -> None:
        if self.is_taken() or not self.jobs:
            return
        number = picked(list(self.jobs), which)
        job = self.jobs[number]
        rows = Job.objects.filter(pk=number)
        if not self.is_locked(number):
            assert api.cancel(rows) == (job.status in LIVE)
            job.move(Status.CANCELLED if job.status in LIVE else job.status)
        elif job.cancelling is None:
            job.cancelling = elsewhere(api.cancel, rows)

    # Workers.

    def hire(self, which: int, how: int) -> None:
        if len(self.hands) < HANDS and not self.is_taken():
            self.hands.append(Hand(self.clock))

    def claim(self, which: int, how: int) -> None:
        if self.is_taken() or not (hand := picked(self.hands, which)):
            return
        number, limit = hand.number, 1 + how % 3
        ready = [job for job in self.jobs.values() if job.status == Status.READY]
        suspect = how % 2 == 1 and any(job.suspect for job in ready)
        selection = Selection(suspect=suspect)
        try:
            taken = hand.dispatcher.do(
                claims.claim, "default", number, limit, selection
            )
        except Error:  # its session was cut
            return
        wanted = [
            pk
            for pk, job in self.jobs.items()
            if job.status == Status.READY and job.suspect == suspect
        ]
        assert len(taken) == min(limit, len(wanted))
        for claimed in taken:
            assert claimed.id in wanted
            job = self.jobs[claimed.id]
            job.status, job.worker = Status.RUNNING, number
            job.attempt += 1
            assert claimed.attempt == job.attempt
        if how:  # or its answer is lost
            hand.claimed += taken

    def give_back(self, which: int, how: int) -> None:
        if self.is_taken() or not (hand := picked(self.hands, which)):
            return
        standing = [job for job in hand.claimed if self.stands_for(hand, job)]
        try:
            given = {job.id: job.attempt for job in hand.claimed}
            count = hand.dispatcher.do(claims.release, "default", hand.number, given)
        except Error:
            return
        assert count == len(standing)
        for claimed in standing:
            self.jobs[claimed.id].move(Status.READY)
        hand.claimed.clear()

    def start(self, which: int, how: int) -> None:
        hand = picked([hand for hand in self.hands if hand.claimed], which)
        if hand and not self.is_taken():
            self.begin_run(hand)

    def step(self, which: int, how: int) -> None:
        run = picked(self.going(), which)
        if run and self.may_go_on(run):
            run.step()
            self.learn(run)

    def finish(self, which: int, how: int) -> None:
        run = picked(self.going(), which)
        if run and self.may_go_on(run):
            self.run_to_its_end(run)

    def promote(self, which: int, how: int) -> None:
        if self.is_taken() or not (hand := picked(self.hands, which)):
            return
        waiting = [pk for pk, job in self.jobs.items() if job.status == Status.WAITING]
        for pk in waiting:
            Job.objects.filter(pk=pk).update(run_after=statements.now(here()))
        if self.asked(hand, maintenance.promote, "default") is None:
            return
        for pk in waiting:
            self.jobs[pk].move(Status.READY)

    def tick(self, which: int, how: int) -> None:
        """Do what a keeper does with each beat."""
        if self.is_taken() or not (hand := picked(self.hands, which)):
            return
        lost = {pk for pk, job in self.jobs.items() if self.is_orphan(job)}
        try:
            told = hand.keeper.do(lambda: hand.place.beat(here(), None))
        except DeclaredDead:
            assert hand.number in self.buried
            self.move_out(hand)
            return
        except Error:
            assert not hand.keeps_lock
            hand.take_place()
            return
        hand.beat_at = self.clock
        assert told.has_lost == bool(lost)
        found = hand.keeper.do(
            lambda: hand.peers.look(
                told.others, self.clock, trusts_locks=hand.place.has_lock
            )
        )
        self.learn_deaths(hand)
        if found or told.has_lost:
            self.rescue(hand)
        self.compare(hand)

    def let_pass(self, which: int, how: int) -> None:
        self.clock += 1 + 10 * (how % 4)

    def overlook(self, which: int, how: int) -> None:
        """Let one look twice while the others stand still for long."""
        self.tick(which, how)
        self.clock += STALL + 1
        self.tick(which, how)

    # What goes wrong.

    def cut(self, which: int, how: int) -> None:
        if IS_SERIAL:  # it has no server; see `time_out`
            return
        run = picked([run for run in self.going() if run.cuts < CUTS], which)
        if run and not run.is_cut:
            run.cut()

    def cut_keeper(self, which: int, how: int) -> None:
        if IS_SERIAL or not (hand := picked(self.hands, which)):
            return
        hand.keeper.cut()
        hand.keeps_lock = False

    def cut_dispatcher(self, which: int, how: int) -> None:
        if not IS_SERIAL and (hand := picked(self.hands, which)):
            hand.dispatcher.cut()

    def time_out(self, which: int, how: int) -> None:
        """End a run that takes too long, as its keeper would."""
        watched = [(hand, run) for hand in self.hands for run in hand.going()]
        if not watched:
            return
        hand, run = picked(watched, which)
        if self.is_taken(run):
            return
        if hand.keeps_lock and self.end(hand, run, JobTimeout("too long")):
            self.jobs[run.job.id].fail()

    def die(self, which: int, how: int) -> None:
        if hand := picked(self.hands, which):
            hand.die()
            self.hands.remove(hand)

    def leave(self, which: int, how: int) -> None:
        """Shut down, although runs of it go on."""
        hand = picked(self.hands, which)
        if self.is_taken() or not hand or not hand.keeps_lock:
            return
        if any(self.is_locked(pk) for pk in self.jobs):
            return
        number = hand.number
        hand.leave()
        self.hands.remove(hand)
        for job in self.jobs.values():
            if job.status == Status.RUNNING and job.worker == number:
                job.move(Status.READY)

    def overtake(self, which: int, how: int) -> None:
        """Let others claim what one gives back who then goes on with it."""
        busy = [hand for hand in self.hands if hand.claimed or hand.going()]
        if not (hand := picked(busy, which)):
            return
        self.leave(self.hands.index(hand), how)
        if hand in self.hands:
            return
        self.claim(how, 2)
        while hand.claimed and not self.is_taken():
            self.begin_run(hand)
            if self.may_go_on(self.runs[-1]):
                self.run_to_its_end(self.runs[-1])
        for run in hand.going():
            if self.may_go_on(run):
                self.run_to_its_end(run)

    # What must hold after each step.

    @invariant()
    def rows_are_as_the_model_says(self) -> None:
        self.hear_of_cancels()
        rows = Job.objects.values_list(
            "pk", "status", "attempt", "worker_id", "failures", "suspect"
        )
        assert {pk: tuple(rest) for pk, *rest in rows} == {
            pk: job.state for pk, job in self.jobs.items()
        }

    @invariant()
    def effects_are_as_the_model_says(self) -> None:
        labels = Effect.objects.values_list("label", flat=True)
        assert sorted(labels) == sorted(
            f"{pk}:{attempt}"
            for pk, job in self.jobs.items()
            for attempt in job.effects
        )
        for job in self.jobs.values():
            if job.is_atomic:  # by the model itself
                wanted = [job.attempt] * (job.status == Status.SUCCESSFUL)
                assert job.effects == wanted

    def teardown(self) -> None:
        try:
            if sys.exc_info()[0] is None:
                self.let_all_end()
            else:  # which Hypothesis does not tell if it does not come again
                traceback.print_exc()
        finally:
            for run in self.going():
                run.die()
            for hand in self.hands:
                hand.die()

    def let_all_end(self) -> None:
        """Finish what goes on; one who is hired then does the rest."""
        holding = [run for run in self.going() if run.is_in_transaction]
        holding.sort(key=lambda run: not run.locks_its_row)
        for run in [*holding, *self.going()]:
            self.run_to_its_end(run)
        while self.hands:
            self.die(0, 0)
        self.hire(0, 0)
        for _ in range(12):
            self.clock += STALL + 1
            self.tick(0, 0)
            self.promote(0, 0)
            for how in (2, 5):  # suspects, too
                self.claim(0, how)
            while self.hands[0].claimed:
                self.start(0, 0)
                self.finish(0, 0)
            self.rows_are_as_the_model_says()
            self.effects_are_as_the_model_says()
        assert {job.status for job in self.jobs.values()} <= set(FINAL)
        self.hands.pop().leave()

    # The model.

    def going(self) -> list[Run]:
        return [run for run in self.runs if not run.is_over]

    def is_taken(self, besides: Run | None = None) -> bool:
        """Tell whether somebody else writes, where only one can."""
        return IS_SERIAL and any(
            run.is_in_transaction for run in self.runs if run is not besides
        )

    def is_locked(self, number: int, besides: Run | None = None) -> bool:
        return any(
            run.locks_its_row
            for run in self.runs
            if run.job.id == number and run is not besides
        )

    def may_go_on(self, run: Run) -> bool:
        """Tell whether it would not wait for somebody who stands still."""
        return not (self.is_taken(run) or self.is_locked(run.job.id, run))

    def is_orphan(self, job: Known) -> bool:
        living = set(Worker.objects.filter(dead_at=None).values_list("pk", flat=True))
        return job.status == Status.RUNNING and job.worker not in living

    def stands_for(self, hand: Hand, claimed: Any) -> bool:
        job = self.jobs[claimed.id]
        claim = (Status.RUNNING, hand.number, claimed.attempt)
        return (job.status, job.worker, job.attempt) == claim

    def asked(self, hand: Hand, *call: Any) -> bool | None:
        """Do it in the keeper's session; None if that was cut."""
        try:
            hand.keeper.do(*call)
        except Error:
            assert not hand.keeps_lock
            return None
        return True

    def end(self, hand: Hand, run: Run, cause: JobStopped) -> bool:
        """End a run as its keeper does; tell whether its claim stood until then."""
        if not run.job.control.stop(cause):
            return False
        stood = self.jobs[run.job.id].stands(run)
        hand.keeper.do(run.cut)
        hand.keeper.do(executor.end, run.job)
        return stood

    def begin_run(self, hand: Hand) -> None:
        self.runs.append(hand.begin())
        self.learn(self.runs[-1])

    def run_to_its_end(self, run: Run) -> None:
        for _ in range(20):
            if run.is_over:
                return
            run.step()
            self.learn(run)
        raise AssertionError(f"{run.job} does not end: {run.at}")

    def learn(self, run: Run) -> None:
        """Hold what a run has come to against the model."""
        job, said = self.jobs[run.job.id], run.at
        if said == protocol.AFTER_EFFECT and not job.is_atomic:
            job.effects.append(run.job.attempt)
        if said in (protocol.AFTER_FENCE, protocol.AFTER_RECORD):
            self.hear_of_cancels()
            assert job.stands(run)
        if not run.is_over:
            return
        action = getattr(said, "action", said)
        if action in ("succeed", "retry", "fail"):
            assert job.stands(run)
            self.commit(run, job, action)
        elif action == "snooze":
            # What was cut outside of a transaction is not run again at once.
            assert run.cuts
            assert not job.is_atomic
            job.suspect = False
            job.move(Status.WAITING)
        else:
            self.hear_of_cancels()
            assert action == "lose"
            assert not job.stands(run) or run.job.control.is_ended

    def commit(self, run: Run, job: Known, action: str) -> None:
        if action != "succeed":
            assert run.was_at == protocol.AFTER_RECORD
            job.fail()
            return
        assert run.was_at == protocol.AFTER_FENCE
        if job.is_atomic:
            job.effects.append(run.job.attempt)
        job.move(Status.SUCCESSFUL)

    def hear_of_cancels(self) -> None:
        """Take note of those that waited for a row which is free now."""
        for number, job in self.jobs.items():
            if job.cancelling is None or self.is_locked(number):
                continue
            count = job.cancelling.result(30)
            job.cancelling = None
            assert count == (job.status in LIVE)
            job.move(Status.CANCELLED if count else job.status)

    def move_out(self, hand: Hand) -> None:
        for run in hand.going():
            if self.end(hand, run, WorkerStopping("found dead")):
                self.jobs[run.job.id].move(Status.READY)
        hand.lose_place()

    def learn_deaths(self, observer: Hand) -> None:
        dead = Worker.objects.exclude(dead_at=None).values_list("pk", flat=True)
        new = set(dead) - self.buried
        self.buried |= new
        # Whose lock may not be free yet.
        ended = observer.stalled_workers()
        for hand in self.hands:
            if hand.number in new:
                assert hand is not observer
                assert not hand.keeps_lock or self.clock - hand.beat_at >= STALL
            if hand.number in new | ended:
                hand.keeps_lock = False
        for run in self.going():
            if run.job.worker in new | ended and not IS_SERIAL:
                run.is_cut = True

    def rescue(self, hand: Hand) -> None:
        orphans = {pk for pk, job in self.jobs.items() if self.is_orphan(job)}
        hand.keeper.do(maintenance.rescue, "default")
        rescued = Job.objects.filter(pk__in=orphans, status=Status.READY)
        for pk in rescued.values_list("pk", flat=True):
            self.jobs[pk].rescue()
            orphans.remove(pk)
        # The server may take a moment to end the sessions of the dead.
        assert all(self.may_be_locked(pk) for pk in orphans)

    def may_be_locked(self, number: int) -> bool:
        locking = (protocol.AFTER_FENCE, protocol.AFTER_RECORD)
        return any(run.at in locking for run in self.runs if run.job.id == number)

    def compare(self, hand: Hand) -> None:
        """End the runs that have lost their claims; give back what nobody runs."""
        rows = hand.keeper.do(lambda: statements.running(here(), hand.number))
        going = {run.job.id: run for run in hand.going()}
        for number, run in going.items():
            if rows.get(number) != run.job.attempt and run.job.control.is_atomic:
                assert not self.end(hand, run, JobCancelled("cancelled"))
        known = going.keys() | {job.id for job in hand.claimed}
        orphans = {pk: number for pk, number in rows.items() if pk not in known}
        left = dict(orphans.items() & hand.orphans.items())
        hand.orphans = orphans
        released = hand.keeper.do(claims.release, "default", hand.number, left)
        assert released == len(left)
        for pk in left:
            self.jobs[pk].move(Status.READY)


def picked(items: list[Any], which: int) -> Any:
    return items[which % len(items)] if items else None


@pytest.fixture
def stepped() -> Iterator[None]:
    FACTS.prepare(here())
    with protocol.stepped():
        yield


@pytest.mark.usefixtures("stepped")
def test_steps_in_any_order_keep_the_promise() -> None:
    run_state_machine_as_test(
        Protocol,
        settings=settings(
            max_examples=EXAMPLES,
            stateful_step_count=LENGTH,
            derandomize=True,
            deadline=None,
            database=None,
            # Each step is taken by real sessions, so a shorter example is far away.
            phases=(Phase.generate,),
            suppress_health_check=list(HealthCheck),
        ),
    )
