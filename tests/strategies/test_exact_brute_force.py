"""Brute force, branch and bound and the solver agree on tiny instances."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
from samullm_cpsat.bounding import branch
from samullm_cpsat.instance import Instance
from samullm_cpsat.options import ExactOptions
from samullm_cpsat.planning import solve_instance
from samullm_cpsat.schedule import Schedule, best_list_schedule
from samullm_cpsat.solver import SolveOptions, solve

from tests.strategies.exact_brute_force import (
    best_with_segments,
    best_without_switching,
    random_instance,
)

INSTANCES = 240
BLOCKS = 12


def check(instance: Instance, schedule: Schedule, makespan: int) -> None:
    """Check a schedule by itself: devices, groups, work, precedence, makespan."""
    users: dict[int, list[tuple[int, int]]] = {}
    by_task: dict[int, list[int]] = {}
    for n, p in enumerate(schedule.placements):
        mode = instance.tasks[p.task].modes[p.mode]
        assert len(set(p.devices)) == mode.devices
        size = mode.parallel.tensor_parallel_size
        for first in range(0, len(p.devices), size):
            part = set(p.devices[first : first + size])
            assert any(part <= set(pool.devices) for pool in instance.pools)
        for d in p.devices:
            users.setdefault(d, []).append((p.start, p.end))
        by_task.setdefault(p.task, []).append(n)
    for spans in users.values():
        spans.sort()
        assert all(a[1] <= b[0] for a, b in pairwise(spans))
    assert set(by_task) == set(range(len(instance.tasks)))
    assert all(schedule.placements[of[-1]].done == pytest.approx(1.0) for of in by_task.values())
    for lag in instance.lags:
        producer = [schedule.placements[n] for n in by_task[lag.producer]]
        consumer = [schedule.placements[n] for n in by_task[lag.consumer]]
        assert consumer[0].start >= producer[0].start
        if len(consumer) == 1:
            tail = lag.tail[producer[-1].mode][consumer[0].mode]
            assert consumer[0].end >= producer[-1].end + tail
        else:
            assert consumer[0].start >= producer[-1].end
    assert schedule.makespan <= makespan


@pytest.mark.parametrize("block", range(BLOCKS))
def test_without_switching(block: int) -> None:
    for seed in range(block, INSTANCES, BLOCKS):
        instance = random_instance(random.Random(seed), 3, 4)
        expected = best_without_switching(instance)
        whole = solve_instance(instance, ExactOptions(workers=1))
        assert (whole.outcome.objective, whole.outcome.bound) == (expected, expected), seed
        assert whole.outcome.optimal, seed
        check(whole.instance, whole.outcome.schedule, expected)
        alone = solve_instance(instance, ExactOptions(workers=1, branch_nodes=0))
        assert (alone.outcome.objective, alone.outcome.bound) == (expected, expected), seed
        check(alone.instance, alone.outcome.schedule, expected)
        simple = instance.simplified()
        proof = branch(simple, best_list_schedule(simple), nodes=10**6)
        assert proof.bound <= expected <= proof.schedule.makespan, seed
        if len(simple.pools) == 1:
            assert proof.bound == proof.schedule.makespan == expected, seed
        check(simple, proof.schedule, proof.schedule.makespan)


@pytest.mark.parametrize("block", range(6))
def test_with_segments(block: int) -> None:
    for seed in range(block, 72, 6):
        instance = random_instance(random.Random(1000 + seed), 2, 3)
        units = 3
        expected = best_with_segments(instance, units)
        simple = instance.simplified(switching=True)
        first = best_list_schedule(simple)
        outcome = solve(simple, first, 0, SolveOptions(segments=2, units=units, workers=1))
        assert (outcome.objective, outcome.bound, outcome.optimal) == (expected, expected, True), (
            seed
        )
        check(simple, outcome.schedule, expected)
