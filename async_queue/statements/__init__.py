"""The prepared SQL of a job's path, and of the ticks of the workers.

The ORM would cost several times the statement itself here. Conditions and targets
come from `TRANSITIONS`; what differs between databases, from `db`. In the order of a
job's life:

- `insert` gives birth to it; `announce` wakes who wants it, see `want_wakeup`;
- `heads` tells which queues have READY jobs, `heads_from` which still have; `claim`
  takes some for a worker, `claim_here` one for a transaction; `held_job` reads one that
  was taken;
- `finish` ends it: the fence; `finish_many` ends some that have written nothing;
- `tick` is a worker's beat, with all it has to look for; `running` is what it holds.
"""

from async_queue.statements.claims import claim, claim_here, heads, heads_from, held_job
from async_queue.statements.ends import finish, finish_many
from async_queue.statements.inserts import insert
from async_queue.statements.rows import (
    ANYTHING,
    InsertedJob,
    NewJob,
    Position,
    Selection,
    now,
)
from async_queue.statements.ticks import Other, Tick, running, tick
from async_queue.statements.wakeups import CHANNEL, CLOCK, announce, want_wakeup

__all__ = [
    "ANYTHING",
    "CHANNEL",
    "CLOCK",
    "InsertedJob",
    "NewJob",
    "Other",
    "Position",
    "Selection",
    "Tick",
    "announce",
    "claim",
    "claim_here",
    "finish",
    "finish_many",
    "heads",
    "heads_from",
    "held_job",
    "insert",
    "now",
    "running",
    "tick",
    "want_wakeup",
]
