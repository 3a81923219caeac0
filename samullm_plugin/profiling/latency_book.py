"""What a profile knows about latency, ready to predict."""

from __future__ import annotations

from collections.abc import Mapping

from samullm_plugin.checkpoints.models import bundled_architecture, find_name
from samullm_plugin.model.architecture import ModelArchitecture
from samullm_plugin.profiling.book import LatencyBook
from samullm_plugin.profiling.profile_files import Profile
from samullm_plugin.profiling.transfer import FittedLatency, LatencyTransfer


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
