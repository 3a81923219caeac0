"""Bring up engine processes: what all ways have in common, and fresh interpreters."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import IO, ClassVar

from samullm_vllm.channel import Channel, MessageChannel
from samullm_vllm.devices import Platform
from samullm_vllm.processes import RecordedProcess, kill, last_error, strike_tree
from samullm_vllm.protocol import Go

ENGINE_GROUP = 0
"""Engines are in process groups of their own, which a terminal's Ctrl-C does not reach, but in the
coordinator's session: Linux shares processors out by sessions (autogroups), and between two of them
the coordinator, which needs little, was left waiting for many seconds beside engines on all cores.
"""


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

    channel: MessageChannel
    pids: tuple[int, ...] = ()
    processes: list[RecordedProcess] = field(default_factory=list)
    exited: dict[int, int] = field(default_factory=dict)
    lost: bool = False
    why_lost: str = ""


class Launcher(ABC):
    """Brings up engine processes.

    Attributes:
        rank_processes: each rank of an engine is a process launched here; else vLLM starts those of
            further ranks itself.
    """

    rank_processes: ClassVar[bool] = False

    def __init__(self, platform: Platform, environment: Mapping[str, str]) -> None:
        """Keep what all engines have in common.

        Args:
            platform: what the devices are.
            environment: variables for all engines.
        """
        self._platform = platform
        self._environment = dict(environment)

    def await_ready(self, timeout_s: float) -> str | None:
        """Wait until engines can be launched; return why they never can be, if so."""
        del timeout_s
        return None

    def placement(self, devices: Sequence[str]) -> Go:
        """Return what tells an engine's processes their devices, by their physical names."""
        if self._platform == "cuda":
            visible = {"CUDA_VISIBLE_DEVICES": ",".join(devices)}
            if "CUDA_VISIBLE_DEVICES" not in os.environ:  # the names are NVML's, in its order
                visible["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"
            return Go((), visible)
        return Go(tuple(int(d) for d in devices), {})

    @abstractmethod
    def launch(self, key: str, num_ranks: int, log: IO[bytes], where: Go) -> Launched:
        """Start the processes of an engine, their output going to ``log``.

        Args:
            key: the engine's.
            num_ranks: its ranks.
            log: takes the output.
            where: its devices as far as they are known; a message names them to the engine again.
        """

    @abstractmethod
    def strike(self, launched: Launched) -> None:
        """Kill an engine's processes and what they started, and do not wait."""

    @abstractmethod
    def kill(self, launched: Launched, timeout_s: float) -> bool:
        """Kill them and wait until the last thread is gone; return whether that is so in time."""

    @abstractmethod
    def filenos(self) -> list[int]:
        """Return descriptors that become readable when ``update`` has something to do."""

    @abstractmethod
    def update(self) -> None:
        """Bring what is known about the launched processes up to date."""

    @abstractmethod
    def close(self) -> None:
        """End whatever is left."""


def child_environment(platform: Platform, extra: Mapping[str, str]) -> dict[str, str]:
    """Return this process's environment as engines should see it.

    What vLLM and its compilers keep from start to start must outlive the run's temporary folder.
    """
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
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "samullm"
    # Where this is not set, vLLM keeps the kernels of a model's first start in a place of that
    # model's own, and later starts look elsewhere: the second would compile them all again.
    environment.setdefault("TRITON_CACHE_DIR", str(home / "triton"))
    environment.setdefault("TORCHINDUCTOR_CACHE_DIR", str(home / "inductor"))
    if platform == "cpu":
        # Two OpenMP threads that wait for one another on a busy machine make a decode step forty
        # times slower: one thread per rank.
        environment |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    else:
        # Workers of further ranks: a process with threads must not be forked.
        environment.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
        if find_spec("flashinfer") is None:
            environment.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")
    return environment | dict(extra)


class FreshLauncher(Launcher):
    """Starts each engine as a new interpreter that sees its own devices only."""

    def __init__(self, platform: Platform, environment: Mapping[str, str]) -> None:
        """Prepare to launch; for the arguments see :class:`Launcher`."""
        super().__init__(platform, environment)
        self._children: list[tuple[Launched, subprocess.Popen[bytes]]] = []
        # Nothing is ever written: engines end when our end closes, however we end.
        self._lifeline, self._ours = os.pipe()

    def placement(self, devices: Sequence[str]) -> Go:
        """Return the devices; ranks of an engine on CPU cores are bound by vLLM itself."""
        if self._platform == "cuda":
            return super().placement(devices)
        cores = tuple(int(d) for d in devices) if len(devices) == 1 else ()
        return Go(cores, {"VLLM_CPU_OMP_THREADS_BIND": "|".join(devices)})

    def launch(self, key: str, num_ranks: int, log: IO[bytes], where: Go) -> Launched:
        """Start an engine; vLLM starts the processes of further ranks itself."""
        ours, theirs = socket.socketpair()
        numbers = (theirs.fileno(), self._lifeline)
        variables = {**self._environment, **where.environment}
        with theirs:
            process = subprocess.Popen(
                [sys.executable, "-m", "samullm_vllm.worker", *(str(n) for n in numbers)],
                env=child_environment(self._platform, variables),
                pass_fds=numbers,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                process_group=ENGINE_GROUP,
            )
        recorded = RecordedProcess.of(process.pid)
        launched = Launched(Channel(ours), (process.pid,), [recorded] if recorded else [])
        self._children.append((launched, process))
        return launched

    def strike(self, launched: Launched) -> None:
        """Kill without waiting."""
        strike_tree(launched.processes)

    def kill(self, launched: Launched, timeout_s: float) -> bool:
        """Kill and wait; a parent's wait returns when the whole process has ended."""
        gone = kill(launched.processes, timeout_s)
        for other, process in self._children:
            if other is launched:
                try:
                    launched.exited[process.pid] = process.wait(timeout_s)
                except subprocess.TimeoutExpired:
                    return False
        return gone

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
            if process.poll() is None:
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
