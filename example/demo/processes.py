"""The demo's child processes: `manage.py run_workers`, and none outlives the demo."""

import os
import signal
import subprocess
import sys
import time

from django.conf import settings

from async_queue.models import Job

LOGS = settings.VAR / "logs"


class Workers:
    def __init__(self, **environment: str) -> None:
        self.environment = {**os.environ, **environment}
        self.started: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.running():
            process.terminate()
        for process in self.started:
            wait_or_kill(process)

    def start(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, str(settings.BASE / "manage.py"), "run_workers"]
        with (LOGS / f"worker-{len(self.started) + 1}.log").open("wb") as log:
            process = subprocess.Popen(
                [*command, "--no-reload"],
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        self.started.append(process)
        return process

    def running(self) -> list[subprocess.Popen[bytes]]:
        return [process for process in self.started if process.poll() is None]

    def last_words(self) -> str:
        log = LOGS / f"worker-{len(self.started)}.log"
        return log.read_text(errors="replace")[-2000:]


def wait_or_kill(process: subprocess.Popen[bytes]) -> None:
    try:
        process.wait(timeout=5)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


class Recovery:
    """Kills one process while it holds jobs and measures how soon these run again."""

    def __init__(self) -> None:
        self.attempts: dict[int, int] = {}
        self.first_after = self.all_after = 0.0

    def kill_one(self, processes: Workers) -> int | None:
        """Kill the first process found to hold jobs; return its id."""
        for process in processes.running():
            self.attempts = kill_while_it_holds_jobs(process)
            if self.attempts:
                self.killed_at = time.monotonic()
                return process.pid
        return None

    def look(self) -> None:
        if not self.attempts or self.all_after:
            return
        seconds = time.monotonic() - self.killed_at
        jobs = list(Job.objects.filter(pk__in=self.attempts))
        again = [job for job in jobs if job.attempt > self.attempts[job.pk]]
        if again and not self.first_after:
            self.first_after = seconds
        done = [job for job in again if job.status == Job.Status.SUCCESSFUL]
        if len(done) == len(self.attempts):
            self.all_after = seconds


def kill_while_it_holds_jobs(process: subprocess.Popen[bytes]) -> dict[int, int]:
    """Kill the process if it holds jobs; return their ids and attempts, else nothing.

    It is frozen first: what it holds cannot change between the look and the kill.
    """
    if process.poll() is not None:
        return {}
    os.kill(process.pid, signal.SIGSTOP)
    os.waitpid(process.pid, os.WUNTRACED)
    held = Job.objects.filter(status=Job.Status.RUNNING, worker__pid=process.pid)
    attempts = dict(held.values_list("pk", "attempt"))
    if attempts:
        process.kill()
        process.wait()
    else:
        process.send_signal(signal.SIGCONT)
    return attempts
