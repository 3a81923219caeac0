"""Nodes of one checkpoint that may be served by one set of engines at the same moment.

Nodes that :mod:`samullm_plugin.rules.fusion` makes one by rule follow one another. Nodes beside
one another may share engines as well: that saves engine starts and makes larger batches, and takes
away the freedom to place them apart, so it is shorter in some applications and longer in others.
Here is which nodes could, and the problem in which they do; a scheduler compares.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from graphlib import CycleError, TopologicalSorter

from samullm_plugin.model.application import Application
from samullm_plugin.model.problem import Problem
from samullm_plugin.model.scenarios import LengthScenario
from samullm_plugin.rules.fusion import NodeGroup, fuse_groups, fused_name

ALONE_UP_TO = 3
"""Groups up to which each is offered alone as well, besides all of them together."""

Groups = Mapping[str, tuple[str, ...]]
"""By the name of each set of nodes that become one, their names in the order of their requests."""


def sharing_choices(problem: Problem) -> list[Groups]:
    """Return the ways to let nodes share engines that are worth comparing, the fullest first.

    Nodes share if their engines are the same (checkpoint, engine arguments, costs), if no other
    model stands between them (its node would wait for the shared one and that for it), and if that
    does not tie together what replicas should share, as in
    :func:`samullm_plugin.rules.fusion.fuse_chains`.
    """
    groups = _groups(problem.app, problem.engine_numbers, problem.cluster.num_gpus)
    if not groups:
        return []
    sets = [groups]
    if 1 < len(groups) <= ALONE_UP_TO:
        sets += [[g] for g in groups]
    return [_named(problem.app, chosen) for chosen in sets]


def shared_problem(problem: Problem, groups: Mapping[str, Sequence[str]]) -> Problem:
    """Return the problem in which some of its nodes are one.

    Args:
        problem: the instance.
        groups: by name, which.

    Raises:
        InputError: as :func:`samullm_plugin.rules.fusion.fuse_groups`.
    """
    made = fuse_groups(problem.app, groups)
    scenarios = tuple(
        LengthScenario(made.joined(s.prompt_tokens), made.joined(s.output_tokens))
        for s in problem.scenarios
    )
    first = [made.node.index(i) for i in range(len(made.app.nodes))]
    numbers = problem.engine_of
    return replace(
        problem,
        app=made.app,
        scenarios=scenarios,
        costs=tuple(problem.costs[k] for k in first),
        engine_of=None if numbers is None else tuple(numbers[k] for k in first),
    )


def _named(app: Application, groups: Sequence[Sequence[int]]) -> Groups:
    """Return groups of node indices by name."""
    found = {}
    for group in groups:
        nodes = [app.nodes[i] for i in group]
        found[fused_name([p.name for n in nodes for p in n.parts])] = tuple(n.name for n in nodes)
    return found


def _groups(app: Application, numbers: Sequence[int], num_devices: int) -> list[list[int]]:
    """Return the nodes that could be one, in topological order, by first come."""
    heads: dict[int, NodeGroup] = {}
    head_of = list(range(len(app.all_nodes)))
    for i in app.order:
        for head, group in heads.items():
            if numbers[head] != numbers[i]:
                continue
            moved = head_of.copy()
            moved[i] = head
            if _has_cycle(app, moved):
                continue
            more = group.with_node(app, i)
            if more.is_even(num_devices):
                heads[head], head_of = more, moved
                break
        else:
            heads[i] = NodeGroup(set())
            heads[i].add(app, i)
    return [g.members for g in heads.values() if len(g.members) > 1]


def _has_cycle(app: Application, head_of: Sequence[int]) -> bool:
    """Return whether nodes would wait for each other if those of one head were one."""
    before: dict[int, set[int]] = {}
    for i, sources in enumerate(app.sources):
        mine = before.setdefault(head_of[i], set())
        mine |= {head_of[s] for s in sources} - {head_of[i]}
    try:
        TopologicalSorter(before).prepare()
    except CycleError:
        return True
    return False
