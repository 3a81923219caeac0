"""Carries plans out in simulation, by the same transition rule as the coordinator."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from copy import copy

import numpy as np

from samullm_plugin.engine import EngineCache
from samullm_plugin.errors import PlanError
from samullm_plugin.model.parallel import ParallelConfig
from samullm_plugin.model.plan import Plan, StageEnd
from samullm_plugin.model.problem import Problem
from samullm_plugin.model.result import PlanTrace
from samullm_plugin.model.types import Floats, Ints
from samullm_plugin.rules.bounds import LowerBound, lower_bound
from samullm_plugin.rules.preparing import wanted_ahead
from samullm_plugin.rules.sleeping import Asleep, Sleeping, can_sleep, sleeping
from samullm_plugin.rules.transition import Running, RunState, next_transition
from samullm_plugin.simulator.aggregation import calibrated_aggregate
from samullm_plugin.simulator.node_run import NodeWork, Progress
from samullm_plugin.simulator.python_rows import settle_python
from samullm_plugin.simulator.requests import NodeInputs
from samullm_plugin.simulator.runs import NodeQuery, NodeRuns, PolicyCall
from samullm_plugin.simulator.state import SimulationState

COARSE_REQUESTS = 20_000
"""Requests of all nodes that are simulated for every plan that is considered, about."""

BOUND_REQUESTS = 200_000
"""Requests of nodes alone that are simulated for the lower bound of a length scenario, at most."""

ENGINE_REQUESTS = 16
"""An engine is counted as so many requests there: without, a node of few requests is simulated on
each number of a thousand engines."""


class PlanSimulator:
    """Simulates plans of one problem; identical parts are simulated once.

    Attributes:
        problem: the instance.
        works: per scenario and node, what there is to do.
        starts: per scenario and node, the progress of having done nothing.
        running: engines that run when plans begin.
        asleep: engines that sleep when plans begin.
        runs: simulations of single nodes, shared by everything this simulator is asked.
        cache: results of engine simulations behind them.
        alike: by node of a model, for how many requests of the whole problem one stands; 1 unless
            this is a :meth:`coarse` simulator.
    """

    def __init__(
        self,
        problem: Problem,
        cache: EngineCache | None = None,
        policy: PolicyCall | None = None,
        running: Mapping[str, tuple[Running, float]] | None = None,
        asleep: Collection[Asleep] = (),
    ) -> None:
        """Prepare the problem's requests.

        Args:
            problem: the instance.
            cache: results to reuse; a new cache if None.
            policy: order and replicas of requests; None: first come, first served, in turn.
            running: by node name, engines that run when plans begin, and in how many seconds they
                are ready. Unfinished requests start over from their prompts; for what an engine
                that goes on need not compute again it is ready that much before 0.
            asleep: engines that sleep when plans begin.
        """
        self.problem = problem
        self.running = dict(running or {})
        self.asleep = tuple(asleep)
        self._can_sleep = can_sleep(problem)
        self.cache = EngineCache() if cache is None else cache
        inputs = [NodeInputs(problem.app, i) for i in range(len(problem.app.all_nodes))]
        self.works = [
            [
                NodeWork(inputs[i], scenario.prompt_tokens[i], scenario.output_tokens[i])
                for i in range(len(inputs))
            ]
            for scenario in problem.scenarios
        ]
        self.starts = [
            [
                Progress(np.full(len(w.output_tokens), np.inf), np.zeros_like(w.output_tokens))
                for w in works
            ]
            for works in self.works
        ]
        self.runs = NodeRuns(problem, self.works, self.cache, policy)
        self.alike: tuple[float, ...] = (1.0,) * len(problem.app.nodes)
        self._policy = policy
        self._whole: PlanSimulator | None = None
        self._coarse: PlanSimulator | None = None
        self._lower_bounds_s: Floats | None = None
        self._upstreams = {
            node.name: tuple(problem.app.nodes[u].name for u in sorted(problem.app.upstreams[i]))
            for i, node in enumerate(problem.app.nodes)
        }

    def with_first_scenarios(self, count: int) -> PlanSimulator:
        """Return a simulator of the first length scenarios alone that shares all results."""
        if count >= len(self.problem.scenarios):
            return self
        part: PlanSimulator = copy(self)
        part.problem = self.problem.with_scenarios(self.problem.scenarios[:count])
        part.works, part.starts = self.works[:count], self.starts[:count]
        part._whole, part._lower_bounds_s = self, None
        return part

    def without_pipelines(self) -> PlanSimulator:
        """Return a simulator of :meth:`Problem.without_pipelines` that shares all results."""
        part: PlanSimulator = copy(self)
        part.problem, part._lower_bounds_s = self.problem.without_pipelines(), None
        part._whole = None if self._whole is None else self._whole.without_pipelines()
        if self._whole is None:
            coarse = self.coarse()
            part._coarse = part if coarse is self else coarse.without_pipelines()
        return part

    def with_python(self, scenario: int, finish_s: list[Floats]) -> list[Floats]:
        """Return ``finish_s``, by node, with the entries of Python nodes filled in."""
        works, app = self.works[scenario], self.problem.app
        settle_python(app, [w.inputs for w in works], [w.taken for w in works], finish_s)
        return finish_s

    def coarse(self) -> PlanSimulator:
        """Return a simulator that is fast enough to try many plans.

        It is this one unless the problem has so many requests that requests alike are aggregated
        (:mod:`samullm_plugin.simulator.aggregation`). Plans are valid for both, and so are the
        names and indices of nodes and scenarios; seconds are close, and to be confirmed here.
        """
        if self._whole is not None:
            return self._whole.coarse().with_first_scenarios(len(self.problem.scenarios))
        if self._coarse is None:
            smaller = calibrated_aggregate(self.problem, COARSE_REQUESTS, self.cache)
            self._coarse = self
            if smaller is not None:
                policy = None if self._policy is None else _on_kept(self._policy, smaller.kept)
                self._coarse = PlanSimulator(
                    smaller.problem, self.cache, policy, self.running, self.asleep
                )
                self._coarse.alike = smaller.alike
                self._coarse._coarse = self._coarse
        return self._coarse

    def lower_bounds_s(self) -> Floats:
        """Return seconds that no plan's makespan beats, by length scenario, computed once."""
        if self._lower_bounds_s is None:
            bounds = [self._lower_bound(s) for s in range(len(self.problem.scenarios))]
            self._lower_bounds_s = np.array([b.value_s for b in bounds])
        return self._lower_bounds_s

    def _lower_bound(self, scenario: int) -> LowerBound:
        left = BOUND_REQUESTS

        def timed(node: int, parallel: ParallelConfig, gpu: str) -> Floats | None:
            nonlocal left
            taken = self.works[scenario][node].taken
            requests = int(taken.sum())
            left -= max(requests, ENGINE_REQUESTS * parallel.data_parallel_size)
            if left < 0:
                return None
            device = self.problem.cluster.kinds.index(gpu)
            query = self.start_query(scenario, node, parallel, device, 0.0)
            return np.where(taken, self.runs.get(query).finish_s, 0.0)

        engines = {a.engine for a in self.asleep}
        return lower_bound(
            self.problem, self.problem.scenarios[scenario], self.running, timed, engines
        )

    def initial_state(self, scenario: int = 0) -> SimulationState:
        """Return the state in which plans begin."""
        state = SimulationState(self.runs, self.starts[scenario], scenario)
        for name, (running, ready_s) in self.running.items():
            state.start(running)
            state.active[name].ready_s = ready_s
        state.asleep = dict.fromkeys(self.asleep, 0.0)
        if self.running:
            state.refresh()
        return state

    def alone_s(self, scenario: int, node: int, parallel: ParallelConfig) -> float:
        """Return the seconds a node takes alone, all its inputs there, its engine start included.

        inf if the configuration has no place on the idle cluster.

        Raises:
            InputError: if it does not fit in memory.
        """
        return self.alone_many_s(scenario, [(node, parallel)])[0]

    def alone_many_s(
        self, scenario: int, modes: Sequence[tuple[int, ParallelConfig]]
    ) -> list[float]:
        """Return :meth:`alone_s` of several nodes and configurations, simulated at once."""
        found = [self.problem.idle_devices(i, p) for i, p in modes]
        queries = [
            self.start_query(
                scenario,
                node,
                parallel,
                devices[0],
                self.problem.load_s(self.problem.mode(node, parallel, devices)),
            )
            for (node, parallel), devices in zip(modes, found, strict=True)
            if devices is not None
        ]
        ends = iter(r.end_s for r in self.runs.get_many(queries))
        return [float("inf") if devices is None else next(ends) for devices in found]

    def start_query(
        self,
        scenario: int,
        node: int,
        parallel: ParallelConfig,
        device: int,
        load_s: float,
        available_s: Floats | None = None,
    ) -> NodeQuery:
        """Return the simulation of a whole node whose engines are started at 0.

        Args:
            scenario: index of the length scenario.
            node: index of the node.
            parallel: parallel sizes.
            device: a device of the kind that it runs on.
            load_s: seconds of an engine start.
            available_s: when the inputs of its requests are there; None: from the start.
        """
        base = self.starts[scenario][node]
        return NodeQuery(scenario, node, parallel, device, base, available_s, load_s)

    def simulate(self, plan: Plan) -> tuple[PlanTrace, ...]:
        """Carry the plan out in every length scenario.

        Raises:
            PlanError: if the plan cannot finish every node.
        """
        return tuple(self.simulate_scenario(plan, s) for s in range(len(self.problem.scenarios)))

    def simulate_scenario(self, plan: Plan, scenario: int) -> PlanTrace:
        """Carry the plan out in one length scenario.

        Raises:
            PlanError: if the plan cannot finish every node.
        """
        app, cluster = self.problem.app, self.problem.cluster
        state, rule = self.initial_state(scenario), RunState()
        watched = {s.end.node for s in plan.stages if s.end.kind == "node_progress" and s.end.node}
        stage_start: list[float] = []
        stalled = False
        while True:
            rule.finished = state.finished()
            rule.running = {n: a.running for n, a in state.active.items()}
            rule.released = dict(state.released)
            rule.done_fraction = {n: state.done_fraction(app.index(n)) for n in watched}
            if len(rule.finished) == len(app.nodes):
                break
            stuck = stalled and rule.stage == len(plan.stages) - 1
            move = next_transition(
                plan, cluster, self._upstreams, rule,
                stalled=stalled, same_engine=self.problem.same_engine,
            )  # fmt: skip
            stage_start += [state.clock_s] * (move.stage + 1 - len(stage_start))
            change = Sleeping()
            if self._can_sleep:
                change = sleeping(self.problem, plan, rule, move, state.asleep)
            for name in move.stop:
                state.stop(name)
            state.sleep(change)
            for running in move.start:
                state.start(running, change.wake.get(running.planned.node))
            state.released.clear()
            state.refresh()
            next_s = self._next_event_s(state, rule, plan.stages[move.stage].end)
            stalled = not np.isfinite(next_s)
            if stalled and stuck:
                missing = sorted({n.name for n in app.nodes} - state.finished())
                raise PlanError(
                    "the plan cannot finish: after its last stage these nodes wait for ever: "
                    + ", ".join(missing)
                )
            if not stalled:
                rule.running = {n: a.running for n, a in state.active.items()}
                state.prepare(wanted_ahead(self.problem, plan, rule, state.asleep))
                state.caches.read_next(plan, move.stage, rule.finished, state.clock_s)
                state.advance_to(next_s)
        return self._trace(state, stage_start)

    def _next_event_s(self, state: SimulationState, rule: RunState, end: StageEnd) -> float:
        """Return when the next node finishes or the current stage's end event happens."""
        app = self.problem.app
        times = [
            state.node_finish_s(i) for i, n in enumerate(app.nodes) if n.name not in rule.finished
        ]
        if end.kind == "node_progress" and end.node is not None:
            at = state.time_of_fraction(app.index(end.node), end.fraction)
            if at > state.clock_s:
                times.append(at)
        return max(min(times, default=float("inf")), state.clock_s)

    def _trace(self, state: SimulationState, stage_start: Sequence[float]) -> PlanTrace:
        node_finish = np.array([state.node_finish_s(i) for i in range(len(state.finish_s))])
        makespan = float(node_finish.max())
        segments = tuple(sorted(state.segments, key=lambda s: (s.start_s, s.node)))
        busy = sum(s.busy_s * (len(s.devices) / s.parallel.data_parallel_size) for s in segments)
        total = makespan * self.problem.cluster.num_gpus
        return PlanTrace(
            makespan,
            segments,
            tuple(stage_start),
            node_finish,
            tuple(state.finish_s),
            1.0 - busy / total if total > 0 else 0.0,
        )


def _on_kept(policy: PolicyCall, kept: Sequence[Ints]) -> PolicyCall:
    """Return a request policy that is asked about some of the requests it knows."""

    def call(
        scenario: int, node: int, requests: Ints, arrivals_s: Floats | None, replicas: int
    ) -> tuple[Ints | None, Ints | None]:
        return policy(scenario, node, kept[node][requests], arrivals_s, replicas)

    return call
