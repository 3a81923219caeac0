"""Processes by id and start time, so that nobody else's process is ever killed."""

from __future__ import annotations

import ctypes
import fcntl
import os
import re
import select
import signal
import socket
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

_PR_SET_PDEATHSIG = 1
_TAIL_BYTES = 1 << 16
_ERROR = re.compile(r"^[A-Za-z_][\w.]*(Error|Exception|Interrupt|Exit)\b.*")

_AGAIN_S = 0.005
_TRACKER_S = 2.0


@dataclass(frozen=True, slots=True)
class RecordedProcess:
    """A process as it was when its id was learnt.

    Attributes:
        pid: its id.
        start_ticks: clock ticks after the machine's start when it was started, which no step of
            the clock changes; another process of the same id was started at another time.
    """

    pid: int
    start_ticks: int = field(repr=False)

    @classmethod
    def of(cls, pid: int) -> RecordedProcess | None:
        """Record a process, or return None if it has ended."""
        found = _state_and_start(pid)
        return None if found is None else cls(pid, found[1])

    def find(self) -> psutil.Process | None:
        """Return the process if it still runs, be it only in threads that outlive their leader.

        Memory of a process, on devices as well, goes with its last thread.
        """
        found = _state_and_start(self.pid)
        if found is None or found[1] != self.start_ticks:
            return None
        try:
            if found[0] in "ZX" and len(os.listdir(f"/proc/{self.pid}/task")) <= 1:
                return None
            return psutil.Process(self.pid)
        except (psutil.NoSuchProcess, FileNotFoundError, ProcessLookupError):
            return None


def _state_and_start(pid: int) -> tuple[str, int] | None:
    """Return a process's state and start in clock ticks (``man proc_pid_stat``); None: it ended."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = stat.rpartition(")")[2].split()  # the name before may hold anything
    return fields[0], int(fields[19])


def alive(processes: Iterable[RecordedProcess]) -> list[psutil.Process]:
    """Return those that still run."""
    return [p for r in processes if (p := r.find()) is not None]


def with_children(processes: Iterable[RecordedProcess]) -> set[RecordedProcess]:
    """Return the processes and everything they started, as far as it runs."""
    found: set[RecordedProcess] = set()
    for process in alive(processes):
        with suppress(psutil.NoSuchProcess):
            family = [process, *process.children(recursive=True)]
            found |= {r for p in family if (r := RecordedProcess.of(p.pid)) is not None}
    return found


def wait_gone(processes: Iterable[RecordedProcess], timeout_s: float) -> bool:
    """Wait until none of them runs; return whether that is so."""
    left, deadline_s = list(processes), time.monotonic() + timeout_s
    while alive(left):
        if time.monotonic() > deadline_s:
            return False
        time.sleep(_AGAIN_S)
    return True


def strike(processes: Iterable[RecordedProcess]) -> None:
    """Kill the processes themselves and do not wait."""
    for process in alive(processes):
        with suppress(ProcessLookupError, PermissionError):
            os.kill(process.pid, signal.SIGKILL)


def strike_tree(processes: Iterable[RecordedProcess]) -> None:
    """Kill the processes and all they started but resource trackers, and do not wait."""
    strike(r for r in with_children(processes) if not _is_tracker(r))


def kill(processes: Iterable[RecordedProcess], timeout_s: float = 10.0) -> bool:
    """Kill the processes and all they started; return whether all are gone in time.

    Python's resource trackers among them get a moment to end by themselves: they remove shared
    memory that the killed can no longer remove.
    """
    roots = list(processes)
    every = set(roots)
    trackers: set[RecordedProcess] = set()
    for _ in range(3):  # a process may start another while its tree is read
        every |= with_children(roots)
        trackers |= {r for r in every - trackers if _is_tracker(r)}
        if not alive(every - trackers):
            break
        strike(every - trackers)
    gone = wait_gone(every - trackers, timeout_s)
    if not wait_gone(trackers, _TRACKER_S):
        strike(trackers)
    return wait_gone(trackers, timeout_s) and gone


def _is_tracker(recorded: RecordedProcess) -> bool:
    process = recorded.find()
    try:
        return process is not None and "resource_tracker" in " ".join(process.cmdline())
    except psutil.Error:
        return False


def end_with_parent(parent: int, *, cleaning_up: bool = False) -> None:
    """Have the kernel end this process when the thread that started it ends, or now if it has.

    Args:
        parent: process id of whoever should have started it.
        cleaning_up: five seconds later, for what this process does when it notices by itself; that
            it may never do, if it hangs.
    """
    libc = ctypes.CDLL(None)
    if cleaning_up:
        # The handler is libc's own alarm(seconds), called with the signal's number, which is 5:
        # nothing of Python has to run for the alarm to end the process.
        libc.signal(signal.SIGTRAP, ctypes.cast(libc.alarm, ctypes.c_void_p))
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTRAP)
    else:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


@contextmanager
def ended_with_peer(control: socket.socket) -> Iterator[None]:
    """Have this process's whole group end when the other end of a socket closes.

    Nobody waits for that but the kernel: a process that is to be forked should have no threads.
    """
    closing = select.poll()
    closing.register(control, select.POLLRDHUP)

    def look(*_: object) -> None:
        if closing.poll(0):
            os.killpg(0, signal.SIGKILL)

    before = signal.signal(signal.SIGIO, look)
    flags = fcntl.fcntl(control, fcntl.F_GETFL)
    fcntl.fcntl(control, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(control, fcntl.F_SETFL, flags | os.O_ASYNC)
    try:
        look()
        yield
    finally:
        fcntl.fcntl(control, fcntl.F_SETFL, flags)
        signal.signal(signal.SIGIO, before)


def tail(log: str) -> bytes:
    """Return the end of a log, 64 KiB at most.

    Raises:
        OSError: if it cannot be read.
    """
    with Path(log).open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - _TAIL_BYTES))
        return file.read()


def last_error(log: str) -> str | None:
    """Return the last line of a log that ends a traceback, or None if there is none."""
    try:
        lines = tail(log).decode(errors="replace").splitlines()
    except OSError:
        return None
    return next((line for line in reversed(lines) if _ERROR.match(line)), None)
