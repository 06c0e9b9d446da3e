"""Which vendor's facts belong to a connection."""

from django.core.exceptions import ImproperlyConfigured
from django.db.backends.base.base import BaseDatabaseWrapper

from async_queue.db.base import Vendor
from async_queue.db.mysql import MySQL
from async_queue.db.postgresql import PostgreSQL
from async_queue.db.sqlite import SQLite

_VENDORS: dict[str, Vendor] = {
    "postgresql": PostgreSQL(),
    "mysql": MySQL(),
    "sqlite": SQLite(),
}


def vendor(connection: BaseDatabaseWrapper) -> Vendor:
    """Return what is known of the database behind ``connection``.

    Raises ImproperlyConfigured for a database that cannot hold a queue.
    """
    try:
        return _VENDORS[connection.vendor]
    except KeyError:
        raise ImproperlyConfigured(
            f"async_queue cannot keep jobs in {connection.vendor}. Set "
            "ASYNC_QUEUE['DATABASE'] to an alias of PostgreSQL, MariaDB or SQLite."
        ) from None
