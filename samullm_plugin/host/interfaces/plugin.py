"""What all plugin classes have in common."""

from __future__ import annotations

from typing import ClassVar

from pydantic import BaseModel, ConfigDict


class NoOptions(BaseModel):
    """Options of a plugin that has none."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Plugin:
    """Base of every plugin kind.

    Attributes:
        name: what users write; lower case letters, digits and hyphens.
        Config: pydantic model of the options; one that forbids extra fields names misspelt ones.
        config: the validated options of this instance.
    """

    name: ClassVar[str]
    Config: ClassVar[type[BaseModel]] = NoOptions

    def __init__(self, config: BaseModel | None = None) -> None:
        """Keep the options; without any, the defaults.

        Args:
            config: an instance of ``Config``.
        """
        self.config = self.Config() if config is None else config
