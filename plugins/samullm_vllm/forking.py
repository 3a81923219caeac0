"""Forks engines on CPUs from one process that has imported vLLM: a second instead of sixteen."""

from __future__ import annotations

import array
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import IO, ClassVar

from samullm_vllm.channel import Channel, ChannelClosedError
from samullm_vllm.launching import ENGINE_GROUP, Launched, Launcher, child_environment
from samullm_vllm.processes import RecordedProcess, kill
from samullm_vllm.protocol import Exited, Fault, Fork, Forked, Message, Preloaded, encode

_KNOWN_S = 60.0


class _Forker:
    """The process that forks engines.

    Args:
        log: where its own output goes.

    Attributes:
        process: the process.
        control: to it.
        imported: it has imported vLLM and can fork.
        fault: why it never will.
    """

    kept: ClassVar[_Forker | None] = None
    keeping: ClassVar[bool] = False
    imported = False
    fault = ""

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
                self.fault = f"vLLM cannot be imported: {message.reason}"
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

    def await_ready(self, timeout_s: float) -> str | None:
        """Wait until vLLM is imported; return why engines can never be launched, if so."""
        return self._forker.await_import(timeout_s)

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
            messages = self._forker.receive()
        except ChannelClosedError:
            self._forker.control.close()
            for launched in self._engines.values():
                launched.lost, launched.why_lost = True, self._forker.fault
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
        wanted = _Forker.keeping and _Forker.kept is None
        if wanted and not self._forker.lost and self._all_known():
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
