"""Deliberately wrong plugins: each is caught, by the rule it breaks."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from samullm_simulated.plugin import SimulatedExecutor

from samullm_plugin import (
    Assignment,
    Curve,
    LatencyModel,
    LengthEstimator,
    LoadTimes,
    ParallelConfig,
    Plan,
    Provenance,
    RequestPolicy,
    Stage,
    StageScheduler,
    StepLatency,
)
from samullm_plugin.testing.executor_contract import ExecutorContract
from samullm_plugin.testing.latency_contract import LatencyModelContract
from samullm_plugin.testing.length_contract import LengthEstimatorContract
from samullm_plugin.testing.policy_contract import RequestPolicyContract
from samullm_plugin.testing.rules import ContractViolation
from samullm_plugin.testing.scheduler_contract import SchedulerContract


def broken_rules(contract):
    """Run every test of a contract and return the rules found broken, by test."""
    found = set()
    for name in [n for n in dir(contract) if n.startswith("test_")]:
        test = getattr(contract(), name)
        marks = [m for m in getattr(test, "pytestmark", ()) if m.name == "parametrize"]
        cases = [{marks[0].args[0]: value} for value in marks[0].args[1]] if marks else [{}]
        for case in cases:
            try:
                test(**case)
            except ContractViolation as violation:
                found.add(violation.rule)
                assert str(violation).startswith(f"rule {violation.rule}: ")  # noqa: PT017  # several may come
    return found


# Schedulers


class OneByOne(StageScheduler):
    """A correct scheduler, to be spoilt below."""

    name = "one-by-one"

    def schedule(self, problem, context):
        stages = []
        for node in problem.app.order:
            parallel = problem.parallel_configs(node)[0]
            devices = problem.cluster.find_devices(range(problem.cluster.num_gpus), parallel)
            assignment = Assignment(problem.app.nodes[node].name, parallel, devices)
            stages.append(Stage((assignment,)))
        return Plan(tuple(stages))


class Overlaps(OneByOne):
    def schedule(self, problem, context):
        plan = super().schedule(problem, context)
        return Plan((Stage(tuple(s.assignments[0] for s in plan.stages)),))


class IgnoresPrecedence(OneByOne):
    def schedule(self, problem, context):
        return Plan(tuple(reversed(super().schedule(problem, context).stages)))


class DropsAModel(OneByOne):
    def schedule(self, problem, context):
        plan = super().schedule(problem, context)
        return Plan(plan.stages[:-1] or plan.stages)


class IgnoresMemory(OneByOne):
    def schedule(self, problem, context):
        plan = super().schedule(problem, context)
        eight = ParallelConfig(1, 1, 1)
        spoilt = [
            Stage(tuple(replace(a, parallel=eight, devices=(0,)) for a in s.assignments))
            for s in plan.stages
        ]
        return Plan(tuple(spoilt))


class ChangesItsMind(OneByOne):
    calls = 0

    def schedule(self, problem, context):
        type(self).calls += 1
        device = self.calls % problem.cluster.num_gpus
        plan = super().schedule(problem, context)
        moved = [
            replace(a, devices=(device,)) if a.parallel.num_devices == 1 else a
            for s in plan.stages
            for a in s.assignments
        ]
        return Plan(tuple(Stage((a,)) for a in moved))


class ChangesTheProblem(OneByOne):
    def schedule(self, problem, context):
        problem.app.nodes[0].requests.prompt_tokens[0] += 1
        return super().schedule(problem, context)


class ReturnsNonsense(OneByOne):
    def schedule(self, problem, context):
        return [super().schedule(problem, context)]


class ReportsAFalseBound(OneByOne):
    def schedule(self, problem, context):
        context.report_bound(100.0, "anything")
        context.report.objective_s = 99.0
        context.report.explanation["nobody"] = "because"
        return super().schedule(problem, context)


@pytest.mark.parametrize(
    ("wrong", "rule"),
    [
        (Overlaps, "valid-plan"),
        (IgnoresPrecedence, "valid-plan"),
        (DropsAModel, "valid-plan"),
        (IgnoresMemory, "valid-plan"),
        (ChangesItsMind, "deterministic"),
        (ChangesTheProblem, "leaves-problem"),
        (ReturnsNonsense, "returns-plan"),
        (ReportsAFalseBound, "true-bound"),
        (ReportsAFalseBound, "explains-nodes"),
    ],
)
def test_wrong_schedulers_are_caught(wrong, rule):
    contract = type("Contract", (SchedulerContract,), {"scheduler_class": wrong})
    if wrong is ReportsAFalseBound and rule == "true-bound":
        wrong = type("Bound", (OneByOne,), {"schedule": _bound_only})
        contract = type("Contract", (SchedulerContract,), {"scheduler_class": wrong})
    assert rule in broken_rules(contract)


def _bound_only(self, problem, context):
    context.report_bound(100.0, "anything")
    context.report.objective_s = 99.0
    return OneByOne.schedule(self, problem, context)


def test_a_correct_scheduler_breaks_no_rule():
    contract = type("Contract", (SchedulerContract,), {"scheduler_class": OneByOne})
    assert broken_rules(contract) == set()


# Length estimators


class Halfway(LengthEstimator):
    """A correct estimator, to be spoilt below."""

    name = "halfway"

    def fit(self, observations):
        return self

    def sample(self, query, rng, num_scenarios):
        low = np.minimum(query.generated_tokens + 1, query.max_tokens)
        return rng.integers(low, query.max_tokens + 1, (num_scenarios, len(query)))


class ReturnsZero(Halfway):
    def sample(self, query, rng, num_scenarios):
        return 0 * super().sample(query, rng, num_scenarios)


class BeyondTheLimit(Halfway):
    def sample(self, query, rng, num_scenarios):
        return super().sample(query, rng, num_scenarios) + 1


class IgnoresGenerated(Halfway):
    def sample(self, query, rng, num_scenarios):
        fresh = replace(query, generated_tokens=np.zeros_like(query.generated_tokens))
        return super().sample(fresh, rng, num_scenarios)


class GlobalRandomness(Halfway):
    def sample(self, query, rng, num_scenarios):
        shape = (num_scenarios, len(query))
        return np.random.randint(1, 3, shape)  # noqa: NPY002  # wrong on purpose


class FitsItself(Halfway):
    shift = 0

    def fit(self, observations):
        self.shift = -1
        return self

    def sample(self, query, rng, num_scenarios):
        drawn = super().sample(query, rng, num_scenarios)
        return np.maximum(drawn + self.shift, 1)


class KeepsWhatCannotBePickled(Halfway):
    def fit(self, observations):
        fitted = type(self)(self.config)
        fitted.rule = lambda length: length
        return fitted


class ForgetsWhenPickled(Halfway):
    learned = 0

    def fit(self, observations):
        fitted = type(self)(self.config)
        fitted.learned = 1
        return fitted

    def __getstate__(self):
        return {"config": self.config}

    def sample(self, query, rng, num_scenarios):
        drawn = super().sample(query, rng, num_scenarios)
        return np.broadcast_to(query.max_tokens, drawn.shape) if self.learned else drawn


class WrongShape(Halfway):
    def sample(self, query, rng, num_scenarios):
        return super().sample(query, rng, num_scenarios)[0]


class ChangesTheQuery(Halfway):
    def sample(self, query, rng, num_scenarios):
        drawn = super().sample(query, rng, num_scenarios)
        query.prompt_tokens[:] = 1
        return drawn


@pytest.mark.parametrize(
    ("wrong", "rule"),
    [
        (ReturnsZero, "at-least-one"),
        (BeyondTheLimit, "at-most-limit"),
        (IgnoresGenerated, "conditional"),
        (GlobalRandomness, "deterministic"),
        (FitsItself, "fit-leaves-self"),
        (KeepsWhatCannotBePickled, "fit-pickles"),
        (ForgetsWhenPickled, "fit-pickles"),
        (WrongShape, "shape"),
        (ChangesTheQuery, "leaves-query"),
    ],
)
def test_wrong_length_estimators_are_caught(wrong, rule):
    contract = type("Contract", (LengthEstimatorContract,), {"estimator_class": wrong})
    assert rule in broken_rules(contract)


def test_a_correct_estimator_breaks_no_rule():
    contract = type("Contract", (LengthEstimatorContract,), {"estimator_class": Halfway})
    assert broken_rules(contract) == set()


# Latency models


class Plain(LatencyModel):
    """A correct latency model, to be spoilt below."""

    name = "plain"

    def step_latency(self, model, gpu, tensor_parallel_size, pipeline_parallel_size=1):
        return StepLatency(Curve.line(0.01, 1e-5), context_token_s=1e-8)

    def kv_cache_tokens(self, model, gpu, tensor_parallel_size, pipeline_parallel_size=1):
        return 10_000 * tensor_parallel_size

    def load_times(self, model, gpu, tensor_parallel_size, pipeline_parallel_size=1):
        return LoadTimes(10.0, 60.0)

    def provenance(self, model, gpu, tensor_parallel_size, pipeline_parallel_size=1):
        return Provenance("assumed", "constants of a test")


class Negative(Plain):
    def step_latency(self, *size, **more):
        return StepLatency(Curve.line(-0.05, 1e-5))


class NotMonotone(Plain):
    def step_latency(self, *size, **more):
        return StepLatency(Curve((0.0, 100.0, 200.0), (0.02, 0.05, 0.02)))


class _Drifting:
    calls = 0

    def step_seconds(self, steps):
        type(self).calls += 1
        return np.full(len(steps), 0.01 * self.calls)


class Drifts(Plain):
    def step_latency(self, *size, **more):
        return _Drifting()


class _Whole:
    def step_seconds(self, steps):
        return np.full(len(steps), 0.01 * len(steps))


class DependsOnTheTable(Plain):
    def step_latency(self, *size, **more):
        return _Whole()


class NotANumber(Plain):
    def step_latency(self, *size, **more):
        return StepLatency(Curve.constant(0.01), context_token_s=float("inf"))


class NoStepModel(Plain):
    def step_latency(self, *size, **more):
        return 0.02


class LosesMemory(Plain):
    def kv_cache_tokens(self, model, gpu, tensor_parallel_size, pipeline_parallel_size=1):
        return 10_000 // tensor_parallel_size


class LoadsFasterCold(Plain):
    def load_times(self, *size, **more):
        return LoadTimes(60.0, 10.0)


class NoSource(Plain):
    def provenance(self, *size, **more):
        return Provenance("guessed", "")


@pytest.mark.parametrize(
    ("wrong", "rule"),
    [
        (Negative, "positive"),
        (NotMonotone, "monotone"),
        (Drifts, "deterministic"),
        (DependsOnTheTable, "row-by-row"),
        (NotANumber, "finite"),
        (NoStepModel, "step-model"),
        (LosesMemory, "kv-tokens"),
        (LoadsFasterCold, "load-times"),
        (NoSource, "provenance"),
    ],
)
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # infinity times zero, wanted
def test_wrong_latency_models_are_caught(wrong, rule):
    contract = type("Contract", (LatencyModelContract,), {"latency_class": wrong})
    found = broken_rules(contract)
    assert rule in found or (wrong is Drifts and "row-by-row" in found)


def test_a_correct_latency_model_breaks_no_rule():
    contract = type("Contract", (LatencyModelContract,), {"latency_class": Plain})
    assert broken_rules(contract) == set()


# Request policies


class InTurn(RequestPolicy):
    """A correct policy, to be spoilt below."""

    name = "in-turn"

    def assign(self, batch, num_replicas):
        return None, np.arange(len(batch)) % num_replicas


class BeyondTheReplicas(InTurn):
    def assign(self, batch, num_replicas):
        return None, np.arange(len(batch)) % (num_replicas + 1)


class Fractions(InTurn):
    def assign(self, batch, num_replicas):
        return batch.arrival_s, super().assign(batch, num_replicas)[1]


class TooFew(InTurn):
    def assign(self, batch, num_replicas):
        return None, super().assign(batch, num_replicas)[1][1:]


class Rolls(InTurn):
    def assign(self, batch, num_replicas):
        return None, np.random.default_rng().integers(0, num_replicas, len(batch))


class SortsTheBatch(InTurn):
    def assign(self, batch, num_replicas):
        batch.predicted_tokens.sort()
        return super().assign(batch, num_replicas)


@pytest.mark.parametrize(
    ("wrong", "rule"),
    [
        (BeyondTheReplicas, "replica-range"),
        (Fractions, "whole-numbers"),
        (TooFew, "shape"),
        (Rolls, "deterministic"),
        (SortsTheBatch, "leaves-batch"),
    ],
)
def test_wrong_policies_are_caught(wrong, rule):
    contract = type("Contract", (RequestPolicyContract,), {"policy_class": wrong})
    assert rule in broken_rules(contract)


# Executors


class Spoilt(SimulatedExecutor):
    """The simulated executor with its events tampered with."""

    def poll(self, timeout_s):
        return [replace(e, outputs=self.spoil(e.outputs)) for e in super().poll(timeout_s)]


class Loses(Spoilt):
    def spoil(self, outputs):
        return tuple(o for o in outputs if o.request != 2)


class Doubles(Spoilt):
    def spoil(self, outputs):
        return (*outputs, *(o for o in outputs if o.request == 1))


class Reorders(Spoilt):
    """Gives each request of a pair the other's output."""

    def spoil(self, outputs):
        return tuple(replace(o, request=o.request ^ 1) for o in outputs)


class Invents(Spoilt):
    def spoil(self, outputs):
        return (*outputs, *(replace(o, request=77) for o in outputs[:1]))


class NeverReady(SimulatedExecutor):
    def poll(self, timeout_s):
        return [e for e in super().poll(timeout_s) if e.kind != "ready"]


class ForgetsOnStop(SimulatedExecutor):
    def stop_engine(self, key):
        return super().stop_engine(key)[1:]


class MixesEngines(SimulatedExecutor):
    def poll(self, timeout_s):
        swap = {"a.0": "b.0", "b.0": "a.0"}
        return [replace(e, key=swap.get(e.key, e.key)) for e in super().poll(timeout_s)]


@pytest.mark.parametrize(
    ("wrong", "rule"),
    [
        (Loses, "nothing-lost"),
        (Doubles, "nothing-doubled"),
        (Reorders, "own-tokens"),
        (Invents, "nothing-invented"),
        (NeverReady, "ready-once"),
        (ForgetsOnStop, "nothing-lost"),
        (MixesEngines, "nothing-lost"),
    ],
)
def test_wrong_executors_are_caught(wrong, rule):
    fields = {"executor_class": wrong, "limit_s": 0.5}
    assert rule in broken_rules(type("Contract", (ExecutorContract,), fields))
