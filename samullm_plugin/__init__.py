"""Plan, simulate and run offline inference of multi-LLM applications.

What Python programs and plugins need is here by name; each is imported when first used, so that the
command line answers at once and a plugin imports no more of the host than it uses.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from samullm_plugin.api.app import App as App
    from samullm_plugin.api.app import compare as compare
    from samullm_plugin.api.nodes import Model as Model
    from samullm_plugin.api.nodes import Node as Node
    from samullm_plugin.api.plans import AppPlan as AppPlan
    from samullm_plugin.api.plans import Comparison as Comparison
    from samullm_plugin.api.run_table import RunTable as RunTable
    from samullm_plugin.api.runs import AppRun as AppRun
    from samullm_plugin.api.tasks import Task as Task
    from samullm_plugin.checkpoints.gpus import bundled_gpu as bundled_gpu
    from samullm_plugin.checkpoints.models import bundled_model as bundled_model
    from samullm_plugin.checkpoints.models import find_name as find_name
    from samullm_plugin.engine.simulate import simulate_engine as simulate_engine
    from samullm_plugin.engine.workload import EngineRun as EngineRun
    from samullm_plugin.engine.workload import Workload as Workload
    from samullm_plugin.errors import InputError as InputError
    from samullm_plugin.errors import MissingExtraError as MissingExtraError
    from samullm_plugin.errors import PlanError as PlanError
    from samullm_plugin.errors import PluginError as PluginError
    from samullm_plugin.errors import Reject as Reject
    from samullm_plugin.errors import RunError as RunError
    from samullm_plugin.errors import SamullmError as SamullmError
    from samullm_plugin.host.hookspecs import INTERFACE_VERSION as INTERFACE_VERSION
    from samullm_plugin.host.hookspecs import hookimpl as hookimpl
    from samullm_plugin.host.hookspecs import hookspec as hookspec
    from samullm_plugin.host.interfaces.application import ApplicationSource as ApplicationSource
    from samullm_plugin.host.interfaces.executor import EngineEvent as EngineEvent
    from samullm_plugin.host.interfaces.executor import EngineRequest as EngineRequest
    from samullm_plugin.host.interfaces.executor import EngineSpec as EngineSpec
    from samullm_plugin.host.interfaces.executor import Executor as Executor
    from samullm_plugin.host.interfaces.executor import RequestOutput as RequestOutput
    from samullm_plugin.host.interfaces.latency import LatencyModel as LatencyModel
    from samullm_plugin.host.interfaces.length import LengthEstimator as LengthEstimator
    from samullm_plugin.host.interfaces.length import LengthQuery as LengthQuery
    from samullm_plugin.host.interfaces.observer import RunEvent as RunEvent
    from samullm_plugin.host.interfaces.observer import RunInfo as RunInfo
    from samullm_plugin.host.interfaces.observer import StageRecord as StageRecord
    from samullm_plugin.host.interfaces.plugin import NoOptions as NoOptions
    from samullm_plugin.host.interfaces.plugin import Plugin as Plugin
    from samullm_plugin.host.interfaces.policy import PolicyBatch as PolicyBatch
    from samullm_plugin.host.interfaces.policy import RequestPolicy as RequestPolicy
    from samullm_plugin.host.interfaces.scheduler import SchedulingContext as SchedulingContext
    from samullm_plugin.host.interfaces.scheduler import StageScheduler as StageScheduler
    from samullm_plugin.host.manager import PluginHost as PluginHost
    from samullm_plugin.model.application import Application as Application
    from samullm_plugin.model.application import EngineOptions as EngineOptions
    from samullm_plugin.model.application import ModelNode as ModelNode
    from samullm_plugin.model.application import ModelSpec as ModelSpec
    from samullm_plugin.model.architecture import ModelArchitecture as ModelArchitecture
    from samullm_plugin.model.cluster import Cluster as Cluster
    from samullm_plugin.model.cluster import Gpu as Gpu
    from samullm_plugin.model.costs import LoadTimes as LoadTimes
    from samullm_plugin.model.costs import ModeCosts as ModeCosts
    from samullm_plugin.model.costs import Provenance as Provenance
    from samullm_plugin.model.engine_config import EngineConfig as EngineConfig
    from samullm_plugin.model.latency import Curve as Curve
    from samullm_plugin.model.latency import StepLatency as StepLatency
    from samullm_plugin.model.latency import StepModel as StepModel
    from samullm_plugin.model.latency import StepTable as StepTable
    from samullm_plugin.model.lengths import LengthDistribution as LengthDistribution
    from samullm_plugin.model.lengths import LengthObservations as LengthObservations
    from samullm_plugin.model.mixing import mix_applications as mix_applications
    from samullm_plugin.model.parallel import ParallelConfig as ParallelConfig
    from samullm_plugin.model.plan import Assignment as Assignment
    from samullm_plugin.model.plan import Plan as Plan
    from samullm_plugin.model.plan import Stage as Stage
    from samullm_plugin.model.plan import StageEnd as StageEnd
    from samullm_plugin.model.problem import Problem as Problem
    from samullm_plugin.model.requests import RequestTable as RequestTable
    from samullm_plugin.model.scenarios import LengthScenario as LengthScenario
    from samullm_plugin.profiling.bundled_lengths import measured_lengths as measured_lengths
    from samullm_plugin.profiling.bundled_lengths import measured_models as measured_models
    from samullm_plugin.profiling.bundled_lengths import unknown_model as unknown_model
    from samullm_plugin.profiling.bundled_lengths import workload_lengths as workload_lengths
    from samullm_plugin.rules.verify import verify as verify

_PUBLIC = {
    "api.app": ("App", "compare"),
    "api.nodes": ("Model", "Node"),
    "api.plans": ("AppPlan", "Comparison"),
    "api.run_table": ("RunTable",),
    "api.runs": ("AppRun",),
    "api.tasks": ("Task",),
    "model.application": ("Application", "EngineOptions", "ModelNode", "ModelSpec"),
    "model.architecture": ("ModelArchitecture",),
    "model.cluster": ("Cluster", "Gpu"),
    "model.costs": ("LoadTimes", "ModeCosts", "Provenance"),
    "model.lengths": ("LengthDistribution", "LengthObservations"),
    "model.mixing": ("mix_applications",),
    "model.engine_config": ("EngineConfig",),
    "model.latency": ("Curve", "StepLatency", "StepModel", "StepTable"),
    "engine.simulate": ("simulate_engine",),
    "engine.workload": ("EngineRun", "Workload"),
    "model.parallel": ("ParallelConfig",),
    "model.plan": ("Assignment", "Plan", "Stage", "StageEnd"),
    "model.problem": ("Problem",),
    "model.requests": ("RequestTable",),
    "model.scenarios": ("LengthScenario",),
    "rules.verify": ("verify",),
    "errors": (
        "InputError",
        "MissingExtraError",
        "PlanError",
        "PluginError",
        "Reject",
        "RunError",
        "SamullmError",
    ),
    "host.hookspecs": ("INTERFACE_VERSION", "hookimpl", "hookspec"),
    "host.interfaces.application": ("ApplicationSource",),
    "host.interfaces.executor": (
        "EngineEvent",
        "EngineRequest",
        "EngineSpec",
        "Executor",
        "RequestOutput",
    ),
    "host.interfaces.latency": ("LatencyModel",),
    "host.interfaces.length": ("LengthEstimator", "LengthQuery"),
    "host.interfaces.observer": ("RunEvent", "RunInfo", "StageRecord"),
    "host.interfaces.plugin": ("NoOptions", "Plugin"),
    "host.interfaces.policy": ("PolicyBatch", "RequestPolicy"),
    "host.interfaces.scheduler": ("SchedulingContext", "StageScheduler"),
    "checkpoints.gpus": ("bundled_gpu",),
    "profiling.bundled_lengths": (
        "measured_lengths",
        "measured_models",
        "unknown_model",
        "workload_lengths",
    ),
    "checkpoints.models": ("bundled_model", "find_name"),
    "host.manager": ("PluginHost",),
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
