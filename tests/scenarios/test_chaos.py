"""Everything breaks at random, for seconds; two broken protocols are found out.

Faults 49 and 50. All run at once, each on a database, or server, of its own.
"""

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
from django.db import connection

from tests import servers
from tests.figures import figure
from tests.long import long
from tests.process import ROOT

pytestmark = pytest.mark.skipif(
    bool(connection.settings_dict["HOST"] and servers.obstacle()),
    reason=servers.obstacle() or "there is one",
)
DATABASES = {"sqlite": "sqlite", "postgresql": "postgres", "mysql": "mariadb"}
SEED = 3
# Many jobs, so that few seconds will do.
BRIEFLY = ("--seconds=3", "--rate=90")
CONTROLS = ("no-fence", "early-ack")
PATIENCE = long(80, 400)  # seconds, of which it needs few if nothing is wrong


class Told(NamedTuple):
    code: int
    figures: dict[str, Any]


def chaos(*arguments: str) -> subprocess.Popen[str]:
    command = ["-m", "benchmarks.chaos", "--db", DATABASES[connection.vendor]]
    return subprocess.Popen(
        [sys.executable, *command, "--json", f"--seed={SEED}", *arguments],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture(scope="module")
def runs() -> Iterator[dict[str, subprocess.Popen[str]]]:
    """Start them all; they end in good order where a test does not wait for them."""
    started = {name: chaos(f"--control={name}", *BRIEFLY) for name in CONTROLS}
    started[""] = chaos(f"--seconds={long(5, 120)}")
    try:
        yield started
    finally:
        for process in started.values():
            process.send_signal(signal.SIGTERM)
            process.communicate()


def heard(process: subprocess.Popen[str]) -> Told:
    said, complaint = process.communicate(timeout=PATIENCE)
    assert said, complaint
    return Told(process.returncode, json.loads(said))


def test_chaos_loses_and_repeats_nothing(
    runs: dict[str, subprocess.Popen[str]],
) -> None:
    code, figures = heard(runs[""])

    assert figures["examples"] == []
    assert (figures["violations"], figures["jobs lost"]) == (0, 0)
    assert figures["connections left"] == 0
    assert code == 0
    assert figures["jobs"] > 20
    assert figures["faults in all"] > 0
    for name in ("jobs", "faults in all", "violations", "jobs lost"):
        figure(f"chaos for {figures['seconds']} s: {name}", figures[name])


@pytest.mark.parametrize("control", CONTROLS)
def test_chaos_finds_out_a_broken_protocol(
    runs: dict[str, subprocess.Popen[str]], control: str
) -> None:
    code, figures = heard(runs[control])

    assert figures["violations"] > 0
    assert code == 0
    figure(f"chaos, {control}: violations found", figures["violations"])
