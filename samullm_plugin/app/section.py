"""The base of everything a user writes in ``app.yaml``."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

LARGEST = 2**31 - 1
"""Largest count of tokens or of anything else, and largest token id."""

Count = Annotated[int, Field(ge=1, le=LARGEST)]
Natural = Annotated[int, Field(ge=0, le=LARGEST)]
NumGpus = Annotated[int, Field(le=65_536)]


class Section(BaseModel):
    """Base of all parts of the file: unknown fields are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)
