"""Models and clusters from their sections of ``app.yaml``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path

from samullm_plugin.app.spec import (
    NETWORK_GBIT_S,
    NETWORK_LATENCY_US,
    AppSpec,
    ArchitectureSection,
    ClusterSection,
    ModelSection,
    SharedSection,
)
from samullm_plugin.checkpoints.gpus import bundled_gpu
from samullm_plugin.checkpoints.hf_config import derived_max_model_len, read_config_file
from samullm_plugin.checkpoints.hub import fetch_description, has_weights, is_snapshot
from samullm_plugin.checkpoints.models import (
    bundled_architecture,
    find_checkpoint,
    read_checkpoint,
    revision_of,
)
from samullm_plugin.errors import InputError, suggest
from samullm_plugin.model.application import EngineOptions, ModelSpec
from samullm_plugin.model.architecture import ModelArchitecture
from samullm_plugin.model.cluster import Cluster, Gpu, Network
from samullm_plugin.model.shared_gpus import Sharing, share_gpus

_GIB = 2**30
_PLANNED = ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size")
_NUMBERS = {
    "max_num_seqs": 1,
    "max_num_batched_tokens": 1,
    "block_size": 1,
}
_FLAGS = ("enable_prefix_caching", "async_scheduling")


def model_specs(spec: AppSpec, path: Path) -> dict[str, ModelSpec]:
    """Return the models of a file by their names in it.

    Raises:
        InputError: naming file and field.
    """
    return {
        name: _model(section, path, f"{path}: models.{name}")
        for name, section in spec.models.items()
    }


def _model(section: ModelSection, path: Path, where: str) -> ModelSpec:
    """Return one model."""
    engine = engine_options(section.engine_args, f"{where}.engine_args")
    folder = _files(section, path, engine, where)
    architecture, longest = _architecture(section, path, where, folder, engine)
    max_model_len = section.max_model_len or longest
    if max_model_len is None and folder is not None:
        max_model_len = _longest(folder, where)
    if max_model_len is None:
        raise InputError(
            f"{where}.max_model_len: missing, and {section.model} is neither a bundled model nor a "
            "folder here; give the folder of its files as path, or the longest prompt plus output "
            "in tokens"
        )
    loaded = section.path
    if folder is not None and folder.is_dir() and (has_weights(folder) or not is_snapshot(folder)):
        loaded = str(folder.resolve())
    return ModelSpec(section.model, max_model_len, architecture, loaded, engine)


def _files(section: ModelSection, path: Path, engine: EngineOptions, where: str) -> Path | None:
    """Return where a model's description is: on this machine, or brought here from the hub.

    Raises:
        InputError: naming the section of a model that nothing here describes, if the hub cannot
            describe it either.
    """
    reference, revision = section.path or section.model, revision_of(engine)
    found = find_checkpoint(reference, path.parent, revision)
    described = section.architecture is not None and section.max_model_len is not None
    named = any(bundled_architecture(name) is not None for name in (section.model, reference))
    if found or described or named:
        return found
    try:
        return fetch_description(reference, revision)
    except InputError as error:
        raise InputError(f"{where}: {error}") from error


def _architecture(
    section: ModelSection, path: Path, where: str, folder: Path | None, engine: EngineOptions
) -> tuple[ModelArchitecture | None, int | None]:
    """Return the figures and the longest length, as far as known.

    What is written here comes first, then the files that are loaded, then the name.
    """
    given = section.architecture
    if isinstance(given, ArchitectureSection):
        return ModelArchitecture(**given.model_dump()), None
    if given is None:
        if folder is not None:
            return _read(folder, where, engine)
        return _bundled(section.model, where, engine) or (None, None)
    file = find_checkpoint(given, path.parent)
    if file is not None:
        return _read(file, f"{where}.architecture", engine)
    if found := _bundled(given, where, engine):
        return found
    raise InputError(
        f"{where}.architecture: {given!r} is neither a bundled model nor a file; give the "
        "figures or the path of a config.json"
    )


def _longest(folder: Path, where: str) -> int:
    """Return the longest length of a checkpoint whose figures are written here.

    Raises:
        InputError: naming the model's section as well.
    """
    try:
        return derived_max_model_len(read_config_file(folder))
    except InputError as error:
        raise InputError(f"{where}.max_model_len: missing, and {error}") from error


def _read(file: Path, where: str, engine: EngineOptions) -> tuple[ModelArchitecture, int]:
    """Return figures and longest length of a checkpoint.

    Raises:
        InputError: naming the model's section as well.
    """
    try:
        return read_checkpoint(file, engine)
    except InputError as error:
        raise InputError(f"{where}: {error}") from error


def _bundled(name: str, where: str, engine: EngineOptions) -> tuple[ModelArchitecture, int] | None:
    """Return figures and longest length of a bundled model; None if it is not bundled.

    Raises:
        InputError: naming the section of engine arguments that do not suit it.
    """
    try:
        return bundled_architecture(name, engine)
    except InputError as error:
        raise InputError(f"{where}.engine_args: {error}") from error


def engine_options(arguments: Mapping[str, object], where: str) -> EngineOptions:
    """Return engine settings; those the planner does not read are passed on.

    Args:
        arguments: of vLLM's engine, by name.
        where: file and field, or option, for messages.

    Raises:
        InputError: naming an argument that is wrong, unknown, or not given here.
    """
    known = {f.name for f in fields(EngineOptions)} - {"extra"}
    chosen: dict[str, object] = {}
    extra: list[tuple[str, object]] = []
    for name, value in arguments.items():
        field = f"{where}.{name}"
        if name in _PLANNED or name in ("model", "max_model_len"):
            meant = "the planner decides it" if name in _PLANNED else "give it one level up"
            raise InputError(f"{field}: {meant}; leave it out here")
        if name in known:
            _check_engine(name, value, field)
            chosen[name] = value
        else:
            if close := suggest(name, known):
                raise InputError(f"{field}: unknown engine argument{close}")
            extra.append((name, tuple(value) if isinstance(value, list) else value))
    return EngineOptions(**chosen, extra=tuple(extra))  # type: ignore[arg-type]  # checked above


def _check_engine(name: str, value: object, field: str) -> None:
    """Refuse a wrong value of an engine argument the planner reads."""
    if name in _NUMBERS:
        if not isinstance(value, int) or isinstance(value, bool) or value < _NUMBERS[name]:
            raise InputError(f"{field}: must be a whole number of at least 1, not {value!r}")
    elif name in _FLAGS:
        if not isinstance(value, bool):
            raise InputError(f"{field}: must be true or false, not {value!r}")
    elif name == "gpu_memory_utilization":
        if not isinstance(value, int | float) or not 0 < value <= 1:
            raise InputError(f"{field}: must be above 0 and at most 1, not {value!r}")
    elif not isinstance(value, str):
        raise InputError(f"{field}: must be a text, not {value!r}")


def build_cluster(section: ClusterSection, where: str) -> Cluster:
    """Return the devices of a file.

    Raises:
        InputError: naming file and field.
    """
    if isinstance(section.gpus, int):
        gpus = (_gpu(section.gpu, section.gpu_memory_gib, where),) * section.gpus
        sharing = [_sharing(section, where)] * section.gpus
    else:
        gpus = tuple(
            gpu
            for kind in section.gpus
            for gpu in (_gpu(kind.gpu, kind.gpu_memory_gib, where),) * kind.count
        )
        sharing = [
            how
            for k, kind in enumerate(section.gpus)
            for how in [_sharing(kind, f"{where}.gpus[{k}]")] * kind.count
        ]
        for field in SharedSection.model_fields:
            if field in section.model_fields_set:
                raise InputError(
                    f"{where}.{field}: gpus lists several kinds; write it in the entries of those "
                    "that engines share"
                )
    machines = _machines(section.machines, len(gpus), where)
    network = _network(section, where)
    try:
        host = None if section.host_memory_gib is None else int(section.host_memory_gib * 2**30)
        whole = Cluster(gpus, _groups(section.nvlink, len(gpus)), machines, host, network)
    except InputError as error:
        raise InputError(f"{where}: {str(error).removeprefix('cluster: ')}") from error
    return whole if all(how.engines == 1 for how in sharing) else share_gpus(whole, sharing)


def _sharing(section: SharedSection, where: str) -> Sharing:
    """Return how engines share GPUs of a kind.

    Raises:
        InputError: if it is not said how much slower they are, or said for nothing.
    """
    engines, slowdown = section.engines_per_gpu, section.slowdown
    if engines > 1 and slowdown is None:
        raise InputError(
            f"{where}.slowdown: missing, and engines_per_gpu is {engines}; give the factor by "
            "which iterations take longer beside another engine, as `samullm profile slowdown` "
            "measures it"
        )
    if engines == 1 and slowdown is not None:
        raise InputError(
            f"{where}.slowdown: it counts only where engines share a GPU; leave it out, or set "
            "engines_per_gpu: 2"
        )
    return Sharing(engines, 1.0 if slowdown is None else slowdown)


def _network(section: ClusterSection, where: str) -> Network | None:
    """Return what joins the machines, if replicas may lie across them.

    Raises:
        InputError: for figures that nothing would use.
    """
    if not section.replicas_across_machines:
        for field in ("network_gbit_s", "network_latency_us"):
            if getattr(section, field) is not None:
                raise InputError(
                    f"{where}.{field}: it counts only for replicas across machines; leave it out, "
                    "or set replicas_across_machines: true"
                )
        return None
    gbit_s, latency_us = section.network_gbit_s, section.network_latency_us
    return Network(
        (NETWORK_GBIT_S if gbit_s is None else gbit_s) * 1e9 / 8,
        (NETWORK_LATENCY_US if latency_us is None else latency_us) * 1e-6,
    )


def _gpu(name: str, memory_gib: float | None, where: str) -> Gpu:
    """Return a kind of GPU."""
    if memory_gib is not None:
        return Gpu(name, int(memory_gib * _GIB))
    try:
        return bundled_gpu(name)
    except InputError as error:
        raise InputError(f"{where}.{error}") from error


def _groups(nvlink: int | list[list[int]], count: int) -> tuple[tuple[int, ...], ...]:
    """Return the NVLink groups."""
    if isinstance(nvlink, list):
        return tuple(tuple(g) for g in nvlink)
    size = max(nvlink, 1)
    return tuple(tuple(range(i, min(i + size, count))) for i in range(0, count, size))


def _machines(
    machines: int | list[list[int]], count: int, where: str
) -> tuple[tuple[int, ...], ...]:
    """Return the machines' devices."""
    if isinstance(machines, list):
        return tuple(tuple(m) for m in machines)
    if machines < 1 or count % machines:
        raise InputError(
            f"{where}.machines: {count} GPUs cannot be spread evenly over {machines} machines; "
            "list the GPUs of each"
        )
    size = count // machines
    return tuple(tuple(range(i, i + size)) for i in range(0, count, size))
