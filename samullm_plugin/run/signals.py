"""What interruptions do to a run: the first drains it, and none cuts its cleaning up short."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""What people, process managers and terminals that close interrupt a run with."""


@contextmanager
def handled(handler: Callable[[int, FrameType | None], Any]) -> Iterator[None]:
    """Have interruptions call ``handler``, except those that are ignored (``nohup``, ``&``).

    Outside the main thread, the only one in which Python runs signal handlers, none do.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {n: signal.getsignal(n) for n in SIGNALS}
    mine = {n: old for n, old in before.items() if old is not signal.SIG_IGN}
    for number in mine:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number, old in mine.items():
            signal.signal(number, old)


@contextmanager
def defer_signals() -> Iterator[None]:
    """Defer interruptions until the context ends; the last one is then delivered."""
    received: list[int] = []
    try:
        with handled(lambda number, _: received.append(number)):
            yield
    finally:
        if received:
            os.kill(os.getpid(), received[-1])


@contextmanager
def draining() -> Iterator[Callable[[Callable[[], None]], None]]:
    """Let the first interruption drain a run, and the second end it.

    Yields:
        What is to be called with the run's ``request_drain`` before it runs; until then the first
        interruption ends it.
    """
    drain: list[Callable[[], None]] = []
    asked = False

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        del number, frame
        if asked or not drain:
            raise KeyboardInterrupt
        asked = True
        with suppress(OSError):  # not by sys.stderr, in the middle of whose work this may be
            os.write(2, b"samullm: stopping; once more to stop at once\n")
        drain[0]()

    with handled(handle):
        yield drain.append
