"""Standard streams that never end a command (closed, full, read by nobody), and logging to them."""

from __future__ import annotations

import io
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO, cast


class TolerantStream(io.TextIOBase):
    """A text stream that drops what cannot be written.

    Attributes:
        broken: something was dropped.
    """

    def __init__(self, stream: TextIO) -> None:
        """Write to ``stream``."""
        self._stream = stream
        self.broken = False

    def write(self, text: str) -> int:
        """Write as far as possible."""
        try:
            return self._stream.write(text)
        except (OSError, ValueError):  # a ValueError: it is closed
            self.broken = True
            return len(text)

    def flush(self) -> None:
        """Flush as far as possible."""
        try:
            self._stream.flush()
        except (OSError, ValueError):
            self.broken = True

    def isatty(self) -> bool:
        """Return whether it is a terminal."""
        try:
            return self._stream.isatty()
        except ValueError:
            return False

    def fileno(self) -> int:
        """Return its descriptor."""
        return self._stream.fileno()

    @property
    def encoding(self) -> str:  # type: ignore[override]  # a property in the class above as well
        """Return the encoding."""
        return self._stream.encoding

    @property
    def errors(self) -> str | None:  # type: ignore[override]  # as above
        """Return how what it cannot encode is written."""
        return self._stream.errors

    def __getattr__(self, name: str) -> Any:
        """Return what else the stream has."""
        return getattr(self._stream, name)


@contextmanager
def standard_streams() -> Iterator[None]:
    """Have a stdout and a stderr, of which stderr, for people, never fails.

    Descriptors that are closed are opened on the null device first, lest a file of a run gets
    the number of stdout and everything that is printed.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
    before = sys.stdout, sys.stderr
    null = open(os.devnull, "w", encoding="utf-8") if None in before else None  # noqa: SIM115  # closed below
    tolerant = TolerantStream(before[1] or cast("TextIO", null))
    sys.stdout = before[0] or cast("TextIO", null)
    sys.stderr = cast("TextIO", tolerant)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
        if tolerant.broken:
            discard(before[1])
        if null is not None:
            null.close()


def discard(stream: TextIO | None) -> None:
    """Send what a stream still holds nowhere: Python would complain when it closes it."""
    with suppress(OSError, ValueError, AttributeError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, cast("TextIO", stream).fileno())
        os.close(null)


PACKAGE = "samullm_plugin"


class _Stderr(logging.Handler):
    """Writes one line per record to whatever stderr is at that time."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record."""
        sys.stderr.write(self.format(record) + "\n")


def configure_logging(verbosity: int = 0, *, quiet: bool = False) -> None:
    """Send warnings (or more, or only errors) of this project and its plugins to stderr."""
    level = logging.WARNING - 10 * verbosity
    logger = logging.getLogger()
    handler = _Stderr()
    handler.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))
    logger.handlers = [h for h in logger.handlers if not isinstance(h, _Stderr)]
    logger.addHandler(handler)
    for name in (PACKAGE, *(_plugin_packages() if quiet or verbosity else ())):
        logging.getLogger(name).setLevel(logging.ERROR if quiet else level)


def _plugin_packages() -> set[str]:
    """Return the top-level packages of installed plugins, without importing them."""
    from importlib.metadata import EntryPoint

    from samullm_plugin.host.discovery import installed_plugins

    points = [p for p in installed_plugins() if isinstance(p, EntryPoint)]
    return {point.module.partition(".")[0] for point in points}


def is_quiet() -> bool:
    """Return whether people asked for results and errors only."""
    return logging.getLogger(PACKAGE).getEffectiveLevel() >= logging.ERROR
