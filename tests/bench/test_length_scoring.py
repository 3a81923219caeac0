"""Scores of length estimators, worked out by hand, and what errors do to plans."""

from __future__ import annotations

import json

import numpy as np
import pytest

from samullm_plugin import InputError, LengthEstimator, LengthObservations, PluginError, PluginHost
from samullm_plugin.bench import length_scoring as scoring
from samullm_plugin.bench.length_plans import PlanBench, choose_groups
from samullm_plugin.cli.app import main
from samullm_plugin.planning.applications import build_named
from samullm_plugin.profiling.observations import ObservedLengths


@pytest.fixture(scope="module")
def host():
    return PluginHost()


def group(outputs, *, model="own/model", task="", limit=0, censored=None, prompts=None):
    n = len(outputs)
    return ObservedLengths(
        LengthObservations(
            model,
            task,
            np.full(n, 20) if prompts is None else np.array(prompts),
            np.array(outputs),
            np.zeros(n, bool) if censored is None else np.array(censored),
        ),
        np.full(n, limit),
    )


class Constant(LengthEstimator):
    """Says the mean of what it saw."""

    name = "constant"
    value = 0

    def fit(self, observations):
        fitted = Constant()
        fitted.value = round(float(np.concatenate([o.output_tokens for o in observations]).mean()))
        return fitted

    def sample(self, query, rng, num_scenarios):
        return np.full((num_scenarios, len(query)), min(self.value, query.max_tokens.min()))


def scored(estimator, groups, folds, **changes):
    how = {"samples": 20, "seed": 0, "default_limit": 1000} | changes
    return scoring.score(estimator, "it", groups, folds, **how)


def test_scores_are_what_they_are_by_hand():
    seen = group([10, 10, 10, 40])
    fold = scoring.Fold((np.array([0, 1, 2]),), (np.array([3]),))
    total, model = scored(Constant(), [seen], [fold])
    mean_level = np.mean(scoring.LEVELS)
    assert total.pinball_tokens == pytest.approx(30 * mean_level)  # 40 seen, 10 said
    assert total.coverage_50 == total.coverage_80 == 0.0
    assert total.total_error == pytest.approx(10 / 40 - 1)
    assert (model.model, model.num_scored) == ("own/model", 1)
    fold = scoring.Fold((np.array([3]),), (np.array([0, 1]),))
    total = scored(Constant(), [seen], [fold])[0]
    assert total.pinball_tokens == pytest.approx(30 * (1 - mean_level))  # 10 seen, 40 said
    assert total.total_error == pytest.approx(3.0)


def test_every_observation_is_predicted_once_and_never_learned_from_at_once():
    groups = [group(range(1, 24)), group(range(1, 8), task="t")]
    for folds in (scoring.make_folds(groups, 5, None, 3), scoring.make_folds(groups, 5, 0.3, 3)):
        for fold in folds:
            for train, test, g in zip(fold.train, fold.test, groups, strict=True):
                assert sorted([*train, *test]) == list(range(len(g)))
    folds = scoring.make_folds(groups, 5, None, 3)
    for k, g in enumerate(groups):
        assert sorted(np.concatenate([f.test[k] for f in folds])) == list(range(len(g)))
    again = scoring.make_folds(groups, 5, None, 3)
    assert all((a.test[0] == b.test[0]).all() for a, b in zip(folds, again, strict=True))


def test_what_was_cut_elsewhere_is_learned_from_but_not_scored():
    seen = group([50, 50, 7, 9], limit=50, censored=[True, True, True, False])
    assert scoring.scored_rows(seen).tolist() == [True, True, False, True]


def test_the_oracle_is_perfect_and_the_limit_is_not(host):
    groups = [group(range(10, 60), limit=64)]
    folds = scoring.make_folds(groups, 5, None, 0)
    best = scored(scoring.create(host, "oracle", groups), groups, folds)[0]
    assert (best.pinball_tokens, best.coverage_50, best.total_error) == (0.0, 1.0, 0.0)
    worst = scored(scoring.create(host, "fixed", groups), groups, folds)[0]
    assert worst.total_error == pytest.approx(64 / 34.5 - 1)


def test_an_estimator_that_learned_the_distribution_is_calibrated(host):
    rng = np.random.default_rng(5)
    groups = [group(rng.integers(10, 500, 800), limit=600)]
    folds = scoring.make_folds(groups, 4, None, 0)
    found = scored(scoring.create(host, "ecdf", groups), groups, folds, samples=100)[0]
    assert found.coverage_50 == pytest.approx(0.5, abs=0.06)
    assert found.coverage_80 == pytest.approx(0.8, abs=0.05)
    assert abs(found.total_error) < 0.05
    # the loss of a uniform distribution's own quantiles: width times the mean of q (1 - q) / 2
    expected = 490 * np.mean([q * (1 - q) / 2 for q in scoring.LEVELS])
    assert found.pinball_tokens == pytest.approx(expected, rel=0.06)


def test_knowing_the_prompt_helps_where_it_tells(host):
    rng = np.random.default_rng(6)
    prompts = rng.integers(10, 200, 600)
    groups = [group(2 * prompts + rng.integers(0, 20, 600), limit=600, prompts=prompts)]
    folds = scoring.make_folds(groups, 4, None, 0)
    ecdf, conditional = (
        scored(scoring.create(host, name, groups), groups, folds, samples=50)[0].pinball_tokens
        for name in ("ecdf", "conditional:prompt_bins=8")
    )
    assert conditional < 0.7 * ecdf


class Broken(Constant):
    def fit(self, observations):
        return self

    def sample(self, query, rng, num_scenarios):
        raise ZeroDivisionError("no idea")


def test_an_estimator_that_raises_is_named():
    groups = [group([5, 6])]
    folds = scoring.make_folds(groups, 2, None, 0)
    with pytest.raises(PluginError, match="length-estimator it raised ZeroDivisionError: no idea"):
        scored(Broken(), groups, folds)


def test_one_observation_cannot_be_divided():
    with pytest.raises(InputError, match="own/model"):
        scoring.make_folds([group([5])], 5, None, 0)


def test_plans_are_carried_out_on_what_was_held_out(host):
    loaded = build_named(host, "small-1")
    rng = np.random.default_rng(2)
    names = [n.model.name for n in loaded.app.nodes]
    groups = [
        group(rng.integers(1, 40, 300), model=names[0], limit=256),
        group(rng.integers(200, 256, 300), model=names[1], limit=256),
    ]
    folds = scoring.make_folds(groups, 5, None, 0)
    notes = []
    chosen = choose_groups(loaded.app, groups, notes)
    assert (chosen, notes) == ((0, 1), [])
    bench = PlanBench(
        host,
        loaded.app,
        loaded.cluster,
        latency_model="linear",
        scheduler="greedy",
        scenarios=1,
        seed=0,
    )
    experiment = bench.deal(groups, chosen, folds[0], 0)
    truth = experiment.problem.scenarios[0].output_tokens
    held = groups[0].observations.output_tokens[folds[0].test[0]]
    assert set(truth[0]) <= set(held)
    assert truth[1].min() >= 200
    informed = [bench.informed_s(experiment)]
    best = bench.effect("oracle", [experiment], None, informed)
    assert (best.loss, best.error) == (0.0, 0.0)
    fixed = scoring.create(host, "fixed", groups)
    worst = bench.effect("fixed", [experiment], fixed, informed)
    assert worst.error > 0.1  # all outputs at their limits are too long
    assert worst.informed_s == best.realised_s


def test_models_nobody_observed_get_a_stand_in_and_a_note(host):
    app = build_named(host, "small-1").app
    notes = []
    assert choose_groups(app, [group([5, 6])], notes) == (0, 0)
    assert all("own/model" in n and "stand in" in n for n in notes)
    assert len(notes) == 2


@pytest.fixture
def observations(tmp_path):
    rng = np.random.default_rng(1)
    path = tmp_path / "seen.jsonl"
    rows = [
        {"model": m, "prompt_tokens": 9, "output_tokens": int(rng.integers(1, 99)), "task": t}
        for m in ("lmsys/vicuna-13b-v1.5", "own/model")
        for t in ("", "summary")
        for _ in range(30)
    ]
    path.write_text("\n".join(json.dumps(r) for r in rows))
    return path


def test_the_command_scores_and_plans(observations, capsys):
    words = ["bench", "lengths", "--observations", str(observations), "--samples", "20"]
    more = ["--estimators", "ecdf fixed oracle", "--app", "small-1", "--draws", "1"]
    assert main([*words, *more, "--output-json", "-"]) == 0
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert [s["estimator"] for s in found["scores"] if not s["model"]] == [
        "ecdf",
        "fixed",
        "oracle",
    ]
    assert {p["estimator"]: p["loss"] for p in found["plans"]}["oracle"] == 0.0
    assert found["num_observations"] == 120
    assert "pinball tokens" in err
    assert "informed s" in err


def test_an_estimator_without_knowledge_does_not_hide_the_others(observations, capsys):
    words = ["bench", "lengths", "--observations", str(observations), "--app", "none"]
    estimators = "ecdf oracle:output_tokens={}"
    assert main([*words, "--samples", "20", "--estimators", estimators]) == 0
    err = capsys.readouterr().err
    assert "oracle:output_tokens={}: length-estimator oracle" in err
    assert "ecdf" in err


@pytest.mark.parametrize(
    ("words", "fault"),
    [
        (["--estimators", "edcf"], "did you mean 'ecdf'"),
        (["--estimators", " "], "--estimators is empty"),
        (["--estimators", "ecdf:scal=2"], "scal"),
        (["--holdout", "1.5"], "--holdout is 1.5"),
        (["--app", "smal-1"], "did you mean"),
        (["--scheduler", "gredy"], "did you mean 'greedy'"),
        (["--latency-model", "liner"], "did you mean 'linear'"),
    ],
)
def test_wrong_input_is_one_message_and_exit_code_2(observations, capsys, words, fault):
    assert main(["bench", "lengths", "--observations", str(observations), *words]) == 2
    err = capsys.readouterr().err
    assert fault in err
    assert "Traceback" not in err


def test_a_file_that_is_not_there_is_exit_code_2(capsys):
    assert main(["bench", "lengths", "--observations", "nowhere.jsonl"]) == 2
    assert "nowhere.jsonl" in capsys.readouterr().err
    assert main(["bench", "lengths"]) == 2
