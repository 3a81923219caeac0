"""What errors of length estimators do to plans, on an application with observed lengths."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from samullm_plugin.bench.length_scoring import Fold, limits, scored_rows
from samullm_plugin.checkpoints.models import find_name
from samullm_plugin.errors import InputError
from samullm_plugin.host.interfaces.length import LengthEstimator, LengthQuery
from samullm_plugin.host.manager import PluginHost
from samullm_plugin.model.application import Application, ModelNode
from samullm_plugin.model.cluster import Cluster
from samullm_plugin.model.costs import ModeCosts
from samullm_plugin.model.lengths import LengthObservations
from samullm_plugin.model.problem import ModeKey, Problem
from samullm_plugin.model.scenarios import draw_taken, make_scenario
from samullm_plugin.model.types import Ints
from samullm_plugin.planning.building import collect_costs, sample_scenarios
from samullm_plugin.planning.estimators import make_latency_model
from samullm_plugin.planning.planner import PlanningOptions, make_plan
from samullm_plugin.profiling.observations import ObservedLengths
from samullm_plugin.simulator import PlanSimulator


@dataclass(frozen=True, slots=True)
class PlanEffect:
    """What one estimator's plans take, in seconds, means of the draws.

    Attributes:
        estimator: its name and options.
        planned_s: makespan on the lengths the plan was made for.
        realised_s: makespan of the same plan on the true lengths.
        informed_s: makespan of the plan made with the true lengths.
        loss: ``realised_s`` over ``informed_s`` less 1: what not knowing the lengths costs.
        error: ``planned_s`` over ``realised_s`` less 1: how wrong the plan's own figure is.
    """

    estimator: str
    planned_s: float
    realised_s: float
    informed_s: float
    loss: float
    error: float


@dataclass(frozen=True, slots=True, eq=False)
class Dealt:
    """Which observation stands behind each request of a node.

    Attributes:
        group: the observations of the node's model.
        rows: a row of ``group`` per request, shape ``(n,)``.
    """

    group: ObservedLengths
    rows: Ints


@dataclass(frozen=True, slots=True, eq=False)
class PlanExperiment:
    """An application whose requests are observations.

    Attributes:
        problem: with the true lengths as its only scenario.
        dealt: by node.
    """

    problem: Problem
    dealt: Mapping[str, Dealt]


class _Asked(LengthEstimator):
    """Asks a fitted estimator about the observations behind an application's requests."""

    name = "asked"

    def __init__(self, fitted: LengthEstimator, dealt: Mapping[str, Dealt]) -> None:
        super().__init__()
        self._fitted, self._dealt = fitted, dealt
        self.name = fitted.name  # type: ignore[misc]  # messages name the estimator

    def fit(self, observations: Sequence[LengthObservations]) -> LengthEstimator:
        """Refuse: it is fitted."""
        raise NotImplementedError

    def sample(self, query: LengthQuery, rng: np.random.Generator, num_scenarios: int) -> Ints:
        """Return lengths for the model and task that the node's requests were observed with."""
        node = self._dealt[query.node]
        seen = node.group.observations
        requests = np.arange(len(query)) if query.requests is None else query.requests
        texts = seen.prompts
        asked = replace(
            query,
            model=seen.model,
            task=seen.task,
            prompts=None if texts is None else tuple(texts[r] for r in node.rows[requests]),
        )
        return self._fitted.sample(asked, rng, num_scenarios)


def choose_groups(
    app: Application, groups: Sequence[ObservedLengths], notes: list[str]
) -> tuple[int, ...]:
    """Return for each node the group whose lengths it is given.

    That of its model and task, else of its model, else one in turn, which ``notes`` tell.
    """
    found = []
    for i, node in enumerate(app.nodes):
        name = find_name(node.model.name, [g.observations.model for g in groups])
        own = [k for k, g in enumerate(groups) if g.observations.model == name]
        task = [k for k in own if groups[k].observations.task == node.task]
        if not own:
            k = i % len(groups)
            stand_in = groups[k].observations
            notes.append(
                f"node {node.name}: nothing was observed of {node.model.name}; lengths of "
                f"{stand_in.model} {stand_in.task} stand in".replace("  ", " ")
            )
        found.append((task or own or [i % len(groups)])[0])
    return tuple(found)


class PlanBench:
    """Plans an application with estimators' lengths and carries the plans out on observed ones.

    Attributes:
        app: the application, before it is given observations.
    """

    def __init__(
        self,
        host: PluginHost,
        app: Application,
        cluster: Cluster,
        *,
        latency_model: str,
        scheduler: str,
        scenarios: int,
        seed: int,
    ) -> None:
        """Collect the costs, which do not depend on lengths.

        Raises:
            InputError: if the latency model knows nothing of a model.
        """
        self._host, self.app, self._cluster = host, app, cluster
        self._scheduler, self._scenarios, self._seed = scheduler, scenarios, seed
        self._costs: tuple[Mapping[ModeKey, ModeCosts], ...] = collect_costs(
            app, cluster, make_latency_model(host, latency_model)
        )

    def deal(
        self, groups: Sequence[ObservedLengths], chosen: Sequence[int], fold: Fold, draw: int
    ) -> PlanExperiment:
        """Give each request a held-out observation: its output, limit and, if free, its prompt.

        Raises:
            InputError: if a group has no held-out observation of known length.
        """
        rng = np.random.default_rng([self._seed, 23, draw])
        nodes, truth, dealt = [], [], {}
        for node, k in zip(self.app.nodes, chosen, strict=True):
            group, held = groups[k], fold.test[k]
            held = held[scored_rows(group)[held]]
            if not len(held):
                name = group.observations.model
                raise InputError(f"model {name}: no held-out observation has a known length")
            rows = rng.choice(held, len(node.requests))
            nodes.append(_observed_node(node, group, rows))
            truth.append(group.observations.output_tokens[rows])
            dealt[node.name] = Dealt(group, rows)
        app = Application(self.app.name, tuple(nodes), self.app.notes)
        scenario = make_scenario(app, truth, draw_taken(app, rng))
        problem = Problem(app, self._cluster, (scenario,), self._costs, "warm")
        return PlanExperiment(problem.without_sleeping_engines(), dealt)

    def informed_s(self, experiment: PlanExperiment) -> float:
        """Return the makespan of the plan made with the true lengths."""
        return make_plan(
            self._host, experiment.problem, self._scheduler, PlanningOptions(seed=self._seed)
        ).mean_makespan_s

    def effect(
        self,
        text: str,
        experiments: Sequence[PlanExperiment],
        fitted: LengthEstimator | None,
        informed_s: Sequence[float],
        on_draw: Callable[[], None] = lambda: None,
    ) -> PlanEffect:
        """Return what an estimator's plans take.

        Args:
            text: what the user calls the estimator.
            experiments: see :meth:`deal`.
            fitted: fitted to what is not held out; None: the true lengths.
            informed_s: :meth:`informed_s` of each experiment.
            on_draw: called as each draw starts.
        """
        planned, realised = [], []
        for draw, experiment in enumerate(experiments):
            on_draw()
            problem = experiment.problem
            if fitted is not None:
                rng = np.random.default_rng([self._seed, 29, draw])
                asked = _Asked(fitted, experiment.dealt)
                problem = problem.with_scenarios(
                    sample_scenarios(problem.app, asked, rng, self._scenarios)
                )
            result = make_plan(
                self._host, problem, self._scheduler, PlanningOptions(seed=self._seed)
            )
            planned.append(result.mean_makespan_s)
            trace = PlanSimulator(experiment.problem).simulate(result.plan)[0]
            realised.append(trace.makespan_s)
        thought, took, best = (float(np.mean(v)) for v in (planned, realised, informed_s))
        return PlanEffect(text, thought, took, best, took / best - 1.0, thought / took - 1.0)


def _observed_node(node: ModelNode, group: ObservedLengths, rows: Ints) -> ModelNode:
    """Return a node whose requests have the prompts and limits of observations.

    Requests that wait for others keep their prompts, which those determine.
    """
    table, longest = node.requests, node.model.max_model_len
    free = np.diff(table.input_indptr) == 0
    seen = np.clip(group.observations.prompt_tokens[rows], 1, longest - 1)
    prompts = np.where(free, seen, table.prompt_tokens)
    limit = limits(group, None)[0][rows]
    given = np.where(group.max_tokens[rows] > 0, limit, np.maximum(table.max_tokens, limit))
    left = np.maximum(longest - prompts, 1)
    return replace(
        node,
        requests=replace(
            table,
            prompt_tokens=prompts,
            max_tokens=np.where(free, np.minimum(given, left), given),
            prefix_id=np.full(len(table), -1, np.int64),
            prefix_tokens=np.zeros(len(table), np.int64),
        ),
    )
