"""Worker processes of any system, and what they use: from /proc, of all descendants."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from benchmarks.places import ROOT

_TICKS = os.sysconf("SC_CLK_TCK")
_ENDS_IN = 20  # seconds, once it was told to
_SHOWN = 1500


class Memory(NamedTuple):
    """In MiB: resident; with shared pages divided among those who share; private."""

    rss: float
    pss: float
    uss: float


class Processes:
    """The processes of some commands, and all that these start."""

    def __init__(self, started: list[subprocess.Popen[bytes]], log: Path) -> None:
        self._started = started
        self._log = log

    @property
    def has_ended(self) -> bool:
        """Whether one of the commands has ended, which none should by itself."""
        return any(process.poll() is not None for process in self._started)

    def said(self) -> str:
        """Return the end of what they wrote."""
        return self._log.read_text(errors="replace")[-_SHOWN:]

    def pids(self) -> list[int]:
        return [pid for each in self._started for pid in _family(each.pid)]

    def cpu_seconds(self) -> float:
        return sum(map(_cpu_seconds, self.pids()))

    def memory(self) -> Memory:
        found = [_memory(pid) for pid in self.pids()]
        return Memory(*(round(sum(each), 2) for each in zip(*found, strict=True)))


@contextmanager
def running(
    commands: Sequence[Sequence[str]], environment: Mapping[str, str], log: Path
) -> Iterator[Processes]:
    """Run the commands beside each other; end them and all they started."""
    with ExitStack() as around:
        yield Processes(
            [
                around.enter_context(_process(each, environment, log))
                for each in commands
            ],
            log,
        )


def python(*arguments: str) -> list[str]:
    """Return a command of this Python."""
    return [sys.executable, *arguments]


@contextmanager
def _process(
    command: Sequence[str], environment: Mapping[str, str], log: Path
) -> Iterator[subprocess.Popen[bytes]]:
    with log.open("ab") as output:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,  # its group is what is killed in the end
        )
    try:
        yield process
    finally:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(_ENDS_IN)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _family(pid: int) -> list[int]:
    """Return the process and its descendants."""
    parents = dict(_parents())
    family = [pid]
    for member in family:  # which grows meanwhile
        family += [child for child, parent in parents.items() if parent == member]
    return family


def _parents() -> Iterator[tuple[int, int]]:
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            yield int(path.parent.name), int(_fields(path)[1])


def _fields(path: Path) -> list[str]:
    # The name, in brackets, may hold anything.
    return path.read_text().rpartition(")")[2].split()


def _cpu_seconds(pid: int) -> float:
    with suppress(OSError):
        fields = _fields(Path(f"/proc/{pid}/stat"))
        return (int(fields[11]) + int(fields[12])) / _TICKS
    return 0.0


def _memory(pid: int) -> Memory:
    kib = {"Rss": 0, "Pss": 0, "Private_Clean": 0, "Private_Dirty": 0}
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]:
            key, _, value = line.partition(":")
            if key in kib:
                kib[key] = int(value.split()[0])
    private = kib["Private_Clean"] + kib["Private_Dirty"]
    return Memory(kib["Rss"] / 1024, kib["Pss"] / 1024, private / 1024)
