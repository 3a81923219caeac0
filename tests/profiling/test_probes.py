"""Workloads that profile an engine."""

from __future__ import annotations

import numpy as np
import pytest

from samullm_plugin.profiling.probes import Limits, ProbeWorkload, probes, unseen, warm_up

LIMITS = [
    Limits(64, 2048, 4096, 65_536),
    Limits(1, 64, 128, 256),
    Limits(256, 8192, 2048, 4096),
    Limits(8, 16, 512, 1024),
    Limits(1024, 16384, 32_768, 400_000),
    Limits(4, 64, 64, 128),
]


def decoded(workload: ProbeWorkload) -> set[int]:
    """Return the batch sizes that are decoded if all requests run at once."""
    outputs = np.array(workload.output_tokens)
    return {int((outputs > t).sum()) for t in range(1, outputs.max())}


@pytest.mark.parametrize("limits", LIMITS)
def test_every_workload_fits_the_engine(limits: Limits) -> None:
    workloads = [w for variant in range(5) for w in probes(limits, variant)]
    workloads += [warm_up(limits), *unseen(limits, np.random.default_rng(0)).values()]
    for workload in workloads:
        assert len(workload.prompt_tokens) == len(workload.output_tokens) > 0
        assert min(workload.prompt_tokens) >= 1
        assert min(workload.output_tokens) >= 1
        for prompt, output in zip(workload.prompt_tokens, workload.output_tokens, strict=True):
            assert prompt + output <= limits.max_model_len
            assert prompt + output <= limits.kv_cache_tokens


@pytest.mark.parametrize("limits", LIMITS[:3])
def test_ladders_decode_small_and_large_batches_for_a_while(limits: Limits) -> None:
    ladder = probes(limits)[0]
    sizes = decoded(ladder)
    most = limits.most(300)
    assert max(sizes) >= min(most, limits.max_num_seqs) // 2
    assert {1, 2, 4} & set(range(1, most + 1)) <= sizes
    outputs = np.array(ladder.output_tokens)
    lasts = np.diff(np.unique(outputs))
    assert (lasts >= 8).all()


def test_warm_up_meets_a_full_batch_and_every_size() -> None:
    workload = warm_up(LIMITS[0])
    assert sum(workload.prompt_tokens) > 2048
    assert set(range(1, 64)) <= decoded(workload)


def test_variants_prefill_other_numbers_of_tokens() -> None:
    alone = [
        {w.prompt_tokens[0] for w in probes(LIMITS[0], v) if len(w.prompt_tokens) == 1}
        for v in range(3)
    ]
    assert not alone[0] & alone[1]
    assert not alone[1] & alone[2]


def test_unseen_workloads_are_not_probes() -> None:
    found = unseen(LIMITS[0], np.random.default_rng(1))
    assert len(found) == 4
    assert not set(found.values()) & set(probes(LIMITS[0]))
    mixed = found["mixed"]
    assert len(mixed.prompt_tokens) > LIMITS[0].max_num_seqs
    assert mixed.longer(1).prompt_tokens[5] == mixed.prompt_tokens[5] + 1
