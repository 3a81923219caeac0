"""The third-party examples, installed with pip beside the wheel, and plugins that misbehave."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]

EXAMPLES = {
    "samullm-one-by-one": ("scheduler", "one-by-one"),
    "samullm-geometric": ("length-estimator", "geometric"),
    "samullm-roofline": ("latency-model", "roofline"),
    "samullm-longest-prompt": ("request-policy", "longest-prompt"),
    "samullm-fixed-rate": ("executor", "fixed-rate"),
}

MISBEHAVING = """
    import sys
    from samullm_plugin import StageScheduler, hookimpl

    class Base(StageScheduler):
        def schedule(self, problem, context):
            return context.schedule_with("max-heuristic")

    class Raises(Base):
        '''Raises.'''
        name = "raises"
        def schedule(self, problem, context):
            raise ValueError("no idea")

    class Hangs(Base):
        '''Hangs.'''
        name = "hangs"
        def schedule(self, problem, context):
            while True:
                pass

    class Prints(Base):
        '''Prints to stdout.'''
        name = "prints"
        def schedule(self, problem, context):
            print("this must not mix with the JSON")
            return super().schedule(problem, context)

    class Changes(Base):
        '''Changes the problem.'''
        name = "changes"
        def schedule(self, problem, context):
            for scenario in problem.scenarios:
                for outputs in scenario.output_tokens:
                    outputs[:] = 1
            return super().schedule(problem, context)

    class Nonsense(Base):
        '''Returns a string.'''
        name = "nonsense"
        def schedule(self, problem, context):
            return "a plan"

    class Invalid(Base):
        '''Returns an invalid plan.'''
        name = "invalid"
        def schedule(self, problem, context):
            plan = super().schedule(problem, context)
            return type(plan)(plan.stages[:1])

    class Exits(Base):
        '''Ends its process.'''
        name = "exits"
        def schedule(self, problem, context):
            import os
            os._exit(3)

    @hookimpl
    def register_schedulers(register):
        for cls in (Raises, Hangs, Prints, Changes, Nonsense, Invalid, Exits):
            register(cls)
    """


@pytest.mark.slow
def test_examples_install_pass_their_tests_and_appear_in_the_bench(
    installed, example_wheel, tmp_path
):
    wheels = [str(example_wheel(name)) for name in EXAMPLES]
    installed.install(*wheels, "pytest", "hypothesis")
    try:
        rows = json.loads(installed.run("samullm", "plugins", "--json").stdout)
        found = {r["distribution"]: (r["kind"], r["name"]) for r in rows if r["status"] == "ok"}
        assert {k: found.get(k) for k in EXAMPLES} == EXAMPLES
        for name in EXAMPLES:  # away from this repository's own pytest options
            tests = REPOSITORY / "examples" / "plugins" / name / "tests"
            shutil.copytree(tests, tmp_path / name.replace("-", "_"))
        words = ("-q", "--import-mode", "importlib", str(tmp_path))
        done = installed.run("python", "-m", "pytest", *words)
        assert done.returncode == 0, done.stdout + done.stderr
        words = ["--apps", "small-1", "--schedulers", "one-by-one,greedy,exact", "--seeds", "1"]
        done = installed.run("samullm", "bench", *words, "--output-json", "-")
        assert done.returncode == 0, done.stderr
        rows = json.loads(done.stdout)["rows"]
        assert [r["scheduler"] for r in rows] == ["one-by-one", "greedy", "exact"]
        assert all(r["realised_s"] > 0 for r in rows), rows
    finally:
        installed.run("python", "-m", "pip", "uninstall", "--yes", "--quiet", *EXAMPLES)


@pytest.mark.slow
def test_schedulers_that_misbehave_are_named_and_the_rest_still_appear(installed, third_party):
    third_party("samullm-naughty", MISBEHAVING)
    expected = {
        "raises": "raised ValueError: no idea",
        "hangs": "did not answer within 8 s and was ended",
        "changes": "changed the problem it was given",
        "nonsense": "returned a str, not a Plan",
        "invalid": "[completeness]",
        "exits": "ended its process (exit status 3)",
    }
    names = ",".join(["greedy", *expected, "prints"])
    words = ["--apps", "small-1", "--schedulers", names, "--seeds", "1", "--output-json", "-"]
    done = installed.run("samullm", "bench", *words, SAMULLM_THIRD_PARTY_LIMIT_S="8")
    assert done.returncode == 1, done.stderr
    rows = {r["scheduler"]: r for r in json.loads(done.stdout)["rows"]}
    for name, fault in expected.items():
        assert fault in rows[name]["note"], (name, rows[name]["note"])
        assert f"samullm-naughty:{name}" in rows[name]["note"]
        assert rows[name]["simulated_s"] is None
    for name in ("greedy", "prints"):
        assert rows[name]["simulated_s"] > 0, rows[name]["note"]
    assert "must not mix" not in done.stdout
    done = installed.run("samullm", "plan", "small-1", "--scheduler", "raises")
    assert done.returncode == 1
    assert "samullm-naughty:raises raised ValueError: no idea" in done.stderr
    assert "Traceback" not in done.stderr


MISBEHAVING_ESTIMATORS = """
    import os, time
    import numpy as np
    from samullm_plugin import (
        Curve, LatencyModel, LengthEstimator, LoadTimes, Provenance, StepLatency, hookimpl,
    )

    class Base(LengthEstimator):
        def fit(self, observations):
            return self
        def sample(self, query, rng, num_scenarios):
            return np.tile(query.max_tokens, (num_scenarios, 1))

    class Prints(Base):
        '''Prints to stdout.'''
        name = "prints-lengths"
        def sample(self, query, rng, num_scenarios):
            print("this must not mix with the JSON")
            return super().sample(query, rng, num_scenarios)

    class Hangs(Base):
        '''Hangs in fit.'''
        name = "hangs-lengths"
        def fit(self, observations):
            time.sleep(600)

    class Zero(Base):
        '''Returns zero.'''
        name = "zero-lengths"
        def sample(self, query, rng, num_scenarios):
            return super().sample(query, rng, num_scenarios) * 0

    class Changes(Base):
        '''Changes its question.'''
        name = "changes-lengths"
        def sample(self, query, rng, num_scenarios):
            query.prompt_tokens[:] = 1
            return super().sample(query, rng, num_scenarios)

    class Exits(Base):
        '''Ends its process.'''
        name = "exits-lengths"
        def fit(self, observations):
            os._exit(3)

    class Small(LatencyModel):
        '''Raises for two models.'''
        name = "raises-latency"
        def step_latency(self, model, gpu, tensor_parallel_size, pipeline_parallel_size=1):
            if model.name.endswith(("alpaca-13b", "vicuna-13b-v1.5")):
                raise KeyError(model.name)
            return StepLatency(Curve.constant(0.020))
        def kv_cache_tokens(self, model, gpu, tensor_parallel_size, pipeline_parallel_size=1):
            return 100_000
        def load_times(self, model, gpu, tensor_parallel_size, pipeline_parallel_size=1):
            return LoadTimes(warm_s=10.0, cold_s=20.0)
        def provenance(self, model, gpu, tensor_parallel_size, pipeline_parallel_size=1):
            return Provenance("assumed", "a constant")

    @hookimpl
    def register_length_estimators(register):
        for cls in (Prints, Hangs, Zero, Changes, Exits):
            register(cls)

    @hookimpl
    def register_latency_models(register):
        register(Small)
    """


@pytest.mark.slow
def test_estimators_that_misbehave_are_named_and_the_rest_still_appear(
    installed, third_party, tmp_path
):
    third_party("samullm-guess", MISBEHAVING_ESTIMATORS)
    seen = tmp_path / "seen.jsonl"
    lines = [{"model": "a", "prompt_tokens": 5, "output_tokens": n + 1} for n in range(40)]
    seen.write_text("\n".join(json.dumps(line) for line in lines))
    expected = {
        "hangs-lengths": "fit did not answer within 15 s and was ended",
        "zero-lengths": "is below 1",
        "changes-lengths": "sample changed the query it was given",
        "exits-lengths": "fit ended its process (exit status 3)",
    }
    names = " ".join(["ecdf", *expected, "prints-lengths"])
    words = ["--observations", str(seen), "--app", "none", "--estimators", names]
    more = ["--samples", "20", "--output-json", "-"]
    limit = {"SAMULLM_THIRD_PARTY_LIMIT_S": "15"}
    done = installed.run("samullm", "bench", "lengths", *words, *more, **limit)
    assert done.returncode == 1, done.stderr
    found = json.loads(done.stdout)
    assert {s["estimator"] for s in found["scores"]} == {"ecdf", "prints-lengths"}
    for name, fault in expected.items():
        assert fault in found["failed"][name], found["failed"]
        assert f"samullm-guess:{name}" in found["failed"][name]
    assert "Traceback" not in done.stderr
    file = tmp_path / "app.yaml"
    file.write_text(
        "version: 1\nname: guessed\napplications: [small-1]\ncluster: {gpus: 2, nvlink: 2}\n"
        "planner: {length_estimator: zero-lengths}\n"
    )
    done = installed.run("samullm", "plan", str(file), "--scheduler", "max-heuristic")
    assert done.returncode == 1, done.stderr
    assert "samullm-guess:zero-lengths" in done.stderr
    assert "Traceback" not in done.stderr
    # small-3 has a model that the latency model raises for, small-5 has none
    words = ["--apps", "small-3 small-5", "--schedulers", "max-heuristic", "--seeds", "1"]
    model = ["--latency-model", "raises-latency", "--output-json", "-"]
    done = installed.run("samullm", "bench", *words, *model)
    assert done.returncode == 1, done.stderr
    found = json.loads(done.stdout)
    assert [r["application"] for r in found["rows"]] == ["small-5"]
    assert "samullm-guess:raises-latency" in found["failed"]["small-3"]
    assert "KeyError" in found["failed"]["small-3"]
