"""GPUs that several engines share, each with its part of the memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from samullm_plugin.model.cluster import Cluster, Gpu


@dataclass(frozen=True, slots=True)
class Sharing:
    """How engines share a GPU.

    Attributes:
        engines: at most so many at once, each with an equal part of the memory.
        slowdown: factor on the iterations of each.
    """

    engines: int = 1
    slowdown: float = 1.0


WHOLE = Sharing()
"""One engine on a GPU at a time."""


def share_gpus(cluster: Cluster, sharing: Sequence[Sharing]) -> Cluster:
    """Return a cluster whose devices are the parts of another one's GPUs.

    Parts are numbered GPU by GPU. The first parts of an NVLink group's GPUs form a group, so do
    their second parts, and so on: engines never have two parts of one GPU, which NCCL refuses.

    Args:
        cluster: of whole GPUs.
        sharing: by GPU.
    """
    gpus: list[Gpu] = []
    cards: list[tuple[int, ...]] = []
    for gpu, how in zip(cluster.gpus, sharing, strict=True):
        cards.append(tuple(range(len(gpus), len(gpus) + how.engines)))
        part = gpu.memory_bytes // how.engines
        kind = replace(gpu, memory_bytes=part, engines=how.engines, slowdown=how.slowdown)
        gpus += [kind] * how.engines
    groups = [
        tuple(cards[g][k] for g in group if sharing[g] == how)
        for group in cluster.nvlink_groups
        for how in dict.fromkeys(sharing[g] for g in group)
        for k in range(how.engines)
    ]
    machines = tuple(tuple(d for g in machine for d in cards[g]) for machine in cluster.machines)
    return replace(
        cluster,
        gpus=tuple(gpus),
        nvlink_groups=tuple(groups),
        machines=machines,
        cards=tuple(cards),
    )
