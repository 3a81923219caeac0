"""Two ways to bring up an engine process: fork it from one that has imported vLLM, or start afresh.

Forking is for CPUs, where it turns sixteen seconds into one. A process that has touched CUDA must
not be forked, and without vLLM's CPU platform there is nothing to gain by sharing what is imported
before; there each engine is a fresh interpreter with its devices in its environment.
"""

from __future__ import annotations

import array
import os
import signal
import socket
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import IO, ClassVar

from samullm_vllm.channel import Channel, ChannelClosedError
from samullm_vllm.processes import RecordedProcess, kill, wait_gone
from samullm_vllm.protocol import Exited, Fork, Forked, encode

_KNOWN_S = 60.0


@dataclass(slots=True)
class Launched:
    """An engine's processes, as far as they are known.

    Attributes:
        channel: to its first rank.
        pids: ids of the processes, once they are known.
        processes: those of them that ran then.
        exited: exit status by process id, negative for a signal.
        lost: nobody will tell any more.
    """

    channel: Channel
    pids: tuple[int, ...] = ()
    processes: list[RecordedProcess] = field(default_factory=list)
    exited: dict[int, int] = field(default_factory=dict)
    lost: bool = False


class Launcher(ABC):
    """Brings up engine processes."""

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


class _Forker:
    """The process that forks engines.

    Args:
        log: where its own output goes.
    """

    kept: ClassVar[_Forker | None] = None
    keeping: ClassVar[bool] = False

    def __init__(self, log: IO[bytes]) -> None:
        ours, theirs = socket.socketpair()
        # Two OpenMP threads that wait for one another on a busy machine make a decode step forty
        # times slower: one thread per rank.
        extra = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "samullm_vllm.zygote", str(theirs.fileno())],
                env=child_environment(extra),
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self._socket = ours
        self.control = Channel(ours)

    @property
    def lost(self) -> bool:
        """Whether the process has ended."""
        return self.control.fileno() < 0 or self.process.poll() is not None

    def send(self, message: Fork, descriptors: Sequence[int]) -> None:
        """Ask for an engine.

        Raises:
            OSError: if the process has ended.
        """
        numbers = array.array("i", descriptors)
        self._socket.sendmsg([encode(message)], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, numbers)])

    def end(self) -> None:
        """End the process, and with it every engine it made."""
        recorded = RecordedProcess.of(self.process.pid)
        self.control.close()
        if recorded is not None:
            kill([recorded])
        self.process.wait()


@contextmanager
def kept_forker() -> Iterator[None]:
    """Let executors that are opened one after another fork from one process.

    Importing vLLM takes most of the time of a short run. The process ends when the context does.
    """
    _Forker.keeping = True
    try:
        yield
    finally:
        _Forker.keeping = False
        if _Forker.kept is not None:
            _Forker.kept.end()
            _Forker.kept = None


class ForkLauncher(Launcher):
    """Forks engines from one process that has imported vLLM, each rank bound to its core.

    Args:
        log: where that process's own output goes.
        bind: bind ranks to cores.
        environment: variables for the engines.
    """

    def __init__(self, log: IO[bytes], *, bind: bool, environment: Mapping[str, str]) -> None:
        self._log = log
        self._bind = bind
        self._environment = dict(environment)
        self._engines: dict[str, Launched] = {}
        kept, _Forker.kept = _Forker.kept, None
        if kept is not None and kept.lost:
            kept.end()
            kept = None
        self._forker = kept or _Forker(log)

    def launch(self, key: str, devices: Sequence[str], num_ranks: int, log: IO[bytes]) -> Launched:
        """Ask for an engine; its process ids become known later."""
        if self._forker.lost:
            self._forker.end()
            self._forker = _Forker(self._log)
        ours, theirs = socket.socketpair()
        cores = tuple(int(d) for d in devices) if self._bind else ()
        launched = Launched(Channel(ours))
        self._engines[key] = launched
        with theirs:
            try:
                self._forker.send(
                    Fork(key, cores, num_ranks, self._environment), (theirs.fileno(), log.fileno())
                )
            except OSError:
                launched.lost = True
        return launched

    def filenos(self) -> list[int]:
        """Return the descriptor of the control channel."""
        number = self._forker.control.fileno()
        return [number] if number >= 0 else []

    def update(self) -> None:
        """Read what the forking process says."""
        if self._forker.control.fileno() < 0:
            return
        try:
            messages = self._forker.control.receive()
        except ChannelClosedError:
            self._forker.control.close()
            for launched in self._engines.values():
                launched.lost = True
            return
        for message in messages:
            if isinstance(message, Forked) and message.key in self._engines:
                launched = self._engines[message.key]
                launched.pids = message.pids
                recorded = [RecordedProcess.of(pid) for pid in message.pids]
                launched.processes = [r for r in recorded if r is not None]
            elif isinstance(message, Exited) and message.key in self._engines:
                launched = self._engines[message.key]
                if message.pid in launched.pids:  # not an earlier engine of the same name
                    launched.exited[message.pid] = message.status

    def close(self) -> None:
        """End every engine, and the forking process unless it is kept."""
        if _Forker.keeping and not self._forker.lost and self._all_known():
            for launched in self._engines.values():
                kill(launched.processes)
            _Forker.kept = self._forker
        else:
            self._forker.end()

    def _all_known(self) -> bool:
        """Wait a little until it is known which processes are there to be ended."""
        deadline_s = time.monotonic() + _KNOWN_S
        while not all(e.pids or e.lost for e in self._engines.values()):
            if time.monotonic() > deadline_s:
                return False
            self.update()
            time.sleep(0.01)
        return True


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
        names = ",".join(devices)
        if self._cuda:
            visible = {"CUDA_VISIBLE_DEVICES": names, "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
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
                start_new_session=True,
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
        """Collect exit statuses."""
        for launched, process in self._children:
            status = process.poll()
            if status is not None:
                launched.exited[process.pid] = status

    def close(self) -> None:
        """Kill what is left."""
        if self._ours < 0:
            return
        os.close(self._ours)
        os.close(self._lifeline)
        self._ours = -1
        for launched, process in self._children:
            if process.poll() is None and not wait_gone(launched.processes, 0.0):
                kill(launched.processes)
            process.wait()


def exit_reason(launched: Launched, timeout_s: float, launcher: Launcher) -> str:
    """Return how an engine's processes ended, waiting a little for word of it."""
    deadline_s = time.monotonic() + timeout_s
    while not launched.exited and not launched.lost and time.monotonic() < deadline_s:
        launcher.update()
        time.sleep(0.002)
    bad = {pid: s for pid, s in launched.exited.items() if s != 0} or launched.exited
    for pid, status in bad.items():
        if status < 0:
            return f"engine process {pid} was ended by {signal.Signals(-status).name}"
        return f"engine process {pid} ended with exit status {status}"
    return "the engine process ended"
