"""Real engines that go on for other nodes of their model: fewer starts, the same texts."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from textwrap import dedent

import pytest

from samullm_plugin.app.loading import read_spec
from samullm_plugin.app.spec import ModelSection
from samullm_plugin.model.parallel import ParallelConfig
from samullm_plugin.model.plan import Assignment, Plan, Stage
from samullm_plugin.planning.reporting import sharing_lines
from samullm_plugin.profiling.loading import resident
from samullm_plugin.run.run import start_run
from samullm_plugin.simulator import PlanSimulator
from tests.models import make_tiny_llama
from tests.run.test_pipelines import ENGINE, outputs, setup_of

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]

APP = """
    version: 1
    name: judged
    models:
      writer: {model: one}
      judge: {model: two}
      wide: {model: two}
    nodes:
      write:
        model: writer
        requests: tasks.jsonl
        sampling_params: {temperature: 0, max_tokens: 20}
      check0:
        model: judge
        for_each: write
        prompt: "Is this usable? {{ output }}"
        output_schema: {choice: ["yes", "no"]}
        sampling_params: {temperature: 0, max_tokens: 8}
      check1:
        model: judge
        for_each: write
        chat: true
        messages: [{system: "Be strict."}, {user: "Rate {{ write }}."}]
        sampling_params: {temperature: 0, max_tokens: 6, logprobs: 2}
      answer:
        model: writer
        inputs: {first: check0, second: check1}
        prompt: "{{ first }} {{ second }} so:"
        sampling_params: {temperature: 0, max_tokens: 12}
      check2:
        model: wide
        for_each: answer
        sampling_params: {temperature: 0, max_tokens: 5, min_tokens: 2}
"""
NODES = ("write", "check0", "check1", "answer", "check2")


def test_a_judge_is_started_once_on_real_engines(tmp_path: Path) -> None:
    for k, name in enumerate(("one", "two")):
        make_tiny_llama(tmp_path / name, seed=k, characters=True, vocab_size=104)
    (tmp_path / "app.yaml").write_text(dedent(APP))
    lines = [{"id": f"t{k}", "prompt": f"Write about {k}."} for k in range(4)]
    (tmp_path / "tasks.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))

    def model(name: str, **changes: object) -> ModelSection:
        folder = str(tmp_path / name)
        args = {**ENGINE, **changes}
        return ModelSection(
            model=name, path=folder, architecture=folder, max_model_len=512, engine_args=args
        )

    models = {"writer": model("one"), "judge": model("two"), "wide": model("two", max_num_seqs=4)}
    one = ParallelConfig()
    plan = Plan(tuple(Stage((Assignment(n, one, (0,)),)) for n in NODES))
    told, texts = [], []
    for name in ("shared", "apart", "sleeping"):
        spec = read_spec(tmp_path / "app.yaml")
        ready = setup_of(spec, models, tmp_path / "app.yaml", tmp_path / name, cores=1)
        problem = ready.instance.problem
        if name == "apart":
            problem = problem.without_shared_engines()
        if name == "sleeping":  # which on CPU cores is to be left in peace
            sizes = [
                {k: replace(c, load=resident(c.load, node.model, 4096)) for k, c in s.items()}
                for node, s in zip(problem.app.nodes, problem.costs, strict=True)
            ]
            problem = replace(problem, costs=tuple(sizes), engine_of=problem.engine_numbers)
        ready = replace(ready, instance=replace(ready.instance, problem=problem))
        trace = PlanSimulator(problem).simulate_scenario(plan, 0)
        outcome = start_run(ready, plan)
        assert not outcome.failed
        figures = outcome.metrics
        told.append(tuple(figures[f"engine{n}"] for n in ("_starts", "s_taken_over", "s_woken")))
        planned = sum(s.ready_s == s.start_s and not s.woken for s in trace.segments)
        assert planned == figures["engines_taken_over"]  # as the plan says
        assert sum(s.woken for s in trace.segments) == figures["engines_woken"]
        texts.append({n: outputs(tmp_path / name, n) for n in NODES})
        if name == "shared":
            assert sharing_lines(problem, trace) == [
                "write, answer: the same engines; 0 of 2 times they are taken over from another "
                "node and not started",
                "check0, check1: the same engines; 1 of 2 times they are taken over from another "
                "node and not started",
                "check0, check2: one checkpoint, but engines of their own, as max_num_seqs differs",
            ]
    assert told == [(4, 1, 0), (5, 0, 0), (3, 1, 1)]
    assert texts[0] == texts[1] == texts[2]
    assert all(len(t) == 4 for t in texts[0].values())
