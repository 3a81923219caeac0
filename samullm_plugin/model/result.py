"""What became of a plan: simulated traces, bounds, and how good it is known to be."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol

import numpy as np

from samullm_plugin.model.parallel import ParallelConfig
from samullm_plugin.model.plan import Plan
from samullm_plugin.model.problem import Problem
from samullm_plugin.model.types import Floats


@dataclass(frozen=True, slots=True)
class EngineSegment:
    """One model on its devices, from the start of its engine to its stop.

    Attributes:
        node: name of the node.
        parallel: parallel sizes.
        devices: devices held.
        stage: stage of the plan it was started in.
        start_s: when the engine start began.
        ready_s: when it could serve (may lie after ``end_s`` if it was stopped while starting).
        end_s: when the devices were free again.
        busy_s: seconds of iterations, summed over its replicas.
        num_finished: requests it finished.
        num_preemptions: recompute preemptions in its engines.
        finished: it ended because the node had finished.
        woken: it was not started, but slept before.
    """

    node: str
    parallel: ParallelConfig
    devices: tuple[int, ...]
    stage: int
    start_s: float
    ready_s: float
    end_s: float
    busy_s: float
    num_finished: int
    num_preemptions: int
    finished: bool
    woken: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class PlanTrace:
    """A plan carried out in one length scenario.

    Attributes:
        makespan_s: when the last request finished.
        segments: engines in order of their start.
        stage_start_s: when each stage of the plan became current.
        node_finish_s: by node index, shape ``(nodes,)``.
        finish_s: per node, when each request finished.
        idle_share: share of all device seconds until the makespan in which no iteration ran
            (engine starts count as idle).
    """

    makespan_s: float
    segments: tuple[EngineSegment, ...]
    stage_start_s: tuple[float, ...]
    node_finish_s: Floats
    finish_s: tuple[Floats, ...]
    idle_share: float


class Timeline(Protocol):
    """What is shown of a plan carried out: a :class:`PlanTrace`, or what was kept of one."""

    @property
    def makespan_s(self) -> float:
        """When the last request finished."""
        ...

    @property
    def segments(self) -> tuple[EngineSegment, ...]:
        """Engines in order of their start."""
        ...

    @property
    def stage_start_s(self) -> tuple[float, ...]:
        """When each stage of the plan became current."""
        ...

    @property
    def idle_share(self) -> float:
        """Share of device seconds without an iteration."""
        ...


class PlanStatus(StrEnum):
    """How good a plan is known to be."""

    OPTIMAL = "optimal"
    FEASIBLE = "feasible"
    HEURISTIC = "heuristic"


@dataclass(frozen=True, slots=True)
class Bound:
    """A proven lower bound.

    Attributes:
        value_s: no plan of the structure takes less.
        structure: for which plans and which durations it holds.
    """

    value_s: float
    structure: str


@dataclass(frozen=True, slots=True, eq=False)
class PlanResult:
    """A verified plan with the host's own figures.

    Attributes:
        scheduler: who made it.
        plan: the plan.
        makespan_s: simulated makespan per length scenario, shape ``(scenarios,)``.
        traces: per scenario.
        lower_bound_s: no plan at all can be faster, per scenario, in the simulation.
        status: how good the scheduler knows its plan to be in its own structure.
        structure_bound: the scheduler's own bound, if it proved one.
        structure_objective_s: the scheduler's own objective for this plan in that structure.
        planning_s: seconds the scheduler took.
        explanation: by node, why it is where it is, if the scheduler says so.
        notes: what the scheduler gave up or left out on the way.
        request_policy: the request policy that was chosen with the plan and that its figures
            assume; None: none was.
        problem: what the plan is of: the problem that was given, or that with nodes that share
            engines.
        shared: by name, the nodes that share engines there, and were several in the problem given.
    """

    scheduler: str
    problem: Problem
    plan: Plan
    makespan_s: Floats
    traces: tuple[PlanTrace, ...]
    lower_bound_s: Floats
    status: PlanStatus
    structure_bound: Bound | None
    structure_objective_s: float | None
    planning_s: float
    explanation: tuple[tuple[str, str], ...] = ()
    notes: tuple[str, ...] = ()
    request_policy: str | None = None
    shared: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def mean_makespan_s(self) -> float:
        """Return the mean simulated makespan over the scenarios."""
        return float(np.mean(self.makespan_s))

    @property
    def gap(self) -> float:
        """Return how far the mean makespan may lie above the optimum, as a share of the bound."""
        bound = float(np.mean(self.lower_bound_s))
        return self.mean_makespan_s / bound - 1.0 if bound > 0 else float("inf")
