"""Cleaning up is not cut short by interruptions, and they are not lost."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator

import pytest

from samullm_plugin.run.signals import defer_signals


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
