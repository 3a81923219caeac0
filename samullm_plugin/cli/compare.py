"""``samullm compare``: several schedulers' plans for one application, side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from samullm_plugin.cli.options import PlanningGroup, Svg, Target, require_folder, with_groups
from samullm_plugin.cli.output import OutputJson, console, percent, print_table, seconds, write_json
from samullm_plugin.cli.plan import draw_plans, panels_of, plan_json, show_fusion
from samullm_plugin.errors import InputError, SamullmError


@with_groups
def compare(
    target: Target,
    *,
    schedulers: Annotated[
        str, typer.Option(help="Stage schedulers, comma separated.")
    ] = "greedy,exact,auto,max-heuristic,min-heuristic",
    planning: PlanningGroup,
    gantt: Annotated[bool, typer.Option(help="Draw each plan.")] = True,
    svg: Svg = None,
    html: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write tables and charts as one page.")
    ] = None,
    output_json: OutputJson = None,
) -> None:
    """Plan with several schedulers; show where the plans differ and what that costs."""
    from samullm_plugin.host.manager import PluginHost
    from samullm_plugin.planning.applications import find_application
    from samullm_plugin.planning.instances import make_instance
    from samullm_plugin.planning.planner import make_plan
    from samullm_plugin.planning.reporting import differences, text_gantt
    from samullm_plugin.run.pages import Table

    require_folder(svg, "--svg")
    require_folder(html, "--html")
    host = PluginHost.from_settings()
    names = list(dict.fromkeys(s.strip() for s in schedulers.split(",") if s.strip()))
    if not names:
        raise InputError("--schedulers is empty; write for example greedy,exact")
    for name in names:
        host.resolve("scheduler", name)
    loaded = find_application(host, target)
    planner = planning.over(loaded.planner)
    instance = make_instance(host, loaded, planner, gpus=planning.gpus)
    problem = instance.problem
    results, failed = [], {}
    for name in names:
        how = instance.planning_options(host)
        try:
            simulator = instance.simulator(host)  # each its own: planning times are compared
            results.append(make_plan(host, problem, name, how, simulator=simulator))
        except SamullmError as error:
            failed[name] = str(error)
    out = console()
    for name, reason in failed.items():
        out.print(f"{name}: no plan: {reason}", markup=False, soft_wrap=True)
    if not results:
        raise SamullmError(f"none of {', '.join(names)} made a plan")
    best = min(results, key=lambda r: r.mean_makespan_s)
    rows = [
        (
            r.scheduler,
            r.status.value,
            seconds(r.mean_makespan_s),
            f"+{100 * (r.mean_makespan_s / best.mean_makespan_s - 1):.1f} %",
            percent(r.gap),
            seconds(r.planning_s),
            percent(r.traces[0].idle_share),
            len(r.plan.stages),
        )
        for r in sorted(results, key=lambda r: r.mean_makespan_s)
    ]
    numbers = ("makespan s", "over best", "gap", "planning s", "idle", "stages")
    title = f"{problem.app.name} on {problem.cluster.size_text}"
    print_table(("scheduler", "status", *numbers), rows, title=title, numbers=numbers)
    chosen = [
        f"{r.scheduler}: with request policy {r.request_policy}"
        for r in results
        if r.request_policy is not None
    ]
    for text in chosen:
        out.print(text, markup=False)
    tables = [Table(None, ("scheduler", "status", *numbers), rows, numbers)]
    compared = {}
    for r in results:
        if r is best:
            continue
        found = differences(best, r)
        compared[r.scheduler] = found
        table = [
            (
                d.node,
                d.first,
                d.second,
                f"{d.second_device_s - d.first_device_s:+,.0f}",
            )
            for d in found
        ]
        if table:
            columns = ("node", best.scheduler, r.scheduler, "device s more")
            heading = f"where {r.scheduler} differs from {best.scheduler}"
            print_table(columns, table, title=heading, numbers=columns[3:])
            tables.append(Table(heading, columns, table, columns[3:]))
        else:
            out.print(f"{r.scheduler} runs every node as {best.scheduler} does\n", markup=False)
    show_fusion(best.problem, best.traces[0])
    if gantt:
        for r in results:
            out.print(f"{r.scheduler}, {r.mean_makespan_s:.1f} s", markup=False)
            chart = text_gantt(r.traces[0], problem.cluster)
            out.print(chart + "\n", markup=False, soft_wrap=True)
    if svg is not None:
        draw_plans(results, svg)
    if html is not None:
        from samullm_plugin.planning.reporting import provenance_lines
        from samullm_plugin.run.charts import device_names
        from samullm_plugin.run.pages import write_tables

        notes = [*chosen, *provenance_lines(problem), *problem.app.notes]
        notes += [f"{name}: no plan: {reason}" for name, reason in failed.items()]
        panels, labels = panels_of(results), device_names(problem.cluster)
        subtitle = "Predicted makespans of plans by several schedulers; charts: first scenario."
        write_tables(html, title, subtitle, tables, panels, labels, notes)
        out.print(f"page written to {html}", markup=False)
    if output_json is not None:
        write_json(
            {
                "plans": [plan_json(r) for r in results],
                "failed": failed,
                "differences_from_best": compared,
                "best": best.scheduler,
            },
            output_json,
        )
