"""Writes docs/rehearsal.svg: what a real rehearsal's `inv up` and `inv status` show on a terminal.

Type, as root: .venv/bin/python -m rehearsal.picture
"""

import os
import pty
import re
import shlex
import sys
import termios
from contextlib import suppress
from io import StringIO

from rich.console import Console
from rich.text import Text

from cluster.command import say
from cluster.repository import ROOT
from rehearsal import sandbox
from rehearsal.flow import ALLOW, IMAGE, Flow
from rehearsal.hosts import INV, Host
from rehearsal.rig import Rig
from rehearsal.shell import script

WIDTH = 110
# A line that is drawn anew: the one that is erased, and the one that is erased after its end.
ERASED = (r"[^\n]*\r\x1b\[2K", r"[^\n]*\n[^\n]*\x1b\[1A\x1b\[2K", r"\x1b\[\?25[lh]")


def shown(host: Host, words: list[str], key: str) -> str:
    """Type a task on a terminal of the host, and return what the terminal shows at the end."""
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (50, WIDTH))
    env = {"VLLM_API_KEY": key, "WORKER_HOSTS": "spark-2", "TERM": "xterm-256color"}
    task = host.popen(*INV, *words, env=env, stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    text = b""
    with suppress(OSError):  # which comes when the last program on the terminal has ended
        while True:
            text += os.read(ours, 65536)
    if task.wait():
        sys.exit(text.decode())
    said = text.decode().replace("\r\n", "\n")
    for pattern in ERASED:
        said = re.sub(pattern, "", said)
    return said.replace(f"{host.state}/", "/").replace(str(ROOT), "~/dgx-spark-cluster")


if __name__ == "__main__":
    screen = Console(record=True, width=WIDTH, file=StringIO())
    with Rig(say=say) as rig:
        flow = Flow(rig, say)
        flow.build()
        rig.copy(IMAGE)
        head, worker = rig.hosts
        # No sshd runs here: what stands in for ssh steps into the other host.
        there = worker.command("env", *(f"{name}={value}" for name, value in worker.env.items()), "sh", "-c")
        script(sandbox.state(rig.root, "bin") / "ssh", "for last; do :; done", f'exec {shlex.join(there)} "$last"')
        for words in (["up", "--model", "rehearsal", "--allow", ALLOW], ["status"]):
            screen.print(f"[bold]$ inv {shlex.join(words)}")
            screen.print(Text.from_ansi(shown(head, words, flow.key)))
    screen.save_svg(str(ROOT / "docs/rehearsal.svg"), title="Two stand-in Sparks", unique_id="rehearsal")
