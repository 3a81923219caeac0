"""Simulation of inference engines, step for step as vLLM's scheduler runs them."""

from samullm_plugin.engine.batch import EngineCache, EngineJob, simulate_engines
from samullm_plugin.engine.simulate import CHECKED_VLLM_VERSIONS, simulate_engine
from samullm_plugin.engine.workload import (
    EngineRun,
    NeverFitsError,
    ProgressCurve,
    StepTrace,
    Workload,
)
from samullm_plugin.model.engine_config import EngineConfig
from samullm_plugin.model.latency import Curve, StepLatency, StepModel, StepTable

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
