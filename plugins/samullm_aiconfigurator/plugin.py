"""Latency from operator tables: ``aiconfigurator``."""

from __future__ import annotations

from collections.abc import Callable

from samullm_aiconfigurator.models import OperatorTables
from samullm_plugin import LatencyModel, hookimpl


@hookimpl
def register_latency_models(register: Callable[[type[LatencyModel]], None]) -> None:
    """Offer the model."""
    register(OperatorTables)
