"""Programs and what precedes a request."""

from __future__ import annotations

import numpy as np

from samullm_plugin import Application, ModelNode, ModelSpec, RequestTable
from samullm_plugin.model.programs import program_ids, tokens_before
from samullm_plugin.model.scenarios import make_scenario

MODEL = ModelSpec("m", 4096)


def test_programs_join_what_waits_for_each_other():
    writer = RequestTable.of([10, 10, 10], 50, [[], [(0, 0)], []])
    judge = RequestTable.of([5, 5], 50, [[(0, 1)], [(0, 2)]])
    app = Application("a", (ModelNode("w", MODEL, writer), ModelNode("j", MODEL, judge)))
    writers, judges = program_ids(app)
    assert writers.tolist() == [0, 0, 1]
    assert judges.tolist() == [0, 1]


def test_tokens_before_follow_the_longest_path():
    writer = RequestTable.of([10, 10], 50, [[], [(0, 0)]])
    judge = RequestTable.of([5], 50, [[(0, 0), (0, 1)]])
    app = Application("a", (ModelNode("w", MODEL, writer), ModelNode("j", MODEL, judge)))
    lengths = make_scenario(app, [np.array([7, 9]), np.array([3])])
    w, j = tokens_before(app, lengths)
    # request 0: 10 + 7; request 1: prompt 10 + 7, output 9
    assert w.tolist() == [0, 17]
    assert j.tolist() == [17 + 17 + 9]
