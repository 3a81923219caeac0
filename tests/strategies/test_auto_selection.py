"""Which candidate auto trusts: what was found replaces a start only for more than chance."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
from samullm_auto.risk import Risk
from samullm_auto.search import Candidate
from samullm_auto.selection import Elsewhere, confirm, select_on_holdout, simplest

from samullm_plugin.model.parallel import ParallelConfig
from samullm_plugin.model.plan import Assignment, Plan, Stage


def candidate(device: int, value_s: float, *, start: bool) -> Candidate:
    plan = Plan((Stage((Assignment("a", ParallelConfig(), (device,)),)),))
    return Candidate(plan, value_s, np.array([value_s]), "test", start)


@dataclass
class Holdout:
    """Answers with the makespans of scenarios that nobody searched on."""

    seconds: dict[int, list[float]]

    def simulate_scenario(self, plan: Plan, scenario: int) -> SimpleNamespace:
        device = plan.stages[0].assignments[0].devices[0]
        return SimpleNamespace(makespan_s=self.seconds[device][scenario])


def elsewhere(seconds: dict[int, list[float]], scenarios: range) -> Elsewhere:
    return Elsewhere(Holdout(seconds), scenarios, Risk())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("gains", "trusted"),
    [
        ([2.0, 2.0, 2.0, 2.0], True),
        ([9.0, -7.0, 8.0, -8.0], False),  # 0.5 s better on average, give or take 4.6 s
        ([-1.0, -1.0, -1.0, -1.0], False),
        ([3.0, -1.0, 2.0, 0.0], True),  # 1.0 s better, give or take 0.9 s
    ],
)
def test_a_gain_must_exceed_its_standard_error(gains: list[float], trusted: bool) -> None:
    start, found = candidate(0, 100.0, start=True), candidate(1, 99.5, start=False)
    seconds = {0: [100.0] * 4, 1: [100.0 - g for g in gains]}
    chosen = select_on_holdout([start, found], elsewhere(seconds, range(4)))
    assert chosen is (found if trusted else start)


def test_of_equally_good_plans_the_one_that_changes_least_is_taken() -> None:
    def plan(*devices: int) -> Plan:
        return Plan(tuple(Stage((Assignment("a", ParallelConfig(), (d,)),)) for d in devices))

    plans = [plan(0, 1), plan(0, 0), plan(0), plan(1, 0, 1)]
    assert simplest(plans, [100.0, 100.0 + 1e-9, 100.1, 100.0]) == 1
    assert simplest(plans, [100.0, 100.0, 100.0, 99.9]) == 3


def test_the_best_start_is_taken_where_nothing_found_is_better() -> None:
    starts = [candidate(0, 100.0, start=True), candidate(1, 100.5, start=True)]
    seconds = {0: [101.0] * 3, 1: [90.0] * 3}
    assert select_on_holdout(starts, elsewhere(seconds, range(3))) is starts[1]


def test_a_start_that_is_good_only_where_it_was_made_for_loses_to_a_steady_one() -> None:
    brittle, steady = candidate(0, 100.0, start=True), candidate(1, 110.0, start=True)
    seconds = {0: [130.0] * 3, 1: [110.0] * 3}
    assert select_on_holdout([brittle, steady], elsewhere(seconds, range(3))) is steady


def test_what_is_confirmed_whole_is_judged_by_the_other_scenarios_too() -> None:
    brittle, steady = candidate(0, 100.0, start=True), candidate(1, 110.0, start=True)
    coarse = elsewhere({0: [100.0, 130.0, 130.0], 1: [110.0, 110.0, 110.0]}, range(1, 3))
    whole = Holdout({0: [101.0], 1: [111.0]})
    found = confirm(steady, [brittle, steady], coarse, whole, 1)  # type: ignore[arg-type]
    assert found is steady
    slower = Holdout({0: [101.0], 1: [140.0]})  # aggregated requests were too kind to it
    found = confirm(steady, [brittle, steady], coarse, slower, 1)  # type: ignore[arg-type]
    assert found is brittle
