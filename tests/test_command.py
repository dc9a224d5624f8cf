"""The command layer: from template to words, and from words to a process with its signals and exit status."""

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
from invoke import Exit
from jinja2 import UndefinedError

from cluster import command, notes
from cluster.command import ENDINGS, Command, become, held, pipe, run, say, stream, tell, words_of


@pytest.fixture
def written(tmp_path, monkeypatch):
    """Renders a template of this text."""

    def render(text: str, **values: object) -> command.Lines:
        (tmp_path / "it.j2").write_text(text)
        monkeypatch.setattr(command, "ROOT", tmp_path)
        command._templates.cache_clear()
        return command.render("it.j2", **values)

    yield render
    command._templates.cache_clear()


def test_a_missing_value_is_an_error(written):
    """A name without a value ends the run and never becomes an empty word."""
    with pytest.raises(UndefinedError, match="MISSING"):
        written("docker {{ MISSING }}\n")


def test_none_is_an_error(written):
    """None is a mistake of ours, and not the word None."""
    with pytest.raises(ValueError, match="None"):
        written("docker {{ it }}\n", it=None)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a\n{% if %}", "line 2: Expected an expression"),
        ("{{ A | nothing }}", "line 1: No filter named"),
        ('a\n{% include "gone.j2" %}', "line 2: gone.j2 is missing, or extends itself."),
        ('{% extends "it.j2" %}', "line 1: it.j2 is missing, or extends itself."),
        ("{{ gone }}", "line 1: 'gone' is undefined."),
        ("a\n{{ 1 / 0 }}", "line 2: division by zero."),
        ("{{ none }}", "line 1: a template printed None."),
        ("{{ 'a\\nb' }}", "line 1: 'a\\nb' has a control character."),
        ("a\nb c\n--x it's", "line 3: no quote or backslash is needed here."),
        ('--x "{{ 1 }}"', "line 1: no quote or backslash is needed here."),
        ("--x \\{{ 1 }}", r"line 1: no quote or backslash is needed here."),
    ],
)
def test_a_template_with_a_mistake_is_named(text, said, written, monkeypatch):
    """A new model's template is refused in a sentence with file, line and cause."""
    written("{# makes the file #}")
    (command.ROOT / "it.j2").write_text(text)
    monkeypatch.setattr(notes, "ROOT", command.ROOT)
    command._templates.cache_clear()
    command.template_names.cache_clear()
    with pytest.raises(Exception) as error:  # noqa: PT011 - the sentence is the promise
        command.render("it.j2", names=command.template_names("it.j2"))
    assert notes.in_a_sentence(error.value).startswith(f"it.j2, {said}")


@pytest.mark.parametrize("char", ["\n", "\r", "\0", "\x1b", "\u2028", "\udcff"], ids=ascii)
def test_a_control_character_is_an_error(char, written):
    """No command line is written with a control character, even if a setting let it through."""
    with pytest.raises(ValueError):  # noqa: PT011 - the value is the message
        written("docker {{ it }}\n", it=f"a{char}b")


@pytest.mark.parametrize("value", ["", "a b", "'", '"', "$(id)", "-x", "#", "\\", "a=b#c", "{{ 1 }}", "é\u00a0", 7])
def test_a_value_is_one_word_wherever_it_stands(value, written):
    """Each `{{ … }}` is quoted, also beside other text, and nothing is exempt."""
    lines = written("docker --name={{ it }} {{ it }}:/x\n{{ it }}\n", it=value)
    assert lines == (("docker", f"--name={value}", f"{value}:/x"), (str(value),))
    assert shlex.split(Command(lines).text.replace("\\\n", "")) == words_of(lines)


def test_text_is_what_bash_reads_back():
    """bash reads the pasted text as the same words. Each flag has its own line, which ends with a backslash."""
    lines = (("printf", "%s\\0"), ("a b", "$HOME"), ("`id`",), ("\\",), ("'",), ("",))
    done = subprocess.run(["bash"], input=Command(lines).text, capture_output=True, text=True, check=True)
    assert done.stdout.split("\0")[:-1] == words_of(lines)[2:]


@contextmanager
def _child(body: Callable[[], object]) -> Iterator[SimpleNamespace]:
    """Call body in a process with a session of its own, as `inv` has. Its output goes to pipes."""
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
    """The process id, standard output and exit status are those of the program. It ignores no signal."""
    text = "echo $$; sh -c 'kill -PIPE $$'; echo $?; exit 7"
    with _child(lambda: (tell("before"), become(_sh(text)))) as child:
        assert child.out.read() == f"before\n{child.pid}\n{128 + signal.SIGPIPE}\n"
        assert child.err.read() == f"{shlex.join(['sh', '-c', text])}\n"
        assert child.status() == 7


def test_become_refuses_a_missing_program(monkeypatch):
    """A program that is not on the PATH brings a message."""
    monkeypatch.setenv("PATH", "/usr/bin:/bin")  # a folder on it that cannot be read would be another sentence
    before = signal.getsignal(signal.SIGPIPE)
    with pytest.raises(Exit, match=r"no-such-program cannot be started: No such file or directory\."):
        become(Command((("no-such-program",),)))
    signal.signal(signal.SIGPIPE, before)


@pytest.mark.parametrize("how", [{}, {"whole": True}, {"capture": True}, {"heard": "spark-2"}], ids=str)
def test_a_program_that_is_missing_is_named(how, capfd):
    """No way to run a command ends in a traceback."""
    with pytest.raises(Exit, match=r"no-such-program cannot be started: No such file or directory\."):
        run(Command((("no-such-program",),)), **how)


@pytest.mark.parametrize("how", [{}, {"whole": True}, {"capture": True}, {"heard": "spark-2"}], ids=str)
def test_an_exit_status_is_passed_on(how, capfd):
    """A command that fails ends the task with its status, or with 128 and its signal as a shell does."""
    for end, said, status in (("exit 3", "failed with status 3", 3), ("kill -TERM $$", "was ended by SIGTERM", 143)):
        with pytest.raises(Exit, match=said) as failed:
            run(_sh(end), **how)
        assert failed.value.code == status
    assert run(_sh("exit 0"), **how) == ""


def test_what_a_command_says_goes_to_standard_error(capfd):
    """Standard output is for command lines: the text of a command that runs, and its output, go to standard error."""
    run(Command((("echo", "said"),), "this node", {"A": "b c"}))
    out, err = capfd.readouterr()
    assert (out, err) == ("", "# this node\nexport A='b c'\necho said\nsaid\n")


def test_a_closed_standard_error_drops_what_is_said(monkeypatch, capfd):
    """With `2>&-` no note gets between the command lines on standard output, and commands run all the same."""
    monkeypatch.setattr(sys, "stderr", None)
    say("a note")
    run(_sh("echo output; echo error >&2"))
    monkeypatch.undo()
    assert capfd.readouterr() == ("", "")


def test_captured_output_is_returned_and_not_shown(capfd):
    """Neither the command nor its output is shown. If it fails, its last three lines say why."""
    assert run(_sh("echo '  two  '; echo lines; echo error >&2"), capture=True) == "two\nlines"
    with pytest.raises(Exit, match=r"^sh -c .* failed with status 3: 2 / 3 / 4$"):
        run(_sh("for i in 1 2 3 4; do echo $i >&2; done; exit 3"), capture=True)
    assert capfd.readouterr() == ("", "")


def test_a_command_on_a_host_is_heard_as_it_runs(capfd):
    """Each line of its standard error is shown after the name of its host. Its standard output is returned."""
    assert run(_sh("echo one >&2; echo '  two ' >&2; echo id"), heard="spark-2") == "id"
    assert capfd.readouterr() == ("", "spark-2 | one\nspark-2 |   two\n")
    with pytest.raises(Exit) as failed:
        run(_sh("for i in 1 2 3 4 5 6 7 8 9 10 11 12 13 14; do echo $i >&2; done; exit 3"), heard="spark-2")
    assert failed.value.message.splitlines()[1:] == [f"  {number}" for number in range(3, 15)]


def test_the_words_behind_an_alias_are_never_said(capfd):
    """An operator's own command may hold a password: neither its text nor its failure shows a word of it."""
    for words in (("sh", "-c", "exit 3; sk_marker"), ("/no/sk_marker",)):
        with pytest.raises(Exit, match=r"^the hook (failed with status 3|cannot be started)") as failed:
            run(Command((words,), alias="the hook"), seconds=5, whole=True)
        assert "marker" not in failed.value.message
    assert capfd.readouterr() == ("", "")


def test_a_child_gets_no_secret_unless_its_command_hands_it_on(monkeypatch, tmp_path, capfd):
    """Secrets in the shell of the operator stay there: only the server's start takes them by name."""
    for name in command.SECRETS:
        monkeypatch.setenv(name, "from the shell")
    shown = Command((("sh", "-c", "echo ${HF_TOKEN-none} ${VLLM_API_KEY-none}"),), secrets={"HF_TOKEN": "handed on"})
    assert run(shown, capture=True) == "handed on none"
    asked = Command((("sh", "-c", "echo $A"),), asks={"A": shown.lines})
    assert run(asked, capture=True) == "none none"


def test_an_answer_is_exported_to_the_command_that_asks(capfd):
    """`export NAME="$(…)"`: the output of one command reaches the next by name."""
    run(Command((("sh", "-c", "echo got $A"),), asks={"A": (("echo", "an answer"),)}))
    assert capfd.readouterr().err.endswith("A is an answer\ngot an answer\n")


def test_an_answer_that_fails_stops_the_command(capfd):
    """A question that fails is not an empty answer."""
    with pytest.raises(Exit):
        run(Command((("echo", "not reached"),), asks={"A": (("false",),)}))
    assert "\nnot reached" not in capfd.readouterr().err


@pytest.mark.parametrize(
    ("ends", "how"),
    [
        ("exec sleep 60", {}),
        ("exec 2>&-; exec sleep 60", {"heard": "spark-2"}),
        ("sleep 60 & wait", {"capture": True}),
        ("sleep 60 & wait", {"whole": True}),
    ],
)
def test_a_command_that_takes_too_long_is_killed(ends, how, capfd, tmp_path):
    """The command is killed with its children, because a jump host's ssh would hold the pipes open."""
    group = tmp_path / "group"
    for seconds in (0.05, 1, 10):  # beside other work the shell may need more to come as far as its child
        begun = time.monotonic()
        with pytest.raises(Exit, match=rf"did not end within {seconds:.0f} s and was killed") as failed:
            run(_sh(f"echo $$ >{group}; {ends}"), seconds=seconds, **how)
        assert failed.value.code == 128 + signal.SIGKILL and time.monotonic() - begun < seconds + 10
        if group.exists() and group.read_text():
            break
    until = time.monotonic() + 10
    while _group_runs(int(group.read_text())) and time.monotonic() < until:
        time.sleep(0.002)
    assert not _group_runs(int(group.read_text()))


def _group_runs(group: int) -> bool:
    """Whether a process of the group runs. Zombies that nobody has collected yet do not."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, _, its_group = stat.read_text().rpartition(")")[2].split()[:3]
            if int(its_group) == group and state != "Z":
                return True
    return False


def test_a_program_that_cannot_be_killed_is_left(monkeypatch):
    """A driver may hang in the kernel, where no signal reaches it: the task goes on without it."""
    groups = []

    def refused(group, _):
        groups.append(group)
        raise PermissionError

    with monkeypatch.context() as patch:
        patch.setattr(os, "killpg", refused)
        with pytest.raises(Exit, match=r"^sleep 9 did not end within 0 s and could not be killed \(process \d+\)\.$"):
            run(Command((("sleep", "9"),)), capture=True, seconds=0.01)
    os.killpg(groups[0], signal.SIGKILL)


def test_a_command_that_must_not_be_cut_has_its_time(monkeypatch, capfd):
    """A time limit ends a command that no signal may end."""
    monkeypatch.setattr(command, "WHOLE_S", 0.01)
    with pytest.raises(Exit, match="sleep 9 did not end within 0 s"):
        run(Command((("sleep", "9"),)), whole=True)


def test_a_reader_that_has_seen_enough_ends_the_task_quietly():
    """`inv plan | head` ends by SIGPIPE, without a traceback. Elsewhere a closed pipe or socket ends nothing."""

    def body() -> None:
        tell("short")
        assert signal.getsignal(signal.SIGPIPE) is before
        tell("long " * 100_000)

    before = signal.getsignal(signal.SIGPIPE)
    with _child(body) as child:
        assert child.out.readline() == "short\n"
        child.out.close()
        assert (child.status(), child.err.read()) == (-signal.SIGPIPE, "")


@pytest.mark.parametrize("number", [signal.SIGINT, *ENDINGS], ids=lambda number: number.name)
def test_a_signal_waits_for_a_command_that_must_not_be_cut(number, tmp_path):
    """whole: a Ctrl-C does not reach the command. It reaches this process after the command's end."""

    def body() -> None:
        for one in (signal.SIGINT, *ENDINGS):
            signal.signal(one, signal.default_int_handler)
        try:
            run(_sh(f"echo started; read -r _ <{tmp_path}/line; echo done"), whole=True)
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
    """The signals that were heard, in order. The handlers are restored afterwards."""
    numbers, got = (signal.SIGINT, *ENDINGS), []
    before = {number: signal.signal(number, lambda number, _: got.append(number)) for number in numbers}
    yield got
    for number, handler in before.items():
        signal.signal(number, handler)


def test_held_signals_count_once_at_the_end(heard):
    """After the block, or after its failure, the earlier handler gets the first held signal."""

    def cut():
        with held():
            with held():
                os.kill(os.getpid(), signal.SIGHUP)
            os.kill(os.getpid(), signal.SIGTERM)
            assert heard == []
            raise Exit("it failed")

    handlers = [signal.getsignal(number) for number in ENDINGS]
    with pytest.raises(Exit, match="it failed"):
        cut()
    assert heard == [signal.SIGHUP] and handlers == [signal.getsignal(number) for number in ENDINGS]


def test_an_ignored_signal_stays_ignored(heard):
    """Under `nohup` SIGHUP is ignored. It is not held, and a child ignores SIGHUP too."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with held():
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        os.kill(os.getpid(), signal.SIGHUP)
    with stream(_sh("kill -HUP $$; echo done")) as lines:
        os.kill(os.getpid(), signal.SIGHUP)
        assert list(lines) == ["done"]
    assert heard == []


def test_a_stream_gives_lines_as_they_come_and_ends_its_command(capfd):
    """The input is closed too, because a process in a container gets no SIGTERM from `docker exec`."""
    for at_the_end in ("exec sleep 60", "trap '' TERM; exec cat"):
        with stream(_sh(f"echo one; {at_the_end}")) as lines:
            assert next(lines) == "one"
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize("number", ENDINGS, ids=lambda number: number.name)
def test_a_stream_ends_with_its_terminal(number):
    """A SIGHUP or SIGTERM to this process ends the command too, and the exit status names the signal."""

    def body() -> None:
        signal.signal(number, signal.SIG_DFL)
        with stream(_sh("echo $$; exec sleep 60")) as lines:
            for line in lines:
                print(line, flush=True)

    with _child(body) as child:
        follower = int(child.out.readline())
        os.kill(child.pid, number)
        assert child.status() == 128 + number
    with pytest.raises(ProcessLookupError):
        os.kill(follower, 0)


GREETS = ("sh", "-c", 'read -r _ _ _ _ _ session _ </proc/$$/stat; [ "$session" = $$ ] && echo "$GREETING"; cat')


@pytest.fixture
def detached(tmp_path) -> Command:
    """A command that writes a line if it has a session of its own, then reads its standard input to the end."""
    return Command((GREETS,), "head", env={"GREETING": "it's two  words"}, log=tmp_path / "a log")


def test_a_detached_command_writes_to_its_log(detached, monkeypatch):
    """The output follows the log's earlier lines. A log that is too long is moved aside first."""
    line = "it's two  words\n"
    monkeypatch.setattr(command, "LOG_BYTES", 2 * len(line) - 1)
    for begun, log in ((0, line), (len(line), line * 2), (0, line)):
        child, at = command.detach(detached)
        assert (child.wait(5), at, detached.log.read_text()) == (0, begun, log)
    assert detached.log.with_name("a log.1").read_text() == line * 2


def test_a_log_that_cannot_be_written_is_named(detached):
    """The message names the log, the cause, and a command that shows more. Nothing is started."""
    detached.log.mkdir()
    for log, cause in ((detached.log, "Is a directory"), (detached.log / "nowhere/log", "No such file or directory")):
        with pytest.raises(OSError, match=cause) as error:
            command.detach(Command((GREETS,), log=log))
        assert notes.in_a_sentence(error.value) == f"{log}: {cause}. Type: namei -l '{log}'"


def test_a_detached_command_pastes_as_it_is(detached):
    """In bash the printed text starts the same session, log and variables. bash does not wait for it."""
    assert detached.text.splitlines()[-1].endswith("1 &") and detached.words == list(GREETS) == words_of(detached.lines)
    subprocess.run(["bash"], input=f"{detached.text}\nwait\n", text=True, check=True)
    assert detached.log.read_text() == "it's two  words\n"


# --- A pipe of bytes -------------------------------------------------------------------------------------------------


def shell(line: str) -> Command:
    return Command((("sh", "-c", line),), alias="ssh to spark-2")


def test_bytes_go_into_a_command_and_come_out_of_one(tmp_path, capfd):
    """No byte is changed, and the end of the block waits for the command."""
    with pipe(shell("printf 'a\\377\\r\\n'")) as source, pipe(shell(f"cat >{tmp_path}/got"), into=True) as sink:
        sink.write(source.read())
    assert (tmp_path / "got").read_bytes() == b"a\xff\r\n"


def flood(line: str) -> None:
    with pipe(shell(line), into=True) as sink:
        for _ in range(100):
            sink.write(b"0" * 10**5)


@pytest.mark.parametrize("line", ["echo full >&2; exit 3", "echo full >&2; exec <&-; sleep 0.1; exit 3"])
def test_a_command_that_refuses_bytes_says_why(line, capfd):
    """The command's own words count, and not that its pipe broke."""
    with pytest.raises(Exit, match=r"^ssh to spark-2 failed with status 3: full$") as no:
        flood(line)
    assert no.value.code == 3


def interrupted(pids: list[int]) -> None:
    with pipe(shell("echo $$; exec sleep 60")) as source:
        pids.append(int(source.readline()))
        raise KeyboardInterrupt


def test_a_block_that_fails_kills_the_command(capfd):
    """A command that waits for more bytes would stay for ever."""
    pids: list[int] = []
    with pytest.raises(KeyboardInterrupt):
        interrupted(pids)
    with pytest.raises(ProcessLookupError):
        os.kill(pids[0], 0)
