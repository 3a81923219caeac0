"""Fit profiles from tables of measured iterations, and check profiles against them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from samullm_plugin.checkpoints.models import find_name
from samullm_plugin.errors import InputError
from samullm_plugin.model.architecture import ModelArchitecture
from samullm_plugin.profiling.book import architecture_of, latency_book, transfer_errors
from samullm_plugin.profiling.device_fit import fit_architectures, fit_device
from samullm_plugin.profiling.fitting import AttentionPrior, StepFit, fit_iterations
from samullm_plugin.profiling.iterations import Iterations
from samullm_plugin.profiling.loading import fit_loading
from samullm_plugin.profiling.memory import RecordedStart, fit_memory
from samullm_plugin.profiling.profile_files import (
    EngineStart,
    FittedModel,
    LatencyData,
    Profile,
    TransferData,
    architecture_data,
)
from samullm_plugin.profiling.roofline import HARDWARE, DeviceHardware
from samullm_plugin.profiling.transfer import FittedLatency

_LONGEST_WORK = 160.0
_LONGEST_BLOCKS = 512


def attention_prior(
    architecture: ModelArchitecture, parallel: int, hardware: DeviceHardware
) -> AttentionPrior:
    """Return what to assume about attention where rows do not tell.

    On the A100 one sequence and head occupies one multiprocessor until 512 of them are busy: the
    ratio falls with the heads of a device, and below that number long sequences are split. Context
    is read once, at the bandwidth of the data sheet at best.
    """
    heads = max(architecture.num_heads / parallel, 1.0)
    context_token_s = architecture.kv_bytes_per_token / parallel / hardware.bandwidth
    return AttentionPrior(_LONGEST_WORK / heads, int(_LONGEST_BLOCKS / heads), context_token_s)


def fit_group(rows: Iterations, architecture: ModelArchitecture | None) -> StepFit:
    """Return the fit of one model at one size."""
    prior = None
    if architecture is not None and "A100" in rows.device.upper():
        hardware = HARDWARE.get(rows.device, HARDWARE["A100-80GB"])
        prior = attention_prior(architecture, rows.tensor_parallel_size, hardware)
    return fit_iterations(rows, prior)


def hardware_of(device: str) -> DeviceHardware:
    """Return the data-sheet figures of a device.

    Raises:
        InputError: if they are not known.
    """
    if device not in HARDWARE:
        raise InputError(
            f"device {device!r}: no data-sheet figures for transfer; known are "
            f"{', '.join(HARDWARE)}. Fit without --transfer, or name the device in the table"
        )
    return HARDWARE[device]


def fit_profile(
    groups: Sequence[Iterations],
    architectures: Mapping[str, ModelArchitecture],
    *,
    source: str,
    transfer: bool = False,
    starts: Sequence[EngineStart] = (),
) -> Profile:
    """Return the profile of measured iterations.

    Args:
        groups: iterations of one device, one entry per model and size.
        architectures: sizes of models that are not bundled.
        source: where the measurements come from.
        transfer: also learn device coefficients for models that were not measured.
        starts: recorded engine starts.

    Raises:
        InputError: if the iterations cannot be fitted, or come from several devices.
    """
    devices = sorted({g.device for g in groups})
    if len(devices) != 1:
        raise InputError(
            f"the iterations come from several devices ({', '.join(devices)}); fit one at a time"
        )
    known: dict[str, ModelArchitecture] = {}
    for name in (*(g.model for g in groups), *(s.model for s in starts)):
        found = architecture_of(name, architectures)
        if found is not None:
            known[name] = found
    fits = {(g.model, g.tensor_parallel_size): fit_group(g, known.get(g.model)) for g in groups}
    learned = _learn(groups, fits, known, devices[0]) if transfer else None
    recorded = [r for s in starts if (r := _recorded(s, known)) is not None]
    loads = [(s, known[s.model]) for s in starts if s.warm_s is not None and s.model in known]
    loading = None
    if len(loads) >= 3:
        loading = fit_loading(
            [a.weight_bytes for _, a in loads],
            [s.tensor_parallel_size for s, _ in loads],
            [s.warm_s for s, _ in loads if s.warm_s is not None],
        )
    return Profile(
        device=devices[0] or "unknown",
        source=source,
        models=tuple(
            FittedModel(
                model=model,
                tensor_parallel_size=size,
                latency=LatencyData.of(fit.latency),
                num_rows=fit.num_rows,
                mape_pct=round(fit.mape_pct, 2),
                interruption_pct=round(fit.interruption_pct, 2),
                undetermined=fit.undetermined,
            )
            for (model, size), fit in fits.items()
        ),
        starts=tuple(starts),
        architectures={n: architecture_data(a) for n, a in known.items()},
        transfer=learned,
        memory=asdict(fit_memory(recorded)) if recorded else None,
        loading=None if loading is None else asdict(loading),
    )


def _learn(
    groups: Sequence[Iterations],
    fits: Mapping[tuple[str, int], StepFit],
    known: Mapping[str, ModelArchitecture],
    device: str,
) -> TransferData:
    """Return the device coefficients with the errors of transfer."""
    hardware = hardware_of(device)
    hosts = {key: fit.latency.host_by_seqs for key, fit in fits.items()}
    measured = fit_architectures(groups, hosts, known)
    if not measured:
        raise InputError(
            "--transfer: no architecture of the measured models is known; give --architectures"
        )
    learned = fit_device(measured, hardware)
    errors = transfer_errors(
        measured, _known(fits, known), hardware, same_experts=learned.same_experts
    )
    return TransferData.of(learned, hardware, errors)


def _known(
    fits: Mapping[tuple[str, int], StepFit], known: Mapping[str, ModelArchitecture]
) -> list[FittedLatency]:
    return [
        FittedLatency(model, known[model], size, fit.latency, fit.mape_pct)
        for (model, size), fit in fits.items()
        if model in known
    ]


def _recorded(start: EngineStart, known: Mapping[str, ModelArchitecture]) -> RecordedStart | None:
    """Return a start as the memory fit takes it, or None if it says nothing about memory."""
    if start.model not in known or start.limits is None or start.peak_bytes is None:
        return None
    return RecordedStart(
        known[start.model],
        start.tensor_parallel_size,
        start.peak_bytes,
        start.block_bytes or 0.0,
        start.limits,
    )


def check_profile(
    profile: Profile,
    groups: Sequence[Iterations],
    architectures: Mapping[str, ModelArchitecture],
) -> dict[str, Any]:
    """Return the errors of a profile's predictions of measured iterations.

    Percentages are of the measured iteration less its host stall (rows whose host time is more
    than twice the usual one of such batches); ``mape_with_stalls_pct`` takes rows as they are.

    Returns:
        ``{"overall": {...}, "groups": [{"model", "tp", "phase", "shape", "basis", ...}]}``;
        ``bias_pct`` is the error of the summed time.
    """
    book = latency_book(profile, architectures)
    every: list[np.ndarray] = []
    raw: list[np.ndarray] = []
    stalled = 0
    rows_out: list[dict[str, Any]] = []
    for rows in groups:
        name = find_name(rows.model, [m.model for m in profile.models]) or rows.model
        size = rows.tensor_parallel_size
        architecture = profile.architecture(name) or architecture_of(rows.model, architectures)
        latency, provenance = book.predict(name, architecture, size)
        predicted = latency.step_seconds(rows.steps)
        stalls = rows.host_stalls()
        error = 100 * np.abs(predicted / (rows.seconds - stalls) - 1)
        plain = 100 * np.abs(predicted / rows.seconds - 1)
        every.append(error)
        raw.append(plain)
        stalled += int(np.count_nonzero(stalls))
        for phase in ("decode", "prefill", "mixed"):
            for shape in np.unique(rows.shape):
                keep = (rows.phase == phase) & (rows.shape == shape)
                if keep.any():
                    entry = {"model": rows.model, "tp": size, "phase": phase, "shape": str(shape)}
                    entry |= _summary(error[keep], plain[keep], int(np.count_nonzero(stalls[keep])))
                    measured = (rows.seconds - stalls)[keep].sum()
                    held = profile.fitted(name, size)
                    longer = 1 + (0.0 if held is None else held.interruption_pct) / 100
                    bias = 100 * (longer * predicted[keep].sum() / measured - 1)
                    entry["bias_pct"] = round(float(bias), 3)
                    entry["basis"] = provenance.kind
                    entry["source"] = provenance.source
                    rows_out.append(entry)
    overall = _summary(np.concatenate(every), np.concatenate(raw), stalled)
    return {"overall": overall, "groups": rows_out}


def _summary(error: np.ndarray, plain: np.ndarray, stalled: int) -> dict[str, Any]:
    """Return the figures of one set of rows."""
    return {
        "mape_pct": round(float(error.mean()), 3),
        "median_ape_pct": round(float(np.median(error)), 3),
        "p95_ape_pct": round(float(np.percentile(error, 95)), 3),
        "n": len(error),
        "mape_with_stalls_pct": round(float(plain.mean()), 3),
        "stalled_rows": stalled,
    }
