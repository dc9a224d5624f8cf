"""Cables between stand-in Sparks: veth pairs named like a Spark's own network devices."""

from dataclasses import dataclass
from pathlib import Path

from rehearsal.shell import run

SWITCH = "rehearsal-switch"


@dataclass(frozen=True)
class Link:
    """One PCIe function of a port: its network device, its RoCE device, its subnet if it has an IPv4 address."""

    netdev: str
    roce: str
    subnet: str | None

    def address(self, number: int) -> str:
        """The IPv4 address of host `number` on this link."""
        return f"{self.subnet}.{number}"


CONTROL = Link("enp1s0f1np1", "rocep1s0f1", "10.0.0")
LINKS = (
    CONTROL,
    Link("enp1s0f0np0", "rocep1s0f0", "10.0.1"),
    Link("enP2p1s0f1np1", "roceP2p1s0f1", None),
    Link("enP2p1s0f0np0", "roceP2p1s0f0", None),
)


def connect(spaces: list[str]) -> None:
    """Cable the namespaces: two directly, any other number through bridges in the namespace `rehearsal-switch`."""
    for link in LINKS:
        (_direct if len(spaces) == 2 else _switched)(spaces, link)
        for number, space in enumerate(spaces, 1):
            _raise(space, link, number)


def far(spaces: list[str], number: int, link: Link) -> tuple[str, str]:
    """Namespace and name of the other end of a host's cable (hosts count from 1)."""
    if len(spaces) == 2:
        return spaces[2 - number], link.netdev
    return SWITCH, f"p{number}-{LINKS.index(link)}"


def switch(spaces: list[str], number: int, netdev: str, state: str) -> None:
    """Set the far end of a host's cable `up` or `down`: the host's own carrier follows."""
    link = next(link for link in LINKS if link.netdev == netdev)
    space, device = far(spaces, number, link)
    _ip(space, "link", "set", device, state)


def write_sysfs(folder: Path) -> None:
    """Write a sysfs tree: live network devices of whoever reads it, and RoCE devices that point at them."""
    (folder / "class").mkdir(parents=True, exist_ok=True)
    (folder / "class/net").symlink_to("/sys/class/net")
    for link in LINKS:
        devices = folder / "class/infiniband" / link.roce / "device/net"
        devices.mkdir(parents=True)
        (devices / link.netdev).symlink_to(f"/sys/class/net/{link.netdev}")


def _direct(spaces: list[str], link: Link) -> None:
    _pair(link.netdev, spaces[0], link.netdev, spaces[1])


def _switched(spaces: list[str], link: Link) -> None:
    bridge = f"br{LINKS.index(link)}"
    _ip(SWITCH, "link", "add", bridge, "up", "type", "bridge")
    for number, space in enumerate(spaces, 1):
        _, port = far(spaces, number, link)
        _pair(link.netdev, space, port, SWITCH)
        _ip(SWITCH, "link", "set", port, "up", "master", bridge)


def _pair(near: str, space: str, far_end: str, far_space: str) -> None:
    run("ip", "link", "add", near, "netns", space, "type", "veth", "peer", "name", far_end, "netns", far_space)


def _raise(space: str, link: Link, number: int) -> None:
    if link.subnet:
        _ip(space, "address", "add", f"{link.address(number)}/24", "dev", link.netdev)
    _ip(space, "link", "set", link.netdev, "up")


def _ip(space: str, *words: str) -> None:
    run("ip", "-n", space, *words)
