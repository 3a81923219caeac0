"""Messages survive the wire in whatever pieces they come."""

from __future__ import annotations

import socket

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from samullm_vllm.channel import Channel, ChannelClosedError
from samullm_vllm.protocol import (
    LENGTH,
    Asleep,
    Beat,
    Exited,
    Fault,
    Finished,
    Fork,
    Forked,
    Go,
    Message,
    Prepared,
    ProtocolError,
    Ready,
    Sleep,
    Start,
    Stop,
    Stopped,
    Submit,
    Tick,
    Wake,
    decode,
    encode,
    frame_bytes,
)

from samullm_plugin import EngineRequest, RequestOutput
from samullm_plugin.model.logprobs import TokenLogprob

ids = st.lists(st.integers(0, 2**31 - 1), max_size=40).map(tuple)
number = st.integers(0, 10**9)
requests = st.builds(
    EngineRequest,
    request=number,
    prompt_token_ids=st.none() | ids,
    prompt_tokens=number,
    max_tokens=number,
    priority=st.integers(-5, 5),
    sampling=st.dictionaries(
        st.text(),
        st.none()
        | st.floats(allow_nan=False)
        | st.integers(-(2**63), 2**63)
        | st.text()
        | st.lists(st.text())
        | st.dictionaries(number, st.floats(allow_nan=False)),
    ),
    prompt=st.none() | st.text(),
    messages=st.none() | st.lists(st.dictionaries(st.text(), st.text())).map(tuple),
    num_generated=number,
    output_tokens=st.none() | number,
    chat=st.dictionaries(st.text(), st.booleans() | st.dictionaries(st.text(), st.text())),
)
logprobs = st.none() | st.lists(
    st.lists(
        st.builds(TokenLogprob, number, st.floats(allow_nan=False), st.none() | number, st.text()),
        max_size=3,
    ).map(tuple),
    max_size=3,
).map(tuple)
outputs = st.lists(
    st.builds(
        RequestOutput,
        request=number,
        num_tokens=number,
        token_ids=st.none() | ids,
        text=st.none() | st.text(),
        finish_reason=st.sampled_from([None, "stop", "length", "error"]),
        error=st.none() | st.text(),
        prompt_token_ids=st.none() | ids,
        stop_reason=st.none() | number | st.text(),
        logprobs=logprobs,
        prompt_logprobs=logprobs,
    ),
    max_size=4,
).map(tuple)
beats = st.lists(st.tuples(number, ids), max_size=4).map(
    lambda rows: Beat(
        tuple(r for r, _ in rows),
        tuple(len(t) for _, t in rows),
        np.array([t for _, ts in rows for t in ts], dtype=np.int32).tobytes(),
        np.ones((2, 13)).tobytes(),
    )
)
messages = st.one_of(
    st.lists(requests, max_size=4).map(tuple).map(Submit),
    outputs.map(Finished),
    outputs.map(Stopped),
    beats,
    st.text().map(Fault),
    st.sampled_from(
        [
            Start("a", "/m", {"dtype": "float32", "x": [1]}, latency={"launch_s": 1.0}),
            Stop(), Sleep(2.5), Wake(0.5), Tick(step=True), Asleep(),
            Go((0, 1), {"CUDA_VISIBLE_DEVICES": "3"}), Prepared(),
            Ready(100, "0.32.0", {"configuration": 0.1}),
            Fork("a", 2, {"TMPDIR": "/t"}), Forked("a", (1, 2)), Exited("a", 1, -9),
        ]
    ),
)  # fmt: skip


@settings(deadline=None)
@given(messages)
def test_round_trip(message: Message) -> None:
    frame = encode(message)
    body = frame[LENGTH.size :]
    assert len(body) == frame_bytes(frame[: LENGTH.size])
    assert decode(body) == message


@settings(deadline=None)
@given(st.lists(messages, max_size=5), st.integers(1, 50))
def test_arrives_in_any_pieces(sent: list[Message], piece: int) -> None:
    ours, theirs = socket.socketpair()
    with ours:
        channel = Channel(theirs)
        stream = b"".join(encode(m) for m in sent)
        received: list[Message] = []
        for at in range(0, len(stream), piece):
            ours.sendall(stream[at : at + piece])
            received += channel.receive()
        assert received == sent
        channel.close()


def test_sending_never_blocks_and_the_end_is_noticed() -> None:
    """What the socket does not take is kept, in order, and delivered before the end is reported."""
    ours, theirs = (Channel(s) for s in socket.socketpair())
    big = Submit((EngineRequest(0, tuple(range(500_000)), 500_000, 1),))
    ours.send(big)
    ours.send(Stop())
    assert ours.wants_write
    received: list[Message] = []
    while len(received) < 2:
        received += theirs.receive()
        ours.flush()
    assert received == [big, Stop()]
    ours.send(Wake())
    ours.close()
    assert theirs.receive(1.0) == [Wake()]
    with pytest.raises(ChannelClosedError):
        theirs.receive(1.0)
    with pytest.raises(ChannelClosedError):
        theirs.send(Stop())
    theirs.close()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"no msgpack",
        msgspec.msgpack.encode({"type": "Nothing"}),
        msgspec.msgpack.encode({"type": "Ready", "start_s": "soon"}),
        msgspec.msgpack.encode({"type": "Finished", "outputs": [{"num_tokens": 3}]}),
        encode(Stop())[LENGTH.size :] + b"x",
    ],
)
def test_anything_else_is_an_error(data: bytes) -> None:
    with pytest.raises(ProtocolError):
        decode(data)


def test_absurd_lengths_are_an_error() -> None:
    with pytest.raises(ProtocolError):
        frame_bytes(b"\xff" * 4)


@pytest.mark.parametrize("value", ["\ud800", 2**64, object()])
def test_what_cannot_be_sent_is_told(value: object) -> None:
    with pytest.raises(ProtocolError, match="it cannot be sent"):
        encode(Submit((EngineRequest(0, None, 1, 1, sampling={"x": value}),)))
