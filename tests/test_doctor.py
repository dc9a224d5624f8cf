"""`inv doctor`: the facts that a host tells without anything of ours."""

import json
import subprocess

import pytest

from cluster import doctor, repository
from cluster.command import Command
from cluster.models import find_model
from cluster.settings import load_settings


@pytest.fixture
def site(operator, tmp_path):
    """Makes the settings of a head whose only worker is this machine too, without ssh in between."""
    operator.setattr(doctor, "ssh_command", lambda settings, host, words, reads: Command((tuple(words),)))
    operator.setenv("HOME", str(tmp_path))
    operator.setenv("PYTHONDONTWRITEBYTECODE", "1")

    def settle(model="nemotron", **shell):
        return load_settings(find_model(model), {}, {"HOME": str(tmp_path), "WORKER_HOSTS": "spark-2", **shell})

    return settle


def test_a_worker_reads_its_own_settings(site, tmp_path, operator):
    """A worker's folders are those of its `.env`. The image is the one of the head's shell. No secret goes along."""
    (tmp_path / "sparks").mkdir()
    (tmp_path / "sparks/.env").write_text("CACHE_DIR='/mnt/my cache' # big\nVLLM_IMAGE=old\nVLLM_API_KEY=sk_marker\n")
    operator.delenv("ENV_FILE")
    settings = site(REPO_DIR="~/sparks", VLLM_IMAGE="new", VLLM_API_KEY="sk_marker", CACHE_DIR="/mine")
    head, worker = doctor.ask_hosts(settings, "settings")
    assert {told["CACHE_DIR"] for told in (head.facts["settings"],)} == {"/mine"}
    told = worker.facts["settings"]
    assert (told["CACHE_DIR"], told["HF_CACHE"], told["VLLM_IMAGE"]) == (
        "/mnt/my cache",
        "/mnt/my cache/huggingface",
        "new",
    )
    assert "sk_marker" not in json.dumps(worker.facts) + str(doctor.doctor_commands(settings))


def test_the_first_facts(site, tmp_path):
    """The digest is this checkout's, a token is a mode and a hash, and a Docker that is missing is no image of None."""
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray/auth_token").write_text("secret")
    (tmp_path / ".ray/auth_token").chmod(0o644)
    head, worker = doctor.ask_hosts(site(DOCKER_HOST="unix:///nowhere"), "repository", "token", "disk")
    assert head.facts["repository"] == repository.repository_digest()
    assert head.facts["token"]["mode"] == 0o644 and head.facts["token"]["hash"] == worker.facts["token"]["hash"]
    assert "secret" not in json.dumps(head.facts) and all(one["free"] > 0 for one in head.facts["disk"].values())


def test_a_host_that_does_not_answer_keeps_no_other_from_it(site, operator):
    """ssh's own last line is the error of that host."""
    operator.setattr(doctor, "ssh_command", lambda *_, **__: Command((("sh", "-c", "echo no route >&2; exit 255"),)))
    head, worker = doctor.ask_hosts(site(), "settings")
    assert head.facts and not head.error
    assert not worker.facts and "255: no route" in worker.error


def test_the_text_runs_in_a_plain_python(tmp_path):
    """A host needs nothing but its own Python: the sent modules import the standard library alone."""
    texts = {file: (repository.ROOT / f"cluster/{file}.py").read_text() for file in ("inside/probe", "repository")}
    text = doctor.LOADER.format(texts=texts).replace('sys.modules["doctor"].main()', "")
    subprocess.run(["python3", "-IS", "-"], input=text, text=True, check=True)
