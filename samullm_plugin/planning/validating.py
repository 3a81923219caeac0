"""Everything that can be said about an application before it is planned."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from samullm_plugin.app.loaded import LoadedApplication
from samullm_plugin.host.manager import PluginHost
from samullm_plugin.planning.estimators import make_length_estimator
from samullm_plugin.planning.instances import make_instance, unfused
from samullm_plugin.planning.this_machine import check_here


@dataclass(frozen=True, slots=True)
class NodeReport:
    """What is known of one node.

    Attributes:
        node: its name.
        model: its checkpoint.
        num_requests: requests.
        prompt_tokens: mean prompt length over requests that are taken, upstream outputs included.
        output_tokens: mean sampled output length of those.
        fits: replica sizes that fit in memory, with their KV-cache capacity in tokens, such as
            ``A100-80GB tp2: 145000``; empty without a cluster.
        lengths: where output lengths come from.
        latency: where iteration latencies come from; empty without a cluster.
    """

    node: str
    model: str
    num_requests: int
    prompt_tokens: float
    output_tokens: float
    fits: tuple[str, ...]
    lengths: str
    latency: str


@dataclass(frozen=True, slots=True)
class ApplicationReport:
    """What is known of an application.

    Attributes:
        name: of the application.
        num_gpus: GPUs; None if no cluster is given, and then nothing is known of memory.
        nodes: by node.
        notes: what was assumed or estimated.
    """

    name: str
    num_gpus: int | None
    nodes: tuple[NodeReport, ...]
    notes: tuple[str, ...]


def validate_application(host: PluginHost, loaded: LoadedApplication) -> ApplicationReport:
    """Check an application as far as that can be done without running it.

    Raises:
        InputError: for the first thing that is wrong.
    """
    planner = loaded.planner
    host.check_options("scheduler", planner.scheduler.type, planner.scheduler.options)
    host.check_options("executor", loaded.executor.type, loaded.executor.options)
    check_here(host, loaded)
    if planner.request_policy is not None:
        policy = planner.request_policy
        host.check_options("request-policy", policy.type, policy.options)
    problem = None
    if loaded.cluster is None:  # lengths can be checked all the same
        estimator = make_length_estimator(
            host, planner.length_estimator.type, planner.length_estimator.options
        )
    else:
        instance = make_instance(host, loaded, unfused(planner))
        estimator, problem = instance.estimator, instance.problem
    reports = []
    for i, node in enumerate(loaded.app.nodes):
        prompts, outputs, fits, latency = node.requests.prompt_tokens, None, [], ""
        if problem is not None:
            scenario = problem.scenarios[0]
            taken = scenario.output_tokens[i] > 0
            prompts, outputs = scenario.prompt_tokens[i][taken], scenario.output_tokens[i][taken]
            for key, costs in problem.costs[i].items():
                if problem.fits(i, key):
                    fits.append(f"{key.gpu} {key.sizes}: {costs.kv_cache_tokens}")
                    latency = f"{costs.provenance.kind}: {costs.provenance.source}"
        reports.append(
            NodeReport(
                node.name,
                node.model.name,
                len(node.requests),
                _mean(prompts),
                _mean(outputs) if outputs is not None else float("nan"),
                tuple(fits),
                "known beforehand"
                if loaded.output_tokens is not None or node.requests.max_tokens.max() == 1
                else estimator.source(node.model.name),
                latency,
            )
        )
    gpus = len(loaded.cluster.cards) if loaded.cluster is not None else None
    return ApplicationReport(loaded.app.name, gpus, tuple(reports), loaded.app.notes)


def _mean(values: np.ndarray[tuple[int, ...], np.dtype[np.int64]]) -> float:
    """Return the mean of lengths, 0 without any."""
    return float(values.mean()) if len(values) else 0.0
