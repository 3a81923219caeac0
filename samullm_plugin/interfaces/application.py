"""Applications that are built by code rather than read from a file."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

from pydantic import BaseModel

from samullm_plugin.core.application import Application


class ApplicationSource(ABC):
    """Builds an application under a name.

    Example::

        class Pair(ApplicationSource):
            \"\"\"Two models answer the same prompts.\"\"\"

            name = "pair"

            class Config(BaseModel):
                num_requests: int = Field(default=1000, ge=1)

            def build(self) -> Application:
                table = RequestTable.of([100] * self.config.num_requests, max_tokens=256)
                return Application("pair", (ModelNode("a", A, table), ModelNode("b", B, table)))

    Attributes:
        name: what users write, lower-case with hyphens.
        Config: options, as a pydantic model.
        config: the validated options of this instance.
    """

    name: ClassVar[str]
    Config: ClassVar[type[BaseModel]]

    def __init__(self, config: Any) -> None:
        """Keep the options, an instance of the class's own ``Config``."""
        self.config = config

    @abstractmethod
    def build(self) -> Application:
        """Return the application; equal options give an equal application."""
