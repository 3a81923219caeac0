"""The paper's greedy: each stage grown by the largest gain in throughput per added GPU."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from samullm_greedy.throughput import StageView, WorkMeter, mean_throughput
from samullm_plugin.model.parallel import ParallelConfig
from samullm_plugin.model.plan import Assignment, Plan
from samullm_plugin.model.problem import Problem
from samullm_plugin.rules.placement import place
from samullm_plugin.simulator import PlanSimulator, Rollout

Stage = Mapping[str, ParallelConfig]
"""A stage in the making: configuration by node name."""


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
        self._configs = {
            node.name: problem.parallel_configs(i) for i, node in enumerate(problem.app.nodes)
        }

    def plan(self) -> Plan:
        """Return the plan."""
        rollout = Rollout(self._simulator, self._give_up_s)
        while unfinished := rollout.unfinished():
            rollout.run_stage(self._next_stage(rollout, unfinished))
        return rollout.plan()

    def _next_stage(self, rollout: Rollout, unfinished: list[str]) -> tuple[Assignment, ...]:
        """Return the stage that begins now, grown from nothing (or from what may not change)."""
        views = [StageView(self._simulator, s, self._meter) for s in rollout.states]
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
        candidates = list(self._candidates(stage, ready, fixed))
        drafts = [self._draft(rollout, c) for _, c in candidates]
        for view in views:
            view.prefetch([a for draft in drafts for a in draft])
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

    def _candidates(
        self, stage: Stage, ready: list[str], fixed: Stage
    ) -> Iterator[tuple[str, Stage]]:
        """Yield stages with one ready node more, or one node on more GPUs than it has."""
        free = self._problem.cluster.num_gpus - sum(p.num_devices for p in stage.values())
        for node in ready:
            if node in fixed:
                continue
            has = stage[node].num_devices if node in stage else 0
            for parallel in self._configs[node]:
                if has < parallel.num_devices <= has + free:
                    yield node, {**stage, node: parallel}

    def _draft(self, rollout: Rollout, stage: Stage) -> tuple[Assignment, ...]:
        """Return assignments before devices are chosen: those held if equal, else anywhere."""
        draft = []
        for name, parallel in stage.items():
            mine = rollout.held.get(name)
            if mine is None or mine.parallel != parallel:
                mine = Assignment(name, parallel, (self._some_device(name, parallel),))
            draft.append(mine)
        return tuple(draft)

    def _some_device(self, name: str, parallel: ParallelConfig) -> int:
        """Return a device of a kind on which the configuration fits."""
        problem, node = self._problem, self._problem.app.index(name)
        devices = range(problem.cluster.num_gpus)
        return next(d for d in devices if problem.fits(node, problem.mode_key(parallel, (d,))))


def _still(
    fixed: Stage, assignments: tuple[Assignment, ...], held: Mapping[str, Assignment]
) -> bool:
    """Return whether every fixed node stays where it is."""
    return all(held[a.node] == a for a in assignments if a.node in fixed)
