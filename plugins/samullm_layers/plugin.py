"""The latency model ``layers``: profiles found in a folder, composed for a model and size."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

from pydantic import BaseModel, ConfigDict, Field

from samullm_layers.compose import LayerSteps, Link
from samullm_layers.tables import LayerTables, find_table, read_tables
from samullm_plugin import (
    Gpu,
    InputError,
    LatencyModel,
    LoadTimes,
    ModelSpec,
    Provenance,
    find_name,
    hookimpl,
)
from samullm_plugin.checkpoints.models import short_name, sizes_of
from samullm_plugin.model.kv_cache import KvCacheGroup
from samullm_plugin.profiling.loading import AssumedStarts
from samullm_plugin.profiling.memory import (
    kv_cache_pool_tokens,
    replica_groups,
    weight_bytes_on_device,
)

_VARIANTS = {
    "auto": "bf16",
    "bfloat16": "bf16",
    "float16": "fp16",
    "half": "fp16",
    "float32": "fp32",
}


class LayersOptions(AssumedStarts):
    """Options of ``layers``."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    profiles: Path = Field(
        description="Folder of layer profiles: <device>/<organisation>/<model>/<dtype>/tp<N>/ with "
        "attention.csv, dense.csv, per_sequence.csv, optional skew_fit.csv and meta.yaml."
    )
    models: dict[str, str] = Field(
        default_factory=dict,
        description="Profile to use for a model: {name in the application: profile's name}.",
    )
    devices: dict[str, str] = Field(
        default_factory=dict,
        description="Folder to use for a kind of GPU: {name in the application: <device>}.",
    )
    variant: str | None = Field(
        default=None,
        description="Folder between model and tp<N>; the short name of the model's dtype if not "
        "given, such as bf16.",
    )
    link_bytes_per_s: float | None = Field(
        default=None,
        gt=0,
        description="Bytes per second between devices, for all-reduces; needed beyond size 1 "
        "unless dense.csv has a layer all_reduce.",
    )
    link_latency_s: float = Field(
        default=0.0, ge=0, description="Seconds of one transfer between devices besides."
    )
    host_s: float = Field(
        default=0.0,
        ge=0,
        description="Seconds of the host per iteration; hidden behind the device with "
        "asynchronous scheduling.",
    )
    overhead_bytes: int = Field(
        default=1_300_000_000,
        ge=0,
        description="Memory of a device that neither weights nor KV cache use; the default is what "
        "a recorded vLLM 0.19 engine kept (8B model, 2,048 batched tokens, CUDA graphs), rounded "
        "up.",
    )


class LayersLatency(LatencyModel):
    """Iteration time composed from measured layers of the model on the device."""

    name: ClassVar[str] = "layers"
    Config: ClassVar[type[BaseModel]] = LayersOptions

    def __init__(self, config: BaseModel | None = None) -> None:
        """Keep the options.

        Args:
            config: the options.

        Raises:
            InputError: if the folder of profiles does not exist.
        """
        super().__init__(config)
        assert isinstance(self.config, LayersOptions)
        self._options = self.config
        if not self._options.profiles.is_dir():
            raise InputError(
                f"layers: profiles: {self._options.profiles} is not a folder; give the folder that "
                "holds <device>/<organisation>/<model>"
            )
        self._tables: dict[tuple[Path, int], LayerTables] = {}

    def step_latency(
        self,
        model: ModelSpec,
        gpu: Gpu,
        tensor_parallel_size: int,
        pipeline_parallel_size: int = 1,
    ) -> LayerSteps:
        """Return the iteration latency of one replica.

        Raises:
            InputError: if there is no profile of the model, device or size, or a table is wrong.
        """
        size = tensor_parallel_size
        tables = self._profile(model, gpu, size, pipeline_parallel_size)
        options, link = self._options, None
        if size > 1 and "all_reduce" not in tables.dense:
            if options.link_bytes_per_s is None:
                raise InputError(
                    f"{tables.folder}: dense.csv has no layer all_reduce, so the communication of "
                    f"{size} devices is unknown; give link_bytes_per_s (and link_latency_s)"
                )
            link = Link(options.link_bytes_per_s, options.link_latency_s)
        return LayerSteps(
            tables,
            sizes_of(model),
            size,
            link,
            options.host_s,
            overlap_host=model.engine.async_scheduling,
        )

    def kv_cache_tokens(
        self,
        model: ModelSpec,
        gpu: Gpu,
        tensor_parallel_size: int,
        pipeline_parallel_size: int = 1,
    ) -> int:
        """Return the KV-cache capacity in tokens; 0 if weights and one longest sequence do not fit.

        Raises:
            InputError: if the sizes of the model are not known.
        """
        architecture = sizes_of(model)
        if architecture.num_heads % tensor_parallel_size:
            return 0
        devices = tensor_parallel_size * pipeline_parallel_size
        used = weight_bytes_on_device(architecture, model.engine, devices)
        return kv_cache_pool_tokens(
            self.kv_cache_groups(model, gpu, tensor_parallel_size, pipeline_parallel_size),
            model,
            total_bytes=gpu.memory_bytes,
            used_bytes=used + self._options.overhead_bytes,
        )

    def kv_cache_groups(
        self,
        model: ModelSpec,
        gpu: Gpu,
        tensor_parallel_size: int,
        pipeline_parallel_size: int = 1,
    ) -> tuple[KvCacheGroup, ...]:
        """Return which layers share block tables."""
        return replica_groups(
            sizes_of(model), model.engine, tensor_parallel_size, pipeline_parallel_size
        )

    def load_times(
        self,
        model: ModelSpec,
        gpu: Gpu,
        tensor_parallel_size: int,
        pipeline_parallel_size: int = 1,
    ) -> LoadTimes:
        """Return the seconds of engine starts, by bytes and the assumed rates of the options.

        Raises:
            InputError: if the sizes of the model are not known.
        """
        devices = tensor_parallel_size * pipeline_parallel_size
        return self._options.load_times(sizes_of(model).weight_bytes, devices)

    def provenance(
        self,
        model: ModelSpec,
        gpu: Gpu,
        tensor_parallel_size: int,
        pipeline_parallel_size: int = 1,
    ) -> Provenance:
        """Return which profile the iteration latency is composed from.

        Raises:
            InputError: as :meth:`step_latency`.
        """
        tables = self._profile(model, gpu, tensor_parallel_size, pipeline_parallel_size)
        return Provenance("layer-profile", f"layers measured on {tables.about}")

    def _profile(self, model: ModelSpec, gpu: Gpu, size: int, pipeline: int) -> LayerTables:
        """Return the tables of a model on a device, read once.

        Raises:
            InputError: naming what there is instead.
        """
        if pipeline != 1:
            raise InputError(
                f"model {model.name}: layer profiles tell nothing of pipeline-parallel size "
                f"{pipeline}; use 1"
            )
        options = self._options
        device = self._device(gpu)
        present = {
            str(folder.relative_to(device)): folder
            for folder in sorted(device.glob("*/*"))
            if folder.is_dir()
        }
        wanted = options.models.get(model.name, model.name)
        name = find_name(wanted, present)
        if name is None:
            raise InputError(
                f"model {wanted}: no layer profile in {device} (there are "
                f"{', '.join(present) or 'none'}); profile it, or name one to use in models: "
                f"{{{short_name(model.name)}: ...}}"
            )
        variant = options.variant or _VARIANTS.get(model.engine.dtype, model.engine.dtype)
        folder = present[name] / variant / f"tp{size}"
        if not any(find_table(folder, f) for f in ("attention.csv", "dense.csv")):
            there = sorted(
                str(f.relative_to(present[name])) for f in present[name].glob("*/tp*") if f.is_dir()
            )
            raise InputError(
                f"model {name}: no layer profile for {variant}/tp{size} in {present[name]}; there "
                f"are {', '.join(there) or 'none'}"
            )
        if (folder, size) not in self._tables:
            self._tables[folder, size] = read_tables(folder, size)
        return self._tables[folder, size]

    def _device(self, gpu: Gpu) -> Path:
        """Return the folder of a kind of GPU.

        Raises:
            InputError: naming the devices there are.
        """
        wanted = _plain(self._options.devices.get(gpu.name, gpu.name))
        present = [f for f in sorted(self._options.profiles.iterdir()) if f.is_dir()]
        for folder in present:
            if _plain(folder.name) == wanted:
                return folder
        raise InputError(
            f"GPU {gpu.name}: no layer profiles in {self._options.profiles}; there are profiles of "
            f"{', '.join(f.name for f in present) or 'no device'}"
        )


def _plain(name: str) -> str:
    """Return a device name without vendor, memory and punctuation."""
    text = re.sub(r"nvidia|geforce", "", name.lower())
    text = re.sub(r"[-_ ]?\d+ ?gb$", "", text)
    return re.sub(r"[^a-z0-9]", "", text)


@hookimpl
def register_latency_models(register: Callable[[type[LatencyModel]], None]) -> None:
    """Offer the model."""
    register(LayersLatency)
