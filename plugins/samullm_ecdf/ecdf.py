"""Output lengths drawn from a model's empirical distribution function."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from samullm_ecdf.knowledge import (
    STAND_INS,
    Ints,
    Known,
    bundled,
    by_model,
    estimate,
    within_limits,
)
from samullm_plugin import LengthEstimator, LengthObservations, LengthQuery, find_name


class EcdfOptions(BaseModel):
    """Options of ``ecdf``."""

    model_config = ConfigDict(extra="forbid", frozen=True)

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
        """Start from the bundled distributions."""
        super().__init__(config)
        self._fitted: dict[str, Known] = {}

    def fit(self, observations: Sequence[LengthObservations]) -> EcdfLengths:
        """Return an estimator in which these observations replace earlier ones of their models."""
        fitted = EcdfLengths(self.config)
        fitted._fitted = dict(self._fitted)
        for model, seen in by_model(observations).items():
            prior = bundled(model, self.config.stand_ins, silent=True)
            count = sum(len(o.output_tokens) for o in seen)
            source = f"{count} observations" + (f", prior {prior.source}" if prior else "")
            distribution = estimate(
                seen, prior.distribution if prior else None, self.config.prior_observations
            )
            fitted._fitted[find_name(model, fitted._fitted) or model] = Known(distribution, source)
        return fitted

    def known(self, model: str) -> Known:
        """Return a model's distribution.

        Raises:
            InputError: if nothing is known of it.
        """
        if name := find_name(model, self._fitted):
            return self._fitted[name]
        found = bundled(model, self.config.stand_ins)
        assert found is not None  # not silent
        return found

    def sample(self, query: LengthQuery, rng: np.random.Generator, num_scenarios: int) -> Ints:
        """Return independent draws by inverse transform, above the tokens generated so far."""
        distribution = self.known(query.model).distribution
        if self.config.scale != 1.0:
            distribution = distribution.scaled(self.config.scale)
        uniforms = rng.random((num_scenarios, len(query)))
        drawn = distribution.conditional_quantile(uniforms, query.generated_tokens)
        return within_limits(drawn, query)

    def source(self, model: str) -> str:
        """Return the measurements a model's lengths come from."""
        scale = "" if self.config.scale == 1.0 else f", times {self.config.scale:g}"
        return self.known(model).source + scale
