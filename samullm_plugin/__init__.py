"""Plan, simulate and run offline inference of multi-LLM applications.

What plugins need is here by name; each is imported when first used, so that the command line
answers at once and a plugin imports no more of the host than it uses.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from samullm_plugin.core.application import Application as Application
    from samullm_plugin.core.application import EngineOptions as EngineOptions
    from samullm_plugin.core.application import ModelNode as ModelNode
    from samullm_plugin.core.application import ModelSpec as ModelSpec
    from samullm_plugin.core.application import RequestTable as RequestTable
    from samullm_plugin.core.architecture import ModelArchitecture as ModelArchitecture
    from samullm_plugin.core.cluster import Cluster as Cluster
    from samullm_plugin.core.cluster import Gpu as Gpu
    from samullm_plugin.core.costs import LoadTimes as LoadTimes
    from samullm_plugin.core.costs import ModeCosts as ModeCosts
    from samullm_plugin.core.costs import Provenance as Provenance
    from samullm_plugin.core.engine.config import EngineConfig as EngineConfig
    from samullm_plugin.core.engine.latency import Curve as Curve
    from samullm_plugin.core.engine.latency import StepLatency as StepLatency
    from samullm_plugin.core.engine.latency import StepModel as StepModel
    from samullm_plugin.core.engine.latency import StepTable as StepTable
    from samullm_plugin.core.engine.simulate import simulate_engine as simulate_engine
    from samullm_plugin.core.engine.workload import EngineRun as EngineRun
    from samullm_plugin.core.engine.workload import Workload as Workload
    from samullm_plugin.core.lengths import LengthDistribution as LengthDistribution
    from samullm_plugin.core.mixing import mix_applications as mix_applications
    from samullm_plugin.core.parallel import ParallelConfig as ParallelConfig
    from samullm_plugin.core.plan import Assignment as Assignment
    from samullm_plugin.core.plan import Plan as Plan
    from samullm_plugin.core.plan import Stage as Stage
    from samullm_plugin.core.plan import StageEnd as StageEnd
    from samullm_plugin.core.problem import Problem as Problem
    from samullm_plugin.core.scenarios import LengthScenario as LengthScenario
    from samullm_plugin.core.verify import verify as verify
    from samullm_plugin.errors import InputError as InputError
    from samullm_plugin.errors import MissingExtraError as MissingExtraError
    from samullm_plugin.errors import PlanError as PlanError
    from samullm_plugin.errors import PluginError as PluginError
    from samullm_plugin.errors import RunError as RunError
    from samullm_plugin.errors import SamullmError as SamullmError
    from samullm_plugin.hookspecs import INTERFACE_VERSION as INTERFACE_VERSION
    from samullm_plugin.hookspecs import hookimpl as hookimpl
    from samullm_plugin.hookspecs import hookspec as hookspec
    from samullm_plugin.interfaces.application import ApplicationSource as ApplicationSource
    from samullm_plugin.interfaces.executor import EngineEvent as EngineEvent
    from samullm_plugin.interfaces.executor import EngineRequest as EngineRequest
    from samullm_plugin.interfaces.executor import EngineSpec as EngineSpec
    from samullm_plugin.interfaces.executor import Executor as Executor
    from samullm_plugin.interfaces.executor import RequestOutput as RequestOutput
    from samullm_plugin.interfaces.latency import LatencyModel as LatencyModel
    from samullm_plugin.interfaces.length import LengthEstimator as LengthEstimator
    from samullm_plugin.interfaces.length import LengthObservations as LengthObservations
    from samullm_plugin.interfaces.length import LengthQuery as LengthQuery
    from samullm_plugin.interfaces.observer import RunEvent as RunEvent
    from samullm_plugin.interfaces.observer import RunInfo as RunInfo
    from samullm_plugin.interfaces.observer import StageRecord as StageRecord
    from samullm_plugin.interfaces.plugin import NoOptions as NoOptions
    from samullm_plugin.interfaces.plugin import Plugin as Plugin
    from samullm_plugin.interfaces.policy import PolicyBatch as PolicyBatch
    from samullm_plugin.interfaces.policy import RequestPolicy as RequestPolicy
    from samullm_plugin.interfaces.scheduler import SchedulingContext as SchedulingContext
    from samullm_plugin.interfaces.scheduler import StageScheduler as StageScheduler
    from samullm_plugin.io.gpus import bundled_gpu as bundled_gpu
    from samullm_plugin.io.lengths import measured_lengths as measured_lengths
    from samullm_plugin.io.lengths import measured_models as measured_models
    from samullm_plugin.io.lengths import unknown_model as unknown_model
    from samullm_plugin.io.lengths import workload_lengths as workload_lengths
    from samullm_plugin.io.models import bundled_model as bundled_model
    from samullm_plugin.io.models import find_name as find_name
    from samullm_plugin.manager import PluginHost as PluginHost

_PUBLIC = {
    "core.application": ("Application", "EngineOptions", "ModelNode", "ModelSpec", "RequestTable"),
    "core.architecture": ("ModelArchitecture",),
    "core.cluster": ("Cluster", "Gpu"),
    "core.costs": ("LoadTimes", "ModeCosts", "Provenance"),
    "core.lengths": ("LengthDistribution",),
    "core.mixing": ("mix_applications",),
    "core.engine.config": ("EngineConfig",),
    "core.engine.latency": ("Curve", "StepLatency", "StepModel", "StepTable"),
    "core.engine.simulate": ("simulate_engine",),
    "core.engine.workload": ("EngineRun", "Workload"),
    "core.parallel": ("ParallelConfig",),
    "core.plan": ("Assignment", "Plan", "Stage", "StageEnd"),
    "core.problem": ("Problem",),
    "core.scenarios": ("LengthScenario",),
    "core.verify": ("verify",),
    "errors": (
        "InputError",
        "MissingExtraError",
        "PlanError",
        "PluginError",
        "RunError",
        "SamullmError",
    ),
    "hookspecs": ("INTERFACE_VERSION", "hookimpl", "hookspec"),
    "interfaces.application": ("ApplicationSource",),
    "interfaces.executor": (
        "EngineEvent",
        "EngineRequest",
        "EngineSpec",
        "Executor",
        "RequestOutput",
    ),
    "interfaces.latency": ("LatencyModel",),
    "interfaces.length": ("LengthEstimator", "LengthObservations", "LengthQuery"),
    "interfaces.observer": ("RunEvent", "RunInfo", "StageRecord"),
    "interfaces.plugin": ("NoOptions", "Plugin"),
    "interfaces.policy": ("PolicyBatch", "RequestPolicy"),
    "interfaces.scheduler": ("SchedulingContext", "StageScheduler"),
    "io.gpus": ("bundled_gpu",),
    "io.lengths": ("measured_lengths", "measured_models", "unknown_model", "workload_lengths"),
    "io.models": ("bundled_model", "find_name"),
    "manager": ("PluginHost",),
}
_MODULE_OF = {name: module for module, names in _PUBLIC.items() for name in names}

__all__ = sorted(_MODULE_OF)  # noqa: PLE0605  # computed from the one table above


def __getattr__(name: str) -> object:
    """Import a public name's module when the name is first used."""
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """Return the public names."""
    return __all__
