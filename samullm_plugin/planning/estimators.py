"""Length estimators and latency models by name; third parties' ones isolated."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np

from samullm_plugin.errors import PluginError, SamullmError
from samullm_plugin.host.interfaces.latency import LatencyModel
from samullm_plugin.host.interfaces.length import LengthEstimator
from samullm_plugin.host.manager import PluginHost
from samullm_plugin.host.settings import read_settings
from samullm_plugin.model.application import ModelSpec
from samullm_plugin.model.cluster import Gpu
from samullm_plugin.model.costs import LoadTimes, ModeCosts, Provenance
from samullm_plugin.model.latency import StepLatency, StepModel, StepTable
from samullm_plugin.model.types import Floats
from samullm_plugin.planning.isolated_lengths import IsolatedLengthEstimator

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
