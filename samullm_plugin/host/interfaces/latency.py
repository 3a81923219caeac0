"""Latency, memory and load-time models."""

from __future__ import annotations

from abc import ABC, abstractmethod

from samullm_plugin.host.interfaces.plugin import Plugin
from samullm_plugin.model.application import ModelSpec
from samullm_plugin.model.cluster import Gpu
from samullm_plugin.model.costs import LoadTimes, ModeCosts, Provenance
from samullm_plugin.model.kv_cache import KvCacheGroup
from samullm_plugin.model.latency import StepModel


class LatencyModel(Plugin, ABC):
    """Predicts iterations, memory and engine starts of a model on a kind of device.

    A complete plugin::

        from samullm_plugin import Curve, LatencyModel, LoadTimes, Provenance, StepLatency, hookimpl


        class Flat(LatencyModel):
            '''Every iteration takes 20 ms, whatever the model.'''

            name = "flat"

            def step_latency(self, model, gpu, tensor_parallel_size, pipeline_parallel_size=1):
                return StepLatency(Curve.constant(0.020))

            def kv_cache_tokens(self, model, gpu, tensor_parallel_size, pipeline_parallel_size=1):
                return 100_000

            def load_times(self, model, gpu, tensor_parallel_size, pipeline_parallel_size=1):
                return LoadTimes(warm_s=30.0, cold_s=120.0)

            def provenance(self, model, gpu, tensor_parallel_size, pipeline_parallel_size=1):
                return Provenance("assumed", "a constant")


        @hookimpl
        def register_latency_models(register):
            register(Flat)
    """

    @abstractmethod
    def step_latency(
        self,
        model: ModelSpec,
        gpu: Gpu,
        tensor_parallel_size: int,
        pipeline_parallel_size: int = 1,
    ) -> StepModel:
        """Return the iteration latency of one replica.

        A :class:`~samullm_plugin.model.latency.StepLatency` is evaluated in the compiled
        loop; any other object with ``step_seconds(table)`` works too, more slowly.

        Raises:
            InputError: if the model cannot be predicted, naming what is missing.
        """

    @abstractmethod
    def kv_cache_tokens(
        self,
        model: ModelSpec,
        gpu: Gpu,
        tensor_parallel_size: int,
        pipeline_parallel_size: int = 1,
    ) -> int:
        """Return the KV-cache capacity of one replica in tokens; 0 if the weights do not fit."""

    @abstractmethod
    def load_times(
        self,
        model: ModelSpec,
        gpu: Gpu,
        tensor_parallel_size: int,
        pipeline_parallel_size: int = 1,
    ) -> LoadTimes:
        """Return the seconds of engine starts, sleeps and wake-ups."""

    @abstractmethod
    def provenance(
        self,
        model: ModelSpec,
        gpu: Gpu,
        tensor_parallel_size: int,
        pipeline_parallel_size: int = 1,
    ) -> Provenance:
        """Return where the iteration latency comes from, with its known error."""

    def kv_cache_groups(
        self,
        model: ModelSpec,
        gpu: Gpu,
        tensor_parallel_size: int,
        pipeline_parallel_size: int = 1,
    ) -> tuple[KvCacheGroup, ...]:
        """Return which layers share block tables; empty: all of them, with full attention."""
        return ()

    def costs(
        self,
        model: ModelSpec,
        gpu: Gpu,
        tensor_parallel_size: int,
        pipeline_parallel_size: int = 1,
    ) -> ModeCosts:
        """Return everything a problem holds about one replica size."""
        size = (model, gpu, tensor_parallel_size, pipeline_parallel_size)
        return ModeCosts(
            self.step_latency(*size),
            self.kv_cache_tokens(*size),
            self.load_times(*size),
            self.provenance(*size),
            self.kv_cache_groups(*size),
        )
