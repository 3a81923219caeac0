"""Plans carried out by the coordinator, round after round, and what is kept of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from samullm_plugin import InputError, PluginHost
from samullm_plugin.bench.engine_bench import (
    BenchRun,
    EngineBench,
    PlannedCase,
    engine_rows,
    mean_error_pct,
)
from samullm_plugin.bench.engine_cases import CaseBuilder, EngineBenchSettings, random_model
from samullm_plugin.checkpoints.models import bundled_model, read_checkpoint
from samullm_plugin.cli.app import main
from samullm_plugin.model.application import EngineOptions, ModelSpec
from samullm_plugin.model.architecture import ModelArchitecture
from samullm_plugin.profiling.transfer import layer_key
from tests.models import BUNDLED

SCHEDULERS = ["greedy", "max-heuristic", "min-heuristic"]


def bench(folder: Path, **changes: object) -> tuple[EngineBench, list[str]]:
    said: list[str] = []
    settings = EngineBenchSettings("simulated", **{"rounds": 2, **changes})  # type: ignore[arg-type]
    return EngineBench(
        CaseBuilder(PluginHost(), settings, folder, "this machine", said.append)
    ), said


def test_simulated_runs_take_what_was_foreseen(tmp_path: Path) -> None:
    """Every scheduler's plan meets the same hidden lengths in a round, and others in the next."""
    made, said = bench(tmp_path)
    result = made.run(["small-1"], SCHEDULERS)
    assert result.left == 0
    assert len(result.runs) == 6
    for run in result.runs:
        assert run.measured_s == pytest.approx(run.foreseen_s, abs=1e-6)
        assert run.requests["finished"] == 800
        assert (tmp_path / run.directory / "metrics.json").exists()
    tokens = {r.round: {x.completion_tokens for x in result.runs if x.round == r.round}
              for r in result.runs}  # fmt: skip
    assert all(len(t) == 1 for t in tokens.values())
    assert tokens[0] != tokens[1]
    order = [line.split()[1] for line in said]
    assert order == [*SCHEDULERS, *SCHEDULERS[1:], SCHEDULERS[0]]  # nobody is always first


def test_a_call_goes_on_where_another_stopped(tmp_path: Path) -> None:
    first, _ = bench(tmp_path)
    assert first.run(["small-1"], SCHEDULERS, time_limit_s=-1.0).left == 6
    one, _ = bench(tmp_path, rounds=1)
    some = one.run(["small-1"], SCHEDULERS[:2])
    again, said = bench(tmp_path)
    result = again.run(["small-1"], SCHEDULERS)
    assert len(said) == 4  # a further round does not change the first
    assert [r for r in result.runs if r in some.runs] == list(some.runs)
    assert [p.plan for p in result.plans[:2]] == [p.plan for p in some.plans]
    other, said = bench(tmp_path, seed=1)
    other.run(["small-1"], SCHEDULERS[:1])
    assert len(said) == 2  # other lengths: other runs


def test_rows_pair_rounds() -> None:
    """Speedups compare what ran on the same lengths, not medians of different rounds."""

    def run(scheduler: str, number: int, seconds: float) -> BenchRun:
        return BenchRun(
            "app", scheduler, number, seconds, seconds * 0.9, 3, 0, 2.0, 0.0, {"finished": 1}, 1,
            0.1, 1, {}, "", 0.0, 0.0,
        )  # fmt: skip

    plans = [PlannedCase("app", n, planned_s=11.0) for n in ("greedy", "min-heuristic")]
    runs = [
        run("greedy", 0, 10.0), run("min-heuristic", 0, 20.0),
        run("greedy", 1, 40.0), run("min-heuristic", 1, 20.0),
        run("greedy", 2, 10.0), run("other", 2, 1.0),
    ]  # fmt: skip
    greedy, least = engine_rows(plans, runs)
    assert greedy.speedup_min is not None
    assert (greedy.speedup_min.least, greedy.speedup_min.most) == (0.5, 2.0)
    assert greedy.speedup_max is None
    assert least.speedup_min is None
    assert greedy.measured_s is not None
    assert greedy.measured_s.median == 10.0
    assert greedy.planned_error_pct == pytest.approx((10.0, -72.5, 10.0))
    assert greedy.foreseen_error_pct == pytest.approx((-10.0,) * 3)
    assert mean_error_pct([greedy]) == pytest.approx((10 + 72.5 + 10) / 3)
    assert mean_error_pct([]) is None


@pytest.mark.parametrize("name", BUNDLED)
def test_a_stand_in_has_the_sizes(tmp_path: Path, name: str) -> None:
    """Every bundled model's weights can be made up for engines, none of its own being there."""
    model = bundled_model(name)
    made = random_model(model, tmp_path)
    assert made.path is not None
    found, _ = read_checkpoint(Path(made.path))
    assert model.architecture is not None
    if model.architecture.mlp == "plain":  # learned positions and biases are not in the sizes
        assert found.num_layers == model.architecture.num_layers
        assert found.intermediate_size == model.architecture.intermediate_size
    else:
        assert layer_key(found) == layer_key(model.architecture)
        assert found.weight_bytes == pytest.approx(model.architecture.weight_bytes, rel=0.001)
    assert dict(made.engine.extra) == {"load_format": "dummy"}


def test_no_stand_in_for_sizes_no_model_kind_has(tmp_path: Path) -> None:
    sizes = ModelArchitecture(2, 64, 4, 1, 16, 128, 512, mlp="plain")
    with pytest.raises(InputError, match="fewer key-value than query heads"):
        random_model(ModelSpec("m", 128, sizes, engine=EngineOptions()), tmp_path)
    with pytest.raises(InputError, match="its sizes are not known"):
        random_model(ModelSpec("m", 128), tmp_path)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["bench", "--executor", "simulated", "--apps", "small-1", "--seeds", "1"]
    words += ["--schedulers", "max-heuristic,min-heuristic", "--work-dir", str(tmp_path / "w")]
    out = tmp_path / "out.json"
    assert main([*words, "--time-limit-s", "0"]) == 0
    assert "2 runs are left: the same command goes on" in capsys.readouterr().err
    assert main([*words, "--output-json", str(out)]) == 0
    assert "1/1" in capsys.readouterr().err
    result = json.loads(out.read_text())
    assert result["runs_left"] == 0
    assert result["mean_error_on_true_lengths_pct"] == pytest.approx(0, abs=1e-6)
    assert [r["scheduler"] for r in result["rows"]] == ["max-heuristic", "min-heuristic"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--work-dir", "x"], "--work-dir needs --executor"),
        (["--replan"], "--replan needs --executor"),
        (["--executor", "simulated", "--shifts", "longer"], "--shifts has no effect"),
        (["--executor", "simulatd"], "did you mean 'simulated'"),
        (["--executor", "simulated", "--executor-option", "x=1"], "unknown option 'x'"),
        (["--executor", "simulated", "--profile", "none.json"], "none.json: cannot be read"),
        (["--executor", "simulated", "--latency-model", "linaer"], "did you mean 'linear'"),
    ],
)
def test_wrong_input_of_the_command(
    capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert main(["bench", "--apps", "small-1", *words]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert "Traceback" not in err
