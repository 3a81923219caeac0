"""How far plans are from the optimum, and what it costs that lengths are unknown.

Run from the repository root::

    python benchmarks/plan_quality.py gaps [--schedulers auto,greedy] [--only NAME]
    python benchmarks/plan_quality.py lengths [APPLICATION ...] [--seeds 30] [--gpus 8]
    python benchmarks/plan_quality.py chains [--schedulers auto,greedy] [--gpus 8]
    python benchmarks/plan_quality.py prepared [APPLICATION ...] [--schedulers auto,greedy]
    python benchmarks/plan_quality.py isolated [APPLICATION ...] [--gpus 8]

``gaps`` plans the problems behind the instances of ``tests/instances``. ``lengths`` compares plans
that were made with one, several and the true length scenarios, and carries them out on the same
hidden lengths, of the planner's own distribution and of others. ``chains`` compares chains of one
model written as one node and as one node per step. ``prepared`` plans with and without engine
starts that are prepared ahead, and carries both plans out on the same hidden lengths; ``isolated``
does so with plans of auto that may and may not choose a request policy. What each option of the
plan space saves, alone and with all others, is in ``plan_space.py``.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from samullm_cpsat.durations import measure
from samullm_cpsat.instance import Instance
from stored_instances import TARGET, TICKS, Recipe, build, size_class

from samullm_plugin import Application, Problem
from samullm_plugin.bench.cases import CaseSettings, make_case
from samullm_plugin.bench.rows import warm_up
from samullm_plugin.host.manager import PluginHost
from samullm_plugin.model.requests import RequestTable
from samullm_plugin.model.scenarios import LengthScenario
from samullm_plugin.model.types import Floats, Ints
from samullm_plugin.planning.planner import PlanningOptions, make_plan
from samullm_plugin.planning.policies import policy_call
from samullm_plugin.rules.fusion import fuse_chains
from samullm_plugin.simulator import PlanSimulator

Gaps = list[tuple[str, str, float, float, float]]
"""Size class, instance, and gap to the best simulated plan, to the optimum of the structure without
switching, and to the lower bound."""

PARTS = ("gaps", "lengths", "chains", "prepared", "isolated")

APPLICATIONS = (
    "ensembling:requests=1000,max_tokens=256",
    "routing:known=false",
    "chain-summary:documents=100,judges=4",
    "mixed:documents=100,requests=5000",
)


def stored_problem(file: Path, host: PluginHost) -> tuple[Instance, Problem]:
    """Return a stored instance and the problem behind it, made again by its recipe."""
    data = json.loads(file.read_text(encoding="utf-8"))
    return Instance.from_json(data["instance"]), build(Recipe.of(data["recipe"]), host)


def gaps(host: PluginHost, schedulers: Sequence[str], only: str) -> None:
    """Print the distribution of gaps of simulated makespans, planning not included.

    ``best`` is the best of all of them and of exact.
    """
    warm_up(host, (*schedulers, "exact"))
    found: dict[str, Gaps] = {s: [] for s in (*schedulers, "best")}
    for file in sorted(TARGET.glob("*.json")):
        if not any(word in file.stem for word in only.split(",")):
            continue
        instance, problem = stored_problem(file, host)
        simulator = PlanSimulator(problem)
        measured = measure(problem, simulator, TICKS).instance
        exact = make_plan(host, problem, "exact", simulator=simulator)
        known = exact.structure_bound  # none where it saw aggregated requests
        optimum_s = float("nan") if known is None else known.value_s
        values = {
            s: float(make_plan(host, problem, s, simulator=PlanSimulator(problem)).makespan_s[0])
            for s in schedulers
        }
        best_s = min(float(exact.makespan_s[0]), *values.values())
        bound_s = float(simulator.lower_bounds_s()[0])
        changed = "" if measured.tasks == instance.tasks else "  (durations have changed since)"
        for s, value in values.items():
            row = (value / best_s - 1, value / optimum_s - 1, value / bound_s - 1)
            found[s].append((size_class(instance), file.stem, *row))
        row = (0.0, best_s / optimum_s - 1, best_s / bound_s - 1)
        found["best"].append((size_class(instance), file.stem, *row))
        shown = ", ".join(f"{s} {v:.1f}" for s, v in values.items())
        print(f"{file.stem}: exact {exact.makespan_s[0]:.1f}, {shown}{changed}", flush=True)
    for which, title in enumerate(
        ("best simulated plan known", "bound on plans without switching", "lower bound"), start=2
    ):
        print(f"\nGap to the {title}, %: mean, median, 90th percentile, worst\n")
        print("| size | instances | " + " | ".join(found) + " |")
        print("|---|--:|" + "--:|" * len(found))
        sizes = sorted({row[0] for row in found["best"]})
        for size in (*sizes, "all"):
            cells = []
            for rows in found.values():
                part = 100 * np.array([r[which] for r in rows if size in (r[0], "all")])
                part = part[np.isfinite(part)]
                figures = part.mean(), np.median(part), np.percentile(part, 90), part.max()
                cells.append(", ".join(f"{f:.1f}" for f in figures))
            count = len([r for r in found["best"] if size in (r[0], "all")])
            print(f"| {size} | {count} | " + " | ".join(cells) + " |")
    for s in schedulers:
        worst = sorted(found[s], key=lambda r: -r[2])[:3]
        print(f"\n{s}, worst: " + "; ".join(f"{r[1]} {100 * r[2]:.1f} %" for r in worst))


def lengths(host: PluginHost, names: Sequence[str], seeds: int, gpus: int, scheduler: str) -> None:
    """Print realised makespans of plans by what the planner knew, paired over the hidden draws."""
    warm_up(host, (scheduler,))
    print(
        f"Plans of {scheduler}, {gpus} GPUs: mean makespan and 95th percentile over {seeds} hidden "
        "draws, seconds, planning not included; in brackets the mean of the paired differences "
        "from the plan for one scenario and its standard error.\n"
    )
    kinds = ("1", "4", "8", "true")
    print("| application | hidden lengths | " + " | ".join(kinds) + " |")
    print("|---|---|" + "--:|" * len(kinds))
    for text in names:
        given = CaseSettings(scenarios=8, seeds=seeds, gpus=gpus)
        case = make_case(host, text, given)
        plans = {}
        for count in (1, 4, 8):
            seen = case.problem.with_scenarios(case.problem.scenarios[:count])
            plans[str(count)] = make_plan(host, seen, scheduler).plan
        for hidden in case.hidden:
            simulator = PlanSimulator(hidden.problem)
            realised = {
                k: np.array([t.makespan_s for t in simulator.simulate(plan)])
                for k, plan in plans.items()
            }
            realised["true"] = np.array(
                [
                    make_plan(host, hidden.problem.with_scenarios((s,)), scheduler).makespan_s[0]
                    for s in hidden.problem.scenarios
                ]
            )
            cells = []
            for k in kinds:
                ratio = 100 * (realised[k] / realised["1"] - 1)
                error = ratio.std(ddof=1) / np.sqrt(len(ratio))
                cell = f"{realised[k].mean():,.1f}, {np.percentile(realised[k], 95):,.1f}"
                cells.append(cell + ("" if k == "1" else f" ({ratio.mean():+.2f} ± {error:.2f} %)"))
            print(f"| `{text}` | {hidden.label} | " + " | ".join(cells) + " |", flush=True)


def by_step(problem: Problem, node: int) -> Problem:
    """Return the problem with a node's chains written as one node per step.

    Args:
        problem: the problem; it has one length scenario.
        node: a node of chains whose requests wait for others of it.
    """
    table = problem.app.nodes[node].requests
    step = np.zeros(len(table), np.int64)
    for r in range(len(table)):
        entries = range(table.input_indptr[r], table.input_indptr[r + 1])
        own = [int(table.input_request[e]) for e in entries if table.input_node[e] == node]
        step[r] = max((step[q] + 1 for q in own), default=0)
    steps = int(step.max()) + 1
    place = np.zeros(len(table), np.int64)
    for k in range(steps):
        place[step == k] = np.arange(np.count_nonzero(step == k))
    nodes, costs, prompts, outputs = [], [], [], []
    scenario = problem.scenarios[0]
    for i, old in enumerate(problem.app.nodes):
        for k in range(steps if i == node else 1):
            rows = np.flatnonzero(step == k) if i == node else np.arange(len(old.requests))
            name = f"{old.name}-{k}" if i == node else old.name
            requests = taken_rows(old.requests, rows, node, steps, step, place)
            nodes.append(replace(old, name=name, requests=requests))
            costs.append(problem.costs[i])
            prompts.append(scenario.prompt_tokens[i][rows])
            outputs.append(scenario.output_tokens[i][rows])
    app = Application(f"{problem.app.name}, one node per step", tuple(nodes), problem.app.notes)
    lengths = LengthScenario(tuple(prompts), tuple(outputs))
    return Problem(app, problem.cluster, (lengths,), tuple(costs), problem.page_cache)


def taken_rows(
    table: RequestTable, rows: Ints, node: int, steps: int, step: Ints, place: Ints
) -> RequestTable:
    """Return some rows of a table, their inputs renumbered for :func:`by_step`."""
    begins, ends = table.input_indptr[rows], table.input_indptr[rows + 1]
    entries = np.concatenate(
        [np.zeros(0, np.int64), *(np.arange(b, e) for b, e in zip(begins, ends, strict=True))]
    ).astype(np.int64)
    of, request = table.input_node[entries], table.input_request[entries]
    moved = of == node
    to_step = node + step[np.where(moved, request, 0)]
    columns = {
        name: value[rows] if len(value) == len(table) else value
        for name in RequestTable.__dataclass_fields__
        if (value := getattr(table, name)) is not None and not name.startswith("input_")
    }
    return RequestTable(
        **columns,
        input_indptr=np.concatenate([[0], np.cumsum(ends - begins)]),
        input_node=np.where(moved, to_step, of + np.where(of > node, steps - 1, 0)),
        input_request=np.where(moved, place[np.where(moved, request, 0)], request),
        input_in_prompt=table.input_in_prompt[entries],
    )


def chains(host: PluginHost, gpus: int, schedulers: Sequence[str]) -> None:
    """Print what a chain costs that is written as one node per step, and once it is fused."""
    warm_up(host, schedulers)
    print("| application | scheduler | as bundled | one node per step | fused again |")
    print("|---|---|--:|--:|--:|")
    for text in ("chain-summary:documents=100,judges=1", "chain-summary:documents=100,judges=4"):
        given = CaseSettings(seeds=0, shifts=(), gpus=gpus)
        bundled = make_case(host, text, given).problem
        apart = by_step(bundled, 0)
        fused = fuse_chains(apart.app, gpus)
        lengths = apart.scenarios[0]
        again = Problem(
            fused.app,
            apart.cluster,
            (
                LengthScenario(
                    fused.joined(lengths.prompt_tokens), fused.joined(lengths.output_tokens)
                ),
            ),
            tuple(apart.costs[fused.node.index(i)] for i in range(len(fused.app.nodes))),
            apart.page_cache,
        )
        for s in schedulers:
            values = [make_plan(host, p, s).makespan_s[0] for p in (bundled, apart, again)]
            label = f"{text}`, {len(apart.app.nodes)} nodes by step"
            print(
                f"| `{label} | {s} | " + " | ".join(f"{v:,.1f}" for v in values) + " |", flush=True
            )


def prepared(
    host: PluginHost, names: Sequence[str], seeds: int, gpus: int, schedulers: Sequence[str]
) -> None:
    """Print what starts that are prepared ahead save, paired over the hidden draws."""
    warm_up(host, schedulers)
    print("| application | scheduler | without, s | with, s | paired difference | worst draw |")
    print("|---|---|--:|--:|--:|--:|")
    for text in names:
        for s in schedulers:
            realised = []
            for ahead in (False, True):
                count = 4 if s == "auto" else 1
                given = CaseSettings(
                    scenarios=count, seeds=seeds, shifts=(), gpus=gpus, prepared_starts=ahead
                )
                case = make_case(host, text, given)
                plan = make_plan(host, case.problem, s).plan
                hidden = next(h for h in case.hidden if h.label == "same").problem
                traces = PlanSimulator(hidden).simulate(plan)
                realised.append(np.array([t.makespan_s for t in traces]))
            print(f"| `{text}` | {s} | {_paired(*realised)} |", flush=True)


def _paired(without_s: Floats, with_s: Floats) -> str:
    """Return mean makespans, and their paired difference with its standard error and the worst."""
    ratio = 100 * (with_s / without_s - 1)
    error = ratio.std(ddof=1) / np.sqrt(len(ratio))
    return (
        f"{without_s.mean():,.1f} | {with_s.mean():,.1f} | {ratio.mean():+.2f} ± {error:.2f} % "
        f"| {ratio.max():+.1f} %"
    )


def isolated(host: PluginHost, names: Sequence[str], seeds: int, gpus: int) -> None:
    """Print what a request policy chosen with the plan saves, paired over the hidden draws.

    As in a run the policy is told lengths that the planner drew.
    """
    warm_up(host, ("auto",))
    print("| application, GPUs | chosen | without, s | with, s | paired difference | worst draw |")
    print("|---|---|--:|--:|--:|--:|")
    for text in names:
        case = make_case(host, text, CaseSettings(scenarios=4, seeds=seeds, shifts=(), gpus=gpus))
        hidden = next(h for h in case.hidden if h.label == "same").problem
        realised, chosen = [], None
        for offered in ((), ("isolate-longest",)):
            found = make_plan(host, case.problem, "auto", PlanningOptions(policies=offered))
            chosen, call = found.request_policy, None
            if chosen is not None:
                told = [case.problem.scenarios[0]] * len(hidden.scenarios)
                call = policy_call(hidden.app, host.create("request-policy", chosen), told)
            traces = PlanSimulator(hidden, policy=call).simulate(found.plan)
            realised.append(np.array([t.makespan_s for t in traces]))
        print(f"| `{text}`, {gpus} | {chosen or 'none'} | {_paired(*realised)} |", flush=True)


def main() -> None:
    """Measure one part."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("applications", nargs="*", default=APPLICATIONS)
    parser.add_argument("--schedulers", default="auto,greedy")
    parser.add_argument("--only", default="", help="instances whose names contain one of")
    parser.add_argument("--seeds", type=int, default=30)
    parser.add_argument("--gpus", type=int, default=8)
    given = parser.parse_intermixed_args()
    host, schedulers = PluginHost(), given.schedulers.split(",")
    if given.part == "gaps":
        gaps(host, schedulers, given.only)
    elif given.part == "chains":
        chains(host, given.gpus, schedulers)
    elif given.part == "prepared":
        prepared(host, given.applications, given.seeds, given.gpus, schedulers)
    elif given.part == "isolated":
        isolated(host, given.applications, given.seeds, given.gpus)
    else:
        lengths(host, given.applications, given.seeds, given.gpus, schedulers[0])


if __name__ == "__main__":
    main()
