"""Bring up engine processes: what all ways have in common, and the one of fresh interpreters.

A process that has touched CUDA must not be forked, and without vLLM's CPU platform there is nothing
to gain by sharing what is imported before; there each engine is a fresh interpreter with its
devices in its environment. Forking, for CPUs, is in :mod:`samullm_vllm.forking`.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from samullm_vllm.channel import Channel
from samullm_vllm.processes import RecordedProcess, kill, wait_gone

ENGINE_GROUP = 0
"""Engines are in process groups of their own, which a terminal's Ctrl-C does not reach, but in the
coordinator's session: Linux shares processors out by sessions (autogroups), and between two of them
the coordinator, which needs little, was left waiting for many seconds beside engines on all cores.
"""

_TAIL_BYTES = 1 << 16
_ERROR = re.compile(r"^[A-Za-z_][\w.]*(Error|Exception|Interrupt|Exit)\b.*")


@dataclass(slots=True)
class Launched:
    """An engine's processes, as far as they are known.

    Attributes:
        channel: to its first rank.
        pids: ids of the processes, once they are known.
        processes: those of them that ran then.
        exited: exit status by process id, negative for a signal.
        lost: nobody will tell any more.
        why_lost: why not, if that is known.
    """

    channel: Channel
    pids: tuple[int, ...] = ()
    processes: list[RecordedProcess] = field(default_factory=list)
    exited: dict[int, int] = field(default_factory=dict)
    lost: bool = False
    why_lost: str = ""


class Launcher(ABC):
    """Brings up engine processes."""

    def await_ready(self, timeout_s: float) -> str | None:
        """Wait until engines can be launched; return why they never can be, if so."""
        del timeout_s
        return None

    @abstractmethod
    def launch(self, key: str, devices: Sequence[str], num_ranks: int, log: IO[bytes]) -> Launched:
        """Start the processes of an engine on physical devices, their output going to ``log``."""

    @abstractmethod
    def filenos(self) -> list[int]:
        """Return descriptors that become readable when ``update`` has something to do."""

    @abstractmethod
    def update(self) -> None:
        """Bring what is known about the launched processes up to date."""

    @abstractmethod
    def close(self) -> None:
        """End whatever is left."""


def child_environment(extra: Mapping[str, str]) -> dict[str, str]:
    """Return this process's environment as engines should see it."""
    environment = dict(os.environ)
    # These two would override the KV cache and the core binding that the plan decides.
    for name in ("VLLM_CPU_KVCACHE_SPACE", "VLLM_CPU_OMP_THREADS_BIND"):
        environment.pop(name, None)
    environment |= {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONUNBUFFERED": "1",
    }
    return environment | dict(extra)


class FreshLauncher(Launcher):
    """Starts each engine as a new interpreter that sees its own devices only.

    Args:
        cuda: devices are CUDA devices; otherwise CPU cores.
        environment: variables for all engines.
    """

    def __init__(self, *, cuda: bool, environment: Mapping[str, str]) -> None:
        self._cuda = cuda
        self._environment = environment
        self._children: list[tuple[Launched, subprocess.Popen[bytes]]] = []
        # Nothing is ever written: engines end when our end closes, however we end.
        self._lifeline, self._ours = os.pipe()

    def launch(self, key: str, devices: Sequence[str], num_ranks: int, log: IO[bytes]) -> Launched:
        """Start an engine; vLLM starts the processes of further ranks itself."""
        if self._cuda:
            visible = {"CUDA_VISIBLE_DEVICES": ",".join(devices)}
            if "CUDA_VISIBLE_DEVICES" not in os.environ:  # the names are NVML's, in its order
                visible["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"
        else:
            binding = "|".join(devices)
            visible = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
            visible |= {"VLLM_CPU_OMP_THREADS_BIND": binding}
        ours, theirs = socket.socketpair()
        numbers = (theirs.fileno(), self._lifeline)
        with theirs:
            process = subprocess.Popen(
                [sys.executable, "-m", "samullm_vllm.worker", *(str(n) for n in numbers)],
                env=child_environment({**self._environment, **visible}),
                pass_fds=numbers,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                process_group=ENGINE_GROUP,
            )
        recorded = RecordedProcess.of(process.pid)
        launched = Launched(Channel(ours), (process.pid,), [recorded] if recorded else [])
        if not self._cuda and num_ranks == 1:
            with suppress(OSError):
                os.sched_setaffinity(process.pid, {int(d) for d in devices})
        self._children.append((launched, process))
        return launched

    def filenos(self) -> list[int]:
        """Return nothing: an engine that ends closes its channel."""
        return []

    def update(self) -> None:
        """Collect exit statuses, and end what an engine that ended has left of its group."""
        for launched, process in self._children:
            if process.returncode is None and _has_ended(process.pid):
                with suppress(
                    ProcessLookupError
                ):  # its id is not given away before it is waited for
                    os.killpg(process.pid, signal.SIGKILL)
                launched.exited[process.pid] = process.wait()

    def close(self) -> None:
        """Kill what is left."""
        if self._ours < 0:
            return
        os.close(self._ours)
        os.close(self._lifeline)
        self._ours = -1
        self.update()
        for launched, process in self._children:
            if process.poll() is None and not wait_gone(launched.processes, 0.0):
                kill(launched.processes)
            process.wait()


def _has_ended(pid: int) -> bool:
    """Return whether a child has ended, leaving its exit status where it is."""
    flags = os.WEXITED | os.WNOHANG | os.WNOWAIT
    return os.waitid(os.P_PID, pid, flags) is not None


def exit_reason(launched: Launched, timeout_s: float, launcher: Launcher, log: str) -> str:
    """Return how an engine's processes ended, waiting a little for word of it.

    Args:
        launched: the processes.
        timeout_s: how long to wait.
        launcher: who started them.
        log: path of their output.
    """
    deadline_s = time.monotonic() + timeout_s
    while not launched.exited and not launched.lost and time.monotonic() < deadline_s:
        launcher.update()
        time.sleep(0.002)
    bad = {pid: s for pid, s in launched.exited.items() if s != 0} or launched.exited
    for pid, status in bad.items():
        if status < 0:
            return f"engine process {pid} was ended by {signal.Signals(-status).name}"
        said = last_error(log) if status else None
        ended = f"engine process {pid} ended with exit status {status}"
        return f"{ended}: {said}" if said else ended
    return launched.why_lost or "the engine process ended"


def last_error(log: str) -> str | None:
    """Return the last line of a log that ends a traceback, or None if there is none."""
    try:
        with Path(log).open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - _TAIL_BYTES))
            lines = file.read().decode(errors="replace").splitlines()
    except OSError:
        return None
    return next((line for line in reversed(lines) if _ERROR.match(line)), None)
