from __future__ import annotations

import math
from dataclasses import fields, replace

import numpy as np
import pytest

from samullm_plugin.errors import InputError
from samullm_plugin.model.latency import Curve, StepLatency, StepTable
from samullm_plugin.profiling.fitting import AttentionPrior, fit_iterations
from samullm_plugin.profiling.iterations import Iterations
from samullm_plugin.profiling.regression import (
    least_absolute,
    levenberg_marquardt,
    nonnegative_least_squares,
)

TRUE = StepLatency(
    by_tokens=Curve.line(0.010, 0.0001),
    by_seqs=Curve.line(0.0, 0.00001),
    prefill_seq_s=0.00002,
    prefill_pair_s=2e-9,
    context_token_s=4e-7,
    longest_token_s=2.4e-6,
    longest_over_seqs=12,
    host_by_seqs=Curve.line(0.0008, 0.00001),
    launch_s=0.0105,
    prefill_launch_s=0.012,
)


def steps_of(rows: list[tuple[str, int, float, float, int]]) -> StepTable:
    """Rows: phase, sequences, context, longest, tokens of a prefill sequence."""
    prefill = np.array([r[0] == "prefill" for r in rows])
    seqs = np.array([r[1] for r in rows])
    length = np.array([r[4] for r in rows], dtype=float)
    return StepTable(
        num_seqs=seqs,
        num_tokens=np.where(prefill, seqs * length, seqs).astype(np.int64),
        prefill_seqs=np.where(prefill, seqs, 0),
        prefill_tokens=np.where(prefill, seqs * length, 0).astype(np.int64),
        prefill_pairs=np.where(prefill, seqs * length * (length + 1) / 2, 0.0),
        context_tokens=np.where(prefill, 0.0, [r[2] for r in rows]),
        longest_tokens=np.where(prefill, 0.0, [r[3] for r in rows]),
    )


def batches(sizes: list[int]) -> StepTable:
    rows: list[tuple[str, int, float, float, int]] = []
    for b in sizes:
        rows += [("decode", b, float(b), 1.0, 0), ("decode", b, b + 1.0, 2.0, 0)]
        rows += [("decode", b, 60000.0, 60000.0 / b, 0), ("decode", b, 30000.0, 30000.0 / b, 0)]
        rows += [("decode", b, 4095.0 + b, 4096.0, 0), ("decode", b, 2047.0 + b, 2048.0, 0)]
        rows += [("prefill", b, 0, 0, 1), ("prefill", b, 0, 0, 2)]
        rows += [("prefill", b, 0, 0, max(4096 // b, 1))]
    return steps_of(rows)


def measured(steps: StepTable, latency: StepLatency = TRUE, *, device: bool = True) -> Iterations:
    seconds = latency.step_seconds(steps)
    host = latency.host_by_seqs.at(steps.num_seqs)
    return Iterations(
        model="made/up",
        tensor_parallel_size=1,
        device="A100-80GB",
        phase=np.where(steps.prefill_seqs > 0, "prefill", "decode"),
        shape=np.array(["uniform"] * len(steps)),
        batch_size=steps.num_seqs,
        steps=steps,
        seconds=seconds,
        device_s=seconds - host if device else np.full(len(steps), math.nan),
    )


SIZES = [1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 320, 384, 512]


def error_pct(latency: StepLatency, rows: Iterations) -> float:
    return float(100 * np.abs(latency.step_seconds(rows.steps) / rows.seconds - 1).mean())


def test_terms_of_made_up_measurements_are_recovered_on_other_batch_sizes() -> None:
    fit = fit_iterations(measured(batches(SIZES)))
    held_out = measured(batches([3, 12, 40, 100, 150, 300, 450]))
    assert error_pct(fit.latency, held_out) < 1.5
    assert fit.latency.context_token_s == pytest.approx(TRUE.context_token_s, rel=0.08)
    assert fit.latency.longest_token_s == pytest.approx(TRUE.longest_token_s, rel=0.15)
    assert fit.latency.launch_s == pytest.approx(TRUE.launch_s, rel=0.03)
    host = fit.latency.host_by_seqs.at(np.array([1, 256]))
    np.testing.assert_allclose(host, TRUE.host_by_seqs.at(np.array([1, 256])), rtol=0.05)
    assert fit.undetermined == ()


def test_host_stalls_do_not_move_the_fit() -> None:
    rows = measured(batches(list(range(1, 513, 6))))
    rng = np.random.default_rng(3)
    stalled = rng.random(len(rows)) < 0.08
    disturbed = replace(rows, seconds=rows.seconds + np.where(stalled, 0.07, 0.0))
    fit = fit_iterations(disturbed)
    assert error_pct(fit.latency, measured(batches([3, 12, 40, 100, 300]))) < 3
    found = disturbed.host_stalls()
    assert (found[stalled] > 0.06).mean() > 0.9
    assert not (found[~stalled] > 0).any()


def test_tile_steps_become_knots() -> None:
    knots = (0, 1, 128, 129, 256, 257, 384, 385, 512)
    stepped = Curve(knots, (0.01, 0.01, 0.01, 0.02, 0.02, 0.03, 0.03, 0.04, 0.04))
    sizes = [*range(1, 513, 9), 128, 129, 256, 257]
    latency = StepLatency(stepped, context_token_s=4e-7)
    rows = measured(batches(sorted(set(sizes))), latency)
    fit = fit_iterations(rows.where(rows.phase == "decode"))
    low, high = fit.latency.by_tokens.at(np.array([256, 257])) + fit.latency.by_seqs.at(
        np.array([256, 257])
    )
    assert high - low == pytest.approx(0.01, rel=0.25)


def test_undetermined_terms_are_named() -> None:
    steps = batches(SIZES)
    rows = measured(steps)
    even = rows.where((rows.steps.longest_tokens < 2000) & (rows.phase == "decode"))
    even = even.where(even.steps.longest_tokens * even.batch_size <= even.steps.context_tokens * 2)
    said = " ".join(fit_iterations(even).undetermined)
    assert "no longest-sequence term" in said
    assert "no prefill rows" in said
    assumed = fit_iterations(even, AttentionPrior(6.0, 12, 1e-6))
    assert assumed.latency.longest_token_s == pytest.approx(6 * assumed.latency.context_token_s)
    assert assumed.latency.longest_over_seqs == 12
    short = even.where(even.steps.context_tokens <= 16 * even.batch_size)
    assert fit_iterations(short).latency.context_token_s == 0.0
    priced = fit_iterations(short, AttentionPrior(6.0, 12, 1e-6))
    assert priced.latency.context_token_s == 1e-6
    assert "memory bandwidth" in " ".join(priced.undetermined)
    only_prefill = fit_iterations(rows.where(rows.phase == "prefill"))
    assert "no decode rows" in " ".join(only_prefill.undetermined)


def test_without_device_times_totals_still_hold() -> None:
    rows = measured(batches(SIZES), device=False)
    rng = np.random.default_rng(5)
    swapped = rng.random(len(rows)) < 0.1
    disturbed = replace(rows, seconds=rows.seconds * np.where(swapped, 2.0, 1.0))
    fit = fit_iterations(disturbed)
    assert "no separate device times" in fit.undetermined[0]
    predicted = fit.latency.step_seconds(rows.steps).sum() * (1 + fit.interruption_pct / 100)
    assert predicted == pytest.approx(disturbed.seconds.sum(), rel=0.01)
    assert error_pct(fit.latency, rows) < 3


def test_interrupted_prefills_do_not_make_decode_iterations_longer() -> None:
    """An engine that prepares itself for every new number of tokens is slow in most prefills."""
    rows = measured(batches(SIZES), device=False)
    prefill = rows.phase == "prefill"
    rng = np.random.default_rng(7)
    slow = prefill & (rng.random(len(rows)) < 0.4)
    disturbed = replace(rows, seconds=rows.seconds + np.where(slow, 0.008, 0.0))
    fit = fit_iterations(disturbed)
    latency = fit.latency.scaled(1 + fit.interruption_pct / 100)
    for part in (prefill, ~prefill):
        total = disturbed.seconds[part].sum()
        assert latency.step_seconds(rows.steps)[part].sum() == pytest.approx(total, rel=0.02)


def test_small_batches_may_cost_less_by_token_than_large_ones() -> None:
    """On a CPU a matrix product of four rows takes as long as of one."""
    by_tokens = Curve((0, 4, 32, 512), (0.010, 0.010, 0.024, 0.120))
    latency = StepLatency(by_tokens, context_token_s=4e-7, prefill_step_s=0.004)
    fit = fit_iterations(measured(batches(SIZES), latency, device=False))
    held_out = measured(batches([3, 6, 12, 40, 100, 300, 450]), latency, device=False)
    assert error_pct(fit.latency, held_out) < 2
    assert fit.latency.prefill_step_s == pytest.approx(0.004, rel=0.2)


def test_few_rows_are_enough_and_one_batch_size_is_not() -> None:
    two = fit_iterations(measured(batches([1, 64])))
    assert error_pct(two.latency, measured(batches([1, 64]))) < 5
    with pytest.raises(InputError, match="at least two batch sizes"):
        fit_iterations(measured(batches([16])))


def test_mixed_iterations_are_fitted() -> None:
    rng = np.random.default_rng(1)
    n = 200
    decode, prefill = rng.integers(0, 100, n), rng.integers(1, 4, n)
    tokens = prefill * rng.integers(10, 300, n)
    context = decode * 500.0
    steps = StepTable(
        decode + prefill,
        decode + tokens,
        prefill,
        tokens,
        tokens * 100.0,
        context,
        context * 0 + 500,
    )
    rows = measured(steps)
    fit = fit_iterations(replace(rows, phase=np.array(["mixed"] * n)))
    assert error_pct(fit.latency, rows) < 2


def test_where_keeps_columns_together() -> None:
    rows = measured(batches([1, 8]))
    keep = rows.batch_size == 8
    part = rows.where(keep)
    for field in fields(StepTable):
        np.testing.assert_array_equal(
            getattr(part.steps, field.name), getattr(rows.steps, field.name)[keep]
        )
    assert len(part) == keep.sum()


def test_nonnegative_least_squares_meets_its_optimality_conditions() -> None:
    rng = np.random.default_rng(0)
    for k in (1, 3, 10):
        for _ in range(20):
            matrix, target = rng.normal(size=(40, k)), rng.normal(size=40)
            matrix[:, 0] *= 1e6
            x = nonnegative_least_squares(matrix, target)
            scale = np.linalg.norm(matrix, axis=0)
            gradient = matrix.T @ (target - matrix @ x) / scale
            assert (x >= 0).all()
            assert (gradient <= 1e-6).all()
            np.testing.assert_allclose(gradient[x > 0], 0, atol=1e-6)


def test_least_absolute_ignores_outliers_and_levenberg_marquardt_finds_a_minimum() -> None:
    x = np.arange(50.0)
    y = 3 + 2 * x
    y[::10] += 1000
    found = least_absolute(np.column_stack([np.ones(50), x]), y, floor=1e-6)
    np.testing.assert_allclose(found, [3, 2], atol=1e-3)
    best = levenberg_marquardt(lambda p: np.array([p[0] - 2, 10 * (p[1] - p[0] ** 2)]), np.zeros(2))
    np.testing.assert_allclose(best, [2, 4], atol=1e-2)
