"""The paper's greedy: each stage grown by the largest gain in throughput per added GPU."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from samullm_tasks.sizes import between, far_apart

from samullm_greedy.throughput import StageView, WorkMeter, mean_throughput
from samullm_plugin.model.parallel import ParallelConfig
from samullm_plugin.model.plan import Assignment, Plan
from samullm_plugin.model.problem import Problem
from samullm_plugin.rules.placement import place
from samullm_plugin.simulator import PlanSimulator, Progress, Rollout

Stage = Mapping[str, ParallelConfig]
"""A stage in the making: configuration by node name."""

EVERY_STEP, SHORTLIST = 128, 12
"""Steps of a stage that are all judged; of more, so many by nodes that are in the stage, and so
many by others, those of largest throughput alone per GPU."""


@dataclass(frozen=True, slots=True)
class Choice:
    """The step by which a stage grew.

    Attributes:
        node: the node that was added, or whose configuration was replaced.
        stage: the stage after it.
        assignments: the same with devices.
        throughput: work per second of the stage after it.
        gain: gain in throughput per added GPU.
    """

    node: str
    stage: Stage
    assignments: tuple[Assignment, ...]
    throughput: float
    gain: float


class Greedy:
    """Grows stage after stage until every node has finished.

    Attributes:
        reasons: by node name, why it first got the configuration it got.
    """

    def __init__(
        self,
        problem: Problem,
        simulator: PlanSimulator,
        meter: WorkMeter,
        *,
        preemption: bool,
        give_up_s: float = float("inf"),
    ) -> None:
        """Prepare the search.

        Args:
            problem: the instance.
            simulator: the host's simulator of it.
            meter: what counts as useful work.
            preemption: a started model may get another configuration, or none, in the next stage.
            give_up_s: on the clock of ``time.monotonic``, when to give up.
        """
        self.reasons: dict[str, str] = {}
        self._problem, self._simulator, self._meter = problem, simulator, meter
        self._preemption, self._give_up_s = preemption, give_up_s
        self._drafts: dict[tuple[str, ParallelConfig], Assignment] = {}
        self._alone: dict[tuple[object, ...], tuple[float, list[Progress]]] = {}
        self._by_rank: dict[tuple[str, ParallelConfig], float] = {}
        self._configs = {
            node.name: problem.parallel_configs(i) for i, node in enumerate(problem.app.nodes)
        }

    def plan(self) -> Plan:
        """Return the plan.

        Stages end at their first finisher, as the paper's; if the simulation of the whole plan is
        shorter by it (with engines prepared ahead another may be first), at that of planning.
        """
        rollout = Rollout(self._simulator, self._give_up_s)
        while unfinished := rollout.unfinished():
            rollout.run_stage(self._next_stage(rollout, unfinished))
        plans = rollout.plan(), rollout.plan(named=True)
        took_s = [sum(t.makespan_s for t in self._simulator.simulate(p)) for p in plans]
        return plans[took_s[1] < took_s[0]]

    def _next_stage(self, rollout: Rollout, unfinished: list[str]) -> tuple[Assignment, ...]:
        """Return the stage that begins now, grown from nothing (or from what may not change)."""
        views = [StageView(self._simulator, s, self._meter) for s in rollout.states]
        self._by_rank.clear()
        fixed: dict[str, ParallelConfig] = {}
        if not self._preemption:
            fixed = {n: a.parallel for n, a in rollout.held.items() if n in unfinished}
        stage: Stage = fixed
        assignments = tuple(rollout.held[n] for n in fixed)
        throughput = mean_throughput(views, assignments)
        while True:
            rollout.require_time()
            ready = rollout.ready(unfinished, stage)
            step = self._best(rollout, views, stage, throughput, ready, fixed)
            if step is None and assignments:
                return assignments
            if step is None:  # no step gains anything, and something must be done
                smallest = {ready[0]: self._configs[ready[0]][0]}
                return place(self._problem, smallest, rollout.held) or ()
            if step.node not in self.reasons:
                parallel = step.stage[step.node]
                self.reasons[step.node] = (
                    f"{parallel} from stage {len(rollout.stages)} on: of all steps it raised the "
                    f"stage's throughput most per GPU, from {throughput:.3g} to "
                    f"{step.throughput:.3g} per second"
                )
            stage, assignments, throughput = step.stage, step.assignments, step.throughput

    def _best(
        self,
        rollout: Rollout,
        views: list[StageView],
        stage: Stage,
        throughput: float,
        ready: list[str],
        fixed: Stage,
    ) -> Choice | None:
        """Return the step of largest gain, or None if none is feasible or gains anything.

        Candidates are judged as if whoever goes on stayed where it is; only those that would win
        get devices, and are judged again if somebody had to move for them.
        """
        steps = list(self._steps(stage, ready, fixed))
        if len(steps) > EVERY_STEP:
            steps = self._shortlist(rollout, views, stage, steps)
        candidates = [(n, {**stage, n: p}) for n, p in steps]
        here = {n: self._draft(rollout, n, p) for n, p in stage.items()}
        new = [self._draft(rollout, n, p) for n, p in steps]
        drafts = [tuple({**here, a.node: a}.values()) for a in new]
        for view in views:
            view.prefetch([*here.values(), *new])
        used = sum(p.num_devices for p in stage.values())

        def judged(node: str, grown: Stage, assignments: tuple[Assignment, ...]) -> Choice:
            value = mean_throughput(views, assignments)
            added = sum(p.num_devices for p in grown.values()) - used
            return Choice(node, grown, assignments, value, (value - throughput) / added)

        choices = [judged(n, c, d) for (n, c), d in zip(candidates, drafts, strict=True)]
        best: Choice | None = None
        # The first of equals: fewest GPUs, then the order of the nodes.
        for choice in sorted(choices, key=lambda c: -c.gain):
            if choice.gain <= (0.0 if best is None else best.gain):
                break  # drafts are never worse than what becomes of them
            assignments = place(self._problem, choice.stage, rollout.held)
            if assignments is None or not _still(fixed, assignments, rollout.held):
                continue
            real = judged(choice.node, choice.stage, assignments)
            if real.gain > (0.0 if best is None else best.gain):
                best = real
        return best

    def _steps(
        self, stage: Stage, ready: list[str], fixed: Stage
    ) -> Iterator[tuple[str, ParallelConfig]]:
        """Yield one ready node more, or one node on more GPUs than it has."""
        free = self._problem.cluster.num_gpus - sum(p.num_devices for p in stage.values())
        for node in ready:
            if node in fixed:
                continue
            has = stage[node].num_devices if node in stage else 0
            for parallel in self._configs[node]:
                if has < parallel.num_devices <= has + free:
                    yield node, parallel

    def _shortlist(
        self,
        rollout: Rollout,
        views: list[StageView],
        stage: Stage,
        steps: list[tuple[str, ParallelConfig]],
    ) -> list[tuple[str, ParallelConfig]]:
        """Return steps of the stage's own nodes, and those of others that do most alone."""
        if not self._by_rank:
            self._rank(rollout, views, steps)
        own = [s for s in steps if s[0] in stage]
        ranked = sorted(own, key=lambda s: -self._by_rank.get(s, 0.0))[:SHORTLIST]
        others = [s for s in steps if s[0] not in stage]
        ranked += sorted(others, key=lambda s: -self._by_rank.get(s, 0.0))[:SHORTLIST]
        return ranked

    def _rank(
        self, rollout: Rollout, views: list[StageView], steps: list[tuple[str, ParallelConfig]]
    ) -> None:
        """Find the throughput alone per GPU of steps; of many sizes, that of some is simulated."""
        new = [s for s in steps if self._alone_key(rollout, *s) not in self._alone]
        some = [sizes[k] for sizes in _by_shape(new) for k in far_apart(_devices(sizes))]
        drafts = [self._draft(rollout, n, p) for n, p in some]
        for view in views:
            view.prefetch(drafts)
        known = {
            step: mean_throughput(views, (draft,)) / step[1].num_devices
            for step, draft in zip(some, drafts, strict=True)
        }
        for sizes in _by_shape(new):
            apart = far_apart(_devices(sizes))
            found = np.array([[known[sizes[k]]] for k in apart])
            values = between(_devices(sizes), apart, found)[:, 0]
            node = self._problem.app.index(sizes[0][0])
            bases = [s.progress[node] for s in rollout.states]
            for step, value in zip(sizes, values, strict=True):
                self._alone[self._alone_key(rollout, *step)] = float(value), bases
        for step in steps:
            self._by_rank[step] = self._alone[self._alone_key(rollout, *step)][0]

    def _alone_key(
        self, rollout: Rollout, name: str, parallel: ParallelConfig
    ) -> tuple[object, ...]:
        """Return what the throughput of a node started alone depends on."""
        node = self._problem.app.index(name)
        running = tuple(s.clock_s for s in rollout.states if name in s.active)
        return name, parallel, running, tuple(id(s.progress[node]) for s in rollout.states)

    def _draft(self, rollout: Rollout, name: str, parallel: ParallelConfig) -> Assignment:
        """Return an assignment before devices are chosen: the one held if equal, else anywhere."""
        held = rollout.held.get(name)
        if held is not None and held.parallel == parallel:
            return held
        key = name, parallel
        if key not in self._drafts:
            devices = self._problem.idle_devices(self._problem.app.index(name), parallel)
            assert devices is not None  # ``parallel_configs`` gives only what has a place
            self._drafts[key] = Assignment(name, parallel, devices[:1])
        return self._drafts[key]


def _by_shape(
    steps: Iterable[tuple[str, ParallelConfig]],
) -> list[list[tuple[str, ParallelConfig]]]:
    """Return steps by node and shape of a replica, in the order of their devices."""
    shapes: dict[tuple[str, int, int], list[tuple[str, ParallelConfig]]] = {}
    for name, p in steps:
        key = name, p.tensor_parallel_size, p.pipeline_parallel_size
        shapes.setdefault(key, []).append((name, p))
    return list(shapes.values())


def _devices(sizes: Sequence[tuple[str, ParallelConfig]]) -> list[int]:
    return [p.num_devices for _, p in sizes]


def _still(
    fixed: Stage, assignments: tuple[Assignment, ...], held: Mapping[str, Assignment]
) -> bool:
    """Return whether every fixed node stays where it is."""
    return all(held[a.node] == a for a in assignments if a.node in fixed)
