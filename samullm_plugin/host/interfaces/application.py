"""Applications that are built by code rather than read from a file."""

from __future__ import annotations

from abc import ABC, abstractmethod

from samullm_plugin.host.interfaces.plugin import Plugin
from samullm_plugin.model.application import Application
from samullm_plugin.model.cluster import Cluster
from samullm_plugin.model.types import Ints


class ApplicationSource(Plugin, ABC):
    """Builds an application under a name.

    A complete plugin::

        from pydantic import BaseModel, Field
        from samullm_plugin import ApplicationSource, hookimpl


        class PairOptions(BaseModel, extra="forbid"):
            num_requests: int = Field(default=1000, ge=1)


        class Pair(ApplicationSource):
            '''Two models answer the same prompts.'''

            name = "pair"
            Config = PairOptions

            def build(self):
                table = RequestTable.of([100] * self.config.num_requests, max_tokens=256)
                return Application("pair", (ModelNode("a", A, table), ModelNode("b", B, table)))


        @hookimpl
        def register_applications(register):
            register(Pair)
    """

    @abstractmethod
    def build(self) -> Application:
        """Return the application; equal options give an equal application.

        What had to be assumed about it is said in its ``notes``.
        """

    def cluster(self) -> Cluster | None:
        """Return the cluster the application is meant for; None: any."""
        return None

    def output_tokens(self) -> tuple[Ints, ...] | None:
        """Return the output lengths where they are known before the run; None: they are not.

        One array per node of what :meth:`build` returns, of shape ``(n,)``.
        """
        return None
