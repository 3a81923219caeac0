"""Registers the paper's two heuristics."""

from __future__ import annotations

from collections.abc import Callable

from samullm_baselines.max_heuristic import MaxHeuristic
from samullm_baselines.min_heuristic import MinHeuristic
from samullm_plugin import StageScheduler, hookimpl


@hookimpl
def register_schedulers(register: Callable[[type[StageScheduler]], None]) -> None:
    """Offer ``max-heuristic`` and ``min-heuristic``."""
    register(MaxHeuristic)
    register(MinHeuristic)
