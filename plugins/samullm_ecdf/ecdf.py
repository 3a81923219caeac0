"""Output lengths by a model's empirical distribution: one, or one per task and prompt length."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from samullm_ecdf.prior import (
    STAND_INS,
    Prior,
    assumed,
    bundled,
    by_model,
    estimate,
    within_limits,
)
from samullm_plugin import (
    LengthDistribution,
    LengthEstimator,
    LengthObservations,
    LengthQuery,
    find_name,
)
from samullm_plugin.model.types import Floats, Ints
from samullm_plugin.profiling.observations import LengthProfile, read_length_profile


class EcdfOptions(BaseModel):
    """Options of ``ecdf``."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    profile: Path | None = Field(
        default=None,
        description="Lengths of one's own prompts, as `samullm profile lengths` writes them; they "
        "come before the bundled ones.",
    )
    stand_ins: Mapping[str, str] = Field(
        default=STAND_INS,
        description="Measured models that stand in for models without measurements.",
    )
    prior_observations: float = Field(
        default=20.0,
        ge=0,
        description="As how many observations the bundled distribution counts once there are own.",
    )
    scale: float = Field(
        default=1.0, gt=0, description="Factor on every length, to try plans on shifted lengths."
    )


class EcdfLengths(LengthEstimator):
    """Draws from each model's measured distribution, whatever the prompt (the paper's estimator).

    SamuLLM, section 3: output lengths depend on the model far more than on the prompt. Unlike the
    paper's first implementation, every request in every scenario is an independent draw, so that
    scenarios differ and requests of different nodes are not tied to one quantile. Bundled are 23
    models on the No Robots prompts; outputs cut by a limit count as censored.
    """

    name = "ecdf"
    Config = EcdfOptions
    config: EcdfOptions

    def __init__(self, config: BaseModel | None = None) -> None:
        """Start from the bundled distributions and the profile.

        Raises:
            InputError: if the profile cannot be read.
        """
        super().__init__(config)
        self._measured: dict[str, Prior] = {}
        self._fitted: dict[str, Prior] = {}
        found = profile_of(self.config)
        if found is not None:
            for model, seen in by_model(found.observations).items():
                name = find_name(model, self._measured) or model
                self._measured[name] = self._learned(model, seen, f"outputs, {found.source}")

    def fit(self, observations: Sequence[LengthObservations]) -> EcdfLengths:
        """Return an estimator in which these observations replace earlier ones of their models.

        Those of a profile are not replaced: they take the place of the bundled ones.
        """
        fitted = copy(self)
        fitted._fitted = dict(self._fitted)
        for model, seen in by_model(observations).items():
            name = find_name(model, fitted._fitted) or model
            fitted._fitted[name] = self._learned(model, seen, "observations")
        return fitted

    def _learned(self, model: str, seen: Sequence[LengthObservations], what: str) -> Prior:
        """Return what observations and all that was known before them say."""
        measured = find_name(model, self._measured)
        prior = self._measured[measured] if measured else bundled(model, self.config.stand_ins)
        count = sum(len(o.output_tokens) for o in seen)
        source = f"{model}: {count} {what}" + (f"; prior {prior.source}" if prior else "")
        distribution = estimate(
            seen, prior.distribution if prior else None, self.config.prior_observations
        )
        return Prior(distribution, source)

    def known(self, model: str) -> Prior:
        """Return a model's distribution; of one nobody has measured, what is assumed."""
        for learned in (self._fitted, self._measured):
            if name := find_name(model, learned):
                return learned[name]
        return bundled(model, self.config.stand_ins) or assumed(model)

    def sample(self, query: LengthQuery, rng: np.random.Generator, num_scenarios: int) -> Ints:
        """Return independent draws by inverse transform, above the tokens generated so far."""
        known = self.known(query.model)
        uniforms = rng.random((num_scenarios, len(query)))
        drawn = np.empty((num_scenarios, len(query)), np.int64)
        for k in range(num_scenarios):
            distribution = known.distribution
            if known.models:
                distribution = known.models[int(rng.integers(len(known.models)))]
            if self.config.scale != 1.0:
                distribution = distribution.scaled(self.config.scale)
            drawn[k] = distribution.conditional_quantile(uniforms[k], query.generated_tokens)
        return within_limits(drawn, query)

    def source(self, model: str) -> str:
        """Return the measurements a model's lengths come from."""
        scale = "" if self.config.scale == 1.0 else f", times {self.config.scale:g}"
        return self.known(model).source + scale


def profile_of(options: EcdfOptions) -> LengthProfile | None:
    """Return the profile that options name.

    Raises:
        InputError: if it cannot be read.
    """
    return None if options.profile is None else read_length_profile(options.profile)


class ConditionalOptions(EcdfOptions):
    """Options of ``conditional``."""

    prompt_bins: int = Field(default=4, ge=1, description="Prompt-length bins of equal count.")
    shrink_observations: float = Field(
        default=50.0,
        ge=0,
        description="As how many observations the pooled distribution counts in each cell: thin "
        "cells stay close to it.",
    )


@dataclass(frozen=True, slots=True, eq=False)
class _Cells:
    """Distributions of one model by task and prompt-length bin.

    Attributes:
        edges: upper prompt lengths of all bins but the last, by task.
        cells: one distribution per bin, by task.
    """

    edges: Mapping[str, Floats]
    cells: Mapping[str, tuple[LengthDistribution, ...]]


class ConditionalLengths(LengthEstimator):
    """Draws from the distribution of a request's task and prompt length, shrunk to the pooled one.

    A cell's estimate counts its own observations once each and the model's pooled distribution as
    a fixed number of them. Without observations of a task it is ``ecdf``.
    """

    name = "conditional"
    Config = ConditionalOptions
    config: ConditionalOptions

    def __init__(self, config: BaseModel | None = None) -> None:
        """Start from the bundled distributions and the profile.

        Raises:
            InputError: if the profile cannot be read.
        """
        super().__init__(config)
        self._pooled = self._pool()
        self._models: dict[str, _Cells] = {}
        found = profile_of(self.config)
        if found is not None:
            self._learn(found.observations)

    def _pool(self) -> EcdfLengths:
        names = EcdfOptions.model_fields
        options = {k: v for k, v in self.config.model_dump().items() if k in names}
        return EcdfLengths(EcdfOptions(**options))

    def fit(self, observations: Sequence[LengthObservations]) -> ConditionalLengths:
        """Return an estimator in which these observations replace earlier ones of their models."""
        fitted = copy(self)
        fitted._pooled = self._pooled.fit(observations)
        fitted._models = dict(self._models)
        fitted._learn(observations)
        return fitted

    def _learn(self, observations: Sequence[LengthObservations]) -> None:
        for model, seen in by_model(observations).items():
            pooled = self._pooled.known(model).distribution
            edges, cells = {}, {}
            for task in dict.fromkeys(o.task for o in seen):
                merged = _merge([o for o in seen if o.task == task])
                edges[task], cells[task] = self._cells(merged, pooled)
            self._models[find_name(model, self._models) or model] = _Cells(edges, cells)

    def _cells(
        self, seen: LengthObservations, pooled: LengthDistribution
    ) -> tuple[Floats, tuple[LengthDistribution, ...]]:
        """Return bin edges and the distribution of each bin of one task."""
        shares = np.arange(1, self.config.prompt_bins) / self.config.prompt_bins
        edges = np.unique(np.quantile(seen.prompt_tokens, shares)) if len(shares) else np.empty(0)
        bins = np.searchsorted(edges, seen.prompt_tokens)
        return edges, tuple(
            estimate([_rows(seen, bins == b)], pooled, max(self.config.shrink_observations, 1e-9))
            for b in range(len(edges) + 1)
        )

    def sample(self, query: LengthQuery, rng: np.random.Generator, num_scenarios: int) -> Ints:
        """Return independent draws from each request's cell."""
        name = find_name(query.model, self._models)
        cells = self._models[name] if name else None
        if cells is None or query.task not in cells.cells:
            return self._pooled.sample(query, rng, num_scenarios)
        uniforms = rng.random((num_scenarios, len(query)))
        bins = np.searchsorted(cells.edges[query.task], query.prompt_tokens)
        drawn = np.empty((num_scenarios, len(query)), np.int64)
        for b, cell in enumerate(cells.cells[query.task]):
            part = bins == b
            if part.any():
                one = cell if self.config.scale == 1.0 else cell.scaled(self.config.scale)
                drawn[:, part] = one.conditional_quantile(
                    uniforms[:, part], query.generated_tokens[part]
                )
        return within_limits(drawn, query)

    def source(self, model: str) -> str:
        """Return the measurements a model's lengths come from."""
        name = find_name(model, self._models)
        tasks = ", ".join(repr(t) for t in self._models[name].cells) if name else ""
        return self._pooled.source(model) + (
            f"; by prompt length for tasks {tasks}" if name else ""
        )


def _merge(seen: Sequence[LengthObservations]) -> LengthObservations:
    """Return observations of one task as one."""
    return LengthObservations(
        seen[0].model,
        seen[0].task,
        np.concatenate([o.prompt_tokens for o in seen]),
        np.concatenate([o.output_tokens for o in seen]),
        np.concatenate([o.censored for o in seen]),
    )


def _rows(
    seen: LengthObservations, rows: np.ndarray[tuple[int], np.dtype[np.bool_]]
) -> LengthObservations:
    return LengthObservations(
        seen.model,
        seen.task,
        seen.prompt_tokens[rows],
        seen.output_tokens[rows],
        seen.censored[rows],
    )
