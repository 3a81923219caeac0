"""Progress of a run: a live table on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from contextlib import suppress
from types import TracebackType
from typing import TYPE_CHECKING, Self

from samullm_plugin.host.interfaces.observer import RunEvent
from samullm_plugin.run.progress import RunProgress

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.live import Live

LINE_EVERY_S = 10.0
"""Seconds between plain lines."""

TOLD = ("plan", "engine_failed", "resumed", "drained", "node_finished")
"""Events that get a plain line of their own."""


class RunDisplay:
    """Shows the progress of a run on stderr.

    Attributes:
        quiet: show nothing.
    """

    def __init__(self, progress: RunProgress, *, quiet: bool = False) -> None:
        """Show ``progress`` from ``with`` on.

        Args:
            progress: of the run.
            quiet: show nothing.
        """
        self._progress = progress
        self._live: Live | None = None
        self.quiet = quiet
        self._said_at = time.monotonic()

    def __enter__(self) -> Self:
        """Begin to show."""
        if not self.quiet and sys.stderr.isatty():
            from rich.console import Console
            from rich.live import Live

            self._live = Live(
                get_renderable=self._table,
                console=Console(stderr=True, highlight=False),
                refresh_per_second=4,
                transient=True,
                redirect_stdout=False,
            )
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stop showing."""
        if self._live is not None:
            self._live.stop()

    def take(self, event: RunEvent) -> None:
        """Follow an event of the run."""
        self._progress.take(event)
        if self.quiet or self._live is not None:
            return
        now = time.monotonic()
        if event.kind in TOLD:
            self._say(self._told(event))
        elif now - self._said_at >= LINE_EVERY_S:
            self._said_at = now
            self._say(self.summary())

    def _say(self, text: str) -> None:
        with suppress(OSError, ValueError, AttributeError):  # closed, full, or none: not shown
            sys.stderr.write(f"samullm: {self._progress.now_s:.1f} s: {text}\n")

    def _told(self, event: RunEvent) -> str:
        fields = event.fields
        if event.kind == "node_finished":
            node = next(n for n in self._progress.nodes if n.name == fields["node"])
            failed = f", {node.failed} of {node.total} requests failed" if node.failed else ""
            return f"{node.name} has finished{failed}"
        if event.kind == "engine_failed":
            return f"engine {fields['key']} failed: {fields['reason']}"
        if event.kind == "plan":
            gain = fields.get("gain_s")
            return (
                "planned" if gain is None else f"planned again: about {float(str(gain)):.0f} s less"
            )
        return f"{event.kind}; {fields['note']}" if fields.get("note") else event.kind

    def summary(self) -> str:
        """Return how far the run is, in a line."""
        progress = self._progress
        parts = [f"stage {progress.stage}", f"{progress.settled} of {progress.total} requests"]
        if (left := remaining_text(progress)) is not None:
            parts.append(f"{left} left")
        return ", ".join(parts)

    def _table(self) -> RenderableType:
        from rich import box
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        progress = self._progress
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for name in ("Node", "Requests", "Tokens/s", "Engines"):
            table.add_column(name, justify="left" if name == "Node" else "right")
        for node in progress.nodes:
            rate = node.tokens_per_s(progress.now_s)
            failed = f" ({node.failed} failed)" if node.failed else ""
            table.add_row(
                node.name,
                f"{node.settled}/{node.total}{failed}",
                "-" if rate is None else f"{rate:,.0f}",
                str(node.engines) if node.engines else "-",
            )
        return Group(Text(self.summary()), table)


def remaining_text(progress: RunProgress) -> str | None:
    """Return the remaining time with its uncertainty, or None if nothing is known."""
    left = progress.remaining_s()
    if left is None:
        return None
    least, most = left
    if most - least < 0.05 * most + 0.5:
        return f"{most:.0f} s"
    return f"{least:.0f} to {most:.0f} s"
