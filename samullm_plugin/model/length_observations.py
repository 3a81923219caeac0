"""Output lengths that were seen."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class LengthObservations:
    """Output lengths that were seen, for one model and task.

    Attributes:
        model: name of the model.
        task: label, may be empty.
        prompt_tokens: shape ``(n,)``.
        output_tokens: lengths seen, shape ``(n,)``.
        censored: the output was cut by a limit or is still in flight: it is at least this long,
            shape ``(n,)``.
        prompts: prompt texts, one per observation; None: not kept.
    """

    model: str
    task: str
    prompt_tokens: Ints
    output_tokens: Ints
    censored: NDArray[np.bool_]
    prompts: tuple[str, ...] | None = None
