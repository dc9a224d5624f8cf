"""Every name that a setting may have: its default, its form, the flag that sets it."""

import re
from collections.abc import Iterable
from difflib import get_close_matches

from settings import forms
from settings.forms import Form

SECRETS = ("HF_TOKEN", "VLLM_API_KEY")
# What says where one node is, or what only that node has: `up` does not hand it on to the others.
NODE_OWN = ("VLLM_HOST_IP", "NCCL_IB_GID_INDEX", "SYSFS", "CACHE_DIR", "HF_CACHE", "RAY_AUTH_TOKEN_PATH",
            "WORKER_HOSTS", "REPO_DIR", "REHEARSAL_DIR", "WATCH_INTERVAL_S", "WATCH_FAILURES", "WATCH_HOOK",
            "WATCH_COOLDOWN_S", "WATCH_MAX")  # fmt: skip
# What may hold a secret of the operator's own making: its value is never said.
UNSAID = (*SECRETS, "SERVE_EXTRA", "WATCH_HOOK")
DEFAULT_BASE_IMAGE = "nvcr.io/nvidia/vllm:26.05.post1-py3"

# What no profile has to say. None: unset means something of its own, which .env.example tells.
CORE: dict[str, tuple[str | None, Form]] = {
    "PRIMARY_IF": ("enp1s0f1np1", forms.INTERFACE),
    "HEAD_NODE_IP": ("10.0.0.1", forms.ADDRESS),
    "WORKER_IP": ("10.0.0.2", forms.ADDRESSES),
    "WORKER_HOSTS": (None, forms.optional(forms.HOSTS)),
    "REPO_DIR": (None, forms.THERE),
    "VLLM_HOST_IP": (None, forms.ADDRESS),
    "DATA_IFS": (None, forms.optional(forms.DEVICES)),
    "RDMA_HCAS": (None, forms.optional(forms.DEVICES)),
    "NCCL_IB_GID_INDEX": (None, forms.INDEX),
    "NCCL_DEBUG": (None, forms.optional(forms.TEXT)),
    "NCCL_DEBUG_SUBSYS": (None, forms.optional(forms.TEXT)),
    "SYSFS": ("/sys", forms.FOLDER),
    "VLLM_IMAGE": ("local/vllm-ray:26.05.post1", forms.IMAGE),
    "BASE_IMAGE": (DEFAULT_BASE_IMAGE, forms.IMAGE),
    "TAG": (None, forms.IMAGE),
    "RAY_VERSION": ("2.60.0", forms.VERSION),
    "CACHE_DIR": ("~/.cache", forms.FOLDER),
    "HF_CACHE": (None, forms.FOLDER),
    "OBJECT_STORE_MEMORY": ("1073741824", forms.COUNT),
    "INCLUDE_DASHBOARD": ("0", forms.GATE),
    "WAIT_HEAD_S": ("60", forms.SECONDS),
    "HOST": ("0.0.0.0", forms.LISTEN),
    "PORT": ("8000", forms.PORT),
    "GPU_MEM_UTIL_MAX": ("0.85", forms.FRACTION),
    "MEM_WARN_GIB": ("6", forms.GIB),
    "MEM_FLOOR_GIB": ("3", forms.GIB),
    "MEM_ABORT_GIB": ("2", forms.GIB),
    "STALL_S": ("600", forms.PATIENCE),
    "HANG_S": ("300", forms.PATIENCE),
    "WATCH_INTERVAL_S": ("30", forms.PATIENCE),
    "WATCH_FAILURES": ("10", forms.COUNT),
    "WATCH_HOOK": ("", forms.COMMAND),
    "WATCH_COOLDOWN_S": ("3600", forms.SECONDS),
    "WATCH_MAX": ("3", forms.INDEX),
    "IMAGE_GATES": ("refuse", forms.GATES),
    "RAY_AUTH_TOKEN_PATH": ("~/.ray/auth_token", forms.FILE),
    "REQUIRED_SECRETS": ("VLLM_API_KEY", forms.SECRETS),
    "SERVE_EXTRA": ("", forms.WORDS),
    "VLLM_FORWARD_VARS": ("", forms.ANY),
    "HF_TOKEN": (None, forms.ANY),
    "VLLM_API_KEY": (None, forms.ANY),
    "REHEARSAL_DIR": ("/var/lib/dgx-spark-rehearsal", forms.FOLDER),
}

# Knobs of more than one profile whose form is narrower than text that may be empty.
KNOBS: dict[str, Form] = {
    "MODEL_CKPT": forms.TEXT,
    "SERVED_NAME": forms.TEXT,
    "MAX_MODEL_LEN": forms.TOKENS,
    "GPU_MEM_UTIL": Form("a plain decimal above 0 and at most GPU_MEM_UTIL_MAX", forms.FRACTION.read),
    "TP_SIZE": forms.COUNT,
    "PP_SIZE": forms.COUNT,
    "MAX_NUM_SEQS": forms.optional(forms.COUNT),
    "MAX_NUM_BATCHED_TOKENS": forms.optional(forms.TOKENS),
    "CUDAGRAPH_CAPTURE_SIZE": forms.optional(forms.COUNT),
    "PARSER_REVISION": forms.TEXT,
}


# The flags that set a setting, as their origin is printed.
FLAGS = {"MAX_MODEL_LEN": "--max-len", "HEAD_NODE_IP": "--head-ip", "BASE_IMAGE": "--base-image", "TAG": "--tag"}


def form(name: str) -> Form:
    """The form of the setting called name; a knob that only its own profile knows is text, or nothing."""
    if name in CORE:
        return CORE[name][1]
    return KNOBS.get(name, forms.GATE if name.startswith("ENABLE_") else forms.optional(forms.TEXT))


def looks_secret(name: str) -> bool:
    """Whether a variable of this name probably holds a secret, which `docker inspect` would show to everyone."""
    return bool(re.search("TOKEN|KEY|SECRET|PASSWORD", name, re.IGNORECASE))


def nearest(name: str, known: Iterable[str]) -> str:
    """` (did you mean X?)` where a known name is close, else nothing."""
    near = get_close_matches(name, known, 1)
    return f" (did you mean {near[0]}?)" if near else ""
