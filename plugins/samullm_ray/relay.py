"""The engines of a machine: commands are carried out, and what engines say is relayed."""

from __future__ import annotations

import os
import socket
import threading
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import IO

import msgspec
import psutil
from samullm_vllm.channel import ChannelClosedError
from samullm_vllm.channel_selector import ChannelSelector
from samullm_vllm.device_memory import DeviceMemory
from samullm_vllm.devices import Platform
from samullm_vllm.launching import Launched, Launcher, exit_reason
from samullm_vllm.processes import tail
from samullm_vllm.protocol import Go, ProtocolError, Start
from samullm_vllm.protocol import encode as encode_frame
from samullm_vllm.vllm_executor import read_ahead
from samullm_vllm.workdir import WorkDir

from samullm_ray.messages import (
    Begin,
    Command,
    Ended,
    Kill,
    Killed,
    Launch,
    Meet,
    News,
    Place,
    Prefetch,
    Said,
)

TICK_S, KILL_S = 0.2, 10.0
"""How long news is waited for at a time, and how long an engine may take to end."""


@dataclass(slots=True, eq=False)
class Engine:
    """An engine of this machine.

    Attributes:
        launched: its processes.
        log: their output.
        devices: its devices, counted on this machine.
        ended: the coordinator knows that it ended.
        spread: it lies on other machines as well.
    """

    launched: Launched
    log: IO[bytes]
    devices: tuple[int, ...]
    ended: bool = False
    spread: bool = False


class EngineRelay:
    """The engines of one machine; used by one thread.

    Args:
        launcher: starts them.
        platform: what the devices are.
        devices: their names, as the coordinator counts them on this machine.
        memory: of the devices.
        files: logs and temporary files.
        tell: takes what the coordinator is to hear.
        bell: descriptor that becomes readable when there is something to do.

    Attributes:
        engines: by key.
    """

    def __init__(
        self,
        launcher: Launcher,
        platform: Platform,
        devices: Sequence[str],
        memory: DeviceMemory,
        files: WorkDir,
        tell: Callable[[News], None],
        bell: int,
    ) -> None:
        self.engines: dict[str, Engine] = {}
        self._launcher, self._platform, self._devices = launcher, platform, devices
        self._memory, self._files, self._tell = memory, files, tell
        self._selector: ChannelSelector[str] = ChannelSelector(launcher)
        self._selector.add_bell(bell)
        self._bell = bell

    def listen(self) -> None:
        """Relay what engines say; wait a little for something, or for the bell."""
        for key in self._selector.select(TICK_S):
            self._relay(key)
        _empty(self._bell)

    def check(self) -> None:
        """Report engines that have ended."""
        self._selector.update_launcher()
        for key, engine in self.engines.items():
            if (engine.launched.exited or engine.launched.lost) and not engine.ended:
                self._relay(key)  # it may have said why
                if not engine.ended:
                    self._end(key, engine)

    def end_all(self) -> None:
        """End all engines and forget them."""
        for engine in self.engines.values():
            self._kill(engine)
        self.engines.clear()

    def _kill(self, engine: Engine) -> bool:
        """End an engine; return whether its processes are gone."""
        gone = self._launcher.kill(engine.launched, KILL_S)
        self._memory.await_back(engine.devices)
        self._forget(engine)
        return gone

    def carry_out(self, command: Command) -> None:
        """Do what the coordinator asks for."""
        if isinstance(command, Prefetch):
            threading.Thread(target=read_ahead, args=(command.model,), daemon=True).start()
            return
        key = command.key
        if isinstance(command, Launch):
            log = self._files.open_log(key)
            try:
                where = self._launcher.placement([self._devices[d] for d in command.devices])
                launched = self._launcher.launch(key, command.num_ranks, log, where)
            except (OSError, IndexError):
                self._tell(Ended(key, traceback.format_exc(limit=1), b""))
                return
            self.engines[key] = Engine(launched, log, command.devices)
            self._selector.add(launched.channel, key)
            return
        engine = self.engines.get(key)
        if engine is None:
            if isinstance(command, Kill):
                self._tell(Killed(key, b"", gone=True))
            return
        if isinstance(command, Kill):
            gone = self._kill(engine)
            del self.engines[key]
            self._tell(Killed(key, tail(engine.log.name), gone))
            return
        if isinstance(command, Place):
            self._memory.note_before(command.devices)
            names = [self._devices[d] for d in command.devices]
            place = self._placement_across if engine.spread else self._launcher.placement
            frame = encode_frame(place(names))
        elif isinstance(command, Begin):
            frame = encode_frame(self._begin(engine, command))
        else:
            frame = command.frame
        try:
            engine.launched.channel.send_bytes(frame)
        except ChannelClosedError:
            return  # reading finds out, and first what it still had to say
        self._selector.watch(engine.launched.channel)

    def _begin(self, engine: Engine, command: Begin) -> Start:
        """Return what to tell an engine: where its ranks find each other is known here."""
        start = command.start
        engine.spread = start.num_machines > 1
        if not engine.spread:
            return msgspec.structs.replace(start, rendezvous=str(self._files.rendezvous()))
        if start.machine == 0:
            address, port = _own_address(), _free_port()
            self._tell(Meet(command.key, address, port))
            start = msgspec.structs.replace(start, master=address, master_port=port)
        return start

    def _placement_across(self, names: Sequence[str]) -> Go:
        """Return the devices, and by which of its networks this machine reaches the others."""
        address = _own_address()
        network = {"VLLM_HOST_IP": address}
        if "GLOO_SOCKET_IFNAME" not in os.environ and (name := _interface(address)):
            network["GLOO_SOCKET_IFNAME"] = name
        if self._platform == "cpu":  # each rank binds itself
            return Go(tuple(map(int, names)), {"VLLM_CPU_OMP_THREADS_BIND": "nobind", **network})
        return Go((), {**self._launcher.placement(names).environment, **network})

    def _relay(self, key: str) -> None:
        """Tell what an engine says, or that it has ended."""
        engine = self.engines[key]
        if engine.ended:
            return
        try:
            if messages := engine.launched.channel.receive_encoded():
                self._tell(Said(key, tuple(messages)))
        except (ChannelClosedError, ProtocolError):
            self._end(key, engine)

    def _end(self, key: str, engine: Engine) -> None:
        reason = exit_reason(engine.launched, TICK_S, self._launcher, str(engine.log.name))
        self._forget(engine)
        self._tell(Ended(key, reason, tail(engine.log.name)))

    def _forget(self, engine: Engine) -> None:
        """Watch an engine's channel no more."""
        if not engine.ended and engine.launched.channel.fileno() >= 0:
            self._selector.remove(engine.launched.channel)
        engine.ended = True


def _own_address() -> str:
    """Return the address by which other machines of the cluster reach this one."""
    from ray.util import get_node_ip_address

    return str(get_node_ip_address())


def _free_port() -> int:
    """Return a port that is free now; if somebody takes it first, an engine's start fails."""
    with socket.socket() as free:
        free.bind(("", 0))
        return int(free.getsockname()[1])


def _interface(address: str) -> str | None:
    """Return the network interface that has an address."""
    known = psutil.net_if_addrs().items()
    return next((name for name, of in known if any(a.address == address for a in of)), None)


def _empty(descriptor: int) -> None:
    try:
        while os.read(descriptor, 1 << 16):
            pass
    except BlockingIOError:
        return
