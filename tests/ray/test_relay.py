"""The engines of a machine as its agent has them: without any, on descriptors of the test's own."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from typing import IO

import pytest
from samullm_ray.messages import Ended, Kill, Killed, Launch, News, Said
from samullm_ray.relay import EngineRelay
from samullm_vllm.channel import Channel
from samullm_vllm.device_memory import DeviceMemory
from samullm_vllm.launching import Launched, Launcher
from samullm_vllm.protocol import Go, Ready, decode, encode
from samullm_vllm.workdir import WorkDir


class FakeLauncher(Launcher):
    """Engines that are one end of a socket pair."""

    def __init__(self) -> None:
        super().__init__("cpu", {})
        self.far_ends: dict[str, socket.socket] = {}

    def launch(self, key: str, num_ranks: int, log: IO[bytes], where: Go) -> Launched:
        ours, self.far_ends[key] = socket.socketpair()
        return Launched(Channel(ours))

    def strike(self, launched: Launched) -> None:
        raise AssertionError

    def kill(self, launched: Launched, timeout_s: float) -> bool:
        return True

    def filenos(self) -> list[int]:
        return []

    def update(self) -> None:
        pass

    def close(self) -> None:
        for end in self.far_ends.values():
            end.close()


class Bench:
    def __init__(self) -> None:
        self.launcher, self.news, self.files = FakeLauncher(), list[News](), WorkDir(None)
        self.bell, self._ring = os.pipe()
        os.set_blocking(self.bell, False)
        self.relay = EngineRelay(
            self.launcher, "cpu", ["0", "1"], DeviceMemory(()), self.files, self.news.append,
            self.bell,
        )  # fmt: skip

    def ring(self) -> None:
        os.write(self._ring, b"x")

    def close(self) -> None:
        self.relay.end_all()
        self.launcher.close()
        self.files.close()
        os.close(self.bell)
        os.close(self._ring)


@pytest.fixture
def bench() -> Iterator[Bench]:
    made = Bench()
    yield made
    made.close()


def test_what_engines_say_is_told_by_their_keys(bench: Bench) -> None:
    for key in ("a", "b"):
        bench.relay.carry_out(Launch(key, (0,), 1))
    bench.launcher.far_ends["b"].sendall(encode(Ready(8, "1")))
    bench.relay.listen()
    (said,) = bench.news
    assert isinstance(said, Said)
    assert (said.key, [decode(m) for m in said.messages]) == ("b", [Ready(8, "1")])


@pytest.mark.parametrize("noticed_by", ["channel", "status"])
def test_an_engine_that_ends_is_told_of_once(bench: Bench, noticed_by: str) -> None:
    bench.relay.carry_out(Launch("a", (0,), 1))
    bench.launcher.far_ends["a"].close()
    if noticed_by == "status":
        bench.relay.engines["a"].launched.exited[7] = 1
    for _ in range(2):
        if noticed_by == "channel":
            bench.relay.listen()
        bench.relay.check()
    (ended,) = bench.news
    assert isinstance(ended, Ended)
    bench.relay.carry_out(Kill("a"))
    assert bench.news[1:] == [Killed("a", b"", gone=True)]
    bench.relay.carry_out(Kill("a"))  # the answer was lost
    assert bench.news[2:] == [Killed("a", b"", gone=True)]
    assert bench.relay.engines == {}


def test_devices_that_there_are_none_of_end_the_engine(bench: Bench) -> None:
    bench.relay.carry_out(Launch("a", (2,), 1))
    (ended,) = bench.news
    assert isinstance(ended, Ended)
    assert "IndexError" in ended.reason


def test_the_bell_ends_waiting(bench: Bench) -> None:
    bench.ring()
    began_s = time.monotonic()
    assert list(bench.relay._selector.select(60.0)) == []
    assert time.monotonic() - began_s < 30.0
    bench.relay.listen()
    with pytest.raises(BlockingIOError):
        os.read(bench.bell, 1)
