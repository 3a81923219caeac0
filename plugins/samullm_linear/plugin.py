"""Latency models by measured iterations, and by data sheets alone."""

from __future__ import annotations

from collections.abc import Callable

from samullm_linear.assumed import Assumed
from samullm_linear.models import Linear, Transfer
from samullm_plugin import LatencyModel, hookimpl


@hookimpl
def register_latency_models(register: Callable[[type[LatencyModel]], None]) -> None:
    """Offer the models."""
    register(Linear)
    register(Transfer)
    register(Assumed)
