"""What an engine costs on a GPU that it shares with others."""

from __future__ import annotations

from dataclasses import replace

from samullm_plugin.model.cluster import Gpu
from samullm_plugin.model.costs import LoadTimes, ModeCosts
from samullm_plugin.model.latency import rescaled


def beside_others(costs: ModeCosts, gpu: Gpu) -> ModeCosts:
    """Return the costs of a replica on parts of GPUs; on whole ones they stay as they are.

    Every iteration takes longer by the GPU's slowdown, also while the other parts are idle. A start
    does on a CPU core, which it keeps busy; on GPUs it is mostly the host's work.

    Args:
        costs: alone on its part, with that part's memory.
        gpu: the part.
    """
    if gpu.engines == 1:
        return costs
    factor, found = gpu.slowdown, costs.provenance
    source = f"{found.source}; times {factor:g}, as {gpu.engines} engines share the device"
    return replace(
        costs,
        latency=rescaled(costs.latency, factor),
        load=_slower(costs.load, factor) if gpu.is_core else costs.load,
        provenance=replace(found, source=source, error_pct=None),
    )


def _slower(load: LoadTimes, factor: float) -> LoadTimes:
    """Return load times of which all but reading from disk takes longer."""
    warm_s = load.warm_s * factor
    return replace(
        load,
        warm_s=warm_s,
        cold_s=warm_s + load.cold_s - load.warm_s,
        prepare_s=load.prepare_s * factor,
    )
