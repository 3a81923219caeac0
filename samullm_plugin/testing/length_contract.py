"""The contract of length estimators.

Subclass it in a test module, and every rule becomes a test::

    class TestMine(LengthEstimatorContract):
        estimator_class = MyEstimator
        model = "lmsys/vicuna-13b-v1.5"
"""

from __future__ import annotations

import pickle
from typing import ClassVar

import numpy as np

from samullm_plugin.host.interfaces.length import LengthEstimator, LengthQuery
from samullm_plugin.model.lengths import LengthObservations
from samullm_plugin.model.types import Ints
from samullm_plugin.testing.rules import require


class LengthEstimatorContract:
    """Rules every length estimator keeps.

    Attributes:
        estimator_class: the class under test.
        options: its options.
        model: a model it knows.
        task: a task label.
    """

    estimator_class: ClassVar[type[LengthEstimator]]
    options: ClassVar[dict[str, object]] = {}
    model: ClassVar[str] = "contract-model"
    task: ClassVar[str] = ""

    def make(self) -> LengthEstimator:
        """Return a new instance."""
        config = self.estimator_class.Config
        return self.estimator_class(config.model_validate(self.options))

    def query(self, generated: int = 0, limit: int = 300, count: int = 200) -> LengthQuery:
        """Return requests of mixed prompt lengths and limits."""
        rows = np.arange(count)
        limits = np.where(rows % 3 == 0, limit // 2, limit).astype(np.int64)
        return LengthQuery(
            model=self.model,
            task=self.task,
            prompt_tokens=10 + rows % 50,
            max_tokens=limits,
            generated_tokens=np.minimum(generated, limits),
            max_model_len=2048,
            node="node",
            requests=rows,
        )

    def sample(self, query: LengthQuery, num_scenarios: int = 3, seed: int = 0) -> Ints:
        """Return samples of a new instance."""
        drawn = np.asarray(self.make().sample(query, np.random.default_rng(seed), num_scenarios))
        shape = (num_scenarios, len(query))
        require(drawn.shape == shape, "shape", f"{drawn.shape} instead of {shape}")
        return drawn

    def test_shape(self) -> None:
        """Samples are whole numbers, one row per scenario and one column per request."""
        drawn = self.sample(self.query())
        require(np.issubdtype(drawn.dtype, np.integer), "shape", f"the lengths are {drawn.dtype}")

    def test_no_requests(self) -> None:
        """A node without requests gets samples without columns."""
        self.sample(self.query(count=0))

    def test_limits(self) -> None:
        """Every length is at least 1 and at most the request's limit."""
        for limit in (2, 16, 300):
            query = self.query(limit=limit)
            drawn = self.sample(query, 5)
            require(drawn.min() >= 1, "at-least-one", f"a length is {drawn.min()}")
            over = drawn > query.max_tokens
            require(not over.any(), "at-most-limit", f"a length exceeds its limit {limit}")

    def test_longer_than_generated(self) -> None:
        """A request that has generated tokens and not reached its limit gets a longer length."""
        for generated in (1, 20, 149, 299):
            query = self.query(generated=generated)
            drawn = self.sample(query, 4)
            open_ = query.generated_tokens < query.max_tokens
            short = (drawn <= query.generated_tokens)[:, open_]
            require(not short.any(), "conditional", f"not above {generated} generated tokens")
            require((drawn <= query.max_tokens).all(), "at-most-limit", "above the limit")

    def test_equal_seeds(self) -> None:
        """Equal states of the generator give equal samples; other randomness is not used."""
        np.random.seed(1)  # noqa: NPY002  # an estimator that uses the global state is caught
        first = self.sample(self.query(), seed=5)
        np.random.seed(2)  # noqa: NPY002  # see above
        second = self.sample(self.query(), seed=5)
        same = np.array_equal(first, second)
        require(same, "deterministic", "equal seeds gave different samples")

    def test_fit_leaves_itself_alone(self) -> None:
        """``fit`` returns an estimator and does not change the one it is called on."""
        estimator = self.make()
        before = estimator.sample(self.query(), np.random.default_rng(3), 2)
        n = 60
        seen = LengthObservations(
            model=self.model,
            task=self.task,
            prompt_tokens=np.full(n, 30),
            output_tokens=np.arange(1, n + 1),
            censored=np.arange(n) % 10 == 0,
        )
        fitted = estimator.fit([seen])
        require(isinstance(fitted, LengthEstimator), "fit-returns", f"got {type(fitted).__name__}")
        after = estimator.sample(self.query(), np.random.default_rng(3), 2)
        require(np.array_equal(before, after), "fit-leaves-self", "fit changed the estimator")
        query = self.query()
        drawn = np.asarray(fitted.sample(query, np.random.default_rng(3), 2))
        inside = (drawn >= 1).all() and (drawn <= query.max_tokens).all()
        require(inside, "at-most-limit", "after fit, lengths leave their limits")
        try:
            kept = pickle.loads(pickle.dumps(fitted))
        except Exception as error:  # whatever pickle finds
            broken = f"what fit returns cannot be pickled: {error}"
            require(False, "fit-pickles", broken)
        again = np.asarray(kept.sample(query, np.random.default_rng(3), 2))
        same = np.array_equal(drawn, again)
        require(same, "fit-pickles", "a pickled copy of what fit returns gives other lengths")

    def test_fit_without_observations(self) -> None:
        """Fitting on nothing is allowed."""
        fitted = self.make().fit([])
        require(isinstance(fitted, LengthEstimator), "fit-returns", f"got {type(fitted).__name__}")

    def test_query_is_left_alone(self) -> None:
        """The query's arrays are not changed."""
        query = self.query(generated=10)
        copies = [a.copy() for a in (query.prompt_tokens, query.max_tokens, query.generated_tokens)]
        self.sample(query)
        now = (query.prompt_tokens, query.max_tokens, query.generated_tokens)
        same = all(np.array_equal(a, b) for a, b in zip(copies, now, strict=True))
        require(same, "leaves-query", "the query was changed")
