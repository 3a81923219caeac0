"""A plan made stage by stage, each ending at its first finisher, simulated as it grows."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from time import monotonic

from samullm_plugin.errors import OutOfTimeError, PlanError
from samullm_plugin.model.parallel import ParallelConfig
from samullm_plugin.model.plan import Assignment, Plan, Stage, StageEnd
from samullm_plugin.model.problem import Problem
from samullm_plugin.simulator.simulator import PlanSimulator
from samullm_plugin.simulator.state import SimulationState


class Rollout:
    """Stages so far, and where every length scenario stands after them.

    Attributes:
        problem: the instance.
        states: per scenario, the state after the last stage.
        stages: the stages so far.
        held: by node name, the assignments of engines that run in some scenario.
    """

    def __init__(self, simulator: PlanSimulator, give_up_s: float = float("inf")) -> None:
        """Begin with what runs when the simulator's plans begin.

        Args:
            simulator: of the problem.
            give_up_s: on the clock of ``time.monotonic``, when to give up; see
                :attr:`~samullm_plugin.host.interfaces.scheduler.SchedulingContext.give_up_s`.
        """
        self.problem = simulator.problem
        self._give_up_s = give_up_s
        self._simulator = simulator
        nodes = self.problem.app.nodes
        self._upstreams = {
            node.name: {nodes[u].name for u in up}
            for node, up in zip(nodes, self.problem.app.upstreams, strict=True)
        }
        self.states: list[SimulationState] = [
            simulator.initial_state(s) for s in range(len(self.problem.scenarios))
        ]
        self.stages: list[Stage] = []
        self._finishers: list[str | None] = []  # by stage, who ends it in every scenario
        self.held: dict[str, Assignment] = {n: r.planned for n, (r, _) in simulator.running.items()}

    def require_time(self) -> None:
        """Raise if it is time to give up.

        Raises:
            OutOfTimeError: then.
        """
        if monotonic() > self._give_up_s:
            raise OutOfTimeError(f"out of time after {len(self.stages)} stages")

    def unfinished(self) -> list[str]:
        """Return the nodes that have something left to do in some scenario, upstream ones first."""
        finished = set.intersection(*(s.finished() for s in self.states))
        nodes = self.problem.app.nodes
        return [nodes[i].name for i in self.problem.app.order if nodes[i].name not in finished]

    def ready(self, unfinished: Collection[str], chosen: Collection[str]) -> list[str]:
        """Return the unfinished nodes all of whose upstream nodes are finished or ``chosen``.

        Not those that have no request of their own left and only wait for others to finish.
        """
        waiting = set(unfinished) - set(chosen)

        def is_ready(name: str) -> bool:
            if not self._upstreams[name].isdisjoint(waiting):
                return False
            node = self.problem.app.index(name)
            return any(s.has_work(node) for s in self.states)

        return [n for n in unfinished if is_ready(n)]

    def alone_s(self, modes: Sequence[tuple[str, ParallelConfig]]) -> list[float]:
        """Return the mean seconds of finishing nodes started anew now, all their inputs there.

        Args:
            modes: node names and configurations; they are simulated at once.
        """
        problem, known = self.problem, self._simulator.runs.alone_s
        asked = [
            (state.scenario, problem.app.index(name), parallel, state)
            for name, parallel in modes
            for state in self.states
        ]
        bases = [state.progress_now(node) for _, node, _, state in asked]
        keys = [
            (s, i, p, id(base), state.can_take_over(i, p))
            for (s, i, p, state), base in zip(asked, bases, strict=True)
        ]
        missing = {k: a for k, a in zip(keys, asked, strict=True) if k not in known}
        queries = []
        for _, node, parallel, state in missing.values():
            devices = problem.idle_devices(node, parallel)
            assert devices is not None, f"{parallel} has no place on the idle cluster"
            queries.append(state.restart_query(node, parallel, devices[0]))
        runs = self._simulator.runs.get_many(queries)
        for key, (_, _, _, state), run in zip(missing, missing.values(), runs, strict=True):
            # What is there at the start does not depend on when that is.
            known[key] = (max(run.end_s - state.clock_s, 0.0) if run.jobs else 0.0), run.base
        took = [known[k][0] for k in keys]
        n = len(self.states)
        return [sum(took[i * n : (i + 1) * n]) / n for i in range(len(modes))]

    def remaining_s(self, name: str) -> float:
        """Return the mean seconds until a node that runs finishes if it goes on as it is."""
        node = self.problem.app.index(name)
        left = [
            max(s.node_finish_s(node) - s.clock_s, 0.0) for s in self.states if name in s.active
        ]
        return sum(left) / len(self.states)

    def run_stage(self, assignments: Sequence[Assignment]) -> None:
        """Append a stage and simulate it to its first finisher.

        Raises:
            PlanError: if none of its nodes can ever finish.
            OutOfTimeError: if it is time to give up.
        """
        self.require_time()
        self.stages.append(Stage(tuple(assignments)))
        index = self.problem.app.index
        self.held = {}
        finishers = [a.node for a in assignments]
        for state in self.states:
            done = state.finished()
            left = [a for a in assignments if a.node not in done]
            if not left:
                continue
            state.keep_only(left)
            end_s = min(state.node_finish_s(index(a.node)) for a in left)
            if end_s == float("inf"):
                names = ", ".join(a.node for a in left)
                raise PlanError(f"a stage of {names} would wait for ever")
            first = {a.node for a in left if state.node_finish_s(index(a.node)) == end_s}
            finishers = [n for n in finishers if n in first]
            state.advance_to(end_s)
            self.held.update((a.node, a) for a in left if a.node in state.active)
        self._finishers.append(finishers[0] if finishers else None)

    def plan(self, *, named: bool = False) -> Plan:
        """Return the plan, nodes that have nothing to do in these scenarios included.

        Their requests may be needed after all in the scenario that comes true.

        Args:
            named: stages end when the node finishes that finished first here, not at whatever
                finishes first. Where another is first after all (other lengths, engines prepared
                ahead), what the plan does at this one's end then waits for it. Left to themselves,
                such stages begin with the node that they wait for finished already, and wait for
                the next one instead.
        """
        stages = self.stages
        if named:
            ends = [None if n is None else StageEnd("node_finished", n) for n in self._finishers]
            ends = [*ends[:-1], None][: len(stages)]
            stages = [
                s if end is None else Stage(s.assignments, end)
                for s, end in zip(stages, ends, strict=True)
            ]
        return with_idle_nodes(self.problem, stages)


def with_idle_nodes(problem: Problem, stages: Sequence[Stage]) -> Plan:
    """Return the plan of some stages, with stages inserted for nodes that none assigns.

    A node that is missing gets its smallest configuration just before its first consumer. What
    runs on meanwhile runs on.
    """
    plan, app = Plan(tuple(stages)), problem.app
    for i in app.order:
        if plan.last_stage(app.nodes[i].name) >= 0:
            continue
        consumers = {app.nodes[c].name for c, up in enumerate(app.upstreams) if i in up}
        first = next(
            (k for k, s in enumerate(plan.stages) if any(s.assignment(c) for c in consumers)),
            len(plan.stages),
        )
        plan = _insert(problem, plan, first, i)
    return plan


def _insert(problem: Problem, plan: Plan, position: int, node: int) -> Plan:
    """Return the plan with a stage before ``position`` that runs ``node`` beside what goes on."""
    before = plan.stages[position - 1].assignments if position > 0 else ()
    after = plan.stages[position].assignments if position < len(plan.stages) else ()
    going_on = [a for a in before if a in after]
    parallel = problem.parallel_configs(node)[0]
    free = set(range(problem.cluster.num_gpus)) - {d for a in going_on for d in a.devices}
    devices = problem.find_devices(node, parallel, free)
    if devices is None:
        going_on = []
        devices = problem.idle_devices(node, parallel)
    assert devices is not None  # ``parallel_configs`` gives only what has a place
    mine = Assignment(problem.app.nodes[node].name, parallel, devices)
    stage = Stage((mine, *going_on))
    return Plan((*plan.stages[:position], stage, *plan.stages[position:]))
