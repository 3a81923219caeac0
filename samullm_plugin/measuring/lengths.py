"""Measure output lengths: a sample of an application's requests on engines, node by node."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from samullm_plugin.errors import InputError, RunError
from samullm_plugin.host.interfaces.executor import EngineRequest, EngineSpec, Executor
from samullm_plugin.host.interfaces.observer import RunInfo
from samullm_plugin.model.application import Application, ModelSpec
from samullm_plugin.model.cluster import Cluster, Gpu
from samullm_plugin.model.costs import ModeCosts
from samullm_plugin.model.lengths import LengthObservations
from samullm_plugin.model.types import Bools
from samullm_plugin.run.ledger import Ledger, Status
from samullm_plugin.run.log import RunLog
from samullm_plugin.run.prompts import PromptBuilder
from samullm_plugin.run.request_queue import RequestQueue
from samullm_plugin.run.results import Result

Masks = tuple[Bools, ...]
"""Per node, which of its requests are meant, shape ``(n,)``."""

_LONGEST_SEQUENCES = 16


@dataclass(frozen=True, slots=True)
class EngineSetup:
    """How engines are started for measuring; none of it changes lengths, only the time it takes.

    Attributes:
        tensor_parallel_size: devices per engine.
        sizes: the same by node, where nodes differ; None: they do not.
        num_engines: replicas side by side.
        gpu: kind of the devices.
        kv_cache_tokens: capacity of an engine; None: by :func:`enough_kv_tokens`.
        costs: by node, for executors that model engines; None: real ones.
        run_dir: where engines' logs go; None: nowhere.
    """

    tensor_parallel_size: int = 1
    num_engines: int = 1
    sizes: tuple[int, ...] | None = None
    gpu: Gpu = field(default_factory=lambda: Gpu("this-machine", 1 << 40))
    kv_cache_tokens: int | None = None
    costs: tuple[ModeCosts, ...] | None = None
    run_dir: Path | None = None

    @property
    def cluster(self) -> Cluster:
        """Return the devices of all engines."""
        size = max(self.sizes or (self.tensor_parallel_size,))
        return Cluster.uniform(self.gpu, size * self.num_engines, nvlink=size)

    def size(self, node: int) -> int:
        """Return the devices per engine of a node."""
        return self.tensor_parallel_size if self.sizes is None else self.sizes[node]


@dataclass(frozen=True, slots=True, eq=False)
class MeasuredLengths:
    """What was measured.

    Attributes:
        observations: by model and task.
        failed: requests without an output, as (node, request, reason).
        num_run: requests given to engines.
        seconds: it took.
    """

    observations: tuple[LengthObservations, ...]
    failed: tuple[tuple[str, int, str], ...]
    num_run: int
    seconds: float


def sample_requests(app: Application, count: int, rng: np.random.Generator) -> Masks:
    """Return which requests to run: ``count`` of each node, and all whose outputs they need.

    Nodes are taken from the last to the first, and what others need counts: a node behind which
    everything is needed anyway is not sampled on top of that.

    Args:
        app: the application.
        count: requests per node; all where it has fewer.
        rng: which ones.
    """
    masks = tuple(np.zeros(len(n.requests), bool) for n in app.nodes)
    for i in reversed(app.order):
        table, mask = app.nodes[i].requests, masks[i]
        missing = count - int(mask.sum())
        if missing > 0:
            rest = np.flatnonzero(~mask)
            mask[rng.choice(rest, min(missing, len(rest)), replace=False)] = True
        own = table.input_node == i
        rows, inputs = table.input_row[own], table.input_request[own]
        before = -1
        while before != int(mask.sum()):  # a chain: earlier requests of the node itself
            before = int(mask.sum())
            mask[inputs[mask[rows]]] = True
        for node in np.unique(table.input_node[~own]).tolist():
            part = (table.input_node == node) & mask[table.input_row]
            masks[node][table.input_request[part]] = True
    return masks


def measure_lengths(
    executor: Executor,
    app: Application,
    source: PromptBuilder,
    masks: Masks,
    setup: EngineSetup | None = None,
    *,
    report: Callable[[str], None] = lambda text: None,
) -> MeasuredLengths:
    """Run a sample of requests and return how long their outputs are.

    Args:
        executor: not open; it is opened and closed here.
        app: the application.
        source: makes its prompts.
        masks: which requests to run, closed under what they wait for.
        setup: how engines are started; None: one device, one engine.
        report: called with lines of progress.

    Raises:
        InputError: if the executor cannot work here, or no request had an output.
        RunError: if an engine fails.
    """
    how = setup or EngineSetup()
    began_s = time.monotonic()
    ledger = Ledger(app)
    for i, mask in enumerate(masks):
        for r in np.flatnonzero(~mask).tolist():
            ledger.settle((i, r), Status.SKIPPED, 0.0, Result())
    log = RunLog(RunInfo("profile-lengths", app.name, executor.name))
    requests = RequestQueue(ledger, source, log, {})
    requests.admit_first(0.0)
    executor.check([n.model for n, mask in zip(app.nodes, masks, strict=True) if mask.any()])
    executor.open(how.cluster, how.run_dir)
    try:
        for i in app.order:
            if not ledger.settled(i):
                _run_node(executor, i, ledger, requests, how)
                report(_done(ledger, i, masks[i]))
            log.flush()
    finally:
        executor.close()
    return _collect(ledger, masks, time.monotonic() - began_s)


def enough_kv_tokens(model: ModelSpec, requests: Sequence[EngineRequest]) -> int:
    """Return a KV capacity that holds all requests at once, up to 16 of the longest sequences.

    Never below one sequence of ``max_model_len``, which vLLM demands.
    """
    limit = model.max_model_len
    wanted = sum(min(r.prompt_tokens + r.max_tokens, limit) for r in requests)
    blocks = model.engine.block_size * (len(requests) + 1)
    return max(limit + model.engine.block_size, min(wanted + blocks, _LONGEST_SEQUENCES * limit))


def _run_node(
    executor: Executor, node: int, ledger: Ledger, requests: RequestQueue, how: EngineSetup
) -> None:
    """Start a node's engines, give them its requests, and stop them."""
    model, name = ledger.app.nodes[node].model, ledger.app.nodes[node].name
    first = requests.take_given(node, 0.0)
    size = how.size(node)
    keys = [f"{name}.{k}" for k in range(how.num_engines)]
    for k, key in enumerate(keys):
        executor.start_engine(
            EngineSpec(
                key,
                node,
                model,
                tuple(range(k * size, (k + 1) * size)),
                size,
                1,
                how.kv_cache_tokens or enough_kv_tokens(model, first),
                costs=None if how.costs is None else how.costs[node],
            )
        )
    waiting, open_, turn = set(keys), 0, 0
    timeout_s = float("inf") if executor.virtual_clock else 0.5
    queue = first
    while not ledger.settled(node):
        if not waiting:
            queue += requests.take_given(node, 0.0)
            for k, key in enumerate(keys):
                mine = queue[(k - turn) % len(keys) :: len(keys)]
                if mine:
                    executor.submit(key, mine)
            turn, open_ = turn + len(queue), open_ + len(queue)
            queue = []
            if not open_:  # what was to be given last may have been refused, which settles it
                if ledger.settled(node) or requests.queued(node):
                    continue
                raise RunError(f"node {name}: requests are left that wait for nothing that runs")
        events = executor.poll(timeout_s)
        if not events and executor.virtual_clock:
            raise RunError(f"node {name}: requests are left, and nothing happens")
        for event in events:
            if event.kind == "failed":
                raise RunError(
                    f"engine {event.key} of model {model.name} failed: {event.reason}; if its "
                    "memory was too small, give --kv-cache-tokens or --tp"
                )
            if event.kind == "ready":
                waiting.discard(event.key)
            for output in event.outputs:
                open_ -= 1
                requests.finish((node, output.request), output, event.time_s)
    for key in keys:
        executor.stop_engine(key)


def _collect(ledger: Ledger, masks: Masks, seconds: float) -> MeasuredLengths:
    """Return the finished outputs by model and task; those cut at a limit are censored."""
    rows: dict[tuple[str, str], list[tuple[int, int, bool]]] = {}
    failed = []
    for i, node in enumerate(ledger.app.nodes):
        group = rows.setdefault((node.model.name, node.task), [])
        for r in np.flatnonzero(masks[i]).tolist():
            result = ledger.results[i, r]
            if ledger.status[i][r] == Status.FAILED:
                failed.append((node.name, r, result.error or ""))
            elif ledger.status[i][r] == Status.FINISHED:
                cut = result.finish_reason == "length"
                group.append((result.prompt_tokens, max(result.num_tokens, 1), cut))
    found = []
    for (model, task), group in rows.items():
        if group:
            prompts, outputs, cut_ = (np.array(column) for column in zip(*group, strict=True))
            found.append(LengthObservations(model, task, prompts, outputs, cut_))
    if not found:
        reason = f"; the first: {failed[0][2]}" if failed else ""
        raise InputError(f"no request of the sample had an output{reason}")
    return MeasuredLengths(tuple(found), tuple(failed), int(sum(m.sum() for m in masks)), seconds)


def _done(ledger: Ledger, node: int, mask: Bools) -> str:
    status = ledger.status[node][mask]
    finished, failed = (int((status == s).sum()) for s in (Status.FINISHED, Status.FAILED))
    more = f", {failed} failed" if failed else ""
    return f"{ledger.app.nodes[node].name}: {finished} of {len(status)} requests finished{more}"
