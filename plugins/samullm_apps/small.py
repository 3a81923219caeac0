"""Five small instances, cut from the bundled applications, for which optimality can be proved."""

from __future__ import annotations

from samullm_apps.chain_summary import chain_summary
from samullm_apps.ensembling import MODELS, ensembling
from samullm_apps.paper import PaperApplication, SourceOptions
from samullm_apps.routing import Routing, RoutingOptions
from samullm_plugin import Application


class SmallOptions2(SourceOptions):
    """Options of a small instance on two GPUs."""

    gpus: int = 2


class SmallOptions4(SourceOptions):
    """Options of a small instance on four GPUs."""

    gpus: int = 4


def named(name: str, app: Application) -> Application:
    """Return the application under another name."""
    return Application(name, app.nodes, app.notes)


class Small1(PaperApplication):
    """Two chat models answer 400 requests on two GPUs."""

    name = "small-1"
    Config = SmallOptions2

    def build(self) -> Application:
        """Return the part of ``ensembling``."""
        models = (MODELS[0], MODELS[7])
        return named(self.name, ensembling(400, 256, models, self.config.seed))


class Small2(PaperApplication):
    """Three chat models answer 600 requests on two GPUs."""

    name = "small-2"
    Config = SmallOptions2

    def build(self) -> Application:
        """Return the part of ``ensembling``."""
        models = (MODELS[0], MODELS[6], MODELS[7])
        return named(self.name, ensembling(600, 256, models, self.config.seed))


class Small3(PaperApplication):
    """Four chat models answer 1000 requests on four GPUs."""

    name = "small-3"
    Config = SmallOptions4

    def build(self) -> Application:
        """Return the part of ``ensembling``."""
        models = (MODELS[2], MODELS[4], MODELS[5], MODELS[7])
        return named(self.name, ensembling(1000, 512, models, self.config.seed))


class Small4(PaperApplication):
    """Twenty documents summarised chunk by chunk and judged, on four GPUs."""

    name = "small-4"
    Config = SmallOptions4

    def build(self) -> Application:
        """Return the part of ``chain-summary``."""
        return named(self.name, chain_summary(20, 2, "vicuna", 900, self.config.seed))


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
