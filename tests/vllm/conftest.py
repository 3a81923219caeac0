"""One forking process for all tests here, so that vLLM is imported once."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from samullm_vllm.executor import ProcessExecutor
from samullm_vllm.vllm_executor import VllmExecutor, VllmOptions

from samullm_plugin import (
    Cluster,
    EngineEvent,
    EngineOptions,
    EngineRequest,
    EngineSpec,
    Gpu,
    ModelSpec,
    RequestOutput,
)
from tests.models import make_tiny_llama

CLUSTER = Cluster.uniform(Gpu("core", 1 << 30), 2, nvlink=2)
GREEDY = {"temperature": 0.0, "ignore_eos": True}


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float32 model, so that greedy tokens do not depend on the batch."""
    return make_tiny_llama(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def wordy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with a tokenizer."""
    return make_tiny_llama(tmp_path_factory.mktemp("models") / "wordy", tokenizer=True)


def spec(key: str, folder: Path, devices: tuple[int, ...] = (0,), **changes: object) -> EngineSpec:
    """Return a replica of a tiny model."""
    engine = EngineOptions(
        block_size=32, dtype="float32", max_num_seqs=16, max_num_batched_tokens=512
    )
    settings: dict[str, object] = {
        "model": ModelSpec("tiny", 512, path=str(folder), engine=engine),
        "kv_cache_tokens": 8192,
        **changes,
    }
    return EngineSpec(
        key=key,
        node=0,
        devices=devices,
        tensor_parallel_size=len(devices),
        pipeline_parallel_size=1,
        **settings,  # type: ignore[arg-type]  # checked by the dataclass's users
    )


def request(index: int, max_tokens: int = 20, **sampling: object) -> EngineRequest:
    """Return a request of 17 prompt tokens of its own."""
    ids = tuple(3 + (index * 31 + i) % 500 for i in range(17))
    return EngineRequest(index, ids, len(ids), max_tokens, sampling={**GREEDY, **sampling})


@dataclass
class Bench:
    """An open executor and what has been heard of its engines."""

    executor: ProcessExecutor
    events: list[EngineEvent] = field(default_factory=list)
    outputs: dict[int, RequestOutput] = field(default_factory=dict)

    def poll(self, timeout_s: float = 0.5) -> None:
        """Take in events."""
        for event in self.executor.poll(timeout_s):
            self.events.append(event)
            for output in event.outputs:
                assert output.request not in self.outputs
                self.outputs[output.request] = output

    def wait(self, kind: str, key: str, limit_s: float = 240.0) -> EngineEvent:
        """Wait for an event of an engine."""
        deadline = time.monotonic() + limit_s
        while time.monotonic() < deadline:
            for event in self.events:
                if event.key == key and event.kind == kind:
                    return event
                assert event.kind != "failed", event.reason
            self.poll()
        raise AssertionError(f"no {kind} of {key} in {limit_s} s")

    def start(self, spec_: EngineSpec) -> None:
        """Start an engine and wait until it is ready."""
        self.executor.start_engine(spec_)
        self.wait("ready", spec_.key)

    def gather(self, count: int, limit_s: float = 60.0) -> dict[int, RequestOutput]:
        """Wait until so many requests have been reported in all."""
        deadline = time.monotonic() + limit_s
        while len(self.outputs) < count and time.monotonic() < deadline:
            self.poll()
            for event in self.events:
                assert event.kind != "failed", event.reason
        assert len(self.outputs) == count
        return self.outputs

    def until(self, condition: Callable[[], bool], limit_s: float = 180.0) -> None:
        """Poll until a condition holds."""
        deadline = time.monotonic() + limit_s
        while not condition():
            assert time.monotonic() < deadline
            self.poll(0.01)

    def failure(self, key: str, limit_s: float = 30.0) -> EngineEvent:
        """Wait until an engine has failed."""
        deadline = time.monotonic() + limit_s
        while time.monotonic() < deadline:
            for event in self.events:
                if event.key == key and event.kind == "failed":
                    return event
            self.poll(0.05)
        raise AssertionError(f"{key} did not fail in {limit_s} s")

    def pids(self, key: str) -> list[int]:
        """Return the process ids of an engine."""
        return list(self.executor._replicas[key].launched.pids)


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    """An executor on two cores."""
    executor = VllmExecutor(VllmOptions(heartbeat_s=0.02))
    executor.open(CLUSTER, tmp_path / "run")
    try:
        yield Bench(executor)
    finally:
        executor.close()
