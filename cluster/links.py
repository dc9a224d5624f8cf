"""The links of this node: each is a RoCE device with its network interface, as sysfs lists them."""

import fcntl
import re
import socket
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

SIOCGIFADDR = 0x8915  # linux/sockios.h


@dataclass(frozen=True)
class Link:
    """One RoCE device with its interface. `address` is the interface's first IPv4 address."""

    hca: str
    netdev: str
    up: bool
    address: str | None

    @property
    def port(self) -> str:
        """The socket of the cable. A Spark shows each as two PCIe functions: enp1s0f0np0 and enP2p1s0f0np0 are f0."""
        match = re.search(r"f(\d+)(?:np\d+)?$", self.netdev)
        return f"f{match[1]}" if match else self.netdev


def find_links(sysfs: str) -> list[Link]:
    """Return all links, sorted by interface."""
    found = Path(sysfs).glob("class/infiniband/*/device/net/*")
    pairs = [(path.parts[-4], path.name) for path in found]
    pairs.sort(key=lambda pair: pair[1].swapcase())  # enp1... before enP2p1..., the usual order
    return [Link(hca, netdev, _is_up(sysfs, netdev), ipv4_address(netdev)) for hca, netdev in pairs]


def ipv4_address(netdev: str) -> str | None:
    """The interface's first IPv4 address in this network namespace, if there is one."""
    request = struct.pack("256s", netdev.encode()[:15])
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        try:
            return socket.inet_ntoa(fcntl.ioctl(asking.fileno(), SIOCGIFADDR, request)[20:24])
        except OSError:
            return None


def link_remarks(found: Sequence[Link]) -> list[str]:
    """Sentences for the operator about ports that are down, both halves or one."""
    if not any(link.up for link in found):
        return []
    remarks = []
    for port in sorted({link.port for link in found}):
        halves = [link for link in found if link.port == port]
        down = [link.netdev for link in halves if not link.up]
        if down and len(down) == len(halves):
            remarks.append(f"Note: port {port} is down ({', '.join(down)}); one cable is normal.")
        elif down:
            remarks.append(
                f"Warning: {', '.join(down)} is down, but the other half of port {port} is up, so this cable carries "
                "half its rate. A cold boot (power off, wait, power on) has brought such halves back."
            )
    return remarks


def _is_up(sysfs: str, netdev: str) -> bool:
    folder = Path(sysfs) / "class/net" / netdev
    try:
        # Reading the carrier of an interface that is administratively down is an error.
        return (folder / "carrier").read_text().strip() == "1" and (folder / "operstate").read_text().strip() == "up"
    except OSError:
        return False
