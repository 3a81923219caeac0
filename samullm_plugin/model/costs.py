"""What it costs to run a model on a kind of device, and where that figure comes from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from samullm_plugin.errors import InputError
from samullm_plugin.model.kv_cache import KvCacheGroup
from samullm_plugin.model.latency import StepModel

ProvenanceKind = Literal["measured", "transferred", "operator-table", "layer-profile", "assumed"]


@dataclass(frozen=True, slots=True)
class Provenance:
    """Where a prediction comes from.

    Attributes:
        kind: measured on this model and device, transferred from others, and so on.
        source: where the figures come from.
        error_pct: known mean absolute percentage error of an iteration, or None if unknown.
    """

    kind: ProvenanceKind
    source: str
    error_pct: float | None = None


@dataclass(frozen=True, slots=True)
class LoadTimes:
    """Seconds to bring a model's engine up, by where its weights are.

    Attributes:
        warm_s: new engine, files in the page cache.
        cold_s: new engine, files on disk.
        sleep1_s: putting it to sleep with its weights in host memory (vLLM sleep level 1).
        wake1_s: waking it from there.
        sleep2_s: putting it to sleep without weights (level 2).
        wake2_s: waking it from there, weights reloaded.
        prepare_s: part of ``warm_s`` that needs no device, so that it can be done while others
            still compute; reading files from disk can be, too.
        prepared_bytes: host memory of a replica of which that part is done.
        source: where the seconds come from, such as the parts of a measured start.
    """

    warm_s: float
    cold_s: float
    sleep1_s: float | None = None
    wake1_s: float | None = None
    sleep2_s: float | None = None
    wake2_s: float | None = None
    prepare_s: float = 0.0
    prepared_bytes: float = 0.0
    source: str = ""

    def __post_init__(self) -> None:
        """Refuse a part that is longer than the whole.

        Raises:
            InputError: naming both.
        """
        if not 0.0 <= self.prepare_s <= self.warm_s:
            raise InputError(
                f"load times: prepare_s is {self.prepare_s} s, a part of warm_s {self.warm_s} s"
            )


@dataclass(frozen=True, slots=True)
class ModeCosts:
    """Costs of one replica of a model at one tensor- and pipeline-parallel size.

    Attributes:
        latency: seconds of an iteration; with pipeline parallelism, of one of its stages.
        kv_cache_tokens: KV-cache capacity of a replica: blocks of its pool times the tokens of a
            block; 0 if the weights, or one longest sequence, do not fit.
        load: engine start.
        provenance: where the iteration latency comes from.
        kv_cache_groups: which layers share block tables; empty: all of them, with full attention.
    """

    latency: StepModel
    kv_cache_tokens: int
    load: LoadTimes
    provenance: Provenance
    kv_cache_groups: tuple[KvCacheGroup, ...] = ()
