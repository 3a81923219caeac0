"""The profile artifact: fitted latencies, engine starts and device coefficients of one device."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, fields
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from samullm_plugin.errors import InputError
from samullm_plugin.files import save
from samullm_plugin.model.architecture import ModelArchitecture
from samullm_plugin.model.latency import CURVES, LONGEST_S, Curve, StepLatency
from samullm_plugin.profiling.device_fit import DeviceFit, HostCoefficients
from samullm_plugin.profiling.loading import LoadModel
from samullm_plugin.profiling.memory import BatchLimits, MemoryModel
from samullm_plugin.profiling.roofline import DeviceCoefficients, DeviceHardware
from samullm_plugin.profiling.transfer import TransferErrors
from samullm_plugin.records import read_record

_DIGITS = 5
Seconds = Annotated[float, Field(ge=-LONGEST_S, le=LONGEST_S)]
"""A term of an iteration's latency."""

Figure = Annotated[float, Field(ge=-1e18, le=1e18)]
"""Any other: what it is multiplied by does not make it infinite."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class CurveData(_Strict):
    """A curve: seconds at knots."""

    knots: tuple[Figure, ...] = Field(min_length=1)
    values: tuple[Seconds, ...] = Field(min_length=1)

    @classmethod
    def of(cls, curve: Curve) -> CurveData:
        """Return the data of a curve."""
        return cls(knots=curve.knots, values=_rounded(curve.values))

    def curve(self) -> Curve:
        """Return the curve."""
        return Curve(self.knots, self.values)


class LatencyData(_Strict):
    """The terms of :class:`~samullm_plugin.model.latency.StepLatency`, in seconds."""

    by_tokens: CurveData
    by_seqs: CurveData
    host_by_seqs: CurveData
    prefill_token_s: Seconds = 0.0
    prefill_seq_s: Seconds = 0.0
    prefill_pair_s: Seconds = 0.0
    context_token_s: Seconds = 0.0
    longest_token_s: Seconds = 0.0
    longest_over_seqs: int = 0
    launch_s: Seconds = 0.0
    prefill_launch_s: Seconds = 0.0
    prefill_step_s: Seconds = 0.0
    overlap_host: bool = False

    @classmethod
    def of(cls, latency: StepLatency) -> LatencyData:
        """Return the data of a latency."""
        data: dict[str, Any] = {f.name: getattr(latency, f.name) for f in fields(latency)}
        for name, value in data.items():
            if isinstance(value, Curve):
                data[name] = CurveData.of(value)
            elif isinstance(value, float):
                data[name] = _round(value)
        return cls(**data)

    def latency(self) -> StepLatency:
        """Return the latency."""
        values = {n: getattr(self, n) for n in type(self).model_fields}
        return StepLatency(**{n: v.curve() if n in CURVES else v for n, v in values.items()})


class FittedModel(_Strict):
    """Latency of one model at one size, fitted to measured iterations.

    ``mape_pct`` is the mean absolute percentage error on rows not fitted where ``held_out_rows``
    says how many, else on the fitted rows; host stalls are taken out of the measurements.
    ``interruption_pct`` is what totals take longer than the sum of undisturbed iterations.
    """

    model: str
    tensor_parallel_size: int = Field(ge=1)
    latency: LatencyData
    num_rows: int = Field(ge=1)
    mape_pct: Figure
    held_out_rows: int = 0
    interruption_pct: Figure = 0.0
    undetermined: tuple[str, ...] = ()


class EngineStart(_Strict):
    """What was recorded of engine starts of one model at one size.

    ``kv_cache_tokens`` is the capacity that engines were given, for machines where nobody measures
    it (vLLM's CPU build); it stands in where peak memory was not recorded. ``warm_s`` is a start
    with files and compiled code in their caches, ``prepare_s`` the part of it that needs no device,
    ``first_s`` the first start of all, and ``parts`` the seconds of the warm one by part.
    """

    model: str
    tensor_parallel_size: int = Field(ge=1)
    kv_cache_tokens: int | None = Field(default=None, ge=1)
    total_bytes: Figure | None = None
    peak_bytes: Figure | None = None
    block_bytes: Figure | None = None
    num_blocks: int | None = None
    max_num_batched_tokens: int | None = None
    max_num_seqs: int | None = None
    warm_s: Figure | None = None
    prepare_s: Figure | None = None
    first_s: Figure | None = None
    parts: dict[str, Figure] = Field(default_factory=dict)

    @property
    def parts_text(self) -> str:
        """Return what the warm start consists of, the longest part first; empty if not recorded."""
        parts = sorted(self.parts.items(), key=lambda item: -item[1])
        return ", ".join(f"{name} {seconds:.1f} s" for name, seconds in parts)

    @property
    def limits(self) -> BatchLimits | None:
        """Return the largest batch, if recorded."""
        if self.max_num_batched_tokens is None or self.max_num_seqs is None:
            return None
        return BatchLimits(self.max_num_batched_tokens, self.max_num_seqs)


class TransferData(_Strict):
    """What transfer to other models needs."""

    coefficients: dict[str, Figure]
    hardware: dict[str, Figure]
    host_single: tuple[Figure, ...]
    host_parallel: tuple[Figure, ...]
    host_per_vocab: tuple[Figure, ...]
    same_experts: bool
    errors_pct: dict[str, Figure | None]

    @classmethod
    def of(cls, fit: DeviceFit, hardware: DeviceHardware, errors: TransferErrors) -> TransferData:
        """Return the data of a device fit."""
        return cls(
            coefficients={
                n: _round(getattr(fit.coefficients, n)) for n in _fields(DeviceCoefficients)
            },
            hardware={n: float(getattr(hardware, n)) for n in _fields(DeviceHardware)},
            host_single=_rounded(fit.host.single),
            host_parallel=_rounded(fit.host.parallel),
            host_per_vocab=_rounded(fit.host.per_vocab),
            same_experts=fit.same_experts,
            errors_pct={n: getattr(errors, n) for n in _fields(TransferErrors)},
        )

    def device(self) -> DeviceFit:
        """Return the device fit."""
        host = HostCoefficients(self.host_single, self.host_parallel, self.host_per_vocab)
        return DeviceFit(DeviceCoefficients(**self.coefficients), host, self.same_experts)

    def device_hardware(self) -> DeviceHardware:
        """Return the data-sheet figures."""
        figures = dict(self.hardware)
        return DeviceHardware(int(figures.pop("multiprocessors")), **figures)

    def errors(self) -> TransferErrors:
        """Return the expected errors."""
        return TransferErrors(**self.errors_pct)


class Profile(_Strict):
    """Everything learned about one device."""

    format: Literal["samullm-profile-1"] = "samullm-profile-1"
    device: str
    source: str
    models: tuple[FittedModel, ...] = ()
    starts: tuple[EngineStart, ...] = ()
    architectures: dict[str, dict[str, Any]] = Field(default_factory=dict)
    transfer: TransferData | None = None
    memory: dict[str, Figure] | None = None
    loading: dict[str, Figure] | None = None

    @field_validator("loading")
    @classmethod
    def _possible(cls, loading: dict[str, Figure] | None) -> dict[str, float] | None:
        for name, value in (loading or {}).items():
            if not (value > 0 if name.endswith("_bytes_per_s") else value >= 0):
                raise ValueError(f"{name} is {value}: seconds of at least 0, rates above 0")
        older = ("sleep_bytes_per_s", "wake_bytes_per_s")  # of a sleep that nothing uses any more
        return None if loading is None else {k: v for k, v in loading.items() if k not in older}

    def fitted(self, model: str, tensor_parallel_size: int) -> FittedModel | None:
        """Return the fitted latency of a model at a size, or None."""
        for entry in self.models:
            if entry.model == model and entry.tensor_parallel_size == tensor_parallel_size:
                return entry
        return None

    def start(self, model: str, tensor_parallel_size: int) -> EngineStart | None:
        """Return what was recorded of a model's starts at a size, or None."""
        for entry in self.starts:
            if entry.model == model and entry.tensor_parallel_size == tensor_parallel_size:
                return entry
        return None

    def architecture(self, model: str) -> ModelArchitecture | None:
        """Return the sizes of a model, if the profile holds them."""
        sizes = self.architectures.get(model)
        if sizes is None:
            return None
        return read_record(ModelArchitecture, sizes, f"architectures.{model}")

    def memory_model(self) -> MemoryModel | None:
        """Return the memory model, if any."""
        return None if self.memory is None else MemoryModel(**self.memory)

    def load_model(self) -> LoadModel | None:
        """Return the model of engine starts, if any."""
        return None if self.loading is None else LoadModel(**self.loading)


def architecture_data(architecture: ModelArchitecture) -> dict[str, Any]:
    """Return the sizes of a model as the profile stores them."""
    optional = ("parameters", "active_parameters", "stored_bytes", "kv_cache")
    sizes = asdict(architecture)
    return {n: v for n, v in sizes.items() if v or n not in optional}


def read_profile(path: Path) -> Profile:
    """Read a profile.

    Raises:
        InputError: naming the file and the field.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from error
    return _parse(text, str(path))


def _parse(text: str, where: str) -> Profile:
    """Return the profile of a JSON text.

    Raises:
        InputError: naming where it came from and the field.
    """
    try:
        profile = Profile.model_validate_json(text)
        for entry in profile.models:
            entry.latency.latency()
        if profile.transfer is not None:
            profile.transfer.device()
            profile.transfer.device_hardware()
            profile.transfer.errors()
        for name in profile.architectures:
            profile.architecture(name)
        profile.memory_model()
        profile.load_model()
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise InputError(
            f"{where}: not a profile: {place or 'content'}: {first['msg']} "
            "(make one with samullm profile fit)"
        ) from error
    except (TypeError, KeyError, InputError) as error:
        raise InputError(f"{where}: not a usable profile: {error}") from error
    return profile


def write_profile(profile: Profile, path: Path) -> None:
    """Write a profile as JSON, one model per line.

    Raises:
        InputError: if the file cannot be written.
    """
    data = profile.model_dump(mode="json", exclude_defaults=True)
    data = {"format": profile.format, "device": profile.device, "source": profile.source, **data}
    lines = []
    for key, value in data.items():
        if key in ("models", "starts") and value:
            rows = ",\n".join(_compact(row) for row in value)
            lines.append(f'"{key}": [\n{rows}\n]')
        else:
            lines.append(f'"{key}": {_compact(value)}')
    save(path, [("{\n" + ",\n".join(lines) + "\n}\n").encode()])


@cache
def bundled_profiles() -> Mapping[str, Profile]:
    """Return the profiles that come with the package, by device."""
    folder = files("samullm_plugin") / "data" / "latency"
    found = {}
    for entry in sorted(folder.iterdir(), key=lambda e: e.name):
        if entry.name.endswith(".json"):
            profile = _parse(entry.read_text(encoding="utf-8"), entry.name)
            found[profile.device] = profile
    return found


def _compact(value: object) -> str:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False)


def _fields(kind: type) -> tuple[str, ...]:
    """Return the field names of a dataclass."""
    return tuple(kind.__dataclass_fields__)  # type: ignore[attr-defined]  # dataclasses have it


def _round(value: float) -> float:
    return float(f"{value:.{_DIGITS}g}")


def _rounded(values: tuple[float, ...]) -> tuple[float, ...]:
    return tuple(_round(v) for v in values)
