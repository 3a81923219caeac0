"""Executors: how engines are started and fed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from samullm_plugin.errors import InputError
from samullm_plugin.host.interfaces.plugin import Plugin
from samullm_plugin.model.application import ModelSpec
from samullm_plugin.model.cluster import Cluster
from samullm_plugin.model.logprobs import PositionLogprobs

if TYPE_CHECKING:  # engine processes import this module, and vLLM does not stand numba beside it
    from samullm_plugin.model.costs import ModeCosts
    from samullm_plugin.model.latency import StepTable
    from samullm_plugin.model.problem import Problem
    from samullm_plugin.model.types import Floats


WINDOW = 3
"""An engine is given so many times the requests that it can run at once."""

REFILL = 6
"""A window is filled again once this part of it is free."""


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
        costs: what the plan assumes of the replica; executors that model engines instead of
            computing go by it.
        after: replicas on its devices that have been put to sleep; it gets the devices when they
            do sleep.
    """

    key: str
    node: int
    model: ModelSpec
    devices: tuple[int, ...]
    tensor_parallel_size: int
    pipeline_parallel_size: int
    kv_cache_tokens: int
    scheduling_policy: Literal["fcfs", "priority"] = "fcfs"
    costs: ModeCosts | None = None
    after: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class EngineRequest:
    """One request for an engine.

    Attributes:
        request: index in its node's request table.
        prompt_token_ids: prompt plus whatever was generated elsewhere; None in simulations, and if
            the engine is to tokenise ``prompt`` or ``messages``.
        prompt_tokens: length of that; an estimate as long as it is not tokenised.
        max_tokens: tokens it may still generate.
        priority: lower is served first under policy ``priority``.
        sampling: vLLM sampling parameters by name.
        prompt: text to tokenise.
        messages: chat messages to put through the model's chat template.
        chat: variables passed to the chat template, such as ``tools`` and ``chat_template_kwargs``.
        num_generated: how many of the last prompt tokens were generated elsewhere.
        output_tokens: how many tokens it is still to generate, whatever the engine would say:
            where lengths are modelled or imposed. None: the engine decides, up to ``max_tokens``.
        task: of a pooling model: ``embed``, ``score``, ``classify`` or ``reward``; None: text is
            generated.
        pair: the second text, for ``score``.
        lora: folder of the adapter it is computed with; None: without one.
    """

    request: int
    prompt_token_ids: tuple[int, ...] | None
    prompt_tokens: int
    max_tokens: int
    priority: int = 0
    sampling: Mapping[str, object] = field(default_factory=dict)
    prompt: str | None = None
    messages: tuple[Mapping[str, object], ...] | None = None
    num_generated: int = 0
    output_tokens: int | None = None
    chat: Mapping[str, object] = field(default_factory=dict)
    task: str | None = None
    pair: str | None = None
    lora: str | None = None


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """Tokens a request generated on one engine.

    Attributes:
        request: index in its node's request table.
        num_tokens: tokens generated on this engine.
        token_ids: those tokens; None in simulations.
        text: text of everything generated, here and before, if the engine detokenises.
        finish_reason: ``stop``, ``length`` or ``error``; None if it was cut off unfinished.
        error: why it failed, for ``error``.
        prompt_token_ids: the prompt, if the engine tokenised it.
        stop_reason: stop string or token that ended it, if one did.
        logprobs: for each of ``token_ids`` how likely it and others were, if asked for.
        prompt_logprobs: the same of each token of the prompt, if asked for; the first has none.
        numbers: what a pooling model gave; such an output counts as one token.
    """

    request: int
    num_tokens: int
    token_ids: tuple[int, ...] | None = None
    text: str | None = None
    finish_reason: str | None = None
    error: str | None = None
    prompt_token_ids: tuple[int, ...] | None = None
    stop_reason: int | str | None = None
    logprobs: tuple[PositionLogprobs, ...] | None = None
    prompt_logprobs: tuple[PositionLogprobs | None, ...] | None = None
    numbers: tuple[float, ...] | None = None


@dataclass(frozen=True, slots=True)
class EngineEvent:
    """Something an engine reports.

    Attributes:
        key: the replica.
        kind: ``ready``, ``finished`` (with outputs), ``failed`` (with a reason), or, of devices
            instead of a replica, ``lost`` (with a reason) and ``joined``. Engines on lost devices
            are gone; stopping them returns at once with what was heard of their requests.
        time_s: the executor's clock when it happened.
        outputs: finished requests.
        reason: why it failed, or why devices are lost.
        devices: those that are lost or have joined; ``key`` is empty then.
    """

    key: str
    kind: Literal["ready", "finished", "failed", "lost", "joined"]
    time_s: float
    outputs: tuple[RequestOutput, ...] = ()
    reason: str = ""
    devices: tuple[int, ...] = ()


class Executor(Plugin, ABC):
    """Starts engines on devices, feeds them and reports what they finish.

    The coordinator calls it from one thread: ``open``, then any order of the others, then
    ``close``. Every submitted request is reported exactly once: finished by an event, or unfinished
    by ``stop_engine``, which is also called for an engine that failed. What an engine finished
    before it was stopped may be reported by events after ``stop_engine`` has returned.

    Attributes:
        virtual_clock: time stands still but for ``poll``; nothing real happens.
    """

    virtual_clock: ClassVar[bool] = False

    @property
    def devices_are(self) -> Literal["gpu", "cpu"]:
        """What engines compute on here."""
        return "gpu"

    @property
    def can_sleep(self) -> bool:
        """Whether engines can be put to sleep and woken, for other nodes too."""
        return False

    @property
    def can_share_gpus(self) -> bool:
        """Whether several engines can be on one GPU at once (``Cluster.cards``)."""
        return False

    @property
    def can_prepare(self) -> bool:
        """Whether ``prepare_engine`` shortens the start that follows."""
        return False

    @property
    def can_pass_on(self) -> bool:
        """Whether ``pass_on_engine`` lets engines go on for another node."""
        return False

    @classmethod
    def kept_warm(cls) -> AbstractContextManager[None]:
        """Let executors opened one after another in this context share what is slow to start."""
        return nullcontext()

    def begin_opening(self) -> None:
        """Begin what is slow and needs no plan; called in ``kept_warm``, while a plan is made.

        Raises:
            InputError: if something that every run needs is missing, with the remedy.
        """

    @classmethod
    def local_cluster(cls) -> Cluster | None:
        """Return the devices that this machine offers to its engines; None if it simulates them."""
        return None

    def imitate(self, truth: Problem) -> None:
        """Receive, before ``open``, the true lengths of outputs, iterations and engine starts.

        Executors that generate their own tokens ignore it.

        Args:
            truth: the application with one length scenario, which the coordinator does not see.
        """
        del truth

    def engine_version(self) -> str | None:
        """Return what generates outputs, and its version, such as ``vllm 0.32.0``.

        Outputs are kept for later runs under it. None: they are not, as with executors that model
        engines instead of computing.
        """
        return None

    def check(self, models: Sequence[ModelSpec]) -> None:
        """Refuse models that cannot be run here, before anything is started.

        Raises:
            InputError: naming the model and the remedy.
        """

    def check_pipeline(self, model: ModelSpec) -> None:
        """Refuse a model whose layers engines cannot divide into pipeline stages.

        Raises:
            InputError: naming the model.
        """

    def check_node(
        self, model: ModelSpec, sampling: Mapping[str, object], *, texts: bool, chat: bool
    ) -> None:
        """Refuse what a node asks of its model and cannot be done here, before anything is started.

        Args:
            model: the node's.
            sampling: its sampling parameters, by vLLM's names.
            texts: whether requests are texts, for which a tokenizer is needed.
            chat: whether they are sent through the model's own chat template.

        Raises:
            InputError: naming the field and the remedy.
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
        """Begin to start a replica; a ``ready`` or ``failed`` event follows.

        If it is being prepared under this key, go on from there, on the devices named now.
        """

    def prepare_engine(self, spec: EngineSpec) -> bool:
        """Begin with what a replica's start needs no device for; ``spec.devices`` may be held yet.

        ``start_engine`` under the same key follows, or ``stop_engine`` if it is not wanted after
        all; if it fails meanwhile, a ``failed`` event and then ``stop_engine``.

        Returns:
            Whether that has begun; if not, nothing follows. Only asked if ``can_prepare``.
        """
        del spec
        return False

    def pass_on_engine(self, key: str, spec: EngineSpec) -> None:
        """Let a ready replica without requests go on for another node, ready at once.

        From now on it is known by ``spec.key`` and reports the requests of ``spec.node``; model,
        devices and sizes are those it has. Only called if ``can_pass_on``.

        Args:
            key: of the replica.
            spec: what it is from now on.
        """
        raise InputError(f"executor {self.name}: its engines serve one node only")

    def window(self, model: ModelSpec) -> int | None:
        """Return how many requests a replica of a model is given before it reports some.

        Under a request policy, those to be served before the last that it has come on top.
        None: all there are. By default three times as many as its engine runs at once, so that at
        least twice as many wait in the engine: its scheduler then decides as if it had them all.
        On a virtual clock they are given at once.
        """
        return None if self.virtual_clock else WINDOW * model.engine.max_num_seqs

    def window_of(self, spec: EngineSpec) -> int | None:
        """Return the same of a replica that is about to be started."""
        return self.window(spec.model)

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

    def prefetch(self, model: ModelSpec) -> None:
        """Read a model's weights ahead, in the background, for an engine started later."""

    def prefetch_on(self, model: ModelSpec, devices: Sequence[int]) -> None:
        """Do so on the machines of these devices; an executor of one machine has only that."""
        self.prefetch(model)

    def progress(self, key: str) -> Mapping[int, int]:
        """Return how many tokens each unfinished request of a replica has generated so far.

        At most about a second old; an executor that cannot tell returns nothing.
        """
        return {}

    def take_steps(self, key: str) -> tuple[StepTable, Floats] | None:
        """Return the iterations a replica has run since the last call, and their seconds.

        None if the executor does not record them. Works until ``stop_engine`` has returned.
        """
        return None

    def start_parts(self, key: str) -> Mapping[str, float]:
        """Return the seconds of a ready replica's start by part, in their order, if known."""
        del key
        return {}

    def figures(self) -> Mapping[str, float]:
        """Return what the executor has measured of itself, for ``metrics.json``."""
        return {}

    def sleep_engine(self, key: str) -> bool:
        """Begin to free a ready replica's devices but keep its processes; it has no requests.

        ``wake_engine`` or ``stop_engine`` follows; if it fails meanwhile, a ``failed`` event and
        then ``stop_engine``. Engines started on its devices name it (:attr:`EngineSpec.after`).

        Returns:
            Whether that has begun; if not, it is to be stopped. Only asked if ``can_sleep``.
        """
        del key
        return False

    def wake_engine(self, key: str, spec: EngineSpec) -> None:
        """Bring a replica that sleeps, or falls asleep, back for a node, on its own devices.

        From now on it is known by ``spec.key``; a ``ready`` or ``failed`` event follows. Only
        called for what ``sleep_engine`` has put to sleep.

        Args:
            key: of the replica.
            spec: what it is from now on.
        """
        raise InputError(f"executor {self.name}: its engines have no sleep mode")
