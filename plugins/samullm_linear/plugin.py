"""Latency models by measured iterations, and by data sheets alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from samullm_linear.assumed import Assumed
from samullm_plugin import (
    Gpu,
    InputError,
    LatencyModel,
    LoadTimes,
    ModelArchitecture,
    ModelSpec,
    Provenance,
    hookimpl,
)
from samullm_plugin.checkpoints.models import find_name
from samullm_plugin.model.kv_cache import KvCacheGroup
from samullm_plugin.model.latency import StepLatency
from samullm_plugin.profiling.book import LatencyBook, architecture_of, latency_book
from samullm_plugin.profiling.loading import PROCESS_BYTES
from samullm_plugin.profiling.memory import (
    BatchLimits,
    assumed_pool_tokens,
    kv_cache_pool_tokens,
    replica_groups,
    weight_bytes_on_device,
)
from samullm_plugin.profiling.profile_files import (
    EngineStart,
    Profile,
    bundled_profiles,
    read_profile,
)
from samullm_plugin.profiling.transfer import PIPELINE_SOURCE, layer_key, stage_latency

CHANGE_LATENCY = frozenset(
    {"quantization", "speculative_config", "speculative_model", "kv_cache_dtype", "cpu_offload_gb",
     "enforce_eager", "enable_lora", "compilation_config"}
)  # fmt: skip
"""Engine arguments with which an iteration takes another time than the measured one."""
_ONE_GROUP = (KvCacheGroup("full"),)


class LinearOptions(BaseModel):
    """Options of ``linear`` and ``transfer``."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    profile: Path | None = Field(
        default=None,
        description="Profile made by `samullm profile fit`; bundled ones if not given.",
    )
    overlap_host: bool | None = Field(
        default=None,
        description="Host time hidden behind the device (asynchronous scheduling): true or false; "
        "not given: as measured, that is synchronous for the bundled profiles.",
    )
    experts: Literal["spread", "as-profiled"] = Field(
        default="spread",
        description="Mixture-of-experts models: tokens take different experts, or as in the "
        "profile, whose equal prompts all took the same few.",
    )
    extra_memory_bytes: int = Field(
        default=0,
        ge=0,
        description="Device memory that neither weights, activations nor KV cache may use, such as "
        "for CUDA graphs of newer vLLM versions.",
    )
    disk_bytes_per_s: float | None = Field(
        default=None, gt=0, description="Reading speed of the disk, for cold starts."
    )


class Linear(LatencyModel):
    """Few terms per model and size, fitted to measured iterations; others by transfer."""

    name: ClassVar[str] = "linear"
    Config: ClassVar[type[BaseModel]] = LinearOptions
    use_measured: ClassVar[bool] = True

    def __init__(self, config: BaseModel | None = None) -> None:
        """Read the profiles.

        Args:
            config: the options.

        Raises:
            InputError: if the profile cannot be read.
        """
        super().__init__(config)
        options = self.config
        assert isinstance(options, LinearOptions)
        self._options = options
        if options.profile is None:
            self._profiles = dict(bundled_profiles())
        else:
            profile = read_profile(options.profile)
            self._profiles = {profile.device: profile}
        self._books: dict[str, LatencyBook] = {}

    def step_latency(
        self,
        model: ModelSpec,
        gpu: Gpu,
        tensor_parallel_size: int,
        pipeline_parallel_size: int = 1,
    ) -> StepLatency:
        """Return the iteration latency of one replica.

        Raises:
            InputError: if the device, the model or the size cannot be predicted.
        """
        latency, _ = self._predict(model, gpu, tensor_parallel_size, pipeline_parallel_size)
        profile = self._profile(gpu)
        held = profile.fitted(self._identify(model, profile)[0], tensor_parallel_size)
        if held is not None and held.interruption_pct and self.use_measured:
            latency = latency.scaled(1 + held.interruption_pct / 100)
        if self._options.overlap_host is not None:
            latency = replace(latency, overlap_host=self._options.overlap_host)
        return latency

    def provenance(
        self,
        model: ModelSpec,
        gpu: Gpu,
        tensor_parallel_size: int,
        pipeline_parallel_size: int = 1,
    ) -> Provenance:
        """Return where the iteration latency comes from, with its known error.

        Raises:
            InputError: as :meth:`step_latency`.
        """
        found = self._predict(model, gpu, tensor_parallel_size, pipeline_parallel_size)[1]
        changed = sorted(n for n, v in model.engine.extra if n in CHANGE_LATENCY and v)
        if found.kind != "measured" or not changed:
            return found
        source = f"{found.source}; without {', '.join(changed)}, whose effect was not measured"
        return Provenance("assumed", source, None)

    def kv_cache_tokens(
        self,
        model: ModelSpec,
        gpu: Gpu,
        tensor_parallel_size: int,
        pipeline_parallel_size: int = 1,
    ) -> int:
        """Return the KV-cache capacity in tokens; 0 if weights and one longest sequence do not fit.

        Exact on recorded starts, by vLLM's formula; else from the predicted peak memory. With
        other batch limits than recorded, what activations differ by is predicted.

        Raises:
            InputError: if the sizes of the model are needed and not known.
        """
        profile = self._profile(gpu)
        size = tensor_parallel_size
        name, architecture = self._identify(model, profile)
        if architecture is not None and architecture.num_heads % size:
            return 0
        engine = model.engine
        limits = BatchLimits(engine.max_num_batched_tokens, engine.max_num_seqs)
        start = profile.start(name, size) if pipeline_parallel_size == 1 else None
        if start is not None and architecture is not None and _stored_otherwise(architecture):
            start = None  # recorded with weights and cache of 16 bits
        memory = profile.memory_model()
        used = float(self._options.extra_memory_bytes)
        if start is not None and start.kv_cache_tokens is not None and start.peak_bytes is None:
            given = start.kv_cache_tokens
            if gpu.engines > 1:  # it was alone on the device
                given = min(given, _room_on_part(model, architecture, gpu, size))
            return given if given >= model.max_model_len else 0
        groups = self.kv_cache_groups(model, gpu, size, pipeline_parallel_size)
        if start is not None and start.peak_bytes is not None and start.block_bytes is not None:
            used += start.peak_bytes
            known = start.limits
            if known is not None and known != limits and architecture is not None and memory:
                more = memory.overhead_bytes(architecture, size, limits)
                used += more - memory.overhead_bytes(architecture, size, known)
            per_block: float | None = start.block_bytes
        elif architecture is None or memory is None:
            raise InputError(
                f"model {model.name}: its memory at tensor-parallel size {size} was not recorded; "
                "give its architecture (figures, or the path of its config.json), and a profile "
                "with recorded engine starts"
            )
        else:
            devices = size * pipeline_parallel_size
            used += weight_bytes_on_device(architecture, engine, devices)
            used += memory.overhead_bytes(architecture, size, limits)
            per_block = None
        return kv_cache_pool_tokens(
            groups or _ONE_GROUP,
            model,
            total_bytes=gpu.memory_bytes,
            used_bytes=used,
            per_block_bytes=per_block,
        )

    def kv_cache_groups(
        self,
        model: ModelSpec,
        gpu: Gpu,
        tensor_parallel_size: int,
        pipeline_parallel_size: int = 1,
    ) -> tuple[KvCacheGroup, ...]:
        """Return which layers share block tables; nothing for a model of unknown sizes."""
        architecture = self._identify(model, self._profile(gpu))[1]
        if architecture is None:
            return ()
        return replica_groups(
            architecture, model.engine, tensor_parallel_size, pipeline_parallel_size
        )

    def load_times(
        self,
        model: ModelSpec,
        gpu: Gpu,
        tensor_parallel_size: int,
        pipeline_parallel_size: int = 1,
    ) -> LoadTimes:
        """Return the seconds of engine starts, sleeps and wake-ups.

        Raises:
            InputError: if neither a recorded start nor the model's sizes are known.
        """
        profile = self._profile(gpu)
        name, architecture = self._identify(model, profile)
        devices = tensor_parallel_size * pipeline_parallel_size
        start = profile.start(name, devices) if pipeline_parallel_size == 1 else None
        warm = None if start is None else start.warm_s
        prepare = None if start is None else start.prepare_s
        source = _start_source(profile, start)
        loading = profile.load_model()
        if architecture is None or loading is None:
            if warm is None:
                raise InputError(
                    f"model {model.name}: its start at tensor-parallel size {tensor_parallel_size} "
                    "was not recorded; give its architecture, and a profile with recorded starts"
                )
            weights = 0.0 if architecture is None else architecture.weight_bytes
            return LoadTimes(
                warm_s=warm,
                cold_s=warm,
                prepare_s=min(prepare or 0.0, warm),
                prepared_bytes=weights + PROCESS_BYTES,
                source=source,
            )
        if self._options.disk_bytes_per_s is not None:
            loading = replace(loading, disk_bytes_per_s=self._options.disk_bytes_per_s)
        return loading.times(
            architecture.weight_bytes, devices, warm_s=warm, prepare_s=prepare, source=source
        )

    def _profile(self, gpu: Gpu) -> Profile:
        """Return the profile of a device.

        Raises:
            InputError: naming the devices there are profiles of.
        """
        wanted = _plain(gpu.name)
        for device, profile in self._profiles.items():
            if _plain(device) == wanted:
                return profile
        raise InputError(
            f"GPU {gpu.name}: no profile; there are profiles of {', '.join(self._profiles)}. Make "
            "one with samullm profile fit, or take another latency model"
        )

    def _identify(self, model: ModelSpec, profile: Profile) -> tuple[str, ModelArchitecture | None]:
        """Return the name that the profile uses, and the model's sizes."""
        names = [m.model for m in profile.models] + [s.model for s in profile.starts]
        name = find_name(model.name, names) or model.name
        known = profile.architecture(name) or architecture_of(name, {})
        own = model.architecture
        if own is not None and known is not None and layer_key(own) != layer_key(known):
            # The same name for other sizes: what was measured under it does not hold.
            return f"{model.name} (other sizes)", own
        return name, own or known

    def _predict(
        self, model: ModelSpec, gpu: Gpu, size: int, pipeline: int
    ) -> tuple[StepLatency, Provenance]:
        """Return latency and provenance.

        Raises:
            InputError: if the device, the model or the size cannot be predicted.
        """
        profile = self._profile(gpu)
        if profile.device not in self._books:
            self._books[profile.device] = latency_book(profile)
        name, architecture = self._identify(model, profile)
        if pipeline != 1 and architecture is None:
            raise InputError(
                f"model {model.name}: pipeline-parallel size {pipeline} was not measured on "
                f"{gpu.name}; to predict it the model's architecture is needed, else use 1"
            )
        latency, found = self._books[profile.device].predict(
            name,
            architecture,
            size,
            spread=self._options.experts == "spread",
            use_measured=self.use_measured,
        )
        if pipeline == 1 or architecture is None:
            return latency, found
        source = f"{found.source}; {PIPELINE_SOURCE}"
        stage = stage_latency(latency, architecture, pipeline)
        return stage, Provenance("transferred", source, None)


class Transfer(Linear):
    """From the architecture and the device's coefficients alone, as for a model never profiled."""

    name: ClassVar[str] = "transfer"
    use_measured: ClassVar[bool] = False


def _room_on_part(
    model: ModelSpec, architecture: ModelArchitecture | None, gpu: Gpu, size: int
) -> int:
    """Return the KV-cache capacity in tokens that the parts of shared GPUs are assumed to have.

    Raises:
        InputError: if the sizes of the model are not known.
    """
    if architecture is None:
        raise InputError(
            f"model {model.name}: what it was measured with tells nothing of a part of a GPU; give "
            "its architecture (figures, or the path of its config.json), or set "
            "cluster.engines_per_gpu: 1"
        )
    return assumed_pool_tokens(model, architecture, gpu, size)


def _stored_otherwise(architecture: ModelArchitecture) -> bool:
    """Return whether weights or KV cache are of another type than those of recorded starts."""
    plain = replace(architecture, stored_bytes=0.0, kv_cache=(), dtype_bytes=2.0)
    return architecture.dtype_bytes != 2 or (
        architecture.kv_bytes_per_token != plain.kv_bytes_per_token
    )


def _start_source(profile: Profile, start: EngineStart | None) -> str:
    """Return where the seconds of an engine start come from."""
    if start is not None and start.warm_s is not None:
        parts = f": {start.parts_text}" if start.parts else ""
        return f"measured on {profile.device}{parts}"
    count = sum(s.warm_s is not None for s in profile.starts)
    return f"by the bytes of the weights, from {count} starts measured on {profile.device}"


def _plain(name: str) -> str:
    """Return a device name without vendor, form factor and punctuation."""
    text = name.lower().replace("nvidia", "")
    for part in ("sxm4", "sxm", "pcie", "gb", "-", "_", " "):
        text = text.replace(part, "")
    return text.removesuffix("g")


@hookimpl
def register_latency_models(register: Callable[[type[LatencyModel]], None]) -> None:
    """Offer the models."""
    register(Linear)
    register(Transfer)
    register(Assumed)
