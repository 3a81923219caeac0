"""Messages to and from the processes of engines, and which engines have failed."""

from __future__ import annotations

import time
from collections.abc import Callable

from samullm_vllm.channel import ChannelClosedError
from samullm_vllm.channel_selector import ChannelSelector
from samullm_vllm.launching import Launcher, exit_reason
from samullm_vllm.process_options import ProcessOptions
from samullm_vllm.protocol import Message, ProtocolError
from samullm_vllm.replica import Replica

LISTEN_S = 0.2
"""Longest wait for a message; whether engines are alive is checked after each."""

_STATUS_WAIT_S = 0.2


class Connections:
    """The channels of the engines that are there.

    Args:
        launcher: starts the engines' processes, and says which have ended.
        options: how long an engine may be silent.
        take: is called with each message that arrives.
        fail: is called when an engine has failed, with the reason.
    """

    def __init__(
        self,
        launcher: Launcher,
        options: ProcessOptions,
        take: Callable[[Replica, Message], None],
        fail: Callable[[Replica, str], None],
    ) -> None:
        self._launcher, self._options = launcher, options
        self._take, self._fail = take, fail
        self._replicas: list[Replica] = []
        self._selector: ChannelSelector[Replica] = ChannelSelector(launcher)
        self._listened_s = time.monotonic()

    def add(self, replica: Replica) -> None:
        """Listen to an engine that has just been launched."""
        self._replicas.append(replica)
        self._selector.add(replica.launched.channel, replica)

    def remove(self, replica: Replica) -> None:
        """Close an engine's channel, if it is open."""
        if replica in self._replicas:
            self._replicas.remove(replica)
            self._selector.remove(replica.launched.channel)

    def close(self) -> None:
        """Close all channels."""
        for replica in list(self._replicas):
            self.remove(replica)
        self._selector.close()

    def send(self, replica: Replica, message: Message) -> None:
        """Send, as far as the engine's process is there to take it.

        Raises:
            ProtocolError: if the message cannot be sent to anybody.
        """
        try:
            replica.launched.channel.send(message)
        except ChannelClosedError:
            return  # reading will find out, and first what it still had to say
        self._selector.watch(replica.launched.channel)

    def listen(self, timeout_s: float) -> None:
        """Take in what has arrived, waiting so long for something, and find what has failed."""
        for replica in self._selector.select(timeout_s):
            if replica.phase not in ("failed", "stopped"):
                self._read(replica)
        now_s = time.monotonic()
        listened_s = min(now_s - self._listened_s, 2 * LISTEN_S)
        self._listened_s = now_s
        self._selector.update_launcher()
        for replica in list(self._replicas):
            self._check_alive(replica, listened_s)

    def _read(self, replica: Replica) -> None:
        try:
            messages = replica.launched.channel.receive()
        except ChannelClosedError:
            self._fail(replica, self._how_it_ended(replica, _STATUS_WAIT_S))
            return
        except ProtocolError as error:
            self._fail(replica, f"it sent {error}")
            return
        for message in messages:
            replica.silent_s = 0.0
            self._take(replica, message)

    def _check_alive(self, replica: Replica, listened_s: float) -> None:
        """Find an engine of which a process has ended or nothing is heard."""
        if replica.phase in ("failed", "stopped"):
            return
        if replica.launched.exited or replica.launched.lost:
            self._read(replica)  # it may have said why
            if replica.phase not in ("failed", "stopped"):
                self._fail(replica, self._how_it_ended(replica, 0.0))
            return
        if replica.phase == "prepared":
            return  # it waits, and says nothing
        replica.silent_s += listened_s
        options = self._options
        coming_up = replica.phase in ("preparing", "starting", "dozing")
        if coming_up and replica.silent_s > options.load_timeout_s:
            self._fail(replica, f"not ready after {replica.silent_s:.0f} s (load_timeout_s)")
        elif not coming_up and replica.silent_s > options.hang_timeout_s:
            self._fail(replica, f"no sign of life for {replica.silent_s:.1f} s (hang_timeout_s)")

    def _how_it_ended(self, replica: Replica, timeout_s: float) -> str:
        return exit_reason(replica.launched, timeout_s, self._launcher, replica.log)
