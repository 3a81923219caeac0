"""Closed, full and broken standard streams end no command, and no run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

SAMULLM = f"{sys.executable} -m samullm_plugin"


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("app with spaces é")
    node = {"model": "a", "requests": "r.jsonl", "sampling_params": {"max_tokens": 9}}
    spec = {
        "version": 1,
        "name": "t",
        "models": {"a": {"model": "lmsys/vicuna-13b-v1.5"}},
        "nodes": {"x": node},
        "cluster": {"gpus": 1},
        "planner": {"scheduler": "max-heuristic"},
    }
    (folder / "app.yaml").write_text(yaml.safe_dump(spec))
    lines = (json.dumps({"id": str(i), "prompt": "hello"}) for i in range(20))
    (folder / "r.jsonl").write_text("\n".join(lines))
    return folder


@pytest.mark.parametrize(
    "streams",
    [">&-", "2>&-", ">&- 2>&-", "<&- >&- 2>&-", ">/dev/full 2>/dev/full", "2>&1 | true"],
)
def test_a_run_goes_on_whatever_its_streams_are(app: Path, tmp_path: Path, streams: str) -> None:
    out = tmp_path / "run"
    run = f"{SAMULLM} run '{app}/app.yaml' --output-dir {out}"
    command = f"set -o pipefail; {run} {streams}"
    done = subprocess.run(["bash", "-c", command], check=False, capture_output=True, timeout=120)
    assert done.returncode == 0
    outputs = (out / "outputs/x.jsonl").read_text().splitlines()
    assert [json.loads(line)["custom_id"] for line in outputs] == [str(i) for i in range(20)]
    for line in (out / "events.jsonl").read_text().splitlines():
        assert "kind" in json.loads(line)  # nothing that was printed got into it


def test_results_that_nobody_can_take_are_told() -> None:
    done = subprocess.run(
        ["bash", "-c", f"{SAMULLM} schema > /dev/full"], check=False, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (
        1,
        "samullm: standard output: No space left on device\n",
    )
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {SAMULLM} schema | true"],
        check=False,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (1, "")
