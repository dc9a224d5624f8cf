"""A model is data: `<folder>/<size>.env` is the model `<folder>-<size>`, and `<folder>/serve.j2` is its command line.

Profiles and `.env` are the same kind of file. Both hold NAME=value lines, which are read without expanding `${...}`.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import cache
from pathlib import Path

from dotenv.parser import parse_stream
from invoke import Exit

from cluster.command import template_names
from cluster.repository import ROOT


@dataclass(frozen=True)
class Model:
    """One profile: its folder below the root, its file without `.env`, and the name that `--model` takes.

    `clash`: another file has the same name, so no run may use this model.
    """

    folder: str
    size: str
    name: str
    clash: str = ""

    @property
    def profiles(self) -> tuple[Path, ...]:
        """The files with this model's values: the knobs, then the containers' variables. An earlier file wins."""
        files = [ROOT / self.folder / f"{name}.env" for name in (self.size, "cluster")]
        return tuple(file for file in files if file.exists())

    @property
    def serve(self) -> str:
        return f"{self.folder}/serve.j2"

    @property
    def fetch(self) -> str | None:
        """The template of a download that the server needs before it starts. Few models have one."""
        return f"{self.folder}/fetch.j2" if (ROOT / self.folder / "fetch.j2").exists() else None

    @property
    def knobs(self) -> frozenset[str]:
        """The names that this model's templates use."""
        return template_names(self.serve) | (template_names(self.fetch) if self.fetch else frozenset())

    @property
    def keys(self) -> frozenset[str]:
        """The names that this model's files set."""
        return frozenset(_assigned(self.profiles)) - {"ALIAS"}


@cache
def known_models() -> dict[str, Model]:
    """Return every model by its name: the profile's ALIAS, or its folder's name if the folder has one model.

    Where two files would be one model or one task, the first has the `clash`, and the second is left out.
    """
    found: dict[str, Model] = {}
    tasks: dict[str, Model] = {}
    for folder in sorted(file.parent for file in ROOT.glob("*/serve.j2")):
        files = sorted(file for file in folder.glob("[!.]*.env") if file.name != "cluster.env" and file.is_file())
        for file in files:
            name = folder.name if len(files) == 1 else f"{folder.name}-{file.stem}"
            name = _assigned([file]).get("ALIAS", name)
            model = Model(folder.name, file.stem, name)
            first = tasks.setdefault(re.sub("[._]", "-", name), model)
            if first is not model:
                both = f"{file_label(file)} and {first.folder}/{first.size}.env are both the model {name}"
                model = replace(first, clash=f"{both}. Rename one of them, and take ALIAS out of one if both have it.")
            found[model.name] = model
    return found


def _assigned(files: Iterable[Path]) -> dict[str, str]:
    """Return the plain values in these files. They are not parsed, because every start asks every model.

    A file that cannot be read sets nothing here, so only a run with its model stops at it.
    """
    try:
        text = "\n".join(file.read_text(errors="replace") for file in files)
    except OSError:
        return {}
    return dict(re.findall(r"^([A-Z][A-Z0-9_]*)=([\w.-]*)", text, re.MULTILINE))


def find_model(name: str) -> Model:
    """Return the model of this name, or of this `<folder>-<size>`. Raises Exit with all names."""
    models = known_models()
    by_name = {f"{model.folder}-{model.size}": model for model in models.values()} | models
    if name not in by_name:
        raise Exit(f"No model is called {name!r}{nearest(name, by_name)}. There are: {', '.join(models)}.")
    if clash := by_name[name].clash:
        raise Exit(clash)
    return by_name[name]


def nearest(name: str, known: Iterable[str], least: float = 0.6) -> str:
    """Return ` (did you mean X?)` if a known name is close to this one, otherwise an empty text."""
    near = get_close_matches(name, known, 1, least)
    return f" (did you mean {near[0]}?)" if near else ""


# --- Files of NAME=value lines ---------------------------------------------------------------------------------------


def file_label(file: Path) -> str:
    """Return a file's path below the root, or its whole path."""
    return str(file.relative_to(ROOT)) if file.is_relative_to(ROOT) else str(file)


def read_values(file: Path) -> dict[str, str]:
    """Return the values of a file by name. The last line of a name counts.

    Raises Exit with the number of a line that is no NAME=value. The text of the line may be a secret.
    """
    if not file.is_file():  # a pipe or a device may have no end
        raise Exit(f"{file} is no file that can be read. ENV_FILE may name another file, or be empty.")
    with file.open(encoding="utf-8", errors="surrogateescape") as stream:  # no setting takes an undecodable byte
        bindings = list(parse_stream(stream))
    for binding in bindings:
        # The second line of a key in base64 may have + and /, and ends in =. A backslash does not join two lines.
        value = binding.value if re.fullmatch(r"[A-Za-z_]\w*", binding.key or "_", re.ASCII) else None
        if binding.error or (binding.key and (value in (None, "=") or value.endswith("\\"))):
            raise Exit(f"{file_label(file)}, line {binding.original.line}: expected NAME=value, with closed quotes.")
    return {binding.key: binding.value or "" for binding in bindings if binding.key}
