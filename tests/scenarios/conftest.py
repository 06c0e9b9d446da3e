"""A database server of our own, which the scenarios may stop, kill and freeze."""

from collections.abc import Iterator
from typing import Any

import pytest

from tests import fleet, servers
from tests.servers import Server

Settings = dict[str, Any]


@pytest.fixture(scope="session")
def own_server() -> Iterator[Server]:
    if reason := servers.obstacle():
        pytest.skip(reason)
    with servers.server() as made:
        yield made


@pytest.fixture(scope="session")
def migrated(own_server: Server, django_db_setup: None) -> Settings:
    return servers.migrated(own_server)


@pytest.fixture
def server(own_server: Server) -> Server:
    """One server for all scenarios, which each of them finds running."""
    own_server.thaw()
    if not own_server.processes():
        own_server.start()
    return own_server


@pytest.fixture
def database(server: Server, migrated: Settings) -> Iterator[Settings]:
    """An empty database on it, on which the test works, too."""
    with fleet.at_database(migrated):
        yield migrated
