"""Random problems of every kind that applications come in, made again by their number.

Costs are the bundled A100 figures; lengths are drawn from log-normal distributions and known. Run
from the repository root to list them::

    python benchmarks/random_problems.py [FIRST] [LAST]
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache

import numpy as np

from samullm_plugin import Application, ModelNode, Problem, RequestTable, bundled_model
from samullm_plugin.checkpoints.gpus import bundled_gpu
from samullm_plugin.host.manager import PluginHost
from samullm_plugin.model.cluster import Cluster
from samullm_plugin.model.costs import ModeCosts
from samullm_plugin.model.problem import ModeKey
from samullm_plugin.model.scenarios import make_scenario
from samullm_plugin.model.types import Ints
from samullm_plugin.planning.building import collect_costs

COUNT = 500
"""Problems of the quality table."""

MODELS = (
    "lmsys/vicuna-13b-v1.5",
    "mosaicml/mpt-7b-chat",
    "THUDM/chatglm3-6b",
    "TheBloke/koala-13B-HF",
    "databricks/dolly-v2-12b",
    "WizardLMTeam/WizardLM-13B-V1.2",
    "mistralai/Mistral-7B-Instruct-v0.2",
    "meta-llama/Llama-2-70b-chat-hf",
    "mistralai/Mixtral-8x7B-Instruct-v0.1",
)
LARGE = 2
"""Of them, the last ones, which need two or more GPUs."""

GPUS = (1, 2, 3, 4, 4, 5, 6, 7, 8, 8, 8, 12, 16, 32, 64)

Edges = Sequence[tuple[int, ...]]
"""By node, the nodes whose outputs enter its prompts."""


@dataclass(frozen=True)
class Described:
    """A random problem.

    Attributes:
        number: by which it is made again.
        kind: of its application.
        problem: the problem itself, one length scenario.
    """

    number: int
    kind: str
    problem: Problem

    @property
    def label(self) -> str:
        """Return what it is in a few words."""
        app, cluster = self.problem.app, self.problem.cluster
        return (
            f"{self.number} {self.kind}: {len(app.nodes)} nodes, {app.num_requests:,} requests, "
            f"{cluster.num_gpus} GPUs"
        )

    @property
    def size(self) -> str:
        """Return its size class."""
        nodes, gpus = len(self.problem.app.nodes), self.problem.cluster.num_gpus
        if self.problem.app.num_requests >= 20_000:
            return "20,000 requests and more"
        if nodes > 12:
            return "more than 12 nodes"
        width = "1-4" if gpus <= 4 else "5-8" if gpus <= 8 else "12-64"
        return f"{'1-4' if nodes <= 4 else '5-12'} nodes, {width} GPUs"


def fan(rng: np.random.Generator, count: int) -> Edges:
    """Return nodes that wait for nobody."""
    return [() for _ in range(count)]


def pipeline(rng: np.random.Generator, count: int) -> Edges:
    """Return nodes in a row."""
    return [(i - 1,) if i else () for i in range(count)]


def diamond(rng: np.random.Generator, count: int) -> Edges:
    """Return one node, several behind it, and one that reads them all."""
    middle = tuple(range(1, count - 1))
    return [(), *((0,) for _ in middle), middle or (0,)]


def judged(rng: np.random.Generator, count: int) -> Edges:
    """Return several nodes and one that reads each of their outputs."""
    return [*(() for _ in range(count - 1)), tuple(range(count - 1))]


def layered(rng: np.random.Generator, count: int) -> Edges:
    """Return a random graph."""
    edges: list[tuple[int, ...]] = []
    for i in range(count):
        most = min(i, 2)
        several = int(rng.integers(0, most + 1))
        near = np.arange(max(0, i - 6), i)
        edges.append(tuple(sorted(rng.choice(near, several, replace=False).tolist())) if i else ())
    return edges


SHAPES: Mapping[str, Callable[[np.random.Generator, int], Edges]] = {
    "fan": fan,
    "pipeline": pipeline,
    "diamond": diamond,
    "judged": judged,
    "layered": layered,
    "documents": pipeline,
    "map-reduce": pipeline,
    "equal": fan,
}


@cache
def _latency() -> object:
    return PluginHost().create("latency-model", "linear")


@cache
def _costs(model: str, limit: int, sizes: tuple[int, ...]) -> Mapping[ModeKey, ModeCosts]:
    """Return a model's costs on NVLink groups of these sizes."""
    gpu = bundled_gpu("A100-80GB")
    cluster = Cluster.uniform(gpu, max(sizes), nvlink=max(sizes))
    node = ModelNode("x", bundled_model(model, max_model_len=limit), RequestTable.of([1], 1))
    latency = _latency()
    return collect_costs(Application("x", (node,)), cluster, latency)[0]  # type: ignore[arg-type]  # a latency model


def make(number: int) -> Described:
    """Return a random problem."""
    rng = np.random.default_rng([number, 1509])
    kind = str(rng.choice(list(SHAPES)))
    size = rng.random()
    count = int(rng.integers(3, 9)) if kind in ("pipeline", "diamond") else int(rng.integers(2, 13))
    if kind in ("documents", "map-reduce"):
        count = int(rng.integers(2, 5))
    base = int(10 ** rng.uniform(1.0, 3.7))
    gpus = int(rng.choice(GPUS))
    if size < 0.03:
        kind, count, base = "layered", 200, int(rng.integers(20, 200))
    elif size < 0.10:
        base = int(10 ** rng.uniform(4.0, 5.0))
        count = min(count, 10)
    cluster = _cluster(rng, gpus)
    group = max(len(g) for g in cluster.nvlink_groups)
    edges = SHAPES[kind](rng, count)
    names = [_model(rng, group, kind == "equal" and i > 0) for i in range(count)]
    if kind == "equal":
        names = [names[0]] * count
    nodes, outputs = _nodes(rng, kind, edges, names, base)
    app = Application(f"random-{number}", tuple(nodes))
    scenario = make_scenario(app, outputs)
    sizes = tuple(sorted({len(g) for g in cluster.nvlink_groups}))
    costs = tuple(_costs(n.model.name, n.model.max_model_len, sizes) for n in nodes)
    problem = Problem(app, cluster, (scenario,), costs).without_sleeping_engines()
    return Described(number, kind, problem)


def _cluster(rng: np.random.Generator, gpus: int) -> Cluster:
    gpu = bundled_gpu("A100-80GB")
    nvlink = int(rng.choice([n for n in (1, 2, 2, 4, 8) if n <= max(gpus, 1)]))
    one = Cluster.uniform(gpu, gpus, nvlink=nvlink)
    if gpus < 4 or gpus % (2 * nvlink) or rng.random() < 0.7:
        return one
    half = gpus // 2
    return Cluster(one.gpus, one.nvlink_groups, (tuple(range(half)), tuple(range(half, gpus))))


def _model(rng: np.random.Generator, group: int, any_size: bool) -> str:
    """Return a model that fits into NVLink groups of a size."""
    last = len(MODELS) if group >= 2 and rng.random() < 0.3 else len(MODELS) - LARGE
    return str(rng.choice(MODELS[:last]))


def _nodes(
    rng: np.random.Generator, kind: str, edges: Edges, names: Sequence[str], base: int
) -> tuple[list[ModelNode], list[Ints]]:
    """Return nodes and the output lengths of their requests."""
    nodes: list[ModelNode] = []
    outputs: list[Ints] = []
    short = rng.random() < 0.2  # engine starts take longer than the work
    base = max(4, base // 20) if short else base
    for i, (inputs, name) in enumerate(zip(edges, names, strict=True)):
        limit = min(4096, bundled_model(name).max_model_len)
        table = _requests(rng, kind, i, inputs, nodes, base, limit)
        spread = float(rng.choice([0.3, 0.7, 1.2]))
        median = float(10 ** rng.uniform(1.0, 2.5))
        drawn = np.ceil(rng.lognormal(np.log(median), spread, len(table)))
        if rng.random() < 0.15:
            drawn[int(rng.integers(len(table)))] = 2000  # one that is very long
        outputs.append(np.clip(drawn, 1, table.max_tokens).astype(np.int64))
        model = bundled_model(name, max_model_len=limit)
        nodes.append(ModelNode(f"n{i}", model, table, "task"))
    return nodes, outputs


def _requests(
    rng: np.random.Generator,
    kind: str,
    i: int,
    inputs: tuple[int, ...],
    nodes: Sequence[ModelNode],
    base: int,
    limit: int,
) -> RequestTable:
    """Return the requests of a node: one per output it reads, or as many as it likes."""
    most = int(rng.choice([64, 256, 1024]))

    def prompts(count: int) -> Ints:
        drawn = rng.lognormal(np.log(float(10 ** rng.uniform(1.3, 2.7))), 0.6, count)
        return np.clip(drawn, 4, limit // 3).astype(np.int64)

    if kind == "documents" and i == 0:
        return _chains(rng, max(2, base // 10), prompts, most)
    if not inputs:
        count = max(1, int(base * 10 ** rng.uniform(-0.3, 0.3)))
        return RequestTable.of(prompts(count), most)
    rows = min(len(nodes[u].requests) for u in inputs)
    if kind == "judged":
        pairs = [[(u, r)] for u in inputs for r in range(len(nodes[u].requests))]
    elif kind == "map-reduce":
        parts = np.array_split(np.arange(rows), max(1, rows // 8))
        pairs = [[(inputs[0], int(r)) for r in part] for part in parts]
    else:
        pairs = [[(u, r) for u in inputs] for r in range(rows)]
    in_prompt = kind != "map-reduce"
    return RequestTable.of(prompts(len(pairs)), most, pairs, in_prompt=in_prompt)


def _chains(
    rng: np.random.Generator, documents: int, prompts: Callable[[int], Ints], most: int
) -> RequestTable:
    """Return documents whose parts are read one after the other by the same model."""
    parts = np.minimum(1 + rng.geometric(0.25, documents), 60)
    own = prompts(int(parts.sum()))
    inputs: list[list[tuple[int, int]]] = []
    for n in parts:
        first = len(inputs)
        inputs += [[(0, first + k - 1)] if k else [] for k in range(int(n))]
    return RequestTable.of(own, min(most, 256), inputs)


def large(nodes: int, requests: int, gpus: int) -> Problem:
    """Return models of so many requests each, side by side, for timing at scale."""
    rng = np.random.default_rng([nodes, requests, gpus])
    names = [MODELS[i % (len(MODELS) - LARGE)] for i in range(nodes)]
    made, outputs = [], []
    for i, name in enumerate(names):
        drawn = rng.lognormal(np.log(100.0), 0.8, requests)
        limit = min(4096, bundled_model(name).max_model_len)
        table = RequestTable.of(rng.integers(20, 200, requests), 512)
        made.append(ModelNode(f"n{i}", bundled_model(name, max_model_len=limit), table))
        outputs.append(np.clip(drawn, 1, 512).astype(np.int64))
    app = Application("large", tuple(made))
    cluster = Cluster.uniform(bundled_gpu("A100-80GB"), gpus, nvlink=2)
    costs = tuple(_costs(n.model.name, n.model.max_model_len, (2,)) for n in made)
    return Problem(app, cluster, (make_scenario(app, outputs),), costs).without_sleeping_engines()


def one_of(described: Described, scenarios: int) -> Problem:
    """Return the problem with several length scenarios: the lengths in other orders."""
    problem = described.problem
    rng = np.random.default_rng(described.number)
    (first,) = problem.scenarios
    made = [first]
    for _ in range(scenarios - 1):
        outputs = [rng.permutation(o) for o in first.output_tokens]
        made.append(make_scenario(problem.app, outputs))
    return replace(problem, scenarios=tuple(made))


def main() -> None:
    """List them."""
    first, last = [*map(int, sys.argv[1:]), 0, COUNT][:2] if len(sys.argv) > 2 else (0, COUNT)
    for number in range(first, last):
        print(make(number).label)


if __name__ == "__main__":
    main()
