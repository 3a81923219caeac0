"""What the bench says of a scheduler on a case: its plan, simulated on hidden lengths.

A case is planned once (:func:`try_plan`) and compared with the baselines' plans (:func:`speedups`),
also where plans are run (:mod:`samullm_plugin.bench.engine_bench`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from samullm_plugin.bench.cases import BenchCase, CaseSettings, make_case
from samullm_plugin.errors import InputError, PlanError, PluginError, SamullmError
from samullm_plugin.host.manager import PluginHost
from samullm_plugin.model.plan import Plan
from samullm_plugin.model.problem import Problem
from samullm_plugin.model.result import PlanResult, PlanStatus
from samullm_plugin.planning.planner import PlanningOptions, bounds_s, make_plan
from samullm_plugin.planning.policies import offered_policies, policy_call
from samullm_plugin.simulator import PlanSimulator

Baselines = Mapping[str, str]
BASELINES: Baselines = {"speedup_max": "max-heuristic", "speedup_min": "min-heuristic"}
"""By field of the rows, the scheduler that the others are compared with unless told otherwise."""


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


@dataclass(frozen=True, slots=True, eq=False)
class Planned:
    """What came of asking a scheduler for a plan.

    Attributes:
        result: the plan and its figures; None if there is none.
        note: why there is none.
        failed: a plugin is to blame for that.
    """

    result: PlanResult | None
    note: str = ""
    failed: bool = False


def try_plan(
    host: PluginHost,
    problem: Problem,
    scheduler: str,
    how: PlanningOptions,
    simulator: PlanSimulator | None = None,
) -> Planned:
    """Return a scheduler's plan, or why it has none: one that fails does not affect the others."""
    try:
        return Planned(make_plan(host, problem, scheduler, how, simulator=simulator))
    except (InputError, PlanError, PluginError) as error:
        return Planned(None, str(error), not isinstance(error, InputError))


def speedups(
    seconds: Mapping[str, Mapping[int, float]], scheduler: str, baselines: Baselines
) -> dict[str, Spread]:
    """Return by how much a scheduler beats each baseline, round by round.

    Args:
        seconds: by scheduler and round.
        scheduler: one of them; it is not compared with itself.
        baselines: by the name of the comparison, a scheduler.
    """
    mine, found = seconds[scheduler], {}
    for field_, name in baselines.items():
        other = seconds.get(name, {})
        ratios = [other[k] / s for k, s in mine.items() if k in other]
        if name != scheduler and (spread := Spread.of(ratios)) is not None:
            found[field_] = spread
    return found


@dataclass(frozen=True, slots=True)
class BenchRow:
    """One scheduler on one case in simulation; times in seconds.

    Attributes:
        application: of the case.
        num_gpus: of the case.
        scheduler: its name.
        status: what the scheduler proved of its plan; None if it made none.
        note: why there is no plan, what the figures leave out, or the request policy chosen.
        failed: a plugin is to blame for that.
        simulated_s: makespan on the planner's lengths, mean of its scenarios.
        realised_s: makespan on hidden lengths of the same distribution, mean of the draws.
        shifted_s: the same by shift.
        planning_s: what the scheduler took.
        total_s: realised plus planning.
        idle_share: share of device seconds without an iteration, in the hidden draws.
        bound_s: no plan takes less on the planner's lengths.
        gap: of ``simulated_s`` to ``bound_s``, as a share of the bound.
        structure: for which plans the scheduler's own bound holds.
        structure_bound_s: that bound.
        structure_objective_s: the plan in that structure's own terms.
        speedup_max: total of the max-heuristic over this total.
        speedup_min: total of the min-heuristic over this total.
        stages: stages of the plan.
    """

    application: str
    num_gpus: int
    scheduler: str
    status: PlanStatus | None = None
    note: str = ""
    failed: bool = False
    simulated_s: float | None = None
    realised_s: float | None = None
    shifted_s: dict[str, float] = field(default_factory=dict)
    planning_s: float | None = None
    total_s: float | None = None
    idle_share: float | None = None
    bound_s: float | None = None
    gap: float | None = None
    structure: str | None = None
    structure_bound_s: float | None = None
    structure_objective_s: float | None = None
    speedup_max: float | None = None
    speedup_min: float | None = None
    stages: int | None = None


def run_case(
    host: PluginHost,
    case: BenchCase,
    schedulers: Sequence[str],
    options: Callable[[str], PlanningOptions],
    *,
    baselines: Baselines = BASELINES,
    on_start: Callable[[str], None] = lambda name: None,
) -> list[BenchRow]:
    """Let each scheduler plan a case, and carry its plan out on the hidden lengths.

    A scheduler that fails gets a row that says so; the others are not affected. Every scheduler
    starts from an empty cache, so that planning times can be compared. A request policy that it
    chooses with its plan is given lengths that the planner drew, as in a run.

    Args:
        host: the plugins.
        case: the instance.
        schedulers: names.
        options: planning options by scheduler.
        baselines: what the others are compared with.
        on_start: called with the name of each scheduler as it starts.
    """
    rows = []
    simulators = [(draw.label, PlanSimulator(draw.problem)) for draw in case.hidden]
    for name in schedulers:
        on_start(name)
        how = replace(options(name), policies=offered_policies(case.problem.app))
        planned = try_plan(host, case.problem, name, how)
        if planned.result is None:
            rows.append(
                BenchRow(
                    case.application,
                    case.num_gpus,
                    name,
                    note=planned.note,
                    failed=planned.failed,
                    bound_s=float(np.mean(bounds_s(host, case.problem, how))),
                )
            )
        else:
            policy = planned.result.request_policy
            chosen = simulators if policy is None else _honouring(host, policy, case)
            rows.append(_simulated_row(case, name, planned.result, chosen))
    totals = {r.scheduler: {0: r.total_s} for r in rows if r.total_s is not None}
    return [_compared(r, totals, baselines) for r in rows]


def _honouring(host: PluginHost, policy: str, case: BenchCase) -> list[tuple[str, PlanSimulator]]:
    """Return simulators of the hidden draws that honour a policy."""
    found = []
    for draw in case.hidden:
        told = [case.problem.scenarios[0]] * len(draw.problem.scenarios)
        call = policy_call(draw.problem.app, host.create("request-policy", policy), told)
        found.append((draw.label, PlanSimulator(draw.problem, policy=call)))
    return found


def _compared(
    row: BenchRow, totals: Mapping[str, Mapping[int, float]], baselines: Baselines
) -> BenchRow:
    """Return a row with its speedups, planning included."""
    if row.scheduler not in totals:
        return row
    found: dict[str, Any] = {
        k: s.median for k, s in speedups(totals, row.scheduler, baselines).items()
    }
    return replace(row, **found)


def _simulated_row(
    case: BenchCase,
    name: str,
    result: PlanResult,
    simulators: Iterable[tuple[str, PlanSimulator]],
) -> BenchRow:
    """Return the figures of one plan."""
    realised: dict[str, list[float]] = {}
    idle: list[float] = []
    for label, simulator in simulators:
        makespans, shares = carry_out(simulator, result.plan)
        realised.setdefault(label, []).extend(makespans)
        if label == "same":
            idle.extend(shares)
    same = float(np.mean(realised["same"])) if "same" in realised else None
    structure = result.structure_bound
    return BenchRow(
        application=case.application,
        num_gpus=case.num_gpus,
        scheduler=name,
        status=result.status,
        note="" if result.request_policy is None else f"request policy {result.request_policy}",
        simulated_s=result.mean_makespan_s,
        realised_s=same,
        shifted_s={k: float(np.mean(v)) for k, v in realised.items() if k != "same"},
        planning_s=result.planning_s,
        total_s=None if same is None else same + result.planning_s,
        idle_share=float(np.mean(idle)) if idle else None,
        bound_s=float(np.mean(result.lower_bound_s)),
        gap=result.gap,
        structure=None if structure is None else structure.structure,
        structure_bound_s=None if structure is None else structure.value_s,
        structure_objective_s=result.structure_objective_s,
        stages=len(result.plan.stages),
    )


def carry_out(simulator: PlanSimulator, plan: Plan) -> tuple[list[float], list[float]]:
    """Return makespans and idle shares of a plan in every scenario of a simulator."""
    traces = simulator.simulate(plan)
    return [t.makespan_s for t in traces], [t.idle_share for t in traces]


def warm_up(host: PluginHost, schedulers: Sequence[str]) -> None:
    """Let the shipped schedulers plan two small instances, so that all are timed alike afterwards.

    After an installation the first call of anything compiled would otherwise pay for compiling it.
    What goes wrong here goes wrong again where it is reported.
    """
    shipped = [n for n in schedulers if host.resolve("scheduler", n).provenance.shipped]
    for text in ("small-1", "small-4") if shipped else ():
        with suppress(SamullmError):
            case = make_case(host, text, CaseSettings(seeds=1, shifts=()))
            run_case(host, case, shipped, lambda name: PlanningOptions())
