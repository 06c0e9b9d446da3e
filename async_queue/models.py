"""The tables, and every change of a job's status.

`TRANSITIONS` lists what may happen to a job; `JobQuerySet.transition` and the
prepared SQL of `statements` are the only ones that write a status.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from django.db import connections, models
from django.db.backends.base.schema import BaseDatabaseSchemaEditor
from django.db.backends.ddl_references import Statement
from django.db.models import Q

from async_queue import codec, context
from async_queue.callform import call_form
from async_queue.context import RunningJob
from async_queue.db import MomentField, Now

HIGHEST, LOWEST = 100, -100
# What every database and Python can tell; schedule() refuses what is outside.
MOMENTS = (datetime(1900, 1, 1, tzinfo=UTC), datetime(9999, 1, 1, tzinfo=UTC))


class Status(models.TextChoices):
    """Where a job stands; Django's four words for tasks and two more."""

    WAITING = "WAITING", "waiting"
    READY = "READY", "ready"
    RUNNING = "RUNNING", "running"
    SUCCESSFUL = "SUCCESSFUL", "successful"
    FAILED = "FAILED", "failed"
    CANCELLED = "CANCELLED", "cancelled"


LIVE = (Status.WAITING, Status.READY, Status.RUNNING)
FINAL = (Status.SUCCESSFUL, Status.FAILED, Status.CANCELLED)


@dataclass(frozen=True, slots=True)
class Transition:
    """What an action does to the jobs in one of its ``sources``, and to no others."""

    sources: tuple[Status, ...]
    target: Status
    stamps: Mapping[str, Any] = field(default_factory=dict)


_FINISHED = {"worker": None, "finished_at": Now()}

TRANSITIONS: dict[str, Transition] = {
    # its moment has come
    "promote": Transition((Status.WAITING,), Status.READY),
    # a worker takes it
    "claim": Transition((Status.READY,), Status.RUNNING),
    # somebody runs it by hand, in one transaction
    "execute": Transition((Status.WAITING, Status.READY), Status.RUNNING),
    # its function returned, and its effects commit with this
    "succeed": Transition((Status.RUNNING,), Status.SUCCESSFUL, _FINISHED),
    # its function raised, and it has attempts left
    "retry": Transition((Status.RUNNING,), Status.WAITING, {"worker": None}),
    # it asked to run later, or this process cannot run it yet
    "snooze": Transition((Status.RUNNING,), Status.WAITING, {"worker": None}),
    # its function raised for the last time, or its row was refused
    "fail": Transition((Status.RUNNING,), Status.FAILED, _FINISHED),
    # its worker gives it back without having begun
    "release": Transition((Status.RUNNING,), Status.READY, {"worker": None}),
    # its worker has died
    "rescue": Transition((Status.RUNNING,), Status.READY, {"worker": None}),
    # the process in which it ran alone has died, and it is to be tried once more
    "crash": Transition((Status.RUNNING,), Status.READY, {"worker": None}),
    # somebody, or the job itself, wants it no more
    "cancel": Transition(LIVE, Status.CANCELLED, _FINISHED),
    # a person wants it once more
    "run again": Transition(
        FINAL,
        Status.READY,
        {
            "finished_at": None,
            "result": None,
            "failures": 0,
            "crashes": 0,
            "suspect": False,
            "run_after": Now(),
        },
    ),
}


class JobQuerySet(models.QuerySet):  # type: ignore[type-arg]  # not at runtime
    """Jobs; the adjectives compose."""

    def live(self) -> "JobQuerySet":
        """Those that may still run, or are running."""
        return self.filter(status__in=LIVE)

    def due(self) -> "JobQuerySet":
        """Those that a worker may take now, in the order in which it would."""
        moment_has_come = Q(status=Status.WAITING, run_after__lte=Now())
        due = self.filter(Q(status=Status.READY) | moment_has_come)
        return due.order_by("rank", "run_after", "id")

    def held(self, job: RunningJob) -> "JobQuerySet":
        """The one of this claim, while the claim stands."""
        return self.filter(
            pk=job.id,
            status=Status.RUNNING,
            worker_id=job.worker,
            attempt=job.attempt,
        )

    def unlocked(self) -> "JobQuerySet":
        """Those whose rows nobody has locked; reading them, in a transaction, does.

        All of them where rows cannot be locked one by one.
        """
        features = connections[self.db].features
        if not features.has_select_for_update_skip_locked:
            return self
        # Somebody's row that refers to a job's is no obstacle.
        no_key = features.has_select_for_no_key_update
        return self.select_for_update(skip_locked=True, no_key=no_key)

    def transition(self, action: str, **changes: Any) -> int:
        """Do ``action`` to those jobs that are in a state for it; return how many.

        One UPDATE, in which the condition and the change are one.
        """
        move = TRANSITIONS[action]
        return self.filter(status__in=move.sources).update(
            **{"status": move.target, **move.stamps, **changes}
        )


class StatusIndex(models.Index):
    """An index over the jobs of one status.

    A partial index, so that other jobs cost nothing; where the vendor has none, a
    plain one that begins with the status. All its columns ascend, as InnoDB needs.
    """

    def __init__(self, *, status: str, fields: list[str], name: str) -> None:
        super().__init__(fields=fields, name=name)
        self.status = status

    def create_sql(
        self,
        model: type[models.Model],
        schema_editor: BaseDatabaseSchemaEditor,
        using: str = "",
        **kwargs: Any,
    ) -> Statement:
        if schema_editor.connection.features.supports_partial_indexes:
            condition = Q(status=self.status)
            index = models.Index(
                fields=self.fields, name=self.name, condition=condition
            )
        else:
            index = models.Index(fields=["status", *self.fields], name=self.name)
        return index.create_sql(model, schema_editor, using, **kwargs)

    def deconstruct(self) -> Any:
        path, expressions, kwargs = super().deconstruct()
        return path, expressions, kwargs | {"status": str(self.status)}


class Worker(models.Model):
    """A process that runs jobs; a new row at every registration.

    ``beat`` counts the beats of its heart, by which others see that it has not
    stalled; ``seen_at``, the moment of the last, is for people. Where it ``has_lock``,
    that one is free when the worker has died.
    """

    host = models.CharField(max_length=255)
    pid = models.PositiveIntegerField()
    version = models.CharField(max_length=32)
    queues = models.TextField(help_text="comma-separated; empty for all")
    threads = models.PositiveSmallIntegerField()
    beat = models.PositiveBigIntegerField(default=0)
    wants_wakeup = models.BooleanField(default=False)
    has_lock = models.BooleanField(default=True)
    seen_at = MomentField()
    dead_at = MomentField(null=True, blank=True)

    class Meta:
        db_table = "async_queue_worker"

    def __str__(self) -> str:
        return f"{self.pk} ({self.host}, process {self.pid})"


class Job(models.Model):
    """A call of a function that is to be made, is being made, or was made.

    ``rank`` is the negated priority, so that the order of the claim ascends in every
    column. ``attempt`` is the fencing number and only grows; ``failures`` counts
    what uses up the job's attempts. A ``suspect`` has lost its worker more than once,
    so it runs in a process of its own; ``crashes`` counts those that died of it.
    """

    Status = Status

    function = models.CharField(max_length=255)
    args = models.TextField(default="[]")
    kwargs = models.TextField(default="{}")
    meta = models.TextField(default="{}")
    seal = models.CharField(max_length=100, blank=True)
    identity = models.CharField(max_length=64)
    queue = models.CharField(max_length=64, default="default")
    rank = models.SmallIntegerField(default=0)
    run_after = MomentField()
    status = models.CharField(max_length=10, choices=Status, default=Status.READY)
    attempt = models.PositiveIntegerField(default=0, db_default=0)
    failures = models.PositiveIntegerField(default=0, db_default=0)
    suspect = models.BooleanField(default=False, db_default=False)
    crashes = models.PositiveIntegerField(default=0, db_default=0)
    worker = models.ForeignKey(
        Worker,
        on_delete=models.DO_NOTHING,
        null=True,
        blank=True,
        related_name="jobs",
        db_constraint=False,
        db_index=False,
    )
    enqueued_at = MomentField()
    started_at = MomentField(null=True, blank=True)
    finished_at = MomentField(null=True, blank=True)
    result = models.TextField(null=True, blank=True)

    objects = JobQuerySet.as_manager()

    class Meta:
        db_table = "async_queue_job"
        permissions = (
            ("retry_job", "Can run finished jobs again"),
            ("cancel_job", "Can cancel jobs"),
        )
        indexes = (
            StatusIndex(
                status=Status.READY,
                fields=["suspect", "queue", "rank", "run_after", "id"],
                name="async_queue_job_ready",
            ),
            StatusIndex(
                status=Status.WAITING,
                fields=["run_after", "id"],
                name="async_queue_job_waiting",
            ),
            StatusIndex(
                status=Status.RUNNING,
                fields=["worker", "id"],
                name="async_queue_job_running",
            ),
        )
        constraints = (
            models.CheckConstraint(
                condition=Q(status__in=Status.values),
                name="async_queue_job_status",
            ),
            models.CheckConstraint(
                condition=Q(status=Status.RUNNING, worker__isnull=False)
                | (~Q(status=Status.RUNNING) & Q(worker__isnull=True)),
                name="async_queue_job_worker",
            ),
            models.CheckConstraint(
                condition=Q(status__in=FINAL, finished_at__isnull=False)
                | Q(status__in=LIVE, finished_at__isnull=True),
                name="async_queue_job_finished",
            ),
            # PostgreSQL also has -infinity, which would stop whoever reads the row.
            models.CheckConstraint(
                condition=Q(run_after__range=MOMENTS),
                name="async_queue_job_run_after",
            ),
            models.CheckConstraint(
                condition=Q(enqueued_at__range=MOMENTS),
                name="async_queue_job_enqueued_at",
            ),
        )

    def __str__(self) -> str:
        return call_form(self.function, self.args, self.kwargs)

    @property
    def priority(self) -> int:
        """From -100 to 100; higher ones run first."""
        return -self.rank

    @property
    def is_finished(self) -> bool:
        """Whether the status is final, until a person runs the job again."""
        return self.status in FINAL

    @property
    def return_value(self) -> Any:
        """What the function returned.

        Raises ValueError unless the job is SUCCESSFUL.
        """
        if self.status != Status.SUCCESSFUL:
            raise ValueError(f"job {self.pk} is {self.status}: it has no return value")
        return None if self.result is None else codec.decode(self.result)

    def execute(self) -> Any:
        """Run this job here and now, in one transaction, and return what it returns.

        It must be WAITING or READY; its moment need not have come. What the function
        raises is recorded as by a worker, and raised. Raises InsideTransaction where
        the caller already is in a transaction (such as one of ATOMIC_REQUESTS), and
        NotExecutable for a job that is running elsewhere or finished.
        """
        return context.execute_here(self)


class Attempt(models.Model):
    """One attempt of a job that failed, was put off or was lost."""

    job = models.ForeignKey(
        Job, on_delete=models.CASCADE, related_name="attempts", db_constraint=False
    )
    number = models.PositiveIntegerField()
    worker = models.ForeignKey(
        Worker,
        on_delete=models.DO_NOTHING,
        null=True,
        related_name="attempts",
        db_constraint=False,
        db_index=False,
    )
    started_at = MomentField(null=True)
    finished_at = MomentField()
    exception = models.CharField(max_length=255)
    message = models.TextField()
    traceback = models.TextField()

    class Meta:
        db_table = "async_queue_attempt"
        ordering = ("id",)

    def __str__(self) -> str:
        return f"attempt {self.number} of job {self.job_id}: {self.exception}"


class Progress(models.Model):
    """How far a job says it is; written outside of the job's transaction."""

    job = models.OneToOneField(
        Job,
        on_delete=models.CASCADE,
        primary_key=True,
        related_name="progress",
        db_constraint=False,
    )
    done = models.PositiveBigIntegerField()
    total = models.PositiveBigIntegerField(null=True, blank=True)
    note = models.CharField(max_length=255, blank=True)

    class Meta:
        db_table = "async_queue_progress"

    def __str__(self) -> str:
        of = "" if self.total is None else f" of {self.total}"
        return f"job {self.job_id}: {self.done}{of} {self.note}".rstrip()
