"""Requests of a node, and which of them its user wrote as a node of their own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import overload

import numpy as np

from samullm_plugin.model.types import Bools, Floats, Ints


@dataclass(frozen=True, slots=True, eq=False)
class RequestTable:
    """Requests of one node, one row each, in submission order.

    Attributes:
        prompt_tokens: the request's own prompt (template and user text) without upstream outputs,
            shape ``(n,)``.
        max_tokens: limit of its output, at least 1, shape ``(n,)``.
        prefix_id: requests of equal id share their first ``prefix_tokens`` prompt tokens; -1: none.
        prefix_tokens: length of that prefix.
        input_indptr: shape ``(n + 1,)``; the inputs of request ``r`` are the entries
            ``input_indptr[r]:input_indptr[r + 1]`` of the next three (:meth:`entries`).
        input_node: index of the node whose output is waited for; the node itself for a chain whose
            request waits for an earlier one of the same node.
        input_request: index of the request in that node.
        input_in_prompt: the output's tokens are added to the prompt (else it is only waited for).
        probability: chance that the request is needed at all, shape ``(n,)``; below one behind
            routers and filters that decide at run time.
        choice: requests of equal id, over all nodes, are alternatives of which exactly one is
            taken, by ``probability``; -1: taken or not independently.
        gate: requests of equal id, over all nodes, are let through by the same upstream filter:
            they share one draw, so that those of equal probability are taken together; -1 or None:
            independent.
        input_needed: the request is not taken where this input is not; None: no input is needed
            by itself, and a request is left out only with all of its inputs.
    """

    prompt_tokens: Ints
    max_tokens: Ints
    prefix_id: Ints
    prefix_tokens: Ints
    input_indptr: Ints
    input_node: Ints
    input_request: Ints
    input_in_prompt: Bools
    probability: Floats
    choice: Ints
    gate: Ints | None = None
    input_needed: Bools | None = None

    @classmethod
    def of(
        cls,
        prompt_tokens: Ints | list[int],
        max_tokens: Ints | list[int] | int,
        inputs: list[list[tuple[int, int]]] | None = None,
        *,
        in_prompt: bool = True,
        probability: Floats | None = None,
        choice: Ints | None = None,
        prefix_id: Ints | None = None,
        prefix_tokens: Ints | None = None,
        gate: Ints | None = None,
        needed: Bools | None = None,
    ) -> RequestTable:
        """Build a table from lists; ``inputs[r]`` holds the (node, request) pairs of request r."""
        prompts = np.asarray(prompt_tokens, dtype=np.int64)
        n = len(prompts)
        edges = inputs if inputs is not None else [[] for _ in range(n)]
        flat = [pair for row in edges for pair in row]
        return cls(
            prompts,
            np.broadcast_to(np.asarray(max_tokens, dtype=np.int64), (n,)).copy(),
            np.full(n, -1, np.int64) if prefix_id is None else prefix_id,
            np.zeros(n, np.int64) if prefix_tokens is None else prefix_tokens,
            np.cumsum([0, *(len(row) for row in edges)], dtype=np.int64),
            np.array([node for node, _ in flat], dtype=np.int64),
            np.array([request for _, request in flat], dtype=np.int64),
            np.full(len(flat), in_prompt),
            np.ones(n) if probability is None else probability,
            np.full(n, -1, np.int64) if choice is None else choice,
            gate,
            needed,
        )

    def __len__(self) -> int:
        """Return the number of requests."""
        return len(self.prompt_tokens)

    def entries(self, request: int) -> range:
        """Return which of the inputs are a request's."""
        return range(*self.input_indptr[request : request + 2].tolist())

    @property
    def input_row(self) -> Ints:
        """Return the request each input belongs to, shape of ``input_node``."""
        return np.repeat(np.arange(len(self)), np.diff(self.input_indptr))


@dataclass(frozen=True, slots=True)
class NodePart:
    """Consecutive requests of a node that its user wrote as a node of their own.

    Behind each request come those that ask it again where its output is rejected
    (:mod:`samullm_plugin.rules.repeats`): for the second try, the third, and so on. Only plans and
    executors that model engines know them.

    Attributes:
        name: of the user's node.
        task: its task.
        start: its first request in the node's table.
        stop: the one behind its last, repeated requests included.
        repeats: how often each request is in the table again.
    """

    name: str
    task: str
    start: int
    stop: int
    repeats: int = 0

    def __len__(self) -> int:
        """Return the number of its requests, without repeated ones."""
        return (self.stop - self.start) // (1 + self.repeats)

    @property
    def rows(self) -> slice:
        """Return its requests in the node's table, without repeated ones."""
        return slice(self.start, self.stop, 1 + self.repeats)

    @property
    def again(self) -> Ints:
        """Return its repeated requests in the node's table."""
        every = np.arange(self.start, self.stop)
        return every[(every - self.start) % (1 + self.repeats) > 0]

    @overload
    def place(self, index: int) -> int: ...

    @overload
    def place(self, index: Ints) -> Ints: ...

    def place(self, index: int | Ints) -> int | Ints:
        """Return where requests of the user's node are in the node's table, not repeated."""
        return self.start + index * (1 + self.repeats)

    @property
    def whole(self) -> slice:
        """Return its requests in the node's table, repeated ones included."""
        return slice(self.start, self.stop)

    @property
    def written(self) -> Ints:
        """Return by request of :attr:`whole` its index in the user's node."""
        return np.repeat(np.arange(len(self)), 1 + self.repeats)
