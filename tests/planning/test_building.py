"""From applications to problems: sampled lengths, costs by replica size, faulty estimators."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from samullm_ecdf.ecdf import EcdfLengths
from samullm_ecdf.given import OracleLengths, OracleOptions

from samullm_plugin import (
    Application,
    Cluster,
    Gpu,
    InputError,
    LatencyModel,
    LengthEstimator,
    LoadTimes,
    ModelNode,
    PluginError,
    Provenance,
    RequestTable,
    bundled_model,
)
from samullm_plugin.checkpoints.gpus import bundled_gpu
from samullm_plugin.host.manager import PluginHost
from samullm_plugin.model.cluster import Network
from samullm_plugin.model.latency import Curve, StepLatency, StepTable
from samullm_plugin.model.plan import Assignment, Plan, Stage
from samullm_plugin.model.problem import ModeKey
from samullm_plugin.model.shared_gpus import Sharing, share_gpus
from samullm_plugin.planning.building import build_problem, collect_costs, sample_outputs
from samullm_plugin.rules.bounds import lower_bound
from samullm_plugin.simulator import PlanSimulator


class Flat(LatencyModel):
    """Constant steps, and memory from the weights."""

    name = "flat"

    def step_latency(self, model: Any, gpu: Any, tp: int, pp: int = 1) -> StepLatency:
        if tp == 4:
            raise InputError("nothing is known of 4 devices")
        return StepLatency(Curve.constant(0.02))

    def kv_cache_tokens(self, model: Any, gpu: Any, tp: int, pp: int = 1) -> int:
        room = 0.9 * gpu.memory_bytes * tp - model.architecture.weight_bytes
        return max(0, int(room / model.architecture.kv_bytes_per_token))

    def load_times(self, model: Any, gpu: Any, tp: int, pp: int = 1) -> LoadTimes:
        return LoadTimes(30.0, 120.0)

    def provenance(self, model: Any, gpu: Any, tp: int, pp: int = 1) -> Provenance:
        return Provenance("assumed", "a constant")


A100 = Gpu("A100-80GB", 80 * 2**30)
SMALL = bundled_model("chatglm3-6b")
LARGE = bundled_model("Llama-2-70b-chat-hf")


def chain() -> Application:
    """Ten chains of three requests, judged by a large model."""
    table = RequestTable.of([100] * 30, 900, [[(0, r - 10)] if r >= 10 else [] for r in range(30)])
    judge = RequestTable.of([10] * 10, 50, [[(0, r)] for r in range(20, 30)])
    return Application("c", (ModelNode("s", SMALL, table), ModelNode("j", LARGE, judge)))


def build(app: Application, estimator: LengthEstimator, cluster: Cluster, **options: Any) -> Any:
    rng = np.random.default_rng(options.pop("seed", 0))
    return build_problem(app, cluster, estimator, Flat(), rng=rng, **options)


def test_scenarios_are_independent_and_reproducible() -> None:
    cluster = Cluster.uniform(A100, 4, nvlink=2)
    problem = build(chain(), EcdfLengths(), cluster, scenarios=3)
    again = build(chain(), EcdfLengths(), cluster, scenarios=5)
    for one, two in zip(problem.scenarios, again.scenarios, strict=False):
        assert one.output_tokens[0].tolist() == two.output_tokens[0].tolist()
    first, second, _ = problem.scenarios
    assert first.output_tokens[0].tolist() != second.output_tokens[0].tolist()
    prompts, outputs = first.prompt_tokens[0], first.output_tokens[0]
    assert (prompts[10:] == 100 + outputs[:20]).all()
    assert (first.prompt_tokens[1] == 10 + outputs[20:]).all()


def test_estimators_see_prompts_with_their_inputs() -> None:
    seen: dict[str, np.ndarray[Any, Any]] = {}

    class Watching(EcdfLengths):
        """Remembers the prompts it was asked about."""

        def sample(self, query: Any, rng: Any, num_scenarios: int) -> Any:
            seen[query.node] = query.prompt_tokens
            return super().sample(query, rng, num_scenarios)

    outputs = sample_outputs(chain(), Watching(), np.random.default_rng(0))
    assert (seen["j"] == 10 + outputs[0][20:]).all()
    assert (seen["s"][:10] == 100).all()
    assert (seen["s"][10:] > 100).all()


def test_untaken_requests_have_no_output() -> None:
    first = RequestTable.of([10] * 200, 5)
    second = RequestTable.of(
        [10] * 200, 50, [[(0, r)] for r in range(200)], probability=np.full(200, 0.3)
    )
    app = Application("f", (ModelNode("a", SMALL, first), ModelNode("b", SMALL, second)))
    problem = build(app, EcdfLengths(), Cluster.uniform(A100, 1), scenarios=20)
    shares = [(s.output_tokens[1] > 0).mean() for s in problem.scenarios]
    assert np.mean(shares) == pytest.approx(0.3, abs=0.04)
    assert len(set(shares)) > 1


def test_true_lengths_are_taken_as_they_are() -> None:
    true = [np.arange(1, 31), np.arange(1, 11)]
    problem = build(
        chain(), EcdfLengths(), Cluster.uniform(A100, 4, nvlink=2), true_lengths=true, scenarios=9
    )
    assert len(problem.scenarios) == 1
    assert problem.scenarios[0].output_tokens[0].tolist() == list(range(1, 31))
    oracle = OracleLengths(
        OracleOptions(output_tokens={"s": tuple(range(1, 31)), "j": tuple(range(1, 11))})
    )
    same = build(chain(), oracle, Cluster.uniform(A100, 4, nvlink=2), scenarios=1)
    assert same.scenarios[0].output_tokens[1].tolist() == list(range(1, 11))


def test_sizes_follow_nvlink_groups_heads_and_what_is_known() -> None:
    def sizes(cluster: Cluster) -> list[list[int]]:
        return [
            [k.tensor_parallel_size for k in costs]
            for costs in collect_costs(chain(), cluster, Flat())
        ]

    assert sizes(Cluster.uniform(A100, 4, nvlink=2)) == [[1, 2], [1, 2]]
    # The large one fits no device: its layers are divided over two as well.
    assert sizes(Cluster.uniform(A100, 3)) == [[1], [1, 1]]
    assert sizes(Cluster.uniform(A100, 8, nvlink=8)) == [[1, 2, 8], [1, 2, 8]]  # 4 is not known
    mixed = Cluster((A100, A100, Gpu("L40S-48GB", 44 * 2**30)), ((0, 1), (2,)))
    keys = list(collect_costs(chain(), mixed, Flat())[0])
    assert [(k.gpu, k.tensor_parallel_size) for k in keys] == [
        ("A100-80GB", 1),
        ("A100-80GB", 2),
        ("L40S-48GB", 1),
    ]


def test_a_model_that_fits_nowhere_is_named() -> None:
    with pytest.raises(InputError) as error:
        build(chain(), EcdfLengths(), Cluster.uniform(A100, 4))
    assert "node j: model meta-llama/Llama-2-70b-chat-hf fits on no set of devices" in str(
        error.value
    )
    with pytest.raises(InputError, match="scenarios is 0"):
        build(chain(), EcdfLengths(), Cluster.uniform(A100, 4), scenarios=0)


@pytest.mark.parametrize(
    ("wrong", "rule"),
    [
        (lambda q, s: np.zeros((s, len(q)), np.int64), "is below 1"),
        (lambda q, s: np.tile(q.max_tokens + 1, (s, 1)), "is above max_tokens"),
        (lambda q, s: np.ones((s, len(q) + 1), np.int64), "samples have shape"),
        (lambda q, s: np.full((s, len(q)), 1.5), "whole numbers are needed"),
    ],
)
def test_faulty_estimators_are_named(wrong: Callable[..., Any], rule: str) -> None:
    class Faulty(EcdfLengths):
        """Breaks a rule."""

        name = "faulty"

        def sample(self, query: Any, rng: Any, num_scenarios: int) -> Any:
            return wrong(query, num_scenarios)

    with pytest.raises(PluginError, match=f"length-estimator faulty: .*{rule}"):
        build(chain(), Faulty(), Cluster.uniform(A100, 4, nvlink=2))


def large_alone(nvlink: int, sizes: tuple[int, ...] | None) -> Any:
    model = bundled_model("meta-llama/Llama-2-70b-chat-hf")
    app = Application("large", (ModelNode("a", model, RequestTable.of([100] * 4, 50)),))
    cluster = Cluster.uniform(bundled_gpu("A100-80GB"), 4, nvlink=nvlink)
    latency = PluginHost().create("latency-model", "linear")
    known = [np.full(4, 50)]
    rng = np.random.default_rng(0)
    return build_problem(
        app,
        cluster,
        EcdfLengths(),
        latency,
        rng=rng,
        true_lengths=known,
        pipeline_parallel_sizes=sizes,
    )


def test_a_model_that_fits_no_nvlink_group_is_divided_by_layers() -> None:
    """And it runs as the simulation of its pipeline stages says, never below the bound."""
    problem = large_alone(1, None)
    assert {str(p) for p in problem.parallel_configs(0)} == {
        "dp1xtp1xpp2", "dp2xtp1xpp2", "dp1xtp1xpp4"
    }  # fmt: skip
    for parallel in problem.parallel_configs(0):
        devices = problem.idle_devices(0, parallel)
        assert devices is not None
        plan = Plan((Stage((Assignment("a", parallel, devices),)),))
        makespan_s = PlanSimulator(problem).simulate_scenario(plan, 0).makespan_s
        assert lower_bound(problem, problem.scenarios[0]).value_s <= makespan_s
    assert {p.pipeline_parallel_size for p in large_alone(2, None).parallel_configs(0)} == {1}
    assert {p.pipeline_parallel_size for p in large_alone(2, (1, 2)).parallel_configs(0)} == {1, 2}


def test_pipeline_stages_are_planned_where_one_stage_does_not_replace_them() -> None:
    """A small model is faster on as many devices of its own; a large one has more room so."""
    names = ("THUDM/chatglm3-6b", "meta-llama/Llama-2-70b-chat-hf")
    nodes = tuple(ModelNode(n, bundled_model(n), RequestTable.of([100] * 400, 300)) for n in names)
    app = Application("both", nodes)
    problem = build_problem(
        app,
        Cluster.uniform(bundled_gpu("A100-80GB"), 8, nvlink=2),
        EcdfLengths(),
        PluginHost().create("latency-model", "linear"),
        rng=np.random.default_rng(0),
        true_lengths=[np.full(400, 300)] * 2,
        pipeline_parallel_sizes=(1, 2),
    )
    stages = [{p.pipeline_parallel_size for p in problem.parallel_configs(i)} for i in (0, 1)]
    assert stages == [{1}, {1, 2}]
    assert set(problem.costs[1]) > set(problem.without_pipelines().costs[1])


def test_layers_that_cannot_be_divided_so_are_said() -> None:
    with pytest.raises(InputError, match=r"sizes 81: .*80 layers and 4 GPUs in a machine"):
        large_alone(2, (81,))


def test_a_model_that_fits_no_machine_lies_across_machines_if_allowed() -> None:
    """A hop to another machine costs what the network says, and is only planned where needed."""
    pairs = ((0, 1), (2, 3))
    gpu = bundled_gpu("A100-80GB")
    small = replace(gpu, memory_bytes=48 * 2**30)
    app = Application("app", (ModelNode("a", LARGE, RequestTable.of([100] * 40, 30)),))
    assumed = PluginHost().create("latency-model", "assumed")

    def costs(cluster: Cluster, sizes: tuple[int, ...] | None = None) -> Any:
        return collect_costs(app, cluster, assumed, pipeline_parallel_sizes=sizes)[0]

    def two(gpu: Gpu, network: Network | None) -> Cluster:
        return Cluster((gpu,) * 4, pairs, pairs, network=network)

    network = Network(12.5e9, 50e-6)
    assert costs(two(gpu, network)) == costs(two(gpu, None))  # it fits a machine
    alone = costs(two(small, None))
    assert {k.sizes for k in alone} == {"tp1", "tp2", "tp1xpp2"}
    wide = costs(two(small, network))
    assert {k.sizes for k in wide} - {k.sizes for k in alone} == {"tp2xpp2", "tp1xpp4"}
    assert {k: c for k, c in wide.items() if k in alone} == alone
    key = ModeKey(small.name, 2, 2)
    inside = costs(Cluster((small,) * 4, pairs, (tuple(range(4)),)), (1, 2))[key]
    assert "network_gbit_s" in wide[key].provenance.source
    tokens = np.array([1, 512, 8192])
    hop_s = wide[key].latency.by_tokens.at(tokens) - inside.latency.by_tokens.at(tokens)
    assert hop_s == pytest.approx(50e-6 + tokens * 2 * 2 * 8192 / 12.5e9)
    assert {k.sizes for k in costs(two(gpu, network), (1, 2, 4))} >= {"tp2xpp2", "tp2"}

    class OfTables(Flat):
        def step_latency(self, model: Any, gpu: Any, tp: int, pp: int = 1) -> Any:
            return OfTables

    known = collect_costs(app, two(small, network), OfTables())[0]
    assert {k.sizes for k in known} == {k.sizes for k in alone}  # nothing is known of a hop


def test_sizes_are_named_with_their_stages() -> None:
    assert [ModeKey("g", 2).sizes, ModeKey("g", 2, 4).sizes] == ["tp2", "tp2xpp4"]


def test_stages_lie_on_gpus_of_one_kind_that_are_whole() -> None:
    """Parts of GPUs and GPUs of another kind are no room for them."""
    whole = Cluster((A100,) * 4, ((0, 1, 2, 3),))
    cluster = share_gpus(whole, [Sharing()] * 2 + [Sharing(4, 1.5)] * 2)
    one = Application("c", chain().nodes[:1])
    (costs,) = collect_costs(one, cluster, Flat(), pipeline_parallel_sizes=(1, 2, 4))
    stages = {k.pipeline_parallel_size for k in costs if k.gpu == "A100-80GB"}
    assert stages == {1, 2}
    with pytest.raises(InputError, match="28 layers and 2 GPUs in a machine"):
        collect_costs(one, cluster, Flat(), pipeline_parallel_sizes=(4,))


def test_engines_that_share_gpus_have_a_part_of_the_memory_and_are_slower() -> None:
    """Weights and what an engine needs besides are there for each; starts are the host's work."""
    app = Application("a", (ModelNode("s", SMALL, RequestTable.of([100] * 8, 50)),))
    whole = Cluster.uniform(bundled_gpu("A100-80GB"), 4, nvlink=2)
    cluster = share_gpus(whole, [Sharing()] * 2 + [Sharing(2, 1.5)] * 2)
    latency = PluginHost().create("latency-model", "linear")
    (costs,) = collect_costs(app, cluster, latency, pipeline_parallel_sizes=(1, 2))
    alone, half = "A100-80GB", "A100-80GB shared by 2 (x 1.5)"
    assert set(costs) == {
        ModeKey(alone, 1), ModeKey(alone, 2), ModeKey(alone, 1, 2), ModeKey(half, 1),
        ModeKey(half, 2),
    }  # fmt: skip
    steps = StepTable(*(np.array([n]) for n in (8, 8, 0, 0)), *(np.zeros(1) + n for n in (0, 9, 2)))
    for size in (1, 2):
        one, part = costs[ModeKey(alone, size)], costs[ModeKey(half, size)]
        assert 0 < part.kv_cache_tokens < one.kv_cache_tokens / 2
        assert part.latency.step_seconds(steps) == pytest.approx(
            1.5 * one.latency.step_seconds(steps)
        )
        assert part.load == one.load
        assert part.provenance.error_pct is None
        assert "times 1.5, as 2 engines share the device" in part.provenance.source


def test_a_core_that_engines_share_starts_them_more_slowly() -> None:
    """All of a start may be what can be done ahead, and is after rounding, too."""
    start_s = 0.11

    class Cores(Flat):
        def load_times(self, model: Any, gpu: Any, tp: int, pp: int = 1) -> LoadTimes:
            return LoadTimes(start_s, start_s + 90.0, prepare_s=start_s)

    app = Application("a", (ModelNode("s", SMALL, RequestTable.of([100] * 8, 50)),))
    core = Cluster.uniform(Gpu("core", 40 * 2**30), 1)
    (costs,) = collect_costs(app, share_gpus(core, [Sharing(2, 3.41)]), Cores())
    (load,) = (c.load for c in costs.values())
    assert load.warm_s == load.prepare_s == 3.41 * start_s
    assert load.cold_s - load.warm_s == pytest.approx(90.0)
