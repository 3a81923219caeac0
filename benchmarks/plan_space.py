"""What each option of the plan space saves, alone and with all others.

Run from the repository root::

    python benchmarks/plan_space.py [APPLICATION ...] [--seeds 30] [--scenarios 4] [--gpus 8]
        [--profile FILE] [--options NAME ...]

Plans of auto with none of the options, with each of them and with all are carried out on the same
hidden draws of the output lengths, in simulation, planning not included. ``prepared``: what an
engine start needs no device for is done ahead; ``pipeline``: replicas of one and two pipeline
stages; ``shared``: nodes of one checkpoint may be served by the same engines at one moment;
``isolated``: the longest chains may be given a replica of their own; ``all``: these four. Only
where ``--options`` asks for them: ``sleeping``, engines sleep until their model comes again;
``halves-F``, two engines share each GPU, and iterations take F times as long (``-``: a model does
not fit). *all, planned* compares all options with the best single one in the scenarios that were
planned for, where more to choose from must not be worse. ``--profile``: latencies measured on a
device, for the applications for CPU cores (``cores-...``), which have their own clusters.
*processor time* is that of planning with none of the options and with the last one.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass
from typing import Any

import numpy as np

from samullm_plugin.bench.cases import CaseSettings, make_case
from samullm_plugin.bench.rows import warm_up
from samullm_plugin.errors import InputError
from samullm_plugin.host.manager import PluginHost
from samullm_plugin.model.shared_gpus import Sharing
from samullm_plugin.model.types import Floats
from samullm_plugin.planning.planner import PlanningOptions, make_plan
from samullm_plugin.planning.policies import offered_policies, policy_call
from samullm_plugin.rules.sharing import shared_problem
from samullm_plugin.simulator import PlanSimulator

APPLICATIONS = (
    "map-reduce",
    "vote",
    "filter-vote",
    "document-questions",
    "ensembling:requests=1000,max_tokens=256",
    "routing:known=false",
    "chain-summary:documents=100,judges=4",
    "mixed:documents=100,requests=5000",
    *(f"small-{k}" for k in range(1, 6)),
    "routing:known=true",
    "chain-summary:documents=300,judges=6",
    "chain-summary:documents=300,judges=6,summariser=mixtral",
    "mixed:documents=300,requests=5000",
    "ensembling:requests=10000,max_tokens=512",
)

PREPARED: dict[str, Any] = {"prepared_starts": True}
PIPELINE: dict[str, Any] = {"pipeline_parallel_sizes": (1, 2)}


@dataclass(frozen=True, slots=True)
class Option:
    """What a plan may use.

    Attributes:
        name: in the table.
        settings: of the case.
        shared: nodes may share engines.
        policies: a request policy may be chosen.
    """

    name: str
    settings: dict[str, Any]
    shared: bool = False
    policies: bool = False


NONE = Option("none", {})
OPTIONS = (
    Option("prepared", PREPARED),
    Option("pipeline", PIPELINE),
    Option("shared", {}, shared=True),
    Option("isolated", {}, policies=True),
    Option("all", PREPARED | PIPELINE, shared=True, policies=True),
)
MORE = (
    Option("sleeping", {"sleeping_engines": True}),
    *(Option(f"halves-{f:g}", {"sharing": Sharing(2, f)}) for f in (1.2, 1.5, 1.8, 2.0)),
)


@dataclass(frozen=True, slots=True)
class Made:
    """A plan and what it takes.

    Attributes:
        planned_s: mean makespan in the scenarios that were planned for.
        hidden_s: makespan by hidden draw.
        cpu_s: processor seconds of planning, the problem included.
    """

    planned_s: float
    hidden_s: Floats
    cpu_s: float


def made(host: PluginHost, text: str, option: Option, given: argparse.Namespace) -> Made:
    """Plan one application with an option, and carry the plan out on the hidden draws."""
    started_s = time.process_time()
    case = make_case(
        host,
        text,
        CaseSettings(
            scenarios=given.scenarios,
            seeds=given.seeds,
            shifts=(),
            gpus=None if text.startswith(("small", "cores")) else given.gpus,
            profile=given.profile,
            **option.settings,
        ),
    )
    policies = offered_policies(case.problem.app) if option.policies else ()
    simulator_of = PlanSimulator if option.shared else None
    how = PlanningOptions(policies=policies, simulator_of=simulator_of)
    found = make_plan(host, case.problem, "auto", how)
    cpu_s = time.process_time() - started_s
    hidden, call = case.hidden[0].problem, None
    if found.shared:
        hidden = shared_problem(hidden, found.shared)
    if found.request_policy is not None:  # as in a run it is told lengths that the planner drew
        told = [found.problem.scenarios[0]] * len(hidden.scenarios)
        call = policy_call(hidden.app, host.create("request-policy", found.request_policy), told)
    traces = PlanSimulator(hidden, policy=call).simulate(found.plan)
    return Made(found.mean_makespan_s, np.array([t.makespan_s for t in traces]), cpu_s)


def cell(with_s: Floats, without_s: Floats) -> str:
    """Return the mean paired difference with its standard error."""
    ratio = 100 * (with_s / without_s - 1)
    if not np.abs(ratio).max() >= 0.05:
        return "0"
    error = ratio.std(ddof=1) / np.sqrt(len(ratio)) if len(ratio) > 1 else 0.0
    return f"{ratio.mean():+.1f} ± {error:.1f} %"


def main() -> None:
    """Print the table, a row at a time."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("applications", nargs="*", default=APPLICATIONS)
    parser.add_argument("--seeds", type=int, default=30, help="hidden draws")
    parser.add_argument("--scenarios", type=int, default=4, help="length scenarios of the plans")
    parser.add_argument("--gpus", type=int, default=8)
    parser.add_argument("--profile", help="measured latencies of the devices")
    known = {o.name: o for o in (*OPTIONS, *MORE)}
    default = [o.name for o in OPTIONS]
    parser.add_argument("--options", nargs="+", choices=known, default=default)
    given = parser.parse_intermixed_args()
    options = [known[name] for name in given.options]
    host = PluginHost()
    warm_up(host, ("auto",))
    made(
        host,
        "map-reduce",
        OPTIONS[1],
        argparse.Namespace(scenarios=1, seeds=1, gpus=4, profile=None),
    )
    whole = "all" in given.options
    heads = [*given.options, *(["all, planned"] if whole else []), "processor time, s"]
    print(f"| application | none, s | {' | '.join(heads)} |")
    print(f"|---|--:|{'--:|' * len(heads)}")
    for text in given.applications:
        none = made(host, text, NONE, given)
        found: dict[str, Made] = {}
        for option in options:
            try:
                found[option.name] = made(host, text, option, given)
            except InputError as error:  # such as a model that does not fit into half a GPU
                print(f"{text}, {option.name}: {error}", file=sys.stderr)
        cells = [
            cell(found[n].hidden_s, none.hidden_s) if n in found else "-" for n in given.options
        ]
        if whole:
            best_s = min(none.planned_s, *(f.planned_s for n, f in found.items() if n != "all"))
            cells.append(f"{100 * (found['all'].planned_s / best_s - 1):+.1f} %")
        cpu_s = [none.cpu_s, *(found[n].cpu_s for n in given.options[-1:] if n in found)]
        cells.append(", ".join(f"{s:.1f}" for s in cpu_s))
        row = f"`{text}` | {none.hidden_s.mean():,.1f} | {' | '.join(cells)}"
        print(f"| {row} |", flush=True)


if __name__ == "__main__":
    main()
