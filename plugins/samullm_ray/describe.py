"""What machines a Ray cluster has, as the ``cluster`` section of an ``app.yaml``."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

from samullm_vllm.devices import cpu_devices

from samullm_plugin import Cluster, Gpu

_GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class FoundMachine:
    """A machine of the cluster.

    Attributes:
        host: its name.
        cluster: its GPUs and how NVLink joins them; None if it has none.
        num_cpus: CPU cores it offers.
        memory_bytes: its memory.
    """

    host: str
    cluster: Cluster | None
    num_cpus: int
    memory_bytes: int


def find_machines() -> list[FoundMachine]:
    """Ask every machine of the connected cluster what it has, head first."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    nodes = [n for n in ray.nodes() if n["Alive"]]
    nodes.sort(key=lambda n: "node:__internal_head__" not in n["Resources"])
    look = ray.remote(_look_around)
    asked = [
        look.options(
            num_cpus=0,
            scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False),
        ).remote(int(node["Resources"].get("GPU", 0)))
        for node in nodes
    ]
    found: list[FoundMachine] = []
    for node, (host, cluster, memory_bytes) in zip(nodes, ray.get(asked, timeout=60), strict=True):
        cpus = int(node["Resources"].get("CPU", 0))
        found.append(FoundMachine(host, cluster, cpus, memory_bytes))
    return found


def _look_around(num_gpus: int) -> tuple[str, Cluster | None, int]:
    """Run on a machine: return its name, its GPUs and its memory."""
    import socket

    import psutil
    from samullm_vllm.devices import cuda_cluster, cuda_devices

    environment = {k: v for k, v in os.environ.items() if k != "CUDA_VISIBLE_DEVICES"}
    cluster = cuda_cluster(cuda_devices(environment)[:num_gpus]) if num_gpus else None
    return socket.gethostname(), cluster, int(psutil.virtual_memory().total)


def cluster_section(machines: Sequence[FoundMachine]) -> dict[str, object]:
    """Return the ``cluster`` section: of the GPUs, or of CPU cores where nobody has a GPU."""
    gpus: list[Gpu] = []
    nvlink: list[list[int]] = []
    parts: list[list[int]] = []
    with_gpus = any(m.cluster is not None for m in machines)
    for machine in machines:
        first = len(gpus)
        if machine.cluster is not None:
            gpus += machine.cluster.gpus
            nvlink += [[first + d for d in g] for g in machine.cluster.nvlink_groups]
        elif not with_gpus:
            gpus += cpu_devices(machine.num_cpus, machine.memory_bytes)
            nvlink.append(list(range(first, len(gpus))))
        if len(gpus) > first:
            parts.append(list(range(first, len(gpus))))
    kinds: list[dict[str, object]] = []
    for gpu in gpus:
        memory_gib = round(gpu.memory_bytes / _GIB, 2)
        if kinds and (kinds[-1]["gpu"], kinds[-1]["gpu_memory_gib"]) == (gpu.name, memory_gib):
            kinds[-1]["count"] = int(str(kinds[-1]["count"])) + 1
        else:
            kinds.append({"gpu": gpu.name, "count": 1, "gpu_memory_gib": memory_gib})
    return {"gpus": kinds, "nvlink": [g for g in nvlink if len(g) > 1], "machines": parts}
