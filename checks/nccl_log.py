"""What NCCL's own log (NCCL_DEBUG=INFO, NCCL_DEBUG_SUBSYS=INIT,NET) says of the network that it chose."""

import re
from collections.abc import Iterator
from dataclasses import dataclass

# NCCL's src/transport/net.cc: "Channel 00/0 : 0[0] -> 1[0] [send] via NET/IB/0", with an external plugin in place of
# IB ("IBext_v10", "NCCL RDMA Plugin v10"), "0(8)" where another GPU's proxy carries it, "/GDRDMA" or "/Shared" behind.
_VIA = re.compile(r"Channel \d+/\d+ : \S+ -> \S+ \[(?:send|receive)\] via NET/([^/\n]+)/(\d+)")
# src/transport/net_ib.cc, net_socket.cc: "NET/IB : Using [0]rocep1s0f0:1/RoCE [RO]; OOB …", in some versions with NICs
# of one card as "[0]={[0] mlx5_0:1/RoCE, [1] mlx5_1:1/RoCE}"; "NET/Socket : Using [0]enp1s0f1np1:10.0.0.1<0>".
_USING = re.compile(r"NET/(\S+) : Using (\[\d+\][^;\n]*)")
_LISTED = re.compile(r"\[(\d+)\](?:=\{([^}]*)\}|([^\s:\]={]+):)")
_MERGED = re.compile(r"([^\s:,\]]+):\d+/")
# From 2.24: every device as NCCL counts them, those that it put together as "name=rocep1s0f0+roceP2p1s0f0".
_MADE = re.compile(r"NET/\S+ : Made virtual device \[(\d+)\] name=(\S+)")
_WARNING = re.compile(r"NCCL WARN (.+)")
SOCKET = "Socket"


@dataclass(frozen=True)
class Transport:
    """What the channels between nodes went over, by NCCL's names (`Socket` is TCP), and on which devices."""

    names: tuple[str, ...] = ()
    devices: tuple[str, ...] = ()

    @property
    def rdma(self) -> bool:
        """Whether every channel between nodes went over RDMA."""
        return bool(self.names) and SOCKET not in self.names

    def __str__(self) -> str:
        over = " and ".join(f"NET/{name}" for name in self.names)
        return f"{over} on {', '.join(self.devices)}" if over else "no network"


def transport(log: str) -> Transport:
    """The transport that NCCL chose, read from the channels that it opened; an offer alone is no choice."""
    chosen = list(dict.fromkeys(_VIA.findall(log)))
    devices = [device for name, index in chosen for device in _named(log, name == SOCKET, int(index))]
    return Transport(tuple(dict.fromkeys(name for name, _ in chosen)), tuple(dict.fromkeys(devices)))


def complaint(log: str) -> str:
    """The first warning of NCCL's, since the others are its echo; without one the log's last line."""
    found = _WARNING.search(log)
    return found[1].strip() if found else (log.strip().splitlines() or ["it said nothing"])[-1].strip()


def _named(log: str, socket: bool, index: int) -> list[str]:
    """The devices behind one index; several where NCCL put them together."""
    made = {} if socket else {int(number): name.split("+") for number, name in _MADE.findall(log)}
    return (dict(_offers(log, socket)) | made).get(index, [f"device {index}"])


def _offers(log: str, socket: bool) -> Iterator[tuple[int, list[str]]]:
    for name, line in _USING.findall(log):
        if (name == SOCKET) == socket:
            for index, several, one in _LISTED.findall(line):
                yield int(index), [one] if one else _MERGED.findall(several)
