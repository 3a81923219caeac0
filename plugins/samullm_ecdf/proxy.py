"""Output lengths predicted from features of the prompt by a regressor (extra ``learn``)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import AbstractContextManager
from copy import copy
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, Field

from samullm_ecdf.ecdf import EcdfLengths, EcdfOptions, profile_of
from samullm_ecdf.prior import by_model, within_limits
from samullm_plugin import (
    LengthDistribution,
    LengthEstimator,
    LengthObservations,
    LengthQuery,
    MissingExtraError,
    find_name,
)
from samullm_plugin.model.types import Floats, Ints

_CUES = tuple(
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        r"\b(list|enumerate|steps?|outline)\b",
        r"\b(write|compose|draft|create|generate|story|essay|poem|article)\b",
        r"\b(summari[sz]e|summary|shorten|brief|tl;?dr)\b",
        r"\b(classify|label|true or false|yes or no|which of|choose|option)\b",
        r"\b(explain|describe|discuss|compare|why|how)\b",
        r"\b(code|function|python|java|sql|script|program)\b",
        r"\b(translate|rewrite|paraphrase|correct)\b",
        r"\b(one|single) (word|sentence|line)\b",
    )
)
_NUMBER = re.compile(r"\b(\d{1,4})\s*(words?|sentences?|paragraphs?|items?|examples?|ideas?)\b")


def prompt_features(prompt_tokens: Ints, prompts: Sequence[str] | None, task: float) -> Floats:
    """Return one row of features per prompt; NaN where texts are not known.

    Args:
        prompt_tokens: shape ``(n,)``.
        prompts: texts, or None.
        task: code of the task, NaN if unknown.

    Returns:
        Shape ``(n, 15)``.
    """
    count = len(prompt_tokens)
    columns = np.full((count, 15), np.nan)
    columns[:, 0] = np.log1p(prompt_tokens)
    columns[:, 1] = task
    if prompts is not None:
        for row, text in enumerate(prompts):
            asked = _NUMBER.search(text)
            columns[row, 2:7] = (
                np.log1p(len(text)),
                text.count("?"),
                text.count("\n"),
                sum(c.isdigit() for c in text) / max(len(text), 1),
                float(asked.group(1)) if asked else np.nan,
            )
            columns[row, 7:] = [bool(cue.search(text)) for cue in _CUES]
    return columns


_LEVELS = np.array([0.05, 0.15, 0.25, 0.35, 0.5, 0.65, 0.75, 0.85, 0.95])


class ProxyOptions(EcdfOptions):
    """Options of ``proxy``."""

    min_observations: int = Field(
        default=100, ge=20, description="Fewer uncensored observations of a model: ``ecdf``."
    )
    seed: int = Field(default=0, ge=0, description="Seed of the regressor.")


@dataclass(frozen=True, slots=True)
class _Trained:
    """Regressors of one model.

    Attributes:
        tasks: labels in the order of their codes.
        told: features that were known of any observation.
        regressors: one per quantile level.
    """

    tasks: tuple[str, ...]
    told: NDArray[np.intp]
    regressors: tuple[Any, ...]


class ProxyLengths(LengthEstimator):
    """Predicts quantiles of each output from its prompt with gradient-boosted trees.

    After Qiu et al. 2024 (a small proxy model sees the prompt before the large one answers), with
    features in place of a language model: prompt length, task and, where texts are kept, its
    wording. Outputs that were cut are completed from the model's own product-limit estimate before
    the regression, so that limits do not pass for short answers. Models with too few observations
    are estimated by ``ecdf``.
    """

    name = "proxy"
    Config = ProxyOptions
    config: ProxyOptions

    def __init__(self, config: BaseModel | None = None) -> None:
        """Start from the bundled distributions and the profile.

        Raises:
            InputError: if the profile cannot be read.
            MissingExtraError: if there is one and scikit-learn is not installed.
        """
        super().__init__(config)
        names = EcdfOptions.model_fields
        options = {k: v for k, v in self.config.model_dump().items() if k in names}
        self._pooled = EcdfLengths(EcdfOptions(**options))
        self._regressors: dict[str, _Trained] = {}
        found = profile_of(self.config)
        if found is not None:
            self._learn(found.observations)

    def fit(self, observations: Sequence[LengthObservations]) -> ProxyLengths:
        """Return an estimator in which these observations replace earlier ones of their models.

        Raises:
            MissingExtraError: if scikit-learn is not installed.
        """
        _regressor(0.5, 0)  # say what is missing before any work
        fitted = copy(self)
        fitted._pooled = self._pooled.fit(observations)
        fitted._regressors = dict(self._regressors)
        fitted._learn(observations)
        return fitted

    def _learn(self, observations: Sequence[LengthObservations]) -> None:
        for model, seen in by_model(observations).items():
            key = find_name(model, self._regressors) or model
            self._regressors.pop(key, None)
            if sum(int((~o.censored).sum()) for o in seen) >= self.config.min_observations:
                self._regressors[key] = self._train(seen, self._pooled.known(model).distribution)

    def _train(self, seen: Sequence[LengthObservations], pooled: LengthDistribution) -> _Trained:
        """Return one regressor per quantile level."""
        tasks = tuple(dict.fromkeys(o.task for o in seen))
        features = np.concatenate([self._features(o, tasks) for o in seen])
        told = np.flatnonzero(np.isfinite(features).any(axis=0))
        lengths = np.concatenate([o.output_tokens for o in seen])
        censored = np.concatenate([o.censored for o in seen])
        rng = np.random.default_rng(self.config.seed)
        completed = pooled.conditional_quantile(
            rng.random(len(lengths)), np.maximum(lengths - 1, 0)
        )
        longest = int(lengths.max())
        targets = np.where(censored, np.minimum(completed, 2 * longest), lengths)
        logs = np.log1p(targets.astype(np.float64))
        with _one_thread():
            regressors = [
                _regressor(float(level), self.config.seed).fit(features[:, told], logs)
                for level in _LEVELS
            ]
        return _Trained(tasks, told, tuple(regressors))

    @staticmethod
    def _features(rows: LengthQuery | LengthObservations, tasks: tuple[str, ...]) -> Floats:
        code = float(tasks.index(rows.task)) if rows.task in tasks else float("nan")
        return prompt_features(rows.prompt_tokens, rows.prompts, code)

    def sample(self, query: LengthQuery, rng: np.random.Generator, num_scenarios: int) -> Ints:
        """Return independent draws from each request's predicted quantiles."""
        name = find_name(query.model, self._regressors)
        if name is None:
            return self._pooled.sample(query, rng, num_scenarios)
        trained = self._regressors[name]
        features = self._features(query, trained.tasks)[:, trained.told]
        with _one_thread():
            logs = np.sort(np.stack([r.predict(features) for r in trained.regressors]), axis=0)
        uniforms = rng.random((num_scenarios, len(query)))
        drawn = np.empty((num_scenarios, len(query)), np.int64)
        pooled = self._pooled.known(query.model).distribution
        for column in range(len(query)):
            lengths = np.expm1(logs[:, column]) * self.config.scale
            drawn[:, column] = _draw(
                lengths, uniforms[:, column], int(query.generated_tokens[column]), pooled
            )
        return within_limits(drawn, query)

    def source(self, model: str) -> str:
        """Return where a model's lengths come from."""
        learned = find_name(model, self._regressors) is not None
        return ("regression on prompts; " if learned else "") + self._pooled.source(model)


def _draw(lengths: Floats, uniforms: Floats, generated: int, pooled: LengthDistribution) -> Ints:
    """Return draws from a quantile function linear between the levels, above ``generated``.

    Beyond the outer levels the pooled distribution's shape continues it, scaled to meet it.
    """
    top = pooled.quantile(np.array([_LEVELS[-1], 0.999]))
    tail = lengths[-1] * (top[1] / top[0] if top[1] < 2**40 else 2.0)
    levels = np.concatenate(([0.0], _LEVELS, [1.0]))
    values = np.maximum.accumulate(np.concatenate(([1.0], lengths, [tail])))
    below = float(np.interp(generated, values, levels)) if generated > 0 else 0.0
    drawn = np.interp(below + uniforms * (1.0 - below), levels, values)
    whole: Ints = np.maximum(np.rint(drawn), 1).astype(np.int64)
    return whole


def _one_thread() -> AbstractContextManager[object]:
    """Keep scikit-learn to one thread: its threads spin while they wait, also for engines' CPUs."""
    from threadpoolctl import threadpool_limits

    limits: AbstractContextManager[object] = threadpool_limits(1, user_api="openmp")
    return limits


def _regressor(level: float, seed: int) -> Any:
    """Return an untrained regressor of one quantile."""
    try:
        from sklearn.ensemble import HistGradientBoostingRegressor
    except ImportError as error:
        raise MissingExtraError("length-estimator proxy", "scikit-learn", "learn") from error
    return HistGradientBoostingRegressor(
        loss="quantile",
        quantile=level,
        max_iter=80,
        max_leaf_nodes=15,
        min_samples_leaf=20,
        learning_rate=0.08,
        random_state=seed,
    )
