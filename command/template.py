"""A template and values in, lines of words out: one flag per line, every value quoted, a missing one an error."""

import shlex
import unicodedata
from functools import cache
from itertools import pairwise
from pathlib import Path

from invoke import Exit
from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from jinja2.exceptions import TemplateNotFound, TemplateSyntaxError

ROOT = Path(__file__).resolve().parent.parent
Lines = tuple[tuple[str, ...], ...]


def printable(text: str) -> str:
    """Return text unchanged; raise ValueError for control or invisible characters, line ends and undecodable bytes."""
    if not text.isprintable() and any(unicodedata.category(char) in ("Cc", "Cf", "Cs", "Zl", "Zp") for char in text):
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
        optimized=False,  # constants are few, and looking for them costs every start
    )
    environment.filters["words"] = shlex.split
    return environment


def render(name: str, **values: object) -> Lines:
    """Render the template called name to lines of words; raises jinja2.UndefinedError for a name without a value."""
    text = _loaded(name).render(values)
    return tuple(_words(line) for line in text.split("\n") if line.strip())


def _words(line: str) -> tuple[str, ...]:
    # shlex reads letter by letter, which every start would feel; a line without a quote needs no more than its spaces.
    return tuple(shlex.split(line) if {"'", '"', "\\"} & set(line) else line.split())


def _loaded(name: str) -> Template:
    try:
        return _environment().get_template(name)
    except TemplateSyntaxError as error:
        raise Exit(f"{error.name}, line {error.lineno}, is no template: {error.message}") from None
    except (TemplateNotFound, OSError, UnicodeDecodeError) as error:
        raise Exit(f"The template {name} cannot be read: {error}") from None


@cache
def names(name: str) -> frozenset[str]:
    """The names in capitals that the template called name uses, itself or through a template that it extends.

    Read by Jinja's lexer alone: its parser would cost every start as much again as the rendering.
    """
    environment = _environment()
    try:
        source = environment.loader.get_source(environment, name)[0]
        tokens = [token[1:] for token in environment.lex(source)]
    except (TemplateSyntaxError, TemplateNotFound, OSError, UnicodeDecodeError) as error:
        raise Exit(f"The template {name} cannot be read: {error}") from None
    tokens = [token for token in tokens if token[0] in ("name", "string")]
    parents = [text.strip("\"'") for (_, word), (_, text) in pairwise(tokens) if word == "extends"]
    used = {word for kind, word in tokens if kind == "name" and word.isupper()}
    return frozenset(used.union(*(names(parent) for parent in parents)))


def words(lines: Lines) -> list[str]:
    """The command as one list of words, as execve takes it."""
    return [word for line in lines for word in line]


def text(lines: Lines) -> str:
    """The command as a person pastes it into bash: one line a flag, continued with a backslash."""
    return " \\\n  ".join(shlex.join(line) for line in lines)
