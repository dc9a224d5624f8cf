"""TCP ports: whether one answers, whether one is free here, and who holds it."""

import errno
import re
import socket

from invoke import Exit

from command import run
from command.command import Command


def answers(address: str, port: int, timeout: float = 2.0) -> bool:
    """Whether somebody accepts a connection at address:port within timeout seconds."""
    try:
        socket.create_connection((address, port), timeout).close()
    except OSError:
        return False
    return True


def is_mine(address: str) -> bool:
    """Whether address is one of this host's own."""
    with socket.socket() as asked:
        try:
            asked.bind((address, 0))
        except OSError:
            return False
    return True


def obstacle(address: str, port: int) -> str:
    """Why no server could listen on address:port now, or nothing; connections that are just ending do not count."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family) as asked:
        asked.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            asked.bind((address, port))
        except OSError as error:
            held = error.errno == errno.EADDRINUSE
            return f"port {port} is held by {holder(port)}" if held else f"{address}:{port}: {error.strerror}"
    return ""


def holder(port: int) -> str:
    """Who listens on port, in words. Only root may see the processes of others."""
    try:
        listening = run.output(Command((("ss", "-Hltnp", f"sport = :{port}"),)))
    except Exit as error:
        return f"somebody; who is unknown ({error.message})"
    processes = re.findall(r'"([^"]+)",pid=(\d+)', listening)
    if processes:
        return ", ".join(f"{name} (process {pid})" for name, pid in dict.fromkeys(processes))
    return f"a process of another user (sudo ss -ltnp 'sport = :{port}' names it)" if listening else "nobody"
