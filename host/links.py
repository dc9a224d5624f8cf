"""The links of this node, read from sysfs: RoCE devices, their netdevs, and which of them are up."""

import fcntl
import re
import socket
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

_SIOCGIFADDR = 0x8915  # linux/sockios.h


@dataclass(frozen=True)
class Link:
    """One RoCE device and its netdev; `address` is the netdev's first IPv4 address, or None."""

    hca: str
    netdev: str
    up: bool
    address: str | None

    @property
    def port(self) -> str:
        """The socket on the machine's back that this is a half of.

        A Spark shows each of its two QSFP ports as two PCIe functions: enp1s0f0np0 and enP2p1s0f0np0 are both f0.
        """
        match = re.search(r"f(\d+)(?:np\d+)?$", self.netdev)
        return f"f{match[1]}" if match else self.netdev


def ipv4(netdev: str) -> str | None:
    """The first IPv4 address of netdev in this network namespace, or None."""
    request = struct.pack("256s", netdev.encode()[:15])
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
        try:
            return socket.inet_ntoa(fcntl.ioctl(asked.fileno(), _SIOCGIFADDR, request)[20:24])
        except OSError:
            return None


def read(sysfs: str, address: Callable[[str], str | None] = ipv4) -> tuple[Link, ...]:
    """Every RoCE device below sysfs with its netdev, sorted by netdev; none where there is no class/infiniband."""
    found = Path(sysfs).glob("class/infiniband/*/device/net/*")
    pairs = [(netdev.name, netdev.parts[-4]) for netdev in found]
    pairs.sort(key=lambda pair: pair[0].swapcase())  # enp1... before enP2p1..., as everybody lists them
    return tuple(Link(hca, netdev, _is_up(Path(sysfs), netdev), address(netdev)) for netdev, hca in pairs)


def exists(sysfs: str, netdev: str) -> bool:
    """Whether this machine has a network interface of that name."""
    return (Path(sysfs) / "class/net" / netdev).exists()


def remarks(found: Sequence[Link]) -> list[str]:
    """What a person should know about the links: a port that is down, or half a port."""
    said: list[str] = []
    if not any(link.up for link in found):
        return said
    for port in sorted({link.port for link in found}):
        halves = [link for link in found if link.port == port]
        down = [link.netdev for link in halves if not link.up]
        if down and len(down) == len(halves):
            said.append(f"Note: port {port} is down ({', '.join(down)}); one cable is normal.")
        elif down:
            said.append(
                f"Warning: {', '.join(down)} is down, the other half of port {port} is up: this cable carries half "
                "its rate. A cold boot (power off, not reboot) has brought such halves back."
            )
    return said


def _is_up(sysfs: Path, netdev: str) -> bool:
    folder = sysfs / "class/net" / netdev
    try:
        # A link that is administratively down refuses to tell its carrier.
        return (folder / "carrier").read_text().strip() == "1" and (folder / "operstate").read_text().strip() == "up"
    except OSError:
        return False
