"""One message names everything that is missing, with the line that installs it. Nothing is touched."""

from pathlib import Path

import pytest
from invoke import Exit

from rehearsal import needs, sandbox


@pytest.fixture
def bare(monkeypatch, tmp_path):
    """A machine with no program at all, and the packages that a test names."""
    monkeypatch.setattr(needs, "PATH", str(tmp_path))

    def packages(*installed: str) -> str:
        monkeypatch.setattr(needs, "installed", lambda package: package in installed)
        return needs.missing(tmp_path)

    return packages


def test_one_message_names_all_that_is_missing_and_the_line_that_installs_it(bare):
    """The message has the missing programs and the line for apt-get, which removes no package."""
    said = bare()
    assert "dockerd, docker, docker-init, containerd, runc, ip, debootstrap" in said
    assert said.count("apt-get install") == 1
    assert "apt-get install --yes --no-install-recommends --no-remove" in said
    assert " docker.io " in said


def test_dockers_own_packages_are_never_mixed_with_debians(bare):
    """If one package of Docker's own is installed, the missing ones are Docker's own too."""
    said = bare("containerd.io")
    assert "docker.io" not in said
    assert "docker-ce docker-ce-cli" in said


@pytest.mark.parametrize(
    ("system", "apart"),
    [({"ID": "debian", "VERSION_ID": "12"}, False), ({"ID": "debian", "VERSION_ID": "13"}, True),
     ({"ID": "debian"}, True), ({"ID": "ubuntu", "VERSION_ID": "24.04"}, False)],
)  # fmt: skip
def test_the_command_line_is_a_package_of_its_own_since_debian_13(bare, monkeypatch, system, apart):
    """Since Debian 13 docker.io lacks the program docker. Older ones and Ubuntu 24.04 have it."""
    monkeypatch.setattr(needs.platform, "freedesktop_os_release", lambda: system)
    assert (" docker-cli " in bare()) == apart and (" docker-cli " in bare("containerd.io")) is False


def test_a_folder_that_holds_something_else_is_refused(tmp_path):
    """A rehearsal deletes files below its folder, so the folder must be empty or from an earlier rehearsal."""
    for name in ("engines", "run", "log"):
        (tmp_path / name).mkdir()
    assert "does not belong" not in needs.missing(tmp_path) + needs.missing(tmp_path / "not there yet")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/one.jpg").touch()
    assert "one.jpg does not belong to a rehearsal" in needs.missing(tmp_path / "photos/one.jpg")
    assert f"{tmp_path}/photos does not belong to a rehearsal (set REHEARSAL_DIR " in needs.missing(tmp_path)


@pytest.mark.parametrize("folder", ["sparks", "/my sparks", "/opt/sparks", f"/{'x' * 56}", "/srv/../sparks"])
def test_a_folder_where_no_engine_could_live_is_refused(folder):
    """The path becomes part of socket names and mount options, and the engines cover some folders."""
    with pytest.raises(Exit, match="REHEARSAL_DIR"):
        sandbox.folder({"ENV_FILE": "", "REHEARSAL_DIR": folder})
    assert sandbox.folder({"ENV_FILE": "", "REHEARSAL_DIR": "/srv/optical"}) == Path("/srv/optical")


def test_nothing_is_said_where_nothing_is_missing(monkeypatch, tmp_path):
    """An empty message means that the rehearsal can run."""
    monkeypatch.setattr(needs, "packages", lambda tests: {})
    monkeypatch.setattr(needs, "obstacles", lambda *_: [])
    assert needs.missing(tmp_path) == ""
