"""A model executor that takes the modelled time of an iteration instead of computing it.

Everything else is vLLM's own: the engine core, its scheduler, its KV-cache manager, its processing
of requests and outputs. Iterations follow one another on a clock of their own: one that begins
while the last is still running starts when that ends, as on a device. What the engine itself needs
between iterations is thereby hidden as long as it is shorter than the iteration; the rest is the
lag that :func:`total_lag_s` tells.
"""

from __future__ import annotations

import time
from concurrent.futures import Future
from typing import Any

import torch
from vllm.v1.executor.abstract import Executor
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.worker.worker_base import CompilationTimes

from samullm_vllm.sampling import EOS_TOKEN
from samullm_vllm.step_seconds import StepSeconds

TOKEN = 7

_lag_s = 0.0


def total_lag_s() -> float:
    """Return by how many real seconds iterations of this process came later than modelled."""
    return _lag_s


class _Later(Future):  # type: ignore[type-arg]  # vLLM takes any future
    """A result that is there from a moment on."""

    def __init__(self, value: Any, due_s: float) -> None:
        super().__init__()
        self._due_s = due_s
        self.set_result(value)

    def result(self, timeout: float | None = None) -> Any:
        """Wait until the moment has come."""
        wait_s = self._due_s - time.monotonic()
        if wait_s > 0:
            time.sleep(wait_s)
        return super().result(timeout)


class _Sequence:
    """What a model runner would know of a request."""

    __slots__ = ("computed", "generated", "known", "output_tokens", "prompt")

    def __init__(self, data: Any) -> None:
        ids = getattr(data, "prefill_token_ids", None) or data.prompt_token_ids
        self.prompt = len(data.prompt_token_ids)
        self.known = len(ids)
        self.generated = self.known - self.prompt
        self.computed = data.num_computed_tokens
        extra = data.sampling_params.extra_args or {}
        self.output_tokens = extra.get("samullm_output_tokens", 1 << 60)


class ModelledExecutor(Executor):  # type: ignore[misc]  # vLLM is not typed here
    """Answers vLLM's engine core as a model would, after the modelled time."""

    supports_pp = True

    @classmethod
    def supports_async_scheduling(cls) -> bool:
        """Results come as futures."""
        return True

    def _init_executor(self) -> None:
        given = self.vllm_config.additional_config
        self._seconds = StepSeconds(given["latency"])
        self._scale = float(given["time_scale"])
        self._sequences: dict[str, _Sequence] = {}
        self._output: ModelRunnerOutput | None = None
        self._free_s = 0.0
        self._ran: set[str] = set()

    def get_kv_cache_specs(self) -> list[dict[str, Any]]:
        """Return a cache of which no byte is ever allocated."""
        spec = FullAttentionSpec(
            block_size=self.cache_config.block_size,
            num_kv_heads=1,
            head_size=16,
            dtype=torch.bfloat16,
        )
        return [{"layer": spec}]

    def determine_available_memory(self) -> list[int]:
        """Return anything: the number of blocks is given."""
        return [1 << 20]

    def get_supported_kv_cache_layouts(self) -> list[list[str]]:
        """Return a layout vLLM knows."""
        return [["LBHNC"]]

    def collective_rpc(self, method: Any, *args: Any, **kwargs: Any) -> list[Any]:
        """Answer the engine core's questions to workers."""
        if method == "get_supported_tasks":
            return [("generate",)]
        if method == "compile_or_warm_up_model":
            return [CompilationTimes(0.0, 0.0)]
        return [None]

    def execute_model(self, scheduler_output: Any, non_block: bool = False) -> Any:
        """Begin an iteration."""
        if not scheduler_output.total_num_scheduled_tokens:
            self._forget(scheduler_output)
            empty = _Later(ModelRunnerOutput(req_ids=[], req_id_to_index={}), 0.0)
            return empty if non_block else empty.result()
        self._output, seconds = self._advance(scheduler_output)
        self._begin(set(scheduler_output.num_scheduled_tokens), seconds * self._scale)
        nothing = _Later(None, 0.0)
        return nothing if non_block else None

    def sample_tokens(self, grammar_output: Any, non_block: bool = False) -> Any:
        """Return the iteration's tokens when its time has passed."""
        later = _Later(self._output, self._free_s)
        return later if non_block else later.result()

    def _begin(self, names: set[str], seconds: float) -> None:
        """Put an iteration behind the one before, or at now if the device was idle."""
        global _lag_s  # noqa: PLW0603  # one engine per process
        now_s = time.monotonic()
        continues = bool(names & self._ran) or now_s < self._free_s
        begin_s = self._free_s if continues else now_s
        self._free_s = begin_s + seconds
        _lag_s += max(0.0, now_s - self._free_s) if continues else 0.0
        self._ran = names

    def _forget(self, scheduler_output: Any) -> None:
        for name in scheduler_output.finished_req_ids:
            self._sequences.pop(name, None)

    def _advance(self, scheduler_output: Any) -> tuple[ModelRunnerOutput, float]:
        """Return an iteration's tokens and its modelled seconds."""
        self._forget(scheduler_output)
        for data in scheduler_output.scheduled_new_reqs:
            self._sequences[data.req_id] = _Sequence(data)
        cached = scheduler_output.scheduled_cached_reqs
        for name, computed in zip(cached.req_ids, cached.num_computed_tokens, strict=True):
            self._sequences[name].computed = computed
        prefills, contexts, tokens = [], [], []
        names = list(scheduler_output.num_scheduled_tokens)
        for name in names:
            sequence, new = self._sequences[name], scheduler_output.num_scheduled_tokens[name]
            if new == 1 and sequence.computed >= sequence.prompt:
                contexts.append(sequence.computed + 1)
            else:
                prefills.append((sequence.computed, new))
            sequence.computed += new
            tokens.append(self._sample(sequence))
        output = ModelRunnerOutput(
            req_ids=names,
            req_id_to_index={name: i for i, name in enumerate(names)},
            sampled_token_ids=tokens,
        )
        return output, self._seconds(prefills, contexts)

    @staticmethod
    def _sample(sequence: _Sequence) -> list[int]:
        if sequence.computed < sequence.known:
            return []
        sequence.known += 1
        sequence.generated += 1
        return [EOS_TOKEN if sequence.generated >= sequence.output_tokens else TOKEN]

    def check_health(self) -> None:
        """Nothing can fall ill."""

    def shutdown(self) -> None:
        """Nothing to end."""
