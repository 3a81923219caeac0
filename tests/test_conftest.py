"""What a machine lacks is skipped; in CI a missing vLLM is a failure."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest


@pytest.fixture
def rules(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("rules", Path(__file__).with_name("conftest.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    monkeypatch.setattr(module, "_has_gpu", lambda: False)
    return module


def marked(*names: str) -> SimpleNamespace:
    return SimpleNamespace(get_closest_marker=lambda name: name in names)


def test_a_missing_vllm_is_a_skip_here_and_a_failure_in_ci(rules, monkeypatch) -> None:
    monkeypatch.delenv("CI", raising=False)
    with pytest.raises(pytest.skip.Exception, match="make test"):
        rules.pytest_runtest_setup(marked("vllm"))
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception, match="in CI that is an error"):
        rules.pytest_runtest_setup(marked("vllm"))
    monkeypatch.setattr(rules, "find_spec", lambda name: object())
    rules.pytest_runtest_setup(marked("vllm"))


def test_a_missing_gpu_is_a_skip(rules) -> None:
    with pytest.raises(pytest.skip.Exception, match="no CUDA GPU"):
        rules.pytest_runtest_setup(marked("gpu"))
    rules.pytest_runtest_setup(marked())


def test_tests_that_share_engines_or_an_installation_run_in_one_process(rules) -> None:
    assert rules.group_of("tests/vllm/test_engines.py::test_a[x/y]") == "engines"
    assert rules.group_of("tests/run/test_real_engines.py::test_b") == "engines"
    assert rules.group_of("tests/ray/test_ray.py::TestRay::test_c") == "engines"
    assert rules.group_of("tests/packaging/test_wheel.py::test_d") == "packaging"
    one = "tests/model/test_cluster.py"
    assert rules.group_of(f"{one}::test_e") == one
    conformance = "tests/conformance/test_conformance.py"
    assert rules.group_of(f"{conformance}::test_f") == conformance
