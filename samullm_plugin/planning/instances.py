"""From an application as users name it to the problem their planner section asks for."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from samullm_plugin.app.loaded import LoadedApplication
from samullm_plugin.app.spec import PlannerSection
from samullm_plugin.checkpoints.gpus import bundled_gpu
from samullm_plugin.errors import InputError
from samullm_plugin.host.interfaces.latency import LatencyModel
from samullm_plugin.host.interfaces.length import LengthEstimator
from samullm_plugin.host.manager import PluginHost
from samullm_plugin.model.cluster import Cluster, Gpu
from samullm_plugin.model.problem import Problem
from samullm_plugin.model.result import PlanResult
from samullm_plugin.model.shared_gpus import Sharing, share_gpus
from samullm_plugin.planning.best_known import best_known, seen_lengths
from samullm_plugin.planning.building import build_problem
from samullm_plugin.planning.estimators import make_latency_model, make_length_estimator
from samullm_plugin.planning.planner import PlanningOptions
from samullm_plugin.planning.policies import named_policy, offered_policies, planned_policy
from samullm_plugin.planning.this_machine import local_devices
from samullm_plugin.rules.fusion import fuse_chains, fuse_groups
from samullm_plugin.rules.repeats import with_repeats
from samullm_plugin.rules.sharing import shared_problem
from samullm_plugin.simulator import PlanSimulator


@dataclass(frozen=True, slots=True, eq=False)
class Instance:
    """A problem and where its figures come from.

    Attributes:
        problem: what schedulers see.
        estimator: where the lengths come from.
        latency_model: where the costs come from.
        planner: how it is planned.
        policy_chosen: the planner's request policy was chosen with a plan, not asked for.
    """

    problem: Problem
    estimator: LengthEstimator
    latency_model: LatencyModel
    planner: PlannerSection
    policy_chosen: bool = False

    @property
    def policy_free(self) -> bool:
        """Return whether plans may choose the request policy: nobody has asked for one."""
        return self.planner.request_policy is None or self.policy_chosen

    @property
    def offered_policies(self) -> tuple[str, ...]:
        """Return the request policies that may be chosen with a plan: none if one is asked for."""
        chosen = self.planner.request_policy
        return offered_policies(self.problem.app) if chosen is None else ()

    @property
    def policy_name(self) -> str | None:
        """Return the name of the planner's request policy, if it has one."""
        chosen = self.planner.request_policy
        return None if chosen is None else chosen.type

    def planning_options(
        self, host: PluginHost, options: Mapping[str, object] | None = None
    ) -> PlanningOptions:
        """Return how the planner makes a plan of it.

        Args:
            host: the plugins.
            options: the scheduler's; None: its defaults.
        """
        return PlanningOptions(
            options=options or {},
            seed=self.planner.seed,
            budget_s=self.planner.budget_s,
            policies=self.offered_policies,
            simulator_of=partial(self.simulator, host),
        )

    def as_planned(self, result: PlanResult) -> Instance:
        """Return the instance that a plan is of: with the nodes and the policy it has chosen."""
        made = self
        if result.shared:
            made = replace(made, problem=shared_problem(made.problem, result.shared))
        if result.request_policy is not None:
            made = made.with_policy(result.request_policy)
        return made

    def with_policy(self, name: str | None) -> Instance:
        """Return the instance with the request policy that was chosen with a plan, or with none."""
        chosen = {"request_policy": None if name is None else named_policy(name)}
        return replace(self, planner=self.planner.model_copy(update=chosen), policy_chosen=True)

    def with_stored_policy(self, host: PluginHost, name: str | None, path: Path) -> Instance:
        """Return the instance with the policy that was chosen with a plan, if none is asked for.

        Args:
            host: the plugins.
            name: the policy; None: none was chosen.
            path: file of the plan, for messages.

        Raises:
            InputError: if that policy is not installed.
        """
        if self.planner.request_policy is not None:
            return self
        if name is not None:
            try:
                host.resolve("request-policy", name)
            except InputError as error:
                raise InputError(f"{path}: request_policy: {error}") from error
        return self.with_policy(name)

    def simulator(self, host: PluginHost, problem: Problem | None = None) -> PlanSimulator:
        """Return a simulator that honours the planner's request policy.

        Args:
            host: the plugins.
            problem: the same application with other lengths; None: the instance's own.

        Raises:
            InputError: for an unknown policy or wrong options.
        """
        problem = problem or self.problem
        return PlanSimulator(problem, policy=planned_policy(host, self.planner, problem))


def cluster_of(
    loaded: LoadedApplication, gpus: int | None, host: PluginHost | None = None
) -> Cluster:
    """Return the application's cluster, or another number of GPUs of its first kind.

    Of several machines so many are taken, the last in part, with the GPUs that they have.

    Args:
        loaded: the application.
        gpus: the number; None: as the application says.
        host: asked for this machine's devices where the application names none.

    Raises:
        InputError: if there is neither a cluster nor a number, or the number is below one.
    """
    if gpus is None:
        if loaded.cluster is None:
            here = None if host is None or loaded.sources is None else local_devices(host)
            if here is not None:
                return here[1]
            where = loaded.path or f"application {loaded.app.name}"
            raise InputError(
                f"{where}: it names no cluster; add a `cluster` section, or give --gpus"
            )
        return loaded.cluster
    try:
        gpus = operator.index(gpus)  # numpy's numbers are whole as well
    except TypeError as error:
        raise InputError(f"gpus is {gpus!r}; it must be a whole number") from error
    if gpus < 1:
        raise InputError(f"--gpus is {gpus}; a plan needs at least one GPU")
    if loaded.cluster is None:
        return Cluster.uniform(bundled_gpu("A100-80GB"), gpus, nvlink=2)
    if len(loaded.cluster.machines) > 1:
        return loaded.cluster.with_gpus(gpus)
    pairs, first = max(len(g) for g in loaded.cluster.nvlink_groups), loaded.cluster.gpus[0]
    how = Sharing(first.engines, first.slowdown)
    kind = Gpu(first.name, first.memory_bytes * first.engines)
    whole = Cluster.uniform(kind, gpus, nvlink=pairs)
    whole = replace(whole, host_memory_bytes=loaded.cluster.host_memory_bytes)
    return share_gpus(whole, [how] * gpus)


def unfused(planner: PlannerSection) -> PlannerSection:
    """Return the same planner for the application's nodes as they were written."""
    return planner.model_copy(update={"fusion": False})


def _require_preparable(problem: Problem, loaded: LoadedApplication) -> None:
    """Refuse prepared starts that were asked for where none can be.

    Raises:
        InputError: naming what is in the way.
    """
    asked = _asked(loaded, "prepared_starts")
    loads = [c.load for costs in problem.costs for c in costs.values() if c.load.prepare_s]
    if not loads:
        raise InputError(
            f"{asked}, but the latency model knows of no part of an engine start that needs no "
            "device; leave it out"
        )
    least = min(load.prepared_bytes for load in loads)
    _require_room(problem, asked, "no prepared engine", least, "prepared_starts")


def _require_sleepers(problem: Problem, loaded: LoadedApplication, *, fusion: bool) -> None:
    """Refuse engines that sleep where that was asked for and none can.

    Raises:
        InputError: naming what is in the way.
    """
    asked = _asked(loaded, "sleeping_engines")
    if not fusion:
        raise InputError(
            f"{asked}, but with fusion: false no node goes on with engines of another; leave one "
            "of them out"
        )
    loads = [c.load for costs in problem.costs for c in costs.values() if c.load.can_sleep]
    if not loads:
        raise InputError(
            f"{asked}, but the latency model knows of no engine how long it takes to sleep and "
            "wake; leave it out"
        )
    least = min(load.asleep_bytes for load in loads)
    _require_room(problem, asked, "no engine that sleeps", least, "sleeping_engines")


def _asked(loaded: LoadedApplication, option: str) -> str:
    """Return who asks for an option of the planner, as messages begin."""
    return f"{loaded.path or f'application {loaded.app.name}'}: planner.{option} is true"


def _require_room(problem: Problem, asked: str, what: str, least: float, option: str) -> None:
    """Refuse an option for which no machine's host has the least memory that it takes.

    Raises:
        InputError: with both figures.
    """
    most = max(problem.cluster.host_bytes(m) for m in range(len(problem.cluster.machines)))
    if least > most:
        raise InputError(
            f"{asked}, but cluster.host_memory_gib {most / 2**30:.1f} has room for {what}, of "
            f"which the smallest needs {least / 2**30:.1f} GiB; give more, or leave {option} out"
        )


def make_instance(
    host: PluginHost,
    loaded: LoadedApplication,
    planner: PlannerSection | None = None,
    *,
    gpus: int | None = None,
    fused: Mapping[str, Sequence[str]] | None = None,
) -> Instance:
    """Build the problem of an application.

    Args:
        host: the plugins.
        loaded: the application.
        planner: how to plan; the application's own section if None.
        gpus: overrides the cluster's number of GPUs.
        fused: nodes to fuse, by the name of what they become, as a plan knows them; None: those
            that can be, unless the planner says otherwise.

    Raises:
        InputError: for unknown names or options, lengths or latencies nobody knows, or a model that
            fits nowhere.
        PluginError: if an estimator or a latency model breaks its interface's rules.
    """
    how = planner or loaded.planner
    cluster = cluster_of(loaded, gpus, host)
    app, known = with_repeats(loaded.app), loaded.output_tokens
    if fused is not None:
        made = fuse_groups(app, fused)
    else:
        made = fuse_chains(app, cluster.num_gpus) if how.fusion else fuse_groups(app, {})
    app, known = made.app, None if known is None else made.joined(known)
    estimator = make_length_estimator(host, how.length_estimator.type, how.length_estimator.options)
    if "length_estimator" not in how.model_fields_set and (seen := seen_lengths(app)):
        estimator = estimator.fit(seen)
    latency: LatencyModel = best_known(host)
    if how.latency_model is not None:
        latency = make_latency_model(host, how.latency_model.type, how.latency_model.options)
    problem = build_problem(
        app,
        cluster,
        estimator,
        latency,
        scenarios=how.scenarios,
        rng=np.random.default_rng(how.seed),
        page_cache=how.page_cache,
        true_lengths=known,
        pipeline_parallel_sizes=how.pipeline_parallel_sizes,
        prepared_starts=how.prepared_starts,
        sleeping_engines=how.sleeping_engines,
    )
    if not how.fusion:
        problem = problem.without_shared_engines()
    if how.prepared_starts:
        _require_preparable(problem, loaded)
    if how.sleeping_engines:
        _require_sleepers(problem, loaded, fusion=how.fusion)
    return Instance(problem, estimator, latency, how)
