"""The whole running phase on real vLLM engines."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from samullm_plugin.errors import InputError
from samullm_plugin.model.parallel import ParallelConfig
from samullm_plugin.model.plan import Assignment, Plan, Stage
from samullm_plugin.run.coordinator import Coordinator
from samullm_plugin.run.journal import read_journal
from samullm_plugin.run.ledger import Status
from samullm_plugin.run.proposing import ReplanOptions
from samullm_plugin.run.replanning import Replanner
from samullm_plugin.run.run import resume_run, start_run
from tests.run.chaos import Chaos, read_texts
from tests.run.real_app import ITEMS, make_files, plan, run_setup

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models, requests and app.yaml."""
    made = tmp_path_factory.mktemp("real")
    make_files(made)
    return made


def quiet_plan() -> Plan:
    """Return stages in which no engine is moved."""
    one = ParallelConfig()
    return Plan(
        (
            Stage((Assignment("answer", one, (0,)), Assignment("chain", one, (1,)))),
            Stage((Assignment("judge", one, (0,)), Assignment("chain", one, (1,)))),
        )
    )


@pytest.fixture(scope="module")
def reference(folder: Path) -> dict[str, list[str]]:
    """What comes out when no engine is ever moved."""
    outcome = start_run(run_setup(folder, folder / "reference"), quiet_plan())
    assert not outcome.failed
    moved = [r for r in read_journal(folder / "reference/events.jsonl") if r["kind"] == "moved"]
    assert not moved
    return read_texts(folder / "reference")


def test_moved_requests_end_as_undisturbed_ones(
    folder: Path, reference: dict[str, list[str]]
) -> None:
    """Stages that resize, move and pause engines in mid-request change no token."""
    outcome = start_run(run_setup(folder, folder / "moved"), plan())
    assert not outcome.failed
    moved = [r for r in read_journal(folder / "moved/events.jsonl") if r["kind"] == "moved"]
    assert moved
    assert read_texts(folder / "moved") == reference
    assert len(reference["answer"]) == len(reference["judge"]) == ITEMS
    metrics = outcome.metrics
    assert metrics["requests"] == {"finished": 96, "skipped": 0, "failed": 0}
    starts = [load for node in metrics["nodes"].values() for load in node["load_s"]]
    # one that is early may be stopped while it starts, as its stage is over by then
    assert 3 <= len(starts) <= metrics["engine_starts"]


def num_finished(coordinator: Coordinator) -> int:
    return sum(int((s == Status.FINISHED).sum()) for s in coordinator.ledger.status)


def test_interrupted_and_resumed(folder: Path, reference: dict[str, list[str]]) -> None:
    """Drained in the middle: what was generated goes on, and no engine is left."""
    engines: list[int] = []

    def soon(coordinator: Coordinator) -> None:
        def wait() -> None:
            while num_finished(coordinator) < 10:
                time.sleep(0.02)
            engines.extend(p.pid for p in psutil.Process().children(recursive=True))
            coordinator.request_drain()

        threading.Thread(target=wait, daemon=True).start()

    directory = folder / "drained"
    outcome = start_run(run_setup(folder, directory, on_start=soon), plan())
    assert outcome.drained
    before = [r for r in read_journal(directory / "events.jsonl") if r["kind"] == "finished"]
    assert 10 <= len(before) < 96
    outcome = resume_run(run_setup(folder, directory))
    assert not outcome.drained
    finished = [r for r in read_journal(directory / "events.jsonl") if r["kind"] == "finished"]
    assert finished[: len(before)] == before
    assert len(finished) == 96
    assert read_texts(directory) == reference


def edited(folder: Path, target: Path, name: str, change: dict[int, dict[str, object]]) -> Path:
    """Copy the application with other requests."""
    target.mkdir()
    for path in folder.iterdir():
        if path.is_file():
            (target / path.name).write_bytes(path.read_bytes())
    lines = [json.loads(line) for line in (target / name).read_text().splitlines()]
    for index, fields in change.items():
        lines[index] |= fields
    (target / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return target


def test_a_prompt_that_is_too_long_fails_alone(folder: Path, tmp_path: Path) -> None:
    long = " ".join(["w3"] * 1100)  # passes for 825 tokens as long as nobody tokenises it
    app = edited(folder, tmp_path / "app", "requests.jsonl", {5: {"prompt": long}})
    outcome = start_run(run_setup(app, tmp_path / "run"), plan())
    assert [(node, name) for node, name, _ in outcome.failed] == [("answer", "i5"), ("judge", "i5")]
    assert "1024" in outcome.failed[0][2]
    assert outcome.failed[1][2] == "its input i5 of node answer failed"
    assert outcome.metrics["requests"]["finished"] == 94


def test_a_folder_without_tokenizer_is_refused_before_anything_starts(
    folder: Path, tmp_path: Path
) -> None:
    app = edited(folder, tmp_path / "app", "requests.jsonl", {})
    broken = tmp_path / "broken"
    broken.mkdir()
    for name in ("config.json", "model.safetensors"):
        (broken / name).write_bytes((folder / "two" / name).read_bytes())
    text = (app / "app.yaml").read_text().replace(f"path: {folder}/two", f"path: {broken}")
    (app / "app.yaml").write_text(text)
    with pytest.raises(InputError, match="node chain: model two: there is no tokenizer"):
        start_run(run_setup(app, tmp_path / "run"), plan())
    assert not (tmp_path / "run").exists()


def test_an_engine_that_hangs_is_replaced(
    folder: Path, tmp_path: Path, reference: dict[str, list[str]]
) -> None:
    stopped: list[int] = []

    def soon(coordinator: Coordinator) -> None:
        def hang() -> None:
            status = coordinator.ledger.status[coordinator.ledger.app.index("answer")]
            while not (status == Status.FINISHED).any():
                time.sleep(0.005)
            # at work, that is: one that stands still while it starts has load_timeout_s
            replica = coordinator.executor._replicas  # type: ignore[attr-defined]
            pid = next(r.launched.pids[0] for k, r in replica.items() if k.startswith("answer"))
            os.kill(pid, signal.SIGSTOP)
            stopped.append(pid)

        threading.Thread(target=hang, daemon=True).start()

    options = {"heartbeat_s": 0.05, "hang_timeout_s": 5.0, "stop_timeout_s": 1.0}
    ready = run_setup(folder, tmp_path / "run", on_start=soon, executor_options=options)
    outcome = start_run(ready, quiet_plan())
    assert stopped
    assert not outcome.failed
    assert outcome.metrics["engine_failures"] >= 1
    assert read_texts(tmp_path / "run") == reference
    assert not psutil.pid_exists(stopped[0])


@pytest.mark.slow
def test_five_kills(folder: Path, reference: dict[str, list[str]]) -> None:
    """SIGKILL to engines and coordinators at random moments; ``make soak`` does it for longer."""
    seed = int(os.environ.get("CHAOS_SEED", np.random.default_rng().integers(1 << 30)))
    print(f"CHAOS_SEED={seed}")
    chaos = Chaos(folder, np.random.default_rng(seed), reference=reference, pause_s=0.6)
    while chaos.kills < 5:
        chaos.run_once(5)
    assert chaos.engines >= 2
    assert chaos.runs >= 1


def test_planning_again_changes_no_token(
    folder: Path, tmp_path: Path, reference: dict[str, list[str]]
) -> None:
    """In a thread beside the engines, from iterations and lengths that they report."""
    ready = run_setup(folder, tmp_path / "run")
    replanner = Replanner(ready.host, ready.instance, ReplanOptions(check_every=0.05))
    outcome = start_run(run_setup(folder, tmp_path / "run", replanner=replanner), plan())
    assert not outcome.failed
    assert replanner.proposals
    assert read_texts(tmp_path / "run") == reference
    observed = replanner._drift._seconds
    assert observed
    assert all(0 < measured < 60 for measured, _ in observed.values())
