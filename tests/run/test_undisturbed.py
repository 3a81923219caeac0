"""Clearing up is not cut short by interruptions, and they are not lost."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from samullm_plugin.run.undisturbed import undisturbed


def test_an_interruption_waits() -> None:
    done = []
    with pytest.raises(KeyboardInterrupt):  # noqa: PT012  # the second statement must be reached
        with undisturbed():
            os.kill(os.getpid(), signal.SIGINT)
            done.append("cleared up")
        done.append("never")
    assert done == ["cleared up"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_without_interruption_nothing_changes() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with undisturbed():
        pass
    assert signal.getsignal(signal.SIGTERM) is before


def test_other_threads_are_never_interrupted() -> None:
    seen: list[object] = []

    def work() -> None:
        with undisturbed():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [signal.default_int_handler]
