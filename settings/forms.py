"""What a setting's value may look like: each form reads text and returns it in canonical form, or raises ValueError."""

import os
import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal
from ipaddress import IPv4Address, ip_address

# vLLM's own reading (vllm.utils human_readable_int): capitals are powers of 1024, small letters of 1000.
_TOKEN_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "K": 2**10, "M": 2**20, "G": 2**30}


@dataclass(frozen=True)
class Form:
    """`takes` completes the sentence "it takes ..."; `read` returns the canonical text or raises ValueError."""

    takes: str
    read: Callable[[str], str]


def optional(form: Form) -> Form:
    """The same form, where empty is a value too: it drops what the setting would add."""
    return Form(f"{form.takes}, or nothing", lambda text: form.read(text) if text else "")


def _matching(pattern: str) -> Callable[[str], str]:
    """A reader that takes what the whole pattern matches."""

    def read(text: str) -> str:
        if not re.fullmatch(pattern, text, re.ASCII):
            raise ValueError(text)
        return text

    return read


def _whole(low: int, high: int) -> Callable[[str], str]:
    """A reader of plain decimal digits between low and high."""

    def read(text: str) -> str:
        if not re.fullmatch("[0-9]{1,18}", text) or not low <= int(text) <= high:
            raise ValueError(text)
        return str(int(text))

    return read


def _tokens(text: str) -> str:
    match = re.fullmatch(r"([0-9]{1,12})([kmgKMG]?)", text)
    if not match or not int(match[1]):
        raise ValueError(text)
    return str(int(match[1]) * _TOKEN_UNITS[match[2]])


def _fraction(text: str) -> str:
    if not re.fullmatch(r"0?\.[0-9]{1,6}|1(\.0{1,6})?", text) or not Decimal(text):
        raise ValueError(text)
    return text


def _text(text: str) -> str:
    if not text or text.startswith("-"):
        raise ValueError(text)
    return text


def _folder(text: str) -> str:
    path = os.path.expanduser(text)
    if not os.path.isabs(path) or ":" in path:
        raise ValueError(text)
    return path


def _words(text: str) -> str:
    # A key on a command line can be read by every user of the host; vLLM takes it from VLLM_API_KEY.
    for word in shlex.split(text):
        option = word.replace("_", "-").partition("=")[0]
        if option in ("--api", "--api-") or option.startswith(("--api-k", "--hf-t")):
            raise ValueError(option)
    return text


def _command(text: str) -> str:
    if shlex.split(text)[:1] == [""]:
        raise ValueError(text)
    return text


TEXT = Form("text that does not start with a dash", _text)
ANY = Form("text without control characters", lambda text: text)
WORDS = Form("words as a shell would read them, and no key among them", _words)
COMMAND = Form("a command's words as a shell would read them, or nothing", _command)
COUNT = Form("a whole number of at least 1", _whole(1, 10**18))
PATIENCE = Form("a whole number of seconds, 1 to 1000000", _whole(1, 10**6))
SECONDS = Form("a whole number of seconds, at most 1000000", _whole(0, 10**6))
PORT = Form("a port, 1 to 65535", _whole(1, 65535))
INDEX = Form("a whole number, at most 1000000", _whole(0, 10**6))
GATE = Form("1, 0 or nothing", lambda text: "1" if _matching("[01]?")(text) == "1" else "")
TOKENS = Form("tokens: 262144, or 256K (262144), 256k (256000), 1M (1048576), 1m (1000000)", _tokens)
FRACTION = Form("a plain decimal above 0 and at most 1", _fraction)
ADDRESS = Form("an IPv4 address", lambda text: str(IPv4Address(text)))
ADDRESSES = Form("IPv4 addresses, comma separated", lambda text: ",".join(str(IPv4Address(a)) for a in text.split(",")))
LISTEN = Form("an IP address to listen on", lambda text: str(ip_address(text)))
INTERFACE = Form("a network interface", _matching(r"[\w.@-]{1,15}"))
DEVICES = Form("device names, comma separated", _matching(r"[\w.@-]+(,[\w.@-]+)*"))
THERE = Form(
    "a folder without an equals sign, from the home folder if it is relative", _matching(r"(?!((~|\.)/+)*-)[^=]+")
)
HOSTS = Form("ssh destinations, comma separated", _matching(r"(?!-)[\w.@%-]+(,(?!-)[\w.@%-]+)*"))
IMAGE = Form("an image name", _matching(r"[\w][\w./:@-]*"))
GIB = Form("a plain decimal of at least 0, in GiB", _matching(r"[0-9]{1,4}(\.[0-9]{1,3})?"))
SECRETS = Form("HF_TOKEN, VLLM_API_KEY, both or nothing", _matching("((HF_TOKEN|VLLM_API_KEY) ?)*"))
GATES = Form("refuse or auto", _matching("refuse|auto"))
VERSION = Form("a version number", _matching(r"[0-9][\w.+!]*"))
FILE = Form("an absolute path without a colon", _folder)
FOLDER = Form("an absolute folder without a colon", _folder)
