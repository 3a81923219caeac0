"""What plugins may register, the checks on it, and where it came from."""

from __future__ import annotations

import inspect
import re
from dataclasses import dataclass
from typing import Any, Literal, get_args

from pydantic import BaseModel

from samullm_plugin.errors import PluginError
from samullm_plugin.host.interfaces.application import ApplicationSource
from samullm_plugin.host.interfaces.executor import Executor
from samullm_plugin.host.interfaces.latency import LatencyModel
from samullm_plugin.host.interfaces.length import LengthEstimator
from samullm_plugin.host.interfaces.policy import RequestPolicy
from samullm_plugin.host.interfaces.scheduler import StageScheduler

Kind = Literal[
    "length-estimator",
    "latency-model",
    "scheduler",
    "executor",
    "request-policy",
    "application",
]
THIS_PROCESS = "this-process"
"""Stands for a distribution in the names of what Python code hands over itself."""

Status = Literal["ok", "failed", "disabled", "dropped"]

KINDS: tuple[Kind, ...] = get_args(Kind)

_REGISTER_HOOKS: dict[Kind, tuple[str, type]] = {
    "length-estimator": ("register_length_estimators", LengthEstimator),
    "latency-model": ("register_latency_models", LatencyModel),
    "scheduler": ("register_schedulers", StageScheduler),
    "executor": ("register_executors", Executor),
    "request-policy": ("register_request_policies", RequestPolicy),
    "application": ("register_applications", ApplicationSource),
}

_NAME = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")


@dataclass(frozen=True, slots=True)
class PluginProvenance:
    """Where something comes from and whether it works.

    Attributes:
        kind: a kind of plugin class, ``command``, ``observer``, or ``plugin`` for an entry point
            of which nothing was registered.
        name: the registered name; for ``plugin`` and ``observer`` the entry point's.
        distribution: what was installed with pip.
        version: of the distribution.
        module: where the code is.
        status: ``ok``; ``failed``: nothing of the plugin is in use; ``disabled``: not loaded, as
            asked; ``dropped``: an observer that raised and is no longer called.
        reason: why, where the status is not ``ok``.
    """

    kind: str
    name: str
    distribution: str
    version: str
    module: str
    status: Status = "ok"
    reason: str = ""

    @property
    def qualified_name(self) -> str:
        """Return the name that is never ambiguous."""
        return f"{self.distribution}:{self.name}"

    @property
    def shipped(self) -> bool:
        """Return whether it comes with this project, or from the caller, and not from others."""
        return canonical_distribution(self.distribution) in ("samullm-plugin", THIS_PROCESS)


@dataclass(frozen=True, slots=True)
class Registration:
    """One thing a plugin offered: a class of a kind, or a command, and where it came from.

    What Python code hands over itself may be an instance.
    """

    provenance: PluginProvenance
    value: Any


def register_hook(kind: Kind) -> str:
    """Return the name of the hook that offers classes of a kind."""
    return _REGISTER_HOOKS[kind][0]


def canonical_distribution(name: str) -> str:
    """Return a distribution's name as package indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def check_class(kind: Kind, cls: object) -> None:
    """Check that ``cls`` may be registered as ``kind``.

    Raises:
        PluginError: saying which rule it breaks.
    """
    hook, base = _REGISTER_HOOKS[kind]
    if not isinstance(cls, type):
        raise PluginError(f"{hook}: {cls!r} is not a class; register the class, not an instance")
    label = f"{hook}: {cls.__module__}.{cls.__qualname__}"
    if not issubclass(cls, base):
        raise PluginError(f"{label} does not derive from {base.__name__}")
    if inspect.isabstract(cls):
        missing = ", ".join(sorted(getattr(cls, "__abstractmethods__", ())))
        raise PluginError(f"{label} does not implement {missing}")
    name = getattr(cls, "name", None)
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise PluginError(
            f"{label} has the name {name!r}; write lower-case letters, digits and single hyphens, "
            "a letter first"
        )
    config = getattr(cls, "Config", None)
    if not (isinstance(config, type) and issubclass(config, BaseModel)):
        raise PluginError(f"{label} has no pydantic model as its Config")
    if not (cls.__doc__ or "").strip():
        raise PluginError(f"{label} has no docstring; its first line is shown to users")
