"""Estimators that do not estimate: given lengths, limits, lengths of other workloads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from samullm_ecdf.prior import within_limits
from samullm_plugin import (
    InputError,
    LengthEstimator,
    LengthObservations,
    LengthQuery,
    workload_lengths,
)
from samullm_plugin.model.types import Ints


class OracleOptions(BaseModel):
    """Options of ``oracle``."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    output_tokens: Mapping[str, tuple[int, ...]] = Field(
        default={}, description="By node, the output length of each of its requests, in order."
    )


class OracleLengths(LengthEstimator):
    """Returns the true lengths it was given: the best any estimator could do."""

    name = "oracle"
    Config = OracleOptions
    config: OracleOptions

    def fit(self, observations: Sequence[LengthObservations]) -> OracleLengths:
        """Return itself: it knows already."""
        return self

    def sample(self, query: LengthQuery, rng: np.random.Generator, num_scenarios: int) -> Ints:
        """Return the given lengths, the same in every scenario.

        Raises:
            InputError: for a node or a request whose length was not given.
        """
        lengths = np.array(self.config.output_tokens.get(query.node, ()), np.int64)
        rows = np.arange(len(query)) if query.requests is None else query.requests
        if len(rows) and (not len(lengths) or rows.max() >= len(lengths)):
            raise InputError(
                f"length-estimator oracle: node {query.node!r} has {len(lengths)} given lengths "
                "and more requests; give all of them under options.output_tokens"
            )
        return np.tile(within_limits(lengths[rows], query), (num_scenarios, 1))

    def source(self, model: str) -> str:
        """Return that lengths were given."""
        return f"{model}: lengths given beforehand"


class FixedLengths(LengthEstimator):
    """Every output runs to its limit: what a planner without an estimator has to assume."""

    name = "fixed"

    def fit(self, observations: Sequence[LengthObservations]) -> FixedLengths:
        """Return itself: it does not learn."""
        return self

    def sample(self, query: LengthQuery, rng: np.random.Generator, num_scenarios: int) -> Ints:
        """Return the limits: of the request, or what its prompt leaves of the model's length."""
        room = np.maximum(query.max_model_len - query.prompt_tokens, 1)
        drawn = np.minimum(query.max_tokens, room)
        return np.tile(within_limits(drawn, query), (num_scenarios, 1))

    def source(self, model: str) -> str:
        """Return that lengths are the limits."""
        return f"{model}: every output at its limit"


class WorkloadOptions(BaseModel):
    """Options of ``workload``."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    workload: str = Field(
        default="sharegpt", description="`sharegpt`, `azure-conv`, `azure-code` or `arxiv`."
    )
    scale: float = Field(default=1.0, gt=0, description="Factor on every length.")


class WorkloadLengths(LengthEstimator):
    """Draws from another real workload, whatever the model: lengths to try plans against."""

    name = "workload"
    Config = WorkloadOptions
    config: WorkloadOptions

    def fit(self, observations: Sequence[LengthObservations]) -> WorkloadLengths:
        """Return itself: it is meant to differ from what is observed."""
        return self

    def sample(self, query: LengthQuery, rng: np.random.Generator, num_scenarios: int) -> Ints:
        """Return independent draws.

        Raises:
            InputError: for an unknown workload.
        """
        distribution = workload_lengths(self.config.workload).distribution.scaled(self.config.scale)
        uniforms = rng.random((num_scenarios, len(query)))
        drawn = distribution.conditional_quantile(uniforms, query.generated_tokens)
        return within_limits(drawn, query)

    def source(self, model: str) -> str:
        """Return the workload."""
        return f"{self.config.workload}: {workload_lengths(self.config.workload).source}"
