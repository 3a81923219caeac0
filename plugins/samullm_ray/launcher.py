"""Engines on other machines, launched and spoken to as if they were here."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import IO

from samullm_vllm.channel import ChannelClosedError
from samullm_vllm.launching import Launched, Launcher
from samullm_vllm.protocol import Go, Message, Start, decode, encode

from samullm_ray.machine import Machine
from samullm_ray.messages import Begin, Command, Ended, Kill, Launch, News, Place, Said, Send

_WAIT_S = 0.002


class RemoteGo(Go, frozen=True):
    """Devices of another machine; its agent knows what they are called there.

    Attributes:
        machine: number of the machine.
        devices: its devices, counted from 0.
    """

    machine: int = 0
    devices: tuple[int, ...] = ()


class RemoteChannel:
    """Messages to and from an engine of another machine.

    Args:
        machine: the machine.
        key: the replica.
    """

    wants_write = False

    def __init__(self, machine: Machine, key: str) -> None:
        self._machine, self._key = machine, key
        self._bell = os.eventfd(0, os.EFD_NONBLOCK)
        self._heard: deque[bytes] = deque()
        self._ended = False

    def fileno(self) -> int:
        """Return a descriptor that is readable when something has arrived."""
        return self._bell

    def send(self, message: Message) -> None:
        """Send a message.

        Raises:
            ChannelClosedError: if the machine is lost.
        """
        if isinstance(message, RemoteGo):
            self._tell(Place(self._key, message.devices))
        elif isinstance(message, Start):
            self._tell(Begin(self._key, message))
        else:
            self.send_bytes(encode(message))

    def send_bytes(self, frame: bytes) -> None:
        """Send an encoded message; raise as ``send`` does."""
        self._tell(Send(self._key, frame))

    def _tell(self, command: Command) -> None:
        if self._machine.lost:
            raise ChannelClosedError(self._machine.lost)
        self._machine.tell(command)

    def flush(self) -> None:
        """Do nothing: what is sent is on its way."""

    def feed(self, messages: Sequence[bytes]) -> None:
        """Take in what the engine said, encoded."""
        self._heard.extend(messages)
        self._ring()

    def end(self) -> None:
        """Note that nothing more will come."""
        self._ended = True
        self._ring()

    def _ring(self) -> None:
        if self._bell >= 0:
            os.eventfd_write(self._bell, 1)

    def receive(self) -> list[Message]:
        """Return what has arrived; never waits.

        Raises:
            ChannelClosedError: if nothing is left and nothing more will come.
            ProtocolError: for bytes that are no message.
        """
        return [decode(data) for data in self.receive_encoded()]

    def receive_encoded(self) -> list[bytes]:
        """Return what has arrived without looking into it; raise as ``receive`` does."""
        if self._bell < 0:
            raise ChannelClosedError("this end is closed")
        with suppress(BlockingIOError):
            os.eventfd_read(self._bell)
        messages = list(self._heard)
        self._heard.clear()
        if self._ended:
            if not messages:
                raise ChannelClosedError("the other side is gone")
            self._ring()  # the end is still to be read
        return messages

    def close(self) -> None:
        """Close this end."""
        if self._bell >= 0:
            os.close(self._bell)
            self._bell = -1


@dataclass(slots=True, eq=False)
class _RemoteEngine:
    """An engine of another machine.

    Attributes:
        launched: what the executor knows of it.
        channel: to it.
        machine: where it is.
        log: takes its output when it ends.
        struck: its agent was asked to kill it.
        gone: whether its processes ended when they were killed, once the agent has said.
    """

    launched: Launched
    channel: RemoteChannel
    machine: Machine
    log: IO[bytes]
    struck: bool = False
    gone: bool | None = None

    def strike(self, key: str) -> None:
        """Ask for its death, once: a second answer would be taken for that of a later engine."""
        if not self.struck:
            self.struck = True
            self.machine.tell(Kill(key))

    def lose(self, why: str) -> None:
        """Note that nothing more will be heard of it."""
        if not self.launched.lost:
            self.launched.lost, self.launched.why_lost = True, why
            self.channel.end()


class RemoteLauncher(Launcher):
    """Launches engines through the agents of their machines.

    Devices are named ``MACHINE/DEVICE``, both counted from 0.

    Args:
        bell: descriptor of an eventfd that rings when an agent has answered.
        on_lost: is called once with each machine that is lost.
        rank_processes: see :class:`Launcher`.

    Attributes:
        machines: by their number in the plan's cluster.
        fed: whether ``update`` had something for an engine's channel since this was last unset.
    """

    def __init__(
        self, bell: int, on_lost: Callable[[Machine], None], *, rank_processes: bool
    ) -> None:
        self._bell, self._on_lost = bell, on_lost
        self.rank_processes = rank_processes  # type: ignore[misc]  # of the agents' launchers
        self._reported: set[Machine] = set()
        self.machines: dict[int, Machine] = {}
        self.fed = False
        self._engines: dict[str, _RemoteEngine] = {}

    def placement(self, devices: Sequence[str]) -> RemoteGo:
        """Return where an engine is to run."""
        places = [tuple(int(n) for n in d.split("/")) for d in devices]
        return RemoteGo((), {}, places[0][0], tuple(d for _, d in places))

    def launch(self, key: str, num_ranks: int, log: IO[bytes], where: Go) -> Launched:
        """Ask a machine for an engine; its output comes to ``log`` when it ends."""
        assert isinstance(where, RemoteGo)  # from placement
        machine = self.machines[where.machine]
        channel = RemoteChannel(machine, key)
        engine = _RemoteEngine(Launched(channel), channel, machine, log)
        self._engines[key] = engine
        machine.tell(Launch(key, where.devices, num_ranks))
        if machine.lost:
            engine.lose(machine.lost)
        return engine.launched

    def filenos(self) -> list[int]:
        """Return the descriptor that rings when an agent has answered."""
        return [self._bell]

    def flush(self) -> None:
        """Send the agents what was said to them, and go on asking them for news."""
        now_s = time.monotonic()
        for machine in self.machines.values():
            machine.flush(now_s)

    def update(self) -> None:
        """Take in what the agents have said, and find machines that are lost."""
        with suppress(BlockingIOError):
            os.eventfd_read(self._bell)
        now_s = time.monotonic()
        for machine in list(self.machines.values()):
            for news in machine.update(now_s):
                self.fed = True
                self._take(news)
            if machine.lost and machine not in self._reported:
                self._reported.add(machine)
                self._on_lost(machine)
            if machine.lost:
                for engine in self._engines.values():
                    if engine.machine is machine:
                        engine.lose(machine.lost)

    def _take(self, news: News) -> None:
        engine = self._engines.get(news.key)
        if engine is None:
            return
        if isinstance(news, Said):
            engine.channel.feed(news.messages)
            return
        engine.log.write(news.log)
        engine.log.flush()
        if isinstance(news, Ended):
            engine.lose(news.reason)
        else:
            engine.gone = news.gone

    def _key(self, launched: Launched) -> str | None:
        return next((k for k, e in self._engines.items() if e.launched is launched), None)

    def strike(self, launched: Launched) -> None:
        """Have an engine's processes killed and do not wait."""
        key = self._key(launched)
        if key is not None:
            self._engines[key].strike(key)

    def kill(self, launched: Launched, timeout_s: float) -> bool:
        """Have an engine's processes killed; return False if its agent says that they do not end.

        A machine that does not answer in time is given up, so that its devices are never used by
        two; its engines end with its agent.
        """
        key = self._key(launched)
        if key is None:
            return True
        engine = self._engines[key]
        machine = engine.machine
        engine.strike(key)
        limit_s = 2 * timeout_s  # the agent gives it one of them before it answers
        deadline_s = time.monotonic() + limit_s
        while engine.gone is None and not machine.lost:
            if time.monotonic() > deadline_s:
                machine.give_up(f"engine {key} did not end in {limit_s:.0f} s")
            self.flush()
            self.update()
            time.sleep(_WAIT_S)
        del self._engines[key]
        return engine.gone is not False

    def close(self) -> None:
        """Forget the engines; their machines' agents end them when they are stopped."""
        self._engines.clear()
