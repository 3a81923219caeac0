"""A stream socket that carries messages and never blocks its owner unless asked to wait."""

from __future__ import annotations

import select
import socket
from collections import deque
from contextlib import suppress
from typing import Protocol

from samullm_vllm.protocol import LENGTH, Message, decode, encode, frame_bytes

_READ_BYTES = 1 << 20


class ChannelClosedError(Exception):
    """The other side is gone."""


class MessageChannel(Protocol):
    """What carries messages to and from an engine, wherever it is."""

    @property
    def wants_write(self) -> bool:
        """Whether something waits to be sent."""
        ...

    def fileno(self) -> int:
        """Return a descriptor for selectors; negative once this end is closed."""
        ...

    def send(self, message: Message) -> None:
        """Send a message; raise :class:`ChannelClosedError` if the other side is gone."""
        ...

    def send_bytes(self, frame: bytes) -> None:
        """Send an encoded message; raise as ``send`` does."""
        ...

    def flush(self) -> None:
        """Send what can be sent now; raise :class:`ChannelClosedError` as ``send`` does."""
        ...

    def receive(self) -> list[Message]:
        """Return what has arrived; raise :class:`ChannelClosedError` if nothing more will come."""
        ...

    def receive_encoded(self) -> list[bytes]:
        """Return what has arrived without looking into it; raise as ``receive`` does."""
        ...

    def close(self) -> None:
        """Close this end."""
        ...


class Channel:
    """Messages over one end of a socket pair.

    Args:
        sock: the end; the channel owns it.
    """

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._socket = sock
        self._incoming = bytearray()
        self._outgoing: deque[memoryview] = deque()
        self._closed = False

    def fileno(self) -> int:
        """Return the descriptor, for selectors."""
        return self._socket.fileno()

    @property
    def wants_write(self) -> bool:
        """Whether something waits to be sent."""
        return bool(self._outgoing)

    def send(self, message: Message) -> None:
        """Send a message, as much of it as the socket takes now; ``flush`` sends the rest.

        Raises:
            ChannelClosedError: if the other side is gone.
        """
        self.send_bytes(encode(message))

    def send_bytes(self, frame: bytes) -> None:
        """Send an encoded message."""
        self._outgoing.append(memoryview(frame))
        self.flush()

    def flush(self) -> None:
        """Send what the socket takes.

        Raises:
            ChannelClosedError: if the other side is gone.
        """
        while self._outgoing:
            part = self._outgoing[0]
            try:
                sent = self._socket.send(part)
            except BlockingIOError:
                return
            except OSError as error:
                raise ChannelClosedError(str(error)) from error
            if sent < len(part):
                self._outgoing[0] = part[sent:]
            else:
                self._outgoing.popleft()

    def flush_all(self, timeout_s: float) -> None:
        """Wait until everything is sent, at most so long.

        Raises:
            ChannelClosedError: if the other side is gone.
        """
        self.flush()
        while self._outgoing and select.select([], [self], [], timeout_s)[1]:
            self.flush()

    def receive(self, timeout_s: float | None = 0.0) -> list[Message]:
        """Return the messages that have arrived, waiting so long for something to arrive.

        Raises:
            ChannelClosedError: if the other side is gone and has sent nothing more.
            ProtocolError: for bytes that are no message.
        """
        return [decode(data) for data in self.receive_encoded(timeout_s)]

    def receive_encoded(self, timeout_s: float | None = 0.0) -> list[bytes]:
        """Return the messages that have arrived, to be passed on or decoded.

        Raises:
            ChannelClosedError: if the other side is gone and has sent nothing more.
            ProtocolError: for bytes that are no frame.
        """
        if timeout_s != 0.0 and not self._wait(timeout_s):
            return []
        while not self._closed:
            try:
                data = self._socket.recv(_READ_BYTES)
            except BlockingIOError:
                break
            except OSError:
                data = b""
            if not data:
                self._closed = True
            self._incoming += data
            if len(data) < _READ_BYTES:
                break
        messages = self._take_frames()
        if self._closed and not messages:
            raise ChannelClosedError("the other side is gone")
        return messages

    def _wait(self, timeout_s: float | None) -> bool:
        """Wait for something to read, sending what is left meanwhile."""
        while True:
            writing = [self] if self._outgoing else []
            readable, writable, _ = select.select([self], writing, [], timeout_s)
            if readable or not writable:
                return bool(readable)
            self.flush()

    def _take_frames(self) -> list[bytes]:
        messages = []
        view, at = memoryview(self._incoming), 0
        try:
            while len(view) - at >= LENGTH.size:
                start = at + LENGTH.size
                end = start + frame_bytes(view[at:start])
                if len(view) < end:
                    break
                messages.append(bytes(view[start:end]))
                at = end
        finally:
            view.release()
        if at:
            del self._incoming[:at]
        return messages

    def close(self) -> None:
        """Close this end."""
        with suppress(OSError):
            self._socket.close()
