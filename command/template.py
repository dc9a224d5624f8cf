"""A template and values in, lines of words out: one flag per line, every value quoted, a missing one an error."""

import shlex
import unicodedata
from functools import cache
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined, meta

ROOT = Path(__file__).resolve().parent.parent
Lines = tuple[tuple[str, ...], ...]


def printable(text: str) -> str:
    """Return text unchanged; raise ValueError if it holds control characters, line separators or undecodable bytes."""
    if any(unicodedata.category(char) in ("Cc", "Cs", "Zl", "Zp") for char in text):
        raise ValueError(text)
    return text


def _quote(value: object) -> str:
    if value is None:
        raise ValueError("a template printed None")
    return shlex.quote(printable(str(value)))


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader([ROOT / "templates", ROOT]),
        finalize=_quote,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["words"] = shlex.split
    return environment


def render(name: str, **values: object) -> Lines:
    """Render the template called name to lines of words; raises jinja2.UndefinedError for a name without a value."""
    text = _environment().get_template(name).render(values)
    return tuple(tuple(shlex.split(line)) for line in text.split("\n") if line.strip())


@cache
def names(name: str) -> frozenset[str]:
    """The names in capitals that the template called name uses, itself or through a template that it extends."""
    environment = _environment()
    tree = environment.parse(environment.loader.get_source(environment, name)[0])
    used = {used for used in meta.find_undeclared_variables(tree) if used.isupper()}
    return frozenset(used.union(*(names(parent) for parent in meta.find_referenced_templates(tree) if parent)))


def words(lines: Lines) -> list[str]:
    """The command as one list of words, as execve takes it."""
    return [word for line in lines for word in line]


def text(lines: Lines) -> str:
    """The command as a person pastes it into bash: one line a flag, continued with a backslash."""
    return " \\\n  ".join(shlex.join(line) for line in lines)
