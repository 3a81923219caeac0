"""Carries plans out in simulation, by the same transition rule as the coordinator."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
from numpy.typing import NDArray

from samullm_plugin.core.engine import EngineCache
from samullm_plugin.core.parallel import ParallelConfig
from samullm_plugin.core.plan import Plan, StageEnd
from samullm_plugin.core.problem import Problem
from samullm_plugin.core.result import PlanTrace
from samullm_plugin.core.simulation.node_run import NodeRun, NodeWork, Progress, run_node
from samullm_plugin.core.simulation.requests import NodeInputs
from samullm_plugin.core.simulation.state import SimulationState
from samullm_plugin.core.transition import Running, RunState, next_transition
from samullm_plugin.errors import PlanError

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

PolicyCall = Callable[[int, int, Ints, "Floats | None", int], tuple["Ints | None", Ints]]
"""A request policy: from scenario, node, request indices, their arrivals after the engines are
ready (None: all are there) and the number of replicas to priorities and replicas."""


class PlanSimulator:
    """Simulates plans of one problem; identical parts are simulated once.

    Attributes:
        problem: the instance.
        works: per scenario and node, what there is to do.
        cache: results of engine simulations, shared by everything this simulator is asked.
    """

    def __init__(
        self,
        problem: Problem,
        cache: EngineCache | None = None,
        policy: PolicyCall | None = None,
    ) -> None:
        """Prepare the problem's requests.

        Args:
            problem: the instance.
            cache: results to reuse; a new cache if None.
            policy: order and replicas of requests; None: first come, first served, in turn.
        """
        self.problem = problem
        self._policy = policy
        self.cache = EngineCache() if cache is None else cache
        inputs = [NodeInputs(problem.app, i) for i in range(len(problem.app.nodes))]
        self.works = [
            [
                NodeWork(inputs[i], scenario.prompt_tokens[i], scenario.output_tokens[i])
                for i in range(len(inputs))
            ]
            for scenario in problem.scenarios
        ]
        self._upstreams = {
            node.name: tuple(problem.app.nodes[u].name for u in sorted(problem.app.upstreams[i]))
            for i, node in enumerate(problem.app.nodes)
        }

    def initial_state(self, scenario: int = 0) -> SimulationState:
        """Return the state before anything runs."""
        return SimulationState(self, scenario)

    def run(
        self,
        scenario: int,
        node: int,
        running: Running,
        base: Progress,
        available_s: Floats | None,
        ready_s: float,
    ) -> NodeRun:
        """Simulate a node from ``base`` to its end on an assignment."""
        costs = self.problem.mode(node, running.planned.parallel, running.devices)
        table = self.problem.app.nodes[node].requests
        prefixes = None
        if self.problem.app.nodes[node].model.engine.enable_prefix_caching:
            prefixes = (table.prefix_id, table.prefix_tokens)
        return run_node(
            self.works[scenario][node],
            base,
            available_s,
            ready_s,
            running.planned.parallel,
            self.problem.engine_config(node, costs),
            costs,
            self.cache,
            spread=None if self._policy is None else partial(self._policy, scenario, node),
            prefixes=prefixes,
        )

    def alone_s(self, scenario: int, node: int, parallel: ParallelConfig) -> float:
        """Return the seconds a node takes alone, all its inputs there, its engine start included.

        Raises:
            InputError: if it does not fit.
        """
        devices = self.problem.cluster.find_devices(range(self.problem.cluster.num_gpus), parallel)
        if devices is None:
            return float("inf")
        costs = self.problem.mode(node, parallel, devices)
        work = self.works[scenario][node]
        base = Progress(np.full(len(work.output_tokens), np.inf), np.zeros_like(work.output_tokens))
        load_s = self.problem.load_s(costs)
        config = self.problem.engine_config(node, costs)
        run = run_node(work, base, None, load_s, parallel, config, costs, self.cache)
        return max((load_s + r.makespan_s for r in run.runs), default=0.0)

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
        state, rule = SimulationState(self, scenario), RunState()
        stage_start: list[float] = []
        stalled = False
        while True:
            rule.finished = state.finished()
            rule.running = {n: a.running for n, a in state.active.items()}
            end = plan.stages[max(rule.stage, 0)].end
            if end.kind == "node_progress" and end.node is not None:
                rule.done_fraction = {end.node: state.done_fraction(app.index(end.node))}
            if len(rule.finished) == len(app.nodes):
                break
            move = next_transition(plan, cluster, self._upstreams, rule, stalled=stalled)
            stage_start += [state.clock_s] * (move.stage + 1 - len(stage_start))
            for name in move.stop:
                state.stop(name)
            for running in move.start:
                state.start(running)
            state.refresh()
            next_s = self._next_event_s(state, rule, plan.stages[move.stage].end)
            stalled = not np.isfinite(next_s)
            if stalled and move.stage == len(plan.stages) - 1:
                missing = sorted({n.name for n in app.nodes} - state.finished())
                raise PlanError(
                    "the plan cannot finish: after its last stage these nodes wait for ever: "
                    + ", ".join(missing)
                )
            if not stalled:
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
