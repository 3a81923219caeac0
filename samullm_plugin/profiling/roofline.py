"""Iteration latency from a model's architecture and coefficients of the device.

An iteration's device time is, per layer, its matrix products (each the larger of reading its
weights and of the tiles it computes, in whole waves over the multiprocessors), element-wise work,
all-reduces between tensor-parallel devices and attention; never less than launching the kernels
one by one. The coefficients are learned across all models measured on the device.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields

import numpy as np

from samullm_plugin.errors import InputError
from samullm_plugin.model.architecture import ModelArchitecture
from samullm_plugin.model.latency import Curve, StepLatency, StepTable
from samullm_plugin.model.types import Floats

_TILES = ((64, 64, 0), (128, 64, 1), (64, 128, 1), (128, 128, 2), (256, 128, 3), (128, 256, 3))
_EXPERT_TILES = ((16, 64, 0), (32, 64, 0), *_TILES)
"""Rows, columns and which share of the peak. Experts see few tokens each, on smaller tiles."""
_SHARPNESS = 3.0
"""Of the larger of computing and reading: a norm of this order, a choice."""
_LONGEST_SPREAD = 512
"""Blocks of decode attention (sequences times heads) up to which a long sequence is split."""


@dataclass(frozen=True, slots=True)
class DeviceHardware:
    """Data-sheet figures of a device.

    Attributes:
        multiprocessors: streaming multiprocessors.
        peak_flops: dense half-precision FLOP/s.
        bandwidth: device memory bytes/s.
    """

    multiprocessors: int
    peak_flops: float
    bandwidth: float


HARDWARE: Mapping[str, DeviceHardware] = {
    "A100-80GB": DeviceHardware(108, 312e12, 2.039e12),
    "A100-40GB": DeviceHardware(108, 312e12, 1.555e12),
}
"""Devices whose data sheets are known, by the name that profiles use."""


@dataclass(frozen=True, slots=True)
class DeviceCoefficients:
    """Learned coefficients of a device; every one positive.

    Attributes:
        tile_64, tile_64_128, tile_128, tile_256: share of the peak reached on tiles of that size.
        bandwidth: share of the memory bandwidth reached by matrix products.
        gated_token_bytes, plain_token_bytes: element-wise traffic per token and layer, in units of
            the hidden state's bytes, for gated and plain MLPs.
        gated_layer_s, plain_layer_s: fixed seconds per layer.
        allreduce_s: seconds per all-reduce (two a layer).
        allreduce_bandwidth_2, allreduce_bandwidth_4: bytes/s of all-reduces over 2, and over
            more devices.
        head_seq_s: seconds per sequence, head of width 128 and layer.
        prefill_head_seq_s: the same, extra, per prefill sequence.
        pair_inefficiency: prefill attention's seconds over those of its FLOPs at peak.
        query_read: decode attention's reads per query head over those at full bandwidth.
        kv_read: the same per key-value head.
        longest_s: seconds per token of the longest sequence and layer, one head of width 128.
        gated_launch_s, plain_launch_s: least seconds per layer of a decode iteration.
        gated_prefill_launch_s, plain_prefill_launch_s: what a prefill adds to it.
        parallel_launch_s: what tensor parallelism adds to it.
        expert_tile: share of the tiles' efficiency that expert layers reach.
    """

    tile_64: float = 0.47
    tile_64_128: float = 0.6
    tile_128: float = 0.8
    tile_256: float = 0.9
    bandwidth: float = 0.9
    gated_token_bytes: float = 50.0
    plain_token_bytes: float = 50.0
    gated_layer_s: float = 5e-5
    plain_layer_s: float = 6e-5
    allreduce_s: float = 2e-5
    allreduce_bandwidth_2: float = 1e11
    allreduce_bandwidth_4: float = 1.5e11
    head_seq_s: float = 7e-9
    prefill_head_seq_s: float = 2e-8
    pair_inefficiency: float = 2.3
    query_read: float = 0.3
    kv_read: float = 1.0
    longest_s: float = 4e-8
    gated_launch_s: float = 2.5e-4
    plain_launch_s: float = 3e-4
    gated_prefill_launch_s: float = 1.4e-4
    plain_prefill_launch_s: float = 1.7e-4
    parallel_launch_s: float = 2e-5
    expert_tile: float = 0.5

    def __post_init__(self) -> None:
        """Refuse coefficients that are not positive.

        Raises:
            InputError: naming the coefficient.
        """
        for name, value in asdict(self).items():
            if not (np.isfinite(value) and value > 0):
                raise InputError(f"device coefficients: {name} is {value}; it must be positive")

    def logarithms(self) -> Floats:
        """Return the natural logarithms in field order."""
        return np.asarray(np.log(np.array([getattr(self, f.name) for f in fields(self)])))

    @classmethod
    def from_logarithms(cls, values: Floats) -> DeviceCoefficients:
        """Return the coefficients of :meth:`logarithms`."""
        return cls(
            **dict(zip((f.name for f in fields(cls)), map(float, np.exp(values)), strict=True))
        )


@dataclass(frozen=True, slots=True, eq=False)
class Shapes:
    """What each of ``n`` iterations computes: model sizes per device, one row per iteration.

    Attributes:
        steps: composition of the iterations.
        layers, hidden, heads, kv_heads, head_dim: sizes on one device, shape ``(n,)``.
        outputs, inputs: output and input width of the four matrix products of a layer on one
            device, shape ``(4, n)``: query-key-value, attention output, MLP up, MLP down.
        experts, active_experts: of the MLP, 0 for dense models.
        gated: whether the MLP is gated.
        parallel: tensor-parallel size.
        weight_bytes: bytes of one weight.
        same_experts: whether all tokens take the same experts.
    """

    steps: StepTable
    layers: Floats
    hidden: Floats
    heads: Floats
    kv_heads: Floats
    head_dim: Floats
    outputs: Floats
    inputs: Floats
    experts: Floats
    active_experts: Floats
    gated: np.ndarray
    parallel: Floats
    weight_bytes: Floats
    same_experts: np.ndarray

    @classmethod
    def of(
        cls,
        architecture: ModelArchitecture,
        parallel: int,
        steps: StepTable,
        *,
        same_experts: bool = False,
    ) -> Shapes:
        """Return the shapes of one model's iterations at one tensor-parallel size.

        Args:
            architecture: sizes of the whole model.
            parallel: tensor-parallel size.
            steps: composition of the iterations.
            same_experts: all tokens take the same experts, as when a profile's prompts are all
                equal; otherwise they spread.
        """
        a = architecture
        heads, kv = a.num_heads / parallel, max(a.num_kv_heads / parallel, 1.0)
        up = (2 if a.mlp == "gated" else 1) * a.intermediate_size / parallel
        outputs = [(heads + 2 * kv) * a.head_dim, a.hidden_size, up, a.hidden_size]
        inputs = [a.hidden_size, heads * a.head_dim, a.hidden_size, a.intermediate_size / parallel]

        def rows(value: float) -> Floats:
            return np.full(len(steps), float(value))

        return cls(
            steps,
            rows(a.num_layers),
            rows(a.hidden_size),
            rows(heads),
            rows(kv),
            rows(a.head_dim),
            np.stack([rows(v) for v in outputs]),
            np.stack([rows(v) for v in inputs]),
            rows(a.num_experts),
            rows(a.num_active_experts),
            rows(a.mlp == "gated") > 0,
            rows(parallel),
            rows(a.dtype_bytes),
            rows(same_experts) > 0,
        )


def touched_experts(tokens: Floats, experts: Floats, active: Floats) -> Floats:
    """Return the expected number of distinct experts that tokens pass through.

    Each token takes ``active`` different experts, taken to be uniform and independent.
    """
    share = active / np.maximum(experts, 1)
    touched = experts * (1 - (1 - share) ** tokens)
    return np.asarray(np.maximum(touched, np.minimum(active, experts)))


def _product_s(
    tokens: Floats,
    outputs: Floats,
    inputs: Floats,
    weight_bytes: Floats,
    hardware: DeviceHardware,
    c: DeviceCoefficients,
    experts: tuple[Floats, Floats] | None = None,
) -> Floats:
    """Return the seconds of a product of ``tokens`` rows.

    Args:
        tokens: rows, of each expert if there are any.
        outputs: columns.
        inputs: inner width.
        weight_bytes: bytes of one weight.
        hardware: data-sheet figures.
        c: coefficients.
        experts: experts computed, and what divides their rate of computing (not of reading).
    """
    copies, slower = (1.0, 1.0) if experts is None else experts
    shares = (c.tile_64, c.tile_64_128, c.tile_128, c.tile_256)
    per_processor = hardware.peak_flops / hardware.multiprocessors
    compute = np.full(np.broadcast(tokens, outputs).shape, np.inf)
    for rows, columns, kind in _TILES if experts is None else _EXPERT_TILES:
        tiles = copies * np.ceil(tokens / rows) * np.ceil(outputs / columns)
        waves = np.ceil(tiles / hardware.multiprocessors)
        seconds = slower * waves * (2 * rows * columns * inputs) / (per_processor * shares[kind])
        compute = np.minimum(compute, seconds)
    traffic = copies * (outputs * inputs + tokens * (outputs + inputs)) * weight_bytes
    read = traffic / (hardware.bandwidth * c.bandwidth)
    return np.asarray((compute**_SHARPNESS + read**_SHARPNESS) ** (1 / _SHARPNESS))


def _per_token_layer_s(s: Shapes, hardware: DeviceHardware, c: DeviceCoefficients) -> Floats:
    """Return the seconds of one layer that depend on the number of scheduled tokens."""
    tokens = s.steps.num_tokens.astype(np.float64)
    busy = np.maximum(tokens, 1)
    total = np.zeros(len(tokens))
    for i in (0, 1):
        total += _product_s(busy, s.outputs[i], s.inputs[i], s.weight_bytes, hardware, c)
    for i in (2, 3):
        shape = (s.outputs[i], s.inputs[i], s.weight_bytes)
        dense = _product_s(busy, *shape, hardware, c)
        if s.experts.any():
            spread = touched_experts(busy, s.experts, s.active_experts)
            touched = np.maximum(np.where(s.same_experts, s.active_experts, spread), 1)
            routed = busy * s.active_experts / touched
            slower = np.full(len(busy), 1 / c.expert_tile)
            sparse = _product_s(routed, *shape, hardware, c, (touched, slower))
            dense = np.where(s.experts > 0, sparse, dense)
        total += dense
    state = tokens * s.hidden * 2
    total += (
        np.where(s.gated, c.gated_token_bytes, c.plain_token_bytes) * state / hardware.bandwidth
    )
    total += np.where(s.gated, c.gated_layer_s, c.plain_layer_s)
    link = np.where(s.parallel > 2, c.allreduce_bandwidth_4, c.allreduce_bandwidth_2)
    # A ring over p devices moves 2 (p - 1) / p of the data; beyond 4 devices nothing was measured.
    ring = (s.parallel - 1) / s.parallel * np.where(s.parallel > 2, 4 / 3, 2.0)
    reduced = np.where(s.parallel > 1, 2 * (c.allreduce_s + ring * state / link), 0.0)
    return np.asarray(total + reduced)


def _context_token_s(s: Shapes, hardware: DeviceHardware, c: DeviceCoefficients) -> Floats:
    """Return the seconds per token of context read in decode attention."""
    reads = c.query_read * s.heads + c.kv_read * s.kv_heads
    return np.asarray(s.layers * reads * s.head_dim * 4 / hardware.bandwidth)


def _launches(s: Shapes, c: DeviceCoefficients) -> tuple[Floats, Floats]:
    """Return the least seconds of a decode and of a prefill iteration."""
    parallel = np.where(s.parallel > 1, c.parallel_launch_s, 0.0)
    decode = np.where(s.gated, c.gated_launch_s, c.plain_launch_s) + parallel
    more = np.where(s.gated, c.gated_prefill_launch_s, c.plain_prefill_launch_s)
    return s.layers * decode, s.layers * (decode + more)


def device_seconds(s: Shapes, hardware: DeviceHardware, c: DeviceCoefficients) -> Floats:
    """Return the device seconds of each iteration, shape ``(n,)``."""
    steps = s.steps
    pair = c.pair_inefficiency * 4 * s.heads * s.head_dim / hardware.peak_flops
    decode_seqs = steps.num_seqs - steps.prefill_seqs
    over = np.floor(_LONGEST_SPREAD / s.heads)
    longest = np.where(decode_seqs > over, s.layers * c.longest_s * s.head_dim / 128, 0.0)
    work = (
        s.layers
        * (
            _per_token_layer_s(s, hardware, c)
            + s.heads
            * (s.head_dim / 128)
            * (c.head_seq_s * steps.num_seqs + c.prefill_head_seq_s * steps.prefill_seqs)
            + pair * steps.prefill_pairs
        )
    ) + np.maximum(
        _context_token_s(s, hardware, c) * steps.context_tokens, longest * steps.longest_tokens
    )
    decode, prefill = _launches(s, c)
    return np.asarray(np.maximum(work, np.where(steps.prefill_seqs > 0, prefill, decode)))


def _knots() -> Floats:
    """Return token counts at which the curve is given: both sides of every tile edge."""
    edges = [*range(64, 1025, 64), *range(1152, 8193, 128)]
    return np.unique(
        [0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, *edges, *(e + 1 for e in edges), 16384, 32768]
    )


def roofline_latency(
    architecture: ModelArchitecture,
    parallel: int,
    hardware: DeviceHardware,
    c: DeviceCoefficients,
    host: Curve,
    *,
    same_experts: bool = False,
) -> StepLatency:
    """Return the iteration latency of an architecture at a tensor-parallel size."""
    knots = _knots().astype(np.int64)
    none = np.zeros(len(knots), dtype=np.int64)
    zero = np.zeros(len(knots))
    steps = StepTable(knots, knots, none, none, zero, zero, zero)
    s = Shapes.of(architecture, parallel, steps, same_experts=same_experts)
    curve = s.layers * _per_token_layer_s(s, hardware, c)
    decode, prefill = _launches(s, c)
    layers, heads = architecture.num_layers, float(s.heads[0])
    widths = layers * heads * architecture.head_dim / 128
    return StepLatency(
        by_tokens=Curve(tuple(map(float, knots)), tuple(map(float, curve))),
        by_seqs=Curve.line(0.0, widths * c.head_seq_s),
        prefill_seq_s=widths * c.prefill_head_seq_s,
        prefill_pair_s=layers
        * c.pair_inefficiency
        * 4
        * heads
        * architecture.head_dim
        / hardware.peak_flops,
        context_token_s=float(_context_token_s(s, hardware, c)[0]),
        longest_token_s=layers * c.longest_s * architecture.head_dim / 128,
        longest_over_seqs=int(_LONGEST_SPREAD / heads),
        launch_s=float(decode[0]),
        prefill_launch_s=float(prefill[0]),
        host_by_seqs=host,
    )
