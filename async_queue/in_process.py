"""A worker inside the web server's process, for a site that needs no second one.

ASYNC_QUEUE["IN_PROCESS"] switches it on. It starts with the first request, because
only then it is certain that this process serves, and will not fork its servers any
more; and it stops when the process ends.
"""

import atexit
import logging
import os
import signal
import sys
import threading
from typing import Any

from asgiref.sync import async_to_sync
from django.core.handlers.asgi import ASGIHandler
from django.core.handlers.wsgi import WSGIHandler
from django.core.signals import request_started
from django.db import Error

from async_queue import conf
from async_queue.exceptions import AsyncQueueError
from async_queue.worker import Worker

logger = logging.getLogger("async_queue")

# Seconds between two tries to start, while the database is away or not migrated.
_AGAIN = 1.0
# Seconds for a worker's own end, beside the time that its jobs have.
_MARGIN = 10.0

_lock = threading.Lock()
# The process that has its worker; a forked child is another one.
_served: int | None = None


def serve_with_requests() -> None:
    """Start a worker with the first request that a server passes on to Django."""
    request_started.connect(_start_once, dispatch_uid="async_queue.in_process")


def _start_once(*, sender: Any, **kwargs: Any) -> None:
    global _served
    if _served == os.getpid() or not _is_server(sender):
        return
    with _lock:
        if _served == os.getpid():
            return
        _served = os.getpid()
    # A site whose jobs do not run serves its pages still.
    try:
        _start(sender)
    except Exception:
        logger.exception("no jobs run in this process")


def _is_server(sender: Any) -> bool:
    # Requests of Django's test client come from another handler, those of its live
    # servers from the same; but there a worker would outlast the database.
    is_handler = isinstance(sender, type) and issubclass(
        sender, (WSGIHandler, ASGIHandler)
    )
    return is_handler and not _is_test()


def _is_test() -> bool:
    utils = sys.modules.get("django.test.utils")
    return hasattr(getattr(utils, "_TestState", None), "saved_data")


def _start(sender: Any) -> None:
    if not conf.settings().in_process:
        return
    inside = Inside()
    inside.start()
    if issubclass(sender, ASGIHandler):
        # In the thread of the server's loop: the main one, as a rule.
        async_to_sync(inside.defer_term)()


class Inside:
    """Workers in a thread of this process, one after the other, until it ends."""

    def __init__(self) -> None:
        self._process = os.getpid()
        self._worker = self._new_worker()
        self._is_over = threading.Event()
        self._told = ""
        self._holds_term = False
        self._thread = threading.Thread(
            target=self._run, name="async_queue-in-process", daemon=True
        )

    def start(self) -> None:
        """Start, and stop at the end of the process."""
        self._thread.start()
        # Where Python has it, before the pools of threads are closed for good: a job
        # may use one to its end.
        getattr(threading, "_register_atexit", atexit.register)(self.stop)

    def stop(self) -> None:
        """Stop as a worker does, and wait for that."""
        # A forked child has the intention, but not the threads.
        if os.getpid() != self._process:
            return
        self._is_over.set()
        self._worker.stop()
        self._thread.join(conf.settings().shutdown_timeout.total_seconds() + _MARGIN)
        if self._holds_term:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])

    async def defer_term(self) -> None:
        """Let a server that ends by the signal that has stopped it wait for `stop`.

        Uvicorn does: once it has served, it raises the signal again, which would kill
        the process before Python ends anything.
        """
        is_main = threading.current_thread() is threading.main_thread()
        former = signal.getsignal(signal.SIGTERM)
        if not (is_main and callable(former) and hasattr(signal, "pthread_sigmask")):
            return

        def defer(number: int, frame: Any) -> Any:
            # For this thread, where it is raised; one from outside finds others.
            signal.pthread_sigmask(signal.SIG_BLOCK, [number])
            self._holds_term = True
            return former(number, frame)

        signal.signal(signal.SIGTERM, defer)

    def _run(self) -> None:
        while not self._is_over.is_set():
            # Until the process ends there is nobody else to run its jobs.
            try:
                self._worker.run()
                self._note(f"the worker has ended: {self._worker.reason}")
            except (Error, AsyncQueueError) as error:
                self._note(str(error).strip().partition("\n")[0])
            except Exception:
                logger.exception("the worker of this process has failed")
            if not self._is_over.wait(_AGAIN):
                self._worker = self._new_worker()

    def _note(self, reason: str) -> None:
        if reason != self._told and not self._is_over.is_set():
            logger.warning("no jobs run in this process, trying again: %s", reason)
        self._told = reason

    def _new_worker(self) -> Worker:
        return Worker(shutdown_timeout=conf.settings().shutdown_timeout)
