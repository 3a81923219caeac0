"""What the disk and signals do to a run at each of its phases: it stops, says why, and goes on."""

from __future__ import annotations

import errno
import json
import os
import pkgutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from samullm_plugin.cli.app import main

APP = """
version: 1
name: two
models: {a: {model: THUDM/chatglm3-6b}, b: {model: lmsys/vicuna-13b-v1.5}}
nodes:
  first: {model: a, requests: q.jsonl, sampling_params: {max_tokens: 20}}
  second: {model: b, for_each: first, prompt: "{{ first }}", sampling_params: {max_tokens: 20}}
cluster: {gpus: 2}
planner: {scheduler: max-heuristic}
output: {file: table.csv}
"""
ROWS = 12


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    lines = [json.dumps({"id": f"q{k}", "prompt": f"question {k}"}) for k in range(ROWS)]
    (tmp_path / "q.jsonl").write_text("\n".join(lines))
    (tmp_path / "app.yaml").write_text(APP)
    return tmp_path


def run(folder: Path, *, resume: bool = False) -> int:
    option = "--resume" if resume else "--output-dir"
    return main(["run", str(folder / "app.yaml"), option, str(folder / "run"), "--reuse", "off"])


def check_complete(folder: Path) -> None:
    """Every row has one line in the outputs of each node, and one in the table."""
    for node in ("first", "second"):
        lines = (folder / f"run/outputs/{node}.jsonl").read_text().splitlines()
        assert [json.loads(line)["custom_id"] for line in lines] == [f"q{k}" for k in range(ROWS)]
    assert len((folder / "run/table.csv").read_text().splitlines()) == ROWS + 1


@pytest.mark.parametrize("number", [errno.ESTALE, errno.EIO, errno.EDQUOT])
@pytest.mark.parametrize("call", ["write", "fdatasync"])
def test_a_journal_that_cannot_be_written_stops_a_run_that_goes_on(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
    call: str, number: int,
) -> None:  # fmt: skip
    real, calls, at = getattr(os, call), 0, 2 if call == "write" else 1

    def failing(descriptor: int, *rest: Any) -> Any:
        nonlocal calls
        if os.readlink(f"/proc/self/fd/{descriptor}").endswith("/events.jsonl"):
            calls += 1
            if calls == at:
                raise OSError(number, os.strerror(number))
        return real(descriptor, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(os, call, failing)
        assert run(folder) == 1
    said = capsys.readouterr().err
    assert f"events.jsonl: {os.strerror(number)}" in said or "cannot be written" in said
    assert f"--resume {folder / 'run'}" in said
    assert "Traceback" not in said
    assert run(folder, resume=True) == 0
    check_complete(folder)


def interrupted(original: Callable[..., Any], number: signal.Signals) -> Callable[..., Any]:
    """Return a function that sends its process a signal the first time, and goes on."""
    sent = False

    def phase(*args: Any, **named: Any) -> Any:
        nonlocal sent
        if not sent:
            sent = True
            os.kill(os.getpid(), number)
        return original(*args, **named)

    return phase


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize(
    "place",
    [
        "samullm_plugin.run.run.write_plan",
        "samullm_plugin.run.run.forecast_run",
        "samullm_simulated.plugin.SimulatedExecutor.open",
        "samullm_plugin.run.coordinator.Coordinator.run",
        "samullm_simulated.plugin.SimulatedExecutor.poll",
        "samullm_plugin.run.outputs.OutputWriter.take",
        "samullm_plugin.run.outputs.OutputWriter.write_rest",
        "samullm_plugin.run.table_files.TableParts.finish",
        "samullm_plugin.run.run.run_metrics",
    ],
)
def test_a_signal_at_any_phase_loses_nothing(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
    place: str, number: signal.Signals,
) -> None:  # fmt: skip
    before = signal.signal(number, signal.default_int_handler)  # nohup's stays ignored
    try:
        with monkeypatch.context() as patch:
            patch.setattr(place, interrupted(pkgutil.resolve_name(place), number))
            code = run(folder)
    finally:
        signal.signal(number, before)
    said = capsys.readouterr().err
    assert code in (0, 130)
    assert "Traceback" not in said
    assert "internal error" not in said
    begun = (folder / "run" / "events.jsonl").exists()
    assert run(folder, resume=begun) == 0
    check_complete(folder)
