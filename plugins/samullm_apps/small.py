"""Five small instances, cut from the bundled applications, for which optimality can be proved."""

from __future__ import annotations

from typing import ClassVar

from samullm_apps.paper import (
    MODELS,
    PaperApplication,
    Routing,
    RoutingOptions,
    SourceOptions,
    chain_summary,
    ensembling,
)
from samullm_plugin import Application


class SmallOptions2(SourceOptions):
    """Options of a small instance on two GPUs."""

    gpus: int = 2


class SmallOptions4(SourceOptions):
    """Options of a small instance on four GPUs."""

    gpus: int = 4


class _PartOfEnsembling(PaperApplication):
    """Some models of ``ensembling``, with fewer requests."""

    requests: ClassVar[int]
    max_tokens: ClassVar[int] = 256
    models: ClassVar[tuple[int, ...]]

    def build(self) -> Application:
        """Return the part of ``ensembling``."""
        models = tuple(MODELS[i] for i in self.models)
        return ensembling(self.requests, self.max_tokens, models, self.config.seed, self.name)


class Small1(_PartOfEnsembling):
    """Two chat models answer 400 requests on two GPUs."""

    name = "small-1"
    Config = SmallOptions2
    requests, models = 400, (0, 7)


class Small2(_PartOfEnsembling):
    """Three chat models answer 600 requests on two GPUs."""

    name = "small-2"
    Config = SmallOptions2
    requests, models = 600, (0, 6, 7)


class Small3(_PartOfEnsembling):
    """Four chat models answer 1000 requests on four GPUs."""

    name = "small-3"
    Config = SmallOptions4
    requests, max_tokens, models = 1000, 512, (2, 4, 5, 7)


class Small4(PaperApplication):
    """Twenty documents summarised chunk by chunk and judged, on four GPUs."""

    name = "small-4"
    Config = SmallOptions4

    def build(self) -> Application:
        """Return the part of ``chain-summary``."""
        return chain_summary(20, 2, "vicuna", 900, self.config.seed, self.name)


class Small5(PaperApplication):
    """A fifth of the router benchmark's requests for four of its models, on four GPUs."""

    name = "small-5"
    Config = SmallOptions4

    def build(self) -> Application:
        """Return the part of ``routing``."""
        options = RoutingOptions(max_tokens=1024, share=0.2, seed=self.config.seed)
        app = Routing(options).build()
        return Application(self.name, app.nodes[1:], app.notes)


SMALL: tuple[type[PaperApplication], ...] = (Small1, Small2, Small3, Small4, Small5)
"""The small instances in order."""
