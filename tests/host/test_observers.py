"""Observers: called in the parent only, dropped once they raise."""

from __future__ import annotations

import logging
import os

import pytest

from samullm_plugin import RunEvent, RunInfo, Stage, StageRecord

RUN = RunInfo("run-1", "app", "simulated")

WATCHER = """
from samullm_plugin import hookimpl
seen = []

@hookimpl
def before_stage_run(stage):
    seen.append(("before", stage))

@hookimpl
def after_stage_run(run, record):
    seen.append((run.run_id, record.index))

@hookimpl
def on_run_event(event):
    print("to stdout")
    seen.append(event.kind)
"""
RAISER = """
from samullm_plugin import hookimpl
calls = 0

@hookimpl
def before_stage_run(run):
    global calls
    calls += 1
    raise ValueError("cannot watch")

@hookimpl
def on_run_event(event):
    global calls
    calls += 1
"""


@pytest.fixture
def host(install, load):
    install("watcher", watch=WATCHER)
    install("araiser", bad=RAISER)
    return load()


def test_observers_see_what_they_ask_for(host, capsys) -> None:
    import watcher_watch

    stage = Stage(())
    host.before_stage_run(RUN, stage)
    host.after_stage_run(RUN, stage, StageRecord(3, 0.0, 1.5))
    host.on_run_event(RUN, RunEvent(0.1, "engine_started"))
    assert watcher_watch.seen == [("before", stage), ("run-1", 3), "engine_started"]
    assert capsys.readouterr().out == ""


def test_one_that_raises_is_reported_once_and_dropped(host, caplog) -> None:
    import araiser_bad
    import watcher_watch

    with caplog.at_level(logging.WARNING):
        host.before_stage_run(RUN, Stage(()))
        host.before_stage_run(RUN, Stage(()))
        host.on_run_event(RUN, RunEvent(0.1, "x"))
    assert araiser_bad.calls == 1
    assert len(watcher_watch.seen) == 3
    assert caplog.text.count("ValueError: cannot watch") == 1
    rows = {row.distribution: (row.kind, row.status) for row in host.provenance()}
    assert rows == {"araiser": ("observer", "dropped"), "watcher": ("observer", "ok")}


def test_a_forked_process_tells_nobody(host, monkeypatch) -> None:
    import watcher_watch

    pid = os.getpid()
    monkeypatch.setattr(os, "getpid", lambda: pid + 1)
    host.on_run_event(RUN, RunEvent(0.1, "x"))
    assert watcher_watch.seen == []
