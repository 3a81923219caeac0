"""Output-length estimators."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from samullm_plugin.host.interfaces.plugin import Plugin
from samullm_plugin.model.lengths import LengthObservations
from samullm_plugin.model.types import Ints


@dataclass(frozen=True, slots=True, eq=False)
class LengthQuery:
    """Requests of one node whose output lengths are asked for.

    Attributes:
        model: name of the model, as profiles name it.
        task: label of the node, may be empty.
        prompt_tokens: prompt lengths as far as known, shape ``(n,)``.
        max_tokens: limits of the outputs, at least 1, shape ``(n,)``.
        generated_tokens: tokens generated so far, shape ``(n,)``: lengths are conditional on being
            longer than that (0: not started).
        max_model_len: the model's longest prompt plus output.
        node: name of the node, if the query comes from one.
        requests: indices of the requests in that node, shape ``(n,)``; None: not known.
        prompts: prompt texts as far as known, one per request; None: not known.
    """

    model: str
    task: str
    prompt_tokens: Ints
    max_tokens: Ints
    generated_tokens: Ints
    max_model_len: int
    node: str = ""
    requests: Ints | None = None
    prompts: tuple[str, ...] | None = None

    def __len__(self) -> int:
        """Return the number of requests."""
        return len(self.prompt_tokens)


class LengthEstimator(Plugin, ABC):
    """Samples output lengths of requests.

    A complete plugin::

        import numpy as np
        from samullm_plugin import LengthEstimator, hookimpl


        class Halfway(LengthEstimator):
            '''Every output is half its limit.'''

            name = "halfway"

            def fit(self, observations):
                return self

            def sample(self, query, rng, num_scenarios):
                half = np.maximum(query.max_tokens // 2, query.generated_tokens + 1)
                half = np.minimum(half, query.max_tokens)
                return np.tile(half, (num_scenarios, 1))


        @hookimpl
        def register_length_estimators(register):
            register(Halfway)
    """

    @abstractmethod
    def fit(self, observations: Sequence[LengthObservations]) -> LengthEstimator:
        """Return an estimator that has learned from observations; ``self`` is left as it is.

        Observations of a model replace or refine what was known of that model.
        """

    @abstractmethod
    def sample(self, query: LengthQuery, rng: np.random.Generator, num_scenarios: int) -> Ints:
        """Return independent samples of total output lengths.

        Args:
            query: the requests.
            rng: the only source of randomness: equal states give equal samples.
            num_scenarios: independent scenarios.

        Returns:
            Shape ``(num_scenarios, len(query))``; every length is at least 1, more than
            ``generated_tokens`` unless that has reached the limit, and at most ``max_tokens``.

        Raises:
            InputError: if the estimator knows nothing of the model; it must not guess silently.
        """

    def source(self, model: str) -> str:
        """Return where the estimate of a model comes from, for people."""
        return f"{self.name}: {model}"
