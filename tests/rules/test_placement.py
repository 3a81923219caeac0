"""Devices for the models of a stage."""

from __future__ import annotations

from samullm_plugin.model.parallel import ParallelConfig
from samullm_plugin.model.plan import Assignment
from samullm_plugin.rules.placement import place
from samullm_plugin.testing.factories import TestNode, make_problem

ONE, PAIR = ParallelConfig(), ParallelConfig(1, 2)


def test_the_smallest_models_make_room() -> None:
    """Free devices are in two groups; the pair that comes needs a whole one."""
    problem = make_problem([TestNode(n, [4], [4], sizes=(1, 2)) for n in "abcd"], 6, nvlink=2)
    held = {
        "a": Assignment("a", PAIR, (4, 5)),
        "b": Assignment("b", ONE, (0,)),
        "c": Assignment("c", ONE, (2,)),
    }
    placed = place(problem, {"a": PAIR, "b": ONE, "c": ONE, "d": PAIR}, held)
    assert placed is not None
    assert {a.node: a.devices for a in placed} == {"a": (4, 5), "b": (0,), "c": (1,), "d": (2, 3)}
    assert place(problem, {"a": PAIR, "b": ONE, "c": ONE}, held) == tuple(held.values())
    assert place(problem, {"a": PAIR, "b": PAIR, "c": PAIR, "d": ONE}, held) is None
