from __future__ import annotations

import json
from pathlib import Path

import pytest

from samullm_plugin.errors import InputError
from samullm_plugin.profiling.iterations import read_architectures
from samullm_plugin.profiling.profile_files import bundled_profiles, read_profile, write_profile


def test_bundled_profile_survives_writing_and_reading(tmp_path: Path) -> None:
    profile = bundled_profiles()["A100-80GB"]
    path = tmp_path / "p.json"
    write_profile(profile, path)
    assert read_profile(path) == profile
    assert path.stat().st_size < 100_000
    assert profile.transfer is not None
    assert "de1677dc" in profile.source


def test_bundled_profile_holds_no_machine_paths() -> None:
    profile = bundled_profiles()["A100-80GB"]
    assert "/" not in profile.source.replace("puddingfjz/vllm", "")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"device": None}, "device"),
        ({"surprise": 1}, "surprise"),
        ({"format": "other"}, "format"),
        ({"models": [{"model": "a"}]}, r"models\.0\.tensor_parallel_size"),
        ({"memory": {"wrong": 1.0}}, "not a usable profile"),
        ({"architectures": {"a": {"num_layers": 0}}}, "not a usable profile"),
        (
            {"loading": {"start_s": 1, "parallel_start_s": 1, "read_bytes_per_s": 0}},
            "rates above 0",
        ),
        (
            {"loading": {"start_s": -1, "parallel_start_s": 1, "read_bytes_per_s": 9}},
            "start_s is -1",
        ),
    ],
)
def test_wrong_profiles_are_named(tmp_path: Path, change: dict[str, object], said: str) -> None:
    path = tmp_path / "p.json"
    path.write_text(json.dumps({"device": "X", "source": "y", **change}))
    with pytest.raises(InputError, match=said) as caught:
        read_profile(path)
    assert str(path) in str(caught.value)
    path.write_text("{")
    with pytest.raises(InputError, match="not a profile"):
        read_profile(path)


def test_seconds_that_no_iteration_takes_are_refused(tmp_path: Path) -> None:
    """Their sums leave the range of numbers, which ended compiled code without a word."""
    profile = bundled_profiles()["A100-80GB"].model_dump(mode="json")
    profile["models"][0]["latency"]["prefill_launch_s"] = 1e308
    path = tmp_path / "p.json"
    path.write_text(json.dumps(profile))
    with pytest.raises(InputError, match=r"models\.0\.latency\.prefill_launch_s"):
        read_profile(path)


def test_tables_of_sizes(tmp_path: Path) -> None:
    table = tmp_path / "a.csv"
    table.write_text(
        "model,layers,hidden_size,attention_heads,kv_heads,head_dim,intermediate_size,mlp,vocab_size\n"
        "a/b,2,64,4,4,16,128,plain,100\n"
    )
    assert read_architectures(table)["a/b"].mlp == "plain"
    table.write_text(table.read_text().replace("plain", "odd"))
    with pytest.raises(InputError, match="or 'plain', not 'odd'"):
        read_architectures(table)
    table.write_text("model,layers\n")
    with pytest.raises(InputError, match="no column mlp"):
        read_architectures(table)
    table.write_text(
        "model,layers,hidden_size,attention_heads,kv_heads,head_dim,intermediate_size,mlp,vocab_size\n"
        "a/b,two,64,4,4,16,128,plain,100\n"
    )
    with pytest.raises(InputError, match="row 2"):
        read_architectures(table)
    other = tmp_path / "a.json"
    other.write_text(json.dumps({"a/b": {"num_layers": 2, "colour": 3}}))
    with pytest.raises(InputError, match="colour"):
        read_architectures(other)
