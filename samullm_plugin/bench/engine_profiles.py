"""Latency profiles of an application's models, measured on this machine once and kept."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from samullm_plugin.checkpoints.models import read_checkpoint, short_name
from samullm_plugin.errors import InputError
from samullm_plugin.host.interfaces.executor import Executor
from samullm_plugin.measuring.engine import MeasuredModel, capacities, iterations_of, measure
from samullm_plugin.model.application import ModelSpec
from samullm_plugin.model.cluster import Cluster
from samullm_plugin.planning.building import TENSOR_PARALLEL_SIZES
from samullm_plugin.profiling.fit import fit_profile
from samullm_plugin.profiling.profile_files import Profile, read_profile, write_profile

SEQUENCES = 16
"""KV caches hold so many of the longest sequences."""


@dataclass(frozen=True, slots=True)
class Measurement:
    """How a model's profile was measured.

    Attributes:
        model: its name.
        device: what the profile calls the device.
        sizes: tensor-parallel sizes.
        measured_at: when, UTC.
        seconds: how long it took.
        error_pct: mean error of single iterations of unseen workloads, per size.
        sum_error_pct: error of their sum, per size.
        start_s: seconds of an engine start and of what its first iterations take longer, per size.
        fits: what has to be equal for the profile to be used again.
    """

    model: str
    device: str
    sizes: tuple[int, ...]
    measured_at: str
    seconds: float
    error_pct: tuple[float, ...]
    sum_error_pct: tuple[float, ...]
    start_s: tuple[float, ...]
    fits: Mapping[str, Any]


class ProfileStore:
    """Profiles in a folder, a file per model, and how each was measured."""

    def __init__(self, folder: Path, executor: str, machine: str) -> None:
        """Keep profiles in ``folder``.

        Args:
            folder: made when needed.
            executor: what runs the engines.
            machine: profiles hold on this machine and these versions only.
        """
        self._folder, self._executor, self._machine = folder, executor, machine

    def profile(
        self,
        make_executor: Callable[[], Executor],
        models: Sequence[ModelSpec],
        cluster: Cluster,
        tell: Callable[[str], None],
    ) -> tuple[Path, list[Measurement]]:
        """Return one profile of all models, measuring those that are not known.

        Args:
            make_executor: returns an executor that is not open.
            models: as the executor is to load them.
            cluster: where they will run; all its devices must be of one kind.
            tell: called with lines of progress.

        Raises:
            InputError: for a mixed cluster or a model of unknown sizes.
            RunError: if an engine fails.
        """
        device = cluster.gpus[0].name
        if len({g.name for g in cluster.gpus}) > 1:
            raise InputError("profiles are measured of one kind of device; give --profile")
        found, facts = [], []
        for model in {m.name: m for m in models}.values():
            known = self._known(model, cluster)
            if known is None:
                known = self._measure(make_executor(), model, cluster, tell)
            found.append(known[0])
            facts.append(known[1])
        names = " ".join(short_name(m.model) for m in facts)
        path = self._folder / f"{device}-{'-'.join(names.split())}.json"
        write_profile(_joined(found, device), path)
        return path, facts

    def _paths(self, model: ModelSpec) -> tuple[Path, Path]:
        stem = self._folder / short_name(model.name)
        return stem.with_suffix(".profile.json"), stem.with_suffix(".measured.json")

    def _fits(self, model: ModelSpec, cluster: Cluster) -> dict[str, Any]:
        fits = {
            "executor": self._executor,
            "machine": self._machine,
            "device": cluster.gpus[0].name,
            "sizes": replica_sizes(model, cluster),
            "model": asdict(replace(model, path=None)),
        }
        plain: dict[str, Any] = json.loads(json.dumps(fits))
        return plain

    def _known(self, model: ModelSpec, cluster: Cluster) -> tuple[Profile, Measurement] | None:
        profile_path, facts_path = self._paths(model)
        try:
            read: dict[str, Any] = json.loads(facts_path.read_text(encoding="utf-8"))
            plain: dict[str, Any] = {
                k: tuple(v) if isinstance(v, list) else v for k, v in read.items()
            }
            facts = Measurement(**plain)
        except (OSError, ValueError, TypeError):
            return None
        if facts.fits != self._fits(model, cluster):
            return None
        return read_profile(profile_path), facts

    def _measure(
        self,
        executor: Executor,
        model: ModelSpec,
        cluster: Cluster,
        tell: Callable[[str], None],
    ) -> tuple[Profile, Measurement]:
        sizes, device = replica_sizes(model, cluster), cluster.gpus[0].name
        architecture = model.architecture
        if architecture is None:
            architecture = read_checkpoint(Path(model.path or model.name))[0]
        tell(f"profiling {model.name} at tensor-parallel size {', '.join(map(str, sizes))}")
        began_s = time.monotonic()
        known = replace(model, architecture=architecture)
        room = capacities(executor, known, cluster.gpus[0], sizes, SEQUENCES)
        measured = measure(
            executor,
            model,
            sizes,
            device=device,
            kv_cache_tokens=room,
            vocab_size=architecture.vocab_size,
            run_dir=self._folder / f"{short_name(model.name)}.engines",
        )
        starts = [
            m.engine_start(model.name, size, capacity)
            for size, capacity, m in zip(sizes, room, measured, strict=True)
        ]
        profile = fit_profile(
            [m.rows for m in measured],
            {model.name: architecture},
            source=f"measured on {device}",
            starts=starts,
        )
        errors = [_errors(profile, m) for m in measured]
        facts = Measurement(
            model.name,
            device,
            tuple(sizes),
            datetime.now(UTC).isoformat(timespec="seconds"),
            round(time.monotonic() - began_s, 1),
            tuple(e for e, _ in errors),
            tuple(e for _, e in errors),
            tuple(round(m.start_s, 2) for m in measured),
            self._fits(model, cluster),
        )
        self._folder.mkdir(parents=True, exist_ok=True)
        profile_path, facts_path = self._paths(model)
        write_profile(profile, profile_path)
        facts_path.write_text(json.dumps(asdict(facts), indent=1) + "\n", encoding="utf-8")
        return profile, facts


def replica_sizes(model: ModelSpec, cluster: Cluster) -> list[int]:
    """Return the tensor-parallel sizes that a cluster's NVLink groups and a model's heads allow."""
    largest = max(len(g) for g in cluster.nvlink_groups)
    heads = model.architecture.num_heads if model.architecture else 1 << 10
    return [s for s in TENSOR_PARALLEL_SIZES if s <= largest and heads % s == 0]


def _joined(profiles: Sequence[Profile], device: str) -> Profile:
    """Return one profile with the models of several."""
    return Profile(
        device=device,
        source=profiles[0].source,
        models=tuple(m for p in profiles for m in p.models),
        starts=tuple(s for p in profiles for s in p.starts),
        architectures={n: a for p in profiles for n, a in p.architectures.items()},
    )


def _errors(profile: Profile, measured: MeasuredModel) -> tuple[float, float]:
    """Return a profile's mean error on single unseen iterations, and that of their sum."""
    fits = measured.rows
    rows = iterations_of(measured.unseen, fits.model, fits.tensor_parallel_size, fits.device)
    fitted = profile.fitted(rows.model, rows.tensor_parallel_size)
    assert fitted is not None  # it was fitted to the same model and size
    predicted = fitted.latency.latency().step_seconds(rows.steps)
    longer = 1 + fitted.interruption_pct / 100
    single = 100 * float(np.mean(np.abs(predicted / rows.seconds - 1)))
    whole = 100 * float(longer * predicted.sum() / rows.seconds.sum() - 1)
    return round(single, 2), round(whole, 2)
