"""Hypothesis strategies for small random problems and plans."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import assume
from hypothesis import strategies as st

from samullm_plugin.engine import Curve, StepLatency
from samullm_plugin.model.application import EngineOptions
from samullm_plugin.model.parallel import ParallelConfig
from samullm_plugin.model.plan import Assignment, EndKind, Plan, Stage, StageEnd
from samullm_plugin.model.problem import Problem
from samullm_plugin.testing.factories import TestNode, make_problem


@st.composite
def step_latencies(draw: st.DrawFn) -> StepLatency:
    """Return latencies with tile steps, launch floors and every term at times."""
    base = draw(st.sampled_from([0.01, 0.05, 0.2]))
    slope = draw(st.sampled_from([0.0, 0.0005, 0.01]))
    jump = draw(st.sampled_from([0.0, 0.03]))
    knots = (0.0, 16.0, 17.0, 64.0)
    values = (base, base + 16 * slope, base + jump + 17 * slope, base + jump + 64 * slope)

    def some(*values_s: float) -> float:
        return draw(st.sampled_from((0.0, *values_s)))

    return StepLatency(
        Curve(knots, values),
        Curve.line(some(0.005), some(0.001)),
        prefill_token_s=some(0.001, -slope / 4),
        prefill_pair_s=some(1e-5),
        context_token_s=some(2e-5, 1e-3),
        longest_token_s=some(1e-4),
        host_by_seqs=Curve.line(some(0.02), some(0.0005)),
        overlap_host=draw(st.booleans()),
        prefill_seq_s=some(0.01),
        launch_s=some(0.04),
        prefill_launch_s=some(0.06),
        longest_over_seqs=draw(st.integers(0, 2)),
        prefill_step_s=some(0.02),
    )


@st.composite
def engine_options(draw: st.DrawFn) -> EngineOptions:
    """Return small engines, so that few requests already meet every limit."""
    return EngineOptions(
        max_num_seqs=draw(st.integers(1, 6)),
        max_num_batched_tokens=draw(st.sampled_from([16, 32, 128])),
        block_size=draw(st.sampled_from([4, 16])),
        enable_prefix_caching=draw(st.booleans()),
        async_scheduling=draw(st.booleans()),
    )


@st.composite
def problems(
    draw: st.DrawFn,
    *,
    max_nodes: int = 4,
    max_requests: int = 8,
    max_scenarios: int = 1,
    engines: int | None = None,
) -> Problem:
    """Return problems of 2 to ``max_nodes`` models with joins, fan-outs, chains, untaken requests.

    On 2 to 8 GPUs in NVLink pairs; caches are small enough to preempt at times. The nodes have so
    many different engines at most, one may take over those of another (None: each has its own).
    """
    num_scenarios = draw(st.integers(1, max_scenarios))
    nodes: list[TestNode] = []
    sizes: list[int] = []
    for i in range(draw(st.integers(2, max_nodes))):
        n = draw(st.integers(1, max_requests))
        chained = draw(st.integers(0, 3)) == 0
        sources = [u for u in range(i) if draw(st.integers(0, 2)) == 0]
        inputs: list[list[tuple[int, int]]] = []
        for r in range(n):
            row = [(u, r % sizes[u]) for u in sources if draw(st.integers(0, 3)) > 0]
            if chained and r > 0 and draw(st.booleans()):
                row.append((i, draw(st.integers(0, r - 1))))
            inputs.append(row)
        lengths = st.lists(st.integers(1, 30), min_size=n, max_size=n)
        outputs = [draw(lengths) for _ in range(num_scenarios)]
        untaken = draw(st.integers(0, 4)) == 0
        max_model_len = draw(st.sampled_from([64, 96]))
        load_s = draw(st.sampled_from([0.0, 0.5, 3.0]))
        nodes.append(
            TestNode(
                f"n{i}",
                draw(st.lists(st.integers(1, 40), min_size=n, max_size=n)),
                outputs,
                inputs,
                load_s=load_s,
                prepare_s=load_s * draw(st.sampled_from([0.0, 0.4, 1.0])),
                sizes=draw(st.sampled_from([(1,), (1, 2), (2,)])),
                kv_cache_tokens=draw(st.sampled_from([max_model_len, 150, 4000])),
                max_model_len=max_model_len,
                engine=draw(engine_options()),
                taken=[draw(st.booleans()) for _ in range(n)] if untaken else None,
                prefix_tokens=draw(st.sampled_from([0, 20])),
                latency=draw(step_latencies()),
            )
        )
        sizes.append(n)
    gpus = draw(st.sampled_from([2, 4, 8]))
    problem = make_problem(
        nodes,
        gpus,
        nvlink=2,
        num_scenarios=num_scenarios,
        host_memory_bytes=draw(st.sampled_from([None, 1, 3])),
    )
    if engines is None:
        return problem
    drawn = [draw(st.integers(0, engines - 1)) for _ in nodes]
    engine_of = tuple(drawn.index(k) for k in drawn)
    assume(all(n.model.max_model_len == problem.app.nodes[k].model.max_model_len
               for n, k in zip(problem.app.nodes, engine_of, strict=True)))  # fmt: skip
    costs = tuple(problem.costs[k] for k in engine_of)
    return replace(problem, costs=costs, engine_of=engine_of)


END_KINDS: tuple[EndKind, ...] = (
    "first_finisher",
    "node_finished",
    "node_progress",
    "all_finished",
)


@st.composite
def plans(draw: st.DrawFn, problem: Problem, *, max_extra_stages: int = 3) -> Plan:
    """Return valid plans with resized, moved, paused and pipelined models and all end events.

    Every node gets a first and a last stage in line with what it waits for; in between it is
    assigned or not, by chance. What does not fit beside the others gets stages of its own.
    """
    app, cluster = problem.app, problem.cluster
    length = draw(st.integers(1, len(app.nodes) + max_extra_stages))
    wanted: list[list[int]] = [[] for _ in range(length)]
    first: dict[int, int] = {}
    for i in app.order:
        first[i] = draw(
            st.integers(max((first[u] for u in app.upstreams[i]), default=0), length - 1)
        )
        last = draw(st.integers(first[i], length - 1))
        for s in range(first[i], last + 1):
            if s in (first[i], last) or draw(st.booleans()):
                wanted[s].append(i)
    stages: list[Stage] = []
    before: dict[int, Assignment] = {}
    for members in wanted:
        free = set(range(cluster.num_gpus))
        chosen: list[Assignment] = []
        for i in members:
            kept = before.get(i)
            if kept is not None and free.issuperset(kept.devices) and draw(st.booleans()):
                assignment = kept
            else:
                configs = problem.parallel_configs(i)
                parallel: ParallelConfig = draw(st.sampled_from(configs))
                devices = problem.find_devices(i, parallel, free)
                if devices is None:
                    stages += _closed(draw, chosen)
                    chosen, free = [], set(range(cluster.num_gpus))
                    devices = problem.find_devices(i, parallel, free)
                    assert devices is not None
                assignment = Assignment(app.nodes[i].name, parallel, devices)
            chosen.append(assignment)
            before[i] = assignment
            free -= set(assignment.devices)
        stages += _closed(draw, chosen)
    return Plan(tuple(stages))


def _closed(draw: st.DrawFn, assignments: list[Assignment]) -> list[Stage]:
    if not assignments:
        return []
    kind = draw(st.sampled_from(END_KINDS))
    if kind in ("first_finisher", "all_finished"):
        return [Stage(tuple(assignments), StageEnd(kind))]
    node = draw(st.sampled_from([a.node for a in assignments]))
    fraction = draw(st.sampled_from([0.3, 0.5, 1.0])) if kind == "node_progress" else 1.0
    return [Stage(tuple(assignments), StageEnd(kind, node, fraction))]
