"""Latency models fitted to measured iterations: ``linear`` and ``transfer``."""

from __future__ import annotations

from collections.abc import Callable

from samullm_linear.models import Linear, Transfer
from samullm_plugin import LatencyModel, hookimpl


@hookimpl
def register_latency_models(register: Callable[[type[LatencyModel]], None]) -> None:
    """Offer both models."""
    register(Linear)
    register(Transfer)
