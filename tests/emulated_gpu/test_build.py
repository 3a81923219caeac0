"""The emulated driver is for environments with vLLM's CUDA wheel, and says what is missing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.emulated_gpu import build
from tests.emulated_gpu.run import main


def test_what_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build.shutil, "which", lambda tool: None)
    with pytest.raises(build.Unavailable, match="no gcc"):
        build.build(tmp_path)


def test_an_environment_without_the_wheel_is_skipped_with_the_reason(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """As where this suite runs: with vLLM's CPU build, or without vLLM."""
    inside = tmp_path / "bin" / "python"
    inside.parent.mkdir()
    inside.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')  # -S: without packages
    inside.chmod(0o755)
    assert main([str(tmp_path), "-c", "print('never run')"]) == 0
    said = capfd.readouterr().out
    assert said.startswith("skipped: no emulated driver here: ")
    assert "never run" not in said


def test_made_up_tokens_follow_from_what_was_there() -> None:
    """A request that was moved goes on as it would have."""
    folder = Path(build.__file__).parent / "site"
    code = (
        "from sitecustomize import next_token as n;"
        "whole = [5]\nfor _ in range(9): whole.append(n(whole[-1], len(whole)))\n"
        "half = whole[:4]\nwhile len(half) < 10: half.append(n(half[-1], len(half)))\n"
        "assert half == whole and len(set(whole)) > 5 and all(3 <= t < 503 for t in whole[1:])"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=folder)
