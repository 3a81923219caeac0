"""Applications times schedulers: what each plan takes, planned and on lengths it did not see."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from samullm_plugin.errors import InputError, PlanError, PluginError
from samullm_plugin.host.manager import PluginHost
from samullm_plugin.model.plan import Plan
from samullm_plugin.model.problem import Problem
from samullm_plugin.model.result import PlanResult, PlanStatus
from samullm_plugin.planning.planner import PlanningOptions, make_plan
from samullm_plugin.rules.bounds import lower_bound
from samullm_plugin.simulator import PlanSimulator

MAX_HEURISTIC, MIN_HEURISTIC = "max-heuristic", "min-heuristic"


@dataclass(frozen=True, slots=True)
class HiddenDraw:
    """One world in which plans are carried out.

    Attributes:
        label: ``same`` (other draws of the planner's own distribution) or the name of a shift.
        problem: the same application and costs with these lengths.
    """

    label: str
    problem: Problem


@dataclass(frozen=True, slots=True)
class BenchCase:
    """One application on one cluster.

    Attributes:
        application: what was asked for, such as ``ensembling:requests=1000``.
        num_gpus: devices.
        problem: what schedulers see.
        hidden: the worlds their plans are carried out in.
        provenance: by model, what its latency rests on.
    """

    application: str
    num_gpus: int
    problem: Problem
    hidden: tuple[HiddenDraw, ...]
    provenance: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class BenchRow:
    """One scheduler on one case; times in seconds.

    Attributes:
        application: of the case.
        num_gpus: of the case.
        scheduler: its name.
        status: what the scheduler proved of its plan; None if it made none.
        note: why there is no plan, or what the figures leave out.
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
    on_start: Callable[[str], None] = lambda name: None,
) -> list[BenchRow]:
    """Let each scheduler plan a case, and carry its plan out on the hidden lengths.

    A scheduler that fails gets a row that says so; the others are not affected. Every scheduler
    starts from an empty cache, so that planning times can be compared.

    Args:
        host: the plugins.
        case: the instance.
        schedulers: names.
        options: planning options by scheduler.
        on_start: told the name of each scheduler as it starts.
    """
    rows = []
    simulators = [(draw.label, PlanSimulator(draw.problem)) for draw in case.hidden]
    bound_s = float(np.mean([lower_bound(case.problem, s).value_s for s in case.problem.scenarios]))
    for name in schedulers:
        on_start(name)
        row = {"application": case.application, "num_gpus": case.num_gpus, "scheduler": name}
        try:
            result = make_plan(host, case.problem, name, options(name))
            rows.append(_row(case, name, result, simulators))
        except (InputError, PlanError, PluginError) as error:
            failed = not isinstance(error, InputError)
            rows.append(BenchRow(**row, note=str(error), failed=failed, bound_s=bound_s))  # type: ignore[arg-type]  # three strings and a number
    return _with_speedups(rows)


def _row(
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


def _with_speedups(rows: list[BenchRow]) -> list[BenchRow]:
    """Return the rows with their speedups over the two heuristics, planning included."""
    from dataclasses import replace

    totals = {r.scheduler: r.total_s for r in rows}

    def over(name: str, row: BenchRow) -> float | None:
        other = totals.get(name)
        if other is None or row.total_s is None or row.scheduler == name:
            return None
        return other / row.total_s

    return [
        replace(r, speedup_max=over(MAX_HEURISTIC, r), speedup_min=over(MIN_HEURISTIC, r))
        for r in rows
    ]
