"""The plugin host: loads plugins one by one, contains their faults and resolves their names."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from importlib import metadata
from typing import TYPE_CHECKING, Any, Literal, overload

from pydantic import BaseModel, ValidationError

from samullm_plugin.errors import (
    InputError,
    PluginError,
    SamullmError,
    UnknownNameError,
    describe_validation,
    suggest,
)
from samullm_plugin.host.discovery import BrokenMetadata, installed_plugins
from samullm_plugin.host.loading import PluginLoader, one_line, origin_of, selectors_of
from samullm_plugin.host.registration import (
    THIS_PROCESS,
    Kind,
    PluginProvenance,
    Registration,
    canonical_distribution,
    check_class,
)

if TYPE_CHECKING:
    from samullm_plugin.host.interfaces.application import ApplicationSource
    from samullm_plugin.host.interfaces.executor import Executor
    from samullm_plugin.host.interfaces.latency import LatencyModel
    from samullm_plugin.host.interfaces.length import LengthEstimator
    from samullm_plugin.host.interfaces.observer import RunEvent, RunInfo, StageRecord
    from samullm_plugin.host.interfaces.policy import RequestPolicy
    from samullm_plugin.host.interfaces.scheduler import StageScheduler
    from samullm_plugin.model.plan import Stage

Options = Mapping[str, object] | None

NO_PLUGINS = (
    "no plugin is installed, not even those shipped with samullm-plugin: a source checkout has to "
    "be installed once, with `pip install -e .`"
)

logger = logging.getLogger(__name__)


class PluginHost:
    """The plugins of one process, loaded when the host is made.

    Args:
        entry_points: the plugins; by default those of every installed distribution.
        disabled: not loaded: names of entry points, of distributions, or ``distribution:entry``.
        only: if given, nothing else is loaded (shipped plugins included); names as in ``disabled``.
        trace: log every hook call, at debug level.
    """

    def __init__(
        self,
        entry_points: Iterable[metadata.EntryPoint] | None = None,
        disabled: Collection[str] = (),
        only: Collection[str] | None = None,
        *,
        trace: bool = False,
    ) -> None:
        """Load every plugin that is not disabled; faults are kept, not raised."""
        self._pid = os.getpid()
        self._provenance: list[PluginProvenance] = []
        self._registrations: list[Registration] = []
        self._observers: dict[str, PluginProvenance] = {}
        self._loader = PluginLoader(trace=trace)
        points = list[metadata.EntryPoint](entry_points or ())
        if entry_points is None:
            for point in installed_plugins():
                if isinstance(point, BrokenMetadata):
                    self._provenance.append(
                        PluginProvenance(
                            "plugin", point.name, point.name, "", "", "failed", point.reason
                        )
                    )
                else:
                    points.append(point)
        ordered = sorted(points, key=lambda point: (origin_of(point), point.name))
        for point in ordered:
            loaded = self._loader.load(point, self._registrations, disabled, only)
            self._registrations.extend(loaded.registrations)
            if loaded.observer is not None:
                self._observers[loaded.observer.qualified_name] = loaded.observer
            if loaded.absent is not None:
                self._provenance.append(loaded.absent)
        known = {name for point in ordered for name in selectors_of(point)}
        for name in {*disabled, *(only or ())} - known:
            logger.warning("no installed plugin is named %r%s", name, suggest(name, known))

    @classmethod
    def from_settings(cls) -> PluginHost:
        """Return a host as the ``SAMULLM_*`` environment variables ask for."""
        from samullm_plugin.host.settings import read_settings

        settings = read_settings()
        return cls(
            disabled=settings.disable_plugins,
            only=settings.load_plugins,
            trace=settings.trace_plugins,
        )

    def add(self, kind: Kind, value: object) -> str:
        """Take a class or an instance from Python code, and return the name to use for it.

        It runs in this process; one of an equal kind and name is replaced.

        Raises:
            InputError: saying which rule of plugin classes it breaks.
        """
        cls: Any = value if isinstance(value, type) else type(value)
        try:
            check_class(kind, cls)
        except PluginError as error:
            raise InputError(f"{kind}: {error}") from error
        name: str = cls.name
        origin = PluginProvenance(kind, name, THIS_PROCESS, "", cls.__module__)
        self._registrations = [
            r
            for r in self._registrations
            if (r.provenance.kind, r.provenance.qualified_name) != (kind, origin.qualified_name)
        ]
        self._registrations.append(Registration(origin, value))
        return origin.qualified_name

    # Asking

    def provenance(self) -> list[PluginProvenance]:
        """Return everything registered, and every plugin that failed or is disabled."""
        rows = [r.provenance for r in self._registrations]
        rows += [*self._observers.values(), *self._provenance]
        return sorted(rows, key=lambda row: (row.kind, row.name, row.distribution))

    def failures(self) -> list[PluginProvenance]:
        """Return the plugins that failed to load."""
        return [row for row in self._provenance if row.status == "failed"]

    def names(self, kind: Kind | Literal["command"]) -> list[str]:
        """Return the names to write for everything of a kind, qualified where ambiguous."""
        rows = [r.provenance for r in self._registrations if r.provenance.kind == kind]
        bare = [row.name for row in rows]
        return sorted(row.name if bare.count(row.name) == 1 else row.qualified_name for row in rows)

    def resolve(self, kind: Kind | Literal["command"], name: str) -> Registration:
        """Return what a name, bare or ``distribution:name``, stands for.

        Raises:
            InputError: if it stands for nothing (an ``UnknownNameError``), or for more than one
                thing.
        """
        distribution, _, bare = name.rpartition(":")
        wanted = canonical_distribution(distribution)
        found = [
            r
            for r in self._registrations
            if r.provenance.kind == kind
            and r.provenance.name == bare
            and wanted in ("", canonical_distribution(r.provenance.distribution))
        ]
        if len(found) == 1:
            return found[0]
        if found:
            options = [r.provenance.qualified_name for r in found]
            raise InputError(
                f"{kind} {name!r} is provided by {' and by '.join(options)}; write one of these"
            )
        if not self._registrations and not self._provenance:
            raise UnknownNameError(NO_PLUGINS)
        known = self.names(kind)
        message = f"unknown {kind} {name!r}{suggest(name, known)}; known: {', '.join(known)}"
        if not known:
            message = f"unknown {kind} {name!r}: no loaded plugin provides any"
        if failed := self.failures():
            listed = ", ".join(row.qualified_name for row in failed)
            message += f" (failed to load, see `samullm plugins`: {listed})"
        raise UnknownNameError(message)

    def check_options(self, kind: Kind, name: str, options: Options = None) -> BaseModel:
        """Return options as the plugin's own ``Config``, without making an instance.

        Raises:
            InputError: for an unknown or ambiguous name, and for wrong options, by field.
        """
        return _validated(self.resolve(kind, name).value.Config, options or {}, f"{kind} {name}")

    @overload
    def create(
        self, kind: Literal["scheduler"], name: str, options: Options = None
    ) -> StageScheduler: ...
    @overload
    def create(self, kind: Literal["executor"], name: str, options: Options = None) -> Executor: ...
    @overload
    def create(
        self, kind: Literal["latency-model"], name: str, options: Options = None
    ) -> LatencyModel: ...
    @overload
    def create(
        self, kind: Literal["request-policy"], name: str, options: Options = None
    ) -> RequestPolicy: ...
    @overload
    def create(
        self, kind: Literal["application"], name: str, options: Options = None
    ) -> ApplicationSource: ...
    @overload
    def create(
        self, kind: Literal["length-estimator"], name: str, options: Options = None
    ) -> LengthEstimator: ...

    def create(self, kind: Kind, name: str, options: Options = None) -> Any:
        """Return a new instance of a registered class.

        Args:
            kind: what it is.
            name: bare or ``distribution:name``.
            options: checked by the class's own ``Config``.

        Raises:
            InputError: for an unknown or ambiguous name, and for wrong options, by field.
            PluginError: if the plugin's constructor raises; its name is in the message.
        """
        registration = self.resolve(kind, name)
        config = self.check_options(kind, name, options)
        if not isinstance(registration.value, type):  # an instance that Python code handed over
            if options:
                raise InputError(f"{kind} {name}: it is an instance and takes no options any more")
            return registration.value
        try:
            return registration.value(config)
        except SamullmError:
            raise
        except Exception as error:  # foreign code
            origin = registration.provenance.qualified_name
            raise PluginError(f"{kind} {origin} could not be made: {one_line(error)}") from error

    # Observers

    @property
    def has_observers(self) -> bool:
        """Whether there are observers of runs."""
        return any(row.status == "ok" for row in self._observers.values())

    def before_stage_run(self, run: RunInfo, stage: Stage) -> None:
        """Tell observers that a stage is about to start."""
        self._tell("before_stage_run", run=run, stage=stage)

    def after_stage_run(self, run: RunInfo, stage: Stage, record: StageRecord) -> None:
        """Tell observers that a stage has ended."""
        self._tell("after_stage_run", run=run, stage=stage, record=record)

    def on_run_event(self, run: RunInfo, event: RunEvent) -> None:
        """Tell observers of an event of the journal."""
        self._tell("on_run_event", run=run, event=event)

    def _tell(self, hook: str, **arguments: object) -> None:
        """Call every observer that still works; one that raises is reported once and dropped."""
        if os.getpid() != self._pid:  # a forked engine has a copy of the host
            return
        for key, origin in self._observers.items():
            if origin.status != "ok":
                continue
            try:
                with contextlib.redirect_stdout(sys.stderr):
                    self._loader.only(hook, key)(**arguments)
            except Exception as error:  # foreign code
                reason = f"{hook}: {one_line(error)}"
                self._observers[key] = replace(origin, status="dropped", reason=reason)
                logger.warning("observer %s raised and is no longer called: %s", key, reason)


def _validated(model: type[BaseModel], options: Mapping[str, object], label: str) -> BaseModel:
    """Return the options as the plugin's config; unknown ones are refused in any case.

    Pydantic ignores unknown fields unless told otherwise; a misspelt option would pass unnoticed.
    """
    if model.model_config.get("extra") != "allow":
        fields = model.model_fields.items()
        known = {key for name, field in fields for key in (name, field.alias) if key}
        for key in options:
            if key not in known:
                listed = ", ".join(sorted(known)) or "none"
                raise InputError(
                    f"{label}: unknown option {key!r}{suggest(key, known)}; known: {listed}"
                )
    try:
        return model.model_validate(dict(options))
    except ValidationError as error:
        raise InputError(f"{label}: {describe_validation(error)}") from error
