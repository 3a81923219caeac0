"""A plan as text: one line per device, time from left to right."""

from __future__ import annotations

from samullm_plugin.model.cluster import Cluster, device_labels
from samullm_plugin.model.result import PlanTrace

LOADING = "░"


def text_gantt(trace: PlanTrace, cluster: Cluster, width: int = 72) -> str:
    """Return a Gantt chart.

    Every node has a letter, in order of its first start; engine starts are shaded, idle time is
    left blank.

    Args:
        trace: a plan carried out.
        cluster: the devices.
        width: columns of the chart.
    """
    if trace.makespan_s <= 0:
        return "(nothing to do)"
    order = list(dict.fromkeys(s.node for s in trace.segments))
    letters = {n: _letter(i) for i, n in enumerate(order)}
    rows = [[" "] * width for _ in range(cluster.num_gpus)]
    scale = width / trace.makespan_s
    for segment in trace.segments:
        first = int(segment.start_s * scale)
        ready = int(min(segment.ready_s, segment.end_s) * scale)
        last = max(first + 1, round(segment.end_s * scale))
        for device in segment.devices:
            for column in range(first, min(last, width)):
                rows[device][column] = LOADING if column < ready else letters[segment.node]
    names = device_labels(cluster.num_gpus, cluster.machines_if_several)
    label = max(6, max(map(len, names)) + 4)
    lines = [
        f"{'GPU ' + name:<{label}}|{''.join(row)}|" for name, row in zip(names, rows, strict=True)
    ]
    end = f"{trace.makespan_s:.0f} s"
    lines.append(" " * label + "0" + " " * (width - len(end)) + " " + end)
    legend = "  ".join(f"{letters[n]} {n}" for n in order)
    lines.append(f"{' ' * label}{legend}  ({LOADING} engine start)")
    return "\n".join(lines)


def _letter(index: int) -> str:
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789"
    return alphabet[index % len(alphabet)]
