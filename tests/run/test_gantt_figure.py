"""Gantt charts as SVG: what is in them, and that names cannot break them."""

from __future__ import annotations

import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from samullm_plugin.cli.app import main
from samullm_plugin.errors import InputError
from samullm_plugin.model.cluster import Cluster
from samullm_plugin.run.gantt_figure import (
    Bar,
    Panel,
    figure_svg,
    gantt_figure,
    node_colors,
    plan_figure,
    shortened,
    write_svg,
)
from samullm_plugin.run.metrics import MeasuredEngine
from samullm_plugin.simulator import PlanSimulator
from samullm_plugin.testing.factories import GPU
from tests.run.worlds import small_plan, small_problem

DEVICES = [str(i) for i in range(8)]
SVG = "{http://www.w3.org/2000/svg}"


def texts(svg: str) -> list[str]:
    return ["".join(t.itertext()) for t in ET.fromstring(svg).iter(f"{SVG}text")]


def test_a_plan_has_a_bar_per_engine_and_a_legend_entry_per_node() -> None:
    problem = small_problem()
    trace = PlanSimulator(problem).simulate(small_plan())[0]
    figure = plan_figure(trace, problem.cluster)
    (ax,) = figure.axes
    starts = sum(s.ready_s > s.start_s for s in trace.segments)
    serving = sum(s.end_s > s.ready_s for s in trace.segments)
    assert len(ax.collections) == starts + serving  # neighbouring devices share a bar
    assert sum(bool(c.get_hatch()) for c in ax.collections) == starts
    legend = [t.get_text() for t in figure.legends[0].get_texts()]
    assert sorted(legend) == ["a", "b", "engine start", "judge"]
    assert ax.get_xlim()[1] >= trace.makespan_s
    assert ax.get_ylim() == (2.5, -0.5)  # device 0 on top


def test_a_run_is_drawn_into_axes_of_the_caller() -> None:
    from matplotlib.figure import Figure

    engines = [
        MeasuredEngine("a.0", "a", (0, 2), "dp2xtp1", 0.0, 2.0, 5.0),
        MeasuredEngine("b.0", "b", (1,), "dp1xtp1", 0.0, None, 1.0, failed=True),
    ]
    figure = Figure()
    ax = figure.subplots()
    cluster = Cluster.uniform(GPU, 3)
    assert plan_figure(engines, cluster, ax) is figure
    assert len(ax.collections) == 5  # two devices that are apart, start and serving; one start
    assert [t.get_text() for t in ax.texts if t.get_text() == "×"]
    assert "measured" in texts(figure_svg(figure))


def test_eleven_nodes_have_eleven_colours_and_more_have_too() -> None:
    for count in (11, 20, 64):
        bars = tuple(Bar(f"n{i}", (0,), i, i, i + 1) for i in range(count))
        colors = node_colors([Panel("", bars)])
        assert len(set(colors.values())) == count


def test_names_with_markup_formulas_and_underscores_stay_as_they_are(tmp_path: Path) -> None:
    names = ["<script>alert(1)</script>", "$x_1$ & y", "_hidden", "模型", "n" * 120]
    bars = tuple(Bar(n, (i,), 0, 1, 100) for i, n in enumerate(names))
    write_svg(gantt_figure([Panel("<b>", bars)], DEVICES), tmp_path / "a.svg")
    whole = (tmp_path / "a.svg").read_text()
    assert "<script" not in whole
    shown = [
        t.lstrip("\u200b") for t in texts(figure_svg(gantt_figure([Panel("", bars)], DEVICES)))
    ]
    for name in names[:4]:
        assert name in shown
    assert shortened("n" * 120, 44) in shown  # in the legend


def test_the_same_plan_gives_the_same_file() -> None:
    panel = Panel("p", (Bar("a", (0,), 0.0, 1.0, 2.0),), 2.0)
    assert figure_svg(gantt_figure([panel], DEVICES)) == figure_svg(gantt_figure([panel], DEVICES))


def test_a_plan_without_engines_can_be_drawn() -> None:
    assert "nothing" in texts(figure_svg(gantt_figure([Panel("nothing", ())], DEVICES)))


def test_shortened_keeps_both_ends() -> None:
    assert shortened("oasst-sft-4-pythia-12b", 10) == "oasst…-12b"
    assert shortened("short", 10) == "short"


def test_an_unwritable_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--svg"):
        write_svg(gantt_figure([Panel("", ())], DEVICES), tmp_path / "none" / "a.svg")


def test_plan_and_compare_draw(tmp_path: Path) -> None:
    one, two = tmp_path / "plan.svg", tmp_path / "compare.svg"
    app = "ensembling:requests=20"
    assert main(["plan", app, "--scheduler=min-heuristic", "--scenarios=1", f"--svg={one}"]) == 0
    names = "--schedulers=min-heuristic,max-heuristic"
    assert main(["compare", app, names, "--scenarios=1", f"--svg={two}"]) == 0
    assert any(t.startswith("min-heuristic: ") for t in texts(one.read_text()))
    found = texts(two.read_text())
    assert {t.split(":")[0] for t in found} >= {"min-heuristic", "max-heuristic"}
    assert found.count("vicuna-13b-v1.5") >= 1


@pytest.mark.parametrize("command", ["plan", "compare"])
def test_without_matplotlib_one_line_says_what_to_install(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main([command, "ensembling:requests=20", "--svg=a.svg"]) == 2
    assert "pip install 'samullm-plugin[report]'" in capsys.readouterr().err
