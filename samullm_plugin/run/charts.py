"""Charts as SVG, drawn here: Gantt charts, lines over time, shares.

A page must be one small file that works without a network, and charting libraries weigh one to five
megabytes each. Positions along the time axis are percentages, so that a chart fits any width and a
page zooms by widening it, while texts keep their size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from math import floor, log10

from samullm_plugin.model.cluster import Cluster
from samullm_plugin.model.result import EngineSegment
from samullm_plugin.planning.reporting import device_labels
from samullm_plugin.run.metrics import MeasuredEngine

# Neighbours differ in hue and lightness; all are legible on white and on near-black.
_PALETTE = (
    "#3b7dd8", "#e0822f", "#3a9a54", "#d1495b", "#8a63c9", "#a2714a", "#d77fb8", "#7d8590",
    "#a8a12c", "#2fa7b5", "#5c6bc0", "#f0a48a", "#7fc48f", "#c9a227", "#8fb4e8", "#b99be0",
)  # fmt: skip
ROW_PX, BAR_PX, AXIS_PX, TITLE_PX = 22, 17, 22, 24
_LABEL_PX, _LETTER_PX, _LEGEND_PX, _WIDTH_PX, _HEIGHT_PX = 90, 6, 20, 1000, 150


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
        note: shown with it.
    """

    node: str
    devices: tuple[int, ...]
    start_s: float
    ready_s: float
    end_s: float
    failed: bool = False
    note: str = ""


@dataclass(frozen=True, slots=True)
class Panel:
    """One Gantt chart.

    Attributes:
        title: above it.
        bars: its engines.
        end_s: marked as the end; None: no mark.
    """

    title: str
    bars: tuple[Bar, ...]
    end_s: float | None = None


def planned_bars(segments: Sequence[EngineSegment]) -> tuple[Bar, ...]:
    """Return the engines of a simulated plan."""
    return tuple(
        Bar(
            s.node, s.devices, s.start_s, min(s.ready_s, s.end_s), s.end_s,
            note=f"{s.parallel}, {s.num_finished:,} requests",
        )
        for s in segments
    )  # fmt: skip


def measured_bars(engines: Sequence[MeasuredEngine]) -> tuple[Bar, ...]:
    """Return the engines of a run; one that never was ready has only a start."""
    bars = []
    for e in engines:
        end_s = e.start_s if e.end_s is None else e.end_s
        ready_s = end_s if e.ready_s is None else min(e.ready_s, end_s)
        note = f"{e.parallel}, {e.num_finished:,} requests"
        bars.append(Bar(e.node, e.devices, e.start_s, ready_s, end_s, e.failed, note))
    return tuple(bars)


def device_names(cluster: Cluster) -> list[str]:
    """Return a name per device of a cluster, as :func:`names_of_devices` has them."""
    count, kinds = cluster.num_gpus, cluster.kinds
    return names_of_devices(count, cluster.machines_if_several, cluster.cards_if_shared, kinds)


def names_of_devices(
    count: int,
    machines: Sequence[Sequence[int]],
    cards: Sequence[Sequence[int]],
    kinds: Sequence[str],
) -> list[str]:
    """Return a name per device, such as ``GPU 3``, or ``device 3 (GPU 1)`` where engines share any.

    Args:
        count: devices of the cluster.
        machines: devices of each machine; none if there is only one.
        cards: devices of each GPU; none if all are whole.
        kinds: of each device, named where there are several; none if they are not known.
    """
    names = [f"{'device' if cards else 'GPU'} {n}" for n in device_labels(count, machines)]
    for gpu, parts in enumerate(cards):
        for device in parts:
            names[device] += f" (GPU {gpu})"
    several = len(set(kinds)) > 1
    return [f"{name} {kinds[i]}" if several else name for i, name in enumerate(names)]


def node_colors(panels: Sequence[Panel]) -> dict[str, str]:
    """Return a colour per node, in the order of the nodes' first starts."""
    names = dict.fromkeys(bar.node for panel in panels for bar in panel.bars)
    return {name: _PALETTE[k % len(_PALETTE)] for k, name in enumerate(names)}


def last_s(panels: Sequence[Panel]) -> float:
    """Return the end of the time axis that panels share."""
    ends = [bar.end_s for panel in panels for bar in panel.bars]
    return max([*ends, *(p.end_s for p in panels if p.end_s is not None), 1e-9])


def plot_svg(panel: Panel, num_devices: int, end_s: float, colors: Mapping[str, str]) -> str:
    """Return one chart without labels, as wide as its place.

    Args:
        panel: what to draw.
        num_devices: rows.
        end_s: end of the time axis.
        colors: by node.
    """
    height = num_devices * ROW_PX
    parts = [
        f'<rect x="0" y="{d * ROW_PX}" width="100%" height="{ROW_PX - 1}" class="row"/>'
        for d in range(num_devices)
    ]
    for tick in ticks(end_s):
        x = _percent(tick, end_s)
        parts.append(f'<line x1="{x}" x2="{x}" y1="0" y2="{height}" class="grid"/>')
        anchor = "start" if tick == 0 else "middle"
        parts.append(
            f'<text x="{x}" y="{height + 15}" text-anchor="{anchor}" class="tick">{tick:g}</text>'
        )
    for bar in panel.bars:
        color = colors[bar.node]
        told = escape(
            f"{bar.node}: {bar.note}\nstart {bar.start_s:,.1f} s, ready {bar.ready_s:,.1f} s, "
            f"end {bar.end_s:,.1f} s" + ("\nthe engine died" if bar.failed else "")
        )
        for device in bar.devices:
            if not 0 <= device < num_devices:
                continue
            y = device * ROW_PX + (ROW_PX - BAR_PX) // 2
            parts.append(f"<g><title>{told}</title>")
            for first, last, kind in (
                (bar.start_s, bar.ready_s, "load"),
                (bar.ready_s, bar.end_s, "serve"),
            ):
                if last > first or kind == "serve":
                    parts.append(
                        f'<svg x="{_percent(first, end_s)}" y="{y}" '
                        f'width="{_percent(last - first, end_s)}" height="{BAR_PX}">'
                        f'<rect width="100%" height="100%" fill="{color}" class="{kind}"/>'
                        + (
                            f'<text x="4" y="12.5" class="name">{escape(bar.node)}</text>'
                            if kind == "serve"
                            else ""
                        )
                        + "</svg>"
                    )
            if bar.failed:
                parts.append(
                    f'<text x="{_percent(bar.end_s, end_s)}" y="{y + 13}" class="died">×</text>'
                )
            parts.append("</g>")
    if panel.end_s is not None:
        x = _percent(panel.end_s, end_s)
        parts.append(f'<line x1="{x}" x2="{x}" y1="0" y2="{height}" class="end"/>')
    return (
        f'<svg class="plot" width="100%" height="{height + AXIS_PX}" role="img" '
        f'aria-label="{escape(panel.title)}">{"".join(parts)}</svg>'
    )


def gantt_svg(panels: Sequence[Panel], labels: Sequence[str]) -> str:
    """Return charts one above the other as a file of their own.

    Args:
        panels: what to draw; they share the axis of time.
        labels: of the devices.
    """
    colors, end_s = node_colors(panels), last_s(panels)
    label_px = max(_LABEL_PX, 12 + _LETTER_PX * max(map(len, labels), default=0))
    plot_px = _WIDTH_PX - label_px - 24
    parts, y = [], 0
    for panel in panels:
        parts.append(
            f'<text x="{label_px}" y="{y + 17}" class="title">{escape(panel.title)}</text>'
        )
        y += TITLE_PX
        for d, label in enumerate(labels):
            parts.append(
                f'<text x="{label_px - 8}" y="{y + d * ROW_PX + 15}" text-anchor="end" '
                f'class="tick">{escape(label)}</text>'
            )
        height = len(labels) * ROW_PX + AXIS_PX
        plot = plot_svg(panel, len(labels), end_s, colors)
        parts.append(
            f'<svg x="{label_px}" y="{y}" width="{plot_px}" height="{height}" '
            f'overflow="visible">{plot}</svg>'
        )
        y += height + 6
    x = label_px
    for name, color in colors.items():
        room = 24 + 7 * len(name)
        if x + room > _WIDTH_PX and x > label_px:
            x, y = label_px, y + _LEGEND_PX
        parts.append(f'<rect x="{x}" y="{y + 3}" width="12" height="12" fill="{color}"/>')
        parts.append(f'<text x="{x + 17}" y="{y + 13}" class="tick">{escape(name)}</text>')
        x += room
    y += _LEGEND_PX
    parts.append(
        f'<text x="{label_px}" y="{y + 13}" class="tick">seconds; pale: the engine starts</text>'
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH_PX}" height="{y + 24}" '
        f'viewBox="0 0 {_WIDTH_PX} {y + 24}"><style>{CHART_STYLE}</style>'
        f'<rect width="100%" height="100%" class="back"/>{"".join(parts)}</svg>'
    )


CHART_STYLE = """
svg{font:11px system-ui,sans-serif}.back{fill:#fff}.row{fill:#8881}.grid{stroke:#8884}
.tick{fill:#666}.title{fill:#222;font-size:13px;font-weight:600}.load{opacity:.35}
.name{fill:#fff;font-weight:600;paint-order:stroke;stroke:#0006;stroke-width:2px}
.end{stroke:#d1495b;stroke-dasharray:3 2}.died{fill:#d1495b;font-size:16px;font-weight:700}
@media(prefers-color-scheme:dark){.back{fill:#15181d}.tick{fill:#9aa4b2}.title{fill:#e6e9ee}}
""".replace("\n", "")


@dataclass(frozen=True, slots=True)
class TimeSeries:
    """A figure over time.

    Attributes:
        name: in the legend.
        points: (seconds, value), in order of time; the value holds until the next.
        color: of the line.
    """

    name: str
    points: tuple[tuple[float, float], ...]
    color: str

    def corners(self) -> list[tuple[float, float]]:
        """Return the points of its steps."""
        corners = list(self.points[:1])
        for (_, before), (t, after) in pairwise(self.points):
            corners += [(t, before), (t, after)] if before != after else [(t, after)]
        return corners


def lines_svg(lines: Sequence[TimeSeries], end_s: float, unit: str) -> str:
    """Return lines over time, as wide as their place.

    Args:
        lines: what to draw; they share both axes.
        end_s: end of the time axis.
        unit: of the values.
    """
    top = max([v for line in lines for _, v in line.points], default=0.0)
    top = (ticks(top, 4) or [1.0])[-1] or 1.0
    top = max(top, max([v for line in lines for _, v in line.points], default=0.0)) * 1.05
    parts = []
    for tick in ticks(end_s):
        x = _percent(tick, end_s)
        anchor = "start" if tick == 0 else "middle"
        parts.append(f'<line x1="{x}" x2="{x}" y1="0" y2="{_HEIGHT_PX}" class="grid"/>')
        parts.append(
            f'<text x="{x}" y="{_HEIGHT_PX + 15}" text-anchor="{anchor}" class="tick">'
            f"{tick:g}</text>"
        )
    for value in ticks(top, 4)[1:]:
        y = _HEIGHT_PX * (1 - value / top)
        parts.append(f'<line x1="0" x2="100%" y1="{y:.1f}" y2="{y:.1f}" class="grid"/>')
        text = f"{value:,g} {escape(unit)}"
        parts.append(f'<text x="2" y="{y - 3:.1f}" class="tick">{text}</text>')
    curves = []
    for line in lines:
        points = " ".join(
            f"{1000 * t / end_s:.2f},{_HEIGHT_PX * (1 - v / top):.2f}" for t, v in line.corners()
        )
        curves.append(
            f'<polyline points="{points}" fill="none" stroke="{line.color}" stroke-width="1.8" '
            'vector-effect="non-scaling-stroke"/>'
        )
    return (
        f'<svg class="plot" width="100%" height="{_HEIGHT_PX + AXIS_PX}" role="img" '
        f'aria-label="{escape(", ".join(n.name for n in lines))}">{"".join(parts)}'
        f'<svg viewBox="0 0 1000 {_HEIGHT_PX}" width="100%" height="{_HEIGHT_PX}" '
        f'preserveAspectRatio="none">{"".join(curves)}</svg></svg>'
    )


def shares_svg(rows: Sequence[Sequence[tuple[str, float, str]]]) -> str:
    """Return a stacked bar per row, as wide as its place.

    Args:
        rows: per bar its parts: name, share of the whole, colour.
    """
    parts = []
    for k, row in enumerate(rows):
        at = 0.0
        for name, share, color in row:
            parts.append(
                f'<rect x="{100 * at:.3f}%" y="{k * ROW_PX + 2}" width="{100 * share:.3f}%" '
                f'height="{BAR_PX}" fill="{color}"><title>{escape(name)}: {100 * share:.1f} %'
                "</title></rect>"
            )
            at += share
    return f'<svg class="plot" width="100%" height="{len(rows) * ROW_PX}">{"".join(parts)}</svg>'


def ticks(end: float, count: int = 8) -> list[float]:
    """Return round numbers from 0 to ``end``, about ``count`` of them."""
    if not end > 0:
        return [0.0]
    raw = end / count
    power = 10.0 ** floor(log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.999)
    return [round(k * step, 12) for k in range(int(end / step + 1e-9) + 1)]


def _percent(value: float, end: float) -> str:
    return f"{100 * value / end:.4f}%"
