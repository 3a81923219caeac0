"""Which of the last candidates is returned, and why each of its models is where it is.

Candidates are compared by further length scenarios, and by the whole problem.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from samullm_auto.risk import Risk
from samullm_auto.search import Candidate
from samullm_auto.solution import by_shape
from samullm_plugin import Plan, Problem
from samullm_plugin.model.result import PlanTrace
from samullm_plugin.model.types import Floats
from samullm_plugin.simulator import PlanSimulator

CONTENDERS = 3
"""Starts, and plans that were found, that are judged at most."""

NEAR, NEAR_COARSE = 0.02, 0.2
"""Starts worse than the best candidate by this share are not judged; where candidates were judged
on aggregated requests, by the second."""


def contenders_of(candidates: Sequence[Candidate], near: float, most: int) -> list[Candidate]:
    """Return the candidates that may be the best, starts first."""
    ranked = sorted(candidates, key=lambda c: c.value_s)
    limit_s = ranked[0].value_s * (1 + near)
    starts = [c for c in ranked if c.start]
    close = [c for c in starts if c.value_s <= limit_s] or starts[:1]
    found = [c for c in ranked if not c.start and c.value_s <= limit_s]
    return close[:most] + found[:CONTENDERS]


class Elsewhere:
    """Judges candidates by further length scenarios than those that were searched on."""

    def __init__(self, simulator: PlanSimulator, scenarios: Sequence[int], risk: Risk) -> None:
        """Nothing is simulated before it is asked for, and nothing twice.

        Args:
            simulator: of the problem that was searched on.
            scenarios: indices of the length scenarios nobody searched on.
            risk: what is to be small.
        """
        self.risk = risk
        self._simulator, self._scenarios = simulator, scenarios
        self._further: dict[Plan, Floats] = {}

    def further_s(self, candidate: Candidate) -> Floats:
        """Return a candidate's makespans there."""
        plan = candidate.plan
        if plan not in self._further:
            simulate = self._simulator.simulate_scenario
            self._further[plan] = np.array([simulate(plan, s).makespan_s for s in self._scenarios])
        return self._further[plan]

    def value_s(self, candidate: Candidate) -> float:
        """Return a candidate's value in all scenarios."""
        return self.risk.of(np.append(candidate.makespan_s, self.further_s(candidate)))


def select_on_holdout(candidates: Sequence[Candidate], elsewhere: Elsewhere) -> Candidate:
    """Return the candidate to trust.

    A plan that was searched for in some scenarios looks better in them than it is. So the last
    candidates are simulated in further ones, the same for all (common random numbers), and a plan
    that was found replaces the best start only if it is better there by more than the standard
    error of the paired difference.

    Args:
        candidates: simulated in the scenarios that were searched on; one start at least.
        elsewhere: tells what they take in others.
    """
    contenders = contenders_of(candidates, NEAR, CONTENDERS)
    values = {c.plan: elsewhere.value_s(c) for c in contenders}
    # A start that is worse where others were searched for may be better everywhere else.
    for other in sorted((c for c in candidates if c.start), key=lambda c: c.value_s):
        if other.plan not in values and other.value_s < min(values.values()):
            contenders.append(other)
            values[other.plan] = elsewhere.value_s(other)
    contenders.sort(key=lambda c: values[c.plan])
    chosen = next(c for c in contenders if c.start)
    for found in (c for c in contenders if not c.start):
        gains_s = elsewhere.further_s(chosen) - elsewhere.further_s(found)
        if values[found.plan] < values[chosen.plan] and _trusted(gains_s, elsewhere.risk):
            return found
    return chosen


def simplest(plans: Sequence[Plan], values: Sequence[float]) -> int:
    """Return the index of the best plan, of equally good ones of that which changes least.

    Where lengths are others than planned, whatever a plan does on the way may come at a bad moment.

    Args:
        plans: one at least.
        values: by plan, what is to be small; equally good are those that only rounding tells apart.
    """
    most = min(values) * (1 + 1e-9)
    near = [k for k, value in enumerate(values) if value <= most]
    return min(near, key=lambda k: (_num_changes(plans[k]), values[k]))


def _num_changes(plan: Plan) -> int:
    """Return how many assignments the stages of a plan begin with, and how many stages it has."""
    before = ((), *(s.assignments for s in plan.stages))
    begun = sum(
        a not in old for s, old in zip(plan.stages, before, strict=False) for a in s.assignments
    )
    return begun + len(plan.stages)


def confirm(
    chosen: Candidate,
    candidates: Sequence[Candidate],
    elsewhere: Elsewhere,
    whole: PlanSimulator,
    searched: int,
) -> Candidate:
    """Return the candidate that is best on the whole problem, of those that may be.

    Each is simulated whole in scenarios that were searched on; how much longer it takes there than
    on aggregated requests is taken to hold for the other scenarios too.

    Args:
        chosen: the best by aggregated requests.
        candidates: all, with values by aggregated requests.
        elsewhere: tells what they take by aggregated requests in other scenarios.
        whole: the simulator of the whole problem.
        searched: how many of the first length scenarios to simulate whole.
    """
    contenders = contenders_of(candidates, NEAR_COARSE, len(candidates))
    plans = {c.plan: c for c in [*contenders, chosen]}
    values = {}
    for plan, candidate in plans.items():
        made = [whole.simulate_scenario(plan, s).makespan_s for s in range(searched)]
        risk = elsewhere.risk
        longer = risk.of(np.array(made)) / risk.of(candidate.makespan_s[:searched])
        values[plan] = longer * elsewhere.value_s(candidate)
    return plans[min(values, key=values.__getitem__)]


def _trusted(gains_s: Floats, risk: Risk) -> bool:
    """Return whether a gain in further scenarios is more than chance."""
    if len(gains_s) < 2 or risk.measure != "mean":
        return True
    return bool(gains_s.mean() > gains_s.std(ddof=1) / np.sqrt(len(gains_s)))


def explain(problem: Problem, judge: PlanSimulator, best: Candidate) -> dict[str, str]:
    """Return by node name what it got, when, and what the fastest alternative would have been."""
    simulator = judge.coarse()
    trace = simulator.simulate_scenario(best.plan, 0)
    word = problem.cluster.device_word
    result = {}
    for i, node in enumerate(problem.app.nodes):
        segments = [s for s in trace.segments if s.node == node.name]
        if not segments:
            result[node.name] = "it has nothing to do in the first length scenario"
            continue
        parts = [
            f"{s.parallel} on {word}s {_devices(s.devices)} from {s.start_s:.0f} to {s.end_s:.0f} s"
            for s in segments
        ]
        shapes = by_shape(problem.parallel_configs(i))  # each by number of devices
        configs = list(dict.fromkeys(p for same in shapes for p in (same[0], same[-1])))
        times = simulator.alone_many_s(0, [(i, p) for p in configs])
        fastest = min(range(len(configs)), key=times.__getitem__)
        gpu_s = [t * p.num_devices for t, p in zip(times, configs, strict=True)]
        cheapest = min(range(len(configs)), key=gpu_s.__getitem__)
        result[node.name] = (
            f"{', then '.join(parts)}; alone it would take {times[fastest]:.0f} s at best "
            f"({configs[fastest]}) and {gpu_s[cheapest]:.0f} {word}-seconds at least "
            f"({configs[cheapest]}, {times[cheapest]:.0f} s){_critical(trace, i)}"
        )
    return result


def _devices(devices: tuple[int, ...]) -> str:
    return ",".join(str(d) for d in devices)


def _critical(trace: PlanTrace, node: int) -> str:
    """Return a remark if the node finishes last."""
    if trace.node_finish_s[node] >= trace.makespan_s:
        return "; it finishes last and decides the makespan"
    slack = trace.makespan_s - trace.node_finish_s[node]
    return f"; it could finish {slack:.0f} s later without delaying the end"
