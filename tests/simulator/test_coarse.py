"""Problems with many requests are simulated by a part of them, closely."""

from __future__ import annotations

import numpy as np
import pytest

from samullm_plugin.host.manager import PluginHost
from samullm_plugin.model.application import EngineOptions
from samullm_plugin.model.problem import Problem
from samullm_plugin.planning.planner import make_plan
from samullm_plugin.rules.verify import verify
from samullm_plugin.simulator import PlanSimulator
from samullm_plugin.simulator.aggregation import aggregate
from samullm_plugin.testing.factories import TestNode, make_problem


def crowd(requests: int = 30_000, *, chained: bool = False, long_prompt_tokens: int = 0) -> Problem:
    """Return a writer and a reader of each of its outputs; first and last prompt may be long."""
    rng = np.random.default_rng(5)
    long_ones = np.isin(np.arange(requests), [0, requests - 1] if long_prompt_tokens else [])
    engine = EngineOptions(async_scheduling=False)
    made = [
        TestNode(
            name,
            np.where(long_ones, long_prompt_tokens, rng.integers(20, 200, requests)).tolist(),
            np.where(
                long_ones, 1, np.ceil(rng.lognormal(3.5, 0.7, requests)).astype(int).clip(1, 600)
            ).tolist(),
            inputs,
            step_s=0.02,
            token_s=0.0001,
            context_s=1e-7,
            engine=engine,
            kv_cache_tokens=60_000,
        )
        for name, inputs in (
            ("write", [[(0, r - 1)] if chained and r % 4 else [] for r in range(requests)]),
            ("read", [[(0, r)] for r in range(requests)]),
        )
    ]
    return make_problem(made, num_gpus=4)


@pytest.mark.parametrize("chained", [False, True])
def test_a_part_takes_about_as_long_as_the_whole(chained: bool) -> None:
    problem = crowd(chained=chained)
    whole = PlanSimulator(problem)
    part = whole.coarse()
    assert part.problem.app.num_requests < 0.5 * problem.app.num_requests
    assert part is whole.coarse()
    assert part.coarse() is part
    plan = make_plan(PluginHost(), problem, "max-heuristic", simulator=whole).plan
    assert verify(part.problem, plan) == ()
    for node, parallel in (
        (0, problem.parallel_configs(0)[0]),
        (1, problem.parallel_configs(1)[-1]),
    ):
        assert part.alone_s(0, node, parallel) == pytest.approx(
            whole.alone_s(0, node, parallel), rel=0.06
        )
    assert part.simulate_scenario(plan, 0).makespan_s == pytest.approx(
        whole.simulate_scenario(plan, 0).makespan_s, rel=0.06
    )


def test_long_prompts_with_short_outputs_are_not_the_ones_that_are_kept() -> None:
    problem = crowd(long_prompt_tokens=700)
    whole = PlanSimulator(problem)
    part = whole.coarse()
    assert part.problem.app.nodes[0].model.max_model_len < 700
    parallel = problem.parallel_configs(0)[0]
    assert part.alone_s(0, 0, parallel) == pytest.approx(whole.alone_s(0, 0, parallel), rel=0.06)


def test_requests_that_hang_together_are_kept_together() -> None:
    problem = crowd(chained=True)
    found = aggregate(problem, 10_000)
    assert found is not None
    for i, node in enumerate(found.problem.app.nodes):
        kept, table = found.kept[i], problem.app.nodes[i].requests
        assert node.requests.max_tokens.tolist() == table.max_tokens[kept].tolist()
        for new, old in enumerate(kept[:300]):
            mine = slice(*node.requests.input_indptr[new : new + 2])
            its = slice(*table.input_indptr[old : old + 2])
            sources = node.requests.input_node[mine]
            requests = node.requests.input_request[mine]
            moved = [found.kept[s][q] for s, q in zip(sources, requests, strict=True)]
            assert moved == table.input_request[its].tolist()
    longest = problem.scenarios[0].output_tokens[1].max()
    assert found.problem.scenarios[0].output_tokens[1].max() > 0.5 * longest


def test_small_problems_are_simulated_whole() -> None:
    simulator = PlanSimulator(crowd(200))
    assert simulator.coarse() is simulator
