"""Draws docs/rehearsal.svg: a terminal that shows `inv up` and `inv status` on real stand-in Sparks.

Type as root: .venv/bin/python -m rehearsal.picture
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
CUTS = (
    # Lines that the terminal erases, before or after their end.
    (r"[^\n]*\r\x1b\[2K|[^\n]*\n[^\n]*\x1b\[1A\x1b\[2K|\x1b\[\?25[lh]", ""),
    # The words of a command line below its comment. With them the picture would be 200 lines high.
    (r"(?m)^((?:spark-\d \| )?# .*)\n(?:.*\\\n|(?:spark-\d \| )?export .*\n)*.*\n", r"\1 …\n"),
    (str(ROOT), "~/dgx-spark-cluster"),
)


def shown(host: Host, words: list[str], key: str) -> str:
    """Run a task on a terminal of the host, and return the text that the terminal shows at the end."""
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (50, WIDTH))
    env = {"VLLM_API_KEY": key, "WORKER_HOSTS": "spark-2", "TERM": "xterm-256color"}
    task = host.popen(*INV, *words, env=env, stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    text = b""
    with suppress(OSError):  # reading fails when the last program on the terminal has ended
        while True:
            text += os.read(ours, 65536)
    if task.wait():
        sys.exit(text.decode())
    said = text.decode().replace("\r\n", "\n")
    for pattern, instead in (*CUTS, (f"{sandbox.state(host.root, 'spark-')}[0-9]+/", "/")):
        said = re.sub(pattern, instead, said)
    return said


if __name__ == "__main__":
    screen = Console(record=True, width=WIDTH, file=StringIO())
    with Rig(say=say) as rig:
        flow = Flow(rig, say)
        flow.build()
        rig.copy(IMAGE)
        head, worker = rig.hosts
        # No sshd runs here. This script replaces ssh, and enters the other host directly.
        there = worker.command("env", *(f"{name}={value}" for name, value in worker.env.items()), "sh", "-c")
        script(sandbox.state(rig.root, "bin") / "ssh", "for last; do :; done", f'exec {shlex.join(there)} "$last"')
        for words in (["up", "--model", "rehearsal", "--allow", ALLOW], ["status"]):
            screen.print(f"[bold]$ inv {shlex.join(words)}")
            screen.print(Text.from_ansi(shown(head, words, flow.key)))
    picture = screen.export_svg(title="Two stand-in Sparks", unique_id="rehearsal")
    # Whoever opens the picture must not fetch a font from another site. Any monospace font will do.
    (ROOT / "docs/rehearsal.svg").write_text(re.sub(r"@font-face \{.*?\}\s*", "", picture, flags=re.DOTALL))
