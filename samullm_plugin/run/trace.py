"""Timelines for Perfetto (https://ui.perfetto.dev): planned and measured, one track per device."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Slice:
    """Something that occupied a device for a while.

    Attributes:
        device: index of the device.
        name: what it did.
        start_s: seconds after the start of the run.
        end_s: not before ``start_s``.
        category: ``load`` or ``run``.
        details: shown by the viewer.
    """

    device: int
    name: str
    start_s: float
    end_s: float
    category: str
    details: tuple[tuple[str, object], ...] = ()


def trace_json(tracks: Mapping[str, Iterable[Slice]], marks: Iterable[tuple[float, str]]) -> Any:
    """Return a trace in Chrome's JSON format, which Perfetto reads.

    Slices of one device never overlap: where rounding or a late report would make them, the later
    one begins where the earlier one ended.

    Args:
        tracks: by the name of a group of tracks, its slices.
        marks: moments of the run, with what happened.
    """
    events: list[dict[str, Any]] = []
    for pid, (group, slices) in enumerate(tracks.items(), 1):
        events.append(_name("process_name", pid, 0, group))
        last: dict[int, int] = {}
        for item in sorted(slices, key=lambda s: (s.device, s.start_s, s.end_s)):
            if item.device not in last:
                events.append(_name("thread_name", pid, item.device + 1, f"device {item.device}"))
                last[item.device] = 0
            start = max(round(item.start_s * 1e6), last[item.device])
            end = max(round(item.end_s * 1e6), start)
            if end == start:
                continue
            last[item.device] = end
            events.append(
                {
                    "ph": "X",
                    "name": item.name,
                    "cat": item.category,
                    "pid": pid,
                    "tid": item.device + 1,
                    "ts": start,
                    "dur": end - start,
                    "args": dict(item.details),
                }
            )
    for time_s, text in marks:
        events.append(
            {
                "ph": "i",
                "s": "g",
                "name": text,
                "pid": len(tracks),
                "tid": 0,
                "ts": max(round(time_s * 1e6), 0),
            }
        )
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def _name(kind: str, pid: int, tid: int, name: str) -> dict[str, Any]:
    return {"ph": "M", "name": kind, "pid": pid, "tid": tid, "args": {"name": name}}
