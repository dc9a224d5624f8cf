"""TCP ports of this host: whether one answers, whether a server can listen there, and which process holds it."""

import errno
import re
import socket
from contextlib import suppress

from invoke import Exit

from cluster.command import Command, run


def port_answers(address: str, port: int) -> bool:
    """Whether a connection to the port is accepted within two seconds."""
    with suppress(OSError), socket.create_connection((address, port), timeout=2):
        return True
    return False


def is_own_address(address: str) -> bool:
    return not port_obstacle(address, 0)  # 0 is any port that is free


def port_obstacle(address: str, port: int) -> str:
    """Return why no server can listen there now; nothing if one can."""
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as trial:
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a connection that is just ending is no obstacle
        try:
            trial.bind((address, port))
        except OSError as error:
            held = error.errno == errno.EADDRINUSE
            return f"port {port} is held by {port_holder(port)}" if held else f"{address}:{port}: {error.strerror}"
    return ""


def port_holder(port: int) -> str:
    """Name the processes that listen on the port. Only root may see the processes of other users."""
    listening = ""
    with suppress(Exit):  # a host may lack ss
        listening = run(Command((("ss", "-Hltnp", f"sport = :{port}"),)), capture=True, seconds=20)
    processes = dict.fromkeys(re.findall(r'"([^"]+)",pid=(\d+)', listening))
    named = ", ".join(f"{name} (process {pid})" for name, pid in processes)
    return named or f"a process of another user (sudo ss -ltnp 'sport = :{port}' names it)"


def freeing(obstacle: str) -> str:
    """Return what to do about processes that hold a port and are in none of this project's containers."""
    pids = re.findall(r"process (\d+)", obstacle)
    see, end = f"systemctl status {' '.join(pids)}", f"sudo kill {' '.join(pids)}, or sudo systemctl stop SERVICE"
    return f". No container of this project holds it. To see what does: {see}; to end it: {end}" if pids else ""
