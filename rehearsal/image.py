"""The stand-in for NGC's vLLM image: Debian from debootstrap, a real CPU build of vLLM, no Ray."""

import hashlib
import shutil
from pathlib import Path

from rehearsal import place
from rehearsal.engine import Engine
from rehearsal.shell import Say, contained, logged, run, step

CONTEXT = Path(__file__).parent / "standin"
SUITE = "bookworm"  # its Python is 3.11
KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
PACKAGES = ("python3", "python3-pip", "binutils", "libnuma1", "curl", "ca-certificates", "iproute2", "procps")
LEFT_OUT = ("./var/cache/apt/*", "./var/lib/apt/lists/*", "./usr/share/doc/*", "./usr/share/man/*",
            "./usr/share/locale/*", "./dev/*")  # fmt: skip


def make(builder: Engine, say: Say) -> str:
    """Build what is missing on the builder's engine and return the image's name; its inputs are in the tag."""
    base = f"rehearsal/base:{_digest(SUITE, *PACKAGES)}"
    image = f"rehearsal/vllm:{_digest(base, *_texts())}"
    if not builder.image_id(base):
        with step(say, f"base system (Debian {SUITE})"):
            _bootstrap(builder, base)
    if not builder.image_id(image):
        with step(say, "stand-in vLLM image"):
            _build(builder, base, image)
    _forget(builder, keep=(base, image))
    return image


def clone(builder: Engine, engine: Engine) -> None:
    """Give an engine that is stopped the builder's images, and nothing else.

    Layers become hard links: nobody writes into a layer, and `docker save | docker load` takes a minute per host.
    """
    shutil.rmtree(engine.data, ignore_errors=True)
    engine.data.mkdir(parents=True)
    run("cp", "--archive", "--link", builder.data / "overlay2", engine.data)
    run("cp", "--archive", builder.data / "image", engine.data)


def _bootstrap(builder: Engine, base: str) -> None:
    folder, archive = builder.root / "base", builder.root / "base.tar"
    shutil.rmtree(folder, ignore_errors=True)
    words = ("debootstrap", "--variant=minbase", "--force-check-gpg", f"--keyring={KEYRING}")
    bootstrap = (*words, f"--include={','.join(PACKAGES)}", SUITE, folder)
    logged(place.log(builder.root, "base"), *contained(*bootstrap))
    logged(place.log(builder.root, "tar"), "tar", "--directory", folder, *(f"--exclude={path}" for path in LEFT_OUT),
           "--create", "--file", archive, ".")  # fmt: skip
    logged(place.log(builder.root, "import"), "docker", "import", archive, base, env=builder.env)
    shutil.rmtree(folder)
    archive.unlink()


def _build(builder: Engine, base: str, image: str) -> None:
    logged(place.log(builder.root, "vllm"), "docker", "build", "--network", "host", "--build-arg", f"BASE={base}",
           "--tag", image, CONTEXT, env=builder.env)  # fmt: skip


def _forget(builder: Engine, keep: tuple[str, ...]) -> None:
    """Remove images of earlier versions of this folder, to give their disk back."""
    ours = [word for name in keep for word in ("--filter", f"reference={name.partition(':')[0]}")]
    listed = builder.docker("image", "ls", *ours, "--format", "{{.Repository}}:{{.Tag}}").split()
    if old := set(listed) - set(keep):
        builder.docker("image", "rm", "--force", *old)


def _texts() -> list[str]:
    files = sorted(file for file in CONTEXT.rglob("*") if file.is_file())
    return [f"{file.relative_to(CONTEXT)}\n{file.read_text()}" for file in files]


def _digest(*inputs: str) -> str:
    return hashlib.sha256("\0".join(inputs).encode()).hexdigest()[:12]
