"""The latency model ``aiconfigurator``: operator tables for devices nobody had to profile."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from samullm_aiconfigurator.package import (
    Operators,
    PricedReplica,
    bundled,
    package_version,
    require,
)
from samullm_aiconfigurator.tabulate import HostTime, OperatorSteps
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
from samullm_plugin.errors import describe_validation
from samullm_plugin.profiling.loading import AssumedStarts

_SYSTEMS = {
    "a10080": "a100_sxm", "a100": "a100_sxm", "a100sxm": "a100_sxm", "a100sxm80": "a100_sxm",
    "h100": "h100_sxm", "h10080": "h100_sxm", "h100sxm": "h100_sxm",
    "h200": "h200_sxm", "h200141": "h200_sxm", "b200": "b200_sxm", "b300": "b300_sxm",
    "gb200": "gb200", "gb300": "gb300", "l40s": "l40s", "l40s48": "l40s",
    "rtxpro6000": "rtx_pro_6000_server", "rtxpro600096": "rtx_pro_6000_server",
}  # fmt: skip
"""Devices by plain name, memory in GB at the end. An A100 of 40 GB has slower memory: not here."""

_RENAMED = re.compile(r"(?i)^(.*/)?(?:meta-)?(llama-3(?:\.1)?-\d+b)$")


class CorrectionEntry(BaseModel):
    """Host time of one model and size."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str
    tensor_parallel_size: int = Field(ge=1)
    device: str | None = None
    host_s: float = Field(ge=0)
    host_s_per_seq: float = Field(ge=0)
    mape_pct: float | None = Field(default=None, ge=0)


class Correction(BaseModel):
    """A file written by ``samullm profile fit --base aiconfigurator``."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    base: str
    entries: tuple[CorrectionEntry, ...]


class AiconfiguratorOptions(AssumedStarts):
    """Options of ``aiconfigurator``."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    systems: dict[str, str] = Field(
        default_factory=dict,
        description="The package's name of a device: {name in the application: h100_sxm}.",
    )
    models: dict[str, str] = Field(
        default_factory=dict,
        description="What the package prices for a model: {name in the application: name whose "
        "configuration the package has, or folder of a config.json}.",
    )
    backend_version: str | None = Field(
        default=None, description="vLLM version of the tables; the package's current one if null."
    )
    gemm_quant_mode: str | None = Field(
        default=None, description="Such as bfloat16, fp8, nvfp4; null: as the configuration says."
    )
    moe_quant_mode: str | None = Field(default=None, description="The same of experts.")
    kvcache_quant_mode: str | None = Field(default=None, description="The same of the KV cache.")
    fmha_quant_mode: str | None = Field(default=None, description="The same of attention.")
    expert_parallel: bool = Field(
        default=False, description="Split mixtures of experts by experts, not within each."
    )
    min_measured_share: float = Field(
        default=0.5,
        ge=0,
        le=1,
        description="Least share of a decode iteration that must come from measured operators.",
    )
    correction: Path | None = Field(
        default=None,
        description="Host time from measured iterations, written by samullm profile fit --base "
        "aiconfigurator.",
    )


class OperatorTables(LatencyModel):
    """Iterations priced operator by operator by the package aiconfigurator, tabulated once."""

    name: ClassVar[str] = "aiconfigurator"
    Config: ClassVar[type[BaseModel]] = AiconfiguratorOptions

    def __init__(self, config: BaseModel | None = None) -> None:
        """Keep the options.

        Args:
            config: the options.

        Raises:
            MissingExtraError: without the package.
            InputError: if the correction cannot be read.
        """
        super().__init__(config)
        assert isinstance(self.config, AiconfiguratorOptions)
        self._options = self.config
        require()
        path = self._options.correction
        self._correction = None if path is None else _read_correction(path)
        self._operators: dict[PricedReplica, Operators] = {}
        self._steps: dict[tuple[PricedReplica, int, int, int, HostTime], OperatorSteps] = {}

    def step_latency(
        self,
        model: ModelSpec,
        gpu: Gpu,
        tensor_parallel_size: int,
        pipeline_parallel_size: int = 1,
    ) -> OperatorSteps:
        """Return the iteration latency of one replica.

        Raises:
            InputError: if the package cannot price it.
        """
        operators = self._priced(model, gpu, tensor_parallel_size, pipeline_parallel_size)
        entry = self._entry(model, gpu, tensor_parallel_size)
        host = HostTime() if entry is None else HostTime(entry.host_s, entry.host_s_per_seq)
        engine = model.engine
        limits = engine.max_num_seqs, engine.max_num_batched_tokens, model.max_model_len
        key = (operators.deployment, *limits, host)
        if key not in self._steps:
            self._steps[key] = OperatorSteps(
                operators,
                max_num_seqs=limits[0],
                max_num_batched_tokens=limits[1],
                max_model_len=limits[2],
                host=host,
            )
        return self._steps[key]

    def kv_cache_tokens(
        self,
        model: ModelSpec,
        gpu: Gpu,
        tensor_parallel_size: int,
        pipeline_parallel_size: int = 1,
    ) -> int:
        """Return the KV-cache capacity by the package's memory model; 0 if the weights do not fit.

        Raises:
            InputError: if the package cannot tell.
        """
        operators = self._priced(model, gpu, tensor_parallel_size, pipeline_parallel_size)
        tokens = self._memory(operators, model, gpu)[0]
        return tokens if tokens >= model.max_model_len else 0

    def load_times(
        self,
        model: ModelSpec,
        gpu: Gpu,
        tensor_parallel_size: int,
        pipeline_parallel_size: int = 1,
    ) -> LoadTimes:
        """Return the seconds of engine starts, by bytes and the assumed rates of the options.

        Raises:
            InputError: if the package cannot tell the weights.
        """
        operators = self._priced(model, gpu, tensor_parallel_size, pipeline_parallel_size)
        weights = self._memory(operators, model, gpu)[1] * tensor_parallel_size
        return self._options.load_times(weights, tensor_parallel_size)

    def provenance(
        self,
        model: ModelSpec,
        gpu: Gpu,
        tensor_parallel_size: int,
        pipeline_parallel_size: int = 1,
    ) -> Provenance:
        """Return the tables that the iteration latency comes from, and how far they were measured.

        Raises:
            InputError: as :meth:`step_latency`.
        """
        operators = self._priced(model, gpu, tensor_parallel_size, pipeline_parallel_size)
        entry = self._entry(model, gpu, tensor_parallel_size)
        corrected = "" if entry is None else "; host time from own measurements"
        return Provenance(
            "operator-table",
            f"aiconfigurator {package_version()}, vLLM {operators.version} tables of "
            f"{operators.deployment.system}, {operators.measured_share():.0%} of a decode "
            f"iteration from measured operators{corrected}",
            None if entry is None else entry.mape_pct,
        )

    def _priced(self, model: ModelSpec, gpu: Gpu, size: int, pipeline: int) -> Operators:
        """Return the deployment, compiled once.

        Raises:
            InputError: if the package cannot price it.
        """
        if pipeline != 1:
            raise InputError(
                f"model {model.name}: aiconfigurator prices whole iterations; pipeline-parallel "
                f"size {pipeline} cannot be planned with it, use 1"
            )
        options = self._options
        quantised = dict(model.engine.extra).get("quantization")
        if quantised and options.gemm_quant_mode is None:
            raise InputError(
                f"model {model.name}: it is started with quantization {quantised!r}; tell "
                "aiconfigurator which tables that means by its option gemm_quant_mode"
            )
        if model.engine.dtype not in ("auto", "bfloat16", "float16", "half"):
            raise InputError(
                f"model {model.name}: aiconfigurator has no tables for dtype {model.engine.dtype}"
            )
        deployment = PricedReplica(
            self._name(model),
            self._system(gpu),
            size,
            options.expert_parallel,
            options.backend_version,
            options.gemm_quant_mode,
            options.moe_quant_mode,
            options.kvcache_quant_mode,
            options.fmha_quant_mode,
        )
        if deployment not in self._operators:
            operators = Operators(deployment)
            share = operators.measured_share()
            if share < options.min_measured_share:
                raise InputError(
                    f"aiconfigurator estimates {1 - share:.0%} of a decode iteration of "
                    f"{deployment.said} without measured operators; lower min_measured_share to "
                    "accept that, or take another latency model"
                )
            self._operators[deployment] = operators
        return self._operators[deployment]

    def _memory(self, operators: Operators, model: ModelSpec, gpu: Gpu) -> tuple[int, float]:
        engine = model.engine
        return operators.memory(
            gpu.memory_bytes,
            engine.gpu_memory_utilization,
            engine.max_num_batched_tokens,
            engine.max_num_seqs,
        )

    def _name(self, model: ModelSpec) -> str:
        """Return the package's name of a model, or the folder of its configuration."""
        chosen = self._options.models.get(model.name)
        if chosen is not None:
            return chosen
        if model.path is not None and Path(model.path).is_dir():
            return model.path
        known = bundled()
        renamed = _RENAMED.match(model.name)
        names = [model.name]
        if renamed is not None:  # Meta published the 3.1 models under both names
            names += [f"meta-llama/Meta-{renamed[2]}"]
        return next((n for n in (find_name(m, known) for m in names) if n), model.name)

    def _system(self, gpu: Gpu) -> str:
        """Return the package's name of a device.

        Raises:
            InputError: if it is not known which one it is.
        """
        chosen = self._options.systems.get(gpu.name)
        if chosen is not None:
            return chosen
        plain = re.sub(r"nvidia|geforce|gb$|[^a-z0-9]", "", gpu.name.lower())
        if plain in _SYSTEMS:
            return _SYSTEMS[plain]
        if gpu.name in _SYSTEMS.values():
            return gpu.name
        raise InputError(
            f"GPU {gpu.name}: not one of those aiconfigurator has vLLM tables for "
            f"({', '.join(sorted(set(_SYSTEMS.values())))}); name one in the option systems, or "
            "take another latency model"
        )

    def _entry(self, model: ModelSpec, gpu: Gpu, size: int) -> CorrectionEntry | None:
        """Return the correction of a model and size, if there is one."""
        for entry in () if self._correction is None else self._correction.entries:
            same = find_name(model.name, [entry.model]) is not None
            if same and entry.tensor_parallel_size == size and entry.device in (None, gpu.name):
                return entry
        return None


def _read_correction(path: Path) -> Correction:
    """Read a correction.

    Raises:
        InputError: naming file and field.
    """
    try:
        found = Correction.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"{path}: cannot be read as a correction: {error}") from error
    except ValidationError as error:
        raise InputError(f"{path}: {describe_validation(error)}") from error
    if found.base != OperatorTables.name:
        raise InputError(f"{path}: corrects latency model {found.base}, not {OperatorTables.name}")
    return found


@hookimpl
def register_latency_models(register: Callable[[type[LatencyModel]], None]) -> None:
    """Offer the model."""
    register(OperatorTables)
