"""What the runs of a bench on engines say, per application and scheduler."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from samullm_plugin.bench.engine_bench import BenchRun, PlannedCase
from samullm_plugin.bench.plans import MAX_HEURISTIC, MIN_HEURISTIC


@dataclass(frozen=True, slots=True)
class Spread:
    """A figure over rounds.

    Attributes:
        median: of the rounds.
        least: of the rounds.
        most: of the rounds.
    """

    median: float
    least: float
    most: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread | None:
        """Return the spread of values; None if there are none."""
        if not values:
            return None
        return cls(float(np.median(values)), min(values), max(values))


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


def engine_rows(plans: Sequence[PlannedCase], runs: Sequence[BenchRun]) -> list[EngineRow]:
    """Return a row per application and scheduler, in the order of the plans."""
    return [_row(planned, runs) for planned in plans]


def _row(planned: PlannedCase, every: Sequence[BenchRun]) -> EngineRow:
    alike = [r for r in every if r.application == planned.application]
    runs = [r for r in alike if r.scheduler == planned.scheduler]
    measured = {r.round: r.measured_s for r in runs}

    def over(name: str) -> Spread | None:
        if name == planned.scheduler:
            return None
        others = {r.round: r.measured_s for r in alike if r.scheduler == name}
        return Spread.of([others[k] / measured[k] for k in measured if k in others])

    return EngineRow(
        planned.application,
        planned.scheduler,
        len(runs),
        planned.planned_s,
        planned.planning_s,
        Spread.of(list(measured.values())),
        tuple(100 * (planned.planned_s / r.measured_s - 1) for r in runs),
        tuple(100 * (r.foreseen_s / r.measured_s - 1) for r in runs if r.foreseen_s is not None),
        Spread.of([r.engine_starts for r in runs]),
        Spread.of([r.load_s for r in runs]),
        Spread.of([r.idle_share for r in runs if r.idle_share is not None]),
        over(MAX_HEURISTIC),
        over(MIN_HEURISTIC),
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
