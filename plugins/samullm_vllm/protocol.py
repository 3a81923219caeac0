"""Messages between the coordinating process and an engine process, and their framing.

A frame is two little-endian 32-bit lengths, a JSON header ``[name, {field: value}]`` and a block of
bytes. Numbers in bulk (token ids, measured iterations) travel in the block, so that a hundred
thousand prompts cost no more than copying them. Nothing is pickled: an engine process cannot make
the coordinator run code.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from samullm_plugin import EngineRequest, RequestOutput

LENGTHS = struct.Struct("<II")
_LARGEST = 1 << 31


class ProtocolError(Exception):
    """Bytes that are no message of this protocol."""


@dataclass(frozen=True, slots=True)
class Start:
    """First message to an engine: what to be.

    Attributes:
        key: name of the replica.
        model: folder or hub id.
        engine_args: vLLM's engine arguments by name.
        num_ranks: processes that share the engine, each on its own device.
        rendezvous: file by which they find each other.
        ahead: do at once what needs no device; without it that, too, begins with :class:`Go`.
        beat_s: seconds between signs of life.
        latency: coefficients of the modelled iteration latency, if nothing is to be computed.
        prepare_s: seconds that the part of a modelled start which needs no device takes.
        load_s: seconds that the rest of it takes.
        time_scale: real seconds per modelled second.
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


@dataclass(frozen=True, slots=True)
class Go:
    """An engine's devices are free: take them.

    Attributes:
        cores: CPU core of each rank; empty: not bound.
        environment: variables by which libraries know the devices.
    """

    cores: tuple[int, ...]
    environment: dict[str, str]


@dataclass(frozen=True, slots=True)
class Submit:
    """Requests for the engine."""

    requests: tuple[EngineRequest, ...]


@dataclass(frozen=True, slots=True)
class Stop:
    """Report unfinished requests and end."""


@dataclass(frozen=True, slots=True)
class Sleep:
    """Free device memory (vLLM's sleep levels 1 and 2)."""

    level: int


@dataclass(frozen=True, slots=True)
class Wake:
    """Undo :class:`Sleep`."""


@dataclass(frozen=True, slots=True)
class Tick:
    """To the other ranks of an engine: all of one round's messages are through; run a step."""

    step: bool


@dataclass(frozen=True, slots=True)
class Prepared:
    """All of a start that needs no device is done."""


@dataclass(frozen=True, slots=True)
class Ready:
    """The engine can compute.

    Attributes:
        kv_cache_tokens: its KV-cache capacity.
        vllm_version: of the library.
        parts: seconds of its start by part, in the order they were done.
    """

    kv_cache_tokens: int
    vllm_version: str
    parts: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Asleep:
    """The engine's device memory is free."""


@dataclass(frozen=True, slots=True)
class Finished:
    """Requests that came to their end."""

    outputs: tuple[RequestOutput, ...]


@dataclass(frozen=True, slots=True)
class Stopped:
    """Answer to :class:`Stop`: the unfinished requests. The engine ends."""

    outputs: tuple[RequestOutput, ...]


@dataclass(frozen=True, slots=True)
class Beat:
    """A sign of life from the engine's loop.

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


@dataclass(frozen=True, slots=True)
class Fault:
    """An engine cannot go on, or none can be made.

    Attributes:
        reason: one line.
        of_all: no engine of this installation would fare better.
    """

    reason: str
    of_all: bool = False


@dataclass(frozen=True, slots=True)
class Preloaded:
    """The process that forks engines has imported vLLM."""


@dataclass(frozen=True, slots=True)
class Fork:
    """To the process that forks engines: make one. Its channel and its log come as descriptors.

    Attributes:
        key: name of the replica.
        num_ranks: processes to make.
        environment: variables for them.
    """

    key: str
    num_ranks: int
    environment: dict[str, str]


@dataclass(frozen=True, slots=True)
class Forked:
    """Answer to :class:`Fork`: the process ids of the ranks."""

    key: str
    pids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Exited:
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


def _flat(rows: Sequence[Sequence[int] | None]) -> tuple[list[int | None], bytes]:
    """Return the length of each row and all rows as 32-bit integers."""
    lengths = [None if r is None else len(r) for r in rows]
    numbers = [n for r in rows if r is not None for n in r]
    return lengths, np.asarray(numbers, dtype=np.int32).tobytes()


class _Numbers:
    """Reads rows back from a block."""

    def __init__(self, block: bytes) -> None:
        self._numbers = np.frombuffer(block, dtype=np.int32).tolist()
        self._at = 0

    def take(self, length: int | None) -> tuple[int, ...] | None:
        if length is None:
            return None
        row = tuple(self._numbers[self._at : self._at + length])
        if len(row) != length:
            raise ProtocolError("a block is shorter than its header says")
        self._at += length
        return row


def _pack_submit(message: Submit) -> tuple[dict[str, Any], bytes]:
    lengths, block = _flat([r.prompt_token_ids for r in message.requests])
    rows = []
    for request, length in zip(message.requests, lengths, strict=True):
        row = {f: getattr(request, f) for f in EngineRequest.__slots__ if f != "prompt_token_ids"}
        row["sampling"] = dict(request.sampling)
        if request.messages is not None:
            row["messages"] = [dict(m) for m in request.messages]
        rows.append([length, row])
    return {"requests": rows}, block


def _unpack_submit(header: Mapping[str, Any], block: bytes) -> Submit:
    numbers, requests = _Numbers(block), []
    for length, row in header["requests"]:
        if row["messages"] is not None:
            row["messages"] = tuple(row["messages"])
        requests.append(EngineRequest(prompt_token_ids=numbers.take(length), **row))
    return Submit(tuple(requests))


def _pack_outputs(message: Finished | Stopped) -> tuple[dict[str, Any], bytes]:
    outputs = message.outputs
    lengths, block = _flat([ids for o in outputs for ids in (o.token_ids, o.prompt_token_ids)])
    rows = []
    for i, output in enumerate(outputs):
        row = {
            f: getattr(output, f)
            for f in RequestOutput.__slots__
            if f not in ("token_ids", "prompt_token_ids", "logprobs")
        }
        if output.logprobs is not None:
            row["logprobs"] = [list(position.items()) for position in output.logprobs]
        rows.append([lengths[2 * i], lengths[2 * i + 1], row])
    return {"outputs": rows}, block


def _unpack_outputs(header: Mapping[str, Any], block: bytes) -> tuple[RequestOutput, ...]:
    numbers, outputs = _Numbers(block), []
    for length, prompt_length, row in header["outputs"]:
        if "logprobs" in row:
            row["logprobs"] = tuple({int(k): v for k, v in p} for p in row["logprobs"])
        ids, prompt_ids = numbers.take(length), numbers.take(prompt_length)
        outputs.append(RequestOutput(token_ids=ids, prompt_token_ids=prompt_ids, **row))
    return tuple(outputs)


def _pack_beat(message: Beat) -> tuple[dict[str, Any], bytes]:
    header = {
        "requests": message.requests,
        "counts": message.counts,
        "split": len(message.token_ids),
        "lag_s": message.lag_s,
    }
    return header, message.token_ids + message.steps


def _unpack_beat(header: Mapping[str, Any], block: bytes) -> Beat:
    split = header["split"]
    return Beat(
        tuple(header["requests"]),
        tuple(header["counts"]),
        block[:split],
        block[split:],
        header["lag_s"],
    )


def _plain(cls: Callable[..., Message]) -> Callable[[Mapping[str, Any], bytes], Message]:
    def unpack(header: Mapping[str, Any], block: bytes) -> Message:
        values = {k: tuple(v) if isinstance(v, list) else v for k, v in header.items()}
        return cls(**values)

    return unpack


_PLAIN: tuple[type[Message], ...] = (
    Start, Go, Stop, Sleep, Wake, Tick,
    Prepared, Ready, Asleep, Fault, Fork, Forked, Exited, Preloaded
)  # fmt: skip
_UNPACK: dict[str, Callable[[Mapping[str, Any], bytes], Message]] = {
    **{cls.__name__: _plain(cls) for cls in _PLAIN},
    "Submit": _unpack_submit,
    "Finished": lambda header, block: Finished(_unpack_outputs(header, block)),
    "Stopped": lambda header, block: Stopped(_unpack_outputs(header, block)),
    "Beat": _unpack_beat,
}


def encode(message: Message) -> bytes:
    """Return the frame of a message."""
    if isinstance(message, Submit):
        header, block = _pack_submit(message)
    elif isinstance(message, Finished | Stopped):
        header, block = _pack_outputs(message)
    elif isinstance(message, Beat):
        header, block = _pack_beat(message)
    else:
        header, block = asdict(message), b""
    name = type(message).__name__
    text = json.dumps([name, header], separators=(",", ":"), allow_nan=True).encode()
    return LENGTHS.pack(len(text), len(block)) + text + block


def decode(header: bytes, block: bytes) -> Message:
    """Return the message of a frame.

    Raises:
        ProtocolError: if it is none.
    """
    try:
        name, values = json.loads(header)
        return _UNPACK[name](values, block)
    except (ValueError, KeyError, TypeError) as error:
        raise ProtocolError(f"not a message of this protocol: {error!r}") from error


def frame_size(lengths: bytes) -> tuple[int, int]:
    """Return the lengths of header and block.

    Raises:
        ProtocolError: if they cannot be right.
    """
    header, block = LENGTHS.unpack(lengths)
    if header + block > _LARGEST:
        raise ProtocolError(f"a frame of {header + block} bytes")
    return header, block
