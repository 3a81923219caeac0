"""One model on its devices: replicas, arrivals, and what was done by any moment."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from samullm_plugin.engine import (
    EngineCache,
    EngineConfig,
    EngineJob,
    EngineRun,
    Workload,
    simulate_engines,
)
from samullm_plugin.model.costs import ModeCosts
from samullm_plugin.model.parallel import ParallelConfig
from samullm_plugin.model.types import Bools, Floats, Ints
from samullm_plugin.simulator.requests import NodeInputs

CURVE_POINTS = 256

Spread = Callable[[Ints, Floats | None, int], tuple[Ints | None, Ints | None]]
"""A request policy on one node: from request indices, their arrivals as :func:`arrivals_known` has
them (None: all are there) and the number of replicas to priorities (None: first come, first served)
and replicas (None: in turn)."""


UNFORESEEN_S = 1e9
"""Arrival that request policies see of requests whose inputs of other nodes are not there yet."""


@dataclass(frozen=True, slots=True, eq=False)
class Progress:
    """What is done of a node.

    Attributes:
        finish_s: when each request finished on the plan's clock, inf if it has not, shape ``(n,)``.
        generated: output tokens generated so far, shape ``(n,)``.
    """

    finish_s: Floats
    generated: Ints


@dataclass(frozen=True, slots=True, eq=False)
class NodeRun:
    """A node run to its end on one assignment, with given arrivals.

    Attributes:
        ready_s: when the engines were ready, on the plan's clock.
        base: what was done before; unfinished requests start over from prompt plus generated.
        parts: request indices of each replica.
        jobs: the simulations behind it, one per replica.
        runs: their results.
    """

    ready_s: float
    base: Progress
    parts: tuple[Ints, ...]
    jobs: tuple[EngineJob, ...]
    runs: tuple[EngineRun, ...]

    @property
    def finish_s(self) -> Floats:
        """Return when each request finishes on the plan's clock, shape ``(n,)``.

        inf for those whose inputs are not foreseen.
        """
        finish = self.base.finish_s.copy()
        for part, run in zip(self.parts, self.runs, strict=True):
            finish[part] = self.ready_s + run.finish_s
        return finish

    @property
    def end_s(self) -> float:
        """Return when the last of its requests finishes, at the earliest when it is ready.

        0 if there is nothing left to do.
        """
        ends = [self.ready_s + r.makespan_s for r in self.runs]
        return max(ends, default=0.0)

    @property
    def busy_s(self) -> float:
        """Return the seconds of iterations of all replicas until the end."""
        return sum(r.busy_s for r in self.runs)

    def until(self, stop_s: float, cache: EngineCache) -> tuple[Progress, NodeRun]:
        """Return what is done by ``stop_s`` on the plan's clock, and the run cut there."""
        # The clock may be the sum that told when an iteration ends: it must not be cut by rounding.
        after = stop_s - self.ready_s + 4 * float(np.spacing(stop_s))
        jobs = tuple(replace(j, stop_s=after, curve_points=0) for j in self.jobs)
        if after <= 0:
            return self.base, replace(self, jobs=jobs, runs=())
        runs = tuple(simulate_engines(jobs, cache=cache))
        cut = replace(self, jobs=jobs, runs=runs)
        generated = self.base.generated.copy()
        for part, run in zip(self.parts, runs, strict=True):
            generated[part] += run.generated_tokens
        return Progress(cut.finish_s, generated), cut


@dataclass(frozen=True, slots=True, eq=False)
class NodeWork:
    """What one node has to do in one length scenario.

    Attributes:
        inputs: what its requests wait for.
        prompt_tokens: shape ``(n,)``.
        output_tokens: shape ``(n,)``; 0 where a request is not taken.
        taken: which requests are needed, shape ``(n,)``.
        all_taken: whether all are.
    """

    inputs: NodeInputs
    prompt_tokens: Ints
    output_tokens: Ints
    taken: Bools = field(init=False)
    all_taken: bool = field(init=False)

    def __post_init__(self) -> None:
        """Look once at what is asked again and again."""
        object.__setattr__(self, "taken", self.output_tokens > 0)
        object.__setattr__(self, "all_taken", bool(self.taken.all()))
        object.__setattr__(self, "inputs", self.inputs.past(self.taken))


@dataclass(frozen=True, slots=True, eq=False)
class NodeJobs:
    """A node's remaining requests dealt to the replicas of an assignment, ready to be simulated.

    Attributes:
        base: what is done already; unfinished requests start over from prompt plus generated.
        parts: request indices of each replica that has any.
        jobs: one simulation per part.
    """

    base: Progress
    parts: tuple[Ints, ...]
    jobs: tuple[EngineJob, ...]

    def run(self, ready_s: float, runs: Sequence[EngineRun]) -> NodeRun:
        """Return the results on the plan's clock.

        Args:
            ready_s: when the engines are ready.
            runs: one per job.
        """
        return NodeRun(ready_s, self.base, self.parts, self.jobs, tuple(runs))


def node_jobs(
    work: NodeWork,
    base: Progress,
    available_s: Floats | None,
    ready_s: float,
    parallel: ParallelConfig,
    config: EngineConfig,
    costs: ModeCosts,
    *,
    spread: Spread | None = None,
    prefixes: tuple[Ints, Ints] | None = None,
) -> NodeJobs:
    """Deal a node's remaining requests to replicas.

    A request's replica does not depend on which inputs are foreseen by now, so that learning of
    later arrivals never changes the past.

    Args:
        work: lengths and inputs.
        base: what is done already.
        available_s: when the inputs from other nodes are there, on the plan's clock, or None.
        ready_s: when the engines are ready.
        parallel: parallel sizes.
        config: scheduler settings of a replica.
        costs: costs of a replica.
        spread: order and replicas; None: first come, first served, replicas in turn.
        prefixes: shared-prefix ids and lengths, shape ``(n,)`` each, for prefix caching.
    """
    inputs = work.inputs
    todo = work.taken & ~np.isfinite(base.finish_s)
    foreseen = todo if available_s is None else todo & np.isfinite(available_s)
    if inputs.has_chain and available_s is not None:
        foreseen = _reachable(inputs, foreseen, todo)
    remaining = np.flatnonzero(todo)
    arrivals = None
    if available_s is not None:
        arrivals = arrivals_after(available_s[remaining], ready_s)
    priority, chosen = None, None
    if spread is not None:
        known = None if arrivals is None else arrivals_known(arrivals, inputs.heads(remaining))
        priority, chosen = spread(remaining, known, parallel.data_parallel_size)
    if chosen is None:
        replica = inputs.spread(remaining, parallel.data_parallel_size, arrivals)
    else:
        replica = inputs.with_chains_whole(remaining, chosen)
    if priority is not None:
        config = replace(config, scheduling_policy="priority")
    if arrivals is not None and not arrivals.any():
        arrivals = None
    parts, jobs = [], []
    for d in range(parallel.data_parallel_size):
        mine = np.flatnonzero((replica == d) & foreseen[remaining])
        if not len(mine):
            continue
        part = remaining[mine]
        release = inputs.releases(part)
        jobs.append(
            EngineJob(
                config,
                Workload(
                    work.prompt_tokens[part] + base.generated[part],
                    work.output_tokens[part] - base.generated[part],
                    arrival_s=None if arrivals is None else arrivals[mine],
                    priority=None if priority is None else priority[mine],
                    prefix_id=None if prefixes is None else prefixes[0][part],
                    prefix_tokens=None if prefixes is None else prefixes[1][part],
                    release_index=None if release is None else release[0],
                    release_indptr=None if release is None else release[1],
                ),
                costs.latency,
                curve_points=CURVE_POINTS,
            )
        )
        parts.append(part)
    return NodeJobs(base, tuple(parts), tuple(jobs))


def arrivals_known(arrival_s: Floats, heads: Ints) -> Floats:
    """Return the arrivals that a request policy sees, which are those that a run can know.

    It is asked when the first requests can be served: those whose inputs of other nodes are there
    then have arrived at 0, all others will at ``UNFORESEEN_S``.

    Args:
        arrival_s: when the inputs of other nodes are there.
        heads: positions of the requests that wait for none of their own node.
    """
    first_s = max(0.0, float(arrival_s[heads].min(initial=np.inf)))
    return np.where(arrival_s <= first_s, 0.0, UNFORESEEN_S)


def arrivals_after(available_s: Floats, ready_s: float) -> Floats:
    """Return when requests arrive at engines, counted from when these are ready.

    What is there when the plan begins is there from the start, also for engines that have run
    before and are taken to have been ready earlier (``ready_s`` below 0).
    """
    return np.where(available_s > 0.0, np.maximum(available_s - ready_s, 0.0), 0.0)


def _reachable(inputs: NodeInputs, reachable: Bools, todo: Bools) -> Bools:
    """Return the requests whose predecessors in this node are reachable or done as well."""
    result = reachable.copy()
    for r, q in zip(inputs.own_row, inputs.own_request, strict=True):  # inputs come before
        result[r] &= result[q] or not todo[q]
    return result


def untaken_finish_s(work: NodeWork, available_s: Floats | None, finish_s: Floats) -> Floats:
    """Return ``finish_s`` with requests that are not taken finished once their inputs are there."""
    if work.all_taken:
        return finish_s
    return work.inputs.settled_s(work.taken, available_s, finish_s)


def finished_count(runs: Sequence[EngineRun]) -> int:
    """Return the requests that finished in these runs."""
    return sum(int(np.isfinite(r.finish_s).sum()) for r in runs)
