"""A run directory as one page: planned against measured, from its journal."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from samullm_plugin.errors import InputError
from samullm_plugin.model.plan import Plan
from samullm_plugin.planning.artifacts import read_plan
from samullm_plugin.planning.reporting import device_list, end_event
from samullm_plugin.records import read_record
from samullm_plugin.run.causes import (
    CAUSES,
    cut_shares,
    grouped_failures,
    load_lines,
    measured_shares,
    planned_shares,
)
from samullm_plugin.run.charts import (
    Panel,
    lines_svg,
    measured_bars,
    names_of_devices,
    planned_bars,
    shares_svg,
)
from samullm_plugin.run.forecast import Forecast, ForecastNode, read_forecast
from samullm_plugin.run.journal import read_journal
from samullm_plugin.run.log import BULKY, SETTLED, without_retried
from samullm_plugin.run.metrics import counts_of_records, measured_engines, metrics_of
from samullm_plugin.run.pages import gantt_facts, render_page, write_page
from samullm_plugin.run.rows import FOLDER, RunRows
from samullm_plugin.run.rundir import read_facts
from samullm_plugin.run.samples import sample_rows

SHOWN_FAILURES = 50

_FILES = (
    ("app.yaml", "the application as it was given"),
    ("plan.json", "the first plan"),
    ("planned.json", "what was expected of it"),
    ("events.jsonl", "journal of every event"),
    ("metrics.json", "the figures of this page for machines"),
    ("trace.json", "timeline for Perfetto (ui.perfetto.dev)"),
)


@dataclass(frozen=True, slots=True, eq=False)
class RunRecord:
    """What a run directory holds.

    Attributes:
        directory: the folder.
        facts: of ``run.json``.
        records: the journal's events, without the contents of outputs.
        planned: what was foreseen; None: not recorded.
        planned_makespan_s: of the first plan; None: unknown.
        nodes: as their user wrote them, in the order of the plan's.
        finished: every request is settled.
    """

    directory: Path
    facts: Mapping[str, Any]
    records: tuple[Mapping[str, Any], ...]
    planned: Forecast | None
    planned_makespan_s: float | None
    nodes: tuple[ForecastNode, ...]
    finished: bool


def read_run(directory: Path) -> RunRecord:
    """Read a run directory, of a finished run or one that is not.

    Raises:
        InputError: if the folder holds no run, or a file of it is damaged.
    """
    facts = read_facts(directory)
    journal = directory / "events.jsonl"
    if not journal.exists():
        raise InputError(f"{directory}: the run has no journal (events.jsonl): it never began")
    events = ({k: v for k, v in r.items() if k not in BULKY} for r in read_journal(journal))
    records = tuple(without_retried(events))
    planned = read_forecast(directory)
    makespan_s = planned.trace.makespan_s if planned is not None else None
    if planned is not None:
        nodes = planned.nodes
        total = sum(n.num_requests for n in nodes)
        finished = sum(r["kind"] in SETTLED for r in records) == total
    else:
        stored = read_plan(directory / "plan.json")
        makespan_s = stored.makespan_s[0] if stored.makespan_s else None
        served = dict.fromkeys(a.node for s in stored.plan.stages for a in s.assignments)
        nodes = tuple(
            ForecastNode(name, "", 0, node if node in stored.fused else "")
            for node in served
            for name in stored.fused.get(node, (node,))
        )
        names = [n.name for n in nodes]
        ended = {r["node"] for r in records if r["kind"] == "node_finished"}
        finished = ended >= set(names)
    return RunRecord(directory, facts, records, planned, makespan_s, nodes, finished)


def report_html(run: RunRecord, output: Path | None, refresh_ms: int = 0) -> str:
    """Return the page: one file that needs no other.

    Args:
        run: the run.
        output: where it will be, so that links to the run's files lead there; None: no links.
        refresh_ms: the page asks for itself anew so often while the run goes on; 0: never.

    Raises:
        InputError: if the journal's plans cannot be read.
    """
    refresh_ms = 0 if run.finished else refresh_ms
    return render_page("report.html.j2", report_facts(run, output), refresh_ms)


def write_report(run: RunRecord, output: Path) -> None:
    """Write the page.

    Raises:
        InputError: if the file cannot be written.
    """
    write_page(report_html(run, output), output)


def report_facts(run: RunRecord, output: Path | None) -> dict[str, Any]:
    """Return everything the page shows."""
    trace = None if run.planned is None else run.planned.trace
    metrics = metrics_of(
        str(run.facts.get("application", "")),
        run.nodes,
        run.records,
        counts_of_records(run.records, run.nodes),
        int(run.facts["num_devices"]),
        trace if run.finished else None,  # half a run is no match for a whole plan
    )
    last_s = float(run.records[-1]["time_s"]) if run.records else 0.0
    if not run.finished:
        busy_s = sum(e.busy_s * len(e.devices) for e in measured_engines(run.records))
        total_s = last_s * int(run.facts["num_devices"])  # engines also work after the last result
        metrics["idle_share"]["measured"] = 1.0 - busy_s / total_s if total_s > 0 else None
    if trace is not None and not run.finished:
        for node in run.nodes:
            metrics["nodes"][node.name]["finish_s"]["planned"] = node.finish_s
    return {
        "facts": run.facts,
        "finished": run.finished,
        "drained": bool(run.records) and run.records[-1]["kind"] == "drained",
        "directory": str(run.directory),
        "planned": run.planned,
        "planned_makespan_s": run.planned_makespan_s,
        "last_s": last_s,
        "metrics": metrics,
        "nodes": _nodes(run, metrics),
        "plans": _plans(run),
        "stages": _stages(run, metrics),
        **gantt_facts(_panels(run, metrics), _labels(run)),
        **_shares(run, last_s),
        "load_charts": _load_charts(run, last_s),
        "samples": sample_rows(run.directory),
        "engine_failures": [r for r in run.records if r["kind"] == "engine_failed"],
        "failed": _failures(run),
        "moved": Counter(r["node"] for r in run.records if r["kind"] == "moved"),
        "interruptions": [r for r in run.records if r["kind"] == "resumed"],
        "links": [] if output is None else _links(run.directory, output),
    }


def _nodes(run: RunRecord, metrics: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return a row per node."""
    sizes = {} if run.planned is None else {n.name: n for n in run.planned.nodes}
    rows, cut = [], cut_shares(run.records)
    for name, node in metrics["nodes"].items():
        finish, requests = node["finish_s"], node["requests"]
        planned, measured = finish.get("planned"), finish["measured"]
        settled = sum(requests.values()) + node["calls"]
        total = sizes[name].num_requests if name in sizes else None
        hidden = sizes[name].hidden_calls or 0 if name in sizes else 0
        done = run.finished or (total is not None and settled == total)
        rows.append(
            {
                "name": name,
                "model": sizes[name].model if name in sizes else "",
                "fused": sizes[name].fused if name in sizes else "",
                "total": None if total is None else total - hidden,
                "requests": requests,
                "planned_s": planned,
                "measured_s": measured if done else None,
                "error": _error(planned, measured if done else None),
                "tokens": node["completion_tokens"],
                "tokens_per_s": node["tokens_per_s"],
                "loads": node["load_s"],
                "cut": cut.get(name),
            }
        )
    return rows


_UNTOLD = dict.fromkeys(("remaining_s", "gain_s", "planning_s"))
"""What is told only of plans that were made while the run went on."""


def _plans(run: RunRecord) -> list[dict[str, Any]]:
    """Return the plans the run went by."""
    found = []
    for record in run.records:
        if record["kind"] == "plan":
            where = f"{run.directory / 'events.jsonl'}: plan"
            plan = read_record(Plan, record["plan"], where)
            found.append({**_UNTOLD, **record, "plan": plan})
    return found


def _stages(run: RunRecord, metrics: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return a row per stage that began, with what it ran."""
    plans = [p["plan"] for p in _plans(run)]
    starts = run.planned.trace.stage_start_s if run.planned is not None else ()
    machines = run.facts.get("machines", ())
    rows = []
    for stage in metrics["stages"]:
        going_on = not run.finished and stage is metrics["stages"][-1]
        number = stage["stage"]
        plan = plans[stage["plan"]]
        what = plan.stages[number]
        begin, end = stage["start_s"], stage["end_s"]
        planned = begin.get("planned")
        if planned is None and stage["plan"] == 0 and number < len(starts):
            planned = starts[number]
        rows.append(
            {
                "plan": stage["plan"] + 1,
                "number": number + 1,
                "start": begin["measured"],
                "planned_start": planned,
                "end": None if going_on else end["measured"],
                "planned_end": end.get("planned"),
                "until": end_event(what),
                "runs": [
                    f"{a.node} {a.parallel} on {device_list(a.devices, machines)}"
                    for a in what.assignments
                ],
            }
        )
    return rows


def _panels(run: RunRecord, metrics: Mapping[str, Any]) -> list[Panel]:
    """Return planned and measured engines."""
    panels = []
    if run.planned is not None:
        trace = run.planned.trace
        title = f"planned: {trace.makespan_s:.1f} s"
        panels.append(Panel(title, planned_bars(trace.segments), trace.makespan_s))
    measured_s = metrics["makespan_s"]["measured"]
    title = f"measured: {measured_s:.1f} s" if run.finished else "measured so far"
    bars = measured_bars(measured_engines(run.records))
    panels.append(Panel(title, bars, measured_s if run.finished else None))
    return panels


def _labels(run: RunRecord) -> list[str]:
    """Return a name per device."""
    return names_of_devices(
        int(run.facts["num_devices"]),
        run.facts.get("machines", ()),
        run.facts.get("cards", ()),
        run.planned.gpus if run.planned is not None else (),
    )


def _shares(run: RunRecord, last_s: float) -> dict[str, Any]:
    """Return where device time was to go and went."""
    count = int(run.facts["num_devices"])
    rows = (
        {}
        if run.planned is None
        else {
            "planned": planned_shares(
                run.planned.trace.segments, count, run.planned.trace.makespan_s
            )
        }
    )
    rows["measured"] = measured_shares(run.records, count, last_s)
    bars = [[(name, share, CAUSES[name]) for name, share in row.items()] for row in rows.values()]
    legend = {
        f"{name}: {' / '.join(f'{100 * row[name]:.0f}' for row in rows.values())} %": color
        for name, color in CAUSES.items()
    }
    return {"shares": shares_svg(bars), "share_rows": list(rows), "share_legend": legend}


def _load_charts(run: RunRecord, last_s: float) -> list[tuple[str, str, dict[str, str]]]:
    """Return charts over time: title, drawing, legend."""
    lines = load_lines(run.records)
    if not lines:
        return []
    return [
        (title, lines_svg(some, last_s, unit), {n.name: n.color for n in some})
        for title, unit, some in (
            ("output tokens per second", "tokens/s", lines[:1]),
            ("requests", "", lines[1:]),
        )
    ]


def _failures(run: RunRecord) -> list[dict[str, Any]]:
    """Return the kinds of failures, the requests by the names they have in the outputs."""
    found = grouped_failures(run.records)[:SHOWN_FAILURES]
    if found and (run.directory / FOLDER / "items.parquet").is_file():
        rows = RunRows(run.directory)
        names = {n.name: n.ids for n in rows.nodes}
        rows.close()
        for row in found:
            if row["node"] in names:
                row["request"] = names[row["node"]][row["request"] - 1].as_py()
    return found


def _links(directory: Path, output: Path) -> list[tuple[str, str, str]]:
    """Return (name, link, what it is) of the run's files, relative to the page."""
    found = [(directory / name, name, text) for name, text in _FILES]
    for folder, text in (("outputs", "results, OpenAI batch format"), ("logs", "engine's log")):
        inside = sorted(p for p in (directory / folder).glob("**/*") if p.is_file())
        found += [(p, str(p.relative_to(directory)), text) for p in inside]
    home = output.resolve().parent
    return [
        (name, quote(os.path.relpath(path.resolve(), home)), text)
        for path, name, text in found
        if path.exists()
    ]


def _error(planned: float | None, measured: float | None) -> float | None:
    """Return by how much the plan was off, in percent of what was measured."""
    if planned is None or not measured:
        return None
    return 100.0 * (planned / measured - 1.0)
