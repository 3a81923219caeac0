"""Bring up engine processes: forked from one that has imported vLLM, or as fresh interpreters.

Importing vLLM takes six seconds and more, what an engine itself needs is less, so engines are
forked from a process that has imported it once (:mod:`samullm_vllm.fork_server`). Importing vLLM
touches no CUDA device, and a process that has not touched one can be forked.
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
from importlib.util import find_spec
from pathlib import Path
from typing import IO, ClassVar

from samullm_vllm.channel import Channel, ChannelClosedError, MessageChannel
from samullm_vllm.devices import Platform
from samullm_vllm.processes import RecordedProcess, kill, strike_tree
from samullm_vllm.protocol import Exited, Fault, Fork, Forked, Go, Message, Preloaded, encode

ENGINE_GROUP = 0
"""Engines are in process groups of their own, which a terminal's Ctrl-C does not reach, but in the
coordinator's session: Linux shares processors out by sessions (autogroups), and between two of them
the coordinator, which needs little, was left waiting for many seconds beside engines on all cores.
"""

_KNOWN_S = 60.0
_AGAIN_S = 0.005


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


class _ForkServer:
    """The process that forks engines, as seen from here.

    Args:
        platform: what the engines compute on.
        log: where its own output goes.

    Attributes:
        process: the process.
        control: to it.
        imported: it has imported vLLM and can fork.
        fault: why it never will.
    """

    kept: ClassVar[dict[Platform, _ForkServer]] = {}
    keeping: ClassVar[bool] = False
    imported = False
    fault = ""

    def __init__(self, platform: Platform, log: IO[bytes]) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "samullm_vllm.fork_server", platform, str(theirs.fileno())],
                env=child_environment(platform, {}),
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                process_group=ENGINE_GROUP,
            )
        self._socket = ours
        self.control = Channel(ours)

    @property
    def lost(self) -> bool:
        """Whether the process has ended."""
        return self.control.fileno() < 0 or self.process.poll() is not None

    def receive(self, timeout_s: float = 0.0) -> list[Message]:
        """Return what it says of engines, waiting up to ``timeout_s`` for it to say anything.

        Raises:
            ChannelClosedError: if it has ended.
        """
        told: list[Message] = []
        for message in self.control.receive(timeout_s):
            if isinstance(message, Preloaded):
                self.imported = True
            elif isinstance(message, Fault):
                self.fault = message.reason
            else:
                told.append(message)
        return told

    def await_import(self, timeout_s: float) -> str | None:
        """Wait until it can fork; return why it never will, if so."""
        deadline_s = time.monotonic() + timeout_s
        try:
            while not (self.imported or self.fault):
                left_s = deadline_s - time.monotonic()
                if left_s <= 0:
                    return f"importing vLLM has taken more than {timeout_s:.0f} s (load_timeout_s)"
                self.receive(left_s)
        except ChannelClosedError:
            status = self.process.wait()
            how = signal.Signals(-status).name if status < 0 else f"exit status {status}"
            return f"the process that imports vLLM has ended ({how})"
        return self.fault or None

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
def kept_fork_server() -> Iterator[None]:
    """Let executors that are opened one after another fork from one process.

    Importing vLLM takes most of the time of a short run. The process ends when the context does.
    """
    _ForkServer.keeping = True
    try:
        yield
    finally:
        _ForkServer.keeping = False
        while _ForkServer.kept:
            _ForkServer.kept.popitem()[1].end()


class ForkLauncher(Launcher):
    """Forks engines from one process that has imported vLLM.

    On CPUs each rank is a forked process, bound to its core; on CUDA an engine is one, and vLLM
    starts those of further ranks.
    """

    def __init__(
        self,
        platform: Platform,
        environment: Mapping[str, str],
        log: IO[bytes],
    ) -> None:
        """Start the process that forks, or take over one that was kept.

        Args:
            platform: what the devices are.
            environment: variables for the engines.
            log: where that process's own output goes.
        """
        super().__init__(platform, environment)
        self.rank_processes = platform == "cpu"  # type: ignore[misc]  # by platform here
        self._log = log
        self._engines: dict[str, Launched] = {}
        kept = _ForkServer.kept.pop(platform, None)
        if kept is not None and kept.lost:
            kept.end()
            kept = None
        self._server = kept or _ForkServer(platform, log)

    def await_ready(self, timeout_s: float) -> str | None:
        """Wait until vLLM is imported; return why engines can never be launched, if so."""
        return self._server.await_import(timeout_s)

    def launch(self, key: str, num_ranks: int, log: IO[bytes], where: Go) -> Launched:
        """Ask for an engine; its process ids become known later."""
        if self._server.lost:
            self._server.end()
            self._server = _ForkServer(self._platform, self._log)
        ours, theirs = socket.socketpair()
        launched = Launched(Channel(ours))
        self._engines[key] = launched
        variables = {**self._environment, **where.environment}
        with theirs:
            try:
                self._server.send(Fork(key, num_ranks, variables), (theirs.fileno(), log.fileno()))
            except OSError:
                launched.lost = True
        return launched

    def strike(self, launched: Launched) -> None:
        """Kill without waiting."""
        strike_tree(launched.processes)

    def kill(self, launched: Launched, timeout_s: float) -> bool:
        """Kill and wait; processes that are just being made must not outlive this."""
        deadline_s = time.monotonic() + timeout_s
        while not launched.pids and not launched.lost and time.monotonic() < deadline_s:
            self.update()
            time.sleep(_AGAIN_S)
        gone = kill(launched.processes, timeout_s)
        while not (launched.lost or launched.exited.keys() >= set(launched.pids)):
            if time.monotonic() > deadline_s + timeout_s:
                return False
            self.update()
            time.sleep(_AGAIN_S)
        return gone

    def filenos(self) -> list[int]:
        """Return the descriptor of the control channel."""
        number = self._server.control.fileno()
        return [number] if number >= 0 else []

    def update(self) -> None:
        """Read what the forking process says."""
        if self._server.control.fileno() < 0:
            return
        try:
            messages = self._server.receive()
        except ChannelClosedError:
            self._server.control.close()
            for launched in self._engines.values():
                launched.lost, launched.why_lost = True, self._server.fault
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
        wanted = _ForkServer.keeping and self._platform not in _ForkServer.kept
        if wanted and not self._server.lost and self._all_known():
            for launched in self._engines.values():
                kill(launched.processes)
            _ForkServer.kept[self._platform] = self._server
        else:
            self._server.end()

    def _all_known(self) -> bool:
        """Wait a little until it is known which processes are there to be ended."""
        deadline_s = time.monotonic() + _KNOWN_S
        while not all(e.pids or e.lost for e in self._engines.values()):
            if time.monotonic() > deadline_s:
                return False
            self.update()
            time.sleep(_AGAIN_S)
        return True
