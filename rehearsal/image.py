"""The image that replaces NGC's vLLM image: Debian from debootstrap, a real CPU build of vLLM, and no Ray.

The builder's containers use this machine's pip settings. No image keeps these settings.
"""

import ast
import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

from rehearsal import sandbox
from rehearsal.engine import Engine
from rehearsal.shell import RehearsalError, Say, run, tail, works

CONTEXT = Path(__file__).parent / "standin"
SUITE = "bookworm"  # its Python is 3.11
KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
PACKAGES = ("python3", "python3-pip", "binutils", "libnuma1", "curl", "ca-certificates", "iproute2", "procps")
LEFT_OUT = ("./var/cache/apt/*", "./var/lib/apt/lists/*", "./usr/share/doc/*", "./usr/share/man/*",
            "./usr/share/locale/*", "./dev/*")  # fmt: skip
PIP = ("index-url", "extra-index-url", "find-links", "trusted-host", "no-index", "proxy", "timeout", "retries", "cert")
PROXIES = ("http_proxy", "https_proxy", "no_proxy", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY")
CERTIFICATES = "/etc/ssl/certs/ca-certificates.crt"


def make(builder: Engine, say: Say) -> str:
    """Return the name of the stand-in vLLM image. Build the image and its base if the builder's engine lacks them.

    The tag is a digest of all inputs, so a change of an input makes another image.
    """
    files = sorted(file for file in CONTEXT.rglob("*") if file.is_file())
    texts = [f"{file.relative_to(CONTEXT)}\n{file.read_text()}" for file in files]
    base = f"rehearsal/base:{_digest(SUITE, *PACKAGES)}"
    image = f"rehearsal/vllm:{_digest(base, *texts)}"
    if not builder.image_id(base):
        say(f"base system (Debian {SUITE}) …")
        _bootstrap(builder, base)
    if not builder.image_id(image):
        say("stand-in vLLM image …")
        words = ("--network", "host", "--build-arg", f"BASE={base}", "--tag", image, CONTEXT)
        _logged(builder, "vllm", "docker", "build", *words)
    # The images of earlier inputs are removed, because each takes gigabytes of disk.
    ours = [word for name in ("base", "vllm") for word in ("--filter", f"reference=rehearsal/{name}")]
    listed = builder.docker("image", "ls", *ours, "--format", "{{.Repository}}:{{.Tag}}").split()
    if old := set(listed) - {base, image}:
        builder.docker("image", "rm", "--force", *old)
    return image


def clone(builder: Engine, engine: Engine) -> None:
    """Give a stopped engine exactly the images of the builder.

    The layers are hard links, which is safe because no engine writes into a layer. `docker save | docker load` would
    take a minute per host.
    """
    shutil.rmtree(engine.data, ignore_errors=True)
    engine.data.mkdir(parents=True)
    run("cp", "--archive", "--link", builder.data / "overlay2", engine.data)
    run("cp", "--archive", builder.data / "image", engine.data)


def _bootstrap(builder: Engine, base: str) -> None:
    folder, archive = builder.root / "base", builder.root / "base.tar"
    shutil.rmtree(folder, ignore_errors=True)
    checked = ("debootstrap", "--variant=minbase", "--force-check-gpg", f"--keyring={KEYRING}")
    _logged(builder, "base", "unshare", "--mount", *checked, f"--include={','.join(PACKAGES)}", SUITE, folder)
    without = [f"--exclude={path}" for path in LEFT_OUT]
    _logged(builder, "tar", "tar", "--directory", folder, *without, "--create", "--file", archive, ".")
    _logged(builder, "import", "docker", "import", archive, base)
    shutil.rmtree(folder)
    archive.unlink()


def _logged(builder: Engine, name: str, *words: str | Path) -> None:
    """Run a long step in the sandbox. A log gets its output. Raises RehearsalError with the log's end if it fails."""
    log = sandbox.log(builder.root, name)
    with log.open("w") as output:
        line = sandbox.entered(*words, processes=True)
        done = subprocess.run(line, env=builder.env, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
    if done.returncode:
        raise RehearsalError(f"{words[0]} failed ({done.returncode}), see {log}:\n{tail(log.read_text(), 15)}")


def _digest(*inputs: str) -> str:
    return hashlib.sha256("\0".join(inputs).encode()).hexdigest()[:12]


def pip_additions() -> dict:
    """Return the mounts and variables that give a container this machine's pip settings.

    The container also mounts the folders that `find-links` names. An index that is a folder is left out, because its
    links may point outside of the folder. /run is a tmpfs, so that no mount point stays in an image.
    """
    settings = pip_settings()
    lent: dict[str, str] = {}
    links = []
    for word in settings.get("find-links", "").split():
        path = Path(word.removeprefix("file://")).expanduser()
        if path.is_dir():
            word = f"/run/rehearsal-wheels-{len(lent)}"
            lent[word] = str(path.resolve())
        links.append(word)
    certificates = Path(settings.get("cert") or CERTIFICATES)
    if certificates.is_file():
        settings["cert"] = "/run/rehearsal.pem"
        lent["/run/rehearsal.pem"] = str(certificates.resolve())
    settings["find-links"] = " ".join(links)
    chosen = {name: settings[name] for name in PIP if settings.get(name)}
    env = [f"PIP_{name.replace('-', '_').upper()}={' '.join(value.split())}" for name, value in chosen.items()
           if not (name.endswith("index-url") and "file:" in value)]  # fmt: skip
    mounts = [{"destination": "/run", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "nodev", "mode=755"]}]
    for inside, source in lent.items():
        mounts.append({"destination": inside, "type": "bind", "source": source, "options": ["rbind", "ro"]})
    return {"mounts": mounts, "env": env + [f"{name}={os.environ[name]}" for name in PROXIES if name in os.environ]}


def pip_settings() -> dict[str, str]:
    """Return pip's settings for `install`, as `pip config list` prints them. Environment variables beat files."""
    pip = [sys.executable, "-m", "pip"]
    if not works(*pip, "--version"):
        pip = [shutil.which("pip3") or shutil.which("pip") or "true"]
    sections: dict[str, dict[str, str]] = {"global": {}, "install": {}, ":env:": {}}
    for line in run(*pip, "config", "list").splitlines():
        key, _, value = line.partition("=")
        section, _, name = key.rpartition(".")
        sections.get(section, {})[name.removeprefix("default-")] = str(ast.literal_eval(value))
    return sections["global"] | sections["install"] | sections[":env:"]
