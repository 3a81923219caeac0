"""Simulation of whole plans."""

from __future__ import annotations

from samullm_plugin.simulator.node_run import NodeRun, Progress
from samullm_plugin.simulator.rollout import Rollout, with_idle_nodes
from samullm_plugin.simulator.runs import NodeQuery
from samullm_plugin.simulator.simulator import PlanSimulator
from samullm_plugin.simulator.state import SimulationState

__all__ = [
    "NodeQuery",
    "NodeRun",
    "PlanSimulator",
    "Progress",
    "Rollout",
    "SimulationState",
    "with_idle_nodes",
]
