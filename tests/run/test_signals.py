"""Cleaning up is not cut short by interruptions, and they are not lost."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator

import pytest

from samullm_plugin.host.manager import PluginHost
from samullm_plugin.planning.planner import PlanningOptions, make_plan
from samullm_plugin.run.signals import SIGNALS, defer_signals, draining
from tests.run.worlds import small_problem


@pytest.fixture(autouse=True)
def interruptible() -> Iterator[None]:
    """Python's own handler of SIGINT, which processes started by nohup or cron inherit ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_an_interruption_waits() -> None:
    done = []
    with pytest.raises(KeyboardInterrupt):  # noqa: PT012  # the second statement must be reached
        with defer_signals():
            os.kill(os.getpid(), signal.SIGINT)
            done.append("cleaned up")
        done.append("never")
    assert done == ["cleaned up"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_ignored_signal_stays_ignored() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    done = []
    with defer_signals():
        os.kill(os.getpid(), signal.SIGINT)
        done.append("cleaned up")
    done.append("went on")
    assert done == ["cleaned up", "went on"]
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def test_without_interruption_nothing_changes() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with defer_signals():
        pass
    assert signal.getsignal(signal.SIGTERM) is before


def test_other_threads_defer_nothing() -> None:
    seen: list[object] = []

    def work() -> None:
        with defer_signals():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [signal.default_int_handler]


@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_interruption_drains_and_the_second_ends(
    number: signal.Signals, capfd: pytest.CaptureFixture[str]
) -> None:
    drained = []
    inherited = signal.signal(number, signal.SIG_DFL)  # one that nohup ignores stays ignored
    try:
        with draining() as begin:
            begin(lambda: drained.append("drained"))
            signal.raise_signal(number)
            assert drained == ["drained"]
            assert "stopping; once more" in capfd.readouterr().err
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(number)
    finally:
        signal.signal(number, inherited)
    assert drained == ["drained"]


def test_before_a_run_an_interruption_ends_the_command() -> None:
    with draining(), pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGTERM)


def test_solvers_leave_the_handlers_alone() -> None:
    """OR-Tools sets SIGINT to its default after each solve unless told not to."""
    problem = small_problem()
    host = PluginHost.from_settings()
    drained = []
    with draining() as begin:
        begin(lambda: drained.append("drained"))
        for name in ("exact", "auto"):
            make_plan(host, problem, name, PlanningOptions(seed=0, budget_s=2.0))
            assert signal.getsignal(signal.SIGINT) is not signal.SIG_DFL
        os.kill(os.getpid(), signal.SIGINT)
    assert drained == ["drained"]
