"""The knob that drops an option which an image lacks: named when the line is refused, turned by IMAGE_GATES=auto."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from checks import line
from checks.finding import Finding
from checks.options import Environment, Known, Problem, examine
from command import template
from settings.models import Model
from settings.names import CORE, form


@dataclass(frozen=True)
class Serving:
    """A model's line before it is rendered, and the image that will read it.

    `values` is what the model's template is rendered with, `env` what the containers start with, and `launch` the
    command that the person typed.
    """

    model: Model
    values: Mapping[str, object]
    image: Known
    env: Environment
    launch: str

    def words(self, **emptied: str) -> list[str]:
        """The line with some knobs emptied."""
        return template.words(template.render(self.model.serve, **{**self.values, **emptied}))

    def problems(self, **emptied: str) -> list[Problem]:
        """All that the image's vLLM would stop at."""
        return examine(self.words(**emptied), self.image, self.env)


@dataclass(frozen=True)
class Gates:
    """What IMAGE_GATES=auto empties, what to say of each, and what is wrong even then."""

    overrides: Mapping[str, str]
    said: Sequence[str]
    findings: Sequence[Finding]


def refusals(serving: Serving) -> list[Finding]:
    """A finding for each problem of a line, with the knob that drops it: what IMAGE_GATES=refuse says."""
    return _findings(serving, {})


def gates(serving: Serving) -> Gates:
    """What IMAGE_GATES=auto comes to: knobs are emptied until none would solve a problem any more."""
    emptied: dict[str, str] = {}
    said: list[str] = []
    while found := _next(serving, emptied):
        problem, knob = found
        emptied[knob] = ""
        said.append(f"{_cause(problem, serving)} IMAGE_GATES=auto sets {spelled(knob)}")
    return Gates(emptied, said, _findings(serving, emptied))


def spelled(knob: str) -> str:
    """How a person empties it: `ENABLE_X=0` for a gate, `NAME=` (set, but empty) for the others."""
    return f"{knob}={'0' if knob.startswith('ENABLE_') else ''}"


def _findings(serving: Serving, emptied: Mapping[str, str]) -> list[Finding]:
    found = []
    for problem in serving.problems(**emptied):
        knob = _knob(problem, serving, emptied)
        do = f"Type: {spelled(knob)} {serving.launch}; or: IMAGE_GATES=auto {serving.launch}" if knob else ""
        text = f"{_cause(problem, serving)} {do or _by_hand(problem, serving)}"
        found.append(Finding("options", text))
    return found


def _next(serving: Serving, emptied: Mapping[str, str]) -> tuple[Problem, str] | None:
    """The first problem that a knob solves, and the knob."""
    for problem in serving.problems(**emptied):
        if knob := _knob(problem, serving, emptied):
            return problem, knob
    return None


def _knob(problem: Problem, serving: Serving, emptied: Mapping[str, str]) -> str | None:
    """The profile's knob that takes the option off the line: a gate before others, then the one that drops least."""
    solving = {}
    for knob in sorted(serving.model.knobs - CORE.keys() - emptied.keys()):
        if serving.values.get(knob) and _may_be_empty(knob):
            words = serving.words(**emptied, **{knob: ""})
            if problem.option not in {option.name for option in line.read(words)}:
                solving[knob] = len(words)
    return min(solving, key=lambda knob: (not knob.startswith("ENABLE_"), -solving[knob], knob), default=None)


def _may_be_empty(knob: str) -> bool:
    """Whether empty is a value of this knob: it cannot be for a model's name."""
    try:
        return form(knob).read("") == ""
    except ValueError:
        return False


def _by_hand(problem: Problem, serving: Serving) -> str:
    own = {option.name for option in line.read(serving.words(SERVE_EXTRA=""))}
    where = f"{serving.model.serve}, which has no knob for it," if problem.option in own else "SERVE_EXTRA"
    return f"Take it out of {where} or serve with another image: VLLM_IMAGE=... {serving.launch}"


def _cause(problem: Problem, serving: Serving) -> str:
    return f"{problem.option}: {problem.why}; this image has vLLM {serving.image.vllm}."
