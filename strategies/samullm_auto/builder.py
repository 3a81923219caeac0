"""From a solution to a plan, by list scheduling on the host's simulation."""

from __future__ import annotations

from collections.abc import Sequence

from samullm_auto.decoder import GROWN, WORTHWHILE
from samullm_auto.solution import Solution, Split, by_shape
from samullm_plugin import Assignment, ParallelConfig, Plan, Problem, Stage, StageEnd
from samullm_plugin.simulator import PlanSimulator, SimulationState, with_idle_nodes

Event = tuple[float, StageEnd]


class Builder:
    """Builds plans in one length scenario.

    Whenever something happens (a model finishes, or has done a share that the solution names),
    models start in the solution's order on the devices that are free; nobody is moved unless the
    solution says so.
    """

    def __init__(
        self,
        problem: Problem,
        simulator: PlanSimulator,
        scenario: int,
        modes: Sequence[Sequence[ParallelConfig]],
    ) -> None:
        """Prepare building.

        Args:
            problem: the instance.
            simulator: the host's simulator.
            scenario: index of the length scenario to build in.
            modes: the configurations to which models may grow, by node.
        """
        self._problem, self._simulator, self._scenario = problem, simulator, scenario
        self._names = [n.name for n in problem.app.nodes]
        self._shapes = [by_shape(of_node) for of_node in modes]

    def build(self, solution: Solution) -> Plan:
        """Return the solution's plan."""
        state = self._simulator.initial_state(self._scenario)
        stages: list[Stage] = []
        held: dict[str, Assignment] = {}
        splits = list(solution.splits)
        started: set[int] = set()
        while True:
            finished = state.finished()
            held = {n: a for n, a in held.items() if n not in finished}
            for split in [s for s in splits if self._is_due(state, held, s)]:
                splits.remove(split)
                self._resize(held, split.node, split.parallel)
            self._start(solution, state, finished, held, started)
            if not held:
                return with_idle_nodes(self._problem, stages)
            if solution.grow and len(started) == len(self._names):
                self._grow(state, held)
            state.keep_only(held.values())
            time_s, end = self._next(solution, state, held, started, splits)
            stages.append(Stage(tuple(held.values()), end))
            state.advance_to(time_s)

    def _start(
        self,
        solution: Solution,
        state: SimulationState,
        finished: set[str],
        held: dict[str, Assignment],
        started: set[int],
    ) -> None:
        """Give free devices to models in order, in place."""
        app = self._problem.app
        free = self._free(held)
        awaited: set[str] = set()
        for i in solution.order:
            if i in started:
                continue
            if self._names[i] in finished:
                started.add(i)
            if i in started or not state.has_work(i):
                continue
            upstreams = app.upstreams[i]
            if not upstreams <= started or any(
                self._names[u] not in finished
                and (state.done_fraction(u) < solution.starts[i] - 1e-9)
                for u in upstreams
            ):
                continue
            if solution.patient:
                before = self._comes_free(i, solution.modes[i], state, held, awaited)
                if before is not None:
                    awaited.add(before)
                    continue
            devices = self._find(i, solution.modes[i], free)
            if devices is None:
                if solution.strict:
                    return
                continue
            held[self._names[i]] = Assignment(self._names[i], solution.modes[i], devices)
            free -= set(devices)
            started.add(i)

    def _comes_free(
        self,
        node: int,
        parallel: ParallelConfig,
        state: SimulationState,
        held: dict[str, Assignment],
        awaited: set[str],
    ) -> str | None:
        """Return a running model whose engines a node could have before its own had started.

        None as well if it can have such engines now.
        """
        problem, same = self._problem, self._problem.same_engine
        number = same.get(self._names[node])
        if number is None or state.can_take_over(node, parallel):
            return None
        devices = problem.idle_devices(node, parallel)
        assert devices is not None, f"{parallel} has no place on the idle cluster"
        limit_s = state.clock_s + problem.load_s(problem.mode(node, parallel, devices))
        for name, assignment in held.items():
            if same.get(name) != number or name in awaited or name not in state.active:
                continue
            ends_s = state.node_finish_s(problem.app.index(name))
            if assignment.parallel == parallel and ends_s < limit_s:
                return name
        return None

    def _is_due(self, state: SimulationState, held: dict[str, Assignment], split: Split) -> bool:
        running = self._names[split.node] in held
        return running and state.done_fraction(split.node) >= split.fraction - 1e-9

    def _resize(self, held: dict[str, Assignment], node: int, parallel: ParallelConfig) -> bool:
        """Give a running model another configuration if it has a place, in place."""
        name = self._names[node]
        if held[name].parallel == parallel:
            return False
        own = set(held[name].devices)
        devices = self._find(node, parallel, own) or self._find(
            node, parallel, own | self._free(held)
        )
        if devices is not None:
            held[name] = Assignment(name, parallel, devices)
        return devices is not None

    def _grow(self, state: SimulationState, held: dict[str, Assignment]) -> None:
        """Give free devices to running models that finish sooner by it, the last one first."""
        app = self._problem.app
        done = state.finished()
        index = {n: app.index(n) for n in held}
        running = [
            n
            for n in held
            if n in state.active and all(self._names[u] in done for u in app.upstreams[index[n]])
        ]
        for name in sorted(running, key=lambda n: -state.node_finish_s(index[n]))[:GROWN]:
            if not self._free(held):
                return
            node = index[name]
            room = len(held[name].devices) + len(self._free(held))
            around = set(held[name].devices) | self._free(held)
            larger, queries = [], []
            for configs in self._shapes[node]:
                widest = max((p for p in configs if p.num_devices <= room), default=None)
                if widest is None or widest.num_devices <= len(held[name].devices):
                    continue
                devices = self._find(node, widest, around)
                if devices is not None:  # maybe of another kind than those it has
                    larger.append(widest)
                    queries.append(state.restart_query(node, widest, devices[0]))
            if not larger:
                continue
            ends = [r.end_s for r in self._simulator.runs.get_many(queries)]
            as_is = state.node_finish_s(node)
            margin = WORTHWHILE * (as_is - state.clock_s)
            for end_s, parallel in sorted(zip(ends, larger, strict=True)):
                if end_s < as_is - margin and self._resize(held, node, parallel):
                    break

    def _next(
        self,
        solution: Solution,
        state: SimulationState,
        held: dict[str, Assignment],
        started: set[int],
        splits: list[Split],
    ) -> Event:
        """Return the next event, and the end event of the stage until then.

        The finisher is named: with other lengths another may be first, and what the plan does at
        this one's end is not for the other's.
        """
        app = self._problem.app
        first = min(held, key=lambda n: state.node_finish_s(app.index(n)))
        ends_s = state.node_finish_s(app.index(first))
        events: list[Event] = [(ends_s, StageEnd("node_finished", first))]
        shares = {(s.node, s.fraction) for s in splits if self._names[s.node] in held}
        for i in set(solution.order) - started:
            shares |= {(u, solution.starts[i]) for u in app.upstreams[i]}
        for node, fraction in shares:
            if self._names[node] in held and 0.0 < fraction < 1.0:
                time_s = state.time_of_fraction(node, fraction)
                if time_s > state.clock_s:
                    events.append((time_s, StageEnd("node_progress", self._names[node], fraction)))
        return min(events, key=lambda e: e[0])

    def _free(self, held: dict[str, Assignment]) -> set[int]:
        taken = {d for a in held.values() for d in a.devices}
        return set(range(self._problem.cluster.num_gpus)) - taken

    def _find(self, node: int, parallel: ParallelConfig, free: set[int]) -> tuple[int, ...] | None:
        return self._problem.find_devices(node, parallel, free)
