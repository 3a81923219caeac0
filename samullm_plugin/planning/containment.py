"""Third parties' schedule, sample and fit calls, in a child process that can be ended.

The child imports the plugin's class, makes an instance and calls one method. Whatever it prints
goes to stderr; whatever it changes stays with it; when its time is over its process group is
killed.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from samullm_plugin.errors import InputError, PluginError, SamullmError
from samullm_plugin.host.interfaces.scheduler import SchedulingReport
from samullm_plugin.host.registration import Registration
from samullm_plugin.model.plan import Plan
from samullm_plugin.model.problem import Problem


@dataclass(frozen=True, slots=True)
class ContainedCall:
    """What the child is asked to do.

    Attributes:
        job: ``schedule``, ``length`` or ``method``.
        module: module of the plugin's class.
        qualname: name of the class in it.
        options: validated again by the class's ``Config``.
        arguments: of the call.
        search_path: where the child finds the plugin.
    """

    job: str
    module: str
    qualname: str
    options: Mapping[str, object]
    arguments: Mapping[str, Any]
    search_path: tuple[str, ...] = field(default_factory=lambda: tuple(sys.path))


@dataclass(frozen=True, slots=True)
class ContainedResult:
    """What the child answers: a value, or an error by kind and text."""

    value: Any = None
    error_kind: str = ""
    error: str = ""


def call_contained(registration: Registration, call: ContainedCall, limit_s: float) -> Any:
    """Run a call in a child process and return its value.

    Args:
        registration: what is called, for messages.
        call: the call.
        limit_s: seconds until the child is killed.

    Raises:
        PluginError: if it raises, is too slow, dies or answers nothing; the plugin is named.
        InputError: if the plugin raised one: its message is for the user.
    """
    origin = registration.provenance
    name = f"{origin.kind} {origin.qualified_name}"
    child = subprocess.Popen(
        [sys.executable, "-m", "samullm_plugin.planning.contained_child"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        out, _ = child.communicate(pickle.dumps(call), timeout=limit_s)
    except subprocess.TimeoutExpired:
        raise PluginError(f"{name} did not answer within {limit_s:g} s and was ended") from None
    finally:
        # Also what the plugin started; the group is gone if the child has ended alone.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()
        for pipe in (child.stdin, child.stdout):
            if pipe is not None:
                pipe.close()
    if not out:
        raise PluginError(f"{name} ended its process (exit status {child.returncode})")
    result = pickle.loads(out)
    if not isinstance(result, ContainedResult):
        raise PluginError(f"{name} answered nonsense")
    if result.error_kind == "input":
        raise InputError(result.error)
    if result.error_kind:
        raise PluginError(f"{name} {result.error}")
    return result.value


def schedule_contained(
    registration: Registration,
    options: Mapping[str, object],
    problem: Problem,
    seed: int,
    budget_s: float | None,
    limit_s: float,
) -> tuple[Plan, SchedulingReport]:
    """Let a third party's scheduler plan in a child process.

    Raises:
        PluginError: if it raises, is too slow, changes the problem or returns no plan.
        InputError: if the instance is beyond it.
    """
    cls = registration.value
    arguments = {"problem": problem, "seed": seed, "budget_s": budget_s}
    call = ContainedCall("schedule", cls.__module__, cls.__qualname__, options, arguments)
    plan, report = call_contained(registration, call, limit_s)
    if not isinstance(plan, Plan):
        name = registration.provenance.qualified_name
        raise PluginError(f"scheduler {name} returned a {type(plan).__name__}, not a Plan")
    return plan, report


def method_contained(
    registration: Registration,
    options: Mapping[str, object],
    method: str,
    arguments: Mapping[str, Any],
    limit_s: float,
) -> Any:
    """Call one method of a new instance in a child process and return what it returns.

    Raises:
        PluginError: if it raises, is too slow or dies.
    """
    cls = registration.value
    call = ContainedCall(
        "method",
        cls.__module__,
        cls.__qualname__,
        options,
        {"method": method, "arguments": dict(arguments)},
    )
    return call_contained(registration, call, limit_s)


def describe(error: BaseException) -> ContainedResult:
    """Return an error as the child answers it."""
    if isinstance(error, InputError):
        return ContainedResult(error_kind="input", error=str(error))
    if isinstance(error, SamullmError):
        return ContainedResult(error_kind="plugin", error=f"failed: {error}")
    text = " ".join(str(error).split())
    return ContainedResult(error_kind="raised", error=f"raised {type(error).__name__}: {text}")
