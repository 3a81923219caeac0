"""Dataclasses as JSON and back."""

from __future__ import annotations

import pytest

from samullm_plugin.errors import InputError
from samullm_plugin.model.architecture import ModelArchitecture
from samullm_plugin.model.kv_cache import KvCacheLayers
from samullm_plugin.records import read_record, to_record

SIZES = {
    "num_layers": 2, "hidden_size": 64, "num_heads": 4, "num_kv_heads": 2, "head_dim": 16,
    "intermediate_size": 128, "vocab_size": 100,
    "kv_cache": [{"kind": "mamba", "num_layers": 2, "state_bytes": 8.0}],
}  # fmt: skip


def test_round_trip() -> None:
    found = read_record(ModelArchitecture, SIZES, "a.json")
    assert found.kv_cache == (KvCacheLayers("mamba", 2, state_bytes=8.0),)
    assert read_record(ModelArchitecture, to_record(found), "a.json") == found


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heads": 4}, "a.json: heads: unknown field"),
        (
            {"kv_cache": [{"kind": "mamba", "num_layers": 2, "state_bytes": 8.0, "q": 1}]},
            "a.json: kv_cache.0.q: unknown field",
        ),
        ({"head_dim": "16"}, "a.json: head_dim: Input should be a valid integer, not '16'"),
        ({"mlp": "odd"}, "a.json: mlp: Input should be 'gated' or 'plain', not 'odd'"),
        ({"head_dim": 0}, "a.json: architecture: head_dim is 0; it must be >= 1"),
    ],
)
def test_what_is_wrong_is_named(change: dict[str, object], message: str) -> None:
    with pytest.raises(InputError) as caught:
        read_record(ModelArchitecture, {**SIZES, **change}, "a.json")
    assert str(caught.value).startswith(message)
