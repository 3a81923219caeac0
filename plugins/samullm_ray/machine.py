"""A machine as the coordinator sees it: messages to its agent and what was heard of it.

Nothing here waits: calls are made in the background, and ``update`` takes in what has come back.
"""

from __future__ import annotations

import queue
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, Protocol

from samullm_ray.link import Batch, Incoming, Outgoing
from samullm_ray.messages import Command, MachineFacts, News, Reply

_AGAIN_S = 0.1
LISTENED_AT_MOST_S = 0.5
"""Between two looks at the clock so much silence is counted: the coordinator may have been busy."""


class Transport(Protocol):
    """How calls reach an agent."""

    def command(self, batch: Batch[Command]) -> Future[Reply]:
        """Call the agent's ``command``."""

    def poll(self, acknowledged: int, timeout_s: float, linger_s: float) -> Future[Reply]:
        """Call the agent's ``poll``."""

    def final(self, error: BaseException) -> str | None:
        """Return why no call will ever succeed again, or None if the error may pass."""

    def fence(self) -> None:
        """See to it that the agent does nothing more, as far as it can be reached."""


class Machine:
    """One machine of the cluster.

    Args:
        index: its number in the plan's cluster.
        devices: the plan's devices that are on it.
        transport: to its agent.
        facts: what the agent said of itself.
        ring: is called, on any thread, when ``update`` has something to do.
        poll_s: longest wait of one poll.
        linger_s: how long the agent gathers news under load.
        lost_timeout_s: silence after which the machine is given up.

    Attributes:
        lost: why the machine was given up; empty as long as it is there.
        polls: polls that were answered.
    """

    def __init__(
        self,
        index: int,
        devices: Sequence[int],
        transport: Transport,
        facts: MachineFacts,
        ring: Callable[[], None],
        *,
        poll_s: float,
        linger_s: float,
        lost_timeout_s: float,
    ) -> None:
        self.index, self.devices, self.facts = index, tuple(devices), facts
        self.lost = ""
        self.polls = 0
        self._transport, self._ring = transport, ring
        self._poll_s, self._linger_s, self._lost_timeout_s = poll_s, linger_s, lost_timeout_s
        self._commands: Outgoing[Command] = Outgoing()
        self._news: Incoming[News] = Incoming()
        self._answers: queue.SimpleQueue[tuple[bool, Future[Reply]]] = queue.SimpleQueue()
        self._sent = 0
        self._flying = 0
        self._silent_s = 0.0
        self._updated_s: float | None = None
        self._replied_s = float("-inf")
        self._poll_again_s = float("inf")
        self._poll(0.0)

    def tell(self, command: Command) -> None:
        """Give the agent something to do; it happens once, in order."""
        if self.lost:
            return
        self._commands.add(command)
        self._send()

    def _send(self) -> None:
        batch = self._commands.since(self._sent)
        if batch.items:
            self._sent = batch.first + len(batch.items)
            self._flying += 1
            self._call(polling=False, future=self._transport.command(batch))

    def _poll(self, linger_s: float) -> None:
        future = self._transport.poll(self._news.received, self._poll_s, linger_s)
        self._call(polling=True, future=future)

    def _call(self, *, polling: bool, future: Future[Reply]) -> None:
        def answered(done: Future[Any]) -> None:
            self._answers.put((polling, done))
            self._ring()

        future.add_done_callback(answered)

    def update(self, now_s: float) -> Sequence[News]:
        """Return what the agent has said since the last time, and go on asking.

        Args:
            now_s: a clock that only goes forward.
        """
        news: list[News] = []
        if self._updated_s is not None and not self.lost:
            self._silent_s += min(now_s - self._updated_s, LISTENED_AT_MOST_S)
        self._updated_s = now_s
        while not self.lost:
            try:
                polling, future = self._answers.get_nowait()
            except queue.Empty:
                break
            self._flying -= not polling
            error = future.exception()
            if error is not None:
                if why := self._transport.final(error):
                    self.give_up(why)
                    break
                if polling:
                    self._poll_again_s = now_s + _AGAIN_S
                continue
            reply = future.result()
            if reply.incarnation != self.facts.incarnation:
                self.give_up("another agent answers in its place")
                break
            self._silent_s = 0.0
            self._commands.acknowledge(reply.commands)
            if polling:
                news += self._news.take(reply.news)
                self.polls += 1
                busy = now_s - self._replied_s < self._linger_s
                self._replied_s = now_s
                self._poll(self._linger_s if busy else 0.0)
        if not self.lost and self._silent_s > self._lost_timeout_s:
            self.give_up(f"nothing was heard of it for {self._silent_s:.0f} s (lost_timeout_s)")
        if not self.lost and now_s >= self._poll_again_s:
            self._poll_again_s = float("inf")
            self._poll(0.0)
        if not self.lost and self._commands and not self._flying:
            self._sent = self._commands.acknowledged  # a call was lost on its way
            self._send()
        return news

    def give_up(self, why: str) -> None:
        """Take the machine for lost; whatever still comes from its agent is dropped."""
        if not self.lost:
            self.lost = f"machine {self.facts.host} is lost: {why}"
            self._transport.fence()
