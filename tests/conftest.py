"""What the fast tests share: an operator on a machine made up of files, who types `inv …` and reads what it says."""

import difflib
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
from invoke import Config, Context, Exit
from invoke.parser import Parser

import tasks
from cluster import links, settings

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = Path(__file__).with_name("golden")

# A Spark's two ports, each shown as two PCIe functions: RoCE device and netdev.
SPARK = (
    ("rocep1s0f0", "enp1s0f0np0"),
    ("rocep1s0f1", "enp1s0f1np1"),
    ("roceP2p1s0f0", "enP2p1s0f0np0"),
    ("roceP2p1s0f1", "enP2p1s0f1np1"),
)

# What `inv` makes anew for every line typed, made once.
PARSERS = {task.name: Parser(contexts=[task]) for task in tasks.ns.to_contexts()}
CONTEXTS = {dry: Context(Config(overrides={"run": {"dry": dry}})) for dry in (True, False)}
# No test changes the profiles of this repository, so each is read once.
_fresh, _once = settings.read_values, cache(settings.read_values)
settings.read_values = lambda file: dict(_once(file)) if file.parent.parent == ROOT else _fresh(file)


@dataclass(frozen=True)
class Said:
    """What one `inv …` printed, and its exit status."""

    out: str
    err: str
    code: int


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the flag with which a change of a command line that is meant is written down."""
    parser.addoption("--update-golden", action="store_true", help="write tests/golden anew, and print what changed")


@pytest.fixture(scope="session")
def sysfs(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Makes a /sys with these RoCE devices and netdevs, all up but those in `down`."""

    @cache
    def make(devices: tuple[tuple[str, str], ...] = SPARK, down: tuple[str, ...] = ()) -> Path:
        root = tmp_path_factory.mktemp("sys")
        for number, (hca, netdev) in enumerate(devices):
            bus = root / f"devices/pci{number}"
            (bus / "net" / netdev).mkdir(parents=True)
            (bus / "net" / netdev / "carrier").write_text(f"{int(netdev not in down)}\n")
            (bus / "net" / netdev / "operstate").write_text("down\n" if netdev in down else "up\n")
            for place, target in ((f"net/{netdev}", bus / "net" / netdev), (f"infiniband/{hca}/device", bus)):
                (root / "class" / place).parent.mkdir(parents=True, exist_ok=True)
                (root / "class" / place).symlink_to(target)
        return root

    return make


@pytest.fixture
def addresses(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The IPv4 address of each netdev of this machine, to be changed by a test."""
    made = {netdev: f"10.0.{number}.1" for number, (_, netdev) in enumerate(SPARK)}
    made["enp1s0f1np1"] = "10.0.0.1"
    monkeypatch.setattr(links, "ipv4_address", made.get)
    return made


@pytest.fixture
def operator(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """An environment that is the same everywhere: /home/operator, no setting in the shell, no `.env`."""
    for name in os.environ.keys() - {"PATH", "TMPDIR"}:
        if not name.startswith("PYTEST"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", "/home/operator")
    monkeypatch.setenv("ENV_FILE", "")
    return monkeypatch


@pytest.fixture
def env_file(operator: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """This site's `.env`, empty until a test writes to it."""
    file = tmp_path / "site.env"
    file.touch(mode=0o600)
    operator.setenv("ENV_FILE", str(file))
    return file


@pytest.fixture
def inv(operator: pytest.MonkeyPatch, sysfs: Callable[..., Path], addresses: dict, capfd) -> Callable[..., Said]:
    """Types `inv …` on a Spark whose links are all up, settings before it as in a shell: inv("stop", PORT="1")."""

    def typed(line: str, **shell: str) -> Said:
        words = shlex.split(line.removeprefix("--dry "))
        (call,) = PARSERS[words[0]].parse_argv(words)
        with pytest.MonkeyPatch.context() as now:
            for name, value in ({"SYSFS": str(sysfs())} | shell).items():
                now.setenv(name, value)
            capfd.readouterr()
            try:
                tasks.ns[call.name](CONTEXTS[line.startswith("--dry ")], **call.as_kwargs)
            except Exit as error:
                out, err = capfd.readouterr()
                return Said(out, err + error.message, error.code)
        return Said(*capfd.readouterr(), 0)

    return typed


@pytest.fixture(scope="session")
def real_run() -> subprocess.CompletedProcess:
    """One real `python -m invoke --dry …` of several tasks, from a sub-folder, with Invoke's own variables set."""
    words = [sys.executable, "-X", "importtime", "-m", "invoke", "--echo", "--dry"]
    words += ["build-image", "launch-nemotron", "stop", "health", "cleanup"]
    env = {"PATH": os.environ["PATH"], "HOME": "/home/operator", "ENV_FILE": "", "INVOKE_RUN_ECHO": "1"}
    env |= {"INVOKE_RUN_ECHO_FORMAT": "\33[1m{command}", "INVOKE_RUN_PTY": "1"}
    return subprocess.run(words, cwd=ROOT / "tests", env=env, capture_output=True, text=True, check=True)


@pytest.fixture
def golden(request: pytest.FixtureRequest, capfd) -> Iterator[Callable[[str, str], None]]:
    """Compares text with tests/golden/NAME.txt; `pytest --update-golden` writes it and prints what changed."""

    def compare(name: str, text: str) -> None:
        file = GOLDEN / f"{name}.txt"
        text = text.replace(str(ROOT), "REPOSITORY")
        before = file.read_text() if file.exists() else ""
        if request.config.getoption("--update-golden") and text != before:
            file.write_text(text)
            changes = difflib.unified_diff(before.splitlines(True), text.splitlines(True), file.name, file.name)
            with capfd.disabled():
                sys.stdout.write("\n" + "".join(changes))
        else:
            assert text == before, "if this is meant: pytest --update-golden, and read the diff"

    return compare
