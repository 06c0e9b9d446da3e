import pytest

from async_queue.models import FINAL, TRANSITIONS, Job, Status
from tests.factories import JobFactory, WorkerFactory

pytestmark = pytest.mark.django_db

STATES = {
    Status.WAITING: {"waiting": True},
    Status.READY: {},
    Status.RUNNING: {"running": True},
    Status.SUCCESSFUL: {"successful": True, "result": "1"},
    Status.FAILED: {"failed": True},
    Status.CANCELLED: {"cancelled": True},
}


def changes_of(action):
    """What the callers of an action give beside what the table says."""
    if TRANSITIONS[action].target == Status.RUNNING:
        return {"worker": WorkerFactory()}
    return {}


@pytest.mark.parametrize("status", Status)
@pytest.mark.parametrize("action", TRANSITIONS)
def test_an_action_changes_the_jobs_in_its_states_and_no_others(action, status):
    job = JobFactory(**STATES[status])
    bystander = JobFactory()
    before = Job.objects.values().get(pk=job.pk)
    move = TRANSITIONS[action]

    changed = Job.objects.filter(pk=job.pk).transition(action, **changes_of(action))

    assert changed == (status in move.sources)
    after = Job.objects.values().get(pk=job.pk)
    assert after == before if not changed else after["status"] == move.target
    assert Job.objects.get(pk=bystander.pk).status == Status.READY


@pytest.mark.parametrize("action", TRANSITIONS)
def test_an_action_leaves_a_consistent_row(action):
    move = TRANSITIONS[action]
    job = JobFactory(**STATES[move.sources[0]])

    Job.objects.filter(pk=job.pk).transition(action, **changes_of(action))

    job.refresh_from_db()
    assert (job.worker_id is not None) == (move.target == Status.RUNNING)
    assert (job.finished_at is not None) == (move.target in FINAL)
    assert job.attempt == JobFactory(**STATES[move.sources[0]]).attempt


def test_a_final_status_is_left_by_a_person_only():
    leaving = {
        action for action, move in TRANSITIONS.items() if set(move.sources) & set(FINAL)
    }

    assert leaving == {"run again"}


def test_running_again_starts_the_counters_but_not_the_attempts():
    job = JobFactory(failed=True, attempt=5, failures=5, result="1")

    Job.objects.transition("run again")

    job.refresh_from_db()
    assert (job.attempt, job.failures, job.result) == (5, 0, None)


def test_one_action_changes_all_the_jobs_of_a_queryset():
    JobFactory.create_batch(3)
    JobFactory(successful=True)

    assert Job.objects.transition("cancel") == 3
