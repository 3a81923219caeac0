"""The stored scheduling instances: how they are derived, and how much ``exact`` proves on them.

Run from the repository root::

    python benchmarks/stored_instances.py solve [--time-limit 30] [--structure segments]
    python benchmarks/stored_instances.py derive [--time-limit 60] [--only NAME] [--missing]

``solve`` solves every instance of ``tests/instances`` again and compares with what is stored there.
``derive`` makes them: each is a bundled application, or some of its nodes, with fewer requests, or
one of the shapes of ``instance_shapes.py``, on 2 to 8 GPUs, with lengths of one draw. Its file
holds the scheduling instance (modes with their durations in ticks, what waits for what, groups of
devices), the recipe by which :func:`build` makes the whole problem again, and for each structure
the optimum or the best bound that is known. Requests and latencies are not stored.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from instance_shapes import CLUSTERS, shaped
from samullm_cpsat.durations import measure
from samullm_cpsat.instance import Instance
from samullm_cpsat.options import ExactOptions
from samullm_cpsat.planning import ExactResult, solve_instance

from samullm_plugin.bench.cases import bundled_cluster
from samullm_plugin.host.manager import PluginHost
from samullm_plugin.model.application import Application
from samullm_plugin.model.problem import Problem
from samullm_plugin.model.requests import RequestTable
from samullm_plugin.planning.applications import parse_named
from samullm_plugin.planning.building import build_problem
from samullm_plugin.simulator import PlanSimulator

TARGET = Path(__file__).parents[1] / "tests" / "instances"
TICKS = 20_000


@dataclass(frozen=True)
class Recipe:
    """How an instance is made.

    Attributes:
        application: a bundled application with its options, or ``shape:`` and those of ``shaped``.
        gpus: GPUs of the cluster.
        nodes: which of its nodes, in their order; None for all. Others' outputs must not be needed.
        seed: of the output lengths.
        cluster: what GPUs a shape has, see ``instance_shapes.CLUSTERS``.
    """

    application: str
    gpus: int
    nodes: tuple[int, ...] | None = None
    seed: int = 0
    cluster: str = "pairs"

    @classmethod
    def of(cls, stored: Mapping[str, Any]) -> Recipe:
        """Return the recipe in an instance's file."""
        nodes = stored["nodes"]
        return cls(**{**stored, "nodes": None if nodes is None else tuple(nodes)})


def recipes() -> Iterator[tuple[str, Recipe]]:
    """Yield the names and recipes of all instances."""
    yield from bundled_recipes()
    yield from shape_recipes()


def shape_recipes() -> Iterator[tuple[str, Recipe]]:
    """Yield those of shapes that no bundled application has."""

    def recipe(
        name: str, text: str, nodes: int, gpus: int, cluster: str = "pairs"
    ) -> tuple[str, Recipe]:
        asked = Recipe(f"shape:shape={text},nodes={nodes}", gpus, None, nodes, cluster)
        return f"{name}-{nodes}", asked

    for gpus in (4, 8):
        for nodes in range(3, 9):
            yield recipe("pipeline", "pipeline,requests=200", nodes, gpus)
        for nodes in (4, 5, 6, 8):
            yield recipe("diamond", "diamond,requests=200", nodes, gpus)
        yield recipe("kinds-pipeline", "pipeline,requests=300", 4, gpus, "two-kinds")
        yield recipe("kinds-fan", "fan,requests=1000", gpus // 2 + 2, gpus, "two-kinds")
        yield recipe("machines-pipeline", "pipeline,requests=300", 5, gpus, "two-machines")
        yield recipe("machines-fan", "fan,requests=1000", 6, gpus, "two-machines")
    yield recipe("kinds-diamond", "diamond,requests=300", 5, 8, "two-kinds")
    for nodes, gpus in ((4, 2), (6, 4), (8, 8)):
        yield recipe("equal", "fan,requests=500,equal=true", nodes, gpus)
    for text, nodes, gpus in (("fan", 3, 4), ("fan", 5, 8), ("pipeline", 4, 4)):
        yield recipe(f"long-{text}", f"{text},requests=300,longest=1500", nodes, gpus)


def bundled_recipes() -> Iterator[tuple[str, Recipe]]:
    """Yield those of bundled applications."""
    for gpus in (2, 4, 8):
        for models in (2, 3, 4, 6, 9):
            for requests, limit in ((200, 256), (2000, 512)):
                if (gpus, models) == (2, 9):
                    continue
                text = f"ensembling:requests={requests},max_tokens={limit},models={models}"
                yield f"ensembling-{models}x{requests}", Recipe(text, gpus)
    for gpus in (2, 4, 8):
        for nodes in ((2, 3, 4), (1, 2, 3, 4)):
            text = "routing:share=0.25,max_tokens=1024"
            yield f"routing-{len(nodes)}", Recipe(text, gpus, nodes)
    yield "routing-5", Recipe("routing:max_tokens=4096", 8)
    yield "routing-known-5", Recipe("routing:known=true", 8)
    for gpus in (4, 8):
        for documents, judges, summariser in ((20, 2, "vicuna"), (60, 4, "mixtral")):
            text = f"chain-summary:documents={documents},judges={judges},summariser={summariser}"
            yield f"chain-{summariser}-{documents}x{judges}", Recipe(text, gpus)
        yield "map-reduce-80", Recipe("map-reduce:documents=80", gpus)
        yield "vote-600", Recipe("vote:requests=600", gpus)
        yield "filter-vote-800", Recipe("filter-vote:requests=800", gpus)
        mixed = "mixed:documents=40,judges=2,requests=1000"
        for nodes in ((0, 1, 2), (0, 1, 3, 6), (0, 1, 2, 4, 5, 9), (0, 1, 2, 3, 4, 6, 7, 8, 10)):
            yield f"mixed-{len(nodes)}", Recipe(mixed, gpus, nodes)
    yield "vote-3000", Recipe("vote:requests=3000", 8)
    yield "filter-vote-4000", Recipe("filter-vote:requests=4000", 8)
    for seed in (1, 2, 3):
        text = "ensembling:requests=5000,max_tokens=256"
        subset = tuple(np.sort(np.random.default_rng(seed).choice(9, 5, replace=False)).tolist())
        yield f"ensembling-draw{seed}-5x5000", Recipe(text, 8, subset, seed)
        yield f"ensembling-draw{seed}-9x5000", Recipe(text, 8, None, seed)
        yield (
            f"mixed-draw{seed}-7",
            Recipe("mixed:documents=100,requests=3000", 8, (0, 1, *(2 + n for n in subset)), seed),
        )


def build(recipe: Recipe, host: PluginHost | None = None) -> Problem:
    """Return the whole problem of a recipe, requests and latencies included."""
    host = host or PluginHost()
    name, options = parse_named(recipe.application)
    if name == "shape":
        cluster = CLUSTERS[recipe.cluster](recipe.gpus)
        return shaped(host, cluster=cluster, seed=recipe.seed, **options)  # type: ignore[arg-type]  # read as YAML
    source = host.create("application", name, options)
    app = source.build()
    known = source.output_tokens()
    if recipe.nodes is not None:
        app = subset(app, recipe.nodes)
        known = None if known is None else [known[i] for i in recipe.nodes]
    return build_problem(
        app,
        bundled_cluster(source, recipe.gpus),
        host.create("length-estimator", "ecdf"),
        host.create("latency-model", "linear"),
        scenarios=1,
        rng=np.random.default_rng([recipe.seed, 5]),
        true_lengths=known,
    )


def subset(app: Application, keep: tuple[int, ...]) -> Application:
    """Return the part of an application that some of its nodes make up.

    Raises:
        ValueError: if one of them needs a node that is left out.
    """
    position = {old: new for new, old in enumerate(keep)}
    nodes = []
    for old in keep:
        table = app.nodes[old].requests
        if missing := set(table.input_node.tolist()) - set(keep):
            raise ValueError(f"node {app.nodes[old].name} needs nodes {sorted(missing)}")
        moved = np.array([position[int(n)] for n in table.input_node], dtype=np.int64)
        fields = {f: getattr(table, f) for f in RequestTable.__dataclass_fields__}
        nodes.append(
            replace(app.nodes[old], requests=RequestTable(**{**fields, "input_node": moved}))
        )
    return Application(app.name, tuple(nodes), app.notes)


def structures(instance: Instance) -> list[str]:
    """Return the structures an instance is solved in; segments only where it is small."""
    small = len(instance.tasks) <= 5
    return ["no-switching", "segments"] if small else ["no-switching"]


def solve(instance: Instance, structure: str, time_limit_s: float) -> tuple[ExactResult, float]:
    """Return the result in a structure and the seconds it took."""
    start = time.monotonic()
    options = ExactOptions.model_validate({"structure": structure, "time_limit_s": time_limit_s})
    result = solve_instance(instance, options, start + time_limit_s)
    return result, time.monotonic() - start


def compact(data: dict[str, Any]) -> str:
    """Return JSON with a line for each task and lag."""
    instance = data["instance"]
    lists = {
        key: ",\n    ".join(json.dumps(entry) for entry in instance[key])
        for key in ("pools", "tasks", "lags")
    }
    plain = {key: value for key, value in instance.items() if key not in lists}
    body = ",\n   ".join(
        [f"{json.dumps(k)}: {json.dumps(v)}" for k, v in plain.items()]
        + [f"{json.dumps(k)}: [\n    {v}]" for k, v in lists.items()]
    )
    return (
        f'{{"recipe": {json.dumps(data["recipe"])},\n "best": {json.dumps(data["best"])},\n'
        f' "instance": {{\n   {body}}}}}\n'
    )


@dataclass(frozen=True)
class Row:
    """One instance solved in one structure.

    Attributes:
        name: of the instance.
        size: its size class.
        objective: ticks of the schedule found.
        bound: ticks no schedule goes below.
        optimal: both are proven to meet.
        seconds: taken.
        agrees: the stored bounds do not contradict it.
    """

    name: str
    size: str
    objective: int
    bound: int
    optimal: bool
    seconds: float
    agrees: bool

    @property
    def gap(self) -> float:
        """Return how far the schedule may lie above the optimum."""
        return self.objective / self.bound - 1


def size_class(instance: Instance) -> str:
    """Return the size class of an instance."""
    count = len(instance.tasks)
    models = "2-3" if count <= 3 else "4-6" if count <= 6 else "7-9"
    return f"{models} models, {instance.num_devices} GPUs"


def solve_stored(data: dict[str, Any], structure: str, options: dict[str, Any]) -> Row:
    """Solve a stored instance and compare."""
    instance = Instance.from_json(data["instance"])
    config = ExactOptions.model_validate({"structure": structure, **options})
    start = time.monotonic()
    outcome = solve_instance(instance, config, start + config.time_limit_s).outcome
    seconds = time.monotonic() - start
    known = data["best"][structure]
    agrees = outcome.bound <= known["objective"] and known["bound"] <= outcome.objective
    return Row(
        instance.name,
        size_class(instance),
        outcome.objective,
        outcome.bound,
        outcome.optimal,
        seconds,
        agrees,
    )


def table(rows: list[Row]) -> str:
    """Return a line per size class."""
    lines = [
        "| size | instances | proven | mean gap | largest gap | median s | longest s |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for size in [*sorted({r.size for r in rows}), "all"]:
        part = [r for r in rows if size in (r.size, "all")]
        proven = sum(r.optimal for r in part)
        lines.append(
            f"| {size} | {len(part)} | {proven} ({proven / len(part):.0%}) "
            f"| {statistics.mean(r.gap for r in part):.2%} | {max(r.gap for r in part):.2%} "
            f"| {statistics.median(r.seconds for r in part):.2f} "
            f"| {max(r.seconds for r in part):.1f} |"
        )
    return "\n".join(lines)


def solve_all(arguments: argparse.Namespace) -> None:
    """Solve every stored instance again, and print how much is proven."""
    options: dict[str, Any] = {
        "time_limit_s": arguments.time_limit,
        "workers": arguments.workers,
    }
    if arguments.solver_only:
        options["branch_nodes"] = 0
    rows = []
    for file in sorted(TARGET.glob("*.json")):
        data = json.loads(file.read_text(encoding="utf-8"))
        if arguments.only in file.stem and arguments.structure in data["best"]:
            rows.append(solve_stored(data, arguments.structure, options))
            row = rows[-1]
            print(
                f"{row.name}: {row.objective} ticks, gap {row.gap:.2%}, {row.seconds:.2f} s"
                + ("" if row.agrees else "  CONTRADICTS THE STORED BOUNDS"),
                flush=True,
            )
    print(table(rows))
    if arguments.output_json:
        result = {
            "structure": arguments.structure,
            "options": options,
            "machine": platform.machine(),
            "python": platform.python_version(),
            "rows": [asdict(r) for r in rows],
        }
        arguments.output_json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def derive(arguments: argparse.Namespace) -> None:
    """Write the files of instances."""
    TARGET.mkdir(parents=True, exist_ok=True)
    host = PluginHost()
    for short, recipe in recipes():
        name = f"{short}-on-{recipe.gpus}"
        file = TARGET / f"{name}.json"
        if arguments.only not in name or (arguments.missing and file.exists()):
            continue
        problem = build(recipe, host)
        instance = replace(measure(problem, PlanSimulator(problem), TICKS).instance, name=name)
        best: dict[str, Any] = {}
        for structure in structures(instance):
            result, seconds = solve(instance, structure, arguments.time_limit)
            outcome = result.outcome
            best[structure] = {
                "objective": outcome.objective,
                "bound": outcome.bound,
                "optimal": outcome.optimal,
                "seconds": round(seconds, 2),
            }
            print(name, structure, best[structure], flush=True)
        data = {"recipe": asdict(recipe), "best": best, "instance": instance.to_json()}
        file.write_text(compact(data), encoding="utf-8")


def main() -> None:
    """Solve or derive."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parts = parser.add_subparsers(dest="part", required=True)
    solving = parts.add_parser("solve", help="proven share and gap on the stored instances")
    solving.add_argument("--time-limit", type=float, default=30.0, help="seconds per instance")
    solving.add_argument(
        "--structure", default="no-switching", choices=["no-switching", "segments"]
    )
    solving.add_argument("--workers", type=int, default=2)
    solving.add_argument("--solver-only", action="store_true", help="without branch and bound")
    solving.add_argument("--output-json", type=Path)
    deriving = parts.add_parser("derive", help="write the instances")
    deriving.add_argument("--time-limit", type=float, default=60.0, help="seconds per structure")
    deriving.add_argument("--missing", action="store_true", help="only instances without a file")
    for part in (solving, deriving):
        part.add_argument("--only", default="", help="only instances whose names contain this")
    arguments = parser.parse_args()
    solve_all(arguments) if arguments.part == "solve" else derive(arguments)


if __name__ == "__main__":
    main()
