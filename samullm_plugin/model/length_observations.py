"""Output lengths that were seen."""

from __future__ import annotations

from dataclasses import dataclass

from samullm_plugin.model.types import Bools, Ints


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
    censored: Bools
    prompts: tuple[str, ...] | None = None
