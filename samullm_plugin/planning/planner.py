"""From a problem and a scheduler's name to a verified, re-simulated plan.

No scheduler grades itself: the host checks every plan against the rules and simulates it with the
same lengths and latencies for all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from time import monotonic, perf_counter

import numpy as np

from samullm_plugin.errors import PluginError, SamullmError
from samullm_plugin.host.interfaces.scheduler import (
    SchedulingContext,
    SchedulingReport,
    SharingChoice,
    lower_bounds_s,
)
from samullm_plugin.host.isolation import FaultError, IsolatedWorker, digest, import_class
from samullm_plugin.host.manager import PluginHost
from samullm_plugin.host.registration import Registration
from samullm_plugin.host.settings import read_settings
from samullm_plugin.model.plan import Plan
from samullm_plugin.model.problem import Problem
from samullm_plugin.model.result import PlanResult
from samullm_plugin.model.types import Floats
from samullm_plugin.planning.policies import policy_call
from samullm_plugin.rules.sharing import shared_problem, sharing_choices
from samullm_plugin.rules.verify import require_valid
from samullm_plugin.simulator import PlanSimulator

Progress = Callable[[float | None, float | None], None]

MAX_NESTING = 3
"""Schedulers may start from others' plans, and those from others' in turn, but not for ever."""


@dataclass(frozen=True, slots=True)
class PlanningOptions:
    """How to plan.

    Attributes:
        options: the scheduler's own options.
        seed: of its randomness.
        budget_s: seconds an anytime scheduler may use; None: its own default.
        incumbent: a valid plan to start from.
        progress: called with (bound, incumbent) in seconds during a long search.
        third_party_limit_s: seconds after which a third party's scheduler is ended; None: as the
            settings say.
        give_up_s: seconds after which a scheduler that has no plan is given up; None: never.
        policies: request policies that may be chosen with the plan, if the simulator has none.
        simulator_of: makes simulators of problems in which nodes share engines, which a plan may be
            of as well; None: it is of the problem that is given.
    """

    options: Mapping[str, object] = field(default_factory=dict)
    seed: int = 0
    budget_s: float | None = None
    incumbent: Plan | None = None
    progress: Progress | None = None
    third_party_limit_s: float | None = None
    give_up_s: float | None = None
    policies: tuple[str, ...] = ()
    simulator_of: Callable[[Problem], PlanSimulator] | None = None


def make_plan(
    host: PluginHost,
    problem: Problem,
    scheduler: str,
    how: PlanningOptions | None = None,
    *,
    simulator: PlanSimulator | None = None,
) -> PlanResult:
    """Plan, verify and simulate.

    Args:
        host: the plugins.
        problem: the instance.
        scheduler: name of a stage scheduler.
        how: options.
        simulator: results to reuse; a new one if None.

    Raises:
        InputError: for an unknown name, wrong options, or an instance beyond the scheduler.
        PlanError: if the plan is invalid, with every violation, or cannot finish.
        PluginError: if the scheduler raises or returns something else than a plan.
    """
    how = how or PlanningOptions()
    worlds = _worlds(host, problem, how, simulator)
    start = perf_counter()
    plan, report = _schedule(host, worlds, scheduler, how, depth=0)
    planning_s = perf_counter() - start
    world = next(w for w in worlds if w.groups == report.shared)
    policy = report.request_policy
    traces = (world.simulator if policy is None else world.with_policies[policy]).simulate(plan)
    return PlanResult(
        scheduler=scheduler,
        problem=world.simulator.problem,
        shared=world.groups,
        plan=plan,
        makespan_s=np.array([t.makespan_s for t in traces]),
        traces=traces,
        lower_bound_s=_least_s(worlds),
        status=report.status,
        structure_bound=report.bound,
        structure_objective_s=report.objective_s,
        planning_s=planning_s,
        explanation=tuple(report.explanation.items()),
        notes=tuple(report.notes),
        request_policy=policy,
    )


def bounds_s(host: PluginHost, problem: Problem, how: PlanningOptions | None = None) -> Floats:
    """Return seconds that no plan beats, by length scenario, as plans are printed with."""
    return _least_s(_worlds(host, problem, how or PlanningOptions(), None))


@dataclass(frozen=True, slots=True)
class _World:
    """A problem that a plan may be of.

    Attributes:
        simulator: of the problem.
        with_policies: by request policy, simulators that honour it and share what is known of
            engines.
        groups: nodes that are one here and several in the problem that was given.
    """

    simulator: PlanSimulator
    with_policies: Mapping[str, PlanSimulator] = field(default_factory=dict)
    groups: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def without_pipelines(self) -> _World | None:
        """Return the world without pipeline-parallel sizes that no model needs.

        None if there are none, or if engines run already, which may be of such a size.
        """
        problem = self.simulator.problem
        if self.simulator.running or problem.without_pipelines().costs == problem.costs:
            return None
        policies = {n: s.without_pipelines() for n, s in self.with_policies.items()}
        return _World(self.simulator.without_pipelines(), policies, self.groups)

    @classmethod
    def of(
        cls,
        host: PluginHost,
        simulator: PlanSimulator,
        policies: tuple[str, ...],
        groups: Mapping[str, tuple[str, ...]] | None = None,
    ) -> _World:
        """Return the world of a simulator, with the policies that may be chosen."""
        problem, made = simulator.problem, {n: host.create("request-policy", n) for n in policies}
        others = {
            n: PlanSimulator(
                problem,
                simulator.cache,
                policy_call(problem.app, policy, problem.scenarios),
                simulator.running,
                simulator.asleep,
            )
            for n, policy in made.items()
        }
        return cls(simulator, others, groups or {})

    def lower_bounds_s(self) -> Floats:
        """Return seconds that no plan beats, whatever policy is chosen, by length scenario."""
        return lower_bounds_s(self.simulator, self.with_policies)


def _worlds(
    host: PluginHost, problem: Problem, how: PlanningOptions, simulator: PlanSimulator | None
) -> list[_World]:
    """Return the problem, and others that a shipped scheduler may choose instead."""
    worlds = [_World.of(host, simulator or PlanSimulator(problem), how.policies)]
    if how.simulator_of is not None:
        for groups in sharing_choices(problem):
            other = how.simulator_of(shared_problem(problem, groups))
            worlds.append(_World.of(host, other, how.policies, groups))
    return worlds


def _least_s(worlds: Sequence[_World]) -> Floats:
    """Return seconds that no plan of any of these beats, by length scenario."""
    return np.asarray(np.min([w.lower_bounds_s() for w in worlds], axis=0))


def _schedule(
    host: PluginHost, worlds: Sequence[_World], name: str, how: PlanningOptions, depth: int
) -> tuple[Plan, SchedulingReport]:
    """Return a verified plan and what its scheduler says about it.

    Args:
        host: the plugins.
        worlds: the problem, and others that a shipped scheduler may choose instead.
        name: of the scheduler.
        how: options.
        depth: how many schedulers wait for it.
    """
    registration = host.resolve("scheduler", name)
    origin = registration.provenance
    problem = worlds[0].simulator.problem
    if not origin.shipped:
        limit_s = how.third_party_limit_s or read_settings().third_party_limit_s
        plan, report = _schedule_isolated(registration, problem, how, limit_s)
        require_valid(problem, plan, f"scheduler {origin.qualified_name}")
        return plan, report
    instance = host.create("scheduler", name, dict(how.options))
    context = _context(host, worlds[0], name, how, depth)
    alone = replace(how, incumbent=None)  # what there is, is a plan of the problem itself
    context.sharing = tuple(
        SharingChoice(w.groups, _context(host, w, name, alone, depth)) for w in worlds[1:]
    )
    try:
        plan = instance.schedule(problem, context)
    except SamullmError:
        raise
    except Exception as error:  # plugin code
        text = f"{type(error).__name__}: {error}"
        raise PluginError(f"scheduler {origin.qualified_name} raised {text}") from error
    if not isinstance(plan, Plan):
        kind = type(plan).__name__
        raise PluginError(f"scheduler {origin.qualified_name} returned a {kind}, not a Plan")
    shared = context.report.shared
    chosen = next((w.simulator.problem for w in worlds if w.groups == shared), problem)
    require_valid(chosen, plan, f"scheduler {origin.qualified_name}")
    return plan, context.report


def _context(
    host: PluginHost, world: _World, name: str, how: PlanningOptions, depth: int
) -> SchedulingContext:
    """Return what a scheduler may use."""
    simulator = world.simulator
    problem = simulator.problem

    def schedule_with(
        other: str,
        /,
        *,
        options: Mapping[str, object] | None = None,
        budget_s: float | None = None,
        give_up_s: float | None = None,
        scenarios: int | None = None,
    ) -> Plan:
        if depth + 1 >= MAX_NESTING:
            raise PluginError(f"scheduler {name}: schedulers call each other more than twice deep")
        nested = PlanningOptions(
            options={} if options is None else options,
            seed=how.seed,
            budget_s=how.budget_s if budget_s is None else budget_s,
            give_up_s=give_up_s,
        )
        part = simulator
        if scenarios is not None and scenarios < len(problem.scenarios):
            part = simulator.with_first_scenarios(scenarios)
        return _schedule(host, [_World(part)], other, nested, depth + 1)[0]

    single = world.without_pipelines() if depth == 0 else None
    smaller = None
    if single is not None:
        smaller = _context(host, single, name, replace(how, incumbent=None), depth)
    now_s = monotonic()
    return SchedulingContext(
        simulator,
        np.random.default_rng(how.seed),
        deadline_s=float("inf") if how.budget_s is None else now_s + how.budget_s,
        give_up_s=float("inf") if how.give_up_s is None else now_s + how.give_up_s,
        incumbent=how.incumbent,
        schedule_with=schedule_with,
        progress=how.progress,
        with_policies=world.with_policies,
        without_pipelines=smaller,
    )


def _schedule_isolated(
    registration: Registration, problem: Problem, how: PlanningOptions, limit_s: float
) -> tuple[Plan, SchedulingReport]:
    """Let a third party's scheduler plan in a child process.

    Raises:
        PluginError: if it raises, is too slow, changes the problem or returns no plan.
        InputError: if the instance is beyond it.
    """
    origin, cls = registration.provenance, registration.value
    worker = IsolatedWorker()
    try:
        return worker.call(
            f"scheduler {origin.qualified_name}",
            _schedule_in_child,
            limit_s,
            cls.__module__,
            cls.__qualname__,
            dict(how.options),
            problem,
            how.seed,
            how.budget_s,
        )
    finally:
        worker.close()


def _schedule_in_child(
    module: str,
    qualname: str,
    options: Mapping[str, object],
    problem: Problem,
    seed: int,
    budget_s: float | None,
) -> tuple[Plan, SchedulingReport]:
    """Plan with a new instance of a scheduler, and see to it that it changes nothing."""

    def schedule_with(
        name: str,
        /,
        *,
        options: Mapping[str, object] | None = None,
        budget_s: float | None = budget_s,
        give_up_s: float | None = None,
        scenarios: int | None = None,
    ) -> Plan:
        how = PlanningOptions(options or {}, seed, budget_s, give_up_s=give_up_s)
        part = problem.with_scenarios(problem.scenarios[:scenarios])
        return make_plan(PluginHost.from_settings(), part, name, how).plan

    context = SchedulingContext(
        PlanSimulator(problem),
        np.random.default_rng(seed),
        deadline_s=float("inf") if budget_s is None else monotonic() + budget_s,
        schedule_with=schedule_with,
    )
    cls = import_class(module, qualname)
    before = digest(problem)
    plan = cls(cls.Config.model_validate(dict(options))).schedule(problem, context)
    if digest(problem) != before:
        raise FaultError("changed the problem it was given")
    if not isinstance(plan, Plan):
        raise FaultError(f"returned a {type(plan).__name__}, not a Plan")
    return plan, context.report
