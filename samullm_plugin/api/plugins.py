"""Plugins as Python code names them: by name, with options, as classes or as instances."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from samullm_plugin.app.fields import validate
from samullm_plugin.app.spec import Component, PlannerSection

if TYPE_CHECKING:
    from samullm_plugin.host.manager import PluginHost
    from samullm_plugin.host.registration import Kind

Part = str | Mapping[str, Any] | Component | type | object
"""A plugin: its name, a mapping of ``type`` and ``options``, a class of its kind or an instance."""


class HandedOver:
    """The plugins that are installed, and those that Python code has handed over."""

    def __init__(self) -> None:
        """Load nothing before it is needed."""
        self._host: PluginHost | None = None

    @property
    def host(self) -> PluginHost:
        """Return the plugins, those handed over included."""
        if self._host is None:
            from samullm_plugin.host.manager import PluginHost

            self._host = PluginHost.from_settings()
        return self._host

    def part(self, kind: Kind, value: Part) -> Any:
        """Return a plugin as ``app.yaml`` names it; a class or an instance is registered."""
        if isinstance(value, str | Mapping | Component):
            return value
        return self.host.add(kind, value)

    def planner(self, planner: Mapping[str, Any] | PlannerSection) -> Any:
        """Return a section ``planner`` with its plugins as ``app.yaml`` names them."""
        if isinstance(planner, PlannerSection):
            return planner
        kinds: dict[str, Kind] = {
            "scheduler": "scheduler",
            "length_estimator": "length-estimator",
            "latency_model": "latency-model",
            "request_policy": "request-policy",
        }
        return {
            n: self.part(kinds[n], v) if n in kinds and v is not None else v
            for n, v in planner.items()
        }

    def scheduler_name(self, value: Part) -> str:
        """Return the name of a scheduler that is given by it, as a class or as an instance.

        Raises:
            InputError: if there is none of this name.
        """
        name = self.component("scheduler", value).type
        self.host.resolve("scheduler", name)
        return name

    def component(self, kind: Kind, value: Part) -> Component:
        """Return a plugin with its options."""
        part = self.part(kind, value)
        return validate(Component, {"type": part} if isinstance(part, str) else part, kind)
