"""Options that contradict: one message with field and remedy, exit code 2, nothing started."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from samullm_plugin.cli.app import main

LARGE = {
    "architectures": ["IQuestLoopCoderForCausalLM"],
    "model_type": "llama",
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "num_hidden_layers": 80,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
    "torch_dtype": "bfloat16",
}


def application(folder: Path, **sections: object) -> Path:
    """Write an application of two nodes, one of them large; its executor is given."""
    model = folder / "large"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(LARGE))
    rows = "".join(
        json.dumps({"id": f"r{k}", "prompt_token_ids": [1] * 64}) + "\n" for k in range(400)
    )
    (folder / "rows.jsonl").write_text(rows)
    app = {
        "version": 1,
        "name": "large",
        "models": {"large": {"model": str(model), "engine_args": {"load_format": "dummy"}}},
        "nodes": {
            "judge": {
                "model": "large",
                "requests": "rows.jsonl",
                "sampling_params": {"max_tokens": 200},
            }
        },
        "cluster": {"gpus": 4, "gpu": "A100-80GB", "nvlink": 2},
        **sections,
    }
    path = folder / "app.yaml"
    path.write_text(yaml.safe_dump(app))
    return path


def refusal(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Return the one line that a refused command says."""
    assert main([str(a) for a in arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "Traceback" not in err
    return " ".join(err.split())


def assert_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str, app: Path, said: str
) -> None:
    """Have a command refused that leaves nothing behind."""
    output = ("--output-dir", tmp_path / "run") if command == "run" else ()
    assert said in refusal(capsys, command, app, *output)
    assert not (tmp_path / "run").exists()


@pytest.mark.vllm
def test_stages_of_a_model_that_vllm_cannot_divide(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    app, stages = application(tmp_path, executor="vllm"), ("--pipeline-parallel-sizes", "1,2")
    said = (
        "large: the installed vLLM cannot divide IQuestLoopCoderForCausalLM into pipeline stages; "
        "planner.pipeline_parallel_sizes must be [1] or left out"
    )
    assert said in refusal(capsys, "plan", app, *stages)
    assert said in refusal(capsys, "run", app, *stages, "--output-dir", tmp_path / "run")
    assert not (tmp_path / "run").exists()
    assert main(["plan", str(app), "--scheduler", "max-heuristic"]) == 0
    config = tmp_path / "large/config.json"
    config.write_text(json.dumps({**LARGE, "architectures": ["LlamaForCausalLM"]}))
    assert main(["plan", str(app), *stages, "--scheduler", "max-heuristic"]) == 0


@pytest.mark.vllm
def test_a_model_that_needs_stages_and_cannot_have_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cluster = {"gpus": 4, "gpu": "A100-80GB", "nvlink": 1}
    app = application(tmp_path, executor="vllm", cluster=cluster)
    said = refusal(capsys, "plan", app)
    assert "cannot divide IQuestLoopCoderForCausalLM" in said
    assert "give the cluster larger ones (nvlink)" in said


def test_more_prepared_engines_than_the_host_holds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cluster = {"gpus": 4, "gpu": "A100-80GB", "nvlink": 2, "host_memory_gib": 2}
    said = refusal(capsys, "plan", application(tmp_path, cluster=cluster), "--prepared-starts")
    assert "cluster.host_memory_gib 2.0 has room for no prepared engine" in said
    assert "or leave prepared_starts out" in said


@pytest.mark.vllm
def test_starts_are_prepared_by_executors_that_can(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fresh = {"type": "vllm", "options": {"start_method": "fresh", "platform": "cpu"}}
    app = application(tmp_path, executor=fresh, planner={"prepared_starts": True})
    said = refusal(capsys, "run", app, "--output-dir", tmp_path / "run")
    assert "planner.prepared_starts is true, but executor vllm with these options" in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("command", "given", "said"),
    [
        ("plan", {"planner": {"sleeping_engines": True, "fusion": False}}, "with fusion: false"),
        ("plan", {"host_memory_gib": 0.5}, "host_memory_gib 0.5 has room for no engine that"),
        (
            "run",
            {"executor": {"type": "vllm", "options": {"platform": "cuda"}}},
            "executor vllm with these options cannot put engines to sleep",
        ),
        (
            "run",
            {"executor": {"type": "ray", "options": {"address": "1.2.3.4:5"}}},
            "executor ray with these options cannot put engines to sleep",
        ),
    ],
)
def test_engines_that_are_to_sleep_where_none_can(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    command: str,
    given: dict[str, Any],
    said: str,
) -> None:
    cluster = {"gpus": 4, "gpu": "A100-80GB", "nvlink": 2}
    if "host_memory_gib" in given:
        cluster["host_memory_gib"] = given.pop("host_memory_gib")
    given["planner"] = {"sleeping_engines": True, **given.get("planner", {})}
    app = application(tmp_path, cluster=cluster, **given)
    assert_refused(tmp_path, capsys, command, app, said)


@pytest.mark.parametrize(
    ("executor", "options", "said"),
    [
        ("simulated", ["sleep_mode=true"], "sleep_mode"),
        pytest.param(
            "vllm",
            ["sleep_mode=true", "platform=cpu"],
            "executor vllm: sleep_mode needs CUDA; leave it out on a CPU",
            marks=pytest.mark.vllm,
        ),
    ],
)
def test_sleep_with_an_executor_that_cannot(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    executor: str,
    options: list[str],
    said: str,
) -> None:
    app = application(tmp_path, cluster={"gpus": 1, "gpu": "H100-80GB", "nvlink": 1})
    config = tmp_path / "large/config.json"
    config.write_text(
        json.dumps({**LARGE, "num_hidden_layers": 4, "architectures": ["LlamaForCausalLM"]})
    )
    words = [w for o in options for w in ("--executor-option", o)]
    target = ("run", app, "--executor", executor, *words, "--output-dir", tmp_path / "run")
    assert said in refusal(capsys, *target)
    assert not (tmp_path / "run").exists()


SHARED = {"gpus": 4, "gpu": "A100-80GB", "nvlink": 2, "engines_per_gpu": 2, "slowdown": 1.5}


@pytest.mark.parametrize(
    ("command", "given", "said"),
    [
        (
            "plan",
            {"cluster": {**SHARED, "engines_per_gpu": 16}},
            "fits on no set of devices of the cluster: at best a KV cache of 0 tokens is left, and "
            "max_model_len is 4096; add devices, larger NVLink groups or memory, or lower "
            "max_model_len, or lower cluster.engines_per_gpu",
        ),
        (
            "plan",
            {"cluster": {**SHARED, "nvlink": 4}, "planner": {"pipeline_parallel_sizes": [2]}},
            "pipeline_parallel_sizes 2: no replica of",
        ),
        (
            "run",
            {"executor": {"type": "ray", "options": {"address": "1.2.3.4:5"}}, "cluster": SHARED},
            "cluster.engines_per_gpu is above 1, but executor ray has one engine on a GPU at a "
            "time; leave it out, or take another executor, such as vllm",
        ),
    ],
)
def test_gpus_that_engines_cannot_share(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    command: str,
    given: dict[str, Any],
    said: str,
) -> None:
    app = application(tmp_path, **given)
    assert_refused(tmp_path, capsys, command, app, said)
