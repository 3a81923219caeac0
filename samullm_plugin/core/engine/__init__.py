"""Simulation of inference engines, step for step as vLLM's scheduler runs them."""

from samullm_plugin.core.engine.batch import EngineCache, EngineJob, simulate_engines
from samullm_plugin.core.engine.check import NeverFitsError
from samullm_plugin.core.engine.config import EngineConfig
from samullm_plugin.core.engine.latency import Curve, StepLatency, StepModel, StepTable
from samullm_plugin.core.engine.simulate import CHECKED_VLLM_VERSIONS, simulate_engine
from samullm_plugin.core.engine.workload import EngineRun, ProgressCurve, StepTrace, Workload

__all__ = [
    "CHECKED_VLLM_VERSIONS",
    "Curve",
    "EngineCache",
    "EngineConfig",
    "EngineJob",
    "EngineRun",
    "NeverFitsError",
    "ProgressCurve",
    "StepLatency",
    "StepModel",
    "StepTable",
    "StepTrace",
    "Workload",
    "simulate_engine",
    "simulate_engines",
]
