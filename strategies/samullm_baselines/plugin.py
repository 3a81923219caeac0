"""The paper's two heuristics: one model at a time on all GPUs, or as many as possible."""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import attrgetter
from typing import ClassVar, Literal

import numpy as np

from samullm_plugin import Assignment, ParallelConfig, Plan, Problem, StageScheduler, hookimpl
from samullm_plugin.errors import OutOfTimeError
from samullm_plugin.host.interfaces.scheduler import SchedulingContext
from samullm_plugin.rules.placement import place
from samullm_plugin.simulator import PlanSimulator, Rollout

Order = Literal["given", "longest", "shortest"]
Resplit = Literal["always", "if-sooner", "never"]


@dataclass(frozen=True, slots=True)
class Variant:
    """One way to carry the idea out.

    Attributes:
        order: which models come first where not all have a place: in topological order, or those
            that would take longest or shortest on their smallest configuration.
        resplit: at a first finisher, running models are given their new share of the GPUs always,
            if they finish sooner by it (engine start included), or never.
    """

    order: Order
    resplit: Resplit

    def __str__(self) -> str:
        """Return a short form."""
        return f"{self.order} first, re-split {self.resplit}"


VARIANTS = tuple(
    Variant(order, resplit)
    for resplit in ("if-sooner", "never", "always")
    for order in ("given", "longest", "shortest")
)

_devices = attrgetter("num_devices")

LARGE, FEW_VARIANTS = 300, (Variant("longest", "if-sooner"), Variant("longest", "never"))
"""Nodes times GPUs beyond which only these variants are tried."""


class MinHeuristic(StageScheduler):
    """As many models at a time as possible, GPUs split evenly (the paper's Min-heuristic).

    Ready models get one smallest configuration each until no further one has a place. Then the GPUs
    are split evenly: again and again the model with the fewest GPUs gets its next larger
    configuration, as long as one has a place. GPUs that remain after an even split so go, one step
    each, to the models that would take longest. At the size a model ends with it takes the data-
    and tensor-parallel sizes that finish it first. Where the first model finishes, the GPUs are
    split anew, which may resize running models (they pay an engine start).

    The best of the variants of order and re-splitting is returned, by simulated makespan (of two on
    large problems), with stages that end when the node finishes that was first when planning, or
    when any does; after the deadline, if there is one, no further variant is tried.
    """

    name: ClassVar[str] = "min-heuristic"

    def schedule(self, problem: Problem, context: SchedulingContext) -> Plan:
        """Return the best variant's plan; with several length scenarios, mean times decide."""
        simulator = context.simulator.coarse()
        best: tuple[float, Variant, Plan] | None = None
        large = len(problem.app.nodes) * problem.cluster.num_gpus > LARGE
        for variant in FEW_VARIANTS if large else VARIANTS:
            if best is not None and context.remaining_s <= 0:
                break
            try:
                plans = self._plans(simulator, context.give_up_s, variant)
            except OutOfTimeError:
                if best is None:
                    raise
                break
            for plan in plans:
                makespan_s = float(np.mean([t.makespan_s for t in simulator.simulate(plan)]))
                if best is None or makespan_s < best[0]:
                    best = makespan_s, variant, plan
        assert best is not None
        for node in problem.app.nodes:
            context.report.explanation[node.name] = f"an even share of the GPUs ({best[1]})"
        return best[2]

    def _plans(
        self, simulator: PlanSimulator, give_up_s: float, variant: Variant
    ) -> tuple[Plan, Plan]:
        """Return a variant's plan with stages that wait for the node that was first, or any."""
        rollout = Rollout(simulator, give_up_s)
        split = EvenSplit(simulator.problem, rollout)
        while unfinished := rollout.unfinished():
            rollout.run_stage(split.stage(unfinished, variant))
        return rollout.plan(named=True), rollout.plan()


class EvenSplit:
    """Divides the GPUs among models at the beginning of a stage."""

    def __init__(self, problem: Problem, rollout: Rollout) -> None:
        """Look at what runs in ``rollout``."""
        self._problem, self._rollout = problem, rollout
        self._configs = {
            node.name: problem.parallel_configs(i) for i, node in enumerate(problem.app.nodes)
        }
        self._known_places: dict[object, bool] = {}

    def stage(self, unfinished: list[str], variant: Variant) -> tuple[Assignment, ...]:
        """Return the assignments of the stage that begins now."""
        self._known_places.clear()
        held = {n: a for n, a in self._rollout.held.items() if n in unfinished}
        fixed = {n: a.parallel for n, a in held.items()} if variant.resplit == "never" else {}
        shares = self._smallest(unfinished, variant.order, fixed)
        self._enlarge(shares, fixed)
        wanted = self._fastest(shares, fixed)
        if variant.resplit == "if-sooner":
            wanted = self._if_sooner(wanted, held)
        assignments = place(self._problem, wanted, held)
        if assignments is None:  # what does not move may stand in the way of a larger one
            assignments = place(self._problem, wanted, {})
        if assignments is None:  # as it was when the shares were given
            assignments = place(self._problem, shares, held)
        assert assignments is not None
        return assignments

    def _smallest(
        self, unfinished: list[str], order: Order, fixed: Mapping[str, ParallelConfig]
    ) -> dict[str, ParallelConfig]:
        """Return a smallest configuration for as many ready models as have a place."""
        smallest = {n: self._configs[n][0] for n in unfinished}
        names = list(unfinished)
        if order != "given":
            times = dict(zip(names, self._rollout.alone_s(list(smallest.items())), strict=True))
            names.sort(key=lambda n: times[n], reverse=order == "longest")
        shares = dict(fixed)
        while True:
            ready = set(self._rollout.ready(unfinished, shares))
            added = False
            for name in names:
                if self._num_free(shares) == 0:
                    return shares
                if name in shares or name not in ready:
                    continue
                trial = {**shares, name: smallest[name]}
                if self._has_place(trial, fixed):
                    shares, added = trial, True
            if not added:
                return shares

    def _num_free(self, shares: Mapping[str, ParallelConfig]) -> int:
        """Return the GPUs that nobody has."""
        return self._problem.cluster.num_gpus - sum(p.num_devices for p in shares.values())

    def _enlarge(
        self, shares: dict[str, ParallelConfig], fixed: Mapping[str, ParallelConfig]
    ) -> None:
        """Give larger configurations to the models with the fewest GPUs, in place."""
        open_ones = [n for n in shares if n not in fixed]
        while self._num_free(shares) > 0:
            larger = self._larger(shares, open_ones, fixed)
            if not larger:
                return
            shares.update(larger)

    def _larger(
        self,
        shares: Mapping[str, ParallelConfig],
        names: Sequence[str],
        fixed: Mapping[str, ParallelConfig],
    ) -> dict[str, ParallelConfig]:
        """Return what is enlarged next: models of equally many GPUs, or one; none if none can.

        Who comes first matters, and is simulated, only where not all of them can have more.
        """

        def devices(name: str) -> int:
            return shares[name].num_devices

        for _, alike in groupby(sorted(names, key=devices), key=devices):
            level = list(alike)
            first = {n: p for n in level for p in self._larger_configs(shares[n], n)[:1]}
            if len(first) == len(level) and self._has_place({**shares, **first}, fixed):
                return first
            if len(level) > 1:
                times = self._rollout.alone_s([(n, shares[n]) for n in level])
                level = [level[k] for k in sorted(range(len(level)), key=lambda k: -times[k])]
            for name in level:
                for larger in self._larger_configs(shares[name], name):
                    if self._has_place({**shares, name: larger}, fixed):
                        return {name: larger}
        return {}

    def _larger_configs(self, share: ParallelConfig, name: str) -> Sequence[ParallelConfig]:
        """Return a model's configurations of the next larger number of GPUs."""
        configs = self._configs[name]
        first = bisect_right(configs, share.num_devices, key=_devices)
        if first == len(configs):
            return ()
        return configs[first : bisect_right(configs, configs[first].num_devices, key=_devices)]

    def _fastest(
        self, shares: Mapping[str, ParallelConfig], fixed: Mapping[str, ParallelConfig]
    ) -> dict[str, ParallelConfig]:
        """Return, for each model, the fastest configuration of its share that has a place."""
        wanted = dict(shares)
        same = {
            n: [p for p in self._configs[n] if p.num_devices == share.num_devices]
            for n, share in shares.items()
            if n not in fixed
        }
        same = {n: configs for n, configs in same.items() if len(configs) > 1}
        pairs = [(n, p) for n, configs in same.items() for p in configs]
        times = dict(zip(pairs, self._rollout.alone_s(pairs), strict=True))
        for name, configs in same.items():
            for p in sorted(configs, key=lambda p: times[name, p]):
                if self._has_place({**wanted, name: p}, fixed):
                    wanted[name] = p
                    break
        return wanted

    def _if_sooner(
        self, wanted: Mapping[str, ParallelConfig], held: Mapping[str, Assignment]
    ) -> dict[str, ParallelConfig]:
        """Return the stage with running models as they are unless a new start finishes sooner."""
        result = dict(wanted)
        running = [n for n in wanted if n in held and held[n].parallel != wanted[n]]
        anew = self._rollout.alone_s([(n, wanted[n]) for n in running])
        as_is = [self._rollout.remaining_s(n) for n in running]
        for name, new_s, old_s in zip(running, anew, as_is, strict=True):
            if old_s <= new_s:
                trial = {**result, name: held[name].parallel}
                if self._has_place(trial, {}):
                    result = trial
        return result

    def _has_place(
        self, stage: Mapping[str, ParallelConfig], fixed: Mapping[str, ParallelConfig]
    ) -> bool:
        """Return whether a stage has a place in which the fixed models stay where they are."""
        if sum(p.num_devices for p in stage.values()) > self._problem.cluster.num_gpus:
            return False
        # Replicas that need the same fill the same places, whatever model they are of.
        replicas: Counter[object] = Counter()
        for name, parallel in stage.items():
            if name not in fixed:
                replicas[self._needs(name, parallel)] += parallel.data_parallel_size
        key = frozenset(replicas.items()), frozenset(fixed)
        if key not in self._known_places:
            held = {n: self._rollout.held[n] for n in fixed}
            assignments = place(self._problem, stage, held)
            self._known_places[key] = assignments is not None and all(
                held[a.node] == a for a in assignments if a.node in held
            )
        return self._known_places[key]

    def _needs(self, name: str, parallel: ParallelConfig) -> object:
        """Return what a replica's place depends on: its shape and the kinds of GPU it fits on."""
        problem, node = self._problem, self._problem.app.index(name)
        tp, pp = parallel.tensor_parallel_size, parallel.pipeline_parallel_size
        kinds = frozenset(
            key.gpu
            for key in problem.costs[node]
            if (key.tensor_parallel_size, key.pipeline_parallel_size) == (tp, pp)
            and problem.fits(node, key)
        )
        return tp, pp, kinds


class MaxHeuristic(StageScheduler):
    """One model at a time, in topological order, on all GPUs (the paper's Max-heuristic).

    Each model takes the data- and tensor-parallel sizes that finish it first, among those that
    leave no room for another replica. The GPUs such a configuration leaves over (an odd one with
    tensor-parallel size two, say) stay idle. A model is started when the one before has finished,
    so there is nothing to preempt.
    """

    name: ClassVar[str] = "max-heuristic"

    def schedule(self, problem: Problem, context: SchedulingContext) -> Plan:
        """Return the plan; with several length scenarios, mean times decide."""
        simulator = context.simulator.coarse()
        problem = simulator.problem
        rollout = Rollout(simulator, context.give_up_s)
        while unfinished := rollout.unfinished():
            name = rollout.ready(unfinished, ())[0]
            parallel, ends_s = self._fastest(problem, rollout, name)
            assignments = place(problem, {name: parallel}, {})
            assert assignments is not None  # ``parallel_configs`` gives only what has a place
            rollout.run_stage(assignments)
            context.report.explanation[name] = (
                f"{parallel}, the fastest of the configurations that leave no room for another "
                f"replica: {ends_s:.1f} s"
            )
        return rollout.plan()

    def _fastest(
        self, problem: Problem, rollout: Rollout, name: str
    ) -> tuple[ParallelConfig, float]:
        """Return the configuration that finishes a node first, and the mean seconds it takes."""
        node = problem.app.index(name)
        fitting = problem.parallel_configs(node)
        widest: dict[tuple[int, int], ParallelConfig] = {}
        for p in fitting:
            shape = p.tensor_parallel_size, p.pipeline_parallel_size
            if shape not in widest or p.data_parallel_size > widest[shape].data_parallel_size:
                widest[shape] = p
        configs = list(widest.values())
        times = rollout.alone_s([(name, p) for p in configs])
        best = min(range(len(configs)), key=times.__getitem__)
        return configs[best], times[best]


@hookimpl
def register_schedulers(register: Callable[[type[StageScheduler]], None]) -> None:
    """Offer ``max-heuristic`` and ``min-heuristic``."""
    register(MaxHeuristic)
    register(MinHeuristic)
