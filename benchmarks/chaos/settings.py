"""Django's settings for the chaos run: the tests' own, with little patience."""

from tests.settings import *  # noqa: F403  the rest of them
from tests.settings import DATABASES, INSTALLED_APPS

# Seconds that a job takes at most.
LONGEST = 1.5
if DATABASES["default"]["ENGINE"].endswith("sqlite3"):
    # As a project sets them that writes from many processes.
    DATABASES["default"]["OPTIONS"] = {"timeout": 30, "transaction_mode": "IMMEDIATE"}
    LONGEST = 0.3  # for meanwhile nobody else can write

INSTALLED_APPS = [*INSTALLED_APPS, "benchmarks.chaos.mutants.Mutants"]
STALL_AFTER = 3
ASYNC_QUEUE = {
    "STALL_AFTER": STALL_AFTER,
    "POLL_INTERVAL": 0.5,
    "SHUTDOWN_TIMEOUT": 5,
    "BACKOFF": "benchmarks.chaos.workload.soon",
}
