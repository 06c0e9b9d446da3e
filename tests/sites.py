"""Web servers of the project with a worker inside; what they say goes into files."""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from time import monotonic
from typing import Any
from urllib.request import ProxyHandler, build_opener

from django.db import connection

from tests.process import ROOT
from tests.workers import descendants

WSGI = "django.core.wsgi:get_wsgi_application()"
ASGI = "django.core.asgi:get_asgi_application"
# What serves, without its address.
SERVERS = {
    "runserver": ["django", "runserver", "--noreload"],
    "reloading": ["django", "runserver"],
    "gunicorn": ["gunicorn", "--preload", "--workers=2", WSGI],
    "threads": ["gunicorn", "--threads=4", WSGI],
    "uvicorn": ["uvicorn", "--factory", ASGI],
    "processes": ["uvicorn", "--workers=2", "--factory", ASGI],
}
_open = build_opener(ProxyHandler({})).open


class Site:
    """A web server that was started."""

    def __init__(
        self, process: subprocess.Popen[bytes], port: int, log: Path, kind: str
    ) -> None:
        self.process = process
        self.kind = kind
        self._port = port
        self._log = log

    @property
    def said(self) -> str:
        return self._log.read_text(encoding="utf-8")

    def get(self, page: str) -> int:
        """Ask for a page; return the number of the process that has answered."""
        with _open(f"http://127.0.0.1:{self._port}/{page}/", timeout=20) as answer:
            return int(answer.read())

    def is_up(self) -> bool:
        """Whether it accepts connections; no request is made."""
        assert self.process.poll() is None, self.said
        try:
            socket.create_connection(("127.0.0.1", self._port), timeout=5).close()
        except OSError:
            return False
        return True

    def tell(self, number: signal.Signals) -> None:
        """Send a signal to the process that is to stop, as an operator would."""
        # Ctrl-C, for a server that loads code anew, is for the one that serves.
        serving = descendants(self.process.pid) if self.kind == "reloading" else []
        os.kill((serving or [self.process.pid])[0], number)

    def stop(self) -> int:
        """Let it stop; return its exit code."""
        if self.kind not in ("runserver", "reloading"):
            self.tell(signal.SIGTERM)
            return self.process.wait(40)
        # What Ctrl-C raises is lost where Python has just called back: press it again.
        for _ in range(3):
            self.tell(signal.SIGINT)
            with suppress(subprocess.TimeoutExpired):
                return self.process.wait(15)
        return self.process.wait(15)


@contextmanager
def site(
    kind: str,
    folder: Path,
    *,
    environment: dict[str, str] | None = None,
    database: dict[str, Any] | None = None,
    **settings: Any,
) -> Iterator[Site]:
    """Serve the tests' project until the block ends.

    ``settings`` are ASYNC_QUEUE's, ``database`` changes those of the database.
    """
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    log = folder / f"{kind}-{monotonic()}.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", *_command(kind, port)],
            cwd=ROOT,
            env={
                **os.environ,
                "DJANGO_SETTINGS_MODULE": "tests.settings",
                "AQ_TEST_DATABASE": str(connection.settings_dict["NAME"]),
                "AQ_TEST_OPTIONS": json.dumps(database or {}),
                "AQ_TEST_SETTINGS": json.dumps({"IN_PROCESS": True, **settings}),
                **(environment or {}),
            },
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
        )
    try:
        yield Site(process, port, log, kind)
    finally:
        for pid in [process.pid, *descendants(process.pid)]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait(20)
        # Shown where the test fails.
        sys.stderr.write(log.read_text(encoding="utf-8"))


def _command(kind: str, port: int) -> list[str]:
    command = SERVERS[kind]
    if command[0] == "django":
        return [*command, f"127.0.0.1:{port}"]
    if command[0] == "gunicorn":
        return [*command, f"--bind=127.0.0.1:{port}"]
    return [*command, f"--port={port}"]
