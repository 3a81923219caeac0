"""Output lengths that users have seen, as JSON lines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator

from samullm_plugin.app.fields import validate
from samullm_plugin.errors import InputError, suggest
from samullm_plugin.files import good_rows
from samullm_plugin.model.lengths import LengthObservations
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
