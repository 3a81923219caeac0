from __future__ import annotations

import csv
import json
import re
import zlib
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import numpy as np
import pytest

from samullm_plugin.app.loading import load_application
from samullm_plugin.checkpoints.models import bundled_architecture
from samullm_plugin.cli.app import main
from samullm_plugin.errors import InputError
from samullm_plugin.model.application import ModelSpec
from samullm_plugin.profiling.calibration import setting_key
from samullm_plugin.profiling.profile_files import read_profile

Run = Callable[..., CompletedProcess[str]]
COLUMNS = [
    "device", "model", "tp", "phase", "batch_size", "context_tokens", "max_seq_len", "new_tokens",
    "padded_tokens", "shape", "iter_s", "comp_s", "sample_s", "prep_s", "meta_s", "warmup",
]  # fmt: skip
LLAMA, MPT, DOLLY = "NousResearch/Llama-2-7b-hf", "mosaicml/mpt-7b-chat", "databricks/dolly-v2-12b"


def made_up_rows(model: str, tp: int, sizes: list[int], speed: float = 1.0) -> list[list[object]]:
    """Iterations in proportion to the model's weights."""
    found = bundled_architecture(model)
    assert found is not None
    weights = found[0].weight_bytes / tp / 2e12
    rng = np.random.default_rng(zlib.crc32(model.encode()) + tp)
    rows: list[list[object]] = []
    for batch in sizes:
        for context, longest, new, phase, shape in (
            (batch, 1, batch, "decode", "uniform"),
            (batch * 800, 800, batch, "decode", "uniform"),
            (batch + 2047, 2048, batch, "decode", "skew"),
            (2048, max(2048 // batch, 1), batch * max(2048 // batch, 1), "prefill", "uniform"),
        ):
            pairs = new * longest / 2 if phase == "prefill" else 0
            work = weights * (1 + new / 150) + 3e-7 / tp * context * (phase == "decode")
            comp = speed * (work + 1e-10 * pairs) * (1 + 0.002 * rng.standard_normal())
            host = 0.001 + 1e-5 * batch
            rows.append(
                ["A100-80GB", model, tp, phase, batch, context, longest, new, new, shape,
                 comp + host + 0.0005, comp, host, 0, 0.0005, 0]
            )  # fmt: skip
    return rows


def write(path: Path, rows: list[list[object]], columns: list[str] = COLUMNS) -> Path:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([columns, *rows])
    return path


FIT = [1, 8, 16, 32, 64, 96, 128, 192, 256, 384, 512]
CHECK = [4, 24, 80, 160, 300]


def test_fit_then_check_on_other_batches_models_and_sizes(samullm: Run, tmp_path: Path) -> None:
    train = [r for m in (LLAMA, MPT, DOLLY) for r in made_up_rows(m, 1, FIT)]
    train += [r for m in (LLAMA, MPT) for r in made_up_rows(m, 2, FIT)]
    test = made_up_rows(LLAMA, 1, CHECK) + made_up_rows(DOLLY, 2, CHECK)
    test += made_up_rows("lmsys/vicuna-13b-v1.5", 1, CHECK)
    table = write(tmp_path / "train.csv", train)
    done = samullm(
        "profile", "fit", "--iterations", str(table), "--output", "p.json", "--transfer",
        "--output-json", "fit.json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "transfer errs by" in done.stderr
    assert len(json.loads((tmp_path / "fit.json").read_text())["models"]) == 5
    assert read_profile(tmp_path / "p.json").transfer is not None
    held_out = write(tmp_path / "test.csv", test)
    check = samullm(
        "profile", "check", "--profile", "p.json", "--iterations", str(held_out),
        "--output-json", "-",
    )  # fmt: skip
    assert check.returncode == 0, check.stderr
    report = json.loads(check.stdout)
    assert {"mape_pct", "median_ape_pct", "p95_ape_pct", "n"} <= set(report["overall"])
    assert report["overall"]["n"] == len(test)
    groups = {(g["model"], g["tp"], g["phase"], g["shape"]): g for g in report["groups"]}
    assert len(groups) == 9
    measured = groups[LLAMA, 1, "decode", "uniform"]
    assert measured["basis"] == "measured"
    assert measured["mape_pct"] < 3
    assert groups[DOLLY, 2, "prefill", "uniform"]["basis"] == "transferred"
    assert groups[DOLLY, 2, "decode", "uniform"]["mape_pct"] < 30


def test_one_model_of_a_table_without_names(samullm: Run, tmp_path: Path) -> None:
    keep = [COLUMNS.index(c) for c in ("phase", "batch_size", "context_tokens", "max_seq_len")]
    keep += [COLUMNS.index(c) for c in ("new_tokens", "iter_s")]
    rows = [[r[i] for i in keep] for r in made_up_rows(LLAMA, 1, FIT)]
    write(tmp_path / "i.csv", rows, [COLUMNS[i] for i in keep])
    done = samullm(
        "profile", "fit", "--iterations", "i.csv", "--output", "p.json", "--model", "me/mine",
        "--tp", "2", "--device", "my-gpu",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (entry,) = read_profile(tmp_path / "p.json").models
    assert (entry.model, entry.tensor_parallel_size) == ("me/mine", 2)
    assert "no separate device times" in entry.undetermined[0]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["fit", "--iterations", "one.csv", "--output", "p.json"], "one.csv: .*two batch sizes"),
        (["fit", "--iterations", "bad.csv", "--output", "p.json"], "bad.csv, row 3: iter_s"),
        (["fit", "--iterations", "short.csv", "--output", "p.json"], "no column iter_s"),
        (["fit", "--iterations", "none.csv", "--output", "p.json"], "none.csv"),
        (
            ["fit", "--iterations", "good.csv", "--output", "p.json", "--transfer"],
            "good.csv: transfer needs .* two models",
        ),
        (
            [
                "fit",
                "--iterations",
                "good.csv",
                "--output",
                "p.json",
                "--architectures",
                "config.json",
            ],
            "not modelled",
        ),
        (["fit", "--iterations", "good.csv", "--output", "no/p.json"], "cannot be written"),
        (["check", "--iterations", "good.csv", "--profile", "bad.csv"], "bad.csv: not a profile"),
        (["check", "--iterations", "other.csv"], "has no bundled profile"),
    ],
)
def test_wrong_input_is_named_and_exits_with_two(
    samullm: Run, tmp_path: Path, arguments: list[str], said: str
) -> None:
    rows = made_up_rows(LLAMA, 1, FIT)
    write(tmp_path / "good.csv", rows)
    write(tmp_path / "one.csv", made_up_rows(LLAMA, 1, [8]))
    bad = [list(r) for r in rows]
    bad[1][COLUMNS.index("iter_s")] = -1
    write(tmp_path / "bad.csv", bad)
    write(tmp_path / "short.csv", [r[:-6] for r in rows], COLUMNS[:-6])
    write(tmp_path / "other.csv", [["my-gpu", *r[1:]] for r in rows])
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "new", "auto_map": {"AutoModel": "m.M"}})
    )
    done = samullm("profile", *arguments)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr

    assert re.search(said, done.stderr), done.stderr


def test_bundled_profile_is_checked_by_default(samullm: Run, tmp_path: Path) -> None:
    write(tmp_path / "i.csv", made_up_rows(LLAMA, 1, CHECK))
    done = samullm("profile", "check", "--iterations", "i.csv", "--output-json", "-")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["groups"][0]["basis"] == "measured"


CONFIG = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 176, "vocab_size": 512,
    "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 1024,
}  # fmt: skip


def test_engine_arguments_make_the_engine_that_they_make_in_an_application(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is measured is kept under the settings, and found again by plans with the same ones."""
    pytest.importorskip("vllm")
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text(json.dumps(CONFIG))
    seen: list[ModelSpec] = []

    def measured(executor: object, model: ModelSpec, *_: object, **__: object) -> None:
        seen.append(model)
        raise InputError("seen")

    monkeypatch.setattr("samullm_plugin.measuring.engine.measure", measured)
    arguments = {
        "enable_prefix_caching": "true", "block_size": "64", "max_num_seqs": "9",
        "dtype": "float32", "cudagraph_capture_sizes": "[1, 2]", "seed": "3",
    }  # fmt: skip
    words = [w for name, value in arguments.items() for w in ("--engine-arg", f"{name}={value}")]
    output = str(tmp_path / "p.json")
    model = str(tmp_path / "m")
    assert main(["profile", "latency", "--model", model, "--output", output, *words]) == 2
    given = ", ".join(f"{name}: {value}" for name, value in arguments.items())
    (tmp_path / "r.jsonl").write_text('{"prompt": "x"}')
    (tmp_path / "app.yaml").write_text(
        "version: 1\nname: a\nmodels: {m: {model: m, path: m, engine_args: "
        f"{{max_num_batched_tokens: 2048, {given}}}}}}}\n"
        "nodes: {n: {model: m, requests: r.jsonl, sampling_params: {max_tokens: 4}}}\n"
    )
    planned = load_application(tmp_path / "app.yaml").app.nodes[0].model
    assert seen[0].engine.enable_prefix_caching
    assert setting_key(seen[0], "core", 1, 1) == setting_key(planned, "core", 1, 1)


def test_what_profile_latency_cannot_measure_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text(json.dumps(CONFIG))
    for words, told in (
        (["--executor", "simulated"], "--executor simulated: its times come from a latency model"),
        (["--tp", "0"], "--tp 0: write sizes as in --tp 1,2"),
        (["--kv-cache-tokens", "100"], "--kv-cache-tokens 100: one sequence of 1024 does not fit"),
        (["--engine-arg", "block_size=x"], "--engine-arg.block_size: must be a whole number"),
        (["--engine-arg", "tensor_parallel_size=2"], "tensor_parallel_size: give it as --tp"),
        (["--max-num-seqs", "8", "--engine-arg", "max_num_seqs=9"], "max_num_seqs: there is an"),
        (["--model", "nowhere"], "nowhere: there is no such file"),
        (["--model", str(tmp_path / "m" / ".")], "another folder is called m as well"),
        (["--model", "other", "--name", "a"], "--name names one model"),
    ):
        model, output = str(tmp_path / "m"), str(tmp_path / "p.json")
        given = ["profile", "latency", "--model", model, "--output", output, *words]
        assert main(given) == 2
        assert told in capsys.readouterr().err
        assert not (tmp_path / "p.json").exists()
