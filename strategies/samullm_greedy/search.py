"""The paper's greedy: each stage grown by the largest gain in throughput per added GPU."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

from samullm_greedy.ranking import Ranking, Step
from samullm_greedy.throughput import StageView, WorkMeter, mean_throughput, mean_throughputs
from samullm_plugin.model.parallel import ParallelConfig
from samullm_plugin.model.plan import Assignment, Plan
from samullm_plugin.model.problem import Problem
from samullm_plugin.rules.placement import place
from samullm_plugin.simulator import PlanSimulator, Rollout

Stage = Mapping[str, ParallelConfig]
"""A stage in the making: configuration by node name."""

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
        self._ranking, self._ranked = Ranking(problem), False
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
        self._ranked = False
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
        free = self._problem.cluster.num_gpus - sum(p.num_devices for p in stage.values())
        sizes = {n: self._sizes(n, stage, free) for n in ready if n not in fixed}
        if sum(map(len, sizes.values())) <= EVERY_STEP or not self._ranked:
            steps = [(n, p) for n, offered in sizes.items() for p in offered]
            if len(steps) <= EVERY_STEP:
                return steps
            self._ranking.begin(rollout, views, {s: self._draft(rollout, *s) for s in steps})
            self._ranked = True
        own = self._shortlist({n: s for n, s in sizes.items() if n in stage})
        return own + self._shortlist({n: s for n, s in sizes.items() if n not in stage})

    def _sizes(self, name: str, stage: Stage, free: int) -> Sequence[ParallelConfig]:
        """Return what a model may get next: more GPUs than it has, as far as they are free."""
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

    def _shortlist(self, sizes: Mapping[str, Sequence[ParallelConfig]]) -> list[Step]:
        """Return the steps of these models that do most alone per GPU.

        Of equals, and among models that were not ready when the stage began, the first ones.
        """
        limits = {n: (s[0].num_devices, s[-1].num_devices) for n, s in sizes.items() if s}
        found = self._ranking.best(limits, SHORTLIST)
        if len(found) == SHORTLIST:
            return found
        taken = set(found)
        rest = ((n, p) for n, offered in sizes.items() for p in offered if (n, p) not in taken)
        return found + list(islice(rest, SHORTLIST - len(found)))

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


def _devices(sizes: Sequence[ParallelConfig]) -> list[int]:
    return [p.num_devices for p in sizes]


def _still(
    fixed: Stage, assignments: tuple[Assignment, ...], held: Mapping[str, Assignment]
) -> bool:
    """Return whether every fixed node stays where it is."""
    return all(held[a.node] == a for a in assignments if a.node in fixed)
