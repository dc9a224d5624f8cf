"""The settings of one run: a flag beats the shell, then `<folder>/.env` of the model, `.env`, and the model's profile.

A value that is set but empty is a value. Every name, default and form stands here. A value of the wrong form, an
unknown name in a profile and a file that cannot be read raise Exit.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from decimal import Decimal
from ipaddress import IPv4Address, ip_address
from pathlib import Path
from typing import Literal, NamedTuple, Self

from invoke import Exit

from cluster.command import SECRETS, printable, render, words_of
from cluster.models import ROOT, Model, file_label, nearest, read_values

# A value of these may be a secret, so no line shows it. A malformed value of NEVER_SHOWN may be one too.
HIDDEN = (*SECRETS, "WATCH_HOOK")
NEVER_SHOWN = (*HIDDEN, "SERVE_EXTRA")
# These belong to one node. `up` does not pass them on.
OF_ONE_NODE = (
    "ENV_FILE",
    *("VLLM_HOST_IP", "NCCL_IB_GID_INDEX", "SYSFS", "CACHE_DIR", "HF_CACHE", "RAY_AUTH_TOKEN_PATH", "WORKER_HOSTS"),
    *("REPO_DIR", "SHIP_VIA", "REHEARSAL_DIR", "WATCH_INTERVAL_S", "WATCH_FAILURES", "WATCH_HOOK", "WATCH_COOLDOWN_S"),
    "WATCH_MAX",
)
FLAGS = {"MAX_MODEL_LEN": "--max-len", "HEAD_NODE_IP": "--head-ip", "BASE_IMAGE": "--base-image", "TAG": "--tag",
         "REVISION": "--revision", "WORKER_HOSTS": "--to"}  # fmt: skip
DEFAULT_BASE_IMAGE, DEFAULT_IMAGE = "nvcr.io/nvidia/vllm:26.05.post1-py3", "local/vllm-ray:26.05.post1"


# --- Forms -----------------------------------------------------------------------------------------------------------


class Form(NamedTuple):
    """`takes` ends the sentence "it takes …". `read` returns the value in one spelling, or raises ValueError."""

    takes: str
    read: Callable[[str], str]


def _matching(pattern: str) -> Callable[[str], str]:
    def read(text: str) -> str:
        if not re.fullmatch(pattern, text, re.ASCII):
            raise ValueError(text)
        return text

    return read


def _whole(low: int, high: int) -> Callable[[str], str]:
    def read(text: str) -> str:
        if not re.fullmatch("[0-9]{1,18}", text) or not low <= int(text) <= high:
            raise ValueError(text)
        return str(int(text))

    return read


def _tokens(text: str) -> str:
    """Read the units as vLLM does: capitals are powers of 1024, small letters powers of 1000."""
    units = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "K": 2**10, "M": 2**20, "G": 2**30}
    match = re.fullmatch(r"([0-9]{1,12})([kmgKMG]?)", text)
    if not match or not int(match[1]):
        raise ValueError(text)
    return str(int(match[1]) * units[match[2]])


def _extra_words(text: str) -> str:
    """Refuse a key, because every user of the host can read a command line. VLLM_API_KEY is for the key."""
    for word in shlex.split(text):
        if re.match("--api(-|-k.*)?$|--hf-t", word.replace("_", "-").partition("=")[0]):
            raise ValueError("a key")
    return text


def _or_nothing(form: Form) -> Form:
    return Form(f"{form.takes}, or nothing", lambda text: form.read(text) if text else "")


ANY = Form("text without control characters", str)
PUBLIC = Form("text without a password, because `docker inspect` would show it", _matching(r"(?!.*://[^/\s]*@)(.|\n)*"))
TEXT = Form("text that does not start with a dash", _matching(r"[^-](.|\n)*"))
COUNT = Form("a whole number of at least 1", _whole(1, 10**18))
INDEX = Form("a whole number, at most 1000000", _whole(0, 10**6))
SECONDS = Form("a whole number of seconds, at most 1000000", _whole(0, 10**6))
PATIENCE = Form("a whole number of seconds, 1 to 1000000", _whole(1, 10**6))
GATE = Form("1, 0 or nothing", lambda text: _matching("[01]?")(text).replace("0", ""))
TOKENS = Form("tokens: 262144, or 256K (262144), 256k (256000), 1M (1048576), 1m (1000000)", _tokens)
SHARE = Form("a plain decimal above 0 and at most 1", _matching(r"(?=.*[1-9])(0?\.[0-9]{1,6}|1(\.0{1,6})?)"))
GIB = Form("a plain decimal of at least 0, in GiB", _matching(r"[0-9]{1,4}(\.[0-9]{1,3})?"))
ADDRESS = Form("an IPv4 address", lambda text: str(IPv4Address(text)))
ADDRESSES = Form("IPv4 addresses, comma separated", lambda text: ",".join(str(IPv4Address(a)) for a in text.split(",")))
INTERFACE = Form("a network interface", _matching(r"[\w.@-]{1,15}"))
DEVICES = Form("device names, comma separated", _matching(r"[\w.@-]+(,[\w.@-]+)*"))
HOSTS = Form("ssh destinations, comma separated", _matching(r"(?!-)[\w.@%-]+(,(?!-)[\w.@%-]+)*"))
# On the other node `env NAME=value … FOLDER/inv` would take a folder with an equals sign for a variable.
CHECKOUT = Form("a folder without an equals sign, from the home folder if it is relative", _matching(r"(?!-)[^=]+"))
PATH = Form("an absolute path without a colon", lambda text: _matching("/[^:]*")(os.path.expanduser(text)))
REVISION = Form("a branch, a tag or a commit", _matching(r"(?!.*\.\.)\w[\w./-]*"))
IMAGE = Form("an image name", _matching(r"(?!.*//)[\w][\w./:@-]*"))
SECRET_NAMES = Form("HF_TOKEN, VLLM_API_KEY, both or nothing", _matching("((HF_TOKEN|VLLM_API_KEY)( |$))*"))
EXTRA_WORDS = Form("words as a shell would read them, and no key among them", _extra_words)
COMMAND = Form("a command's words as a shell would read them, or nothing", lambda text: shlex.join(shlex.split(text)))

# The default and the form of each setting that a profile need not set. None means no default: .env.example says what
# happens then.
CORE: dict[str, tuple[str | None, Form]] = {
    "PRIMARY_IF": ("enp1s0f1np1", INTERFACE),
    "HEAD_NODE_IP": ("10.0.0.1", ADDRESS),
    "WORKER_IP": ("10.0.0.2", ADDRESSES),
    "WORKER_HOSTS": (None, _or_nothing(HOSTS)),
    "SHIP_VIA": (None, _or_nothing(HOSTS)),
    "REPO_DIR": (None, CHECKOUT),
    "VLLM_HOST_IP": (None, ADDRESS),
    "DATA_IFS": (None, _or_nothing(DEVICES)),
    "RDMA_HCAS": (None, _or_nothing(DEVICES)),
    "NCCL_IB_GID_INDEX": (None, INDEX),
    "NCCL_DEBUG": (None, _or_nothing(TEXT)),
    "NCCL_DEBUG_SUBSYS": (None, _or_nothing(TEXT)),
    "SYSFS": ("/sys", PATH),
    "VLLM_IMAGE": (DEFAULT_IMAGE, IMAGE),
    "BASE_IMAGE": (DEFAULT_BASE_IMAGE, IMAGE),
    "TAG": (None, IMAGE),
    "RAY_VERSION": ("2.60.0", Form("a version number", _matching(r"[0-9][\w.+!]*"))),
    "CACHE_DIR": ("~/.cache", PATH),
    "HF_CACHE": (None, PATH),
    "HF_ENDPOINT": (None, _or_nothing(PUBLIC)),
    "REVISION": ("", _or_nothing(REVISION)),
    "PYTORCH_CUDA_ALLOC_CONF": ("expandable_segments:True", _or_nothing(TEXT)),
    "ENGINE_TIMEOUT_S": ("1800", PATIENCE),
    "OBJECT_STORE_MEMORY": ("1073741824", COUNT),
    "INCLUDE_DASHBOARD": ("0", GATE),
    "WAIT_HEAD_S": ("60", SECONDS),
    "HOST": ("0.0.0.0", Form("an IP address to listen on", lambda text: str(ip_address(text)))),
    "PORT": ("8000", Form("a port, 1 to 65535", _whole(1, 65535))),
    "GPU_MEM_UTIL_MAX": ("0.85", SHARE),
    "MEM_WARN_GIB": ("12", GIB),
    "MEM_FLOOR_GIB": ("5", GIB),
    "MEM_ABORT_GIB": ("4", GIB),
    "DROP_CACHE": ("1", GATE),
    "STALL_S": ("600", PATIENCE),
    "HANG_S": ("300", PATIENCE),
    "WATCH_INTERVAL_S": ("30", PATIENCE),
    "WATCH_FAILURES": ("10", COUNT),
    "WATCH_HOOK": ("", COMMAND),
    "WATCH_COOLDOWN_S": ("3600", SECONDS),
    "WATCH_MAX": ("3", INDEX),
    "IMAGE_GATES": ("refuse", Form("refuse or auto", _matching("refuse|auto"))),
    "RAY_AUTH_TOKEN_PATH": ("~/.ray/auth_token", PATH),
    "REQUIRED_SECRETS": ("VLLM_API_KEY", SECRET_NAMES),
    "SERVE_EXTRA": ("", EXTRA_WORDS),
    "VLLM_FORWARD_VARS": ("", ANY),
    "HF_TOKEN": (None, ANY),
    "VLLM_API_KEY": (None, ANY),
    "REHEARSAL_DIR": ("/var/lib/dgx-spark-rehearsal", PATH),
}
# The forms of some knobs. Any other ENABLE_… takes 1, 0 or nothing, and any other knob takes text or nothing.
KNOBS: dict[str, Form] = {
    "MODEL_CKPT": TEXT,
    "SERVED_NAME": TEXT,
    "MAX_MODEL_LEN": TOKENS,
    "GPU_MEM_UTIL": Form("a plain decimal above 0 and at most GPU_MEM_UTIL_MAX", SHARE.read),
    "TP_SIZE": COUNT,
    "PP_SIZE": COUNT,
    "MAX_NUM_SEQS": _or_nothing(COUNT),
    "MAX_NUM_BATCHED_TOKENS": _or_nothing(TOKENS),
    "CUDAGRAPH_CAPTURE_SIZE": _or_nothing(COUNT),
    "PARSER_REVISION": TEXT,
}


def form(name: str) -> Form:
    if name in CORE:
        return CORE[name][1]
    return KNOBS.get(name, GATE if name.startswith("ENABLE_") else _or_nothing(TEXT))


# --- The settings of one run -----------------------------------------------------------------------------------------


class Setting(NamedTuple):
    """One value, the text it was read from, and its origin: `flag --max-len`, `shell`, a file, `default`."""

    value: str
    text: str
    origin: str


@dataclass(frozen=True, eq=False)
class Settings(Mapping[str, str]):
    """The settings of one run, name to value. A setting that is unset and has no default is absent.

    `forward` names the variables that both containers start with. `lacking` names those that the profile lists and that
    are unset or empty. `notes` are sentences for the operator. `typed` is the task with the flags that are no settings.
    """

    found: Mapping[str, Setting]
    model: Model | None
    forward: tuple[str, ...]
    lacking: tuple[str, ...]
    notes: tuple[str, ...]
    typed: tuple[str, ...] = ("launch",)

    def __getitem__(self, name: str) -> str:
        return self.found[name].value

    def __iter__(self) -> Iterator[str]:
        return iter(self.found)

    def __len__(self) -> int:
        return len(self.found)

    def origin(self, name: str) -> str:
        return self.found[name].origin

    def handed_on(self) -> dict[str, str]:
        """Return what the shell and the flags set, for another node: no secret, and nothing of this node alone."""
        stays = (*SECRETS, *OF_ONE_NODE, "HEAD_NODE_IP")
        given = [name for name in sorted(self) if re.match("shell$|flag ", self.origin(name)) and name not in stays]
        return {name: self.found[name].text for name in given}

    def public(self) -> dict[str, str]:
        """Return all settings but the secrets, for templates."""
        return {name: value for name, value in self.items() if name not in SECRETS}

    def emptied(self, names: Iterable[str], origin: str) -> Self:
        """Return the same settings, with these names set but empty."""
        return replace(self, found={**self.found, **dict.fromkeys(names, Setting("", "", origin))})

    def line(self, task: str = "", where: Literal["here", "elsewhere"] = "here", /, **changed: str) -> str:
        """Return the typed line with these settings changed, or the line of another task for the same model.

        The shell's settings stand before it, but no secret, and for a node elsewhere nothing that belongs to this
        node. `up` brings up every node, so it does for head and worker.
        """
        same = not task or (self.typed[0] == "up" and task in ("head", "worker", "launch"))
        shell = {name: self.found[name].text for name in sorted(self) if self.origin(name) == "shell"}
        flags = {name: one.text for name, one in self.found.items() if same and one.origin.startswith("flag ")}
        for name, value in changed.items():
            (flags if name in FLAGS else shell)[name] = value
        words = ["--model", self.model.name] if self.model else []
        words += [word for name, value in flags.items() for word in (FLAGS[name], value)]
        left_out = {*flags, *HIDDEN, *(OF_ONE_NODE if where == "elsewhere" and not same else ())}
        before = [f"{name}={value and shlex.quote(value)} " for name, value in shell.items() if name not in left_out]
        first, *own = self.typed if same else (task,)
        return "".join(before) + shlex.join(["inv", *first.split(), *words, *own])

    def workers(self) -> list[str]:
        """Return every worker as ssh knows it: WORKER_HOSTS, or the addresses in WORKER_IP."""
        hosts = self.get("WORKER_HOSTS", self["WORKER_IP"]).split(",")
        return [host for host in dict.fromkeys(hosts) if host]

    def world_size(self) -> int:
        """Return the number of GPUs that the model needs. A Spark has one."""
        return int(self.get("TP_SIZE", "1")) * int(self.get("PP_SIZE", "1"))


@dataclass(frozen=True, eq=False)
class ModelSettings(Settings):
    """The settings of a run that has a model."""

    model: Model


# The values of each origin. An earlier origin beats a later one.
Sources = Mapping[str, Mapping[str, str]]


def load_settings(
    model: Model | None = None, flags: Mapping[str, str | None] | None = None, shell: Mapping[str, str] = os.environ
) -> Settings:
    """Find every setting of a run with this model, or without one."""
    site = {origin: read_values(file) for origin, file in site_files(model, shell.get("ENV_FILE")).items()}
    given = {f"flag {FLAGS[name]}": {name: text} for name, text in (flags or {}).items() if text is not None}
    defaults = {name: value for name, (value, _) in CORE.items() if value is not None}
    profiles = _profiles(model) if model else {}
    sources = {**given, "shell": shell, **site, **profiles, "default": defaults}

    knobs = (model.knobs if model else frozenset()) | {"ENV_FILE"} & shell.keys()  # so a remedy reads the same file
    found = {name: setting for name in sorted(knobs | CORE.keys()) if (setting := _find(name, sources, form(name)))}
    if model and (lacking := sorted(knobs - found.keys())):
        raise Exit(f"{model.folder}/{model.size}.env lacks {', '.join(lacking)}, which {model.serve} uses.")
    _check_limits(found)
    listed = {name: _find(name, sources, PUBLIC) for name in _forward_list(sources)}
    forward = {name: found[setting]._replace(origin=setting) for name, setting in EVERY_CONTAINER.items()}
    forward |= {name: setting for name, setting in listed.items() if setting and setting.value}
    empty = [name for name in listed if name not in forward]
    of_profile = " ".join(values.get("VLLM_FORWARD_VARS", "") for values in profiles.values()).split()
    of_model = tuple(name for name in empty if name in of_profile)
    text = "VLLM_FORWARD_VARS lists {}, which is unset or empty: no container gets it{}."
    notes = [text.format(name, ", and launch refuses this" * (name in of_model)) for name in empty]
    settings = Settings({**forward, **found}, model, tuple(forward), of_model, tuple(notes))
    return _with_model(settings, model) if model else settings


def is_operators(origin: str) -> bool:
    return origin in ("shell", ".env") or origin.startswith("flag ") or origin.endswith("/.env")


def site_files(model: Model | None, named: str | None) -> dict[str, Path]:
    """Return the operator's files by origin: the one in ENV_FILE if it is set, or the model's `.env` and the root's."""
    if named is not None:
        return {".env": Path(named)} if named else {}
    places = [f"{model.folder}/.env", ".env"] if model else [".env"]
    return {place: ROOT / place for place in places if os.path.lexists(ROOT / place)}


def _profiles(model: Model) -> Sources:
    """Read the model's files. A name that nothing uses is an error."""
    sources = {}
    for file in model.profiles:
        values = read_values(file)
        known = CORE.keys() | model.knobs | {"ALIAS"} | set(values.get("VLLM_FORWARD_VARS", "").split())
        for name in sorted(values.keys() - known):
            raise Exit(f"{file_label(file)} sets {name}, which {model.serve} does not use{nearest(name, known)}.")
        sources[file_label(file)] = values
    return sources


def _find(name: str, sources: Sources, of_form: Form) -> Setting | None:
    """Read a setting from the first source that has it."""
    origin = next((origin for origin, values in sources.items() if name in values), None)
    if origin is None:
        return None
    text = sources[origin][name]
    try:
        return Setting(printable(of_form.read(printable(text))), text, origin)
    except ValueError:
        got = "not shown here, it may hold a secret" if name in NEVER_SHOWN or "://" in text else repr(text)
        takes = of_form.takes if text.isprintable() else f"{of_form.takes}; none with control characters"
        raise Exit(f"{name} ({origin}) is {got}; it takes {takes}.") from None


def _check_limits(found: Mapping[str, Setting]) -> None:
    asked, most = found.get("GPU_MEM_UTIL"), found["GPU_MEM_UTIL_MAX"]
    if asked and Decimal(asked.value) > Decimal(most.value):
        raise Exit(
            f"GPU_MEM_UTIL ({asked.origin}) is {asked.value}; it takes at most GPU_MEM_UTIL_MAX, which is {most.value} "
            f"({most.origin}), because the host needs the rest of the memory."
        )
    limits = {name: found[name] for name in ("MEM_ABORT_GIB", "MEM_FLOOR_GIB", "MEM_WARN_GIB")}
    abort, floor, warn = (Decimal(limit.value) for limit in limits.values())
    if floor > warn or (abort and abort >= floor):
        told = ", ".join(f"{name} is {limit.value} ({limit.origin})" for name, limit in limits.items())
        raise Exit(f"{told}. MEM_ABORT_GIB must be below MEM_FLOOR_GIB (or 0), and MEM_FLOOR_GIB at most MEM_WARN_GIB.")


def _with_model(settings: Settings, model: Model) -> ModelSettings:
    """Drop expandable segments if the model has a KV connector. vLLM refuses the two together (vllm PR 41237)."""
    allocator = "PYTORCH_CUDA_ALLOC_CONF"
    words = words_of(render(model.serve, hf_cache="", **settings.public()))
    connector = [word for word in words if re.match("--kv[-_](transfer[-_]config|offloading[-_]size)", word)]
    if connector and "expandable_segments:True" in (value := settings[allocator]):
        ours = settings.origin(allocator) == "default"
        note = f"{allocator} {'is' if ours else 'must be'} empty, because vLLM refuses {value} beside {connector[0]}."
        settings = replace(settings.emptied([allocator] * ours, "KV connector"), notes=(*settings.notes, note))
    return ModelSettings(**vars(settings))


# --- VLLM_FORWARD_VARS -----------------------------------------------------------------------------------------------

# The variables that every container gets in any case, with the setting that changes each.
SET_BY = {
    "VLLM_HOST_IP": "VLLM_HOST_IP", "MASTER_ADDR": "HEAD_NODE_IP", "TP_SOCKET_IFNAME": "PRIMARY_IF",
    "NCCL_SOCKET_IFNAME": "DATA_IFS", "GLOO_SOCKET_IFNAME": "DATA_IFS", "OMPI_MCA_btl_tcp_if_include": "DATA_IFS",
    "NCCL_IB_HCA": "RDMA_HCAS", "NCCL_IB_DISABLE": "RDMA_HCAS", "UCX_NET_DEVICES": "RDMA_HCAS",
}  # fmt: skip
# The variables that every container starts with, each with the setting that holds its value. ENGINE_TIMEOUT_S is the
# limit for a step in vLLM's newer and in its older executor for Ray, and the limit for the start of its engine.
EVERY_CONTAINER = {
    "PYTORCH_CUDA_ALLOC_CONF": "PYTORCH_CUDA_ALLOC_CONF", "VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS": "ENGINE_TIMEOUT_S",
    "RAY_CGRAPH_get_timeout": "ENGINE_TIMEOUT_S", "VLLM_ENGINE_READY_TIMEOUT_S": "ENGINE_TIMEOUT_S",
    "MEM_ABORT_GIB": "MEM_ABORT_GIB",
}  # fmt: skip
# Bash or the container sets these for itself, or vLLM warns about the name.
SET_ELSEWHERE = (
    "VLLM_IMAGE", "VLLM_FORWARD_VARS", "PATH", "HOME", "_", "UID", "EUID", "PPID", "GROUPS", "SHELLOPTS", "OPTIND",
    "SHLVL", "RANDOM", "SRANDOM", "LINENO", "SECONDS", "EPOCHSECONDS", "EPOCHREALTIME", "DIRSTACK", "FUNCNAME",
    "HISTCMD", "PIPESTATUS",
)  # fmt: skip


def _forward_list(sources: Sources) -> list[str]:
    """Return the names to forward: the profile's list, and behind it the operator's."""
    lists = {origin: values["VLLM_FORWARD_VARS"] for origin, values in sources.items() if "VLLM_FORWARD_VARS" in values}
    of_operator = [text for origin, text in lists.items() if is_operators(origin)][:1]
    of_profile = [text for origin, text in lists.items() if not is_operators(origin)]
    names = list(dict.fromkeys(" ".join([*reversed(of_profile), *of_operator]).split()))
    for name in names:
        if why := _unfit(name):
            raise Exit(f"VLLM_FORWARD_VARS lists {re.split('[=:]', name)[0]!r}, which {why}. Remove it from the list.")
    return names


def _unfit(name: str) -> str | None:
    """Return why no container may get a variable of this name."""
    if not re.fullmatch("[A-Za-z_][A-Za-z0-9_]*", name):
        return "is no variable name; the list takes names with spaces between them"
    if re.search("TOKEN|KEY|SECRET|PASS(W|PHRASE|$)|PWD|CREDENTIAL|AUTH|BEARER|COOKIE|_PAT$", name, re.IGNORECASE):
        return "looks like a secret: `docker inspect` would show it. HF_TOKEN and VLLM_API_KEY go to the server anyway"
    if name in SET_BY:
        return f"every container has from the setting {SET_BY[name]}; set {SET_BY[name]} instead"
    if name in SET_ELSEWHERE or name.startswith(("NODE_RAY_", "BASH")):
        return "bash, the container or this project sets for itself"
    return None
