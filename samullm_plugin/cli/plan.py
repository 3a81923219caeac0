"""``samullm plan``: make a plan, show it and keep it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from samullm_plugin.cli.options import (
    PlanningGroup,
    RequestsGroup,
    Scheduler,
    Svg,
    Target,
    parsed_options,
    require_folder,
    with_groups,
)
from samullm_plugin.cli.output import OutputJson, console, print_table, write_json

if TYPE_CHECKING:
    from samullm_plugin.model.problem import Problem
    from samullm_plugin.model.result import PlanResult, PlanTrace
    from samullm_plugin.run.charts import Panel


@with_groups
def plan(
    target: Target,
    *,
    scheduler: Scheduler = None,
    option: Annotated[
        list[str] | None, typer.Option(help="Option of the scheduler, as key=value; repeatable.")
    ] = None,
    no_preemption: Annotated[
        bool, typer.Option("--no-preemption", help="Started models keep their plan to their end.")
    ] = False,
    planning: PlanningGroup,
    requests: RequestsGroup,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write the plan to this file.")
    ] = None,
    explain: Annotated[bool, typer.Option(help="Say why each model is where it is.")] = False,
    svg: Svg = None,
    output_json: OutputJson = None,
) -> None:
    """Plan an application: which models run when, on which devices, spread how."""
    from samullm_plugin.host.manager import PluginHost
    from samullm_plugin.planning.applications import find_application
    from samullm_plugin.planning.artifacts import StoredPlan, write_plan
    from samullm_plugin.planning.instances import make_instance
    from samullm_plugin.planning.planner import make_plan
    from samullm_plugin.planning.this_machine import check_here, check_stages
    from samullm_plugin.run.known import known_outputs, known_text

    require_folder(svg, "--svg")
    host = PluginHost.from_settings()
    loaded = find_application(host, target, limit=requests.limit)
    planner = planning.over(loaded.planner)
    chosen = planner.scheduler
    name = scheduler or chosen.type
    options: dict[str, object] = dict(chosen.options) if name == chosen.type else {}
    options |= parsed_options(option)
    if no_preemption:
        options["preemption"] = False
    check_here(host, loaded)
    instance = make_instance(host, loaded, planner, gpus=planning.gpus)
    how = instance.planning_options(host, options)
    part = loaded.executor
    engines = host.create("executor", part.type, part.options)
    check_stages(engines, instance.problem, planner)
    version = engines.engine_version()
    known = known_outputs(requests.reused(), version, loaded, instance.problem)
    problem = instance.problem if known is None else known.problem
    result = make_plan(host, problem, name, how, simulator=instance.simulator(host, problem))
    if (text := known_text(known, problem)) is not None:
        console().print(f"{text}; the plan is for the others", markup=False)
    problem = result.problem
    show_plan(result, explain=explain)
    if output is not None:
        write_plan(output, StoredPlan.of_result(result))
        console().print(f"plan written to {output}", markup=False)
    if svg is not None:
        draw_plans([result], svg)
    if output_json is not None:
        record = plan_json(result)
        if known is not None:
            record["known_requests"] = dict(known.counts)
        write_json(record, output_json)


def panels_of(results: Sequence[PlanResult]) -> list[Panel]:
    """Return a Gantt chart per plan, in its first length scenario."""
    from samullm_plugin.run.charts import Panel, planned_bars

    panels = []
    for r in results:
        trace = r.traces[0]
        title = f"{r.scheduler}: {trace.makespan_s:.1f} s"
        panels.append(Panel(title, planned_bars(trace.segments), trace.makespan_s))
    return panels


def draw_plans(results: Sequence[PlanResult], path: Path) -> None:
    """Write Gantt charts of plans, one above the other, in each plan's first length scenario."""
    from samullm_plugin.run.charts import device_names, gantt_svg
    from samullm_plugin.run.pages import write_page

    svg = gantt_svg(panels_of(results), device_names(results[0].problem.cluster))
    write_page(svg, path, "--svg")
    console().print(f"chart written to {path}", markup=False)


def show_plan(result: PlanResult, *, explain: bool = False) -> None:
    """Print the stage table, the Gantt chart and where the figures come from."""
    import numpy as np

    from samullm_plugin.planning.reporting import (
        idle_lines,
        makespan_band,
        part_lines,
        provenance_lines,
        stage_lines,
        start_lines,
        text_gantt,
    )

    problem, trace = result.problem, result.traces[0]
    rows = []
    for line in stage_lines(result.plan, trace, problem.cluster):
        times = "-" if line.start_s is None else f"{line.start_s:.1f}"
        end = "-" if line.end_s is None else f"{line.end_s:.1f}"
        rows.append((line.stage, line.node, line.parallel, line.devices, times, end, line.end))
    columns = ("stage", "node", "spread", "devices", "start s", "end s", "stage ends when")
    title = f"plan by {result.scheduler}: {problem.app.name} on {problem.cluster.size_text}"
    print_table(columns, rows, title=title, numbers=("stage", "start s", "end s"))
    out = console()
    out.print(text_gantt(trace, problem.cluster), markup=False, soft_wrap=True)
    out.print()
    spread = ""
    if len(result.makespan_s) > 1:
        low, high = float(np.min(result.makespan_s)), float(np.max(result.makespan_s))
        spread = f" ({low:.1f} to {high:.1f} in {len(result.makespan_s)} length scenarios)"
    band = makespan_band(problem, result)
    bands = []
    if band is not None:
        bands = [("With the latencies' errors (s):", f"{band[0]:.1f} to {band[1]:.1f}")]
    facts = [
        ("Makespan, simulated (s):", f"{result.mean_makespan_s:.1f}{spread}"),
        *bands,
        ("Lower bound for these lengths (s):", f"{float(np.mean(result.lower_bound_s)):.1f}"),
        ("Gap (%):", f"{100 * result.gap:.1f}"),
        ("Idle share of device time (%):", f"{100 * trace.idle_share:.1f}"),
        ("Planning time (s):", f"{result.planning_s:.2f}"),
        ("Status:", result.status.value),
    ]
    if result.structure_bound is not None:
        bound = result.structure_bound
        facts.append(("Scheduler's own bound (s):", f"{bound.value_s:.1f}, for {bound.structure}"))
    for label, value in facts:
        out.print(f"{label:<36}{value}", markup=False, soft_wrap=True)
    for text in part_lines(problem.cluster):
        out.print(text, markup=False, style="dim", soft_wrap=True)
    out.print("Iteration latencies come from:", style="dim")
    for text in provenance_lines(problem):
        out.print(f"  {text}", markup=False, style="dim", soft_wrap=True)
    for note in problem.app.notes:
        out.print(f"  assumed: {note}", markup=False, style="dim", soft_wrap=True)
    show_fusion(problem, result.traces[0])
    if idle := idle_lines(problem, result.plan):
        out.print("GPUs that stay idle:", style="dim")
        for text in idle:
            out.print(f"  {text}", markup=False, style="dim", soft_wrap=True)
    if result.request_policy is not None:
        text = f"Request policy, chosen with the plan: {result.request_policy}"
        out.print(text, markup=False, style="dim", soft_wrap=True)
    if explain:
        out.print("Why:")
        for node, text in result.explanation:
            out.print(f"  {node}: {text}", markup=False, soft_wrap=True)
        for note in result.notes:
            out.print(f"  ({note})", markup=False, soft_wrap=True)
        if not result.explanation:
            out.print(f"  {result.scheduler} gives no reasons", markup=False)
        if lines := start_lines(problem):
            out.print("Engine starts:")
        for text in lines:
            out.print(f"  {text}", markup=False, soft_wrap=True)


def show_fusion(problem: Problem, trace: PlanTrace) -> None:
    """Print which of the application's nodes are planned as one, or share engines."""
    from samullm_plugin.planning.reporting import fusion_lines, sharing_lines

    for title, lines in (
        ("Nodes of one model planned as one", fusion_lines(problem.app)),
        ("Engines of nodes of one model", sharing_lines(problem, trace)),
    ):
        out = console()
        if lines:
            out.print(f"{title} (--no-fusion keeps them apart):", style="dim")
        for line in lines:
            out.print(f"  {line}", markup=False, style="dim", soft_wrap=True)


def plan_json(result: PlanResult) -> dict[str, object]:
    """Return a plan and its figures for machines."""
    from samullm_plugin.planning.reporting import (
        idle_lines,
        makespan_band,
        provenance_lines,
        start_lines,
    )

    problem = result.problem
    return {
        "application": problem.app.name,
        "scheduler": result.scheduler,
        "plan": asdict(result.plan),
        "makespan_s": result.makespan_s,
        "makespan_band_s": makespan_band(problem, result),
        "lower_bound_s": result.lower_bound_s,
        "gap": result.gap,
        "status": result.status,
        "structure_bound": None
        if result.structure_bound is None
        else asdict(result.structure_bound),
        "planning_s": result.planning_s,
        "idle_share": [t.idle_share for t in result.traces],
        "segments": [asdict(s) for s in result.traces[0].segments],
        "explanation": dict(result.explanation),
        "notes": result.notes,
        "latency_rests_on": provenance_lines(problem),
        "starts_rest_on": start_lines(problem),
        "assumptions": problem.app.notes,
        "fused": problem.app.fused,
        "cards": problem.cluster.cards_if_shared,
        "idle_gpus": idle_lines(problem, result.plan),
        "request_policy": result.request_policy,
    }
