"""Requests of one node that hang together."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from samullm_plugin.model.chains import Chains, chains_of

Edges = list[list[int]]


@st.composite
def edges(draw: st.DrawFn) -> Edges:
    """Per request the earlier ones it waits for."""
    count = draw(st.integers(1, 12))
    return [
        draw(st.lists(st.integers(0, r - 1), unique=True, max_size=3)) if r else []
        for r in range(count)
    ]


def brute_force(inputs: Edges) -> tuple[list[int], list[int], int]:
    """Return first of chain, depth and the most beside the longest line, by searching."""
    count = len(inputs)
    near = [set(row) | {q for q in range(count) if r in inputs[q]} for r, row in enumerate(inputs)]
    first = []
    for r in range(count):
        seen, todo = {r}, [r]
        while todo:
            new = near[todo.pop()] - seen
            seen |= new
            todo += new
        first.append(min(seen))

    def depth(r: int) -> int:
        return max((depth(q) + 1 for q in inputs[r]), default=0)

    depths = [depth(r) for r in range(count)]
    beside = [
        first.count(f) - 1 - max(d for d, g in zip(depths, first, strict=True) if g == f)
        for f in set(first)
    ]
    return first, depths, max(beside)


def pairs(inputs: Edges, begin: int = 0) -> list[tuple[int, int]]:
    return [(r, q) for r, row in enumerate(inputs) if r >= begin for q in row]


@given(edges())
def test_as_by_searching(inputs: Edges) -> None:
    rows = np.array([r for r, _ in pairs(inputs)], np.int64)
    requests = np.array([q for _, q in pairs(inputs)], np.int64)
    chains = chains_of(len(inputs), rows, requests)
    first, depth, beside = brute_force(inputs)
    assert chains.first.tolist() == first
    assert chains.depth == depth
    assert chains.most_beside == beside


@given(edges(), st.data())
def test_grown_in_two_steps_it_is_the_same_and_the_copy_is_untouched(
    inputs: Edges, data: st.DataObject
) -> None:
    begin = data.draw(st.integers(0, len(inputs)))
    chains = Chains()
    chains.grow(begin, pairs(inputs[:begin]))
    before = chains.copy()
    chains.grow(len(inputs) - begin, pairs(inputs, begin))
    assert (chains.first.tolist(), chains.depth, chains.most_beside) == brute_force(inputs)
    if begin:
        assert (before.first.tolist(), before.depth, before.most_beside) == brute_force(
            inputs[:begin]
        )
