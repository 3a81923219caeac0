"""What request policies do to a plan: the same plan, requests in another order."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from samullm_plugin.engine import EngineCache
from samullm_plugin.host.manager import PluginHost
from samullm_plugin.model.application import Application
from samullm_plugin.model.plan import Plan
from samullm_plugin.model.problem import Problem
from samullm_plugin.model.programs import program_ids
from samullm_plugin.model.result import PlanTrace
from samullm_plugin.model.scenarios import LengthScenario, make_scenario
from samullm_plugin.planning.applications import parse_named
from samullm_plugin.planning.building import sample_scenarios
from samullm_plugin.planning.estimators import make_length_estimator
from samullm_plugin.planning.policies import policy_call
from samullm_plugin.simulator import PlanSimulator

Prediction = Literal["exact", "noisy", "drawn"]
PREDICTIONS: Mapping[Prediction, str] = {
    "exact": "the true output lengths",
    "noisy": "the true lengths times log-normal noise",
    "drawn": "an independent draw of the estimator, which knows nothing of a single request",
}


@dataclass(frozen=True, slots=True)
class PolicyRow:
    """One policy on one application; seconds and means over the draws.

    Attributes:
        application: what was asked for.
        policy: its name and options; ``none``: no policy.
        prediction: what it believed of output lengths.
        makespan_s: when the last request finished.
        request_s: mean time at which requests finished.
        program_s: mean time at which programs (requests that wait for each other) finished.
        preemptions: recompute preemptions.
    """

    application: str
    policy: str
    prediction: Prediction
    makespan_s: float
    request_s: float
    program_s: float
    preemptions: float


def predictions(
    host: PluginHost, problem: Problem, kind: Prediction, *, estimator: str, noise: float, seed: int
) -> tuple[LengthScenario, ...]:
    """Return what policies believe, per scenario of a problem.

    Args:
        host: the plugins.
        problem: its scenarios are true.
        kind: see ``PREDICTIONS``.
        estimator: where ``drawn`` lengths come from.
        noise: standard deviation of the logarithm for ``noisy``.
        seed: of noise and draws.
    """
    if kind == "exact":
        return problem.scenarios
    rng = np.random.default_rng([seed, 37])
    if kind == "drawn":
        source = make_length_estimator(host, estimator)
        return sample_scenarios(problem.app, source, rng, len(problem.scenarios))
    found = []
    for scenario in problem.scenarios:
        outputs = []
        for true in scenario.output_tokens:
            factor = np.exp(noise * rng.standard_normal(len(true)))
            outputs.append(np.maximum(np.rint(true * factor), 1).astype(np.int64))
        taken = [true > 0 for true in scenario.output_tokens]
        found.append(make_scenario(problem.app, outputs, taken))
    return tuple(found)


def compare_policies(
    host: PluginHost,
    application: str,
    problem: Problem,
    plan: Plan,
    policies: Sequence[str],
    believed: Mapping[Prediction, Sequence[LengthScenario]],
) -> Iterator[PolicyRow]:
    """Carry a plan out under each policy and each belief.

    Raises:
        PluginError: if a policy raises or breaks its interface's rules.
    """
    cache = EngineCache()
    for text in policies:
        name, options = parse_named(text)
        policy = host.create("request-policy", name, options)
        for kind, predicted in believed.items():
            call = policy_call(problem.app, policy, predicted)
            traces = PlanSimulator(problem, cache, policy=call).simulate(plan)
            yield _row(application, text, kind, problem, traces)


def _row(
    application: str,
    policy: str,
    kind: Prediction,
    problem: Problem,
    traces: Sequence[PlanTrace],
) -> PolicyRow:
    request_s, program_s, preemptions = [], [], []
    for trace, scenario in zip(traces, problem.scenarios, strict=True):
        one, whole = completion_s(problem.app, scenario, trace)
        request_s.append(one)
        program_s.append(whole)
        preemptions.append(sum(s.num_preemptions for s in trace.segments))
    return PolicyRow(
        application,
        policy,
        kind,
        float(np.mean([t.makespan_s for t in traces])),
        float(np.mean(request_s)),
        float(np.mean(program_s)),
        float(np.mean(preemptions)),
    )


def completion_s(
    app: Application, scenario: LengthScenario, trace: PlanTrace
) -> tuple[float, float]:
    """Return the mean times at which requests that are needed, and programs, finished."""
    taken = np.concatenate([o > 0 for o in scenario.output_tokens])
    finish = np.concatenate(trace.finish_s)[taken]
    programs = np.concatenate(program_ids(app))[taken]
    _, index = np.unique(programs, return_inverse=True)
    last = np.zeros(index.max() + 1)
    np.maximum.at(last, index, finish)
    return float(finish.mean()), float(last.mean())
