"""The best that is known of each model and device, where the application names no latency model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import ClassVar, TypeVar

import numpy as np

from samullm_plugin.errors import InputError, MissingExtraError
from samullm_plugin.host.interfaces.latency import LatencyModel
from samullm_plugin.host.manager import PluginHost
from samullm_plugin.model.application import Application, ModelSpec
from samullm_plugin.model.cluster import Gpu
from samullm_plugin.model.costs import LoadTimes, ModeCosts, Provenance
from samullm_plugin.model.kv_cache import KvCacheGroup
from samullm_plugin.model.latency import StepLatency, StepModel
from samullm_plugin.model.lengths import LengthObservations
from samullm_plugin.planning.estimators import make_latency_model
from samullm_plugin.profiling.calibration import (
    LEAST_ITERATIONS,
    Calibration,
    read_calibration,
    read_lengths,
    setting_key,
    start_factor,
)
from samullm_plugin.profiling.loading import ASSUMED, SCALED

ORDER = ("linear", "aiconfigurator", "assumed")
"""Latency models by how much they know: profiles and transfer, operator tables, data sheets."""

T = TypeVar("T")


class BestKnown(LatencyModel):
    """Asks latency models in turn; what runs on this machine have measured comes first."""

    name: ClassVar[str] = "best-known"

    def __init__(self, candidates: Sequence[LatencyModel]) -> None:
        """Keep the models to ask, those that know most first."""
        super().__init__()
        self._candidates = tuple(candidates)

    def _first(
        self, model: ModelSpec, gpu: Gpu, tp: int, pp: int, ask: Callable[[LatencyModel], T]
    ) -> T:
        """Return the first answer.

        Raises:
            InputError: what the last of them lacks.
        """
        refusal: InputError | None = None
        for candidate in self._candidates:
            try:
                candidate.step_latency(model, gpu, tp, pp)
                return ask(candidate)
            except (InputError, MissingExtraError) as error:
                refusal = error if isinstance(error, InputError) else refusal
        raise refusal or InputError(f"model {model.name}: no latency model is installed")

    def step_latency(
        self, model: ModelSpec, gpu: Gpu, tensor_parallel_size: int, pipeline_parallel_size: int = 1
    ) -> StepModel:
        """Return the iteration latency of one replica."""
        return self.costs(model, gpu, tensor_parallel_size, pipeline_parallel_size).latency

    def kv_cache_tokens(
        self, model: ModelSpec, gpu: Gpu, tensor_parallel_size: int, pipeline_parallel_size: int = 1
    ) -> int:
        """Return the KV-cache capacity."""
        return self.costs(model, gpu, tensor_parallel_size, pipeline_parallel_size).kv_cache_tokens

    def kv_cache_groups(
        self, model: ModelSpec, gpu: Gpu, tensor_parallel_size: int, pipeline_parallel_size: int = 1
    ) -> tuple[KvCacheGroup, ...]:
        """Return which layers share block tables."""
        return self.costs(model, gpu, tensor_parallel_size, pipeline_parallel_size).kv_cache_groups

    def load_times(
        self, model: ModelSpec, gpu: Gpu, tensor_parallel_size: int, pipeline_parallel_size: int = 1
    ) -> LoadTimes:
        """Return the seconds of engine starts."""
        return self.costs(model, gpu, tensor_parallel_size, pipeline_parallel_size).load

    def provenance(
        self, model: ModelSpec, gpu: Gpu, tensor_parallel_size: int, pipeline_parallel_size: int = 1
    ) -> Provenance:
        """Return where the iteration latency comes from."""
        return self.costs(model, gpu, tensor_parallel_size, pipeline_parallel_size).provenance

    def costs(
        self, model: ModelSpec, gpu: Gpu, tensor_parallel_size: int, pipeline_parallel_size: int = 1
    ) -> ModeCosts:
        """Return everything about a replica size, of the first model that knows it."""
        size = (model, gpu, tensor_parallel_size, pipeline_parallel_size)
        found = self._first(*size, lambda candidate: candidate.costs(*size))
        key = setting_key(model, gpu.name, tensor_parallel_size, pipeline_parallel_size)
        seen = read_calibration(key)
        if seen is not None:
            found = calibrated(found, seen)
        if found.load.source == ASSUMED and (factor := start_factor(gpu.name)) is not None:
            found = replace(found, load=_with_start(found.load, factor * found.load.warm_s, SCALED))
        return found


def calibrated(costs: ModeCosts, seen: Calibration) -> ModeCosts:
    """Return costs with what runs on this machine have measured in their place."""
    if seen.start_s:
        source = f"measured on this machine, {len(seen.start_s)} starts"
        usual = float(np.median(seen.start_s))
        costs = replace(costs, load=_with_start(costs.load, usual, source))
    if seen.num_iterations < LEAST_ITERATIONS or not isinstance(costs.latency, StepLatency):
        return costs
    latency, error_pct = seen.latency(costs.latency)
    source = f"measured on this machine, {seen.num_iterations:,} iterations"
    return replace(costs, latency=latency, provenance=Provenance("measured", source, error_pct))


def _with_start(load: LoadTimes, warm_s: float, source: str) -> LoadTimes:
    """Return load times with another start from the page cache; what a disk adds stays."""
    return replace(
        load,
        warm_s=warm_s,
        cold_s=warm_s + load.cold_s - load.warm_s,
        prepare_s=min(load.prepare_s, warm_s),
        source=source,
    )


def best_known(host: PluginHost) -> BestKnown:
    """Return the latency models that are installed and usable, in order."""
    names = [n for n in ORDER if n in host.names("latency-model")]
    found = []
    for name in names:
        try:
            found.append(make_latency_model(host, name))
        except (InputError, MissingExtraError):
            continue  # an extra that is not installed
    return BestKnown(found)


def seen_lengths(app: Application) -> list[LengthObservations]:
    """Return the output lengths that runs of these models on this machine have shown."""
    models = {n.model.name: n.model for n in app.nodes}
    return [seen for model in models.values() for seen in read_lengths(model)]
