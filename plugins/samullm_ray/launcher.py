"""Engines on other machines, launched and spoken to as if they were here."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import IO

import msgspec
from samullm_vllm.channel import ChannelClosedError
from samullm_vllm.launching import Launched, Launcher
from samullm_vllm.protocol import Go, Message, Start, decode, encode

from samullm_ray.machine import Machine
from samullm_ray.messages import Begin, Command, Ended, Kill, Launch, Meet, News, Place, Said, Send

_WAIT_S = 0.002


class RemoteGo(Go, frozen=True):
    """Devices of another machine; its agent knows what they are called there.

    Attributes:
        parts: number of each machine that the engine lies on and its devices, counted from 0; the
            first one leads.
    """

    parts: tuple[tuple[int, tuple[int, ...]], ...] = ()


class RemoteChannel:
    """Messages to and from an engine of another machine.

    Args:
        machine: the machine.
        key: the replica.
        others: further machines that the engine lies on, and its devices there.
    """

    wants_write = False

    def __init__(
        self,
        machine: Machine,
        key: str,
        others: Sequence[tuple[Machine, tuple[int, ...]]] = (),
    ) -> None:
        self._machine, self._key, self._others = machine, key, others
        self._start: Start | None = None
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
            self._tell(Place(self._key, message.parts[0][1]))
        elif isinstance(message, Start):
            self._start = message
            self._tell(Begin(self._key, message))
        else:
            self.send_bytes(encode(message))

    def send_bytes(self, frame: bytes) -> None:
        """Send an encoded message; raise as ``send`` does."""
        self._tell(Send(self._key, frame))

    def meet(self, news: Meet) -> None:
        """Tell the other machines where the one that leads is to be found.

        Their devices are free by then: engines of several machines are not prepared ahead.
        """
        assert self._start is not None  # which was answered so
        for number, (machine, devices) in enumerate(self._others, start=1):
            start = msgspec.structs.replace(
                self._start, machine=number, master=news.address, master_port=news.port
            )
            machine.tell(Begin(self._key, start))
            machine.tell(Place(self._key, devices))

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
    """An engine of another machine, or of several.

    Attributes:
        launched: what the executor knows of it.
        channel: to it.
        gone: by machine, the one that leads first, whether its processes ended when they were
            killed, once the agent has said.
        log: takes its output when it ends.
        struck: the agents were asked to kill it.
    """

    launched: Launched
    channel: RemoteChannel
    gone: dict[Machine, bool | None]
    log: IO[bytes]
    struck: bool = False

    def strike(self, key: str) -> None:
        """Ask for its death, once: a second answer would be taken for that of a later engine."""
        if not self.struck:
            self.struck = True
            for machine in self.gone:
                machine.tell(Kill(key))

    def lose(self, why: str) -> None:
        """Note that nothing more will be heard of it."""
        if not self.launched.lost:
            self.launched.lost, self.launched.why_lost = True, why
            self.channel.end()

    def unanswered(self) -> list[Machine]:
        """Return the machines whose agents are still to say that its processes have ended."""
        return [m for m, gone in self.gone.items() if gone is None and not m.lost]


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
        parts: dict[int, tuple[int, ...]] = {}
        for name in devices:
            machine, device = (int(n) for n in name.split("/"))
            parts[machine] = (*parts.get(machine, ()), device)
        return RemoteGo((), {}, tuple(parts.items()))

    def launch(self, key: str, num_ranks: int, log: IO[bytes], where: Go) -> Launched:
        """Ask a machine for an engine, or each for its part of it.

        Its output comes to ``log`` when it ends.
        """
        assert isinstance(where, RemoteGo)  # from placement
        parts = [(self.machines[number], devices) for number, devices in where.parts]
        channel = RemoteChannel(parts[0][0], key, parts[1:])
        engine = _RemoteEngine(Launched(channel), channel, {m: None for m, _ in parts}, log)
        self._engines[key] = engine
        for machine, devices in parts:
            machine.tell(Launch(key, devices, num_ranks))
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
                self._take(machine, news)
            if machine.lost and machine not in self._reported:
                self._reported.add(machine)
                self._on_lost(machine)
            if machine.lost:
                for engine in self._engines.values():
                    if machine in engine.gone:
                        engine.lose(machine.lost)

    def _take(self, machine: Machine, news: News) -> None:
        engine = self._engines.get(news.key)
        if engine is None or machine not in engine.gone:
            return
        if isinstance(news, Meet):
            if not engine.struck:
                engine.channel.meet(news)
            return
        if isinstance(news, Said):
            engine.channel.feed(news.messages)
            return
        engine.log.write(news.log)
        engine.log.flush()
        if isinstance(news, Ended):
            where = f"machine {machine.facts.host}: " if len(engine.gone) > 1 else ""
            engine.lose(where + news.reason)
        else:
            engine.gone[machine] = news.gone

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
        engine.strike(key)
        limit_s = 2 * timeout_s  # the agent gives it one of them before it answers
        deadline_s = time.monotonic() + limit_s
        while waited_for := engine.unanswered():
            if time.monotonic() > deadline_s:
                for machine in waited_for:
                    machine.give_up(f"engine {key} did not end in {limit_s:.0f} s")
            self.flush()
            self.update()
            time.sleep(_WAIT_S)
        del self._engines[key]
        return False not in engine.gone.values()

    def close(self) -> None:
        """Forget the engines; their machines' agents end them when they are stopped."""
        self._engines.clear()
