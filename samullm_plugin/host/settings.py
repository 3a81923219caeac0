"""Settings from the environment: every ``SAMULLM_*`` variable this project reads.

A command-line option beats the environment, which beats a file, which beats the default. The table
in ``docs/settings.md`` lists them all.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Annotated

from pydantic import Field, ValidationError, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from samullm_plugin.errors import InputError, describe_validation, suggest

PREFIX = "SAMULLM_"

Names = Annotated[tuple[str, ...], NoDecode]

logger = logging.getLogger(__name__)


class Settings(BaseSettings):
    """The settings; each field is the variable of its upper-case name behind ``SAMULLM_``."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, frozen=True, extra="ignore")

    load_plugins: Names | None = Field(
        default=None,
        description="Load these plugins only, comma separated: names of entry points, of "
        "distributions, or `distribution:entry`. The shipped ones are "
        "`samullm-plugin`. Empty: none.",
    )
    disable_plugins: Names = Field(
        default=(), description="Do not load these plugins; names as in `SAMULLM_LOAD_PLUGINS`."
    )
    trace_plugins: bool = Field(
        default=False, description="Log every hook call with its arguments to stderr."
    )

    third_party_limit_s: float = Field(
        default=300.0,
        gt=0,
        description="Seconds after which a third party's schedule, sample or fit call is ended.",
    )

    output_store: Path | None = Field(
        default=None,
        description="File in which outputs are kept for later runs (`--reuse cache`). By default "
        "`samullm/outputs.sqlite` in the user's cache folder (`XDG_CACHE_HOME`, else `~/.cache`).",
    )

    cache_dir: Path | None = Field(
        default=None,
        description="Folder for what this machine keeps between runs: what runs have measured, "
        "counts of tokens, and what transformers and vLLM have said of models. `~/.cache/samullm` "
        "by default.",
    )

    @field_validator("load_plugins", "disable_plugins", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        """Split a comma-separated list."""
        if isinstance(value, str):
            return tuple(part.strip() for part in value.split(",") if part.strip())
        return value


def read_settings() -> Settings:
    """Return the settings of this process's environment, and warn of variables nobody reads.

    Raises:
        InputError: naming the variable that cannot be understood.
    """
    known = {PREFIX + name.upper() for name in Settings.model_fields}
    for name in sorted(os.environ):
        if name.startswith(PREFIX) and name not in known:
            logger.warning("%s is set, but no setting has this name%s", name, suggest(name, known))
    try:
        return Settings()
    except ValidationError as error:
        names = ", ".join(PREFIX + str(item["loc"][0]).upper() for item in error.errors())
        raise InputError(f"environment variable {names}: {describe_validation(error)}") from error
