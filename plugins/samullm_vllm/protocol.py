"""Messages between the coordinating process and an engine process, and their framing.

A frame is a little-endian 32-bit length and the message in msgpack, by msgspec. Keys of mappings
keep their types. Nothing is pickled: an engine process cannot make the coordinator run code.
"""

from __future__ import annotations

import struct
from typing import Any

import msgspec

from samullm_plugin import EngineRequest, RequestOutput

LENGTH = struct.Struct("<I")
_LARGEST_BYTES = 1 << 31


class ProtocolError(Exception):
    """Bytes that are no message of this protocol."""


class Start(msgspec.Struct, frozen=True, tag=True):
    """First message to an engine: what to be.

    Attributes:
        key: name of the replica.
        model: folder or hub id.
        engine_args: vLLM's engine arguments by name.
        num_ranks: processes that share the engine, each on its own device.
        rendezvous: file by which they find each other.
        ahead: do at once what needs no device; without it that, too, begins with :class:`Go`.
        beat_s: seconds between heartbeats.
        latency: coefficients of the modelled iteration latency, if nothing is to be computed.
        prepare_s: seconds that the part of a modelled start which needs no device takes.
        load_s: seconds that the rest of it takes.
        time_scale: real seconds per modelled second.
        num_machines: machines that the engine lies on; on each, one process has vLLM start ranks.
        machine: which of them this process is on; the one on 0 leads.
        master: address of that one.
        master_port: where ranks of all machines find each other there.
    """

    key: str
    model: str
    engine_args: dict[str, Any]
    num_ranks: int = 1
    rendezvous: str = ""
    ahead: bool = False
    beat_s: float = 0.25
    latency: dict[str, Any] | None = None
    prepare_s: float = 0.0
    load_s: float = 0.0
    time_scale: float = 1.0
    num_machines: int = 1
    machine: int = 0
    master: str = ""
    master_port: int = 0


class Go(msgspec.Struct, frozen=True, tag=True):
    """An engine's devices are free: take them.

    Attributes:
        cores: CPU core of each rank; empty: not bound.
        environment: variables by which libraries know the devices.
    """

    cores: tuple[int, ...]
    environment: dict[str, str]


class Submit(msgspec.Struct, frozen=True, tag=True):
    """Requests for the engine."""

    requests: tuple[EngineRequest, ...]


class Stop(msgspec.Struct, frozen=True, tag=True):
    """Report unfinished requests and end."""


class Sleep(msgspec.Struct, frozen=True, tag=True):
    """Free device memory: weights and KV cache are dropped (vLLM's sleep level 2).

    Attributes:
        seconds: that this takes a modelled engine.
    """

    seconds: float = 0.0


class Wake(msgspec.Struct, frozen=True, tag=True):
    """Undo :class:`Sleep`.

    Attributes:
        seconds: that this takes a modelled engine.
    """

    seconds: float = 0.0


class Tick(msgspec.Struct, frozen=True, tag=True):
    """To the other ranks of an engine: all of one round's messages are through; run a step."""

    step: bool


class Prepared(msgspec.Struct, frozen=True, tag=True):
    """All of a start that needs no device is done."""


class Ready(msgspec.Struct, frozen=True, tag=True):
    """The engine can compute.

    Attributes:
        kv_cache_tokens: its KV-cache capacity.
        vllm_version: of the library.
        parts: seconds of its start by part, in the order they were done.
    """

    kv_cache_tokens: int
    vllm_version: str
    parts: dict[str, float] = {}


class Asleep(msgspec.Struct, frozen=True, tag=True):
    """The engine's device memory is free."""


class Finished(msgspec.Struct, frozen=True, tag=True):
    """Requests that came to their end."""

    outputs: tuple[RequestOutput, ...]


class Stopped(msgspec.Struct, frozen=True, tag=True):
    """Answer to :class:`Stop`: the unfinished requests. The engine ends."""

    outputs: tuple[RequestOutput, ...]


class Beat(msgspec.Struct, frozen=True, tag=True):
    """A heartbeat of the engine's loop.

    Attributes:
        requests: unfinished requests that have new tokens.
        counts: how many each.
        token_ids: those tokens, one request's after the other, 32-bit.
        steps: iterations since the last beat, rows of :data:`STEP_COLUMNS`, 64-bit.
        lag_s: real seconds by which modelled iterations have come late so far.
    """

    requests: tuple[int, ...] = ()
    counts: tuple[int, ...] = ()
    token_ids: bytes = b""
    steps: bytes = b""
    lag_s: float = 0.0


class Fault(msgspec.Struct, frozen=True, tag=True):
    """An engine cannot go on, or none can be made.

    Attributes:
        reason: one line.
        of_all: no engine of this installation would fare better.
    """

    reason: str
    of_all: bool = False


class Preloaded(msgspec.Struct, frozen=True, tag=True):
    """The process that forks engines has imported vLLM."""


class Fork(msgspec.Struct, frozen=True, tag=True):
    """To the process that forks engines: make one. Its channel and its log come as descriptors.

    Attributes:
        key: name of the replica.
        num_ranks: processes to make.
        environment: variables for them.
    """

    key: str
    num_ranks: int
    environment: dict[str, str]


class Forked(msgspec.Struct, frozen=True, tag=True):
    """Answer to :class:`Fork`: the process ids of the ranks."""

    key: str
    pids: tuple[int, ...]


class Exited(msgspec.Struct, frozen=True, tag=True):
    """A forked process has ended.

    Attributes:
        key: name of the replica.
        pid: its process id.
        status: exit status, negative for a signal.
    """

    key: str
    pid: int
    status: int


Message = (
    Start | Go | Submit | Stop | Sleep | Wake | Tick
    | Prepared | Ready | Asleep | Finished | Stopped | Beat | Fault
    | Fork | Forked | Exited | Preloaded
)  # fmt: skip

STEP_COLUMNS = (
    "num_seqs",
    "num_tokens",
    "prefill_seqs",
    "prefill_tokens",
    "prefill_pairs",
    "context_tokens",
    "longest_tokens",
    "seconds",
    "schedule_s",
    "running",
    "waiting",
    "kv_blocks",
    "preempted",
)


_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[Message] = msgspec.msgpack.Decoder(Message)


def encode(message: Message) -> bytes:
    """Return the frame of a message.

    Raises:
        ProtocolError: for a message too large, or with values that msgpack or UTF-8 lacks.
    """
    try:
        data = _encoder.encode(message)
    except (TypeError, ValueError, OverflowError) as error:
        raise ProtocolError(f"it cannot be sent: {error}") from error
    if len(data) > _LARGEST_BYTES:
        raise ProtocolError(f"it cannot be sent: a frame of {len(data)} bytes")
    return LENGTH.pack(len(data)) + data


def frame_bytes(length: bytes | memoryview) -> int:
    """Return the size of a message from what stands before it.

    Raises:
        ProtocolError: if it cannot be right.
    """
    size = int(LENGTH.unpack(length)[0])
    if size > _LARGEST_BYTES:
        raise ProtocolError(f"a frame of {size} bytes")
    return size


def decode(data: bytes | memoryview) -> Message:
    """Return the message of a frame.

    Raises:
        ProtocolError: if it is none.
    """
    try:
        return _decoder.decode(data)
    except (msgspec.DecodeError, msgspec.ValidationError, UnicodeDecodeError) as error:
        raise ProtocolError(f"not a message of this protocol: {error}") from error
