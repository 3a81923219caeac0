"""Output lengths measured on one's own prompts: what ``samullm profile lengths`` writes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator

from samullm_plugin.app.fields import validate
from samullm_plugin.errors import InputError
from samullm_plugin.files import read_json, save, to_json
from samullm_plugin.model.lengths import LengthDistribution, LengthObservations

FORMAT = "samullm-lengths-1"

_QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


@dataclass(frozen=True, slots=True, eq=False)
class LengthProfile:
    """Measured output lengths.

    Attributes:
        observations: by model and task.
        source: how and when they were measured, for people.
    """

    observations: tuple[LengthObservations, ...]
    source: str


class _ModelLengths(BaseModel):
    """Outputs of one model and task; ``summary`` is for people and not read."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    model: str = Field(min_length=1)
    task: str = ""
    prompt_tokens: list[Annotated[int, Field(ge=0)]] = Field(min_length=1)
    output_tokens: list[Annotated[int, Field(ge=1)]]
    censored: list[bool]

    @model_validator(mode="after")
    def _same_length(self) -> _ModelLengths:
        if not len(self.prompt_tokens) == len(self.output_tokens) == len(self.censored):
            raise ValueError(
                f"prompt_tokens, output_tokens and censored have {len(self.prompt_tokens)}, "
                f"{len(self.output_tokens)} and {len(self.censored)} entries; they must be as many"
            )
        return self


class _File(BaseModel):
    """The file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal["samullm-lengths-1"]
    written_by: str = ""
    source: str
    lengths: list[_ModelLengths] = Field(min_length=1)


def fitted(seen: LengthObservations) -> LengthDistribution:
    """Return the product-limit estimate of measured lengths (Kaplan and Meier 1958).

    An output that ended at its limit counts as at least that long, never as a short one.
    """
    return LengthDistribution.kaplan_meier(seen.output_tokens, seen.censored)


def summary(seen: LengthObservations) -> dict[str, object]:
    """Return figures for people: counts and quantiles; a quantile beyond all limits is None."""
    distribution = fitted(seen)
    values = distribution.quantile(np.array(_QUANTILES)).tolist()
    longest = int(seen.output_tokens.max())
    return {
        "outputs": len(seen.output_tokens),
        "cut_at_limit": int(seen.censored.sum()),
        "longest": longest,
        "quantiles": {
            f"{q:g}": v if v <= longest else None for q, v in zip(_QUANTILES, values, strict=True)
        },
    }


def write_length_profile(
    path: Path, observations: Sequence[LengthObservations], source: str
) -> None:
    """Write measured lengths, whole or not at all; texts are not kept.

    Raises:
        InputError: if the file cannot be written.
    """
    record = {
        "format": FORMAT,
        "written_by": f"samullm-plugin {version('samullm-plugin')}",
        "source": source,
        "lengths": [
            {
                "model": seen.model,
                "task": seen.task,
                "summary": summary(seen),
                "prompt_tokens": seen.prompt_tokens.tolist(),
                "output_tokens": seen.output_tokens.tolist(),
                "censored": seen.censored.tolist(),
            }
            for seen in observations
        ],
    }
    save(path, [to_json(record), b"\n"])


def read_length_profile(path: Path) -> LengthProfile:
    """Return measured lengths.

    Raises:
        InputError: naming the file, the field and the remedy.
    """
    missing = "there is no such length profile; make it with `samullm profile lengths`"
    value = read_json(path, missing)
    found = value.get("format") if isinstance(value, dict) else None
    if found != FORMAT:
        raise InputError(
            f"{path}: format: {found!r} instead of {FORMAT}; give a file that `samullm profile "
            "lengths` wrote"
        )
    file = validate(_File, value, str(path))
    return LengthProfile(
        tuple(
            LengthObservations(
                g.model,
                g.task,
                np.array(g.prompt_tokens, np.int64),
                np.array(g.output_tokens, np.int64),
                np.array(g.censored, bool),
            )
            for g in file.lengths
        ),
        file.source,
    )
