"""What a run needs before it starts: executor, prompts, forecast, log; checked."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from samullm_plugin.app.loaded import LoadedApplication
from samullm_plugin.app.spec import PlannerSection
from samullm_plugin.errors import InputError
from samullm_plugin.host.interfaces.executor import Executor
from samullm_plugin.host.interfaces.observer import RunEvent, RunInfo
from samullm_plugin.host.manager import PluginHost
from samullm_plugin.model.cluster import Cluster
from samullm_plugin.model.plan import Plan
from samullm_plugin.model.problem import Problem
from samullm_plugin.model.result import PlanTrace
from samullm_plugin.planning.building import sample_scenarios
from samullm_plugin.planning.instances import Instance
from samullm_plugin.planning.policies import planned_policy
from samullm_plugin.planning.this_machine import check_runnable, check_stages
from samullm_plugin.run.coordinator import Coordinator
from samullm_plugin.run.engine_failures import RunOptions
from samullm_plugin.run.journal import Journal
from samullm_plugin.run.length_prompts import LengthPrompts, SampledPrompts, TokenPrompts
from samullm_plugin.run.log import RunLog
from samullm_plugin.run.prompts import PromptBuilder
from samullm_plugin.run.reuse import NO_REUSE, ReuseOptions
from samullm_plugin.run.table_files import check_output
from samullm_plugin.run.text_prompts import TextPrompts
from samullm_plugin.run.view import Replanning
from samullm_plugin.simulator import PlanSimulator
from samullm_plugin.simulator.runs import PolicyCall

Listener = Callable[[RunEvent], None]


@dataclass(frozen=True, slots=True, eq=False)
class RunSetup:
    """Everything a run needs.

    Attributes:
        host: the plugins.
        loaded: the application with its texts.
        instance: its problem and where the figures come from.
        executor: name of the executor.
        executor_options: its options.
        directory: where the run keeps its files.
        replanner: may replace the plan; None: it is kept.
        options: limits.
        listener: called with each event.
        on_start: called with the coordinator before it runs.
        truth: output lengths (its first length scenario) and, on executors that imitate engines,
            costs that hold in this run. Engines that compute get prompts of random tokens and
            generate as much. None: imitated lengths are drawn, others are the engines' affair.
        reuse: where outputs of equal requests are looked for.
        remaining: the problem without what is found there, as it was planned; None: all of it.
    """

    host: PluginHost
    loaded: LoadedApplication
    instance: Instance
    executor: str
    directory: Path
    executor_options: Mapping[str, object] = field(default_factory=dict)
    replanner: Replanning | None = None
    options: RunOptions = field(default_factory=RunOptions)
    listener: Listener | None = None
    on_start: Callable[[Coordinator], None] | None = None
    truth: Problem | None = None
    reuse: ReuseOptions = NO_REUSE
    remaining: Problem | None = None


def prepare(setup: RunSetup) -> tuple[Executor, PromptBuilder]:
    """Return the executor and where the requests come from, checked before anything starts."""
    executor = setup.host.create("executor", setup.executor, dict(setup.executor_options))
    require_able(executor, setup.instance.planner, setup.instance.problem.cluster)
    check_stages(executor, setup.instance.problem, setup.instance.planner)
    check_runnable(executor, setup.loaded)
    check_output(setup.loaded)
    if not imitates(executor):
        if setup.truth is not None:
            seed = setup.instance.planner.seed
            return executor, TokenPrompts(setup.truth.scenarios[0], seed)
        return executor, TextPrompts(setup.loaded, setup.instance.problem.app)
    truth = setup.truth or hidden_truth(setup)
    executor.imitate(truth)
    if setup.loaded.sources is None:
        return executor, LengthPrompts(truth.scenarios[0])
    app = setup.instance.problem.app
    return executor, SampledPrompts(truth.scenarios[0], setup.loaded, app)


def require_able(executor: Executor, planner: PlannerSection, cluster: Cluster | None) -> None:
    """Refuse what plans may use on an executor that does not have it.

    Args:
        executor: the executor.
        planner: may ask for prepared starts and sleeping engines.
        cluster: may have GPUs that engines share; None: the application names none.

    Raises:
        InputError: naming the field and the remedy.
    """
    if cluster and cluster.cards_if_shared and not executor.can_share_gpus:
        raise InputError(
            f"cluster.engines_per_gpu is above 1, but executor {executor.name} has one engine on a "
            "GPU at a time; leave it out, or take another executor, such as vllm"
        )
    if planner.prepared_starts and not executor.can_prepare:
        raise InputError(
            f"planner.prepared_starts is true, but executor {executor.name} with these options "
            "prepares no engine starts; leave it out, or take another executor or start_method"
        )
    if planner.sleeping_engines and not executor.can_sleep:
        raise InputError(
            f"planner.sleeping_engines is true, but executor {executor.name} with these options "
            "cannot put engines to sleep; leave it out, or take another executor (vllm on GPUs: "
            "with its option sleep_mode)"
        )


def imitates(executor: Executor) -> bool:
    """Return whether an executor takes lengths from a truth instead of generating tokens."""
    return type(executor).imitate is not Executor.imitate


def hidden_truth(setup: RunSetup) -> Problem:
    """Return the lengths that are true in an imitated run.

    Those known beforehand, else a draw of its own from the estimator: the plan has not seen it.
    """
    problem = setup.instance.problem
    if setup.loaded.output_tokens is not None:
        return problem.with_scenarios(problem.scenarios[:1])
    rng = np.random.default_rng([setup.instance.planner.seed, 29])
    return problem.with_scenarios(sample_scenarios(problem.app, setup.instance.estimator, rng, 1))


def planned_trace(setup: RunSetup, plan: Plan) -> PlanTrace:
    """Return the plan's simulation in the length scenario nearest to the mean makespan."""
    problem = setup.remaining or setup.instance.problem
    traces = PlanSimulator(problem, policy=policy_of(setup)).simulate(plan)
    makespans = np.array([t.makespan_s for t in traces])
    return traces[int(np.argmin(np.abs(makespans - makespans.mean())))]


def policy_of(setup: RunSetup) -> PolicyCall | None:
    """Return the request policy of a run; None: first come, first served."""
    return planned_policy(setup.host, setup.instance.planner, setup.instance.problem)


def open_log(setup: RunSetup, journal: Journal) -> RunLog:
    """Return the log of a run, with its listener."""
    name = setup.directory.resolve().name
    info = RunInfo(name, setup.loaded.app.name, setup.executor, setup.directory)
    log = RunLog(info, journal, setup.host)
    if setup.listener is not None:
        log.add_listener(setup.listener)
    return log
