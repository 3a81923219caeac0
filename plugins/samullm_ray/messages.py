"""What the coordinator and the agent of a machine say to one another; Ray pickles it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from samullm_vllm.devices import Platform

from samullm_ray.link import Batch


@dataclass(frozen=True, slots=True)
class Launch:
    """Start the processes of an engine.

    Attributes:
        key: the replica.
        devices: its devices, counted on its machine from 0.
        num_ranks: processes to start.
    """

    key: str
    devices: tuple[int, ...]
    num_ranks: int


@dataclass(frozen=True, slots=True)
class Send:
    """Pass a message on to an engine.

    Attributes:
        key: the replica.
        message: one of :mod:`samullm_vllm.protocol`.
    """

    key: str
    message: Any


@dataclass(frozen=True, slots=True)
class Kill:
    """End the processes of an engine; :class:`Killed` answers."""

    key: str


@dataclass(frozen=True, slots=True)
class Prefetch:
    """Read the weights of a model into the page cache."""

    model: str


@dataclass(frozen=True, slots=True)
class Place:
    """Tell an engine that its devices are free.

    Attributes:
        key: the replica.
        devices: its devices, counted on its machine from 0.
    """

    key: str
    devices: tuple[int, ...]


Command = Launch | Send | Place | Kill | Prefetch


@dataclass(frozen=True, slots=True)
class Said:
    """An engine sent messages.

    Attributes:
        key: the replica.
        messages: messages of :mod:`samullm_vllm.protocol`.
    """

    key: str
    messages: tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class Ended:
    """An engine's channel is closed, or its processes have ended.

    Attributes:
        key: the replica.
        reason: how its processes ended, as far as the agent could tell.
        log: the end of its output.
    """

    key: str
    reason: str
    log: bytes


@dataclass(frozen=True, slots=True)
class Killed:
    """The processes of an engine are gone.

    Attributes:
        key: the replica.
        log: the end of its output.
        gone: False if some of them did not end.
    """

    key: str
    log: bytes
    gone: bool


News = Said | Ended | Killed


@dataclass(frozen=True, slots=True)
class Reply:
    """The agent's answer to any call.

    Attributes:
        incarnation: which agent answers; a machine's next agent has another.
        commands: how many commands it has received.
        news: what the coordinator has not acknowledged; empty in answers to commands.
    """

    incarnation: str
    commands: int
    news: Batch[News]


@dataclass(frozen=True, slots=True)
class MachineFacts:
    """What an agent says of its machine.

    Attributes:
        incarnation: of the agent.
        host: host name.
        platform: ``cpu`` or ``cuda``.
        gpu_names: what kind of GPU each is; empty for CPU cores.
        versions: package versions that must agree between machines.
        fault: why no engine can be started there; empty if engines can be.
    """

    incarnation: str
    host: str
    platform: Platform
    gpu_names: tuple[str, ...]
    versions: tuple[tuple[str, str], ...]
    fault: str = ""
