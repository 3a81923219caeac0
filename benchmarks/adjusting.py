"""What adjusting a plan at run time is worth when lengths or latencies were mis-estimated.

Simulated runs: the plan is made for the planner's own lengths and latencies, and carried out where
something else is true: lengths that the planner estimated at half or at twice their size, or
iterations 1.5 times as long. Three times are compared: with the fixed plan, with planning again
while the run goes on, and with a plan made by one who knew. Every one of these plans is the better
of greedy's and min-heuristic's, so that what is saved is not the difference between schedulers.

    python benchmarks/adjusting.py [--seeds 3] [APPLICATION ...]
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace

import numpy as np

from samullm_plugin.core.engine import StepLatency
from samullm_plugin.core.plan import Plan
from samullm_plugin.core.problem import Problem
from samullm_plugin.io.spec import Component, PlannerSection
from samullm_plugin.manager import PluginHost
from samullm_plugin.services.applications import build_named
from samullm_plugin.services.building import sample_scenarios
from samullm_plugin.services.instances import Instance, make_instance
from samullm_plugin.services.planning import make_plan
from samullm_plugin.services.running.adjusting import Replanner
from samullm_plugin.services.running.imitation import run_imitated

APPLICATIONS = (
    "ensembling:requests=1000,max_tokens=256",
    "routing",
    "chain-summary:documents=100,judges=4",
    "mixed:documents=100,judges=4,requests=1000",
)
WORLDS = {
    "as estimated": (1.0, 1.0),
    "lengths estimated at 0.5x": (2.0, 1.0),
    "lengths estimated at 2x": (0.5, 1.0),
    "latencies 1.5x": (1.0, 1.5),
}
"""By name, the true lengths and the true iteration latencies, as factors of the estimates."""


def true_problem(host: PluginHost, instance: Instance, name: str, seed: int) -> Problem:
    """Return the problem with one draw of what is true."""
    lengths, latencies = WORLDS[name]
    estimator = host.create("length-estimator", "ecdf", {"scale": lengths})
    rng = np.random.default_rng([seed, 5])
    scenario = sample_scenarios(instance.problem.app, estimator, rng, 1)
    costs = tuple(
        {
            key: replace(mode, latency=mode.latency.scaled(latencies))
            for key, mode in modes.items()
            if isinstance(mode.latency, StepLatency)
        }
        for modes in instance.problem.costs
    )
    problem = instance.problem
    return Problem(problem.app, problem.cluster, scenario, costs, problem.page_cache)


def best_plan(host: PluginHost, problem: Problem) -> Plan:
    """Return the better of both schedulers' plans."""
    results = [make_plan(host, problem, name) for name in ("greedy", "min-heuristic")]
    return min(results, key=lambda r: r.mean_makespan_s).plan


def measure(host: PluginHost, text: str, seeds: int) -> None:
    """Print one row per world."""
    loaded = build_named(host, text)
    planner = PlannerSection(scheduler=Component(type="greedy"), scenarios=1)
    instance = make_instance(host, replace(loaded, output_tokens=None), planner)
    plan = best_plan(host, instance.problem)
    for name in WORLDS:
        rows, adopted, planning = [], 0, []
        for seed in range(seeds):
            truth = true_problem(host, instance, name, seed)
            perfect = best_plan(host, truth)
            adjusting = Replanner(host, instance)
            row = []
            for chosen, how in ((plan, None), (plan, adjusting), (perfect, None)):
                executor = host.create("executor", "simulated")
                done = run_imitated(instance.problem, chosen, executor, truth, adjustments=how)
                row.append(max(float(f.max()) for f in done.ledger.finish_s))
            rows.append(row)
            adopted += sum(p.plan is not None for p in adjusting.proposals)
            planning += [p.planning_s for p in adjusting.proposals]
        fixed, again, known = np.mean(rows, axis=0)
        closed = (fixed - again) / (fixed - known) if fixed - known > 0.01 * fixed else np.nan
        print(
            f"| {text} | {name} | {fixed:.0f} | {again:.0f} | {known:.0f} | "
            f"{100 * (1 - again / fixed):+.1f} % | "
            f"{'-' if np.isnan(closed) else f'{100 * closed:.0f} %'} | "
            f"{adopted / seeds:.1f} of {len(planning) / seeds:.1f} | "
            f"{np.median(planning) if planning else 0:.2f} | "
            f"{max(planning, default=0):.2f} |",
            flush=True,
        )


def main() -> None:
    """Run the experiment and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("applications", nargs="*", default=APPLICATIONS)
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    host = PluginHost.from_settings()
    print(
        "| application | world | fixed plan s | planned again s | known s | saved | gap closed | "
        "plans adopted | planning median s | max s |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    started = time.perf_counter()
    for text in arguments.applications:
        measure(host, text, arguments.seeds)
    print(f"\n{arguments.seeds} draws each, {time.perf_counter() - started:.0f} s in all")


if __name__ == "__main__":
    main()
