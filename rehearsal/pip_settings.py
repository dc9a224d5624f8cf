"""This machine's way to Python packages, lent to the containers of a build and never written into an image."""

import ast
import os
import shutil
import subprocess
import sys
from configparser import RawConfigParser
from pathlib import Path

CARRIED = ("index-url", "extra-index-url", "find-links", "trusted-host", "no-index", "proxy", "timeout", "retries")
PROXIES = ("http_proxy", "https_proxy", "no_proxy", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY")
SYSTEM_CERTIFICATES = "/etc/ssl/certs/ca-certificates.crt"
INSIDE = "/run/rehearsal"


def additions(folder: Path) -> dict:
    """Write pip's settings into `folder` and return the mounts and variables that show them to a container.

    Folders named by `find-links` are lent too; an index that is a folder is left out, its links may lead anywhere.
    /run gets a tmpfs of its own, so that no mount point stays behind in an image.
    """
    folder.mkdir(parents=True)
    folder.chmod(0o700)
    settings = read()
    settings["find-links"], folders = _lend(settings.get("find-links", ""))
    _write(folder, settings)
    run = {"destination": "/run", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "nodev", "mode=755"]}
    mounts = [run, *(_bind(source, inside) for inside, source in {INSIDE: str(folder), **folders}.items())]
    env = [f"{name}={os.environ[name]}" for name in PROXIES if name in os.environ]
    return {"mounts": mounts, "env": [f"PIP_CONFIG_FILE={INSIDE}/pip.conf", *env]}


def read() -> dict[str, str]:
    """pip's own settings for `install` as it tells them itself; its environment variables win over its files."""
    sections: dict[str, dict[str, str]] = {"global": {}, "install": {}, ":env:": {}}
    for line in _listed().splitlines():
        key, _, value = line.partition("=")
        section, _, name = key.rpartition(".")
        sections.get(section, {})[name.removeprefix("default-")] = ast.literal_eval(value)
    merged = {**sections["global"], **sections["install"], **sections[":env:"]}
    return {name: str(value) for name, value in merged.items() if name in (*CARRIED, "cert")}


def _listed() -> str:
    pip = [sys.executable, "-m", "pip"]
    if subprocess.run([*pip, "--version"], capture_output=True).returncode:
        pip = [shutil.which("pip3") or shutil.which("pip") or "true"]
    return subprocess.run([*pip, "config", "list"], capture_output=True, text=True).stdout


def _lend(find_links: str) -> tuple[str, dict[str, str]]:
    """The value with local folders renamed to what they are called inside, and those folders by their inner name."""
    words, folders = [], {}
    for word in find_links.split():
        path = Path(word.removeprefix("file://")).expanduser()
        if path.is_dir():
            inside = f"/run/rehearsal-wheels-{len(folders)}"
            folders[inside] = str(path.resolve())
            word = inside
        words.append(word)
    return " ".join(words), folders


def _write(folder: Path, settings: dict[str, str]) -> None:
    config = RawConfigParser()
    config["global"] = {name: settings[name] for name in CARRIED if _useful(name, settings.get(name, ""))}
    certificates = Path(settings.get("cert") or SYSTEM_CERTIFICATES)
    if certificates.is_file():
        (folder / "ca.pem").write_bytes(certificates.read_bytes())
        config["global"]["cert"] = f"{INSIDE}/ca.pem"
    with (folder / "pip.conf").open("w") as file:
        config.write(file)


def _useful(name: str, value: str) -> bool:
    return bool(value) and not (name.endswith("index-url") and "file:" in value)


def _bind(source: str, destination: str) -> dict:
    return {"destination": destination, "type": "bind", "source": source, "options": ["rbind", "ro"]}
