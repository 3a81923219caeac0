"""The simulator compiled by another process, meanwhile."""

from __future__ import annotations

import os
import subprocess
from typing import Any

import pytest

from samullm_plugin.engine import ahead
from samullm_plugin.engine.ahead import loop_compiled_beside
from samullm_plugin.engine.jit import Compiled


@pytest.fixture
def children(monkeypatch: pytest.MonkeyPatch) -> list[subprocess.Popen[bytes]]:
    """Return what is started where nothing is compiled yet and two cores are free."""
    started: list[subprocess.Popen[bytes]] = []

    class Kept(subprocess.Popen[bytes]):
        def __init__(self, *args: Any, **more: Any) -> None:
            super().__init__(*args, **more)
            started.append(self)

    monkeypatch.setattr(subprocess, "Popen", Kept)
    monkeypatch.setattr(Compiled, "has", lambda *_: False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    return started


def test_another_process_can_compile_the_loop(children: list[subprocess.Popen[bytes]]) -> None:
    with loop_compiled_beside():
        pass
    assert [c.returncode for c in children] == [0]


def test_a_failing_process_does_no_harm(
    children: list[subprocess.Popen[bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ahead, "COMMAND", "raise SystemExit(3)")
    with loop_compiled_beside():
        pass
    assert [c.returncode for c in children] == [3]


def test_nothing_is_left_when_the_other_work_fails(
    children: list[subprocess.Popen[bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ahead, "COMMAND", "import time; time.sleep(600)")
    with pytest.raises(KeyboardInterrupt), loop_compiled_beside():
        raise KeyboardInterrupt
    assert len(children) == 1
    assert children[0].returncode == -9


def test_what_is_compiled_needs_no_process(
    children: list[subprocess.Popen[bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Compiled, "has", lambda *_: True)
    with loop_compiled_beside():
        pass
    assert children == []
