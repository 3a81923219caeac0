"""Registers the simulated executor."""

from __future__ import annotations

from collections.abc import Callable

from samullm_plugin import Executor, hookimpl
from samullm_simulated.executor import SimulatedExecutor


@hookimpl
def register_executors(register: Callable[[type[Executor]], None]) -> None:
    """Offer the executor ``simulated``."""
    register(SimulatedExecutor)
