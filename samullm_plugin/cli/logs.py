"""Logging of the command line, the only place that configures any."""

from __future__ import annotations

import logging
import sys

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
