"""Sampling an application's requests, running them, and what is written down."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from samullm_simulated.plugin import SimulatedExecutor

from samullm_plugin.cli.app import main
from samullm_plugin.errors import InputError, RunError
from samullm_plugin.host.interfaces.executor import EngineEvent, EngineSpec
from samullm_plugin.measuring.lengths import (
    EngineSetup,
    Masks,
    MeasuredLengths,
    measure_lengths,
    sample_requests,
)
from samullm_plugin.model.scenarios import make_scenario
from samullm_plugin.profiling.observations import read_length_profile
from samullm_plugin.run.length_prompts import LengthPrompts
from samullm_plugin.run.prompts import Refused
from samullm_plugin.testing.factories import GPU, TestNode, make_problem
from tests.run.worlds import small_problem

PROBLEM = small_problem(n=40)
LIMIT = {"sampling_params": {"max_tokens": 100}}


def measure(
    masks: Masks, executor: SimulatedExecutor | None = None, engines: int = 1, **changes: object
) -> MeasuredLengths:
    """Measure the small problem, whose true lengths are known."""
    problem = changes.pop("problem", PROBLEM)
    truth = make_scenario(problem.app, problem.scenarios[0].output_tokens, masks)  # type: ignore[attr-defined]
    executor = executor or SimulatedExecutor()
    executor.imitate(problem.with_scenarios((truth,)))  # type: ignore[attr-defined]
    costs = tuple(next(iter(c.values())) for c in problem.costs)  # type: ignore[attr-defined]
    setup = EngineSetup(
        num_engines=engines, gpu=GPU, kv_cache_tokens=costs[0].kv_cache_tokens, costs=costs
    )
    return measure_lengths(executor, problem.app, LengthPrompts(truth), masks, setup)  # type: ignore[attr-defined]


@settings(max_examples=60, deadline=None)
@given(count=st.integers(1, 50), seed=st.integers(0, 1000))
def test_a_sample_holds_everything_its_prompts_need(count: int, seed: int) -> None:
    app = PROBLEM.app
    masks = sample_requests(app, count, np.random.default_rng(seed))
    for node, mask in zip(app.nodes, masks, strict=True):
        assert mask.sum() >= min(count, len(node.requests))
        table = node.requests
        for row, i, r in zip(table.input_row, table.input_node, table.input_request, strict=True):
            assert not mask[row] or masks[i][r]
    # the last node is needed by nobody, so it is sampled to the letter
    assert masks[-1].sum() == min(count, len(app.nodes[-1].requests))


def test_what_others_need_counts_as_sampled() -> None:
    masks = sample_requests(PROBLEM.app, 10, np.random.default_rng(0))
    assert masks[0].sum() == 10  # the ten answers that the ten judgements need, and no more


@pytest.mark.parametrize("engines", [1, 3])
def test_every_sampled_request_is_measured_with_its_true_length(engines: int) -> None:
    masks = sample_requests(PROBLEM.app, 12, np.random.default_rng(1))
    measured = measure(masks, engines=engines)
    assert not measured.failed
    assert measured.num_run == sum(m.sum() for m in masks)
    by_model = {s.model: s for s in measured.observations}
    for i, node in enumerate(PROBLEM.app.nodes):
        seen = by_model[node.model.name]
        expected = PROBLEM.scenarios[0].output_tokens[i][masks[i]]
        assert seen.output_tokens.tolist() == expected.tolist()
        assert not seen.censored.any()
        if not (node.requests.input_in_prompt.any()):
            assert seen.prompt_tokens.tolist() == node.requests.prompt_tokens[masks[i]].tolist()


def test_outputs_that_reach_the_limit_are_censored() -> None:
    nodes = [TestNode("a", [10] * 6, [5, 50, 500, 22, 22, 3], max_model_len=32)]
    problem = make_problem(nodes, 1, nvlink=1)
    (seen,) = measure((np.ones(6, bool),), problem=problem).observations
    assert seen.output_tokens.tolist() == [5, 22, 22, 22, 22, 3]
    assert seen.censored.tolist() == [False, True, True, True, True, False]


class Broken(SimulatedExecutor):
    """Its engines die."""

    name = "broken"

    def poll(self, timeout_s: float) -> Sequence[EngineEvent]:
        return [EngineEvent(key, "failed", 0.0, reason="no memory") for key in self.started]

    def start_engine(self, spec: EngineSpec) -> None:
        self.started = [spec.key]

    closed = False

    def close(self) -> None:
        self.closed = True


def test_an_engine_that_fails_ends_it_with_its_reason_and_nothing_stays() -> None:
    executor = Broken()
    with pytest.raises(RunError, match=r"model-a failed: no memory; .*--kv-cache-tokens"):
        measure(sample_requests(PROBLEM.app, 2, np.random.default_rng(0)), executor)
    assert executor.closed


def test_requests_that_all_fail_are_an_error() -> None:
    nodes = [TestNode("a", [20], [5], max_model_len=32)]
    problem = make_problem(nodes, 1, nvlink=1)

    class TooLong(LengthPrompts):
        def prepare(self, request, ledger):  # type: ignore[no-untyped-def]  # as its base
            prompt = super().prepare(request, ledger)
            return type(prompt)(40, 5, output_tokens=5)

    executor = SimulatedExecutor()
    executor.imitate(problem)
    costs = tuple(next(iter(c.values())) for c in problem.costs)
    setup = EngineSetup(gpu=GPU, kv_cache_tokens=100, costs=costs)
    masks = (np.ones(1, bool),)
    with pytest.raises(InputError, match=r"no request .* prompt of 40 tokens"):
        measure_lengths(executor, problem.app, TooLong(problem.scenarios[0]), masks, setup)


def test_last_requests_whose_prompts_cannot_be_made_fail_alone() -> None:
    nodes = [TestNode("a", [20] * 3, [5] * 3, inputs=[[], [(0, 0)], [(0, 1)]])]
    problem = make_problem(nodes, 1, nvlink=1)

    class Breaks(LengthPrompts):
        def prepare(self, request, ledger):  # type: ignore[no-untyped-def]  # as its base
            made = super().prepare(request, ledger)
            return Refused("the template fails on this output") if request[1] == 1 else made

    executor = SimulatedExecutor()
    executor.imitate(problem)
    costs = tuple(next(iter(c.values())) for c in problem.costs)
    setup = EngineSetup(gpu=GPU, kv_cache_tokens=100, costs=costs)
    prompts, masks = Breaks(problem.scenarios[0]), (np.ones(3, bool),)
    measured = measure_lengths(executor, problem.app, prompts, masks, setup)
    assert [len(s.output_tokens) for s in measured.observations] == [1]
    reasons = ["the template fails on this output", "its input request-1 of node a failed"]
    assert measured.failed == tuple(("a", r, why) for r, why in enumerate(reasons, 1))


# --- from outside ---


def test_the_file_is_what_a_planner_takes(tmp_path: Path) -> None:
    profile = tmp_path / "lengths.json"
    command = ["profile", "lengths", "ensembling:requests=60", "--sample=50", f"-o{profile}"]
    assert main([*command, "--executor=simulated"]) == 0
    found = read_length_profile(profile)
    assert len(found.observations) == 9
    assert all(len(s.output_tokens) == 50 for s in found.observations)
    assert "nothing was measured" in found.source  # lengths of a simulation are no measurement
    app = tmp_path / "app.yaml"
    (tmp_path / "r.jsonl").write_text('{"prompt": "hello"}\n' * 20)
    app.write_text(
        json.dumps(
            {
                "version": 1,
                "name": "mine",
                "models": {"m": {"model": "lmsys/vicuna-13b-v1.5"}},
                "nodes": {"answer": {"model": "m", "requests": "r.jsonl", **LIMIT}},
                "cluster": {"gpus": 1},
                "planner": {
                    "scheduler": "min-heuristic",
                    "length_estimator": {"type": "ecdf", "options": {"profile": str(profile)}},
                },
            }
        )
    )
    plan = tmp_path / "plan.json"
    assert main(["plan", str(app), "--output-json", str(plan)]) == 0
    assert json.loads(plan.read_text())["makespan_s"][0] > 0


def test_prompts_are_measured_without_an_application(tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    lines = [{"prompt": "hello " * i, "max_tokens": 10 + i} for i in range(1, 31)]
    prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))
    out = tmp_path / "lengths.json"
    said = tmp_path / "said.json"
    arguments = ["--model=lmsys/vicuna-13b-v1.5", "--sample=25", "--executor=simulated"]
    command = ["profile", "lengths", f"--prompts={prompts}", *arguments, f"-o{out}"]
    assert main([*command, f"--output-json={said}"]) == 0
    (seen,) = read_length_profile(out).observations
    assert seen.model == "lmsys/vicuna-13b-v1.5"
    assert len(seen.output_tokens) == 25
    assert (seen.output_tokens <= 40).all()
    assert seen.censored.any()
    assert json.loads(said.read_text())["lengths"][0]["outputs"] == 25


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give an app.yaml, or --prompts"),
        (["ensembling", "--prompts=p.jsonl"], "give an app.yaml, or --prompts"),
        (["--prompts=p.jsonl"], "--prompts needs --model"),
        (["--prompts=none.jsonl", "--model=vicuna-13b-v1.5"], "there is no such requests file"),
        (["--prompts=p.jsonl", "--model=nobody/knows"], "give --max-model-len"),
        (["--prompts=p.jsonl", "--model=vicuna-13b-v1.5", "--engine-arg=dtype"], "key=value"),
        (["ensembling", "--model=vicuna-13b-v1.5"], "--model goes with --prompts"),
        (["ensembling", "--executor=nothing"], "nothing"),
        (["ensembling", "--executor=vllm"], "has no prompts"),
    ],
)
def test_wrong_input_is_one_message(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.jsonl").write_text('{"prompt": "hello"}\n')
    assert main(["profile", "lengths", *arguments, "-o", "lengths.json"]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
    assert not (tmp_path / "lengths.json").exists()
