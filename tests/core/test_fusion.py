"""Chains written as one node per step become one node."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from samullm_plugin.core.application import Application
from samullm_plugin.core.fusion import fuse_chains
from samullm_plugin.testing.factories import TestNode


def application(*nodes: TestNode, same_model: tuple[str, ...] = ()) -> Application:
    built = [n.node() for n in nodes]
    shared = next((n.model for n in built if n.name in same_model), None)
    built = [replace(n, model=shared) if shared and n.name in same_model else n for n in built]
    return Application("test", tuple(built))


def chunks() -> Application:
    """Three documents of 3, 2 and 1 chunks, one node per chunk number, and a judge."""
    return application(
        TestNode("chunk-0", [11, 12, 13], [1] * 3),
        TestNode("chunk-1", [21, 22], [1] * 2, [[(0, 0)], [(0, 1)]]),
        TestNode("chunk-2", [31], [1], [[(1, 0)]]),
        TestNode("judge", [5] * 3, [1] * 3, [[(2, 0)], [(1, 1)], [(0, 2)]]),
        same_model=("chunk-0", "chunk-1", "chunk-2"),
    )


def test_a_chain_of_nodes_becomes_one() -> None:
    fused = fuse_chains(chunks())
    summary, judge = fused.app.nodes
    assert (summary.name, judge.name) == ("chunk-0", "judge")
    assert summary.requests.prompt_tokens.tolist() == [11, 12, 13, 21, 22, 31]
    assert summary.requests.input_indptr.tolist() == [0, 0, 0, 0, 1, 2, 3]
    assert summary.requests.input_request.tolist() == [0, 1, 3]
    assert (summary.requests.input_node == 0).all()
    assert judge.requests.input_node.tolist() == [0, 0, 0]
    assert judge.requests.input_request.tolist() == [5, 4, 2]
    assert fused.node == (0, 0, 0, 1)
    assert fused.offset == (0, 3, 5, 0)


def test_fusing_again_changes_nothing() -> None:
    once = fuse_chains(chunks()).app
    twice = fuse_chains(once)
    assert len(twice.app.nodes) == len(once.nodes)
    assert twice.offset == (0, 0)


def test_other_models_other_tasks_and_parallel_nodes_stay_apart() -> None:
    a = TestNode("a", [4], [1])
    b = TestNode("b", [4], [1], [[(0, 0)]])
    assert len(fuse_chains(application(a, b)).app.nodes) == 2
    same = application(a, b, same_model=("a", "b"))
    other_task = Application("t", (same.nodes[0], replace(same.nodes[1], task="judge")))
    assert len(fuse_chains(other_task).app.nodes) == 2
    beside = application(a, TestNode("b", [4], [1]), same_model=("a", "b"))
    assert len(fuse_chains(beside).app.nodes) == 2


def test_no_cycle_comes_of_it() -> None:
    """a -> x -> b, where a and b are one model: fused, x would wait for what waits for it."""
    a = TestNode("a", [4], [1])
    x = TestNode("x", [4], [1], [[(0, 0)]])
    b = TestNode("b", [4], [1], [[(0, 0), (1, 0)]])
    fused = fuse_chains(application(a, x, b, same_model=("a", "b")))
    assert [n.name for n in fused.app.nodes] == ["a", "x", "b"]


def test_upstreams_of_the_fused_node_may_be_shared() -> None:
    source = TestNode("source", [4], [1])
    a = TestNode("a", [4], [1], [[(0, 0)]])
    b = TestNode("b", [4], [1], [[(0, 0), (1, 0)]])
    fused = fuse_chains(application(source, a, b, same_model=("a", "b")))
    assert [n.name for n in fused.app.nodes] == ["source", "a"]
    assert fused.app.nodes[1].requests.input_node.tolist() == [0, 0, 1]
    assert fused.app.nodes[1].requests.input_request.tolist() == [0, 0, 0]


@pytest.mark.parametrize("gate", [None, np.array([7])])
def test_gates_are_kept(gate: np.ndarray | None) -> None:
    app = chunks()
    table = replace(app.nodes[2].requests, gate=gate)
    nodes = (*app.nodes[:2], replace(app.nodes[2], requests=table), app.nodes[3])
    fused = fuse_chains(Application("t", nodes)).app.nodes[0].requests.gate
    if gate is None:
        assert fused is None
    else:
        assert fused is not None
        assert fused.tolist() == [-1] * 5 + [7]
