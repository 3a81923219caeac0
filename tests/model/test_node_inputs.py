"""What requests wait for where some of those before them are not taken."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from samullm_plugin.model.application import Application
from samullm_plugin.simulator.requests import NodeInputs
from samullm_plugin.testing.factories import TestNode


@st.composite
def worlds(
    draw: st.DrawFn,
) -> tuple[list[list[int]], list[bool], list[float | None], list[int]]:
    """Per request: earlier ones it waits for, taken, when an outside input is there, seconds."""
    count = draw(st.integers(1, 9))
    own = [
        draw(st.lists(st.integers(0, r - 1), unique=True, max_size=3)) if r else []
        for r in range(count)
    ]
    taken = draw(st.lists(st.booleans(), min_size=count, max_size=count))
    outside = draw(st.lists(st.one_of(st.none(), st.floats(0, 9)), min_size=count, max_size=count))
    seconds = draw(st.lists(st.integers(1, 5), min_size=count, max_size=count))
    return own, taken, outside, seconds


@given(worlds())
def test_who_waits_for_one_not_taken_waits_for_what_that_waits_for(
    world: tuple[list[list[int]], list[bool], list[float | None], list[int]],
) -> None:
    own, taken, outside, seconds = world
    count = len(own)
    inputs = [
        [(1, q) for q in own[r]] + ([(0, r)] if outside[r] is not None else [])
        for r in range(count)
    ]
    app = Application(
        "test",
        (
            TestNode("source", [4] * count, [1] * count).node(),
            TestNode("chain", [4] * count, [1] * count, inputs).node(),
        ),
    )
    ready, settled = [0.0] * count, [0.0] * count
    for r in range(count):  # by the definition: settled with all inputs, and computed if taken
        ready[r] = max([outside[r] or 0.0, *(settled[q] for q in own[r])])
        settled[r] = ready[r] + (seconds[r] if taken[r] else 0.0)
    source = np.array([0.0 if t is None else t for t in outside])
    mask = np.array(taken)
    node = NodeInputs(app, 1).past(mask)
    available = node.available_s([source, np.array(settled)])
    there = np.zeros(count) if available is None else available
    assert all(taken[q] for q in node.own_request) or mask.all()
    assert (np.diff(node.own_row) >= 0).all()
    for r in range(count):
        before = [settled[q] for q in node.own_request[node.own_row == r]]
        assert max([there[r], *before]) == ready[r]
    finish = np.where(mask, settled, np.nan)
    assert node.settled_s(mask, available, finish).tolist() == settled


def test_long_chains_that_are_not_taken_stay_small() -> None:
    """A filter before each document: every chunk waits for its verdict and for the one before."""
    count = 3000
    inputs = [[(0, 0)], *([(0, 0), (1, r - 1)] for r in range(1, count))]
    app = Application(
        "test",
        (
            TestNode("filter", [4], [1]).node(),
            TestNode("chunks", [4] * count, [1] * count, inputs).node(),
        ),
    )
    taken = np.zeros(count, bool)
    node = NodeInputs(app, 1).past(taken)
    assert node._past is not None
    assert len(node._past[0]) < 2 * count
    available = node.available_s([np.array([7.0])])
    assert available is not None
    assert (available == 7.0).all()
