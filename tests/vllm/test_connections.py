"""Listening to engines: without any, on descriptors of the test's own."""

from __future__ import annotations

import os
import socket
import time
from types import SimpleNamespace

import pytest
from samullm_vllm.channel import Channel
from samullm_vllm.connections import Connections
from samullm_vllm.process_options import ProcessOptions
from samullm_vllm.replica import Phase, Replica


class FakeLauncher:
    """Has one descriptor, and counts how often it was told that something came by it."""

    def __init__(self) -> None:
        self.ends = os.pipe()
        self.updates = 0

    def filenos(self) -> list[int]:
        return [self.ends[0]]

    def update(self) -> None:
        self.updates += 1

    def start_again(self) -> None:
        before = self.ends
        for number in before:
            os.close(number)
        self.ends = os.pipe()
        assert self.ends == before  # the lowest that are free


class Bench:
    def __init__(self, **options: float) -> None:
        self.launcher = FakeLauncher()
        self.failed: list[str] = []
        self.connections = Connections(
            self.launcher,  # type: ignore[arg-type]  # as much of one as is asked
            ProcessOptions(**options),
            lambda replica, message: None,
            lambda replica, reason: self.failed.append(reason),
        )
        self.far_ends: list[socket.socket] = []

    def add(self, phase: Phase) -> Replica:
        ours, theirs = socket.socketpair()
        self.far_ends.append(theirs)
        launched = SimpleNamespace(channel=Channel(ours), exited={}, lost=False)
        replica = Replica(SimpleNamespace(key="a"), launched, "a.log", phase)  # type: ignore[arg-type]  # as above
        self.connections.add(replica)
        return replica

    def close(self) -> None:
        self.connections.close()
        for number in self.launcher.ends:
            os.close(number)
        for end in self.far_ends:
            end.close()


@pytest.mark.parametrize(
    ("phase", "silent_s", "told"),
    [
        ("dozing", 899.0, []),
        ("dozing", 900.0, ["not ready after 900 s (load_timeout_s)"]),
        ("ready", 29.0, []),
        ("ready", 30.0, ["no sign of life for 30.0 s (hang_timeout_s)"]),
        ("asleep", 30.0, ["no sign of life for 30.0 s (hang_timeout_s)"]),
        ("prepared", 900.0, []),
    ],
)
def test_silence(phase: Phase, silent_s: float, told: list[str]) -> None:
    """Falling asleep may take as long as loading; one that computes is given up sooner."""
    bench = Bench(hang_timeout_s=30.0, load_timeout_s=900.0)
    try:
        bench.add(phase).silent_s = silent_s
        bench.connections.listen(0.01)
        assert bench.failed == told
    finally:
        bench.close()


def test_a_launcher_that_was_started_again_is_heard_at_once() -> None:
    """Its new descriptor may have the number of the old one, to which nobody listens."""
    bench = Bench()
    try:
        bench.launcher.start_again()
        bench.add("starting")
        os.write(bench.launcher.ends[1], b"x")
        began_s = time.monotonic()
        bench.connections.listen(30.0)
        assert time.monotonic() - began_s < 15.0
        assert bench.launcher.updates >= 2  # for what came, and at the end
    finally:
        bench.close()
