"""A plan or a run as a picture: one row per device, time from left to right (extra ``report``)."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from colorsys import hsv_to_rgb
from contextlib import contextmanager
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from samullm_plugin.errors import InputError, MissingExtraError
from samullm_plugin.model.cluster import Cluster
from samullm_plugin.model.result import PlanTrace, Timeline
from samullm_plugin.run.metrics import MeasuredEngine

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Strong colours first, their light companions after: neighbours in the legend stay distinct.
_PALETTE = (
    "#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b", "#e377c2", "#7f7f7f",
    "#bcbd22", "#17becf", "#0b3c6f", "#f7b6d2", "#98df8a", "#ffbb78", "#aec7e8", "#c5b0d5",
    "#c49c94", "#dbdb8d", "#9edae5", "#c7c7c7",
)  # fmt: skip
_STYLE: Any = {
    "font.family": "sans-serif",
    "font.size": 9.0,
    "hatch.linewidth": 0.6,
    "svg.fonttype": "none",  # text stays text: smaller, and found by a search
    "svg.hashsalt": "samullm",  # the same figure gives the same file
    "text.parse_math": False,  # a dollar sign in a name is no formula
}
_ROW_INCHES, _PANEL_INCHES, _COLUMNS = 0.3, 5.5, 3
_LEGEND_CHARACTERS = 44
_BAR_POINTS, _SHORTEST_LABEL = 7.0, 6
_FAILED = "×"


@dataclass(frozen=True, slots=True)
class Bar:
    """An engine on its devices.

    Attributes:
        node: what it serves.
        devices: their indices.
        start_s: when its start began.
        ready_s: when it could serve, at most ``end_s``.
        end_s: when the devices were free again.
        failed: it died.
    """

    node: str
    devices: tuple[int, ...]
    start_s: float
    ready_s: float
    end_s: float
    failed: bool = False


@dataclass(frozen=True, slots=True)
class Panel:
    """One chart of a figure.

    Attributes:
        title: above it.
        bars: its engines.
        end_s: marked as the end; None: no mark.
    """

    title: str
    bars: tuple[Bar, ...]
    end_s: float | None = None


def planned_bars(trace: Timeline) -> tuple[Bar, ...]:
    """Return the engines of a simulated plan."""
    return tuple(
        Bar(s.node, s.devices, s.start_s, min(s.ready_s, s.end_s), s.end_s) for s in trace.segments
    )


def measured_bars(engines: Sequence[MeasuredEngine]) -> tuple[Bar, ...]:
    """Return the engines of a run; one that never was ready has only a start."""
    bars = []
    for e in engines:
        end_s = e.start_s if e.end_s is None else e.end_s
        ready_s = end_s if e.ready_s is None else min(e.ready_s, end_s)
        bars.append(Bar(e.node, e.devices, e.start_s, ready_s, end_s, e.failed))
    return tuple(bars)


def device_names(cluster: Cluster) -> list[str]:
    """Return a label per device: its index, and its kind where there are several."""
    kinds = {g.name for g in cluster.gpus}
    return [f"{i} {g.name}" if len(kinds) > 1 else str(i) for i, g in enumerate(cluster.gpus)]


def require_matplotlib(what: str) -> None:
    """Refuse early, before anything is computed.

    Raises:
        MissingExtraError: naming the command that installs it.
    """
    try:
        import matplotlib  # noqa: F401  # asked for only to see whether it is there
    except ImportError as error:
        raise MissingExtraError(what, "matplotlib", "report") from error


def plan_figure(
    trace: PlanTrace | Sequence[MeasuredEngine], cluster: Cluster, ax: Axes | None = None
) -> Figure:
    """Draw one plan, simulated or measured.

    Args:
        trace: the simulation, or the engines of a run.
        cluster: its devices.
        ax: where to draw; None: a figure of its own.

    Returns:
        The figure, which the caller may change and save.

    Raises:
        MissingExtraError: without matplotlib.
    """
    if isinstance(trace, PlanTrace):
        panel = Panel("planned", planned_bars(trace), trace.makespan_s)
    else:
        panel = Panel("measured", measured_bars(trace))
    if ax is None:
        return gantt_figure([panel], device_names(cluster))
    require_matplotlib("a Gantt figure")
    colors = node_colors([panel])
    with _styled():
        _draw(ax, panel, device_names(cluster), colors, _end_s([panel]))
        ax.legend(*_handles(colors), loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
    figure: Any = ax.get_figure()
    return figure  # type: ignore[no-any-return]  # matplotlib is untyped here


def gantt_figure(
    panels: Sequence[Panel], devices: Sequence[str], *, columns: int = 0, width: float = 0.0
) -> Figure:
    """Draw several charts on one time axis, with one legend.

    Args:
        panels: at least one.
        devices: label of each device.
        columns: charts side by side; 0: up to three.
        width: of the figure in inches; 0: by the number of columns.

    Raises:
        MissingExtraError: without matplotlib.
    """
    require_matplotlib("a Gantt figure")
    from matplotlib.figure import Figure

    columns = min(columns or _COLUMNS, len(panels))
    rows = -(-len(panels) // columns)
    colors = node_colors(panels)
    end_s = _end_s(panels)
    height = rows * (len(devices) * _ROW_INCHES + 1.0)
    width = width or max(columns * _PANEL_INCHES, 8.0)
    across = _legend_columns(colors, width)
    legend_lines = -(-(len(colors) + 1) // across)
    with _styled():
        figure = Figure(figsize=(width, height + 0.2 * legend_lines + 0.2), layout="constrained")
        grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
        axes = grid.flatten().tolist()
        for ax, panel in zip(axes, panels, strict=False):
            _draw(ax, panel, devices, colors, end_s)
            ax.tick_params(labelbottom=True)
        for ax in axes[len(panels) :]:
            ax.set_visible(False)
        handles, labels = _handles(colors)
        figure.legend(
            handles, labels, loc="outside lower left", ncols=across, frameon=False, fontsize=8
        )
        figure.draw_without_rendering()
        for ax, panel in zip(axes, panels, strict=False):
            _label(ax, panel, colors)
    return figure


def figure_svg(figure: Figure) -> str:
    """Return a figure as an SVG element without XML header, to stand in a page."""
    text = StringIO()
    none = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with _styled():
        figure.savefig(text, format="svg", metadata=none)
    whole = text.getvalue()
    return whole[whole.index("<svg") :]


def write_svg(figure: Figure, path: Path) -> None:
    """Write a figure as an SVG file.

    Raises:
        InputError: if the file cannot be written.
    """
    try:
        path.write_text('<?xml version="1.0" encoding="utf-8"?>\n' + figure_svg(figure), "utf-8")
    except OSError as error:
        raise InputError(f"--svg {path}: {error.strerror}") from error


def node_colors(panels: Sequence[Panel]) -> dict[str, str]:
    """Return a colour per node, in the order in which engines start; the same in all charts."""
    order = dict.fromkeys(
        b.node for panel in panels for b in sorted(panel.bars, key=lambda b: b.start_s)
    )
    golden = 0.618033988749895  # steps of the golden ratio never repeat a hue
    return {
        node: _PALETTE[i]
        if i < len(_PALETTE)
        else _hex(hsv_to_rgb(i * golden % 1.0, 0.35 + 0.15 * (i % 3), 0.85))
        for i, node in enumerate(order)
    }


def _hex(color: tuple[float, float, float]) -> str:
    return "#" + "".join(f"{round(255 * part):02x}" for part in color)


def _end_s(panels: Sequence[Panel]) -> float:
    ends = [b.end_s for p in panels for b in p.bars] + [p.end_s or 0.0 for p in panels]
    return max([*ends, 1e-9])


@contextmanager
def _styled() -> Iterator[None]:
    """Use our style, and stay quiet about letters the drawing font lacks: viewers have others."""
    import matplotlib

    with matplotlib.rc_context(_STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        yield


def _draw(
    ax: Axes, panel: Panel, devices: Sequence[str], colors: Mapping[str, str], end_s: float
) -> None:
    for bar in panel.bars:
        color = colors[bar.node]
        for first, count in _runs(bar.devices):
            base, height = first - 0.44, count - 0.12
            if bar.ready_s > bar.start_s:
                ax.broken_barh(
                    [(bar.start_s, bar.ready_s - bar.start_s)], (base, height),
                    facecolor="white", edgecolor=color, hatch="////", linewidth=0.6,
                )  # fmt: skip
            if bar.end_s > bar.ready_s:
                ax.broken_barh(
                    [(bar.ready_s, bar.end_s - bar.ready_s)], (base, height),
                    facecolor=color, edgecolor="white", linewidth=0.4,
                )  # fmt: skip
            if bar.failed:
                ax.text(bar.end_s, first + (count - 1) / 2, _FAILED, color="#b00000",
                        ha="right", va="center", fontweight="bold", clip_on=True, zorder=4,
                        bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.6})  # fmt: skip
    ax.set_xlim(0.0, end_s * 1.01)
    ax.set_ylim(len(devices) - 0.5, -0.5)
    ax.set_yticks(range(len(devices)), labels=list(devices))
    ax.set_ylabel("device")
    ax.set_xlabel("seconds")
    ax.set_title(panel.title, loc="left", fontsize=9.5)
    ax.tick_params(length=2)
    ax.set_axisbelow(True)
    ax.grid(axis="x", color="#e4e4e4", linewidth=0.6)
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    if panel.end_s is not None:
        ax.axvline(panel.end_s, color="#444444", linewidth=0.9, linestyle=(0, (4, 2)))


def _label(ax: Axes, panel: Panel, colors: Mapping[str, str]) -> None:
    """Write names into the bars that are wide enough; the layout must be known."""
    from matplotlib.colors import to_rgb

    inches_per_s = ax.get_window_extent().width / ax.figure.dpi / (ax.get_xlim()[1] or 1.0)
    for bar in panel.bars:
        room = int(inches_per_s * (bar.end_s - bar.ready_s) * 72 / (_BAR_POINTS * 0.6)) - 1
        if room < _SHORTEST_LABEL and room < len(bar.node):
            continue
        red, green, blue = to_rgb(colors[bar.node])
        dark = 0.3 * red + 0.59 * green + 0.11 * blue < 0.55
        first, count = max(_runs(bar.devices), key=lambda run: run[1])
        ax.text(
            (bar.ready_s + bar.end_s) / 2,
            first + (count - 1) / 2,
            shortened(bar.node, room),
            color="white" if dark else "black",
            ha="center",
            va="center",
            fontsize=_BAR_POINTS,
            clip_on=True,
        )


def shortened(name: str, room: int) -> str:
    """Return a name in at most ``room`` characters; its end says more than its middle."""
    if len(name) <= room:
        return name
    tail = (room - 1) // 2
    return name[: room - 1 - tail] + "…" + name[len(name) - tail :]


def _handles(colors: Mapping[str, str]) -> tuple[list[Any], list[str]]:
    """Return what stands in the legend: nodes, then what hatching means."""
    from matplotlib.patches import Patch

    handles = [Patch(facecolor=c, edgecolor="white") for c in colors.values()]
    handles.append(Patch(facecolor="white", edgecolor="#666666", hatch="////"))
    # matplotlib leaves out what begins with an underscore
    names = [n if not n.startswith("_") else "\u200b" + n for n in colors]
    return handles, [*(shortened(n, _LEGEND_CHARACTERS) for n in names), "engine start"]


def _legend_columns(colors: Mapping[str, str], width: float) -> int:
    """Return how many legend entries fit side by side, by the longest name."""
    longest = max((min(len(n), _LEGEND_CHARACTERS) for n in [*colors, "engine start"]), default=0)
    entry_inches = longest * 8 * 0.56 / 72 + 0.5
    return max(1, min(len(colors) + 1, int(width / entry_inches)))


def _runs(devices: Sequence[int]) -> list[tuple[int, int]]:
    """Return neighbouring devices as (first, count): one bar each."""
    runs: list[tuple[int, int]] = []
    for d in sorted(devices):
        if runs and d == sum(runs[-1]):
            runs[-1] = (runs[-1][0], runs[-1][1] + 1)
        else:
            runs.append((d, 1))
    return runs
