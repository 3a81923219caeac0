"""The executor ``simulated``: engines that exist on a virtual clock only."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np

from samullm_plugin import (
    Cluster,
    EngineEvent,
    EngineRequest,
    EngineSpec,
    Executor,
    ModelSpec,
    Problem,
    RequestOutput,
    RunError,
    hookimpl,
)
from samullm_plugin.engine import StepTable
from samullm_plugin.host.interfaces.executor import WINDOW
from samullm_plugin.model.types import Floats
from samullm_simulated.cluster import SimulatedCluster
from samullm_simulated.engine import Submission


class SimulatedExecutor(Executor):
    """Runs an application on simulated engines with given lengths and latencies.

    The clock stands still between calls and jumps to the next event in ``poll``, so that a run of
    an hour takes seconds. What the coordinator learns is what it would learn of real engines.
    """

    name = "simulated"
    virtual_clock: ClassVar[bool] = True

    _cluster: SimulatedCluster | None = None
    _truth: Problem | None = None

    def imitate(self, truth: Problem) -> None:
        """Take lengths, latencies, load times and KV capacities from ``truth``."""
        self._truth = truth

    def open(self, cluster: Cluster, run_dir: Path | None) -> None:
        """Begin at time 0.

        Raises:
            RunError: if nobody has said what is true.
        """
        del cluster, run_dir
        if self._truth is None:
            raise RunError("executor simulated: imitate() must be called before open()")
        self._cluster = SimulatedCluster(self._truth, self.window_of)
        self._late: list[EngineEvent] = []

    @property
    def cluster(self) -> SimulatedCluster:
        """Return the state of all engines.

        Raises:
            RunError: before ``open`` or after ``close``.
        """
        if self._cluster is None:
            raise RunError("executor simulated: it is not open")
        return self._cluster

    def now_s(self) -> float:
        """Return the virtual clock."""
        return self._cluster.clock_s if self._cluster is not None else 0.0

    @property
    def can_prepare(self) -> bool:
        """Starts that were prepared take as much less as the costs say."""
        return True

    def prepare_engine(self, spec: EngineSpec) -> bool:
        """Begin with what a replica's start needs no device for."""
        self.cluster.prepare(spec)
        return True

    def prefetch_on(self, model: ModelSpec, devices: Sequence[int]) -> None:
        """Begin to read a checkpoint on the devices' machines."""
        self.cluster.prefetch(model.name, devices)

    def start_engine(self, spec: EngineSpec) -> None:
        """Start a replica; it is ready after its load time."""
        self.cluster.start(spec)

    @property
    def can_pass_on(self) -> bool:
        """Simulated engines serve whatever they are given."""
        return True

    def pass_on_engine(self, key: str, spec: EngineSpec) -> None:
        """Let a replica without requests go on for another node."""
        self.cluster.pass_on(key, spec)

    @property
    def can_share_gpus(self) -> bool:
        """Parts of GPUs are devices like others; the costs are theirs."""
        return True

    @property
    def can_sleep(self) -> bool:
        """Sleeping and waking take what the costs say."""
        return True

    def sleep_engine(self, key: str) -> bool:
        """Let a replica without requests fall asleep."""
        self.cluster.sleep(key)
        return True

    def wake_engine(self, key: str, spec: EngineSpec) -> None:
        """Let a replica that sleeps serve a node; it is ready after the seconds of waking."""
        self.cluster.wake(key, spec)

    def window(self, model: ModelSpec) -> int | None:
        """Return how many requests a replica of a model has at a time, as real ones have."""
        return WINDOW * model.engine.max_num_seqs

    def window_of(self, spec: EngineSpec) -> int | None:
        """Return how many requests a replica has at a time; all there are under request policies.

        Who comes first is foreseen without a policy only, and else everything would be simulated
        again each time that some are given.
        """
        return None if spec.scheduling_policy == "priority" else self.window(spec.model)

    def submit(self, key: str, requests: Sequence[EngineRequest]) -> None:
        """Let requests arrive now."""
        engine = self.cluster.engine(key)
        limit = engine.spec.model.max_model_len
        for request in requests:
            if request.prompt_tokens >= limit:
                reason = (
                    f"prompt of {request.prompt_tokens} tokens; max_model_len {limit} must be above"
                )
                output = RequestOutput(request.request, 0, finish_reason="error", error=reason)
                self._late.append(EngineEvent(key, "finished", self.cluster.clock_s, (output,)))
            else:
                self.cluster.submit(engine, request)

    def poll(self, timeout_s: float) -> Sequence[EngineEvent]:
        """Go to the next event, at most ``timeout_s`` ahead, and return all of that moment."""
        if self._late:
            events, self._late = self._late, []
            return events
        cluster = self.cluster
        cluster.refresh()
        at = cluster.next_event_s()
        if at > cluster.clock_s + timeout_s:
            cluster.clock_s += timeout_s
            return ()
        if not np.isfinite(at):
            return ()
        cluster.clock_s = at
        events = []
        for engine in cluster.engines.values():
            if not engine.reported_ready and engine.ready_s <= at:
                engine.reported_ready = True
                events.append(EngineEvent(engine.spec.key, "ready", at))
            outputs = tuple(_finished(s) for s in engine.take_finished(at))
            if outputs:
                cluster.note_finished(engine, outputs, at)
                events.append(EngineEvent(engine.spec.key, "finished", at, outputs))
        return events

    def stop_engine(self, key: str) -> Sequence[RequestOutput]:
        """Stop a replica; iterations that have ended by now count."""
        finished, unfinished = self.cluster.stop(key)
        if finished:
            outputs = tuple(_finished(s) for s in finished)
            self._late.append(EngineEvent(key, "finished", self.cluster.clock_s, outputs))
        return [RequestOutput(s.request, tokens) for s, tokens in unfinished]

    def progress(self, key: str) -> Mapping[int, int]:
        """Return what unfinished requests have generated by now, of those that have begun."""
        return self.cluster.engine(key).progress(self.cluster.clock_s)

    def take_steps(self, key: str) -> tuple[StepTable, Floats] | None:
        """Return the iterations since the last call."""
        return self.cluster.engine(key).take_steps(self.cluster.clock_s)

    def close(self) -> None:
        """Forget everything but the clock."""
        if self._cluster is not None:
            self._cluster.engines.clear()


def _finished(submission: Submission) -> RequestOutput:
    reason = "length" if submission.cut else "stop"
    return RequestOutput(submission.request, submission.output_tokens, finish_reason=reason)


@hookimpl
def register_executors(register: Callable[[type[Executor]], None]) -> None:
    """Offer the executor ``simulated``."""
    register(SimulatedExecutor)
