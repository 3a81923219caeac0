"""Iteration latency of one pipeline stage, from that of a whole replica of the same layers."""

from __future__ import annotations

from dataclasses import replace

from samullm_plugin.model.architecture import ModelArchitecture
from samullm_plugin.model.cluster import Network
from samullm_plugin.model.latency import Curve, StepLatency
from samullm_plugin.profiling.transfer import combined

HOP_S = 1e-4
"""Seconds of handing a batch from a stage to the next, whatever its size. **Assumed**: a send, a
receive and what waits for them."""

LINK_BYTES_PER_S = 1.6e10
"""Bytes per second between the devices of two stages. **Assumed**: about two thirds of a PCIe 4.0
slot, as stages are for devices that NVLink does not join."""

HANDED = 2
"""States per token that are handed over, two bytes a number: hidden state and residual, as vLLM's
models do."""

SOURCE = "pipeline stages: its share of the layers, the way between stages assumed"
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
    token_s = HANDED * 2.0 * architecture.hidden_size / LINK_BYTES_PER_S
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
    token_s = HANDED * number_bytes * architecture.hidden_size / network.bytes_per_s
    hop = Curve.line(network.latency_s, token_s)
    return replace(stage, by_tokens=combined([stage.by_tokens, hop], [1.0, 1.0]))
