"""One rehearsal at a time on a machine, and a record of what the last one made."""

import fcntl
import json
import os
from pathlib import Path

from rehearsal.shell import RehearsalError

# Namespaces and control groups are the machine's, so this is too, whatever REHEARSAL_DIR is.
FILE = Path("/run/dgx-spark-rehearsal.json")
SIZE = 2000


class Lock:
    """Held until released or this process ends, however it ends; the file's text is the record."""

    def __init__(self, file: Path = FILE) -> None:
        self.file = file
        self._held: int | None = None

    def acquire(self) -> None:
        """Take the lock; raise RehearsalError if another process holds it."""
        descriptor = os.open(self.file, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = _parse(descriptor).get("process", "unknown")
            os.close(descriptor)
            raise RehearsalError(f"another rehearsal is running on this machine (process {owner})") from None
        self._held = descriptor

    @property
    def held(self) -> bool:
        """Whether it is ours now."""
        return self._held is not None

    def release(self) -> None:
        """Let go; the record stays."""
        if self._held is not None:
            os.close(self._held)
        self._held = None

    def read(self) -> dict:
        """The record: empty if nothing of ours is left."""
        return _parse(self._held)

    def write(self, record: dict) -> None:
        """Replace the record, in one write: a kill leaves the old one or the new one."""
        text = json.dumps({**record, "process": os.getpid()} if record else {})
        os.pwrite(self._held, text.ljust(SIZE).encode(), 0)


def _parse(descriptor: int) -> dict:
    text = os.pread(descriptor, SIZE, 0)
    return json.loads(text) if text.strip() else {}
