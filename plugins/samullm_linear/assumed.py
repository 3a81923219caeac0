"""Latency, memory and engine starts from data sheets, where nobody has measured."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

from samullm_plugin import (
    Gpu,
    LatencyModel,
    LoadTimes,
    ModelSpec,
    Provenance,
)
from samullm_plugin.checkpoints.gpus import known_name
from samullm_plugin.checkpoints.models import sizes_of
from samullm_plugin.model.kv_cache import KvCacheGroup
from samullm_plugin.model.latency import StepLatency
from samullm_plugin.profiling.assumed import CPU_LOADING, LOADING, assumed_latency, sheet_of
from samullm_plugin.profiling.assumed_memory import assumed_pool_tokens
from samullm_plugin.profiling.loading import ASSUMED
from samullm_plugin.profiling.memory import replica_groups
from samullm_plugin.profiling.pipeline import SOURCE as PIPELINE_SOURCE
from samullm_plugin.profiling.pipeline import stage_latency


class Assumed(LatencyModel):
    """By data sheets alone: for models and devices nobody has measured; every figure says so."""

    name: ClassVar[str] = "assumed"

    def step_latency(
        self,
        model: ModelSpec,
        gpu: Gpu,
        tensor_parallel_size: int,
        pipeline_parallel_size: int = 1,
    ) -> StepLatency:
        """Return the iteration latency of one replica.

        Raises:
            InputError: if neither the model's sizes nor the device's data sheet are known.
        """
        sheet, _ = sheet_of(gpu)
        sizes = sizes_of(model)
        whole = assumed_latency(sizes, tensor_parallel_size, sheet)
        latency = stage_latency(whole, sizes, pipeline_parallel_size)
        return replace(latency, overlap_host=model.engine.async_scheduling)

    def kv_cache_tokens(
        self,
        model: ModelSpec,
        gpu: Gpu,
        tensor_parallel_size: int,
        pipeline_parallel_size: int = 1,
    ) -> int:
        """Return the KV-cache capacity in tokens of the pool; 0 if the model does not fit."""
        return assumed_pool_tokens(
            model, sizes_of(model), gpu, tensor_parallel_size, pipeline_parallel_size
        )

    def kv_cache_groups(
        self,
        model: ModelSpec,
        gpu: Gpu,
        tensor_parallel_size: int,
        pipeline_parallel_size: int = 1,
    ) -> tuple[KvCacheGroup, ...]:
        """Return which layers share block tables."""
        return replica_groups(
            sizes_of(model), model.engine, tensor_parallel_size, pipeline_parallel_size
        )

    def load_times(
        self,
        model: ModelSpec,
        gpu: Gpu,
        tensor_parallel_size: int,
        pipeline_parallel_size: int = 1,
    ) -> LoadTimes:
        """Return the seconds of engine starts, by the bytes of the weights."""
        devices = tensor_parallel_size * pipeline_parallel_size
        loading = CPU_LOADING if known_name(gpu.name) is None else LOADING
        return loading.times(sizes_of(model).weight_bytes, devices, source=ASSUMED)

    def provenance(
        self,
        model: ModelSpec,
        gpu: Gpu,
        tensor_parallel_size: int,
        pipeline_parallel_size: int = 1,
    ) -> Provenance:
        """Return the data sheet that the figures come from, with their known error."""
        found = sheet_of(gpu)[1]
        if pipeline_parallel_size == 1:
            return found
        return replace(found, source=f"{found.source}; {PIPELINE_SOURCE}")
