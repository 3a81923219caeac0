"""Waiting for the channels of engines, and for what their launcher waits for."""

from __future__ import annotations

import selectors
from collections.abc import Iterator
from typing import Generic, NamedTuple, TypeVar

from samullm_vllm.channel import ChannelClosedError, MessageChannel
from samullm_vllm.launching import Launcher

T = TypeVar("T")


class _Engine(NamedTuple, Generic[T]):
    channel: MessageChannel
    owner: T


class ChannelSelector(Generic[T]):
    """The channels of the engines that are there, each with an owner.

    Args:
        launcher: starts the engines' processes.
    """

    def __init__(self, launcher: Launcher) -> None:
        self._launcher = launcher
        self._selector = selectors.DefaultSelector()
        self._watched: set[int] = set()
        self._watch_launcher()

    def add(self, channel: MessageChannel, owner: T) -> None:
        """Wait for a channel of an engine that has just been launched."""
        self._watch_launcher()  # started again, it may have another descriptor of the same number
        self._selector.register(channel, selectors.EVENT_READ, _Engine(channel, owner))

    def add_bell(self, descriptor: int) -> None:
        """End waiting when a descriptor becomes readable; who adds it empties it."""
        self._selector.register(descriptor, selectors.EVENT_READ)

    def remove(self, channel: MessageChannel) -> None:
        """Close a channel and wait for it no more."""
        self._selector.unregister(channel)
        channel.close()

    def close(self) -> None:
        """Wait for nothing any more."""
        self._selector.close()

    def watch(self, channel: MessageChannel) -> None:
        """Wait for a channel to take more, if something is left to send."""
        if channel.fileno() < 0:
            return
        wanted = selectors.EVENT_READ | (selectors.EVENT_WRITE if channel.wants_write else 0)
        key = self._selector.get_key(channel)
        if key.events != wanted:
            self._selector.modify(channel, wanted, key.data)

    def select(self, timeout_s: float) -> Iterator[T]:
        """Yield the owners of channels from which there is something to read.

        What waits to be sent is sent as far as it can be.

        Args:
            timeout_s: how long to wait for something.
        """
        for key, mask in self._selector.select(timeout_s):
            if isinstance(key.data, _Engine):
                channel, owner = key.data
                if mask & selectors.EVENT_WRITE:
                    self._flush(channel)
                if mask & selectors.EVENT_READ:
                    yield owner
            elif key.fd in self._watched:
                self.update_launcher()

    def _flush(self, channel: MessageChannel) -> None:
        try:
            channel.flush()
        except ChannelClosedError:
            return  # reading will find out, and first what it still had to say
        self.watch(channel)

    def update_launcher(self) -> None:
        """Let the launcher take in what it has heard of processes."""
        self._launcher.update()
        if set(self._launcher.filenos()) != self._watched:
            self._watch_launcher()

    def _watch_launcher(self) -> None:
        """Wait for what the launcher waits for at present."""
        for number in self._watched:
            self._selector.unregister(number)
        self._watched = set(self._launcher.filenos())
        for number in self._watched:
            self._selector.register(number, selectors.EVENT_READ)
