"""Charts as SVG: bars where they belong, round ticks, names that cannot inject markup."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import pytest

from samullm_plugin.cli.app import main
from samullm_plugin.run.causes import (
    CAUSES,
    cut_shares,
    grouped_failures,
    load_lines,
    measured_shares,
)
from samullm_plugin.run.charts import (
    Bar,
    Panel,
    TimeSeries,
    gantt_svg,
    lines_svg,
    shares_svg,
    ticks,
)

SVG = "{http://www.w3.org/2000/svg}"


def test_bars_are_where_their_engines_were() -> None:
    bars = (Bar("a", (0, 2), 0.0, 2.0, 6.0), Bar("<b&", (1,), 5.0, 10.0, 10.0, failed=True))
    text = gantt_svg([Panel("one", bars, 8.0), Panel("two", bars[:1])], ["GPU 0", "GPU 1", "GPU 2"])
    root = ElementTree.fromstring(text)  # well-formed, so nothing was injected
    plots = [e for e in root.iter(f"{SVG}svg") if e.get("class") == "plot"]
    assert [p.get("aria-label") for p in plots] == ["one", "two"]
    places = [
        (float(e.get("x", "").rstrip("%")), float(e.get("width", "").rstrip("%")), e.get("y"))
        for e in plots[0].iter(f"{SVG}svg")
        if e.get("y")
    ]
    assert places == [
        (0, 20, "2"), (20, 40, "2"), (0, 20, "46"), (20, 40, "46"), (50, 50, "24"), (100, 0, "24"),
    ]  # fmt: skip
    titles = [e.text or "" for e in plots[0].iter(f"{SVG}title")]
    assert "<b&" in titles[2]
    assert "the engine died" in titles[2]
    marks = [e.get("x1") for e in plots[0].iter(f"{SVG}line") if e.get("class") == "end"]
    assert marks == ["80.0000%"]
    assert [e.text for e in root.iter(f"{SVG}text")].count("×") == 1


@pytest.mark.parametrize(
    ("end", "expected"),
    [(100, [0, 20, 40, 60, 80, 100]), (0.03, [0, 0.005, 0.01, 0.015, 0.02, 0.025, 0.03]), (0, [0])],
)
def test_ticks_are_round(end: float, expected: list[float]) -> None:
    assert ticks(end) == expected


def test_an_empty_chart_is_drawn() -> None:
    ElementTree.fromstring(gantt_svg([Panel("nothing", ())], ["0"]))
    ElementTree.fromstring(f'<x xmlns="http://www.w3.org/2000/svg">{lines_svg([], 1.0, "")}</x>')
    line = lines_svg([TimeSeries("n", ((0.0, 0.0), (2.0, 4.0)), "red")], 2.0, "u")
    assert 'points="0.00,150.00 1000.00,150.00 1000.00,7.14"' in line  # a step
    assert 'x="25.000%"' in shares_svg([[("a", 0.25, "red"), ("b", 0.75, "blue")]])


def test_where_device_time_went() -> None:
    records = [
        {"time_s": 0.0, "kind": "engine_started", "key": "a", "node": "a", "devices": [0],
         "parallel": "tp1"},
        {"time_s": 2.0, "kind": "engine_ready", "key": "a"},
        {"time_s": 6.0, "kind": "engine_stopped", "key": "a", "busy_s": 3.0, "num_finished": 1},
        {"time_s": 7.0, "kind": "engine_started", "key": "b", "node": "b", "devices": [0],
         "parallel": "tp1"},
        {"time_s": 8.0, "kind": "engine_ready", "key": "b"},
        {"time_s": 9.0, "kind": "engine_stopped", "key": "b", "busy_s": 1.0, "num_finished": 1},
        {"time_s": 10.0, "kind": "finished", "node": "b", "request": 0},
    ]  # fmt: skip
    shares = measured_shares(records, 2, 10.0)
    assert list(shares) == list(CAUSES)
    assert list(shares.values()) == pytest.approx([0.2, 0.15, 0.05, 0.05, 0.55])


def test_failures_are_grouped() -> None:
    errors = ["prompt of 900 tokens", "prompt of 8 tokens", "its input q1 of node a failed",
              "its input q22 of node a failed", "other"]  # fmt: skip
    records = [
        {"kind": "failed", "node": "n", "request": k, "error": e} for k, e in enumerate(errors)
    ]
    rows = grouped_failures([*records, {"kind": "failed", "node": "m", "request": 0, "error": "x"}])
    assert [(r["count"], r["error"]) for r in rows] == [
        (2, errors[0]), (2, errors[2]), (1, "other"), (1, "x"),
    ]  # fmt: skip


def test_load_and_cut_outputs() -> None:
    loads = [
        {"kind": "load", "time_s": t, "tokens": 10 * t, "running": t, "at_engines": 4, "waiting": 1}
        for t in (0.0, 1.0, 3.0)
    ]
    rate, running, *_ = load_lines(loads)
    assert rate.points == ((0.0, 10.0), (1.0, 10.0), (3.0, 10.0))
    assert running.points == ((0.0, 0.0), (1.0, 1.0), (3.0, 3.0))
    done = [{"kind": "finished", "node": "n", "finish_reason": r} for r in ("stop", "length")]
    assert cut_shares(done) == {"n": 0.5}


def test_compare_draws_pages(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = "max-heuristic,min-heuristic"
    words = ["compare", "small-1", "--schedulers", names, "--scenarios", "1"]
    svg, html = tmp_path / "a.svg", tmp_path / "a.html"
    assert main([*words, "--svg", str(svg), "--html", str(html)]) == 0
    ElementTree.parse(svg)
    page = html.read_text()
    assert page.count('class="plot"') == 2
    assert "<td>min-heuristic</td>" in page
    assert "Where the figures come from" in page
    assert main([*words, "--html", str(tmp_path / "none" / "a.html")]) == 2
    assert "there is no folder" in capsys.readouterr().err
