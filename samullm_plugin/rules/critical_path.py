"""When requests can finish at the earliest: by their own iterations and what they wait for.

An output token needs an iteration of its own request, no iteration is faster than the fastest
possible one for a sequence of that length, and a request begins after its inputs and an engine
start. A plan may preempt a request at any moment: then one decode step is replaced by a prefill of
everything so far, which may be the cheaper of the two where reading context is dear.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from samullm_plugin.model.application import PythonNode
from samullm_plugin.model.costs import ModeCosts
from samullm_plugin.model.engine_config import EngineConfig
from samullm_plugin.model.latency import StepLatency
from samullm_plugin.model.problem import Problem
from samullm_plugin.model.scenarios import LengthScenario
from samullm_plugin.model.types import Bools, Floats, Ints
from samullm_plugin.rules.iteration_prices import iteration_parts


def modes_of(problem: Problem, node: int) -> list[tuple[int, ModeCosts, EngineConfig]]:
    """Return devices per replica, costs and engine settings of every size that fits."""
    return [
        (
            key.num_devices,
            costs,
            problem.engine_config(node, costs, key.pipeline_parallel_size),
        )
        for key, costs in problem.costs[node].items()
        if problem.fits(node, key)
    ]


@dataclass(frozen=True, slots=True)
class Window:
    """Between which moments a node can be at work, devices being unlimited.

    Attributes:
        head_s: no iteration of it begins before this.
        end_s: its last request cannot finish before this.
        tail_s: no makespan is less than this after its last request.
    """

    head_s: float
    end_s: float
    tail_s: float


@dataclass(frozen=True, slots=True)
class Earliest:
    """When requests can begin and finish at the earliest, by node and request.

    Attributes:
        ready_s: no iteration of a request begins before this.
        finish_s: it cannot finish before this.
    """

    ready_s: list[Floats]
    finish_s: list[Floats]

    @property
    def end_s(self) -> float:
        """Return when the last request of all can finish at the earliest."""
        return max(float(f.max()) for f in self.finish_s)


class Paths:
    """A problem's requests in one length scenario, each with an engine for itself.

    Attributes:
        taken: by node, which requests are needed.
        alone_s: by node, the least seconds of each request, 0 where it is not needed.
        after_s: by node, the least seconds from each request's end to that of all behind it.
        load_s: by node, when its engines can be ready at the earliest.
    """

    def __init__(
        self,
        problem: Problem,
        scenario: LengthScenario,
        ahead_s: Mapping[int, float],
        started: Container[int],
    ) -> None:
        """Look at all requests.

        Args:
            problem: the instance.
            scenario: lengths.
            ahead_s: by index of a node whose engines run, the seconds of work they have done.
            started: nodes that may be served by engines which run.
        """
        self._app = app = problem.app
        count = len(app.all_nodes)
        self.taken = [tokens > 0 for tokens in scenario.output_tokens]
        self.load_s, self.alone_s = [0.0] * count, [np.empty(0)] * count
        for i in range(count):
            found = _load_and_alone_s(problem, scenario, i, ahead_s, i in started)
            self.load_s[i] = found[0]
            self.alone_s[i] = np.where(self.taken[i], found[1], 0.0)
        self._read: list[list[tuple[int, Ints, Ints]]] = []  # source, rows, requests of it
        self._own: list[list[tuple[int, int]]] = []  # rows and requests they wait for, both taken
        for i, node in enumerate(app.all_nodes):
            table = node.requests
            rows, taken = table.input_row, self.taken[i]
            own = table.input_node == i
            read = []
            for source in np.unique(table.input_node[~own]).tolist():
                part = np.flatnonzero(table.input_node == source)
                read.append((source, rows[part], table.input_request[part]))
            self._read.append(read)
            both = own & taken[rows]
            both[own] &= taken[table.input_request[own]]
            pairs = zip(rows[both].tolist(), table.input_request[both].tolist(), strict=True)
            self._own.append(list(pairs))
        self.after_s = [np.zeros(len(t)) for t in self.taken]
        for i in reversed(app.full_order):
            after_s, alone_s = self.after_s[i], self.alone_s[i]
            for r, q in reversed(self._own[i]):
                after_s[q] = max(after_s[q], alone_s[r] + after_s[r])
            behind_s = alone_s + after_s
            for source, rows, requests in self._read[i]:
                np.maximum.at(self.after_s[source], requests, behind_s[rows])

    @property
    def entries(self) -> int:
        """Return how many requests and inputs there are to look at."""
        inputs = sum(len(n.requests.input_row) for n in self._app.all_nodes)
        return inputs + sum(len(t) for t in self.taken)

    def earliest(self, later_s: Mapping[int, Floats] | None = None) -> Earliest:
        """Return when requests can begin and finish at the earliest.

        Args:
            later_s: by index of some nodes, moments before which their requests do not finish.
        """
        later_s = later_s or {}
        finish: list[Floats] = [np.empty(0)] * len(self.taken)
        readys = list(finish)
        for i in self._app.full_order:
            alone_s = self.alone_s[i]
            ready = np.where(self.taken[i], self.load_s[i], 0.0)
            for source, rows, requests in self._read[i]:
                np.maximum.at(ready, rows, finish[source][requests])
            ends = ready + alone_s
            if i in later_s:
                ends = np.maximum(ends, later_s[i])
            for r, q in self._own[i]:  # earlier ones first
                if ends[q] > ready[r]:
                    ready[r] = ends[q]
                    ends[r] = max(ends[r], ready[r] + alone_s[r])
            readys[i], finish[i] = ready, ends
        return Earliest(readys, finish)

    @property
    def order(self) -> Sequence[int]:
        """Return the nodes, those that others wait for first."""
        return self._app.full_order

    def behind_s(self, node: int) -> dict[int, float]:
        """Return by source the least seconds from its last request to that of a node."""
        found = {}
        for source, rows, requests in self._read[node]:
            behind_s = np.zeros(len(self.taken[source]))
            np.maximum.at(behind_s, requests, self.alone_s[node][rows])
            found[source] = float(behind_s[self._lasts(source)].min(initial=np.inf))
        return {u: s for u, s in found.items() if np.isfinite(s)}

    def tail_s(self, node: int) -> float:
        """Return the least seconds behind a node's last request."""
        return float(self.after_s[node][self._lasts(node)].min(initial=np.inf))

    def _lasts(self, node: int) -> Bools:
        """Return which requests of a node can be its last."""
        last = self.taken[node].copy()
        last[[q for _, q in self._own[node]]] = False
        return last

    def window(self, earliest: Earliest, node: int) -> Window:
        """Return between which moments a model can be at work."""
        taken = self.taken[node]
        return Window(
            float(earliest.ready_s[node][taken].min(initial=np.inf)),
            float(earliest.finish_s[node].max()),
            self.tail_s(node),
        )


def _load_and_alone_s(
    problem: Problem,
    scenario: LengthScenario,
    node: int,
    ahead_s: Mapping[int, float],
    started: bool,
) -> tuple[float, Floats]:
    """Return when a node's engines can be ready, and the least seconds of each request alone."""
    app = problem.app
    described = app.all_nodes[node]
    if isinstance(described, PythonNode):
        called = np.arange(len(described.requests)) < described.num_calls
        return 0.0, np.where(called, described.seconds, 0.0)
    modes = modes_of(problem, node)
    alone = np.min([alone_s(scenario, node, c.latency, e) for _, c, e in modes], axis=0)
    if started:
        return 0.0, np.maximum(alone - ahead_s.get(node, 0.0), 0.0)
    return min(problem.first_ready_s(node, costs) for _, costs, _ in modes), alone


def alone_s(scenario: LengthScenario, node: int, latency: object, config: EngineConfig) -> Floats:
    """Return the least seconds of each request with an engine for itself, shape ``(n,)``."""
    prompts = scenario.prompt_tokens[node]
    outputs = scenario.output_tokens[node]
    if not isinstance(latency, StepLatency):
        return np.zeros(len(prompts))
    step_s: Floats = _least_step_s(latency, config)
    so_far = np.concatenate(([0.0], np.cumsum(step_s)))  # at n: the steps of lengths 1 to n
    decode = np.maximum(outputs - 1, 0)
    prefill_steps = (
        1.0 if config.enable_prefix_caching else np.ceil(prompts / config.max_num_batched_tokens)
    )
    ends = np.minimum(prompts + decode, len(step_s))
    generate_s = so_far[ends] - so_far[np.minimum(prompts, ends)]
    # Chunks of a prompt follow each other through the pipeline's stages; a token that is generated
    # has passed all of them before the next one begins.
    stages = config.pipeline_parallel_size
    return np.asarray((prefill_steps + stages - 1) * step_s[0] + stages * generate_s)


@lru_cache(maxsize=1024)
def _least_step_s(latency: StepLatency, config: EngineConfig) -> Floats:
    """Return the least seconds of an iteration that lengthens a sequence, by its length.

    At ``n - 1``: the sequence has ``n`` tokens including the one computed; it decodes, or it was
    preempted and is computed anew. Shape ``(max_model_len,)``, not decreasing.
    """
    tables = iteration_parts(latency, config)
    lengths = np.arange(1, config.max_model_len + 1)
    lone_s = latency.longest_token_s if latency.longest_over_seqs < 1 else 0.0
    read_s = max(latency.context_token_s, lone_s, 0.0) * lengths
    least = np.minimum.accumulate(tables.tokens[::-1])[::-1]  # of at least so many tokens
    floor_s = max(0.0, float(least[0]))
    pairs_s = max(0.0, latency.prefill_pair_s)
    if config.enable_prefix_caching:
        again_s = pairs_s * lengths
    else:
        # In one iteration with at least so many tokens, or in several.
        at_once = np.minimum(lengths, len(least))
        again_s = np.minimum(np.maximum(least[at_once - 1] - floor_s, 0.0), floor_s)
        again_s += max(0.0, latency.prefill_token_s) * lengths
        again_s += pairs_s * lengths * (lengths + 1) / 2
        again_s[lengths > 1] = np.minimum.accumulate(again_s[:0:-1])[::-1]
    seqs_s = max(0.0, float(tables.seqs.min()))
    work_s = floor_s + seqs_s + np.minimum(read_s, again_s)
    host_s = max(0.0, float(tables.host.min()))
    return np.asarray(np.maximum(work_s, tables.launch) + host_s)
