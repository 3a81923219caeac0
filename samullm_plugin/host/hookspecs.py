"""Every hook a plugin may implement.

A plugin is a module (or object) named by an entry point of the group ``samullm``. It marks the
hooks it implements with :data:`hookimpl`::

    from samullm_plugin import hookimpl


    @hookimpl
    def register_schedulers(register):
        register(MyScheduler)

An implementation may leave out arguments it does not need, and must not ask for others. The host
loads each plugin on its own: what one does wrong is listed with its name and reason by
``samullm plugins`` and does not stop the rest; of a plugin that fails in any hook nothing stays.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    import typer

    from samullm_plugin.host.interfaces.application import ApplicationSource
    from samullm_plugin.host.interfaces.executor import Executor
    from samullm_plugin.host.interfaces.latency import LatencyModel
    from samullm_plugin.host.interfaces.length import LengthEstimator
    from samullm_plugin.host.interfaces.observer import RunEvent, RunInfo, StageRecord
    from samullm_plugin.host.interfaces.policy import RequestPolicy
    from samullm_plugin.host.interfaces.scheduler import StageScheduler
    from samullm_plugin.model.plan import Stage

INTERFACE_VERSION = 1
"""Version of the hooks and interfaces; a plugin may state the one it was written for by a module
variable ``samullm_interface``, and is then refused by a host that has another."""

hookspec = pluggy.HookspecMarker("samullm")
hookimpl = pluggy.HookimplMarker("samullm")


class Registrations:
    """Hooks by which a plugin offers its classes, each called once when plugins are loaded.

    ``register`` takes one class per call and may be called any number of times. The class must
    derive from the kind's base class and implement its abstract methods, have a docstring, a class
    variable ``name`` (lower-case letters, digits and single hyphens) and a class variable
    ``Config`` (a pydantic model of its options), and be constructible with that config alone.
    """

    @hookspec
    def register_length_estimators(self, register: Callable[[type[LengthEstimator]], None]) -> None:
        """Offer length estimators: how long outputs will be."""

    @hookspec
    def register_latency_models(self, register: Callable[[type[LatencyModel]], None]) -> None:
        """Offer latency models: seconds of iterations and loads, and memory."""

    @hookspec
    def register_schedulers(self, register: Callable[[type[StageScheduler]], None]) -> None:
        """Offer stage schedulers: which models run when, how parallel, on which GPUs."""

    @hookspec
    def register_executors(self, register: Callable[[type[Executor]], None]) -> None:
        """Offer executors: what starts engines and feeds them requests."""

    @hookspec
    def register_request_policies(self, register: Callable[[type[RequestPolicy]], None]) -> None:
        """Offer request policies: order of requests inside a model, and their replica."""

    @hookspec
    def register_applications(self, register: Callable[[type[ApplicationSource]], None]) -> None:
        """Offer applications that can be named where an ``app.yaml`` is expected."""

    @hookspec
    def register_commands(self, app: typer.Typer) -> None:
        """Add commands to ``samullm``.

        ``app`` is an empty ``typer.Typer`` of this plugin's own; commands and sub-applications
        added to it become commands of ``samullm``. A built-in command keeps its name: a plugin's
        command of the same name is reached as ``<distribution>:<command>``.
        """


class Observers:
    """Hooks that watch a run.

    They are called in the process that coordinates the run only, never in engines or workers. What
    they return is ignored; one that raises is reported once and not called again.
    """

    @hookspec
    def before_stage_run(self, run: RunInfo, stage: Stage) -> None:
        """Be told that a stage is about to start."""

    @hookspec
    def after_stage_run(self, run: RunInfo, stage: Stage, record: StageRecord) -> None:
        """Be told that a stage has ended, and what it did."""

    @hookspec
    def on_run_event(self, run: RunInfo, event: RunEvent) -> None:
        """Be told of each event as it enters the run's journal."""


OBSERVER_HOOKS = ("before_stage_run", "after_stage_run", "on_run_event")
