"""Break everything around the queue, and look whether its promise held.

Three worker processes of four threads each, three clients that schedule jobs, and a
nemesis that picks a fault every second or so, by a seed: it kills and stops processes,
ends sessions, cuts, delays and stalls wires, restarts, kills and freezes the server,
cancels jobs, locks rows. Every now and then all is mended, and one worker is killed
while nothing else happens. In the end everything that is left must run, and what has
become of each job is held against what its client knows, and against the effects, in a
table without a unique constraint:

I1  a successful job has exactly one effect, by its final attempt
I2  a job that has not succeeded has none
I3  attempts never fall, and none commits twice
I4  no job is RUNNING without a live owner
I5  no job is lost, and none is there that was rolled back
I6  final states are final

Prints jobs, faults by kind, violations, jobs lost, how long it took until the jobs of
killed workers ran again, what memory the workers' processes had in the fifths of their
lives (that of worker-0 is never killed), and the connections that were left over once
all had ended. Exits with 1 where something was violated. A seed gives the same faults
in about the same order, but not at the same moments of each job.

With --control the workers run a protocol that is broken on purpose, and the run exits
with 1 if it has not found that out:

no-fence       a run succeeds whatever has become of its claim
early-ack      a success is recorded before the function is called
trigger-happy  jobs of live workers are rescued, and attempts are not compared
no-rescue      the jobs of dead workers stay where they are

The database is made for the run, SQLite in a file, the others as a server of its own
in a temporary folder, and gone with it; their programs must be installed.
"""

import argparse
import json
import os
import signal
import sys
from typing import Any

import django

# Of benchmarks.chaos.mutants, which cannot be imported before the settings are known.
_CONTROLS = ("no-fence", "early-ack", "trigger-happy", "no-rescue")
_DATABASES = ("postgres", "mariadb", "sqlite")
_SHOWN = 20


def main() -> int:
    options = _options()
    os.environ["DB"] = options.db
    os.environ["DJANGO_SETTINGS_MODULE"] = "benchmarks.chaos.settings"
    os.environ.pop("AQ_TEST_DATABASE", None)
    # So that servers and workers end with it.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    django.setup()
    # Models can be imported only now.
    from benchmarks.chaos.run import run

    found = run(
        seconds=options.seconds,
        seed=options.seed,
        rate=options.rate,
        control=options.control,
        logs=options.logs,
    )
    if options.json:
        print(json.dumps(found, indent=1))
    else:
        _show(found)
    return int(bool(found["violations"]) == (options.control is None))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.chaos",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--db", choices=_DATABASES, required=True, help="what the queue is on")
    add(
        "--seconds",
        type=float,
        default=60,
        help="for how long things break; it takes some more to begin and to end",
    )
    add("--seed", type=int, default=7, help="of the faults and of the jobs")
    add("--rate", type=float, default=30, help="jobs that are scheduled a second")
    add("--control", choices=_CONTROLS, help="what is broken on purpose, see above")
    add(
        "--logs",
        metavar="FOLDER",
        help="where the workers' logs stay, and, if jobs did not end, the stacks of "
        "the workers and the sessions of the server",
    )
    add("--json", action="store_true", help="print the figures as JSON")
    return parser.parse_args()


def _show(found: dict[str, Any]) -> None:
    examples = found.pop("examples")
    for name, value in found.items():
        if isinstance(value, dict):
            value = ", ".join(f"{key}: {each}" for key, each in value.items())
        print(f"{name:<24} {value}")
    for example in examples[:_SHOWN]:
        print(f"  {example}")


if __name__ == "__main__":
    sys.exit(main())
