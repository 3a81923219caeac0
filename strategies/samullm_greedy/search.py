"""The paper's greedy: each stage grown by the largest gain in throughput per added GPU."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
from samullm_tasks.sizes import between, far_apart

from samullm_greedy.throughput import StageView, WorkMeter, mean_throughput, mean_throughputs
from samullm_plugin.model.parallel import ParallelConfig
from samullm_plugin.model.plan import Assignment, Plan
from samullm_plugin.model.problem import Problem
from samullm_plugin.rules.placement import place
from samullm_plugin.simulator import PlanSimulator, Progress, Rollout

Stage = Mapping[str, ParallelConfig]
"""A stage in the making: configuration by node name."""

Step = tuple[str, ParallelConfig]
"""One ready node more, or one node on more GPUs than it has."""

EVERY_STEP, SHORTLIST = 128, 12
"""Steps of a stage that are all judged; of more, so many by nodes that are in the stage, and so
many by others, those of largest throughput alone per GPU. Then, too, no model is started again that
would finish in less than a start takes. Choices; what they save and change is in
``docs/planning.md``, "Planning times"."""


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
        self._alone: dict[
            tuple[object, ...], tuple[dict[ParallelConfig, float], list[Progress]]
        ] = {}  # the progress is kept, for its ids are in the key
        self._ranked: list[Step] = []
        self._as_is: set[str] = set()  # running models that are not worth another start
        self._held: Mapping[str, Assignment] = {}
        self._load_s: dict[str, float] = {}
        self._configs = {
            node.name: problem.parallel_configs(i) for i, node in enumerate(problem.app.nodes)
        }  # fewest GPUs first
        self._num_devices = {n: _devices(configs) for n, configs in self._configs.items()}

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
        self._ranked.clear()
        self._held = rollout.held
        self._as_is.clear()
        if sum(len(self._configs[n]) for n in unfinished) > EVERY_STEP:
            running = [n for n in unfinished if n in rollout.held]
            self._as_is |= {n for n in running if rollout.remaining_s(n) <= self._least_load_s(n)}
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
        steps = self._considered(rollout, views, stage, ready, fixed)
        here = [self._draft(rollout, n, p) for n, p in stage.items()]
        new = [self._draft(rollout, n, p) for n, p in steps]
        for view in views:
            view.prefetch([*here, *new])

        def gain_of(value: float, name: str, parallel: ParallelConfig) -> float:
            has = stage[name].num_devices if name in stage else 0
            return (value - throughput) / (parallel.num_devices - has)

        values = mean_throughputs(views, here, new)
        gains = [gain_of(v, *s) for v, s in zip(values, steps, strict=True)]
        best: Choice | None = None
        # The first of equals: fewest GPUs, then the order of the nodes.
        for k in sorted(range(len(steps)), key=lambda k: -gains[k]):
            if gains[k] <= (0.0 if best is None else best.gain):
                break  # drafts are never worse than what becomes of them
            name, parallel = steps[k]
            grown = {**stage, name: parallel}
            assignments = place(self._problem, grown, rollout.held)
            if assignments is None or not _still(fixed, assignments, rollout.held):
                continue
            value = mean_throughput(views, assignments)
            gain = gain_of(value, name, parallel)
            if gain > (0.0 if best is None else best.gain):
                best = Choice(name, grown, assignments, value, gain)
        return best

    def _considered(
        self,
        rollout: Rollout,
        views: list[StageView],
        stage: Stage,
        ready: list[str],
        fixed: Stage,
    ) -> list[Step]:
        """Return steps to judge: all, or of many the most promising by what models do alone."""
        open_ = [n for n in ready if n not in fixed]
        if sum(len(self._sizes(n, stage)) for n in open_) <= EVERY_STEP:
            return [(n, p) for n in open_ for p in self._sizes(n, stage)]
        if not self._ranked:
            self._rank(rollout, views, {n: self._sizes(n, stage) for n in open_})
        own = self._shortlist(stage, [n for n in open_ if n in stage])
        return own + self._shortlist(stage, [n for n in open_ if n not in stage])

    def _sizes(self, name: str, stage: Stage) -> Sequence[ParallelConfig]:
        """Return what a model may get next: more GPUs than it has, as far as they are free."""
        free = self._problem.cluster.num_gpus - sum(p.num_devices for p in stage.values())
        has = stage[name].num_devices if name in stage else 0
        if name in self._as_is:
            mine = self._held[name].parallel
            return [mine] if name not in stage and mine.num_devices <= free else []
        counts = self._num_devices[name]
        return self._configs[name][bisect_right(counts, has) : bisect_right(counts, has + free)]

    def _least_load_s(self, name: str) -> float:
        """Return the seconds of the shortest start of a model's engines."""
        if name not in self._load_s:
            sizes = self._problem.costs[self._problem.app.index(name)]
            self._load_s[name] = min(self._problem.load_s(costs) for costs in sizes.values())
        return self._load_s[name]

    def _shortlist(self, stage: Stage, names: list[str]) -> list[Step]:
        """Return the steps of these models that do most alone per GPU.

        Of equals, and among models that were not ready when the stage began, the first ones.
        """
        sizes = {n: self._sizes(n, stage) for n in names}
        limits = {n: (s[0].num_devices, s[-1].num_devices) for n, s in sizes.items() if s}
        found: list[Step] = []
        for name, parallel in self._ranked:
            least, most = limits.get(name, (1, 0))
            if least <= parallel.num_devices <= most:
                found.append((name, parallel))
                if len(found) == SHORTLIST:
                    return found
        taken = set(found)
        rest = ((n, p) for n in names for p in sizes[n] if (n, p) not in taken)
        return found + list(islice(rest, SHORTLIST - len(found)))

    def _rank(
        self,
        rollout: Rollout,
        views: list[StageView],
        steps: Mapping[str, Sequence[ParallelConfig]],
    ) -> None:
        """Rank steps by their throughput alone per GPU; of many sizes, that of some is simulated.

        Args:
            rollout: the stages so far.
            views: by length scenario.
            steps: by model, the sizes it may get.
        """
        keys = {n: self._alone_key(rollout, n) for n in steps}
        alone = {
            n: self._alone.setdefault(k, ({}, self._bases(rollout, n)))[0] for n, k in keys.items()
        }
        new = {n: [p for p in sizes if p not in alone[n]] for n, sizes in steps.items()}
        shapes = [(n, s) for n, sizes in new.items() for s in _by_shape(sizes)]
        some = [(n, s[k]) for n, s in shapes for k in far_apart(_devices(s))]
        drafts = [self._draft(rollout, n, p) for n, p in some]
        for view in views:
            view.prefetch(drafts)
        found = iter(
            [
                mean_throughput(views, (draft,)) / p.num_devices
                for (_, p), draft in zip(some, drafts, strict=True)
            ]
        )
        for name, sizes in shapes:
            apart = far_apart(_devices(sizes))
            known = np.array([[next(found)] for _ in apart])
            values = between(_devices(sizes), apart, known)[:, 0]
            alone[name].update(zip(sizes, values.tolist(), strict=True))
        every = [(n, p, alone[n][p]) for n, sizes in steps.items() for p in sizes]
        every = [e for e in every if e[2] > 0.0]
        self._ranked = [(n, p) for n, p, _ in sorted(every, key=lambda e: -e[2])]

    def _alone_key(self, rollout: Rollout, name: str) -> tuple[object, ...]:
        """Return what the throughput of a node started alone depends on, but for its size."""
        running = tuple(s.clock_s for s in rollout.states if name in s.active)
        return name, running, tuple(id(p) for p in self._bases(rollout, name))

    def _bases(self, rollout: Rollout, name: str) -> list[Progress]:
        """Return what is done of a node in each scenario."""
        node = self._problem.app.index(name)
        return [s.progress[node] for s in rollout.states]

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


def _by_shape(sizes: Iterable[ParallelConfig]) -> list[list[ParallelConfig]]:
    """Return sizes by shape of a replica, in the order of their devices."""
    shapes: dict[tuple[int, int], list[ParallelConfig]] = {}
    for p in sizes:
        shapes.setdefault((p.tensor_parallel_size, p.pipeline_parallel_size), []).append(p)
    return list(shapes.values())


def _devices(sizes: Sequence[ParallelConfig]) -> list[int]:
    return [p.num_devices for p in sizes]


def _still(
    fixed: Stage, assignments: tuple[Assignment, ...], held: Mapping[str, Assignment]
) -> bool:
    """Return whether every fixed node stays where it is."""
    return all(held[a.node] == a for a in assignments if a.node in fixed)
