"""What the coordinator and the agent of a machine say to one another.

Calls and replies cross Ray as bytes: msgpack, by msgspec. What engines say and hear inside them is
not looked into on its way; as objects, Ray would pickle every request and every output.
"""

from __future__ import annotations

from dataclasses import dataclass

import msgspec
from samullm_vllm.devices import Platform
from samullm_vllm.protocol import Start

from samullm_ray.link import Batch


class Launch(msgspec.Struct, frozen=True, tag=True):
    """Start the processes of an engine, or those of one of its machines.

    Attributes:
        key: the replica.
        devices: its devices, counted on its machine from 0.
        num_ranks: processes to start.
    """

    key: str
    devices: tuple[int, ...]
    num_ranks: int


class Begin(msgspec.Struct, frozen=True, tag=True):
    """Tell an engine what to be; its ranks meet by a file that the agent names.

    Attributes:
        key: the replica.
        start: what it is told.
    """

    key: str
    start: Start


class Send(msgspec.Struct, frozen=True, tag=True):
    """Pass a message on to an engine.

    Attributes:
        key: the replica.
        frame: a frame of :mod:`samullm_vllm.protocol`.
    """

    key: str
    frame: bytes


class Kill(msgspec.Struct, frozen=True, tag=True):
    """End the processes of an engine; :class:`Killed` answers."""

    key: str


class Prefetch(msgspec.Struct, frozen=True, tag=True):
    """Read the weights of a model into the page cache."""

    model: str


class Place(msgspec.Struct, frozen=True, tag=True):
    """Tell an engine that its devices are free.

    Attributes:
        key: the replica.
        devices: its devices, counted on its machine from 0.
    """

    key: str
    devices: tuple[int, ...]


Command = Launch | Begin | Send | Place | Kill | Prefetch


class Meet(msgspec.Struct, frozen=True, tag=True):
    """The ranks of an engine that lies on several machines find each other here.

    Attributes:
        key: the replica.
        address: of the machine that leads.
        port: free there a moment ago.
    """

    key: str
    address: str
    port: int


class Said(msgspec.Struct, frozen=True, tag=True):
    """An engine sent messages.

    Attributes:
        key: the replica.
        messages: of :mod:`samullm_vllm.protocol`, encoded.
    """

    key: str
    messages: tuple[bytes, ...]


class Ended(msgspec.Struct, frozen=True, tag=True):
    """An engine's channel is closed, or its processes have ended.

    Attributes:
        key: the replica.
        reason: how its processes ended, as far as the agent could tell.
        log: the end of its output.
    """

    key: str
    reason: str
    log: bytes


class Killed(msgspec.Struct, frozen=True, tag=True):
    """The processes of an engine are gone.

    Attributes:
        key: the replica.
        log: the end of its output.
        gone: False if some of them did not end.
    """

    key: str
    log: bytes
    gone: bool


News = Meet | Said | Ended | Killed


class Call(msgspec.Struct, frozen=True):
    """A call to an agent.

    Attributes:
        commands: what to do, if anything.
        acknowledged: how many items of news the coordinator has.
        wait_s: how long to wait for news; None: no news is asked for.
        linger_s: once there is news, how long to gather more, so that the coordinator handles many
            in one reply; 0 under light load, so that nothing is held up.
    """

    commands: Batch[Command]
    acknowledged: int = 0
    wait_s: float | None = None
    linger_s: float = 0.0


class Reply(msgspec.Struct, frozen=True):
    """The agent's answer to a call.

    Attributes:
        incarnation: which agent answers; a machine's next agent has another.
        commands: how many commands it has received.
        news: what the coordinator has not acknowledged, if it asked.
    """

    incarnation: str
    commands: int
    news: Batch[News]


_encoder = msgspec.msgpack.Encoder()
_calls = msgspec.msgpack.Decoder(Call)
_replies = msgspec.msgpack.Decoder(Reply)


def encode(message: Call | Reply) -> bytes:
    """Return a call or reply as bytes."""
    return _encoder.encode(message)


def decode_call(data: bytes) -> Call:
    """Return the call that was encoded."""
    return _calls.decode(data)


def decode_reply(data: bytes) -> Reply:
    """Return the reply that was encoded."""
    return _replies.decode(data)


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
