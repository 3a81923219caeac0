"""A machine as the coordinator sees it: messages to its agent and what was heard of it.

Nothing here waits: ``flush`` makes calls in the background, and ``update`` takes in what has come
back. What costs is the call and not what is in it, so one call carries all commands there are and
asks for news at once; a call of commands alone is made only while another waits for news.
"""

from __future__ import annotations

import queue
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, Protocol

from samullm_ray.link import Incoming, Outgoing
from samullm_ray.messages import Call, Command, MachineFacts, News, decode_reply, encode

_AGAIN_S = 0.1
_BUSY_LINGERS = 3
"""News is gathered while replies come at most so many times ``linger_s`` apart."""

LISTENED_AT_MOST_S = 0.5
"""Between two looks at the clock so much silence is counted: the coordinator may have been busy."""


class Transport(Protocol):
    """How calls reach an agent."""

    def call(self, data: bytes) -> Future[bytes]:
        """Call the agent's ``exchange``; ``data`` is a :class:`Call`, the result a reply."""

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
        self._answers: queue.SimpleQueue[tuple[bool, Future[bytes]]] = queue.SimpleQueue()
        self._sent = 0
        self._asking = False
        self._silent_s = 0.0
        self._updated_s: float | None = None
        self._replied_s = self._again_s = float("-inf")
        self._busy = False

    def tell(self, command: Command) -> None:
        """Give the agent something to do; it happens once, in order, after ``flush``."""
        if not self.lost:
            self._commands.add(command)

    def flush(self, now_s: float) -> None:
        """Send what the agent was told, and ask for news unless a call does that already.

        Args:
            now_s: a clock that only goes forward.
        """
        if self.lost or now_s < self._again_s:
            return
        if self._asking and self._sent == self._commands.acknowledged + len(self._commands):
            return
        batch = self._commands.since(self._sent)
        self._sent = batch.first + len(batch.items)
        if self._asking:
            self._call(polling=False, call=Call(batch))
            return
        linger_s = self._linger_s if self._busy else 0.0
        self._asking = True
        self._call(polling=True, call=Call(batch, self._news.received, self._poll_s, linger_s))

    def _call(self, *, polling: bool, call: Call) -> None:
        def answered(done: Future[Any]) -> None:
            self._answers.put((polling, done))
            self._ring()

        self._transport.call(encode(call)).add_done_callback(answered)

    def update(self, now_s: float) -> Sequence[News]:
        """Return what the agent has said since the last time.

        Args:
            now_s: a clock that only goes forward.
        """
        news: list[News] = []
        if self._updated_s is not None and not self.lost:
            self._silent_s += min(now_s - self._updated_s, LISTENED_AT_MOST_S)
        self._updated_s = now_s
        while not self.lost and not self._answers.empty():
            polling, future = self._answers.get_nowait()
            self._asking &= not polling
            error = future.exception()
            if error is not None:
                if why := self._transport.final(error):
                    self.give_up(why)
                    break
                self._sent = self._commands.acknowledged  # what was on its way is sent again
                self._again_s = now_s + _AGAIN_S
                continue
            reply = decode_reply(future.result())
            if reply.incarnation != self.facts.incarnation:
                self.give_up("another agent answers in its place")
                break
            self._silent_s = 0.0
            self._commands.acknowledge(reply.commands)
            if polling:
                news += self._news.take(reply.news)
                self.polls += 1
                self._busy = now_s - self._replied_s < _BUSY_LINGERS * self._linger_s
                self._replied_s = now_s
        if not self.lost and self._silent_s > self._lost_timeout_s:
            self.give_up(f"nothing was heard of it for {self._silent_s:.0f} s (lost_timeout_s)")
        return news

    def give_up(self, why: str) -> None:
        """Take the machine for lost; whatever still comes from its agent is dropped."""
        if not self.lost:
            self.lost = f"machine {self.facts.host} is lost: {why}"
            self._transport.fence()
