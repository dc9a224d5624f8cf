"""The command layer: from template to words, and from words to a process with its signals and exit status."""

import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from types import SimpleNamespace

import pytest
from invoke import Exit
from jinja2 import UndefinedError

from command import run, template
from command.command import Command, tell


@pytest.fixture
def written(tmp_path, monkeypatch):
    """Renders a template of this text."""

    def render(text: str, **values: object) -> template.Lines:
        (tmp_path / "it.j2").write_text(text)
        monkeypatch.setattr(template, "ROOT", tmp_path)
        template._environment.cache_clear()
        return template.render("it.j2", **values)

    yield render
    template._environment.cache_clear()


def test_a_missing_value_is_an_error(written):
    """A name that nobody gave ends the run: it never becomes an empty word."""
    with pytest.raises(UndefinedError, match="MISSING"):
        written("docker {{ MISSING }}\n")


def test_none_is_an_error(written):
    """None is a mistake of ours, and not the word None."""
    with pytest.raises(ValueError, match="None"):
        written("docker {{ it }}\n", it=None)


@pytest.mark.parametrize("char", ["\n", "\r", "\0", "\x1b", "\u2028", "\udcff"], ids=ascii)
def test_a_control_character_is_an_error(char, written):
    """The last gate: whatever let it through before, no command line is written with it."""
    with pytest.raises(ValueError):  # noqa: PT011 - the value is the message
        written("docker {{ it }}\n", it=f"a{char}b")


@pytest.mark.parametrize("value", ["", "a b", "'", '"', "$(id)", "-x", "#", "\\", "a=b#c", "{{ 1 }}", "é\u00a0", 7])
def test_a_value_is_one_word_wherever_it_stands(value, written):
    """Each `{{ … }}` is quoted, also beside other text, and nothing is exempt."""
    lines = written("docker --name={{ it }} {{ it }}:/x\n{{ it }}\n", it=value)
    assert lines == (("docker", f"--name={value}", f"{value}:/x"), (str(value),))
    assert shlex.split(template.text(lines).replace("\\\n", "")) == template.words(lines)


def test_text_is_what_bash_reads_back():
    """The text of a command, pasted, is the same words."""
    lines = (("printf", "%s\\0"), ("a b", "$HOME"), ("`id`",), ("\\",), ("'",), ("",))
    done = subprocess.run(["bash"], input=template.text(lines), capture_output=True, text=True, check=True)
    assert done.stdout.split("\0")[:-1] == template.words(lines)[2:]


@contextmanager
def _child(body: Callable[[], object]) -> Iterator[SimpleNamespace]:
    """A process in a session of its own that does what body does, as `inv` would, its output buffered in a pipe."""
    (out, its_out), (err, its_err) = os.pipe(), os.pipe()
    if not (pid := os.fork()):
        status = 1
        try:
            os.setsid()
            os.dup2(its_out, 1), os.dup2(its_err, 2)
            sys.stdout, sys.stderr = open(1, "w"), open(2, "w")  # noqa: SIM115 - they live as long as the process
            for end in (out, its_out, err, its_err):
                os.close(end)
            body()
            status = 0
        except SystemExit as ended:
            status = ended.code
        finally:
            sys.stdout.flush()
            os._exit(status)
    os.close(its_out), os.close(its_err)
    with open(out) as said, open(err) as told:
        yield SimpleNamespace(pid=pid, out=said, err=told, status=lambda: _status(pid))


def _status(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _sh(text: str) -> Command:
    return Command((("sh", "-c", text),))


def test_become_is_the_program():
    """The process id, standard output and exit status are the program's own, and it ignores no signal."""
    text = "echo $$; sh -c 'kill -PIPE $$'; echo $?; exit 7"
    with _child(lambda: (print("before"), run.become(_sh(text)))) as child:
        assert child.out.read() == f"before\n{child.pid}\n{128 + signal.SIGPIPE}\n"
        assert child.err.read() == f"{shlex.join(['sh', '-c', text])}\n"
        assert child.status() == 7


def test_become_refuses_what_is_not_there(monkeypatch):
    """No docker on the PATH is a sentence."""
    monkeypatch.setenv("PATH", "/usr/bin:/bin")  # a folder on it that cannot be read would be another sentence
    before = signal.getsignal(signal.SIGPIPE)
    with pytest.raises(Exit, match=r"no-such-program cannot be started: No such file or directory\."):
        run.become(Command((("no-such-program",),)))
    signal.signal(signal.SIGPIPE, before)


@pytest.mark.parametrize("started", [run.run, run.run_whole, run.output], ids=lambda started: started.__name__)
def test_a_program_that_is_not_there_is_a_sentence(started, capfd):
    """However it is started, a missing program is no traceback."""
    with pytest.raises(Exit, match="no-such-program"):
        started(Command((("no-such-program",),)))


@pytest.mark.parametrize("started", [run.run, run.run_whole], ids=lambda started: started.__name__)
def test_an_exit_status_is_passed_on(started, capfd):
    """A command that fails ends the run with its status; one that does well says nothing more."""
    with pytest.raises(Exit, match="failed with status 3") as failed:
        started(Command((("sh", "-c", "exit 3"),)))
    assert failed.value.code == 3
    assert started(Command((("true",),))) is None


def test_what_a_command_says_goes_to_standard_error(capfd):
    """Standard output is for command lines; a command that runs, and its text, are told to the person."""
    run.run(Command((("echo", "said"),), "this node", {"A": "b c"}))
    out, err = capfd.readouterr()
    assert (out, err) == ("", "# this node\nexport A='b c'\necho said\nsaid\n")


def test_an_answer_is_exported_to_the_command_that_asks(capfd):
    """`export NAME="$(…)"`: the output of one command reaches the next by name."""
    run.run(Command((("sh", "-c", "echo got $A"),), asks={"A": (("echo", "an answer"),)}))
    assert capfd.readouterr().err.endswith("A is an answer\ngot an answer\n")


def test_an_answer_that_fails_stops_the_command(capfd):
    """A question without an answer is no empty answer."""
    with pytest.raises(Exit):
        run.run(Command((("echo", "not reached"),), asks={"A": (("false",),)}))
    assert "\nnot reached" not in capfd.readouterr().err


def test_a_question_that_takes_too_long_is_a_sentence():
    """Asking never hangs."""
    with pytest.raises(Exit, match="sleep 9 did not answer within"):
        run.output(Command((("sleep", "9"),)), seconds=0.01)


def test_a_question_is_given_up_though_its_program_cannot_be_killed(monkeypatch):
    """nvidia-smi may hang in the kernel, where no signal reaches it: whoever asked goes on."""
    asked = []
    with monkeypatch.context() as patch:
        patch.setattr(run.Child, "kill", lambda child: asked.append(child))
        with pytest.raises(Exit, match="sleep 9 did not answer within"):
            run.output(Command((("sleep", "9"),)), seconds=0.01)
    (child,) = asked
    assert child.poll() is None
    child.kill()
    child.wait()


def test_a_command_that_must_not_be_cut_has_its_time(monkeypatch, capfd):
    """No signal ends it, so that something else must."""
    monkeypatch.setattr(run, "WHOLE_S", 0.01)
    with pytest.raises(Exit, match="sleep 9 did not end within 0 s"):
        run.run_whole(Command((("sleep", "9"),)))


@pytest.mark.parametrize("stdout", [None, "/dev/full"], ids=["closed", "full"])
def test_what_was_asked_for_and_cannot_be_written_is_a_sentence(stdout, monkeypatch):
    """Neither a traceback nor silence."""
    with open(stdout, "w") if stdout else nullcontext() as file:
        monkeypatch.setattr(sys, "stdout", file)
        with pytest.raises(Exit, match=r"Standard output (is closed|cannot be written)"):
            tell("{}")
        monkeypatch.undo()
        with suppress(OSError):
            file and file.close()


@pytest.mark.parametrize("number", [signal.SIGINT, *run.ENDINGS], ids=lambda number: number.name)
def test_a_signal_waits_for_a_command_that_must_not_be_cut(number, tmp_path):
    """run_whole: the terminal's Ctrl-C reaches neither the command nor, before its end, us; then it counts."""

    def body() -> None:
        for one in run.ENDINGS:
            signal.signal(one, signal.default_int_handler)
        try:
            run.run_whole(_sh(f"echo started; read -r _ <{tmp_path}/line; echo done"))
        except KeyboardInterrupt:
            print("interrupted")

    os.mkfifo(tmp_path / "line")
    line = os.open(tmp_path / "line", os.O_RDWR)
    with _child(body) as child:
        while child.err.readline() != "started\n":
            pass
        os.killpg(child.pid, number)
        os.write(line, b"\n")
        os.close(line)
        assert (child.err.read(), child.out.read(), child.status()) == ("done\n", "interrupted\n", 0)


@pytest.fixture
def heard():
    """The signals that were heard, in order; who hears them afterwards is who heard them before."""
    numbers, got = (signal.SIGINT, *run.ENDINGS), []
    before = {number: signal.signal(number, lambda number, _: got.append(number)) for number in numbers}
    yield got
    for number, handler in before.items():
        signal.signal(number, handler)


def test_held_signals_count_once_at_the_end(heard):
    """The first of them, to whoever hears it then, when all is done that must not be cut in two, or has failed."""

    def cut():
        with run.held():
            with run.held():
                os.kill(os.getpid(), signal.SIGHUP)
            os.kill(os.getpid(), signal.SIGTERM)
            assert heard == []
            raise Exit("it failed")

    handlers = [signal.getsignal(number) for number in run.ENDINGS]
    with pytest.raises(Exit, match="it failed"):
        cut()
    assert heard == [signal.SIGHUP] and handlers == [signal.getsignal(number) for number in run.ENDINGS]


def test_who_ignores_a_signal_goes_on_to(heard):
    """`nohup` has us ignore a hang-up: it is neither held nor counted, and nobody who is started hears it."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with run.held():
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        os.kill(os.getpid(), signal.SIGHUP)
    with run.following(_sh("kill -HUP $$; echo done")) as log:
        os.kill(os.getpid(), signal.SIGHUP)
        assert log.stdout.read() == "done\n"
    assert heard == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP], ids=lambda number: number.name)
def test_who_follows_a_log_ends_with_its_terminal(number):
    """following: a hang-up or a SIGTERM to us ends the follower too, and our status says which it was."""

    def body() -> None:
        with run.following(_sh("exec sleep 60")) as log:
            print(log.pid, flush=True)
            log.wait()

    with _child(body) as child:
        follower = int(child.out.readline())
        os.kill(child.pid, number)
        assert child.status() == 128 + number
    with pytest.raises(ProcessLookupError):
        os.kill(follower, 0)
