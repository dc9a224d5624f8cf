"""Ray's token. Without a token Ray runs code for anyone who reaches its port."""

import os
import re
import secrets
import shlex
from pathlib import Path

from invoke import Exit

from cluster.command import say
from cluster.settings import Settings

INSIDE_TOKEN = "/run/ray_auth_token"
# The first Ray with tokens, by its documentation. They were tried with 2.60.
FIRST_RAY = (2, 52)


def token_file(settings: Settings) -> Path | None:
    """The token's file on this host, if there is one."""
    path = Path(settings["RAY_AUTH_TOKEN_PATH"])
    return path if path.is_file() else None


def make_token(settings: Settings) -> None:
    """Write a random token that only its owner may read, and say how to copy it to the other nodes."""
    path = Path(settings["RAY_AUTH_TOKEN_PATH"])
    file, folder = shlex.quote(str(path)), shlex.quote(str(path.parent))
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as made:
            made.write(secrets.token_hex(32))
    except OSError as error:
        if path.is_file():
            raise Exit(f"{path} is there already. To make another, first remove it on every node: rm {file}") from None
        raise Exit(f"{path} cannot be written: {error.strerror}. Type: ls -ld {folder}") from None
    say(f"The token is in {path}. Copy it to every other node, then bring all nodes up again:")
    remote = shlex.quote(f"umask 077; mkdir -p {folder} && cat >{file}")
    say(*(f"  ssh {host} {remote} <{file}" for host in settings.workers()))


def knows_no_tokens(ray_version: str) -> bool:
    """Whether a Ray of this version ignores tokens. An unknown version is taken for one that does."""
    numbers = re.match(r"(\d+)\.(\d+)", ray_version)
    return numbers is None or tuple(map(int, numbers.groups())) < FIRST_RAY
