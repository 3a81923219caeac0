"""What the bench runs: suites of applications, and how one of them becomes a case."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from samullm_plugin.checkpoints.gpus import bundled_gpu
from samullm_plugin.errors import InputError, suggest
from samullm_plugin.host.interfaces.application import ApplicationSource
from samullm_plugin.host.interfaces.length import LengthEstimator
from samullm_plugin.host.manager import PluginHost
from samullm_plugin.model.cluster import Cluster
from samullm_plugin.model.costs import ModeCosts
from samullm_plugin.model.problem import ModeKey, Problem
from samullm_plugin.model.shared_gpus import WHOLE, Sharing, share_gpus
from samullm_plugin.planning.applications import parse_named
from samullm_plugin.planning.building import build_problem, sample_scenarios
from samullm_plugin.planning.estimators import make_latency_model, make_length_estimator
from samullm_plugin.planning.planner import PlanningOptions
from samullm_plugin.rules.fusion import fuse_chains

SMALL = ("small-1", "small-2", "small-3", "small-4", "small-5")
"""Instances on which exact proves optimality."""

_CHAINS = tuple(
    f"chain-summary:documents={d},judges={j},summariser={s}"
    for s in ("vicuna", "mixtral")
    for d, j in ((100, 1), (100, 4), (300, 1), (300, 6), (500, 8))
)
_FULL = (
    *(
        f"ensembling:requests={r},max_tokens={t}"
        for r, t in ((1000, 256), (5000, 256), (10000, 256), (1000, 512), (10000, 512))
    ),
    "routing:known=false",
    "routing:known=true",
    *_CHAINS,
    "mixed:documents=100,requests=5000",
    "mixed:documents=300,requests=5000",
    "map-reduce",
    "vote",
    "filter-vote",
)
SUITES: Mapping[str, tuple[str, ...]] = {
    "default": (
        "ensembling:requests=1000,max_tokens=256",
        "routing",
        "chain-summary:documents=100,judges=4",
        "mixed:documents=100,judges=4,requests=5000",
        *SMALL,
    ),
    "small": SMALL,
    "cores": ("cores-ensembling", "cores-routing", "cores-chain-summary", "cores-mixed"),
    "full": (*_FULL, *(f"{spec}{',' if ':' in spec else ':'}gpus=4" for spec in _FULL), *SMALL),
}
"""Suites by name: applications with their options, as on the command line."""


@dataclass(frozen=True, slots=True)
class HiddenDraw:
    """One set of output lengths on which plans are carried out; no scheduler saw them.

    Attributes:
        label: ``same`` (other draws of the planner's own distribution) or the name of a shift.
        problem: the same application and costs with these lengths.
    """

    label: str
    problem: Problem


@dataclass(frozen=True, slots=True)
class BenchCase:
    """One application on one cluster.

    Attributes:
        application: what was asked for, such as ``ensembling:requests=1000``.
        num_gpus: devices.
        problem: what schedulers see.
        hidden: the lengths on which their plans are carried out.
        provenance: by model, where its latency comes from.
    """

    application: str
    num_gpus: int
    problem: Problem
    hidden: tuple[HiddenDraw, ...]
    provenance: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class CaseSettings:
    """How problems are made.

    Attributes:
        scenarios: length scenarios the schedulers see.
        seeds: hidden draws of the same distribution.
        shifts: names of shifts, see :func:`shifted_estimator`.
        seed: of everything.
        estimator: name of the length estimator.
        latency_model: name of the latency model.
        profile: measured latencies for it to use; None: its own figures.
        gpus: overrides the application's own number of GPUs.
        prepared_starts: what engine starts need no device for can be done ahead.
        sleeping_engines: engines may sleep until they are needed again.
        sharing: how engines share the cluster's GPUs.
        pipeline_parallel_sizes: groups of layers to consider for a replica; None: as few as fit.
    """

    scenarios: int = 1
    seeds: int = 3
    shifts: tuple[str, ...] = ("longer", "sharegpt")
    seed: int = 0
    estimator: str = "ecdf"
    latency_model: str = "linear"
    profile: str | None = None
    gpus: int | None = None
    prepared_starts: bool = False
    sleeping_engines: bool = False
    sharing: Sharing = WHOLE
    pipeline_parallel_sizes: tuple[int, ...] | None = None


def shifted_estimator(host: PluginHost, name: str, estimator: str) -> LengthEstimator:
    """Return where the lengths of a shift come from.

    ``longer`` and ``shorter`` scale the planner's own distribution by 1.5 and by 2/3 (that of
    ``ecdf`` if the planner's estimator has no option ``scale``); the others
    are real workloads of other origin: ``sharegpt``, ``azure-conv``, ``azure-code``, ``arxiv``.

    Raises:
        InputError: naming the shifts there are.
    """
    factors = {"longer": 1.5, "shorter": 2.0 / 3.0}
    if name in factors:
        fields = host.resolve("length-estimator", estimator).value.Config.model_fields
        scaled = estimator if "scale" in fields else "ecdf"
        return make_length_estimator(host, scaled, {"scale": factors[name]})
    workloads = ("sharegpt", "azure-conv", "azure-code", "arxiv")
    if name not in workloads:
        known = (*factors, *workloads)
        raise InputError(f"unknown shift {name!r}{suggest(name, known)}; known: {', '.join(known)}")
    return host.create("length-estimator", "workload", {"workload": name})


def bundled_cluster(source: ApplicationSource, gpus: int | None) -> Cluster:
    """Return the cluster of a bundled application, or the same kind with other GPUs."""
    cluster = source.cluster()
    if gpus is None and cluster is not None:
        return cluster
    gpu = bundled_gpu("A100-80GB") if cluster is None else cluster.gpus[0]
    return Cluster.uniform(gpu, 8 if gpus is None else gpus, nvlink=2)


def make_case(host: PluginHost, text: str, settings: CaseSettings) -> BenchCase:
    """Build the problem of a bundled application and the hidden lengths for its plans.

    Raises:
        InputError: for an unknown application, option, estimator or shift.
    """
    name, options = parse_named(text)
    source = host.create("application", name, options)
    cluster = bundled_cluster(source, settings.gpus)
    cluster = share_gpus(cluster, [settings.sharing] * cluster.num_gpus)
    fused = fuse_chains(source.build(), cluster.num_gpus)
    app = fused.app
    estimator = make_length_estimator(host, settings.estimator)
    measured = {} if settings.profile is None else {"profile": settings.profile}
    latency = make_latency_model(host, settings.latency_model, measured)
    known = source.output_tokens()
    known = None if known is None else fused.joined(known)
    streams = np.random.SeedSequence([settings.seed, 11]).spawn(2 + len(settings.shifts))
    problem = build_problem(
        app,
        cluster,
        estimator,
        latency,
        scenarios=settings.scenarios,
        rng=np.random.default_rng(streams[0]),
        true_lengths=known,
        pipeline_parallel_sizes=settings.pipeline_parallel_sizes,
        prepared_starts=settings.prepared_starts,
        sleeping_engines=settings.sleeping_engines,
    )
    hidden = []
    if settings.seeds and known is None:
        draws = sample_scenarios(app, estimator, np.random.default_rng(streams[1]), settings.seeds)
        hidden.append(HiddenDraw("same", problem.with_scenarios(draws)))
        for shift, stream in zip(settings.shifts, streams[2:], strict=True):
            other = shifted_estimator(host, shift, settings.estimator)
            draws = sample_scenarios(app, other, np.random.default_rng(stream), settings.seeds)
            hidden.append(HiddenDraw(shift, problem.with_scenarios(draws)))
    elif known is not None:  # nothing is hidden: plans are carried out on what is known
        hidden.append(HiddenDraw("same", problem))
    rests = {n.model.name: _provenance(problem.costs[i]) for i, n in enumerate(app.nodes)}
    return BenchCase(text, cluster.num_gpus, problem, tuple(hidden), rests)


def _provenance(costs: Mapping[ModeKey, ModeCosts]) -> str:
    """Return where the latencies of a node's model come from, in one line."""
    parts: dict[str, list[str]] = {}
    for key, mode in costs.items():
        origin = mode.provenance
        error = "" if origin.error_pct is None else f" ±{origin.error_pct:.1f} %"
        sizes = parts.setdefault(f"{origin.kind}{error}", [])
        sizes.append(key.sizes)
    return "; ".join(f"{kind} ({', '.join(where)})" for kind, where in parts.items())


def suite(name: str) -> Sequence[str]:
    """Return the applications of a suite.

    Raises:
        InputError: naming the suites there are.
    """
    if name not in SUITES:
        raise InputError(
            f"--suite: unknown suite {name!r}{suggest(name, SUITES)}; known: {', '.join(SUITES)}"
        )
    return SUITES[name]


def planning_options(
    host: PluginHost, scheduler: str, seed: int, limit_s: float
) -> PlanningOptions:
    """Return how a scheduler plans; one that has an option ``time_limit_s`` gets the limit.

    Raises:
        InputError: for an unknown scheduler.
    """
    fields = host.resolve("scheduler", scheduler).value.Config.model_fields
    limited = {"time_limit_s": limit_s} if "time_limit_s" in fields else {}
    return PlanningOptions(options=limited, seed=seed)
