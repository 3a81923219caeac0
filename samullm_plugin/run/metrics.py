"""What a run did, from its events: segments, metrics and timelines."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from samullm_plugin.model.application import ModelNode, PythonNode
from samullm_plugin.model.result import PlanTrace, Timeline
from samullm_plugin.run.forecast import ForecastNode, forecast_nodes
from samullm_plugin.run.ledger import Ledger, Status
from samullm_plugin.run.log import SETTLED
from samullm_plugin.run.trace import Slice
from samullm_plugin.run.user_nodes import UserNodes

Records = Sequence[Mapping[str, Any]]


@dataclass(slots=True)
class MeasuredEngine:
    """One engine of a run.

    Attributes:
        key: its name.
        node: name of the node it served.
        devices: its devices.
        parallel: spread of the node.
        start_s: when its start began.
        ready_s: when it could serve; None if it never could.
        end_s: when it was stopped or the run was interrupted.
        busy_s: seconds in which it had requests.
        num_finished: requests it finished.
        failed: it died.
        taken_over: it was not started, but taken over from a node that had finished.
        woken: it was not started, but slept before.
    """

    key: str
    node: str
    devices: tuple[int, ...]
    parallel: str
    start_s: float
    ready_s: float | None = None
    end_s: float | None = None
    busy_s: float = 0.0
    num_finished: int = 0
    failed: bool = False
    taken_over: bool = False
    woken: bool = False

    @property
    def started(self) -> bool:
        """Return whether it was started for its node."""
        return not self.taken_over and not self.woken


def measured_engines(records: Records) -> list[MeasuredEngine]:
    """Return the engines of a run in the order of their starts."""
    engines: list[MeasuredEngine] = []
    open_: dict[str, MeasuredEngine] = {}
    for record in records:
        kind, time_s = record["kind"], float(record["time_s"])
        if kind == "engine_started":
            engine = MeasuredEngine(
                record["key"],
                record["node"],
                tuple(record["devices"]),
                record["parallel"],
                time_s,
                taken_over="takes_over" in record,
                woken="wakes" in record,
            )
            engines.append(engine)
            open_[engine.key] = engine
        elif kind == "resumed":  # whatever ran before is gone
            for engine in open_.values():
                _cut_off(engine, float(record["interrupted_s"]))
            open_.clear()
        elif record.get("key") in open_:
            engine = open_[record["key"]]
            if kind == "engine_ready":
                engine.ready_s = time_s
            elif kind == "engine_failed":
                engine.failed = True
            elif kind == "engine_stopped":
                engine.end_s = time_s
                engine.busy_s = float(record["busy_s"])
                engine.num_finished = int(record["num_finished"])
                del open_[engine.key]
    last = float(records[-1]["time_s"]) if records else 0.0
    for engine in open_.values():
        _cut_off(engine, last)
    return engines


def _cut_off(engine: MeasuredEngine, time_s: float) -> None:
    """End an engine that nobody stopped: it is taken to have been busy since it was ready."""
    engine.end_s = time_s
    ready_s = time_s if engine.ready_s is None else engine.ready_s
    engine.busy_s = max(0.0, time_s - ready_s)


def measured_slices(records: Records) -> list[Slice]:
    """Return what every device did: engine starts and serving."""
    slices = []
    for engine in measured_engines(records):
        end_s = engine.start_s if engine.end_s is None else engine.end_s
        ready_s = end_s if engine.ready_s is None else min(engine.ready_s, end_s)
        details = (("engine", engine.key), ("spread", engine.parallel))
        for device in engine.devices:
            slices.append(
                Slice(device, f"load {engine.node}", engine.start_s, ready_s, "load", details)
            )
            more = (*details, ("requests", engine.num_finished))
            slices.append(Slice(device, engine.node, ready_s, end_s, "run", more))
    return slices


def planned_slices(trace: Timeline) -> list[Slice]:
    """Return what every device was to do."""
    slices = []
    for segment in trace.segments:
        ready_s = min(segment.ready_s, segment.end_s)
        details = (("spread", str(segment.parallel)), ("stage", segment.stage))
        for device in segment.devices:
            slices.append(
                Slice(device, f"load {segment.node}", segment.start_s, ready_s, "load", details)
            )
            slices.append(Slice(device, segment.node, ready_s, segment.end_s, "run", details))
    return slices


@dataclass(slots=True)
class NodeCounts:
    """What became of the requests of one of the user's nodes.

    Attributes:
        finished: requests, without calls whose values the rows behind them hold.
        skipped: requests that were not taken, without such calls.
        failed: requests; a call that failed is one, whatever rows it would have had.
        prompt_tokens: of finished requests of models.
        completion_tokens: of finished requests of models.
        settled_s: when the last one was settled; None before.
        finished_s: when the last one finished; None before.
        calls: those left out of the first two.
    """

    finished: int = 0
    skipped: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    settled_s: float | None = None
    finished_s: float | None = None
    calls: int = 0

    def settled(self) -> dict[str, int]:
        """Return how many requests were settled how."""
        return {"finished": self.finished, "skipped": self.skipped, "failed": self.failed}


def counts_of_records(records: Records, nodes: Sequence[ForecastNode]) -> dict[str, NodeCounts]:
    """Return by node what became of its requests, from a whole journal."""
    hidden = {n.name: n.hidden_calls for n in nodes if n.hidden_calls is not None}
    counts: dict[str, NodeCounts] = defaultdict(NodeCounts)
    for record in records:
        if (kind := record["kind"]) not in SETTLED:
            continue
        node, time_s = record["node"], float(record["time_s"])
        count = counts[node]
        if kind != "failed" and record["request"] < hidden.get(node, 0):
            count.calls += 1
        else:
            setattr(count, kind, getattr(count, kind) + 1)
        count.settled_s = max(time_s, count.settled_s or 0.0)
        if kind == "finished":
            if node not in hidden:
                count.prompt_tokens += record.get("prompt_tokens", 0)
                count.completion_tokens += record.get("num_tokens", 0)
            count.finished_s = max(time_s, count.finished_s or 0.0)
    return counts


def counts_of_ledger(ledger: Ledger) -> dict[str, NodeCounts]:
    """Return by node what became of its requests."""
    counts: dict[str, NodeCounts] = {}
    for name, i, part in UserNodes(ledger.app):
        status, finish_s = ledger.status[i][part.rows], ledger.finish_s[i][part.rows]
        node = ledger.app.all_nodes[i]
        hidden = node.hidden_calls if isinstance(node, PythonNode) else 0
        done = status == Status.FINISHED
        settled = status >= Status.FINISHED
        asked = done if isinstance(node, ModelNode) else np.zeros_like(done)
        counts[name] = NodeCounts(
            int(done[hidden:].sum()),
            int((status[hidden:] == Status.SKIPPED).sum()),
            int((status == Status.FAILED).sum()),
            int(ledger.prompt_tokens[i][part.rows][asked].sum()),
            int(ledger.generated[i][part.rows][asked].sum()),
            float(finish_s[settled].max()) if settled.any() else None,
            float(finish_s[done].max()) if done.any() else None,
            int((settled & (status != Status.FAILED))[:hidden].sum()),
        )
    return counts


def makespan_s(counts: Mapping[str, NodeCounts]) -> float:
    """Return when the last request finished."""
    return max((c.finished_s or 0.0 for c in counts.values()), default=0.0)


def run_metrics(
    ledger: Ledger, records: Records, num_devices: int, planned: PlanTrace | None
) -> dict[str, Any]:
    """Return the figures of a run, planned and measured.

    Args:
        ledger: what became of its requests.
        records: its other events.
        num_devices: of the cluster.
        planned: the first plan's simulation; None: unknown.
    """
    nodes = forecast_nodes(ledger.app, planned)
    counts = counts_of_ledger(ledger)
    return metrics_of(ledger.app.name, nodes, records, counts, num_devices, planned)


def metrics_of(
    application: str,
    nodes: Sequence[ForecastNode],
    records: Records,
    counts: Mapping[str, NodeCounts],
    num_devices: int,
    planned: Timeline | None,
) -> dict[str, Any]:
    """Return :func:`run_metrics` of an application of which only the nodes are known."""
    engines, end_s = measured_engines(records), makespan_s(counts)
    busy_s = sum(e.busy_s * len(e.devices) for e in engines)
    total_s = end_s * num_devices
    counts = {node.name: counts.get(node.name, NodeCounts()) for node in nodes}
    generated = sum(c.completion_tokens for c in counts.values())
    result: dict[str, Any] = {
        "application": application,
        "makespan_s": {"measured": end_s},
        "requests": {kind: sum(c.settled()[kind] for c in counts.values()) for kind in SETTLED},
        "completion_tokens": generated,
        "prompt_tokens": sum(c.prompt_tokens for c in counts.values()),
        "tokens_per_s": generated / end_s if end_s > 0 else None,
        "idle_share": {"measured": 1.0 - busy_s / total_s if total_s > 0 else None},
        "engine_starts": sum(e.started for e in engines),
        "engines_taken_over": sum(e.taken_over for e in engines),
        "engines_woken": sum(e.woken for e in engines),
        "load_s": sum(e.ready_s - e.start_s for e in engines if e.ready_s is not None),
        "engine_failures": sum(e.failed for e in engines),
        "plans_adopted": sum(r["kind"] == "plan" for r in records),
        "interruptions": sum(r["kind"] == "resumed" for r in records),
        "stages": _stages(records, end_s, planned),
        "nodes": {},
    }
    if planned is not None:
        result["makespan_s"] |= {
            "planned": planned.makespan_s,
            "error_percent": 100.0 * (planned.makespan_s / end_s - 1.0) if end_s > 0 else None,
        }
        result["idle_share"]["planned"] = planned.idle_share
    for node in nodes:
        count = counts[node.name]
        mine = [e for e in engines if e.node == node.served_as]
        begin = min((e.start_s for e in mine), default=None)
        finish = count.settled_s
        loads = [e.ready_s - e.start_s for e in mine if e.ready_s is not None and e.started]
        seconds = finish - begin if finish is not None and begin is not None else 0.0
        result["nodes"][node.name] = {
            "served_as": node.served_as,
            "requests": count.settled(),
            "calls": count.calls,
            "prompt_tokens": count.prompt_tokens,
            "completion_tokens": count.completion_tokens,
            "start_s": begin,
            "finish_s": {"measured": finish},
            "tokens_per_s": count.completion_tokens / seconds if seconds > 0 else None,
            "load_s": loads,
        }
        if planned is not None:
            result["nodes"][node.name]["finish_s"]["planned"] = node.finish_s
    return result


def _stages(records: Records, end_s: float, planned: Timeline | None) -> list[dict[str, Any]]:
    """Return when each stage began and ended; planned ones until another plan was adopted."""
    starts = [r for r in records if r["kind"] == "stage"]
    found = []
    plans = 0
    at = iter(records)
    for k, record in enumerate(starts):
        for other in at:
            plans += other["kind"] == "plan"
            if other is record:
                break
        ends = float(starts[k + 1]["time_s"]) if k + 1 < len(starts) else end_s
        stage: dict[str, Any] = {
            "stage": record["stage"],
            "plan": max(plans - 1, 0),
            "start_s": {"measured": float(record["time_s"])},
            "end_s": {"measured": max(ends, float(record["time_s"]))},
        }
        if planned is not None and plans <= 1 and record["stage"] < len(planned.stage_start_s):
            begin = planned.stage_start_s[record["stage"]]
            after = planned.stage_start_s[record["stage"] + 1 :]
            stage["start_s"]["planned"] = begin
            stage["end_s"]["planned"] = after[0] if after else planned.makespan_s
        found.append(stage)
    return found
