"""A multi-LLM application: models, their requests, and which output enters which prompt."""

from __future__ import annotations

from dataclasses import dataclass, field
from graphlib import CycleError, TopologicalSorter

import numpy as np

from samullm_plugin.errors import InputError
from samullm_plugin.model.architecture import ModelArchitecture
from samullm_plugin.model.requests import NodePart, RequestTable
from samullm_plugin.model.types import Floats, Ints


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """Engine settings of a model, by vLLM's names (``vllm/engine/arg_utils.py``)."""

    max_num_seqs: int = 256
    max_num_batched_tokens: int = 8192
    block_size: int = 16
    enable_prefix_caching: bool = False
    async_scheduling: bool = True
    gpu_memory_utilization: float = 0.9
    dtype: str = "auto"
    extra: tuple[tuple[str, object], ...] = ()

    @property
    def in_flight_tokens(self) -> int:
        """Return the most tokens that are scheduled and not yet settled."""
        return self.max_num_batched_tokens * (2 if self.async_scheduling else 1)

    def given(self, name: str) -> object | None:
        """Return an engine argument that the planner has no field for, or None."""
        return dict(self.extra).get(name)


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """A checkpoint and how its engines are started.

    Attributes:
        name: as profiles name it, such as ``lmsys/vicuna-13b-v1.5``.
        max_model_len: longest prompt plus output, in tokens.
        architecture: sizes, if known; needed for anything that was not profiled.
        path: local folder or hub id the running phase loads; ``name`` if None.
        engine: engine settings.
    """

    name: str
    max_model_len: int
    architecture: ModelArchitecture | None = None
    path: str | None = None
    engine: EngineOptions = EngineOptions()


@dataclass(frozen=True, slots=True, eq=False)
class ModelNode:
    """One use of a model in the application.

    Attributes:
        name: unique in the application.
        model: the checkpoint; several nodes may use the same.
        requests: what it is asked.
        task: label that length estimators may tell apart, such as ``summary``.
        fused: the user's nodes that have become this one, in order; empty if it is one itself.
        retries: how often an output that is rejected is asked for again.
        reject_rate: share of outputs expected to be rejected each time.
        repeats: how often its table holds each request again, as in :class:`NodePart`.
    """

    name: str
    model: ModelSpec
    requests: RequestTable
    task: str = ""
    fused: tuple[NodePart, ...] = ()
    retries: int = 0
    reject_rate: float = 0.0
    repeats: int = 0

    @property
    def parts(self) -> tuple[NodePart, ...]:
        """Return the user's nodes it consists of: itself, unless it was fused of several."""
        whole = NodePart(self.name, self.task, 0, len(self.requests), self.repeats)
        return self.fused or (whole,)


@dataclass(frozen=True, slots=True, eq=False)
class PythonNode:
    """A function of rows, called on CPUs; it takes no device and is in no plan.

    Its table holds one request per *call*, and behind those one per row that calls may give back
    (a list, or the rows that go on of all): such a row waits for its call and is there at once when
    that has ended. Where calls give one value each, they are the rows themselves.

    The tokens of a row's value in later prompts are its ``prompt_tokens`` (0 or more) and
    ``tokens_share`` of the outputs that enter it.

    Attributes:
        name: unique in the application.
        requests: the calls, then the rows.
        num_calls: how many are calls.
        seconds: of one call.
        workers: processes that call it side by side.
        tokens_share: see above; of rows that are no calls, where there are such.
        at_once: one call takes all rows; one that failed is none of them.
    """

    name: str
    requests: RequestTable
    num_calls: int
    seconds: float = 0.0
    workers: int = 1
    tokens_share: float = 1.0
    at_once: bool = False

    @property
    def parts(self) -> tuple[NodePart, ...]:
        """Return itself, as the only node it consists of."""
        return (NodePart(self.name, "", 0, len(self.requests)),)

    @property
    def hidden_calls(self) -> int:
        """Return how many of its first requests are calls whose values the rows behind them hold.

        0: each call is a row itself.
        """
        return self.num_calls if self.num_calls < len(self.requests) else 0

    def value_tokens(self, rows: Ints, input_tokens: Ints) -> Ints:
        """Return the tokens of values.

        Args:
            rows: requests of the table.
            input_tokens: of the outputs that enter each.
        """
        whole = rows < self.hidden_calls
        share = np.where(whole, 1.0, self.tokens_share)
        tokens = self.requests.prompt_tokens[rows] + np.rint(share * input_tokens)
        found: Ints = np.maximum(tokens, 1).astype(np.int64)
        return found

    def call_ends_s(self, available_s: Floats) -> Floats:
        """Return when calls end whose inputs are there at these times, in the order they come."""
        order = np.argsort(available_s, kind="stable")
        ends = np.empty(len(order))
        for first in range(min(self.workers, len(order))):
            turn = order[first :: self.workers]
            passed = self.seconds * np.arange(len(turn))
            ends[turn] = np.maximum.accumulate(available_s[turn] - passed) + passed + self.seconds
        return ends


@dataclass(frozen=True, slots=True, eq=False)
class Application:
    """A directed acyclic graph of model nodes, and of Python nodes between and behind them.

    Attributes:
        name: for people.
        nodes: of models, in any order; a node is named by its index in request tables and by its
            name in plans.
        notes: what had to be assumed about the application, for people.
        python: nodes that need no engine; in request tables their indices follow those of
            ``nodes``.
        order: ``nodes`` in a topological order.
        upstreams: per node of ``nodes``, those of ``nodes`` it waits for, directly or through
            Python nodes.
        sources: per node of all, Python nodes last, the nodes of all whose outputs it waits for.
        full_order: the indices of all nodes in a topological order.
        through_python: per node of ``nodes``, those of ``nodes`` that a Python node stands between,
            however far.
    """

    name: str
    nodes: tuple[ModelNode, ...]
    notes: tuple[str, ...] = ()
    python: tuple[PythonNode, ...] = ()
    order: tuple[int, ...] = field(init=False)
    upstreams: tuple[frozenset[int], ...] = field(init=False)
    sources: tuple[frozenset[int], ...] = field(init=False)
    full_order: tuple[int, ...] = field(init=False)
    through_python: tuple[frozenset[int], ...] = field(init=False)
    _index: dict[str, int] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Check the graph and find a topological order of the nodes.

        Raises:
            InputError: for duplicate names, an empty node, bad lengths, a missing upstream or a
                cycle.
        """
        names = [p.name for n in self.all_nodes for p in n.parts]
        names += [n.name for n in self.nodes if n.fused]
        if not self.nodes:
            raise InputError(f"application {self.name}: it has no nodes of models")
        if duplicate := next((n for n in names if names.count(n) > 1), None):
            raise InputError(f"application {self.name}: two nodes are named {duplicate!r}")
        direct = [self._check(i, node) for i, node in enumerate(self.all_nodes)]
        try:
            order = tuple(TopologicalSorter(dict(enumerate(direct))).static_order())
        except CycleError as error:
            cycle = " -> ".join(self.all_nodes[i].name for i in error.args[1])
            raise InputError(
                f"application {self.name}: the nodes form a cycle: {cycle}; "
                "a node that feeds itself must do so by requests that wait for earlier ones"
            ) from error
        num = len(self.nodes)
        before: list[frozenset[int]] = [frozenset()] * len(direct)  # nodes of models
        passed: list[frozenset[int]] = [frozenset()] * len(direct)  # those beyond a Python node
        everything: list[frozenset[int]] = [frozenset()] * len(direct)
        for i in order:
            before[i] = frozenset().union(*({u} if u < num else before[u] for u in direct[i]))
            everything[i] = before[i].union(*(everything[u] for u in direct[i]))
            beyond = (everything[u] if u >= num else passed[u] for u in direct[i])
            passed[i] = frozenset().union(*beyond)
        object.__setattr__(self, "order", tuple(i for i in order if i < num))
        object.__setattr__(self, "upstreams", tuple(before[:num]))
        object.__setattr__(self, "sources", tuple(direct))
        object.__setattr__(self, "full_order", order)
        object.__setattr__(self, "through_python", tuple(passed[:num]))
        object.__setattr__(self, "_index", {node.name: i for i, node in enumerate(self.nodes)})

    @property
    def all_nodes(self) -> tuple[ModelNode | PythonNode, ...]:
        """Return the nodes of models, then the Python nodes, as request tables count them."""
        return (*self.nodes, *self.python)

    def _check(self, index: int, node: ModelNode | PythonNode) -> frozenset[int]:
        """Return the other nodes this node waits for, after checking its table."""
        table, where = node.requests, f"application {self.name}, node {node.name}"
        if len(table) == 0:
            raise InputError(f"{where}: it has no requests")
        if isinstance(node, ModelNode):
            _check_prompts(node, where)
        for source in np.unique(table.input_node):
            if not 0 <= source < len(self.all_nodes):
                raise InputError(f"{where}: it waits for node {source}, which does not exist")
            requests = table.input_request[table.input_node == source]
            if (requests < 0).any() or (requests >= len(self.all_nodes[source].requests)).any():
                name = self.all_nodes[source].name
                raise InputError(f"{where}: it waits for a request that {name} does not have")
        own = table.input_node == index
        if (table.input_request[own] >= table.input_row[own]).any():
            raise InputError(f"{where}: a request may wait only for earlier ones of its own node")
        return frozenset(int(s) for s in np.unique(table.input_node) if s != index)

    def index(self, name: str) -> int:
        """Return the index of a node.

        Raises:
            InputError: naming the nodes there are.
        """
        if name in self._index:
            return self._index[name]
        known = ", ".join(n.name for n in self.nodes)
        raise InputError(f"application {self.name} has no node {name!r}; it has {known}")

    @property
    def fused(self) -> dict[str, tuple[str, ...]]:
        """Return by name the nodes that were fused of several, and those."""
        return {n.name: tuple(p.name for p in n.fused) for n in self.nodes if n.fused}

    @property
    def num_requests(self) -> int:
        """Return the requests of all nodes of models."""
        return sum(len(n.requests) for n in self.nodes)


def _check_prompts(node: ModelNode, where: str) -> None:
    """Refuse lengths that cannot be."""
    table = node.requests
    ends = [0, *(p.stop for p in node.parts)]
    if [p.start for p in node.parts] != ends[:-1] or ends[-1] != len(table):
        raise InputError(f"{where}: its parts are not its {len(table)} requests one by one")
    if (table.prompt_tokens < 1).any():
        row = int(np.argmax(table.prompt_tokens < 1))
        raise InputError(f"{where}: prompt_tokens of request {row} must be at least 1")
    if (table.max_tokens < 1).any():
        row = int(np.argmax(table.max_tokens < 1))
        raise InputError(f"{where}: max_tokens of request {row} must be at least 1")
    if (table.prompt_tokens >= node.model.max_model_len).any():
        row = int(np.argmax(table.prompt_tokens >= node.model.max_model_len))
        raise InputError(
            f"{where}: prompt_tokens of request {row} is {table.prompt_tokens[row]}; with "
            f"max_model_len {node.model.max_model_len} it must be below that"
        )
