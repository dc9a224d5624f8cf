"""A stand-in Spark with its links, and the cables between stand-in Sparks."""

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from cluster.repository import ROOT
from rehearsal import model, sandbox
from rehearsal.engine import Engine
from rehearsal.shell import bound, run

# The words that run `inv` with the Python of this process.
INV = (sys.executable, "-m", "invoke", "--search-root", str(ROOT))
TOOLS = Path(__file__).parent / "standin"  # nvidia-smi
SWITCH = "switch"


@dataclass(frozen=True)
class Cable:
    """One PCIe function of a port: its network device, its RoCE device, and its subnet if it has an IPv4 address."""

    netdev: str
    roce: str
    subnet: str | None = None


CONTROL = Cable("enp1s0f1np1", "rocep1s0f1", "10.0.0")
CABLES = (
    CONTROL,
    Cable("enp1s0f0np0", "rocep1s0f0", "10.0.1"),
    Cable("enP2p1s0f1np1", "roceP2p1s0f1"),
    Cable("enP2p1s0f0np0", "roceP2p1s0f0"),
)


@dataclass(frozen=True)
class Host(Engine):
    """Stand-in Spark number `number`, counted from 1: a Docker Engine with links, a sysfs tree and a cache."""

    number: int

    @property
    def address(self) -> str:
        """The host's IPv4 address on the control link."""
        return f"{CONTROL.subnet}.{self.number}"

    @property
    def cache(self) -> Path:
        """The host's CACHE_DIR, which holds the tiny model. The folder is removed after the run."""
        return self.state / "cache"

    @property
    def env(self) -> dict[str, str]:
        """The whole environment of a command on this host. Only PATH comes from the operator's environment."""
        engine = super().env
        return {
            **engine,
            "PATH": f"{sandbox.state(self.root, 'bin')}:{TOOLS}:{engine['PATH']}",
            "SYSFS": str(self.state / "sys"),
            "CACHE_DIR": str(self.cache),
            "ENV_FILE": "",  # no .env, because the operator's .env describes other hosts
        }

    def command(self, *words: str) -> list[str]:
        """Return the words that run a command on this host, with its network and /sys. The caller passes `env`."""
        return sandbox.entered("ip", "netns", "exec", self.name, *words)

    def run(self, *words: str, env: dict[str, str] | None = None, **options) -> subprocess.CompletedProcess:
        """Run a command on this host. env is added to the host's environment; options are those of subprocess.run."""
        options = {"text": True, "capture_output": True, "stdin": subprocess.DEVNULL, **options}
        return subprocess.run(self.command(*words), env={**self.env, **(env or {})}, **options)

    def popen(self, *words: str, env: dict[str, str] | None = None, **options) -> subprocess.Popen:
        """Start a command on this host. The kernel kills its process when the thread that called this ends."""
        return subprocess.Popen(bound(*self.command(*words)), env={**self.env, **(env or {})}, **options)

    def furnish(self) -> None:
        """Write the tiny model, and a sysfs tree with the real network devices and a RoCE device for each cable."""
        model.write(self.cache / "huggingface" / model.NAME)
        folder = self.state / "sys/class"
        folder.mkdir(parents=True)
        (folder / "net").symlink_to("/sys/class/net")
        for cable in CABLES:
            devices = folder / "infiniband" / cable.roce / "device/net"
            devices.mkdir(parents=True)
            (devices / cable.netdev).symlink_to(f"/sys/class/net/{cable.netdev}")
            port = folder / "infiniband" / cable.roce / "ports/1"
            for place in ("gids", "gid_attrs/types"):
                (port / place).mkdir(parents=True)
            if cable.subnet:
                octets = bytes(map(int, f"{cable.subnet}.{self.number}".split("."))).hex(":", 2)
                (port / "gids/3").write_text(f"{':'.join(['0000'] * 5)}:ffff:{octets}")
                (port / "gid_attrs/types/3").write_text("RoCE v2")


def connect(hosts: list[Host], *others: str) -> None:
    """Make the networks of the hosts and of `others`. Connect the hosts through bridges in the switch's network."""
    for network in (SWITCH, *others, *(host.name for host in hosts)):
        _ip("netns", "add", network)
        _ip("-n", network, "link", "set", "lo", "up")
    for bridge, cable in enumerate(CABLES):
        _ip("-n", SWITCH, "link", "add", f"br{bridge}", "up", "type", "bridge")
        for host in hosts:
            port = _port(host, cable)
            peer = ("peer", "name", port, "netns", SWITCH, "mtu", "9000")
            _ip("link", "add", cable.netdev, "netns", host.name, "mtu", "9000", "type", "veth", *peer)
            _ip("-n", SWITCH, "link", "set", port, "up", "master", f"br{bridge}")
            if cable.subnet:
                _ip("-n", host.name, "address", "add", f"{cable.subnet}.{host.number}/24", "dev", cable.netdev)
            _ip("-n", host.name, "link", "set", cable.netdev, "up")


def switch(host: Host, netdev: str, state: str) -> None:
    """Set the switch's end of a host's cable `up` or `down`. The carrier of the host's end follows."""
    cable = next(cable for cable in CABLES if cable.netdev == netdev)
    _ip("-n", SWITCH, "link", "set", _port(host, cable), state)


def _port(host: Host, cable: Cable) -> str:
    return f"p{host.number}-{CABLES.index(cable)}"


def _ip(*words: str) -> None:
    run(*sandbox.entered("ip", *words))
