"""From an application, a cluster and two estimators to a problem that can be planned."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Literal

import numpy as np

from samullm_plugin.checkpoints.models import sizes_of
from samullm_plugin.errors import InputError, PluginError
from samullm_plugin.host.interfaces.latency import LatencyModel
from samullm_plugin.host.interfaces.length import LengthEstimator, LengthQuery
from samullm_plugin.model.application import Application, ModelNode, ModelSpec
from samullm_plugin.model.cluster import Cluster, Gpu, Network
from samullm_plugin.model.costs import ModeCosts
from samullm_plugin.model.latency import StepLatency
from samullm_plugin.model.problem import ModeKey, Problem, holds_longest
from samullm_plugin.model.requests import NodePart, RequestTable
from samullm_plugin.model.scenarios import (
    LengthScenario,
    draw_taken,
    entering_tokens,
    make_scenario,
)
from samullm_plugin.model.types import Bools, Ints
from samullm_plugin.planning.pipelines import without_useless_pipelines
from samullm_plugin.profiling.loading import resident
from samullm_plugin.profiling.shared import beside_others
from samullm_plugin.profiling.transfer import ACROSS_SOURCE, across_machines

TENSOR_PARALLEL_SIZES = (1, 2, 4, 8)
PIPELINE_PARALLEL_SIZES = (2, 4, 8)
"""Groups of layers that are considered for a model which fits no device or NVLink group whole."""
WIDE_PIPELINE_PARALLEL_SIZES = (2, 3, 4, 6, 8, 12, 16)
"""Groups of layers that are considered for a model which fits no machine whole."""


def build_problem(
    app: Application,
    cluster: Cluster,
    estimator: LengthEstimator,
    latency_model: LatencyModel,
    *,
    scenarios: int = 4,
    rng: np.random.Generator,
    page_cache: Literal["warm", "cold"] = "warm",
    true_lengths: Sequence[Ints] | None = None,
    pipeline_parallel_sizes: Sequence[int] | None = None,
    prepared_starts: bool = False,
    sleeping_engines: bool = False,
) -> Problem:
    """Return the problem of running an application on a cluster.

    Args:
        app: the application.
        cluster: its devices.
        estimator: where output lengths come from.
        latency_model: where iteration, memory and load figures come from.
        scenarios: independent length scenarios.
        rng: randomness of the lengths; equal states give equal problems.
        page_cache: whether engine starts find their files in the page cache.
        true_lengths: output lengths known beforehand, per node; then there is one scenario and the
            estimator is not asked (for requests that a router or filter may drop, who is taken is
            still drawn).
        pipeline_parallel_sizes: see :func:`collect_costs`.
        prepared_starts: what engine starts need no device for can be done ahead.
        sleeping_engines: engines may sleep until they are needed again.

    Raises:
        InputError: if a model fits nowhere, or lengths or latencies of one are not known.
        PluginError: if the estimator's samples break its interface's rules.
    """
    if scenarios < 1:
        raise InputError(f"scenarios is {scenarios}; at least one length scenario is needed")
    if true_lengths is not None:
        lengths: tuple[LengthScenario, ...] = (
            make_scenario(app, true_lengths, draw_taken(app, rng)),
        )
    else:
        lengths = sample_scenarios(app, estimator, rng, scenarios)
    costs = collect_costs(
        app, cluster, latency_model, pipeline_parallel_sizes=pipeline_parallel_sizes
    )
    problem = Problem(app, cluster, lengths, costs, page_cache)
    problem = problem if prepared_starts else problem.without_prepared_starts()
    problem = problem if sleeping_engines else problem.without_sleeping_engines()
    return problem if pipeline_parallel_sizes is None else without_useless_pipelines(problem)


def sample_scenarios(
    app: Application, estimator: LengthEstimator, rng: np.random.Generator, count: int
) -> tuple[LengthScenario, ...]:
    """Return independent length scenarios of an application.

    Nodes are sampled in topological order, so that an estimator that looks at prompt lengths sees
    them with the sampled outputs they contain.

    Raises:
        PluginError: if a sample breaks a rule of the interface.
    """
    found = []
    for stream in rng.spawn(count):  # scenario k is the same however many there are
        taken = draw_taken(app, stream)
        sampled = sample_outputs(app, estimator, stream, taken)
        found.append(make_scenario(app, sampled, taken))
    return tuple(found)


def sample_outputs(
    app: Application,
    estimator: LengthEstimator,
    rng: np.random.Generator,
    taken: Sequence[Bools] | None = None,
) -> tuple[Ints, ...]:
    """Return one sample of output lengths per node, before the limits of whole prompts apply.

    Args:
        app: the application.
        estimator: where lengths come from.
        rng: its randomness.
        taken: per node which requests are needed; None: all.
    """
    outputs = [np.zeros(len(n.requests), np.int64) for n in app.all_nodes]
    for i in app.full_order:
        if i >= len(app.nodes):
            python, rows = app.python[i - len(app.nodes)], np.arange(len(outputs[i]))
            entering = entering_tokens(app, i, outputs)
            calls = np.arange(python.num_calls)
            outputs[i][calls] = python.value_tokens(calls, entering[calls])
            outputs[i] = python.value_tokens(rows, entering_tokens(app, i, outputs))
            if taken is not None:
                outputs[i][~taken[i]] = 0
            continue
        node = app.nodes[i]
        mask = np.ones(len(node.requests), bool) if taken is None else taken[i]
        for part in node.parts:
            passes = 2 if _is_chain(node.requests, i, part) else 1  # prompts hold own outputs
            for _ in range(passes):
                prompts = _prompts(app, i, outputs)[part.whole]
                sampled = _sample_part(node, part, prompts, estimator, rng)
                outputs[i][part.whole] = np.where(mask[part.whole], sampled, 0)
    return tuple(np.maximum(o, 1) for o in outputs[: len(app.nodes)])


def _is_chain(table: RequestTable, i: int, part: NodePart) -> bool:
    """Return whether requests of a part of node ``i`` wait for others of the same part."""
    own = table.input_node == i
    rows, requests = table.input_row[own], table.input_request[own]
    first = (rows - part.start) % (1 + part.repeats) == 0  # repeated ones wait for those before
    return bool(((requests >= part.start) & (rows < part.stop) & first).any())


def _prompts(app: Application, i: int, outputs: Sequence[Ints]) -> Ints:
    """Return the prompt lengths of node ``i`` as far as its inputs have been sampled."""
    prompts = app.nodes[i].requests.prompt_tokens + entering_tokens(app, i, outputs)
    fitting: Ints = np.minimum(prompts, app.nodes[i].model.max_model_len - 1)
    return fitting


def _sample_part(
    node: ModelNode,
    part: NodePart,
    prompts: Ints,
    estimator: LengthEstimator,
    rng: np.random.Generator,
) -> Ints:
    """Return one checked sample of a node's output lengths, for one of the user's nodes in it."""
    count = part.stop - part.start
    if node.requests.max_tokens[part.whole].max() == 1:  # as of pooling models
        return np.ones(count, np.int64)
    query = LengthQuery(
        model=node.model.name,
        task=part.task,
        prompt_tokens=prompts,
        max_tokens=node.requests.max_tokens[part.whole],
        generated_tokens=np.zeros(count, np.int64),
        max_model_len=node.model.max_model_len,
        node=part.name,
        requests=part.written,
    )
    lengths: Ints = check_lengths(estimator.sample(query, rng, 1), query, 1, estimator.name)[0]
    return lengths


def check_lengths(sampled: Ints, query: LengthQuery, scenarios: int, name: str) -> Ints:
    """Return sampled lengths after checking them against the interface's rules.

    Raises:
        PluginError: naming the estimator, the rule and the request.
    """
    label = f"length-estimator {name}"
    lengths = np.asarray(sampled)
    shape = (scenarios, len(query))
    if lengths.shape != shape:
        raise PluginError(f"{label}: samples have shape {lengths.shape} instead of {shape}")
    if not np.issubdtype(lengths.dtype, np.integer):
        raise PluginError(f"{label}: samples are {lengths.dtype}; whole numbers are needed")
    least = np.minimum(np.maximum(query.generated_tokens + 1, 1), query.max_tokens)
    for bad, rule in (
        (lengths < least, "is below 1 or not above generated_tokens"),
        (lengths > query.max_tokens, "is above max_tokens"),
    ):
        if bad.any():
            scenario, row = (int(v) for v in np.argwhere(bad)[0])
            raise PluginError(
                f"{label}: the length {lengths[scenario, row]} of request {row} of "
                f"{query.node or query.model} {rule}"
            )
    return lengths.astype(np.int64)


def collect_costs(
    app: Application,
    cluster: Cluster,
    latency_model: LatencyModel,
    *,
    tensor_parallel_sizes: Sequence[int] = TENSOR_PARALLEL_SIZES,
    pipeline_parallel_sizes: Sequence[int] | None = None,
) -> tuple[Mapping[ModeKey, ModeCosts], ...]:
    """Return per node the costs of every replica size that the cluster's NVLink groups allow.

    Replicas on GPUs that engines share have one pipeline stage, and are slower throughout.

    Sizes that do not fit in memory are kept with their KV capacity, so that messages can name it.
    Sizes by which a model's heads or layers cannot be divided are left out, as vLLM refuses them;
    so are sizes for which the latency model has no figures, unless that leaves none.

    Args:
        app: the application.
        cluster: its devices.
        latency_model: where the figures come from.
        tensor_parallel_sizes: devices per layer to consider.
        pipeline_parallel_sizes: groups of layers to consider for a replica; None: more than one
            only for models that fit no device or NVLink group whole, on several machines only if
            they fit none whole.

    Raises:
        InputError: if the latency model knows nothing of a model, or no model's layers can be
            divided as was asked for.
    """
    by_machine = Counter((cluster.machine_of(d), kind) for d, kind in enumerate(cluster.kinds))
    most = {kind: max(n for (_, k), n in by_machine.items() if k == kind) for _, kind in by_machine}
    whole = [most[cluster.kinds[d]] for d, gpu in enumerate(cluster.gpus) if gpu.engines == 1]

    def sizes(pipeline: Sequence[int], *, wide: bool = False) -> list[tuple[int, int, int]]:
        return [
            (device, tp, pp)
            for device, largest in _largest_groups(cluster).items()
            for tp in tensor_parallel_sizes
            for pp in pipeline
            if tp <= largest
            and (pp == 1 or cluster.gpus[device].engines == 1)
            and (
                any(cluster.replicas_by_machine(cluster.kinds[device], tp, pp))
                if wide
                else tp * pp <= most[cluster.kinds[device]]
            )
        ]

    if pipeline_parallel_sizes is None:
        asked = sizes((1,))
    else:
        asked = sizes(pipeline_parallel_sizes, wide=cluster.network is not None)
    known: list[tuple[ModelSpec, Mapping[ModeKey, ModeCosts]]] = []
    per_node = []
    for node in app.nodes:
        costs = next((c for model, c in known if model == node.model), None)
        if costs is None:
            costs, refusal = _model_costs(node, cluster, asked, latency_model.costs)
            if not costs and refusal is not None:
                raise InputError(f"node {node.name}: {refusal}") from refusal
            if not costs and pipeline_parallel_sizes is not None:
                raise InputError(
                    f"node {node.name}: pipeline_parallel_sizes "
                    f"{', '.join(map(str, pipeline_parallel_sizes))}: no replica of "
                    f"{node.model.name} can be divided so, with {_layers_text(node.model)} and "
                    f"{max(whole, default=0)} GPUs in a machine (those that engines share have no "
                    "stages); add smaller sizes, such as 1"
                )
            if pipeline_parallel_sizes is None and not _any_fits(node.model, costs):
                further = sizes(PIPELINE_PARALLEL_SIZES)
                costs |= _model_costs(node, cluster, further, latency_model.costs)[0]
                if cluster.network is not None and not _any_fits(node.model, costs):
                    further = sizes(WIDE_PIPELINE_PARALLEL_SIZES, wide=True)
                    costs |= _model_costs(node, cluster, further, latency_model.costs)[0]
            known.append((node.model, costs))
        per_node.append(costs)
    return tuple(per_node)


def _model_costs(
    node: ModelNode,
    cluster: Cluster,
    sizes: Sequence[tuple[int, int, int]],
    costs_of: Callable[[ModelSpec, Gpu, int, int], ModeCosts],
) -> tuple[dict[ModeKey, ModeCosts], InputError | None]:
    """Return the costs of one model by size, and why the first unknown size is not known."""
    found: dict[ModeKey, ModeCosts] = {}
    refusal: InputError | None = None
    architecture = node.model.architecture
    for device, tp, pp in sizes:
        if architecture and (architecture.num_heads % tp or pp > architecture.num_layers):
            continue
        try:
            key = ModeKey(cluster.kinds[device], tp, pp)
            costs = costs_of(node.model, cluster.gpus[device], tp, pp)
            if cluster.machines_per_replica(key.gpu, tp, pp) > 1:
                costs = _across_machines(node.model, costs, cluster.network)
            if cluster.gpus[device].is_core:
                load = resident(costs.load, node.model, costs.kv_cache_tokens)
                costs = replace(costs, load=load)
            found[key] = beside_others(costs, cluster.gpus[device])
        except InputError as error:
            refusal = refusal or error
    return found, refusal


def _across_machines(model: ModelSpec, costs: ModeCosts, network: Network | None) -> ModeCosts:
    """Return the costs of a replica whose stages lie on several machines.

    Raises:
        InputError: if it cannot be told what crosses the network.
    """
    assert network is not None  # else no replica lies so
    if not isinstance(costs.latency, StepLatency):
        raise InputError(
            f"model {model.name}: this latency model tells nothing of replicas across machines; "
            "set cluster.replicas_across_machines: false"
        )
    latency = across_machines(costs.latency, sizes_of(model), network)
    found = costs.provenance
    provenance = replace(found, source=f"{found.source}; {ACROSS_SOURCE}", error_pct=None)
    return replace(costs, latency=latency, provenance=provenance)


def _layers_text(model: ModelSpec) -> str:
    """Return how many layers a model has, for messages."""
    return "its layers" if (a := model.architecture) is None else f"{a.num_layers} layers"


def _any_fits(model: ModelSpec, costs: Mapping[ModeKey, ModeCosts]) -> bool:
    """Return whether the model fits in one of the sizes."""
    return any(holds_longest(model, key, c) for key, c in costs.items())


def _largest_groups(cluster: Cluster) -> dict[int, int]:
    """Return, by the first device of each kind, the most in one NVLink group on one machine."""
    sizes = Counter(
        (cluster.kinds[device], number, cluster.machine_of(device))
        for number, group in enumerate(cluster.nvlink_groups)
        for device in group
    )
    largest: dict[int, int] = {}
    for kind in dict.fromkeys(cluster.kinds):
        first = cluster.kinds.index(kind)
        largest[first] = max(count for (of_kind, _, _), count in sizes.items() if of_kind == kind)
    return largest
