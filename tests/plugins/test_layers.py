from __future__ import annotations

import csv
import gzip
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from samullm_layers.compose import Link
from samullm_layers.plugin import LayersLatency, LayersOptions
from samullm_layers.tables import REQUIRED

from benchmarks import whole_runs
from samullm_plugin.errors import InputError
from samullm_plugin.model.application import ModelSpec
from samullm_plugin.model.architecture import ModelArchitecture
from samullm_plugin.model.cluster import Gpu
from samullm_plugin.profiling.grid import Grid, fill_holes
from samullm_plugin.testing.latency_contract import LatencyModelContract, step_table

SIZES = ModelArchitecture(4, 256, 8, 4, 32, 512, 1000)
MODEL = ModelSpec("some/model", 2048, SIZES)
GPU = Gpu("RTX9000-24GB", 24 * 2**30)
FULL = (0, 16, 256, 2048)


def attention_us(chunk: float, before: float, decode: float, context: float) -> float:
    """Linear in every variable, so that interpolation is exact on the grid's cells."""
    some = 5.0 if chunk or decode else 0.0
    return some + 0.01 * chunk + 0.0005 * chunk * before / 16 + 0.002 * decode * context


def write_profile(folder: Path, *, compressed: bool = False, skew: bool = False) -> Path:
    """Write a profile whose layers take 2 us plus 0.01 us per token, sampling 1 us per sequence."""
    tables: dict[str, list[tuple[object, ...]]] = {
        "dense.csv": [("layer", "tokens", "time_us")],
        "per_sequence.csv": [("layer", "sequences", "time_us")],
        "attention.csv": [
            ("prefill_chunk", "kv_prefill", "n_decode", "kv_decode", "time_us"),
        ],
    }
    for layer in REQUIRED:
        tables["dense.csv"] += [(layer, t, 2 + 0.01 * t) for t in (1, 64, 2048)]
    for layer in ("lm_head", "sampler"):
        tables["per_sequence.csv"] += [(layer, s, 1.0 * s) for s in (1, 256)]
    tables["attention.csv"] += [
        (c, k, n, x, attention_us(c, k, n, x))
        for c in FULL
        for k in (FULL if c else (0,))
        for n in (0, 1, 64, 256)
        for x in (FULL[1:] if n else (0,))
        if c or n
    ]
    if skew:
        tables["skew_fit.csv"] = [
            ("pc", "n_label", "skew_rate_label", "kv_big_label", "kp_label", "alpha", "n_samples"),
            (0, "n<=16", "sr<=40%", "kvB<=4k", "kp=0", 0.5, 4),
            (0, "n<=256", "sr<=40%", "kvB<=4k", "kp=0", 0.25, 4),
        ]
    folder.mkdir(parents=True)
    for name, rows in tables.items():
        path = folder / (f"{name}.gz" if compressed else name)
        opened = gzip.open if compressed else open
        with opened(path, "wt", newline="", encoding="utf-8") as file:  # type: ignore[operator]
            csv.writer(file).writerows(rows)
    return folder


@pytest.fixture
def profiles(tmp_path: Path) -> Path:
    write_profile(tmp_path / "RTX9000" / "some" / "model" / "bf16" / "tp1")
    write_profile(tmp_path / "RTX9000" / "some" / "model" / "bf16" / "tp2", compressed=True)
    return tmp_path


def make(profiles: Path, **options: object) -> LayersLatency:
    return LayersLatency(LayersOptions.model_validate({"profiles": profiles, **options}))


def expected_s(tokens: int, seqs: int, attention: float) -> float:
    calls = SIZES.num_layers * 7 + 2  # two norms and five others in each layer, two outside
    dense = calls * (2 + 0.01 * tokens)
    return 1e-6 * (dense + 2 * seqs + SIZES.num_layers * attention)


class TestContract(LatencyModelContract):
    latency_class = LayersLatency
    model = replace(MODEL, name="model")
    gpu = GPU

    @pytest.fixture(autouse=True)
    def _profiles(self, profiles: Path) -> None:
        TestContract.options = {"profiles": profiles, "link_bytes_per_s": 1e12}


def test_an_iteration_is_the_sum_of_its_layers(profiles: Path) -> None:
    steps = make(profiles).step_latency(MODEL, GPU, 1)
    rows = [(64, 256, 0, 0, 0), (0, 0, 1, 256, 16), (1, 16, 1, 256, 256), (0, 0, 1, 2048, 0)]
    found = steps.step_seconds(step_table(rows))
    wanted = [
        expected_s(64, 64, attention_us(0, 0, 64, 256)),
        expected_s(256, 1, attention_us(256, 16, 0, 0)),
        expected_s(257, 2, attention_us(256, 256, 1, 16)),
        expected_s(2048, 1, attention_us(2048, 0, 0, 0)),
    ]
    assert found == pytest.approx(wanted, rel=1e-9)


def test_beyond_the_profile_the_last_segment_goes_on(profiles: Path) -> None:
    steps = make(profiles).step_latency(MODEL, GPU, 1)
    found = steps.step_seconds(step_table([(512, 4096, 0, 0, 0)]))[0]
    assert found == pytest.approx(expected_s(512, 512, attention_us(0, 0, 512, 4096)), rel=1e-9)


def test_several_prompts_cost_no_more_than_one_of_as_many_tokens(profiles: Path) -> None:
    steps = make(profiles).step_latency(MODEL, GPU, 1)
    several, one = steps.step_seconds(step_table([(0, 0, 4, 256, 0), (0, 0, 1, 1024, 0)]))
    sampling = 2e-6 * 3
    assert several - sampling < one
    assert several - sampling > one * 0.9


def test_all_reduces_need_a_link_and_take_its_time(profiles: Path) -> None:
    with pytest.raises(InputError, match="link_bytes_per_s"):
        make(profiles).step_latency(MODEL, GPU, 2)
    rows = step_table([(64, 256, 0, 0, 0)])
    fast, slow = (
        make(profiles, link_bytes_per_s=rate, link_latency_s=1e-5).step_latency(MODEL, GPU, 2)
        for rate in (1e15, 1e9)
    )
    message = 64 * SIZES.hidden_size * 2
    assert (slow.step_seconds(rows) - fast.step_seconds(rows))[0] == pytest.approx(
        8 * message / 1e9, rel=1e-4
    )


def test_a_ring_is_taken_where_it_is_faster() -> None:
    link = Link(1e9, 1e-6)
    small, large = link.all_reduce_s(np.array([100.0, 1e9]), 8)
    assert small == pytest.approx(1e-6 + 7 * 100 / 1e9)
    assert large == pytest.approx(14 * (1e-6 + 1e9 / 8 / 1e9))


def test_unequal_lengths_lie_between_mean_and_longest(tmp_path: Path) -> None:
    write_profile(tmp_path / "RTX9000" / "some" / "model" / "bf16" / "tp1", skew=True)
    steps = make(tmp_path).step_latency(MODEL, GPU, 1)
    even = step_table([(16, 256, 0, 0, 0), (64, 256, 0, 0, 0)])
    skewed = replace(even, longest_tokens=np.array([1024.0, 1024.0]))
    gap = steps.step_seconds(skewed) - steps.step_seconds(even)
    full = 1e-6 * SIZES.num_layers * 0.002 * np.array([16, 64]) * (1024 - 256)
    assert gap == pytest.approx(full * [0.5, 0.25])


def test_a_skew_table_said_to_be_off_is_not_used(tmp_path: Path) -> None:
    folder = write_profile(tmp_path / "RTX9000" / "some" / "model" / "bf16" / "tp1", skew=True)
    (folder.parent / "meta.yaml").write_text("gpu: X\nskew_fit:\n  enabled: false\n")
    steps = make(tmp_path).step_latency(MODEL, GPU, 1)
    even = step_table([(16, 256, 0, 0, 0)])
    skewed = replace(even, longest_tokens=np.array([1024.0]))
    assert steps.step_seconds(skewed)[0] == steps.step_seconds(even)[0]


def test_host_time_is_hidden_only_with_asynchronous_scheduling(profiles: Path) -> None:
    rows = step_table([(1, 16, 0, 0, 0)])
    plain = make(profiles).step_latency(MODEL, GPU, 1).step_seconds(rows)[0]
    model = make(profiles, host_s=1e-3)
    assert model.step_latency(MODEL, GPU, 1).step_seconds(rows)[0] == pytest.approx(1e-3)
    waiting = replace(MODEL, engine=replace(MODEL.engine, async_scheduling=False))
    found = model.step_latency(waiting, GPU, 1).step_seconds(rows)[0]
    assert found == pytest.approx(plain + 1e-3)


def test_holes_are_filled_from_both_sides() -> None:
    x, y = np.array([0.0, 1.0, 3.0, 4.0]), np.array([0.0, 2.0, 4.0])
    full = 1 + 2 * x[:, None] + 3 * y[None, :]
    holed = full.copy()
    holed[1, 1] = holed[2, 2] = holed[3, 2] = np.nan
    assert fill_holes(holed, (x, y)) == pytest.approx(full)
    values = Grid((x, y), full).at(np.array([0.5, 2.0, 8.0, -1.0]), np.array([1.0, 3.0, 4.0, 0.0]))
    assert values == pytest.approx([5.0, 14.0, 29.0, 1.0])
    assert Grid((x, y), full).at(np.zeros(0), np.zeros(0)).shape == (0,)


@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        ("dense.csv", "tokens", "token", "column 'tokens' is missing"),
        ("dense.csv", "o_proj,64,2.64", "o_proj,64,-2.64", r"dense.csv:\d+: time_us is '-2.64'"),
        ("dense.csv", "o_proj,64,2.64", "o_proj,64,nan", r"dense.csv:\d+: time_us is 'nan'"),
        ("dense.csv", "o_proj", "p_proj", "no rows for layer 'o_proj'"),
        ("per_sequence.csv", "lm_head", "lm_tail", "no rows for layer 'lm_head'"),
        ("attention.csv", "0,0,1,16,", "0,0,0,16,", r"attention.csv:2: neither prefill_chunk"),
        ("attention.csv", "0,0,1,16,5.032", "0,0,1,16", r"attention.csv:2: a value is missing"),
    ],
)
def test_wrong_tables_are_refused(
    profiles: Path, file: str, old: str, new: str, message: str
) -> None:
    path = profiles / "RTX9000" / "some" / "model" / "bf16" / "tp1" / file
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    with pytest.raises(InputError, match=message):
        make(profiles).step_latency(MODEL, GPU, 1)


def test_what_is_missing_is_named(profiles: Path) -> None:
    with pytest.raises(InputError, match="is not a folder"):
        make(profiles / "none")
    with pytest.raises(InputError, match="there are profiles of RTX9000"):
        make(profiles).step_latency(MODEL, Gpu("H100-80GB", 80 * 2**30), 1)
    with pytest.raises(InputError, match="there are some/model"):
        make(profiles).step_latency(replace(MODEL, name="other"), GPU, 1)
    with pytest.raises(InputError, match="there are bf16/tp1, bf16/tp2"):
        make(profiles).step_latency(MODEL, GPU, 4)
    with pytest.raises(InputError, match="pipeline-parallel size 2"):
        make(profiles).step_latency(MODEL, GPU, 1, 2)
    (profiles / "RTX9000/some/model/bf16/tp1/attention.csv").unlink()
    with pytest.raises(InputError, match=r"attention.csv \(or attention.csv.gz\) is missing"):
        make(profiles).step_latency(MODEL, GPU, 1)


def test_names_can_be_mapped(profiles: Path) -> None:
    model = make(profiles, models={"finetuned": "some/model"}, devices={"Mine": "RTX9000"})
    found = model.provenance(replace(MODEL, name="finetuned"), Gpu("Mine", 24 * 2**30), 1)
    assert found.kind == "layer-profile"


@pytest.mark.skipif(not whole_runs.DATA.is_dir(), reason=f"{whole_runs.DATA} is absent")
class TestRecordedRuns:
    @pytest.mark.parametrize("name", ["RTX4090_Llama-3.1-8B", "RTXPRO6000_Qwen3-32B"])
    def test_they_are_reproduced(self, name: str) -> None:
        run = whole_runs.read_run(whole_runs.DATA / name)
        outcome = whole_runs.simulate(run)
        assert abs(outcome.makespan_error_pct) < 3
        assert abs(outcome.latency_error_pct) < 5
        running, waiting = outcome.counts(run.ticks[:, 0])
        assert np.abs(running - run.ticks[:, 1]).mean() < 4
        assert np.abs(waiting - run.ticks[:, 2]).mean() < 5

    def test_inferred_blocks_are_those_found_at_start(self) -> None:
        run = whole_runs.read_run(whole_runs.DATA / "RTX4090_Llama-3.1-8B")
        usable = whole_runs.usable_blocks(run)
        assert usable is not None
        assert usable + 1 == run.about["kv_cache"]["num_gpu_blocks"]

    def test_nothing_is_inferred_from_nothing(self) -> None:
        run = whole_runs.read_run(whole_runs.DATA / "RTXPRO6000_Qwen3-32B")
        assert whole_runs.usable_blocks(run) is None
