"""Registers the bundled applications."""

from __future__ import annotations

from collections.abc import Callable

from samullm_apps.cores import CORES
from samullm_apps.paper import PAPER
from samullm_apps.shapes import SHAPES
from samullm_apps.small import SMALL
from samullm_plugin import ApplicationSource, hookimpl


@hookimpl
def register_applications(register: Callable[[type[ApplicationSource]], None]) -> None:
    """Offer every bundled application."""
    for source in (*PAPER, *SHAPES, *SMALL, *CORES):
        register(source)
