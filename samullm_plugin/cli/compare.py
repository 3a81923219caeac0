"""``samullm compare``: several schedulers' plans for one application, side by side."""

from __future__ import annotations

from typing import Annotated

import typer

from samullm_plugin.cli.bench_tables import percent, seconds
from samullm_plugin.cli.output import OutputJson, console, print_table, write_json
from samullm_plugin.cli.plan import (
    Budget,
    Gpus,
    NoFusion,
    NoPreparedStarts,
    Scenarios,
    Seed,
    Svg,
    Target,
    draw_plans,
    overridden,
    plan_json,
    require_svg,
    show_fusion,
)
from samullm_plugin.errors import InputError, SamullmError


def compare(
    target: Target,
    schedulers: Annotated[
        str, typer.Option(help="Stage schedulers, comma separated.")
    ] = "greedy,exact,auto,max-heuristic,min-heuristic",
    gpus: Gpus = None,
    scenarios: Scenarios = None,
    seed: Seed = None,
    budget: Budget = None,
    no_fusion: NoFusion = False,
    no_prepared_starts: NoPreparedStarts = False,
    gantt: Annotated[bool, typer.Option(help="Draw each plan.")] = True,
    svg: Svg = None,
    output_json: OutputJson = None,
) -> None:
    """Plan with several schedulers; show where the plans differ and what that costs."""
    from samullm_plugin.host.manager import PluginHost
    from samullm_plugin.planning.applications import find_application
    from samullm_plugin.planning.gantt import text_gantt
    from samullm_plugin.planning.instances import make_instance
    from samullm_plugin.planning.planner import PlanningOptions, make_plan
    from samullm_plugin.planning.reporting import differences

    if svg is not None:
        require_svg(svg)
    host = PluginHost.from_settings()
    names = list(dict.fromkeys(s.strip() for s in schedulers.split(",") if s.strip()))
    if not names:
        raise InputError("--schedulers is empty; write for example greedy,exact")
    for name in names:
        host.resolve("scheduler", name)
    loaded = find_application(host, target)
    planner = overridden(
        loaded.planner,
        scenarios,
        seed,
        budget,
        no_fusion=no_fusion,
        no_prepared_starts=no_prepared_starts,
    )
    instance = make_instance(host, loaded, planner, gpus=gpus)
    problem = instance.problem
    results, failed = [], {}
    for name in names:
        how = PlanningOptions(seed=planner.seed, budget_s=planner.budget_s)
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
    title = f"{problem.app.name} on {problem.cluster.num_gpus} GPUs"
    print_table(("scheduler", "status", *numbers), rows, title=title, numbers=numbers)
    compared = {}
    for r in results:
        if r is best:
            continue
        found = differences(problem, best, r)
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
            print_table(
                ("node", best.scheduler, r.scheduler, "device s more"),
                table,
                title=f"where {r.scheduler} differs from {best.scheduler}",
                numbers=("device s more",),
            )
        else:
            out.print(f"{r.scheduler} runs every node as {best.scheduler} does\n", markup=False)
    show_fusion(problem)
    if gantt:
        for r in results:
            out.print(f"{r.scheduler}, {r.mean_makespan_s:.1f} s", markup=False)
            chart = text_gantt(r.traces[0], problem.cluster.num_gpus)
            out.print(chart + "\n", markup=False, soft_wrap=True)
    if svg is not None:
        draw_plans(problem, results, svg)
    if output_json is not None:
        write_json(
            {
                "plans": [plan_json(problem, r) for r in results],
                "failed": failed,
                "differences_from_best": compared,
                "best": best.scheduler,
            },
            output_json,
        )
