"""Simulation of whole plans."""

from __future__ import annotations

from samullm_plugin.core.simulation.simulator import PlanSimulator
from samullm_plugin.core.simulation.state import SimulationState, StagePreview

__all__ = ["PlanSimulator", "SimulationState", "StagePreview"]
