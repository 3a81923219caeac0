"""``samullm simulate`` from outside."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from samullm_plugin.cli.app import main

REQUESTS = [
    {"id": "a", "prompt_tokens": 30, "output_tokens": 3},
    {"id": "b", "prompt_tokens": 50, "output_tokens": 2, "arrival_step": 1},
]
ENGINE = "max_num_batched_tokens: 40\nnum_blocks: 50\nlatency: {by_tokens: 0.5}\n"

Files = Callable[..., tuple[str, ...]]


@pytest.fixture
def files(tmp_path: Path) -> Files:
    def write(requests: object = REQUESTS, engine: str = ENGINE) -> tuple[str, ...]:
        text = requests
        if isinstance(requests, list):
            text = "".join(json.dumps(r) + "\n" for r in requests)
        (tmp_path / "requests.jsonl").write_text(str(text))
        (tmp_path / "engine.yaml").write_text(engine)
        return (
            "simulate",
            f"--requests={tmp_path / 'requests.jsonl'}",
            f"--engine={tmp_path / 'engine.yaml'}",
        )

    return write


def test_json_and_steps(files: Files, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    steps = tmp_path / "steps.jsonl"
    assert main([*files(), "--output-json", "-", f"--steps={steps}"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["makespan_s"] == 2.0
    assert result["throughput"]["requests_per_s"] == 1.0
    assert result["preemptions"] == 0
    assert result["kv_cache"]["peak_blocks"] == 3 + 3
    rows = [json.loads(line) for line in steps.read_text().splitlines()]
    assert [r["step"] for r in rows] == [0, 1, 2, 3]
    assert [r["scheduled"] for r in rows] == [
        {"a": 30},
        {"a": 1, "b": 39},
        {"a": 1, "b": 11},
        {"b": 1},
    ]
    assert [r["finished"] for r in rows] == [[], [], ["a"], ["b"]]
    assert all(r["preempted"] == [] for r in rows)


def test_table_is_for_people(files: Files, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(list(files())) == 0
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "Makespan" in captured.err


@pytest.mark.parametrize(
    ("request_line", "message"),
    [
        ('{"id": "a", "prompt_tokens": 0, "output_tokens": 1}', "line 2: prompt_tokens"),
        ('{"id": "a", "prompt_tokens": 3, "output_tokens": -4}', "line 2: output_tokens"),
        ('{"id": "a", "prompt_tokens": 8192, "output_tokens": 1}', "line 2: the prompt of 8192"),
        ('{"id": "a", "prompt_tokens": 3, "output_tokens": 1, "x": 1}', "line 2: x: unknown field"),
        ('{"id": "a", "prompt_tokens": 3}', "line 2: output_tokens: missing"),
        ('{"id": "a", "output_tokens": 3}', "line 2: give either prompt_tokens or"),
        ('{"id": "b", "prompt_tokens": 3, "output_tokens": 3}', "line 2: id 'b' is that of line 1"),
        ('{"id": "a", ', "line 2: is not JSON"),
        ("[]", "line 2: must be a JSON object"),
        ('{"id": "a", "prompt_tokens": 3, "output_tokens": 1, "arrival_s": 1.0}', "arrival_step"),
    ],
)
def test_wrong_requests(
    files: Files, capsys: pytest.CaptureFixture[str], request_line: str, message: str
) -> None:
    good = '{"id": "b", "prompt_tokens": 3, "output_tokens": 3, "arrival_step": 4}\n'
    assert main(list(files(good + request_line))) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert "Traceback" not in captured.err
    assert captured.out == ""


@pytest.mark.parametrize(
    ("engine", "message"),
    [
        ("num_blocks: 0", "num_blocks"),
        ("max_seqs: 3", "max_seqs: unknown field"),
        ("block_size: -16", "block_size"),
        ("scheduling_policy: lifo", "scheduling_policy"),
        ("latency: {by_tokens: {knots: [2, 1], values: [1, 1]}}", "knots must increase"),
        ("latency: {by_token: 1}", "latency.by_token: unknown field"),
        ("num_blocks: 3", "line 2: request 'b' needs 4 KV-cache blocks and the engine has 2"),
    ],
)
def test_wrong_engine(
    files: Files, capsys: pytest.CaptureFixture[str], engine: str, message: str
) -> None:
    assert main(list(files(engine=engine))) == 2
    assert message in capsys.readouterr().err


def test_token_ids_and_lengths_mix(files: Files, capsys: pytest.CaptureFixture[str]) -> None:
    ids = list(range(1, 41))
    requests = [
        {"id": 1, "prompt_token_ids": ids, "output_tokens": 1},
        {"id": 2, "prompt_tokens": 40, "output_tokens": 1, "arrival_step": 1},
        {"id": 3, "prompt_token_ids": ids, "output_tokens": 1, "arrival_step": 1},
    ]
    engine = "enable_prefix_caching: true\nlatency: {by_tokens: 1.0}"
    assert main([*files(requests, engine), "--output-json=-"]) == 0
    assert json.loads(capsys.readouterr().out)["cached_tokens"] == 32
