"""HTML pages of one file each: reports of runs, comparisons of plans, benches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from samullm_plugin.errors import InputError
from samullm_plugin.run.charts import Panel, last_s, node_colors, plot_svg


def render_page(template: str, facts: Mapping[str, Any], refresh_ms: int = 0) -> str:
    """Return a page that needs no other file.

    Args:
        template: name of a template in ``data``.
        facts: what it shows.
        refresh_ms: an open page asks for itself anew so often; 0: never.
    """
    data = files("samullm_plugin") / "data"
    css, js = ((data / f"page.{end}").read_text(encoding="utf-8") for end in ("css", "js"))
    page: str = (
        _environment().get_template(template).render(css=css, js=js, refresh_ms=refresh_ms, **facts)
    )
    return page


@cache
def _environment() -> Any:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(
            lambda name: (files("samullm_plugin") / "data" / name).read_text(encoding="utf-8")
        ),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"s": _seconds, "pct": _percent, "n": _number}
    return environment


def write_page(page: str, path: Path, option: str = "--output") -> None:
    """Write a page.

    Raises:
        InputError: if the file cannot be written.
    """
    try:
        path.write_text(page, encoding="utf-8")
    except OSError as error:
        raise InputError(f"{option} {path}: {error.strerror}") from error


def gantt_facts(panels: Sequence[Panel], labels: Sequence[str]) -> dict[str, Any]:
    """Return what templates need to show Gantt charts on one axis of time.

    Args:
        panels: the charts.
        labels: of the devices.
    """
    colors, end_s = node_colors(panels), last_s(panels)
    charts = [(p.title, plot_svg(p, len(labels), end_s, colors)) for p in panels]
    return {"charts": charts, "devices": labels, "colors": colors}


@dataclass(frozen=True, slots=True)
class Table:
    """A table of a page.

    Attributes:
        title: above it; None: nothing.
        columns: headings.
        rows: a cell per column; None is shown as a dash.
        numbers: headings of the columns to align right.
    """

    title: str | None
    columns: Sequence[str]
    rows: Sequence[Sequence[object]]
    numbers: Sequence[str] = ()


def write_tables(
    path: Path,
    title: str,
    subtitle: str,
    tables: Sequence[Table],
    panels: Sequence[Panel] = (),
    labels: Sequence[str] = (),
    notes: Sequence[str] = (),
) -> None:
    """Write a page of tables, with Gantt charts below them.

    Args:
        path: file to write.
        title: of the page.
        subtitle: what it shows.
        tables: one after the other.
        panels: the charts.
        labels: of the devices in them.
        notes: where the figures come from.

    Raises:
        InputError: if the file cannot be written.
    """
    facts = {"title": title, "subtitle": subtitle, "tables": tables, "notes": notes}
    page = render_page("table.html.j2", {**facts, **gantt_facts(panels, labels)})
    write_page(page, path, "--html")


def _seconds(value: float | None) -> str:
    return "–" if value is None else f"{value:,.1f}"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{round(value, 1) + 0.0:+.1f} %"  # no minus zero


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:,.0f}"
