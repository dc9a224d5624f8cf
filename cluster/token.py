"""Ray's token. Without a token Ray runs code for anyone who reaches its port."""

import os
import secrets
import shlex
from pathlib import Path

from invoke import Exit

from cluster.command import say
from cluster.settings import Settings

INSIDE_TOKEN = "/run/ray_auth_token"


def token_file(settings: Settings) -> Path | None:
    """Return the token's file on this host, if there is one. Raises Exit if the file has no token."""
    path = Path(settings["RAY_AUTH_TOKEN_PATH"])
    # Docker mounts also a token that only root can read.
    if path.is_dir() or (path.is_file() and os.access(path, os.R_OK) and not path.read_bytes().strip()):
        raise Exit(f"RAY_AUTH_TOKEN_PATH is {path}, a folder or an empty file. Type: ls -la {path}; then: inv token")
    return path if path.is_file() else None


def make_token(settings: Settings) -> None:
    """Write a random token that only its owner may read, and say how to copy it to the other nodes."""
    path = Path(settings["RAY_AUTH_TOKEN_PATH"])
    file, folder = shlex.quote(str(path)), shlex.quote(str(path.parent))
    # Homes may differ from node to node, so the other node's shell expands `~`.
    text = Path(settings.found["RAY_AUTH_TOKEN_PATH"].text)
    there = [f"~/{shlex.quote('/'.join(one.parts[1:]))}" if one.parts[0] == "~" else shlex.quote(str(one))
             for one in (text.parent, text)]  # fmt: skip
    remote = shlex.quote(f"umask 077; mkdir -p {there[0]} && cat >{there[1]}")
    copies = [f"  ssh {host} {remote} <{file}" for host in settings.workers()]
    if path.is_file():
        say(f"{path} is there already. To copy it to the other nodes:", *copies)
        raise Exit(f"Nothing was made. To make another token, first remove this one on every node: rm {file}")
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    made = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        os.write(made, secrets.token_hex(32).encode())
    except OSError as error:
        path.unlink()
        raise Exit(f"{path} cannot be written: {error.strerror}. Type: df -h {folder}") from None
    say(f"The token is in {path}. Copy it to every other node, then bring all nodes up again:", *copies)
