"""What options of the plan space save on real vLLM engines: planned and measured, in turn.

Run from the repository's root, with vLLM or its CPU build::

    python -m benchmarks.measured_options [--only checks chains turns]
                                          [--options none prepared isolated shared sleeping]
                                          [--turns 3] [--minutes 25] [--cores 2] [--json OUT.json]

Applications on small models of random weights (``tests/models.py``) that generate as many
tokens as they may. *checks* is that of ``shared_engines.py``: three checks by one judge between
nodes of one writer. *chains*: documents are summarised part by part, one of them much longer than
the others; a judge reads each summary twice, and the writer goes on from both. *turns* is *refine*
there: two models take turns, for ``sleeping`` on one core.

A first run, planned from what is assumed of the machine, measures it. From these figures a plan is
made with none of the options and with each, and then the plans are carried out in turn, every
second turn in the opposite order, so that what changes slowly weighs on all alike. A turn that
would end after its share of the minutes is not begun. ``none``: engines are started for every node,
requests run as they come. ``prepared``: engine starts are done ahead. ``shared``: engines are
shared and taken over. ``isolated``: the longest chain has a replica of its own. ``sleeping``:
engines sleep until a node of their model comes again; on CPU cores they are left as they are.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from samullm_vllm.fork_launching import kept_fork_server

from benchmarks.shared_engines import checks, node, refine
from samullm_plugin.app.loading import load_application
from samullm_plugin.app.spec import PlannerSection
from samullm_plugin.host.manager import PluginHost
from samullm_plugin.model.cluster import Cluster
from samullm_plugin.planning.instances import make_instance
from samullm_plugin.planning.planner import make_plan
from samullm_plugin.planning.this_machine import local_devices
from samullm_plugin.run.run import start_run
from samullm_plugin.run.setup import RunSetup
from tests.models import make_tiny_llama

SIZES = {
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 104,
}
"""Large enough that an iteration takes longer the more requests are in it."""

ENGINE: dict[str, Any] = {
    "dtype": "float32",
    "block_size": 32,
    "max_num_seqs": 8,
    "max_num_batched_tokens": 512,
}
NONE: dict[str, Any] = {"scenarios": 2, "fusion": False, "request_policy": "fcfs"}
OPTIONS: dict[str, dict[str, Any]] = {
    "none": {},
    "prepared": {"prepared_starts": True},
    "shared": {"fusion": True},
    "isolated": {"request_policy": "isolate-longest"},
    "sleeping": {"fusion": True, "sleeping_engines": True},
}
ROWS, LONG, SHORT, DOCUMENTS = 24, 30, 8, 12


@dataclass(frozen=True, slots=True)
class Measured:
    """One run.

    Attributes:
        application, option, turn: which.
        planned_s: mean makespan over the plan's length scenarios.
        makespan_s: of the run.
        wall_s: of the run with opening and closing its executor.
        engine_starts: engines that were started.
        taken_over: engines that went on for another node instead.
        woken: engines that had slept instead.
        load_s: seconds of all starts, from the moment an engine had its devices.
        load_average: of the machine, in the minute before the run.
    """

    application: str
    option: str
    turn: int
    planned_s: float
    makespan_s: float
    wall_s: float
    engine_starts: int
    taken_over: int
    woken: int
    load_s: float
    load_average: float


def chains() -> dict[str, Any]:
    """Return documents that are read part by part, with two judgements of each summary."""
    summary = {"summary": {"from": "summarise", "take": "last"}}
    reading = "{{ previous }} {{ prompt }}"
    both = {"first": "score", "second": "style"}
    return {
        "summarise": node("writer", 24, requests="documents.jsonl", chain=True, prompt=reading),
        "score": node("judge", 40, inputs=summary, prompt="Score: {{ summary }}"),
        "style": node("judge", 40, inputs=summary, prompt="Style: {{ summary }}"),
        "rewrite": node("writer", 60, inputs=both, prompt="{{ first }} {{ second }}"),
    }


def write_inputs(folder: Path) -> None:
    """Write the models, the rows and both applications."""
    models = {}
    for seed, name in enumerate(("writer", "judge")):
        place = str(make_tiny_llama(folder / name, seed=seed, characters=True, **SIZES))
        models[name] = {
            "model": name,
            "path": place,
            "architecture": place,
            "max_model_len": 1024,
            "engine_args": ENGINE,
        }
    rows = [{"id": f"r{k}", "prompt": "tell me about it " * (k % 5 + 1)} for k in range(ROWS)]
    parts = [LONG, *[SHORT] * (DOCUMENTS - 1)]
    documents = [
        {"id": f"d{k}", "chunks": [f"Part {c} of {k} says this and that, at length." for c in
         range(count)]}
        for k, count in enumerate(parts)
    ]  # fmt: skip
    for name, lines in (("rows", rows), ("documents", documents)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    for name, nodes in (("checks", checks()), ("chains", chains()), ("turns", refine())):
        for made in nodes.values():
            made.pop("keep", None)  # what random weights say decides nothing
            made["sampling_params"] |= {"temperature": 0, "ignore_eos": True}
            if "for_each" in made:
                made["prompt"] = "About {{ output }}:"
        app = {"version": 1, "name": name, "models": models, "nodes": nodes}
        (folder / f"{name}.yaml").write_text(json.dumps(app))


def runs(
    host: PluginHost,
    folder: Path,
    name: str,
    given: argparse.Namespace,
    cluster: Cluster,
    until_s: float,
) -> Iterator[Measured]:
    """Measure the machine with an application, plan it with every option, run in turn."""
    loaded = replace(load_application(folder / f"{name}.yaml"), cluster=cluster)

    def made(option: str) -> tuple[RunSetup, Any]:
        planner = PlannerSection.model_validate(NONE | OPTIONS[option])
        instance = make_instance(host, loaded, planner)
        how, simulator = instance.planning_options(host), instance.simulator(host)
        result = make_plan(host, instance.problem, "auto", how, simulator=simulator)
        planned = instance.as_planned(result)
        return RunSetup(host, loaded, planned, executor="vllm", directory=folder), result

    def run(option: str, turn: int, setup: RunSetup, result: Any) -> Measured:
        directory = folder / f"{name}-{option}-{turn}"
        began_s, load_average = time.monotonic(), os.getloadavg()[0]
        outcome = start_run(replace(setup, directory=directory), result.plan)
        wall_s = time.monotonic() - began_s
        if outcome.failed:
            raise SystemExit(f"{directory.name}: {outcome.failed[0]}")
        told = outcome.metrics
        found = Measured(
            name,
            option,
            turn,
            float(result.makespan_s.mean()),
            told["makespan_s"]["measured"],
            wall_s,
            told["engine_starts"],
            told["engines_taken_over"],
            told["engines_woken"],
            told["load_s"],
            load_average,
        )
        print(found, flush=True)
        return found

    run("none", 0, *made("none"))
    options = [o for o in given.options if o != "isolated" or name == "chains"]
    plans = {option: made(option) for option in options}
    longest_s = 0.0
    for turn in range(1, given.turns + 1):
        began_s = time.monotonic()
        if began_s + longest_s > until_s:
            print(f"{name}: turn {turn} is left out, the minutes are over", flush=True)
            return
        for option in options if turn % 2 else reversed(options):
            yield run(option, turn, *plans[option])
        longest_s = max(longest_s, time.monotonic() - began_s)


def table(found: list[Measured]) -> str:
    """Return a row for each application and option: every turn's makespan, and means.

    *Against none* is the mean of the paired differences with its standard error.
    """
    lines = [
        "| application | option | planned s | measured s, by turn | mean s | against none | "
        "started | taken over | woken | starts, s | load |",
        "|---|---|--:|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for name, option in dict.fromkeys((m.application, m.option) for m in found):
        mine = [m for m in found if (m.application, m.option) == (name, option)]
        none = {m.turn: m for m in found if (m.application, m.option) == (name, "none")}
        ratios = [
            100 * (m.makespan_s / none[m.turn].makespan_s - 1) for m in mine if m.turn in none
        ]
        gain = ""
        if ratios and option != "none":
            error = f" ± {stdev(ratios) / len(ratios) ** 0.5:.0f}" if len(ratios) > 1 else ""
            gain = f"{mean(ratios):+.0f}{error} %"
        mine.sort(key=lambda m: m.turn)
        turns = ", ".join(f"{m.makespan_s:.1f}" for m in mine)
        lines.append(
            f"| {name} | {option} | {mine[0].planned_s:.1f} | {turns} | "
            f"{mean(m.makespan_s for m in mine):.1f} | {gain} | "
            f"{mine[0].engine_starts} | {mine[0].taken_over} | "
            f"{mine[0].woken} | "
            f"{mean(m.load_s for m in mine):.1f} | {mean(m.load_average for m in mine):.1f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Measure what is asked for and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", nargs="*", default=("checks", "chains"))
    usual = ("none", "prepared", "isolated")
    parser.add_argument("--options", nargs="*", default=usual, choices=tuple(OPTIONS))
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=25.0, help="for all applications together")
    parser.add_argument("--cores", type=int, default=2, help="devices of the plans")
    parser.add_argument("--json", type=Path, help="file for the figures")
    given = parser.parse_args()
    host = PluginHost.from_settings()
    here = local_devices(host)
    if here is None:
        raise SystemExit("no executor has real engines here; install vLLM or its CPU build")
    cluster = Cluster.uniform(here[1].gpus[0], given.cores)
    found: list[Measured] = []
    with tempfile.TemporaryDirectory() as scratch, kept_fork_server():
        folder = Path(scratch)
        os.environ["SAMULLM_CACHE_DIR"] = str(folder / "cache")
        write_inputs(folder)
        end_s = time.monotonic() + 60 * given.minutes
        for number, name in enumerate(given.only):
            left_s = end_s - time.monotonic()
            until_s = time.monotonic() + left_s / (len(given.only) - number)
            for measured in runs(host, folder, name, given, cluster, until_s):
                found.append(measured)
                if given.json is not None:  # each run, lest a later one fail
                    rows = [asdict(m) for m in found]
                    given.json.write_text(json.dumps(rows, indent=1) + "\n")
    print(f"\n{table(found)}")


if __name__ == "__main__":
    main()
