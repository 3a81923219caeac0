"""One abstract base class per kind of plugin."""

from __future__ import annotations

from samullm_plugin.interfaces.executor import Executor
from samullm_plugin.interfaces.latency import LatencyModel
from samullm_plugin.interfaces.length import LengthEstimator
from samullm_plugin.interfaces.policy import RequestPolicy
from samullm_plugin.interfaces.scheduler import StageScheduler

__all__ = ["Executor", "LatencyModel", "LengthEstimator", "RequestPolicy", "StageScheduler"]
