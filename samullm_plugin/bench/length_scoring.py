"""Scores of length estimators on observations they have not seen."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from samullm_plugin.checkpoints.models import bundled_architecture
from samullm_plugin.errors import InputError, PluginError
from samullm_plugin.host.interfaces.length import LengthEstimator, LengthQuery
from samullm_plugin.host.manager import PluginHost
from samullm_plugin.model.types import Bools, Floats, Ints
from samullm_plugin.planning.applications import parse_named
from samullm_plugin.planning.building import check_lengths
from samullm_plugin.planning.estimators import blamed, make_length_estimator
from samullm_plugin.profiling.observations import ObservedLengths

LEVELS = (0.1, 0.25, 0.5, 0.75, 0.9)
ORACLE = "oracle"


@dataclass(frozen=True, slots=True)
class LengthScore:
    """How well one estimator predicts lengths that it did not learn from.

    Attributes:
        estimator: its name and options.
        model: of the observations; empty: all of them.
        num_scored: observations it was scored on.
        pinball_tokens: pinball loss, mean of ``LEVELS`` and of the observations, in tokens.
        coverage_50: share of lengths within the interval predicted to hold 50 % of them.
        coverage_80: the same of 80 %.
        total_error: of the predicted mean lengths' sum, as a share of the true sum.
    """

    estimator: str
    model: str
    num_scored: int
    pinball_tokens: float
    coverage_50: float
    coverage_80: float
    total_error: float


@dataclass(frozen=True, slots=True, eq=False)
class Fold:
    """Which observations of each group are learned from, and which are predicted."""

    train: tuple[Ints, ...]
    test: tuple[Ints, ...]


@dataclass(frozen=True, slots=True, eq=False)
class _Predicted:
    """Predictions of one group in one fold: truth, quantiles ``(levels, n)`` and means."""

    model: str
    truth: Ints
    quantiles: Floats
    means: Floats


def make_folds(
    groups: Sequence[ObservedLengths], folds: int, holdout: float | None, seed: int
) -> list[Fold]:
    """Return how observations are divided: in folds, or once with a share held out.

    Raises:
        InputError: if a model and task have too few observations to be divided.
    """
    rng = np.random.default_rng([seed, 17])
    orders = []
    for group in groups:
        seen = group.observations
        if len(group) < 2:
            raise InputError(
                f"model {seen.model}, task {seen.task!r}: {len(group)} observation; two are "
                "needed, one to learn from and one to predict"
            )
        orders.append(rng.permutation(len(group)))
    if holdout is not None:
        cuts = [max(1, min(len(o) - 1, round(holdout * len(o)))) for o in orders]
        return [
            Fold(
                tuple(np.sort(o[c:]) for o, c in zip(orders, cuts, strict=True)),
                tuple(np.sort(o[:c]) for o, c in zip(orders, cuts, strict=True)),
            )
        ]
    return [
        Fold(
            tuple(np.sort(o[np.arange(len(o)) % folds != k]) for o in orders),
            tuple(np.sort(o[np.arange(len(o)) % folds == k]) for o in orders),
        )
        for k in range(folds)
    ]


def limits(group: ObservedLengths, default: int | None) -> tuple[Ints, int]:
    """Return the limit of each output, and the model's longest prompt plus output.

    Where the file does not say: ``default``, else what a known model's length leaves, else the
    longest length seen.
    """
    seen = group.observations
    known = bundled_architecture(seen.model)
    longest = 0 if known is None else known[1]
    prompts = seen.prompt_tokens
    needed = prompts + np.maximum(group.max_tokens, seen.output_tokens)
    room = np.maximum(longest - prompts, seen.output_tokens)
    if not longest:
        room = np.full(len(group), seen.output_tokens.max())
    unknown = room if default is None else np.maximum(default, seen.output_tokens)
    limit = np.where(group.max_tokens > 0, group.max_tokens, unknown)
    return limit, max(longest, int(needed.max()), int((prompts + limit).max()))


def scored_rows(group: ObservedLengths) -> Bools:
    """Return the observations whose length is known: finished, or cut at a known limit.

    What was cut at ``max_tokens`` has that length for whoever plans with the same limit. An output
    cut elsewhere or still in flight is learned from, but no prediction can be compared with it.
    """
    seen = group.observations
    known: Bools = ~seen.censored | (seen.output_tokens == group.max_tokens)
    return known


def group_query(group: ObservedLengths, rows: Ints, default_limit: int | None) -> LengthQuery:
    """Return the question for the lengths of some observations."""
    limit, longest = limits(group, default_limit)
    part = group.take(rows).observations
    return LengthQuery(
        part.model,
        part.task,
        part.prompt_tokens,
        limit[rows],
        np.zeros(len(rows), np.int64),
        longest,
        node=group_name(group),
        requests=rows,
        prompts=part.prompts,
    )


def group_name(group: ObservedLengths) -> str:
    """Return the node name under which ``oracle`` finds a group's lengths."""
    return f"{group.observations.model}|{group.observations.task}"


def create(host: PluginHost, text: str, groups: Sequence[ObservedLengths]) -> LengthEstimator:
    """Return an estimator by name and options, such as ``ecdf:prior_observations=50``.

    ``oracle`` is given the observed lengths.
    """
    name, options = parse_named(text)
    if name == ORACLE and not options:
        told = {group_name(g): g.observations.output_tokens.tolist() for g in groups}
        return make_length_estimator(host, name, {"output_tokens": told})
    return make_length_estimator(host, name, options)


def score(
    estimator: LengthEstimator,
    text: str,
    groups: Sequence[ObservedLengths],
    folds: Sequence[Fold],
    *,
    samples: int,
    seed: int,
    default_limit: int | None,
    keep: Callable[[LengthEstimator], None] = lambda fitted: None,
) -> list[LengthScore]:
    """Fit an estimator in every fold, and score what it says of the rest.

    Args:
        estimator: not fitted.
        text: what the user calls it.
        groups: the observations.
        folds: see :func:`make_folds`.
        samples: lengths asked for per observation.
        seed: of the samples.
        default_limit: where the file has no limit.
        keep: told the estimator fitted in each fold.

    Returns:
        The score of all observations, then one per model.

    Raises:
        PluginError: if the estimator breaks its interface's rules or raises.
        InputError: if it knows nothing of a model, or nothing can be scored.
    """
    found: list[_Predicted] = []
    for k, fold in enumerate(folds):
        learned = [g.take(r).observations for g, r in zip(groups, fold.train, strict=True)]
        rng = np.random.default_rng([seed, 19, k])
        with blamed(f"length-estimator {text}"):
            fitted = estimator.fit(learned)
            if not isinstance(fitted, LengthEstimator):
                raise PluginError(f"fit returned a {type(fitted).__name__}")
            found += _predict(fitted, groups, fold, samples, rng, default_limit)
        keep(fitted)
    if not any(len(p.truth) for p in found):
        raise InputError("no observation has a known length: all are censored below their limits")
    models = dict.fromkeys(p.model for p in found)
    scores = [_score(text, "", found)]
    return scores + [_score(text, m, [p for p in found if p.model == m]) for m in models]


def _predict(
    fitted: LengthEstimator,
    groups: Sequence[ObservedLengths],
    fold: Fold,
    samples: int,
    rng: np.random.Generator,
    default_limit: int | None,
) -> Iterator[_Predicted]:
    """Yield the predictions of each group's held-out observations."""
    for group, held in zip(groups, fold.test, strict=True):
        rows = held[scored_rows(group)[held]]
        if not len(rows):
            continue
        query = group_query(group, rows, default_limit)
        drawn = check_lengths(fitted.sample(query, rng, samples), query, samples, fitted.name)
        yield _Predicted(
            group.observations.model,
            group.observations.output_tokens[rows],
            np.quantile(drawn, LEVELS, axis=0),
            drawn.mean(axis=0),
        )


def _score(text: str, model: str, found: Sequence[_Predicted]) -> LengthScore:
    truth = np.concatenate([p.truth for p in found]).astype(np.float64)
    quantiles = np.concatenate([p.quantiles for p in found], axis=1)
    means = np.concatenate([p.means for p in found])
    levels = np.array(LEVELS)[:, None]
    above = truth - quantiles
    loss = np.maximum(levels * above, (levels - 1.0) * above)
    within = [
        float(np.mean((quantiles[low] <= truth) & (truth <= quantiles[-1 - low]))) for low in (1, 0)
    ]
    total = float(means.sum() / truth.sum() - 1.0)
    return LengthScore(text, model, len(truth), float(loss.mean()), within[0], within[1], total)
