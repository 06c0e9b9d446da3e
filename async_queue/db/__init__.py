"""Everything that differs from database to database, behind one interface.

`vendor(connection)` answers what a database can do; `private` gives a thread a
connection of the queue's own; `Now` and `MomentField` are the database's time.
"""

from async_queue.db.base import Concern, Vendor
from async_queue.db.block import end_ahead, is_begun_ahead
from async_queue.db.moments import MomentField, Now
from async_queue.db.sessions import awake, keep_connection, persist, private
from async_queue.db.vendors import vendor

__all__ = [
    "Concern",
    "MomentField",
    "Now",
    "Vendor",
    "awake",
    "end_ahead",
    "is_begun_ahead",
    "keep_connection",
    "persist",
    "private",
    "vendor",
]
