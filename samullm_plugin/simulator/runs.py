"""Node simulations of one problem: prepared together, simulated at once, done only once."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from samullm_plugin.engine import EngineCache, simulate_engines
from samullm_plugin.model.parallel import ParallelConfig
from samullm_plugin.model.problem import Problem
from samullm_plugin.model.types import Floats, Ints
from samullm_plugin.simulator.node_run import (
    NodeJobs,
    NodeRun,
    NodeWork,
    Progress,
    arrivals_after,
    node_jobs,
)

PolicyCall = Callable[[int, int, Ints, "Floats | None", int], tuple["Ints | None", "Ints | None"]]
"""A request policy: from scenario, node, request indices, their arrivals as far as a run can know
them (``node_run.arrivals_known``; None: all are there) and the number of replicas to priorities and
replicas (None: first come, first served; None: in turn). Its answer may depend on nothing else."""

MAX_KEPT_REQUESTS = 20_000_000
"""Requests, summed over the kept node simulations, from which the oldest are dropped."""


@dataclass(frozen=True, slots=True, eq=False)
class NodeQuery:
    """A node to be simulated from some progress to its end.

    Attributes:
        scenario: index of the length scenario.
        node: index of the node.
        parallel: parallel sizes.
        device: one of the devices, for their kind.
        base: what is done already.
        available_s: when the inputs from other nodes are there, on the plan's clock, or None.
        ready_s: when the engines are ready.
    """

    scenario: int
    node: int
    parallel: ParallelConfig
    device: int
    base: Progress
    available_s: Floats | None
    ready_s: float


class NodeRuns:
    """Simulates nodes; the same node from the same progress object is simulated once.

    A run whose inputs are all there depends on nothing but when it is ready, so it is kept relative
    to that.

    Attributes:
        problem: the instance.
        works: per scenario and node, what there is to do.
        cache: results of engine simulations.
        alone_s: by scenario, node, sizes, id of the progress they start from and whether there are
            engines to take over, the seconds of engines started anew with all inputs there, and
            that progress.
    """

    def __init__(
        self,
        problem: Problem,
        works: Sequence[Sequence[NodeWork]],
        cache: EngineCache,
        policy: PolicyCall | None = None,
    ) -> None:
        """Keep what every query needs.

        Args:
            problem: the instance.
            works: per scenario and node, what there is to do.
            cache: results of engine simulations.
            policy: order and replicas of requests; None: first come, first served, in turn.
        """
        self.problem, self.works, self.cache = problem, works, cache
        self._policy = policy
        self._kept: OrderedDict[tuple[object, ...], NodeRun] = OrderedDict()
        self._num_kept_requests = 0
        self.alone_s: dict[tuple[int, int, ParallelConfig, int, bool], tuple[float, Progress]] = {}

    def get(self, query: NodeQuery) -> NodeRun:
        """Return one run."""
        return self.get_many([query])[0]

    def get_many(self, queries: Sequence[NodeQuery]) -> list[NodeRun]:
        """Return the runs of several queries, simulating what is missing on all cores."""
        keys = [self._key(q) for q in queries]
        missing: dict[tuple[object, ...], NodeJobs] = {}
        for key, query in zip(keys, queries, strict=True):
            if key not in self._kept and key not in missing:
                missing[key] = self._jobs(query)
        if missing:
            jobs = [job for prepared in missing.values() for job in prepared.jobs]
            runs = iter(simulate_engines(jobs, cache=self.cache))
            for key, prepared in missing.items():
                self._keep(key, prepared.run(0.0, [next(runs) for _ in prepared.jobs]))
        result = [
            replace(self._kept[k], ready_s=q.ready_s) for k, q in zip(keys, queries, strict=True)
        ]
        self._forget()
        return result

    def _jobs(self, query: NodeQuery) -> NodeJobs:
        problem, node = self.problem, self.problem.app.nodes[query.node]
        costs = problem.mode(query.node, query.parallel, (query.device,))
        table = node.requests
        return node_jobs(
            self.works[query.scenario][query.node],
            query.base,
            query.available_s,
            query.ready_s,
            query.parallel,
            problem.engine_config(query.node, costs, query.parallel.pipeline_parallel_size),
            costs,
            spread=(
                None if self._policy is None else partial(self._policy, query.scenario, query.node)
            ),
            prefixes=(
                (table.prefix_id, table.prefix_tokens)
                if node.model.engine.enable_prefix_caching
                else None
            ),
        )

    def _key(self, query: NodeQuery) -> tuple[object, ...]:
        """Return what the run relative to ``ready_s`` depends on."""
        arrivals = None
        if query.available_s is not None:
            taken = self.works[query.scenario][query.node].taken
            todo = taken & ~np.isfinite(query.base.finish_s)
            after = arrivals_after(query.available_s[todo], query.ready_s)
            if after.any():
                arrivals = hashlib.blake2b(after.data, digest_size=16).digest()
        gpu = self.problem.cluster.kinds[query.device]
        return (query.scenario, query.node, query.parallel, gpu, id(query.base), arrivals)

    def _keep(self, key: tuple[object, ...], run: NodeRun) -> None:
        self._kept[key] = run  # it holds ``base``, whose id is in the key
        self._num_kept_requests += len(run.base.finish_s)

    def _forget(self) -> None:
        while self._num_kept_requests > MAX_KEPT_REQUESTS and len(self._kept) > 1:
            _, dropped = self._kept.popitem(last=False)
            self._num_kept_requests -= len(dropped.base.finish_s)
