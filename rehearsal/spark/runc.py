"""Stands in front of runc: takes out of a container's specification what this machine cannot give, then becomes runc.

Words: the real runc, a JSON file with what this engine adds (`network`, `mounts`, `env`), then runc's own words.
"""

import json
import os
import sys

STARTS = ("create", "run", "restore")


def main(real: str, additions: str, *words: str) -> None:
    """Edit the specification that the words name, if they name one, and become runc."""
    with open(additions) as file:
        extra = json.load(file)
    if any(word in STARTS for word in words):
        edit(os.path.join(option(words, "--bundle", "-b") or ".", "config.json"), extra)
    elif "exec" in words and (process := option(words, "--process", "-p")):
        edit(process, {})
    os.execv(real, [real, *words])


def option(words: tuple[str, ...], *names: str) -> str | None:
    """The value of an option, written `--name value` or `--name=value`."""
    for index, word in enumerate(words):
        name, equals, value = word.partition("=")
        if name in names:
            return value if equals else words[index + 1]
    return None


def edit(path: str, extra: dict) -> None:
    """Drop the limits (raising one takes CAP_SYS_RESOURCE, which sandboxes lack) and add mounts and variables."""
    with open(path) as file:
        spec = json.load(file)
    process = spec.get("process", spec)  # `exec` gets the process alone
    process.pop("rlimits", None)
    if "mounts" in spec:
        spec["mounts"] += extra.get("mounts", [])
    if "linux" in spec and "network" in extra:
        join(spec["linux"], extra["network"])
    process["env"] = process.get("env", []) + extra.get("env", [])
    with open(path, "w") as file:
        json.dump(spec, file)


def join(linux: dict, network: str) -> None:
    """Put a container that shares its engine's network (`--network host`) into another namespace."""
    spaces = linux.setdefault("namespaces", [])
    known = [space for space in spaces if space["type"] == "network"]
    if not known:  # BuildKit leaves it out, Docker names the engine's
        spaces.append({"type": "network", "path": network})
    elif "path" in known[0]:
        known[0]["path"] = network


if __name__ == "__main__":
    main(*sys.argv[1:])
