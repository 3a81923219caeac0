"""What a run in progress teaches about lengths, latencies and load times.

The thresholds are choices; ``benchmarks/adjusting.py`` shows what replanning gains with them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from samullm_plugin.host.interfaces.length import LengthEstimator, LengthQuery
from samullm_plugin.model.application import Application
from samullm_plugin.model.latency import StepModel, StepTable
from samullm_plugin.model.lengths import LengthObservations
from samullm_plugin.model.types import Bools, Ints
from samullm_plugin.rules.sleeping import Asleep
from samullm_plugin.rules.transition import Running
from samullm_plugin.run.ledger import Status
from samullm_plugin.run.view import RunView

ENOUGH_OUTPUTS = 20
"""Finished requests of a model from which it says something about other models."""

ALIKE = 0.1
"""Models differ in the same direction if the logarithms of their factors all exceed this."""

ENOUGH_STEPS_S = 1.0
"""Seconds of observed iterations from which a latency factor is believed."""


@dataclass(frozen=True, slots=True, eq=False)
class Snapshot:
    """A run at one moment, for planning on in another thread.

    Attributes:
        now_s: the run's clock.
        status: per node, as in the ledger.
        generated: per node, tokens generated so far, those of running requests included.
        cut: per node, the finished requests whose output ended at a limit.
        running: engines by node name, and in how many seconds they are ready; negative by what
            computing the contents of their KV caches again would take, since simulations of what
            is left start every request over.
        latency_factor: per node, measured by predicted iteration seconds; 1 where unknown.
        load_factor: measured by predicted seconds of engine starts; 1 if unknown.
        devices: those that are not lost.
        in_page_cache: checkpoints that machines have read, by name and machine.
        call_s: by Python node, mean seconds of its calls so far; those without any are left out.
        rejected: by the user's node, outputs that were rejected; those without retries left out.
        asleep: engines that sleep.
    """

    now_s: float
    status: tuple[NDArray[np.int8], ...]
    generated: tuple[Ints, ...]
    cut: tuple[Bools, ...]
    running: dict[str, tuple[Running, float]]
    latency_factor: tuple[float, ...]
    load_factor: float
    devices: tuple[int, ...]
    in_page_cache: frozenset[tuple[str, int]] = frozenset()
    call_s: Mapping[int, float] = field(default_factory=dict)
    rejected: Mapping[str, int] = field(default_factory=dict)
    asleep: tuple[Asleep, ...] = ()


@dataclass(slots=True)
class DriftEstimator:
    """Adds up what engines report."""

    _seconds: dict[int, tuple[float, float]] = field(
        default_factory=lambda: defaultdict(lambda: (0.0, 0.0))
    )

    def take_steps(self, run: RunView) -> None:
        """Compare the iterations since the last call with what the problem's costs predict."""
        for node, deployment in run.engines.deployments.items():
            for replica in deployment.replicas:
                if replica.ready_s is None:
                    continue
                taken = run.take_steps(deployment, replica)
                if taken is None or not len(taken[0]):
                    continue
                steps, seconds = taken
                costs = run.problem.mode(node, deployment.running.planned.parallel, replica.devices)
                predicted = float(np.sum(costs.latency.step_seconds(steps)))
                measured, expected = self._seconds[node]
                self._seconds[node] = (measured + float(np.sum(seconds)), expected + predicted)

    def snapshot(self, run: RunView) -> Snapshot:
        """Return the run as it is now."""
        ledger, app = run.ledger, run.problem.app
        generated = [g.copy() for g in ledger.generated]
        running: dict[str, tuple[Running, float]] = {}
        held: dict[int, list[list[int]]] = defaultdict(list)
        now_s = run.now_s()
        factor = self._load_factor(run)
        for node, deployment in run.engines.deployments.items():
            for replica in deployment.replicas:
                lengths = []
                for request, tokens in run.executor.progress(replica.key).items():
                    if request in replica.outstanding:
                        generated[node][request] += tokens
                        if tokens:
                            lengths.append(replica.outstanding[request].prompt_tokens + tokens)
                held[node].append(lengths)
            costs = run.problem.mode(
                node, deployment.running.planned.parallel, deployment.running.devices
            )
            planned_s = max((r.planned_s for r in deployment.replicas), default=now_s)
            ready_s = deployment.started_s + factor * (planned_s - deployment.started_s)
            left_s = max(0.0, ready_s - now_s)
            if deployment.ready:
                budget = app.nodes[node].model.engine.max_num_batched_tokens
                held_s = np.mean([_prefill_s(costs.latency, h, budget) for h in held[node]])
                left_s = -float(held_s) * self._latency_factor(node)
            running[app.nodes[node].name] = (deployment.running, left_s)
        return Snapshot(
            now_s,
            tuple(s.copy() for s in ledger.status),
            tuple(generated),
            tuple(c.copy() for c in ledger.cut),
            running,
            tuple(self._latency_factor(i) for i in range(len(app.nodes))),
            factor,
            tuple(d for d in range(run.problem.cluster.num_gpus) if d not in run.engines.lost),
            run.engines.caches.held,
            {i: total_s / count for i, (count, total_s) in ledger.calls.items()},
            {
                part.name: run.queue.rejected(i, part)
                for i, node in enumerate(app.nodes)
                for part in node.parts
                if part.repeats
            },
            tuple(run.engines.asleep),
        )

    def _latency_factor(self, node: int) -> float:
        """Return the factor of a node; of all nodes together where it has not run long enough."""
        measured, expected = self._seconds.get(node, (0.0, 0.0))
        if expected < ENOUGH_STEPS_S:
            measured = sum(m for m, _ in self._seconds.values())
            expected = sum(e for _, e in self._seconds.values())
        return measured / expected if expected >= ENOUGH_STEPS_S else 1.0

    @staticmethod
    def _load_factor(run: RunView) -> float:
        ratios = []
        for event in run.log.records:
            started = event["kind"] == "engine_ready" and not event.get("woken")
            if started and event.get("planned_load_s"):
                ratios.append(float(event["load_s"]) / float(event["planned_load_s"]))
        return float(np.median(ratios)) if ratios else 1.0


def _prefill_s(latency: StepModel, lengths: Sequence[int], budget: int) -> float:
    """Return the seconds of prefilling sequences in iterations of a token budget."""
    if not lengths:
        return 0.0
    tokens = np.asarray(lengths, float)
    steps = max(1, int(np.ceil(tokens.sum() / budget)))

    def share(total: float) -> Ints:
        return np.array([max(1, round(total / steps))])

    pairs = float((tokens * (tokens + 1) / 2).sum()) / steps
    none = np.zeros(1)
    table = StepTable(
        share(len(tokens)),
        share(tokens.sum()),
        share(len(tokens)),
        share(tokens.sum()),
        np.array([pairs]),
        none,
        none,
    )
    return steps * float(latency.step_seconds(table)[0])


def length_observations(run: RunView, snapshot: Snapshot) -> list[LengthObservations]:
    """Return the lengths seen so far, by node: finished ones, and running ones as censored."""
    found = []
    for i, node in enumerate(run.problem.app.nodes):
        finished = snapshot.status[i] == Status.FINISHED
        begun = (snapshot.status[i] < Status.FINISHED) & (snapshot.generated[i] > 0)
        for part in node.parts:
            seen = part.place(np.flatnonzero((finished | begun)[part.rows]))
            if not finished[part.rows].any():
                continue
            found.append(
                LengthObservations(
                    node.model.name,
                    part.task,
                    node.requests.prompt_tokens[seen],
                    np.maximum(snapshot.generated[i][seen], 1),
                    (begun | snapshot.cut[i])[seen],
                )
            )
    return found


class ShiftedLengths(LengthEstimator):
    """Another estimator, with the lengths of models that were hardly observed scaled."""

    name = "shifted"

    def __init__(self, inner: LengthEstimator, factor: float, observed: frozenset[str]) -> None:
        """Scale what ``inner`` says of all but the ``observed`` models by ``factor``."""
        super().__init__()
        self._inner, self._factor, self._observed = inner, factor, observed

    def fit(self, observations: Sequence[LengthObservations]) -> LengthEstimator:
        """Return the inner estimator with the observations."""
        return self._inner.fit(observations)

    def sample(self, query: LengthQuery, rng: np.random.Generator, num_scenarios: int) -> Ints:
        """Return scaled samples within the query's limits."""
        drawn = self._inner.sample(query, rng, num_scenarios)
        if query.model in self._observed:
            return drawn
        least = np.minimum(np.maximum(query.generated_tokens + 1, 1), query.max_tokens)
        scaled = np.rint(drawn * self._factor).astype(np.int64)
        within: Ints = np.clip(scaled, least, query.max_tokens)
        return within


def learned(
    prior: LengthEstimator, observations: Sequence[LengthObservations], app: Application
) -> LengthEstimator:
    """Return an estimator that has learned from a run.

    If all models that were observed enough, at least two, are off to the same side, it is likely
    the prompts and not the models that are unusual: the others are then taken to be off by the
    median factor too.
    """
    if not observations:
        return prior
    fitted = prior.fit(observations)
    tokens: dict[str, list[float]] = {}
    enough = {o.model for o in observations if int((~o.censored).sum()) >= ENOUGH_OUTPUTS}
    for node, part in ((n, p) for n in app.nodes for p in n.parts):
        if node.model.name not in enough:
            continue
        query = LengthQuery(
            node.model.name,
            part.task,
            node.requests.prompt_tokens[part.rows],
            node.requests.max_tokens[part.rows],
            np.zeros(len(part), np.int64),
            node.model.max_model_len,
        )
        sums = tokens.setdefault(node.model.name, [0.0, 0.0])
        for k, estimator in enumerate((prior, fitted)):
            sums[k] += float(estimator.sample(query, np.random.default_rng(0), 1).sum())
    logs = np.log([now / before for before, now in tokens.values()])
    alike = len(logs) >= 2 and (np.all(logs > ALIKE) or np.all(logs < -ALIKE))
    if not alike:
        return fitted
    return ShiftedLengths(fitted, float(np.exp(np.median(logs))), frozenset(enough))
