"""The executor ``emulated``: vLLM's engine core and scheduler, modelled time instead of a model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import IO, Any, ClassVar

from pydantic import BaseModel, Field

from samullm_plugin import (
    Cluster,
    EngineRequest,
    EngineSpec,
    InputError,
    ModeCosts,
    ParallelConfig,
    Problem,
    RunError,
)
from samullm_plugin.model.latency import CURVES, StepLatency
from samullm_vllm.engine import engine_args
from samullm_vllm.executor import ProcessExecutor
from samullm_vllm.fork_launching import ForkLauncher, begin_import
from samullm_vllm.launching import Launcher
from samullm_vllm.process_options import ProcessOptions
from samullm_vllm.protocol import Start
from samullm_vllm.vllm_executor import check_installed

_CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_attention_heads": 2,
    "num_hidden_layers": 1,
    "num_key_value_heads": 2,
    "vocab_size": 32_000,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "bfloat16",
}
"""What vLLM has to read of a model of which nothing is ever computed."""


class EmulatedOptions(ProcessOptions):
    """Options of the executor ``emulated``."""

    time_scale: float = Field(
        default=1.0,
        gt=0,
        description="Real seconds per modelled second. Iterations must stay longer than the "
        "two milliseconds or so that an engine itself needs.",
    )


class EmulatedExecutor(ProcessExecutor):
    """Runs plans for any cluster on any machine: real engine cores that sleep instead of computing.

    Devices are only numbers. Times, also those of ``poll`` and ``now_s``, are modelled seconds.
    """

    name = "emulated"
    Config: ClassVar[type[BaseModel]] = EmulatedOptions
    _truth: Problem | None = None

    @property
    def time_scale(self) -> float:  # type: ignore[override]  # an option here
        """Return the real seconds per modelled second."""
        assert isinstance(self.config, EmulatedOptions)
        return self.config.time_scale

    def imitate(self, truth: Problem) -> None:
        """Take lengths, latencies and load times from ``truth``, its first length scenario.

        What an ``EngineSpec`` or ``EngineRequest`` says itself comes first.
        """
        self._truth = truth

    def begin_opening(self) -> None:
        """Begin to import vLLM."""
        check_installed(self.name)
        begin_import("cpu")

    def _prepare(self, cluster: Cluster) -> None:
        check_installed(self.name)

    def _make_launcher(self, log: IO[bytes], environment: Mapping[str, str]) -> Launcher:
        return ForkLauncher("cpu", environment, log)

    def _device_names(self, spec: EngineSpec) -> list[str]:
        return []

    def _costs(self, spec: EngineSpec) -> ModeCosts:
        if spec.costs is not None:
            return spec.costs
        if self._truth is None:
            raise RunError(
                f"executor emulated: nobody has said how long iterations of {spec.key} take"
            )
        parallel = ParallelConfig(1, spec.tensor_parallel_size, spec.pipeline_parallel_size)
        return self._truth.mode(spec.node, parallel, spec.devices)

    @property
    def can_prepare(self) -> bool:
        """Prepared starts take as much less as the costs say."""
        return True

    @property
    def can_share_gpus(self) -> bool:
        """Parts of GPUs are numbers like other devices; the costs are theirs."""
        return True

    @property
    def can_sleep(self) -> bool:
        """Sleeping and waking take what the costs say."""
        return True

    def _sleep_and_wake_s(self, spec: EngineSpec) -> tuple[float, float]:
        load = self._costs(spec).load
        return load.sleep_s or 0.0, load.wake_s or 0.0

    def _load_s(self, costs: ModeCosts) -> tuple[float, float]:
        """Return the modelled seconds of a start: without, and with a device."""
        load_s = costs.load.warm_s if self._truth is None else self._truth.load_s(costs)
        return max(load_s - costs.load.warm_s, 0.0) + costs.load.prepare_s, load_s

    def figures(self) -> Mapping[str, float]:
        """Return ``lag_s``: modelled seconds by which iterations of all engines came late."""
        late_s = self._lag_s + sum(r.lag_s for r in self._replicas.values())
        return {"lag_s": late_s / self.time_scale}

    def _request(self, spec: EngineSpec, request: EngineRequest) -> EngineRequest:
        if request.output_tokens is not None or self._truth is None:
            return request
        length = int(self._truth.scenarios[0].output_tokens[spec.node][request.request])
        return replace(request, output_tokens=max(1, length - request.num_generated))

    def _start_message(self, spec: EngineSpec, rendezvous: str, *, ahead: bool) -> Start:
        costs, options = self._costs(spec), spec.model.engine
        if not isinstance(costs.latency, StepLatency):
            raise InputError(
                f"executor emulated: the latency of {spec.model.name} is a "
                f"{type(costs.latency).__name__}; only piecewise-linear ones can be emulated"
            )
        given: dict[str, Any] = {
            "max_model_len": spec.model.max_model_len,
            "max_num_seqs": options.max_num_seqs,
            "max_num_batched_tokens": options.max_num_batched_tokens,
            "block_size": options.block_size,
            "enable_prefix_caching": options.enable_prefix_caching,
            "async_scheduling": options.async_scheduling,
            "scheduling_policy": spec.scheduling_policy,
            "enable_chunked_prefill": options.given("enable_chunked_prefill") is not False,
            "skip_tokenizer_init": True,
        }
        folder = self._model_folder(spec)
        prepare_s, load_s = self._load_s(costs)
        return Start(
            spec.key,
            str(folder),
            engine_args(str(folder), given, kv_tokens=spec.kv_cache_tokens, platform="cpu"),
            ahead=ahead,
            beat_s=self.options.heartbeat_s,
            latency=latency_fields(costs.latency),
            prepare_s=prepare_s,
            load_s=load_s - prepare_s,
            time_scale=self.time_scale,
        )

    def _model_folder(self, spec: EngineSpec) -> Path:
        """Return a folder with a configuration of the model's length and nothing else."""
        assert self._files is not None
        folder = self._files.temporary / f"model-{spec.model.max_model_len}"
        folder.mkdir(exist_ok=True)
        config = {**_CONFIG, "max_position_embeddings": spec.model.max_model_len}
        (folder / "config.json").write_text(json.dumps(config))
        return folder


def latency_fields(latency: StepLatency) -> dict[str, Any]:
    """Return a latency as plain numbers, curves as pairs of lists."""
    fields = asdict(latency)
    for name in CURVES:
        fields[name] = [list(fields[name]["knots"]), list(fields[name]["values"])]
    return fields
