"""VLLM_FORWARD_VARS: the variables that both containers start with, the profile's and then the operator's."""

import re
from collections.abc import Mapping, Sequence

from invoke import Exit

from settings.names import looks_secret

LIST = "VLLM_FORWARD_VARS"
# This project's own: vLLM warns of VLLM_* names that it does not know.
_PRIVATE = (LIST, "VLLM_IMAGE", "NODE_RAY_WRAPPER", "NODE_RAY_WRAPPER_SHA256", "NODE_RAY_IMAGE")
# What the bring-up sets itself, from settings of this project.
_SET = {
    "VLLM_HOST_IP": "VLLM_HOST_IP",
    "MASTER_ADDR": "HEAD_NODE_IP",
    "TP_SOCKET_IFNAME": "PRIMARY_IF",
    "NCCL_SOCKET_IFNAME": "DATA_IFS",
    "GLOO_SOCKET_IFNAME": "DATA_IFS",
    "OMPI_MCA_btl_tcp_if_include": "DATA_IFS",
    "NCCL_IB_HCA": "RDMA_HCAS",
    "NCCL_IB_DISABLE": "RDMA_HCAS",
    "UCX_NET_DEVICES": "RDMA_HCAS",
}
# A container has its own, or bash would not export them.
_UNFIT = ("PATH", "HOME", "UID", "EUID", "PPID", "SHELLOPTS", "BASHOPTS")


def choose(sources: Sequence[tuple[bool, Mapping[str, str]]]) -> tuple[list[str], list[str]]:
    """The names to forward, and notes about listed names that are unset or empty.

    sources: the one with the last word first, each with whether it is the operator's. The operator's list adds to
    the profile's. Raises Exit for a name that is no variable name, looks like a secret or is the project's own.
    """
    operator = next((values[LIST] for own, values in sources if own and LIST in values), "")
    profile = [values[LIST] for own, values in sources if not own and LIST in values]
    listed = list(dict.fromkeys(" ".join([*reversed(profile), operator]).split()))
    for name in listed:
        _refuse(name)
    empty = [name for name in listed if not next((values[name] for _, values in sources if name in values), "")]
    notes = [f"{LIST} lists {name}, which is unset or empty: no container gets it." for name in empty]
    return [name for name in listed if name not in empty], notes


def _refuse(name: str) -> None:
    if not re.fullmatch("[A-Za-z_][A-Za-z0-9_]*", name):
        raise Exit(f"{LIST} lists {name!r}, which is no variable name; it takes names with spaces between them.")
    if looks_secret(name):
        raise Exit(
            f"{LIST} lists {name}, which looks like a secret: everyone who may run `docker inspect` would read it. "
            "HF_TOKEN and VLLM_API_KEY reach the server by themselves; take it off the list."
        )
    if name in _SET:
        raise Exit(
            f"{LIST} lists {name}, which every container gets by {_SET[name]}; take it off the list and set that."
        )
    if name in _UNFIT:
        raise Exit(f"{LIST} lists {name}, which every container has for itself; take it off the list.")
    if name in _PRIVATE:
        raise Exit(f"{LIST} lists {name}, which is this project's own and means nothing inside; take it off the list.")
