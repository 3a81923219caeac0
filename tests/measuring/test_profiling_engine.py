"""What ``profile latency`` asks of engines before it has any."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest

from samullm_plugin import EngineOptions, Gpu, InputError, ModelArchitecture, ModelSpec
from samullm_plugin.cli.profile_latency import _sizes
from samullm_plugin.measuring.engine import capacities


def test_sizes_are_checked() -> None:
    assert _sizes("1,2") == [1, 2]
    for wrong in ("", "0", "1,1", "two"):
        with pytest.raises(InputError, match="--tp"):
            _sizes(wrong)


def test_a_gpu_is_filled_and_a_cpu_is_not() -> None:
    """Plans take the capacity that engines were measured with: on a GPU all that fits."""
    llama = ModelArchitecture(
        hidden_size=4096,
        num_layers=32,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        intermediate_size=14336,
        vocab_size=128256,
    )
    engine = EngineOptions(max_num_seqs=256, max_num_batched_tokens=8192)
    model = ModelSpec("llama-8b", 4096, llama, engine=engine)
    gpu = Gpu("H100-80GB", 80 << 30)

    def found(
        devices_are: str, gpu: Gpu | None, *sizes: int, model: ModelSpec = model
    ) -> list[int]:
        asked = SimpleNamespace(devices_are=devices_are)
        return capacities(asked, model, gpu, sizes, 16)  # type: ignore[arg-type]  # all it asks

    one, two = found("gpu", gpu, 1, 2)
    assert 400_000 < one < 500_000  # (72 GiB - 15 GiB of weights - overhead) / 128 KiB a token
    assert two > 2 * one
    assert found("gpu", Gpu("H100-80GB", 20 << 30), 1)[0] < 0.1 * one
    assert found("cpu", gpu, 1, 2) == found("gpu", None, 1, 2) == [16 * 4096] * 2
    with pytest.raises(InputError, match=r"llama-8b.*size 1 .*L4 \(16 GiB\).*--kv-cache-tokens"):
        found("gpu", Gpu("L4", 16 << 30), 1, 2)
    assert found("gpu", gpu, 1, model=replace(model, architecture=None)) == [16 * 4096]
