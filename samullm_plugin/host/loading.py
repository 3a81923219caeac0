"""Loads plugins one by one: wholly or not at all, with the reason where one is left out."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from types import ModuleType
from typing import Any
from weakref import WeakKeyDictionary

import pluggy

from samullm_plugin.errors import PluginError, SamullmError, suggest
from samullm_plugin.host import hookspecs
from samullm_plugin.host.discovery import GROUP
from samullm_plugin.host.registration import (
    KINDS,
    Kind,
    PluginProvenance,
    Registration,
    check_class,
    register_hook,
)

logger = logging.getLogger(__name__)
_trace_logger = logging.getLogger("samullm_plugin.hook_calls")


@dataclass(frozen=True, slots=True)
class Loaded:
    """What came of loading a plugin.

    Attributes:
        registrations: what it registered.
        observer: where it is from, if it observes runs.
        absent: why it is left out; None if it is not.
    """

    registrations: tuple[Registration, ...] = ()
    observer: PluginProvenance | None = None
    absent: PluginProvenance | None = None


class PluginLoader:
    """Loads plugins and checks what they register; their hooks are called through pluggy."""

    def __init__(self, *, trace: bool = False) -> None:
        """Begin with no plugin.

        Args:
            trace: log every hook call, at debug level.
        """
        self._manager = pluggy.PluginManager(GROUP)
        self._manager.add_hookspecs(hookspecs.Registrations)
        self._manager.add_hookspecs(hookspecs.Observers)
        if trace:
            _trace_logger.setLevel(logging.DEBUG)
            self._manager.trace.root.setwriter(lambda text: _trace_logger.debug(text.rstrip()))
            self._manager.enable_tracing()

    def load(
        self,
        point: metadata.EntryPoint,
        known: Sequence[Registration],
        disabled: Collection[str],
        only: Collection[str] | None,
    ) -> Loaded:
        """Load one plugin.

        Args:
            point: its entry point.
            known: what other plugins have registered.
            disabled: names of plugins that are not loaded.
            only: if given, nothing else is loaded.
        """
        distribution, version = origin_of(point)
        key = f"{distribution}:{point.name}"
        origin = PluginProvenance("plugin", point.name, distribution, version, point.module)
        selectors = selectors_of(point)
        if not selectors.isdisjoint(disabled) or (only is not None and selectors.isdisjoint(only)):
            reason = "disabled" if not selectors.isdisjoint(disabled) else "not among those to load"
            return Loaded(absent=replace(origin, status="disabled", reason=reason))
        if self._manager.has_plugin(key):
            reason = f"{distribution} has another entry point of this name"
            return Loaded(absent=replace(origin, status="failed", reason=reason))
        try:
            # A plugin's prints would end up inside the JSON that commands write.
            with contextlib.redirect_stdout(sys.stderr):
                plugin = point.load()
                _check_interface_version(plugin, point)
                self._manager.register(plugin, key)
                self._check_hooks(plugin)
                found = [*self._collect(key, origin), *self._collect_commands(key, origin)]
                _check_duplicates(known, found)
        except (Exception, SystemExit) as error:  # foreign code: whatever it raises stays with it
            if self._manager.has_plugin(key):
                self._manager.unregister(name=key)
            logger.debug("plugin %s failed to load", key, exc_info=error)
            return Loaded(absent=replace(origin, status="failed", reason=one_line(error)))
        observes = any(c.name in hookspecs.OBSERVER_HOOKS for c in self._callers(plugin))
        return Loaded(tuple(found), replace(origin, kind="observer") if observes else None)

    def only(self, hook: str, key: str) -> pluggy.HookCaller:
        """Return a caller of one hook of one plugin, so that blame is certain.

        Args:
            hook: its name.
            key: of the plugin, ``distribution:entry point``.
        """
        plugin = self._manager.get_plugin(key)
        others = [other for other in self._manager.get_plugins() if other is not plugin]
        return self._manager.subset_hook_caller(hook, others)

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

    def _collect(self, key: str, origin: PluginProvenance) -> list[Registration]:
        """Return the classes a plugin registers, checked."""
        found: list[Registration] = []
        for kind in KINDS:

            def register(cls: Any, kind: Kind = kind) -> None:
                check_class(kind, cls)
                came = replace(origin, kind=kind, name=cls.name, module=cls.__module__)
                found.append(Registration(came, cls))

            self.only(register_hook(kind), key)(register=register)
        return found

    def _collect_commands(self, key: str, origin: PluginProvenance) -> list[Registration]:
        """Return the commands a plugin adds, built from a typer application of its own."""
        plugin = self._manager.get_plugin(key)
        if not any(caller.name == "register_commands" for caller in self._callers(plugin)):
            return []
        import typer

        app = typer.Typer(add_completion=False)
        self.only("register_commands", key)(app=app)
        if not (app.registered_commands or app.registered_groups):
            return []
        commands = typer.main.get_group(app).commands
        return [
            Registration(replace(origin, kind="command", name=name), command)
            for name, command in commands.items()
        ]


def _check_duplicates(known: Sequence[Registration], found: Sequence[Registration]) -> None:
    """Refuse a second thing of one kind and name in one distribution."""
    seen = {(r.provenance.kind, r.provenance.qualified_name) for r in known}
    for registration in found:
        origin = registration.provenance
        if (origin.kind, origin.qualified_name) in seen:
            raise PluginError(
                f"{origin.distribution} registers the {origin.kind} {origin.name!r} twice"
            )
        seen.add((origin.kind, origin.qualified_name))


_origins: WeakKeyDictionary[metadata.Distribution, tuple[str, str]] = WeakKeyDictionary()


def origin_of(point: metadata.EntryPoint) -> tuple[str, str]:
    """Return name and version of the distribution of an entry point."""
    if point.dist is None:
        return "unknown", ""
    if point.dist not in _origins:  # each look reads and parses its metadata
        _origins[point.dist] = point.dist.name, point.dist.version
    return _origins[point.dist]


def selectors_of(point: metadata.EntryPoint) -> set[str]:
    """Return the names by which users may disable or select a plugin."""
    distribution, _ = origin_of(point)
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


def one_line(error: BaseException) -> str:
    """Return one line about an error."""
    if isinstance(error, SamullmError):
        return str(error)
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
