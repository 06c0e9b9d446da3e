"""Waiting for a word that there may be work.

The keeper waits here between its ticks. PostgreSQL sends word, SQLite's file shows a
change, any thread or signal handler may `wake`; elsewhere the time just passes.
"""

import logging
import math
import selectors
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from time import monotonic, sleep

from django.db import OperationalError
from django.db.backends.base.base import BaseDatabaseWrapper

from async_queue import conf
from async_queue.db import vendor

logger = logging.getLogger("async_queue")

# Seconds between two glances at SQLite's file. They cost 0.4 % of a core, nearly all
# of it for falling asleep and waking up.
_GLANCE = 0.043
# Seconds of silence after which a listener asks for an echo.
_SILENCE = 10.0
ECHO = "echo:"  # which no queue can be called
_DEAF_ROUNDS = 2


class Notifier:
    """What a keeper waits on.

    Only `wake` may be called from other threads. `is_listening` tells whether word
    from the database is expected; without it, somebody has to look now and then.
    """

    def __init__(self) -> None:
        self.is_listening = False
        self._is_woken = False
        self._inner, self._outer = socket.socketpair()
        self._inner.setblocking(False)
        self._outer.setblocking(False)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._inner, selectors.EVENT_READ)
        self._version: int | None = None
        self._has_given_up = False
        self._heard_at = -math.inf
        self._expects_echo = False
        self._deaf_rounds = 0

    def wake(self) -> None:
        """End the wait, or the next one; also from a signal handler."""
        self._is_woken = True
        # Where it is full, the wait ends anyway; where it is closed, there is none.
        with suppress(OSError):
            self._outer.send(b"!")

    def close(self) -> None:
        """Give the descriptors back."""
        self._selector.close()
        self._inner.close()
        self._outer.close()

    def listen(self, connection: BaseDatabaseWrapper) -> None:
        """Listen in a new session, if its database sends word and it arrives."""
        facts = vendor(connection)
        self._heard_at = -math.inf
        self._expects_echo, self._deaf_rounds = False, 0
        self.is_listening = (
            facts.listens
            and conf.settings().notify
            and not self._has_given_up
            # Elsewhere it would be somebody else's session that listens.
            and facts.has_lasting_sessions(connection)
        )
        if self.is_listening:
            facts.listen(connection)

    def echo(self) -> str | None:
        """Return what the next tick shall send, to be heard before the next but one.

        None, if something was heard lately, be it by another worker. After two echoes
        that did not come back, this listens no more.
        """
        if not self.is_listening:
            return None
        if self._expects_echo:
            self._deaf_rounds += 1
            if self._deaf_rounds == _DEAF_ROUNDS:
                self._give_up()
                return None
        elif monotonic() - self._heard_at < _SILENCE:
            return None
        self._expects_echo = True
        return ECHO

    def wait(self, connection: BaseDatabaseWrapper, seconds: float) -> list[str]:
        """Wait so long, or until there is word; return what was said, if anything.

        That is names of queues that have READY jobs, and "" for anything else that is
        worth a look. Raises Error once the server has hung up.
        """
        deadline = monotonic() + seconds
        has_spoken = False
        with self._watched(connection):
            while True:
                said = self._news(connection, has_spoken)
                if self._was_woken() or said:
                    return said
                if (left := deadline - monotonic()) <= 0:
                    return []
                has_spoken = self._pause(connection, left)

    def _give_up(self) -> None:
        self.is_listening, self._has_given_up = False, True
        logger.warning(
            "notifications do not arrive, as behind a transaction pooler: looking for "
            "jobs every %g s instead",
            conf.settings().poll_interval.total_seconds(),
        )

    @contextmanager
    def _watched(self, connection: BaseDatabaseWrapper) -> Iterator[None]:
        """Let what the server sends, and that it hangs up, end the pauses."""
        descriptor = vendor(connection).descriptor(connection)
        if descriptor is None:
            yield
            return
        self._selector.register(descriptor, selectors.EVENT_READ)
        try:
            yield
        finally:
            self._selector.unregister(descriptor)

    def _news(self, connection: BaseDatabaseWrapper, has_spoken: bool) -> list[str]:
        facts = vendor(connection)
        words = facts.heard(connection) if self.is_listening else []
        if words:
            self._heard_at = monotonic()
            self._expects_echo, self._deaf_rounds = False, 0
        # Otherwise a server says nothing unasked, but for a last word.
        elif has_spoken and not connection.is_usable():
            raise OperationalError("the server has hung up")
        said = [word for word in words if word != ECHO]
        before, self._version = self._version, facts.data_version(connection)
        return [*said, ""] if before not in (None, self._version) else said

    def _was_woken(self) -> bool:
        self._is_woken = was_woken = False
        with suppress(BlockingIOError):
            while self._inner.recv(4096):
                was_woken = True
        return was_woken

    def _pause(self, connection: BaseDatabaseWrapper, seconds: float) -> bool:
        """Pause until there is something to see; tell whether the server sent it."""
        if self._version is None:
            ready = self._selector.select(seconds)
            return any(key.fileobj is not self._inner for key, _ in ready)
        look = vendor(connection).data_version
        deadline = monotonic() + seconds
        # As little as can be, for this is what an idle worker costs: falling asleep in
        # the selector, say, takes half as long again.
        while (left := deadline - monotonic()) > 0 and not self._is_woken:
            sleep(min(left, _GLANCE))
            if look(connection) != self._version:
                break
        return False
