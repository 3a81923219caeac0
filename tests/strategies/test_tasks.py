"""Of many sizes of a model some are timed, and the others lie between them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from samullm_tasks.timing import TimedMode, alone, between, far_apart, tails_s

from samullm_plugin.model.application import EngineOptions
from samullm_plugin.model.parallel import ParallelConfig
from samullm_plugin.model.problem import ModeKey
from samullm_plugin.simulator import PlanSimulator
from samullm_plugin.testing.factories import TestNode, make_problem


def test_sizes_that_are_timed_are_far_apart_and_include_both_ends() -> None:
    assert far_apart([1, 2, 3, 4, 5, 6, 7, 8, 9]) == [0, 1, 3, 7, 8]
    assert far_apart([3]) == [0]
    assert far_apart([4, 4, 6]) == [0, 2]


def test_values_between_are_linear_over_the_logarithm() -> None:
    devices, values = [1, 2, 4, 8], np.array([[8.0, 0.0], [2.0, 3.0]])
    found = between(devices, [0, 3], values)
    np.testing.assert_allclose(found, [[8, 0], [6, 1], [4, 2], [2, 3]])
    np.testing.assert_array_equal(between(devices, [0, 1, 2, 3], found), found)


def test_tails_of_pipeline_stages_lie_between_those_of_one_stage() -> None:
    """By what the consumer takes alone; one that is slower has as much more."""
    inputs = [[(0, r)] for r in range(30)]
    engine = EngineOptions(max_num_seqs=4, async_scheduling=False)
    problem = make_problem(
        [
            TestNode("write", [4] * 30, [20] * 30),
            TestNode("judge", [4] * 30, [20] * 30, inputs, step_s=3.0, engine=engine),
        ],
        num_gpus=4,
    )
    slower = []
    for share in (0.4, 0.5, 10.0):
        one = problem.costs[1][ModeKey("test-gpu", 1)]
        latency = one.latency.scaled(share)
        sizes = {**problem.costs[1], ModeKey("test-gpu", 1, 2): replace(one, latency=latency)}
        both = replace(problem, costs=(problem.costs[0], sizes))
        simulator = PlanSimulator(both)
        writes = [TimedMode.idle(both, 0, ParallelConfig(n)) for n in (1, 2)]
        configs = [ParallelConfig(1), ParallelConfig(2), ParallelConfig(1, 1, 2)]
        judges = [TimedMode.idle(both, 1, p) for p in configs]
        finish_s = [run.finish_s for run in alone(simulator, 0, writes)]
        tails = tails_s(simulator, 0, writes, finish_s, judges)
        ends = [run.end_s for run in alone(simulator, 0, judges)]
        slower.append(ends[2] > ends[0] > ends[1])
        if slower[-1]:
            np.testing.assert_allclose(tails[:, 2] - tails[:, 0], ends[2] - ends[0])
        else:
            low, high = np.sort(tails[:, :2], axis=1).T
            assert (low - 1e-9 <= tails[:, 2]).all()
            assert (tails[:, 2] <= high + 1e-9).all()
    assert slower == [False, False, True]
