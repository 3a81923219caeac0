from __future__ import annotations

import pytest

from samullm_plugin.errors import InputError
from samullm_plugin.model.application import EngineOptions, ModelSpec
from samullm_plugin.model.architecture import ModelArchitecture
from samullm_plugin.model.kv_cache import pool_block_bytes
from samullm_plugin.profiling.loading import PROCESS_BYTES, LoadModel, fit_loading, resident
from samullm_plugin.profiling.memory import (
    BatchLimits,
    MemoryModel,
    RecordedStart,
    fit_memory,
    kv_cache_blocks,
    replica_groups,
)
from samullm_plugin.profiling.profile_files import Profile

SMALL = ModelArchitecture(32, 4096, 32, 8, 128, 14336, 32000)
LARGE = ModelArchitecture(40, 5120, 40, 40, 128, 13824, 120000)
TRUE = MemoryModel(5e8, 1e9, 2.5e9, 33.0, 5.0, 7.0)


def test_formula_and_block_sizes() -> None:
    # 16 tokens, keys and values, 32 layers, 8 heads of 128, 2 bytes.
    sizes = {
        tp: pool_block_bytes(replica_groups(SMALL, EngineOptions(), tp)) for tp in (1, 4, 8, 16)
    }
    assert sizes[1] == 16 * 2 * 32 * 8 * 128 * 2
    assert sizes[4] == sizes[1] / 4
    assert sizes[16] == sizes[8]
    assert kv_cache_blocks(84986691584, 0.9, 27584561152, 13107200) == 3731
    assert kv_cache_blocks(1e9, 0.9, 2e9, 1000) == 0


def test_memory_model_is_recovered_and_predicts_other_limits() -> None:
    starts = [
        RecordedStart(a, size, TRUE.peak_bytes(a, size, limits), 0.0, limits)
        for a in (SMALL, LARGE)
        for size in (1, 2, 4)
        for limits in (BatchLimits(2048, 512), BatchLimits(8192, 512), BatchLimits(4096, 128))
    ]
    found = fit_memory(starts)
    for size in (1, 2, 4, 8):
        limits = BatchLimits(16384, 256)
        wanted = TRUE.peak_bytes(LARGE, size, limits)
        assert found.peak_bytes(LARGE, size, limits) == pytest.approx(wanted, rel=0.01)
    one_size = fit_memory([s for s in starts if s.tensor_parallel_size == 1])
    assert one_size.two_bytes == one_size.more_bytes == one_size.one_bytes
    with pytest.raises(InputError, match="no recorded"):
        fit_memory([])


def test_older_profiles_are_read() -> None:
    """They have rates of another sleep, which says nothing of this one."""
    old = {"start_s": 9, "parallel_start_s": 9, "read_bytes_per_s": 1e9, "sleep2_s": 0.5}
    given = {"format": "samullm-profile-1", "device": "d", "source": "s", "models": []}
    profile = Profile.model_validate(
        {**given, "loading": {**old, "sleep_bytes_per_s": 1e9, "wake_bytes_per_s": 1e9}}
    )
    assert profile.load_model() == LoadModel(9, 9, 1e9, sleep2_s=0.5)


def test_an_engine_on_cores_sleeps_as_it_is() -> None:
    """Its host has the memory of process, weights and cache meanwhile."""
    load = LoadModel(10, 20, 2e9).times(1.6e10, 2)
    found = resident(load, ModelSpec("m", 64, LARGE), 1000)
    held = PROCESS_BYTES + LARGE.weight_bytes + 1000 * LARGE.kv_bytes_per_token
    assert (found.sleep_s, found.wake_s, found.asleep_device_bytes) == (0, 0, 0)
    assert found.asleep_bytes == held
    assert not resident(load, ModelSpec("m", 64), 1000).can_sleep


def test_loading_keeps_measured_starts_and_orders_the_rest() -> None:
    model = fit_loading([1e10, 2e10, 4e10, 1e10, 4e10], [1, 1, 1, 2, 2], [15, 20, 30, 30, 45])
    assert model.times(3e10, 1).warm_s == pytest.approx(25, rel=0.01)
    assert model.times(3e10, 2).warm_s == pytest.approx(40, rel=0.01)
    assert model.times(3e10, 1, warm_s=7.0).warm_s == 7.0
    times = LoadModel(10, 20, 2e9).times(1.6e10, 2)
    assert times.sleep_s is not None
    assert times.wake_s is not None
    assert times.sleep_s < times.wake_s < times.warm_s < times.cold_s
    assert times.worth_sleeping
    assert times.asleep_bytes == PROCESS_BYTES
    with pytest.raises(InputError, match="three"):
        fit_loading([1e9], [1], [5])
