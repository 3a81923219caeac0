"""Messages survive the wire in whatever pieces they come."""

from __future__ import annotations

import socket

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from samullm_vllm.channel import Channel, ChannelClosedError
from samullm_vllm.protocol import (
    LENGTHS,
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
    frame_size,
)

from samullm_plugin import EngineRequest, RequestOutput

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
        st.text(), st.none() | st.floats(allow_nan=False) | st.text() | st.lists(st.text())
    ),
    prompt=st.none() | st.text(),
    messages=st.none() | st.lists(st.dictionaries(st.text(), st.text())).map(tuple),
    num_generated=number,
    output_tokens=st.none() | number,
)
logprobs = st.none() | st.lists(
    st.dictionaries(number, st.floats(allow_nan=False), max_size=3), max_size=3
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
            Stop(), Sleep(2), Wake(), Tick(step=True), Asleep(),
            Go((0, 1), {"CUDA_VISIBLE_DEVICES": "3"}), Prepared(),
            Ready(100, "0.32.0", {"configuration": 0.1}),
            Fork("a", 2, {"TMPDIR": "/t"}), Forked("a", (1, 2)), Exited("a", 1, -9),
        ]
    ),
)  # fmt: skip


@given(messages)
def test_round_trip(message: Message) -> None:
    frame = encode(message)
    header, block = frame_size(frame[: LENGTHS.size])
    body = frame[LENGTHS.size :]
    assert len(body) == header + block
    assert decode(body[:header], body[header:]) == message


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
    """What the socket does not take is kept, in order, and delivered before the end is told."""
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
    ("header", "block"),
    [
        (b"no json", b""),
        (b'["Nothing",{}]', b""),
        (b'["Ready",{"unknown":1}]', b""),
        (b'["Finished",{"outputs":[[3,null,{"request":0,"num_tokens":3}]]}]', b"\0" * 8),
    ],
)
def test_anything_else_is_an_error(header: bytes, block: bytes) -> None:
    with pytest.raises(ProtocolError):
        decode(header, block)


def test_absurd_lengths_are_an_error() -> None:
    with pytest.raises(ProtocolError):
        frame_size(b"\xff" * 8)
