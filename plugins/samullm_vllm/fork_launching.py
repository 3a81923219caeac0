"""Bring up engine processes forked from one that has imported vLLM.

Importing vLLM takes six seconds and more, what an engine itself needs is less, so engines are
forked from a process that has imported it once (:mod:`samullm_vllm.fork_server`). Importing vLLM
touches no CUDA device, and a process that has not touched one can be forked.
"""

from __future__ import annotations

import array
import logging
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import IO, ClassVar, Literal

from samullm_vllm.channel import Channel, ChannelClosedError
from samullm_vllm.devices import Platform
from samullm_vllm.engine import CUDA_BEGUN
from samullm_vllm.launching import (
    ENGINE_GROUP,
    FreshLauncher,
    Launched,
    Launcher,
    child_environment,
)
from samullm_vllm.processes import RecordedProcess, kill, strike_tree
from samullm_vllm.protocol import Exited, Fault, Fork, Forked, Go, Message, Preloaded, encode

logger = logging.getLogger(__name__)

_KNOWN_S = 60.0
_AGAIN_S = 0.005


def make_launcher(
    start_method: Literal["auto", "fork", "fresh"],
    platform: Platform,
    log: IO[bytes],
    environment: Mapping[str, str],
) -> Launcher:
    """Return what brings up engines in the way that the option ``start_method`` asks for.

    Args:
        start_method: ``auto`` forks; see :func:`make_other_launcher`.
        platform: what the devices are.
        log: takes the output of the process that forks.
        environment: variables for all engines.
    """
    if start_method == "fresh":
        return FreshLauncher(platform, environment)
    return ForkLauncher(platform, environment, log)


def make_other_launcher(
    start_method: Literal["auto", "fork", "fresh"],
    platform: Platform,
    environment: Mapping[str, str],
    why: str,
) -> Launcher | None:
    """Return fresh interpreters where ``auto`` may not fork; None where they would not help.

    Args:
        start_method: as for :func:`make_launcher`.
        platform: what the devices are.
        environment: variables for all engines.
        why: the first launcher never brings up an engine.
    """
    if start_method != "auto" or not why.startswith(CUDA_BEGUN):
        return None
    logger.warning("%s; each imports vLLM for itself, which takes longer", CUDA_BEGUN)
    return FreshLauncher(platform, environment)


class _ForkServer:
    """The process that forks engines, as seen from here.

    Args:
        platform: what the engines compute on.
        log: where its own output goes.

    Attributes:
        own_log: where its own output goes if it was not told; closed with it.
        process: the process.
        control: to it.
        imported: it has imported vLLM and can fork.
        fault: why it never will.
    """

    kept: ClassVar[dict[Platform, _ForkServer]] = {}
    keeping: ClassVar[bool] = False
    imported = False
    fault = ""

    def __init__(self, platform: Platform, log: IO[bytes] | None = None) -> None:
        self.own_log = None
        if log is None:
            self.own_log = log = tempfile.TemporaryFile()  # noqa: SIM115  # open as long as it is
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
        if self.own_log is not None:
            self.own_log.close()


@contextmanager
def kept_fork_server() -> Iterator[None]:
    """Let executors that are opened one after another fork from one process.

    Importing vLLM takes most of the time of a short run. The process ends when the context does, or
    the outermost one where there are several.
    """
    outer = _ForkServer.keeping
    _ForkServer.keeping = True
    try:
        yield
    finally:
        _ForkServer.keeping = outer
        while _ForkServer.kept and not outer:
            _ForkServer.kept.popitem()[1].end()


def begin_import(platform: Platform) -> None:
    """Begin to import vLLM for the executor that is opened next in :func:`kept_fork_server`.

    There is no run yet whose logs the output of the process could join; it does so if vLLM cannot
    be imported.
    """
    if _ForkServer.keeping and platform not in _ForkServer.kept:
        _ForkServer.kept[platform] = _ForkServer(platform)


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
        why = self._server.await_import(timeout_s)
        if why is not None and self._server.own_log is not None:
            self._server.own_log.seek(0)
            shutil.copyfileobj(self._server.own_log, self._log)
        return why

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
