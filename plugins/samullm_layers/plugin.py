"""Latency composed from layer profiles: ``layers``."""

from __future__ import annotations

from collections.abc import Callable

from samullm_layers.models import Layers
from samullm_plugin import LatencyModel, hookimpl


@hookimpl
def register_latency_models(register: Callable[[type[LatencyModel]], None]) -> None:
    """Offer the model."""
    register(Layers)
