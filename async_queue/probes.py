"""Probes of a worker from outside: a file that it touches, and a port that it answers.

Whoever is probed tells by itself, without a database, whether it is live (its loop
turns) and ready (it has reached its database lately). Used by ``run_workers`` and by
``supervisor``, which probes its workers by their files.
"""

import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from socketserver import ThreadingTCPServer
from threading import Event, Thread
from typing import Protocol

logger = logging.getLogger("async_queue")

# As long as each other: a file is written over in place, so that it is never empty.
_LIVE, _READY = b"alive", b"ready"
_SLACK = 2.0  # seconds that a busy machine may be late


class Probed(Protocol):
    def is_live(self) -> bool: ...

    def is_ready(self) -> bool: ...


@contextmanager
def heartbeat(path: Path, probed: Probed, interval: float) -> Iterator[None]:
    """Touch the file every ``interval`` seconds while ``probed`` lives; then remove it.

    It says "alive" or "ready". Raises OSError where it cannot be written at first.
    """
    over = Event()
    path.write_bytes(_LIVE)
    thread = Thread(
        target=_beat,
        args=(path, probed, interval, over),
        name="async_queue-heartbeat",
        daemon=True,
    )
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        with suppress(OSError):
            path.unlink()


def _beat(path: Path, probed: Probed, interval: float, over: Event) -> None:
    is_well = True
    while not over.is_set():
        try:
            if probed.is_live():
                _write(path, _READY if probed.is_ready() else _LIVE)
            is_well = True
        # A full disk, for one, ends no worker, but is told of once.
        except OSError as error:
            if is_well:
                logger.warning("cannot write the heartbeat file: %s", error)
            is_well = False
        over.wait(interval)


def _write(path: Path, word: bytes) -> None:
    file = os.open(path, os.O_WRONLY | os.O_CREAT, 0o644)
    try:
        os.write(file, word)
        os.utime(path)  # also where the file system saves itself the same bytes
    finally:
        os.close(file)


def is_live(path: Path, interval: float) -> bool:
    """Whether the file is touched every ``interval`` seconds."""
    try:
        age = time.time() - path.stat().st_mtime
    except OSError:
        return False
    return age < 3 * interval + _SLACK


def is_ready(path: Path, interval: float) -> bool:
    """Whether the file is touched, and says that its worker is ready."""
    try:
        return is_live(path, interval) and path.read_bytes() == _READY
    except OSError:
        return False


@contextmanager
def health_port(host: str, port: int, probed: Probed) -> Iterator[int]:
    """Answer ``/live`` and ``/ready`` with 200 or 503; yield the port.

    Port 0 is any free one. Raises OSError where the port is taken.
    """
    server = _Server((host, port), _Handler)
    server.probed = probed
    # It looks so often, in seconds, whether it is over.
    thread = Thread(
        target=server.serve_forever,
        args=(0.25,),
        name="async_queue-health",
        daemon=True,
    )
    thread.start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        server.server_close()


class _Server(ThreadingTCPServer):
    """Unlike http.server's, it does not look up the name of its host: that may hang."""

    allow_reuse_address = os.name == "posix"
    daemon_threads = True
    probed: Probed


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    timeout = 5  # seconds for one request
    server_version = "async_queue"
    sys_version = ""

    def do_GET(self) -> None:
        code, text = self._answer()
        body = f"{text}\n".encode()
        self.send_response(code)
        self.send_header("Content-Type", "text/plain; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_HEAD(self) -> None:
        self.do_GET()

    def _answer(self) -> tuple[int, str]:
        path = self.path.partition("?")[0].rstrip("/")
        if path not in ("/live", "/ready"):
            return 404, "ask for /live or /ready"
        probed, word = self.server.probed, path[1:]
        # Who does not live is not ready, whatever it reached before.
        is_well = probed.is_live() and (word == "live" or probed.is_ready())
        return (200, word) if is_well else (503, f"not {word}")

    def log_message(self, format: str, *args: object) -> None:
        """Write nothing: a probe comes every few seconds."""
