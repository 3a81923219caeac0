"""Output lengths drawn from a model's empirical distribution function."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy
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
from samullm_plugin import LengthEstimator, LengthObservations, LengthQuery, find_name
from samullm_plugin.model.types import Ints
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
