"""Length estimators: distributions, censoring, conditions, and the rules of the interface."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from samullm_ecdf.ecdf import ConditionalLengths, ConditionalOptions, EcdfLengths, EcdfOptions
from samullm_ecdf.given import (
    FixedLengths,
    OracleLengths,
    OracleOptions,
    WorkloadLengths,
    WorkloadOptions,
)
from samullm_ecdf.proxy import ProxyLengths, ProxyOptions

from samullm_plugin import (
    InputError,
    LengthDistribution,
    LengthEstimator,
    LengthObservations,
    LengthQuery,
    MissingExtraError,
    measured_lengths,
    measured_models,
    workload_lengths,
)

VICUNA = "lmsys/vicuna-13b-v1.5"


def query(
    model: str = VICUNA,
    count: int = 2000,
    limit: int = 100_000,
    generated: int | Sequence[int] = 0,
    task: str = "",
    prompts: Sequence[int] | None = None,
) -> LengthQuery:
    return LengthQuery(
        model,
        task,
        np.full(count, 50) if prompts is None else np.array(prompts),
        np.full(count, limit),
        np.broadcast_to(np.asarray(generated), (count,)).copy(),
        100_000,
        node="n",
    )


def observed(
    lengths: Sequence[int] | np.ndarray[tuple[int], np.dtype[np.int64]],
    censored: Sequence[bool] | None = None,
    model: str = VICUNA,
    task: str = "",
    prompts: Sequence[int] | None = None,
    texts: tuple[str, ...] | None = None,
) -> LengthObservations:
    values = np.asarray(lengths, np.int64)
    return LengthObservations(
        model,
        task,
        np.full(len(values), 50) if prompts is None else np.asarray(prompts, np.int64),
        values,
        np.zeros(len(values), bool) if censored is None else np.array(censored),
        texts,
    )


def draw(
    estimator: LengthEstimator, asked: LengthQuery, scenarios: int = 4, seed: int = 0
) -> np.ndarray[tuple[int, int], np.dtype[np.int64]]:
    return estimator.sample(asked, np.random.default_rng(seed), scenarios)


# Distributions


@given(
    st.lists(st.tuples(st.integers(1, 30), st.booleans()), min_size=1, max_size=60),
)
@settings(deadline=None)
def test_product_limit_estimate_equals_scipy(pairs: list[tuple[int, bool]]) -> None:
    stats = pytest.importorskip("scipy.stats", reason="needs scipy to compare with")
    lengths = np.array([n for n, _ in pairs])
    censored = np.array([c for _, c in pairs])
    ours = LengthDistribution.kaplan_meier(lengths, censored)
    data = stats.CensoredData.right_censored(lengths.astype(float), censored)
    theirs = stats.ecdf(data).cdf
    assert ours.cdf_at(np.arange(1, 40)) == pytest.approx(theirs.evaluate(np.arange(1.0, 40.0)))


def test_cut_outputs_do_not_count_as_short() -> None:
    lengths = np.array([10, 20, 30, 30, 30])
    censored = np.array([False, False, True, True, True])
    distribution = LengthDistribution.kaplan_meier(lengths, censored)
    assert distribution.cut_mass == pytest.approx(0.6)
    assert distribution.censored_at == 30
    assert distribution.mean(100) == pytest.approx((10 + 20 + 3 * 100) / 5)


def test_weights_count_as_repetitions() -> None:
    lengths, censored = np.array([3, 5, 9]), np.array([False, True, False])
    weights = np.array([2.0, 1.0, 3.0])
    repeated = np.repeat(np.arange(3), weights.astype(int))
    one = LengthDistribution.kaplan_meier(lengths, censored, weights)
    other = LengthDistribution.kaplan_meier(lengths[repeated], censored[repeated])
    assert one.cdf.tolist() == pytest.approx(other.cdf.tolist())


@given(st.integers(0, 400), st.integers(0, 2**31))
@settings(deadline=None, max_examples=30)
def test_conditional_draws_follow_the_rest_of_the_distribution(generated: int, seed: int) -> None:
    table = measured_lengths(VICUNA)
    assert table is not None
    d = table.distribution
    uniforms = np.random.default_rng(seed).random((1, 4000))
    drawn = d.conditional_quantile(uniforms, np.full(4000, generated))[0]
    assert (drawn > generated).all()
    for length in (generated + 50, generated + 200):
        below = d.cdf_at(np.array([generated]))[0] if generated else 0.0
        expected = (d.cdf_at(np.array([length]))[0] - below) / (1 - below)
        assert (drawn <= length).mean() == pytest.approx(expected, abs=0.04)


def test_bundled_tables_match_the_published_summary(shared_data: Path) -> None:
    with (shared_data / "output_length_summary.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {r["model"] for r in rows} == set(measured_models())
    for row in rows:
        table = measured_lengths(row["model"])
        assert table is not None
        limit = int(row["max_model_len"])
        assert table.distribution.mean(limit) == pytest.approx(float(row["mean"]), rel=2e-3)
        assert table.distribution.cut_mass == pytest.approx(float(row["mass_at_max_len"]), abs=1e-4)
        median = min(int(table.distribution.quantile(np.array([0.5]))[0]), limit)
        assert median == pytest.approx(int(row["p50"]), abs=2)


# ecdf


@pytest.mark.parametrize(
    "name", ["lmsys/vicuna-13b-v1.5", "vicuna-13b-v1.5", "other/Vicuna-13B-v1.5"]
)
def test_names_are_found_with_and_without_organisation(name: str) -> None:
    assert draw(EcdfLengths(), query(name)).tolist() == draw(EcdfLengths(), query()).tolist()


def test_lengths_of_unmeasured_models_are_assumed_and_say_so() -> None:
    estimator = EcdfLengths()
    assert "assumed: new/model was not measured" in estimator.source("new/model")
    drawn = draw(estimator, query("new/model", count=2000, limit=512), scenarios=40)
    assert drawn.max() <= 512
    # Scenarios are those of one model each: their means differ as models do, not as samples do.
    means = drawn.mean(axis=1)
    one_model = draw(estimator, query(count=2000, limit=512), scenarios=40).mean(axis=1)
    assert means.std() > 5 * one_model.std()
    assert (
        draw(estimator, query("new/model")).tolist()
        == draw(EcdfLengths(), query("new/model")).tolist()
    )


def test_stand_ins_are_named() -> None:
    estimator = EcdfLengths()
    name = "stabilityai/stablelm-tuned-alpha-7b"
    assert "mpt-7b-chat stands in" in estimator.source(name)
    same = draw(estimator, query("mosaicml/mpt-7b-chat"))
    assert draw(estimator, query(name)).tolist() == same.tolist()
    assert "assumed" in EcdfLengths(EcdfOptions(stand_ins={})).source(name)


def test_draws_are_independent_over_requests_and_scenarios() -> None:
    drawn = draw(EcdfLengths(), query(count=3000, limit=4096), scenarios=3)
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert abs(np.corrcoef(drawn[a], drawn[b])[0, 1]) < 0.08
    assert drawn.mean() == pytest.approx(208.0, rel=0.05)


def test_scale_shifts_lengths() -> None:
    double = draw(EcdfLengths(EcdfOptions(scale=2.0)), query(count=3000, limit=8192))
    assert double.mean() == pytest.approx(416.0, rel=0.05)


def test_observations_take_over() -> None:
    before = EcdfLengths()
    few = before.fit([observed([900] * 10)])
    many = before.fit([observed([900] * 10_000)])
    unknown = before.fit([observed([900] * 10, model="new/model")])
    assert draw(before, query()).mean() < 300  # the first estimator is left as it is
    assert 300 < draw(few, query()).mean() < 800  # 10 seen against a prior of 20
    assert draw(many, query()).mean() == pytest.approx(900, rel=0.01)
    assert draw(unknown, query("new/model")).tolist() == np.full((4, 2000), 900).tolist()
    assert "10 observations" in unknown.source("new/model")


def test_censored_observations_raise_the_estimate() -> None:
    options = EcdfOptions(prior_observations=0)
    lengths = [100] * 50 + [300] * 50
    plain = EcdfLengths(options).fit([observed(lengths)])
    cut = EcdfLengths(options).fit([observed(lengths, [False] * 50 + [True] * 50)])
    assert draw(plain, query(limit=1000)).max() == 300
    assert set(np.unique(draw(cut, query(limit=1000)))) == {100, 1000}


# The others


def test_conditional_learns_prompt_length_and_task_and_shrinks() -> None:
    rng = np.random.default_rng(0)
    prompts = rng.integers(1, 1000, 4000)
    long = observed(prompts + 5, prompts=prompts.tolist(), task="copy")
    short = observed([3] * 500, task="label")
    thin = observed([5000] * 2, task="rare")
    fitted = ConditionalLengths(ConditionalOptions(shrink_observations=50)).fit([long, short, thin])
    low = draw(fitted, query(task="copy", prompts=[100] * 2000)).mean()
    high = draw(fitted, query(task="copy", prompts=[900] * 2000)).mean()
    assert low < 250
    assert high > 700
    assert draw(fitted, query(task="label")).mean() < 200
    pooled = EcdfLengths().fit([long, short, thin])
    mean = draw(pooled, query()).mean()
    shrunk = (2 * 5000 + 50 * mean) / 52
    assert draw(fitted, query(task="rare")).mean() == pytest.approx(shrunk, rel=0.1)
    assert draw(fitted, query(task="new")).tolist() == draw(pooled, query()).tolist()
    assert "'copy'" in fitted.source(VICUNA)


def test_oracle_and_fixed() -> None:
    oracle = OracleLengths(OracleOptions(output_tokens={"n": (5, 50, 500)}))
    assert draw(oracle, query(count=3, limit=100), 2).tolist() == [[5, 50, 100]] * 2
    part = LengthQuery(
        VICUNA, "", np.ones(1), np.full(1, 900), np.zeros(1), 9000, "n", np.array([2])
    )
    assert draw(oracle, part, 1).tolist() == [[500]]
    with pytest.raises(InputError, match="node 'n' has 3 given lengths"):
        draw(oracle, query(count=4))
    fixed = LengthQuery(VICUNA, "", np.array([10, 90]), np.full(2, 50), np.zeros(2, int), 100)
    assert draw(FixedLengths(), fixed, 1).tolist() == [[50, 10]]


def test_workloads() -> None:
    for name, mean in (("sharegpt", 245.6), ("azure-conv", 211.1), ("azure-code", 27.9)):
        assert workload_lengths(name).distribution.mean(10**6) == pytest.approx(mean, rel=0.01)
        drawn = draw(WorkloadLengths(WorkloadOptions(workload=name, scale=2.0)), query(count=4000))
        assert drawn.mean() == pytest.approx(2 * mean, rel=0.06)
    with pytest.raises(InputError, match="unknown workload 'sharegp'"):
        draw(WorkloadLengths(WorkloadOptions(workload="sharegp")), query())


def test_proxy_learns_from_wording() -> None:
    pytest.importorskip("sklearn", reason="needs the extra learn")
    rng = np.random.default_rng(0)
    padding = [" very" * int(n) for n in rng.integers(0, 20, 800)]
    texts = tuple(
        f"Write a{p} good story." if i % 2 else f"Label{p}: true or false?"
        for i, p in enumerate(padding)
    )
    lengths = [int(v) for v in np.where(np.arange(800) % 2, 600, 4) + rng.integers(0, 3, 800)]
    fitted = ProxyLengths(ProxyOptions(scale=1.0)).fit([observed(lengths, texts=texts)])

    def asked(text: str) -> LengthQuery:
        plain = query(count=300)
        return LengthQuery(
            VICUNA, "", plain.prompt_tokens, plain.max_tokens, plain.generated_tokens, 9000,
            prompts=(text,) * 300,
        )  # fmt: skip

    assert np.median(draw(fitted, asked("Write a poem about the rain."))) > 400
    assert np.median(draw(fitted, asked("Classify: true or false?"))) < 40
    thin = ProxyLengths().fit([observed(lengths[:30])])
    assert np.isfinite(draw(thin, query()).mean())  # too few: ecdf


def test_proxy_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "sklearn.ensemble", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'samullm-plugin\[learn\]'"):
        ProxyLengths().fit([observed([5] * 200)])


@cache
def _estimators() -> list[LengthEstimator]:
    seen = [observed(np.arange(1, 301), prompts=list(range(300)), task="t")]
    oracle = OracleLengths(OracleOptions(output_tokens={"n": tuple(range(1, 60))}))
    return [
        EcdfLengths(),
        EcdfLengths().fit(seen),
        ConditionalLengths().fit(seen),
        oracle,
        FixedLengths(),
        WorkloadLengths(),
        ProxyLengths().fit(seen),
    ]


@given(
    st.lists(
        st.tuples(st.integers(1, 5000), st.integers(1, 3000), st.integers(0, 3500)),
        min_size=1,
        max_size=50,
    ),
    st.sampled_from(["t", "other"]),
    st.integers(0, 2**31),
)
@settings(deadline=None, max_examples=25)
def test_rules_of_the_interface(rows: list[tuple[int, int, int]], task: str, seed: int) -> None:
    pytest.importorskip("sklearn", reason="needs the extra learn")
    prompts, limits, generated = (np.array(column) for column in zip(*rows, strict=True))
    asked = LengthQuery(VICUNA, task, prompts, limits, generated, 8192, "n")
    for estimator in _estimators():
        drawn = draw(estimator, asked, 3, seed)
        assert drawn.shape == (3, len(rows))
        assert np.issubdtype(drawn.dtype, np.integer)
        assert (drawn >= 1).all()
        assert (drawn <= limits).all()
        assert ((drawn > generated) | (generated >= limits)).all()
        assert (drawn == draw(estimator, asked, 3, seed)).all()
