"""Applications that are built by code rather than read from a file."""

from __future__ import annotations

from abc import ABC, abstractmethod

from samullm_plugin.core.application import Application
from samullm_plugin.interfaces.plugin import Plugin


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
        """Return the application; equal options give an equal application."""
