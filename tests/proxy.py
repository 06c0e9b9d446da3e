"""A TCP proxy before a database, which can cut a connection at its next COMMIT."""

import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from threading import Thread

_SIZE = 65536
# MariaDB's driver speaks of autocommit, too.
_COMMIT = re.compile(rb"\bcommit\b", re.I)


class Proxy:
    """Passes everything on, but for the next COMMIT once it was told to cut there."""

    def __init__(self, host: str, port: int) -> None:
        self._server = (host, port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        # "before" the server gets the next COMMIT, or "after" it has answered it.
        self.cut: str | None = None
        self.cuts = 0

    def serve(self) -> None:
        with suppress(OSError):  # closed
            while True:
                client, _ = self._listener.accept()
                server = socket.create_connection(self._server)
                for pair in ((client, server), (server, client)):
                    _start(self._pass_on, *pair, pair[0] is client)

    def close(self) -> None:
        # Only this wakes a thread that accepts.
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _pass_on(
        self, source: socket.socket, target: socket.socket, is_client: bool
    ) -> None:
        with suppress(OSError), source, target:
            while chunk := source.recv(_SIZE):
                if is_client and self.cut and _COMMIT.search(chunk):
                    self._cut_off(source, target, chunk)
                    return
                target.sendall(chunk)
            target.shutdown(socket.SHUT_RDWR)

    def _cut_off(
        self, client: socket.socket, server: socket.socket, commit: bytes
    ) -> None:
        how, self.cut = self.cut, None
        # From now on nothing comes back.
        client.shutdown(socket.SHUT_WR)
        if how == "after":
            server.sendall(commit)
            # The server closes only when it has done what was sent before.
            server.shutdown(socket.SHUT_WR)
        else:
            server.shutdown(socket.SHUT_RDWR)
        self.cuts += 1


def _start(function: object, *args: object) -> None:
    Thread(target=function, args=args, daemon=True).start()  # type: ignore[arg-type]


@contextmanager
def proxy(host: str, port: int) -> Iterator[Proxy]:
    """Run a proxy before a server until the block ends."""
    made = Proxy(host, port)
    _start(made.serve)
    try:
        yield made
    finally:
        made.close()
