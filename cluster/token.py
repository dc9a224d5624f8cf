"""Ray's token: without it Ray runs code for anyone who reaches its port."""

import os
import secrets
import shlex
from pathlib import Path

from invoke import Exit

from command.command import say
from settings.resolve import Settings

INSIDE = "/run/ray_auth_token"
# The first Ray with token authentication, by its documentation; run here on 2.60.
FIRST_RAY = (2, 52)


def file(settings: Settings) -> Path | None:
    """The token's file on this host, if there is one."""
    path = Path(settings["RAY_AUTH_TOKEN_PATH"])
    return path if path.is_file() else None


def make(settings: Settings) -> None:
    """Make a random token for its owner alone, and say how the other nodes get it; raises Exit if there is one."""
    path = Path(settings["RAY_AUTH_TOKEN_PATH"])
    quoted = shlex.quote(str(path))
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as made:
            made.write(secrets.token_hex(32))
    except OSError as error:
        if path.is_file():
            raise Exit(
                f"{path} is there already. To make another, remove it on every node first: rm {quoted}"
            ) from None
        folder = shlex.quote(str(path.parent))
        raise Exit(f"{path} cannot be written: {error.strerror}. Type: ls -ld {folder}") from None
    say(f"The token is in {path}. Copy it to every other node, then bring all of them up again:")
    there = f"umask 077; mkdir -p {shlex.quote(str(path.parent))} && cat >{quoted}"
    for host in settings.workers():
        say(f"  ssh {host} {shlex.quote(there)} <{quoted}")


def too_old(ray: str) -> bool:
    """Whether a Ray of this version knows no tokens; one that is no version is not known to."""
    numbers = ray.split(".")[:2]
    return not all(number.isdigit() for number in numbers) or tuple(map(int, numbers)) < FIRST_RAY


# The names of the rewritten module, until it is there.
token_file, make_token, knows_no_tokens = file, make, too_old
