"""What is extracted."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, Field


class Facts(BaseModel):
    """People and a year of one piece of text."""

    people: Annotated[list[Annotated[str, Field(max_length=8)]], Field(max_length=2)]
    year: Annotated[int, Field(ge=0, le=2100)]
