from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from samullm_plugin.errors import InputError
from samullm_plugin.model.architecture import ModelArchitecture
from samullm_plugin.model.latency import Curve, StepTable
from samullm_plugin.profiling.book import LatencyBook, spread_experts
from samullm_plugin.profiling.device_fit import DeviceFit, HostCoefficients, HostFitted, fit_device
from samullm_plugin.profiling.iterations import Iterations
from samullm_plugin.profiling.roofline import (
    HARDWARE,
    DeviceCoefficients,
    Shapes,
    device_seconds,
    roofline_latency,
    touched_experts,
)
from samullm_plugin.profiling.transfer import (
    FittedLatency,
    LatencyTransfer,
    TransferErrors,
    average,
)

A100 = HARDWARE["A100-80GB"]
SMALL = ModelArchitecture(32, 4096, 32, 32, 128, 11008, 32000)
LARGE = ModelArchitecture(40, 5120, 40, 40, 128, 13824, 32000)
PLAIN = ModelArchitecture(36, 5120, 40, 40, 128, 20480, 50000, "plain")
MIXTURE = ModelArchitecture(32, 4096, 32, 8, 128, 14336, 32000, "gated", 8, 2)
NO_HOST = Curve.constant(0.001)
HOST = HostCoefficients((0.001,) * 5, (0.004,) * 5, (0.0,) * 5)


def decode(batch: int, context: int) -> StepTable:
    one = np.array([batch])
    none = np.array([0])
    total = np.array([float(batch * context)])
    return StepTable(one, one, none, none, none * 1.0, total, np.array([float(context)]))


def prefill(tokens: int) -> StepTable:
    one, n = np.array([1]), np.array([tokens])
    pairs = np.array([tokens * (tokens + 1) / 2])
    return StepTable(one, n, one, n, pairs, np.zeros(1), np.zeros(1))


def seconds(a: ModelArchitecture, size: int, steps: StepTable) -> float:
    latency = roofline_latency(a, size, A100, DeviceCoefficients(), NO_HOST)
    return float(latency.step_seconds(steps)[0])


@given(st.integers(1, 512), st.integers(1, 4096), st.sampled_from([1, 2, 4]))
@settings(max_examples=40, deadline=None)
def test_more_work_never_takes_less(batch: int, context: int, size: int) -> None:
    step = decode(batch, context)
    assert seconds(LARGE, size, step) >= 0.999 * seconds(SMALL, size, step)
    assert seconds(SMALL, size, decode(batch, context + 64)) >= seconds(SMALL, size, step)
    assert seconds(SMALL, size, prefill(batch + 512)) >= 0.97 * seconds(SMALL, size, prefill(batch))
    deeper = replace(SMALL, num_layers=64)
    assert seconds(deeper, size, step) > 1.9 * seconds(SMALL, size, step) - 0.002


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("architecture", [SMALL, PLAIN, MIXTURE])
def test_curve_of_knots_equals_the_formula(architecture: ModelArchitecture, size: int) -> None:
    batch = np.array([1, 7, 63, 64, 65, 130, 257, 511])
    none = np.zeros(8, dtype=np.int64)
    context = batch * 700.0
    steps = StepTable(batch, batch, none, none, none * 1.0, context, context * 0 + 700)
    c = DeviceCoefficients()
    latency = roofline_latency(architecture, size, A100, c, Curve.constant(0.0))
    formula = device_seconds(Shapes.of(architecture, size, steps), A100, c)
    # Experts' tiles fill at token counts of their own, which the knots do not follow.
    tolerance = 0.12 if architecture.num_experts else 0.02
    np.testing.assert_allclose(latency.step_seconds(steps), formula, rtol=tolerance)


def test_touched_experts_grow_to_all_of_them() -> None:
    tokens = np.array([1.0, 2, 4, 16, 64, 10_000])
    touched = touched_experts(tokens, np.full(6, 8.0), np.full(6, 2.0))
    assert touched[0] == pytest.approx(2)
    assert touched[-1] == pytest.approx(8)
    assert (np.diff(touched) > 0).all()
    rng = np.random.default_rng(0)
    drawn = [
        len({e for _ in range(4) for e in rng.choice(8, 2, replace=False)}) for _ in range(4000)
    ]
    assert touched[2] == pytest.approx(np.mean(drawn), rel=0.02)


def made_up(a: ModelArchitecture, size: int, c: DeviceCoefficients, name: str) -> HostFitted:
    batch = np.repeat(np.array([1, 4, 16, 32, 64, 96, 128, 192, 256, 320, 384, 448, 512]), 4)
    kind = np.tile(np.arange(4), 13)
    is_prefill = kind == 3
    tokens = np.where(is_prefill, batch * np.maximum(2048 // batch, 1), batch)
    context = np.where(kind == 0, batch, np.where(kind == 1, batch * 800, batch + 2047)) * 1.0
    longest = np.where(kind == 0, 1, np.where(kind == 1, 800, 2048)) * 1.0
    pairs = tokens * (tokens / batch + 1) / 2
    steps = StepTable(
        batch,
        tokens,
        np.where(is_prefill, batch, 0),
        np.where(is_prefill, tokens, 0),
        np.where(is_prefill, pairs, 0.0),
        np.where(is_prefill, 0.0, context),
        np.where(is_prefill, 0.0, longest),
    )
    device = device_seconds(Shapes.of(a, size, steps), A100, c)
    rows = Iterations(
        name,
        size,
        "A100-80GB",
        np.where(is_prefill, "prefill", "decode"),
        np.array(["uniform"] * len(batch)),
        batch,
        steps,
        device + 0.001,
        device,
    )
    return HostFitted(rows, a, NO_HOST)


def test_coefficients_learned_from_some_models_predict_another() -> None:
    true = DeviceCoefficients(
        tile_128=0.7, bandwidth=0.8, gated_layer_s=3e-5, query_read=0.4, kv_read=0.7
    )
    middle = ModelArchitecture(36, 4608, 36, 36, 128, 12288, 32000)
    groups = [
        made_up(a, size, true, str(i))
        for i, a in enumerate((SMALL, LARGE, PLAIN))
        for size in (1, 2, 4)
    ]
    learned = fit_device(groups, A100)
    for size in (1, 2, 4):
        rows = made_up(middle, size, true, "new").rows
        latency = LatencyTransfer(learned, A100).roofline(middle, size)
        errors = np.abs(latency.step_seconds(rows.steps) / rows.seconds - 1)
        assert np.median(errors) < 0.03
        assert errors.mean() < 0.06


def test_one_architecture_is_too_few_to_learn_from() -> None:
    with pytest.raises(InputError, match="at least two models"):
        fit_device([made_up(SMALL, 1, DeviceCoefficients(), "a")], A100)


def test_whether_experts_were_spread_is_found_out() -> None:
    for same in (True, False):
        groups = [made_up(a, 1, DeviceCoefficients(), a.mlp) for a in (SMALL, PLAIN)]
        group = made_up(MIXTURE, 1, DeviceCoefficients(), "moe")
        shapes = Shapes.of(MIXTURE, 1, group.rows.steps, same_experts=same)
        device = device_seconds(shapes, A100, DeviceCoefficients())
        rows = replace(group.rows, seconds=device + 0.001, device_s=device)
        assert fit_device([*groups, replace(group, rows=rows)], A100).same_experts is same


def transfer(known: list[FittedLatency]) -> LatencyTransfer:
    errors = TransferErrors(2.0, 4.0, 6.0, 20.0)
    return LatencyTransfer(DeviceFit(DeviceCoefficients(), HOST, True), A100, known, errors)


def test_transfer_starts_from_what_is_closest() -> None:
    plain = transfer([])
    twice = plain.roofline(SMALL, 1).scaled(2.0)
    start = transfer([FittedLatency("a/small", SMALL, 1, twice, 2.0)])
    other_vocabulary = replace(SMALL, vocab_size=64000)
    twin = start.predict(other_vocabulary, 1)
    assert twin.latency == twice
    assert twin.error_pct == 2.0
    assert "a/small" in twin.basis
    sized = start.predict(SMALL, 2)
    assert sized.error_pct == 4.0
    ratio = sized.latency.context_token_s / plain.roofline(SMALL, 2).context_token_s
    assert ratio == pytest.approx(2.0)
    assert start.predict(LARGE, 1).error_pct == 6.0
    assert start.predict(MIXTURE, 1).error_pct == 20.0


def test_average_of_equals_is_the_same_and_of_others_between() -> None:
    latency = transfer([]).roofline(SMALL, 1)
    steps = decode(100, 500)
    both = average([latency, latency.scaled(3.0)])
    assert both.step_seconds(steps)[0] == pytest.approx(
        2 * latency.step_seconds(steps)[0], rel=0.01
    )


def test_spreading_experts_costs_their_weights_and_no_more_when_all_are_busy() -> None:
    start = transfer([])
    latency = start.roofline(MIXTURE, 2)
    spread = spread_experts(latency, start, MIXTURE, 2)
    few = spread.by_tokens.at(np.array([32])) - latency.by_tokens.at(np.array([32]))
    unread = 6 * MIXTURE.expert_params * 32 * 2 / 2  # six more experts, 32 layers, halved by tp 2
    assert few[0] == pytest.approx(unread / A100.bandwidth, rel=0.35)
    assert (np.array(spread.by_tokens.values) >= latency.by_tokens.at(spread.by_tokens.knots)).all()
    assert spread_experts(latency, start, SMALL, 2) is latency


def test_what_cannot_be_predicted_is_said() -> None:
    latency = transfer([]).roofline(SMALL, 1)
    book = LatencyBook("A100-80GB", "made up", {("a/small", 1): (latency, 3.0)}, None)
    assert book.predict("a/small", None, 1)[1].kind == "measured"
    with pytest.raises(InputError, match="--transfer"):
        book.predict("a/small", SMALL, 2)
    with pytest.raises(InputError, match="architecture"):
        replace(book, transfer=transfer([])).predict("b/other", None, 1)
    with pytest.raises(InputError, match="must be positive"):
        DeviceCoefficients(bandwidth=0.0)
