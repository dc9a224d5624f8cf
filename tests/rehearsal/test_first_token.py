"""Two stand-ins with nothing but Docker and ssh come to their first token by the commands of docs/first-token.md."""

import json
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from operating import KEY, inv

from cluster.settings import CORE
from rehearsal import image, model
from rehearsal.flow import ALLOW, IMAGE
from rehearsal.hosts import INV, Host
from rehearsal.rig import Rig
from rehearsal.shell import run, wait
from tests.rehearsal.hub import NAME, Hub

pytestmark = pytest.mark.rehearsal
DOCUMENT = (Path(__file__).resolve().parents[2] / "docs/first-token.md").read_text()
WHEELS = 8081


def commands() -> list[str]:
    """Return each `./inv …` and the curl line of the document's blocks, in order."""
    blocks = "\n".join(re.findall("^```sh\n(.*?)^```", DOCUMENT, re.M | re.S))
    return [line for line in blocks.splitlines() if line.startswith(("./inv ", "curl "))]


@pytest.fixture
def bare(rig: Rig, shells, sparks: list[Host], tmp_path) -> Iterator[tuple[list[Host], dict[str, str], Hub]]:
    """Two hosts with the base image alone, and the shell of the operator. The head serves wheels and a small hub."""
    base = image.make(rig.builder, rig.say)
    wheels = tmp_path / "wheels"
    words = ("pip", "download", "--quiet", "--dest", wheels, f"ray[default]=={CORE['RAY_VERSION'][0]}")
    run(sys.executable, "-m", *words)
    names = "127.0.0.1 localhost\n" + "".join(f"{host.address} {host.name}\n" for host in sparks)
    pip = {"env": [f"PIP_FIND_LINKS=http://{sparks[0].address}:{WHEELS}/", "PIP_NO_INDEX=1",
                   f"PIP_TRUSTED_HOST={sparks[0].address}"]}  # fmt: skip
    for host in sparks:
        host.run("docker", "image", "rm", "--force", IMAGE)
        host.run("docker", "image", "prune", "--force")
        host.run("rm", "-rf", str(host.cache))
    rig.power_off(sparks[0])
    rig.processes[sparks[0].name] = sparks[0].start(names, additions=pip)
    sparks[0].ready(rig.processes[sparks[0].name])
    words = (sys.executable, "-m", "http.server", "--bind", sparks[0].address, "--directory", str(wheels), str(WHEELS))
    server = sparks[0].popen(*words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    hub = Hub(sparks[0], tmp_path)
    shell = {"BASE_IMAGE": base, "TAG": IMAGE, "VLLM_IMAGE": IMAGE, "WORKER_HOSTS": "spark-2", "VLLM_API_KEY": KEY,
             "MODEL_CKPT": NAME, "HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "SERVE_EXTRA": "--load-format auto",
             }  # fmt: skip
    yield sparks, shell, hub
    inv(sparks[0], "down", **shell)
    for process in (server, hub.process):
        process.kill()
        process.wait(10)
    for host in sparks:
        host.run("docker", "image", "rm", "--force", IMAGE)
        host.run("rm", "-rf", str(host.cache), f"{host.env['HOME']}/.ray")
        model.write(host.cache / "huggingface" / model.NAME)
    rig.power_off(sparks[0])
    rig.power_on(sparks[0])
    rig.copy(IMAGE)


def test_bare_hosts_come_to_their_first_token(bare):
    """Before the steps `up` names what is missing, and starts nothing. After them a chat completion is answered."""
    (head, worker), shell, hub = bare
    assert [line.split()[1] for line in commands()[:-1]] == ["doctor", "build-image", "weights", "token", "up"]
    *tasks, curl = [line.replace("--model nemotron", "--model rehearsal") for line in commands()]
    first = inv(head, "up", "--model", "rehearsal", **shell)
    assert first.returncode == 1 and "so nothing was started. In this order:" in first.stderr, first.stderr
    for number, step in enumerate(("inv doctor", "build-image", "inv weights", "inv token", "inv up"), 1):
        assert re.search(rf"^  {number}\. .*{step}", first.stderr, re.M), first.stderr

    for line in tasks:
        words = shlex.split(line.removesuffix("--max-len 256K"))[1:]
        allow = ["--allow", ALLOW] if words[0] == "up" else []
        hub.forget()
        begun = time.monotonic()
        done = head.run(*INV, *words, *allow, env=shell, timeout=400)
        moved = re.findall(r"^.*: [0-9.]+ of [0-9.]+ GB.*$", done.stderr, re.M)
        print(f"inv {words[0]}: {time.monotonic() - begun:.1f} s", *moved, sep="; ")
        if words[0] == "doctor":
            assert done.returncode in (0, 1, 2, 3) and "answers" in done.stderr, done.stderr
            continue
        assert done.returncode == 0, done.stderr[-4000:]
        for copy in re.findall(r"^  (ssh spark-2 .*)$", done.stderr, re.M) if words[0] == "token" else ():
            assert head.run("sh", "-c", copy).returncode == 0
    # Every node has all files, so no rank has asked the hub, on either host.
    assert "-e HF_HUB_OFFLINE=1" in done.stderr and hub.requests() == []
    words = shlex.split(curl.replace("nvidia/nemotron-3-super", "tiny"))
    asked = [word.replace("$VLLM_API_KEY", KEY) for word in words]
    answer = head.run(*asked, "--silent", "--show-error", "--max-time", "60")
    assert json.loads(answer.stdout)["choices"], answer.stderr
    ranks = [
        host.run("docker", "exec", "node-ray", "pgrep", "-fc", "^ray::RayWorkerProc").stdout for host in (head, worker)
    ]
    assert ranks == ["1\n", "1\n"]
    assert wait(lambda: inv(head, "health", **shell).returncode == 0, 30)
