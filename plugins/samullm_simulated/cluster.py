"""All simulated engines of a run, and what will come of them.

Simulating an engine again at every request that reaches it would cost the square of their number.
So this foresees, from the application's own structure, which outputs of its engines will be
submitted where and when, and simulates that; as long as the coordinator does just this, nothing is
simulated twice. Whatever differs is simulated again from the engine's start: what arrives later
never changes what happened earlier.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from samullm_plugin import (
    EngineRequest,
    EngineSpec,
    ModeCosts,
    ParallelConfig,
    Problem,
    RequestOutput,
    RunError,
)
from samullm_plugin.engine import EngineCache
from samullm_plugin.model.types import Floats
from samullm_plugin.rules.page_cache import PageCaches
from samullm_plugin.simulator.python_rows import python_finish_s
from samullm_plugin.simulator.requests import NodeInputs
from samullm_simulated.engine import SimulatedEngine, Submission
from samullm_simulated.foreseeing import NodeRequests, due_s


class SimulatedCluster:
    """Engines, clock and true lengths.

    Attributes:
        clock_s: now.
        engines: by key.
        finish_s: per node when each request finished or will, inf if that is not foreseen.
    """

    def __init__(
        self, truth: Problem, window_of: Callable[[EngineSpec], int | None] = lambda _: None
    ) -> None:
        """Begin with nothing running.

        Args:
            truth: its first length scenario is what happens.
            window_of: how many requests an engine is given at a time.
        """
        self.truth, self._window_of = truth, window_of
        self.clock_s = 0.0
        self.engines: dict[str, SimulatedEngine] = {}
        self._prepared: dict[str, float] = {}
        self._asleep: dict[str, float] = {}
        self._caches = PageCaches(truth)
        self._nodes = truth.app.nodes
        scenario = truth.scenarios[0]
        self._taken = [o > 0 for o in scenario.output_tokens]
        self._inputs = [NodeInputs(truth.app, i).past(t) for i, t in enumerate(self._taken)]
        self._requests = [
            NodeRequests(
                node, self._inputs[i], scenario.prompt_tokens[i], scenario.output_tokens[i]
            )
            for i, node in enumerate(self._nodes)
        ]
        self.finish_s: list[Floats] = [np.full(len(t), np.inf) for t in self._taken]
        self._available: list[Floats | None] = [None] * len(self._taken)
        self._stale = set(range(len(self._taken)))
        self._cache = EngineCache(200_000)

    def engine(self, key: str) -> SimulatedEngine:
        """Return an engine.

        Raises:
            RunError: if there is none of that key.
        """
        if key not in self.engines:
            raise RunError(f"executor simulated: there is no engine {key!r}")
        return self.engines[key]

    def prefetch(self, model: str, devices: Sequence[int]) -> None:
        """Begin to read a checkpoint on the machines of some devices."""
        self._caches.read_ahead(model, devices, self.clock_s)

    def prepare(self, spec: EngineSpec) -> None:
        """Begin with what an engine's start needs no device for."""
        self._prepared[spec.key] = self.clock_s
        self.prefetch(spec.model.name, spec.devices)

    def pass_on(self, key: str, spec: EngineSpec) -> None:
        """Let an engine that has no requests go on for another node.

        Raises:
            RunError: if it is not ready or has requests.
        """
        self._leave(key, f"go on as {spec.key}")
        self.start(spec)
        taken_over = self.engines[spec.key]
        taken_over.ready_s, taken_over.reported_ready = self.clock_s, True

    def sleep(self, key: str) -> None:
        """Let an engine that has no requests fall asleep.

        Raises:
            RunError: if it is not ready or has requests.
        """
        spec = self._leave(key, "sleep")
        self._asleep[key] = self.clock_s + (self._costs(spec).load.sleep_s or 0.0)

    def wake(self, key: str, spec: EngineSpec) -> None:
        """Let an engine that sleeps serve another node.

        Raises:
            RunError: if it does not sleep.
        """
        if key not in self._asleep:
            raise RunError(f"executor simulated: engine {key} does not sleep")
        began_s = max(self._asleep.pop(key), self._free_s(spec))
        self.start(spec)
        self.engines[spec.key].ready_s = began_s + (self._costs(spec).load.wake_s or 0.0)

    def _leave(self, key: str, what: str) -> EngineSpec:
        """Take an idle engine off its node, and return what it was."""
        engine = self.engine(key)
        if not engine.reported_ready or engine.generated(self.clock_s):
            raise RunError(f"executor simulated: engine {key} cannot {what}")
        self.stop(key)
        return engine.spec

    def _free_s(self, spec: EngineSpec) -> float:
        """Return when an engine has its devices: when those that it follows sleep."""
        return max((self.clock_s, *(self._asleep[k] for k in spec.after if k in self._asleep)))

    def _costs(self, spec: EngineSpec) -> ModeCosts:
        parallel = ParallelConfig(1, spec.tensor_parallel_size, spec.pipeline_parallel_size)
        return self.truth.mode(spec.node, parallel, spec.devices)

    def start(self, spec: EngineSpec) -> None:
        """Add an engine that is ready after its load time.

        Raises:
            RunError: if a device is taken or the key is used twice.
        """
        for other in self.engines.values():
            if taken := set(other.spec.devices) & set(spec.devices):
                raise RunError(
                    f"executor simulated: device {min(taken)} of {spec.key} is held by "
                    f"{other.spec.key}"
                )
        if spec.key in self.engines:
            raise RunError(f"executor simulated: there is an engine {spec.key!r} already")
        costs = self._costs(spec)
        config = replace(
            self.truth.engine_config(spec.node, costs, spec.pipeline_parallel_size),
            scheduling_policy=spec.scheduling_policy,
        )
        since_s = self._prepared.pop(spec.key, None)
        free_s = self._free_s(spec)
        ready_s = self._caches.ready_s(spec.node, costs, spec.devices, free_s, since_s)
        window = self._window_of(spec)
        engine = SimulatedEngine(spec, config, costs, self.clock_s, ready_s, window)
        if config.enable_prefix_caching:
            table = self._nodes[spec.node].requests
            engine.use_prefixes(table.prefix_id, table.prefix_tokens)
        if not self._of_node(spec.node):
            self._requests[spec.node].turn = 0
        self.engines[spec.key] = engine
        self._stale.add(spec.node)

    def stop(self, key: str) -> tuple[list[Submission], list[tuple[Submission, int]]]:
        """Remove an engine.

        Returns:
            Requests that finished but were not reported, and the unfinished with their tokens.
        """
        if (self._prepared.pop(key, None), self._asleep.pop(key, None)) != (None, None):
            return [], []
        engine = self.engine(key)
        mine = self._requests[engine.spec.node]
        finished, unfinished = [], []
        for submission, tokens in engine.generated(self.clock_s):
            if tokens >= submission.output_tokens:
                finished.append(submission)
                mine.done_s[submission.request] = self.clock_s
            else:
                unfinished.append((submission, tokens))
                mine.generated[submission.request] += tokens  # most likely
        del self.engines[key]
        mine.chain_at = {c: k for c, k in mine.chain_at.items() if k != key}
        self._stale.add(engine.spec.node)
        return finished, unfinished

    def submit(self, engine: SimulatedEngine, request: EngineRequest) -> None:
        """Let a request arrive at an engine now."""
        node, r = engine.spec.node, request.request
        mine = self._requests[node]
        mine.generated[r] = request.num_generated  # in an earlier run, perhaps
        output = int(mine.output_tokens[r]) - request.num_generated
        limit = min(request.max_tokens, mine.node.model.max_model_len - request.prompt_tokens)
        cut = limit <= output or mine.output_tokens[r] >= mine.node.requests.max_tokens[r]
        own, there = mine.own.get(r, ()), self._available[node]
        came = Submission(
            r,
            engine.since_ready(
                self.clock_s,
                own=any(mine.done_s[q] == self.clock_s for q in own),
                others=there is not None and there[r] == self.clock_s,
            ),
            request.prompt_tokens,
            max(1, min(output, limit)),
            bool(cut),
            priority=request.priority,
        )
        mine.note_dealt(r, engine.spec.key)
        foreseen = engine.foreseen.take(r)
        if foreseen is not None and self._as_foreseen(engine, came, foreseen):
            engine.add(foreseen)
            return
        engine.add(came)
        for other in self._of_node(node):
            other.foreseen.take(r)
        self._stale.add(node)

    def _as_foreseen(self, engine: SimulatedEngine, came: Submission, foreseen: Submission) -> bool:
        if foreseen.after:  # it comes when its predecessors have finished
            node, r = engine.spec.node, foreseen.request
            available = self._available[node]
            there_s = 0.0 if available is None else float(available[r])
            after_s = max(float(self.finish_s[node][q]) for q in foreseen.after)
            due_s = max(after_s, there_s)
            if self.clock_s != due_s and (engine.window is None or self.clock_s < due_s):
                return False
            came = replace(came, arrival_s=foreseen.arrival_s, after=foreseen.after)
        elif engine.window is not None and came.arrival_s > foreseen.arrival_s:
            came = replace(came, arrival_s=foreseen.arrival_s)  # it waited outside
        return came == foreseen

    def note_finished(
        self, engine: SimulatedEngine, outputs: Sequence[RequestOutput], time_s: float
    ) -> None:
        """Remember what was reported."""
        for output in outputs:
            self._requests[engine.spec.node].done_s[output.request] = time_s

    def next_event_s(self) -> float:
        """Return when an engine is ready or a request finishes next; inf if never."""
        times = [e.next_finish_s() for e in self.engines.values()]
        times += [e.ready_s for e in self.engines.values() if not e.reported_ready]
        return min(times, default=float("inf"))

    def refresh(self) -> None:
        """Foresee again what may have changed."""
        for engine in self.engines.values():
            if engine.overdue(self.clock_s):
                self._stale.add(engine.spec.node)
        if not self._stale:
            return
        for i in self.truth.app.full_order:
            available = self._inputs[i].available_s(self.finish_s)
            if i not in self._stale and _same(available, self._available[i]):
                continue
            self._available[i] = available
            if i >= len(self._nodes):
                node = self.truth.app.python[i - len(self._nodes)]
                taken = self._taken[i]
                nothing = np.full(len(taken), np.inf)
                self.finish_s[i] = python_finish_s(node, self._inputs[i], taken, available, nothing)
                continue
            self._refresh_node(i, available)
        self._stale.clear()

    def _of_node(self, node: int) -> list[SimulatedEngine]:
        return [e for e in self.engines.values() if e.spec.node == node]

    def _refresh_node(self, i: int, available: Floats | None) -> None:
        mine, engines = self._requests[i], self._of_node(i)
        finish = mine.done_s.copy()
        if not mine.taken.all():
            finish = mine.inputs.settled_s(mine.taken, available, finish)
        if engines:
            mine.foresee(engines, available, finish, self.clock_s)
        for engine in engines:
            engine.simulate(self._cache)
            engine.skip_finished(self._reported_until(engine))
            requests, at_s = engine.finish_times()
            open_ = np.isinf(mine.done_s[requests])
            finish[requests[open_]] = at_s[open_]
        if not mine.taken.all():
            finish = mine.inputs.settled_s(mine.taken, available, finish)
        self.finish_s[i] = finish
        for engine in engines:
            engine.foreseen.expect(due_s(engine, finish))

    def _reported_until(self, engine: SimulatedEngine) -> float:
        """Return the clock once the coordinator has heard of the engine and of all before."""
        return self.clock_s if engine.reported_ready else -1.0


def _same(a: Floats | None, b: Floats | None) -> bool:
    if a is None or b is None:
        return a is b
    return bool(np.array_equal(a, b))
