"""Latency, memory and engine starts from data sheets, where nobody has measured."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from samullm_plugin import LatencyModel, LoadTimes, ModelSpec
from samullm_plugin.checkpoints.gpus import (
    DATA_SHEETS,
    DataSheet,
    described_device,
    known_name,
)
from samullm_plugin.checkpoints.models import sizes_of
from samullm_plugin.errors import InputError
from samullm_plugin.model.architecture import ModelArchitecture
from samullm_plugin.model.cluster import Gpu
from samullm_plugin.model.costs import Provenance
from samullm_plugin.model.kv_cache import KvCacheGroup
from samullm_plugin.model.latency import Curve, StepLatency
from samullm_plugin.model.types import Floats
from samullm_plugin.profiling.loading import ASSUMED, LoadModel
from samullm_plugin.profiling.memory import assumed_pool_tokens, replica_groups
from samullm_plugin.profiling.roofline import touched_experts
from samullm_plugin.profiling.transfer import PIPELINE_SOURCE, stage_latency

LOADING = LoadModel(45.0, 60.0, 2.5e9, 1e9)
"""Engine starts: assumed, of the size that start-up logs of vLLM show."""
CPU_LOADING = LoadModel(5.0, 8.0, 1e9, 5e8)
"""The same on cores, where nothing is compiled."""
_SHARPNESS = 3.0


@dataclass(frozen=True, slots=True)
class Shares:
    """What devices reach of their data sheets, and what every iteration costs besides.

    Fitted by ``benchmarks/assumed_latency.py``; see the module.

    Attributes:
        bandwidth: share of the memory bandwidth when reading weights.
        context_bandwidth: the same when reading the context.
        compute: share of the peak FLOP/s.
        attention_compute: the same in prefill attention.
        link: share of the bandwidth between devices.
        token_bytes: element-wise traffic per token and layer, in hidden states of two bytes.
        layer_s: seconds per layer that nothing hides.
        allreduce_s: seconds of one all-reduce of nothing; two a layer.
        host_s: seconds of an iteration on the host.
        host_seq_s: the same per sequence.
    """

    bandwidth: float = 0.915
    context_bandwidth: float = 0.95
    compute: float = 0.85
    attention_compute: float = 0.42
    link: float = 0.17
    token_bytes: float = 3.6
    layer_s: float = 3.6e-5
    allreduce_s: float = 5.6e-6
    host_s: float = 1.44e-3
    host_seq_s: float = 1.3e-6


SHARES = Shares()
ERROR_PCT = 28.0
"""Mean absolute error of an iteration with its kind of GPU left out, the larger of both tables."""


CPU_ERROR_PCT = 300.0
"""Cores differ that much; a run on them measures, and the next plan knows."""
_CORE = DataSheet(1 << 30, 1, 4.0e10, 8.0e9, 8.0e9)
"""One core of a server: two vector units of 512 bits at about 2 GHz, 32-bit numbers."""


def sheet_of(gpu: Gpu) -> tuple[DataSheet, Provenance]:
    """Return the data sheet of a device, and where figures derived from it come from.

    Raises:
        InputError: naming the kinds whose data sheets are known.
    """
    known = known_name(gpu.name)
    if known is not None:
        return DATA_SHEETS[known], Provenance("assumed", f"data sheet of {known}", ERROR_PCT)
    if gpu.is_core:
        return _CORE, Provenance("assumed", "a usual core of a server", CPU_ERROR_PCT)
    if (found := described_device(gpu.name)) is not None:
        return found, Provenance("assumed", f"what the driver says of {gpu.name}", ERROR_PCT)
    raise InputError(
        f"GPU {gpu.name}: neither measured, nor in this machine, nor a kind whose data sheet is "
        f"known ({', '.join(DATA_SHEETS)}); name one of these, or measure it with "
        "`samullm profile latency`"
    )


def assumed_latency(
    a: ModelArchitecture, parallel: int, sheet: DataSheet, shares: Shares = SHARES
) -> StepLatency:
    """Return the iteration latency of a model at a tensor-parallel size on a kind of device."""
    c = shares
    knots = _knots()
    dense, experts = _layer_parameters(a)
    count, active = max(a.num_experts, 1), a.num_active_experts
    touched = (
        touched_experts(knots, np.full_like(knots, count), np.full_like(knots, active))
        if a.num_experts
        else np.zeros(len(knots))
    )
    head = a.vocab_size * a.hidden_size * 2.0
    read_bytes = (dense + experts * touched / count) * a.dtype_bytes + head
    read = read_bytes / parallel / (sheet.bandwidth * c.bandwidth)
    flops = 2 * (dense + experts * active / count) * knots / parallel
    compute = flops / (sheet.peak_flops * c.compute)
    seconds = (read**_SHARPNESS + compute**_SHARPNESS) ** (1 / _SHARPNESS)
    state = knots * a.hidden_size * 2
    seconds += a.num_layers * (c.token_bytes * state / sheet.bandwidth / parallel**0.5 + c.layer_s)
    if parallel > 1:
        moved = 2 * (parallel - 1) / parallel * state
        seconds += 2 * a.num_layers * (c.allreduce_s + moved / (sheet.link_bandwidth * c.link))
    seconds[0] = 0.0
    context = sum(
        x.num_layers * max(x.num_kv_heads / parallel, 1.0) * x.head_bytes
        for x in a.kv_cache_layers
        if x.kind == "full" or x.window_tokens >= _LONG_WINDOW
    )
    attention = a.num_layers * 4 * a.num_heads * a.head_dim / parallel
    return StepLatency(
        by_tokens=Curve(tuple(map(float, knots)), tuple(map(float, seconds))),
        prefill_pair_s=attention / (sheet.peak_flops * c.attention_compute),
        context_token_s=float(context) / (sheet.bandwidth * c.context_bandwidth),
        host_by_seqs=Curve.line(c.host_s, c.host_seq_s),
        overlap_host=False,
    )


_LONG_WINDOW = 2048
"""Windows up to which reading a layer's context does not grow with it."""


def _layer_parameters(a: ModelArchitecture) -> tuple[float, float]:
    """Return the matrix parameters of all layers: those all tokens use, and the routed experts'."""
    active = float(a.active_matmul_params_per_layer * a.num_layers)
    if not a.num_experts:
        return active, 0.0
    share = a.num_active_experts / a.num_experts
    if a.parameters:
        outside = 2.0 * a.vocab_size * a.hidden_size
        experts = max(a.parameters - outside - active, 0.0) / max(1 - share, 1e-9)
        experts = min(experts, active / max(share, 1e-9))
    else:
        experts = float(a.num_layers * a.num_experts * a.expert_params)
    return active - share * experts, experts


def _knots() -> Floats:
    """Return token counts at which the curve is given."""
    small = [0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024]
    return np.array([*small, 1536, 2048, 3072, 4096, 6144, 8192, 12288, 16384, 32768], np.float64)


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
