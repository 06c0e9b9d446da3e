"""Several machines on one: network namespaces with addresses of their own.

Each host hangs on a bridge by one cable. This machine, where the database of a test
listens, hangs there too, and processes of the project can be started in each host.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from itertools import count
from typing import Any

from tests.process import ROOT
from tests.servers import guarded

_MOST = 250  # hosts in a network
# The address of no card: what goes there is lost in silence.
_NOWHERE = "02:ff:ff:ff:ff:ff"
_numbers = count(1)


class Host:
    """One machine. Its processes reach ``gateway``, which is this machine."""

    def __init__(self, name: str, address: str, bridge: str, gateway: str) -> None:
        self.name, self.address, self.gateway = name, address, gateway
        self.prefix = ["ip", "netns", "exec", name]
        self._bridge, self._port = bridge, name  # the cable's end at the bridge

    def run(self, *command: str, **options: Any) -> subprocess.Popen[str]:
        """Start a command in the host; what still runs at its end is killed."""
        return subprocess.Popen([*self.prefix, *command], text=True, **options)

    @contextmanager
    def started(
        self, *command: str, environment: dict[str, str] | None = None, **database: Any
    ) -> Iterator[subprocess.Popen[str]]:
        """Do what ``tests.process.started`` does, in the host.

        ``database`` must name a database that listens on ``gateway``, such as that of
        ``Server.settings(name, host.gateway)``.
        """
        process = self.run(
            *(sys.executable, "-m", "django", *command),
            cwd=ROOT,
            env={
                **os.environ,
                "DJANGO_SETTINGS_MODULE": "tests.settings",
                "AQ_TEST_DATABASE": database["NAME"],
                "AQ_TEST_OPTIONS": json.dumps(database),
                **(environment or {}),
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        try:
            yield process
        finally:
            process.kill()
            process.communicate()

    def cut(self) -> None:
        """Lose all packets, both ways and in silence: no FIN, no RST, no error.

        The bridge drops what comes to the port. The cable stays in, and both ends know
        the address of the other's card for good, so that nobody notices anything.
        """
        self._set_port_state(1)  # "listening": from "disabled" any event brings it back

    def cut_outgoing(self) -> None:
        """Lose only what the host sends to this machine."""
        self._teach_host(_NOWHERE)

    def cut_incoming(self) -> None:
        """Lose only what this machine sends to the host."""
        self._teach_gateway(_NOWHERE)

    def mend(self) -> None:
        """End every cut. What was lost comes when TCP sends it again."""
        self._set_port_state(3)  # "forwarding"
        self._teach_host(_hardware_address(self.gateway))
        self._teach_gateway(_hardware_address(self.address))

    def delay(self, milliseconds: int) -> None:
        """Delay each packet, both ways, by so much; 0 ends it. See ``can_delay``."""
        how = ["netem", "delay", f"{milliseconds}ms"]
        _run("tc", "qdisc", "replace", "dev", self._port, "root", *how)
        _run(*self.prefix, "tc", "qdisc", "replace", "dev", "eth0", "root", *how)

    def _set_port_state(self, state: int) -> None:
        _ip("link", "set", self._port, "type", "bridge_slave", "state", str(state))

    def _teach_host(self, card: str) -> None:
        _ip("-n", self.name, *_neighbour(self.gateway, card, "eth0"))

    def _teach_gateway(self, card: str) -> None:
        _ip(*_neighbour(self.address, card, self._bridge))


def is_possible() -> bool:
    return not obstacle()


@cache
def obstacle() -> str:
    """Return why this machine cannot play several, or nothing."""
    if sys.platform != "linux":
        return "only Linux has network namespaces"
    if os.geteuid() != 0:
        return "only root makes network namespaces"
    if not shutil.which("ip"):
        return "the command ip (iproute2) is not installed"
    try:
        with hosts(1):
            return ""
    except subprocess.CalledProcessError as error:
        return f"ip cannot make hosts here: {error.stderr.strip()}"


@cache
def can_delay() -> bool:
    """Whether the kernel delays packets; where not, ``tests.proxy`` delays bytes."""
    if not is_possible() or not shutil.which("tc"):
        return False
    with hosts(1) as (host,):
        try:
            host.delay(1)
        except subprocess.CalledProcessError:
            return False
    return True


@contextmanager
def hosts(number: int) -> Iterator[list[Host]]:
    """Make so many hosts; end their processes and remove them when the block ends."""
    assert number <= _MOST
    bridge = f"aq{os.getpid()}x{next(_numbers)}"
    with guarded(_removal(bridge)):
        try:
            network = _free_network()
            gateway, *addresses = (f"{network}.{i}" for i in range(1, number + 2))
            _make_bridge(bridge, gateway)
            yield [
                _make_host(f"{bridge}h{i}", address, bridge, gateway)
                for i, address in enumerate(addresses, start=1)
            ]
        finally:
            _run("sh", "-c", _removal(bridge))


def _make_bridge(name: str, gateway: str) -> None:
    # Without a delay, at whose end the bridge would open ports that are cut.
    kind = ["type", "bridge", "forward_delay", "0"]
    _ip("link", "add", name, "address", _hardware_address(gateway), *kind)
    _ip("address", "add", f"{gateway}/24", "dev", name)
    _ip("link", "set", name, "up")


def _make_host(name: str, address: str, bridge: str, gateway: str) -> Host:
    inner = ["-n", name]
    end = ["name", "eth0", "netns", name, "address", _hardware_address(address)]
    _ip("netns", "add", name)
    _ip("link", "add", name, "type", "veth", "peer", *end)
    _ip("link", "set", name, "master", bridge, "up")
    _ip(*inner, "link", "set", "lo", "up")
    _ip(*inner, "link", "set", "eth0", "up")
    _ip(*inner, "address", "add", f"{address}/24", "dev", "eth0")
    made = Host(name, address, bridge, gateway)
    made.mend()
    return made


def _removal(bridge: str) -> str:
    return f"""
        for host in $(ip netns list | grep -o '^{bridge}h[0-9]*'); do
            ip netns pids $host | xargs -r kill -KILL
            ip link delete $host
            ip netns delete $host
        done
        ip link delete {bridge}
        true  # there may be less of it, where the making failed
    """


def _free_network() -> str:
    """Return the first three numbers of addresses that no card here has."""
    taken = _ip("-oneline", "-4", "address")
    mine = os.getpid() % 256  # so that processes seldom choose at the same time
    networks = (f"10.213.{(mine + i) % 256}" for i in range(256))
    return next(network for network in networks if f" {network}." not in taken)


def _hardware_address(address: str) -> str:
    return ":".join(["02", "00", *(f"{int(part):02x}" for part in address.split("."))])


def _neighbour(address: str, card: str, device: str) -> list[str]:
    known = ["neighbour", "replace", address, "lladdr", card]
    return [*known, "dev", device, "nud", "permanent"]


def _ip(*arguments: str) -> str:
    return _run("ip", *arguments)


def _run(*command: str) -> str:
    ended = subprocess.run(command, check=True, capture_output=True, text=True)
    return ended.stdout
