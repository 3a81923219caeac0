"""What no plan of the structure can beat in the simulation, and better plans by the simulation.

The work model times consumers beside producers at full speed. Where producers are paced themselves
it is wrong, either way. The *relaxed* instance takes nothing for granted that a run could break: a
model without producers runs for as long as it does alone, for nothing in its run depends on when
it starts; one with producers holds its devices for as long as its tokens cost at the best batch,
and its longest request takes, whenever its inputs come; a consumer starts no earlier than its
producers, and its tail may be nothing. Every simulated plan that places each model once, in one
mode, is a schedule of the relaxed instance with room to spare, so a bound for that instance is one
for the simulation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product
from math import prod

import numpy as np

from samullm_cpsat.bounding import branch
from samullm_cpsat.durations import Timings
from samullm_cpsat.instance import Instance, Lag, Mode, Task
from samullm_cpsat.schedule import Schedule, best_list_schedule, list_schedule
from samullm_plugin import Problem
from samullm_plugin.model.problem import ModeKey
from samullm_plugin.rules.bounds import LeastHeld, least_held

TOLERANCE = 1e-3
"""A plan is optimal if its simulated makespan is within this of the bound, for ticks are whole."""

CLIMBED = 60
"""Schedules that are simulated, at most, to improve on the work model's one mode at a time."""


def relaxed(problem: Problem, timings: Timings, scenario: int) -> Instance:
    """Return the instance of which every simulated plan of the structure is a schedule."""
    instance, tick_s = timings.instance, timings.instance.tick_s
    consumers = {lag.consumer for lag in instance.lags}
    tasks = []
    held: dict[tuple[int, ModeKey], LeastHeld] = {}
    for i, task in enumerate(instance.tasks):
        modes = []
        for m, mode in enumerate(task.modes):
            size = mode.parallel
            key = ModeKey(mode.gpu, size.tensor_parallel_size, size.pipeline_parallel_size)
            costs = problem.costs[i][key]
            if i in consumers:
                if (i, key) not in held:
                    held[i, key] = least_held(problem, problem.scenarios[scenario], i, key)
                held_s = float(held[i, key].seconds(np.array(size.data_parallel_size)))
                if task.name in problem.same_engine:  # it may need no start
                    held_s -= held[i, key].start_s
            else:
                ahead_s = problem.load_s(costs)
                if task.name not in problem.same_engine:  # else it may need no start
                    ahead_s -= problem.least_start_s(costs)
                held_s = timings.end_s[i][m][scenario] - ahead_s
            ticks = max(1, int(held_s / tick_s + 1e-9))
            modes.append(Mode(size, 0, ticks, mode.gpu, mode.machines))
        tasks.append(Task(task.name, tuple(modes)))
    lags = tuple(
        Lag(lag.producer, lag.consumer, tuple((0,) * len(row) for row in lag.tail))
        for lag in instance.lags
    )
    return Instance(instance.name, tuple(tasks), lags, instance.pools, tick_s)


def certify(
    problem: Problem, timings: Timings, nodes: int, keep_on: Callable[[], bool]
) -> tuple[float, list[Schedule]]:
    """Return seconds that no simulated plan of the structure beats, and the relaxed schedules.

    With several length scenarios, the mean of what no plan beats in each.

    Args:
        problem: the instance.
        timings: its modes alone.
        nodes: most nodes of branch and bound, in all.
        keep_on: asked now and then whether to go on.
    """
    bounds, schedules = [], []
    count = len(problem.scenarios)
    for scenario in range(count):
        instance = relaxed(problem, timings, scenario).simplified()
        first = best_list_schedule(instance)
        proof = branch(instance, first, nodes=max(1, nodes // count), keep_on=keep_on)
        bounds.append(proof.bound * instance.tick_s)
        schedules.append(in_modes_of(timings.instance, instance, proof.schedule))
    return float(np.mean(bounds)), schedules


def in_modes_of(full: Instance, part: Instance, schedule: Schedule) -> Schedule:
    """Return a list schedule of the full instance with a schedule's order and modes."""
    order = [p.task for p in schedule.placements]
    modes = [0] * len(full.tasks)
    for p in schedule.placements:
        wanted = part.tasks[p.task].modes[p.mode]
        modes[p.task] = next(
            m
            for m, mode in enumerate(full.tasks[p.task].modes)
            if (mode.parallel, mode.gpu) == (wanted.parallel, wanted.gpu)
        )
    return list_schedule(full, order, modes)


def best_simulated(
    instance: Instance,
    schedules: Sequence[Schedule],
    simulate_s: Callable[[Schedule], float],
    simulations: int,
    keep_on: Callable[[], bool],
) -> tuple[float, Schedule]:
    """Return the best of several schedules by simulation, one mode at a time made better.

    Args:
        instance: with all modes.
        schedules: one placement per task; the first wins among equals.
        simulate_s: the simulated makespan of a schedule.
        simulations: most schedules to simulate beside those given: all choices of modes if they are
            no more, else up to ``CLIMBED``.
        keep_on: asked before each simulation whether to go on.
    """
    values = [simulate_s(s) for s in schedules]
    at = min(range(len(values)), key=values.__getitem__)
    value, best = values[at], schedules[at]
    left = min(CLIMBED, simulations) if instance.lags else 0
    seen = {s.placements for s in schedules}
    choices = [
        [m for m, mode in enumerate(t.modes) if instance.placeable(mode)] for t in instance.tasks
    ]
    if instance.lags and prod(map(len, choices)) <= simulations:
        order, left = [p.task for p in best.placements], 0
        for combination in product(*choices):
            if not keep_on():
                break
            trial = list_schedule(instance, order, combination)
            trial_s = simulate_s(trial)
            if trial_s < value * (1 - 1e-9):
                value, best = trial_s, trial
    improved = True
    while improved and left > 0:
        improved = False
        order = [p.task for p in best.placements]
        modes = [0] * len(instance.tasks)
        for p in best.placements:
            modes[p.task] = p.mode
        ends = {p.task: p.end for p in best.placements}
        for task in sorted(order, key=lambda i: -ends[i]):
            for mode in choices[task]:
                if mode == modes[task]:
                    continue
                if left <= 0 or not keep_on():
                    return value, best
                trial = list_schedule(instance, order, [*modes[:task], mode, *modes[task + 1 :]])
                if trial.placements in seen:
                    continue
                seen.add(trial.placements)
                left -= 1
                trial_s = simulate_s(trial)
                if trial_s < value * (1 - 1e-9):
                    value, best, improved = trial_s, trial, True
                    modes[task] = mode
    return value, best
