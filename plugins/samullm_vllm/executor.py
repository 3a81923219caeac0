"""Engines in processes of their own: start, feed, watch and stop them."""

from __future__ import annotations

import logging
import sys
import time
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import IO, ClassVar

from pydantic import BaseModel

from samullm_plugin import (
    Cluster,
    EngineEvent,
    EngineRequest,
    EngineSpec,
    Executor,
    RequestOutput,
    RunError,
)
from samullm_plugin.engine import StepTable
from samullm_plugin.host.interfaces.moving import move_rule
from samullm_plugin.model.types import Floats
from samullm_vllm.connections import LISTEN_S, Connections
from samullm_vllm.fork_launching import kept_fork_server
from samullm_vllm.launching import Launcher
from samullm_vllm.process_options import ProcessOptions
from samullm_vllm.protocol import (
    Asleep,
    Beat,
    Fault,
    Finished,
    Message,
    Prepared,
    ProtocolError,
    Ready,
    Sleep,
    Start,
    Stop,
    Stopped,
    Submit,
    Wake,
)
from samullm_vllm.replica import Phase, Replica
from samullm_vllm.workdir import WorkDir

logger = logging.getLogger(__name__)

_KILL_S = 10.0


class ProcessExecutor(Executor):
    """Base of the executors whose engines are processes."""

    Config: ClassVar[type[BaseModel]] = ProcessOptions
    time_scale = 1.0
    _launcher: Launcher | None = None
    _opened: Connections | None = None
    _files: WorkDir | None = None

    @classmethod
    def kept_warm(cls) -> AbstractContextManager[None]:
        """Import vLLM once for all executors that fork their engines."""
        return kept_fork_server()

    def __init__(self, config: BaseModel | None = None) -> None:
        """Keep the options; nothing is started before ``open``."""
        super().__init__(config)
        self._replicas: dict[str, Replica] = {}
        self._events: list[EngineEvent] = []
        self._origin_s = time.monotonic()
        self._lag_s = 0.0

    @property
    def options(self) -> ProcessOptions:
        """Return the options."""
        assert isinstance(self.config, ProcessOptions)
        return self.config

    @abstractmethod
    def _prepare(self, cluster: Cluster) -> None:
        """Check that this machine has the cluster's devices."""

    @abstractmethod
    def _make_launcher(self, log: IO[bytes], environment: Mapping[str, str]) -> Launcher:
        """Return what starts engines."""

    def _make_other_launcher(self, why: str, environment: Mapping[str, str]) -> Launcher | None:
        """Return what starts engines where the first cannot for some reason; None: nothing."""
        del why, environment
        return None

    @abstractmethod
    def _device_names(self, spec: EngineSpec) -> list[str]:
        """Return the physical devices of a replica."""

    @abstractmethod
    def _start_message(self, spec: EngineSpec, rendezvous: str, *, ahead: bool) -> Start:
        """Return the first message to a replica's engine.

        Args:
            spec: the replica.
            rendezvous: file for its ranks to meet by.
            ahead: its devices are not free yet.
        """

    def _request(self, spec: EngineSpec, request: EngineRequest) -> EngineRequest:
        """Return a request as the engine gets it."""
        return request

    def open(self, cluster: Cluster, run_dir: Path | None) -> None:
        """Prepare for a run; each engine's log goes to ``run_dir/logs``.

        Where engines are forked, this imports vLLM, before the clock starts.

        Raises:
            InputError: if vLLM or the devices are missing, with the remedy.
            RunError: if vLLM cannot be imported.
        """
        self._prepare(cluster)
        self._files = WorkDir(run_dir)
        log = self._files.open_log("engines")
        environment = {"TMPDIR": str(self._files.temporary)}
        self._launcher = self._make_launcher(log, environment)
        why = self._launcher.await_ready(self.options.load_timeout_s)
        if why is not None and (other := self._make_other_launcher(why, environment)) is not None:
            self._launcher.close()
            self._launcher, why = other, None  # fresh interpreters tell when they start
        if why is not None:
            raise self._hopeless(why, log.name)
        self._opened = Connections(self._launcher, self.options, self._take, self._fail)
        self._origin_s = time.monotonic()

    def _hopeless(self, why: str, log: str) -> RunError:
        """Return the error for an installation of which no engine can start."""
        where = f"; log: {log}" if self._files is not None and self._files.kept else ""
        return RunError(
            f"executor {self.name}: {why}{where}; repair the installation until "
            f"`{sys.executable} -c 'import vllm.v1.engine.llm_engine'` works"
        )

    @property
    def _running(self) -> Launcher:
        """Return the launcher.

        Raises:
            RunError: before ``open`` and after ``close``.
        """
        if self._launcher is None:
            raise RunError(f"executor {self.name}: it is not open")
        return self._launcher

    @property
    def _connections(self) -> Connections:
        """Return the channels of the engines; raise as ``_running`` does."""
        if self._opened is None:
            raise RunError(f"executor {self.name}: it is not open")
        return self._opened

    def now_s(self) -> float:
        """Return the seconds since ``open``."""
        return (time.monotonic() - self._origin_s) / self.time_scale

    def _replica(self, key: str) -> Replica:
        if key not in self._replicas:
            raise RunError(f"executor {self.name}: there is no engine {key!r}")
        return self._replicas[key]

    def prepare_engine(self, spec: EngineSpec) -> bool:
        """Do what a replica's start needs no device for; ``start_engine`` does the rest."""
        self._launch(spec, ahead=True)
        return True

    def start_engine(self, spec: EngineSpec) -> None:
        """Begin to start a replica; a ``ready`` or ``failed`` event follows."""
        replica = self._replicas.get(spec.key)
        waits = self._dozing(spec.after)
        if replica is None:
            replica = self._launch(spec, ahead=bool(waits))
        elif replica.phase in ("preparing", "prepared"):
            replica.spec = spec
        elif replica.phase != "failed":  # of which its event tells
            raise RunError(f"executor {self.name}: there is an engine {spec.key!r} already")
        replica.waits = waits
        self._give_devices(replica)

    def _dozing(self, keys: Iterable[str]) -> set[str]:
        """Return those replicas that are still on their way to sleep."""
        return {k for k in keys if k in self._replicas and self._replicas[k].phase == "dozing"}

    def _give_devices(self, replica: Replica) -> None:
        """Let a replica go on with its start, or wake, unless it has to wait for its devices."""
        if replica.waits or replica.phase == "failed":
            return
        woken = replica.asleep or replica.phase == "dozing"
        replica.asleep, replica.phase = False, "starting"
        if woken:
            self._send(replica, Wake(self._sleep_and_wake_s(replica.spec)[1]))
        else:
            self._send(replica, self._running.placement(self._device_names(replica.spec)))
        if replica.unfinished:  # it has waited for its devices
            self._send_requests(replica, list(replica.unfinished.values()))

    def _note_free(self, key: str) -> None:
        """Give devices to those who have waited for a replica to leave them."""
        for replica in self._replicas.values():
            if key in replica.waits:
                replica.waits.discard(key)
                self._give_devices(replica)

    def _sleep_and_wake_s(self, spec: EngineSpec) -> tuple[float, float]:
        """Return the seconds that sleeping and waking take a modelled engine."""
        del spec
        return 0.0, 0.0

    def sleep_engine(self, key: str) -> bool:
        """Begin to put an idle replica to sleep.

        Raises:
            RunError: if it is not ready, or has requests.
        """
        replica = self._idle(key, "be put to sleep")
        replica.phase = "dozing"
        self._send(replica, Sleep(self._sleep_and_wake_s(replica.spec)[0]))
        return True

    def _idle(self, key: str, what: str) -> Replica:
        """Return a replica that is ready and has no requests, to do something with it."""
        replica = self._replica(key)
        if replica.phase != "ready" or replica.unfinished:
            raise RunError(f"engine {key}: only an idle, ready engine can {what}")
        return replica

    def wake_engine(self, key: str, spec: EngineSpec) -> None:
        """Bring a replica that sleeps, or falls asleep, back for a node.

        Raises:
            RunError: if it does not sleep.
        """
        replica = self._replica(key)
        if replica.phase not in ("dozing", "asleep", "failed") or spec.key in self._replicas:
            raise RunError(f"executor {self.name}: engine {key} cannot wake as {spec.key}")
        replica.spec, replica.waits = spec, self._dozing(spec.after)
        self._replicas[spec.key] = self._replicas.pop(key)
        if replica.phase == "failed":  # which was told of it by its old name
            reason = f"it ended while it slept; log: {replica.log}"
            self._events.append(EngineEvent(spec.key, "failed", self.now_s(), reason=reason))
        self._give_devices(replica)

    @property
    def can_pass_on(self) -> bool:
        """What a node asks for is in its requests, not in its engines."""
        return True

    def pass_on_engine(self, key: str, spec: EngineSpec) -> None:
        """Let a ready replica without requests go on for another node.

        Raises:
            RunError: if it is not ready, or has requests.
        """
        replica = self._idle(key, f"go on as {spec.key}")
        if spec.key in self._replicas:
            raise RunError(f"executor {self.name}: there is an engine {spec.key!r} already")
        replica.spec = spec
        self._replicas[spec.key] = self._replicas.pop(key)

    def _launch(self, spec: EngineSpec, *, ahead: bool) -> Replica:
        """Have the processes of a replica made, and tell them what to be."""
        if spec.key in self._replicas:
            raise RunError(f"executor {self.name}: there is an engine {spec.key!r} already")
        self.check([spec.model])
        launcher = self._running
        assert self._files is not None  # as there is a launcher
        log = self._files.open_log(spec.key)
        start = self._start_message(spec, str(self._files.rendezvous()), ahead=ahead)
        where = launcher.placement(self._device_names(spec))
        launched = launcher.launch(spec.key, start.num_ranks, log, where)
        replica = Replica(spec, launched, log.name, "preparing" if ahead else "starting")
        self._replicas[spec.key] = replica
        self._connections.add(replica)
        self._send(replica, start)
        return replica

    def submit(self, key: str, requests: Sequence[EngineRequest]) -> None:
        """Give requests to a replica, which may still be starting."""
        replica = self._replica(key)
        replica.submitted(requests)
        if replica.phase != "failed" and not replica.waits:  # else they follow its devices
            self._send_requests(replica, requests)

    def _send_requests(self, replica: Replica, requests: Iterable[EngineRequest]) -> None:
        given = tuple(self._request(replica.spec, r) for r in requests)
        try:
            self._send(replica, Submit(given))
        except ProtocolError:  # find out whose fault it is
            for request in given:
                self._submit_one(replica, request)

    def _submit_one(self, replica: Replica, request: EngineRequest) -> None:
        """Give one request to a replica; one that cannot be sent has failed."""
        try:
            self._send(replica, Submit((request,)))
        except ProtocolError as error:
            wrong = RequestOutput(request.request, 0, (), finish_reason="error", error=str(error))
            outputs = replica.finished((wrong,))
            self._events.append(EngineEvent(replica.spec.key, "finished", self.now_s(), outputs))

    def poll(self, timeout_s: float) -> Sequence[EngineEvent]:
        """Return what has happened, waiting up to ``timeout_s`` for the first event."""
        deadline_s = time.monotonic() + timeout_s * self.time_scale
        self._pump(0.0)
        while not self._events:
            left_s = deadline_s - time.monotonic()
            if left_s <= 0:
                break
            self._pump(min(left_s, LISTEN_S))
        events, self._events = self._events, []
        return events

    def progress(self, key: str) -> Mapping[int, int]:
        """Return how many tokens each unfinished request has generated, as last heard."""
        return {r: len(ids) for r, ids in self._replica(key).tokens.items()}

    def start_parts(self, key: str) -> Mapping[str, float]:
        """Return the seconds of a ready replica's start by part."""
        return self._replica(key).start_parts

    def take_steps(self, key: str) -> tuple[StepTable, Floats] | None:
        """Return the iterations a replica has run since the last call, and their seconds."""
        steps, seconds = self._replica(key).take_steps()
        return steps, seconds / self.time_scale

    def stop_engine(self, key: str) -> Sequence[RequestOutput]:
        """Stop a replica; return its unfinished requests' tokens so far.

        Requests that cannot be carried over (see ``move_rule``) come back with nothing generated.
        The processes are gone when this returns.
        """
        replica = self._replica(key)
        if replica.phase == "ready" and replica.unfinished:
            self._send(replica, Stop())
            # What it would do now is vLLM's clearing up, about a second of it; killing is quicker.
            self._wait(replica, "stopped", self.options.stop_timeout_s)
        self._end(replica)
        self._lag_s += replica.lag_s
        del self._replicas[key]
        self._note_free(key)
        return [self._movable(replica, o) for o in replica.cut_off()]

    def _wait(self, replica: Replica, phase: Phase, timeout_s: float) -> bool:
        """Wait until a replica is in a phase or has failed; return whether it is."""
        deadline_s = time.monotonic() + timeout_s
        while replica.phase not in (phase, "failed") and time.monotonic() < deadline_s:
            self._pump(min(LISTEN_S, max(0.0, deadline_s - time.monotonic())))
        return replica.phase == phase

    @staticmethod
    def _movable(replica: Replica, output: RequestOutput) -> RequestOutput:
        if move_rule(replica.unfinished[output.request].sampling) == "carry":
            return output
        return RequestOutput(output.request, 0, ())

    def close(self) -> None:
        """Kill every engine and remove what they left; safe to call twice."""
        if self._launcher is not None:
            for replica in self._replicas.values():
                self._launcher.kill(replica.launched, _KILL_S)
            self._launcher.close()  # also ends engines whose ids are not known yet
            self._launcher = None
        if self._opened is not None:
            self._opened.close()
            self._opened = None
        self._replicas.clear()
        if self._files is not None:
            self._files.close()
            self._files = None

    def _send(self, replica: Replica, message: Message) -> None:
        self._connections.send(replica, message)

    def _pump(self, timeout_s: float) -> None:
        """Take in what has arrived, waiting so long for something, and find what has failed."""
        self._connections.listen(timeout_s)

    def _take(self, replica: Replica, message: Message) -> None:
        key, now_s = replica.spec.key, self.now_s()
        if isinstance(message, Ready):
            replica.phase = "ready"
            if message.parts:
                replica.start_parts = message.parts
            self._events.append(EngineEvent(key, "ready", now_s))
        elif isinstance(message, Prepared):
            if replica.phase == "preparing":  # its devices may have become free meanwhile
                replica.phase = "prepared"
        elif isinstance(message, Finished):
            if outputs := replica.finished(message.outputs):
                self._events.append(EngineEvent(key, "finished", now_s, outputs))
        elif isinstance(message, Beat):
            replica.heard(message)
        elif isinstance(message, Stopped):
            replica.snapshot = message.outputs
            replica.phase = "stopped"
        elif isinstance(message, Asleep):
            if replica.phase == "dozing":  # it may be wanted again meanwhile
                replica.phase, replica.asleep = "asleep", True
                self._note_free(key)
        elif isinstance(message, Fault):
            if message.of_all:
                raise self._hopeless(message.reason, replica.log)
            self._fail(replica, message.reason)
        else:
            self._fail(replica, f"it sent {type(message).__name__}")

    def _fail(self, replica: Replica, reason: str) -> None:
        if replica.phase in ("failed", "stopped"):
            return
        replica.phase = "failed"
        reason = f"{reason}; log: {replica.log}"
        logger.info("engine %s failed: %s", replica.spec.key, reason)  # whoever runs it tells
        self._events.append(EngineEvent(replica.spec.key, "failed", self.now_s(), reason=reason))
        # All that is waited for here delays the news; the rest is done when the engine is stopped.
        # On CUDA the engine's workers are its children and must be struck while it is their parent.
        self._running.strike(replica.launched)
        self._connections.remove(replica)

    def _end(self, replica: Replica) -> None:
        """Have the processes of a replica gone, and close its channel."""
        if not self._running.kill(replica.launched, _KILL_S):
            logger.error("engine %s: processes do not end: %s", replica.spec.key, replica.launched)
        self._connections.remove(replica)
