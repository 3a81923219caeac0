"""Third parties' estimators and latency models: named and isolated, whatever they do."""

from __future__ import annotations

import os
import sys
import time

import numpy as np
import pytest

from samullm_plugin import InputError, LengthObservations, LengthQuery, PluginError
from samullm_plugin.planning.building import collect_costs
from samullm_plugin.planning.estimators import (
    IsolatedLengthEstimator,
    make_latency_model,
    make_length_estimator,
)

LENGTHS = """
    import os, sys, time
    import numpy as np
    from samullm_plugin import InputError, LengthEstimator, hookimpl

    class Base(LengthEstimator):
        def __init__(self, config=None):
            super().__init__(config)
            self.mean = 10
        def fit(self, observations):
            fitted = type(self)(self.config)
            fitted.mean = int(np.mean([o.output_tokens.mean() for o in observations]))
            return fitted
        def sample(self, query, rng, num_scenarios):
            drawn = rng.integers(1, 2 * self.mean, (num_scenarios, len(query)))
            return np.clip(drawn, 1, query.max_tokens)

    class Good(Base):
        '''Works, prints, reads stdin and leaves something behind.'''
        name = "good"
        def sample(self, query, rng, num_scenarios):
            print("not in the answer")
            sys.stdin.read()
            os.environ["LEFT_BEHIND"] = str(os.getpid())
            return super().sample(query, rng, num_scenarios)
        def source(self, model):
            return f"{model} {os.getpid()} mean {self.mean}"

    class Bad(Base):
        '''Does what its option says.'''
        name = "bad"
        def fit(self, observations):
            return self._do(os.environ.get("BAD_FIT"), observations[0].output_tokens)
        def sample(self, query, rng, num_scenarios):
            drawn = np.ones((num_scenarios, len(query)), np.int64)
            return self._do(os.environ.get("BAD_SAMPLE"), query.prompt_tokens, drawn)
        def _do(self, what, array, drawn=None):
            if what == "raise":
                raise KeyError("gone")
            if what == "input":
                raise InputError("length-estimator bad: knows nothing of this model")
            if what == "hang":
                time.sleep(600)
            if what == "exit":
                os._exit(3)
            if what == "sys-exit":
                sys.exit("bye")
            if what == "change":
                array[:] = 1
            if what == "zero":
                drawn[:] = 0
            if what == "long":
                drawn[:] = 10**6
            if what == "shape":
                drawn = drawn[:, :1]
            if what == "float":
                drawn = drawn * 1.5
            if what == "nonsense":
                return "nonsense"
            if what == "unpicklable":
                self.cannot = lambda: None
            return self if drawn is None else drawn

    @hookimpl
    def register_length_estimators(register):
        register(Good)
        register(Bad)
"""

LATENCY = """
    import numpy as np
    from samullm_plugin import (
        Curve, LatencyModel, LoadTimes, Provenance, StepLatency, hookimpl,
    )

    class Steps:
        def __init__(self, fault):
            self.fault = fault
        def step_seconds(self, steps):
            if self.fault == "step-raises":
                return 1 / 0
            if self.fault == "step-negative":
                return -np.ones(len(steps))
            if self.fault == "step-shape":
                return np.ones(len(steps) + 1)
            return np.full(len(steps), 0.01)

    class Base(LatencyModel):
        fault = ""
        def step_latency(self, model, gpu, tensor_parallel_size, pipeline_parallel_size=1):
            print("for people")
            if self.fault == "raises":
                raise ZeroDivisionError("no idea")
            if self.fault == "nonsense":
                return 0.01
            return Steps(self.fault)
        def kv_cache_tokens(self, model, gpu, tensor_parallel_size, pipeline_parallel_size=1):
            return "many" if self.fault == "kv" else 100_000
        def load_times(self, model, gpu, tensor_parallel_size, pipeline_parallel_size=1):
            return LoadTimes(warm_s=1.0, cold_s=2.0)
        def provenance(self, model, gpu, tensor_parallel_size, pipeline_parallel_size=1):
            return Provenance("assumed", "a constant")

    @hookimpl
    def register_latency_models(register):
        for fault in ("raises", "nonsense", "kv", "step-raises", "step-negative", "step-shape",
                      "fine"):
            register(type(fault, (Base,), {
                "__doc__": fault, "name": fault, "fault": fault, "__module__": __name__,
            }))
"""


@pytest.fixture
def host(install, load):
    install("samullm-lengths", main=LENGTHS)
    install("samullm-latency", main=LATENCY)
    return load()


def query(count=5):
    return LengthQuery(
        "some/model",
        "",
        np.full(count, 7),
        np.full(count, 40),
        np.zeros(count, np.int64),
        2048,
    )


def seen(mean=30):
    return LengthObservations("some/model", "", np.full(9, 7), np.full(9, mean), np.zeros(9, bool))


def test_shipped_estimators_are_not_isolated():
    from samullm_plugin import PluginHost

    shipped = make_length_estimator(PluginHost(), "ecdf")
    assert not isinstance(shipped, IsolatedLengthEstimator)


def test_answers_are_those_of_the_estimator_and_nothing_is_left_behind(host, capfd):
    estimator = make_length_estimator(host, "good")
    assert isinstance(estimator, IsolatedLengthEstimator)
    rng, twin = np.random.default_rng(1), np.random.default_rng(1)
    drawn = estimator.sample(query(), rng, 3)
    assert drawn.tolist() == twin.integers(1, 20, (3, 5)).clip(1, 40).tolist()
    assert rng.bit_generator.state == twin.bit_generator.state  # it goes on where it ended
    assert "LEFT_BEHIND" not in os.environ
    out, err = capfd.readouterr()
    assert "not in the answer" not in out
    assert "not in the answer" in err


def test_fit_is_kept_and_one_child_serves_all(host):
    estimator = make_length_estimator(host, "good")
    fitted = estimator.fit([seen(30)])
    first, second = estimator.source("m").split(), fitted.source("m").split()
    assert first[1] == second[1] != str(os.getpid())
    assert (first[-1], second[-1]) == ("10", "30")
    assert fitted.fit([seen(50)]).source("m").endswith("50")
    assert fitted.source("m").endswith("30")


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("raise", "sample raised KeyError: 'gone'"),
        ("hang", "sample did not answer within 3 s and was ended"),
        ("exit", "sample ended its process"),
        ("sys-exit", "sample raised SystemExit: bye"),
        ("change", "sample changed the query it was given"),
        ("zero", "is below 1"),
        ("long", "is above max_tokens"),
        ("shape", "samples have shape"),
        ("float", "whole numbers are needed"),
        ("nonsense", "samples have shape"),
    ],
)
def test_a_bad_sample_is_named(host, monkeypatch, what, message):
    monkeypatch.setenv("BAD_SAMPLE", what)
    estimator = make_length_estimator(host, "bad", limit_s=3.0)
    with pytest.raises(PluginError, match="length-estimator samullm-lengths:bad") as caught:
        estimator.sample(query(), np.random.default_rng(0), 2)
    assert message in str(caught.value)
    monkeypatch.delenv("BAD_SAMPLE")
    if what in ("exit", "hang"):  # the next call has a new child
        drawn = estimator.sample(query(), np.random.default_rng(0), 2)
        assert drawn.shape == (2, 5)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("raise", "fit raised KeyError: 'gone'"),
        ("hang", "fit did not answer within 3 s and was ended"),
        ("change", "fit changed the observations it was given"),
        ("nonsense", "fit returned a str, not a LengthEstimator"),
        ("unpicklable", "cannot be pickled"),
    ],
)
def test_a_bad_fit_is_named(host, monkeypatch, what, message):
    monkeypatch.setenv("BAD_FIT", what)
    estimator = make_length_estimator(host, "bad", limit_s=3.0)
    with pytest.raises(PluginError, match="length-estimator samullm-lengths:bad") as caught:
        estimator.fit([seen()])
    assert message in str(caught.value)


def test_a_hanging_call_is_really_ended(host, monkeypatch):
    import psutil

    before = psutil.Process().children(recursive=True)
    monkeypatch.setenv("BAD_SAMPLE", "hang")
    estimator = make_length_estimator(host, "bad", limit_s=2.0)
    began = time.monotonic()
    with pytest.raises(PluginError):
        estimator.sample(query(), np.random.default_rng(0), 1)
    assert time.monotonic() - began < 20
    assert set(psutil.Process().children(recursive=True)) <= set(before)


def test_what_the_plugin_tells_the_user_stays_an_input_error(host, monkeypatch):
    monkeypatch.setenv("BAD_SAMPLE", "input")
    with pytest.raises(InputError, match="knows nothing of this model"):
        make_length_estimator(host, "bad").sample(query(), np.random.default_rng(0), 1)


@pytest.mark.skipif(sys.platform != "linux", reason="counts processes")
def test_the_child_ends_with_its_estimators(host):
    import gc

    import psutil

    estimator = make_length_estimator(host, "good")
    fitted = estimator.fit([seen()])
    pid = int(fitted.source("m").split()[1])
    del estimator
    gc.collect()
    assert psutil.pid_exists(pid)
    del fitted
    gc.collect()
    assert not psutil.pid_exists(pid)


def sized(host, name):
    from samullm_plugin import PluginHost
    from samullm_plugin.planning.applications import build_named

    loaded = build_named(PluginHost(), "small-1")
    return loaded, collect_costs(loaded.app, loaded.cluster, make_latency_model(host, name))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("raises", "raised ZeroDivisionError: no idea"),
        ("nonsense", "float"),
        ("kv", "gave a str"),
    ],
)
def test_a_latency_model_that_fails_is_named(host, name, message, capsys):
    with pytest.raises(PluginError, match=f"latency-model samullm-latency:{name}") as caught:
        sized(host, name)
    assert message in str(caught.value)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("step-raises", "step_seconds raised ZeroDivisionError"),
        ("step-negative", "an iteration of -1.0 s"),
        ("step-shape", "instead of"),
    ],
)
def test_iterations_of_a_latency_model_that_fail_are_named(host, name, message):
    from samullm_plugin import PluginHost
    from samullm_plugin.planning.building import build_problem
    from samullm_plugin.planning.planner import make_plan

    loaded, _ = sized(host, name)
    problem = build_problem(
        loaded.app,
        loaded.cluster,
        make_length_estimator(PluginHost(), "ecdf"),
        make_latency_model(host, name),
        scenarios=1,
        rng=np.random.default_rng(0),
    )
    with pytest.raises(PluginError, match=f"latency-model samullm-latency:{name}") as caught:
        make_plan(PluginHost(), problem, "max-heuristic")
    assert message in str(caught.value)


def test_a_latency_model_that_works_is_left_alone(host):
    loaded, costs = sized(host, "fine")
    assert len(costs) == len(loaded.app.nodes)
    assert all(mode.kv_cache_tokens == 100_000 for by_size in costs for mode in by_size.values())
