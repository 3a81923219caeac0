"""Small instances for tests, by hand: models that cost what a test says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from samullm_plugin.engine import Curve, StepLatency
from samullm_plugin.model.application import Application, EngineOptions, ModelNode, ModelSpec
from samullm_plugin.model.architecture import ModelArchitecture
from samullm_plugin.model.cluster import Cluster, Gpu
from samullm_plugin.model.costs import LoadTimes, ModeCosts, Provenance
from samullm_plugin.model.problem import ModeKey, Problem
from samullm_plugin.model.requests import RequestTable as Requests
from samullm_plugin.model.scenarios import make_scenario

GPU = Gpu("test-gpu", 80 * 2**30)

TINY_ARCHITECTURE = ModelArchitecture(
    num_layers=2,
    hidden_size=64,
    num_heads=4,
    num_kv_heads=4,
    head_dim=16,
    intermediate_size=128,
    vocab_size=256,
)


@dataclass(frozen=True)
class TestNode:
    """A node of a hand-made problem.

    Attributes:
        name: its name.
        prompt_tokens: own prompt tokens of each request.
        output_tokens: output tokens of each request, one row per scenario or one for all.
        inputs: per request the (node, request) pairs it waits for, or None.
        step_s: seconds of an iteration on one device; more devices per replica divide it.
        token_s: seconds per scheduled token on one device.
        context_s: seconds per token of decode context on one device.
        load_s: seconds of an engine start on one device; tensor-parallel ones take as long.
        prepare_s: part of them that needs no device; a prepared replica holds a byte of its host.
        sleep_s, wake_s: seconds of sleeping and waking, if it can; one asleep holds a byte as well.
        sizes: tensor-parallel sizes that have costs.
        kv_cache_tokens: capacity of one replica.
        max_model_len: longest prompt plus output.
        engine: engine settings.
        architecture: sizes of the model.
        taken: which requests are needed, or None for all.
        in_prompt: whether inputs' outputs enter the prompt.
        prefix_tokens: first tokens that all requests of the node share.
        latency: replaces the latency made of the figures above, divided by devices per replica.
    """

    __test__ = False  # not a test class, whatever its name says to pytest

    name: str
    prompt_tokens: Sequence[int]
    output_tokens: Sequence[int] | Sequence[Sequence[int]]
    inputs: Sequence[Sequence[tuple[int, int]]] | None = None
    step_s: float = 1.0
    token_s: float = 0.0
    context_s: float = 0.0
    load_s: float = 10.0
    prepare_s: float = 0.0
    sleep_s: float | None = None
    wake_s: float | None = None
    sizes: Sequence[int] = (1,)
    kv_cache_tokens: int = 100_000
    max_model_len: int = 4096
    engine: EngineOptions = field(default_factory=lambda: EngineOptions(async_scheduling=False))
    architecture: ModelArchitecture | None = TINY_ARCHITECTURE
    taken: Sequence[bool] | None = None
    in_prompt: bool = True
    prefix_tokens: int = 0
    latency: StepLatency | None = None

    def node(self) -> ModelNode:
        """Return the application's node."""
        n = len(self.prompt_tokens)
        shared = self.prefix_tokens > 0
        requests = Requests.of(
            list(self.prompt_tokens),
            self.max_model_len,
            None if self.inputs is None else [list(row) for row in self.inputs],
            in_prompt=self.in_prompt,
            prefix_id=np.zeros(n, np.int64) if shared else None,
            prefix_tokens=np.full(n, self.prefix_tokens, np.int64) if shared else None,
        )
        model = ModelSpec(
            f"model-{self.name}", self.max_model_len, self.architecture, engine=self.engine
        )
        return ModelNode(self.name, model, requests)

    def costs(self) -> Mapping[ModeKey, ModeCosts]:
        """Return the costs of each size."""
        latency = self.latency or StepLatency(
            Curve.line(self.step_s, self.token_s), context_token_s=self.context_s
        )
        provenance = Provenance("assumed", "test")
        return {
            ModeKey(GPU.name, tp): ModeCosts(
                latency.scaled(1 / tp),
                self.kv_cache_tokens * tp,
                LoadTimes(
                    self.load_s,
                    10 * self.load_s,
                    sleep_s=self.sleep_s,
                    wake_s=self.wake_s,
                    asleep_bytes=1.0,
                    prepare_s=self.prepare_s,
                    prepared_bytes=1.0,
                ),
                provenance,
            )
            for tp in self.sizes
        }


def make_problem(
    nodes: Sequence[TestNode],
    num_gpus: int = 2,
    *,
    nvlink: int = 2,
    num_scenarios: int = 1,
    host_memory_bytes: int | None = None,
) -> Problem:
    """Return the problem of hand-made nodes on one machine of equal GPUs.

    Args:
        nodes: the nodes; ``inputs`` refer to their positions.
        num_gpus: GPUs.
        nvlink: neighbours joined by NVLink.
        num_scenarios: length scenarios; a node with one row of outputs has the same in all.
        host_memory_bytes: memory of the machine's host.
    """
    app = Application("test", tuple(n.node() for n in nodes))
    scenarios = []
    for s in range(num_scenarios):
        rows = [np.atleast_2d(np.asarray(n.output_tokens)) for n in nodes]
        outputs = [row[s % len(row)] for row in rows]
        taken = [
            np.ones(len(n.prompt_tokens), bool) if n.taken is None else np.asarray(n.taken, bool)
            for n in nodes
        ]
        scenarios.append(make_scenario(app, outputs, taken))
    cluster = Cluster.uniform(GPU, num_gpus, nvlink=nvlink)
    cluster = replace(cluster, host_memory_bytes=host_memory_bytes)
    return Problem(app, cluster, tuple(scenarios), tuple(n.costs() for n in nodes))
