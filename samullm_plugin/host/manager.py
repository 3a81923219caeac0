"""The plugin host: loads plugins one by one, contains their faults and resolves their names."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from importlib import metadata
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal, overload

import pluggy
from pydantic import BaseModel, ValidationError

from samullm_plugin.errors import (
    InputError,
    PluginError,
    SamullmError,
    UnknownNameError,
    describe_validation,
    suggest,
)
from samullm_plugin.host import hookspecs
from samullm_plugin.host.discovery import GROUP, BrokenMetadata, installed_plugins
from samullm_plugin.host.registration import (
    KINDS,
    THIS_PROCESS,
    Kind,
    PluginProvenance,
    Registration,
    canonical_distribution,
    check_class,
    register_hook,
)

if TYPE_CHECKING:
    from samullm_plugin.host.interfaces.application import ApplicationSource
    from samullm_plugin.host.interfaces.executor import Executor
    from samullm_plugin.host.interfaces.latency import LatencyModel
    from samullm_plugin.host.interfaces.length import LengthEstimator
    from samullm_plugin.host.interfaces.observer import RunEvent, RunInfo, StageRecord
    from samullm_plugin.host.interfaces.policy import RequestPolicy
    from samullm_plugin.host.interfaces.scheduler import StageScheduler
    from samullm_plugin.host.settings import Settings
    from samullm_plugin.model.plan import Stage

Options = Mapping[str, object] | None

NO_PLUGINS = (
    "no plugin is installed, not even those shipped with samullm-plugin: a source checkout has to "
    "be installed once, with `pip install -e .`"
)

logger = logging.getLogger(__name__)
_trace_logger = logging.getLogger("samullm_plugin.hook_calls")


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
        self._manager = pluggy.PluginManager(GROUP)
        self._manager.add_hookspecs(hookspecs.Registrations)
        self._manager.add_hookspecs(hookspecs.Observers)
        if trace:
            _trace_logger.setLevel(logging.DEBUG)
            self._manager.trace.root.setwriter(lambda text: _trace_logger.debug(text.rstrip()))
            self._manager.enable_tracing()
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
        ordered = sorted(points, key=lambda point: (_origin(point), point.name))
        for point in ordered:
            self._load(point, disabled, only)
        known = {name for point in ordered for name in _selectors(point)}
        for name in {*disabled, *(only or ())} - known:
            logger.warning("no installed plugin is named %r%s", name, suggest(name, known))

    @classmethod
    def from_settings(cls, settings: Settings | None = None) -> PluginHost:
        """Return a host as the ``SAMULLM_*`` environment variables ask for."""
        if settings is None:
            from samullm_plugin.host.settings import read_settings

            settings = read_settings()
        return cls(
            disabled=settings.disable_plugins,
            only=settings.load_plugins,
            trace=settings.trace_plugins,
        )

    # Loading

    def _load(
        self,
        point: metadata.EntryPoint,
        disabled: Collection[str],
        only: Collection[str] | None,
    ) -> None:
        """Load one plugin wholly or not at all, and note how it went."""
        distribution, version = _origin(point)
        key = f"{distribution}:{point.name}"
        origin = PluginProvenance("plugin", point.name, distribution, version, point.module)
        selectors = _selectors(point)
        if not selectors.isdisjoint(disabled) or (only is not None and selectors.isdisjoint(only)):
            reason = "disabled" if not selectors.isdisjoint(disabled) else "not among those to load"
            self._provenance.append(replace(origin, status="disabled", reason=reason))
            return
        if self._manager.has_plugin(key):
            reason = f"{distribution} has another entry point of this name"
            self._provenance.append(replace(origin, status="failed", reason=reason))
            return
        try:
            # A plugin's prints would end up inside the JSON that commands write.
            with contextlib.redirect_stdout(sys.stderr):
                plugin = point.load()
                _check_interface_version(plugin, point)
                self._manager.register(plugin, key)
                self._check_hooks(plugin)
                found = [*self._collect(plugin, origin), *self._collect_commands(plugin, origin)]
                self._check_duplicates(found)
        except (Exception, SystemExit) as error:  # foreign code: whatever it raises stays with it
            if self._manager.has_plugin(key):
                self._manager.unregister(name=key)
            self._provenance.append(replace(origin, status="failed", reason=_reason(error)))
            logger.debug("plugin %s failed to load", key, exc_info=error)
            return
        if any(caller.name in hookspecs.OBSERVER_HOOKS for caller in self._callers(plugin)):
            self._observers[key] = replace(origin, kind="observer")
        self._registrations.extend(found)

    def _callers(self, plugin: object) -> list[pluggy.HookCaller]:
        return self._manager.get_hookcallers(plugin) or []

    def _check_hooks(self, plugin: object) -> None:
        """Refuse a plugin with an unknown hook, or with none."""
        callers = self._callers(plugin)
        known = [name for name in dir(self._manager.hook) if not name.startswith("_")]
        known = [name for name in known if getattr(self._manager.hook, name).has_spec()]
        for caller in callers:
            optional = all(i.optionalhook for i in caller.get_hookimpls() if i.plugin is plugin)
            if not caller.has_spec() and not optional:
                raise PluginError(f"unknown hook {caller.name!r}{suggest(caller.name, known)}")
        if not callers:
            raise PluginError("it implements no hook; mark functions with @samullm_plugin.hookimpl")

    def _only(self, hook: str, plugin: object) -> pluggy.HookCaller:
        """Return a caller of one hook of one plugin, so that blame is certain."""
        others = [other for other in self._manager.get_plugins() if other is not plugin]
        return self._manager.subset_hook_caller(hook, others)

    def _collect(self, plugin: object, origin: PluginProvenance) -> list[Registration]:
        """Return the classes a plugin registers, checked."""
        found: list[Registration] = []
        for kind in KINDS:

            def register(cls: Any, kind: Kind = kind) -> None:
                check_class(kind, cls)
                came = replace(origin, kind=kind, name=cls.name, module=cls.__module__)
                found.append(Registration(came, cls))

            self._only(register_hook(kind), plugin)(register=register)
        return found

    def _collect_commands(self, plugin: object, origin: PluginProvenance) -> list[Registration]:
        """Return the commands a plugin adds, built from a typer application of its own."""
        if not any(caller.name == "register_commands" for caller in self._callers(plugin)):
            return []
        import typer

        app = typer.Typer(add_completion=False)
        self._only("register_commands", plugin)(app=app)
        if not (app.registered_commands or app.registered_groups):
            return []
        commands = typer.main.get_group(app).commands
        return [
            Registration(replace(origin, kind="command", name=name), command)
            for name, command in commands.items()
        ]

    def _check_duplicates(self, found: list[Registration]) -> None:
        """Refuse a second thing of one kind and name in one distribution."""
        seen = {(r.provenance.kind, r.provenance.qualified_name) for r in self._registrations}
        for registration in found:
            origin = registration.provenance
            if (origin.kind, origin.qualified_name) in seen:
                raise PluginError(
                    f"{origin.distribution} registers the {origin.kind} {origin.name!r} twice"
                )
            seen.add((origin.kind, origin.qualified_name))

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
            raise PluginError(f"{kind} {origin} could not be made: {_reason(error)}") from error

    # Observers

    @property
    def has_observers(self) -> bool:
        """Whether anyone wants to be told about a run."""
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
                    self._only(hook, self._manager.get_plugin(key))(**arguments)
            except Exception as error:  # foreign code
                reason = f"{hook}: {_reason(error)}"
                self._observers[key] = replace(origin, status="dropped", reason=reason)
                logger.warning("observer %s raised and is no longer called: %s", key, reason)


def _origin(point: metadata.EntryPoint) -> tuple[str, str]:
    """Return name and version of the distribution of an entry point."""
    if point.dist is None:
        return "unknown", ""
    return point.dist.name, point.dist.version


def _selectors(point: metadata.EntryPoint) -> set[str]:
    """Return the names by which users may disable or select a plugin."""
    distribution, _ = _origin(point)
    return {point.name, distribution, f"{distribution}:{point.name}"}


def _check_interface_version(plugin: object, point: metadata.EntryPoint) -> None:
    """Refuse a plugin that says it was written for another version of the interface."""
    module = plugin if isinstance(plugin, ModuleType) else sys.modules[point.module]
    stated = getattr(module, "samullm_interface", hookspecs.INTERFACE_VERSION)
    if stated != hookspecs.INTERFACE_VERSION:
        raise PluginError(
            f"it was written for version {stated!r} of the plugin interface; this samullm-plugin "
            f"has version {hookspecs.INTERFACE_VERSION}: install matching releases of the two"
        )


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


def _reason(error: BaseException) -> str:
    """Return one line about an error."""
    if isinstance(error, SamullmError):
        return str(error)
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
