"""The lock of an output folder: one run at a time."""

import fcntl
import json
import os
import socket
from pathlib import Path

NAME = ".lock"


class Lock:
    """Holds `folder`/.lock while entered.

    The operating system releases the lock when the process ends, however it ends, so a file that is
    left behind by a crash does not block the next run on the same machine. On a shared drive the
    file names the machine that may still be running.
    """

    def __init__(self, folder: Path):
        self.folder, self.path = folder, folder / NAME
        self._file = None

    def check(self) -> None:
        """Fail if another process holds the lock.

        Raises:
            ValueError: names its machine and process id.
        """
        if self.path.exists():
            self.__enter__()
            self.__exit__()

    def __enter__(self) -> "Lock":
        self.folder.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("a+", encoding="utf-8")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            held = not self._is_current() or self._other_host()
        except BlockingIOError:
            held = True
        except OSError:  # the drive has no locks: trust what the file says
            held = self._other_host() or self._running()
        if held:
            message = self._message()
            self._file.close()
            self._file = None
            raise ValueError(message)
        self._file.truncate(0)
        self._file.write(json.dumps({"host": socket.gethostname(), "pid": os.getpid()}))
        self._file.flush()
        return self

    def __exit__(self, *exc) -> None:
        if self._file:
            self.path.unlink(missing_ok=True)
            self._file.close()
            self._file = None

    def _is_current(self) -> bool:
        """False if the previous holder deleted the file between our opening and locking it."""
        try:
            return os.path.samestat(os.fstat(self._file.fileno()), self.path.stat())
        except FileNotFoundError:
            return False

    def _holder(self) -> dict:
        self._file.seek(0)
        try:
            holder = json.loads(self._file.read())
        except ValueError:  # empty, or cut off by a crash
            return {}
        return holder if isinstance(holder, dict) else {}

    def _other_host(self) -> bool:
        return self._holder().get("host", socket.gethostname()) != socket.gethostname()

    def _running(self) -> bool:
        try:
            os.kill(int(self._holder().get("pid", 0)) or os.getpid(), 0)
        except (ProcessLookupError, ValueError, TypeError):
            return False
        except PermissionError:
            return True
        return bool(self._holder())

    def _message(self) -> str:
        holder = self._holder()
        host, pid = holder.get("host", "an unknown machine"), holder.get("pid", "unknown")
        return (
            f"{self.folder} is in use by another run (process {pid} on {host}); wait for it, or choose "
            f"another model.output. If that machine no longer runs it, delete {self.path}"
        )
