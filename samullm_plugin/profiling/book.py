"""Latency of any model on one device: measured where it was, else transferred."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from samullm_plugin.checkpoints.models import bundled_architecture, find_name
from samullm_plugin.errors import InputError
from samullm_plugin.model.architecture import ModelArchitecture
from samullm_plugin.model.costs import Provenance
from samullm_plugin.model.latency import Curve, StepLatency
from samullm_plugin.profiling.device_fit import HostFitted, fit_device
from samullm_plugin.profiling.iterations import Iterations
from samullm_plugin.profiling.profile_files import Profile
from samullm_plugin.profiling.roofline import DeviceHardware
from samullm_plugin.profiling.transfer import (
    FittedLatency,
    LatencyTransfer,
    TransferErrors,
    kind_key,
    layer_key,
)


@dataclass(frozen=True, slots=True)
class LatencyBook:
    """What is known of one device.

    Attributes:
        device: its name.
        source: where the measurements come from.
        measured: fitted latency and its error in percent, by model and size.
        transfer: how to predict the rest, if that was learned.
    """

    device: str
    source: str
    measured: Mapping[tuple[str, int], tuple[StepLatency, float]]
    transfer: LatencyTransfer | None

    def predict(
        self,
        model: str,
        architecture: ModelArchitecture | None,
        parallel: int,
        *,
        spread: bool = False,
        use_measured: bool = True,
    ) -> tuple[StepLatency, Provenance]:
        """Return the latency of a model at a size, and where it comes from.

        Args:
            model: name.
            architecture: its sizes; needed unless it was measured.
            parallel: tensor-parallel size.
            spread: tokens of a mixture of experts take different experts, as they do in use,
                even if the profile's equal prompts sent all of them to the same few.
            use_measured: start from measurements of this model and its twins, if there are any.

        Raises:
            InputError: if the model was not measured and cannot be transferred to.
        """
        found = self.measured.get((model, parallel)) if use_measured else None
        if found is not None:
            latency, error = found
            provenance = Provenance("measured", f"{self.device}: {self.source}", error)
        else:
            latency, provenance = self._transferred(model, architecture, parallel, use_measured)
        if spread and architecture is not None and self.transfer is not None:
            extended = spread_experts(latency, self.transfer, architecture, parallel)
            if extended is not latency:
                note = "; experts' weight reads added, since its prompts were equal"
                provenance = replace(provenance, source=provenance.source + note, error_pct=None)
            latency = extended
        return latency, provenance

    def _transferred(
        self, model: str, architecture: ModelArchitecture | None, parallel: int, twins: bool
    ) -> tuple[StepLatency, Provenance]:
        """Return the transferred latency.

        Raises:
            InputError: naming what is missing.
        """
        who = f"{model} at tensor-parallel size {parallel} was not measured on {self.device}"
        if self.transfer is None:
            raise InputError(
                f"{who}, and the profile holds no device coefficients; measure it, or make the "
                "profile with --transfer from at least two models"
            )
        if architecture is None:
            raise InputError(
                f"{who}; to predict it its architecture is needed (--architectures, or the path "
                "of its config.json)"
            )
        basis = self.transfer if twins else replace(self.transfer, known=())
        result = basis.predict(architecture, parallel)
        error = result.error_pct
        if not twins:
            kinds = {kind_key(k.architecture) for k in self.transfer.known}
            errors = self.transfer.errors
            known = kind_key(architecture) in kinds
            error = errors.sibling if known else errors.stranger
        source = f"{self.device}: {result.basis}; {self.source}"
        return result.latency, Provenance("transferred", source, error)


def spread_experts(
    latency: StepLatency, transfer: LatencyTransfer, architecture: ModelArchitecture, parallel: int
) -> StepLatency:
    """Return a mixture-of-experts latency for tokens that take different experts.

    Profiles made with equal prompts send every token to the same few experts, so that the weights
    of the others are never read. What the device's roofline says this saved is added.
    """
    if not architecture.num_experts or not transfer.device.same_experts:
        return latency
    same = transfer.roofline(architecture, parallel, same_experts=True).by_tokens
    spread = transfer.roofline(architecture, parallel, same_experts=False).by_tokens
    own = latency.by_tokens.at(np.array(same.knots))
    more = np.maximum(np.array(spread.values) - np.array(same.values), 0.0)
    # Reading takes at least as long as launching: the floor is met by the larger of both anyway.
    return replace(latency, by_tokens=Curve(same.knots, tuple(map(float, own + more))))


def row_errors(rows: Iterations, latency: StepLatency) -> np.ndarray:
    """Return the absolute percentage error of each row, host stalls taken out of the measured."""
    measured = rows.seconds - rows.host_stalls()
    return np.asarray(100 * np.abs(latency.step_seconds(rows.steps) / measured - 1))


def transfer_errors(
    groups: Sequence[HostFitted],
    known: Sequence[FittedLatency],
    hardware: DeviceHardware,
    *,
    same_experts: bool,
) -> TransferErrors:
    """Return what transfer errs by, each group predicted from the others.

    Per group the mean absolute percentage error of its rows; of these the median over groups.
    """
    found: dict[str, list[float]] = {
        n: [] for n in ("same_layers", "other_size", "sibling", "stranger")
    }
    for layers in sorted({layer_key(g.architecture) for g in groups}, key=str):
        inside = [g for g in groups if layer_key(g.architecture) == layers]
        outside = [g for g in groups if layer_key(g.architecture) != layers]
        if len({g.architecture for g in outside}) < 2:
            continue
        others = [k for k in known if layer_key(k.architecture) != layers]
        learned = fit_device(outside, hardware, same_experts=same_experts)
        alone = LatencyTransfer(learned, hardware, others)
        kinds = {kind_key(k.architecture) for k in others}
        for group in inside:
            size, a = group.rows.tensor_parallel_size, group.architecture
            twins = [k for k in known if layer_key(k.architecture) == layers]
            here = [k for k in twins if k.tensor_parallel_size == size]
            here = [k for k in here if k.model != group.rows.model]
            away = [k for k in twins if k.tensor_parallel_size != size]
            case = "sibling" if kind_key(a) in kinds else "stranger"
            cases = [(case, others), ("same_layers", here), ("other_size", away)]
            for name, start in cases:
                if start or name == case:
                    latency = replace(alone, known=start).predict(a, size).latency
                    found[name].append(float(row_errors(group.rows, latency).mean()))
    medians = {n: round(float(np.median(v)), 1) if v else None for n, v in found.items()}
    return TransferErrors(**medians)


def architecture_of(model: str, given: Mapping[str, ModelArchitecture]) -> ModelArchitecture | None:
    """Return the sizes of a model, given or bundled, or None."""
    name = find_name(model, given)
    if name is not None:
        return given[name]
    bundled = bundled_architecture(model)
    return None if bundled is None else bundled[0]


def latency_book(
    profile: Profile, architectures: Mapping[str, ModelArchitecture] | None = None
) -> LatencyBook:
    """Return what a profile knows about latency, ready to predict."""
    measured = {
        (m.model, m.tensor_parallel_size): (m.latency.latency(), m.mape_pct) for m in profile.models
    }
    transfer = None
    if profile.transfer is not None:
        data = profile.transfer
        entries = []
        for (model, size), (latency, error) in measured.items():
            architecture = profile.architecture(model) or architecture_of(
                model, architectures or {}
            )
            if architecture is not None:
                entries.append(FittedLatency(model, architecture, size, latency, error))
        transfer = LatencyTransfer(
            data.device(), data.device_hardware(), tuple(entries), data.errors()
        )
    return LatencyBook(profile.device, profile.source, measured, transfer)
