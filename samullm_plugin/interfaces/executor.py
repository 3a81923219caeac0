"""Executors: how engines are started and fed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from samullm_plugin.core.application import ModelSpec
from samullm_plugin.core.cluster import Cluster
from samullm_plugin.interfaces.plugin import Plugin


@dataclass(frozen=True, slots=True)
class EngineSpec:
    """One engine replica to start.

    Attributes:
        key: unique name of the replica in the run, such as ``vicuna.2.0``.
        node: index of the application's node it serves.
        model: checkpoint and engine settings.
        devices: its devices.
        tensor_parallel_size: devices per layer.
        pipeline_parallel_size: groups of layers.
        kv_cache_tokens: KV-cache capacity to reserve.
        scheduling_policy: ``fcfs`` or ``priority``.
    """

    key: str
    node: int
    model: ModelSpec
    devices: tuple[int, ...]
    tensor_parallel_size: int
    pipeline_parallel_size: int
    kv_cache_tokens: int
    scheduling_policy: Literal["fcfs", "priority"] = "fcfs"


@dataclass(frozen=True, slots=True)
class EngineRequest:
    """One request for an engine.

    Attributes:
        request: index in its node's request table.
        prompt_token_ids: prompt plus whatever was generated elsewhere; None in simulations.
        prompt_tokens: length of that.
        max_tokens: tokens it may still generate.
        priority: lower is served first under policy ``priority``.
        sampling: vLLM sampling parameters by name.
    """

    request: int
    prompt_token_ids: tuple[int, ...] | None
    prompt_tokens: int
    max_tokens: int
    priority: int = 0
    sampling: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """Tokens a request generated on one engine.

    Attributes:
        request: index in its node's request table.
        num_tokens: tokens generated on this engine.
        token_ids: those tokens; None in simulations.
        text: their text, if the engine detokenises.
        finish_reason: ``stop``, ``length`` or ``error``; None if it was cut off unfinished.
        error: why it failed, for ``error``.
    """

    request: int
    num_tokens: int
    token_ids: tuple[int, ...] | None = None
    text: str | None = None
    finish_reason: str | None = None
    error: str | None = None


@dataclass(frozen=True, slots=True)
class EngineEvent:
    """Something an engine reports.

    Attributes:
        key: the replica.
        kind: ``ready``, ``finished`` (with outputs) or ``failed`` (with a reason).
        time_s: the executor's clock when it happened.
        outputs: finished requests.
        reason: why it failed.
    """

    key: str
    kind: Literal["ready", "finished", "failed"]
    time_s: float
    outputs: tuple[RequestOutput, ...] = ()
    reason: str = ""


class Executor(Plugin, ABC):
    """Starts engines on devices, feeds them and reports what they finish.

    The coordinator calls it from one thread: ``open``, then any order of the others, then
    ``close``. Every submitted request is reported exactly once: finished by an event, or unfinished
    by ``stop_engine``.
    """

    @abstractmethod
    def open(self, cluster: Cluster, run_dir: Path | None) -> None:
        """Prepare for a run; logs go to ``run_dir`` if there is one.

        Raises:
            InputError: if the executor cannot work on this machine, with the remedy.
        """

    @abstractmethod
    def now_s(self) -> float:
        """Return the executor's clock (virtual clocks advance only in ``poll``)."""

    @abstractmethod
    def start_engine(self, spec: EngineSpec) -> None:
        """Begin to start a replica; a ``ready`` or ``failed`` event follows."""

    @abstractmethod
    def submit(self, key: str, requests: Sequence[EngineRequest]) -> None:
        """Give requests to a replica, which may still be starting."""

    @abstractmethod
    def poll(self, timeout_s: float) -> Sequence[EngineEvent]:
        """Return what has happened, waiting up to ``timeout_s`` for the first event."""

    @abstractmethod
    def stop_engine(self, key: str) -> Sequence[RequestOutput]:
        """Stop a replica and free its devices; return its unfinished requests' tokens so far."""

    @abstractmethod
    def close(self) -> None:
        """Stop everything; safe to call twice and after failures."""
