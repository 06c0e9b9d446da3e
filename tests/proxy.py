"""A TCP proxy before a database: cuts, stalls, delays and refuses connections.

A connection can be cut at its next COMMIT, too.
"""

import re
import socket
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from threading import Event, Lock, Thread
from weakref import WeakSet

_SIZE = 65536
# MariaDB's driver speaks of autocommit, too.
_COMMIT = re.compile(rb"\bcommit\b", re.I)
TO_SERVER, TO_CLIENT = DIRECTIONS = "to_server", "to_client"
Pair = tuple[socket.socket, socket.socket]


class Proxy:
    """Passes everything on, unless it was told otherwise.

    A direction is TO_SERVER or TO_CLIENT; without one, both are meant.
    """

    def __init__(self, host: str, port: int, listen: str = "127.0.0.1") -> None:
        self._server = (host, port)
        self._listener = socket.create_server((listen, 0))
        self._address = self._listener.getsockname()
        self.port: int = self._address[1]
        # "before" the server gets the next COMMIT, or "after" it has answered it.
        self.cut: str | None = None
        self.cuts = 0
        # Seconds by which each piece (up to 64 KiB) comes later.
        self.delay = dict.fromkeys(DIRECTIONS, 0.0)
        self._flowing = {direction: Event() for direction in DIRECTIONS}
        self._pairs: set[Pair] = set()
        self._deaf: WeakSet[socket.socket] = WeakSet()
        self._lock = Lock()
        self._closed = Event()
        self._is_refusing = False
        self.resume()

    def cut_all(self) -> int:
        """End all connections, both ways, and return how many; new ones may come."""
        with self._lock:
            pairs = list(self._pairs)
        for pair in pairs:
            for end in pair:
                with suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)
        return len(pairs)

    def stall(self, *directions: str) -> None:
        """Pass nothing on any more, not even the end of a connection."""
        for direction in directions or DIRECTIONS:
            self._flowing[direction].clear()

    def resume(self, *directions: str) -> None:
        """Pass on what was held back, and all that comes."""
        for direction in directions or DIRECTIONS:
            self._flowing[direction].set()

    def refuse(self) -> None:
        """Accept no new connection, as a machine where no server runs."""
        self._is_refusing = True
        self._stop_listening()
        # Keeps the port, which else somebody might be given meanwhile.
        self._listener = socket.socket()
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._listener.bind(self._address)

    def admit(self) -> None:
        """Accept new connections again."""
        self._is_refusing = False
        self._listener.listen()
        _start(self.serve)

    def count(self) -> int:
        """Return how many connections there are through the proxy now."""
        with self._lock:
            return len(self._pairs)

    def serve(self) -> None:
        listener = self._listener
        with suppress(OSError):  # closed
            while True:
                client, _ = listener.accept()
                # By another thread, because a server may be long in answering.
                _start(self._connect, client)

    def close(self) -> None:
        self._stop_listening()
        self._closed.set()
        self.resume()

    def _stop_listening(self) -> None:
        # Only this wakes a thread that accepts.
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _connect(self, client: socket.socket) -> None:
        try:
            server = socket.create_connection(self._server)
        except OSError:  # the server is away: so are we, to this client
            client.close()
            return
        pair = (client, server)
        with self._lock:
            self._pairs.add(pair)
        if self._is_refusing:  # accepted just before: cut_all() may have missed it
            client.shutdown(socket.SHUT_RDWR)
        _start(self._pass_on, pair, TO_SERVER)
        _start(self._pass_on, pair, TO_CLIENT)

    def _pass_on(self, pair: Pair, direction: str) -> None:
        is_client = direction == TO_SERVER
        source, target = pair if is_client else reversed(pair)
        with self._forgetting(pair), source, target, self._torn(pair, direction):
            while chunk := source.recv(_SIZE):
                self._hold_back(direction)
                if is_client and self.cut and _COMMIT.search(chunk):
                    self._cut_off(source, target, chunk)
                    return
                if target in self._deaf:
                    return
                target.sendall(chunk)
            self._hold_back(direction)
            target.shutdown(socket.SHUT_RDWR)

    @contextmanager
    def _forgetting(self, pair: Pair) -> Iterator[None]:
        try:
            yield
        finally:
            with self._lock:
                self._pairs.discard(pair)

    @contextmanager
    def _torn(self, pair: Pair, direction: str) -> Iterator[None]:
        """End both ways where one end is torn off, as of a client that is killed."""
        try:
            yield
        except OSError:
            self._hold_back(direction)
            for end in pair:
                with suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)

    def _hold_back(self, direction: str) -> None:
        if self.delay[direction]:
            self._closed.wait(self.delay[direction])
        self._flowing[direction].wait()

    def _cut_off(
        self, client: socket.socket, server: socket.socket, commit: bytes
    ) -> None:
        how, self.cut = self.cut, None
        self.cuts += 1
        # From now on nothing comes back.
        self._deaf.add(client)
        if how == "after":
            server.sendall(commit)
            # The server closes only when it has done what was sent before.
            server.shutdown(socket.SHUT_WR)
        else:
            server.shutdown(socket.SHUT_RDWR)
        client.shutdown(socket.SHUT_WR)


def _start(function: object, *args: object) -> None:
    Thread(target=function, args=args, daemon=True).start()  # type: ignore[arg-type]


@contextmanager
def proxy(host: str, port: int, listen: str = "127.0.0.1") -> Iterator[Proxy]:
    """Run a proxy before a server until the block ends."""
    with closing(Proxy(host, port, listen)) as made:
        _start(made.serve)
        yield made
