"""What the bench says of a scheduler on a case: its plan, run by the coordinator in rounds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from samullm_plugin.bench.rows import BASELINES, Baselines, Spread, speedups
from samullm_plugin.model.plan import Plan


@dataclass(frozen=True, slots=True)
class PlannedCase:
    """One scheduler's plan for a case.

    Attributes:
        application: of the case.
        scheduler: its name.
        plan: the plan; None if there is none.
        planned_s: its simulated makespan, mean over the length scenarios it was made for.
        planning_s: what the scheduler took.
        note: why there is no plan.
        failed: a plugin is to blame for that.
    """

    application: str
    scheduler: str
    plan: Plan | None = None
    planned_s: float = 0.0
    planning_s: float = 0.0
    note: str = ""
    failed: bool = False


@dataclass(frozen=True, slots=True)
class BenchRun:
    """One run; times in seconds.

    Attributes:
        application: of the case.
        scheduler: whose plan was run.
        round: which hidden draw.
        measured_s: until the last request finished, engine starts included.
        foreseen_s: the plan simulated on the lengths that were true; None: nobody knows them.
        engine_starts: engines started.
        engine_failures: engines that died.
        load_s: seconds of all engine starts together.
        open_s: seconds before the run's clock began (importing vLLM, unless that was done before).
        requests: requests finished, skipped and failed.
        completion_tokens: tokens generated.
        idle_share: device time without a request.
        plans_adopted: plans, the first included.
        figures: what the executor measured of itself.
        directory: of the run, in the work directory.
        began_at: seconds since the epoch.
        load_average: of the machine, when it began.
    """

    application: str
    scheduler: str
    round: int
    measured_s: float
    foreseen_s: float | None
    engine_starts: int
    engine_failures: int
    load_s: float
    open_s: float
    requests: Mapping[str, int]
    completion_tokens: int
    idle_share: float | None
    plans_adopted: int
    figures: Mapping[str, float]
    directory: str
    began_at: float
    load_average: float


@dataclass(frozen=True, slots=True)
class EngineRow:
    """One scheduler on one application; times in seconds, errors in percent of what was measured.

    Attributes:
        application: of the case.
        scheduler: its name.
        runs: how many there are.
        planned_s: what its plan was to take, on the lengths that the scheduler saw.
        planning_s: what the scheduler took.
        measured_s: makespan.
        planned_error_pct: of ``planned_s``, per round.
        foreseen_error_pct: of the plan simulated on the true lengths, per round.
        engine_starts: per run.
        load_s: of all engine starts of a run together.
        idle_share: of device time.
        speedup_max: measured time of the max-heuristic over this one's, round by round.
        speedup_min: the same of the min-heuristic.
        failed_requests: of all runs.
        figures: what the executor measured of itself, by name.
        note: why there is no plan.
        failed: a plugin is to blame for that.
    """

    application: str
    scheduler: str
    runs: int
    planned_s: float
    planning_s: float
    measured_s: Spread | None
    planned_error_pct: tuple[float, ...]
    foreseen_error_pct: tuple[float, ...]
    engine_starts: Spread | None
    load_s: Spread | None
    idle_share: Spread | None
    speedup_max: Spread | None
    speedup_min: Spread | None
    failed_requests: int
    figures: Mapping[str, Spread]
    note: str = ""
    failed: bool = False


def engine_rows(
    plans: Sequence[PlannedCase], runs: Sequence[BenchRun], baselines: Baselines = BASELINES
) -> list[EngineRow]:
    """Return a row per application and scheduler, in the order of the plans."""
    return [_measured_row(planned, runs, baselines) for planned in plans]


def _measured_row(
    planned: PlannedCase, every: Sequence[BenchRun], baselines: Baselines
) -> EngineRow:
    runs_of: dict[str, list[BenchRun]] = {planned.scheduler: []}
    for run in every:
        if run.application == planned.application:
            runs_of.setdefault(run.scheduler, []).append(run)
    runs = runs_of[planned.scheduler]
    measured = {s: {r.round: r.measured_s for r in mine} for s, mine in runs_of.items()}
    over = speedups(measured, planned.scheduler, baselines)
    return EngineRow(
        planned.application,
        planned.scheduler,
        len(runs),
        planned.planned_s,
        planned.planning_s,
        Spread.of([r.measured_s for r in runs]),
        tuple(100 * (planned.planned_s / r.measured_s - 1) for r in runs),
        tuple(100 * (r.foreseen_s / r.measured_s - 1) for r in runs if r.foreseen_s is not None),
        Spread.of([r.engine_starts for r in runs]),
        Spread.of([r.load_s for r in runs]),
        Spread.of([r.idle_share for r in runs if r.idle_share is not None]),
        over.get("speedup_max"),
        over.get("speedup_min"),
        sum(r.requests.get("failed", 0) for r in runs),
        {
            name: spread
            for name in dict.fromkeys(n for r in runs for n in r.figures)
            if (spread := Spread.of([r.figures[name] for r in runs if name in r.figures]))
        },
        planned.note,
        planned.failed,
    )


def mean_error_pct(rows: Sequence[EngineRow], *, foreseen: bool = False) -> float | None:
    """Return the mean absolute error over all runs; None without runs."""
    errors = [
        abs(e) for r in rows for e in (r.foreseen_error_pct if foreseen else r.planned_error_pct)
    ]
    return float(np.mean(errors)) if errors else None
