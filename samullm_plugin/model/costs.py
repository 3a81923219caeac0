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
    """Seconds to bring a model's engine up, and what that takes of its host.

    Attributes:
        warm_s: new engine, files in the page cache.
        cold_s: new engine, files on disk.
        sleep_s: putting it to sleep: its devices are free, its processes stay; None: it cannot.
        wake_s: waking it, its weights reloaded if they were dropped; None: it cannot sleep.
        asleep_bytes: host memory of a replica that sleeps.
        asleep_device_bytes: memory of each of its devices that it keeps meanwhile.
        prepare_s: part of ``warm_s`` that needs no device, so that it can be done while others
            still compute; reading files from disk can be, too.
        prepared_bytes: host memory of a replica of which that part is done.
        source: where the seconds come from, such as the parts of a measured start.
    """

    warm_s: float
    cold_s: float
    sleep_s: float | None = None
    wake_s: float | None = None
    asleep_bytes: float = 0.0
    asleep_device_bytes: float = 0.0
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

    @property
    def least_start_s(self) -> float:
        """Return the seconds that a start holds devices at least."""
        return self.warm_s - self.prepare_s

    @property
    def can_sleep(self) -> bool:
        """Return whether it is known how long sleeping and waking take."""
        return self.sleep_s is not None and self.wake_s is not None

    @property
    def worth_sleeping(self) -> bool:
        """Return whether sleeping and waking hold devices shorter than another start."""
        if self.sleep_s is None or self.wake_s is None:
            return False
        return self.sleep_s + self.wake_s < self.least_start_s


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
