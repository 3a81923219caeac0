"""Iteration times from a device's nominal figures."""

from pydantic import BaseModel, ConfigDict, Field

from samullm_plugin import (
    Curve,
    Gpu,
    InputError,
    LatencyModel,
    LoadTimes,
    ModelSpec,
    Provenance,
    StepLatency,
    hookimpl,
)

samullm_interface = 1


class Options(BaseModel):
    """Figures of the device."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    bandwidth_bytes_s: float = Field(default=1.6e12, gt=0, description="Memory bandwidth reached.")
    flops: float = Field(default=1.9e14, gt=0, description="Arithmetic reached by large batches.")
    launch_s: float = Field(default=0.004, ge=0, description="Least time of an iteration.")
    disk_bytes_s: float = Field(default=1.5e9, gt=0, description="Reading cold weights.")


class Roofline(LatencyModel):
    """A roofline: an iteration reads the weights once, or computes, whichever takes longer."""

    name = "roofline"
    Config = Options

    def _architecture(self, model: ModelSpec):
        if model.architecture is None:
            raise InputError(
                f"model {model.name}: the latency model roofline needs its architecture; give "
                "`architecture` in app.yaml"
            )
        return model.architecture

    def step_latency(
        self, model: ModelSpec, gpu: Gpu, tensor_parallel_size: int, pipeline_parallel_size: int = 1
    ) -> StepLatency:
        """Return reading below the ridge point, computing above it."""
        sizes, options = self._architecture(model), self.config
        read_s = sizes.weight_bytes / tensor_parallel_size / options.bandwidth_bytes_s
        token_s = sizes.useful_flops(1.0, 0.0) / tensor_parallel_size / options.flops
        ridge = max(2.0, read_s / token_s)
        base = options.launch_s
        curve = Curve((0.0, ridge, 2 * ridge), (base + read_s, base + read_s, base + 2 * read_s))
        kv_s = sizes.kv_bytes_per_token / tensor_parallel_size / options.bandwidth_bytes_s
        return StepLatency(curve, context_token_s=kv_s)

    def kv_cache_tokens(
        self, model: ModelSpec, gpu: Gpu, tensor_parallel_size: int, pipeline_parallel_size: int = 1
    ) -> int:
        """Return what the weights leave of 90 % of the memory."""
        sizes = self._architecture(model)
        left = 0.9 * gpu.memory_bytes - sizes.weight_bytes / tensor_parallel_size
        return max(0, int(left / (sizes.kv_bytes_per_token / tensor_parallel_size)))

    def load_times(
        self, model: ModelSpec, gpu: Gpu, tensor_parallel_size: int, pipeline_parallel_size: int = 1
    ) -> LoadTimes:
        """Return a fixed start plus reading the weights."""
        weights = self._architecture(model).weight_bytes
        warm_s = 10.0 + weights / 10e9 + 10.0 * (tensor_parallel_size > 1)
        return LoadTimes(warm_s, warm_s + weights / self.config.disk_bytes_s)

    def provenance(
        self, model: ModelSpec, gpu: Gpu, tensor_parallel_size: int, pipeline_parallel_size: int = 1
    ) -> Provenance:
        """Say that nothing was measured."""
        return Provenance("assumed", "roofline of the device's nominal figures")


@hookimpl
def register_latency_models(register):
    """Offer the latency model."""
    register(Roofline)
