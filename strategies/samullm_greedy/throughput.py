"""Throughput of a stage: useful work until its first model finishes, over the stage's time."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from samullm_plugin.engine import EngineRun
from samullm_plugin.errors import InputError
from samullm_plugin.model.parallel import ParallelConfig
from samullm_plugin.model.plan import Assignment
from samullm_plugin.model.problem import Problem
from samullm_plugin.model.types import Floats
from samullm_plugin.simulator import NodeQuery, NodeRun, PlanSimulator, SimulationState

Objective = Literal["paper", "corrected", "tokens"]


class WorkMeter:
    """What computing tokens of each model counts for.

    ``paper`` counts model FLOPs as the paper's first implementation does: all experts of a mixture,
    and every token that a stage computes. ``corrected`` counts the experts that a token passes
    through, and each token of a request once, however often its KV cache is lost. ``tokens`` counts
    tokens and needs no architecture.
    """

    def __init__(self, problem: Problem, objective: Objective, alike: Sequence[float]) -> None:
        """Look up every model's architecture.

        Args:
            problem: the instance.
            objective: what counts.
            alike: by node, for how many requests one stands.

        Raises:
            InputError: naming the models that have none.
        """
        self.once = objective != "paper"
        models = [node.model for node in problem.app.nodes]
        unknown = sorted({m.name for m in models if m.architecture is None})
        if unknown and objective != "tokens":
            raise InputError(
                f"scheduler greedy counts model FLOPs, and the architecture of "
                f"{', '.join(unknown)} is not known: give it in the application "
                "(model architecture), or use the scheduler's option objective=tokens"
            )
        self._per_token = np.ones(len(models))
        self._per_pair = np.zeros(len(models))
        for i, model in enumerate(models):
            if objective != "tokens" and model.architecture is not None:
                all_experts = objective == "paper"
                flops = model.architecture.useful_flops
                self._per_token[i] = flops(1.0, 0.0, all_experts=all_experts)
                self._per_pair[i] = flops(0.0, 1.0, all_experts=all_experts)
        self.curves: dict[int, tuple[tuple[EngineRun, ...], WorkCurve]] = {}
        self._per_token *= alike
        self._per_pair *= alike

    def work(self, node: int, tokens: Floats, pairs: Floats) -> Floats:
        """Return what these tokens and query-key pairs of a node count for, element by element."""
        return np.asarray(self._per_token[node] * tokens + self._per_pair[node] * pairs)


@dataclass(frozen=True, slots=True, eq=False)
class WorkCurve:
    """Work of all replicas of a run over the time since they were ready, linear between points."""

    time_s: Floats
    work: Floats

    @classmethod
    def of(cls, meter: WorkMeter, node: int, runs: Sequence[EngineRun]) -> WorkCurve:
        """Return the sum of the replicas' progress curves."""
        curves = [r.curve for r in runs if r.curve is not None]
        if not curves:
            return cls(np.zeros(1), np.zeros(1))
        if len(curves) == 1:
            (curve,) = curves
            return cls(curve.time_s, meter.work(node, curve.tokens, curve.pairs))
        time_s = np.unique(np.concatenate([c.time_s for c in curves]))
        total = np.zeros(len(time_s))
        for curve in curves:
            work = meter.work(node, curve.tokens, curve.pairs)
            total += np.interp(time_s, curve.time_s, work)
        return cls(time_s, total)

    def at(self, time_s: float) -> float:
        """Return the work done ``time_s`` after the engines were ready."""
        return float(np.interp(time_s, self.time_s, self.work))


@dataclass(frozen=True, slots=True, eq=False)
class Member:
    """A model in a stage that is being considered, in one length scenario.

    Attributes:
        run: its simulation to the end.
        curve: its work.
        before: work of the run that lies before the stage.
        again: work at the run's beginning that had been done in an earlier stage.
        end_s: when the run ends.
    """

    run: NodeRun
    curve: WorkCurve
    before: float
    again: float
    end_s: float
    _until: dict[float, float] = field(default_factory=dict)

    def work_until(self, time_s: float) -> float:
        """Return the useful work between the stage's beginning and ``time_s``."""
        known = self._until.get(time_s)
        if known is None:
            done = self.curve.at(time_s - self.run.ready_s)
            known = self._until[time_s] = done - max(self.before, min(done, self.again))
        return known


@dataclass(frozen=True, slots=True, eq=False)
class Lineup:
    """Models of a stage that is being considered, by index, upstream ones first.

    Attributes:
        assignments: theirs.
        members: what they do.
        changed: those that do not go on as they would have without the stage.
    """

    assignments: Mapping[int, Assignment]
    members: dict[int, Member]
    changed: set[int]


class StageView:
    """One length scenario at the beginning of a stage."""

    def __init__(self, simulator: PlanSimulator, state: SimulationState, meter: WorkMeter) -> None:
        """Look at ``state`` without changing it."""
        self._app, self._runs = simulator.problem.app, simulator.runs
        self._state, self._meter = state, meter
        self._scenario_works = simulator.works[state.scenario]
        self._done = state.finished()
        self._rank = {node: k for k, node in enumerate(self._app.order)}
        self._fetched: set[tuple[str, ParallelConfig]] = set()
        self._members: dict[tuple[str, ParallelConfig, bool], Member] = {}
        # Where all requests are taken, and no Python node comes between, when a model's inputs are
        # there depends on the models it waits for alone.
        self._plain = not self._app.python and all(w.all_taken for w in self._scenario_works)
        self._known: dict[tuple[object, ...], tuple[Mapping[int, NodeRun], Member]] = {}
        self._stopped = state.foreseen({}) if self._plain else []

    def prefetch(self, assignments: Sequence[Assignment]) -> None:
        """Simulate starts of models whose inputs are all there, on all cores."""
        queries = []
        for a in assignments:
            if (a.node, a.parallel) in self._fetched:
                continue
            self._fetched.add((a.node, a.parallel))
            node = self._app.index(a.node)
            new = a.node not in self._done and not self._goes_on(a)
            if new and self._all_there(node):
                queries.append(self._restart(a, None))
        self._runs.get_many(queries)

    def throughput(self, stage: Sequence[Assignment]) -> float:
        """Return work per second until the first of the stage's models finishes, loads included.

        0 if this scenario has nothing left to do for any of them.
        """
        return self._throughput(self._lineup(stage).members.values())

    def took_s(self, assignment: Assignment) -> float:
        """Return how long a model takes alone from now on (0 if nothing is left to do)."""
        ends_s = [m.end_s for m in self._lineup((assignment,)).members.values()]
        return max(ends_s[0] - self._state.clock_s, 0.0) if ends_s else 0.0

    def throughputs(self, stage: Sequence[Assignment], new: Sequence[Assignment]) -> list[float]:
        """Return the throughput of the stage with each of ``new`` in turn.

        An assignment of ``new`` comes in addition, or in place of the stage's own of that node.
        """
        if self._plain:
            base = self._lineup(stage)
            return [self._throughput(self._grown(base, a)) for a in new]
        stages = [tuple({**{b.node: b for b in stage}, a.node: a}.values()) for a in new]
        return [self.throughput(s) for s in stages]

    def _throughput(self, members: Collection[Member]) -> float:
        if not members:
            return 0.0
        end_s = min([m.end_s for m in members])
        took_s = end_s - self._state.clock_s
        return sum([m.work_until(end_s) for m in members]) / took_s if took_s > 0 else 0.0

    def _lineup(self, stage: Sequence[Assignment]) -> Lineup:
        """Return the stage's models, upstream ones first."""
        active = {self._app.index(a.node): a for a in stage if a.node not in self._done}
        lineup = Lineup(active, {}, set())
        for i in sorted(active, key=self._rank.__getitem__):
            self._enter(i, active[i], lineup)
        return lineup

    def _grown(self, base: Lineup, new: Assignment) -> Collection[Member]:
        """Return the members of a stage with one more or another assignment.

        Only that model is looked at, and those that have their inputs from it.
        """
        if new.node in self._done:
            return base.members.values()
        node = self._app.index(new.node)
        rank = self._rank
        if node in base.members:
            order = list(base.members)
        else:
            order = sorted([*base.members, node], key=rank.__getitem__)
        lineup = Lineup(base.assignments, {}, set(base.changed))
        touched = {node}
        for i in order:
            if i == node:
                lineup.changed.discard(i)
                self._enter(i, new, lineup)
            elif rank[i] > rank[node] and not self._app.upstreams[i].isdisjoint(touched):
                touched.add(i)
                lineup.changed.discard(i)
                self._enter(i, base.assignments[i], lineup)
            else:
                lineup.members[i] = base.members[i]
        return lineup.members.values()

    def _enter(self, node: int, assignment: Assignment, lineup: Lineup) -> None:
        """Add a model to a lineup in which those before it are."""
        sources = self._app.upstreams[node] & lineup.members.keys()
        goes_on = self._goes_on(assignment)
        told = sources & lineup.changed
        if sources and (told or not goes_on):
            member = self._piped(node, assignment, goes_on, sources, lineup.members)
        else:
            member = self._unpiped(node, assignment, goes_on)
        lineup.members[node] = member
        if not goes_on or told:
            lineup.changed.add(node)

    def _piped(
        self,
        node: int,
        assignment: Assignment,
        goes_on: bool,
        sources: AbstractSet[int],
        members: Mapping[int, Member],
    ) -> Member:
        """Return a model whose inputs come from others of the stage."""
        runs = {u: members[u].run for u in sorted(sources)}
        key = node, assignment.parallel, goes_on, tuple((u, id(run)) for u, run in runs.items())
        if self._plain and key in self._known:
            return self._known[key][1]
        if self._plain:
            finish_s = list(self._stopped)
            for u, run in runs.items():
                finish_s[u] = run.finish_s
        else:
            finish_s = self._state.foreseen({u: m.run for u, m in members.items()})
        query = (
            self._state.go_on_query(assignment.node, finish_s)
            if goes_on
            else self._restart(assignment, finish_s)
        )
        member = self._member(node, self._runs.get(query), goes_on)
        if self._plain:
            self._known[key] = runs, member  # the runs are kept, for their ids are in the key
        return member

    def _unpiped(self, node: int, assignment: Assignment, goes_on: bool) -> Member:
        """Return a model that goes on as it is, or starts with all its inputs there."""
        key = (assignment.node, assignment.parallel, goes_on)
        if key not in self._members:
            run = (
                self._state.active[assignment.node].run
                if goes_on
                else self._runs.get(self._restart(assignment, None))
            )
            self._members[key] = self._member(node, run, goes_on)
        return self._members[key]

    def _member(self, node: int, run: NodeRun, goes_on: bool) -> Member:
        kept = self._meter.curves.get(id(run.runs))
        if kept is None:
            kept = run.runs, WorkCurve.of(self._meter, node, run.runs)
            self._meter.curves[id(run.runs)] = kept
        curve = kept[1]
        before = curve.at(self._state.clock_s - run.ready_s) if goes_on else 0.0
        again = self._again(node, run) if self._meter.once else 0.0
        return Member(run, curve, before, again, run.end_s)

    def _again(self, node: int, run: NodeRun) -> float:
        """Return the work of computing again what unfinished requests had computed."""
        base, work = run.base, self._scenario_works[node]
        begun = (base.generated > 0) & ~np.isfinite(base.finish_s)
        # The newest token had not been computed yet.
        length = (work.prompt_tokens[begun] + base.generated[begun] - 1).astype(np.float64)
        return float(self._meter.work(node, length.sum(), (length * (length + 1) / 2).sum()))

    def _goes_on(self, assignment: Assignment) -> bool:
        engine = self._state.active.get(assignment.node)
        if engine is None:
            return False
        planned = engine.running.planned
        return planned is assignment or planned == assignment

    def _restart(self, assignment: Assignment, finish_s: Sequence[Floats] | None) -> NodeQuery:
        node = self._app.index(assignment.node)
        return self._state.restart_query(node, assignment.parallel, assignment.devices[0], finish_s)

    def _all_there(self, node: int) -> bool:
        return all(self._app.nodes[u].name in self._done for u in self._app.upstreams[node])


def mean_throughput(views: Sequence[StageView], stage: Sequence[Assignment]) -> float:
    """Return the stage's throughput averaged over the length scenarios."""
    return sum(v.throughput(stage) for v in views) / len(views) if stage else 0.0


def mean_throughputs(
    views: Sequence[StageView], stage: Sequence[Assignment], new: Sequence[Assignment]
) -> list[float]:
    """Return the throughput of the stage with each of ``new``, averaged over the scenarios."""
    found = [v.throughputs(stage, new) for v in views]
    return [sum(values) / len(views) for values in zip(*found, strict=True)]
