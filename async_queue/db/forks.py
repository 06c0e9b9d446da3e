"""What a forked child must not touch: the sessions of its parent.

Its copy of a socket keeps a session, and the locks in it, when the parent dies, and a
word on it is a word of the parent's. So sessions of the queue are put out of reach
in every child, and Django opens new ones there.
"""

import os
from contextlib import suppress
from typing import Any
from weakref import WeakKeyDictionary

from django.db import Error, connections
from django.db.backends.base.base import BaseDatabaseWrapper

from async_queue.db.vendors import vendor

# The sessions of the queue: the file number and the inode of each one's socket. A
# driver may still tell the number when the session is lost and somebody else has it.
_watched: WeakKeyDictionary[BaseDatabaseWrapper, tuple[int, int] | None]
_watched = WeakKeyDictionary()
# Of the parent, in the child. Not one may be collected: that would close it.
_inherited: list[Any] = []


def watch(connection: BaseDatabaseWrapper) -> None:
    """Keep the session that ``connection`` has now from children of this process.

    They may keep their copy of a database in memory.
    """
    if not vendor(connection).is_single_connection(connection):
        _watched[connection] = _socket_of(connection)


def _socket_of(connection: BaseDatabaseWrapper) -> tuple[int, int] | None:
    with suppress(Error, OSError), connection.wrap_database_errors:
        number = vendor(connection).descriptor(connection)
        return None if number is None else (number, os.fstat(number).st_ino)
    return None


def _leave_sessions() -> None:
    """In the child: let go of the parent's sessions without a word to the server."""
    watched = [*_watched.items()]
    _watched.clear()
    for connection, place in watched:
        _inherited.append((connection, connection.connection))
        if place is not None:
            _put_out_of_reach(*place)
        vendor(connection).leave_to_parent(connection)
    for mine in connections.all(initialized_only=True):
        if any(mine is connection for connection, _ in watched):
            del connections[mine.alias]


def _put_out_of_reach(number: int, inode: int) -> None:
    with suppress(OSError):
        if os.fstat(number).st_ino == inode:
            nothing = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
            os.dup2(nothing, number, inheritable=False)
            os.close(nothing)


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_leave_sessions)
