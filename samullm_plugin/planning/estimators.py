"""Length estimators and latency models by name; third parties' ones isolated.

A third party's length estimator is asked in a child process. It is started once and answers many
calls: estimators are asked for every node and scenario. It keeps nothing between calls, so that a
call depends on its arguments alone.
"""

from __future__ import annotations

import contextlib
import pickle
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np

from samullm_plugin.errors import PluginError, SamullmError
from samullm_plugin.host.interfaces.latency import LatencyModel
from samullm_plugin.host.interfaces.length import LengthEstimator, LengthQuery
from samullm_plugin.host.isolation import FaultError, IsolatedWorker, digest, import_class
from samullm_plugin.host.manager import PluginHost
from samullm_plugin.host.registration import Registration
from samullm_plugin.host.settings import read_settings
from samullm_plugin.model.application import ModelSpec
from samullm_plugin.model.cluster import Gpu
from samullm_plugin.model.costs import LoadTimes, ModeCosts, Provenance
from samullm_plugin.model.latency import StepLatency, StepModel, StepTable
from samullm_plugin.model.lengths import LengthObservations
from samullm_plugin.model.types import Floats, Ints
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


T = TypeVar("T")


def make_length_estimator(
    host: PluginHost,
    name: str,
    options: Mapping[str, object] | None = None,
    *,
    limit_s: float | None = None,
) -> LengthEstimator:
    """Return a length estimator; a third party's is asked in a child process.

    Args:
        host: the plugins.
        name: of the estimator.
        options: its own.
        limit_s: seconds until a third party's call is ended; None: as the settings say.

    Raises:
        InputError: for an unknown name or wrong options.
    """
    registration = host.resolve("length-estimator", name)
    if registration.provenance.shipped:
        return host.create("length-estimator", name, options)
    host.check_options("length-estimator", name, options)
    limit = limit_s or read_settings().third_party_limit_s
    return IsolatedLengthEstimator(registration, options or {}, limit)


def make_latency_model(
    host: PluginHost, name: str, options: Mapping[str, object] | None = None
) -> LatencyModel:
    """Return a latency model; what a third party's raises names it, what it prints goes to stderr.

    Raises:
        InputError: for an unknown name or wrong options.
    """
    origin = host.resolve("latency-model", name).provenance
    model = host.create("latency-model", name, options)
    return model if origin.shipped else NamedLatencyModel(model, origin.qualified_name)


class NamedLatencyModel(LatencyModel):
    """Passes questions on to a third party's latency model, and blames it for what it raises."""

    def __init__(self, model: LatencyModel, name: str) -> None:
        """Keep the model and the name for messages."""
        super().__init__()
        self.name = name  # type: ignore[misc]  # messages name the distribution
        self._model = model

    def _ask(self, call: Callable[..., T], *size: Any) -> T:
        with blamed(f"latency-model {self.name}: {call.__name__}"):
            return call(*size)

    def step_latency(
        self, model: ModelSpec, gpu: Gpu, tensor_parallel_size: int, pipeline_parallel_size: int = 1
    ) -> StepModel:
        """Return the iteration latency; one of a class of its own is blamed as well."""
        size = (model, gpu, tensor_parallel_size, pipeline_parallel_size)
        return self._named(self._ask(self._model.step_latency, *size))

    def _named(self, found: StepModel) -> StepModel:
        if isinstance(found, StepLatency):
            return found
        if not isinstance(found, StepModel):
            raise PluginError(
                f"latency-model {self.name}: step_latency returned a {type(found).__name__}, "
                "which has no step_seconds"
            )
        return NamedStepModel(found, self.name)

    def kv_cache_tokens(
        self, model: ModelSpec, gpu: Gpu, tensor_parallel_size: int, pipeline_parallel_size: int = 1
    ) -> int:
        """Return the KV-cache capacity."""
        size = (model, gpu, tensor_parallel_size, pipeline_parallel_size)
        return self._ask(self._model.kv_cache_tokens, *size)

    def load_times(
        self, model: ModelSpec, gpu: Gpu, tensor_parallel_size: int, pipeline_parallel_size: int = 1
    ) -> LoadTimes:
        """Return the load times."""
        size = (model, gpu, tensor_parallel_size, pipeline_parallel_size)
        return self._ask(self._model.load_times, *size)

    def provenance(
        self, model: ModelSpec, gpu: Gpu, tensor_parallel_size: int, pipeline_parallel_size: int = 1
    ) -> Provenance:
        """Return where the prediction comes from."""
        size = (model, gpu, tensor_parallel_size, pipeline_parallel_size)
        return self._ask(self._model.provenance, *size)

    def costs(
        self, model: ModelSpec, gpu: Gpu, tensor_parallel_size: int, pipeline_parallel_size: int = 1
    ) -> ModeCosts:
        """Return everything about a replica size, as the model itself puts it together.

        Raises:
            PluginError: if it raises or gives figures of the wrong type.
        """
        size = (model, gpu, tensor_parallel_size, pipeline_parallel_size)
        found = self._ask(self._model.costs, *size)
        if not isinstance(found, ModeCosts):
            raise PluginError(f"latency-model {self.name}: costs gave a {type(found).__name__}")
        for value, kind in (
            (found.kv_cache_tokens, int | np.integer),
            (found.load, LoadTimes),
            (found.provenance, Provenance),
        ):
            if not isinstance(value, kind):
                wanted = getattr(kind, "__name__", "whole number")
                raise PluginError(
                    f"latency-model {self.name}: gave a {type(value).__name__} for {model.name} "
                    f"where a {wanted} is needed"
                )
        return replace(
            found,
            latency=self._named(found.latency),
            kv_cache_tokens=int(found.kv_cache_tokens),
        )


@dataclass(frozen=True, slots=True)
class NamedStepModel:
    """A third party's iteration latency and the name to blame."""

    model: StepModel
    name: str

    def step_seconds(self, steps: StepTable) -> Floats:
        """Return the seconds of each iteration.

        Raises:
            PluginError: if the model raises, or gives seconds that cannot be.
        """
        label = f"latency-model {self.name}: step_seconds"
        with blamed(label):
            seconds = np.asarray(self.model.step_seconds(steps), dtype=np.float64)
        if seconds.shape != (len(steps),):
            raise PluginError(f"{label}: shape {seconds.shape} instead of ({len(steps)},)")
        if not (np.isfinite(seconds) & (seconds >= 0)).all():
            bad = seconds[~(np.isfinite(seconds) & (seconds >= 0))][0]
            raise PluginError(f"{label}: an iteration of {bad} s")
        return seconds


@contextlib.contextmanager
def blamed(label: str) -> Iterator[None]:
    """Name whom an error comes from, and keep prints off stdout."""
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    except SamullmError:
        raise
    except Exception as error:  # foreign code
        text = " ".join(str(error).split())
        raise PluginError(f"{label} raised {type(error).__name__}: {text}") from error
