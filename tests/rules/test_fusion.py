"""Chains written as one node per step become one node."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from samullm_plugin.errors import InputError
from samullm_plugin.model.application import Application, PythonNode
from samullm_plugin.model.requests import RequestTable
from samullm_plugin.rules.fusion import fuse_chains, fuse_groups, fused_name
from samullm_plugin.testing.factories import TestNode


def application(
    *nodes: TestNode, same_model: tuple[str, ...] = (), python: tuple[PythonNode, ...] = ()
) -> Application:
    built = [n.node() for n in nodes]
    shared = next((n.model for n in built if n.name in same_model), None)
    built = [replace(n, model=shared) if shared and n.name in same_model else n for n in built]
    return Application("test", tuple(built), python=python)


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
    fused = fuse_chains(chunks(), 1)
    summary, judge = fused.app.nodes
    assert (summary.name, judge.name) == ("chunk-0+chunk-1+chunk-2", "judge")
    assert summary.requests.prompt_tokens.tolist() == [11, 12, 13, 21, 22, 31]
    assert summary.requests.input_indptr.tolist() == [0, 0, 0, 0, 1, 2, 3]
    assert summary.requests.input_request.tolist() == [0, 1, 3]
    assert (summary.requests.input_node == 0).all()
    assert judge.requests.input_node.tolist() == [0, 0, 0]
    assert judge.requests.input_request.tolist() == [5, 4, 2]
    assert fused.node == (0, 0, 0, 1)
    assert fused.offset == (0, 3, 5, 0)
    assert [(p.name, p.start, p.stop) for p in summary.parts] == [
        ("chunk-0", 0, 3),
        ("chunk-1", 3, 5),
        ("chunk-2", 5, 6),
    ]
    assert [(p.name, p.start, p.stop) for p in judge.parts] == [("judge", 0, 3)]
    values = [np.array(v) for v in ([1, 2, 3], [4, 5], [6], [7, 8, 9])]
    assert [v.tolist() for v in fused.joined(values)] == [[1, 2, 3, 4, 5, 6], [7, 8, 9]]


def test_no_node_is_fused_with_what_a_function_stands_before() -> None:
    """It would wait for the function, and that for it."""
    apart = application(
        TestNode("draft", [4, 4], [1, 1]),
        TestNode("revise", [4, 4], [1, 1], [[(0, 0), (2, 0)], [(0, 1), (2, 1)]]),
        same_model=("draft", "revise"),
        python=(PythonNode("check", RequestTable.of([0, 0], 1, [[(0, 0)], [(0, 1)]]), 2),),
    )
    assert [n.name for n in fuse_chains(apart, 1).app.nodes] == ["draft", "revise"]


def test_fusing_again_changes_nothing() -> None:
    once = fuse_chains(chunks(), 1).app
    twice = fuse_chains(once, 1)
    assert [n.name for n in twice.app.nodes] == [n.name for n in once.nodes]
    assert twice.app.nodes[0].fused == once.nodes[0].fused
    assert twice.offset == (0, 0)


def test_a_fused_node_can_be_fused_further() -> None:
    """Its parts stay the user's nodes, each where it is in the whole."""
    app = chunks()
    model = app.nodes[0].model
    once = fuse_chains(Application("t", app.nodes), 1).app
    later = replace(once.nodes[1], model=model)
    fused = fuse_chains(Application("t", (once.nodes[0], later)), 1)
    assert [(p.name, p.start, p.stop) for p in fused.app.nodes[0].parts] == [
        ("chunk-0", 0, 3),
        ("chunk-1", 3, 5),
        ("chunk-2", 5, 6),
        ("judge", 6, 9),
    ]


def test_other_models_and_parallel_nodes_stay_apart() -> None:
    a = TestNode("a", [4], [1])
    b = TestNode("b", [4], [1], [[(0, 0)]])
    assert len(fuse_chains(application(a, b), 1).app.nodes) == 2
    beside = application(a, TestNode("b", [4], [1]), same_model=("a", "b"))
    assert len(fuse_chains(beside, 1).app.nodes) == 2


def test_tasks_are_kept() -> None:
    a = TestNode("a", [4], [1])
    b = TestNode("b", [4], [1], [[(0, 0)]])
    same = application(a, b, same_model=("a", "b"))
    apart = Application("t", (same.nodes[0], replace(same.nodes[1], task="judge")))
    (node,) = fuse_chains(apart, 1).app.nodes
    assert [(p.name, p.task) for p in node.parts] == [("a", ""), ("b", "judge")]


@pytest.mark.parametrize(
    ("names", "name"),
    [
        (["draft", "revise"], "draft+revise"),
        (["mixed/draft", "mixed/revise"], "mixed/draft+revise"),
        (["c0", "c1", "c2"], "c0+c1+c2"),
        (["c0", "c1", "c2", "c3"], "c0..c3"),
    ],
)
def test_names_tell_the_nodes(names: list[str], name: str) -> None:
    assert fused_name(names) == name


def test_a_name_that_is_taken_is_not_given_again() -> None:
    a = TestNode("a", [4], [1])
    b = TestNode("b", [4], [1], [[(0, 0)]])
    taken = TestNode("a+b", [4], [1])
    fused = fuse_chains(application(a, b, taken, same_model=("a", "b")), 1)
    assert [n.name for n in fused.app.nodes] == ["a+b+", "a+b"]


def reduced(documents: int, chunks: int) -> Application:
    """Documents whose chunks are summarised side by side, then joined, by one model."""
    count = documents * chunks
    joins = [[(0, d * chunks + c) for c in range(chunks)] for d in range(documents)]
    return application(
        TestNode("map", [4] * count, [1] * count),
        TestNode("reduce", [4] * documents, [1] * documents, joins),
        same_model=("map", "reduce"),
    )


@pytest.mark.parametrize(
    ("documents", "chunks", "num_devices", "nodes"),
    [
        (1, 8, 2, 2),  # one prompt takes everything: replicas could not share it
        (1, 8, 1, 1),  # there are none
        (3, 4, 2, 1),  # 3 of 15 requests are beside a line: less than half of a device's share
        (3, 4, 4, 2),
        (30, 4, 8, 1),
        (10, 1, 8, 1),  # lines: they are served one by one wherever they are
        (1, 1, 8, 1),
    ],
)
def test_what_replicas_could_share_stays_apart(
    documents: int, chunks: int, num_devices: int, nodes: int
) -> None:
    app = reduced(documents, chunks)
    assert len(fuse_chains(app, num_devices).app.nodes) == nodes


def test_no_cycle_comes_of_it() -> None:
    """a -> x -> b, where a and b are one model: fused, x would wait for what waits for it."""
    a = TestNode("a", [4], [1])
    x = TestNode("x", [4], [1], [[(0, 0)]])
    b = TestNode("b", [4], [1], [[(0, 0), (1, 0)]])
    fused = fuse_chains(application(a, x, b, same_model=("a", "b")), 1)
    assert [n.name for n in fused.app.nodes] == ["a", "x", "b"]


def test_upstreams_of_the_fused_node_may_be_shared() -> None:
    source = TestNode("source", [4], [1])
    a = TestNode("a", [4], [1], [[(0, 0)]])
    b = TestNode("b", [4], [1], [[(0, 0), (1, 0)]])
    fused = fuse_chains(application(source, a, b, same_model=("a", "b")), 1)
    assert [n.name for n in fused.app.nodes] == ["source", "a+b"]
    assert fused.app.nodes[1].requests.input_node.tolist() == [0, 0, 1]
    assert fused.app.nodes[1].requests.input_request.tolist() == [0, 0, 0]


def test_upstreams_may_be_further_up() -> None:
    """outline -> expand -> a -> b, where b reads the outline as well."""
    outline = TestNode("outline", [4], [1])
    expand = TestNode("expand", [4], [1], [[(0, 0)]])
    a = TestNode("a", [4], [1], [[(1, 0)]])
    b = TestNode("b", [4], [1], [[(2, 0), (0, 0)]])
    fused = fuse_chains(application(outline, expand, a, b, same_model=("a", "b")), 1)
    assert [n.name for n in fused.app.nodes] == ["outline", "expand", "a+b"]


@pytest.mark.parametrize(
    "groups",
    [
        {"x": ()},
        {"x": ("chunk-0", "chunk-0")},
        {"x": ("chunk-0", "chunk-1"), "y": ("chunk-1", "chunk-2")},
        {"x": ("chunk-0", "chunk-1"), "y": ("chunk-0", "chunk-2")},
    ],
)
def test_groups_that_share_nodes_are_refused(groups: dict[str, tuple[str, ...]]) -> None:
    with pytest.raises(InputError, match="fused already"):
        fuse_groups(chunks(), groups)


def test_groups_that_make_a_cycle_are_refused() -> None:
    a = TestNode("a", [4], [1])
    x = TestNode("x", [4], [1], [[(0, 0)]])
    b = TestNode("b", [4], [1], [[(1, 0)]])
    app = application(a, x, b, same_model=("a", "b"))
    with pytest.raises(InputError, match="cycle"):
        fuse_groups(app, {"both": ("a", "b")})


@pytest.mark.parametrize("gate", [None, np.array([7])])
def test_gates_are_kept(gate: np.ndarray | None) -> None:
    app = chunks()
    table = replace(app.nodes[2].requests, gate=gate)
    nodes = (*app.nodes[:2], replace(app.nodes[2], requests=table), app.nodes[3])
    fused = fuse_chains(Application("t", nodes), 1).app.nodes[0].requests.gate
    if gate is None:
        assert fused is None
    else:
        assert fused is not None
        assert fused.tolist() == [-1] * 5 + [7]
