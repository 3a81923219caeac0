"""A run directory as one page: planned against measured, from its journal (extra ``report``)."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any
from urllib.parse import quote

from samullm_plugin.errors import InputError
from samullm_plugin.model.plan import Plan
from samullm_plugin.planning.artifacts import read_plan
from samullm_plugin.planning.records import read_record
from samullm_plugin.planning.reporting import device_list, end_event
from samullm_plugin.run.forecast import Forecast, ForecastNode, read_forecast
from samullm_plugin.run.gantt_figure import (
    Panel,
    figure_svg,
    gantt_figure,
    measured_bars,
    planned_bars,
    require_matplotlib,
)
from samullm_plugin.run.journal import read_journal
from samullm_plugin.run.log import BULKY, without_retried
from samullm_plugin.run.metrics import SETTLED, measured_engines, metrics_of
from samullm_plugin.run.rundir import read_facts

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


def report_html(run: RunRecord, output: Path) -> str:
    """Return the page: one file that needs no other.

    Args:
        run: the run.
        output: where it will be, so that links to the run's files lead there.

    Raises:
        MissingExtraError: without matplotlib.
        InputError: if the journal's plans cannot be read.
    """
    require_matplotlib("samullm report")
    import jinja2

    template = (files("samullm_plugin") / "data" / "report.html.j2").read_text(encoding="utf-8")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"s": _seconds, "pct": _percent, "n": _number}
    return environment.from_string(template).render(report_facts(run, output))


def write_report(run: RunRecord, output: Path) -> None:
    """Write the page.

    Raises:
        MissingExtraError: without matplotlib.
        InputError: if the file cannot be written.
    """
    page = report_html(run, output)
    try:
        output.write_text(page, encoding="utf-8")
    except OSError as error:
        raise InputError(f"--output {output}: {error.strerror}") from error


def report_facts(run: RunRecord, output: Path) -> dict[str, Any]:
    """Return everything the page shows."""
    trace = None if run.planned is None else run.planned.trace
    metrics = metrics_of(
        str(run.facts.get("application", "")),
        run.nodes,
        run.records,
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
        "chart": _chart(run, metrics),
        "engine_failures": [r for r in run.records if r["kind"] == "engine_failed"],
        "failed": [r for r in run.records if r["kind"] == "failed"][:SHOWN_FAILURES],
        "moved": Counter(r["node"] for r in run.records if r["kind"] == "moved"),
        "interruptions": [r for r in run.records if r["kind"] == "resumed"],
        "links": _links(run.directory, output),
    }


def _nodes(run: RunRecord, metrics: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return a row per node."""
    sizes = {} if run.planned is None else {n.name: n for n in run.planned.nodes}
    rows = []
    for name, node in metrics["nodes"].items():
        finish, requests = node["finish_s"], node["requests"]
        planned, measured = finish.get("planned"), finish["measured"]
        settled = sum(requests.values())
        total = sizes[name].num_requests if name in sizes else None
        done = run.finished or (total is not None and settled == total)
        rows.append(
            {
                "name": name,
                "model": sizes[name].model if name in sizes else "",
                "fused": sizes[name].fused if name in sizes else "",
                "total": total,
                "requests": requests,
                "planned_s": planned,
                "measured_s": measured if done else None,
                "error": _error(planned, measured if done else None),
                "tokens": node["completion_tokens"],
                "tokens_per_s": node["tokens_per_s"],
                "loads": node["load_s"],
            }
        )
    return rows


def _plans(run: RunRecord) -> list[dict[str, Any]]:
    """Return the plans the run went by."""
    found = []
    for record in run.records:
        if record["kind"] == "plan":
            where = f"{run.directory / 'events.jsonl'}: plan"
            plan = read_record(Plan, record["plan"], where)
            found.append({**record, "plan": plan})
    return found


def _stages(run: RunRecord, metrics: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return a row per stage that began, with what it ran."""
    plans = [p["plan"] for p in _plans(run)]
    starts = run.planned.trace.stage_start_s if run.planned is not None else ()
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
                    f"{a.node} {a.parallel} on {device_list(a.devices)}" for a in what.assignments
                ],
            }
        )
    return rows


def _chart(run: RunRecord, metrics: Mapping[str, Any]) -> str:
    """Return planned and measured engines, one above the other on one axis of time."""
    panels = []
    if run.planned is not None:
        trace = run.planned.trace
        title = f"planned: {trace.makespan_s:.1f} s"
        panels.append(Panel(title, planned_bars(trace), trace.makespan_s))
    measured_s = metrics["makespan_s"]["measured"]
    title = f"measured: {measured_s:.1f} s" if run.finished else "measured so far"
    bars = measured_bars(measured_engines(run.records))
    panels.append(Panel(title, bars, measured_s if run.finished else None))
    gpus = run.planned.gpus if run.planned is not None else ()
    several = len(set(gpus)) > 1
    count = int(run.facts["num_devices"])
    labels = [f"{i} {gpus[i]}" if several else str(i) for i in range(count)]
    return figure_svg(gantt_figure(panels, labels, columns=1, width=10.0))


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


def _seconds(value: float | None) -> str:
    return "–" if value is None else f"{value:,.1f}"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value:+.1f} %"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:,.0f}"
