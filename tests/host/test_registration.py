"""Every kind has a hook, every hook a specification, every public name a home."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path

import pluggy
import pytest

import samullm_plugin
from samullm_plugin.host import hookspecs, registration
from samullm_plugin.host.registration import KINDS, register_hook

SOURCES = {
    "length-estimator": (
        "LengthEstimator",
        "def fit(self, o): return self\n    def sample(self, q, r, n): return None",
    ),
    "latency-model": ("LatencyModel", "def costs(self, *a): return None"),
    "scheduler": ("StageScheduler", "def schedule(self, p, c): return None"),
    "executor": ("Executor", "pass"),
    "request-policy": ("RequestPolicy", "def assign(self, b, n): return None"),
    "application": ("ApplicationSource", "def build(self): return None"),
}


def test_every_kind_has_its_hook() -> None:
    manager = pluggy.PluginManager("samullm")
    manager.add_hookspecs(hookspecs.Registrations)
    hooks = {h for h in dir(manager.hook) if h.startswith("register_")}
    assert hooks == {register_hook(kind) for kind in KINDS} | {"register_commands"}
    assert set(SOURCES) == set(KINDS)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_can_be_registered_and_made(install, load, kind) -> None:
    base, body = SOURCES[kind]
    source = (
        f"from samullm_plugin import {base}, hookimpl\n"
        f"class Mine({base}):\n    '''Doc.'''\n    name = 'mine'\n    {body}\n"
        "for missing in Mine.__abstractmethods__:\n    setattr(Mine, missing, None)\n"
        "import abc\nabc.update_abstractmethods(Mine)\n"
        f"@hookimpl\ndef {register_hook(kind)}(register):\n    register(Mine)\n"
    )
    install("one", one=source)
    host = load()
    assert host.failures() == []
    assert isinstance(host.create(kind, "mine"), getattr(samullm_plugin, base))


def test_hooks_are_documented_and_typed() -> None:
    for theme in (hookspecs.Registrations, hookspecs.Observers):
        for name, hook in inspect.getmembers(theme, inspect.isfunction):
            assert hook.__doc__, name
            arguments = [p for p in inspect.signature(hook).parameters if p != "self"]
            assert set(arguments) <= set(hook.__annotations__), name


def test_public_names_exist_and_match_what_type_checkers_see() -> None:
    tree = ast.parse(Path(samullm_plugin.__file__).read_text())
    typed = {
        f"{node.module}:{alias.asname}"
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if alias.asname
    }
    table = {
        f"samullm_plugin.{module}:{name}"
        for module, names in samullm_plugin._PUBLIC.items()
        for name in names
    }
    assert typed == table
    for name in samullm_plugin.__all__:
        assert getattr(samullm_plugin, name) is not None
    with pytest.raises(AttributeError, match="no_such_name"):
        samullm_plugin.no_such_name  # noqa: B018  # the access is the test


def test_interface_classes_are_public() -> None:
    for _, base in registration._REGISTER_HOOKS.values():
        assert getattr(samullm_plugin, base.__name__) is base
