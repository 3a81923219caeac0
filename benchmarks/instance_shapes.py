"""Applications of named shapes whose models, lengths and devices are drawn by a seed.

For the stored instances that no bundled application has the shape of; costs are the bundled A100
figures, and where there are two kinds of GPU those of the latency model ``assumed``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from random_problems import LARGE, MODELS, SHAPES

from samullm_plugin import Application, ModelNode, Problem, RequestTable, bundled_model
from samullm_plugin.checkpoints.gpus import bundled_gpu
from samullm_plugin.host.manager import PluginHost
from samullm_plugin.model.cluster import Cluster
from samullm_plugin.model.scenarios import make_scenario
from samullm_plugin.model.types import Ints
from samullm_plugin.planning.building import collect_costs

MAX_TOKENS = 256


def pairs(gpus: int) -> Cluster:
    """Return one machine of A100s in NVLink pairs."""
    return Cluster.uniform(bundled_gpu("A100-80GB"), gpus, nvlink=2)


def two_machines(gpus: int) -> Cluster:
    """Return two such machines of half as many."""
    one, half = pairs(gpus), gpus // 2
    return Cluster(one.gpus, one.nvlink_groups, (tuple(range(half)), tuple(range(half, gpus))))


def two_kinds(gpus: int) -> Cluster:
    """Return one machine of as many A100s as H100s."""
    kinds = (bundled_gpu("A100-80GB"), bundled_gpu("H100-80GB"))
    return Cluster(
        tuple(kinds[d >= gpus // 2] for d in range(gpus)),
        tuple((d, d + 1) for d in range(0, gpus, 2)),
    )


CLUSTERS: Mapping[str, Callable[[int], Cluster]] = {
    "pairs": pairs,
    "two-machines": two_machines,
    "two-kinds": two_kinds,
}


def shaped(
    host: PluginHost,
    shape: str,
    cluster: Cluster,
    seed: int,
    *,
    nodes: int,
    requests: int,
    longest: int = 0,
    equal: bool = False,
) -> Problem:
    """Return a problem of one length scenario.

    Args:
        host: the plugins.
        shape: of the graph, one of ``random_problems.SHAPES``.
        cluster: its devices.
        seed: of models and lengths.
        nodes: how many.
        requests: of each node; those of consumers read one output of each producer.
        longest: output tokens of one single request of each node; 0: as drawn.
        equal: all nodes are of one model.
    """
    rng = np.random.default_rng([seed, nodes, requests, cluster.num_gpus])
    count = 1 if equal else nodes
    names = rng.permutation(MODELS[: len(MODELS) - LARGE])[np.arange(nodes) % count % 7]
    made: list[ModelNode] = []
    outputs: list[Ints] = []
    for i, (inputs, name) in enumerate(zip(SHAPES[shape](rng, nodes), names, strict=True)):
        model = bundled_model(str(name), max_model_len=2048)
        own = np.clip(rng.lognormal(np.log(100.0), 0.6, requests), 4, 400).astype(np.int64)
        rows = [[(u, r) for u in inputs] for r in range(requests)]
        most = max(MAX_TOKENS, longest)
        drawn = rng.lognormal(np.log(float(rng.uniform(30, 150))), 0.7, requests)
        lengths = np.clip(drawn, 1, MAX_TOKENS).astype(np.int64)
        if longest:
            lengths[int(rng.integers(requests))] = longest
        made.append(ModelNode(f"n{i}", model, RequestTable.of(own, most, rows), "task"))
        outputs.append(lengths)
    app = Application(shape, tuple(made))
    latency = host.create("latency-model", "assumed" if len(set(cluster.gpus)) > 1 else "linear")
    costs = collect_costs(app, cluster, latency)
    problem = Problem(app, cluster, (make_scenario(app, outputs),), costs)
    return problem.without_sleeping_engines()
