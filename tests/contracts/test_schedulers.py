"""The shipped schedulers keep their contract."""

from __future__ import annotations

from samullm_baselines.plugin import MaxHeuristic, MinHeuristic
from samullm_greedy.plugin import GreedyScheduler

from samullm_plugin.testing.scheduler_contract import SchedulerContract


class TestGreedy(SchedulerContract):
    scheduler_class = GreedyScheduler


class TestGreedyWithoutPreemption(SchedulerContract):
    scheduler_class = GreedyScheduler
    options = {"preemption": False}


class TestMaxHeuristic(SchedulerContract):
    scheduler_class = MaxHeuristic


class TestMinHeuristic(SchedulerContract):
    scheduler_class = MinHeuristic
