"""What a run's events say beyond its metrics: where device time went, why requests failed, load."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from samullm_plugin.model.result import EngineSegment
from samullm_plugin.run.charts import TimeSeries
from samullm_plugin.run.metrics import Records, measured_engines

CAUSES = {
    "busy": "#3a9a54",
    "engine starts": "#e0822f",
    "engine without requests (waiting for inputs)": "#8a63c9",
    "no engine, before its next": "#7d8590",
    "no engine any more (drained tail)": "#b8bec7",
}
"""What devices spend time on, and the colour of it."""

_Held = Sequence[tuple[tuple[int, ...], float, float, float, float]]
"""Engines: devices, start, ready, end and busy seconds of one of them."""


def measured_shares(records: Records, num_devices: int, end_s: float) -> dict[str, float]:
    """Return which share of all device seconds of a run went where; they add up to 1."""
    held = []
    for e in measured_engines(records):
        end = e.start_s if e.end_s is None else e.end_s
        ready = end if e.ready_s is None else min(e.ready_s, end)
        held.append((e.devices, e.start_s, ready, end, min(e.busy_s, end - ready)))
    return _shares(held, num_devices, end_s)


def planned_shares(
    segments: Sequence[EngineSegment], num_devices: int, end_s: float
) -> dict[str, float]:
    """Return which share of all device seconds of a plan goes where."""
    held = []
    for s in segments:
        ready = min(s.ready_s, s.end_s)
        replicas = max(1, len(s.devices) // max(1, s.parallel.devices_per_replica))
        busy_s = min(s.busy_s / replicas, s.end_s - ready)
        held.append((s.devices, s.start_s, ready, s.end_s, busy_s))
    return _shares(held, num_devices, end_s)


def _shares(held: _Held, num_devices: int, end_s: float) -> dict[str, float]:
    seconds = dict.fromkeys(CAUSES, 0.0)
    busy, starts, waiting, gap, tail = CAUSES
    for device in range(num_devices):
        at = 0.0
        mine = sorted(h[1:] for h in held if device in h[0])
        for *times, busy_s in mine:
            start, ready, end = (min(max(t, at), end_s) for t in times)
            seconds[gap] += start - at
            seconds[starts] += ready - start
            served = min(busy_s, end - ready)
            seconds[busy] += served
            seconds[waiting] += end - ready - served
            at = end
        seconds[tail] += max(0.0, end_s - at)
    total = num_devices * end_s
    return {name: value / total if total > 0 else 0.0 for name, value in seconds.items()}


def grouped_failures(records: Records) -> list[dict[str, Any]]:
    """Return a row per kind of failure, the most frequent first, each with one example.

    Reasons that differ only in numbers and quoted texts are of one kind.
    """
    groups: dict[tuple[str, str], dict[str, Any]] = {}
    for record in records:
        if record["kind"] != "failed":
            continue
        error = str(record.get("error"))
        kind = re.sub(r"'[^']*'|\"[^\"]*\"|\d+(\.\d+)?", "·", error)
        kind = re.sub(r"its input \S+ of node", "its input · of node", kind)
        row = groups.setdefault(
            (record["node"], kind),
            {"node": record["node"], "count": 0, "request": record["request"] + 1, "error": error},
        )
        row["count"] += 1
    return sorted(groups.values(), key=lambda row: -int(row["count"]))


def cut_shares(records: Records) -> dict[str, float]:
    """Return by node which share of finished outputs ended at their limit of tokens."""
    counts: dict[str, list[int]] = {}
    for record in records:
        if record["kind"] == "finished":
            count = counts.setdefault(record["node"], [0, 0])
            count[0] += 1
            count[1] += record.get("finish_reason") == "length"
    return {node: cut / total for node, (total, cut) in counts.items()}


def load_lines(records: Records) -> tuple[TimeSeries, ...]:
    """Return tokens per second, and requests running and waiting, over time."""
    loads = [r for r in records if r["kind"] == "load"]
    if len(loads) < 2:
        return ()
    rate = []
    for before, after in pairwise(loads):
        seconds = after["time_s"] - before["time_s"]
        if seconds > 0 and after["tokens"] >= before["tokens"]:
            rate.append((before["time_s"], (after["tokens"] - before["tokens"]) / seconds))
    if rate:
        rate.append((loads[-1]["time_s"], rate[-1][1]))
    return (
        TimeSeries("tokens/s", tuple(rate), "#3b7dd8"),
        TimeSeries("running", _values(loads, "running"), "#3a9a54"),
        TimeSeries("at engines", _values(loads, "at_engines"), "#8a63c9"),
        TimeSeries("ready, waiting for an engine", _values(loads, "waiting"), "#e0822f"),
    )


def _values(loads: Sequence[Mapping[str, Any]], name: str) -> tuple[tuple[float, float], ...]:
    return tuple((float(r["time_s"]), float(r[name])) for r in loads)
