"""What must hold of jobs and their effects after whatever has happened."""

import json
from collections import Counter
from collections.abc import Iterable

from async_queue.models import Job, Status, Worker
from tests.models import Effect


def assert_kept(*, repeated: Iterable[str] = ()) -> None:
    """Assert that successful jobs have one effect each, and all others none.

    The first argument of each job is the label of its effect. Those ``repeated`` were
    atomic=False, and may have one more.
    """
    jobs = {
        json.loads(args)[0]: status
        for args, status in Job.objects.values_list("args", "status")
    }
    assert len(jobs) == Job.objects.count(), "a label was used twice"
    effects = Counter(Effect.objects.values_list("label", flat=True))
    assert not effects.keys() - jobs.keys(), "effects of no job"
    for label, status in jobs.items():
        wanted = int(status == Status.SUCCESSFUL)
        allowed = {wanted, wanted + 1} if label in set(repeated) else {wanted}
        assert effects[label] in allowed, f"{label}, {status}: {effects[label]} effects"


def assert_nobody_works() -> None:
    """Assert that no worker is left that seems alive, nor any job that seems held."""
    assert not Worker.objects.filter(dead_at=None).exists()
    assert not Job.objects.filter(status=Status.RUNNING).exists()
