"""What is known of a model's output lengths before and after observations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

from samullm_plugin import (
    LengthDistribution,
    LengthObservations,
    LengthQuery,
    find_name,
    measured_lengths,
    measured_models,
)
from samullm_plugin.model.types import Ints

STAND_INS = {
    "stablelm-tuned-alpha-7b": "mpt-7b-chat",
    "cores-small": "chatglm3-6b",
    "cores-medium": "mpt-7b-chat",
    "cores-large": "vicuna-13b-v1.5",
}
"""Models without measurements and the measured model that stands in, by default.

For stablelm the one most like it: a chat model of 7 billion parameters, tuned on the same kinds of
public conversations. The bundled models for CPU cores have random weights and no lengths of their
own; they get those of three different chat models."""


@dataclass(frozen=True, slots=True)
class Prior:
    """A distribution and where it comes from.

    Attributes:
        distribution: of the output lengths.
        source: one sentence.
        models: of a pooled distribution those of its models, which differ more from each other
            than samples of one: a scenario is drawn from one of them.
    """

    distribution: LengthDistribution
    source: str
    models: tuple[LengthDistribution, ...] = ()


def bundled(model: str, stand_ins: Mapping[str, str]) -> Prior | None:
    """Return the bundled distribution of a model or of its stand-in, None if there is none."""
    if table := measured_lengths(model):
        return Prior(table.distribution, f"{table.model}: {table.source}")
    if (name := find_name(model, stand_ins)) and (table := measured_lengths(stand_ins[name])):
        note = f"{model} was not measured; {table.model} stands in: {table.source}"
        return Prior(table.distribution, note)
    return None


def assumed(model: str) -> Prior:
    """Return what is assumed of a model nobody has measured: the bundled models, pooled."""
    distributions, pooled = _pool()
    source = (
        f"assumed: {model} was not measured; the lengths of {len(distributions)} measured models "
        "pooled, each scenario those of one of them"
    )
    return Prior(pooled, source, distributions)


@cache
def _pool() -> tuple[tuple[LengthDistribution, ...], LengthDistribution]:
    """Return the bundled distributions and the one of all with equal weights."""
    tables = [table for name in measured_models() if (table := measured_lengths(name))]
    found = tuple(t.distribution for t in tables if t.distribution.cut_mass < 1)
    points, cut, mass = zip(*(d.weighted_points(1000.0) for d in found), strict=True)
    pooled = LengthDistribution.kaplan_meier(
        np.concatenate(points), np.concatenate(cut), np.concatenate(mass)
    )
    return found, pooled


def estimate(
    observations: Sequence[LengthObservations], prior: LengthDistribution | None, weight: float
) -> LengthDistribution:
    """Return the product-limit estimate of observations and a prior.

    Args:
        observations: of one model.
        prior: what was known before; None: nothing.
        weight: the prior counts as that many observations.
    """
    lengths = [o.output_tokens for o in observations]
    censored = [o.censored for o in observations]
    weights = [np.ones(len(o.output_tokens)) for o in observations]
    if prior is not None and weight > 0:
        points, cut, mass = prior.weighted_points(weight)
        lengths.append(points)
        censored.append(cut)
        weights.append(mass)
    return LengthDistribution.kaplan_meier(
        np.concatenate(lengths), np.concatenate(censored), np.concatenate(weights)
    )


def by_model(observations: Sequence[LengthObservations]) -> dict[str, list[LengthObservations]]:
    """Return non-empty observations by model, keyed by the first spelling of its name."""
    grouped: dict[str, list[LengthObservations]] = {}
    for seen in observations:
        if len(seen.output_tokens):
            grouped.setdefault(find_name(seen.model, grouped) or seen.model, []).append(seen)
    return grouped


def within_limits(drawn: Ints, query: LengthQuery) -> Ints:
    """Return lengths cut at the requests' limits; more than generated wherever limits allow."""
    longer = np.maximum(drawn, query.generated_tokens + 1)
    limited: Ints = np.maximum(np.minimum(longer, query.max_tokens), 1)
    return limited
