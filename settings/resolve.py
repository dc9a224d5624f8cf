"""The settings of one run, and who has the last word: flag, then shell, then .env, then the model's profile."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from decimal import Decimal

from invoke import Exit

from command.template import printable
from settings import envfile, forward, models
from settings.forms import ANY, Form
from settings.models import Model
from settings.names import CORE, FLAGS, NODE_OWN, SECRETS, UNSAID, form, nearest


@dataclass(frozen=True)
class Setting:
    """A value, the text it was read from, and where: `flag --max-len`, `shell`, `.env`, a profile or `default`."""

    value: str
    text: str
    origin: str
    own: bool


@dataclass(frozen=True)
class Source:
    """One place that settings come from; `own` tells the operator's from the project's."""

    origin: str
    values: Mapping[str, str]
    own: bool = True


class Settings(Mapping[str, str]):
    """The settings of one run, frozen: name to value. What is unset and has no default is absent.

    `forward` are the variables that both containers start with, `notes` what the operator should read first.
    """

    def __init__(self, found: dict[str, Setting], model: Model | None, forward: list[str], notes: list[str]) -> None:
        self._found = found
        self.model = model
        self.forward = tuple(forward)
        self.notes = tuple(notes)

    def __getitem__(self, name: str) -> str:
        return self._found[name].value

    def __iter__(self) -> Iterator[str]:
        return iter(self._found)

    def __len__(self) -> int:
        return len(self._found)

    def origin(self, name: str) -> str:
        """Where the value of name came from."""
        return self._found[name].origin

    def overridden(self) -> list[str]:
        """A line for each setting that came from neither profile nor default, with its origin; no secret's value."""
        own = [(name, setting) for name, setting in sorted(self._found.items()) if setting.own]
        said = {
            name: "set" if name in (*SECRETS, "WATCH_HOOK") and at.value else f"= {at.value or at.text or '(empty)'}"
            for name, at in own
        }
        return [f"{name} {said[name]} ({setting.origin})" for name, setting in own]

    def handed_on(self) -> dict[str, str]:
        """What the shell and the flags said, as they said it, for a task on another node: no secret, nothing of this
        node's own."""
        said = {name: at for name, at in self._found.items() if at.origin == "shell" or at.origin.startswith("flag ")}
        return {name: at.text for name, at in sorted(said.items()) if name not in (*SECRETS, *NODE_OWN)}

    def public(self) -> dict[str, str]:
        """What a template may see: everything but the secrets."""
        return {name: value for name, value in self.items() if name not in SECRETS}

    def secrets(self) -> dict[str, str]:
        """The secrets that are set and not empty, to be handed on by name."""
        return {name: self[name] for name in SECRETS if self.get(name)}

    def emptied(self, names: Iterable[str], origin: str) -> Settings:
        """The same settings with these set, but empty, and their new origin."""
        found = self._found | {name: Setting("", "", origin, own=True) for name in names}
        return Settings(found, self.model, list(self.forward), list(self.notes))

    def workers(self) -> list[str]:
        """Every worker as ssh knows it: WORKER_HOSTS, or else the addresses in WORKER_IP."""
        named = self.get("WORKER_HOSTS", self["WORKER_IP"]).split(",")
        return [host for host in dict.fromkeys(named) if host]

    def world_size(self) -> int:
        """How many GPUs, and so how many Sparks, the model needs: TP_SIZE times PP_SIZE."""
        return int(self.get("TP_SIZE", "1")) * int(self.get("PP_SIZE", "1"))


def load(
    model: Model | None = None,
    flags: Mapping[str, str | None] | None = None,
    shell: Mapping[str, str] = os.environ,
) -> Settings:
    """Settle every setting for model (or for none); raises Exit with one sentence for anything that does not fit."""
    site = envfile.site(shell.get("ENV_FILE"))
    own = Source(".env", envfile.read(site) if site else {})
    sources = [*_flags(flags or {}), Source("shell", shell), own, *_profiles(model), _DEFAULTS]
    knobs = model.knobs if model else frozenset()
    found = {name: setting for name in sorted(knobs | CORE.keys()) if (setting := _find(name, sources, form(name)))}
    if lacking := sorted(knobs - found.keys() - CORE.keys()):
        raise Exit(f"{model.folder}/{model.size}.env lacks {', '.join(lacking)}, which {model.serve} uses.")
    _check_utilization(found)
    forwarded, notes = forward.choose([(source.own, source.values) for source in sources])
    found |= {name: _find(name, sources, ANY) for name in forwarded if name not in found}
    notes += [*_unused(knobs.union(forwarded), shell), *_unknown(own, sources)]
    if site and any(own.values.get(name) for name in SECRETS):
        notes += envfile.readable_by_others(site)
    return Settings(found, model, forwarded, notes)


_DEFAULTS = Source("default", {name: value for name, (value, _) in CORE.items() if value is not None}, own=False)


def _flags(flags: Mapping[str, str | None]) -> list[Source]:
    return [Source(f"flag {FLAGS[name]}", {name: text}) for name, text in flags.items() if text is not None]


def _profiles(model: Model | None) -> list[Source]:
    """The model's files, its knobs before what both containers start with; a key that nothing uses is an error."""
    sources = []
    for file in reversed(model.profiles if model else ()):
        values = envfile.read(file)
        known = CORE.keys() | model.knobs | set(values.get("VLLM_FORWARD_VARS", "").split())
        for name in values.keys() - known:
            raise Exit(f"{envfile.label(file)} sets {name}, which {model.serve} does not use{nearest(name, known)}.")
        sources.append(Source(envfile.label(file), values, own=False))
    return sources


def _find(name: str, sources: list[Source], form: Form) -> Setting | None:
    for source in sources:
        if name in source.values:
            return _read(name, source, form)
    return None


def _read(name: str, source: Source, form: Form) -> Setting:
    text = source.values[name]
    try:
        return Setting(printable(form.read(printable(text))), text, source.origin, source.own)
    except ValueError:
        hidden = name in UNSAID
        got = "not shown here, it may hold a secret" if hidden else repr(text)
        takes = form.takes if text.isprintable() else f"{form.takes}; none with control characters"
        raise Exit(f"{name} ({source.origin}) is {got}; it takes {takes}.") from None


def _check_utilization(found: dict[str, Setting]) -> None:
    asked, most = found.get("GPU_MEM_UTIL"), found["GPU_MEM_UTIL_MAX"]
    if asked and Decimal(asked.value) > Decimal(most.value):
        raise Exit(
            f"GPU_MEM_UTIL ({asked.origin}) is {asked.value}; it takes a plain decimal above 0 and at most "
            f"GPU_MEM_UTIL_MAX, which is {most.value} ({most.origin}): the host lives in the same memory."
        )


def _unused(used: frozenset[str], shell: Mapping[str, str]) -> list[str]:
    """A note for each name of another model that the shell sets: this run does not look at it."""
    others = set().union(*(model.keys for model in models.known().values())) - used - CORE.keys()
    return [f"{name} is set in the shell, but this run does not use it." for name in sorted(others & shell.keys())]


def _unknown(own: Source, sources: list[Source]) -> list[str]:
    """A note for each name in `.env` that no setting, no model and no forward list knows."""
    if not own.values:
        return []
    listed = [source.values.get("VLLM_FORWARD_VARS", "").split() for source in sources]
    known = set(CORE).union(*listed, *(model.names for model in models.known().values()))
    strangers = sorted(own.values.keys() - known)
    return [f".env sets {name}, which nothing knows{nearest(name, known)}." for name in strangers]
