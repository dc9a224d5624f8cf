"""Beside the server, in the head's container, until it is gone: `python3 guard.py PID_FILE LOG_FOLDER URL GIB`.

Looks at every node each second, and ends the server when any has less than GIB left (0: never): unified memory that
runs out hangs the whole machine, so nothing else would end it in time. LOG_FOLDER gets vitals.json, what was seen last
and for how long each thing has not moved, and memory-low.json, what each node had left at its lowest.
"""

import contextlib
import fcntl
import json
import os
import signal
import sys
import time

from gauge import gauges, read, sample
from quiet import Counters, Quiet, note

GIB = 2**30


def runs(group):
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def end(group):
    for number, patience in ((signal.SIGTERM, 5), (signal.SIGKILL, 0)):
        if runs(group):
            os.killpg(group, number)
        deadline = time.monotonic() + patience
        while runs(group) and time.monotonic() < deadline:
            time.sleep(0.2)


def say(text):
    with contextlib.suppress(OSError):  # its log may be on the disk that is full
        print(f"memory guard: {text}", flush=True)


def keep(file, value):
    """Write a file whole or not at all; a disk that is full must not end the guard, and has no room for complaints."""
    with contextlib.suppress(OSError):
        with open(f"{file}.new", "w") as opened:
            json.dump(value, opened)
        os.replace(f"{file}.new", file)


def before(file):
    """What was kept there, of the same server by an earlier guard; nothing if there is nothing."""
    with contextlib.suppress(OSError, ValueError):
        return json.loads(read(file))
    return {}


def alone(file):
    """Be the only guard from now on: another one, which may be stuck, is ended. Returns the lock, None without one."""
    with contextlib.ExitStack() as opened, contextlib.suppress(OSError, ValueError):
        lock = opened.enter_context(open(file, "a+"))
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            os.kill(int(lock.read()), signal.SIGKILL)
            fcntl.flock(lock, fcntl.LOCK_EX)
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        opened.pop_all()
        return lock


def too_low(told, least):
    """The node that has less than least GiB left, and how much; None if none has."""
    left = {address: node["available"] / GIB for address, node in told.items() if node}
    return next(((address, free) for address, free in left.items() if free < least), None)


def guard(pid_file, folder, url, least):
    group = int(read(pid_file))
    lows, silent, quiet, counters = before(f"{folder}/memory-low.json"), {}, Quiet(), Counters(url)
    asked = gauges()
    sample(asked, "available", 30)  # the first answer waits for the gauges' own processes
    below = f"the server is ended below {least:g} GiB (MEM_ABORT_GIB)" if least else "MEM_ABORT_GIB is 0: it only looks"
    say(f"watching {', '.join(sorted(asked))}; {below}")
    while runs(group):
        told = sample(asked, "look", 3)
        for address in {address for address, node in told.items() if node is None} - silent.keys():
            say(f"{address} does not answer; its memory is not watched")
        now = time.monotonic()
        silent = {address: silent.get(address, now) for address, node in told.items() if node is None}
        if low := too_low(told, least):
            address, free = low
            say(f"{address} has {free:.1f} GiB left, less than MEM_ABORT_GIB ({least:g}): ending the server")
            end(group)
        note(quiet, told, group, f"{folder}/serve.log")
        left = {address: node["available"] for address, node in told.items() if node}
        lows |= {address: min(free, lows.get(address, free)) for address, free in left.items()}
        still = quiet.seconds() | counters.seconds()
        keep(f"{folder}/memory-low.json", lows)
        unheard = {address: now - since for address, since in silent.items()}
        keep(f"{folder}/vitals.json", {"at": time.time(), "nodes": told, "quiet": still, "silent": unheard})
        time.sleep(1)


if __name__ == "__main__":
    LOCK = alone(f"{sys.argv[1]}.recorder")
    guard(sys.argv[1], sys.argv[2], sys.argv[3], float(sys.argv[4]))
