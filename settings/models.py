"""A model is data: `<folder>/<size>.env` is the model `<folder>-<size>`, its flags are `<folder>/serve.j2`."""

import re
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from pathlib import Path

from invoke import Exit

from command import template
from settings import envfile

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Model:
    """One profile; `name` is what `--model` takes, `size` its file and `folder` its place below the root."""

    folder: str
    size: str
    name: str

    @property
    def profiles(self) -> tuple[Path, ...]:
        """The files that set this model's values: what both containers start with, then its knobs."""
        files = (ROOT / self.folder / "cluster.env", ROOT / self.folder / f"{self.size}.env")
        return tuple(file for file in files if file.exists())

    @property
    def serve(self) -> str:
        """The template of the server's command line."""
        return f"{self.folder}/serve.j2"

    @property
    def fetch(self) -> str | None:
        """The template of what the server needs in the Hugging Face cache before it starts, where there is one."""
        return f"{self.folder}/fetch.j2" if (ROOT / self.folder / "fetch.j2").exists() else None

    @property
    def knobs(self) -> frozenset[str]:
        """The names that this model's templates use."""
        return template.names(self.serve) | (template.names(self.fetch) if self.fetch else frozenset())

    @property
    def keys(self) -> frozenset[str]:
        """The names that its files set, by a glance at their lines."""
        text = "\n".join(file.read_text() for file in self.profiles)
        return frozenset(re.findall(r"^([A-Z][A-Z0-9_]*)=", text, re.MULTILINE))

    @property
    def names(self) -> frozenset[str]:
        """Every name that this model knows: its knobs, and what its files set."""
        return self.knobs.union(*(envfile.read(file) for file in self.profiles))


@cache
def known() -> dict[str, Model]:
    """Every model by name; a folder with one model gives it the folder's own name."""
    models = {}
    for serve in sorted(ROOT.glob("*/serve.j2")):
        folder = serve.parent
        sizes = sorted(
            file.stem for file in folder.glob("*.env") if file.name != "cluster.env" and not file.name.startswith(".")
        )
        for size in sizes:
            name = folder.name if len(sizes) == 1 else f"{folder.name}-{size}"
            models[name] = Model(folder.name, size, name)
    return models


def find(name: str) -> Model:
    """The model called name, or `<folder>-<size>`; raises Exit with the names there are."""
    by_name = known() | {f"{model.folder}-{model.size}": model for model in known().values()}
    if name not in by_name:
        near = get_close_matches(name, by_name, 1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise Exit(f"No model is called {name!r}.{hint} There are: {', '.join(known())}.")
    return by_name[name]
