"""The package ``aiconfigurator``: what it is asked, and its answers as errors a user can act on.

The package (ai-dynamo/aiconfigurator, Apache-2.0; checked with 0.12) prices an engine iteration
operator by operator from measured tables. It is imported only here and only when asked.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

from samullm_plugin import InputError, MissingExtraError
from samullm_plugin.errors import suggest

BACKEND = "vllm"
MEASURED = frozenset({"silicon", "mixed"})
"""Sources the package gives to operators it read from tables, wholly or with interpolation."""

_REFUSALS = (KeyError, AssertionError, ValueError, RuntimeError)
"""How the package says that it has no data for something."""

_Answer = TypeVar("_Answer")


@dataclass(frozen=True, slots=True)
class PricedReplica:
    """What is priced.

    Attributes:
        model: name whose configuration comes with the package, or a folder with config.json.
        system: the package's name of the device, such as ``h100_sxm``.
        tensor_parallel_size: devices.
        expert_parallel: split mixtures of experts by experts instead of within each.
        backend_version: version of vLLM whose tables are used; the package's current one if None.
        gemm, moe, kv_cache, fmha: quantisation; what the configuration says if None.
    """

    model: str
    system: str
    tensor_parallel_size: int
    expert_parallel: bool = False
    backend_version: str | None = None
    gemm: str | None = None
    moe: str | None = None
    kv_cache: str | None = None
    fmha: str | None = None

    @property
    def said(self) -> str:
        """Return what is priced, in words."""
        quantised = ", ".join(q for q in (self.gemm, self.moe, self.kv_cache, self.fmha) if q)
        return (
            f"{self.model} on {self.system}, tensor-parallel size {self.tensor_parallel_size}"
            f"{', ' + quantised if quantised else ''}"
        )

    def arguments(self, *, experts: bool) -> dict[str, Any]:
        """Return the package's keyword arguments.

        Args:
            experts: the model is a mixture of experts.
        """
        size = self.tensor_parallel_size
        split = size if experts else 1
        return {
            "backend_version": self.backend_version,
            "tp_size": size,
            "moe_tp_size": 1 if self.expert_parallel else split,
            "moe_ep_size": split if self.expert_parallel else 1,
            "gemm_quant_mode": self.gemm,
            "moe_quant_mode": self.moe,
            "kvcache_quant_mode": self.kv_cache,
            "fmha_quant_mode": self.fmha,
        }


class Operators:
    """One deployment, ready to be priced; all times in seconds."""

    def __init__(self, deployment: PricedReplica) -> None:
        """Compile the deployment.

        Raises:
            MissingExtraError: without the package.
            InputError: if it has no tables or no configuration for the deployment.
        """
        require()
        self.deployment = deployment
        self._check_system()
        self._check_model()
        self._arguments = deployment.arguments(experts=self._ask(self._is_mixture))
        self.version, self._engine = self._ask(self._compile)

    def decode_s(self, sequences: int, context: int) -> float:
        """Return the seconds of a decode iteration.

        Args:
            sequences: decode sequences.
            context: length of each, its newest token included; at least 2.
        """
        # The package prices the middle of an output: length isl + osl // 2.
        return self._seconds(
            lambda: self._engine.decode_step_latency(sequences, context - 1, 2),
            f"{sequences} sequences of {context} tokens",
        )

    def decode_attention_s(self, sequences: int, context: int) -> float:
        """Return the seconds of the attention of decode sequences beside a prefill."""
        return self._seconds(
            lambda: self._engine.mixed_step_breakdown(1, sequences, context - 1, 2)[3],
            f"{sequences} sequences of {context} tokens beside a prefill",
        )

    def shared_s(self, tokens: int) -> float:
        """Return the seconds of everything but attention, with a prefill in the iteration."""
        return self._seconds(
            lambda: self._engine.mixed_step_breakdown(tokens, 0, tokens, 2)[1], f"{tokens} tokens"
        )

    def prefill_s(self, sequences: int, tokens: int, before: int) -> float:
        """Return the seconds of an iteration of prefills only.

        Args:
            sequences: prefill sequences.
            tokens: new tokens of each.
            before: tokens of each computed earlier.
        """
        return self._seconds(
            lambda: self._engine.predict_prefill_latency(sequences, tokens + before, before),
            f"{sequences} prefills of {tokens} tokens after {before}",
        )

    def measured_share(self, sequences: int = 64, context: int = 1024) -> float:
        """Return the share of a decode iteration that comes from measured tables."""
        rows = self._ask(lambda: self._engine.decode_step_per_op(sequences, context - 1, 2))
        total = sum(row[1] for row in rows)
        return float(sum(row[1] for row in rows if row[3] in MEASURED) / total)

    def memory(
        self, memory_bytes: int, utilization: float, tokens: int, sequences: int
    ) -> tuple[int, float]:
        """Return KV-cache tokens (0 if the weights do not fit) and bytes of weights on a device."""
        from aiconfigurator_core.sdk.memory import KVCacheEstimator

        deployment = self.deployment
        arguments = {**self._arguments, "backend_version": self.version}
        found = self._ask(
            lambda: KVCacheEstimator.from_request(
                deployment.model,
                deployment.system,
                BACKEND,
                max_num_tokens=tokens,
                max_batch_size=sequences,
                **arguments,
            )
        )
        parts = found.breakdown
        weights = float(parts["weights_bytes"])
        if memory_bytes * utilization <= float(parts["non_kv_bytes"]):
            return 0, weights
        estimate = self._ask(
            lambda: found.estimate(
                is_of_free=False,
                fraction=utilization,
                gpu_memory_capacity_bytes_override=memory_bytes,
            )
        )
        return int(estimate["total_kv_size_tokens"]), weights

    def _check_system(self) -> None:
        """Refuse a device without tables.

        Raises:
            InputError: naming the devices there are.
        """
        from aiconfigurator_core.sdk.perf_database import get_version_slots

        known = systems()
        system = self.deployment.system
        if system not in known:
            raise InputError(
                f"aiconfigurator has no system {system!r}{suggest(system, known)}; it has "
                f"{', '.join(known)}"
            )
        slots = self._ask(lambda: get_version_slots(system, BACKEND))
        if not slots:
            raise InputError(
                f"aiconfigurator has no {BACKEND} tables for {system}; take another latency model"
            )
        wanted = self.deployment.backend_version
        if wanted is not None and wanted not in (*slots, *slots.values()):
            raise InputError(
                f"aiconfigurator: backend_version: no {BACKEND} {wanted} tables for {system}; "
                f"there are {', '.join(str(v) for v in slots.values() if v)}"
            )

    def _check_model(self) -> None:
        """Refuse a model whose configuration would have to be fetched or guessed.

        Raises:
            InputError: naming the remedy.
        """
        model = self.deployment.model
        if Path(model).is_dir():
            if not (Path(model) / "config.json").is_file():
                raise InputError(f"{model}: no config.json, from which aiconfigurator takes sizes")
            return
        if model not in bundled():
            raise InputError(
                f"aiconfigurator has no configuration of model {model!r}"
                f"{suggest(model, bundled())}; give the folder of its config.json as the model's "
                "path or in the option models"
            )

    def _is_mixture(self) -> bool:
        from aiconfigurator_core.sdk.models import check_is_moe

        return bool(check_is_moe(self.deployment.model))

    def _compile(self) -> tuple[str, Any]:
        from aiconfigurator_core.sdk.engine import EngineHandle
        from aiconfigurator_core.sdk.perf_database import get_version_slots

        wanted = self.deployment.backend_version or "current"
        slots = get_version_slots(self.deployment.system, BACKEND)
        version = str(slots.get(wanted) or wanted)
        arguments = {**self._arguments, "backend_version": version}
        return version, EngineHandle.compile(
            self.deployment.model, self.deployment.system, BACKEND, **arguments
        )

    def _ask(self, question: Callable[[], _Answer]) -> _Answer:
        """Return an answer of the package, or its refusal as an error of this project.

        Raises:
            InputError: the package cannot answer.
        """
        try:
            with _quiet():
                return question()
        except _REFUSALS as error:
            raise self._refused(error) from error

    def _seconds(self, question: Callable[[], float], what: str) -> float:
        """Return an answer in seconds.

        Raises:
            InputError: the package cannot answer, or not with a time.
        """
        try:
            milliseconds = question()
        except _REFUSALS as error:
            raise self._refused(error, f"{what}: ") from error
        if not 0 <= milliseconds < float("inf"):
            raise self._refused(ValueError(f"it gives {milliseconds} ms"), f"{what}: ")
        return milliseconds * 1e-3

    def _refused(self, error: Exception, what: str = "") -> InputError:
        reason = str(error).strip().splitlines()[0][:400] if str(error) else repr(error)
        if isinstance(error, KeyError):
            reason = f"unknown name {reason}"
        return InputError(
            f"aiconfigurator {package_version()} cannot price {self.deployment.said}: "
            f"{what}{reason}"
        )


def require() -> None:
    """Refuse to go on without the package.

    Raises:
        MissingExtraError: naming the pip command.
    """
    try:
        import aiconfigurator_core.sdk.engine
    except ImportError as error:
        raise MissingExtraError(
            "latency model aiconfigurator", "aiconfigurator", "aiconfigurator"
        ) from error
    assert aiconfigurator_core.sdk.engine


def package_version() -> str:
    """Return the package's version."""
    return metadata.version("aiconfigurator")


def bundled() -> list[str]:
    """Return the models whose configuration comes with the package."""
    from aiconfigurator_core.sdk.common import DefaultHFModels

    return sorted(DefaultHFModels)


def systems() -> list[str]:
    """Return the devices the package knows."""
    from aiconfigurator_core.sdk.common import SupportedSystems

    return sorted(SupportedSystems)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence what the package logs about tables it loads besides."""
    loggers = [logging.getLogger(n) for n in ("aiconfigurator", "aiconfigurator_core")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
