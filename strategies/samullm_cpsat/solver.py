"""Builds the model, gives it a complete first solution, solves it and reads the schedule off."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ortools.sat.python import cp_model

from samullm_cpsat.constraints import add_constraints
from samullm_cpsat.instance import Instance
from samullm_cpsat.placing import Counted, place
from samullm_cpsat.schedule import Schedule
from samullm_cpsat.variables import Variables, make_variables
from samullm_cpsat.warm_start import complete_hint


def minimise_makespan(model: cp_model.CpModel, v: Variables, bound: int) -> None:
    """Minimise the tick at which the last task has finished, known to be at least ``bound``."""
    assert v.makespan is not None
    model.add(v.makespan >= bound)
    model.minimize(v.makespan)


Progress = Callable[[float, float], None]


@dataclass(frozen=True, slots=True)
class SolveOptions:
    """How to solve.

    Attributes:
        segments: most segments of a task; 1 is the structure without switching.
        units: work units a task is divided into where it may have several segments.
        workers: solver threads.
        seed: of the solver's randomness.
        time_limit_s: wall-clock limit.
        deterministic_limit: limit in the solver's deterministic time, which does not depend on the
            machine's load; None: none.
        on_progress: called with (bound, incumbent) in ticks.
        on_log: called with every line of the solver's log.
    """

    segments: int = 1
    units: int = 1
    workers: int = 2
    seed: int = 0
    time_limit_s: float = 30.0
    deterministic_limit: float | None = None
    on_progress: Progress | None = None
    on_log: Callable[[str], None] | None = None


@dataclass(frozen=True, slots=True)
class Outcome:
    """What the solver found.

    Attributes:
        schedule: the best schedule.
        objective: its makespan in ticks.
        bound: no schedule of the instance in this structure takes fewer ticks.
        optimal: bound and objective are proven to meet.
        wall_s: seconds of solving.
    """

    schedule: Schedule
    objective: int
    bound: int
    optimal: bool
    wall_s: float


class _OnSolution(cp_model.CpSolverSolutionCallback):
    """Tells of every better schedule."""

    def __init__(self, progress: Progress) -> None:
        super().__init__()
        self._progress = progress
        self.incumbent = float("inf")

    def on_solution_callback(self) -> None:
        self.incumbent = self.objective_value
        self._progress(self.best_objective_bound, self.incumbent)


def solve(instance: Instance, first: Schedule, bound: int, options: SolveOptions) -> Outcome:
    """Return the best schedule that can be found and proven within the limits.

    Args:
        instance: tasks and devices, simplified.
        first: a schedule with one segment per task, to start from.
        bound: a proven lower bound in ticks.
        options: structure and limits.
    """
    model = cp_model.CpModel()
    pooled = len(instance.pools) > 1
    v = make_variables(
        model,
        instance,
        segments=options.segments,
        units=options.units,
        horizon=first.makespan,
        pooled=pooled,
    )
    add_constraints(model, instance, v, options.units, pooled=pooled)
    minimise_makespan(model, v, bound)
    complete_hint(model, instance, v, first, options.units)
    solver = cp_model.CpSolver()
    solver.parameters.catch_sigint_signal = False  # it would leave the default handler behind
    solver.parameters.num_workers = options.workers
    solver.parameters.random_seed = options.seed
    solver.parameters.max_time_in_seconds = max(0.01, options.time_limit_s)
    if options.deterministic_limit is not None:
        solver.parameters.max_deterministic_time = options.deterministic_limit
    # Not interleave_search: it corrupts memory in or-tools 9.13 to 9.15 (google/or-tools#5048).
    if options.on_log is not None:
        solver.parameters.log_search_progress = True
        solver.parameters.log_to_stdout = False
        solver.log_callback = options.on_log
    callback = None
    if options.on_progress is not None:
        callback = _OnSolution(options.on_progress)
        progress, seen = options.on_progress, callback
        solver.best_bound_callback = lambda bound: progress(bound, seen.incumbent)
    status = solver.solve(model, callback)
    if status not in (cp_model.OPTIMAL, cp_model.FEASIBLE):
        # Nothing was found in time; infeasible it cannot be, for the first schedule is a solution.
        return Outcome(first, first.makespan, bound, bound == first.makespan, solver.wall_time)
    objective = round(solver.objective_value)
    better = objective < first.makespan  # if not, keep what does not depend on threads' luck
    return Outcome(
        _schedule(instance, v, solver, options.units) if better else first,
        objective,
        max(bound, _ceil(solver.best_objective_bound)),
        status == cp_model.OPTIMAL,
        solver.wall_time,
    )


def _ceil(bound: float) -> int:
    """Return the least whole number not below a bound, up to the solver's rounding."""
    return -int(-(bound - 1e-6) // 1)


def _schedule(instance: Instance, v: Variables, solver: cp_model.CpSolver, units: int) -> Schedule:
    """Return the schedule of a solution, with device ids, everything as early as its order lets."""
    counted = []
    for i, segments in enumerate(v.segments):
        for s in segments:
            if not solver.boolean_value(s.present):
                continue
            m = next(m for m, x in enumerate(s.mode) if solver.boolean_value(x))
            share = units if s.share is None else solver.value(s.share[m])
            parts = None
            if s.parts is not None:
                parts = tuple(solver.value(of_pool[m]) for of_pool in s.parts)
            start, end = solver.value(s.start), solver.value(s.end)
            counted.append(Counted(i, m, start, end, share, parts))
    return place(instance, counted, units)
