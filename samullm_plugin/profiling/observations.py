"""Output lengths that users have seen: JSON lines, and what ``samullm profile lengths`` writes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator

from samullm_plugin.app.fields import validate
from samullm_plugin.errors import InputError, suggest
from samullm_plugin.files import good_rows, read_json, save, to_json
from samullm_plugin.model.lengths import LengthDistribution, LengthObservations
from samullm_plugin.model.types import Ints


class ObservationLine(BaseModel):
    """One line of an observations file; fields of other names are left alone."""

    model_config = ConfigDict(extra="allow", frozen=True)

    model: str = Field(min_length=1)
    prompt_tokens: int = Field(ge=0, strict=True)
    output_tokens: int = Field(ge=1, strict=True)
    task: str = ""
    prompt: str | None = None
    max_tokens: int | None = Field(default=None, ge=1, strict=True)
    censored: bool | None = None

    @model_validator(mode="after")
    def _within_limit(self) -> ObservationLine:
        if self.max_tokens is not None and self.output_tokens > self.max_tokens:
            raise ValueError(
                f"output_tokens is {self.output_tokens}, above max_tokens {self.max_tokens}"
            )
        return self


@dataclass(frozen=True, slots=True, eq=False)
class ObservedLengths:
    """What was seen of one model and task.

    Attributes:
        observations: as estimators learn from them.
        max_tokens: limits of the outputs; 0 where the file does not say, shape ``(n,)``.
    """

    observations: LengthObservations
    max_tokens: Ints

    def __len__(self) -> int:
        """Return the number of observations."""
        return len(self.max_tokens)

    def take(self, rows: Ints) -> ObservedLengths:
        """Return some of the observations."""
        seen = self.observations
        return ObservedLengths(
            LengthObservations(
                seen.model,
                seen.task,
                seen.prompt_tokens[rows],
                seen.output_tokens[rows],
                seen.censored[rows],
                None if seen.prompts is None else tuple(seen.prompts[r] for r in rows),
            ),
            self.max_tokens[rows],
        )


def read_observations(paths: Sequence[Path]) -> tuple[ObservedLengths, ...]:
    """Return the observations of JSONL files, grouped by model and task.

    A line has ``model``, ``prompt_tokens``, ``output_tokens`` and, if known, ``task``, ``prompt``
    (the text), ``max_tokens`` and ``censored`` (the output was cut or is not finished; by default,
    whether it reached ``max_tokens``). Texts are kept only if every line of a group has one.

    Raises:
        InputError: naming file, line and field.
    """
    groups: dict[tuple[str, str], list[ObservationLine]] = {}
    for path in paths:
        for line in _read(path):
            groups.setdefault((line.model, line.task), []).append(line)
    return tuple(_group(model, task, lines) for (model, task), lines in groups.items())


def _read(path: Path) -> list[ObservationLine]:
    lines = []
    for where, value in good_rows(path, "observations"):
        line = validate(ObservationLine, value, where)
        for name in line.model_extra or ():
            if close := suggest(name, ObservationLine.model_fields):
                raise InputError(f"{where}: unknown field {name!r}{close}")
        lines.append(line)
    if not lines:
        raise InputError(f"{path}: it holds no observations")
    return lines


def _group(model: str, task: str, lines: Sequence[ObservationLine]) -> ObservedLengths:
    texts = [line.prompt for line in lines if line.prompt is not None]
    return ObservedLengths(
        LengthObservations(
            model,
            task,
            np.array([line.prompt_tokens for line in lines], np.int64),
            np.array([line.output_tokens for line in lines], np.int64),
            np.array(
                [
                    line.output_tokens == line.max_tokens
                    if line.censored is None
                    else line.censored
                    for line in lines
                ]
            ),
            tuple(texts) if len(texts) == len(lines) else None,
        ),
        np.array([line.max_tokens or 0 for line in lines], np.int64),
    )


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
