"""Every hook and every method of an interface is documented with its exact arguments."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest

from samullm_plugin.host import hookspecs
from samullm_plugin.host.interfaces.application import ApplicationSource
from samullm_plugin.host.interfaces.executor import Executor
from samullm_plugin.host.interfaces.latency import LatencyModel
from samullm_plugin.host.interfaces.length import LengthEstimator
from samullm_plugin.host.interfaces.policy import RequestPolicy
from samullm_plugin.host.interfaces.scheduler import StageScheduler
from samullm_plugin.testing import (
    executor_contract,
    latency_contract,
    length_contract,
    policy_contract,
    scheduler_contract,
)

PAGES = Path(__file__).parents[2] / "docs" / "plugins"
TEXT = {path.name: path.read_text() for path in PAGES.glob("*.md")}
HEADINGS = {
    heading
    for text in TEXT.values()
    for heading in re.findall(r"^## `([^`]+)`$", text, re.MULTILINE)
}
INTERFACES = (
    ApplicationSource,
    Executor,
    LatencyModel,
    LengthEstimator,
    RequestPolicy,
    StageScheduler,
)
CONTRACTS = {
    "executor.md": executor_contract,
    "latency-model.md": latency_contract,
    "length-estimator.md": length_contract,
    "request-policy.md": policy_contract,
    "scheduler.md": scheduler_contract,
}


def signature(function, owner: str = "") -> str:
    names = [n for n in inspect.signature(function).parameters if n != "self"]
    return f"{owner}{function.__name__}({', '.join(names)})"


HOOKS = [
    getattr(cls, name)
    for cls in (hookspecs.Registrations, hookspecs.Observers)
    for name in vars(cls)
    if not name.startswith("_")
]


@pytest.mark.parametrize("hook", HOOKS, ids=lambda h: h.__name__)
def test_every_hook_has_a_heading_with_its_arguments(hook):
    assert signature(hook) in HEADINGS


@pytest.mark.parametrize("interface", INTERFACES, ids=lambda c: c.__name__)
def test_every_abstract_method_has_a_heading_with_its_arguments(interface):
    for name in sorted(interface.__abstractmethods__):
        assert signature(getattr(interface, name), f"{interface.__name__}.") in HEADINGS


def test_no_heading_documents_what_does_not_exist():
    known = {signature(h) for h in HOOKS}
    for interface in INTERFACES:
        for name, function in inspect.getmembers(interface, inspect.isfunction):
            if not name.startswith("_"):
                known.add(signature(function, f"{interface.__name__}."))
    assert known >= HEADINGS


def test_optional_executor_methods_are_listed_with_their_arguments():
    listed = re.findall(r"`(Executor\.[a-z_]+\([^`]*\))`", TEXT["executor.md"])
    optional = {
        signature(function, "Executor.")
        for name, function in inspect.getmembers(Executor, inspect.isroutine)
        if not name.startswith("_")
    }
    assert set(listed) == optional


@pytest.mark.parametrize("page", CONTRACTS)
def test_every_rule_of_a_contract_is_listed(page):
    source = inspect.getsource(CONTRACTS[page])
    rules = set(re.findall(r'"([a-z]+(?:-[a-z]+)+|[a-z]+)",?\s*f?"', source))
    rules |= set(re.findall(r'require\(\s*[^"]*?,\s*"([a-z-]+)"', source, re.DOTALL))
    rules |= set(re.findall(r'ContractViolation\(\s*"([a-z-]+)"', source))
    documented = set(re.findall(r"`([a-z-]+)`", TEXT[page].split("## Contract")[1]))
    assert rules, "no rules were found in the source"
    assert rules <= documented, f"not documented: {sorted(rules - documented)}"
    assert documented <= rules, f"no such rule: {sorted(documented - rules)}"
