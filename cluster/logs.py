"""The logs that this node keeps: its server's, and its own where it was started detached."""

import os
import shlex
from typing import NoReturn

from invoke import Exit

from cluster import node, server
from command import run, template
from command.command import Command
from settings.resolve import Settings

LINES = "200"


def shown(settings: Settings, of_node: bool, follow: bool) -> Command:
    """The command that shows the end of the server's log or of the node's, and, with follow, what comes."""
    file = node.log(settings) if of_node else server.log(settings)
    return Command(template.render("tail.j2", file=file, lines=LINES, follow=follow), "this node")


def become(command: Command) -> NoReturn:
    """Become that command; raises Exit where there is no such log."""
    file = command.words[-1]
    try:
        os.stat(file)
    except FileNotFoundError:
        where = "a server's is on the head, a node's where it was started with --detach"
        raise Exit(f"There is no {file} here: {where}.") from None
    except OSError as error:
        raise Exit(
            f"{file} cannot be read: {error.strerror}. Type: ls -ld {shlex.quote(os.path.dirname(file))}"
        ) from None
    run.become(command)
