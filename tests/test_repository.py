"""The digest of the repository: two nodes with the same digest run the same thing."""

import pytest
from invoke import Exit

import tasks
from cluster import repository
from cluster.repository import check_repository, repository_digest

DECIDING = (
    "tasks.py",
    "requirements.lock",
    "templates/a.j2",
    "tiny/serve.j2",
    "tiny/1b.env",
    "tiny/1b.json",
    "cluster/Dockerfile",
    "cluster/a.py",
    "cluster/inside/serve.sh",
    "cluster/inside/deeper/still.py",
)


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A small repository. The digest is taken of it."""
    for name in DECIDING:
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_text(name)
    monkeypatch.setattr(repository, "ROOT", tmp_path)
    return tmp_path


def digest_with(checkout, name):
    """Write a file into the checkout, and take the digest."""
    (checkout / name).parent.mkdir(exist_ok=True, parents=True)
    (checkout / name).write_text("another byte")
    return repository_digest()


def test_a_file_that_decides_what_a_node_runs_changes_the_digest(checkout):
    """A byte in code, a template, a profile, a script or the Dockerfile makes another version, at any depth."""
    seen = [repository_digest()]
    for name in (*DECIDING, "templates/new.j2", "cluster/inside/new.sh"):
        seen.append(digest_with(checkout, name))
        assert seen.count(seen[-1]) == 1, name


def test_a_renamed_file_changes_the_digest(checkout):
    """The same bytes under another name are another version."""
    before = repository_digest()
    (checkout / "templates/a.j2").rename(checkout / "templates/b.j2")
    assert repository_digest() != before


def test_a_file_that_decides_nothing_leaves_the_digest(checkout):
    """Tests, documents, the site's own files and the leftovers of git, pip and Python may differ from node to node."""
    before = repository_digest()
    for name in (
        *("tests/a.py", "tests/measure/a.py", "docs/a.json", "README.md", "tiny/README.md", ".env", "site.env"),
        *(".venv/a.py", ".git/a.py", "venv/lib/a.py", "build/lib/a.py", "cluster/.a.py", "cluster/a.pyc"),
        *("cache/huggingface/config.json", "dgx_spark_cluster.egg-info/a.json"),
    ):
        assert digest_with(checkout, name) == before, name


def test_another_version_is_refused(checkout):
    """The refusal shows both digests and the command to type. No expected digest is no reason to refuse."""
    check_repository(None)
    check_repository(repository_digest())
    with pytest.raises(Exit, match=f"sha256 is {repository_digest()[:12]}, the head has 0123456789ab. .* git pull"):
        check_repository("0123456789abcdef")
    with pytest.raises(Exit, match="another version"):
        tasks.worker.body(None, repository="")
