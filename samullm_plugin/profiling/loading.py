"""Seconds of engine starts, sleeps and wake-ups."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from pydantic import BaseModel, Field

from samullm_plugin.errors import InputError
from samullm_plugin.model.application import ModelSpec
from samullm_plugin.model.costs import LoadTimes
from samullm_plugin.profiling.regression import least_absolute

PROCESS_BYTES = 1e9
"""Host memory of an engine process before it has weights, about as measured with vLLM 0.32."""

ASLEEP_BYTES, ASLEEP_SHARE = 1e9, 0.065
"""Memory that an engine keeps of each device while it sleeps: so much (CUDA's context, graphs), and
so much of its weights there. By two published figures: 0.8 GB of Llama-3.2-1B (NeMo-RL issue 223),
6.2 GB beside 81 GB of weights (a log of vLLM 0.11's worker, imokuri.com, July 2025)."""

ASSUMED = "assumed, of the size that start-up logs of vLLM show"
"""Where starts come from of which none was measured on the kind of device."""

SCALED = "assumed, times what other starts on this machine took of it"
"""Where starts come from of which none was measured in this size, but others on the device."""

MOST_PREPARED = 0.6
"""Share of a start that is taken to need no device at most, where it was not measured."""


@dataclass(frozen=True, slots=True)
class LoadModel:
    """Engine starts from bytes.

    Attributes:
        start_s: start-up on one device without weights.
        parallel_start_s: the same on several (process group, workers).
        read_bytes_per_s: from the page cache to the device.
        disk_bytes_per_s: from disk.
        sleep2_s: putting an engine to sleep, its weights dropped (vLLM's sleep level 2).
        reload_bytes_per_s: weights from the page cache into an engine that wakes.
        process_s: part of a start that needs no device (process, imports, configuration), of which
            at most :data:`MOST_PREPARED` of the whole is taken.

    The defaults of sleeping and waking are published figures of one model (vLLM pull request
    48337, Qwen3-8B: sleep level 2 0.31 s and wake 6.53 s), by its 16.4 GB. Level 1, which keeps
    weights in the host's memory, took longer in all (10.57 s and 2.19 s) and has no figures here.
    That of the disk is about the median of the first implementation's cold starts
    (puddingfjz/vllm @ de1677dc). That of the process is **assumed**: reports of whole starts on
    CUDA tell of about 25 s (vLLM issue 20264: answers after 59 s, of which the engine's own
    initialisation with compiling and capturing takes 34 s) and 16 s (issue 44881, until the
    configuration stands) before a device has anything to do; importing vLLM 0.32 takes 6 to 9 s on
    two cores of an AMD EPYC.
    """

    start_s: float
    parallel_start_s: float
    read_bytes_per_s: float
    disk_bytes_per_s: float = 8e7
    sleep2_s: float = 0.31
    reload_bytes_per_s: float = 2.5e9
    process_s: float = 5.0

    def times(
        self,
        weight_bytes: float,
        parallel: int,
        *,
        warm_s: float | None = None,
        prepare_s: float | None = None,
        source: str = "",
    ) -> LoadTimes:
        """Return the seconds for a model.

        Args:
            weight_bytes: bytes of all weights.
            parallel: devices of a replica; they load, sleep and wake at the same time.
            warm_s: measured start with the files in the page cache, if known.
            prepare_s: measured part of it that needs no device, if known.
            source: where these figures come from.
        """
        start = self.start_s if parallel == 1 else self.parallel_start_s
        warm = start + weight_bytes / self.read_bytes_per_s if warm_s is None else warm_s
        return LoadTimes(
            warm_s=warm,
            cold_s=warm + weight_bytes / self.disk_bytes_per_s,
            sleep_s=self.sleep2_s,
            wake_s=0.1 + weight_bytes / self.reload_bytes_per_s,
            asleep_bytes=PROCESS_BYTES,
            asleep_device_bytes=ASLEEP_BYTES + ASLEEP_SHARE * weight_bytes / parallel,
            prepare_s=(
                min(self.process_s, MOST_PREPARED * warm)
                if prepare_s is None
                else min(prepare_s, warm)
            ),
            prepared_bytes=weight_bytes + PROCESS_BYTES,
            source=source,
        )


def resident(load: LoadTimes, model: ModelSpec, kv_cache_tokens: int) -> LoadTimes:
    """Return the load times of an engine on CPU cores, which sleeps by being left as it is.

    Nothing is freed, so all of its memory is its host's: process, weights and KV cache.

    Args:
        load: of an engine.
        model: of an architecture that is not known no engine sleeps.
        kv_cache_tokens: its capacity.
    """
    if (a := model.architecture) is None:
        return replace(load, sleep_s=None, wake_s=None)
    held = PROCESS_BYTES + a.weight_bytes + kv_cache_tokens * a.kv_bytes_per_token
    return replace(load, sleep_s=0.0, wake_s=0.0, asleep_bytes=held, asleep_device_bytes=0.0)


class AssumedStarts(BaseModel):
    """Options of latency models that know iterations only: engine starts by rates."""

    start_s: float = Field(
        default=45.0,
        gt=0,
        description="Seconds of an engine start without reading weights (assumed, not measured).",
    )
    read_bytes_per_s: float = Field(
        default=2.5e9,
        gt=0,
        description="Weights read from the page cache per second (assumed, not measured).",
    )
    disk_bytes_per_s: float = Field(
        default=1e9, gt=0, description="Weights read from disk per second (assumed, not measured)."
    )

    def load_times(self, weight_bytes: float, devices: int) -> LoadTimes:
        """Return the seconds of a model's starts.

        Args:
            weight_bytes: bytes of all weights.
            devices: of a replica.
        """
        model = LoadModel(self.start_s, self.start_s, self.read_bytes_per_s, self.disk_bytes_per_s)
        by = "assumed, by the options start_s and read_bytes_per_s of the latency model"
        return model.times(weight_bytes, devices, source=by)


def fit_loading(
    weight_bytes: Sequence[float], parallel: Sequence[int], warm_s: Sequence[float]
) -> LoadModel:
    """Return the model of measured warm starts, robustly (file formats differ).

    Raises:
        InputError: if fewer than three starts are given.
    """
    if len(warm_s) < 3:
        raise InputError("loading: fewer than three measured engine starts")
    several = np.array(parallel) > 1
    matrix = np.column_stack([~several, several, np.array(weight_bytes) / 1e9]).astype(float)
    keep = matrix.any(axis=0)
    x = np.zeros(3)
    x[keep] = least_absolute(matrix[:, keep], np.array(warm_s, dtype=float), floor=0.5)
    rate = 1e9 / x[2] if x[2] > 1e-3 else 1e12
    return LoadModel(float(max(x[0], 0.0)), float(max(x[1], x[0], 0.0)), float(rate))
