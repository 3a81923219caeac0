"""``samullm bench policies``: request policies on bundled applications."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from samullm_plugin.cli.output import OutputJson, console, print_table, progress, write_json
from samullm_plugin.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from samullm_plugin.bench.policy_bench import PolicyRow

POLICIES = "fcfs shortest-first longest-first multi-bin prefix-affinity program-age isolate-longest"
APPS = (
    "ensembling:requests=2000,max_tokens=512,gpus=4 document-questions "
    "chain-summary:documents=100,judges=4,gpus=4 map-reduce:gpus=4 vote:gpus=4"
)


def policies(
    apps: Annotated[
        str, typer.Option(help="Bundled applications with options, separated by spaces.")
    ] = APPS,
    policies: Annotated[
        str,
        typer.Option(
            help="Request policies with options, separated by spaces; others are compared with "
            "the first: 'fcfs multi-bin:bins=8'."
        ),
    ] = POLICIES,
    gpus: Annotated[
        int | None, typer.Option(help="GPUs, instead of each application's own.", min=1)
    ] = None,
    noise: Annotated[
        float,
        typer.Option(help="Standard deviation of the logarithm of noisy predictions.", min=0.0),
    ] = 0.5,
    draws: Annotated[int, typer.Option(help="Draws of true lengths.", min=1)] = 3,
    scheduler: Annotated[str, typer.Option(help="Who plans; all policies get its plan.")] = (
        "greedy"
    ),
    length_estimator: Annotated[str, typer.Option(help="Where lengths come from.")] = "ecdf",
    latency_model: Annotated[str, typer.Option(help="Where latencies come from.")] = "linear",
    seed: Annotated[int, typer.Option(help="Seed of everything.", min=0)] = 0,
    output_json: OutputJson = None,
) -> None:
    """Compare request policies: makespan and mean completion under one plan.

    Each policy orders and spreads the requests of the same plan, told the true lengths, the true
    lengths with noise, or lengths drawn independently of them.
    """
    from samullm_plugin.bench import cases as bench_cases
    from samullm_plugin.bench import policy_bench
    from samullm_plugin.errors import PluginError
    from samullm_plugin.host.manager import PluginHost
    from samullm_plugin.planning.applications import parse_named
    from samullm_plugin.planning.planner import PlanningOptions, make_plan

    host = PluginHost.from_settings()
    names = list(dict.fromkeys(policies.split()))
    if not names:
        raise InputError("--policies is empty; write for example 'fcfs shortest-first'")
    for name in names:
        bare, options = parse_named(name)
        host.check_options("request-policy", bare, options)
    texts = apps.split()
    if not texts:
        raise InputError("--apps is empty; write for example 'document-questions'")
    settings = bench_cases.CaseSettings(
        scenarios=draws,
        seeds=0,
        shifts=(),
        seed=seed,
        estimator=length_estimator,
        latency_model=latency_model,
        gpus=gpus,
    )
    rows: list[PolicyRow] = []
    failed: dict[str, str] = {}
    with progress("bench policies", len(texts) * len(names)) as step:
        for text in texts:
            problem = bench_cases.make_case(host, text, settings).problem
            plan = make_plan(host, problem, scheduler, PlanningOptions(seed=seed)).plan
            believed = {
                kind: policy_bench.predictions(
                    host, problem, kind, estimator=length_estimator, noise=noise, seed=seed
                )
                for kind in policy_bench.PREDICTIONS
            }
            found: list[PolicyRow] = []
            for name in names:
                step(f"{text} {name}")
                try:
                    found += policy_bench.compare_policies(
                        host, text, problem, plan, [name], believed
                    )
                except PluginError as error:  # the others' rows still appear
                    failed[name] = str(error)
            rows += found
            _show(text, found)
    for name, reason in failed.items():
        console().print(f"{name}: {reason}", markup=False, soft_wrap=True)
    console().print(
        "seconds until the last request, until requests and until programs (requests that wait for "
        "each other) finish on average; in brackets against the first policy. exact: told the true "
        f"lengths; noisy: times log-normal noise of {noise:g}; drawn: told lengths drawn "
        "independently. All times are simulated.",
        style="dim",
    )
    if output_json is not None:
        write_json({"rows": [asdict(r) for r in rows], "failed": failed}, output_json)
    if failed:
        raise typer.Exit(1)


def _show(text: str, rows: Sequence[PolicyRow]) -> None:
    """Print one application's table."""
    first = {r.prediction: r for r in rows if r.policy == rows[0].policy}
    table = []
    for r in rows:
        base = first[r.prediction]
        if r.policy == base.policy and r.prediction != "exact":
            continue  # the reference is shown once
        table.append(
            (
                r.policy,
                r.prediction,
                against(r.makespan_s, base.makespan_s),
                against(r.request_s, base.request_s),
                against(r.program_s, base.program_s),
                f"{r.preemptions:.0f}",
            )
        )
    numbers = ("makespan s", "mean request s", "mean program s", "preemptions")
    print_table(("policy", "told", *numbers), table, title=text, numbers=numbers)


def against(value: float, base: float) -> str:
    """Return seconds and how they compare."""
    return f"{value:.1f} ({100 * (value / base - 1):+.1f} %)"
