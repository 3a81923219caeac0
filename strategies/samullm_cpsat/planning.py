"""From a problem to an exact plan and what is known about it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from time import monotonic

import numpy as np

from samullm_cpsat.bounding import branch, simple_bound
from samullm_cpsat.certificate import (
    TOLERANCE,
    best_simulated,
    certify,
    in_modes_of,
)
from samullm_cpsat.durations import Timings, measure
from samullm_cpsat.instance import Instance
from samullm_cpsat.options import ExactOptions
from samullm_cpsat.schedule import Placement, Schedule, best_list_schedule, by_weight
from samullm_cpsat.solver import Outcome, SolveOptions, solve
from samullm_cpsat.stages import FinishedShare, plan_of
from samullm_plugin import Plan, Problem
from samullm_plugin.host.interfaces.scheduler import SchedulingContext
from samullm_plugin.model.result import PlanStatus, PlanTrace

SOLVING = 0.7
"""Share of the time that is left after timing which the search for a schedule may take."""

logger = logging.getLogger(__name__)

FIRST_NODES = 2_000_000
"""Nodes of branch and bound spent on a first schedule where switching is allowed."""


@dataclass(frozen=True, slots=True)
class ExactResult:
    """A schedule and its proof.

    Attributes:
        instance: what was solved, simplified.
        outcome: what was found, in ticks.
        rounding: ticks by which rounding up can have lengthened the best schedule at most.
    """

    instance: Instance
    outcome: Outcome
    rounding: int

    @property
    def bound_s(self) -> float:
        """Return a bound for the durations before they were rounded up."""
        return max(0, self.outcome.bound - self.rounding) * self.instance.tick_s

    @property
    def objective_s(self) -> float:
        """Return the makespan of the schedule in the structure's work model."""
        return self.outcome.objective * self.instance.tick_s


def plan_exactly(problem: Problem, context: SchedulingContext, options: ExactOptions) -> Plan:
    """Return the best plan found, and report status, bound and reasons.

    Args:
        problem: the instance.
        context: the host's offers; its simulator times the modes.
        options: structure and limits.
    """
    deadline_s = min(monotonic() + options.time_limit_s, context.deadline_s)
    simulator = context.simulator.coarse()
    timings = measure(simulator.problem, simulator, options.ticks)
    incumbent = context.incumbent
    if options.start_from is not None and context.schedule_with is not None:
        incumbent = context.schedule_with(options.start_from)
    tick_s = timings.instance.tick_s

    def progress(bound: float, objective: float) -> None:
        if context.progress is not None:
            context.progress(bound * tick_s, objective * tick_s)

    solved_by_s = deadline_s
    if options.structure == "no-switching":  # what is simulated and proven after it takes its part
        solved_by_s = monotonic() + SOLVING * max(0.0, deadline_s - monotonic())
    result = solve_instance(timings.instance, options, solved_by_s, incumbent, progress)
    share = _finished_share(result, timings)
    plan = plan_of(result.instance, result.outcome.schedule, share)
    report = context.report
    report.status = PlanStatus.FEASIBLE
    if options.structure == "segments":
        report.explanation.update(_explanation(result.instance, result.outcome.schedule))
        report.objective_s = result.objective_s
        context.report_bound(result.bound_s, _structure(options, len(problem.scenarios)))
        return plan
    smaller = simulator.problem

    def keep_on() -> bool:
        return monotonic() < deadline_s

    bound_s, relaxed = certify(smaller, timings, options.branch_nodes, keep_on)
    full = timings.instance
    found = [in_modes_of(full, result.instance, result.outcome.schedule), *relaxed]

    spans_s: dict[tuple[Placement, ...], dict[str, tuple[float, float]]] = {}

    def simulate_s(schedule: Schedule) -> float:
        traces = simulator.simulate(plan_of(full, schedule, share))
        spans_s[schedule.placements] = _spans_s(traces[0])
        return float(np.mean([t.makespan_s for t in traces]))

    traces = simulator.simulate(plan)
    own_s, own_spans_s = float(np.mean([t.makespan_s for t in traces])), _spans_s(traces[0])
    best_s, best = best_simulated(full, found, simulate_s, options.simulations, keep_on)
    explained: tuple[Instance, Schedule] = result.instance, result.outcome.schedule
    if best_s < own_s * (1 - 1e-9):
        plan, own_s, explained = plan_of(full, best, share), best_s, (full, best)
        own_spans_s = spans_s[best.placements]
        report.notes.append("a schedule that the work model takes to be worse is better simulated")
    report.explanation.update(_explanation(*explained, own_spans_s))
    report.objective_s = own_s
    if simulator is not context.simulator:
        report.notes.append("timed on aggregated requests: nothing is proven")
        return plan
    if simulator.running:
        report.notes.append("timed with a start for every engine, and some run: nothing is proven")
        return plan
    bound_s = max(bound_s, float(np.mean(context.lower_bounds_s())))  # of any structure
    context.report_bound(min(bound_s, own_s), _structure(options, len(problem.scenarios)))
    if own_s <= bound_s * (1 + TOLERANCE):
        report.status = PlanStatus.OPTIMAL
    return plan


def solve_instance(
    full: Instance,
    options: ExactOptions,
    deadline_s: float = float("inf"),
    incumbent: Plan | None = None,
    progress: Callable[[float, float], None] | None = None,
) -> ExactResult:
    """Solve a scheduling instance.

    Args:
        full: tasks and devices.
        options: structure and limits.
        deadline_s: on the clock of ``time.monotonic``.
        incumbent: a plan whose modes and order are tried first.
        progress: called with (bound, incumbent) in ticks.
    """
    deadline_s = min(deadline_s, monotonic() + options.time_limit_s)
    switching = options.structure == "segments"
    instance = full.simplified(switching=switching)
    suggestions = [] if incumbent is None else [_suggestion(instance, incumbent)]
    first = best_list_schedule(instance, suggestions)
    bound = simple_bound(instance, switching=switching)
    half_s = (monotonic() + deadline_s) / 2
    proof = branch(
        instance,
        first,
        nodes=min(options.branch_nodes, FIRST_NODES) if switching else options.branch_nodes,
        keep_on=lambda: monotonic() < half_s,
        progress=None if switching else progress,
    )
    first = proof.schedule
    if not switching:  # a bound for schedules without switching is none for those with it
        bound = proof.bound
    logger.debug("branch and bound: %d nodes, bound %d", proof.nodes, proof.bound)
    units = _units(instance) if switching else 1
    outcome = solve(
        instance,
        first,
        bound,
        SolveOptions(
            segments=options.max_segments if switching else 1,
            units=units,
            workers=options.workers,
            seed=options.seed,
            time_limit_s=deadline_s - monotonic(),
            deterministic_limit=options.deterministic_limit,
            on_progress=progress,
            on_log=logger.debug if logger.isEnabledFor(logging.DEBUG) else None,
        ),
    )
    if switching:
        rounding = sum(
            options.max_segments * (3 - (-max(m.work for m in t.modes) // units))
            for t in instance.tasks
        )
    else:
        rounding = len(instance.tasks)
    return ExactResult(instance, outcome, rounding)


def _units(instance: Instance) -> int:
    """Return work units of a task: as many as ticks in the shortest schedule, at most 2000."""
    return max(1, min(2000, simple_bound(instance, switching=True)))


def _suggestion(instance: Instance, plan: Plan) -> tuple[list[int], list[int]]:
    """Return order and modes of a plan, each node in the mode of its last stage.

    Modes that were left out because others make them superfluous are replaced by the fastest that
    takes no more devices.
    """
    modes, weight = [], []
    for task in instance.tasks:
        stage = plan.last_stage(task.name)
        first = next((n for n, s in enumerate(plan.stages) if s.assignment(task.name)), 0)
        weight.append(-float(first))
        assignment = plan.stages[stage].assignment(task.name) if stage >= 0 else None
        wanted = None if assignment is None else assignment.parallel
        same = [m for m, mode in enumerate(task.modes) if mode.parallel == wanted]
        most = len(assignment.devices) if assignment is not None else 1
        near = [m for m, mode in enumerate(task.modes) if mode.devices <= most]
        pick = same or near or list(range(len(task.modes)))
        modes.append(min(pick, key=lambda m: task.modes[m].duration))
    return by_weight(instance, weight), modes


def _finished_share(result: ExactResult, timings: Timings) -> FinishedShare:
    """Return what tells how many requests are finished when a segment is broken off."""

    def finished_share(placement: Placement) -> float:
        mode = result.instance.tasks[placement.task].modes[placement.mode]
        share = timings.finished_share(placement.task, mode.parallel, mode.gpu, placement.done)
        return min(1.0, max(1e-6, share))

    return finished_share


def _spans_s(trace: PlanTrace) -> dict[str, tuple[float, float]]:
    """Return when each node starts and ends, each being placed once."""
    return {s.node: (s.start_s, s.end_s) for s in trace.segments}


def _structure(options: ExactOptions, scenarios: int) -> str:
    """Return for which plans the bound holds, and what it is made of."""
    durations = "simulated durations"
    if options.structure == "no-switching":
        if scenarios > 1:
            durations = f"the mean of the bounds of {scenarios} length scenarios"
        return f"no switching: every model placed once, in one mode; by any simulation, {durations}"
    if scenarios > 1:
        durations = f"durations averaged over {scenarios} length scenarios"
    return (
        f"at most {options.max_segments} segments per model, work linear inside a mode, a load for "
        f"each; {durations}"
    )


def _explanation(
    instance: Instance,
    schedule: Schedule,
    spans_s: Mapping[str, tuple[float, float]] | None = None,
) -> dict[str, str]:
    """Return by node where it runs and what its mode costs.

    Args:
        instance: tasks and modes.
        schedule: where they are.
        spans_s: by node, when it starts and ends in the simulation; None: as the work model says.
    """
    tick_s = instance.tick_s
    texts: dict[str, str] = {}
    ends_s: dict[str, float] = {}
    for p in schedule.placements:
        task = instance.tasks[p.task]
        mode = task.modes[p.mode]
        cheapest = min(task.modes, key=lambda m: m.devices * m.duration)
        begin_s, end_s = (spans_s or {}).get(task.name, (p.start * tick_s, p.end * tick_s))
        ends_s[task.name] = max(end_s, ends_s.get(task.name, 0.0))
        extra = mode.devices * mode.duration / (cheapest.devices * cheapest.duration) - 1
        text = (
            f"{mode.parallel} from {begin_s:.1f} s to {end_s:.1f} s, "
            f"{extra:.0%} more device time than {cheapest.parallel}, its cheapest mode"
            if extra > 0
            else f"{mode.parallel}, its cheapest mode, from {begin_s:.1f} s to {end_s:.1f} s"
        )
        texts[task.name] = f"{texts[task.name]}; {text}" if task.name in texts else text
    texts[max(ends_s, key=ends_s.__getitem__)] += "; it is the last to finish"
    return texts
