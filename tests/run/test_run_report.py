"""The page of a run: whole and unfinished runs, failures, and folders that hold none."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest

from samullm_plugin.cli import report as report_command
from samullm_plugin.cli.app import main
from samullm_plugin.run.report import read_run, report_facts, report_html
from samullm_plugin.run.run import start_run
from tests.run.worlds import setup_run, small_plan, small_problem

EXAMPLES = Path(__file__).parents[2] / "examples" / "applications"


class Page(HTMLParser):
    """Collects tags, what is loaded or linked, and the text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.loads: list[str] = []
        self.links: list[str] = []
        self.labels: list[str] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        values = dict(attrs)
        self.loads += [v for k in ("src", "srcset", "data") if (v := values.get(k))]
        if tag == "svg" and values.get("aria-label"):
            self.labels.append(values["aria-label"] or "")
        if tag == "a":
            self.links.append(values.get("href") or "")

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    start_run(setup_run(small_problem(), tmp_path / "a run"), small_plan(), "by hand")
    return tmp_path / "a run"


def lines(directory: Path) -> list[str]:
    return (directory / "events.jsonl").read_text().splitlines(keepends=True)


def cut(directory: Path, keep: Callable[[list[str]], list[str]]) -> None:
    """Leave the directory as a killed run does."""
    (directory / "events.jsonl").write_text("".join(keep(lines(directory))))
    for name in ("metrics.json", "trace.json"):
        (directory / name).unlink()


def test_a_whole_run(run_dir: Path) -> None:
    assert main(["report", str(run_dir)]) == 0
    html = (run_dir / "report.html").read_text()
    page = Page(html)
    metrics = json.loads((run_dir / "metrics.json").read_text())
    assert f"{metrics['makespan_s']['measured']:,.1f} s" in page.text
    for node in metrics["nodes"].values():
        assert f"{node['finish_s']['measured']:,.1f}" in page.text
        assert f"{node['finish_s']['planned']:,.1f}" in page.text
    assert "This run was simulated" in page.text
    assert "given with the application" in page.text  # where the lengths come from
    assert "model-judge: tp1 assumed (test)" in page.text  # and the latencies
    assert page.labels == [
        f"planned: {metrics['makespan_s']['planned']:.1f} s",
        f"measured: {metrics['makespan_s']['measured']:.1f} s",
        "tokens/s",
        "running, at engines, ready, waiting for an engine",
    ]
    assert "planned: " in page.text
    assert "measured: " in page.text


def test_figures_are_those_of_metrics_json(run_dir: Path) -> None:
    run = read_run(run_dir)
    assert run.finished
    facts = report_facts(run, run_dir / "report.html")
    stored = json.loads((run_dir / "metrics.json").read_text())
    for own in ("open_s", "executor"):  # measured by the executor, not told by the journal
        del stored[own]
    assert json.loads(json.dumps(facts["metrics"])) == stored


def test_calls_behind_rows_are_no_rows_and_values_no_tokens(tmp_path: Path) -> None:
    """A call that gives a list is not another row, and no model wrote what functions return."""
    where, run_dir = tmp_path / "evol-instruct", tmp_path / "run"
    shutil.copytree(EXAMPLES / "evol-instruct", where)
    command = ["run", str(where / "app.yaml"), "--scheduler", "max-heuristic"]
    assert main([*command, "--executor", "simulated", "--output-dir", str(run_dir)]) == 0
    stored = json.loads((run_dir / "metrics.json").read_text())
    nodes = stored["nodes"]
    for name in ("parse", "unique"):
        rows = (run_dir / "outputs" / f"{name}.jsonl").read_text().splitlines()
        assert nodes[name]["requests"]["finished"] == len(rows) > 0
        assert nodes[name]["completion_tokens"] == 0
    most = 5 * nodes["propose"]["requests"]["finished"]
    assert all(sum(nodes[n]["requests"].values()) == most for n in ("parse", "unique", "evolve"))
    assert nodes["parse"]["calls"] == nodes["propose"]["requests"]["finished"]
    models = ("propose", "evolve", "check", "answer")
    assert stored["completion_tokens"] == sum(nodes[n]["completion_tokens"] for n in models)
    assert stored["completion_tokens"] > 0
    told = report_facts(read_run(run_dir), None)["metrics"]
    assert json.loads(json.dumps(told))["nodes"] == nodes  # told by the journal alone


def test_the_page_needs_no_other_file_and_its_links_lead_somewhere(
    run_dir: Path, tmp_path: Path
) -> None:
    output = tmp_path / "elsewhere" / "page.html"
    output.parent.mkdir()
    assert main(["report", str(run_dir), "-o", str(output)]) == 0
    html = output.read_text()
    page = Page(html)
    assert not {"link", "iframe", "img", "object"} & set(page.tags)
    assert page.tags.count("script") == 1  # inline: nothing is loaded
    assert not page.loads
    assert not re.search(r"@import|url\((?!#)", html)
    assert "outputs/judge.jsonl" in [unquote(link).split("a run/")[-1] for link in page.links]
    for link in page.links:
        assert (output.parent / unquote(link)).is_file()


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_a_killed_run(run_dir: Path, share: float) -> None:
    cut(run_dir, lambda all_: all_[: max(1, int(len(all_) * share))])
    run = read_run(run_dir)
    assert not run.finished
    page = Page(report_html(run, run_dir / "report.html"))
    assert "This run is not finished" in page.text
    assert f"--resume {run_dir}" in page.text
    assert "measured so far" in page.text
    assert " of 20" in page.text
    facts = report_facts(run, run_dir / "report.html")
    done = sum('"finished"' in line for line in lines(run_dir))
    assert facts["metrics"]["requests"]["finished"] == done
    idle = facts["metrics"]["idle_share"]["measured"]
    assert idle is None or 0 <= idle <= 1
    assert facts["stages"][-1]["end"] is None  # it goes on
    # half a run's last request is not held against the end of the whole plan
    assert "error_percent" not in facts["metrics"]["makespan_s"]
    assert all(row["error"] is None for row in facts["nodes"] if row["measured_s"] is None)


def test_a_run_that_has_just_begun(run_dir: Path) -> None:
    cut(run_dir, lambda all_: all_[:1])
    assert main(["report", str(run_dir)]) == 0


def test_failures_are_shown_and_cannot_inject_markup(run_dir: Path) -> None:
    evil = "<img src=x onerror=alert(1)> & more"
    records = [
        {"time_s": 1.0, "kind": "engine_failed", "key": "a.0.0", "node": "a", "reason": evil,
         "failures": 1},
        {"time_s": 1.5, "kind": "moved", "node": "a", "request": 3, "num_tokens": 4},
        {"time_s": 2.0, "kind": "failed", "node": "a", "request": 3, "error": evil},
    ]  # fmt: skip
    cut(run_dir, lambda all_: [*all_[:20], *(json.dumps(r) + "\n" for r in records)])
    html = report_html(read_run(run_dir), run_dir / "report.html")
    page = Page(html)
    assert "img" not in page.tags
    assert unescape(page.text).count(evil) == 2
    assert "a 1" in page.text  # moved requests


def test_a_run_of_a_release_that_kept_no_expectations(run_dir: Path) -> None:
    (run_dir / "planned.json").unlink()
    run = read_run(run_dir)
    assert run.finished
    page = Page(report_html(run, run_dir / "report.html"))
    assert "was not recorded" in page.text
    assert "planned: " not in page.text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "holds no run"),
        ("{", "is not JSON"),
        ("[]", "its format is list"),
        ('{"format": 99}', "its format is 99"),
        ('{"format": 1}', "it never began"),
    ],
)
def test_another_folder_is_one_message(
    content: str | None, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if content is not None:
        (tmp_path / "run.json").write_text(content)
    assert main(["report", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
    assert not (tmp_path / "report.html").exists()


def test_a_folder_that_is_not_there_or_a_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    for name in ("none", "file"):
        assert main(["report", str(tmp_path / name)]) == 2
        assert "holds no run" in capsys.readouterr().err


def test_a_damaged_journal_is_named(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cut(run_dir, lambda all_: [*all_[:5], "{broken\n", *all_[5:]])
    assert main(["report", str(run_dir)]) == 2
    assert "events.jsonl line 6" in capsys.readouterr().err


def test_an_output_that_cannot_be_written(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", str(run_dir), "-o", str(run_dir / "none" / "a.html")]) == 2
    assert "--output" in capsys.readouterr().err


def test_the_command_serves_until_it_is_interrupted(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", str(run_dir), "--serve", "--output", "page.html"]) == 2
    assert "--serve writes no file; leave out --output" in capsys.readouterr().err
    command = [sys.executable, "-m", "samullm_plugin", "report", str(run_dir), "--serve"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as served:
        assert served.stderr is not None
        told = served.stderr.readline()
        try:
            address = re.search(r"http://127\.0\.0\.1:\d+/", told)
            assert address, told
            with urllib.request.urlopen(address[0]) as answer:
                page = answer.read().decode()
        finally:
            served.send_signal(signal.SIGINT)
        try:
            assert served.wait(60) == 0
        finally:
            served.kill()
        rest = served.stderr.read()
    assert "</html>" in page
    assert "Traceback" not in rest


def test_a_served_page_is_not_made_all_the_time(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A page that takes long to make is kept for longer: the run beside it needs the processor."""
    made = []

    def slow(*arguments: object) -> str:
        made.append(arguments)
        time.sleep(0.2)
        return "page"

    monkeypatch.setattr(report_command, "report_html", slow)
    monkeypatch.setattr(report_command, "REFRESH_MS", 0)
    for share, pages in ((0.001, 1), (1.0, 4)):
        monkeypatch.setattr(report_command, "BUSY_SHARE", share)
        made.clear()
        server = report_command.report_server(run_dir)
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            for _ in range(4):
                with urllib.request.urlopen(f"http://127.0.0.1:{server.server_port}/") as answer:
                    assert answer.read() == b"page"
        finally:
            server.shutdown()
            server.server_close()
            thread.join()
        assert len(made) == pages


def test_a_plan_that_a_resumed_run_was_given_promises_nothing(run_dir: Path) -> None:
    """Only one that was made while the run went on is told with its gain."""
    first = next(text for text in lines(run_dir) if '"plan"' in text)
    cut(run_dir, lambda texts: [t for text in texts for t in [text] * (1 + (text == first))])
    page = Page(report_html(read_run(run_dir), run_dir / "report.html"))
    assert "New plans" in page.text
