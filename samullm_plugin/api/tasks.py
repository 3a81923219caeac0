"""Work in a thread of its own: waited for, awaited, or followed by callbacks."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Generator
from threading import Condition, Thread
from typing import Any, Generic, Self, TypeVar

T = TypeVar("T")

logger = logging.getLogger(__name__)


class Task(Generic[T]):
    """Something that is computed in the background.

    Its thread is a daemon: the end of the program does not wait for it.
    """

    def __init__(self, work: Callable[[], T], name: str) -> None:
        """Begin.

        Args:
            work: what to do.
            name: for messages.
        """
        self.name = name
        self._changed = Condition()
        self._callbacks: list[Callable[[Any], object]] = []
        self._done = False
        self._value: T | None = None
        self._error: BaseException | None = None
        self._thread = Thread(target=self._run, args=(work,), name=f"samullm {name}", daemon=True)
        self._thread.start()

    def _run(self, work: Callable[[], T]) -> None:
        try:
            self._value = work()
        except BaseException as error:  # handed to whoever waits
            self._error = error
        with self._changed:
            self._done = True
            callbacks, self._callbacks = self._callbacks, []
            self._changed.notify_all()
        for callback in callbacks:
            self._call(callback)

    def _call(self, callback: Callable[[Any], object]) -> None:
        try:
            callback(self)
        except Exception:  # as concurrent.futures does: it must not end the thread
            logger.exception("a callback of %s raised", self.name)

    def done(self) -> bool:
        """Return whether it has ended, well or not."""
        return self._done

    def wait(self, timeout_s: float | None = None) -> T:
        """Wait for the end and return the result.

        Args:
            timeout_s: longest time to wait; None: without end.

        Raises:
            TimeoutError: if it has not ended by then; it goes on.
            Exception: what the work raised.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: self._done, timeout_s):
                raise TimeoutError(f"{self.name} has not ended after {timeout_s:g} s")
        if self._error is not None:
            raise self._error
        return self._value  # type: ignore[return-value]  # it is a T once done without an error

    def add_done_callback(self, callback: Callable[[Self], object]) -> None:
        """Call ``callback`` with this task at its end, in its thread; at once if it has ended."""
        with self._changed:
            if not self._done:
                self._callbacks.append(callback)
                return
        self._call(callback)

    def __await__(self) -> Generator[Any, None, T]:
        """Wait in a coroutine; other coroutines go on meanwhile."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[None] = loop.create_future()

        def wake(task: Task[T]) -> None:
            del task

            def settle() -> None:
                if not future.done():
                    future.set_result(None)

            if not loop.is_closed():
                loop.call_soon_threadsafe(settle)

        self.add_done_callback(wake)
        yield from future
        return self.wait()
