"""Stage schedulers: from a problem to a plan."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from time import monotonic
from typing import Protocol

import numpy as np

from samullm_plugin.host.interfaces.plugin import Plugin
from samullm_plugin.model.plan import Plan
from samullm_plugin.model.problem import Problem
from samullm_plugin.model.result import Bound, PlanStatus, PlanTrace
from samullm_plugin.model.types import Floats
from samullm_plugin.simulator import PlanSimulator


@dataclass(slots=True)
class SchedulingReport:
    """What a scheduler says about its own plan.

    Attributes:
        status: how good it knows the plan to be in its own structure.
        bound: a bound it proved, with the structure for which it holds.
        objective_s: its own objective for the returned plan in that structure.
        explanation: by node, why it is where it is.
        notes: what was given up or left out on the way, for people.
        request_policy: one of the context's policies, with which the plan is to be carried out;
            None: requests run as they come.
        shared: groups of one of the context's sharing choices, whose problem the plan is of; empty:
            it is of the problem itself.
    """

    status: PlanStatus = PlanStatus.HEURISTIC
    bound: Bound | None = None
    objective_s: float | None = None
    explanation: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    request_policy: str | None = None
    shared: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


class ScheduleWith(Protocol):
    """Plans with another scheduler."""

    def __call__(
        self,
        name: str,
        /,
        *,
        options: Mapping[str, object] | None = None,
        budget_s: float | None = None,
        give_up_s: float | None = None,
        scenarios: int | None = None,
    ) -> Plan:
        """Return the verified plan of scheduler ``name``.

        Args:
            name: as users write it.
            options: that scheduler's own.
            budget_s: seconds it may take to improve on its first plan.
            give_up_s: seconds after which a shipped scheduler that has no plan raises
                ``OutOfTimeError``; None: never.
            scenarios: it sees only so many of the length scenarios; None: all.
        """
        ...


@dataclass(slots=True)
class SchedulingContext:
    """What a scheduler may use of the host.

    Attributes:
        simulator: the host's simulator of this problem; its results are reused between calls.
        rng: the only source of randomness.
        deadline_s: on the clock of ``time.monotonic``: anytime schedulers stop by then; inf if
            there is no limit.
        give_up_s: on the same clock: a scheduler without a plan by then raises
            ``OutOfTimeError``; inf unless another scheduler asks and has limited it.
        incumbent: the best valid plan known so far, or None.
        schedule_with: gives the verified plan of another scheduler by its name, so that no plugin
            imports another.
        progress: called with (bound, incumbent) in seconds while a long search runs.
        report: filled in by the scheduler.
        with_policies: by the name of a request policy that may be chosen with the plan, a simulator
            of this problem that honours it.
        without_pipelines: the same for the problem without pipeline-parallel sizes that no model
            needs; its plans are valid here as well. None: there are no such sizes.
        sharing: ways to serve nodes of one checkpoint by the same engines at the same moment; a
            plan of such a problem may be returned instead, with ``report.shared`` set.
    """

    simulator: PlanSimulator
    rng: np.random.Generator
    deadline_s: float = float("inf")
    give_up_s: float = float("inf")
    incumbent: Plan | None = None
    schedule_with: ScheduleWith | None = None
    progress: Callable[[float | None, float | None], None] | None = None
    report: SchedulingReport = field(default_factory=SchedulingReport)
    with_policies: Mapping[str, PlanSimulator] = field(default_factory=dict)
    without_pipelines: SchedulingContext | None = None
    sharing: tuple[SharingChoice, ...] = ()

    @property
    def remaining_s(self) -> float:
        """Return the seconds left until the deadline, at least 0."""
        return max(0.0, self.deadline_s - monotonic())

    def lower_bounds_s(self) -> Floats:
        """Return seconds that no plan beats, whatever policy is chosen, by length scenario."""
        return lower_bounds_s(self.simulator, self.with_policies)

    def simulate(self, plan: Plan) -> tuple[PlanTrace, ...]:
        """Return the plan's traces, one per length scenario."""
        return self.simulator.simulate(plan)

    def mean_makespan_s(self, plan: Plan) -> float:
        """Return the plan's simulated makespan, averaged over the scenarios."""
        return float(np.mean([t.makespan_s for t in self.simulate(plan)]))

    def report_bound(self, value_s: float, structure: str) -> None:
        """State a proven lower bound and for which plans and durations it holds."""
        self.report.bound = Bound(value_s, structure)


@dataclass(slots=True)
class SharingChoice:
    """The same application, in which some nodes are one.

    Attributes:
        groups: by the name of each, the nodes that it is made of.
        context: what a scheduler may use to plan that; its simulator has the problem.
    """

    groups: Mapping[str, tuple[str, ...]]
    context: SchedulingContext


def lower_bounds_s(simulator: PlanSimulator, with_policies: Mapping[str, PlanSimulator]) -> Floats:
    """Return seconds that no plan beats under any of several request policies, by scenario."""
    bounds = [s.lower_bounds_s() for s in (simulator, *with_policies.values())]
    return np.asarray(np.min(bounds, axis=0))


class StageScheduler(Plugin, ABC):
    """Makes a plan.

    The host verifies every plan and simulates it itself, with the same lengths and latencies for
    all schedulers. A complete plugin::

        from samullm_plugin import Assignment, Plan, Stage, StageScheduler, hookimpl


        class OneByOne(StageScheduler):
            '''One model at a time in topological order, each on its smallest configuration.'''

            name = "one-by-one"

            def schedule(self, problem, context):
                stages = []
                for node in problem.app.order:
                    parallel = problem.parallel_configs(node)[0]
                    devices = problem.idle_devices(node, parallel)
                    name = problem.app.nodes[node].name
                    stages.append(Stage((Assignment(name, parallel, devices),)))
                return Plan(tuple(stages))


        @hookimpl
        def register_schedulers(register):
            register(OneByOne)
    """

    @abstractmethod
    def schedule(self, problem: Problem, context: SchedulingContext) -> Plan:
        """Return a valid plan for the problem.

        Args:
            problem: the instance; it must not be changed.
            context: simulator, randomness, deadline, and where to report bounds and reasons.

        Raises:
            InputError: if the instance is beyond this scheduler, naming the limit and what to use
                instead.
        """
