"""Registers the bundled applications."""

from __future__ import annotations

from collections.abc import Callable

from samullm_apps.chain_summary import ChainSummary, Mixed
from samullm_apps.cores import CORES
from samullm_apps.ensembling import Ensembling
from samullm_apps.routing import Routing
from samullm_apps.shapes import DocumentQuestions, FilterVote, MapReduce, Vote
from samullm_apps.small import SMALL
from samullm_plugin import ApplicationSource, hookimpl


@hookimpl
def register_applications(register: Callable[[type[ApplicationSource]], None]) -> None:
    """Offer every bundled application."""
    sources: tuple[type[ApplicationSource], ...]
    sources = (
        Ensembling,
        Routing,
        ChainSummary,
        Mixed,
        MapReduce,
        Vote,
        FilterVote,
        DocumentQuestions,
        *SMALL,
        *CORES,
    )
    for source in sources:
        register(source)
