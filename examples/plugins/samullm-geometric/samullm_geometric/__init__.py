"""Geometric output lengths, fitted by their mean."""

from collections.abc import Sequence

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from samullm_plugin import LengthEstimator, LengthObservations, LengthQuery, hookimpl

samullm_interface = 1


class Options(BaseModel):
    """Options of the estimator."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    mean_tokens: float = Field(default=200.0, gt=0, description="Mean length before any fit.")


class Geometric(LengthEstimator):
    """Geometric lengths: at every token the output ends with the same chance."""

    name = "geometric"
    Config = Options

    def fit(self, observations: Sequence[LengthObservations]) -> "Geometric":
        """Return an estimator with the maximum-likelihood mean of all observations."""
        tokens = sum(int(o.output_tokens.sum()) for o in observations)
        ended = sum(int((~o.censored).sum()) for o in observations)
        if not ended:
            return self
        return Geometric(Options(mean_tokens=max(tokens / ended, 1.0)))

    def sample(
        self, query: LengthQuery, rng: np.random.Generator, num_scenarios: int
    ) -> np.ndarray:
        """Return independent draws; the distribution has no memory of what was generated."""
        end = min(1.0, 1.0 / self.config.mean_tokens)
        drawn = query.generated_tokens + rng.geometric(end, (num_scenarios, len(query)))
        return np.minimum(drawn, query.max_tokens)


@hookimpl
def register_length_estimators(register):
    """Offer the estimator."""
    register(Geometric)
