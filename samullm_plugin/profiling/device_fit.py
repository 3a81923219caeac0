"""Learn a device's coefficients from the iterations of several models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import numpy as np

from samullm_plugin.errors import InputError
from samullm_plugin.model.architecture import ModelArchitecture
from samullm_plugin.model.latency import Curve, StepTable
from samullm_plugin.model.types import Floats
from samullm_plugin.profiling.iterations import Iterations
from samullm_plugin.profiling.regression import least_absolute, levenberg_marquardt
from samullm_plugin.profiling.roofline import (
    DeviceCoefficients,
    DeviceHardware,
    Shapes,
    device_seconds,
)

# Choices; ``benchmarks/latency_accuracy.py`` shows the errors of unseen models and sizes with them.
_SIZES = 10
"""Batch sizes of a model that are fitted to, by ratio and again by difference."""
_LOSS_SCALE = 0.1
"""Relative errors far beyond this count little (arctan loss)."""
_PRIOR = 0.02
"""Weight of a coefficient's distance from its published figure."""
_HOST_KNOTS = (0.0, 1.0, 64.0, 256.0, 512.0)


@dataclass(frozen=True, slots=True)
class HostCoefficients:
    """Host time at a few numbers of sequences, linear in the vocabulary (sampling).

    Attributes:
        single: seconds at the knots on one device.
        parallel: seconds at the knots on several devices.
        per_vocab: seconds per vocabulary entry at the knots.
    """

    single: tuple[float, ...]
    parallel: tuple[float, ...]
    per_vocab: tuple[float, ...]

    def __post_init__(self) -> None:
        """Refuse other numbers of seconds than there are knots.

        Raises:
            InputError: naming the field.
        """
        for name in ("single", "parallel", "per_vocab"):
            if (count := len(getattr(self, name))) != len(_HOST_KNOTS):
                raise InputError(f"host {name}: {count} values for {len(_HOST_KNOTS)} knots")

    def curve(self, architecture: ModelArchitecture, parallel: int) -> Curve:
        """Return the host time of a model by sequences."""
        base = np.array(self.parallel if parallel > 1 else self.single)
        values = base + np.array(self.per_vocab) * architecture.vocab_size
        return Curve(_HOST_KNOTS, tuple(float(max(v, 0.0)) for v in values))


@dataclass(frozen=True, slots=True)
class HostFitted:
    """Iterations of one model at one size with what a device fit needs.

    Attributes:
        rows: the iterations.
        architecture: sizes of the model.
        host: its fitted host time.
    """

    rows: Iterations
    architecture: ModelArchitecture
    host: Curve


@dataclass(frozen=True, slots=True)
class DeviceFit:
    """What was learned of a device.

    Attributes:
        coefficients: of the device time.
        host: of the host time.
        same_experts: in the rows of mixture-of-experts models all tokens took the same experts
            (equal prompts); chosen by which assumption fits better.
    """

    coefficients: DeviceCoefficients
    host: HostCoefficients
    same_experts: bool


def fit_device(
    groups: Sequence[HostFitted], hardware: DeviceHardware, *, same_experts: bool | None = None
) -> DeviceFit:
    """Return the coefficients that fit all groups best.

    Args:
        groups: one per model and size; at least two architectures.
        hardware: data-sheet figures.
        same_experts: whether all tokens took the same experts; found out if None.

    Raises:
        InputError: if there are too few models.
    """
    if len({g.architecture for g in groups}) < 2:
        raise InputError(
            "transfer needs iterations of at least two models of different size, with known "
            "architectures (--architectures)"
        )
    experts = any(g.architecture.num_experts for g in groups)
    open_question = experts and same_experts is None
    assumed = (True, False) if open_question else (bool(same_experts),)
    fits = [_fit_coefficients(groups, hardware, same) for same in assumed]
    _, coefficients, same = min(fits, key=lambda f: f[0])
    return DeviceFit(coefficients, _fit_host(groups), same)


def _fit_coefficients(
    groups: Sequence[HostFitted], hardware: DeviceHardware, same_experts: bool
) -> tuple[float, DeviceCoefficients, bool]:
    """Return the remaining cost, the coefficients, and the assumption about experts."""
    shapes, target = _stack(groups, same_experts)
    first = DeviceCoefficients().logarithms()
    free = _informed(groups)

    def residuals(x: Floats) -> Floats:
        values = first.copy()
        values[free] = x
        predicted = device_seconds(shapes, hardware, DeviceCoefficients.from_logarithms(values))
        error = np.log(predicted / target)
        robust = _LOSS_SCALE * np.arctan(error / _LOSS_SCALE)
        # Coefficients that the rows do not determine stay at the published-figure guess.
        return np.concatenate([robust, _PRIOR * np.sqrt(len(error) / 1000) * (x - first[free])])

    found = first.copy()
    found[free] = levenberg_marquardt(residuals, first[free], rounds=30)
    rest = residuals(found[free])
    return float(rest @ rest), DeviceCoefficients.from_logarithms(found), same_experts


def _informed(groups: Sequence[HostFitted]) -> np.ndarray:
    """Return which coefficients some group depends on."""
    names = [f.name for f in fields(DeviceCoefficients)]
    gated = {g.architecture.mlp == "gated" for g in groups}
    sizes = {g.rows.tensor_parallel_size for g in groups}
    absent: set[str] = set()
    if True not in gated:
        absent |= {n for n in names if n.startswith("gated")}
    if False not in gated:
        absent |= {n for n in names if n.startswith("plain")}
    if not any(g.architecture.num_experts for g in groups):
        absent.add("expert_tile")
    if 2 not in sizes:
        absent.add("allreduce_bandwidth_2")
    if not any(s > 2 for s in sizes):
        absent.add("allreduce_bandwidth_4")
    if max(sizes) == 1:
        absent |= {"allreduce_s", "parallel_launch_s"}
    return np.array([n not in absent for n in names])


def _stack(groups: Sequence[HostFitted], same_experts: bool) -> tuple[Shapes, Floats]:
    """Return a sample of all groups' rows, and their device seconds."""
    shapes, targets = [], []
    for group in groups:
        rows = group.rows
        sizes = np.unique(rows.batch_size)
        picked = sizes[np.unique(np.geomspace(1, len(sizes), _SIZES).astype(int) - 1)]
        spread = sizes[np.unique(np.linspace(0, len(sizes) - 1, _SIZES).astype(int))]
        keep = np.isin(rows.batch_size, np.union1d(picked, spread)) & (rows.host_stalls() == 0)
        if not keep.any():
            continue
        chosen = rows.where(keep)
        shapes.append(
            Shapes.of(
                group.architecture,
                rows.tensor_parallel_size,
                chosen.steps,
                same_experts=same_experts,
            )
        )
        host = group.host.at(chosen.steps.num_seqs)
        targets.append(np.maximum(chosen.seconds - host, 0.05 * chosen.seconds))

    def joined(name: str) -> Floats:
        return np.concatenate([getattr(s, name) for s in shapes], axis=-1)

    steps = StepTable(
        *(np.concatenate([getattr(s.steps, f.name) for s in shapes]) for f in fields(StepTable))
    )
    rest = {f.name: joined(f.name) for f in fields(Shapes) if f.name != "steps"}
    return Shapes(steps=steps, **rest), np.concatenate(targets)


def _fit_host(groups: Sequence[HostFitted]) -> HostCoefficients:
    """Return host time by size and vocabulary, robustly at each knot."""
    parallel = np.array([g.rows.tensor_parallel_size > 1 for g in groups])
    vocab = np.array([g.architecture.vocab_size for g in groups], dtype=np.float64)
    columns = [~parallel, parallel]
    known = [c for c in columns if c.any()]
    varied = len(np.unique(vocab)) > 1
    single, several, per_vocab = [], [], []
    for knot in _HOST_KNOTS:
        values = np.array([float(g.host.at(np.array([knot]))[0]) for g in groups])
        matrix = np.column_stack([c.astype(float) for c in known] + [vocab / 1e5] * varied)
        x = least_absolute(matrix, values, floor=1e-5)
        slope = max(float(x[-1]), 0.0) / 1e5 if varied else 0.0
        rest = values - slope * vocab
        one = float(np.median(rest[~parallel])) if (~parallel).any() else float(np.median(rest))
        more = float(np.median(rest[parallel])) if parallel.any() else one
        single.append(one)
        several.append(more)
        per_vocab.append(slope)
    return HostCoefficients(tuple(single), tuple(several), tuple(per_vocab))


def fit_architectures(
    groups: Sequence[Iterations],
    hosts: Mapping[tuple[str, int], Curve],
    architectures: Mapping[str, ModelArchitecture],
) -> list[HostFitted]:
    """Return the groups whose architecture is known, ready for :func:`fit_device`."""
    return [
        HostFitted(g, architectures[g.model], hosts[g.model, g.tensor_parallel_size])
        for g in groups
        if g.model in architectures
    ]
