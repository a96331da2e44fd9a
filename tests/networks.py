"""Machines with a network of their own, on this one: name spaces of Linux at one switch, by cables that can be cut.

Nothing of it can be reached from outside, and its addresses are seen by nobody else. All machines share files,
processes and clock with this one. Needs `ip` (Debian: iproute2) and the right to make name spaces, as root has it.
"""

from __future__ import annotations

import secrets
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

PREFIX = "10.77.0"
FIRST = 2  # number of the machine that the switch is in


@dataclass(frozen=True)
class Network:
    """Machines with the numbers FIRST, FIRST + 1, …"""

    name: str
    machines: int

    @property
    def numbers(self) -> range:
        """Of its machines."""
        return range(FIRST, FIRST + self.machines)

    def host(self, number: int) -> str:
        """Address of a machine."""
        return f"{PREFIX}.{number}"

    def inside(self, number: int) -> list[str]:
        """What a command line begins with whose process shall be on a machine."""
        return ["ip", "netns", "exec", self._space(number)]

    def cut(self, number: int) -> None:
        """Pull the cable of a machine out of the switch: packets are lost, and nobody is told."""
        _ip("-n", self._space(FIRST), "link", "set", f"to{number}", "down")

    def restore(self, number: int) -> None:
        """Put the cable back."""
        _ip("-n", self._space(FIRST), "link", "set", f"to{number}", "up")

    def make(self) -> None:
        """Make all of it."""
        for number in self.numbers:
            _ip("netns", "add", self._space(number))
            _ip("-n", self._space(number), "link", "set", "lo", "up")
        self._add_port(FIRST, ["link", "add", "switch", "type", "bridge"], "switch")
        for number in self.numbers[1:]:
            port = f"to{number}"
            cable = ["link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", self._space(number)]
            _ip("-n", self._space(FIRST), *cable)
            _ip("-n", self._space(FIRST), "link", "set", port, "master", "switch", "up")
            self._add_port(number, [], "eth0")

    def remove(self) -> None:
        """Remove what there is of it; processes that are left there keep their name space alive, without a name."""
        there = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout.split()
        for number in self.numbers:
            if self._space(number) in there:
                _ip("netns", "del", self._space(number))

    def _add_port(self, number: int, make: list[str], device: str) -> None:
        """Give a machine its address, and a way to anywhere, which programs look at to learn their own address."""
        space = self._space(number)
        if make:
            _ip("-n", space, *make)
        _ip("-n", space, "addr", "add", f"{self.host(number)}/24", "dev", device)
        _ip("-n", space, "link", "set", device, "up")
        _ip("-n", space, "route", "add", "default", "dev", device)

    def _space(self, number: int) -> str:
        return f"{self.name}-{number}"


def why_not() -> str | None:
    """What keeps such a network from being made here; None if nothing does."""
    if shutil.which("ip") is None:
        return "needs `ip` (Debian: apt-get install iproute2)"
    try:
        with network(2):
            return None
    except subprocess.CalledProcessError as refused:
        return f"this user may not make networks here: {refused.stderr.strip()}"


@contextmanager
def network(machines: int) -> Iterator[Network]:
    """So many machines, of which nothing is left afterwards.

    Raises:
        CalledProcessError: the system refuses; says why in `stderr`.
    """
    made = Network(f"spft-{secrets.token_hex(4)}", machines)
    try:
        made.make()
        yield made
    finally:
        made.remove()


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], capture_output=True, text=True, check=True)
