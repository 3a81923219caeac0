"""Latency of models and sizes that were not measured, from those that were.

So too of a pipeline stage, from that of a whole replica of the same layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from samullm_plugin.model.architecture import ModelArchitecture
from samullm_plugin.model.cluster import Network
from samullm_plugin.model.latency import CURVES, Curve, StepLatency
from samullm_plugin.profiling.device_fit import DeviceFit
from samullm_plugin.profiling.roofline import DeviceHardware, roofline_latency


@dataclass(frozen=True, slots=True)
class FittedLatency:
    """A fitted latency of a known architecture.

    Attributes:
        model: its name.
        architecture: its sizes.
        tensor_parallel_size: devices.
        latency: the fit.
        error_pct: mean absolute percentage error of the fit.
    """

    model: str
    architecture: ModelArchitecture
    tensor_parallel_size: int
    latency: StepLatency
    error_pct: float


@dataclass(frozen=True, slots=True)
class TransferErrors:
    """What transfer errs by, found by leaving measured models out, in percent.

    Attributes:
        same_layers: a measured model has the same layers at that size.
        other_size: a measured model has the same layers at another size.
        sibling: architectures of the same attention and MLP kind were measured.
        stranger: none of the kind was.
    """

    same_layers: float | None = None
    other_size: float | None = None
    sibling: float | None = None
    stranger: float | None = None


@dataclass(frozen=True, slots=True)
class Transferred:
    """A predicted latency and where it comes from.

    Attributes:
        latency: the prediction.
        basis: one sentence.
        error_pct: expected mean absolute percentage error, if known.
    """

    latency: StepLatency
    basis: str
    error_pct: float | None


@dataclass(frozen=True, slots=True)
class LatencyTransfer:
    """Predicts latencies on one device.

    A model with the same layers as a measured one at the same size takes that one's latency (their
    average, if several). With the same layers at another size, the attention terms of the device's
    roofline are corrected by what they missed there. Otherwise the roofline stands alone.

    Attributes:
        device: learned coefficients.
        hardware: data-sheet figures.
        known: measured latencies to start from.
        errors: expected errors.
    """

    device: DeviceFit
    hardware: DeviceHardware
    known: Sequence[FittedLatency] = ()
    errors: TransferErrors = TransferErrors()

    def roofline(
        self, architecture: ModelArchitecture, parallel: int, *, same_experts: bool | None = None
    ) -> StepLatency:
        """Return the latency from the device's coefficients alone.

        Args:
            architecture: sizes of the model.
            parallel: tensor-parallel size.
            same_experts: all tokens take the same experts; as in the measurements if None.
        """
        return roofline_latency(
            architecture,
            parallel,
            self.hardware,
            self.device.coefficients,
            self.device.host.curve(architecture, parallel),
            same_experts=self.device.same_experts if same_experts is None else same_experts,
        )

    def predict(self, architecture: ModelArchitecture, parallel: int) -> Transferred:
        """Return the latency of an architecture at a size, with where it comes from."""
        layers = layer_key(architecture)
        twins = [k for k in self.known if layer_key(k.architecture) == layers]
        here = [k for k in twins if k.tensor_parallel_size == parallel]
        if here:
            names = ", ".join(sorted({k.model for k in here}))
            latency = average([k.latency for k in here])
            return Transferred(latency, f"same layers as {names}", self.errors.same_layers)
        plain = self.roofline(architecture, parallel)
        if twins:
            distance = [abs(np.log2(k.tensor_parallel_size / parallel)) for k in twins]
            near = [k for k, d in zip(twins, distance, strict=True) if d == min(distance)]
            pairs = [
                (k.latency, self.roofline(k.architecture, k.tensor_parallel_size)) for k in near
            ]
            names = ", ".join(sorted({k.model for k in near}))
            basis = (
                f"device coefficients, corrected by {names} at tensor-parallel size "
                f"{near[0].tensor_parallel_size}"
            )
            return Transferred(corrected(plain, pairs), basis, self.errors.other_size)
        kind = kind_key(architecture)
        sibling = any(kind_key(k.architecture) == kind for k in self.known)
        return Transferred(
            plain,
            "device coefficients learned from other models"
            + ("" if sibling else " (none of its attention and MLP kind)"),
            self.errors.sibling if sibling else self.errors.stranger,
        )


def layer_key(a: ModelArchitecture) -> tuple[object, ...]:
    """Return what makes two models' layers cost the same; the vocabulary may differ."""
    return (
        a.num_layers,
        a.hidden_size,
        a.num_heads,
        a.num_kv_heads,
        a.head_dim,
        a.mlp,
        # Widths that round to the same tiles cost the same (Llama-2-13B and Baichuan2-13B).
        round(a.intermediate_size / 256),
        a.num_experts,
        a.num_active_experts,
        a.dtype_bytes,
    )


def kind_key(a: ModelArchitecture) -> tuple[object, ...]:
    """Return the attention and MLP kind: multi-head, grouped or multi-query; dense or experts."""
    groups = a.num_heads // a.num_kv_heads
    attention = "multi-head" if groups == 1 else "grouped" if groups < 16 else "multi-query"
    return attention, a.mlp, a.num_experts > 0, a.head_dim > 128


def combined(curves: Sequence[Curve], weights: Sequence[float]) -> Curve:
    """Return the weighted sum of curves."""
    knots = np.unique(np.concatenate([np.array(c.knots) for c in curves]))
    knots = np.append(knots, knots[-1] + 1024)
    values = sum(w * c.at(knots) for w, c in zip(weights, curves, strict=True))
    return Curve(tuple(map(float, knots)), tuple(map(float, np.asarray(values))))


def average(latencies: Sequence[StepLatency]) -> StepLatency:
    """Return the mean of several latencies, term by term."""
    if len(latencies) == 1:
        return latencies[0]
    weights = [1 / len(latencies)] * len(latencies)

    def mean(name: str) -> Any:
        values = [getattr(x, name) for x in latencies]
        if name in CURVES:
            return combined(values, weights)
        if isinstance(values[0], bool):
            return values[0]
        return int(np.median(values)) if name == "longest_over_seqs" else float(np.mean(values))

    return StepLatency(**{f.name: mean(f.name) for f in fields(StepLatency)})


def corrected(
    plain: StepLatency, neighbours: Sequence[tuple[StepLatency, StepLatency]]
) -> StepLatency:
    """Return a roofline whose attention is corrected by what it missed at neighbouring sizes.

    Only the attention terms carry over from size to size: a kernel that reads a head width badly
    does so at every size, while the other terms trade against each other in a fit.

    Args:
        plain: roofline at the wanted size.
        neighbours: measured latency and roofline at each neighbouring size.
    """

    def factor(name: str) -> float:
        ratios = [
            getattr(m, name) / getattr(r, name)
            for m, r in neighbours
            if getattr(m, name) > 0 and getattr(r, name) > 0
        ]
        return float(np.clip(np.exp(np.mean(np.log(ratios))), 0.4, 2.5)) if ratios else 1.0

    return replace(
        plain,
        context_token_s=plain.context_token_s * factor("context_token_s"),
        longest_token_s=plain.longest_token_s * factor("longest_token_s"),
    )


def same_layers(
    architecture: ModelArchitecture, others: Mapping[str, ModelArchitecture]
) -> list[str]:
    """Return the names of the models with the same layers."""
    return [n for n, a in others.items() if layer_key(a) == layer_key(architecture)]


HOP_S = 1e-4
"""Seconds of handing a batch from a stage to the next, whatever its size. **Assumed**: a send, a
receive and what waits for them."""

HOP_BYTES_PER_S = 1.6e10
"""Bytes per second between the devices of two stages. **Assumed**: about two thirds of a PCIe 4.0
slot, as stages are for devices that NVLink does not join."""

HOP_STATES = 2
"""States per token that are handed over, two bytes a number: hidden state and residual, as vLLM's
models do."""

PIPELINE_SOURCE = "pipeline stages: its share of the layers, the way between stages assumed"
"""Where latencies of :func:`stage_latency` come from, beside the whole replica's."""


ACROSS_SOURCE = "the way between machines by cluster.network_gbit_s and network_latency_us"
"""Where the latency of :func:`across_machines` comes from, beside the stage's."""


def largest_share(architecture: ModelArchitecture, stages: int) -> float:
    """Return what the slowest stage has of an iteration's weights: most layers, and the head."""
    head = architecture.vocab_size * architecture.hidden_size * 2.0
    layers = max(architecture.weight_bytes - head, 0.0)
    most = -(-architecture.num_layers // stages) / architecture.num_layers
    return float((layers * most + head) / (layers + head))


def stage_latency(
    latency: StepLatency, architecture: ModelArchitecture, stages: int
) -> StepLatency:
    """Return the latency of the slowest of a replica's pipeline stages.

    Each has its share of the layers, the last one computes the logits, and a batch is handed on.
    The host's time is taken to be the whole replica's in every stage, as each prepares its inputs.

    Args:
        latency: of a replica of one stage, with as many devices per stage.
        architecture: sizes of the model.
        stages: pipeline-parallel size.
    """
    if stages == 1:
        return latency
    share = largest_share(architecture, stages)
    token_s = HOP_STATES * 2.0 * architecture.hidden_size / HOP_BYTES_PER_S
    return replace(
        latency,
        by_tokens=combined([latency.by_tokens, Curve.line(HOP_S, token_s)], [share, 1.0]),
        prefill_token_s=latency.prefill_token_s * share,
        prefill_pair_s=latency.prefill_pair_s * share,
        prefill_seq_s=latency.prefill_seq_s * share,
        prefill_step_s=latency.prefill_step_s * share,
        context_token_s=latency.context_token_s * share,
        longest_token_s=latency.longest_token_s * share,
        launch_s=latency.launch_s * share,
        prefill_launch_s=latency.prefill_launch_s * share,
    )


def across_machines(
    stage: StepLatency, architecture: ModelArchitecture, network: Network
) -> StepLatency:
    """Return the latency of a stage that hands its batches to one of another machine.

    Once the device has put them down (:func:`stage_latency`), the states of all tokens cross the
    network: with tensor parallelism each device sends its share of them over the same network.

    Args:
        stage: of the slowest of the replica's stages.
        architecture: sizes of the model.
        network: between the machines.
    """
    number_bytes = max(2.0, architecture.dtype_bytes)  # states are not quantised with weights
    token_s = HOP_STATES * number_bytes * architecture.hidden_size / network.bytes_per_s
    hop = Curve.line(network.latency_s, token_s)
    return replace(stage, by_tokens=combined([stage.by_tokens, hop], [1.0, 1.0]))
