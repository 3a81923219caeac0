"""Nodes beside one another that may share engines."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from samullm_plugin.model.application import Application, PythonNode
from samullm_plugin.model.problem import Problem
from samullm_plugin.model.requests import RequestTable
from samullm_plugin.rules.fusion import fuse_groups
from samullm_plugin.rules.sharing import shared_problem, sharing_choices
from samullm_plugin.testing.factories import TestNode, make_problem


def world(*nodes: TestNode, same: tuple[str, ...], devices: int = 2) -> Problem:
    """Return a problem some nodes of which have one model and equal costs."""
    problem = make_problem(list(nodes), devices, nvlink=1)
    first = problem.app.index(same[0])
    model, costs = problem.app.nodes[first].model, problem.costs[first]
    built = [replace(n, model=model) if n.name in same else n for n in problem.app.nodes]
    return replace(
        problem,
        app=Application("test", tuple(built)),
        costs=tuple(
            costs if n.name in same else c
            for n, c in zip(problem.app.nodes, problem.costs, strict=True)
        ),
    )


def fan(num: int, devices: int = 2) -> Problem:
    """Return a writer and nodes of one judge that read what it writes."""
    each = [[(0, r)] for r in range(4)]
    checks = [TestNode(f"check{k}", [5 + k] * 4, [2 + k] * 4, each) for k in range(num)]
    names = tuple(f"check{k}" for k in range(num))
    return world(TestNode("write", [5] * 4, [7] * 4), *checks, same=names, devices=devices)


def test_siblings_share() -> None:
    problem = fan(2)
    (groups,) = sharing_choices(problem)
    assert groups == {"check0+check1": ("check0", "check1")}
    shared = shared_problem(problem, groups)
    assert [n.name for n in shared.app.nodes] == ["write", "check0+check1"]
    assert shared.costs == (problem.costs[0], problem.costs[1])
    lengths = shared.scenarios[0]
    assert lengths.output_tokens[1].tolist() == [2] * 4 + [3] * 4
    before = problem.scenarios[0].prompt_tokens
    assert lengths.prompt_tokens[1].tolist() == [*before[1], *before[2]]
    assert sharing_choices(shared) == []


def test_nodes_without_common_inputs_share() -> None:
    a, b = TestNode("a", [4], [1]), TestNode("b", [4], [1])
    (groups,) = sharing_choices(world(a, b, same=("a", "b")))
    assert groups == {"a+b": ("a", "b")}


def test_other_engines_are_not_shared() -> None:
    problem = fan(2)
    model = problem.app.nodes[2].model
    other = replace(model, engine=replace(model.engine, max_num_seqs=7))
    nodes = (*problem.app.nodes[:2], replace(problem.app.nodes[2], model=other))
    assert sharing_choices(replace(problem, app=Application("t", nodes))) == []
    assert sharing_choices(problem.without_shared_engines()) == []


def test_no_model_stands_between() -> None:
    """a -> x -> b: a and b as one would wait for x, and x for them; c is beside b."""
    each = [[(0, 0)]]
    problem = world(
        TestNode("a", [4], [1]),
        TestNode("x", [4], [1], each),
        TestNode("b", [4], [1], [[(1, 0)]]),
        TestNode("c", [4], [1], [[(1, 0)]]),
        same=("a", "b", "c"),
    )
    (groups,) = sharing_choices(problem)
    assert groups == {"b+c": ("b", "c")}


def test_no_function_stands_between() -> None:
    problem = world(TestNode("a", [4], [1]), TestNode("b", [4], [1]), same=("a", "b"))
    a, b = problem.app.nodes
    b = replace(b, requests=RequestTable.of([4], 1, [[(2, 0)]]))
    step = PythonNode("step", RequestTable.of([0], 1, [[(0, 0)]]), 1)
    app = Application("t", (a, b), python=(step,))
    assert sharing_choices(replace(problem, app=app)) == []


@pytest.mark.parametrize(("devices", "found"), [(1, 1), (4, 0)])
def test_what_replicas_could_share_stays_apart(devices: int, found: int) -> None:
    """One request that reads everything ties what several replicas would share together."""
    every = [[(1, r) for r in range(8)] + [(0, 0)]]
    problem = world(
        TestNode("x", [4], [1]),
        TestNode("map", [4] * 8, [1] * 8),
        TestNode("reduce", [4], [1], every),
        same=("map", "reduce"),
        devices=devices,
    )
    assert len(sharing_choices(problem)) == found


def test_groups_are_offered_alone_as_well() -> None:
    each = [[(0, 0)]]
    problem = world(
        TestNode("w", [4], [1]),
        TestNode("a", [4], [1], each),
        TestNode("b", [4], [1], each),
        TestNode("c", [4], [1], each),
        TestNode("d", [4], [1], each),
        same=("a", "b"),
    )
    nodes = list(problem.app.nodes)
    nodes[4] = replace(nodes[4], model=nodes[3].model)
    costs = (*problem.costs[:4], problem.costs[3])
    found = sharing_choices(replace(problem, app=Application("t", tuple(nodes)), costs=costs))
    one, two = {"a+b": ("a", "b")}, {"c+d": ("c", "d")}
    assert found == [one | two, one, two]


def test_a_stored_plan_makes_the_same_problem() -> None:
    """What was made one in two steps is made one at once, with its requests in the same order."""
    problem = fan(4)
    first = shared_problem(problem, {"x": ("check2", "check3")})
    both = shared_problem(first, {"y": ("x", "check0", "check1")})
    assert both.app.fused == {"y": ("check2", "check3", "check0", "check1")}
    at_once = fuse_groups(problem.app, both.app.fused).app
    assert at_once.fused == both.app.fused
    for one, other in zip(at_once.nodes, both.app.nodes, strict=True):
        np.testing.assert_array_equal(one.requests.prompt_tokens, other.requests.prompt_tokens)
        np.testing.assert_array_equal(one.requests.input_node, other.requests.input_node)
        np.testing.assert_array_equal(one.requests.input_request, other.requests.input_request)
