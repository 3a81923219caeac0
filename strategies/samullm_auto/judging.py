"""Which of the last candidates to return, by length scenarios that nobody searched on."""

from __future__ import annotations

from collections.abc import Sequence
from time import monotonic

import numpy as np

from samullm_auto.risk import Risk
from samullm_auto.search import Candidate
from samullm_plugin.model.types import Floats
from samullm_plugin.simulator import PlanSimulator

CONTENDERS = 3
"""Starts, and plans that were found, that are judged at most."""

NEAR = 0.02
"""Starts worse than the best candidate by this share are not judged."""


def judge(
    candidates: Sequence[Candidate],
    simulator: PlanSimulator,
    scenarios: Sequence[int],
    risk: Risk,
    until_s: float,
) -> Candidate:
    """Return the candidate to trust.

    A plan that was searched for in some scenarios looks better in them than it is. So the last
    candidates are simulated in further ones, and a plan that was found replaces the best start only
    if it is better there by more than the standard error of the difference.

    Args:
        candidates: simulated in the scenarios that were searched on; one start at least.
        simulator: the host's simulator.
        scenarios: indices of the length scenarios nobody searched on.
        risk: what is to be small.
        until_s: when to stop, on the clock of ``time.monotonic``.
    """
    ranked = sorted(candidates, key=lambda c: c.value_s)
    limit_s = ranked[0].value_s * (1 + NEAR)
    starts = [c for c in ranked if c.start]
    near = [c for c in starts if c.value_s <= limit_s] or starts
    contenders = near[:CONTENDERS] + [c for c in ranked if not c.start][:CONTENDERS]
    if ranked[0].start and len(near) == 1:
        return ranked[0]
    rows: list[list[float]] = []
    took_s = 0.0
    for s in scenarios:
        began_s = monotonic()
        if began_s + took_s > until_s:
            break
        rows.append([simulator.simulate_scenario(c.plan, s).makespan_s for c in contenders])
        took_s = monotonic() - began_s
    further = np.array(rows).reshape(len(rows), len(contenders))
    makespans = [np.append(c.makespan_s, further[:, k]) for k, c in enumerate(contenders)]
    values = [risk.of(m) for m in makespans]
    num_starts = len(near[:CONTENDERS])
    chosen = min(range(num_starts), key=values.__getitem__)
    for k in sorted(range(num_starts, len(contenders)), key=values.__getitem__):
        if values[k] < values[chosen] and _trusted(further[:, chosen] - further[:, k], risk):
            chosen = k
            break
    return contenders[chosen]


def _trusted(gains_s: Floats, risk: Risk) -> bool:
    """Return whether a gain in further scenarios is more than chance."""
    if len(gains_s) < 2 or risk.measure != "mean":
        return True
    return bool(gains_s.mean() > gains_s.std(ddof=1) / np.sqrt(len(gains_s)))
