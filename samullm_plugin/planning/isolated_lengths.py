"""A third party's length estimator, asked in a child process.

The child is started once and answers many calls: estimators are asked for every node and scenario.
It keeps nothing between calls, so that a call depends on its arguments alone.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from samullm_plugin.host.interfaces.length import LengthEstimator, LengthQuery
from samullm_plugin.host.isolation import FaultError, IsolatedWorker, digest, import_class
from samullm_plugin.host.registration import Registration
from samullm_plugin.model.length_observations import LengthObservations
from samullm_plugin.model.types import Ints
from samullm_plugin.planning.building import check_lengths


class IsolatedLengthEstimator(LengthEstimator):
    """Asks a third party's estimator in a child process, with a time limit, and checks its answers.

    What ``fit`` returns is kept as pickled bytes and never becomes an object of this process.
    """

    def __init__(
        self,
        registration: Registration,
        options: Mapping[str, object],
        limit_s: float,
        *,
        state: bytes | None = None,
        worker: IsolatedWorker | None = None,
    ) -> None:
        """Keep what calls need; nothing is started yet.

        Args:
            registration: the estimator.
            options: validated again by its ``Config`` in the child.
            limit_s: seconds until a call is ended.
            state: pickled estimator, if it was fitted.
            worker: where calls go; a new one if None.
        """
        super().__init__()
        origin = registration.provenance
        self.name = origin.qualified_name  # type: ignore[misc]  # messages name the distribution
        self._label = f"{origin.kind} {origin.qualified_name}"
        self._registration, self._options, self._limit_s = registration, dict(options), limit_s
        self._state, self._worker = state, worker or IsolatedWorker()

    def _ask(self, method: str, **arguments: Any) -> Any:
        cls = self._registration.value
        return self._worker.call(
            f"{self._label}: {method}",
            _ask_in_child,
            self._limit_s,
            cls.__module__,
            cls.__qualname__,
            self._options,
            self._state,
            method,
            arguments,
        )

    def fit(self, observations: Sequence[LengthObservations]) -> IsolatedLengthEstimator:
        """Return the fitted estimator, isolated as this one is.

        Raises:
            PluginError: if it raises, is too slow, changes what it was given, or returns something
                else than an estimator that can be pickled.
        """
        state = self._ask("fit", observations=list(observations))
        return IsolatedLengthEstimator(
            self._registration, self._options, self._limit_s, state=state, worker=self._worker
        )

    def sample(self, query: LengthQuery, rng: np.random.Generator, num_scenarios: int) -> Ints:
        """Return checked samples; ``rng`` goes on as if it had been used here.

        Raises:
            PluginError: if it raises, is too slow, changes what it was given, or breaks a rule of
                the interface.
        """
        drawn, used = self._ask("sample", query=query, rng=rng, num_scenarios=num_scenarios)
        rng.bit_generator.state = used
        return check_lengths(drawn, query, num_scenarios, self.name)

    def source(self, model: str) -> str:
        """Return where the estimate of a model comes from, in the plugin's words."""
        return str(self._ask("source", model=model))


def _ask_in_child(
    module: str,
    qualname: str,
    options: Mapping[str, object],
    state: bytes | None,
    method: str,
    arguments: Mapping[str, Any],
) -> Any:
    """Call a method of an estimator: a new one, or one fitted as its pickled state says."""
    cls = import_class(module, qualname)  # also what a pickled state needs to be imported
    estimator = cls(cls.Config.model_validate(options))
    if state is not None:
        estimator = pickle.loads(state)
    given = [v for k, v in arguments.items() if k != "rng"]
    before = digest(given)
    value = getattr(estimator, method)(**arguments)
    if digest(given) != before:
        what = "observations" if method == "fit" else "query"
        raise FaultError(f"changed the {what} it was given")
    if method == "sample":
        return value, arguments["rng"].bit_generator.state
    if method != "fit":
        return value
    if not isinstance(value, LengthEstimator):
        raise FaultError(f"returned a {type(value).__name__}, not a LengthEstimator")
    try:
        return pickle.dumps(value)
    except Exception as error:  # foreign objects
        raise FaultError(f"returned an estimator that cannot be pickled: {error}") from error
