"""A load, followed until the server has answered its first request.

The server's own log names the phase. The recorder beside the server tells a load that is slow from one that is stuck.
"""

from __future__ import annotations

import re
import sys
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import TYPE_CHECKING

from invoke import Exit

from cluster import guards, served, server
from cluster.api import Answer, ask_api, generate_token
from cluster.command import run, say, stream
from cluster.node import CONTAINER, log_folder
from cluster.readings import keep_readings, note_load
from cluster.recorder import LOAD, keep_json, kept_json, read_ended, read_recorded
from cluster.settings import ModelSettings

if TYPE_CHECKING:
    from rich.live import Live

PAUSE_S = 0.5
# Without a terminal, progress is printed at each new phase, and after so many seconds.
EVERY_S = 30
# The recorder has to reach every node before its first look.
RECORDER_S = 60

# The phases of vLLM 0.11 to 0.32 (V1 engine) and their first signs, from public logs and from the stand-in. A load may
# skip phases: a CPU compiles nothing, and --enforce-eager captures nothing.
PHASES = {
    "start": r"(?!)",
    "ranks": r"Connecting to existing Ray|Initializing a V1 LLM engine|world_size=",
    "weights": r"Starting to load model|Loading \w* ?(?:safetensors|weights|pt)|checkpoint shards",
    "profiling": r"Model loading took",
    "compilation": r"torch\.compile takes|Dynamo bytecode|Compiling a graph|compiled graph",
    "KV cache": r"Available KV cache memory|GPU KV cache size|CPU KV cache size|Maximum concurrency",
    "graph capture": r"Capturing (?:CUDA|cuda) ?graph",
    "warm-up": r"Graph capturing finished|init engine \(|Warming up|Starting vLLM (?:API )?server|Supported tasks",
    "API": r"Application startup complete",
}
PERCENT = re.compile(r"(\d{1,3})%(?: Completed)?[ |]")


class Phase:
    """The phase of a load by its log so far, and the last percent of the phase's progress bar."""

    def __init__(self) -> None:
        self.name, self.percent = "start", ""

    def read(self, line: str) -> bool:
        """Take a line in. Return whether it began a new phase: phases only go forward."""
        order = list(PHASES)
        found = next((name for name in reversed(order) if re.search(PHASES[name], line)), self.name)
        began = order.index(found) > order.index(self.name)
        if began:
            self.name, self.percent = found, ""
        if found == self.name and (bar := PERCENT.search(line)):
            self.percent = f" {bar[1]}%"
        return began

    def __str__(self) -> str:
        return self.name + self.percent


# --- What the operator sees ------------------------------------------------------------------------------------------


class Progress:
    """The progress of a load: one line that changes on a terminal, and a new line now and then without one.

    expected: the seconds that the last load took. since: the start of this load in seconds since 1970; None is now.
    """

    def __init__(self, model: str, expected: float | None = None, since: float | None = None) -> None:
        self.model = model
        self.about = f", {expected:.0f} s expected" if expected else ""
        self.said = time.monotonic()
        self.begun = self.said - (time.time() - since if since else 0)
        self.live: Live | None = None
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.live import Live

            # Lines that are printed meanwhile go above this one, unless standard output is a file.
            console = Console(stderr=True, soft_wrap=True, markup=False, highlight=False)
            self.live = Live(console=console, transient=True, redirect_stdout=sys.stdout.isatty())
            self.live.start()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.begun

    def show(self, where: str, new: bool = False) -> None:
        text = f"{self.model}: {where}, {self.seconds:.0f} s{self.about}"
        if self.live:
            with suppress(OSError):  # a terminal that is lost does not end the load
                self.live.update(text)
        elif new or time.monotonic() - self.said >= EVERY_S:
            self.said = time.monotonic()
            say(text)

    def stop(self) -> None:
        with suppress(OSError):
            if self.live:
                self.live.stop()


# --- Following a load ------------------------------------------------------------------------------------------------


def launch_model(settings: ModelSettings, addresses: Iterable[str], detached: bool, offline: bool = False) -> None:
    """Start the server and follow its log. Ctrl-C stops the server; a lost terminal does not.

    addresses: those of Ray's nodes. detached: return at once instead. offline: the server needs no hub. Raises Exit
    when the server has ended.
    """
    server.prepare(settings)
    try:
        server.begin(settings, offline)
        note_load(settings)
        if not detached:
            follow_load(settings, addresses, stay=True)
    except KeyboardInterrupt:
        say("Ctrl-C: the server is asked to stop.")
        run(server.stop_command(), whole=True)
        raise Exit("The server is stopped; Ray is still up.", code=130) from None
    say("The server is loading. Its log: inv logs --follow; how it is: inv health; to end it: inv stop")


def follow_load(
    settings: ModelSettings, addresses: Iterable[str], stay: bool = False, since: float | None = None
) -> None:
    """Follow the server's log until the server has answered a first request.

    stay: print the log too, and follow it until the server ends. since: the start of the server in seconds since 1970;
    None is now. Raises Exit when the server has ended, and, without stay, when its load is stuck.
    """
    history = log_folder(settings) / "ready.json"
    times = kept_json(history) or {}
    kind = f"{settings.model.name} on {', '.join(sorted(addresses))}"
    with stream(server.follow_command()) as lines:
        progress = Progress(settings.model.name, times.get(kind, {}).get("seconds"), since)
        load = Load(settings, lines, progress, stay)
        try:
            answered_before = load.is_up()
            load.wait_until_up()
            load.warm_up()
        finally:
            progress.stop()
        if not answered_before:
            with suppress(OSError):  # a full disk costs the next load its expected time, and nothing else
                keep_json(history, times | {kind: {"seconds": round(progress.seconds, 1)}})
        keep_readings(settings)
        how = "It answers" if answered_before else f"Ready after {progress.seconds:.0f} s"
        url = server.api_url(settings["HOST"], settings["PORT"], everywhere=settings["HEAD_NODE_IP"])
        say(f"{how}: API at {url}/v1, model {settings['SERVED_NAME']}")
        while stay:
            load.read_log()
            time.sleep(PAUSE_S)


class Load:
    """The log of a server, read from its first line on, and the server's API. stay: as in follow_load."""

    def __init__(self, settings: ModelSettings, lines: Iterator[str], progress: Progress, stay: bool) -> None:
        self.settings, self.progress, self.stay = settings, progress, stay
        self.url = server.api_url(settings["HOST"], settings["PORT"])
        self.phase = Phase()
        self.last: deque[str] = deque(maxlen=12)
        # A thread waits for the lines, because the log may be silent for minutes.
        self.unread: deque[str] = deque()
        self.reader = threading.Thread(target=self.unread.extend, args=(lines,), daemon=True)
        self.reader.start()

    def is_up(self) -> bool:
        """Whether the API listens. Only a generated token proves that it works."""
        return ask_api(f"{self.url}/health", seconds=2).well

    def read_log(self) -> bool:
        """Read the new lines of the log. Return whether a phase began. Raises Exit if the server has ended."""
        over = not self.reader.is_alive()
        began = False
        while self.unread:
            line = self.unread.popleft()
            self.last.append(line)
            began |= self.phase.read(line)
            try:
                if self.stay:
                    print(line, flush=True)
            except OSError:
                raise Exit("Nothing reads standard output any more. The server runs on. Its log: inv logs") from None
        # `docker exec` may end before the server does.
        if over and not served.server_runs(guards.running_node("Type: inv up --model NAME")):
            while (seen := read_recorded(self.settings)) and seen.alive:  # the recorder's next look asks the guards
                time.sleep(PAUSE_S)
            last = "\n".join(f"  {line}" for line in self.last)
            how, then = read_ended(self.settings) or ("The server has ended.", "inv logs")
            raise Exit(f"{how} The last lines of its log:\n{last}\nType: {then}")
        return began

    def wait_until_up(self) -> None:
        begun, stuck, unguarded = time.monotonic(), False, False
        while not self.is_up():
            began = self.read_log()
            seen = read_recorded(self.settings)
            fetched = f", vLLM downloads the weights: {seen.downloads}" if seen and seen.downloads else ""
            self.progress.show(f"{self.phase}{fetched}", began)
            if not stuck and seen and seen.quiet(*LOAD) >= int(self.settings["STALL_S"]):
                stuck = True
                limit = f"{self.settings['STALL_S']} s (STALL_S)"
                text = f"STUCK in {self.phase}: for {limit} neither log, processor nor memory moved. Look: inv logs"
                if not self.stay:
                    raise Exit(text)
                say(f"{text}; on each node: docker exec {CONTAINER} ps aux; sudo dmesg | tail. To end it: inv stop")
            if not unguarded and not seen and time.monotonic() - begun > RECORDER_S:
                unguarded = True
                say("Warning: the recorder writes nothing, so nothing watches the nodes. Look: inv logs")
            time.sleep(PAUSE_S)

    def warm_up(self) -> None:
        """Send one request, and discard the answer. Raises Exit if the request fails."""
        answers: list[Answer] = []
        # The first request compiles kernels: it took 49 s on two H100, the next one 1.8 s. vLLM waits no longer.
        asked = (self.url, self.settings.get("VLLM_API_KEY"), int(self.settings["ENGINE_TIMEOUT_S"]))
        asking = threading.Thread(target=lambda: answers.append(generate_token(*asked)), daemon=True)
        asking.start()
        self.progress.show("first request", new=True)
        while asking.is_alive():
            self.read_log()
            self.progress.show("first request")
            asking.join(0.2)
        if not answers[0].well:
            said = f"The first request was answered {answers[0].status}: {answers[0].text[:300]}"
            how, then = read_ended(self.settings) or (said, "inv health")
            raise Exit(f"{how}\nType: {then}")
